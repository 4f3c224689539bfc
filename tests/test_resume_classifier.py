"""kill -9 in the middle of the classifier, then the same command (SPEC CT16, X73, BX8)."""

import signal

import pytest
import torch
from runs import stopped_classifier
from test_smoke_train import split_folder

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.core.jobs import read_record
from pillsnap.core.logs import logged_lines
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob
from pillsnap.training.classifier import ClassifierJob

EPOCHS = 5
OVERRIDES = ("data.classification.img_size=64", "train.num_threads=1", "train.classification.lr=0.003")


def job(root, *more):
    return ClassifierJob(run_dir=str(root), config="smoke", overrides=(*OVERRIDES, *more), epochs=EPOCHS)


@pytest.fixture(scope="module")
def killed(delivery, tmp_path_factory):
    "A run folder whose classifier was killed in its second epoch."
    root = split_folder(tmp_path_factory.mktemp("killed") / "run", delivery)
    status, err = stopped_classifier(root, OVERRIDES, EPOCHS, (1, 0), signal.SIGKILL)
    assert status == -signal.SIGKILL, err
    return root


@pytest.mark.spec("CT15", "BX8")
def test_a_checkpoint_of_something_else_is_refused_in_plain_words(killed):
    done = load_ckpt(killed / "checkpoints" / "classifier" / "last.pt")["epoch"]
    assert done == 1 and read_record(killed, "classifier")["status"] == "running"
    with pytest.raises(PillsnapError, match="test_resnet.*test_byobnet"):
        job(killed, "train.classification.backbone=test_byobnet").run()
    with pytest.raises(PillsnapError, match=r"lr: 0.003 -> 0.5"):
        job(killed, "train.classification.lr=0.5").run()
    fewer = "data.progressive_validation.stage_0.max_classes=4"
    SplitsJob(run_dir=str(killed), config="smoke", overrides=(*OVERRIDES, fewer), near_duplicates=False).run()
    with pytest.raises(PillsnapError, match="another class map.*6 classes in the checkpoint, 4 in the data"):
        job(killed, fewer).run()
    SplitsJob(run_dir=str(killed), config="smoke", overrides=OVERRIDES, near_duplicates=False).run()
    assert (
        load_ckpt(killed / "checkpoints" / "classifier" / "last.pt")["epoch"] == done
    )  # refusals leave everything as it was


@pytest.mark.spec("CT16", "CT22")
def test_the_same_command_goes_on_and_ends_as_if_nothing_had_happened(killed, delivery, tmp_path):
    done = load_ckpt(killed / "checkpoints" / "classifier" / "last.pt")["epoch"]
    with logged_lines() as said:
        job(killed).run()
    assert f"after epoch {done} of {EPOCHS}" in "\n".join(said) and f"[train] e={EPOCHS}/{EPOCHS} " in "\n".join(said)
    assert read_record(killed, "classifier")["status"] == "finished"
    rows = read_json(killed / "reports" / "metrics.json")["history"]
    assert [r["epoch"] for r in rows] == list(range(1, EPOCHS + 1))

    straight = split_folder(tmp_path / "straight", delivery)
    res = job(straight).run()
    assert (
        res.record["status"] == "finished"
        and load_split_data(straight, 0).class_map == load_split_data(killed, 0).class_map
    )
    a, b = (load_ckpt(r / "checkpoints" / "classifier" / "last.pt") for r in (straight, killed))
    assert a["epoch"] == b["epoch"] == EPOCHS and a["best_metric"] == b["best_metric"]
    for k, v in a["model_state"].items():
        assert torch.allclose(v.float(), b["model_state"][k].float(), atol=1e-5), k
    assert [r["classification"]["acc"] for r in rows] == [
        r["classification"]["acc"] for r in read_json(straight / "reports" / "metrics.json")["history"]
    ]


@pytest.mark.spec("CT16")
def test_a_finished_run_is_begun_again_only_when_it_is_asked_for(killed):
    "After the end, `auto` begins anew and `last` has nothing left to train."
    with logged_lines() as said:
        job(killed, "train.resume=last").run()
    assert said and not [line for line in said if line.startswith("[train]")]
    with pytest.raises(PillsnapError, match="another configuration"):
        job(killed, "train.resume=last", "train.classification.label_smoothing=0.2").run()
