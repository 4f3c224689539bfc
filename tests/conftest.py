"""Fixtures that many tests share: one small synthetic delivery, rendered once, and one smoke run of all stages."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PILLSNAP_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def delivery(tmp_path_factory) -> Path:
    "A clean delivery: 6 drugs with 18 photos each, 4 combinations, 244x320. Read only."
    from pillsnap.synth.writer import write_delivery

    out = tmp_path_factory.mktemp("delivery") / "aihub"
    write_delivery(out, drugs=6, photos=18, combos=4, seed=42, width=244, height=320, workers=2, progress=False)
    return out


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    "A run folder that the six stages filled, through papermill, with the smoke preset. Read only."
    from pillsnap.cli import PIPELINE
    from pillsnap.core.runner import run_pipeline

    root = tmp_path_factory.mktemp("smoke") / "run"
    run_pipeline(PIPELINE, "smoke", run_dir=root)
    return root
