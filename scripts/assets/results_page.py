#!/usr/bin/env python
"""The results page of the site: what one finished run measured, from its reports and records alone.

    python scripts/assets/results_page.py RUN                  nbs/results.ipynb, its pictures, the home page's
    picture, and the figures of nbs/limits.ipynb
    python scripts/assets/results_page.py RUN --nbs FOLDER     the page and its pictures in another folder

The same run gives the same bytes. Pictures of an earlier run are removed.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_markdown_cell, new_notebook

from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import markdown_table, read_record
from pillsnap.core.plots import drug_label, shown_picture
from pillsnap.dataset.drugs import drug_names
from pillsnap.evaluation.menu import advisor_word, gate_dot

ROOT = Path(__file__).resolve().parents[2]
JOBS = ("conversion", "splits", "classifier", "detector", "interleaved", "evaluation", "export")
PICTURES = {  # file in reports/ → what it shows
    "conversion_boxes": "Photos of the delivery with their boxes, combos first.",
    "splits_groups": "Split of the capture groups: a row per drug, a cell per group.",
    "classifier_curves": "The classifier's training: loss, scores on held-out groups, learning rate.",
    "classifier_recall": "Recall of each drug, from whole photos and from crops.",
    "detector_curves": "The detector's training: its loss, and its average precision on held-out photos.",
    "detector_pr": "Precision and recall of the detector.",
    "evaluation_confusion": "Confusion matrix, and the pairs of drugs that are confused most.",
    "evaluation_mistakes": "Wrong answers with the highest probability, or right ones with the lowest.",
    "evaluation_reliability": "Reliability diagram: accuracy at each confidence.",
    "evaluation_detection": "Boxes of the detector on photos with several pills.",
    "evaluation_conditions": "Accuracy by light, camera, pill size, blur, compression, white balance and phone.",
    "evaluation_latency": "How long an answer takes.",
    "export_boxes": "Boxes of the same photos from torch and from ONNX.",
}


def read(run: Path, name: str) -> dict[str, Any]:
    "A report of the run."
    path = run / "reports" / f"{name}.json"
    if not path.is_file():
        raise PillsnapError(
            f"this run has no {path.name}", where=path, fix="name a run folder that `pillsnap run all` has finished"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    "Some columns of some rows, renamed; a column that is empty throughout is left out."
    used = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    return markdown_table([{columns[key]: row.get(key) for key in used} for row in rows])


def the_run(run: Path, card: Mapping[str, Any]) -> str:
    "When and where the run was made, and what each job took."
    records = {name: record for name in JOBS if (record := read_record(run, name))}
    seconds = sum(record["seconds"] for record in records.values())
    rows = [
        {"job": name, "result": record["verdict"], "seconds": f"{record['seconds']:.0f}"}
        for name, record in records.items()
    ]
    version = next(iter(records.values()))["pillsnap"]
    return (
        f"Run `{card['run_id']}`, finished on {card['made'][:10]} with PillSnap {version} on {card['hardware']}. "
        f"The jobs took {seconds:.0f} s together.\n\n{markdown_table(rows)}"
    )


def the_verdict(card: Mapping[str, Any]) -> str:
    "The gate with its points, then what the advisor says."
    gate, advice = card["gate"], card["advice"]
    label = f" ({gate['label']})" if gate["label"] else ""
    points = table(
        gate["points"],
        {"name": "point", "asked": "asked", "value": "value", "n": "n", "verdict": "verdict", "reason": "reason"},
    )
    said = advisor_word(advice, gate)
    return f"{gate_dot(gate['status'])} **Gate: {gate['status']}**{label}\n\n{points}\n\n{said[:1].upper()}{said[1:]}."


def do_not_rely_on(run: Path, drugs: Sequence[Mapping[str, Any]]) -> str:
    "The drugs that the classifier cannot name, by name and code; nothing where there is none."
    if not drugs:
        return ""
    names = drug_names(run)
    rows = [
        {
            "drug": drug_label(d["drug"], names, 30),
            "named rightly": f"{d['right']:.0%}",
            "mistaken for": drug_label(d["mistaken_for"], names, 30),
            "share": f"{d['share']:.0%}",
            "n": d["n"],
        }
        for d in drugs
    ]
    return "Drugs with too few right answers, and the drug that is answered instead.\n\n" + markdown_table(rows)


def sections(run: Path) -> dict[str, str]:
    "The page's text by heading, without its pictures."
    card, export = read(run, "scorecard"), read(run, "export")
    page = {
        "The run": the_run(run, card),
        "The verdict": the_verdict(card),
        "Figures": table(card["rows"], {"figure": "figure", "value": "value", "n": "n", "how": "how", "note": "note"}),
        "Do not rely on": do_not_rely_on(run, card.get("do_not_rely_on", [])),
        "Exported models": export["verdict"]
        + "\n\n"
        + table(
            export["checks"],
            {"model": "model", "check": "check", "value": "value", "limit": "limit", "n": "n", "verdict": "verdict"},
        ),
        "Latency": "Milliseconds an answer.\n\n"
        + table(
            card["latency"], {k: k for k in ("scope", "p50", "p95", "batch", "precision", "n", "target", "verdict")}
        ),
    }
    return {heading: text for heading, text in page.items() if text}


def introduction(card: Mapping[str, Any]) -> str:
    "Where the figures come from, and what they are not."
    text = (
        "Every figure and every picture on this page comes from the reports of one run. `python "
        "scripts/assets/results_page.py RUN` makes the page; "
        "nothing on it is typed by hand. The notebooks of the jobs show smoke runs instead, whose models are hardly "
        "trained."
    )
    if card["data"] != "aihub":
        text += (
            f"\n\n> **{card['data'].upper()} DATA.** These figures show that the program works. "
            "They say nothing about real pills and are never compared with figures on AI Hub's photos."
        )
    return text


def save_pictures(run: Path, folder: Path) -> dict[str, str]:
    "Copy the run's pictures, small enough for a page; returns the Markdown of each by what it shows."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shown = {}
    for name, words in PICTURES.items():
        source = run / "reports" / f"{name}.png"
        if source.is_file():
            picture = shown_picture(source)
            target = folder / f"{name}.{'jpg' if picture.format == 'jpeg' else 'png'}"
            target.write_bytes(picture.data)
            shown[words] = f"![{words.rstrip('.')}](images/{folder.name}/{target.name})"
    return shown


def write_page(run: Path, nbs: Path) -> Path:
    "Write results.ipynb and its pictures into a folder of notebooks."
    card = read(run, "scorecard")
    texts = [
        "# Results of the demo\n\n> What one finished run measured, made from its run folder by a script.",
        introduction(card),
    ]
    texts += [f"## {heading}\n\n{text}" for heading, text in sections(run).items()]
    texts += ["## Pictures"] + [
        f"{words}  \n{picture}" for words, picture in save_pictures(run, nbs / "images" / "results").items()
    ]
    cells = [new_markdown_cell(text, id=hashlib.sha256(text[:60].encode()).hexdigest()[:8]) for text in texts]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path = nbs / "results.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def refresh_limits(nbs: Path) -> Path:
    "Run limits.ipynb again: it shows figures of results.ipynb, and stops where they do not bear a claim out."
    path = nbs / "limits.ipynb"
    page = nbformat.read(path, 4)
    NotebookClient(page, timeout=300, record_timing=False, resources={"metadata": {"path": str(nbs)}}).execute()
    for cell in page.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                output.pop("execution_count", None)
                if output.output_type == "execute_result":
                    output.execution_count = None
    nbformat.write(page, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument(
        "--nbs",
        type=Path,
        help="folder for results.ipynb and images/results; the home page's picture is then left alone",
    )
    asked = parser.parse_args()
    print(write_page(asked.run, asked.nbs or ROOT / "nbs"))
    if not asked.nbs:
        import result_picture

        picture = ROOT / "nbs" / "images" / "result.png"
        result_picture.main(asked.run, picture)
        print(picture)
        print(refresh_limits(ROOT / "nbs"))


if __name__ == "__main__":
    main()
