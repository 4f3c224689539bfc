"""Run the benchmarks one after another and say at the end which required ratios were missed (`make bench`).

    python benchmarks/run.py            all of them, an hour or more on an otherwise idle machine
    python benchmarks/run.py BM1 BM9    some of them
    python benchmarks/run.py --quick    each on very little: shows that they run, compares nothing
    python benchmarks/run.py --peers D  a folder with further peers (datumaro, globox, pylabel, DALI …), put on
    their import path

A script that fails is a miss too. Exit status 1 names every miss.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def scripts(wanted: list[str]) -> list[Path]:
    "The scripts of these rows, in the order of their numbers; all where none is named."
    by_id = [(f"BM{int(p.stem[2:4])}", p) for p in sorted(HERE.glob("bm[0-9][0-9]_*.py"))]
    if unknown := sorted({w.upper() for w in wanted} - {i for i, _ in by_id}):
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(dict.fromkeys(i for i, _ in by_id))}")
    return [p for i, p in by_id if not wanted or i in {w.upper() for w in wanted}]


def main() -> int:
    "Exit status: 0 when every ratio was reached."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("ids", nargs="*", help="rows, e.g. BM1")
    a.add_argument("--quick", action="store_true", help="very little of each")
    a.add_argument("--peers", type=Path, help="folder with further peers")
    a.add_argument("--out", type=Path, help="folder of the JSON results (default: _runs/bench)")
    o = a.parse_args()
    env, missed = dict(os.environ), []
    if o.peers:
        env["PYTHONPATH"] = os.pathsep.join(
            filter(None, [env.get("PYTHONPATH"), str(o.peers.resolve())])
        )  # behind: a peer must not replace what PillSnap imports
    more = (["--quick"] if o.quick else []) + (["--out", str(o.out)] if o.out else [])
    for p in scripts(o.ids):
        t0 = time.perf_counter()
        print(f"\n{p.name}", flush=True)
        r = subprocess.run([sys.executable, str(p), *more], env=env, stderr=subprocess.PIPE, text=True)
        said = [line.removeprefix("missed  ") for line in r.stderr.splitlines() if line.startswith("missed  ")]
        if r.returncode and not said:
            print(r.stderr, file=sys.stderr)
            said = [f"{p.name} ended with status {r.returncode}"]
        missed += said
        print(f"{p.name}: {time.perf_counter() - t0:.0f} s", flush=True)
    print("\n" + ("every required ratio was reached" if not missed else "missed:\n  " + "\n  ".join(missed)))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
