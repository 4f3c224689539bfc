"""RS1, packing: kill −9 at random moments, then the same call again; the result must be the undisturbed one, byte for
byte.

Every trial builds a pack with two workers in a process of its own and kills it at a random moment of its work: the
process alone, so that its
workers live on as orphans, or the whole group, as a power cut would. What lies there then may hold whole shards only;
called again, it must end
as a run that nobody disturbed. Figures go to `results/RS1_packing.json`.
"""

import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness import arguments, finish, machine, save

from pillsnap.core.errors import PillsnapError
from pillsnap.photos.pack import Pack, build_pack

CHILD = (
    "import sys, pandas as pd; from pillsnap.photos.pack import build_pack; import joblib; print('go', flush=True); "
    "build_pack(pd.read_json(sys.argv[1]), sys.argv[2], sys.argv[3], workers=2, progress=False)"
)


def photos(folder: Path, n: int) -> pd.DataFrame:
    "Small photos, so that a build takes seconds and a campaign minutes."
    folder.mkdir()
    for i in range(n):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 15, 3), np.uint8)).resize(
            (240, 320), Image.BICUBIC
        ).save(folder / f"{i:04}.png")
    return pd.DataFrame([dict(path=f"{i:04}.png", bbox=f"[{i % 90}, 60, 120, 110]") for i in range(n)])


def names(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*") if p.suffix in (".bin", ".arrow")
    }


def trial(work: Path, rows: Path, want: dict[str, str], after: float, group: bool) -> dict:
    out = work / "pack"
    p = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(rows), str(work / "photos"), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    p.stdout.readline()
    time.sleep(after)
    over = p.poll() is not None
    try:
        (os.killpg if group else os.kill)(p.pid, signal.SIGKILL)
    except ProcessLookupError:
        over = True
    p.wait()
    p.stdout.close()
    there = names(out) if out.exists() else {}
    half = [n for n, h in there.items() if want.get(n) != h]
    try:
        opened = bool(Pack(out))
    except PillsnapError:
        opened = False
    early = opened and set(there) != set(want)
    time.sleep(0 if group else 0.3)  # orphans finish the shard in hand, or find their folder swept
    build_pack(pd.read_json(rows), work / "photos", out, workers=2, progress=False)
    got = dict(
        after_s=round(after, 3),
        killed="group" if group else "process",
        too_late=over,
        shards_whole=sum(n.endswith(".bin") for n in there),
        half_written=half,
        opened_too_early=early,
        same=names(out) == want,
        sound=Pack(out).verify() == [],
    )
    shutil.rmtree(out)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(p.pid, signal.SIGKILL)  # orphans wait some minutes for work before they go by themselves
    return got


def main() -> None:
    a = arguments(__doc__, kills=24, photos=640, seed=0)
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        rows = work / "rows.json"
        photos(work / "photos", 96 if a.quick else a.photos).to_json(rows)
        times = []
        for k in range(2):  # the first starts the workers that this process keeps; a child starts its own each time
            t0 = time.perf_counter()
            build_pack(pd.read_json(rows), work / "photos", work / f"quiet{k}", workers=2, progress=False)
            times.append(time.perf_counter() - t0)
        span, want, rng = times[0], names(work / "quiet0"), random.Random(a.seed)
        trials = []
        while len([t for t in trials if not t["too_late"]]) < (2 if a.quick else a.kills):
            trials.append(trial(work, rows, want, rng.uniform(0.3 * span, span), bool(len(trials) % 2)))
            print({k: v for k, v in trials[-1].items() if k != "half_written"}, flush=True)
    live = [t for t in trials if not t["too_late"]]
    bad = [t for t in trials if t["half_written"] or t["opened_too_early"] or not t["same"] or not t["sound"]]
    print(
        f"RS1 packing: {len(live)} kills in {span:.1f} s of work, after {sorted(t['shards_whole'] for t in live)} "
        f"whole shards of {sum(n.endswith('.bin') for n in want)}; {len(bad)} ended otherwise than undisturbed"
    )
    if not a.quick:
        save(
            dict(
                id="RS1_packing",
                what="kill −9 while packing, then again",
                trials=len(live),
                span_s=round(span, 2),
                failed=len(bad),
                each=trials,
                machine=machine(),
            ),
            a.out,
        )
    finish(f"RS1 packing: {t}" for t in bad)


if __name__ == "__main__":
    main()
