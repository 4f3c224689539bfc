"""Two trainings in turn: the stage's place in the pipeline, and kill -9 with both sides ending where their solo
runs end."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import DETECTOR_KILLED

needs_ultralytics = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed"
)
OVER = [
    "data.detection.img_size=64",
    "data.classification.img_size=64",
    "train.num_threads=1",
    "train.classification.drop_rate=0.2",
    "train.interleave_ratio=[1,2]",
    "train.classification.epochs=2",
    "train.detection.epochs=2",
]
BOTH = (
    "import sys; from pillsnap.training.interleaved import InterleavedJob as J; "
    "J(run_dir=sys.argv[1], config='smoke', detector_epochs=2, classifier_epochs=2, "
    "overrides=tuple(sys.argv[2:])).run()"
)


@pytest.mark.spec("X75")
def test_one_key_puts_one_job_in_the_place_of_two(tmp_path, monkeypatch, capsys):
    from pillsnap.cli import PIPELINE
    from pillsnap.core import runner

    ran = []
    monkeypatch.setattr(runner, "run_job", lambda s, *a: ran.append(s.name) or dict(verdict="done", seconds=0.0))
    for way in ("sequential", "interleaved"):
        runner.run_pipeline(PIPELINE, "smoke", [f"train.strategy={way}"], tmp_path / way)
    assert ran == [
        "conversion",
        "splits",
        "classifier",
        "detector",
        "evaluation",
        "export",
        "conversion",
        "splits",
        "interleaved",
        "evaluation",
        "export",
    ]
    assert "interleaved: left out, because train.strategy is sequential" in capsys.readouterr().out


def start(code: str, run: Path, out: Path) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(out.parent / "mpl")}
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run), *OVER],
        env=env,
        stdout=open(out, "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def log_of(run: Path, side: str) -> str:
    f = run / "logs" / f"pillsnap.{side}.log"
    return f.read_text(encoding="utf-8") if f.exists() else ""


@pytest.mark.spec("IT1")
@pytest.mark.parametrize("ratio, want", [([1, 1], "dcdcdcdcdcdc"), ([2, 1], "ddcddcddcccc"), ([1, 3], "dcccdcccdddd")])
def test_steps_come_in_the_configured_ratio(tmp_path, monkeypatch, ratio, want):
    "Two sides of six steps each that only write down their turns; where one has ended the other continues."
    from pillsnap.core.config import load_config
    from pillsnap.core.jobs import JobResult, RunFolder
    from pillsnap.training.interleaved import InterleavedJob

    steps = []

    def side(self, me, baton, run, cfg):
        def work():
            baton.begin(me, 0)
            for _ in range(6):
                steps.append(me[0])
                baton.step_done(me)
            return JobResult("done", [], [], [], [], [])

        return work

    monkeypatch.setattr(InterleavedJob, "_side", side)
    res = InterleavedJob(run_dir=str(tmp_path)).work(
        RunFolder(tmp_path, "interleaved"), load_config("smoke", [f"train.interleave_ratio={ratio}"])
    )
    assert "".join(steps) == want and f"Ratio {ratio[0]}:{ratio[1]}" in res.verdict
    assert json.loads((tmp_path / "reports" / "interleaved.json").read_text())["ratio"] == ratio


def kill_in_the_second_epoch(run: Path, out: Path) -> dict[str, str]:
    "Train in turn and send SIGKILL in the detector's second epoch; the status that each job's record then has."
    assert start(DETECTOR_KILLED + BOTH, run, out).wait(timeout=300) == -signal.SIGKILL, out.read_text()[-3000:]
    return {
        s: json.loads((run / "stages" / f"{s}.json").read_text())["status"]
        for s in ("interleaved", "detector", "classifier")
    }


def check_same_ends(both: Path, solo: Path) -> None:
    "Both trainings end at the weights of the runs that trained one after the other."
    import torch

    from pillsnap.core.checkpoints import load_ckpt

    for side, parts in (("detector", ("model_state", "ema_state")), ("classifier", ("model_state", "ema_state"))):
        a, b = (load_ckpt(r / "checkpoints" / side / "last.pt") for r in (both, solo))
        for part in parts:
            for k, v in b[part].items():
                torch.testing.assert_close(
                    a[part][k], v, rtol=1e-5, atol=1e-6, msg=lambda m, name=f"{side} {part} {k}": f"{name}: {m}"
                )
        assert len(a["history"]) == len(b["history"]) == 2


@needs_ultralytics
@pytest.mark.spec("IT3", "BX10")
def test_killed_in_turn_both_sides_end_where_their_solo_runs_end(tmp_path, delivery):
    from pillsnap.core.config import load_config
    from pillsnap.core.jobs import RunFolder
    from pillsnap.dataset.splits import smoke_splits
    from pillsnap.training.classifier import ClassifierJob
    from pillsnap.training.detector import DetectorJob

    both, solo = tmp_path / "both", tmp_path / "solo"
    for root in (both, solo):
        run = RunFolder(root, "splits")
        (root / "delivery").symlink_to(delivery)
        smoke_splits(run, load_config("smoke", OVER))
    records = kill_in_the_second_epoch(both, tmp_path / "killed.txt")
    assert records["interleaved"] == records["detector"] == "running"
    again = start(BOTH, both, tmp_path / "again.txt")
    for one in (ClassifierJob, DetectorJob):
        one(run_dir=str(solo), config="smoke", epochs=2, overrides=tuple(OVER)).run()
    assert again.wait(timeout=400) == 0, (tmp_path / "again.txt").read_text()[-2500:]
    check_same_ends(both, solo)
    assert "resume: epoch 1 is done" in log_of(both, "detector")
    report = json.loads((both / "reports" / "interleaved.json").read_text())
    sides = report["sides"]
    assert report["ratio"] == [1, 2]
    assert [s["side"] for s in sides] in (["detector", "classifier"], ["detector"]) or sides[-1]["steps"] is None
