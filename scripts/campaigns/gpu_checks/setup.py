"""What the checks of `gpu.py` share: sizes, the GPU behind a few calls, settings, photos, learners and processes."""

import functools
import gc
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from torch import nn

from pillsnap.core.config import load_config
from pillsnap.core.settings import Config
from pillsnap.dataset.datasets import PillsnapClsDataset, Source
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.sampling import EpochSampler
from pillsnap.delivery.classmap import ClassMap
from pillsnap.models.factory import build_classification_model
from pillsnap.models.losses import build_criterion
from pillsnap.training.learner import Outputs, build_learner
from pillsnap.training.presets import ClassifierSettings

CLASSES = 12  # drugs of every check


# ---- sizes and results


@dataclass(frozen=True)
class Size:
    "How large a check is."

    tiny: bool  # a rehearsal

    def of(self, full: Any, tiny: Any) -> Any:
        "The value for the campaign, or the one for a rehearsal."
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Part:
    "One figure of a check."

    name: str
    value: float | int | str | None  # None: not measured, `note` says why
    limit: str = ""  # in words; "" where nothing is asked
    passed: bool | None = None  # None: nothing is asked, or not measured
    required: bool = False  # a check without this figure has not passed
    unit: str = ""
    note: str = ""


def at_most(name: str, value: float, limit: float, unit: str = "", note: str = "") -> Part:
    "A figure that may not be larger; NaN is a miss."
    return Part(name, float(value), f"≤ {limit:g}", bool(value <= limit), True, unit, note)


def at_least(name: str, value: float, limit: float, unit: str = "", note: str = "") -> Part:
    "A figure that may not be smaller; NaN is a miss."
    return Part(name, float(value), f"≥ {limit:g}", bool(value >= limit), True, unit, note)


def holds(name: str, ok: bool, said: Any, limit: str, note: str = "") -> Part:
    "Something that must be so."
    return Part(name, str(said), limit, bool(ok), True, "", note)


def absent(name: str, limit: str, why: str, required: bool = True) -> Part:
    "A figure that could not be had here."
    return Part(name, None, limit, None, required, "", why)


def told(name: str, value: Any, unit: str = "", note: str = "") -> Part:
    "A figure that nothing is asked of."
    return Part(name, value, "", None, False, unit, note)


# ---- the GPU


class Gpu:
    "The few calls that need CUDA; on a CPU they do nothing and answer 0."

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.there = self.device.type == "cuda"

    def sync(self) -> None:
        "Wait until everything that was asked of the GPU is done."
        if self.there:
            torch.cuda.synchronize()

    def clear(self) -> None:
        "Give back what nobody holds."
        if self.there:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def free(self) -> int:
        "Bytes that a process could take now."
        self.clear()
        return torch.cuda.mem_get_info()[0] if self.there else 0

    def allocated(self) -> int:
        "Bytes of tensors."
        return torch.cuda.memory_allocated() if self.there else 0

    def reserved(self) -> int:
        "Bytes that torch holds, used or not."
        return torch.cuda.memory_reserved() if self.there else 0

    def begin_peak(self) -> int:
        "From here on the peak is counted; returns what is allocated now."
        if self.there:
            torch.cuda.reset_peak_memory_stats()
        return self.allocated()

    def peak(self) -> int:
        "The most bytes of tensors since then."
        return torch.cuda.max_memory_allocated() if self.there else 0

    def patience(self, seconds: float) -> float:
        "How long a child may take; a CPU that rehearses may be slow and shared."
        return seconds if self.there else 4 * seconds

    def quarter_short(self, s: Size, need: float) -> float:
        "Three quarters of what a step needs; a rehearsal's steps are smaller than what libraries take by the way."
        return s.of(0.75 * need, max(0.75 * need, 256e6))

    def ballast(self, leave: float) -> torch.Tensor | None:
        "A tensor that leaves so many bytes of the card free."
        if not self.there:
            return None
        take = self.free() - int(leave)
        if take <= 0:
            raise RuntimeError(f"only {(take + leave) / 1e9:.1f} GB are free, {leave / 1e9:.1f} GB should be left")
        return torch.empty(take, dtype=torch.uint8, device=self.device)


class Watch(Callback):
    "Calls functions after numbered training batches, after everybody else."

    order, run_valid = 2000, False

    def __init__(self, at: Mapping[int, Callable[[], Any]]):
        self.at = dict(at)

    def after_batch(self) -> None:
        if self.iter in self.at:
            self.at[self.iter]()


