"""Fixtures that many tests share: one small synthetic delivery, rendered once, and one smoke run of all stages."""

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from terminal import STARTUP, search_path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PILLSNAP_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
if str(STARTUP) not in (known := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    os.environ["PYTHONPATH"] = search_path(*filter(None, known))
# Files that take longest. They begin first, so that no test process works alone at the end.
LONGEST = [
    "distributed",
    "commands",
    "benchmarks",
    "evaluation",
    "site",
    "processes",
    "server",
    "segmentation",
    "pack",
    "guide",
    "menu_browser",
    "web_page",
    "heldout",
    "interleave",
    "stop_and_go",
    "quantise",
    "wheel",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    "Bring the longest files to the front; the order inside a file stays."
    place = {f"test_{name}.py": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


def pytest_collection_finish() -> None:
    "What is loaded stays: from here on, the garbage collector looks only at what tests make."
    gc.collect()
    gc.freeze()


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    "A folder that the first test process makes and all the others read."
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base  # xdist gives each process a folder below
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def delivery(tmp_path_factory) -> Path:
    "A clean delivery: 6 drugs with 18 photos each, 4 combinations, 244x320. Read only."
    from pillsnap.synth.writer import write_delivery

    size = dict(drugs=6, photos=18, combos=4, seed=42, width=244, height=320, workers=2)
    return made_once(tmp_path_factory, "aihub", lambda out: write_delivery(out, **size, progress=False))


@pytest.fixture(scope="session")
def faulty_delivery(tmp_path_factory) -> Path:
    "A small delivery with every fault planted once; `SYNTHETIC.json` says where. Read only."
    from pillsnap.synth.writer import write_delivery

    size = dict(drugs=4, photos=12, combos=4, seed=8, width=98, height=128, workers=1)
    return made_once(tmp_path_factory, "faulty", lambda out: write_delivery(out, **size, faults=True, progress=False))


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    "A run folder that the six stage jobs filled, through papermill, with the smoke preset. Read only."
    from pillsnap.cli import PIPELINE
    from pillsnap.core.runner import run_pipeline

    return made_once(tmp_path_factory, "smoke", lambda out: run_pipeline(PIPELINE, "smoke", run_dir=out))


# Small photos and two epochs: what is tested is that every part fits the next, not what the network has learned.
SMALL_RETRIEVAL = (
    "project.family=retrieval",
    "project.active_feature_set=mvp",
    "data.imbalance.use_class_weights=false",
    "data.classification.img_size=64",
    "train.classification.head=arcface",
    "train.classification.freeze_backbone_epochs=0",
    "train.classification.combo_crops=false",
    "train.classification.early_stopping.monitor=recall@1",
    "train.classification.early_stopping.mode=max",
    "train.classification.epochs=2",
    "retrieval.embedding_dim=32",
    "retrieval.min_image_size=64",
    "retrieval.train_ratio=0.4",
    "retrieval.val_ratio=0.4",
    "retrieval.test_ratio=0.2",
    "answer.alpha=0.5",
    "evaluation.condition_photos=2",
    "evaluation.min_eval_samples=4",
    "evaluation.latency_runs=3",
)


def make_gallery_run(root: Path, delivery: Path) -> None:
    "Split, train, evaluate and export."
    from pillsnap.core.config import load_config
    from pillsnap.core.jobs import RunFolder
    from pillsnap.dataset.splits import smoke_splits
    from pillsnap.deployment.export import ExportJob
    from pillsnap.evaluation.evaluation import EvaluationJob
    from pillsnap.training.retrieval import RetrievalJob

    root.mkdir()
    (root / "delivery").symlink_to(delivery)
    given = (*SMALL_RETRIEVAL, f"paths.root={root / 'delivery'}", f"paths.exp_dir={root}")
    smoke_splits(RunFolder(root, "splits"), load_config("smoke", given))
    for job in (RetrievalJob, EvaluationJob, ExportJob):
        job(run_dir=str(root), config="smoke", overrides=given).run()


@pytest.fixture(scope="session")
def gallery_run(tmp_path_factory, delivery) -> Path:
    "A small retrieval run with gallery, evaluation and export. Read only."
    return made_once(tmp_path_factory, "gallery", lambda out: make_gallery_run(out, delivery))


@pytest.fixture(scope="session")
def strangers(delivery) -> list[list[Path]]:
    "Photos of each drug of the Validation tree, which Training does not hold: a front, a back, the others."
    from pillsnap.delivery.capture import parse_name

    found = []
    for folder in sorted(p for p in (delivery / "data" / "val" / "images" / "single").rglob("K-*") if p.is_dir()):
        front, back = ([p for p in sorted(folder.glob("*.png")) if parse_name(p.stem).side == s] for s in (0, 1))
        if front and back:
            found.append([front[0], back[0], *front[1:], *back[1:]])
    assert len(found) >= 2 and all(len(photos) > 2 for photos in found)
    return found


def build_wheel(folder: Path) -> None:
    "Build the wheel from a copy of the checkout."
    left_out = shutil.ignore_patterns(".venv", ".git", "_runs", "build", "*.egg-info", "__pycache__", "_docs", "_proc")
    shutil.copytree(ROOT, folder / "src", ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps"]
    subprocess.run(
        [*pip, "--no-build-isolation", "-w", folder, folder / "src"], check=True, capture_output=True, text=True
    )
    shutil.rmtree(folder / "src")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    "The wheel of this checkout."
    return next(made_once(tmp_path_factory, "wheel", build_wheel).glob("*.whl"))
