"""The whole path, once, through papermill with the smoke preset: every part is real, its figures mean nothing."""

import json
import re
import subprocess
import sys

import nbformat
import pytest
from terminal import typed

from pillsnap.cli import PIPELINE
from pillsnap.core.jobs import read_record, run_id


@pytest.mark.spec("BX15")
def test_every_job_notebook_ran_and_holds_the_runs_id(smoke_run):
    for s in [s for s in PIPELINE if s.strategy in ("", "sequential")]:
        text = (smoke_run / "notebooks" / s.path.name).read_text(encoding="utf-8")
        assert run_id(smoke_run) in text, s.name
        rec = read_record(smoke_run, s.name)
        assert (
            rec["status"] == "finished" and rec["in_sync"] == "true" and re.fullmatch(r"[0-9a-f]{64}", rec["notebook"])
        )
        assert rec["inputs"] and rec["outputs"] and all(rec["outputs"].values()), s.name


def test_a_job_runs_no_demo(smoke_run):
    "Of the detector's notebook, a job runs neither the demo that trains nor the one that shows the plan."
    cells = [c for c in nbformat.read(smoke_run / "notebooks" / "650_detector.ipynb", 4).cells if c.cell_type == "code"]
    demos = [c for c in cells if "skip-execution" in c.metadata.get("tags", [])]
    assert any("train_detection_stage(" in c.source for c in demos)
    assert {c.execution_count for c in demos} == {None} and cells[-1].execution_count == len(cells) - len(demos)


@pytest.mark.spec("BX15")
def test_the_executed_notebook_holds_the_scorecards_figures(smoke_run):
    card = json.loads((smoke_run / "reports" / "scorecard.json").read_text(encoding="utf-8"))
    text = (smoke_run / "notebooks" / "770_evaluation.ipynb").read_text(encoding="utf-8")
    found = re.findall(r'"value": (0\.\d+)', json.dumps(card))
    assert found and any(f"{float(v):.3f}".rstrip("0") in text or f"{float(v):.4g}" in text for v in found)
    assert "synthetic" in json.dumps(card)


@pytest.mark.spec("SG2")
def test_the_advisor_hears_of_the_export(smoke_run):
    """Evaluation runs before export, so the check onnx_conversion_success is met only if the advice is given again
    afterwards."""
    reports = smoke_run / "reports"
    assert (reports / "advisor.json").stat().st_mtime_ns > (reports / "export.json").stat().st_mtime_ns


@pytest.mark.spec("BX15")
def test_a_second_run_has_nothing_to_do_and_imports_no_torch(smoke_run):
    code = (
        "import sys; from pillsnap.cli import PIPELINE, run_pipeline; "
        "run_pipeline(PIPELINE, 'smoke', run_dir=sys.argv[1]); print('torch' in sys.modules)"
    )
    r = subprocess.run([sys.executable, "-c", code, str(smoke_run)], capture_output=True, text=True, timeout=120)
    assert r.returncode == 0, r.stderr
    assert r.stdout.count("up to date") == 6 and r.stdout.strip().endswith("False")


@pytest.mark.spec("SV4", "BX15")
@pytest.mark.parametrize("mode", ["single", "combo"])
def test_predict_answers_in_the_mode_that_was_asked(smoke_run, mode):
    photo = next((smoke_run / "delivery" / "data" / "train" / "images" / "combination").rglob("K-*.png"))
    r = typed("predict", photo, "--mode", mode, "--run", smoke_run, "--json")
    assert r.returncode == 0, r.stderr
    answer = json.loads(r.stdout)
    assert answer["mode_used"] == answer["mode_requested"] == mode


@pytest.mark.spec("CF5")
@pytest.mark.parametrize("kind", ["missing", "text", "pixel", "mode", "nobundle"])
def test_a_photo_or_a_run_that_cannot_answer_is_said_in_plain_words(smoke_run, tmp_path, kind):
    from PIL import Image

    photo, run, mode = tmp_path / "photo.png", smoke_run, "single"
    if kind == "text":
        photo.write_text("no photo")
    elif kind != "missing":
        Image.new("RGB", (1, 1) if kind == "pixel" else (64, 64)).save(photo)
    if kind == "mode":
        mode = "auto"
    if kind == "nobundle":
        run = tmp_path
    r = typed("predict", photo, "--mode", mode, "--run", run, "--json")
    assert "Traceback" not in r.stderr
    assert r.returncode == 2 and "pillsnap: " in r.stderr or kind == "pixel" and r.returncode == 0


def test_the_final_test_stays_sealed(smoke_run):
    r = typed("final-test", "--run-dir", smoke_run, "--reason", "curiosity")
    assert r.returncode == 2 and "Traceback" not in r.stderr and "stage 4" in r.stderr.lower()
    assert not (smoke_run / "reports" / "final_test_results.json").exists()


@pytest.mark.spec("CF5")
@pytest.mark.parametrize("kind", ["missing root", "empty delivery", "every photo broken"])
def test_a_delivery_that_cannot_be_used_stops_the_first_job(delivery, tmp_path, kind):
    import shutil

    root, run = tmp_path / "aihub", tmp_path / "run"
    if kind == "empty delivery":
        (root / "data" / "train").mkdir(parents=True)
    if kind == "every photo broken":
        shutil.copytree(delivery, root)
        for p in (root / "data" / "train").rglob("*.png"):
            p.write_text("not a photo")
    r = typed("run", "conversion", "--config", "smoke", "--run-dir", run, f"paths.root={root}", "data.source=aihub")
    assert r.returncode == 2 and "Traceback" not in r.stderr, r.stderr[-2000:]
    assert not (run / "manifest.csv").exists(), "nothing half-written"
    if kind == "every photo broken":
        assert (run / "notebooks" / "408_conversion.ipynb").exists() and "--from conversion" in r.stderr
    else:
        assert not run.exists() and "to do:" in r.stderr and str(root) in r.stderr, (
            "nothing is made where there is nothing to read"
        )


@pytest.mark.spec("CF5")
def test_an_unwritable_run_folder_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    r = typed("run", "all", "--config", "smoke", "--run-dir", tmp_path / "file" / "run")
    assert r.returncode == 2 and "Traceback" not in r.stderr


def test_two_runs_do_not_share_a_folder(tmp_path):
    from pillsnap.core.files import FolderLock

    with FolderLock(tmp_path / "run" / "stages"):
        words = ["run", "conversion", "--config", "smoke", "--run-dir", tmp_path / "run"]
        r = subprocess.run([sys.executable, "-m", "pillsnap", *words], capture_output=True, text=True)
    assert r.returncode == 2 and "Traceback" not in r.stderr


@pytest.mark.spec("CF8")
def test_the_sources_command_runs_the_same_pipeline(smoke_run):
    r = typed("--cfg", "smoke", f"paths.exp_dir={smoke_run}")
    assert r.returncode == 0 and r.stdout.count("up to date") == 6, r.stdout + r.stderr


@pytest.mark.parametrize(
    "command", ["run", "synth", "audit", "predict", "evaluate", "decide", "declare", "final-test", "choose", "config"]
)
def test_help_helps(command):
    r = typed(command, "--help")
    assert r.returncode == 0 and "Usage" in r.stdout and len(r.stdout) > 300
