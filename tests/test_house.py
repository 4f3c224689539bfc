"""What makes the code hard to read is counted; no count may grow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "core"))

import house  # noqa: E402


@pytest.mark.spec("HS1")
@pytest.mark.parametrize("what", house.CEILINGS)
def test_no_count_grows(what):
    places = house.LISTS.get(what, list)()
    assert house.count(what) <= house.CEILINGS[what], "\n".join(places[:20])


def test_what_it_counts_is_seen(monkeypatch):
    "A notebook that breaks every rule raises every count that is read from notebooks."
    from nbformat.v4 import new_code_cell, new_markdown_cell

    long_body = "\n".join(f"    x{i} = {i}" for i in range(41))
    exports = ["from pillsnap.cli import main", f"def shown():\n{long_body}", "def hidden(): pass; pass"]
    exports += [f"class C{i}:\n    pass" for i in range(house.CEILINGS["rows"])]
    cells = [new_code_cell(f"#| export\n{source}") for source in exports]
    cells += [new_code_cell("shown()  # " + "w" * 120), new_markdown_cell("The room teaches (SPEC X1).")]
    before = {what: len(places()) for what, places in house.LISTS.items()}
    chapters = [house.Notebook(ROOT / "nbs" / "core" / "000_bad.ipynb", cells), *house.notebooks()]
    monkeypatch.setattr(house, "notebooks", lambda: chapters)
    after = {what: len(places()) for what, places in house.LISTS.items()}
    grown = {what for what in after if after[what] > before[what]}
    assert grown == set(house.LISTS) - {"twice", "unread"}


def test_the_script_prints_every_count():
    r = subprocess.run([sys.executable, str(ROOT / "scripts/core/house.py")], capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    assert all(meaning in r.stdout for meaning in house.MEANING.values())
