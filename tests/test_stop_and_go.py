"""Stopped by whatever stops a run, the same command ends where the undisturbed run ends, to the last bit (SPEC
BX10, CT14-CT16)."""

import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from runs import stopped_classifier
from test_memory import Painted, table
from test_smoke_train import split_folder
from torch import nn

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.core.jobs import read_record
from pillsnap.dataset.datasets import PillsnapClsDataset
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.sampling import BalancedBatchSampler, EpochSampler
from pillsnap.delivery.classmap import ClassMap
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.distributed import OwnDropout
from pillsnap.training.learner import Outputs, build_learner, read_last_checkpoint
from pillsnap.training.presets import ClassifierSettings
from pillsnap.training.saving import average_weights, restore

CM = ClassMap([f"K-{i:06d}" for i in range(3)])


class Fatal(Painted):
    "Photos of which one kills the process that opens it, once: as long as a flag lies there."

    def __init__(self, flag, victim):
        self.flag, self.victim = str(flag), victim

    def open(self, photo, view, reduce=1):
        if photo.path == self.victim and os.path.exists(self.flag):
            os.unlink(self.flag)
            os._exit(9)
        return super().open(photo, view, reduce)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
    )


def learner(folder, source=None, balanced=False, n=60, **loader):
    "Sixty made-up photos in batches of six, windows of four, an average, a save after every step."
    cfg = load_config(
        "smoke",
        [
            (
                "train.classification={epochs: 3, lr: 0.01, grad_accum_steps: 4, amp: false, ema: {enabled: true, "
                "decay: 0.8, warmup: true}, saving: {every_steps: 1}}"
            )
        ],
    )
    rows = table(n)
    d = PillsnapClsDataset(rows, CM, source or Painted(), 16, True, seed=7)
    order = (
        dict(batch_sampler=BalancedBatchSampler(d.labels, None, 2, 7))
        if balanced
        else dict(batch_size=6, sampler=EpochSampler(d, 7), drop_last=True)
    )
    val = PhotoLoader(PillsnapClsDataset(rows[:12], CM, Painted(), 16), 6)
    fixed = dict(
        config_snapshot=cfg.to_dict(), class_map=CM.to_dict(), backbone=cfg.train.classification.backbone, img_size=16
    )
    learn = build_learner(
        ClassifierSettings.from_config(cfg),
        net(),
        nn.CrossEntropyLoss(),
        PhotoLoader(d, **order, **loader),
        {"whole": val},
        3,
        fixed=fixed,
        out=Outputs(folder, quiet=True),
    )
    if (folder / "last.pt").exists():
        learn.first_epoch = restore(learn, read_last_checkpoint(folder / "last.pt", cfg, CM.to_dict()))
    return learn


def same(a, b):
    for (k, v), w in zip(a["model_state"].items(), b["model_state"].values()):
        assert torch.equal(v, w), k
    for k, v in a["ema_state"].items():
        assert torch.equal(v, b["ema_state"][k]), k
    assert [(r["train_loss"], r["classification"]) for r in a["history"]] == [
        (r["train_loss"], r["classification"]) for r in b["history"]
    ]
    assert (
        torch.equal(a["rng_state"]["torch"], b["rng_state"]["torch"])
        and a["sampler_state"] == b["sampler_state"]
        and a["scheduler_state"] == b["scheduler_state"]
    )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    learner(folder).fit(3)
    return load_ckpt(folder / "last.pt")


@pytest.mark.spec("BX10", "CT15", "TL5")
def test_a_worker_that_dies_costs_what_was_done_since_the_last_save(straight, tmp_path):
    "In mid-epoch, after a save; with processes, whose start draws a random number, and dropout, which would notice."
    order = list(EpochSampler(PillsnapClsDataset(table(60), CM, Painted(), 16, True, seed=7), 7))
    # of the ninth batch, which is asked for when six have been worked on; the fourth was saved
    victim = f"{order[8 * 6 + 2]}.png"
    (tmp_path / "flag").touch()
    crash = partial(
        learner,
        tmp_path / "ck",
        Fatal(tmp_path / "flag", victim),
        engine="processes",
        num_workers=1,
        multiprocessing_context="fork",
    )
    with pytest.raises(PillsnapError, match="process that opened photos is gone"):
        crash().fit(3)
    where = load_ckpt(tmp_path / "ck" / "last.pt")
    saved = where["position"]["batch"]
    assert where["epoch"] == 0 and saved in (4, 8) and not (tmp_path / "flag").exists()

    class Tally(Callback):
        order, run_valid, batches = 99, False, 0

        def after_batch(self):
            self.batches += 1

    again, tally = crash(), Tally()
    again.add_cb(tally)
    again.fit(3)
    assert tally.batches == 30 - saved, "of three epochs of ten batches, those after the save"
    same(straight, load_ckpt(tmp_path / "ck" / "last.pt"))


@pytest.mark.spec("BX10")
@pytest.mark.parametrize("kind", ["threads", "balanced"])
def test_every_loader_and_sampler_goes_on_where_it_stood(straight, tmp_path, kind):
    "Photos prefetched by threads are not lost; batches of P drugs with K photos each are drawn on."
    make = partial(learner, num_workers=2, prefetch_factor=3) if kind == "threads" else partial(learner, balanced=True)
    if kind == "balanced":
        make(tmp_path / "whole").fit(3)

    class Plug(Callback):
        order, name, run_valid = 99, "plug", False

        def after_batch(self):
            if (self.epoch, self.iter) == (1, 6):
                raise SystemExit

    run = make(tmp_path / "ck")
    run.add_cb(Plug())
    with pytest.raises(SystemExit):
        run.fit(3)
    ckpt = load_ckpt(tmp_path / "ck" / "last.pt")
    assert (ckpt["epoch"], ckpt["position"]["batch"], ckpt["sampler_state"]["batch"]) == (1, 4, 4)
    make(tmp_path / "ck").fit(3)
    same(
        straight if kind == "threads" else load_ckpt(tmp_path / "whole" / "last.pt"),
        load_ckpt(tmp_path / "ck" / "last.pt"),
    )


