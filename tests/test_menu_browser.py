"""What a person sees in a real browser, headless Chromium: the advisor's menu, the triage page, an answer's card."""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from PIL import Image
from terminal import search_path

from pillsnap.core.jobs import RunFolder
from pillsnap.core.records import Provenance
from pillsnap.evaluation.advisor import Check, Facts, evaluate_and_recommend, get_stage_target
from pillsnap.evaluation.menu import advice_path, read_advice, write_advice

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
KERNEL = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
QUICK = [
    "evaluation.latency_warmup=1",
    "evaluation.latency_runs=4",
    "evaluation.objects=0",
    "evaluation.condition_photos=0",
    "evaluation.hard_case_pictures=0",
    "train.num_threads=1",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def lab_environment(home: Path) -> dict[str, str]:
    "The environment of a JupyterLab whose settings, data and caches lie in a folder of its own."
    return {k: v for k, v in os.environ.items() if not k.startswith(("PILLSNAP_", "JPY_"))} | {
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "PYTHONPATH": search_path(ROOT),
        "PILLSNAP_OFFLINE": "1",
        "YOLO_CONFIG_DIR": str(home),
    }


def lab_command(port: int) -> list[str]:
    "The command line of a JupyterLab on this port, without a password."
    return [
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


def wait_for_lab(server: subprocess.Popen, port: int, log: Path) -> None:
    "Wait until JupyterLab answers; fail with its log if it ends."
    for _ in range(240):
        if server.poll() is not None:
            pytest.fail(log.read_text()[-2000:])
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=1)
            break
        except OSError:
            time.sleep(0.25)


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
    with open(base / "lab.log", "w") as log:
        server = subprocess.Popen(
            lab_command(port), cwd=work, env=lab_environment(home), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for_lab(server, port, base / "lab.log")
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
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
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


CARD_CELL = """from pathlib import Path
from pillsnap.core.container import FolderFiles
from pillsnap.core.files import read_json
from pillsnap.models.cardview import Answer
folder = Path("card")
meta = read_json(folder / "meta.json")
Answer(read_json(folder / "answer.json"), meta, folder / "photo.png", FolderFiles(folder))
"""
TEXTS = """card => [...card.querySelectorAll('th, td, .kind, .name, .role, figcaption, .notes, .pill > div')]
  .filter(e => e.innerText.trim() && e.offsetParent)
  .map(e => { let b = e; while (getComputedStyle(b).backgroundColor === 'rgba(0, 0, 0, 0)') b = b.parentElement;
              return [e.innerText, getComputedStyle(e).color, getComputedStyle(b).backgroundColor]; })"""


def write_card(folder: Path) -> dict:
    "An answer with a twin and a drug without a record, its photo and its reference pictures, one of them broken."
    from PIL import ImageDraw

    from pillsnap.core.files import save_json, sha256_file
    from pillsnap.delivery.classmap import ClassMap
    from pillsnap.models.pipeline import AnswerRule, Pipeline

    (folder / "thumbnails").mkdir(parents=True)
    photo = Image.new("RGB", (300, 360), (60, 90, 150))
    ImageDraw.Draw(photo).ellipse([90, 120, 210, 240], fill=(240, 235, 225))
    photo.save(folder / "photo.png")
    known = dict(dl_name="가나정 1밀리그램", dl_name_en="Gana Tab.", dl_company="한빛샘제약(주)", print_front="P")
    known |= dict(print_back="86", drug_shape="원형", color_class1="하양", leng_long=9, leng_short=9, thick=4.2)
    known |= dict(line_front="-", di_etc_otc_code="전문의약품", dl_material="글리메피리드", di_edi_code="642165000")
    twin = known | dict(dl_name="다라정 4밀리그램", print_front="Y", print_back="74")
    keys = ("K-000001", "K-000002", "K-000003")
    thumbnails = {}
    for k in keys[:2]:
        path = folder / "thumbnails" / f"{k}_front.jpg"
        photo.resize((96, 96)).save(path)
        thumbnails[k] = {"front": {"file": path.name, "sha256": sha256_file(path)}}
    (folder / "thumbnails" / "K-000002_front.jpg").write_bytes(b"broken")

    class Classifier:
        size = 48

        def logits(self, x):
            return np.tile(np.array([[2.0, 1.5, -1.0]], np.float32), (len(x), 1))

    classes = ClassMap(keys)
    rule = AnswerRule("lac", 0.05, (0.7,) * 3, class_map=classes.fingerprint)
    files = {k: {"front": f"thumbnails/{k}_front.jpg"} for k in keys[:2]}
    metadata = dict(zip(keys, (known, twin)))
    pipeline = Pipeline(Classifier(), classes, metadata=metadata, rule=rule, focus="locator", pictures=files)
    answer = pipeline.predict(folder / "photo.png")
    save_json(answer, folder / "answer.json")
    meta = dict(temperature=1.2, calibrated=True, data="synthetic", thumbnails=thumbnails)
    save_json(meta, folder / "meta.json")
    return answer


def contrast(ink: str, paper: str) -> float:
    "WCAG's contrast of two CSS colours, rgb(r, g, b)."

    def luminance(colour):
        c = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in c)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def check_card(card, answer: dict) -> None:
    "Every fact of every candidate is visible, and every text is readable on what lies behind it."
    from pillsnap.models.card import CARD
    from pillsnap.models.cardview import card_rows

    shown = card.evaluate(TEXTS)
    heads = [text for text, *_ in shown]
    assert {label for label, _ in CARD.values()} <= set(heads)
    cells = [text.lstrip("≠? ").strip() for text, *_ in shown]
    for candidate in answer["items"][0]["top_k"]:
        assert set(card_rows(candidate).values()) <= set(cells)
    worst = min((contrast(ink, paper), text) for text, ink, paper in shown)
    assert worst[0] >= 4.5, worst


@pytest.mark.spec("BX11")
def test_the_card_shows_every_field_in_jupyterlab_light_and_dark(lab, page, tmp_path):
    url, work = lab
    answer = write_card(work / "card")
    assert (answer["answer"], len(answer["items"][0]["shortlist"])) == ("shortlist", 2)
    nbformat.write(new_notebook(cells=[new_code_cell(CARD_CELL)], metadata=KERNEL), work / "card.ipynb")
    asked: list[str] = []
    page.set_viewport_size(dict(width=1250, height=1700))
    open_and_run(page, url, "card.ipynb")
    card = page.locator(".ps-card")
    card.wait_for(timeout=240_000)
    page.on("request", lambda r: asked.append(r.url))
    grounds = []
    for theme, light in (("JupyterLab Light", "true"), ("JupyterLab Dark", "false")):
        page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
        page.wait_for_function(f"document.body.dataset.jpThemeLight === '{light}'", timeout=60_000)
        check_card(card, answer)
        grounds.append(card.evaluate("e => getComputedStyle(e).backgroundColor"))
        rows = card.evaluate("e => [...e.querySelectorAll('tbody tr')].map(r => getComputedStyle(r).backgroundColor)")
        assert set(rows) == {grounds[-1]}, "stripes of the notebook's tables would hide what differs"
        shot = Path(os.environ.get("PILLSNAP_SCREENSHOTS") or tmp_path) / f"card_{light}.png"
        card.screenshot(path=shot)
        assert shot.stat().st_size > 10_000
    assert grounds == ["rgb(255, 255, 255)", "rgb(27, 29, 33)"]
    assert card.locator("td", has_text="사진을 읽을 수 없음").count() == 1
    assert card.locator("td", has_text="≠ Y").count() == 1
    assert not [a for a in asked if not a.startswith((url, "data:"))]


class FileChooser:
    "Gives photos to `pillsnap.identify` in a page, through the browser's own upload."

    def __init__(self, page, app):
        self.page, self.app, self.asked = page, app, []
        page.on("filechooser", lambda chooser: self.asked.append(chooser))

    def give(self, *photos: dict, at: str = "사진 고르기") -> None:
        self.asked.clear()
        self.app.locator("button", has_text=at).click()
        while not self.asked:
            self.page.wait_for_timeout(50)
        self.asked[0].set_files(list(photos))


def open_identify(page, url: str, work: Path):
    "Run `pillsnap.identify` in a notebook beside a two-sided bundle; its place in the page."
    from server_parts import two_sided_bundle

    two_sided_bundle(work / "named" / "export")
    cells = [new_code_cell("import pillsnap"), new_code_cell("app = pillsnap.identify('named', who='tester')")]
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), work / "identify.ipynb")
    open_and_run(page, url, "identify.ipynb")
    app = page.locator(".jp-OutputArea-output").filter(has=page.locator("button", has_text="사진 고르기")).first
    app.wait_for(timeout=120_000)
    return app


