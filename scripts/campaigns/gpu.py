#!/usr/bin/env python
"""Measure on this machine's GPU what no CPU can show: fifteen checks, each in its own process, ten minutes, one JSON.

    python scripts/campaigns/gpu.py --out benchmarks/results/GPU.json        all fifteen
    python scripts/campaigns/gpu.py --only GP2 GP5 --add --out GPU.json      two of them; the file keeps its other rows
    python scripts/campaigns/gpu.py --list                                   what each one measures
    python scripts/campaigns/gpu.py --rehearse                               the same code, tiny sizes, no verdicts
    python scripts/campaigns/gpu.py --rehearse --device cpu                  that without a GPU

| verdict | means |
|---|---|
| PASSED | everything that the check asks for was measured and is within its limit |
| MISSED | something was measured and is beyond its limit |
| FAILED | the check raised an error, ended without a result, or did not end in time; `output` is the end of its log |
| NOT_MEASURED | no GPU, a package that is missing, no time left, or GP1 did not pass; `error` says which |
| REHEARSED | `--rehearse`: the code ran to its end; its figures mean nothing |

It runs from a checkout that nobody installed; torch with CUDA and the packages of constraints.txt must be there.
A check whose package is missing says its name. Rehearse first on a new machine: that takes two minutes.

Exit status: 0, or 1 when a check was missed or failed, or 2 for wrong arguments.
The JSON is written anew after every check, so that a campaign that is cut short keeps what it has.
"""

import argparse
import contextlib
import difflib
import faulthandler
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SEARCHED = (ROOT, HERE, ROOT / "benchmarks")  # where a check's process looks for modules
DEFAULT_OUT = Path("_runs/bench/GPU.json")
VERSIONS = (
    "torch",
    "torchvision",
    "triton",
    "timm",
    "fastai",
    "ultralytics",
    "accelerate",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "nvidia-cudnn-cu13",
    "nvidia-nccl-cu13",
)
BASE = (  # modules that every check but the first imports
    "torch",
    "torchvision",
    "fastai",
    "fastcore",
    "timm",
    "pydantic",
    "yaml",
    "numpy",
    "pandas",
    "PIL",
    "pyarrow",
    "msgspec",
    "cv2",
    "simplejpeg",
    "joblib",
    "psutil",
    "tqdm",
    "matplotlib",
)
OURS = {"pillsnap", "gpu_checks", "photos", "loading", "harness"}  # not a package that somebody forgot
TAIL = 4000  # characters of a failed check's output that the JSON keeps


@dataclass(frozen=True)
class Check:
    "One row of the campaign."

    id: str  # GP1
    title: str  # what is measured
    limit: str  # what is asked of it
    where: str  # "gpu_checks.preflight:preflight", or "/path/of/module.py:function"
    seconds: float = 90.0  # after which its process is ended
    needs: tuple[str, ...] = BASE  # modules that it imports


