"""The web site as Quarto gets it: nbdev's processed pages of a copy. Quarto itself is not needed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from terminal import search_path

ROOT = Path(__file__).resolve().parents[1]
SITE = "https://pillsnap.github.io/pillsnap/"
SOURCE = "https://github.com/pillsnap/pillsnap/blob/main/"
COPIED = (
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "_quarto.yml",
    "nbs",
    "pillsnap",
    "configs",
)
LOST = "This sentence stands in the cell of the title."


# nbdev_proc_nbs in one process that leaves without the clean-up of IPython: every page leaves a shell
# behind, and each shell looks through the whole memory for garbage at the end, 100 s in all
PAGES_OF_THE_SITE = r"""
import os, sys
from nbdev.serve import proc_nbs
proc_nbs(n_workers=0, force=True, file_re=r"\.(?:ipynb|qmd|html)$")
sys.stdout.flush()
os._exit(0)
"""


def process(copy: Path) -> None:
    """Run nbdev's processing on a copy. nbdev installs things where it finds no `quarto`: the one it finds here does
    nothing."""
    quarto = copy / "bin" / "quarto"
    quarto.parent.mkdir()
    quarto.write_text("#!/bin/sh\nexit 1\n")
    quarto.chmod(0o755)
    path = os.pathsep.join([str(quarto.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": search_path(copy), "PYTHONWARNINGS": "ignore"}
    r = subprocess.run([sys.executable, "-c", PAGES_OF_THE_SITE], cwd=copy, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    "The processed pages, and one page more whose prose stands in the cell of the title."
    copy = tmp_path_factory.mktemp("site")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        else:
            shutil.copy(source, copy / name)
    first = new_markdown_cell(f"# A page\n\n> What it is for.\n\n{LOST}")
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(new_notebook(cells=[first, new_code_cell("1 + 1")], metadata=kernel), copy / "nbs" / "zz_lost.ipynb")
    process(copy)
    return copy


def pages(site: Path) -> list[str]:
    return sorted(
        p.relative_to(site / "nbs").as_posix() for p in (site / "nbs").rglob("*.ipynb") if p.name != "zz_lost.ipynb"
    )


def read(path: Path) -> nbformat.NotebookNode:
    "A notebook as it is: processed pages hold more than the format allows."
    notebook = nbformat.from_dict(json.loads(path.read_text(encoding="utf-8")))
    for cell in notebook.cells:
        cell.source = "".join(cell.source)
    return notebook


def cells(path: Path, *kinds: str) -> list:
    return [c for c in read(path).cells if c.cell_type in kinds]


def words(text: str) -> str:
    "Prose without the links that nbdev adds, on one line."
    return re.sub(r"\s+", " ", re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", text)).strip()


def lost_prose(source: Path, processed: Path) -> list[str]:
    """Paragraphs of a notebook that its processed page does not hold; the title and the line below it become its
    front matter."""
    head, *rest = cells(source, "markdown")
    title, description = re.search(r"^# +(.+)", head.source, re.M)[1], re.search(r"^> +(.+)", head.source, re.M)[1]
    front = next(yaml.safe_load(c.source.strip().strip("-")) for c in cells(processed, "raw"))
    assert (words(front["title"]), words(front["description"])) == (words(title), words(description))
    shown = words("\n".join(c.source for c in cells(processed, "markdown")))
    below = "\n".join(line for line in head.source.splitlines() if not line.startswith(("# ", "> ")))
    paragraphs = [p for text in (below, *(c.source for c in rest)) for p in re.split(r"\n\s*\n", text) if p.strip()]
    return [p for p in paragraphs if words(p) not in shown and not p.strip().endswith(" -")]


def test_all_prose_reaches_the_site(site):
    "Introductions above all: nbdev takes the whole first cell of a notebook as front matter."
    lost = {name: gone for name in pages(site) if (gone := lost_prose(site / "nbs" / name, site / "_proc" / name))}
    assert lost == {}
    assert lost_prose(site / "nbs" / "zz_lost.ipynb", site / "_proc" / "zz_lost.ipynb") == [LOST], (
        "this test would not see a loss"
    )
    home = cells(site / "_proc" / "index.ipynb", "markdown")
    assert sum(len(c.source.split()) for c in home) > 500, "the home page is the README"


def shown_texts(path: Path) -> list[str]:
    "Markdown and HTML of a page: prose, and what its cells show."
    texts = []
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            texts.append(cell.source)
        for out in cell.get("outputs", []):
            texts += ["".join(v) for k, v in out.get("data", {}).items() if k in ("text/markdown", "text/html")]
    return texts


def links(path: Path) -> set[str]:
    "Where a page's links and pictures point, in Markdown and in HTML; data within the page is no link."
    found = set()
    for text in shown_texts(path):
        text = re.sub(r"```.*?```", "", text, flags=re.S)
        found |= set(re.findall(r"\]\(([^)\s]+)\)", text)) | set(re.findall(r"(?:href|src)=[\"']([^\"']+)", text))
    return {link for link in found if not link.startswith("data:")}


def anchors(path: Path) -> set[str]:
    "The names that pandoc gives a page's headings."
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+)$", "\n".join(shown_texts(path)), re.M):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower().replace("`", "")
        names.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", text).strip())))
    return names


def dead(site: Path, link: str, page: str, outputs: dict[str, str], known: dict[str, set[str]]) -> bool:
    "Whether a link of a page leads nowhere; addresses of other sites are not asked."
    target, _, anchor = link.partition("#")
    if link.startswith(SOURCE):
        return not (ROOT / target.removeprefix(SOURCE)).exists()
    if target.startswith(SITE):
        target = outputs.get(target.removeprefix(SITE), "no such page")
    elif re.match(r"\w+:", target):
        return False
    elif target:
        target = os.path.normpath(Path(page).parent / target)
    target = target or page
    if not (site / "_proc" / target).is_file() or target.endswith(".html"):
        return True
    return bool(anchor) and target.endswith(".ipynb") and anchor.lower() not in known[target]


def test_links_lead_somewhere(site):
    front = {
        name: yaml.safe_load(cells(site / "_proc" / name, "raw")[0].source.strip().strip("-")) for name in pages(site)
    }
    outputs = {(Path(name).parent / f["output-file"]).as_posix(): name for name, f in front.items()}
    assert outputs["photos/png.html"] == "photos/300_png.ipynb", (
        "a page is not called as its notebook: link to the notebook"
    )
    known = {name: anchors(site / "_proc" / name) for name in pages(site)}
    lost = [
        f"{name}: {link}"
        for name in pages(site)
        for link in sorted(links(site / "_proc" / name))
        if dead(site, link, name, outputs, known)
    ]
    assert not lost, "\n".join(lost)
    for wrong in (
        "LICENSE",
        "photos/300_png.html",
        "images/none.png",
        SITE + "core/config.html#nowhere",
        SOURCE + "none.py",
    ):
        assert dead(site, wrong, "index.ipynb", outputs, known), f"this test would not see {wrong}"


def test_every_page_stands_in_the_sidebar_once(site):
    contents = yaml.safe_load((site / "nbs" / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    entries = [e for c in contents for e in c.get("contents", [c])]
    assert sorted(e["href"] for e in entries) == pages(site)
    assert all(e["text"] for e in entries)


def test_signatures_hold_no_links_and_no_annotations(site):
    "What a reader would see as raw Markdown, or as `stage:Annotated`."
    for name in pages(site):
        for text in shown_texts(site / "_proc" / name):
            for signature in re.findall(r"```python\n(.*?)```", text, re.S):
                assert "](http" not in signature and "Annotated" not in signature, (name, signature)


def test_the_command_line_page_shows_every_commands_help(site):
    import typer.main

    from pillsnap.cli import app

    page = "\n".join(shown_texts(site / "_proc" / "920_cli.ipynb"))
    commands = typer.main.get_command(app).commands
    groups = {name: command.commands for name, command in commands.items() if hasattr(command, "commands")}
    below = {f"{name} {sub}": command for name, group in groups.items() for sub, command in group.items()}
    for name, command in ({n: c for n, c in commands.items() if n not in groups} | below).items():
        shown = re.search(rf"^### {name}\n\n```text\n(.*?)```", page, re.S | re.M)
        assert shown, f"run nbs/920_cli.ipynb again: {name} is not on its page"
        missing = [o for p in command.params for o in p.opts if o.startswith("--") and o not in shown[1]]
        assert not missing, f"run nbs/920_cli.ipynb again: {name} has {missing} too"


PHONE = {"width": 390, "height": 800}
BY_HAND = ("index", "results", "benchmarks", "real_pills", "limits")  # pages that people open first, beside the guide


def plain_page(site: Path, name: str) -> Path:
    "A processed page as HTML with the site's own rules alone, without a theme."
    exporter = HTMLExporter(template_name="basic")
    notebook = read(site / "_proc" / name)
    notebook.cells = [c for c in notebook.cells if c.cell_type != "raw" and "#| hide" not in c.source]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        for output in cell.get("outputs", []):
            joined = {kind: "".join(value) for kind, value in output.get("data", {}).items() if isinstance(value, list)}
            output.get("data", {}).update(joined)
            if isinstance(output.get("text"), list):
                output["text"] = "".join(output["text"])
    body, _ = exporter.from_notebook_node(notebook)
    rules = (site / "nbs" / "styles.css").read_text(encoding="utf-8")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{rules}</style>'
    path = (site / "_proc" / name).with_suffix(".plain.html")
    path.write_text(f"<!doctype html><html><head>{head}</head><body><main>{body}</main></body></html>", "utf-8")
    return path


MEASURE = """() => ({
    wide: document.documentElement.scrollWidth,
    nameless: [...document.images].filter(i => !i.alt.trim()).map(i => i.src.slice(0, 80)),
    broken: [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80)),
    empty: document.querySelectorAll("h1, h2, h3").length === 0,
})"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_pages_fit_a_phone(site):
    "Nothing is wider than the screen, and each picture is there and has words."
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    guide = [name for name in pages(site) if name.startswith("guide/")]
    assert len(guide) >= 4
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport=PHONE)
        found = {}
        for name in (*guide, *(f"{stem}.ipynb" for stem in BY_HAND)):
            page.goto(plain_page(site, name).as_uri())
            found[name] = page.evaluate(MEASURE)
        page.set_content(f"<main><p style='width: {PHONE['width'] + 20}px'>wide</p><img src='none.png'></main>")
        seen = page.evaluate(MEASURE)
        browser.close()
    assert seen["wide"] > PHONE["width"] and seen["nameless"] and seen["broken"], "this test would not see a fault"
    fine = {"nameless": [], "broken": [], "empty": False}
    wrong = {n: m for n, m in found.items() if m["wide"] > PHONE["width"] or fine != {k: m[k] for k in fine}}
    assert wrong == {}