class Stopwatch(Callback):
    "Milliseconds of a training step from batch `first` to `last` of each epoch; the GPU is waited for at both."

    order, run_valid = 1001, False

    def __init__(self, gpu: Gpu, first: int, last: int):
        self.gpu, self.first, self.last, self.ms = gpu, first, last, []

    def after_batch(self) -> None:
        if self.iter not in (self.first, self.last):
            return
        self.gpu.sync()
        now = time.perf_counter()
        if self.iter == self.first:
            self.began = now
        else:
            self.ms.append(1e3 * (now - self.began) / (self.last - self.first))


class Losses(Callback):
    "The loss of every training batch, kept on the device."

    order, run_valid = 999, False

    def __init__(self):
        self.seen: list[torch.Tensor] = []

    def after_batch(self) -> None:
        self.seen.append(self.learn.loss.detach().clone())

    def all(self) -> np.ndarray:
        "As numbers."
        return torch.stack(self.seen).float().cpu().numpy()


# ---- configuration, network, learner


def show_decisions() -> None:
    "Print the project's log lines into the check's output."
    log = logging.getLogger("pillsnap")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stdout))
        log.setLevel(logging.INFO)
        log.propagate = False


def settings(s: Size, *over: str, img: int = 384, batch: int = 48, backbone: str = "tf_efficientnetv2_s") -> Config:
    "The two-stage preset without weights to fetch and without compilation; `over` comes last."
    c = "train.classification"
    base = [f"{c}.pretrained=false", f"{c}.early_stopping.patience=1000", "optimization.torch_compile=none"]
    size = [f"data.classification.img_size={s.of(img, 64)}", f"{c}.batch_size={s.of(batch, 4)}"]
    kind = [f"{c}.backbone={s.of(backbone, 'test_resnet')}", "train.oom.cooldown_sec=0"]
    return load_config("two_stage", [*base, *size, *kind, *over])


def drug_keys(n: int = CLASSES) -> ClassMap:
    "The class map of so many drugs."
    return ClassMap([f"K-{k + 1:06d}" for k in range(n)])


def network(cfg: Config, device: torch.device, seed: int = 0) -> nn.Module:
    "The configured classifier with random weights that depend on the seed alone."
    c = cfg.train.classification
    torch.manual_seed(seed)
    last = c.channels_last and cfg.optimization.channels_last
    return build_classification_model(c.backbone, CLASSES, last, False, c.drop_rate).to(device)


def make_learner(  # noqa: PLR0913 - the parts of a learner
    cfg: Config,
    model: nn.Module,
    train: Any,  # loader or list of batches
    views: Mapping[str, Any],  # validation loaders by view
    device: torch.device,
    cbs: Sequence[Callback] = (),
    folder: Path | None = None,  # of checkpoints; None saves none
) -> Any:
    "The project's Learner with the project's loss, as a training job builds it."
    keys, c = drug_keys(), cfg.train.classification
    fixed = dict(config_snapshot=cfg.to_dict(), class_map=keys.to_dict(), backbone=c.backbone)
    fixed |= dict(img_size=cfg.data.classification.img_size)
    show_decisions()
    criterion = build_criterion(cfg, np.full(CLASSES, 10), list(keys))
    s = ClassifierSettings.from_config(cfg)
    learn = build_learner(s, model, criterion, train, views, CLASSES, device, fixed, Outputs(folder))
    learn.add_cbs(list(cbs))
    return learn


# ---- photos


def coloured_batches(
    n: int, batch: int, img: int, device: torch.device, seed: int = 0, last: int | None = None
) -> list[tuple]:
    "Batches on the device: each drug has a coarse pattern, with noise; `last`: photos of the last batch."
    g, out = torch.Generator(device).manual_seed(seed), []
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(7)).to(device)
    for k in range(n):
        size = last if last and k == n - 1 else batch
        y = torch.randint(0, CLASSES, (size,), generator=g, device=device)
        noise = 0.3 * torch.randn(size, 3, img, img, generator=g, device=device)
        x = nn.functional.interpolate(patterns[y], size=(img, img), mode="nearest") + noise
        out.append((x, y, {"paths": [f"{k}-{i}.jpg" for i in range(size)], "skipped": []}))
    return out


class PatchPhotos(Source):
    "Photos of coloured patches, made from their number; no disk is read."

    def __init__(self, side: int = 160):
        self.side = side

    def open(self, photo: Any, _view: Any, _reduce: int = 1) -> tuple[np.ndarray, None]:
        return _patches(int(photo.path.split(".")[0]), self.side), None