# in the order in which they run: cheap and decisive first, compilation last
CHECKS = (
    Check(
        "GP1",
        "the card's architecture, a bf16 convolution, free memory",
        "kernels exist for it; relative error ≤ 1e-2; enough is free; else stop",
        "gpu_checks.preflight:preflight",
        60,
        ("torch",),
    ),
    Check(
        "GP2", "host synchronisations in five rounds of loader and training step", "0", "gpu_checks.loop:host_syncs", 60
    ),
    Check(
        "GP5",
        "200 batches: augmentation on the GPU against the CPU, beside other work",
        "difference ≤ 1e-3",
        "gpu_checks.loop:augmentation",
        60,
    ),
    Check(
        "GP3",
        "EfficientNetV2-S at 384, bf16, channels_last, batch 48, in turn with timm's loop",
        "step ≥ .97×; with its loader ≥ .95×",
        "gpu_checks.loop:beside_timm",
        120,
    ),
    Check(
        "GP4",
        "share of the time in which kernels run: PNGs and pack, threads and processes",
        "≥ 95 % each",
        "gpu_checks.loop:busy",
        120,
        (*BASE, "isal", "numba"),
    ),
    Check(
        "GP6",
        "150 steps in fp32, bf16 and fp16",
        "final loss within 3 %; finite; ≤ 5 skipped steps",
        "gpu_checks.loop:precisions",
        90,
    ),
    Check(
        "GP8",
        "a real out-of-memory error, eager: ¾ of the step's peak is free",
        "weights within 1e-3 of accumulation; growth ≤ 5 MB",
        "gpu_checks.limits:out_of_memory",
        60,
    ),
    Check(
        "GP10",
        "search of the batch size beside another process, then 20 full steps",
        "no out-of-memory error; the planner within 15 %",
        "gpu_checks.limits:batch_search",
        90,
    ),
    Check(
        "GP14",
        "latency p95 with and without explicit synchronisation",
        "single ≤ 50 ms; classifier ≤ 10 ms; they differ by ≤ 2 %",
        "gpu_checks.answers:latency",
        90,
    ),
    Check(
        "GP15",
        "onnxruntime's CUDA provider beside torch; exact search with TF32 on, against fp64",
        "provider CUDA; relative ≤ 1e-4; top-1 equal",
        "gpu_checks.answers:onnx_and_search",
        90,
        (*BASE, "onnx", "onnxscript", "onnxruntime"),
    ),
    Check(
        "GP11",
        "deterministic, dropout, EMA, accumulation; SIGTERM in mid-epoch, a new process continues",
        "bit-equal; the file loads on a CPU",
        "gpu_checks.jobs:stop_and_resume",
        120,
    ),
    Check(
        "GP12",
        "NCCL with one process, and launch() on two GPUs",
        "equals the plain run ≤ 1e-6",
        "gpu_checks.jobs:nccl",
        120,
        (*BASE, "accelerate"),
    ),
    Check(
        "GP13",
        "yolo11n, one epoch: auto-batch, a real out-of-memory error, resume",
        "batch equals the log; halved once; mAP finite",
        "gpu_checks.jobs:detector",
        120,
        (*BASE, "ultralytics"),
    ),
    Check(
        "GP9",
        "a real out-of-memory error, compiled",
        "the run ends; reserved memory ≤ +5 %",
        "gpu_checks.limits:out_of_memory_compiled",
        150,
        (*BASE, "triton"),
    ),
    Check(
        "GP7",
        "torch.compile reduce-overhead: dropout, EMA swap, a short validation batch",
        "≤ 4 graphs, none after epoch 1; no skips; loss within 1 % of eager; ≥ 1.1×",
        "gpu_checks.limits:compiled",
        210,
        (*BASE, "triton"),
    ),
)
STOPS = "GP1"  # nothing else is measured when it does not pass
VERDICTS = ("PASSED", "MISSED", "FAILED", "NOT_MEASURED", "REHEARSED")
MINUTES = 9.7  # for all checks together


@dataclass
class Row:
    "What became of a check."

    id: str
    title: str
    limit: str
    verdict: str
    seconds: float = 0.0
    parts: list[dict[str, Any]] = field(default_factory=list)  # name, value, unit, limit, passed, required, note
    when: str = ""  # UTC
    error: str = ""  # why it was not measured, or how it failed
    output: str = ""  # of a failed check, the end
    facts: dict[str, Any] = field(default_factory=dict)  # what else a reader should know


def now() -> str:
    "The time, UTC."
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_row(check: Check) -> Row:
    "A row before anything is measured."
    return Row(check.id, check.title, check.limit, "NOT_MEASURED", when=now())


