"""A larger stage starts from a smaller one's checkpoint, the head's rows by class key."""

import shutil

import pytest
import torch

from pillsnap.core.checkpoints import load_ckpt, save_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, sha256_file
from pillsnap.core.jobs import RunFolder, read_record
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import smoke_splits
from pillsnap.models.factory import load_classifier
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.learner import Outputs
from pillsnap.training.saving import Checkpoint
from pillsnap.training.trainer import build_training

STAGES = tuple(
    f"data.progressive_validation.stage_{i}.{k}={v}"
    for i, (n, c) in enumerate(((60, 4), (90, 6)), 1)
    for k, v in (("max_samples", n), ("max_classes", c))
)
COMMON = (
    *STAGES,
    "evaluation.min_eval_samples=8",
    "data.classification.img_size=48",
    "train.num_threads=1",
    "train.classification.lr=0.003",
    "train.classification.ema={enabled: true, decay: 0.9}",
)


def overrides(stage, *more):
    return (*COMMON, f"data.progressive_validation.current_stage={stage}", *more)


def job(root, stage, *more, epochs=1):
    return ClassifierJob(run_dir=str(root), config="smoke", overrides=overrides(stage, *more), epochs=epochs)


@pytest.fixture(scope="module")
def both(delivery, tmp_path_factory):
    "Run folders of stage 1, trained for an epoch, and of stage 2, split."
    made = {}
    for stage in (1, 2):
        root = tmp_path_factory.mktemp("warm") / f"stage{stage}"
        root.mkdir()
        (root / "delivery").symlink_to(delivery)
        smoke_splits(RunFolder(root, "splits"), load_config("smoke", overrides(stage)))
        made[stage] = root
    job(made[1], 1).run()
    return made[1], made[2]


@pytest.fixture
def large(both, tmp_path):
    "A copy of the stage-2 folder."
    return shutil.copytree(both[1], tmp_path / "stage2", symlinks=True)


def from_small(both):
    return f"train.classification.init_from={both[0]}"


@pytest.mark.spec("BX20")
def test_rows_and_answers_of_the_shared_drugs_are_the_smaller_stages(both, large):
    "Compared by class key: the shared drugs have other numbers in the larger map, and the new drugs' rows are fresh."
    small_ckpt = both[0] / "checkpoints" / "classifier" / "best.pt"
    loaded = load_classifier(small_ckpt)
    old, of, saved = loaded.model, loaded.class_map, loaded.checkpoint
    data, cfg = load_split_data(large, 2), load_config("smoke", overrides(2, from_small(both)))
    to = data.class_map
    shared, new = [k for k in to if of.id(k) >= 0], [k for k in to if of.id(k) < 0]
    assert len(shared) == 4 and len(new) == 2 and any(of.id(k) != to.id(k) for k in shared)

    learn, origin = build_training(data, cfg, Outputs(large / "checkpoints" / "classifier", quiet=True))
    a, b = [of.id(k) for k in shared], [to.id(k) for k in shared]
    head = learn.model.fc
    assert torch.equal(head.weight[b], old.fc.weight[a]) and torch.equal(head.bias[b], old.fc.bias[a])
    for name, t in learn.model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(t, saved["model_state"][name]), name

    cold, _ = build_training(
        data, load_config("smoke", overrides(2)), Outputs(large / "checkpoints" / "classifier", quiet=True)
    )
    fresh = [to.id(k) for k in new]
    assert torch.equal(head.weight[fresh], cold.model.fc.weight[fresh])

    photos = next(iter(learn.dls.valid))[0]
    model = learn.model.eval()
    with torch.no_grad():
        before, after = old(photos), model(photos)
    assert torch.allclose(after[:, b], before[:, a], atol=1e-6) and not torch.allclose(after[:, :4], before, atol=1e-3)
    learn.ema.before_fit()  # the average begins with the weights that were copied
    assert torch.equal(learn.ema.shadow["fc.weight"], head.weight)
    assert (origin["copied"], origin["new"], origin["dropped"]) == (4, 2, 0)


