"""What makes the code hard to read is counted; no count may grow."""

import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "core"))

import house
import unread_keys


@pytest.mark.spec("HS1")
@pytest.mark.parametrize("what", house.CEILINGS)
def test_no_count_grows(what):
    places = house.found(what) if what in house.LISTS else []
    assert house.count(what) <= house.CEILINGS[what], "\n".join(places[:20])


def chapter(name: str, *cells) -> house.Notebook:
    return house.Notebook(ROOT / "nbs" / "core" / f"{name}.ipynb", list(cells))


def exported(source: str):
    return new_code_cell(f"#| export\n{source}")


def test_what_it_counts_is_seen(monkeypatch):
    "Two notebooks and a script that break every rule raise every count."
    long_body = "\n".join(f"    x{i} = {i}" for i in range(41))
    exports = ["from pillsnap.core.again import shown", f"def shown():\n{long_body}", "def hidden(): pass; pass"]
    exports += [f"class C{i}:\n    pass" for i in range(house.CEILINGS["rows"])] + ["#\n" * 800]
    demo = new_code_cell("shown()  # hidden() " + "w" * 120)
    bad = chapter("000_bad", *map(exported, exports), demo, new_markdown_cell("The room teaches (SPEC X1)."))
    again = chapter("001_again", exported("def shown(): ..."))
    own = dict.fromkeys(("scripts/core/house.py", "tests/test_house.py"), "")
    monkeypatch.setattr(house, "notebooks", lambda: [bad, again])
    monkeypatch.setattr(house, "scripts", lambda: [*own.items(), ("bad.py", f"async def run():\n{long_body}")])
    monkeypatch.setattr(unread_keys, "unread_keys", lambda: ["train.nothing"])
    assert [what for what, places in house.LISTS.items() if not places()] == []


@pytest.mark.parametrize(
    "shown, seen",
    [
        ("found()", True),
        ("house.found", True),
        ('code = """\n    from pillsnap.core import found\n    found()\n"""', True),
        ("'found'  # found()", False),
        ("swapped(found=1)", False),
    ],
)
def test_a_demo_is_a_use(monkeypatch, shown, seen):
    "Not a word in a string or a comment, but code that another process runs."
    monkeypatch.setattr(
        house, "notebooks", lambda: [chapter("000_a", exported("def found(): ..."), new_code_cell(shown))]
    )
    assert house.demos() == [] if seen else house.demos() == ["core/000_a: found"]


@pytest.mark.parametrize("place", ["tests/test_x.py", "scripts/x.py"])
def test_words_are_looked_for_everywhere(monkeypatch, place):
    own = dict.fromkeys(("scripts/core/house.py", "tests/test_house.py"), "")
    monkeypatch.setattr(house, "notebooks", lambda: [chapter("000_a", new_code_cell("judge = 1  # a lot"))])
    monkeypatch.setattr(house, "scripts", lambda: [*own.items(), (place, '"The rows that teach."')])
    assert [found.split(": ")[1] for found in house.words()] == ["judge", "lot", "teach"]


def test_the_script_prints_every_count(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["house.py"])
    assert house.main() == 0
    said = capsys.readouterr().out
    assert all(meaning in said for meaning in house.MEANING.values())
    monkeypatch.setitem(house.CEILINGS, "wide", -1)
    assert house.main() == 1 and "ABOVE" in capsys.readouterr().out
