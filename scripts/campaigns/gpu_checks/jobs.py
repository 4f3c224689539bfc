"""GP11 to GP13: whole training jobs that are stopped, shared between processes, or short of memory."""

import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.logs import logged_lines

from .setup import (
    SMOKE,
    Gpu,
    Part,
    Size,
    absent,
    at_least,
    at_most,
    child,
    ended,
    holds,
    relative,
    split_run,
    told,
)

TRAIN = """
import sys
from pillsnap.training.classifier import ClassifierJob
run, epochs, *over = sys.argv[1:]
ClassifierJob(run_dir=run, config="smoke", overrides=tuple(over), epochs=int(epochs)).run()
"""


def last_of(run: Path, model: str = "classifier") -> Path:
    "Where a training saves."
    return run / "checkpoints" / model / "last.pt"


# ---- GP11: stop and go on

OPEN_ON_CPU = """
import sys, torch
from pillsnap.models.factory import load_classifier
assert not torch.cuda.is_available()
loaded = load_classifier(sys.argv[1])
assert loaded.model(torch.zeros(1, 3, loaded.img_size, loaded.img_size)).isfinite().all()
"""


def terminated_in_an_epoch(gpu: Gpu, run: Path, epochs: int, over: Sequence[str]) -> int:
    "Train in a process that gets SIGTERM once it has saved; the batch of its epoch at which it stopped, or 0."
    last, end = last_of(run), time.monotonic() + gpu.patience(60)
    p = child(TRAIN, run, epochs, *over)
    while p.poll() is None and not last.exists() and time.monotonic() < end:
        time.sleep(0.002)
    p.terminate()
    p.wait(gpu.patience(30))
    if not last.exists():
        raise RuntimeError("the training that should be stopped saved nothing; its output stands above")
    return int(load_ckpt(last)["position"]["batch"])


def stop_and_resume(device: str, tiny: bool, work: Path) -> list[Part]:
    "GP11: one training undisturbed; the same one ended by SIGTERM in mid-epoch and gone on with in a new process."
    s, gpu, at, tries = Size(tiny), Gpu(device), 0, 0
    epochs, c = s.of(3, 2), "train.classification"
    net = "backbone: test_efficientnet"  # no max pooling: torch has no deterministic kernel for its gradient
    kind = f"{c}={{{net}, batch_size: 4, grad_accum_steps: 2, drop_rate: 0.3, ema: {{enabled: true, decay: 0.9}}}}"
    over = ["train.deterministic=true", "data.classification.img_size=64", kind, f"{c}.saving.every_steps=1", *SMOKE]
    straight = split_run(work, "straight", *over)
    whole = child(TRAIN, straight, epochs, *over)
    while not at and tries < 3:  # a signal that comes at an epoch's end proves less
        tries += 1
        run = split_run(work, f"stopped{tries}", *over)
        at = terminated_in_an_epoch(gpu, run, epochs, over)
    copied = Path(shutil.copy(last_of(run), work / "of_the_gpu.pt"))
    opened, goes_on = child(OPEN_ON_CPU, copied, CUDA_VISIBLE_DEVICES=""), child(TRAIN, run, epochs, *over)
    ended(goes_on, gpu.patience(60), "the training that continues")
    ended(whole, gpu.patience(60), "the undisturbed training")
    ended(opened, gpu.patience(60), "opening the checkpoint without a GPU")
    a, b = load_ckpt(last_of(straight)), load_ckpt(last_of(run))
    same = {part: {k: torch.equal(v, b[part][k]) for k, v in a[part].items()} for part in ("model_state", "ema_state")}
    differ = [k for part in same.values() for k, equal in part.items() if not equal]
    where = f"after batch {at}" if at else "at an epoch's end"
    return [
        holds("stopped within an epoch", at > 0, where, "in mid-epoch"),
        at_most("tensors that are not equal to the last bit", len(differ), 0, note=", ".join(differ[:4])),
        holds("epochs", a["epoch"] == b["epoch"] == epochs, b["epoch"], f"{epochs}"),
        holds("the file opens without a GPU", True, "and answers", "and answers"),
    ]


# ---- GP12: several processes

