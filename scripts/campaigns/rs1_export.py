#!/usr/bin/env python
"""Kill -9 at random moments of an export. Given again, the same command ends with the files of the
undisturbed run.

One small run is trained and evaluated. Every trial exports a copy of it in a forked child that has its libraries
loaded, and is killed anywhere in it, up to five times in one folder; then it may finish. After each kill,
whatever lies under a final name must open.

usage: rs1_export.py [--quick] [--kills 20] [--seed 0] [--out FOLDER]
"""

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # children are forked: a pool of threads would not come with them
import onnxruntime
import torch  # noqa: F401 - loaded before the children are forked

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness import arguments, finish, machine, save
from kills import in_time, killed

from pillsnap.core.files import read_json, sha256_file
from pillsnap.core.jobs import read_record
from pillsnap.deployment.export import ExportJob

FORK = multiprocessing.get_context("fork")
STAGES = ("conversion", "splits", "classifier", "detector", "evaluation")


def export(root: Path) -> None:
    "The child's work; its words go nowhere."
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    ExportJob(run_dir=str(root), config="smoke", overrides=("train.num_threads=1",)).run()


def child(root: Path) -> multiprocessing.Process:
    p = FORK.Process(target=export, args=(root,))
    p.start()
    return p


def opened(root: Path) -> list[str]:
    "What lies under its final name, each of it opened."
    there = sorted((root / "export").glob("*")) if (root / "export").exists() else []
    for p in there:
        if p.suffix == ".onnx":
            onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"])
        elif p.suffix == ".json":
            read_json(p)
    read_record(root, "export")
    return [p.name for p in there if not p.name.startswith(".")]


def answer(root: Path) -> dict[str, str]:
    "The exported networks, byte for byte, and what the comparison with torch said of them."
    said = {p.name: sha256_file(p) for p in sorted((root / "export").glob("*.onnx"))}
    return said | {"verdict": (read_record(root, "export") or {}).get("verdict", "")}


def trained_run(root: Path) -> Path:
    "One small run, trained and evaluated, ready for its export."
    for stage in STAGES:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pillsnap",
                "run",
                stage,
                "--config",
                "smoke",
                f"paths.exp_dir={root}",
                "train.num_threads=1",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return root


def undisturbed(root: Path) -> float:
    "Export without a kill; the seconds it takes."
    began = time.perf_counter()
    child(root).join()
    span = time.perf_counter() - began
    if (read_record(root, "export") or {}).get("status") != "finished":
        sys.exit("the undisturbed export failed")
    return span


def campaign(kills: int, seed: int) -> tuple[float, list[dict], list[str]]:
    "Seconds of the undisturbed export, every kill, and the folders that ended otherwise, in words."
    rng, trials, bad = random.Random(seed), [], []
    with tempfile.TemporaryDirectory() as tmp:
        base = trained_run(Path(tmp) / "base")

        def copy(name: str) -> Path:
            return Path(shutil.copytree(base, Path(tmp) / name))

        straight = copy("straight")
        span = undisturbed(straight)
        while (before := len(in_time(trials))) < kills:
            root = copy(f"run{len(trials)}")
            trials += killed(partial(child, root), lambda _late, root=root: opened(root), span, rng, kills - before)
            if answer(root) != answer(straight):
                bad.append(f"after {len(trials)} kills of seed {seed}: {answer(root)} instead of {answer(straight)}")
            shutil.rmtree(root)
    return span, trials, bad


def main() -> None:
    a = arguments(__doc__, kills=20, seed=0)
    t0 = time.perf_counter()
    span, trials, bad = campaign(2 if a.quick else a.kills, a.seed)
    live = in_time(trials)
    print(f"RS1 export: {len(live)} kills in {span:.1f} s of work; {len(bad)} folders ended otherwise than undisturbed")
    if not a.quick:
        save(
            dict(
                id="RS1_export",
                what="kill −9 while exporting, then again",
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
    finish(f"RS1 export: {b}" for b in bad)


if __name__ == "__main__":
    main()
