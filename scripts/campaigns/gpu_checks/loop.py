"""GP2 to GP6: the training loop, its loader and its precision."""

import contextlib
import itertools
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback
from torch import nn

from pillsnap.core.device import enable_tf32, set_seed

from .setup import (
    Gpu,
    Losses,
    Part,
    Size,
    Stopwatch,
    Watch,
    absent,
    at_least,
    at_most,
    coloured_batches,
    cores,
    holds,
    loader,
    make_learner,
    network,
    patch_loader,
    settings,
    told,
)

# ---- GP2: nobody waits


@contextlib.contextmanager
def sync_mode(gpu: Gpu, mode: str) -> Iterator[list[str]]:
    "Inside, host synchronisations are listed by the line that asked for them (`warn`), or raise (`error`)."
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if gpu.there:
            torch.cuda.set_sync_debug_mode(mode)
        try:
            yield lines
        finally:
            if gpu.there:
                torch.cuda.set_sync_debug_mode("default")
            named = [w for w in seen if "synchronizing" in str(w.message)]
            lines += [f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in named]


def watched_rounds(gpu: Gpu, learn: Any, mode: str, first: int, rounds: int) -> list[str]:
    "Train so many rounds of loader and step, from batch `first` on, under that mode; the lines that waited."
    stack, found = contextlib.ExitStack(), []

    def begin() -> None:
        gpu.sync()
        found.append(stack.enter_context(sync_mode(gpu, mode)))

    learn.add_cb(watch := Watch({first - 1: begin, first + rounds - 1: stack.close}))
    try:
        learn.fit(1)
    finally:
        stack.close()
        learn.remove_cb(watch)
    if not found:
        raise RuntimeError("the epoch was too short: nothing was watched")
    return found[0]


def host_syncs(device: str, tiny: bool, work: Path) -> list[Part]:
    "GP2: the loader with all augmentation on the GPU, a step with EMA and the stage's clock; from batch 4 on."
    s, gpu, first, rounds = Size(tiny), Gpu(device), 4, 5
    over = ("train.classification.ema={enabled: true, decay: 0.99}", "train.classification.epochs=1000")
    cfg = settings(s, *over, img=224, batch=32)
    set_seed(42)
    enable_tf32(True)
    train = patch_loader(cfg, cfg.train.classification.batch_size * (first + rounds + 2), gpu.device)
    valid = coloured_batches(1, 4, cfg.data.classification.img_size, gpu.device)
    learn = make_learner(cfg, network(cfg, gpu.device), train, {"whole": valid}, gpu.device, folder=work / "syncs")
    lines = watched_rounds(gpu, learn, "warn", first, rounds)
    where = ", ".join(f"{line} ({lines.count(line)}×)" for line in dict.fromkeys(lines))
    said = ""
    try:
        watched_rounds(gpu, learn, "error", first, rounds)
    except RuntimeError as e:
        if "synchronizing" not in str(e):
            raise
        said = str(e).splitlines()[0]
    return [
        at_most("host synchronisations in five rounds", len(lines), 0, note=where),
        holds("five rounds under set_sync_debug_mode('error')", not said, said or "ended", "no error"),
    ]


# ---- GP3: beside timm's loop


def rendered_photos(n: int, ext: str) -> tuple[Path, pd.DataFrame]:
    "A folder of n rendered photos, a folder a drug, and its manifest rows; few are drawn, the others are links."
    from photos import photo_tree

    return photo_tree(ext, n, distinct=12)


