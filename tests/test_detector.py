"""The detector: two reckonings of its figures, what is left to the library, lazy loading, no network, and life
without ultralytics."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from boards import Board

ROOT = Path(__file__).resolve().parents[1]
needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)


def toy_tree(folder: Path, train: int, val: int, side: int = 128, seed: int = 0) -> Path:
    "Bright ellipses on a noisy ground, one to four a photo, under names that the delivery could have."
    from PIL import Image

    g = np.random.default_rng(seed)
    yy, xx = np.mgrid[:side, :side]
    for split, n in (("train", train), ("val", val)):
        for what in ("images", "labels"):
            (folder / what / split).mkdir(parents=True)
        for i in range(n):
            im, rows = g.normal(90, 8, (side, side, 3)), []
            for q in g.permutation(4)[: g.integers(1, 5)]:
                a, b = g.uniform(9, 15, 2)
                x, y = (
                    side / 4 + side / 2 * (q % 2) + g.uniform(-14, 14),
                    side / 4 + side / 2 * (q // 2) + g.uniform(-14, 14),
                )
                im[((xx - x) / a) ** 2 + ((yy - y) / b) ** 2 < 1] = g.uniform(190, 250, 3)
                rows.append(f"0 {x / side:.6f} {y / side:.6f} {2 * a / side:.6f} {2 * b / side:.6f}")
            codes = "-".join(f"{100 + k:06d}" for k in range(len(rows)))
            name = f"K-{codes}_0_2_0_2_70_{i % 18 * 20:03d}_{200 + i // 18}"
            Image.fromarray(im.clip(0, 255).astype(np.uint8)).save(folder / "images" / split / f"{name}.png")
            (folder / "labels" / split / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return folder


class Sized:
    "A dataset of so many labels."

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)


def toy_plan(tree: Path, out: Path, size: int = 96, **args):
    from pillsnap.core.config import load_config
    from pillsnap.models.yolo import PILL
    from pillsnap.training.detectorsettings import DetectorSettings, TrainPlan, detector_args

    cfg = load_config("smoke", [f"data.detection.img_size={size}"])
    fixed = dict(
        config_snapshot=cfg.to_dict(), class_map=PILL.to_dict(), backbone="yolo11n", img_size=size, data_hash="toy"
    )
    settings = detector_args(DetectorSettings.from_config(cfg), tree, out / "lib")
    return TrainPlan("yolo11n", tree, out, {**settings, **args}, fixed)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    "A detector that has really learned something, though not everything, and what it finds."
    import torch

    from pillsnap.models.yolo import open_detector
    from pillsnap.training.detectordata import photos_in
    from pillsnap.training.detectormetrics import score_detector
    from pillsnap.training.detectortrainer import train_detector

    tmp, threads = tmp_path_factory.mktemp("detector"), torch.get_num_threads()
    board = Board()
    torch.set_num_threads(2)
    try:
        tree = toy_tree(tmp / "yolo_data", 96, 24)
        plan = toy_plan(tree, tmp / "detector", epochs=8, mosaic=0.0, mixup=0.0, warmup_epochs=1.0, scale=(0.9, 1.1))
        trained = train_detector(replace(plan, tb=board))
        scored = score_detector(
            open_detector(tmp / "detector" / "best.pt", lazy=False), photos_in(tree / "images" / "val")
        )
    finally:
        torch.set_num_threads(threads)
    best = max(trained.history, key=lambda r: r["detection"]["mAP@0.5"])
    return best["detection"], scored, board, plan


@needs_ultralytics
@pytest.mark.spec("DT2", "DT4")
def test_two_reckonings_agree(learned):
    "ultralytics' loader, suppression and integration against ours, on a detector that is right only now and then."
    theirs, scored, *_ = learned
    ours = scored.figures
    assert 0.2 < ours["mAP@0.5"] < 0.999, "the comparison would prove little"
    for k in ("mAP@0.5", "mAP@0.5:0.95"):
        assert abs(ours[k] - theirs[k]) <= 0.005, (k, ours[k], theirs[k])
    assert {"precision", "recall"} <= set(theirs)


@needs_ultralytics
@pytest.mark.spec("CT20")
def test_memory_stands_beside_the_batch_size_in_each_epoch_of_the_detector(learned):
    "One point an epoch: photos a step, batches summed, and the memory that these took."
    _, _, board, plan = learned
    size, used = board.of("memory/batch_size"), board.of("memory/used_mb")
    assert size == [(float(plan.args["batch"]), e) for e in range(1, 9)]
    assert [e for _, e in used] == list(range(1, 9)) and all(10 < mb < 1e5 for mb, _ in used)
    assert [e for _, e in board.of("memory/grad_accum")] == list(range(1, 9))


@needs_ultralytics
@pytest.mark.spec("SG6", "X10")
def test_the_detector_counts_its_memory_errors_and_validates_without_tf32(tmp_path, monkeypatch):
    """Ultralytics halves the batch after an out-of-memory error in the first epoch. A resumed training keeps the count.
    TF32 is left to the training."""
    import torch

    from pillsnap.core.checkpoints import load_ckpt
    from pillsnap.core.files import read_json
    from pillsnap.evaluation.checks import memory_errors
    from pillsnap.training.detectortrainer import train_detector

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    left, used = [1], {True: set(), False: set()}

    def forward(model, _args):
        used[model.training].add(torch.backends.cudnn.allow_tf32)
        if model.training and left:
            left.clear()
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    def watch(training):
        for model in (training.model, training.ema.ema):
            model.model[0].register_forward_pre_hook(lambda m, a: forward(m, a))

    plan = toy_plan(toy_tree(tmp_path / "tree", 8, 4), tmp_path / "run", 64, epochs=1, mosaic=0.0, mixup=0.0)
    plan = replace(plan, report=tmp_path / "metrics.json")
    (row,) = train_detector(plan, {"on_train_start": watch}).history
    assert (row["detection"]["oom_events"], left, used) == (1, [], {True: {True}, False: {False}})
    last = load_ckpt(tmp_path / "run" / "last.pt")
    assert last["batch"] == plan.args["batch"] // 2
    train_detector(replace(plan, args=plan.args | {"epochs": 2}, ckpt=last))
    assert memory_errors(read_json(tmp_path / "metrics.json")) == 1


@needs_ultralytics
@pytest.mark.spec("DT1", "X42")
def test_the_aihub_preset_is_yolo11m_at_640_with_one_class():
    from pillsnap.core.config import load_config
    from pillsnap.models.yolo import build_yolo_model

    cfg = load_config("two_stage")
    net = build_yolo_model(cfg.train.detection.model)
    assert cfg.data.detection.img_size == 640 and net.names == {0: "pill"} and net.model[-1].nc == 1
    assert 20.0e6 < sum(p.numel() for p in net.parameters()) < 20.2e6


@needs_ultralytics
@pytest.mark.spec("DT3")
def test_null_is_the_librarys_default_and_shown(tmp_path):
    from pillsnap.core.config import load_config
    from pillsnap.models.yolo import load_ultralytics
    from pillsnap.training.detectorsettings import DetectorSettings, detector_args, resolved_settings

    load_ultralytics(tmp_path)
    from ultralytics.cfg import get_cfg
    from ultralytics.utils import DEFAULT_CFG

    free, set_ = (
        load_config("two_stage"),
        load_config(
            "two_stage",
            ["train.detection.lr=0.005", "train.detection.optimizer=SGD", "train.detection.warmup_epochs=1.5"],
        ),
    )
    assert (
        free.train.detection.epochs == 50 and free.train.detection.auto_batch_max == 16 and free.train.detection.cos_lr
    )
    shown = [
        {r["setting"]: r for r in resolved_settings(s, vars(get_cfg(overrides=detector_args(s, tmp_path, tmp_path))))}
        for s in map(DetectorSettings.from_config, (free, set_))
    ]
    for k in ("lr0", "warmup_epochs", "optimizer", "close_mosaic"):
        assert shown[0][k] == {"setting": k, "value": getattr(DEFAULT_CFG, k), "from": "ultralytics' default"}
    assert (shown[1]["lr0"]["value"], shown[1]["lr0"]["from"], shown[1]["warmup_epochs"]["value"]) == (
        0.005,
        "configuration",
        1.5,
    )
    augment = {k: shown[0][k]["value"] for k in ("mosaic", "mixup", "fliplr", "scale")}
    assert augment == {"mosaic": 0.5, "mixup": 0.1, "fliplr": 0.5, "scale": (0.5, 1.5)}, "SPEC TL2"


def batch_searcher(tmp_path, monkeypatch, points: list):
    "A trainer of forty toy labels that is about to search for its batch size; its TensorBoard points go to `points`."
    from pillsnap.models.yolo import build_yolo_model, load_ultralytics
    from pillsnap.training.detectortrainer import yolo_training

    load_ultralytics(tmp_path)
    board = types.SimpleNamespace(add_scalar=lambda tag, v, step: points.append((tag, v)), add_text=lambda *a: None)
    t = object.__new__(yolo_training())
    t.plan = types.SimpleNamespace(tb=board, batch_cap=24)
    t.args, t.batch_size, t.amp, t.stride, t.data = (
        types.SimpleNamespace(batch=0.88, imgsz=64, multi_scale=0.0, amp=False, cache=False),
        0.88,
        False,
        32,
        {"train": "x"},
    )
    t.model = build_yolo_model("yolo11n")
    labels = [{"cls": [0, 0]}] * 40
    monkeypatch.setattr(type(t), "build_dataset", lambda self, *a, **kw: Sized(labels))
    monkeypatch.setattr(
        "ultralytics.models.yolo.detect.train.override_configs", lambda args, overrides: contextlib.nullcontext(args)
    )
    return t


def stand_in_gpu_memory(monkeypatch, found) -> None:
    "Answer what the library's search asks of a GPU, so that it finds the batch size `found` or meets that error."
    import torch
    from ultralytics.utils import autobatch

    gpu = types.SimpleNamespace(
        get_device_properties=lambda d: types.SimpleNamespace(total_memory=16 << 30, name="toy"),
        memory_reserved=lambda d: 0,
        mem_get_info=lambda d: (16 << 30, 16 << 30),
        empty_cache=lambda: None,
    )
    monkeypatch.setattr(autobatch, "get_torch_device_backend", lambda d: gpu)
    weight = types.SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.nn.Module, "parameters", lambda self: iter([weight]))
    monkeypatch.setattr(autobatch, "autocast", lambda **kw: contextlib.nullcontext())

    def profile(imgs, *a, **kw):
        if isinstance(found, Exception):
            raise found
        return [(0, 0, len(x) * 16 * 0.88 / found) for x in imgs]  # so many GB; the fit's answer is `found`

    monkeypatch.setattr(autobatch, "profile_ops", profile)


@needs_ultralytics
@pytest.mark.spec("X17")
@pytest.mark.parametrize(
    "why, device, found",
    [
        ("a GPU is not there", "cpu", None),
        ("cuDNN searches for kernels", "cuda", 27),
        ("an error", "cuda", RuntimeError("CUDA error: unspecified launch failure")),
    ],
)
def test_a_default_batch_is_not_called_a_search(tmp_path, monkeypatch, why, device, found):
    "The library's own fallback, as it stands in its source; only what was found is a point in TensorBoard."
    import torch

    from pillsnap.core.logs import logged_lines

    points = []
    t = batch_searcher(tmp_path, monkeypatch, points)
    if device == "cuda":
        stand_in_gpu_memory(monkeypatch, found)
    monkeypatch.setattr(
        torch.backends.cudnn, "benchmark", why == "cuDNN searches for kernels"
    )  # another training of this process left it on
    with logged_lines() as lines:
        n = t.auto_batch()
    text = " ".join(lines)
    if found == 27:
        assert n == 24 and points == [("perf/auto_batch_found", 24)] and "found within 88% of the GPU's memory" in text
    else:
        assert n == 16 and not points and "not searched for: ultralytics' default of 16" in text
        assert ("intended for GPU" if device == "cpu" else "unspecified launch failure") in text


@needs_ultralytics
@pytest.mark.spec("DT5", "X38")
def test_single_mode_never_loads_the_detector(tmp_path):
    from pillsnap.delivery.classmap import ClassMap
    from pillsnap.models.pipeline import Pipeline
    from pillsnap.models.yolo import fresh_detector_checkpoint, open_detector

    class Classifier:
        size = 32

        def logits(self, x):
            return np.zeros((len(x), 2), np.float32)

    detector = open_detector(fresh_detector_checkpoint(tmp_path / "best.pt", "yolo11n", 64))
    photo = np.full((80, 60, 3), 120, np.uint8)

    pipeline = Pipeline(Classifier(), ClassMap(["K-000001", "K-000002"]), detector)
    assert pipeline.predict(photo, "single")["mode_used"] == "single" and not detector.loaded
    assert pipeline.predict(photo, "combo")["mode_used"] == "combo" and detector.loaded


@pytest.mark.spec("DT5")
def test_everything_else_lives_without_ultralytics():
    "Every module imports with ultralytics blocked; the detector says what to install."
    code = textwrap.dedent("""
        import importlib, pkgutil, sys
        class Blocked:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "ultralytics": raise ModuleNotFoundError("blocked", name="ultralytics")
        sys.meta_path.insert(0, Blocked())
        import pillsnap
        from pillsnap.core.errors import PillsnapError
        names = [m.name for m in pkgutil.walk_packages(pillsnap.__path__, "pillsnap.") \
if not m.name.endswith("__main__")]
        for n in names: importlib.import_module(n)
        from pillsnap.models.yolo import build_yolo_model
        build_yolo_model("11n", lazy_load=True)
        try: build_yolo_model("11n")
        except PillsnapError as e: \
