"""The layout's rules, on the notebooks themselves (DESIGN: `examples/delivery/100_capture.ipynb` is the model)."""

import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tempfile
import tokenize
from functools import cache
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted((ROOT / "nbs").rglob("[0-9][0-9][0-9]_*.ipynb"))
PAGES = sorted((ROOT / "nbs").rglob("*.ipynb"))  # the home page and the benchmarks too
WINGS = (
    "core",
    "delivery",
    "synth",
    "photos",
    "dataset",
    "models",
    "training",
    "evaluation",
    "deployment",
)  # by the first digit; 9 is what stands above all wings
OPENED_ON_A_RUN = ("450_triage",)  # no stages, but with parameters: a command opens them on a run
BY_NAME = pytest.mark.parametrize("path", NBS, ids=lambda p: p.stem)


@cache
def notebook(path: Path) -> nbformat.NotebookNode:
    "Read once; no test changes it."
    return nbformat.read(path, 4)


def cells(path: Path, kind: str = "code") -> list:
    return [c for c in notebook(path).cells if c.cell_type == kind]


@cache
def exported(path: Path) -> list[str]:
    return [c.source for c in cells(path) if re.match(r"#\|\s*export\b", c.source)]


def module_of(path: Path) -> str:
    wing = path.parent.relative_to(ROOT / "nbs").parts
    return ".".join([*wing, re.sub(r"^\d+_", "", path.stem)])


def number(path: Path) -> str:
    return path.stem.split("_")[0]


@BY_NAME
def test_file_name_is_the_module(path):
    first = next(c.source for c in cells(path) if "default_exp" in c.source)
    assert re.search(r"#\|\s*default_exp\s+(\S+)", first)[1] == module_of(path)
    assert re.fullmatch(r"\d{3}_[a-z]+", path.stem), (
        "three digits, of which the first is the wing, and the module's name"
    )
    wing = int(path.stem[0])
    assert path.parent == (ROOT / "nbs" if wing == len(WINGS) else ROOT / "nbs" / WINGS[wing])


def test_no_two_notebooks_share_a_number():
    numbers = [number(path) for path in NBS]
    assert len(numbers) > 100 and len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_opens_as_literature(path):
    first = notebook(path).cells[0]
    assert first.cell_type == "markdown"
    lines = [line for line in first.source.splitlines() if line.strip()]
    assert lines[0].startswith("# ") and lines[1].startswith("> "), "title, one line, why"
    assert len(lines) == 2, "nbdev takes this whole cell as front matter: prose in it never reaches the site"
    words = sum(len(c.source.split()) for c in cells(path, "markdown"))
    assert words > 60, "a notebook that is only code cells is not done"


@BY_NAME
def test_answers_never_import_training(path):
    if module_of(path).split(".")[0] in ("evaluation", "deployment"):
        assert not any(re.search(r"(from|import) pillsnap\.training", src) for src in exported(path))


@BY_NAME
def test_imports_stand_alone(path):
    for c in cells(path):
        src = re.sub(r"^\s*[%!].*$", "", c.source, flags=re.M)
        body = ast.parse(src).body
        kinds = {
            isinstance(n, (ast.Import, ast.ImportFrom))
            for n in body
            if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
        }
        assert kinds != {True, False}, f"imports share a cell with code:\n{c.source[:300]}"


@BY_NAME
def test_a_logger_is_named_as_its_module(path):
    "In a notebook __name__ is __main__, so the name is written out."
    for src in exported(path):
        for name in re.findall(r"^logger = .*$", src, flags=re.M):
            assert name == f'logger = logging.getLogger("pillsnap.{module_of(path)}")'


@BY_NAME
def test_no_star_imports_in_exported_code(path):
    assert not any(re.search(r"import \*", s) for s in exported(path))


