"""Photos in a folder per drug as runs of the package: imported, split, with the settings that all trainings share."""

import argparse
import shutil
import time
from pathlib import Path

import pandas as pd
from sources import Clone

from pillsnap.core.device import pick_device
from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import Job, why_stale
from pillsnap.core.settings import Config
from pillsnap.dataset.importers import import_command
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob
from pillsnap.delivery.index import read_manifest
from pillsnap.evaluation.answers import eval_photos, load_evaluator
from pillsnap.evaluation.groupfigures import share_figure
from pillsnap.evaluation.intervals import LEAST_GROUPS, interval_words

FOLDER = "Dataset"  # of the photos, in the clone
UNIT = "groups of near-copies"
NAMED = "reports/clean_named.csv"  # of a run: path, group, true and first name of each clean photo
SHARES = "data.split_ratio=[0.7,0.3]", "data.test_known_ratio=0", "splits.unknown_share=0"


def imported(clone: Clone, work: Path) -> Path:
    "The clone's photos as `pillsnap import` takes them; PillsnapError if it holds other photos than the listed ones."
    clone.check()
    folder = work / "import"
    if not (folder / "manifest.json").is_file():
        import_command(clone.folder / FOLDER, folder, "folder", name=clone.data.removeprefix("other:"))
    rows, header = read_manifest(folder / "manifest.csv")
    if odd := {f"{FOLDER}/{p}" for p in rows["path"]} ^ set(clone.photos):
        raise PillsnapError(f"{len(odd)} photos are not listed or not imported", where=sorted(odd)[0])
    if header["source"] != clone.data:
        raise PillsnapError(f"this import is of {header['source']}", where=folder, fix="name another folder: --work")
    return folder


def started(first: Path, folder: Path) -> Path:
    "A run folder of its own with the imported photos."
    if not folder.is_dir():
        shutil.copytree(first, folder)
    return folder


def settings(a: argparse.Namespace, folder: Path, *more: str) -> tuple[str, ...]:
    "What all trainings share."
    root = str(Path(a.abhiram).absolute() / FOLDER)
    hours = f"data.progressive_validation.stage_0.time_limit_hours={a.minutes / 60:.4f}"
    same = "inference.focus=off", "train.num_threads=1", "train.leak_gap=false", hours
    return (
        f"paths.root={root}",
        f"paths.exp_dir={folder.absolute()}",
        f"data.classification.img_size={a.size}",
        *same,
        "pack.enabled=false",  # some photos are smaller than the pack asks for
        "evaluation.condition_photos=4",
        "evaluation.latency_runs=20",
        *more,
    )


def finished(job: Job) -> None:
    "Run a job unless its folder holds what it would write."
    if why_stale(job.run_dir, job.name, job.cfg):
        job.run()


def split_by(a: argparse.Namespace, first: Path, folder: Path, by: str) -> tuple[Path, tuple[str, ...]]:
    "A run whose photos are split by capture (here: by near-copies) or by image, and its settings."
    folder = started(first, folder)
    over = settings(a, folder, f"data.group_by={by}", *SHARES)
    finished(SplitsJob(str(folder), "own", over))
    return folder, over


def named(folder: Path, cfg: Config) -> None:
    "Write the first name that a run gives to each of its clean photos."
    data, began = load_split_data(folder, 0), time.perf_counter()
    evaluator = load_evaluator(folder, data, cfg.data, pick_device(), focus=cfg.inference.focus)
    s = evaluator.singles([p for p in eval_photos(data) if p.part == "clean"])
    keys, most = [data.class_map.key(k) for k in range(len(data.class_map))], s.single.argmax(1)
    t = pd.DataFrame(dict(path=s.paths, group=s.groups, true=[keys[i] for i in s.labels]))
    t.assign(answered=[keys[i] for i in most], seconds=time.perf_counter() - began).to_csv(folder / NAMED, index=False)


def difference(mine: pd.DataFrame, other: pd.DataFrame) -> tuple[float, str]:
    "By how much more of the same photos the first table names rightly, and the interval of that share over groups."
    assert mine["path"].tolist() == other["path"].tolist()
    more = (mine["true"] == mine["answered"]).astype(float) - (other["true"] == other["answered"])
    figure = share_figure(mine, more)
    ends, n = figure.interval(), len(figure.groups)
    if ends is None and n >= LEAST_GROUPS:
        ends = (figure.point, figure.point)  # the same answers to every photo
    return figure.point, interval_words(ends, n, UNIT)
