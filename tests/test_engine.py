"""The engine as a stage runs it: the clock, the stage's settings, the stage by its manifest, and nothing that stops
a GPU at every step."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from typer.testing import CliRunner

from pillsnap.core.checkpoints import load_ckpt, save_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json
from pillsnap.core.jobs import RunFolder, read_record, record_path
from pillsnap.core.records import Provenance
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import smoke_splits
from pillsnap.evaluation.advisor import Check
from pillsnap.evaluation.gates import STAGE_TARGETS, Status, simple_stage_evaluation
from pillsnap.evaluation.scorecard import time_cap
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.learner import Outputs, build_learner, is_finished
from pillsnap.training.presets import ClassifierSettings
from pillsnap.training.trainer import build_training

SMALL = ("data.classification.img_size=48", "train.num_threads=1", "data.progressive_validation.stage_0.max_samples=90")


@pytest.fixture(scope="module")
def split_run(delivery, tmp_path_factory):
    "A run folder with the smoke delivery converted and split; each test that trains works on a copy of its links."
    root = tmp_path_factory.mktemp("engine") / "run"
    root.mkdir()
    (root / "delivery").symlink_to(delivery)
    smoke_splits(RunFolder(root, "splits"), load_config("smoke", SMALL))
    return root


@pytest.fixture
def run(split_run, tmp_path):
    "The same, with a folder of its own for what a training writes."
    import shutil

    shutil.copytree(split_run, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


@pytest.mark.spec("BX1", "CT16", "CT17")
def test_a_job_that_died_after_its_training_reports_that_training(run):
    """Stopped early, then interrupted: the same command says so again, keeps the leak gap of this training, and
    takes none of an earlier one."""
    over = (
        *SMALL,
        "train.leak_gap=true",
        (
            "train.classification={crop_view_prob: 0.0, ema: {enabled: true, evaluate: both}, early_stopping: "
            "{patience: 1, min_delta: 9.0}}"
        ),
    )
    job, gap, rec = (
        ClassifierJob(run_dir=str(run), config="smoke", overrides=over, epochs=4),
        run / "reports" / "leak_gap.json",
        record_path(run, "classifier"),
    )

    def died_and_again():
        save_json({**read_json(rec), "status": "interrupted"}, rec)
        res = job.run()
        assert "stopped early" in res.verdict and read_json(run / "reports" / "classifier.json")["stopped_early"]
        assert list(read_json(run / "reports" / "classifier.json")["per_class"]) == [
            "whole"
        ]  # best.pt holds the average: nothing that it says is of the raw weights
        return read_json(gap)

    assert "stopped early" in job.run().verdict
    first = read_json(gap)
    assert died_and_again() == first
    save_json(
        {**first, "group_split": {**first["group_split"], "value": 2.0, "seconds": 1e6}}, gap
    )  # what an earlier training left
    assert died_and_again()["group_split"] == first["group_split"]


@pytest.mark.spec("CT16", "BX8")
def test_a_checkpoint_of_another_delivery_is_refused(run):
    "As many photos, as a quota gives them, but not the same ones."

    def job(epochs):
        return ClassifierJob(
            run_dir=str(run), config="smoke", overrides=(*SMALL, "train.leak_gap=false"), epochs=epochs
        )

    job(1).run()
    last = run / "checkpoints" / "classifier" / "last.pt"
    save_ckpt(last, **{**load_ckpt(last), "data_hash": "0" * 64})
    with pytest.raises(PillsnapError, match="trained on other photos"):
        job(2).run()


@pytest.mark.spec("SG7", "X6")
def test_a_run_that_the_clock_stopped_counts_as_what_it_is(run, monkeypatch):
    "From the callback through the stage's report to the gate: TIME_CAP_SUCCESS, and only when every condition holds."
    clock = (
        "data.progressive_validation.stage_0={{max_samples: 90, max_classes: 6, target_accuracy: 0.9, "
        "allow_success_on_time_cap: true, time_limit_hours: 1.0e-7, min_samples_required: {}, min_class_coverage: 2}}"
    )
    res = ClassifierJob(run_dir=str(run), config="smoke", overrides=(*SMALL, clock.format(8)), epochs=40).run()
    rows = read_json(run / "reports" / "classifier.json")["history"]
    assert (
        len(rows) == 1
        and rows[0]["clock"]["stopped"]
        and rows[0]["clock"]["photos"] == 16
        and "stopped by the clock" in res.verdict
    )
    assert "clock: " in (run / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    last = load_ckpt(run / "checkpoints" / "classifier" / "last.pt")
    assert is_finished(
        last, load_config("smoke", ["train.classification.epochs=40"]).train.classification
    )  # the same command does not train on

    checks = {k: Check(True, "somewhere") for k in ("pipeline_complete", "classification_model_loading")}
    prov = Provenance("synthetic", "d" * 64, "c" * 64)
    facts = {
        "accuracy": prov.metric("accuracy", 0.2, 300, 1.0),
        "n_eval_samples": prov.metric("n_eval_samples", 300, 300, 1.0),
        "class_coverage": prov.metric("class_coverage", 1.0, 300, 1.0),
        "no_crashes": prov.metric("no_crashes", 1.0, 4, 1.0),
        "map50": prov.metric("map50", 0.95, 30, 1.0),
        "train_overlap": prov.metric("train_overlap", 0, 300, 1.0, kind="computed"),
        "split_by_group": prov.metric("split_by_group", True, 300, 1.0, kind="computed"),
    }

    def verdict(least, **changed):
        p = load_config("smoke", [*SMALL, clock.format(least)]).data.progressive_validation
        return simple_stage_evaluation(0, facts, time_cap(run, p, {**checks, **changed}, 6)).status

    assert STAGE_TARGETS[0].accuracy > 0.2
    assert verdict(8) == Status.TIME_CAP_SUCCESS and verdict(17) == Status.NO_GO  # 16 photos were seen
    assert verdict(8, pipeline_complete=Check(False, "somewhere")) == Status.NO_GO
    plain = load_config("smoke", SMALL).data.progressive_validation  # does not allow it
    assert simple_stage_evaluation(0, facts, time_cap(run, plain, checks, 6)).status == Status.NO_GO


@pytest.mark.spec("CT23", "X57", "X58")
def test_a_stages_overrides_reach_the_training_and_not_the_record(run):
    over = (
        "train.stage_overrides={0: {batch_size_override: 10, memory_format: contiguous, num_workers_override: 0}, 1: "
        "{batch_size_override: 3}}"
    )
    cfg = load_config("smoke", [*SMALL, over, f"paths.exp_dir={run}", "train.classification.channels_last=true"])
    learn, _ = build_training(load_split_data(run, 0), cfg, Outputs(run / "ck", quiet=True))
    assert learn.dls.train.batch_size == 10 and learn.unpack.layout is None
    assert all(p.is_contiguous() for p in learn.model.parameters())
    learn.fit(1)
    assert (
        load_ckpt(run / "ck" / "last.pt")["config_snapshot"]["train"]["classification"]["batch_size"] == 16
    )  # what was asked for: a resumed run compares with that


@pytest.mark.spec("CT2", "TL8")
def test_class_weights_reach_the_loss_of_a_training(run):
    """A stage in which one drug has two photos: each batch's loss is the cross-entropy with weights from these
    counts, and no other."""
    cfg = load_config(
        "smoke",
        [
            *SMALL,
            f"paths.exp_dir={run}",
            (
                "train.classification={epochs: 1, amp: false, label_smoothing: 0.1, combo_crops: false, "
                "crop_view_prob: 0.0}"
            ),
            "data.imbalance={use_class_weights: true, method: inv_freq}",
        ],
    )
    stage = load_split_data(run, 0)
    single = stage.train[stage.train["kind"] == "single"]
    rare = single["class_key"] == list(stage.class_map)[0]
    stage = dataclasses.replace(stage, train=pd.concat([single[rare].head(2), single[~rare]], ignore_index=True))
    learn, _ = build_training(stage, cfg, Outputs(quiet=True))
    n = stage.train.groupby("class_key").size().reindex(list(stage.class_map)).to_numpy(float)
    weights = n.sum() / (n + 1)
    weights = torch.tensor(weights / weights.mean(), dtype=torch.float32)
    assert n[0] == 2 and weights[0] > 2 * weights[1:].max()
    told = []

    class Check(Callback):
        order, run_valid = 99, False

        def after_loss(self):
            loss = [
                torch.nn.functional.cross_entropy(self.pred, self.yb[0], w, label_smoothing=0.1)
                for w in (weights, None)
            ]
            told.append((float(self.loss.detach()), *(float(v.detach()) for v in loss)))

    learn.add_cb(Check())
    learn.fit(1)
    assert (
        told and all(a == pytest.approx(b, rel=1e-5) for a, b, _ in told) and any(abs(a - c) > 0.01 for a, _, c in told)
    )


@pytest.mark.spec("CT25", "X1", "X30")
def test_train_stage_runs_the_stages_job(run, monkeypatch):
    "The command of the sources, through the CLI; papermill is left out, the job is the real one."
    from pillsnap import cli
    from pillsnap.core import runner
    from pillsnap.core.jobs import _save_config  # a folder that ran before has its own configuration

    _save_config(run, load_config("smoke", [*SMALL, f"paths.exp_dir={run}"]))

    def in_process(stage, root, cfg, params=None, resume="", *_):
        source = root / "asked.yaml"
        import yaml

        source.write_text(yaml.safe_dump({"base": None, **cfg.to_dict()}, allow_unicode=True), encoding="utf-8")
        return ClassifierJob(run_dir=str(root), config=str(source), epochs=cfg.train.classification.epochs).run().record

    monkeypatch.setattr(runner, "run_job", in_process)
    manifest = run / "artifacts" / "stage0" / "manifest_train.csv"
    r = CliRunner().invoke(
        cli.app,
        [
            "train-stage",
            "--manifest",
            str(manifest),
            "--num-classes",
            "5000",
            "--target-accuracy",
            "1.0",
            "--epochs",
            "2",
            "--batch-size",
            "12",
        ],
    )
    assert r.exit_code == 0, (r.output, r.exception)
    log = (run / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    assert "6 drugs in the class map, 5000 declared" in log and "2 epochs" in log and "steps of 12" in log
    acc = read_record(run, "classifier")["table"][0]["accuracy"]
    assert f"target accuracy 1.000: {'reached' if acc >= 1 else 'not reached'}, {acc:.3f}" in r.output
    assert len(read_json(run / "reports" / "metrics.json")["history"]) == 2
    with pytest.raises(PillsnapError, match="not a stage of a run folder"):
        CliRunner().invoke(cli.app, ["train-stage", "--manifest", str(run / "asked.yaml")], catch_exceptions=False)


def toy_learner(n, *overrides):
    "A Learner with the default callbacks on `n` batches that are there."
    g = torch.Generator().manual_seed(0)
    batches = [
        (
            torch.rand(4, 3, 8, 8, generator=g),
            torch.randint(0, 3, (4,), generator=g),
            {"paths": list("abcd"), "skipped": []},
        )
        for _ in range(n)
    ]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(144, 3)
    )
    cfg = load_config(
        "smoke",
        ["train.classification.epochs=1", "train.step_log_interval=1000", "train.profile_interval=1000", *overrides],
    )
    loss = torch.nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 1.5]))
    return build_learner(ClassifierSettings.from_config(cfg), net, loss, batches, {"whole": batches[:1]}, 3)


EVERYTHING = (
    "train.classification.grad_accum_steps=2",
    "train.classification.ema={enabled: true, decay: 0.9}",
    "train.classification.mixing.mixup=0.2",
    "data.progressive_validation.stage_0.time_limit_hours=9",
    "train.classification.grad_clip=1.0",
)


@pytest.mark.spec("CT19")
def test_no_step_fetches_a_number(monkeypatch):
    """What would stop a GPU at every step (item, float, cpu, bool) is not called more often when an epoch has three
    times as many."""
    from pillsnap.training.monitoring import Progress, StepLog

    seen = []
    for name in ("item", "__float__", "__bool__", "__int__", "cpu", "tolist", "numpy"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *a, _real=real, _name=name, **kw: (seen.append(_name), _real(self, *a, **kw))[1],
        )

    class Quiet(Callback):
        "Count in training only."

        order = 300

        def before_train(self):
            seen.clear()

        def after_train(self):
            self.learn.fetched = len(seen)

    counts = []
    for n in (6, 18):
        learn = toy_learner(n, *EVERYTHING)
        learn.add_cbs([StepLog(1000), Progress("log", show=lambda line: None), Quiet()])
        learn.fit(1)
        counts.append(learn.fetched)
    assert counts[0] == counts[1], counts


@pytest.mark.spec("CT12", "CT11", "NM8")
def test_everything_at_once_ends_at_finite_weights_that_moved():
    learn = toy_learner(7, *EVERYTHING)  # an odd number of batches: the last window is short
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    np.random.seed(0)
    learn.fit(1)
    now = learn.model.state_dict()
    assert all(torch.isfinite(v).all() for v in now.values()) and not torch.equal(before["3.weight"], now["3.weight"])
    assert math.isfinite(learn.rows[-1]["train_loss"]) and learn.schedule.done == 4


@pytest.mark.spec("NM6")
def test_stochastic_depth_reaches_the_network(run):
    cfg = load_config(
        "smoke",
        [
            *SMALL,
            f"paths.exp_dir={run}",
            "train.classification.drop_path_rate=0.25",
            "train.classification.drop_rate=0.3",
        ],
    )
    learn, _ = build_training(load_split_data(run, 0), cfg, Outputs(quiet=True))
    paths = [m.drop_prob for m in learn.model.modules() if type(m).__name__ == "DropPath"]
    assert math.isclose(max(paths), 0.25) and learn.model.drop_rate == 0.3
