"""One run, one machine, ours beside named peers: ratios, never bare speeds.

Every `benchmarks/bmNN_*.py` builds its input, hands callables to `compare`, and ends with `finish(missed)`:

| given | means |
|---|---|
| `ours` | `{name: callable}`; the first is the one that every required ratio is taken of |
| `peers` | `{name: callable \\| str}`; a string says why the peer is absent ("not installed: No module named 'ffcv'") |
| `n` | units that one call works through; a figure is `n / seconds` |
| `id` | the row; `REQUIRED` holds what it must reach against which peer. A peer that is not in it is shown, not
compared |
| `better` | "higher": ours / peer; "lower": peer / ours (milliseconds, megabytes) |

Each callable runs once to warm up, then `repeats` rounds run them all in turn, so that a busy minute hits everyone;
medians count.
Before each turn it waits until the process and its children rest: what one contender reads ahead must not cost another.
Where a round lasts under a second, a machine whose speed changes from second to second decides it; such a round is
done in parts, in turn (`parts`).
A callable that returns a float gives its own figure instead of `n / seconds` (milliseconds, megabytes, decibels).

| option of every script | means |
|---|---|
| `--quick` | seconds, on little: proves that the script runs; its ratios prove nothing and its results are not kept |
| `--repeats N` | rounds, 5 |
| `--out DIR` | where `<ID>.json` goes: `_runs/bench`. The documentation shows `benchmarks/results`; name that folder
only to replace what is published |
"""

import argparse
import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

OUT = Path("_runs/bench")  # below the working folder: a person's own run never replaces the published results

# What each benchmark must reach, by peer: ours divided by the peer. The only place that holds these numbers.
REQUIRED: dict[str, dict[str, float]] = {
    "BM1": {"json.load": 3.5, "orjson": 1.5},
    "BM2": {"naive one-process json → txt": 5.0},
    "BM3": {"ultralytics": 3.0, "datumaro": 4.0, "globox": 6.0, "pylabel": 100.0},
    "BM4": {"ImageFolder + v2": 2.4, "DALI CPU": 1.4, "FFCV full JPEG": 1.9},
    "BM5": {"ImageFolder + v2": 2.8, "DALI CPU": 1.4},
    "BM6": {"ImageFolder + v2": 4.8, "FFCV JPEG cache": 1.15},
    "BM7": {"ImageFolder + v2": 10.0, "FFCV raw": 1.4},
    "BM8": {"DataLoader, uint8": 4.0},
    "BM9": {"required: 48": 1.0},
    "BM9_ssim": {"required: 0.995": 1.0},
    "BM10": {"bare PyTorch loop": 1 / 1.05},
    "BM11": {"onnxruntime fp32": 1.4},
    "BM11_detector": {"onnxruntime fp32": 1.7},
    "BM12": {"faiss IndexFlatIP": 6.0},
}
# Bounds that are no ratio, by benchmark.
LIMITS: dict[str, dict[str, float]] = {
    "BM9": {"decibels": 48.0},
    "BM9_ssim": {"ssim": 0.995},
    "BM10": {"waiting_percent": 5.0},
    "BM12": {"one_query_ms": 1.0},
    "BM13": {
        "kb_per_epoch": 100.0
    },  # 300 epochs of a long run may then add 30 MB; one batch kept in each would be 786 kB
    "BM14": {"seconds": 45.0, "bytes": 2e9, "growth": 1.25},
}
VERSIONS = (
    "pillsnap",
    "python",
    "numpy",
    "pandas",
    "pyarrow",
    "msgspec",
    "orjson",
    "joblib",
    "torch",
    "torchvision",
    "pillow",
    "opencv-python",
    "simplejpeg",
    "isal",
    "numba",
    "timm",
    "onnxruntime",
    "openvino",
    "faiss-cpu",
    "ultralytics",
    "datumaro",
    "globox",
    "pylabel",
    "nvidia-dali-cuda120",
    "ffcv",
)


@dataclass(frozen=True)
class Peer:
    "Something to be measured against."

    name: str  # as the table shows it
    fn: Callable[[], float | None] | None  # one call's work; None when it is absent
    why_missing: str = ""  # then: why


