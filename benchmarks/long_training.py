"""The training that BM13 watches: memory after each epoch, and what the epochs add to it."""

import gc
import mmap
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import simplejpeg
import torch
from fastai.callback.core import Callback
from harness import LIMITS, arguments, compare, finish
from loading import still
from scipy.stats import theilslopes
from torch import nn

from pillsnap.core.config import load_config
from pillsnap.dataset.datasets import DeliverySource, PillsnapClsDataset
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.sampling import EpochSampler
from pillsnap.delivery.classmap import ClassMap
from pillsnap.training.learner import Outputs, build_learner
from pillsnap.training.presets import ClassifierSettings

LIMIT = LIMITS["BM13"]["kb_per_epoch"]
DRUGS, SIZE, BATCH, WORKERS, WARM, BLOCK = 6, 64, 64, 2, 10, 5


def photos(root: Path, n: int) -> pd.DataFrame:
    "So many photos of 96 x 128 pixels, a colour per drug under noise, and their rows."
    rng, rows = np.random.default_rng(0), []
    for k in range(n):
        img = np.clip(rng.normal(40 * (k % DRUGS) + 20, 30, (128, 96, 3)), 0, 255).astype(np.uint8)
        (root / f"{k}.jpg").write_bytes(simplejpeg.encode_jpeg(img, quality=90))
        rows.append(dict(path=f"{k}.jpg", class_key=f"K-{k % DRUGS:06d}", bbox="", width=96, height=128, kind="single"))
    return pd.DataFrame(rows)


def held() -> tuple[float, int]:
    """kB of this process and its children, anonymous and shared memory, shared pages once; and how many children
    there are."""
    total, counted = 0.0, -1
    for p in (me := psutil.Process(), *me.children(recursive=True)):
        try:
            told = Path(f"/proc/{p.pid}/smaps_rollup").read_text()
        except (ProcessLookupError, FileNotFoundError):  # it has just ended
            continue
        counted += 1
        total += sum(float(kb) for kb in re.findall(r"^Pss_(?:Anon|Shmem): +(\d+) kB", told, re.M))
    assert total, "this system does not tell anonymous memory apart (Pss_Anon in /proc/<pid>/smaps_rollup)"
    return total, counted


class Watch(Callback):
    "Memory after each epoch, when everything of it is written."

    order = 200

    def __init__(self, leak: int) -> None:
        self.kb, self.children, self.leak, self.kept = [], [], leak, []

    def after_epoch(self) -> None:
        if self.leak:
            self.kept.append(mmap.mmap(-1, 1000 * self.leak))  # not from the heap, whose free blocks would hide it
            self.kept[-1].write(bytes([1]) * 1000 * self.leak)
        kb, children = held()
        self.kb.append(kb)
        self.children.append(children)


def slope(kb: list[float]) -> float:
    "kB that an epoch adds."
    return float(theilslopes([min(kb[k : k + BLOCK]) for k in range(0, len(kb) - BLOCK + 1, BLOCK)]).slope) / BLOCK


def training_config(epochs: int) -> Any:
    "The two-stage preset for so many epochs at a rate for a small network."
    return load_config(
        "two_stage",
        [
            f"data.classification.img_size={SIZE}",
            "train.step_log_interval=4",
            (
                f"train.classification={{epochs: {epochs}, lr: 0.01, amp: false, channels_last: false, ema: "
                f"{{enabled: true, decay: 0.9}}, early_stopping: {{patience: 1000}}}}"
            ),
        ],
    )


def small_network() -> nn.Module:
    "A network of a few thousand weights, always the same."
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, DRUGS),
    )


def training(root: Path, rows: pd.DataFrame, engine: str, epochs: int, leak: int) -> tuple[list[float], int]:
    """A training as a stage has it, on a network of a few thousand weights: kB after each epoch, and how many child
    processes were counted."""
    cfg = training_config(epochs)
    classes = ClassMap(sorted(set(rows["class_key"])))

    def make(part, train):
        return PillsnapClsDataset(
            part, classes, DeliverySource(root), SIZE, train=train, augment=cfg.data.augment.classification, seed=1
        )

    options = dict(engine=engine, num_workers=WORKERS, prefetch_factor=2)
    train, val = make(rows.iloc[len(rows) // 4 :], True), make(rows.iloc[: len(rows) // 4], False)
    net = small_network()
    out = root.parent / engine
    fixed = dict(config_snapshot=cfg.to_dict(), class_map=classes.to_dict(), backbone="small", img_size=SIZE)
    learn = build_learner(
        ClassifierSettings.from_config(cfg),
        net,
        nn.CrossEntropyLoss(),
        PhotoLoader(train, BATCH, EpochSampler(train, 1), drop_last=True, **options),
        {"whole": PhotoLoader(val, BATCH, **options)},
        DRUGS,
        fixed=fixed,
        out=Outputs(out, out / "metrics.json"),
    )
    learn.remove_cb(learn.progress)  # its rows would stand between the figures
    learn.add_cb(watch := Watch(leak))
    learn.fit(epochs)
    assert (out / "last.pt").exists() and len(watch.kb) == len(learn.rows) == epochs
    assert engine == "threads" or min(watch.children) >= WORKERS, "the worker processes are not there to be counted"
    return watch.kb, max(watch.children)


def trainings(n: int, epochs: int, leak: int) -> dict[str, tuple[list[float], int]]:
    "Train with both engines on the same n photos: kB after each epoch, and the child processes counted."
    runs: dict[str, tuple[list[float], int]] = {}
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / "photos"
        root.mkdir()
        rows = photos(root, n)
        for engine in ("processes", "threads"):
            runs[f"engine, 2 {engine}"] = training(root, rows, engine, epochs, leak)
            gc.collect()  # a training's processes end with it
    return runs


def main(doc: str) -> None:
    "Train with both engines and say what each adds in an epoch."
    a = arguments(doc, n=512, epochs=50, leak=0)
    n, epochs, warm = (256, 12, 2) if a.quick else (a.n, a.epochs, WARM)
    still()
    t0 = time.time()
    runs = trainings(n, epochs, a.leak)
    slopes = {k: slope(kb[warm:]) for k, (kb, _) in runs.items()}
    missed = [f"BM13: {v:+.0f} kB an epoch with {k}, at most {LIMIT:g}" for k, v in slopes.items() if v > LIMIT]
    note = (
        f"{n} photos of 96x128 at {SIZE} pixels, the first {warm} epochs left out; {time.time() - t0:.0f} s; "
        f"at most {LIMIT:g} kB"
    ) + (f"; {a.leak} kB an epoch kept on purpose" if a.leak else "")
    compare(
        "BM13",
        f"memory of a training run over {epochs} epochs, workers included",
        {k: (lambda v=v: v) for k, v in slopes.items()},
        {},
        n,
        repeats=1,
        unit="kB an epoch",
        note=note,
        better="lower",
        quick=a.quick or bool(a.leak),
        out=a.out,
        extra={
            "kb_after_epoch": {k: [round(x) for x in kb] for k, (kb, _) in runs.items()},
            "children": {k: children for k, (_, children) in runs.items()},
            "limit": LIMIT,
            "warm_up": warm,
            "missed_slope": missed,
        },
    )
    for k, (kb, children) in runs.items():
        print(
            f"{k}: {kb[warm] / 1e3:.0f} MB after {warm + 1} epochs, {kb[-1] / 1e3:.0f} MB after {epochs}, "
            f"{children} child processes counted"
        )
    finish(missed if a.leak or not a.quick else [])
