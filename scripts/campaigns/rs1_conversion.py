#!/usr/bin/env python
"""Kill -9 at random moments of a conversion. The rerun ends as an undisturbed run ends, and nothing
half-written is ever seen under its name.

usage: rs1_conversion.py [--kills 20] [--seed 1] [--out FILE.json]
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pillsnap.core.files import read_json
from pillsnap.delivery.index import Index, read_manifest
from pillsnap.synth.writer import write_delivery

CODE = (
    "import sys; from pillsnap.dataset.conversion import convert_delivery; print('begun', flush=True); "
    "convert_delivery(sys.argv[1], sys.argv[2])"
)
TIMES = {"created", "created_at", "seconds", "digest"}


def timeless(o):
    "A JSON tree without what differs from run to run."
    if isinstance(o, dict):
        return {k: timeless(v) for k, v in o.items() if k not in TIMES}
    return [timeless(v) for v in o] if isinstance(o, list) else o


def said(p: Path) -> bytes:
    "What a file says, apart from when it was said."
    if p.is_symlink():
        return os.readlink(p).encode()
    if p.suffix == ".json":
        return json.dumps(timeless(read_json(p)), sort_keys=True).encode()
    return repr(Index(p).table().to_pydict()).encode() if p.suffix == ".arrow" else p.read_bytes()


def result(run: Path) -> str:
    """A hash of everything a conversion leaves; the journal of opened photos is its own business, and so is what a
    killed writer left hidden."""
    total = hashlib.sha256()
    for p in sorted(
        p
        for p in run.rglob("*")
        if (p.is_file() or p.is_symlink()) and p.name != "photos.seen" and not p.name.startswith(".")
    ):
        total.update(p.relative_to(run).as_posix().encode() + b"\0" + said(p) + b"\0")
    return total.hexdigest()


def whole(run: Path) -> list[str]:
    "Files that are under their final names; each must be readable as what it is."
    found = []
    for p in sorted(
        p for p in run.rglob("*") if p.is_file() and not any(q.startswith(".") for q in p.relative_to(run).parts)
    ):
        if p.suffix in (".json", ".arrow"):
            said(p)
        found.append(p.name)
    if (run / "manifest.json").exists():
        read_manifest(run / "manifest.csv")
    return found


def begin(delivery: Path, run: Path) -> subprocess.Popen:
    "A conversion that has loaded its code and begins."
    p = subprocess.Popen(
        [sys.executable, "-c", CODE, str(delivery), str(run)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    p.stdout.readline()
    return p


def undisturbed(delivery: Path, run: Path) -> tuple[float, str]:
    "Convert without a kill: the seconds it takes, and the hash of what it leaves."
    began = time.perf_counter()
    if begin(delivery, run).wait():
        sys.exit("the undisturbed conversion failed")
    return time.perf_counter() - began, result(run)


def killed(delivery: Path, run: Path, after: float) -> dict:
    "Kill a conversion after so many seconds: whether it had finished, and how many files are under their final names."
    p = begin(delivery, run)
    time.sleep(after)
    os.killpg(p.pid, signal.SIGKILL)
    return dict(finished=p.wait() == 0, files=len(whole(run)))


def in_time(states: list[dict]) -> int:
    "Kills that came before the conversion had finished."
    return sum(not s["finished"] for s in states)


def campaign(kills: int, seed: int = 1) -> dict:
    "Convert undisturbed; then kill, look, go on, again and again; compare."
    rng, t0, states = random.Random(seed), time.perf_counter(), []
    size = dict(drugs=4, photos=18, combos=4, width=244, height=320)
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        write_delivery(tmp / "d", **size, seed=3, faults=True, progress=False, workers=1)
        takes, want = undisturbed(tmp / "d", tmp / "straight")
        while in_time(states) < kills:
            i = len(states)
            run = tmp / f"run{i // 5}"  # five kills on one folder: each continues from the one before
            states.append(killed(tmp / "d", run, rng.uniform(0, 0.8 * takes)))
            if i % 5 == 4 or in_time(states) == kills:
                if begin(tmp / "d", run).wait():
                    sys.exit("the rerun failed")
                if result(run) != want:
                    sys.exit(f"after kill {i + 1} of seed {seed} the rerun differs from the undisturbed run: {run}")
    return dict(
        id="RS1_conversion",
        what="kill -9 in a conversion",
        seed=seed,
        trials=in_time(states),
        too_late=sum(s["finished"] for s in states),
        undisturbed_seconds=round(takes, 2),
        seconds=round(time.perf_counter() - t0, 1),
        failed=0,
        states=states,
    )


if __name__ == "__main__":
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--kills", type=int, default=20)
    a.add_argument("--seed", type=int, default=1)
    a.add_argument("--out", type=Path)
    a = a.parse_args()
    text = json.dumps(campaign(a.kills, a.seed), indent=1) + "\n"
    print(text, end="")
    if a.out:
        a.out.write_text(text, encoding="utf-8")
