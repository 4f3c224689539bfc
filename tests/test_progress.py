"""Progress: one live line on a terminal, one output in a notebook, a line every 30 s in a log."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from terminal import on_a_terminal, screen, search_path

ROOT = Path(__file__).resolve().parents[1]
LOOP = """
import time
from pillsnap.core.logs import build_logger, progress
log = build_logger(name="bar")
for i in progress(range(132), desc="rendering", unit="photos"):
    time.sleep(.02)
    if i % 40 == 39: log.info(f"line {i}")
"""


def plain(**more: str) -> dict[str, str]:
    "The environment without what the test run itself may have set."
    return {k: v for k, v in os.environ.items() if not k.startswith("PILLSNAP_NOTEBOOK")} | more


@pytest.mark.spec("CF4")
def test_on_a_terminal_a_loop_is_one_line_and_log_lines_stand_above_it():
    rc, written = on_a_terminal([sys.executable, "-c", LOOP], cwd=ROOT, env=plain())
    assert rc == 0, written
    left = [line for line in screen(written) if line]
    assert left[:3] == ["line 39", "line 79", "line 119"], left
    assert len(left) == 4 and re.fullmatch(r"✓ rendering: 132 photos in \d\.\d s", left[3]), left
    frames = written.count("132 photos · ")
    assert 5 <= frames <= 40, f"{frames} frames in 2.6 s"


@pytest.mark.spec("CF4")
def test_in_a_log_seconds_of_work_are_silent():
    r = subprocess.run([sys.executable, "-c", LOOP], cwd=ROOT, env=plain(), capture_output=True, text=True)
    assert r.stderr.splitlines() == ["line 39", "line 79", "line 119"] and not r.stdout


@pytest.mark.spec("CF4")
def test_an_executed_notebook_keeps_the_last_frame_alone():
    nb = new_notebook(
        cells=[new_code_cell(LOOP)],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    )
    NotebookClient(nb, resources={"metadata": {"path": str(ROOT)}}).execute()
    frames = [o["data"]["text/plain"] for o in nb.cells[0].outputs if o["output_type"] == "display_data"]
    assert len(frames) == 1 and frames[0].startswith("✓ rendering: 132 photos in "), frames
    said = "".join(o["text"] for o in nb.cells[0].outputs if o["output_type"] == "stream")
    assert said == "line 39\nline 79\nline 119\n"


@pytest.mark.spec("CF4")
def test_work_that_fails_says_how_far_it_came():
    rc, written = on_a_terminal(
        [sys.executable, "-c", LOOP.replace("if i % 40", "if i == 60: raise SystemExit(3)\n    if i % 40")],
        cwd=ROOT,
        env=plain(),
    )
    assert rc == 3 and [line for line in screen(written) if line][-1] == "rendering stopped at 60 photos"


def test_every_bar_is_made_by_progress():
    for file in (ROOT / "pillsnap").rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import) (tqdm|fastprogress)\b|rich\.progress", file.read_text(encoding="utf-8"), re.M
        ), file


@pytest.mark.spec("CF4", "BX15")
def test_a_job_on_a_terminal_and_its_executed_notebook(tmp_path):
    "The job renders and opens photos for seconds: a line each on the terminal, a display each in the notebook."
    command = [
        sys.executable,
        "-m",
        "pillsnap",
        "run",
        "conversion",
        "--config",
        "smoke",
        "--run-dir",
        "run",
        "synth.photos=10",
        "synth.width=390",
        "synth.height=512",
    ]
    rc, written = on_a_terminal(command, cwd=tmp_path, env=plain(PYTHONPATH=search_path(ROOT)))
    assert rc == 0, written
    left = [line for line in screen(written) if line]
    assert len(re.findall(r"rendering .*?/\d+ photos · ", written)) > 5, "no live line was seen"
    assert left[0].startswith("[1/1] conversion: runs, because") and re.match(
        r"\[1/1\] conversion: 72 photos of 6 drugs", left[-1]
    ), left
    assert len([line for line in left if "rendering" in line]) == 1 and len(left) <= 14, left
    assert not [line for line in left if "%|" in line], "somebody else's bar"
    nb = nbformat.read(tmp_path / "run" / "notebooks" / "408_conversion.ipynb", 4)
    outputs = [o for c in nb.cells for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "stream" and "\r" in o.text]
    frames = [
        o.data["text/plain"]
        for o in outputs
        if o.output_type == "display_data" and re.search("rendering|opening", o.data["text/plain"])
    ]
    assert len([f for f in frames if re.match(r"✓ rendering: \d+ photos in ", f)]) == 1 and len(frames) <= 2, frames


@pytest.mark.spec("CF5")
@pytest.mark.parametrize(
    "arguments",
    [
        ["splits"],
        ["evaluation"],
        ["audit"],
        ["all", "--from", "export"],
        ["conversion", "--config", "two_stage", "paths.root=no/such/delivery"],
        ["all", "--config", "two_stage", "data.task=segmentation", "paths.root=no/such/masks"],
    ],
)
def test_a_job_without_its_inputs_leaves_no_folder(arguments, tmp_path, monkeypatch, capsys):
    from pillsnap.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["run", *arguments, "--run-dir", "nowhere"])
    said = capsys.readouterr()
    assert e.value.code == 2 and said.out == "" and len(re.findall("to do:", said.err)) == 1, said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.spec("CF5", "BX15")
def test_what_stopped_a_notebook_is_said_once(tmp_path, monkeypatch, capsys):
    from pillsnap.cli import main
    from pillsnap.core.logs import EVERY

    monkeypatch.setitem(EVERY, "log", 3600.0)  # on a slow machine no line of progress is due
    (tmp_path / "delivery" / "data" / "train" / "labels").mkdir(parents=True)
    (tmp_path / "delivery" / "data" / "train" / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        main(["run", "conversion", "--config", "two_stage", "--run-dir", "run", "paths.root=delivery"])
    said = capsys.readouterr().err
    assert e.value.code == 2
    assert (
        said.startswith("pillsnap: job conversion stopped: ")
        and said.count("where:") == said.count("to do:") == said.count("notebook:") == said.count("go on with:") == 1
    ), said
    assert (
        said.splitlines()[-1]
        .strip()
        .startswith("then go on with: pillsnap run all --config two_stage --run-dir run --from conversion")
    )