@BY_NAME
@pytest.mark.spec("BX15")
def test_a_job_has_one_parameters_cell(path):
    nb = notebook(path)
    is_stage = any(c.cell_type == "markdown" and "## Stage job" in c.source for c in nb.cells)
    tagged = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == (1 if is_stage or path.stem in OPENED_ON_A_RUN else 0)
    if is_stage:
        assert nb.metadata.kernelspec.language == "python", "papermill by hand needs the kernel's name"
        lines = tagged[0].source.splitlines()
        for node in ast.parse(tagged[0].source).body:
            assert isinstance(node, ast.AnnAssign), f"a typed literal: {ast.unparse(node)}"
            assert re.search(r"#\s*\S", lines[node.end_lineno - 1]), f"with a comment: {ast.unparse(node)}"
        tail = [c.source for c in nb.cells if c.cell_type == "code"]
        i = tail.index(tagged[0].source)
        job = re.fullmatch(r"from pillsnap\.\w+\.\w+ import (\w+Job)", tail[i + 1])
        assert job and f"job = {job[1]}(" in tail[i + 2] and "res = job.run()" in tail[i + 3]
        assert any("assert" in s or "test_" in s for s in tail[i + 4 :]), "the contract: assertions true at any scale"
        left_out = [c.source for c in nb.cells if "skip-execution" in c.metadata.get("tags", [])]
        assert not set(left_out) & set(tail[i:]), "what follows the parameters is the job: it runs whole"
        assert not [s for s in left_out if re.match(r"#\|\s*export\b", s)], "a job may need what is exported"
        assert left_out, "a demo before the parameters costs each job its time: tag it skip-execution"


def test_the_six_jobs_are_the_pipeline_and_the_others_stand_aside():
    from pillsnap.cli import ASIDE, IMPORT, PIPELINE

    stages = {p.stem for p in NBS if any("## Stage job" in c.source for c in cells(p, "markdown"))}
    assert stages == {Path(s.notebook).name for s in (*PIPELINE, *ASIDE, IMPORT)} and [s.name for s in ASIDE] == [
        "audit",
        "retrieval",
        "segmentation",
    ]
    assert len([s for s in PIPELINE if s.strategy in ("", "sequential")]) == 6


@BY_NAME
def test_nothing_exports_itself_and_nothing_reads_the_console(path):
    for c in cells(path):
        assert "nbdev_export(" not in c.source
        assert not re.search(r"(?<![\w.])input\(", c.source), "papermill has no console to read from (BX15)"


@cache
def public_functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    "Functions at the top of exported cells."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    tops = [node for src in exported(path) for node in ast.parse(src).body if isinstance(node, kinds)]
    return [node for node in tops if not node.name.startswith("_")]


@BY_NAME
def test_public_functions_say_what_they_do(path):
    for node in public_functions(path):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
        for a in [*node.args.args, *node.args.kwonlyargs]:
            assert a.annotation is not None, f"{node.name}({a.arg}) has no type"


@BY_NAME
def test_public_parameters_are_documented_where_they_stand(path):
    import importlib

    from fastcore.docments import docments

    if module_of(path) == "cli":
        return  # typer's options carry their help text
    mod = importlib.import_module(f"pillsnap.{module_of(path)}")
    names = {n.name for n in public_functions(path) if not any(".command(" in ast.unparse(d) for d in n.decorator_list)}
    for name in sorted(names):
        f = inspect.unwrap(getattr(mod, name, None))  # what a cache stands in front of
        if f is None or getattr(f, "__module__", None) != mod.__name__:
            continue
        # docments finds no comment of `**limits`
        in_the_source = re.findall(r"\*\*(\w+)\b.*# \S", inspect.getsource(f))
        undocumented = [
            k
            for k, v in docments(f, full=True, returns=False).items()
            if not v["docment"] and k not in ("self", "cls", "args", "kwargs", *in_the_source)
        ]
        assert not undocumented, f"{name}: {undocumented} have no comment"


def comments_of_parameters(src: str) -> list[str]:
    """The comments that nbdev prints beside a signature: those of parameters, of what is returned, and of a class's
    fields."""
    code = re.sub(r"^(\s*)[%!].*$", r"\1pass", src, flags=re.M)
    rows = set()
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)):
            rows |= set(range(n.lineno, n.body[0].lineno))
        if isinstance(n, ast.ClassDef):
            rows |= {line for b in n.body if isinstance(b, ast.AnnAssign) for line in range(b.lineno, b.end_lineno + 1)}
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return [t.string for t in tokens if t.type == tokenize.COMMENT and t.start[0] in rows]


@BY_NAME
def test_comments_of_parameters_hold_no_backticks(path):
    "nbdev makes a link of a name in backticks; in a signature, which is code, the link stands as raw Markdown."
    ticked = [text for c in cells(path) for text in comments_of_parameters(c.source) if "`" in text]
    assert not ticked, f"no backticks in the comments of parameters: {ticked}"


