"""Segmentation: masks stay index masks through every transform, the figures agree with scikit-learn's, bad pairs
are skipped."""

import importlib.util
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pillsnap.core.errors import PillsnapError
from pillsnap.dataset.masks import (
    IGNORE,
    CEDiceLoss,
    SegmentationDataset,
    albumentations,
    collate_masks,
    confusion_of,
    read_mask,
    segmentation_metrics,
    sync_transform,
    write_sample,
)
from pillsnap.synth.catalogue import make_catalogue

HAVE = importlib.util.find_spec("albumentations") is not None
needs = pytest.mark.skipif(not HAVE, reason="albumentations is not installed")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    cat = list(make_catalogue(6, 3))
    return write_sample(tmp_path_factory.mktemp("seg") / "set", [cat[2], cat[3]], n=6)


@pytest.mark.spec("DM12")
def test_masks_of_the_renderer_lie_on_the_pills(sample, tmp_path):
    """A pill lies lit on a table: inside its mask the photo differs from the same table without it; bytes follow
    the seed."""
    for a, b in ((sample, write_sample(tmp_path / "again", [list(make_catalogue(6, 3))[i] for i in (2, 3)], n=6)),):
        for sub in ("images", "masks"):
            assert [p.read_bytes() for p in sorted((a / sub).iterdir())] == [
                p.read_bytes() for p in sorted((b / sub).iterdir())
            ]
    for i in range(6):
        img, m = (
            np.asarray(Image.open(sample / f"images/{i:04d}.png")).astype(float),
            read_mask(sample / f"masks/{i:04d}.png", 3),
        )
        assert set(np.unique(m)) == {0, 1, 2} and 0.05 < (m > 0).mean() < 0.6
        ring = m == 0
        table = np.median(img[ring], axis=0)
        off = np.abs(img - table).sum(-1)
        assert np.median(off[m > 0]) > 3 * np.median(off[ring])


@needs
@pytest.mark.spec("DM12")
def test_the_photo_is_bilinear_and_the_mask_nearest():
    import cv2

    for step in sync_transform(48).transforms[:2]:
        assert (step.interpolation, step.mask_interpolation) == (cv2.INTER_LINEAR, cv2.INTER_NEAREST)
    a = np.zeros((10, 10), np.uint8)
    a[:, 5:] = 2
    o = sync_transform(37, train=False)(image=np.repeat(a[..., None] * 100, 3, 2), mask=a)
    assert set(np.unique(o["mask"])) == {0, 2} and len(np.unique(o["image"])) > 2


@pytest.mark.spec("DM12")
def test_without_the_package_one_plain_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PillsnapError, match="--no-deps albumentations==2.0.8"):
        albumentations()


def test_the_module_does_not_import_the_package():
    code = "import sys, pillsnap.dataset.masks; sys.exit('albumentations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.spec("DM12")
@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60), st.booleans()
)
def test_the_figures_are_scikit_learns(classes, pixels, hide):
    from sklearn.metrics import accuracy_score, f1_score, jaccard_score

    t, p = (np.array(v) % classes for v in zip(*pixels))
    full = np.append(t, IGNORE) if hide else t
    r = segmentation_metrics(confusion_of(np.append(p, 0) if hide else p, full, classes))
    seen = sorted(set(t) | set(p))
    assert np.isclose(r["mIoU"], jaccard_score(t, p, labels=seen, average="macro", zero_division=0))
    assert np.isclose(r["Dice"], f1_score(t, p, labels=seen, average="macro", zero_division=0)) and np.isclose(
        r["PixelAcc"], accuracy_score(t, p)
    )
    assert r["n"] == len(t)


@pytest.mark.spec("DM12")
def test_the_loss_is_ce_plus_dice():
    "Against the two terms written out by hand, for two classes."
    torch.manual_seed(0)
    z, m = torch.randn(2, 2, 5, 5), torch.randint(0, 2, (2, 5, 5))
    p = z.softmax(1)[:, 1]
    d = []
    for q, t in ((1 - p, 1 - m), (p, m)):
        d.append((2 * (q * t).sum() + 1) / (q.sum() + t.sum() + 1))
    by_hand = torch.nn.functional.cross_entropy(z, m) + 1 - sum(d) / 2
    assert torch.allclose(CEDiceLoss()(z, m), by_hand, atol=1e-6)
    assert torch.allclose(CEDiceLoss(0)(z, m), torch.nn.functional.cross_entropy(z, m))


@pytest.mark.spec("DM12")
def test_samples_and_skips(sample, tmp_path):
    import shutil

    shutil.copytree(sample, tmp_path / "set")
    (tmp_path / "set/images/0001.png").write_bytes(b"broken")
    Image.fromarray(np.full((160, 128), 7, np.uint8)).save(tmp_path / "set/masks/0002.png")  # a class that is none
    (tmp_path / "set/masks/0003.png").unlink()
    d = SegmentationDataset(tmp_path / "set", 3, 32)
    assert len(d) == 5 and [("_skip" in d[i]) for i in range(5)] == [False, True, True, False, False]
    assert (
        set(d[0]) == {"image", "mask", "path"}
        and d[0]["image"].dtype == torch.float32
        and d[0]["mask"].dtype == torch.int64
    )
    loader = torch.utils.data.DataLoader(d, 5, collate_fn=collate_masks, num_workers=1, multiprocessing_context="spawn")
    x, y, meta = next(iter(loader))
    assert (
        x.shape == (3, 3, 32, 32)
        and y.shape == (3, 32, 32)
        and len(meta["skipped"]) == 2
        and set(y.unique().tolist()) == {0, 1, 2}
    )


