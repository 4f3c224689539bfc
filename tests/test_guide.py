"""The guide's chapters run as a reader runs them, with the public names alone."""

import ast
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import papermill as pm
import pytest
import typer.main
from IPython.core.inputtransformer2 import TransformerManager

import pillsnap
from pillsnap.cli import app

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "nbs" / "guide").glob("*.ipynb"))


def code(chapter: Path) -> list[str]:
    "The code cells as Python: `!command` becomes a call."
    python = TransformerManager().transform_cell
    return [python(c.source) for c in nbformat.read(chapter, 4).cells if c.cell_type == "code"]


def outputs(notebook: Path) -> list:
    return [o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", [])]


def printed(notebook: Path) -> str:
    return "".join(o.get("text", "") for o in outputs(notebook) if o.output_type == "stream")


def html(notebook: Path) -> list[str]:
    return [o.data["text/html"] for o in outputs(notebook) if "text/html" in o.get("data", {})]


def cards(notebook: Path) -> int:
    "How many answers are shown as a card with the photo and the codes of the drug."
    return sum("<img" in page and "보험코드(EDI)" in page for page in html(notebook))


def pictures(notebook: Path) -> int:
    return sum("image/png" in o.get("data", {}) for o in outputs(notebook))


@pytest.fixture
def executed(smoke_run, tmp_path, monkeypatch):
    "Run a chapter on a finished run, so that only what is new takes time."
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

    def execute(name: str, run: Path | None = None, **parameters: float) -> Path:
        (chapter,) = [p for p in CHAPTERS if p.stem == name]
        shutil.copytree(run or smoke_run, tmp_path / "run", symlinks=True)
        out = tmp_path / "executed.ipynb"
        parameters["run_dir"] = str(tmp_path / "run")
        pm.execute_notebook(chapter, out, parameters, cwd=tmp_path, progress_bar=False)
        return out

    return execute


def test_every_chapter_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [p.stem for p in CHAPTERS if f'executed("{p.stem}"' not in source] == []


def test_the_first_run(executed):
    assert cards(executed("01_first_run")) == 1


def test_your_delivery(executed, tmp_path):
    chapter = executed("02_your_delivery")
    assert pictures(chapter) == 1
    assert re.search(r"unparsable +1 ", printed(chapter)), "the audit counts the planted faults"
    reasons = next(page for page in html(chapter) if "box_negative" in page)
    assert "json_unparsable" in reasons and "photo_broken" in reasons
    assert (tmp_path / "checked" / "manifest.csv").is_file()


def test_evaluating_a_run(executed, tmp_path):
    chapter = executed("03_evaluating_a_run")
    said = printed(chapter)
    assert "NO_GO" in said and "recorded in" in said
    assert re.search(r"within noise|better|worse|no interval", said), "the two runs are compared"
    assert "accuracy" in (tmp_path / "diff.html").read_text(encoding="utf-8")
    assert pillsnap.load_run(tmp_path / "longer").records["classifier"]["verdict"].endswith(" of 3")


def test_identifying_pills(executed, tmp_path):
    chapter = executed("04_identifying_pills")
    assert sum('class="ps-card"' in page for page in html(chapter)) == 3 and pictures(chapter) == 1
    assert cards(chapter) >= 2, "the detector of the smoke run finds no pill, so the third card may hold no drug"
    table = (tmp_path / "strangers" / "answers.csv").read_text(encoding="utf-8-sig").splitlines()
    assert len(table) == 1 + 12, "two photos of each of the six unknown drugs"


@pytest.mark.spec("OP2")
def test_serving(executed, tmp_path):
    "The file, the server, the refusals, a release, a rollback; the key stands nowhere but in .env."
    chapter = executed("05_serving", load_seconds=0.4)
    said, home = printed(chapter), tmp_path / "server"
    assert "the sha256 of" in said and said.count("is the current release") == 3
    assert re.search(r"[1-9]\d* photos answered while the bundle changed", said)
    (refusals,) = [page for page in html(chapter) if "not_a_photo" in page]
    assert "key_wrong" in refusals and "photo_unreadable" in refusals
    assert pictures(chapter) == 2
    assert os.readlink(home / "current.pillsnap").startswith("releases/0001-")
    key = (home / ".env").read_text().strip().partition("=")[2]
    kept = [chapter, *(home / "logs").iterdir(), home / "history.jsonl"]
    assert len(key) == 64 and not any(key in file.read_text(encoding="utf-8") for file in kept)


@pytest.mark.spec("IM1", "IM4")
def test_own_photos(executed, tmp_path):
    "A folder of photos becomes a run, learns, and answers; what nobody said is missing on the card."
    chapter = executed("06_own_photos")
    header = pillsnap.read_manifest(tmp_path / "own" / "manifest.csv")[1]
    assert header["source"] == "other:my-pills" and header["counts"]["photos"] == 54
    assert "no detector can be trained" in printed(chapter) and "by regex" in printed(chapter)
    assert any("photo_unlabelled" in page for page in html(chapter))
    (card,) = [page for page in html(chapter) if 'class="ps-card"' in page]
    assert "정보 없음" in card and pictures(chapter) == 1


@pytest.mark.spec("BX19")
def test_new_drugs(executed, gallery_run):
    "A drug is enrolled, listed and taken back; the answer after it differs from the one before."
    chapter = executed("07_new_drugs", gallery_run)
    said, (before, after) = printed(chapter), [page for page in html(chapter) if 'class="ps-card"' in page]
    assert "the new drug" not in before and "the new drug" in after and pictures(chapter) == 1
    assert "the new drug" in said and "is undone" in said
    assert "cannot answer from both sides of a pill: there are 0 pairs" in said, "two photos are no calibrated pair"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_uses_public_names_alone(chapter):
    used = set()
    for node in (n for source in code(chapter) for n in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("pillsnap"), "the guide writes `import pillsnap`"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pillsnap":
            used.add(node.attr)
    assert used and used <= set(pillsnap.__all__)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_names_commands_that_exist(chapter):
    commands = set(typer.main.get_command(app).commands)
    text = "\n".join(c.source for c in nbformat.read(chapter, 4).cells)
    named = set(re.findall(r"(?:^!|^|`)pillsnap ([a-z][a-z-]+)", text, re.M))
    assert named <= commands, named - commands


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_is_stored_as_it_ran(chapter):
    "With what it showed, without the folders of the machine it ran on."
    text = chapter.read_text(encoding="utf-8")
    assert len(text) < 500_000 and outputs(chapter)
    assert not re.findall(r"/(?:tmp|home|root|work)/", text)
    assert all(o.output_type != "error" for o in outputs(chapter))