@pytest.mark.spec("BX20")
def test_the_run_says_where_its_weights_came_from(both, large):
    "Log, report, checkpoint and run record name the file, its hash, both class maps and the counts."
    source = both[0] / "checkpoints" / "classifier" / "best.pt"
    res = job(large, 2, from_small(both)).run()
    of, to = load_ckpt(source)["class_map"], load_split_data(large, 2).class_map
    log = (large / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    assert f"{source}, sha256 {sha256_file(source)[:12]}" in log and "from scratch" not in log
    assert (
        f"{of['fingerprint'][:12]} of 4 to {to.fingerprint[:12]} of 6: 4 head rows copied by key, 2 new, 0 dropped"
        in log
    )
    assert "none of this run's validation or evaluation photos trained it" in log
    for origin in (
        read_json(large / "reports" / "classifier.json")["weights"],
        load_ckpt(large / "checkpoints" / "classifier" / "best.pt")["weights_origin"],
    ):
        assert (origin["source"], origin["path"], origin["sha256"]) == ("init_from", str(source), sha256_file(source))
        assert (origin["class_map_from"], origin["class_map_to"]) == (of["fingerprint"], to.fingerprint)
        assert (origin["copied"], origin["new"], origin["dropped"]) == (4, 2, 0) and 0.9 < origin["share"] < 1
    assert read_record(large, "classifier")["inputs"][str(source)] == sha256_file(source)
    assert any("4 copied, 2 new, 0 dropped" in n for n in res.notes)


@pytest.mark.spec("BX20", "BX10")
def test_a_run_that_goes_on_does_not_start_again(both, large, tmp_path, monkeypatch):
    "Interrupted after its first epoch and continued without the smaller run: the same weights as in one go."
    source = shutil.copytree(both[0], tmp_path / "gone", symlinks=True)
    key = f"train.classification.init_from={source}"
    straight = shutil.copytree(large, tmp_path / "straight", symlinks=True)
    job(straight, 2, key, epochs=2).run()

    done = Checkpoint.after_epoch

    def stop(self):
        done(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Checkpoint, "after_epoch", stop)
        job(large, 2, key, epochs=2).run()
    assert load_ckpt(large / "checkpoints" / "classifier" / "last.pt")["epoch"] == 1
    shutil.rmtree(source)
    job(large, 2, key, epochs=2).run()
    assert "init_from: not read again" in (large / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    a, b = (load_ckpt(r / "checkpoints" / "classifier" / "last.pt") for r in (straight, large))
    assert all(
        torch.allclose(a["model_state"][k].double(), b["model_state"][k].double(), atol=1e-6) for k in a["model_state"]
    )
    assert a["weights_origin"]["sha256"] == b["weights_origin"]["sha256"]


@pytest.mark.spec("BX20")
def test_a_checkpoint_that_was_trained_on_validation_photos_is_refused(both, large, tmp_path):
    "A smaller stage of another seed has trained on groups that are validated here."
    other = tmp_path / "other"
    other.mkdir()
    (other / "delivery").symlink_to((both[0] / "delivery").resolve())
    smoke_splits(RunFolder(other, "splits"), load_config("smoke", overrides(1, "train.seed=5")))
    assert set(load_split_data(other, 1).train["group_id"]) & set(load_split_data(large, 2).eval_set["group_id"])
    path = other / "checkpoints" / "classifier" / "best.pt"
    save_ckpt(
        path,
        **{
            **load_ckpt(both[0] / "checkpoints" / "classifier" / "best.pt"),
            "class_map": load_split_data(other, 1).class_map.to_dict(),
        },
    )
    with pytest.raises(PillsnapError, match=r"\d+ validation or evaluation photos of this run share a capture group"):
        job(large, 2, f"train.classification.init_from={other}").run()
    alone = tmp_path / "alone.pt"
    shutil.copy(path, alone)
    job(large, 2, f"train.classification.init_from={alone}").run()
    log = (large / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    assert "init_from photos: not known, the split it was trained on is not beside it" in log


def test_settings_that_do_not_go_together_are_refused(both, large):
    for more, why in (
        (("train.leak_gap=true",), "a twin that is validated on photos"),
        (("train.classification.pretrained=true",), "two sources"),
        (("train.classification.weights=w.pth",), "two sources"),
    ):
        with pytest.raises(PillsnapError, match=why):
            load_config("smoke", overrides(2, from_small(both), *more))
    with pytest.raises(PillsnapError, match="no checkpoint to start from"):
        job(large, 2, "train.classification.init_from=no/such/run").run()
    with pytest.raises(PillsnapError, match="this run's own checkpoint"):
        shutil.copytree(both[0] / "checkpoints", large / "checkpoints", dirs_exist_ok=True)
        (large / "checkpoints" / "classifier" / "last.pt").unlink()
        job(large, 2, f"train.classification.init_from={large}").run()
