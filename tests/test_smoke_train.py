"""One epoch of the classifier with the speed flags on, through the stage job (SPEC CF6)."""

import dataclasses
import math

import pytest
import torch

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.files import read_json
from pillsnap.core.jobs import RunFolder, read_record
from pillsnap.core.records import Metric
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import smoke_splits
from pillsnap.training.classifier import ClassifierJob

FLAGS = (
    "data.classification.img_size=64",
    "train.num_threads=1",
    "train.classification.amp=true",
    "train.classification.amp_dtype=auto",
    "optimization.torch_compile=max-autotune",
    "optimization.cuda_graphs=true",
    "train.classification.auto_batch_tune=true",
)


def split_folder(root, delivery, *overrides):
    "A run folder with the smoke delivery converted and split."
    run = RunFolder(root, "splits")
    (root / "delivery").symlink_to(delivery)
    smoke_splits(run, load_config("smoke", overrides))
    return root


def check_metrics(root) -> dict:
    "The report holds the one epoch with its figures; that epoch's row."
    rows = read_json(root / "reports" / "metrics.json")
    row = rows["latest"]
    assert (
        len(rows["history"]) == 1
        and row["epoch"] == 1
        and row["classification"].keys() >= {"acc", "top1", "macro_f1", "top5", "loss", "n"}
    )
    assert (
        row["val_loss"] == row["classification"]["loss"]
        and math.isfinite(row["train_loss"])
        and list(row["views"]) == ["focus", "whole"]
    )
    return row


def check_checkpoint(root, classes) -> None:
    "The best checkpoint says what it was trained with and for which drugs."
    best = load_ckpt(root / "checkpoints" / "classifier" / "best.pt")
    assert (
        best["backbone"] == "test_resnet"
        and best["img_size"] == 64
        and best["class_map"] == classes.to_dict()
        and best["config_snapshot"]["train"]["seed"] == 42
    )
    assert best["model_state"]["fc.weight"].shape[0] == len(classes)


def check_leak_gap(root, n: int, accuracy: float) -> None:
    "The gap is the difference of two measurements on n photos, of which one is the run's own accuracy."
    gap = {k: Metric.from_dict(v) for k, v in read_json(root / "reports" / "leak_gap.json").items()}
    assert all(m.measured and m.data == "synthetic" and m.n == n for m in gap.values())
    assert math.isclose(gap["leak_gap"].value, gap["image_split"].value - gap["group_split"].value, abs_tol=1e-9)
    assert math.isclose(gap["group_split"].value, accuracy, abs_tol=1e-9)
    assert not (root / "checkpoints" / "image_split_twin").exists()  # a leaky model is not left lying about


@pytest.mark.spec("CF6", "CT15", "CT20", "CT21", "X57")
def test_smoke_train(delivery, tmp_path):
    root = split_folder(tmp_path / "run", delivery)
    res = ClassifierJob(run_dir=str(root), config="smoke", overrides=(*FLAGS, "train.leak_gap=true"), epochs=1).run()
    log = (root / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    if not torch.cuda.is_available():
        for line in (
            "compile: none, because this is a CPU",
            "precision: float32, because",
            "cuda_graphs: does not apply",
            "needs a GPU",
        ):
            assert log.count(line), line
    assert "training: test_resnet for 6 drugs" in log and "[train] e=1/1 s=1/" in log

    row, stage = check_metrics(root), load_split_data(root, 0)
    n = int((stage.val["kind"] == "single").sum())
    assert row["classification"]["n"] == n and res.table[0]["n"] == n  # nothing of the validation set was dropped (X66)
    check_checkpoint(root, stage.class_map)
    check_leak_gap(root, n, row["classification"]["acc"])
    assert read_record(root, "classifier")["status"] == "finished"
    assert any("tfevents" in p.name for p in (root / "tb" / "classifier").iterdir())


@pytest.mark.spec("CT5", "CT21")
def test_autocast_trains_and_validation_stays_in_full_precision(delivery, tmp_path, monkeypatch):
    "bf16 on a CPU, because it is asked for: the run goes through, and what is saved and validated is float32."
    monkeypatch.setattr(
        "pillsnap.core.device.cpu_has_bf16", lambda: True
    )  # emulated where it is not there: slow, but the same
    from fastai.callback.core import Callback

    from pillsnap.training.learner import Outputs
    from pillsnap.training.trainer import build_training

    root = split_folder(tmp_path / "run", delivery)
    cfg = load_config(
        "smoke",
        [
            *FLAGS,
            f"paths.exp_dir={root}",
            "train.classification.amp_dtype=bf16",
            "train.classification.ema={enabled: true, decay: 0.9}",
        ],
    )
    seen = set()

    class Look(Callback):
        def before_fit(self):
            self.hook = self.model.fc.register_forward_hook(lambda m, i, o: seen.add((self.training, o.dtype)))

    learn, _ = build_training(load_split_data(root, 0), cfg, Outputs(tmp_path / "ck", quiet=True))
    learn.add_cb(Look())
    learn.fit(1)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    ckpt = load_ckpt(tmp_path / "ck" / "last.pt")
    assert (
        all(v.dtype != torch.bfloat16 for v in ckpt["model_state"].values())
        and ckpt["ema_state"].keys() == ckpt["model_state"].keys()
    )


def test_one_drug_is_refused(delivery, tmp_path):
    "A classifier of one class would be right always and worth nothing."
    from pillsnap.core.errors import PillsnapError
    from pillsnap.delivery.classmap import ClassMap
    from pillsnap.training.learner import Outputs
    from pillsnap.training.trainer import build_training

    stage = load_split_data(split_folder(tmp_path / "run", delivery), 0)
    key = list(stage.class_map)[0]
    lone = dataclasses.replace(
        stage,
        class_map=ClassMap([key]),
        train=stage.train[stage.train.class_key == key],
        val=stage.val[stage.val.class_key == key],
    )
    with pytest.raises(PillsnapError, match="at least two drugs"):
        build_training(lone, load_config("smoke", [*FLAGS, f"paths.exp_dir={tmp_path / 'run'}"]), Outputs(quiet=True))
