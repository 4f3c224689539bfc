"""BM10: what the training engine costs a step beside a bare PyTorch loop, and how long a step waits for its photos
from the pack; ms a step, same network, same loader.

The bare loop is what everybody writes: forward, loss, backward, clip, step. The engine does the same arithmetic and
keeps besides its schedule, its clock, its history, its log and its checks.
The engine's step has a bound (1.05 times the loop's), and so has the share of it that waits for photos (5 %).
Beside them stands how many photos a second the loader feeds by itself
and how many the network eats when they are there: where the first is smaller, more workers help; where it is larger,
they cannot.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import timm
import torch
from harness import LIMITS, arguments, compare, finish
from loading import pack_source, still
from photos import DRUGS, photo_tree, size_note
from torch import nn

SHARE = LIMITS["BM10"]["waiting_percent"]  # percent of a step that may be spent waiting
LEAST_MS = 100.0  # of a step: a shorter one would measure the interpreter
SMOOTHING, CLIP, RATE = 0.1, 1.0, 2e-4


class Points:
    "Stands in for TensorBoard and keeps what it is given."

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def add_scalars(self, values: dict[str, float], _step: int) -> None:
        for k, v in values.items():
            self.seen.setdefault(k, []).append(v)

    def add_text(self, *a: Any) -> None:
        pass


def pack_loader(size: int, batch: int, steps: int, workers: int) -> Any:
    "The project's loader over its pack, augmented and normalised, the same photos in the same order each time."
    from pillsnap.core.settings import AugmentClassification
    from pillsnap.dataset.datasets import PillsnapClsDataset
    from pillsnap.dataset.photoloader import PhotoLoader
    from pillsnap.delivery.classmap import ClassMap

    root, rows = photo_tree("jpg", 1024)
    rows, source = rows.iloc[: steps * batch], pack_source(root, rows, "jpeg")
    data = PillsnapClsDataset(
        rows,
        ClassMap(sorted(set(rows["class_key"]))),
        source,
        size,
        train=True,
        crop_view_prob=0.0,
        augment=AugmentClassification(),
    )
    pack_loader.note = size_note(root, rows)
    return PhotoLoader(data, batch, num_workers=workers, prefetch_factor=3)


def engine_config(size: int) -> Any:
    "The two-stage preset for one epoch of float32 steps, logged and profiled every fourth step."
    from pillsnap.core.config import load_config

    return load_config(
        "two_stage",
        [
            f"data.classification.img_size={size}",
            "data.progressive_validation.current_stage=1",
            "train.classification.epochs=1",
            "train.classification.amp=false",
            "train.classification.channels_last=false",
            "train.step_log_interval=4",
            "train.profile_interval=4",
        ],
    )


def engine(make_net: Callable[[], nn.Module], batches: Iterable, size: int, points: Points) -> Callable[[], float]:
    "ms a step of `Learner.fit`, validation left out."
    from fastai.callback.core import Callback

    from pillsnap.training.learner import Outputs, build_learner
    from pillsnap.training.presets import ClassifierSettings

    class Watch(Callback):
        order = 200

        def before_train(self):
            self.t0 = time.perf_counter()

        def after_train(self):
            self.ms = (time.perf_counter() - self.t0) / len(self.dls.train) * 1e3

    cfg = engine_config(size)
    valid = [(x.clone(), y.clone(), m) for x, y, m in itertools.islice(batches, 1)]

    def run() -> float:
        learn = build_learner(
            ClassifierSettings.from_config(cfg),
            make_net(),
            nn.CrossEntropyLoss(label_smoothing=SMOOTHING),
            batches,
            {"whole": valid},
            DRUGS,
            out=Outputs(tb=points),
        )
        learn.remove_cb(learn.progress)  # the table of epochs is no part of a step
        learn.add_cb(watch := Watch())
        learn.fit(1)
        return watch.ms

    return run


def bare(make_net: Callable[[], nn.Module], batches: Iterable) -> Callable[[], float]:
    "ms a step of the loop that everybody writes."

    def run() -> float:
        net, lf = make_net().train(), nn.CrossEntropyLoss(label_smoothing=SMOOTHING)
        opt, n = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-4, fused=True), 0
        t0 = time.perf_counter()
        for x, y, _ in batches:
            lf(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            opt.step()
            opt.zero_grad()
            n += 1
        return (time.perf_counter() - t0) / n * 1e3

    return run


def feeds(batches: Iterable) -> float:
    "Photos a second of the loader with nobody behind it."
    t0 = time.perf_counter()
    got = sum(len(b[1]) for b in batches)
    return got / (time.perf_counter() - t0)


if __name__ == "__main__":
    a = arguments(__doc__, backbone="tf_efficientnetv2_s", size=96, batch=4, steps=16, workers=1)
    steps = 8 if a.quick else a.steps
    still()

    def make_net() -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(a.backbone, num_classes=DRUGS)

    dl, points = pack_loader(a.size, a.batch, steps, a.workers), Points()
    held = [(x.clone(), y.clone(), m) for x, y, m in itertools.islice(dl, 4)]
    extra: dict[str, Any] = {
        "limit_share": SHARE,
        "feeds": statistics.median(feeds(dl) for _ in range(3)),
        "eats": 1e3 * a.batch / bare(make_net, held)(),
    }
    ours = engine(make_net, dl, a.size, points)

    def noted() -> float:
        ms = ours()
        wait, work = (statistics.median(points.seen[k]) for k in ("perf/data_time", "perf/compute_time"))
        extra.update(wait_ms=1e3 * wait, compute_ms=1e3 * work, share=100 * wait / (wait + work), step_ms=ms)
        return ms

    missed = compare(
        "BM10",
        (
            f"a training step of {a.backbone} at {a.size} pixels, batch {a.batch}, from the pack, {a.workers} loader "
            "thread(s)"
        ),
        {"the engine": noted},
        {"bare PyTorch loop": bare(make_net, dl)},
        steps * a.batch,
        a.repeats,
        unit="ms/step",
        note=pack_loader.note,
        better="lower",
        quick=a.quick,
        out=a.out,
        extra=extra,
    )
    print(
        f"a step waits {extra['wait_ms']:.2f} ms for its photos, {extra['share']:.2f} % (at most {SHARE:g} %); "
        f"the loader feeds {extra['feeds']:.0f} photos/s, the network eats {extra['eats']:.0f}"
    )
    if not a.quick:
        missed += (
            [f"BM10: {extra['share']:.1f} % of a step waits for photos, at most {SHARE:g} %"]
            if extra["share"] >= SHARE
            else []
        )
        missed += (
            [f"BM10: a step took {extra['step_ms']:.0f} ms, at least {LEAST_MS:g} ms are needed; take a larger --batch"]
            if extra["step_ms"] < LEAST_MS
            else []
        )
    finish(missed)