# accelerate leaves the network of a group of one without torch's wrapper; here it gets one, so that gradients are
# reduced by the backend, and each reduction is counted
SHARED = """
import sys
import torch
import torch.distributed
from accelerate import Accelerator
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
run, *over = sys.argv[1:]
reduced = 0
def counted(group, bucket):
    global reduced
    reduced += 1
    return allreduce_hook(group, bucket)
def wrapped(self, model, **_):
    ddp = DistributedDataParallel(model, [0] if torch.cuda.is_available() else None)
    ddp.register_comm_hook(None, counted)
    return ddp
Accelerator.prepare_model = wrapped
was = torch.distributed.init_process_group
def noted(*args, **kwargs):
    was(*args, **kwargs)
    with open(f"{run}/backend", "w") as f:
        f.write(f"{torch.distributed.get_backend()} {torch.distributed.get_world_size()}")
torch.distributed.init_process_group = noted
from pillsnap.training.distributed import run_rank
run_rank("classifier", run, "smoke", over)
with open(f"{run}/reduced", "w") as f:
    f.write(str(reduced))
"""
LAUNCHED = """
import sys
from pillsnap.training.distributed import launch_from_notebook, run_rank
if __name__ == "__main__":
    run, *over = sys.argv[1:]
    launch_from_notebook(run_rank, ("classifier", run, "smoke", over), 2)
"""
COMMAND = """
import sys
from pillsnap.training.distributed import distributed_command
run, *over = sys.argv[1:]
distributed_command("classifier", run, 0, "smoke", over)
"""


def group_of_one(gpu: Gpu) -> dict[str, str]:
    "What a launcher tells its only process."
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    ranks = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    cpu = {} if gpu.there else {"ACCELERATE_USE_CPU": "true"}
    return dict(**ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **cpu)


def nccl(device: str, _tiny: bool, work: Path) -> list[Part]:
    """GP12: the classifier's job plain, as the only process of a group, and by `pillsnap distributed` on one GPU.

    On two GPUs by launch() too. The network has no batch statistics and no dropout.
    """
    gpu, gpus, limit = Gpu(device), torch.cuda.device_count() if device == "cuda" else 0, "≤ 1e-06"
    plainly = "batch_size: 8, epochs: 2, grad_accum_steps: 2, amp: false, tf32: false, optimizer: sgd, lr: 0.02"
    kind = f"train.classification={{backbone: test_convnext, {plainly}, drop_rate: 0.0}}"
    over = ["train.deterministic=true", "data.classification.img_size=64", kind, *SMOKE]
    names = ["plain", "group", "command", *(["launched"] if gpus > 1 else [])]
    runs = {name: split_run(work, name, *over) for name in names}
    first = {"CUDA_VISIBLE_DEVICES": "0"} if gpus > 1 else {}
    going = {
        "plain": child(TRAIN, runs["plain"], 2, *over, **first),
        "group": child(SHARED, runs["group"], *over, **first, **group_of_one(gpu)),
        "command": child(COMMAND, runs["command"], *over, **first),
    }
    for name, p in going.items():
        ended(p, gpu.patience(90), f"the training called {name}")
    if gpus > 1:
        ended(child(LAUNCHED, runs["launched"], *over), gpu.patience(90), "launch()")
    state = {name: load_ckpt(last_of(r))["model_state"] for name, r in runs.items()}
    apart = {name: relative(v, state["plain"]) for name, v in state.items()}
    note = runs["group"] / "backend"
    backend = note.read_text() if note.is_file() else "no group was made"
    reduced = int((runs["group"] / "reduced").read_text())
    alone = absent("launch() on two GPUs", limit, f"this machine has {gpus} GPU", required=False)
    two = at_most("weights of launch() on two GPUs against plain", apart["launched"], 1e-6) if gpus > 1 else alone
    return [
        holds("group of the single process", backend == ("nccl 1" if gpu.there else "gloo 1"), backend, "nccl 1"),
        at_least("reductions of gradients in the group", reduced, 1),
        at_most("weights in a group of one against plain", apart["group"], 1e-6),
        at_most("weights of `pillsnap distributed` against plain", apart["command"], 1e-6),
        two,
    ]


# ---- GP13: the detector


