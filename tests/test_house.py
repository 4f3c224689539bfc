"""What makes the code hard to read is counted; no count may grow."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "core"))

import house


@pytest.mark.spec("HS1")
@pytest.mark.parametrize("what", house.CEILINGS)
def test_no_count_grows(what):
    places = house.found(what) if what in house.LISTS else []
    assert house.count(what) <= house.CEILINGS[what], "\n".join(places[:20])


def test_what_it_counts_is_seen(monkeypatch):
    "A notebook that breaks every rule raises every count that is read from notebooks."
    from nbformat.v4 import new_code_cell, new_markdown_cell

    long_body = "\n".join(f"    x{i} = {i}" for i in range(41))
    exports = ["from pillsnap.cli import main", f"def shown():\n{long_body}", "def hidden(): pass; pass"]
    exports += [f"class C{i}:\n    pass" for i in range(house.CEILINGS["rows"])]
    cells = [new_code_cell(f"#| export\n{source}") for source in exports]
    cells += [new_code_cell("shown()  # " + "w" * 120), new_markdown_cell("The room teaches (SPEC X1).")]
    before = {what: len(house.found(what)) for what in house.LISTS}
    chapters = [house.Notebook(ROOT / "nbs" / "core" / "000_bad.ipynb", cells), *house.notebooks()]
    monkeypatch.setattr(house, "notebooks", lambda: chapters)
    from_notebooks = {what: places for what, places in house.LISTS.items() if what != "unread"}
    grown = {what for what, places in from_notebooks.items() if len(places()) > before[what]}
    assert grown == set(from_notebooks) - {"twice"}


def test_the_script_prints_every_count(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py"])
    assert house.main() == 0
    said = capsys.readouterr().out
    assert all(meaning in said for meaning in house.MEANING.values())
    monkeypatch.setitem(house.CEILINGS, "wide", -1)
    assert house.main() == 1 and "ABOVE" in capsys.readouterr().out