def shrunk_photos(n: int, size: tuple[int, int]) -> Path:
    "The same folder with JPEGs of that width and height."
    import cv2

    root, rows = rendered_photos(n, "jpg")
    small, made = root.with_name(f"{root.name}-{size[0]}"), {}
    for path in rows["path"]:
        to, source = small / path, (root / path).stat().st_ino
        to.parent.mkdir(parents=True, exist_ok=True)
        if to.exists():
            continue
        if source in made:
            os.link(made[source], to)
            continue
        picture = cv2.resize(cv2.imread(str(root / path)), size, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(to), picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
        made[source] = to
    return small


def pack_of_photos(n: int) -> tuple[Any, pd.DataFrame]:
    "The project's pack of rendered photos as a source, and n rows of it, each photo many times."
    from loading import pack_source

    root, rows = rendered_photos(96, "jpg")
    return pack_source(root, rows, "jpeg"), pd.concat([rows] * -(-n // len(rows)), ignore_index=True)[:n]


def timm_loader(folder: Path, img: int, batch: int, workers: int, device: torch.device) -> Any:
    "timm's own: JPEGs, random crop and mirror in worker processes, `PrefetchLoader` on the GPU."
    from timm.data import ImageDataset, create_loader

    crop = dict(scale=(0.8, 1.0), ratio=(0.9, 1.1), hflip=0.5, color_jitter=0.0, interpolation="bilinear")
    there = dict(pin_memory=device.type == "cuda", device=device, use_prefetcher=True)
    photos = ImageDataset(str(folder))
    return create_loader(photos, (3, img, img), batch, is_training=True, num_workers=workers, **crop, **there)


class TimmLoop:
    "The loop of timm's train.py: channels_last, bf16 autocast, AdamW (fused), its gradient clipping."

    def __init__(self, gpu: Gpu, model: nn.Module, cfg: Any):
        from timm.optim import create_optimizer_v2

        c = cfg.train.classification
        self.gpu, self.clip = gpu, c.grad_clip
        self.model = model.to(memory_format=torch.channels_last).train()
        self.opt = create_optimizer_v2(model, opt="adamw", lr=c.lr, weight_decay=c.weight_decay, fused=True)
        self.loss = nn.CrossEntropyLoss(label_smoothing=c.label_smoothing)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        from timm.utils import dispatch_clip_grad

        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.gpu.device.type, torch.bfloat16):
            loss = self.loss(self.model(x), y)
        loss.backward()
        dispatch_clip_grad(self.model.parameters(), self.clip, "norm")
        self.opt.step()
        self.opt.zero_grad()

    def run(self, batches: Any, first: int, last: int) -> float:
        "Milliseconds a step, from batch `first` to `last`."
        times = {}
        for k, (x, y, *_) in enumerate(batches):
            self.step(x, y)
            if k in (first, last):
                self.gpu.sync()
                times[k] = time.perf_counter()
            if k == last:
                return 1e3 * (times[last] - times[first]) / (last - first)
        raise RuntimeError(f"there were not {last + 1} batches")


def one_fit(learn: Any, watch: Stopwatch) -> float:
    "Milliseconds a step of one epoch of the project's Learner."
    learn.fit(1)
    return watch.ms[-1]


def bench_settings(s: Size) -> Any:
    "The default classifier at 384 in batches of 48, with crop and mirror alone, as timm's loader has them."
    plain = "data.augment.classification={randaugment: false, color_jitter: [0, 0, 0, 0], hflip: true}"
    over = ("train.classification.epochs=1000", "train.classification.amp_dtype=bf16")  # a schedule that lasts
    return settings(s, plain, *over)


def loader_workers(s: Size) -> int:
    "As many as this machine has processors to spare."
    return s.of(max(1, min(14, cores() - 2)), 1)


def contenders(s: Size, gpu: Gpu) -> dict[str, Callable[[], float]]:
    "Four loops, each a call that trains an epoch and gives milliseconds a step."
    cfg, near, far, workers = bench_settings(s), s.of((4, 20), (1, 2)), s.of((8, 32), (1, 3)), loader_workers(s)
    img, batch = cfg.data.classification.img_size, cfg.train.classification.batch_size
    n = batch * (far[1] + 1)
    peer = timm_loader(shrunk_photos(n, (488, 640)), img, batch, workers, gpu.device)  # as small as in our pack
    resident = coloured_batches(near[1] + 1, batch, img, gpu.device)
    theirs, net = TimmLoop(gpu, network(cfg, gpu.device), cfg), network(cfg, gpu.device)

    def ours(train: Any, span: tuple[int, int]) -> Callable[[], float]:
        watch = Stopwatch(gpu, *span)
        learn = make_learner(cfg, net, train, {"whole": resident[:1]}, gpu.device, [watch])
        return lambda: one_fit(learn, watch)

    source, rows = pack_of_photos(n)
    return {
        "timm, resident": lambda: theirs.run(resident, *near),
        "ours, resident": ours(resident, near),
        "timm, its loader": lambda: theirs.run(peer, *far),
        "ours, our loader": ours(loader(cfg, rows, source, gpu.device, workers), far),
    }


def beside_timm(device: str, tiny: bool, _work: Path) -> tuple[list[Part], dict[str, Any]]:
    "GP3: four loops take turns: ours and timm's over batches that lie on the GPU, ours and timm's with loaders."
    s, gpu = Size(tiny), Gpu(device)
    rounds = s.of(5, 1)
    set_seed(42)
    enable_tf32(True)
    turns = contenders(s, gpu)
    ms: dict[str, list[float]] = {k: [] for k in turns}
    for k in range(rounds + 1):  # the first round warms up: kernels are searched, workers start
        for name, turn in turns.items():
            value = turn()
            if k:
                ms[name].append(value)
    mid = {k: statistics.median(v) for k, v in ms.items()}
    step = mid["timm, resident"] / mid["ours, resident"]
    whole = mid["timm, its loader"] / mid["ours, our loader"]
    goal = ["the next goal, 1.0×, is " + ("reached" if v >= 1 else "not reached") for v in (step, whole)]
    spread = [told(k, v, "ms/step", f"{min(ms[k]):.1f} to {max(ms[k]):.1f}, {rounds} rounds") for k, v in mid.items()]
    bounded = [
        at_least("step beside timm's", step, 0.97, "×", goal[0]),
        at_least("step with loader beside timm's", whole, 0.95, "×", goal[1]),
    ]
    return [*bounded, *spread], dict(loader_workers=loader_workers(s), ms=ms)


# ---- GP4: the GPU works


def kernel_share(events: Sequence[tuple[str, int, int]], begin: float = 0.0) -> tuple[float, int]:
    """Share of the time from the first kernel to the end of the last in which at least one runs; how many there are.

    An event is a name, a start and an end. Copies are not kernels. `begin`: so much of the time is left out at first.
    """
    spans = sorted((a, b) for name, a, b in events if not name.startswith(("Memcpy", "Memset")))
    if not spans:
        return 0.0, 0
    low = spans[0][0] + begin * (max(b for _, b in spans) - spans[0][0])
    spans = [(a, b) for a, b in spans if a >= low]
    busy, reach = 0, spans[0][0]
    for a, b in spans:
        busy += max(0, b - max(a, reach))
        reach = max(reach, b)
    return busy / max(1, reach - spans[0][0]), len(spans)


def profiled(gpu: Gpu, learn: Any, first: int, last: int) -> tuple[float, int]:
    """The kernels' share of the time of the second half of an epoch's batches `first` to `last`.

    In the first half those batches are used up that the loader had made ahead.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    prof = profile(activities=[ProfilerActivity.CUDA if gpu.there else ProfilerActivity.CPU])

    def begin() -> None:
        gpu.sync()
        prof.start()

    def end() -> None:
        gpu.sync()
        prof.stop()

    learn.add_cb(watch := Watch({first: begin, last: end}))
    learn.fit(1)
    learn.remove_cb(watch)
    kind = DeviceType.CUDA if gpu.there else DeviceType.CPU
    events = [e for e in prof.profiler.kineto_results.events() if e.device_type() == kind]
    events = [e for e in events if not e.is_user_annotation()]  # "Optimizer.step" spans pauses too
    return kernel_share([(e.name(), e.start_ns(), e.start_ns() + e.duration_ns()) for e in events], 0.5)


def busy(device: str, tiny: bool, _work: Path) -> list[Part]:
    "GP4: the default classifier trains on PNGs as delivered and on the pack, opened by threads and by processes."
    from pillsnap.dataset.datasets import DeliverySource

    s, gpu = Size(tiny), Gpu(device)
    cfg, workers, (first, last) = bench_settings(s), loader_workers(s), s.of((8, 56), (1, 3))
    set_seed(42)
    enable_tf32(True)
    net, valid = network(cfg, gpu.device), coloured_batches(1, 4, cfg.data.classification.img_size, gpu.device)
    n, out = cfg.train.classification.batch_size * (last + 4), []
    source, rows = pack_of_photos(n)
    folder, pngs = rendered_photos(96, "png")
    pngs = pd.concat([pngs] * -(-n // len(pngs)), ignore_index=True)[:n]
    sources = {"pack": (source, rows), "PNGs": (DeliverySource(folder), pngs)}
    for (name, (photos, table)), engine in itertools.product(sources.items(), ("threads", "processes")):
        train, watch = loader(cfg, table, photos, gpu.device, workers, engine, ahead=2), Stopwatch(gpu, first, last)
        learn = make_learner(cfg, net, train, {"whole": valid}, gpu.device, [watch])
        share, kernels = profiled(gpu, learn, first, last)
        note = f"{kernels} kernels, {watch.ms[-1]:.1f} ms a step, {workers} {engine}"
        title = f"busy, {name} by {engine}"
        none = absent(title, "≥ 95", "the profiler saw no kernel")
        out.append(at_least(title, 100 * share, 95, "%", note) if kernels else none)
    return out


# ---- GP5: the same photos on the GPU


def augmentation(device: str, tiny: bool, _work: Path) -> list[Part]:
    """GP5: every batch of the loader, augmented on the GPU, against the same batch of a loader on the CPU.

    The GPU has other work meanwhile and is late with its copies; nothing is looked at before all batches are made.
    """
    s, gpu = Size(tiny), Gpu(device)
    n = s.of(200, 3)
    cfg = settings(s, "data.augment.classification={rotation: 15, erasing: 0.2}", img=128, batch=16)
    set_seed(42)
    enable_tf32(True)  # as a training process has it
    total = n * cfg.train.classification.batch_size
    near, there = patch_loader(cfg, total, gpu.device), patch_loader(cfg, total, torch.device("cpu"))
    side = torch.cuda.Stream() if gpu.there else None
    load, kept = torch.randn(s.of(4096, 16), s.of(4096, 16), device=gpu.device), []
    for x, y, meta in near:
        kept.append((x, y, meta["paths"]))
        if gpu.there:
            torch.cuda._sleep(5_000_000)  # clock ticks: the queue is milliseconds late when the next batch is copied
            with torch.cuda.stream(side):
                torch.mm(load, load)
    gpu.sync()
    worst, wrong, compared = 0.0, 0, 0
    for (x, y, paths), (want, labels, meta) in zip(kept, there):
        worst = max(worst, float((x.cpu().float() - want.float()).abs().mean((1, 2, 3)).max()))
        wrong += int((y.cpu() != labels).sum()) + (paths != meta["paths"])
        compared += 1
    return [
        at_most("mean difference of the worst photo", worst, 1e-3, note="of normalised pixels"),
        at_most("labels and names that differ", wrong, 0),
        holds("batches compared", compared == n, compared, f"all {n}"),
    ]


# ---- GP6: three precisions


class Skips(Callback):
    "How often the gradient scaler left a step out."

    order, run_valid = 1002, False

    def before_fit(self) -> None:
        self.count, self.scale = 0, None

    def after_batch(self) -> None:
        if (scaler := self.learn.precision.scaler) is None:
            return
        now = scaler.get_scale()
        self.count += now < (65536.0 if self.scale is None else self.scale)  # 65536: where torch's scaler begins
        self.scale = now


def train_in(s: Size, gpu: Gpu, precision: str, batches: list, steps: int) -> tuple[np.ndarray, int, str]:
    "The losses of a short training from the same weights, its skipped steps, and the type that autocast had."
    over = ("train.classification.lr=0.0005", "train.classification.epochs=1", "train.classification.tf32=false")
    cfg = settings(s, f"train.classification.amp_dtype={precision}", *over, img=128, batch=32)
    set_seed(42)
    enable_tf32(False)
    losses, skips, train = Losses(), Skips(), list(itertools.islice(itertools.cycle(batches), steps))
    learn = make_learner(cfg, network(cfg, gpu.device), train, {"whole": batches[:1]}, gpu.device, [losses, skips])
    learn.fit(1)
    return losses.all(), skips.count, str(learn.precision.dtype or torch.float32).removeprefix("torch.")


def precisions(device: str, tiny: bool, _work: Path) -> list[Part]:
    "GP6: 150 steps of the default classifier from the same weights over the same batches."
    s, gpu = Size(tiny), Gpu(device)
    steps, tail = s.of(150, 4), s.of(20, 2)
    batches = coloured_batches(s.of(10, 2), s.of(32, 4), s.of(128, 64), gpu.device)
    got = {p: train_in(s, gpu, p, batches, steps) for p in ("fp32", "bf16", "fp16")}
    final = {p: float(losses[-tail:].mean()) for p, (losses, _, _) in got.items()}
    types = ", ".join(dtype for _, _, dtype in got.values())
    finite = [p for p, (losses, _, _) in got.items() if np.isfinite(losses).all()]
    note = {p: f"{final[p]:.4f} and {final['fp32']:.4f}, mean of the last {tail} steps" for p in got}
    beside = {p: 100 * abs(final[p] / final["fp32"] - 1) for p in got}
    return [
        *(at_most(f"final loss of {p} beside fp32's", beside[p], 3, "%", note[p]) for p in ("bf16", "fp16")),
        holds("losses are finite", len(finite) == 3, ", ".join(finite) or "none", "fp32, bf16, fp16"),
        at_most("steps that fp16 left out", got["fp16"][1], 5),
        holds("types of autocast", types == "float32, bfloat16, float16", types, "float32, bfloat16, float16"),
        told("first loss", float(got["fp32"][0][0]), note=f"it fell to {final['fp32']:.3f}"),
    ]
