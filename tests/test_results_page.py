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


def make_page(run: Path, nbs: Path) -> str:
    nbs.mkdir(exist_ok=True)
    command = [sys.executable, str(ROOT / "scripts" / "assets" / "results_page.py"), str(run), "--nbs", str(nbs)]
    r = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr[-2000:]
    return "\n\n".join(c.source for c in nbformat.read(nbs / "results.ipynb", 4).cells)


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