SMALL = [
    "data.task=segmentation",
    (
        "train.segmentation={backbone: test_resnet, img_size: 64, epochs: 12, batch_size: 6, lr: 0.01, "
        "synthetic_photos: 20, augment: false}"
    ),
]


@pytest.mark.spec("DM12")
def test_the_job_trains_a_network_that_finds_pills(tmp_path):
    "The whole run by its command: figures of photos that did not train, above what an empty answer scores."
    from pillsnap.cli import PIPELINE, main

    with pytest.raises(SystemExit) as ended:
        main(["run", "all", "--config", "smoke", "--run-dir", str(tmp_path / "run"), *SMALL])
    assert ended.value.code == 0
    report = json.loads((tmp_path / "run/reports/segmentation.json").read_text(encoding="utf-8"))
    found = {m["name"]: m for m in report["metrics"]}
    iou = {c["class"]: c["iou"] for c in report["per_class"]}
    empty = report["per_class"][0]["pixels"] / sum(c["pixels"] for c in report["per_class"]) / 4
    assert (
        found["mask_miou"]["value"] > empty + 0.15
        and found["mask_miou"]["how"] == "measured"
        and found["mask_miou"]["data"] == "synthetic"
    )
    assert found["mask_miou"]["n"] == report["photos"]["val"] and list(iou)[0] == "background" and len(iou) == 4
    assert {p.name for p in (tmp_path / "run/checkpoints/segmentation").iterdir()} == {"best.pt", "last.pt"}
    assert not any((tmp_path / "run/stages" / f"{s.name}.json").exists() for s in PIPELINE)


@pytest.mark.spec("DM12")
def test_a_killed_training_of_masks_goes_on(tmp_path):
    "Killed after some epochs, the same command ends with the weights of the run that nobody disturbed."
    from pillsnap.core.checkpoints import load_ckpt
    from pillsnap.training.segmentation import SegmentationJob

    code = (
        "import os, sys; from pillsnap.training.segmentation import KeepEpochs, SegmentationJob; "
        "save = KeepEpochs.save; KeepEpochs.save = lambda self, path: (save(self, path), "
        f"(self.epoch, path.name) == (2, 'last.pt') and os.kill(os.getpid(), {int(signal.SIGKILL)})); "
        "SegmentationJob(run_dir=sys.argv[1], config='smoke', overrides=sys.argv[2:], epochs=12).run()"
    )
    last = tmp_path / "cut/checkpoints/segmentation/last.pt"
    command = [sys.executable, "-c", code, str(tmp_path / "cut"), *SMALL]
    p = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=150)
    assert p.returncode == -signal.SIGKILL
    assert load_ckpt(last)["epoch"] == 3, "saved, and killed before the fourth"
    for name in ("cut", "whole"):
        SegmentationJob(run_dir=str(tmp_path / name), config="smoke", overrides=tuple(SMALL), epochs=12).run()
    log = (tmp_path / "cut/logs/pillsnap.segmentation.log").read_text(encoding="utf-8")
    assert "continues after epoch 3" in log
    a, b = (load_ckpt(tmp_path / k / "checkpoints/segmentation/last.pt") for k in ("whole", "cut"))
    assert [e["epoch"] for e in b["history"]] == list(range(1, 13))
    for k, v in a["model_state"].items():
        assert torch.allclose(v.float(), b["model_state"][k].float(), atol=1e-6), k


@pytest.mark.spec("DM12")
def test_the_job_wants_its_task(tmp_path):
    from pillsnap.training.segmentation import SegmentationJob

    with pytest.raises(PillsnapError, match="data.task=segmentation"):
        SegmentationJob(run_dir=str(tmp_path / "a"), config="smoke").run()


@pytest.mark.spec("BX10")
def test_a_resumed_optimizer_is_where_its_weights_are(tmp_path):
    "A checkpoint is read on the CPU; the device `meta` stands for a GPU."
    from types import SimpleNamespace

    from fastai.optimizer import Adam

    from pillsnap.core.checkpoints import rng_state
    from pillsnap.training.segmentation import KeepEpochs

    def optimizer(device):
        weight = torch.nn.Parameter(torch.zeros(3, device=device))
        weight.grad = torch.ones(3, device=device)
        return weight, Adam([weight], lr=0.1)

    _, trained = optimizer("cpu")
    trained.step()
    weight, resumed = optimizer("meta")
    keep = KeepEpochs(tmp_path, {})
    keep.ckpt = dict(model_state={}, optimizer_state=trained.state_dict(), rng_state=rng_state())
    keep.learn = SimpleNamespace(model=SimpleNamespace(load_state_dict=lambda _s: None), opt=resumed, first_epoch=1)
    keep.before_fit()
    assert all(v.device == weight.device for v in resumed.state[weight].values() if torch.is_tensor(v))
    resumed.step()