def verdict_of(parts: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The verdict of a check that came to its end, and why it is no better.

    One miss is a miss. What is required and was not measured is not passed.
    """
    if any(p["passed"] is False for p in parts):
        return "MISSED", ""
    absent = [p for p in parts if p["passed"] is None and p["required"]]
    if absent or not any(p["passed"] for p in parts):
        return "NOT_MEASURED", "; ".join(f"{p['name']}: {p['note']}" for p in absent) or "no figure was measured"
    return "PASSED", ""


def missing(names: Sequence[str]) -> list[str]:
    "Modules that this interpreter does not have."

    def absent(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is None
        except (ImportError, ValueError):
            return True

    return [n for n in names if absent(n)]


def selection(wanted: Sequence[str], checks: Sequence[Check]) -> list[Check]:
    "The checks that were asked for, in the campaign's order."
    if not wanted:
        return list(checks)
    known = {c.id: c for c in checks}
    for name in wanted:
        if name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, 1, 0.3)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"there is no check {name!r}{meant} Known: {', '.join(known)}")
    asked = {n.upper() for n in wanted}
    return [c for c in checks if c.id in asked]


def why_no_gpu() -> str:
    "Why there is nothing to measure on; empty when there is a GPU. CUDA is started in the checks' processes alone."
    try:
        import torch
    except ImportError as e:
        return f"torch cannot be imported ({e})"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        n = torch.cuda.device_count()
    except Exception as e:
        return f"torch cannot ask the driver: {e}"
    return "" if n else f"torch {torch.__version__} finds no CUDA device"


def machine(device: str) -> dict[str, Any]:
    "Hardware and versions, as a reader needs them to understand a figure."
    versions = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    there = dict(cores=cores, ram_gb=round(ram, 1), system=platform.platform(), versions=versions)
    return dict(device="", driver="", memory_gb=0.0) | there | (_card() if device == "cuda" else {})


def _card() -> dict[str, Any]:
    "Name, memory and driver of the first GPU, from the driver's own tool; {} without it."
    ask = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        said = subprocess.run(ask, capture_output=True, text=True, timeout=30).stdout
        name, driver, mib = (v.strip() for v in said.splitlines()[0].split(","))
        return dict(device=name, driver=driver, memory_gb=round(int(mib) / 1024, 1))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def imported(name: str) -> Any:
    "A module by its name, or by the path of its file."
    if not name.endswith(".py"):
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def child(where: str, device: str, tiny: bool, work: Path, result: Path, seconds: float) -> None:
    "In a process of its own: run one check and write its parts, or how it failed."
    if seconds > 15:
        faulthandler.dump_traceback_later(seconds - 5, exit=False)  # a check that hangs shows where
    name, _, function = where.rpartition(":")
    try:
        got = getattr(imported(name), function)(device, tiny, work)
        parts, facts = got if isinstance(got, tuple) else (got, {})
        said = dict(parts=[p if isinstance(p, dict) else asdict(p) for p in parts], facts=facts)
    except BaseException as e:
        traceback.print_exc()
        said = dict(error=f"{type(e).__name__}: {e}")
        if isinstance(e, ModuleNotFoundError) and (e.name or "").partition(".")[0] not in OURS:
            said = dict(missing=e.name or str(e))
    part = result.with_suffix(".part")
    part.write_text(json.dumps(said, ensure_ascii=False, default=str), encoding="utf-8")
    part.replace(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and worker processes of a check must not keep its process alive


def environment(work: Path) -> dict[str, str]:
    "What a check's process finds in its environment: the project without being installed, no network, own caches."
    paths = [*map(str, SEARCHED), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"PILLSNAP_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "YOLO_OFFLINE": "true"}
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"), "TRITON_CACHE_DIR": str(work / "triton")}
    caches["TMPDIR"] = str(work)
    return {**os.environ, **offline, **caches, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def run_child(check: Check, device: str, tiny: bool, work: Path, limit: float, result: Path) -> tuple[int | None, str]:
    "Its exit status, None when it did not end in time, and the end of its output."
    log = work / f"{check.id}.log"
    command = [sys.executable, str(Path(__file__).resolve()), "--child", check.where, "--device", device]
    command += ["--work", str(work), "--result", str(result), "--seconds", str(limit)]
    command += ["--rehearse"] if tiny else []
    with open(log, "wb") as out:
        to = dict(stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        p = subprocess.Popen(command, cwd=work, env=environment(work), start_new_session=True, **to)
        try:
            status = p.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(p)
    return status, log.read_text(encoding="utf-8", errors="replace")[-TAIL:]


def measure(check: Check, device: str, tiny: bool, work: Path, left: float) -> Row:
    "Run one check in a process of its own and compare what it wrote with its bounds."
    row = new_row(check)
    if gone := missing(check.needs):
        return replace(row, error=f"not installed: {', '.join(gone)}")
    if left < 5:
        return replace(row, error="the campaign's time was used up; --only measures it alone")
    whole = check.seconds * (4 if tiny and device == "cpu" else 1)  # a CPU may be slow and shared
    limit, result, t0 = min(whole, left), work / f"{check.id}.json", time.monotonic()
    result.unlink(missing_ok=True)
    status, end = run_child(check, device, tiny, work, limit, result)
    row = replace(row, seconds=round(time.monotonic() - t0, 1))
    if result.is_file():
        return _with_verdict(row, json.loads(result.read_text(encoding="utf-8")), tiny, end)
    if status is not None:
        return replace(row, verdict="FAILED", error=f"the process ended without a result, status {status}", output=end)
    if limit < whole:
        return replace(row, error=f"no end within the {limit:.0f} s that were left of the campaign's time", output=end)
    return replace(row, verdict="FAILED", error=f"no end within {limit:.0f} s", output=end)


def _end_group(p: subprocess.Popen) -> None:
    "End a check's process and those that it started; they have a process group of their own."
    with contextlib.suppress(ProcessLookupError):
        os.killpg(p.pid, signal.SIGKILL)
    p.wait()


def _with_verdict(row: Row, said: Mapping[str, Any], tiny: bool, output: str) -> Row:
    if "missing" in said:
        return replace(row, error=f"not installed: {said['missing']}", output=output)
    if "error" in said:
        return replace(row, verdict="FAILED", error=said["error"], output=output)
    row = replace(row, parts=said["parts"], facts=said["facts"])
    if tiny:
        return replace(row, verdict="REHEARSED")
    verdict, why = verdict_of(said["parts"])
    return replace(row, verdict=verdict, error=why, output=output if verdict == "MISSED" else "")


def text_of(p: Mapping[str, Any]) -> str:
    "A part's figure beside its limit."
    v, unit, asked = p["value"], f" {p['unit']}" if p["unit"] else "", f" ({p['limit']})" if p["limit"] else ""
    if v is None:
        return f"{p['name']}: not measured{asked}"
    return f"{p['name']}: {f'{v:.4g}' if isinstance(v, float) else v}{unit}{asked}"


def show(row: Row) -> None:
    "A check as a person reads it."
    print(f"{row.id:<5} {row.verdict:<13} {row.seconds:6.1f} s  {row.title}", flush=True)
    for p in row.parts:
        mark = {True: "+", False: "!", None: " "}[p["passed"]]
        print(f"      {mark} {text_of(p)}" + (f"  {p['note']}" if p["note"] else ""), flush=True)
    if row.error:
        print(f"        {row.error}", flush=True)
    if row.output and row.verdict == "FAILED":
        print("\n".join("        | " + line for line in row.output.splitlines()[-25:]), flush=True)


def write(record: Mapping[str, Any], path: Path) -> None:
    "The JSON, whole or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def kept_rows(path: Path, card: str, tiny: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    "The rows of an earlier campaign on the same card, and its machine."
    if not path.is_file():
        return [], {}
    doc = json.loads(path.read_text(encoding="utf-8"))
    was = doc["machine"]["device"]
    if doc["rehearsal"] != tiny:
        raise ValueError(f"{path} holds a {'rehearsal' if doc['rehearsal'] else 'campaign'}; name another file")
    if was and card and was != card:
        raise ValueError(f"{path} holds figures of {was}, and this is {card}; name another file")
    return doc["checks"], doc["machine"]


class Book:
    "The campaign's rows, and the JSON that holds them."

    def __init__(self, out: Path | None, device: str, tiny: bool, add: bool):
        self.out, self.rows, self.old, self.machine = out, [], [], machine(device)
        if add and out is not None:
            self.old, before = kept_rows(out, self.machine["device"], tiny)
            self.machine = before | {k: v for k, v in self.machine.items() if v}
        self.head = dict(id="GPU", what="fifteen checks of training and answering on a GPU", rehearsal=tiny, when=now())

    def add(self, row: Row) -> None:
        "Print a row and write them all."
        self.rows.append(row)
        show(row)
        if row.id == STOPS:  # nvidia-smi may not be there; torch knows the card too
            self.machine = row.facts | {k: v for k, v in self.machine.items() if v or k not in row.facts}
        if self.out is None:
            return
        new = {r.id: asdict(r) for r in self.rows}
        checks = [*(new.pop(r["id"], r) for r in self.old), *new.values()]
        seconds = round(sum(r["seconds"] for r in checks), 1)
        write({**self.head, "machine": self.machine, "seconds": seconds, "checks": checks}, self.out)

    @property
    def stopped(self) -> bool:
        "Whether the first check was made and did not pass."
        return any(r.id == STOPS and r.verdict not in ("PASSED", "REHEARSED") for r in self.rows)

    def close(self) -> int:
        "The last line; the exit status."
        counted = {v: [r.id for r in self.rows if r.verdict == v] for v in VERDICTS}
        said = ", ".join(f"{len(ids)} {v}" for v, ids in counted.items() if ids)
        seconds = sum(r.seconds for r in self.rows)
        print(f"\n{said} in {seconds:.0f} s" + (f"; written to {self.out}" if self.out is not None else ""))
        bad = counted["MISSED"] + counted["FAILED"]
        if bad:
            print(f"missed or failed: {', '.join(bad)}", file=sys.stderr)
        return 1 if bad else 0


def campaign(  # noqa: PLR0913 - the options of the command line
    checks: Sequence[Check],  # in the order in which they run
    device: str = "cuda",  # or cpu, to rehearse
    tiny: bool = False,  # a rehearsal
    out: Path | None = None,  # the JSON; None writes none
    minutes: float = MINUTES,  # for all of them
    no_gpu: str | None = None,  # why there is none; None asks torch
    add: bool = False,  # rows of `out` that are not measured now stay
) -> int:  # the exit status
    "Run the checks, print them, write the JSON."
    if no_gpu is None:
        no_gpu = "" if device == "cpu" else why_no_gpu()
    t0, book = time.monotonic(), Book(out, "" if no_gpu else device, tiny, add)
    if tiny:
        print("REHEARSAL: tiny sizes, only to see that the code runs. No figure below means anything.\n")
    if no_gpu:
        print(f"There is no GPU to measure on: {no_gpu}. Nothing was measured; all rows say NOT_MEASURED.\n")
    with tempfile.TemporaryDirectory(prefix="pillsnap-gpu-", ignore_cleanup_errors=True) as work:
        for check in checks:
            if why := no_gpu or (f"{STOPS} did not pass" if book.stopped else ""):
                book.add(replace(new_row(check), error=why))
            else:
                book.add(measure(check, device, tiny, Path(work), 60 * minutes - (time.monotonic() - t0)))
    return book.close()


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", default=[], metavar="GPn", help="these checks alone")
    p.add_argument("--out", type=Path, help=f"the JSON; {DEFAULT_OUT} when it is not named, none for a rehearsal")
    p.add_argument("--list", action="store_true", help="name the checks and run none")
    p.add_argument("--rehearse", action="store_true", help="tiny sizes, no verdicts")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only rehearses")
    p.add_argument("--minutes", type=float, default=MINUTES, help=f"for the whole campaign; {MINUTES:g}")
    p.add_argument("--add", action="store_true", help="rows of the JSON that are not measured now stay in it")
    for hidden in ("--child", "--work", "--result", "--seconds"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    a = p.parse_args(argv)
    if a.device == "cpu" and not a.rehearse:
        p.error("a CPU has nothing to measure here; add --rehearse to see that the code runs")
    try:
        a.checks = selection(a.only, CHECKS)
    except ValueError as e:
        p.error(str(e))
    return a


def main(argv: Sequence[str] | None = None) -> int:
    a = arguments(argv)
    if a.child:
        child(a.child, a.device, a.rehearse, Path(a.work), Path(a.result), float(a.seconds))
    if a.list:
        for c in a.checks:
            print(f"{c.id:<5} {c.title}\n      asked: {c.limit}")
        return 0
    out = a.out or (None if a.rehearse else DEFAULT_OUT)
    try:
        return campaign(a.checks, a.device, a.rehearse, out, a.minutes, add=a.add)
    except ValueError as e:
        print(e, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