print(len(names), "pip install" in str(e), "single mode" in str(e), "ultralytics" in sys.modules)
    """)
    r = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert r.returncode == 0, r.stderr[-2000:]
    n, *rest = r.stdout.split()
    assert int(n) > 20 and rest == ["True", "True", "False"]


@needs_ultralytics
def test_loader_processes_find_the_dataset_by_name(tmp_path):
    "Spawned workers unpickle it from the package, where it did not exist at import (house rule 9)."
    import torch

    from pillsnap.models.yolo import load_ultralytics
    from pillsnap.training import detectordata

    load_ultralytics(tmp_path / "lib")
    from ultralytics.cfg import get_cfg

    tree = toy_tree(tmp_path / "y", 8, 4)
    ds = detectordata.YoloPillPhotos(
        img_path=str(tree / "images" / "train"),
        imgsz=64,
        augment=True,
        batch_size=4,
        hyp=get_cfg(overrides=toy_plan(tree, tmp_path).args),
        rect=False,
        stride=32,
        pad=0.0,
        task="detect",
        data={"names": {0: "pill"}, "nc": 1},
    )
    loader = torch.utils.data.DataLoader(
        ds, 4, num_workers=2, multiprocessing_context="spawn", collate_fn=ds.collate_fn
    )
    assert sum(len(b["img"]) for b in loader) == 8