@BY_NAME
def test_committed_outputs_are_clean(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert "widgets" not in raw["metadata"]
    for c in raw["cells"]:
        for o in c.get("outputs", []):
            assert o["output_type"] != "error"
            assert "application/vnd.jupyter.widget-view+json" not in o.get("data", {})
    assert path.stat().st_size < 1_500_000, "outputs are small"
    here = [
        p for p in (Path.home(), ROOT, ROOT.parent) if p != Path(tempfile.gettempdir())
    ]  # a checkout may lie in the folder that smoke runs write to
    assert not any(f"{p}/" in json.dumps(raw) for p in here), "no path of somebody's machine"


def test_export_leaves_the_package_unchanged(tmp_path):
    "What nbdev would export is what is committed."
    from nbdev.export import nb_export

    for p in NBS:
        nb_export(str(p), lib_path=str(tmp_path / "pillsnap"))
    for p in NBS:
        rel = module_of(p).replace(".", "/") + ".py"

        def strip(s):
            return re.sub(
                r"# %% \S*?(nbs/\S+)", r"# %% \1", re.sub(r"File to edit: \S*?(nbs/\S+)", r"File to edit: \1", s)
            )

        assert strip((tmp_path / "pillsnap" / rel).read_text(encoding="utf-8")) == strip(
            (ROOT / "pillsnap" / rel).read_text(encoding="utf-8")
        ), f"{p.stem} was edited and not exported"


HEAVY = ("torch", "fastai", "ultralytics", "timm", "torchvision", "matplotlib", "papermill")
LIGHT = [
    "pillsnap.core.settings",
    "pillsnap.core.config",
    "pillsnap.dataset.overlay",
    "pillsnap.dataset.duplicates",
    "pillsnap.dataset.splitfiles",
    "pillsnap.dataset.splits",
    "pillsnap.dataset.audit",
    "pillsnap.dataset.triage",
    "pillsnap.core.records",
    "pillsnap.core.jobs",
    "pillsnap.core.runner",
    "pillsnap.synth.writer",
    "pillsnap.delivery.truth",
    "pillsnap.photos.images",
    "pillsnap.photos.boxes",
    "pillsnap.models.pipeline",
    "pillsnap.deployment.runtime",
    "pillsnap.evaluation.gates",
    "pillsnap.evaluation.advisor",
]


def test_light_modules_stay_light():
    "These import neither torch nor what stands on it (deployment runs without; the pure rules are pure)."
    code = (
        "import importlib, sys\n"
        f"for module in {LIGHT!r}:\n"
        "    importlib.import_module(module)\n"
        f"    if bad := [m for m in {HEAVY!r} if m in sys.modules]: sys.exit(f'{{module}} imports {{bad}}')"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stdout + r.stderr


def test_only_the_detectors_modules_import_ultralytics():
    "AGPL-3.0: imported in the detector's modules alone, inside functions."
    for p in NBS:
        for src in exported(p):
            for line in src.splitlines():
                if re.search(r"(from|import) ultralytics", line):
                    assert module_of(p) in ("models.yolo", "training.detectordata", "training.detectortrainer"), (
                        f"{p.stem} imports ultralytics"
                    )
                    assert line.startswith(" "), f"{p.stem} imports ultralytics when it is imported itself"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_pictures_have_words(path):
    """Quarto gives an output picture no alt text of its own: `#| fig-alt:` at the top of the cell does;
    `![words](picture)` in prose."""
    for c in notebook(path).cells:
        if c.cell_type == "markdown":
            assert not re.search(r"!\[\s*\]\(", c.source), c.source[:200]
            assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", c.source))
        elif not c.source.startswith("#| hide"):
            data = [o.data for o in c.outputs if "data" in o]
            if any(kind.startswith("image/") for d in data for kind in d):
                assert re.match(r'(#\|.*\n)*#\| fig-alt: "[^"]{10,}"\n', c.source), (
                    f"what is in the picture? {c.source[:200]}"
                )
            tags = [tag for d in data for tag in re.findall(r"<img[^>]*>", d.get("text/html", ""))]
            assert all("alt=" in tag for tag in tags), c.source[:200]


@BY_NAME
def test_no_marker_stands_on_imports_alone(path):
    "A cell that only imports proves no row of the contract."
    for source in (c.source for c in cells(path) if c.source.startswith("# spec:")):
        body = ast.parse(re.sub(r"^[%!].*$", "", source, flags=re.M)).body
        assert not all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body), source
