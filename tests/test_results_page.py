"""The results page is made from a run's reports and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "assets"))

import results_page


def make_page(run: Path, nbs: Path) -> str:
    nbs.mkdir(exist_ok=True)
    return "\n\n".join(c.source for c in nbformat.read(results_page.write_page(run, nbs), 4).cells)


@pytest.fixture
def run(smoke_run, tmp_path) -> Path:
    "The reports and records of a finished run."
    for name in ("reports", "stages"):
        shutil.copytree(smoke_run / name, tmp_path / "run" / name)
    return tmp_path / "run"


def test_the_page_says_what_the_reports_say(run, tmp_path):
    page = make_page(run, tmp_path / "nbs")
    card = json.loads((run / "reports" / "scorecard.json").read_text())
    for row in card["rows"]:
        assert re.search(
            rf"^\| {row['figure']} \| {'' if row['value'] is None else format(row['value'], '.4g')} \|", page, re.M
        ), row
    assert f"**Gate: {card['gate']['status']}**" in page and card["run_id"] in page and "SYNTHETIC DATA" in page
    pictures = re.findall(r"!\[([^\]]+)\]\((images/results/[\w.]+)\)", page)
    assert len(pictures) >= 8 and all((tmp_path / "nbs" / path).is_file() for _, path in pictures)
    assert str(run) not in page and str(run.parent) not in page

    before = {p.name: p.read_bytes() for p in (tmp_path / "nbs").rglob("*") if p.is_file()}
    (tmp_path / "nbs" / "images" / "results" / "of_an_earlier_run.png").write_bytes(b"")
    make_page(run, tmp_path / "nbs")
    assert {p.name: p.read_bytes() for p in (tmp_path / "nbs").rglob("*") if p.is_file()} == before, (
        "the same run gives the same bytes"
    )

    card["rows"][0]["value"] = 0.4321
    card["gate"]["status"] = "GO"
    card["do_not_rely_on"] = [{"drug": "K-000001", "right": 0.125, "mistaken_for": "K-000002", "share": 0.875, "n": 16}]
    (run / "reports" / "scorecard.json").write_text(json.dumps(card))
    other = make_page(run, tmp_path / "nbs")
    assert f"| {card['rows'][0]['figure']} | 0.4321 |" in other and "🟢 **Gate: GO**" in other
    assert "| K-000001 | 12% | K-000002 | 88% | 16 |" in other


def test_a_run_that_is_not_finished_is_refused_in_words(run, tmp_path):
    (run / "reports" / "export.json").unlink()
    command = [sys.executable, str(ROOT / "scripts" / "assets" / "results_page.py"), str(run), "--nbs", str(tmp_path)]
    r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert r.returncode != 0 and "no export.json" in r.stderr


def figures(page: str) -> dict[str, tuple[str, ...]]:
    "Rows of a page's tables whose first column is a figure's name: value, n, and the note at the end."
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in page.splitlines() if line[:2] == "| "]
    return {r[0]: (r[1], r[2], r[-1]) for r in rows if re.fullmatch(r"[a-z0-9_]+", r[0]) and r[0] != "figure"}


def test_the_limits_show_the_figures_of_the_results_page():
    results = "\n".join(c.source for c in nbformat.read(ROOT / "nbs" / "results.ipynb", 4).cells)
    known = figures(results.partition("## Figures")[2].partition("\n## ")[0])
    limits = nbformat.read(ROOT / "nbs" / "limits.ipynb", 4)
    outputs = [o.data.get("text/markdown", "") for c in limits.cells if c.cell_type == "code" for o in c.outputs]
    shown = figures("\n".join(outputs))
    assert len(shown) > 15
    wrong = {name: row for name, row in shown.items() if row != known[name]}
    assert not wrong, "run nbs/limits.ipynb again, as scripts/assets/results_page.py does"
    assert figures(outputs[0].replace("| 12 |", "| 13 |")) != figures(outputs[0]), "this test would not see a change"