def optional(module: str) -> Any | str:
    "An imported module, or the line that stands in its place."
    try:
        return importlib.import_module(module)
    except Exception as e:  # a broken build is as absent as a missing one
        return f"not installed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else module}"


def arguments(doc: str, **more: Any) -> argparse.Namespace:
    "The options that all scripts share; `more` are a script's own, name=default."
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="tiny: shows that the script runs")
    p.add_argument("--repeats", type=int, default=5, help="rounds")
    p.add_argument("--out", type=Path, default=OUT, help="folder of the JSON results (default: _runs/bench)")
    for name, default in more.items():
        p.add_argument(
            f"--{name.replace('_', '-')}", type=type(default) if default is not None else str, default=default
        )
    a = p.parse_args()
    if a.quick:
        a.repeats = min(a.repeats, 2)
    return a


def machine() -> dict[str, Any]:
    "Hardware and versions, as a reader needs them to understand a ratio."
    versions = {}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = platform.python_version() if name == "python" else importlib.metadata.version(name)
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return dict(
        cpu=cpu,
        cores=cores,
        ram_gb=round(_ram() / 2**30, 1),
        load=round(os.getloadavg()[0], 2),
        system=platform.platform(),
        versions=versions,
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _ram() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


@dataclass
class _Row:
    name: str
    fn: Callable[[], float | None] | None
    ours: bool
    why: str = ""
    values: list[float] = field(default_factory=list)

    @property
    def value(self) -> float | None:
        return statistics.median(self.values) if self.values else None


def _as_rows(ours: Mapping[str, Callable], peers: Mapping[str, Callable | str] | Iterable[Peer]) -> list[_Row]:
    rows = [_Row(k, f, True) for k, f in ours.items()]
    pairs = (
        peers.items()
        if isinstance(peers, Mapping)
        else [(p.name, p.fn or p.why_missing or "not installed") for p in peers]
    )
    return rows + [_Row(k, None, False, f) if isinstance(f, str) else _Row(k, f, False) for k, f in pairs]


def _wait_until_idle(most: float = 15.0) -> None:
    """Wait until this process and its children rest: a loader that reads ahead after its epoch would do so in the
    next contender's time."""

    def used() -> float:
        total = 0.0
        for p in (me := psutil.Process(), *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):  # it has just ended
                total += sum(p.cpu_times()[:2])
        return total

    end = time.monotonic() + most
    while time.monotonic() < end:
        before = used()
        time.sleep(0.3)
        if used() - before < 0.03:
            return


def _once(row: _Row, n: int) -> float:
    _wait_until_idle()
    t0 = time.perf_counter()
    said = row.fn()
    seconds = time.perf_counter() - t0
    return said if isinstance(said, float) else n / max(seconds, 1e-9)


def _in_parts(live: list[_Row], n: int, parts: int) -> list[float]:
    """One round in which all take turns part by part, each at another part, so that none finds warm what the one
    before it has just left."""
    seconds = [0.0] * len(live)
    for part in range(parts):
        for k, row in enumerate(live):
            t0 = time.perf_counter()
            row.fn((part + k * parts // len(live)) % parts)
            seconds[k] += time.perf_counter() - t0
    return [n / max(s, 1e-9) for s in seconds]


def _measure(live: list[_Row], n: int, repeats: int, parts: int) -> None:
    "Warm all up, then run them in turn for so many rounds; each row gets its figures."
    turn = (lambda: _in_parts(live, n, parts)) if parts else (lambda: [_once(r, n) for r in live])
    turn()
    gc.collect()
    gc.freeze()  # what the contenders' libraries keep is not looked through again and again in somebody's time
    for _ in range(repeats):
        for r, value in zip(live, turn()):
            r.values.append(value)


def _line(r: _Row, first: float | None, better: str, need: float | None) -> dict[str, Any]:
    "A row of the record: its figures, their ratio to the first one's, and whether that is what is needed."
    ratio, verdict = None, ""
    if not r.ours and r.value is not None:
        ratio = first / r.value if better == "higher" else r.value / first
    if ratio is not None and need is not None:
        verdict = "reached" if ratio >= need else "missed"
    return dict(
        name=r.name,
        ours=r.ours,
        value=r.value,
        low=min(r.values, default=None),
        high=max(r.values, default=None),
        ratio=ratio,
        required=need,
        verdict=verdict,
        missing=r.why,
    )


def compare(  # noqa: PLR0913 - what one benchmark states, each part by its name
    id: str,  # "BM1"
    what: str,  # one line: what is done
    ours: Mapping[str, Callable[[], float | None]],  # the first has the bound
    peers: Mapping[str, Callable | str] | Iterable[Peer],  # a string says why one is absent
    n: int,  # units in one call
    repeats: int = 5,  # rounds after the warm-up
    unit: str = "photos/s",  # of the figures
    note: str = "",  # cache state, sizes, what differs
    better: str = "higher",  # or "lower"
    quick: bool = False,  # prove nothing, keep nothing
    out: Path = OUT,  # folder of <id>.json
    extra: Mapping[str, Any] | None = None,  # further measured values for the JSON
    parts: int = 0,  # of a round; then each callable is given a part's number and does that part alone
) -> list[str]:
    "Measure, print the table, write the JSON; returns what missed its ratio, in words."
    reach, rows = REQUIRED.get(id, {}), _as_rows(ours, peers)
    if unknown := sorted(set(reach) - {r.name for r in rows}):
        raise ValueError(f"{id} must be measured against {', '.join(unknown)}, and no contender has that name")
    _measure([r for r in rows if r.fn], n, repeats, parts)
    lines = [_line(r, rows[0].value, better, reach.get(r.name)) for r in rows]
    missed = [
        f"{id}: {x['ratio']:.2f}× of {x['name']}, {x['required']:g}× required"
        for x in lines
        if x["verdict"] == "missed" and not quick
    ]
    record = dict(
        id=id,
        what=what,
        unit=unit,
        better=better,
        n=n,
        repeats=repeats,
        quick=quick,
        note=note,
        rows=lines,
        missed=missed,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        **(extra or {}),
    )
    show(record)
    if not quick:
        save(record, out)
    return missed


def show(record: Mapping[str, Any]) -> None:
    "The table a person reads."
    from rich.console import Console
    from rich.table import Table

    m = record["machine"]
    t = Table(
        title=f"{record['id']}: {record['what']}",
        caption=(
            f"n = {record['n']:,} · median of {record['repeats']} interleaved rounds · {m['cores']} cores, {m['cpu']} "
            f"· load {m['load']}"
        )
        + (f" · {record['note']}" if record["note"] else ""),
    )
    for head, side in (
        ("", "left"),
        (record["unit"], "right"),
        ("lowest to highest", "right"),
        ("ours is", "right"),
        ("required", "right"),
        ("", "left"),
    ):
        t.add_column(head, justify=side)
    for r in record["rows"]:
        if r["value"] is None:
            t.add_row(r["name"], r["missing"], "", "", f"{r['required']:g}×" if r["required"] else "", "")
            continue
        t.add_row(
            ("[bold]" if r["ours"] else "") + r["name"],
            f"{r['value']:,.4g}",
            f"{r['low']:,.4g} … {r['high']:,.4g}",
            f"{r['ratio']:.2f}×" if r["ratio"] else "",
            f"{r['required']:g}×" if r["required"] else "",
            "(quick)" if record["quick"] and r["verdict"] else r["verdict"],
        )
    Console(width=None if sys.stdout.isatty() else 150).print(t)


def save(record: Mapping[str, Any], out: Path = OUT) -> Path:
    "Write `<id>.json`, whole or not at all, and say where."
    out.mkdir(parents=True, exist_ok=True)
    path, tmp = out / f"{record['id']}.json", out / f".{record['id']}.{os.getpid()}"
    tmp.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    tmp.replace(path)
    print(f"kept in {path}", flush=True)
    return path


def finish(missed: Iterable[str]) -> None:
    "End the script: status 1 names what was missed."
    missed = list(missed)
    for line in missed:
        print(f"missed  {line}", file=sys.stderr)
    sys.exit(1 if missed else 0)