EPOCHS, SET = (
    3,
    (
        "data.classification.img_size=48",
        "train.num_threads=1",
        "train.classification={lr: 0.003, batch_size: 8, saving: {every_steps: 1}}",
    ),
)


@pytest.mark.spec("BX10")
def test_a_second_process_draws_on_where_it_stood(tmp_path):
    "The checkpoint is the first process's; the second one's dropout is again its own."

    class Drawn(Callback):
        order, run_valid = 0, False  # after the generator is set, before the network draws

        def __init__(self, stop=None):
            self.stop, self.states = stop, {}

        def before_batch(self):
            self.states[self.epoch, self.iter] = bytes(torch.get_rng_state().numpy())

        def after_batch(self):
            if (self.epoch, self.iter) == self.stop:
                raise SystemExit

    def process(folder, rank, stop=None):
        learn, drawn = learner(tmp_path / folder), Drawn(stop)
        learn.add_cbs([OwnDropout(rank, seed=7), drawn])
        if stop:
            with pytest.raises(SystemExit):
                learn.fit(3)
        else:
            learn.fit(3)
        return drawn.states

    whole = process("second", 1)
    first = process("shared", 0, stop=(1, 6))
    rest = process("shared", 1)
    assert rest and min(rest) == (1, 4) and rest == {k: v for k, v in whole.items() if k >= (1, 4)}
    assert all(whole[k] != v for k, v in first.items())


@pytest.mark.spec("BX10", "CT15", "CT16", "RS1")
def test_killed_and_asked_to_stop_in_mid_epoch_and_still_the_same(delivery, tmp_path):
    "kill -9 in the first epoch, SIGTERM in the second, then in peace: weights and figures of the undisturbed run."
    root = split_folder(tmp_path / "run", delivery)
    status, err = stopped_classifier(root, SET, EPOCHS, (0, 2), signal.SIGKILL)
    assert status == -signal.SIGKILL, err
    status, err = stopped_classifier(root, SET, EPOCHS, (1, 2), signal.SIGTERM)
    assert status and "KeyboardInterrupt: SIGTERM" in err, err
    last = root / "checkpoints" / "classifier" / "last.pt"
    assert "stopped by SIGTERM in epoch" in (root / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    assert read_record(root, "classifier")["status"] == "interrupted" and load_ckpt(last)["epoch"] < EPOCHS
    ClassifierJob(run_dir=str(root), config="smoke", overrides=SET, epochs=EPOCHS).run()
    assert "batches of the next" in (root / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    calm = split_folder(tmp_path / "calm", delivery)
    ClassifierJob(run_dir=str(calm), config="smoke", overrides=SET, epochs=EPOCHS).run()
    same(*(load_ckpt(r / "checkpoints" / "classifier" / "last.pt") for r in (calm, root)))
    assert [r["classification"] for r in read_json(root / "reports" / "metrics.json")["history"]] == [
        r["classification"] for r in read_json(calm / "reports" / "metrics.json")["history"]
    ]


@pytest.mark.spec("CT14", "SG6", "BX23")
def test_the_run_counts_its_memory_errors_and_measures_the_mean_of_its_best(delivery, tmp_path, monkeypatch):
    """Two planted errors in one batch: cache, then two halves; the advisor's number is 2. And averaged.pt lies
    there exactly if validation agreed."""
    import fastai.learner

    real, calls = fastai.learner.Learner._do_one_batch, []

    def planted(self):
        calls.append(self.training)
        if self.training and sum(calls) in (4, 5):
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return real(self)

    monkeypatch.setattr(fastai.learner.Learner, "_do_one_batch", planted)
    root = split_folder(tmp_path / "run", delivery)
    more = (
        "train.oom.cooldown_sec=0",
        "train.oom.escalate_to_fp16=false",
        "train.classification.saving.average_best=2",
    )
    res = ClassifierJob(run_dir=str(root), config="smoke", overrides=(*SET, *more), epochs=2).run()
    report, log = (
        read_json(root / "reports" / "classifier.json"),
        (root / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8"),
    )
    assert read_json(root / "reports" / "metrics.json")["oom_events"] == 2 and [
        e["action"] for e in report["oom_events"]
    ] == ["empty_cache", "microbatching"]
    assert "S2 microbatching" in log and any("Memory ran out 2 times" in n for n in res.notes)
    mean, folder = report["averaged"], root / "checkpoints" / "classifier"
    assert (
        set(mean["epochs"]) == {1, 2}
        and mean["metric"] == "val_loss"
        and mean["kept"] == (mean["averaged"] <= mean["best"]) == (folder / "averaged.pt").exists()
    )
    states = [load_ckpt(folder / f"epoch_{e}.pt")["model_state"] for e in mean["epochs"]]
    for k, v in average_weights(states).items():
        if v.is_floating_point():
            np.testing.assert_allclose(v, np.mean([s[k].numpy() for s in states], 0), atol=1e-6)