class DetectorMemory:
    "ultralytics' hooks that measure what a step needs; with `leave`, a ballast leaves so many bytes for an epoch."

    def __init__(self, gpu: Gpu, leave: float | None = None):
        self.gpu, self.leave, self.need, self.ballast, self.batches, self.refused = gpu, leave, 0, None, [], False

    def hooks(self) -> dict[str, Callable[[Any], None]]:
        return {
            "on_train_epoch_start": self.begin,
            "on_train_batch_end": self.step,
            "on_train_epoch_end": self.release,
        }

    def begin(self, trainer: Any) -> None:
        self.gpu.clear()
        self.at = self.gpu.begin_peak()
        if self.leave is None:
            return
        self.ballast, self.leave = self.gpu.ballast(self.leave), None  # once: the epoch begins anew after an error
        if not self.gpu.there:
            trainer.model.register_forward_pre_hook(self.refuse)

    def refuse(self, *_: Any) -> None:
        "For a rehearsal: one error, as CUDA raises it."
        if not self.refused:
            self.refused = True
            raise RuntimeError("CUDA out of memory (rehearsed)")

    def step(self, trainer: Any) -> None:
        if not self.batches:
            self.gpu.sync()
            self.need = self.gpu.peak() - self.at
        self.batches.append(trainer.batch_size)

    def release(self, _trainer: Any) -> None:
        self.ballast = None
        self.gpu.clear()


def train_yolo(root: Path, cfg: Any, memory: DetectorMemory | None = None) -> tuple[Any, list[str]]:
    "The detector's training of a run folder, and the lines of its log; it resumes from last.pt."
    from pillsnap.core.jobs import RunFolder
    from pillsnap.training.detector import train_detection_stage

    run = RunFolder(root, "detector")
    run.resuming = last_of(root, "detector").exists()
    with logged_lines() as lines:
        trained = train_detection_stage(run, cfg, memory and memory.hooks())
    run.tb.close()
    return trained, lines


def searched_batch(lines: Sequence[str]) -> int | None:
    "The batch that the log says was found; None where the search fell back to a default."
    return next(
        (int(m[1]) for line in lines if (m := re.match(r"auto-batch: (\d+) photos per step, found", line))), None
    )


def detector(device: str, tiny: bool, work: Path) -> tuple[list[Part], dict[str, Any]]:
    "GP13: yolo11n from its description, one epoch with the batch found; again with a ballast; then one more epoch."
    s, gpu = Size(tiny), Gpu(device)
    kind = "train.detection={model: yolo11n, epochs: 1, batch_size: 8, auto_batch_tune: true, auto_batch_max: 16}"
    over = [f"data.detection.img_size={s.of(320, 96)}", kind, *SMOKE]

    def make(root: Path, *more: str) -> Any:
        return load_config("smoke", [*over, f"paths.exp_dir={root}", *more])

    calm, short = (split_run(work, name, *over) for name in ("calm", "short"))
    memory = DetectorMemory(gpu)
    plain, lines = train_yolo(calm, make(calm), memory)
    used, said = load_ckpt(last_of(calm, "detector"))["batch"], searched_batch(lines)
    halved, more = train_yolo(short, make(short), DetectorMemory(gpu, gpu.quarter_short(s, memory.need)))
    ended_with = load_ckpt(last_of(short, "detector"))["batch"]
    retries = sum(line.startswith("out of memory") for line in more)
    later, _ = train_yolo(short, make(short, "train.detection.epochs=2"))
    epochs, scores = [r["epoch"] for r in later.history], [r["detection"]["mAP@0.5"] for r in later.history]
    scores.append(plain.history[-1]["detection"]["mAP@0.5"])
    batches = f"the log {said}, the checkpoint {used}, the steps {sorted(set(memory.batches))}"
    search = holds("auto-batch", said == used and set(memory.batches) == {used}, batches, "all equal")
    return [
        search if gpu.there else absent("auto-batch", "all equal", "the search needs a GPU"),
        holds(
            "halved", (retries, ended_with) == (1, used // 2), f"{retries}×, {used} to {ended_with}", "once, to half"
        ),
        holds("epochs after going on", epochs == [1, 2], epochs, "1 and 2"),
        holds("mAP", bool(np.isfinite(scores).all()), ", ".join(f"{v:.3f}" for v in scores), "finite"),
        told("a step needs", memory.need / 1e9, "GB"),
    ], dict(log=[line for line in (*lines, *more) if "batch" in line or "memory" in line])