def check_two_sides(app, chooser: FileChooser, front: dict, back: dict, shot: Path) -> None:
    "Two photos of one pill are a card, which also says what each of them would be alone."
    app.locator("button", has_text="앞면과 뒷면").click()
    chooser.give(front, at="앞면 고르기")
    chooser.give(back, at="뒷면 고르기")
    app.get_by_text(back["name"]).wait_for(timeout=60_000)
    app.screenshot(path=shot)
    app.locator("button", has_text="두 면으로 찾기").click()
    app.locator(".ps-card").nth(2).wait_for(timeout=60_000)
    both = app.locator(".ps-card").nth(2).inner_text()
    assert "앞면 사진만 보면: 약 K-000001" in both and "뒷면 사진만 보면: 약 K-000001" in both


def check_remark(app, run: Path) -> None:
    "What a person says about the first card lies in the run folder."
    from pillsnap.dataset.feedback import read_remarks

    app.locator("button", has_text="틀림").first.click()
    app.get_by_placeholder("맞는 약").fill("약 K-000003 K-000003")
    app.locator("button", has_text="보내기").click()
    app.get_by_text("에 기록했습니다").wait_for(timeout=60_000)
    (remark,) = read_remarks(run / "feedback.jsonl")
    assert (remark.right, remark.drug, remark.mode, remark.who) == (False, "K-000003", "single", "tester")


