"""RP1: photos in a folder per drug, through the package's own jobs, with and without leakage.

    python benchmarks/real/rp1_folders.py --abhiram CLONE --minutes 3

`pillsnap import` reads the folder and groups near-copies. The same small classifier is trained twice with the same
settings: on a split that keeps every group on one side, and on one that deals photos out one by one. Both are scored
on clean photos, which neither trained, nor selected the checkpoint, nor calibrated; the difference is the leak gap.
Then retrieval is trained without five drugs: how many of their photos are refused, and how many are named rightly once
each of them is enrolled from two photos. `--work` keeps every run: a second call goes on where the first stopped.
"""

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from folders import FOLDER, NAMED, UNIT, finished, imported, named, settings, split_by, started
from sources import OUT, Clone, open_clone, write_result

from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir, read_json, save_text
from pillsnap.core.records import Metric, Provenance
from pillsnap.dataset.splits import SplitsJob
from pillsnap.delivery.index import read_manifest
from pillsnap.deployment.enrol import enrol_drug
from pillsnap.deployment.export import ExportJob
from pillsnap.deployment.runtime import load_bundle
from pillsnap.evaluation.evaluation import EvaluationJob
from pillsnap.evaluation.groupfigures import GroupFigure, share_figure
from pillsnap.evaluation.intervals import group_counts, interval_words, percentile_interval, share_words
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.retrieval import RetrievalJob

OUTSIDE = 5  # drugs that retrieval is trained without
RETRIEVAL = """\
base: demo_retrieval
data:
  source: imported
  progressive_validation: {stage_0: {max_samples: null, max_classes: null}}
retrieval: {train_ratio: 0.65, val_ratio: 0.33, test_ratio: 0.02, min_image_size: 48}
splits: {min_photos: 2}
evaluation: {min_eval_samples: 150}
answer: {alpha: 0.1}  # a rule at .05 needs 20 calibration groups, and fifteen drugs leave 19
"""
Answer = Callable[[Path], Mapping[str, Any]]  # a photo → the JSON of its answer


def left_out(keys: Sequence[str], n: int = OUTSIDE) -> list[str]:
    "The drugs that retrieval is trained without: those whose names have the smallest hashes."
    return sorted(sorted(set(keys), key=lambda k: hashlib.sha256(k.encode()).hexdigest())[:n])


def classified(a: argparse.Namespace, first: Path, by: str) -> Path:
    "The run of a classifier on photos that are split by capture (here: by near-copies) or by image."
    folder, over = split_by(a, first, a.work / f"by_{by}", by)
    finished(job := ClassifierJob(str(folder), "own", over, epochs=a.epochs))
    if by == "capture":  # the evaluation refuses a split that leaks
        finished(EvaluationJob(str(folder), "own", over))
    named(folder, job.cfg)
    return folder


def searched(a: argparse.Namespace, first: Path, known: Sequence[str]) -> Path:
    "The run of retrieval on some of the drugs."
    folder = started(first, a.work / "retrieval")
    save_text(RETRIEVAL, a.work / "retrieval.yaml")
    names = f"retrieval.class_names=[{', '.join(repr(k) for k in known)}]"
    over = settings(a, folder, names, "data.test_known_ratio=0", "splits.unknown_share=0")
    given = str(folder), str(a.work / "retrieval.yaml"), over
    finished(SplitsJob(*given))
    finished(job := RetrievalJob(*given, epochs=a.epochs))
    finished(EvaluationJob(*given))
    finished(ExportJob(*given))
    named(folder, job.cfg)
    return folder


def record_of(clone: Clone, folder: Path) -> Provenance:
    "Where the figures of a run come from: the clone, and the run's classes."
    evaluated = read_json(folder / "reports" / "evaluation.json")["metrics"]["accuracy"]
    return Provenance(clone.data, clone.data_hash, evaluated["class_map_hash"])


def seconds_of(*folders: Path) -> float:
    "What the finished jobs of some runs took."
    return sum(float(read_json(f)["seconds"]) for d in folders for f in (d / "stages").glob("*.json"))