@functools.lru_cache(512)
def _patches(number: int, side: int) -> np.ndarray:
    small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
    return np.ascontiguousarray(np.kron(small, np.ones((side // 8, side // 8, 1), np.uint8)))


def photo_rows(n: int, side: int) -> pd.DataFrame:
    "Manifest rows of so many photos."
    of = dict(bbox="", width=side, height=side, kind="single")
    return pd.DataFrame([dict(path=f"{k}.jpg", class_key=f"K-{k % CLASSES + 1:06d}", **of) for k in range(n)])


def loader(  # noqa: PLR0913 - the parts of a loader
    cfg: Config,
    rows: pd.DataFrame,
    source: Any,
    device: torch.device,
    workers: int,
    engine: str = "threads",
    ahead: int = 4,  # batches, of each worker process or of all threads
) -> PhotoLoader:
    "The project's training loader of whole photos with the configured augmentation."
    c, t = cfg.data.classification, cfg.train
    augment, layout = cfg.data.augment.classification, t.classification.channels_last and cfg.optimization.channels_last
    args = (rows, drug_keys(), source, c.img_size, True, 0.0, "whole", t.seed, augment, c.crop_padding, layout)
    data = PillsnapClsDataset(*args)
    there = dict(device=device, pin_memory=device.type == "cuda", drop_last=True)
    work = dict(engine=engine, num_workers=workers, prefetch_factor=ahead)
    return PhotoLoader(data, t.classification.batch_size, EpochSampler(data, t.seed), **there, **work)


def patch_loader(cfg: Config, n: int, device: torch.device, side: int = 160, workers: int = 4) -> PhotoLoader:
    "A loader of photos that are made on the spot."
    return loader(cfg, photo_rows(n, side), PatchPhotos(side), device, workers)


def cores() -> int:
    "Processors of this process."
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---- other processes


def child(code: str, *args: Any, **env: str) -> subprocess.Popen:
    "An interpreter that runs some code; its output comes together with this process's."
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], env={**os.environ, **env}, stdin=subprocess.PIPE, text=True
    )


def ended(p: subprocess.Popen, seconds: float, what: str) -> None:
    "Wait for a child that must succeed."
    try:
        status = p.wait(seconds)
    except subprocess.TimeoutExpired:
        p.kill()
        raise RuntimeError(f"{what} did not end within {seconds:.0f} s") from None
    if status:
        raise RuntimeError(f"{what} ended with status {status}; its output stands above")


HOLD = """
import sys, torch
take = torch.cuda.mem_get_info()[0]-int(sys.argv[1])
held = torch.empty(max(1, take), dtype=torch.uint8, device="cuda")
torch.cuda.synchronize()
open(sys.argv[2], "w").write(str(held.numel()))
sys.stdin.read()
"""


class Neighbour:
    "Another process that holds the card's memory but for so many bytes, while the block runs."

    def __init__(self, gpu: Gpu, leave: float, work: Path):
        self.gpu, self.leave, self.note = gpu, leave, work / "neighbour"

    def __enter__(self) -> "Neighbour":
        self.p, self.held = None, 0
        if not self.gpu.there:
            return self
        self.gpu.clear()
        self.note.unlink(missing_ok=True)
        self.p = child(HOLD, int(self.leave), self.note)
        end = time.monotonic() + 60
        while not (self.note.is_file() and self.note.read_text()):
            if self.p.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the neighbouring process did not take its memory; its output stands above")
            time.sleep(0.05)
        self.held = int(self.note.read_text())
        return self

    def __exit__(self, *_: Any) -> None:
        if self.p is not None:
            self.p.stdin.close()
            self.p.wait(30)


SMOKE = (
    "synth.drugs=6",
    "synth.photos=18",
    "synth.combos=4",
    "synth.width=244",
    "synth.height=320",
    "train.num_threads=1",
    "optimization.torch_compile=none",
)
SPLIT = threading.Lock()


def split_run(work: Path, name: str, *over: str) -> Path:
    "A run folder whose small synthetic delivery is converted and split; the delivery is rendered once for all of them."
    from pillsnap.core.jobs import RunFolder
    from pillsnap.dataset.splits import smoke_splits
    from pillsnap.synth.writer import write_delivery

    with SPLIT:
        delivery = work / "delivery"
        write_delivery(
            delivery,
            drugs=6,
            photos=18,
            combos=4,
            seed=42,
            width=244,
            height=320,
            workers=min(4, cores()),
            progress=False,
        )
        run = RunFolder(work / name, "splits")
        (run.root / "delivery").symlink_to(delivery)
        smoke_splits(run, load_config("smoke", [*SMOKE, *over, f"paths.exp_dir={run.root}"]))
    return run.root


def relative(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor] | None = None
) -> float:
    "How far two sets of weights are apart: the norm of the difference, over b's or over how far b moved from `start`."
    names = [k for k, v in b.items() if v.is_floating_point()]

    def flat(d):
        return torch.cat([d[k].detach().double().cpu().flatten() for k in names])

    base = flat(b) if start is None else flat(b) - flat(start)
    return float((flat(a) - flat(b)).norm() / base.norm())