@pytest.mark.spec("BX11", "BX16", "X40")
def test_identify_answers_in_jupyterlab(lab, page, tmp_path):
    "Photos through the browser's own upload, a card each, a remark in the run folder, a table beside the notebook."
    from server_parts import pill_photo

    url, work = lab
    app = open_identify(page, url, work)
    red = dict(name="red.png", mimeType="image/png", buffer=pill_photo("K-000001"))
    letter = dict(name="letter.png", mimeType="image/png", buffer=b"Dear pharmacist,")
    chooser = FileChooser(page, app)
    chooser.give(red, letter)
    app.locator(".ps-app", has_text="letter.png").wait_for(timeout=60_000)
    app.locator(".ps-card .pill", has_text="약 K-000001").first.wait_for()
    assert app.locator(".ps-card").count() == 1 and app.get_by_text("사진 2장 중 2장").count() == 1
    shot = Path(os.environ.get("PILLSNAP_SCREENSHOTS") or tmp_path) / "identify.png"
    app.screenshot(path=shot)
    app.locator("button", has_text="조합").click()
    chooser.give(red)
    app.locator(".ps-card").nth(1).wait_for(timeout=60_000)
    assert "모드 조합" in app.locator(".ps-card").nth(1).inner_text()
    back = dict(red, name="back.png", buffer=pill_photo("K-000001", (300, 260)))
    check_two_sides(app, chooser, red, back, shot.with_name("identify_sides.png"))
    check_remark(app, work / "named")
    app.locator("button", has_text="표로 저장").click()
    app.get_by_text("사진 4장").wait_for(timeout=60_000)
    (table,) = work.glob("answers_*.csv")
    assert (
        len(table.read_text(encoding="utf-8-sig").splitlines()) == 6
    )  # a head, a pill, a refusal, two pills of combo, a pair


FILES = """photos => {
    const held = new DataTransfer();
    for (const [name, type, content] of photos)
        held.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
    return held;
}"""
COPY = """content => navigator.clipboard.write([new ClipboardItem({
    "image/png": new Blob([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], { type: "image/png" }) })])"""