def trained(a: argparse.Namespace, *folders: Path) -> str:
    "How some runs were trained, for a note."
    reports = [f for d in folders for f in (d / "reports/classifier.json", d / "reports/retrieval.json") if f.is_file()]
    told = []
    for rows in (read_json(f)["history"] for f in reports):
        stopped = rows[-1].get("clock", {}).get("stopped")
        told.append(f"{len(rows)} epochs" + f", the last cut short after {a.minutes:g} min" * bool(stopped))
    return f"test_resnet from scratch, {a.size} px, {' and '.join(dict.fromkeys(told))}"


def safe_answers(folder: Path) -> pd.DataFrame:
    "What the answer rule of a run said to each of its clean photos."
    return pd.read_csv(folder / "reports" / "safe_answers.csv")


def gap_words(leaky: GroupFigure, honest: GroupFigure) -> str:
    "The interval of the difference of two figures, each over its own groups."
    draws = [
        np.concatenate([f.weighted(c) for c in group_counts(len(f.groups), seed=s)])
        for s, f in ((1, leaky), (2, honest))
    ]
    return interval_words(percentile_interval(draws[0] - draws[1]), len(honest.groups), UNIT)


def classifier_figures(by_group: Path, by_image: Path, prov: Provenance, seconds: float, told: str) -> list[Metric]:
    "Accuracy of both splits, the leak gap, and the safe answer of the split that does not leak."
    honest, leaky = (pd.read_csv(folder / NAMED) for folder in (by_group, by_image))
    trained = pd.read_csv(by_image / "artifacts" / "stage0" / "manifest_train.csv")["group_id"]
    shared, shares, found = float(leaky["group"].isin(set(trained)).mean()), [], []
    for name, t, note in (
        ("accuracy_by_near_copies", honest, "no near-copy on both sides"),
        ("accuracy_by_photo", leaky, f"leaky on purpose: {shared:.0%} of its photos have a near-copy in training"),
    ):
        hit = t["true"] == t["answered"]
        shares.append(share_figure(t, hit))
        words = share_words(hit, t["group"], UNIT)
        found.append(prov.metric(name, float(hit.mean()), len(t), seconds, note=f"{words}; {note}; {told}"))
    gap = shares[1].point - shares[0].point
    note = f"{gap_words(shares[1], shares[0])}; accuracy by photo minus accuracy by near-copies; {told}"
    found.append(prov.metric("leak_gap", gap, min(len(honest), len(leaky)), seconds, note=note))
    return found + safe_answer_figures(
        "safe", safe_answers(by_group), prov, seconds, f"{told}, coverage of .95 asked for"
    )


def safe_answer_figures(name: str, safe: pd.DataFrame, prov: Provenance, seconds: float, told: str) -> list[Metric]:
    "Coverage of the sets, and what the answer rule said."
    named, found = safe[safe["answer"] == "drug"], []
    for key, t, column, what in (
        ("set_coverage", safe, safe["covered"], "sets that hold the true drug"),
        ("single_answers", safe, safe["answer"] == "drug", "photos that got one name"),
        ("single_answer_accuracy", named, named["right"], "of the names given, right"),
        ("known_refused", safe, safe["answer"] == "unknown", "photos of trained drugs that got no answer"),
    ):
        if len(t):
            words, value = share_words(column.astype(bool), t["group"], UNIT), float(column.astype(bool).mean())
            note = f"{words}; {what}; calibrated on other groups; {told}"
            found.append(prov.metric(f"{name}_{key}", value, len(t), seconds, note=note))
    return found


def references(rows: pd.DataFrame, n: int = 2) -> list[str]:
    "Photos to enrol a drug by: the first of each of its largest groups of near-copies."
    groups = rows.groupby("group_id")["path"].agg(["size", "min"])
    return groups.sort_values(["size", "min"], ascending=[False, True])["min"].tolist()[:n]


def asked(answer: Answer, root: Path, rows: pd.DataFrame) -> pd.DataFrame:
    "What is answered to the photos: group, true, answer, top."
    out = []
    for path, group, true in rows[["path", "group_id", "class_key"]].itertuples(index=False):
        item = answer(root / path)["items"][0]
        first = item["top_k"][0]["kcode"] if item["top_k"] else ""
        out.append(dict(path=path, group=group, true=true, answer=item["answer"], top=first))
    return pd.DataFrame(out)


