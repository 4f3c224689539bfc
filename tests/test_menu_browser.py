"""The advisor's menu in a real browser: JupyterLab, headless Chromium, a click, and the choice in the run's record."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pillsnap.core.jobs import RunFolder
from pillsnap.core.records import Provenance
from pillsnap.evaluation.advisor import Check, Facts, evaluate_and_recommend, get_stage_target
from pillsnap.evaluation.menu import advice_path, read_advice, write_advice

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
QUICK = ["evaluation.latency_warmup=1", "evaluation.latency_runs=4", "train.num_threads=1"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a folder of its own, with settings of its own: its address and that folder."
    base, port = tmp_path_factory.mktemp("lab"), free_port()
    home, work = base / "home", base / "work"
    for d in (home / "config/labconfig", work):
        d.mkdir(parents=True)
    (home / "config/labconfig/page_config.json").write_text(
        json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PILLSNAP_", "JPY_"))} | {
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "PYTHONPATH": str(ROOT),
        "PILLSNAP_OFFLINE": "1",
        "YOLO_CONFIG_DIR": str(home),
    }
    cmd = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--allow-root",
        "--IdentityProvider.token=",
        "--ServerApp.password=",
        "--LabApp.expose_app_in_browser=True",
    ]
    with open(base / "lab.log", "w") as log:
        server = subprocess.Popen(cmd, cwd=work, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail((base / "lab.log").read_text()[-2000:])
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}", work
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(tmp_path):
    "A page in headless Chromium; what it showed is kept when a test fails."
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-background-networking",
                "--no-first-run",
            ],
        )
        page = browser.new_page(viewport=dict(width=1100, height=900), device_scale_factor=1.5)
        try:
            yield page
        except BaseException:
            page.screenshot(path=tmp_path / "failed.png")
            raise
        finally:
            browser.close()


def open_and_run(page, url: str, name: str) -> None:
    "Open a notebook, wait until its kernel is there, run all cells."
    page.goto(f"{url}/lab/tree/{name}?reset", wait_until="domcontentloaded", timeout=120_000)
    page.wait_for_function(
        (
            "window.jupyterapp && jupyterapp.shell && jupyterapp.shell.currentWidget && "
            "jupyterapp.shell.currentWidget.sessionContext"
        ),
        timeout=120_000,
    )
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.ready.then(() => 1)")
    page.wait_for_function(
        "['idle', 'busy'].includes(jupyterapp.shell.currentWidget.sessionContext.kernelDisplayStatus)", timeout=120_000
    )
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()


def click_and_wait(page, run: Path, option: dict) -> dict:
    "Click an option's button, and wait for it in the record."
    button = page.locator("button.jupyter-button", has_text=option["label"])
    button.wait_for(timeout=240_000)
    assert page.locator(".jp-OutputArea button.jupyter-button").count() == len(read_advice(run)["user_options"]) == 3
    assert read_advice(run)["user_choice"] is None
    button.click()
    end = time.monotonic() + 60
    while time.monotonic() < end and read_advice(run)["user_choice"] is None:
        time.sleep(0.2)
    page.get_by_text("Recorded:").wait_for(timeout=60_000)
    return read_advice(run)


def example_run(root: Path) -> Path:
    "Advice to look at: that of PILLSNAP_MENU_RUN if it is set, else a demo whose detector is a little short."
    if real := os.environ.get("PILLSNAP_MENU_RUN"):
        advice_path(root).parent.mkdir(parents=True)
        advice_path(root).write_text(
            json.dumps(
                json.loads(advice_path(real).read_text(encoding="utf-8")) | {"user_choice": None, "choice": None}
            ),
            encoding="utf-8",
        )
        return root
    prov = Provenance(data="synthetic", data_hash="a" * 64, class_map_hash="b" * 64)

    def rec(v, n):
        return prov.metric("m", v, n=n, seconds=20.0)

    checks = {c: Check(True, evidence="reports/evaluation.json") for c in get_stage_target(0).checks}
    facts = Facts(
        dict(accuracy=rec(0.941, 221), detection_map50=rec(0.862, 310), class_coverage=rec(1.0, 12)),
        checks,
        oom_events=1,
        settings={"train.detection.epochs": 10, "train.classification.batch_size": 32},
    )
    write_advice(
        root,
        evaluate_and_recommend(0, facts),
        {"status": "NO_GO", "label": "demo, synthetic", "reasons": ["MAP_BELOW_TARGET"]},
    )
    return root


@pytest.mark.spec("SG6", "BX15")
def test_a_click_in_jupyterlab_is_recorded(lab, page, tmp_path):
    url, work = lab
    run = example_run(work / "example")
    cells = [
        new_markdown_cell("# The advisor's menu\n\nA finished run, opened in JupyterLab."),
        new_code_cell("from pillsnap.evaluation.menu import advisor_menu"),
        new_code_cell("advisor_menu('example');"),
    ]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), work / "menu.ipynb")
    open_and_run(page, url, "menu.ipynb")
    advice = read_advice(run)
    got = click_and_wait(page, run, advice["user_options"][1])
    assert (got["user_choice"], got["choice"]["via"]) == (advice["user_options"][1]["id"], "widget")
    shown = page.locator(".jp-OutputArea-output").filter(has=page.locator("button.jupyter-button")).first
    text = shown.inner_text()
    assert (
        advice["recommendation"].replace("_", " ") in text
        and all(s["override"] in text for s in advice["suggestions"])
        and all(b["name"].replace("_", " ") in text for b in advice["bars"])
    )
    shot = Path(os.environ.get("PILLSNAP_SCREENSHOT") or tmp_path / "advisor_menu.png")
    shown.screenshot(path=shot)
    assert shot.stat().st_size > 10_000


@pytest.mark.spec("SG6", "BX15")
def test_the_evaluation_notebook_shows_a_finished_run_with_its_menu(lab, page, delivery):
    from pillsnap.evaluation.evaluation import EvaluationJob
    from pillsnap.evaluation.measurements import smoke_evaluation

    url, work = lab
    run = work / "finished"
    shutil.copytree(delivery, run / "delivery")
    job = EvaluationJob(run_dir=str(run), config="smoke", overrides=QUICK)
    smoke_evaluation(RunFolder(run, "evaluation"), job.cfg_in(run))
    job.run()
    assert read_advice(run)["user_choice"] is None
    nb = nbformat.read(ROOT / "nbs/evaluation/770_evaluation.ipynb", 4)
    (cell,) = [c for c in nb.cells if "parameters" in c.metadata.get("tags", [])]
    cell.source = (
        f"run_dir = {str(run)!r}\n"
        "config = 'smoke'\n"
        f"overrides = {QUICK!r}\n"
        "seed = 42\n"
        "user_choice = ''\n"
        "remeasure = False"
    )
    nb.cells = nb.cells[nb.cells.index(cell) :]  # the stage as a person would use it: parameters, job, menu
    nbformat.write(nb, work / "evaluation.ipynb")
    open_and_run(page, url, "evaluation.ipynb")
    option = read_advice(run)["user_options"][2]
    got = click_and_wait(page, run, option)
    assert (got["user_choice"], got["choice"]["via"], got["choice"]["label"]) == (
        option["id"],
        "widget",
        option["label"],
    )


@pytest.mark.spec("BX22", "BX15")
def test_a_decision_on_the_triage_page_is_in_the_overlay(lab, page, delivery, tmp_path):
    "The photo and its comparisons are on the page; a click relabels, one line is written, the next issue appears."
    from pillsnap.dataset.conversion import convert_delivery
    from pillsnap.dataset.overlay import Overlay
    from pillsnap.dataset.triage import triage_notebook

    url, work = lab
    convert_delivery(delivery, work / "triage")
    assert (
        triage_notebook(work / "triage", who="tester") == work / "triage/notebooks/triage.ipynb"
    )  # what `pillsnap triage` opens
    open_and_run(page, url, "triage/notebooks/triage.ipynb")
    shown = page.locator(".jp-OutputArea-output").filter(has=page.locator("button.jupyter-button")).first
    shown.get_by_text("1 of ").wait_for(timeout=240_000)
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-OutputArea-output img')].length >= 4 && "
        "[...document.querySelectorAll('.jp-OutputArea-output img')].every(i => i.complete && i.naturalWidth)"
    )
    shot = Path(os.environ.get("PILLSNAP_SCREENSHOT") or tmp_path / "triage.png")
    shown.screenshot(path=shot)
    assert shot.stat().st_size > 10_000
    name, _, suggested = shown.locator("input").input_value().rpartition(" ")
    assert name, "a person knows a drug by its name"
    shown.locator("button.jupyter-button", has_text="Relabel").click()
    page.get_by_text("Recorded:").wait_for(timeout=60_000)
    shown.get_by_text("2 of ").wait_for(timeout=60_000)
    (d,) = Overlay(work / "triage").lines()
    assert (
        (d.decision, d.to, d.who) == ("relabel", suggested, "tester")
        and d.kcode != suggested
        and d.path.endswith(".png")
    )