KEEP_CELL = """from pathlib import Path
from pillsnap.deployment.photodrop import PhotoDrop
def keep(photos):
    for name, content in photos:
        Path(f"{len(photos)}_{name}").write_bytes(content)
PhotoDrop(keep)"""


def arrived(page, work: Path, name: str) -> bytes:
    "Wait for a photo that the notebook wrote beside itself; its content."
    for _ in range(600):
        if (found := [*work.glob(name)]) and found[0].stat().st_size:
            page.wait_for_timeout(100)
            return found[0].read_bytes()
        page.wait_for_timeout(100)
    return pytest.fail(f"no {name} in {sorted(p.name for p in work.iterdir())}")


def drop(page, place, *photos: tuple[str, bytes]) -> None:
    "Drop photos, each a name and its content, on a place of the page."
    given = [[name, f"image/{name.partition('.')[2]}", base64.b64encode(content).decode()] for name, content in photos]
    place.dispatch_event("drop", {"dataTransfer": page.evaluate_handle(FILES, given)})


@pytest.mark.spec("BX11")
def test_photos_are_dropped_pasted_and_taken_in_jupyterlab(lab, page, tmp_path):
    "One drop of two, one too large for the connection and one just not, Ctrl+V, the camera; each reaches Python whole."
    from server_parts import pill_photo

    url, work = lab
    nbformat.write(new_notebook(cells=[new_code_cell(KEEP_CELL)], metadata=KERNEL), work / "drop.ipynb")
    open_and_run(page, url, "drop.ipynb")
    place, red = page.locator(".ps-drop"), pill_photo("K-000001")
    place.wait_for(timeout=120_000)
    shot = Path(os.environ.get("PILLSNAP_SCREENSHOTS") or tmp_path) / "photodrop.png"
    place.screenshot(path=shot)
    drop(page, place, ("front.png", red), ("large.png", bytes(10_000_000)), ("back.png", red))
    assert arrived(page, work, "2_front.png") == arrived(page, work, "2_back.png") == red
    assert "large.png: 10 MB" in place.inner_text()
    drop(page, place, ("full.bmp", bytes(9_500_000)))
    full = arrived(page, work, "1_full.bmp")
    assert len(full) == 9_500_000, "the largest photo that the place takes passes the connection"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(COPY, base64.b64encode(red).decode())
    place.focus()
    page.keyboard.press("Control+V")
    pasted = Image.open(io.BytesIO(arrived(page, work, "1_image.png")))
    assert np.array_equal(np.asarray(pasted.convert("RGB")), np.asarray(Image.open(io.BytesIO(red)).convert("RGB")))
    assert page.locator(".jp-Cell").count() == 1, "the notebook pasted no cell"
    place.get_by_role("button", name="카메라").click()
    page.wait_for_function("document.querySelector('.ps-drop video').videoWidth > 0")
    place.screenshot(path=shot.with_name("photodrop_camera.png"))
    place.get_by_role("button", name="찍기").click()
    taken = Image.open(io.BytesIO(arrived(page, work, "1_camera_*.jpg")))
    assert min(taken.size) >= 480 and not place.locator("video").is_visible()


@pytest.mark.spec("BX11")
def test_the_card_of_one_pill_prints_on_one_page(page, tmp_path):
    from pillsnap.core.container import FolderFiles
    from pillsnap.core.files import read_json
    from pillsnap.models.cardview import Answer

    answer, folder = write_card(tmp_path / "card"), tmp_path / "card"
    shown = Answer(answer, read_json(folder / "meta.json"), folder / "photo.png", FolderFiles(folder))
    page.set_content(f"<!doctype html><meta charset=utf-8><body>{shown._repr_html_()}")
    for scheme, ground in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(27, 29, 33)")):
        page.emulate_media(color_scheme=scheme)
        card = page.locator(".ps-card")
        assert card.evaluate("e => getComputedStyle(e).backgroundColor") == ground
        check_card(card, answer)
    page.emulate_media(color_scheme="dark", media="print")
    assert page.locator(".ps-card").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    printed = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page[^s]", printed)) == 1
