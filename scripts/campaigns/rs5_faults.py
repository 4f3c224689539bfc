#!/usr/bin/env python
"""A disk that is full, a folder that is read-only, no more file handles, at random moments of conversion,
splits and packing.

Each trial runs a stage in a process of its own with one fault in it, on a folder where an earlier stage has finished.
It must end with an error in words or, where
the fault came too late, with the undisturbed result; what stood there before must stand; and the same call without
the fault must end as if nothing had been.
usage: rs5_faults.py [--trials 60] [--seed 1] [--out FOLDER]
"""

import errno
import hashlib
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "benchmarks"), str(Path(__file__).resolve().parent)]
from harness import arguments, finish, machine, save
from rs1_conversion import said

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import RunFolder
from pillsnap.dataset.conversion import convert_delivery
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob
from pillsnap.photos.stagepack import build_stage_pack, pack_settings
from pillsnap.synth.writer import write_delivery

FAULTS = ("disk full", "read-only", "no handles")
SETTINGS = ["data.progressive_validation.stage_0.max_samples=40", "evaluation.min_eval_samples=6", "pack.scale=1.0"]


def convert(work: Path, run: Path) -> None:
    convert_delivery(work / "delivery", run)


def split(_work: Path, run: Path) -> None:
    SplitsJob(near_duplicates=False)._cut(RunFolder(run), load_config("smoke", SETTINGS))


def pack(_work: Path, run: Path) -> None:
    cfg = load_config("smoke", SETTINGS)
    settings = pack_settings(cfg.pack, cfg.data)
    build_stage_pack(load_split_data(run, 0), run, settings, workers=1, progress=False)


STAGES: tuple[Callable[[Path, Path], None], ...] = (convert, split, pack)


def contents(run: Path) -> dict[str, str]:
    "What a run folder holds under final names, apart from times, logs and the journal of opened photos."
    files = {
        p.relative_to(run): p
        for p in sorted(run.rglob("*"))
        if p.is_file() and p.name not in ("photos.seen", "pack.json")
    }
    kept = {r: p for r, p in files.items() if not any(q.startswith(".") or q in ("logs", "tb") for q in r.parts)}
    return {
        r.as_posix(): hashlib.sha256(p.read_bytes() if "pack" in r.parts else said(p)).hexdigest()
        for r, p in kept.items()
    }


def plant(fault: str, rng: random.Random) -> None:
    "Limits that bite root as well; a file system that refuses every change after a few."
    if fault == "disk full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (n := int(10 ** rng.uniform(2, 4.7)), n))
    elif fault == "no handles":
        os.close(free := os.dup(1))  # the lowest number that is free
        resource.setrlimit(resource.RLIMIT_NOFILE, (n := free + rng.randrange(4), n))
    else:
        left, real = rng.randrange(8), {name: getattr(os, name) for name in ("replace", "rename", "mkdir")}

        def refuse(name):
            def call(*a, **k):
                nonlocal left
                left -= 1
                if left < 0:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                return real[name](*a, **k)

            return call

        for name in real:
            setattr(os, name, refuse(name))


def child(stage: Callable, work: Path, run: Path, fault: str | None, rng: random.Random) -> str:
    "A stage in a process of its own: `done`, `error in words`, or what else it died of."
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if fault:
                plant(fault, rng)
            stage(work, run)
            end = "done"
        except PillsnapError:
            end = "error in words"
        except BaseException as e:
            end = f"{type(e).__name__}: {e}"
        os.write(write, end.encode()[:2000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as f:
        end = f.read()
    os.waitpid(pid, 0)
    return end or "died without a word"


def trial(stage: Callable, work: Path, fault: str, rng: random.Random, want: dict[str, str]) -> dict:
    "One fault, one look, one call without it."
    run, before = work / "run", contents(work / "before" / stage.__name__)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(work / "before" / stage.__name__, run, symlinks=True)
    end = child(stage, work, run, fault, rng)
    there = contents(run)
    changed = [k for k, v in before.items() if there.get(k) != v]
    half = [k for k, v in there.items() if k not in before and want.get(k) != v]
    again = child(stage, work, run, None, rng)
    return dict(
        stage=stage.__name__,
        fault=fault,
        end=end,
        changed=changed,
        half_written=half,
        again=again,
        same=contents(run) == want,
    )


def campaign(trials: int, seed: int = 1) -> list[dict]:
    "Every stage with every fault, in turn."
    rng, got = random.Random(seed), []
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        write_delivery(
            work / "delivery", drugs=4, photos=18, combos=2, seed=3, width=98, height=128, progress=False, workers=1
        )
        run, want = work / "straight", {}
        run.mkdir()
        for stage in STAGES:
            shutil.copytree(run, work / "before" / stage.__name__, symlinks=True)
            stage(work, run)
            want[stage] = contents(run)
        for k in range(trials):
            stage, fault = STAGES[k % 3], FAULTS[k // 3 % 3]
            got.append(trial(stage, work, fault, rng, want[stage]))
    return got


def main() -> None:
    a = arguments(__doc__, trials=72, seed=1)
    t0, got = time.perf_counter(), campaign(9 if a.quick else a.trials, a.seed)
    bad = [
        t
        for t in got
        if t["end"] not in ("done", "error in words")
        or t["changed"]
        or t["half_written"]
        or t["again"] != "done"
        or not t["same"]
    ]
    ends = Counter(f"{t['stage']}, {t['fault']}: {t['end']}" for t in got)
    for line, n in sorted(ends.items()):
        print(f"{n:4} × {line}")
    print(
        f"RS5: {len(got)} faults, {sum(t['end'] == 'error in words' for t in got)} told in words, {len(bad)} that "
        "ended otherwise than they must"
    )
    if not a.quick:
        save(
            dict(
                id="RS5",
                what="disk full, read-only folder, no file handles",
                trials=len(got),
                failed=len(bad),
                seconds=round(time.perf_counter() - t0, 1),
                when=time.strftime("%Y-%m-%d", time.gmtime()),
                ends=dict(sorted(ends.items())),
                machine=machine(),
            ),
            a.out,
        )
    finish(f"RS5: {t}" for t in bad)


if __name__ == "__main__":
    main()
