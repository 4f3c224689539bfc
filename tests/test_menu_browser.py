"""The advisor's menu in a real browser: JupyterLab, headless Chromium, a click, and the choice in the run's record."""
import json, os, shutil, socket, subprocess, sys, time, urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pillsnap.core.record import Provenance
from pillsnap.evaluation.advisor import Check, Facts, evaluate_and_recommend, get_stage_target
from pillsnap.evaluation.menu import read_advice, write_advice

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")


def finished_run(root: Path) -> Path:
    "A run folder that has advice: a demo whose detector is a little short."
    prov = Provenance(data="synthetic", data_hash="a" * 64, class_map_hash="b" * 64)
    rec = lambda v, n: prov.metric("m", v, n=n, seconds=20.)
    checks = {c: Check(True, evidence="reports/evaluation.json") for c in get_stage_target(0).checks}
    facts = Facts(dict(accuracy=rec(.941, 221), detection_map50=rec(.862, 310), class_coverage=rec(1., 12)), checks, oom_events=1,
                  settings={"train.detection.epochs": 10, "train.classification.batch_size": 32})
    write_advice(root, evaluate_and_recommend(0, facts), {"status": "NO_GO", "label": "demo, synthetic", "reasons": ["MAP_BELOW_TARGET"]})
    return root


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a folder of its own, with settings of its own."
    port, home = free_port(), tmp_path / "home"
    for d in ("home/config/labconfig", "work"): (tmp_path / d).mkdir(parents=True)
    (home / "config/labconfig/page_config.json").write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    env = {**{k: v for k, v in os.environ.items() if not k.startswith("PILLSNAP_")}, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"),
           "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    log = open(tmp_path / "lab.log", "w")
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--allow-root",
           "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.expose_app_in_browser=True"]
    server = subprocess.Popen(cmd, cwd=tmp_path / "work", env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            if server.poll() is not None: pytest.fail((tmp_path / "lab.log").read_text()[-2000:])
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1); break
            except OSError: time.sleep(.25)
        yield f"http://127.0.0.1:{port}", tmp_path / "work"
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def open_notebook(page, url: str, name: str) -> None:
    "Open a notebook and wait until its kernel is there."
    page.goto(f"{url}/lab/tree/{name}?reset", wait_until="domcontentloaded", timeout=90_000)
    page.wait_for_function("window.jupyterapp && jupyterapp.shell && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.sessionContext", timeout=90_000)
    page.evaluate("jupyterapp.shell.currentWidget.sessionContext.ready.then(() => 1)")
    page.wait_for_function("['idle', 'busy'].includes(jupyterapp.shell.currentWidget.sessionContext.kernelDisplayStatus)", timeout=90_000)


def run_all(page) -> None:
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel", has_text="Run All Cells").first.click()


def poll(condition, seconds: float):
    "What a condition gives, once it gives something."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if got := condition(): return got
        time.sleep(.2)
    pytest.fail("nothing came in time")


@pytest.mark.spec("SG6", "BX15")
def test_a_click_in_jupyterlab_is_recorded(lab, tmp_path):
    url, work = lab
    run = finished_run(work / "run")
    cells = [new_markdown_cell("# The advisor's menu\n\nA finished run, opened in JupyterLab."), new_code_cell("from pillsnap.evaluation.menu import advisor_menu"), new_code_cell("advisor_menu('run');")]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), work / "menu.ipynb")
    assert read_advice(run)["user_choice"] is None
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run"])
        page = browser.new_page(viewport=dict(width=1100, height=900), device_scale_factor=1.5)
        try:
            open_notebook(page, url, "menu.ipynb")
            run_all(page)
            button = page.locator("button.jupyter-button", has_text="Apply the advice and retry")
            button.wait_for(timeout=90_000)
            assert page.locator(".jp-OutputArea button.jupyter-button").count() == 3
            button.click()
            got = poll(lambda: (r := read_advice(run))["user_choice"] and r, 30)
            assert (got["user_choice"], got["choice"]["via"]) == ("apply_and_retry", "widget")
            page.get_by_text("Recorded:").wait_for(timeout=30_000)
            shown = page.locator(".jp-OutputArea-output").filter(has=page.locator("button.jupyter-button")).first
            assert "RECOMMEND PROCEED" in shown.inner_text() and "train.classification.batch_size=16" in shown.inner_text()
            shot = Path(os.environ.get("PILLSNAP_SCREENSHOT") or tmp_path / "advisor_menu.png")
            shown.screenshot(path=shot)
            assert shot.stat().st_size > 10_000
        except Exception:
            page.screenshot(path=tmp_path / "failed.png")
            raise
        finally: browser.close()
