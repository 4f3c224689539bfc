"""The guide's chapters run as a reader runs them, with the public names alone."""

import ast
import shutil
from pathlib import Path

import nbformat
import papermill as pm
import pytest

import pillsnap

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "nbs" / "guide").glob("*.ipynb"))


def code(chapter: Path) -> list[str]:
    return [c.source for c in nbformat.read(chapter, 4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_runs(chapter, smoke_run, tmp_path):
    "On a finished run, so that only what is new takes time."
    shutil.copytree(smoke_run, tmp_path / "run", symlinks=True)
    out = tmp_path / "executed.ipynb"
    pm.execute_notebook(chapter, out, {"run_dir": str(tmp_path / "run")}, cwd=tmp_path, progress_bar=False)
    shown = [o for c in nbformat.read(out, 4).cells for o in c.get("outputs", [])]
    cards = [o.data["text/html"] for o in shown if "text/html" in o.get("data", {}) and "<img" in o.data["text/html"]]
    assert len(cards) == 1 and "보험코드(EDI)" in cards[0]


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_uses_public_names_alone(chapter):
    used = set()
    for node in (n for source in code(chapter) for n in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("pillsnap"), "the guide writes `import pillsnap`"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pillsnap":
            used.add(node.attr)
    assert used and used <= set(pillsnap.__all__)