def outside_figures(
    before: pd.DataFrame,  # answers to drugs that are not known
    after: pd.DataFrame,  # answers to the same drugs, once they are enrolled
    prov: Provenance,
    seconds: float,
    told: str,
) -> list[Metric]:
    "Drugs that were not trained: refused before they are enrolled, named after it."
    named, right = after["answer"] == "drug", after["top"] == after["true"]
    found = []
    for key, t, hit, what in (
        ("left_out_refused", before, before["answer"] == "unknown", "photos that got no answer"),
        ("left_out_named", before, before["answer"] == "drug", "photos that got one name, which is wrong"),
        ("enrolled_recall_at_1", after, right, "nearest drug of all, whatever the answer rule says"),
        ("enrolled_named_rightly", after, named & right, "photos that got one name, the right one"),
        ("enrolled_named_wrongly", after, named & ~right, "photos that got one name, a wrong one"),
    ):
        note = f"{share_words(hit, t['group'], UNIT)}; {what}; {told}"
        found.append(prov.metric(key, float(hit.mean()), len(t), seconds, note=note))
    return found


def outside(folder: Path, rows: pd.DataFrame, root: Path, work: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Answers to drugs that were not trained: as trained, and after enrolling each from two photos."
    export = ensure_dir(work) / "enrolled"
    shutil.rmtree(export, ignore_errors=True)
    shutil.copytree(folder / "export", export)
    bundle = load_bundle(export, device="cpu")
    before = asked(lambda p: bundle.predict(p, mode="single"), root, rows)
    shown, codes = set[str](), dict[str, str]()
    for key, mine in rows.groupby("class_key"):
        paths = references(mine)
        codes[code := f"K-9{len(codes):05d}"] = str(key)  # a gallery asks for a K-code
        enrol_drug(export, code, [root / p for p in paths], name=str(key), by="benchmark")
        shown |= set(mine.loc[mine["path"].isin(paths), "group_id"])
    bundle = load_bundle(export, device="cpu")
    after = asked(lambda p: bundle.predict(p, mode="single"), root, rows[~rows["group_id"].isin(shown)])
    return before, after.assign(top=after["top"].replace(codes))


def retrieval_figures(a: argparse.Namespace, clone: Clone, first: Path) -> list[Metric]:
    "Retrieval on the drugs that stay, and the drugs that were left out."
    rows, _ = read_manifest(first / "manifest.csv")
    out = left_out(rows["class_key"].tolist())
    folder = searched(a, first, sorted(set(rows["class_key"]) - set(out)))
    table = pd.read_csv(folder / NAMED)
    prov, t0 = record_of(clone, folder), time.perf_counter()
    answers = outside(folder, rows[rows["class_key"].isin(out)], clone.folder / FOLDER, a.work)
    seconds = seconds_of(folder) + time.perf_counter() - t0
    told = f"{rows['class_key'].nunique() - len(out)} drugs trained; {trained(a, folder)}"
    hit = table["true"] == table["answered"]
    note = f"{share_words(hit, table['group'], UNIT)}; no near-copy on both sides; {told}"
    found = [prov.metric("retrieval_accuracy", float(hit.mean()), len(table), seconds, note=note)]
    asked_for = f"{told}, coverage of .90 asked for"
    found += safe_answer_figures("retrieval", safe_answers(folder), prov, seconds, asked_for)
    return found + outside_figures(*answers, prov, seconds, f"drugs left out: {', '.join(out)}; {told}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--abhiram", type=Path, required=True, help="clone of abhiram-bogisetty/PillDetection")
    p.add_argument("--work", type=Path, default=OUT / "rp1", help="folder of the runs")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP1.json")
    p.add_argument("--minutes", type=float, default=4, help="that one training may take at most")
    p.add_argument("--epochs", type=int, default=30, help="of each training")
    p.add_argument("--size", type=int, default=112, help="side of the network's input, pixels")
    p.add_argument("--classifier-only", action="store_true", help="leave out retrieval and the five further drugs")
    a = p.parse_args()
    clone = open_clone("abhiram", a.abhiram)
    first = imported(clone, a.work)
    runs = [classified(a, first, by) for by in ("capture", "image")]
    told = trained(a, *runs)
    found = classifier_figures(*runs, record_of(clone, runs[0]), seconds_of(*runs), told)
    if not a.classifier_only:
        found += retrieval_figures(a, clone, first)
    for m in found:
        print(m, m.note)
    print(write_result("RP1", __doc__.splitlines()[0], found, a.out, training=told))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
