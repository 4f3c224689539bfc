#!/usr/bin/env python
"""Write "What the demo measures" of the home page from a finished demo run, then README.md."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
HEADING, NEXT = "## What the demo measures", "\n## On the real delivery"
ROWS = {  # figure → what the home page calls it, and what it says of it
    "accuracy": (
        "accuracy, `single`",
        "clean photos: capture groups that neither trained, nor selected the checkpoint, nor calibrated",
    ),
    "accuracy_whole": ("accuracy where the whole photo is classified and no pill is cut out", "the same photos"),
    "accuracy_phone": ("accuracy on rendered phone photos", "the same drugs, as a phone would show them"),
    "accuracy_selection": ("accuracy on the photos that selected the checkpoint", "for comparison"),
    "accuracy_calibration": ("accuracy on the photos that fit temperature and answer rule", "for comparison"),
    "macro_f1": ("macro-F1", ""),
    "twin_accuracy": ("accuracy on drugs with a twin, which differs in little but the imprint", ""),
    "ece_calibrated": ("calibration error after temperature scaling", "on the clean photos"),
    "set_coverage": ("prediction sets that hold the true drug", "asked: 95 %"),
    "single_answers": ("photos that get one name", ""),
    "wrong_per_1000": ("wrong single names per 1,000 photos", ""),
    "unknown_auroc_drugs": ("unknown drugs against known ones, AUROC", "drugs without a look-alike among the known"),
    "unknown_auroc_lookalikes": ("unknown drugs that look like a known one, AUROC", "the same score on these drugs"),
    "unknown_refused_lookalikes": (
        "unknown drugs that look like a known one: photos refused",
        "the others get a wrong name or list",
    ),
    "unknown_auroc_objects": ("things that are no pills against pills, AUROC", ""),
    "known_refused": ("photos of known drugs that the unknown score refuses", ""),
    "twins_unreadable_in_set": (
        "unreadable twins: sets that hold both",
        "rendered out of focus until both are the same",
    ),
    "detection_map50": ("detector mAP@.5", ""),
    "detection_map": ("detector mAP@.5:.95", ""),
    "combo_set_accuracy": ("`combo`: every pill of the photo right, none invented", ""),
    "combo_pill_accuracy": ("`combo`: pills found and rightly named", ""),
    "combo_wrong_per_1000": ("`combo`: wrong single names per 1,000 boxes", "as the answer rule gives them"),
    "leak_gap": ("leak gap: what an image-level split would have added", "two trainings of equal size"),
}


def read(path: Path) -> dict:
    "A JSON file."
    return json.loads(path.read_text(encoding="utf-8"))


def table(metrics: dict) -> str:
    "The measured figures as Markdown."
    lines = ["| figure | value | n | |", "|---|---|---|---|"]
    for name, (title, note) in ROWS.items():
        m = metrics.get(name)
        if m is not None and m["value"] is not None:
            value = f"{m['value']:.1f}" if name.endswith("wrong_per_1000") else f"{m['value']:.3f}"
            lines.append(f"| {title} | {value} | {m['n']} | {note} |")
    return "\n".join(lines)


def verdicts(run: Path) -> str:
    "Gate, drugs not to rely on, and what the export found."
    card, export = read(run / "reports/scorecard.json"), read(run / "reports/export.json")
    weak = read(run / "reports/evaluation.json")["unreliable"]
    drugs = "; ".join(
        f"{d['drug']} is rightly named on {d['right']:.0%} of its {d['n']} photos and mistaken for {d['mistaken_for']}"
        for d in weak
    )
    said = (
        f"Drugs not to rely on: {drugs}." if drugs else "No drug is named rightly on fewer than three of four photos."
    )
    return f"Gate: {card['gate']['status']}. {said} {export['verdict']}."


def durations(run: Path) -> str:
    "Seconds of each job."
    jobs = ("conversion", "splits", "classifier", "detector", "evaluation", "export")
    seconds = [f"{job} {read(run / 'stages' / f'{job}.json')['seconds']:.0f} s" for job in jobs]
    return f"The jobs took {', '.join(seconds)}."


KERNELS = 0.6  # minutes that `make demo` takes beyond its jobs: 523 s where they took 486


def section(run: Path) -> str:
    "The whole section."
    doc = read(run / "reports/evaluation.json")
    first = doc["metrics"]["accuracy"]
    head = f"Measured on {doc['made'][:10]} on {first['hardware']}, on **synthetic** pills, {doc['classes']} drugs:"
    total = sum(read(p)["seconds"] for p in (run / "stages").glob("*.json")) / 60
    tail = (
        f"{durations(run)} With the start of each kernel that is about {total + KERNELS:.0f} minutes on this machine, "
        "installation apart; other work on it counts too. A second run ends in seconds: every job is up to date. "
        "[The results page](results.ipynb) shows this run with its pictures."
    )
    return "\n\n".join([HEADING, head, table(doc["metrics"]), verdicts(run), tail]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a finished demo run")
    run, path = parser.parse_args().run, ROOT / "nbs" / "index.ipynb"
    nb = nbformat.read(path, 4)
    (cell,) = (c for c in nb.cells if HEADING in c.source)
    before, rest = cell.source.split(HEADING)
    cell.source = before + section(run) + NEXT + rest.split(NEXT)[1]
    nbformat.write(nb, path)
    subprocess.run([sys.executable, str(ROOT / "scripts" / "readme.py")], check=True)
    print(path)


if __name__ == "__main__":
    main()
