"Run folders for tests that change what is in them, and jobs that a signal ends at a fixed place."

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

# Code to put before that of a job in a session of its own: kill -9 at the first line of the detector's second epoch,
# when the first one is in last.pt.
DETECTOR_KILLED = (
    "import os; from pillsnap.training import detectortrainer as module; real = module.step_line\n"
    f"module.step_line = lambda e, *a, **k: e == 2 and os.killpg(0, {int(signal.SIGKILL)}) or real(e, *a, **k)\n"
)


def stopped_classifier(
    root: Path,  # a split run
    overrides: Sequence[str],  # of the smoke preset
    epochs: int,
    at: tuple[int, int],  # epoch and batch, from 0
    sig: signal.Signals,  # sent after that batch
) -> tuple[int, str]:  # exit status, errors
    "Train a classifier in a process of its own until a signal ends it."
    code = (
        "import os; from pillsnap.training.monitoring import StepLog; one = StepLog.after_batch; StepLog.after_batch = "
        f"lambda self: ((self.epoch, self.iter) == {at} and os.kill(os.getpid(), {int(sig)}), one(self))[1]\n"
        "from pillsnap.training.classifier import ClassifierJob\n"
        f"ClassifierJob(run_dir={str(root)!r}, config='smoke', overrides={tuple(overrides)!r}, epochs={epochs}).run()"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    p = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, timeout=150
    )
    return p.returncode, p.stderr.decode()


def copy_run(
    root: Path,  # a run folder
    to: Path,  # where the copy goes
    *left_out: str,  # patterns of names that are not copied
) -> Path:
    "A copy of a run folder that finds its delivery from anywhere."
    shutil.copytree(root, to, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    head = json.loads((root / "manifest.json").read_text())
    (to / "manifest.json").write_text(json.dumps(head | {"root": str((root.resolve() / head["root"]).resolve())}))
    return to


def linked_run(
    root: Path,  # a run folder
    to: Path,  # where the copy goes
) -> Path:
    "A copy of a run folder to spoil; its photos stay where they are."
    shutil.copytree(root, to, ignore=shutil.ignore_patterns("delivery", "yolo_data", "logs"))
    (to / "delivery").symlink_to(root / "delivery")
    return to
