"""BM14: ten thousand, a hundred thousand, half a million annotations: time and memory per annotation must not grow.

Each size is indexed in a process of its own; its memory is the resident memory of that process and all its children,
added up every 20 ms.
At 500,000 there are ceilings: 45 seconds on two cores with the files in memory, 2 GB.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from harness import LIMITS, arguments, finish, machine, save

from pillsnap.synth.writer import write_delivery

SIZES = (10_000, 100_000, 500_000)
SECONDS, BYTES, GROWTH = (LIMITS["BM14"][k] for k in ("seconds", "bytes", "growth"))
CODE = """
import json, sys, time
from pillsnap.dataset.conversion import index_labels
t0 = time.perf_counter()
head = index_labels(sys.argv[1], sys.argv[2], workers=int(sys.argv[3]) or None)
print(json.dumps(dict(rows=head["rows"], seconds=time.perf_counter()-t0)))
"""


def family(pid: int) -> list[int]:
    "A process and everything below it."
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for c in children for p in family(int(c)))]


def resident(pid: int) -> int:
    "Bytes of memory that a process holds."
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def indexed(labels: Path, out: Path, workers: int) -> dict:
    "Index a tree in a process of its own, and watch it."
    t0, peak = time.perf_counter(), 0
    p = subprocess.Popen(
        [sys.executable, "-c", CODE, str(labels), str(out), str(workers)], stdout=subprocess.PIPE, text=True
    )
    while p.poll() is None:
        peak = max(peak, sum(map(resident, family(p.pid))))
        time.sleep(0.02)
    if p.returncode:
        sys.exit(f"indexing failed with status {p.returncode}")
    return json.loads(p.stdout.read().splitlines()[-1]) | dict(
        wall=time.perf_counter() - t0, peak_bytes=peak, index_bytes=out.stat().st_size
    )


def record(sizes: list[dict], repeats: int, missed: list[str]) -> dict:
    "What is kept, in the shape of the other benchmarks."

    def line(r: dict) -> dict:
        value, low, high = (1e6 * s / r["rows"] for s in (r["seconds"], min(r["runs_seconds"]), max(r["runs_seconds"])))
        return dict(
            name=f"{r['rows']:,} annotations, {r['wall']:.1f} s and {r['peak_bytes'] / 1e9:.2f} GB",
            ours=True,
            value=value,
            low=low,
            high=high,
            ratio=None,
            required=None,
            verdict="",
            missing="",
        )

    return dict(
        id="BM14",
        what="indexing at growing sizes",
        unit="µs each",
        better="lower",
        n=sizes[-1]["rows"],
        repeats=repeats,
        quick=False,
        note=f"files in the page cache; at most {SECONDS:g} s and {BYTES / 1e9:g} GB at the last size",
        rows=[line(r) for r in sizes],
        sizes=sizes,
        missed=missed,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
    )


def measured(n: int, repeats: int, workers: int, tmp: str | None) -> dict:
    "Write a tree of n annotations and index it so many times; the run of median duration, with the peaks of all."
    with tempfile.TemporaryDirectory(dir=tmp) as folder:
        t0 = time.perf_counter()
        write_delivery(
            Path(folder) / "d",
            drugs=max(n // 1000, 4),
            photos=min(1000, n // 4),
            combos=0,
            labels_only=True,
            progress=False,
        )
        written = time.perf_counter() - t0
        labels, index = Path(folder) / "d/data/train/labels", Path(folder) / "train.arrow"
        runs = [indexed(labels, index, workers) for _ in range(repeats)]
    return sorted(runs, key=lambda r: r["wall"])[len(runs) // 2] | dict(
        peak_bytes=max(r["peak_bytes"] for r in runs),
        written_seconds=written,
        runs_seconds=[r["seconds"] for r in runs],
    )


def over_the_limits(small: dict, big: dict) -> list[str]:
    "What the last size takes too much of, by itself or beside a smaller one, in words."
    missed = []
    if big["wall"] > SECONDS:
        missed.append(f"BM14: {big['wall']:.1f} s at {big['rows']:,} annotations, {SECONDS:g} s allowed")
    if big["peak_bytes"] > BYTES:
        missed.append(
            f"BM14: {big['peak_bytes'] / 1e9:.2f} GB at {big['rows']:,} annotations, {BYTES / 1e9:g} GB allowed"
        )
    if big["seconds"] / big["rows"] > GROWTH * small["seconds"] / small["rows"]:
        missed.append(
            f"BM14: an annotation takes {big['seconds'] / big['rows'] * 1e6:.0f} µs among {big['rows']:,} and "
            f"{small['seconds'] / small['rows'] * 1e6:.0f} µs among {small['rows']:,}"
        )
    return missed


def main() -> None:
    a = arguments(__doc__, workers=0, tmp="")
    rows, missed = [], []
    for n in (400, 1200) if a.quick else SIZES:
        best = measured(n, 1 if a.quick else a.repeats, a.workers, a.tmp or None)
        rows.append(best)
        print(
            f"{best['rows']:>9,} annotations   {best['wall']:7.1f} s in all, {best['seconds']:6.1f} s indexing   "
            f"{1e6 * best['seconds'] / best['rows']:6.1f} µs each   "
            f"peak {best['peak_bytes'] / 1e6:7.0f} MB   index {best['index_bytes'] / 1e6:6.1f} MB   (tree written "
            f"in {best['written_seconds']:.0f} s)",
            flush=True,
        )
    if not a.quick:
        missed = over_the_limits(rows[1], rows[-1])
        save(record(rows, a.repeats, missed), a.out)
    finish(missed)


if __name__ == "__main__":
    main()
