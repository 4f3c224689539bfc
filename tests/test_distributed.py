"""The classifier's stage in two gloo processes, started as `accelerate launch` starts them; the first alone writes."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

OVER = ["data.classification.img_size=64", "train.classification.epochs=1", "train.classification.batch_size=8", "train.num_threads=1"]


def test_two_processes_are_one_stage(tmp_path, delivery):
    from pillsnap.core.checkpoint import load_ckpt
    from pillsnap.core.config import load_config
    from pillsnap.core.stages import RunFolder, read_record, stale
    from pillsnap.data.splits import smoke_splits
    run = tmp_path/"run"
    (tmp_path/"run").mkdir()
    (run/"delivery").symlink_to(delivery)
    smoke_splits(RunFolder(run, "splits"), load_config("smoke", [*OVER, f"paths.exp_dir={run}"]))
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true"}
    r = subprocess.run([sys.executable, "-m", "pillsnap", "distributed", "classifier", "--run-dir", str(run), "--config", "smoke", "--processes", "2", *OVER], env=env, capture_output=True, text=True, timeout=580)
    assert r.returncode == 0, (r.stdout+r.stderr)[-3000:]
    log = (run/"logs"/"pillsnap.classifier.log").read_text(encoding="utf-8")
    steps = re.findall(r"\[train\] e=1/1 s=(\d+)/(\d+)", log)
    photos = int(re.search(r"loaders: (\d+) train samples", log)[1])
    assert [int(a) for a, _ in steps] == list(range(1, photos//8+1)), "a batch is a batch, whoever shares it; one process logs"
    assert load_ckpt(run/"checkpoints"/"classifier"/"last.pt")["epoch"] == 1
    assert read_record(run, "classifier")["status"] == "finished" and stale(run, "classifier", load_config("smoke", [*OVER, f"paths.exp_dir={run}"])) is None
    assert len(list((run/"tb").glob("*/events*"))) == len(list((run/"tb").iterdir())), "one TensorBoard file per stage"
