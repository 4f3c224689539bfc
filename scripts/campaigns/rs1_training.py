#!/usr/bin/env python
"""Kill -9 at random moments of a classifier's training. Given again, the same command ends at the weights
of the undisturbed run, to the last bit.

Each child is a whole stage (read, train, validate, save, report), forked from a process that has its libraries
loaded; it saves after every
optimizer step and is killed anywhere in it. Up to five kills hit one folder, each continuing from the one before; then
it may finish. After each
kill, whatever lies under a final name must open.

usage: rs1_training.py [--quick] [--kills 20] [--seed 0] [--out FOLDER]
"""

import multiprocessing
import os
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked: a pool of threads would not come with them
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness import arguments, finish, machine, save
from kills import in_time, killed

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.files import read_json
from pillsnap.core.jobs import RunFolder, read_record
from pillsnap.dataset.splits import smoke_splits
from pillsnap.training.classifier import ClassifierJob

EPOCHS = 3
DATA = (
    "synth.drugs=3",
    "synth.photos=36",
    "synth.combos=0",
    "synth.width=122",
    "synth.height=160",
    "data.classification.img_size=48",
    "data.progressive_validation.stage_0.max_samples=108",
)
TRAIN = (
    *DATA,
    "train.num_threads=1",
    (
        "train.classification={batch_size: 8, grad_accum_steps: 2, ema: {enabled: true, decay: 0.8}, saving: "
        "{every_steps: 1, keep_best: 2}}"
    ),
)
FORK = multiprocessing.get_context("fork")


def silently(what, *args) -> None:
    "The child's work; its words go nowhere."
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    what(*args)


def splits(root: Path) -> None:
    smoke_splits(RunFolder(root, "splits"), load_config("smoke", DATA))


def train(root: Path) -> None:
    ClassifierJob(run_dir=str(root), config="smoke", overrides=TRAIN, epochs=EPOCHS).run()


def child(what, root: Path) -> multiprocessing.Process:
    p = FORK.Process(target=silently, args=(what, root))
    p.start()
    return p


def opened(root: Path) -> str:
    "Open everything that lies under its final name; how far the training has come."
    folder, at = root / "checkpoints" / "classifier", "nothing saved"
    for p in sorted(folder.glob("*.pt")) if folder.exists() else ():
        ckpt = load_ckpt(p)
        if p.name == "last.pt":
            at = f"epoch {ckpt['epoch']}, batch {ckpt['position']['batch']}"
    for p in root.glob("reports/*.json"):
        read_json(p)
    read_record(root, "classifier")
    return at


def found(root: Path, late: bool) -> str:
    "What lies in a folder after a kill."
    return "finished" if late else opened(root)


def difference(a: Path, b: Path) -> str | None:
    "What separates two finished runs."
    if (read_record(b, "classifier") or {}).get("status") != "finished":
        return "the same command did not come to its end"
    if {p.name for p in (a / "checkpoints" / "classifier").glob("*.pt")} != {
        p.name for p in (b / "checkpoints" / "classifier").glob("*.pt")
    }:
        return "other files were kept"
    for p in sorted((a / "checkpoints" / "classifier").glob("*.pt")):
        x, y = load_ckpt(p), load_ckpt(b / p.relative_to(a))
        for part in ("model_state", "ema_state"):
            if odd := [k for k, v in x[part].items() if not torch.equal(v, y[part][k])]:
                return f"{p.name}: {part} differs, {odd[0]} first"
        if [(r["train_loss"], r["classification"]) for r in x["history"]] != [
            (r["train_loss"], r["classification"]) for r in y["history"]
        ]:
            return f"{p.name}: the history differs"
    return None


def undisturbed(root: Path) -> float:
    "Split and train without a kill; the seconds the training takes."
    child(splits, root).join()
    began = time.perf_counter()
    child(train, root).join()
    span = time.perf_counter() - began
    if (read_record(root, "classifier") or {}).get("status") != "finished":
        sys.exit("the undisturbed training failed")
    return span


def campaign(kills: int, seed: int) -> tuple[float, list[dict], list[str]]:
    "Seconds of the undisturbed training, every kill, and the folders that ended otherwise, in words."
    rng, trials, bad = random.Random(seed), [], []
    with tempfile.TemporaryDirectory() as tmp:
        straight = Path(tmp) / "straight"
        span = undisturbed(straight)
        while (before := len(in_time(trials))) < kills:
            root = Path(tmp) / f"run{len(trials)}"
            child(splits, root).join()
            look = partial(found, root)
            trials += killed(partial(child, train, root), look, span / 2, rng, kills - before)
            if why := difference(straight, root):
                bad.append(f"after {len(trials)} kills of seed {seed}: {why}")
    return span, trials, bad


def main() -> None:
    a = arguments(__doc__, kills=20, seed=0)
    t0 = time.perf_counter()
    span, trials, bad = campaign(2 if a.quick else a.kills, a.seed)
    live = in_time(trials)
    print(
        f"RS1 training: {len(live)} kills in {span:.1f} s of work; {len(bad)} folders ended otherwise than undisturbed"
    )
    if not a.quick:
        save(
            dict(
                id="RS1_training",
                what="kill −9 while training, then again",
                seed=a.seed,
                kills=len(live),
                span_s=round(span, 2),
                seconds=round(time.perf_counter() - t0, 1),
                failed=len(bad),
                trials=trials,
                machine=machine(),
            ),
            a.out,
        )
    finish(f"RS1 training: {b}" for b in bad)


if __name__ == "__main__":
    main()
