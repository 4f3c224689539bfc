"""The names that the source documents state: all in one module, each doing what its document says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pillsnap import aliases as A
from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import RunFolder
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import smoke_splits
from pillsnap.models.yolo import load_ultralytics
from pillsnap.photos.caches import View, cached_view
from pillsnap.photos.images import open_image_safely
from pillsnap.training.learner import Outputs
from pillsnap.training.memory import OomState

ROOT = Path(__file__).resolve().parents[1]
TRAINING = (
    "train_classification_stage",
    "train_detection_stage",
    "build_criterion_classification",
    "build_criterion_detection",
    "build_criterion_cls",
    "build_criterion_det",
    "build_optimizer",
    "build_scheduler",
    "validate_classification",
    "validate_detection",
    "evaluate_detection_metrics",
    "early_stopping",
    "oom_recovery_state_machine",
    "apply_stage_overrides",
    "enable_small_dataset_optimizations",
    "enable_large_dataset_optimizations",
    "get_stage_config",
    "get_stage_target",
    "evaluate_and_recommend",
    "diagnose_and_suggest",
)
DATASETS = (
    "PillsnapClsDataset",
    "PillsnapDetDataset",
    "UserControlledTwoStageDataset",
    "SinglePillDataset",
    "CombinationPillDataset",
    "memory_efficient_loader",
    "lmdb_converter",
)
OTHERS = (
    "build_dataloaders",
    "build_dataloaders_by_mode",
    "build_dataloaders_twostage",
    "discover_dataset",
    "discover_detection_data",
    "safe_collate",
    "safe_collate_cls",
    "safe_collate_det",
    "build_transforms",
    "build_transforms_classification",
    "build_transforms_detection",
    "set_seed",
    "build_logger",
    "StepTimer",
    "TBWriter",
    "save_json",
    "read_json",
    "ensure_dir",
    "get_git_sha",
    "cuda_mem_mb",
    "save_ckpt",
    "load_ckpt",
    "load_config",
)
SECOND_NAMES = (
    "safe_collate_cls",
    "safe_collate_classification",
    "safe_collate_det",
    "build_transforms",
    "build_dataloaders",
    "memory_efficient_loader",
    "discover_dataset",
    "build_criterion_cls",
    "build_criterion_classification",
    "build_criterion_det",
    "evaluate_detection_metrics",
    "try_torch_compile",
    "diagnose_and_suggest",
)
SMALL = (
    "data.classification.img_size=48",
    "data.detection.img_size=64",
    "train.num_threads=1",
    "train.seed=1",
    "train.detection.batch_size=4",
    "train.detection.amp_dtype=fp32",
)


@pytest.fixture(scope="module")
def run(delivery, tmp_path_factory):
    "A run folder with the small delivery converted and split."
    root = tmp_path_factory.mktemp("aliases") / "run"
    root.mkdir()
    (root / "delivery").symlink_to(delivery)
    smoke_splits(RunFolder(root, "splits"), load_config("smoke", SMALL))
    return root


@pytest.fixture(scope="module")
def data(run):
    return load_split_data(run, 0)


@pytest.fixture(scope="module")
def cfg():
    return load_config("smoke", SMALL)


@pytest.fixture(scope="module")
def singles(data):
    return data.train[data.train["kind"] == "single"].reset_index(drop=True)


# ---- the module


@pytest.mark.parametrize("name", [*TRAINING, *DATASETS, *OTHERS])
def test_the_name_is_in_the_module(name):
    assert name in A.__all__ and callable(getattr(A, name))


def test_second_names_stand_in_no_other_module():
    for f in (ROOT / "pillsnap").rglob("*.py"):
        if f.name not in ("aliases.py", "_modidx.py"):
            source = f.read_text(encoding="utf-8")
            found = [n for n in SECOND_NAMES if re.search(rf"^(?:def )?{n}\b *[=(]", source, re.M)]
            assert not found, (f, found)


# ---- training


@pytest.mark.spec("CT26")
def test_train_classification_stage_trains_and_saves(data, cfg, tmp_path):
    trained = A.train_classification_stage(data, cfg, Outputs(tmp_path, quiet=True))
    best = load_ckpt(tmp_path / "best.pt")
    assert len(trained.learn.rows) == cfg.train.classification.epochs and best["class_map"] == data.class_map.to_dict()
    scored = A.validate_classification(trained.learn.model, trained.learn.dls.valid, len(data.class_map))
    want = np.mean(scored["answers"]["pred"] == scored["answers"]["labels"])
    assert scored["acc"] == pytest.approx(want) and scored["n"] == int((data.val["kind"] == "single").sum())
    assert set(scored) >= {"val_loss", "acc", "macro_f1", "top5", "n"}


@pytest.mark.spec("CT26")
def test_train_detection_stage_trains_and_its_metrics_are_of_its_boxes(run, cfg):
    load_ultralytics()  # an import by itself would change PIL's Image.open for the whole process
    from pillsnap.models.yolo import TorchDetector, load_detector
    from pillsnap.training.detectordata import photos_in

    folder = RunFolder(run, "detector")
    trained = A.train_detection_stage(folder, cfg)
    assert len(trained.history) == cfg.train.detection.epochs
    loaded = load_detector(run / "checkpoints" / "detector" / "best.pt")
    assert loaded.checkpoint["epoch"] == 1 and loaded.img_size == 64
    photos = photos_in(run / "yolo_data" / "images" / "val")
    found = A.validate_detection(TorchDetector(loaded.model, loaded.img_size), photos)
    assert found["n_photos"] == len(photos) and found["n_boxes"] > 0
    assert {"mAP@0.5", "mAP@0.5:0.95", "precision", "recall"} <= set(found)


@pytest.mark.spec("CT26")
def test_evaluate_detection_metrics_counts_boxes():
    "One of two pills found, once right and once elsewhere: half of the recall, and an area of one half."
    truth = [np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])]
    found = [(np.array([[0.0, 0, 10, 10], [50, 50, 60, 60]]), np.array([0.9, 0.3]))]
    got = A.evaluate_detection_metrics(found, truth)
    assert got["recall"] == pytest.approx(0.5) and got["precision"] == pytest.approx(1)
    assert got["mAP@0.5"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.spec("CT26")
def test_the_criteria_are_the_losses_that_train(cfg):
    counts = [10, 40, 10]
    loss = A.build_criterion_classification(cfg, counts)
    w = torch.tensor([1 / 11, 1 / 41, 1 / 11])
    w = w / w.mean()
    logits, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 1, 0, 2])
    want = nn.functional.cross_entropy(logits, y, w, label_smoothing=cfg.train.classification.label_smoothing)
    assert torch.isclose(loss(logits, y), want, atol=1e-5) and A.build_criterion_cls is A.build_criterion_classification

    load_ultralytics()  # an import by itself would change PIL's Image.open for the whole process
    torch.manual_seed(0)
    net = A.build_yolo_model("11n").train()
    criterion, x = A.build_criterion_detection(net), torch.rand(2, 3, 64, 64)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.2]])
    labels = dict(batch_idx=torch.tensor([0.0, 1.0]), cls=torch.zeros(2, 1), bboxes=boxes, img=x)
    total, parts = criterion(net(x), labels)
    total.sum().backward()
    assert set(parts) == {"box_loss", "cls_loss", "dfl_loss"}
    assert all(torch.isfinite(v) and v > 0 for v in parts.values())
    assert torch.allclose(total, 2 * torch.stack([parts[k] for k in ("box_loss", "cls_loss", "dfl_loss")]), rtol=1e-4)
    grads = [p.grad for p in net.model[-1].parameters() if p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)
    nothing = {"batch_idx": torch.empty(0), "cls": torch.empty(0, 1), "bboxes": torch.empty(0, 4)}
    none = criterion(net(x), {**labels, **nothing})[1]  # no pill: nothing to place, and confidence still costs
    assert none["box_loss"] == none["dfl_loss"] == 0 < none["cls_loss"]


@pytest.mark.spec("CT26")
def test_optimizer_and_scheduler_are_the_configured_ones():
    c = load_config("two_stage", ["train.classification.warmup_steps=10", "train.classification.epochs=2"])
    model = nn.Linear(3, 2)
    opt = A.build_optimizer(model.parameters(), 2e-4, 1e-4)
    assert isinstance(opt, torch.optim.AdamW) and (opt.defaults["lr"], opt.defaults["weight_decay"]) == (2e-4, 1e-4)
    rate = A.build_scheduler(c.train.classification, 100).rule
    assert rate(10) == pytest.approx(2e-4, rel=0.02) and rate(0) < rate(5) < rate(10)
    assert rate(55) == pytest.approx(1e-4, rel=0.02) and rate(100) < 2e-6


@pytest.mark.spec("CT26")
def test_early_stopping_says_when_and_what_was_best():
    assert A.early_stopping([0.5, 0.7, 0.6, 0.65], patience=2) == (True, 0.7)
    assert A.early_stopping([0.5, 0.7, 0.6], patience=2) == (False, 0.7)
    assert A.early_stopping([3.0, 2.0, 2.5, 2.4], patience=2, mode="min") == (True, 2.0)


@pytest.mark.spec("CT26")
def test_the_memory_machine_cuts_the_batch_and_keeps_the_global_one(cfg):
    state, retries = OomState(64, 1, "fp16"), 0
    seen = []
    for _ in range(5):
        act = A.oom_recovery_state_machine(retries, state, cfg.train.oom)
        seen.append(act.name)
        state, retries = act.next_state, act.retries
    assert seen[:3] == ["empty_cache", "amp_fp16", "microbatching"] and (state.batch_size, state.grad_accum) == (8, 8)


@pytest.mark.spec("CT26")
def test_the_stages_settings():
    own = [f"train.stage_overrides.stage_3.{k}" for k in ("batch_size_override=24", "compile_mode=none")]
    c = load_config("two_stage", [*own, "train.classification.auto_batch_max=200"])
    done = A.apply_stage_overrides(c, 3)
    assert (done.train.classification.batch_size, done.optimization.torch_compile) == (24, "none")
    assert A.apply_stage_overrides(c, 2) == c
    small, large = A.enable_small_dataset_optimizations(c), A.enable_large_dataset_optimizations(c)
    assert (small.train.classification.auto_batch_max, small.optimization.torch_compile) == (96, "reduce-overhead")
    assert (large.train.auto_batch_vram_headroom, large.optimization.torch_compile) == (0.92, "max-autotune")
    assert (A.get_stage_config(2, c).max_samples, A.get_stage_config(2, c).max_classes) == (25000, 250)


@pytest.mark.spec("CT26")
def test_the_advisor_answers_by_its_names():
    from pillsnap.core.records import Provenance
    from pillsnap.evaluation.advisor import Facts

    def m(name, v):
        return Provenance("aihub", "d" * 64, "c" * 64).metric(name, v, n=5000, seconds=60.0)

    target = A.get_stage_target(1)
    assert {t.name: t.value for t in target.targets}["accuracy"] == 0.40
    facts = Facts(metrics={"accuracy": m("accuracy", 0.2)}, oom_events=9)
    advice = A.evaluate_and_recommend(1, facts)
    assert (advice.recommendation, advice.reason) == ("CRITICAL", "repeated_oom") and len(advice.user_options) == 1
    assert any("batch" in s.override for s in A.diagnose_and_suggest(1, facts))


# ---- data


@pytest.mark.spec("TL3")
def test_the_named_data_sets_serve_their_sizes_and_never_switch(data, singles):
    one = A.SinglePillDataset(singles, data.class_map, data.root)
    rows = data.train[data.train["kind"] == "combo"]
    many = A.CombinationPillDataset(rows, data.root)
    assert one[0]["image"].shape == (3, 384, 384) and many[0]["image"].shape == (3, 640, 640)
    assert set(one[0]) == set(many[0]) == {"image", "label", "path"}
    assert isinstance(one, A.PillsnapClsDataset) and isinstance(many, A.PillsnapDetDataset)
    for mode, part in (("single", one), ("combo", many)):
        chosen = A.UserControlledTwoStageDataset(mode, one, many)
        assert len(chosen) == len(part) and chosen[0]["path"] == part[0]["path"]
        assert chosen[0]["image"].shape == part[0]["image"].shape
    with pytest.raises(PillsnapError, match="not 'auto'"):
        A.UserControlledTwoStageDataset("auto", one, many)
    broken = A.SinglePillDataset(singles.head(2).assign(path=["gone.png", singles.path[0]]), data.class_map, data.root)
    assert "_skip" in broken[0] and broken[0]["path"] == "gone.png" and "image" in broken[1]


@pytest.mark.spec("TL3")
def test_memory_efficient_loader_keeps_no_photo_and_serves_all(data):
    c = load_config("smoke", [*SMALL, "dataloader.ram_optimization.cache_policy=labels_only", "pack.enabled=false"])
    train_dl, val_dl, meta = A.memory_efficient_loader(data, c)
    assert meta["cached_bytes"] == 0
    seen = [p for _, _, m in val_dl for p in m["paths"]]
    assert sorted(seen) == sorted(set(data.val.loc[data.val["kind"] == "single", "path"]))


@pytest.mark.spec("TL3")
def test_lmdb_converter_writes_what_is_served(data, singles, tmp_path):
    rows = singles.head(3)
    d = A.PillsnapClsDataset(rows, data.class_map, data.root, 48)
    kept = A.lmdb_converter(d, tmp_path / "canvases.lmdb", map_size="1GB")
    for p, b in zip(rows["path"], rows["bbox"]):
        view = View("whole", 48)
        assert np.array_equal(kept.get(p, b, view), cached_view(open_image_safely(data.root / p)["image"], None, view))


@pytest.mark.spec("X35", "X36")
def test_two_names_are_one_function(data, cfg):
    pairs = (
        ("build_dataloaders", "build_dataloaders_by_mode"),
        ("discover_dataset", "discover_detection_data"),
        ("safe_collate_cls", "safe_collate"),
        ("safe_collate_det", "safe_collate_detection"),
        ("build_transforms", "build_transforms_classification"),
    )
    assert all(getattr(A, a) is getattr(A, b) for a, b in pairs)
    train_dl, val_dl, test_dl, meta = A.build_dataloaders(data, cfg)
    assert test_dl is None and meta["mode"] == "single" and len(A.build_dataloaders_twostage(data, cfg)) == 7
