"""The detector is killed inside an epoch; the same command continues and ends where an undisturbed run ends."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from runs import DETECTOR_KILLED

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed")

OVERRIDES = ("data.detection.img_size=64", "train.num_threads=1", "data.augment.detection.mixup=0.5")
COMMAND = textwrap.dedent("""
    import json, os, sys
    tried = []
    def watch(event, args):
        if event in ("socket.connect", "socket.getaddrinfo") and "AF_UNIX" not in str(args[0]): \
tried.append([event, str(args)])
    sys.addaudithook(watch)
    from pillsnap.training.detector import DetectorJob
    res = DetectorJob(run_dir=sys.argv[1], config="smoke", epochs=2, overrides=tuple(sys.argv[2:])).run()
    home = [p for p in os.listdir(os.environ["HOME"])]
    print("RESULT", json.dumps({"tried": tried, "home": home, "verdict": res.verdict}))
""")


def command(run: Path, home: Path, out: Path, before: str = "") -> subprocess.Popen:
    home.mkdir(exist_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith("YOLO_")} | {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "MPLCONFIGDIR": str(home.parent / "mpl"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, str(run), *OVERRIDES],
        env=env,
        stdout=open(out, "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def log_of(run: Path) -> str:
    f = run / "logs" / "pillsnap.detector.log"
    return f.read_text(encoding="utf-8") if f.exists() else ""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, delivery) -> Path:
    "Two run folders, converted and split alike."
    from pillsnap.core.config import load_config
    from pillsnap.core.jobs import RunFolder
    from pillsnap.dataset.splits import smoke_splits

    tmp = tmp_path_factory.mktemp("resume_detector")
    for name in ("killed", "straight"):
        run = RunFolder(tmp / name, "splits")
        (tmp / name / "delivery").symlink_to(delivery)
        smoke_splits(run, load_config("smoke", ["data.detection.img_size=64"]))
    return tmp


@pytest.mark.spec("DT6", "X73")
def test_killed_in_the_second_epoch(prepared):
    import torch

    from pillsnap.core.checkpoints import load_ckpt
    from pillsnap.training.detector import DetectorJob

    run, straight = prepared / "killed", prepared / "straight"
    out = {n: prepared / f"{n}.txt" for n in ("killed", "resumed")}
    p = command(run, prepared / "home", out["killed"], DETECTOR_KILLED)
    assert p.wait(timeout=240) == -signal.SIGKILL, out["killed"].read_text()[-3000:]
    at = load_ckpt(run / "checkpoints" / "detector" / "last.pt")
    record = json.loads((run / "stages" / "detector.json").read_text())
    assert at["epoch"] == 1 and record["status"] == "running"

    again = command(run, prepared / "home", out["resumed"])
    undisturbed = DetectorJob(run_dir=str(straight), config="smoke", epochs=2, overrides=OVERRIDES).run()
    assert again.wait(timeout=240) == 0, out["resumed"].read_text()[-2000:]
    assert "resume: epoch 1 is done, 1 of 2 to go" in log_of(run)
    result = json.loads(out["resumed"].read_text().split("RESULT ")[-1])

    a, b = (load_ckpt(r / "checkpoints" / "detector" / "last.pt") for r in (run, straight))
    for part in ("model_state", "ema_state"):
        for k, v in b[part].items():
            torch.testing.assert_close(
                a[part][k], v, rtol=1e-5, atol=1e-6, msg=lambda m, part=part, k=k: f"{part} {k}: {m}"
            )

    def figures(c):
        return [{k: v for k, v in r["detection"].items() if "seconds" not in k} for r in c["history"]]

    assert figures(a) == figures(b) and len(a["history"]) == 2
    assert result["verdict"] == undisturbed.verdict
    # nobody was called, and nothing was left in the user's home
    assert result["tried"] == [] and not [h for h in result["home"] if "ltralytics" in h]
    assert all(x.name.startswith(".") for x in run.rglob("*.partial")), "a half-written file under a name that is read"
