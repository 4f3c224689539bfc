"The server's page in headless Chromium, at the size of a desk and of a phone."

import csv
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from pillsnap.core.files import sha256_file
from pillsnap.dataset.feedback import read_remarks
from pillsnap.delivery.classmap import ClassMap
from pillsnap.deployment.admission import REFUSALS, KeyRing
from pillsnap.deployment.batch import COLUMNS, answer_rows
from pillsnap.deployment.runtime import load_bundle
from pillsnap.models import card as cards
from pillsnap.models import cardview
from pillsnap.models.decision import REASONS, AnswerRule
from pillsnap.models.twoside import PairRule

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
from server_parts import KEY, PILLS, Server, colour_bundle, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")

HOSTILE = '<img src=x onerror="window.hacked=1"> 가나정'
DESK, PHONE = dict(width=1280, height=900), dict(width=390, height=844)
FREE = ("--limit", "per_minute=1000000", "--limit", "wait_seconds=60")
LETTER = dict(name="=letter.png", mimeType="image/png", buffer=b"Dear pharmacist,")


def colour_photo(name: str, colour: tuple[int, int, int]) -> dict:
    "A disc on grey, as a file to upload."
    image = Image.new("RGB", (420, 360), (150, 150, 150))
    ImageDraw.Draw(image).ellipse([90, 60, 330, 300], fill=colour)
    out = io.BytesIO()
    image.save(out, "PNG")
    return dict(name=name, mimeType="image/png", buffer=out.getvalue())


RED = colour_photo("빨강.png", PILLS["K-000001"])
PURPLE = colour_photo("purple.png", (160, 50, 140))
GREY = colour_photo("grey.png", (130, 95, 110))
BACK = colour_photo("back.png", (199, 64, 63))  # of the red pill
BLUE = colour_photo("blue.png", PILLS["K-000003"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    "Answers of each kind: red is one drug, purple a short list, grey no answer. One drug's name is an attack."
    record = dict(drug_shape="원형", color_class1="하양", leng_long=9.0, leng_short=9.0, thick=3.5, dl_company="한빛샘")
    drugs = {
        "K-000001": record | dict(dl_name=HOSTILE, print_front="HB", di_edi_code="642500340,A01508511", line_front="-"),
        "K-000002": record | dict(dl_name="다라정 4밀리그램", print_front="<b>YT</b>", line_front="-"),
        "K-000003": record | dict(dl_name="마바정 2밀리그램", print_front="HB", color_class1="파랑"),
    }
    classes = ClassMap(tuple(PILLS))
    rule = AnswerRule("lac", 0.05, (0.8,) * 3, max_list=2, temperature=0.5, class_map=classes.fingerprint)
    place = tmp_path_factory.mktemp("page") / "export"
    front = place / "thumbnails" / "K-000001_front.jpg"
    front.parent.mkdir(parents=True)
    Image.new("RGB", (96, 96), PILLS["K-000001"]).save(front)
    pictures = {"K-000001": {"front": dict(file=front.name, sha256=sha256_file(front))}}
    pairs = PairRule(0.5, class_map=classes.fingerprint)
    how = dict(
        drugs=drugs,
        rule=rule,
        pair_rule=pairs,
        temperature=0.5,
        calibrated=True,
        answering=dict(focus="locator"),
        thumbnails=pictures,
    )
    return colour_bundle(place, **how)


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, bundle, *FREE, "--feedback", str(folder / "feedback.jsonl")) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--no-first-run"]
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*camera, *quiet])
        yield browser
        browser.close()


class Visit:
    "The page in a tab of its own, with what it asked the network and what it complained about."

    def __init__(self, browser, server, size=None, locale="ko-KR", key: str | None = KEY, **how):
        self.url, self.asked, self.wrong = f"http://127.0.0.1:{server.port}", [], []
        self.context = browser.new_context(viewport=size or DESK, locale=locale, **how)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("console", lambda m: self.wrong.append(m.text) if "Content Security Policy" in m.text else None)
        if key:
            self.page.add_init_script(f"sessionStorage.setItem('pillsnap-key', '{key}')")
        self.page.goto(self.url)

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_):
        if kind:
            picture(self.page, "failed")
        self.context.close()
        if not kind:
            assert self.wrong == [], self.wrong
            assert not [url for url in self.asked if not url.startswith((self.url, "blob:", "data:"))]


def give(page, *photos: dict) -> None:
    "Choose photos, and wait for all answers."
    before = page.locator(".card").count()
    page.set_input_files("#files", list(photos))
    assert until(lambda: page.locator(".card").count() == before + len(photos), 60)
    assert until(lambda: page.locator("[aria-busy=true]").count() == 0 and page.locator("#stop").is_hidden(), 60)


def test_after_a_reload_the_page_says_what_is_true_of_the_bundle_that_answers(browser, tmp_path):
    "The card that was there keeps what was true of it."
    real = colour_bundle(tmp_path / "real" / "export", data="aihub", calibrated=True)
    drawn = colour_bundle(tmp_path / "drawn" / "export", data="synthetic", calibrated=False)
    current = tmp_path / "current"
    current.symlink_to(real.parent)
    with Server(tmp_path / "server", current, *FREE) as running, Visit(browser, running) as page:
        give(page, RED)
        assert page.locator("#data-note").is_hidden() and "보정된 확률" in card(page, RED["name"]).inner_text()
        current.unlink()
        current.symlink_to(drawn.parent)
        assert running.ask("/reload", method="POST")[0] == 200
        give(page, BLUE)
        page.locator("#data-note", has_text="⚠").wait_for()
        assert "보정되지 않은" in card(page, BLUE["name"]).inner_text()
        assert "보정된 확률" in card(page, RED["name"]).inner_text()


def card(page, name: str):
    return page.locator(".card").filter(has=page.locator("h3", has_text=name))


def picture(page, name: str) -> None:
    "A screenshot for people, where PILLSNAP_SCREENSHOTS names a folder."
    if folder := os.environ.get("PILLSNAP_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def check_accessible(page) -> None:
    "axe-core finds nothing, with its rules of best practice; nothing is wider than the screen."
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    beyond = (
        "[...document.querySelectorAll('body *')].filter(e => e.getClientRects().length && !e.closest('.off-screen')"
    )
    beyond += " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 90))"
    assert page.evaluate(beyond) == []


@pytest.mark.spec("BX11", "SV1")
@pytest.mark.parametrize("size, locale, colours", [(DESK, "ko-KR", "light"), (PHONE, "en-GB", "dark")])
def test_each_kind_of_answer_is_a_card(browser, server, bundle, size, locale, colours):
    "Asked for its key once; text of an answer is text; nothing from elsewhere; axe-core is content."
    korean = locale == "ko-KR"
    with Visit(browser, server, size, locale, key=None, color_scheme=colours) as page:
        page.locator("#key").wait_for()
        check_accessible(page)
        page.fill("#key", "wrong" * 9)
        page.keyboard.press("Enter")
        page.locator("#key-why", has_text="이 키를 서버가 모릅니다" if korean else "does not know this key").wait_for()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.locator("#data-note", has_text="⚠").wait_for()
        give(page, RED, PURPLE, GREY, LETTER)
        red, purple, grey, letter = (card(page, p["name"]) for p in (RED, PURPLE, GREY, LETTER))
        assert red.locator("h4").inner_text() == HOSTILE and red.locator(".pill.drug").count() == 1
        assert purple.locator(".pill.shortlist b").inner_text().count("·") == 1
        assert grey.locator("h4").inner_text() == ("판별 불가" if korean else "Not identified")
        assert grey.locator(".role").all_text_contents() == [WORDS_NONE[korean]] * 3
        assert ("읽을 수 있는 사진이 아닙니다" if korean else "no photo that can be read") in letter.inner_text()
        assert page.evaluate("window.hacked") is None
        assert set(page.locator("main img").evaluate_all("all => all.map(i => i.src.slice(0, 5))")) == {"blob:"}
        assert page.locator("main img").evaluate_all("all => all.every(i => i.complete && i.naturalWidth && i.alt)")
        assert red.locator(".photo img, .zoom img").count() == 2, "the photo with its box, and the pill enlarged"
        red.locator(".references img").wait_for()
        assert red.locator(".references img").get_attribute("alt").startswith(HOSTILE)
        first = load_bundle(bundle).predict(RED["buffer"], "single")["items"][0]
        assert f"{first['confidence']:.1%}" in red.locator(".kind").inner_text()
        differs = red.locator(".candidates > ol > li").nth(1).locator(".differences").inner_text()
        assert "≠" in differs and ("<b>YT</b>" in differs or "파랑" in differs)
        assert red.locator(".candidates > ol > li").count() == 2 and red.locator("ol[start='3'] > li").count() == 1
        assert page.locator("details[open]").count() == 1, "the facts of the drug that is named, and of no other"
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert "642500340, A01508511" in red.locator(".facts").first.inner_text()
        picture(page, f"page_{colours}_{size['width']}")
        check_accessible(page)


WORDS_NONE = {True: "참고 (답이 아님)", False: "for comparison (not the answer)"}


def test_a_reference_picture_is_of_the_bundle_that_answers(server, bundle):
    "With a key alone; a drug or a side without a picture, and a picture that was changed, have none."
    front = bundle / "thumbnails" / "K-000001_front.jpg"
    data, path = front.read_bytes(), "/picture?kcode=K-000001"
    status, told, headers = server.ask(f"{path}&side=front")
    assert (status, told, headers["content-type"]) == (200, data, "image/jpeg")
    assert server.ask(path, key=None)[0] == 401
    for wrong in (f"{path}&side=back", "/picture?kcode=K-000002", "/picture?kcode=../bundle.json"):
        assert server.ask(wrong)[1]["error"]["code"] == "no_picture"
    try:
        front.write_bytes(data[:-1])
        assert server.ask(path)[0] == 422
    finally:
        front.write_bytes(data)
    assert server.ask(path)[0] == 200


@pytest.mark.spec("X40")
def test_the_page_asks_in_the_mode_that_was_chosen_and_in_no_other(browser, server):
    visit = Visit(browser, server, key=KEY)
    with visit as page:
        give(page, RED, GREY)
        page.check("input[value=combo]")
        give(page, RED)
        assert page.locator(".chip").all_inner_texts() == ["단일", "단일", "조합"]
        assert page.locator("input[value=combo]").is_checked()
        assert card(page, RED["name"]).nth(1).locator(".item").count() == 2  # two pills are found in combo
        picture(page, "page_combo")
        modes = [url.partition("pipeline=")[2] for url in visit.asked if "/predict" in url]
        assert modes == ["single", "single", "combo"]


PUT = """([names, where]) => {
    const data = new DataTransfer();
    for (const [name, bytes] of names) data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
    document.querySelector(where).dispatchEvent(
        new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


def put(page, where: str, *photos: dict) -> None:
    "Drop photos on a place of the page."
    page.evaluate(PUT, [[[p["name"], list(p["buffer"])] for p in photos], where])


def fill_two_sides(page) -> None:
    "Choose a front, drop a back, and drop a third photo, which finds no place."
    page.locator("#data-note").wait_for()
    page.check("input[value=two_side]")
    page.set_input_files("#file-front", [RED])
    assert page.locator("#ask-sides").is_disabled() and page.locator("#files").is_hidden()
    put(page, ".side[data-side=back]", BACK)
    page.locator(".slot img").nth(1).wait_for()
    put(page, "#drop", BLUE)
    assert "1장은 넣지 않았습니다" in page.locator("#sides-note").inner_text()
    assert page.locator(".slot img").evaluate_all("all => all.map(i => i.alt)") == [
        f"{side} 사진: {p['name']}" for side, p in (("앞면", RED), ("뒷면", BACK))
    ]


def check_sides_card(page, answer: dict) -> None:
    "The card shows both photos and the answer to both; what is downloaded is that answer."
    red = card(page, f"{RED['name']} + {BACK['name']}")
    red.locator(".pill.drug").wait_for()
    assert red.locator(".photo img").count() == red.locator(".zoom img").count() == 2
    told = red.inner_text()
    assert all(line in told for line in cardview.sides_alone(answer)) and red.locator("h4").inner_text() == HOSTILE
    assert "보정되지 않은 확률" in told  # one photo's temperature was fitted, that of pairs was not
    picture(page, "page_sides_answer")
    assert red.locator(".chip").inner_text() == "앞면과 뒷면" and page.locator(".slot img").count() == 0
    with page.expect_download() as got:
        page.click("#json")
    (saved,) = json.loads(Path(got.value.path()).read_text(encoding="utf-8"))
    assert saved | {"timings": 0} == answer | dict(photo=f"{RED['name']} + {BACK['name']}", timings=0)


def check_add_a_back(page) -> None:
    "On a phone, in English: the card of one photo offers to add its back, and that photo is then the front."
    page.check("input[value=single]")
    give(page, PURPLE)
    page.set_viewport_size(PHONE)
    page.select_option("#language", "en")
    card(page, PURPLE["name"]).get_by_role("button", name="Add a photo of the back").click()
    assert page.locator("input[value=two_side]").is_checked() and page.locator("#ask-sides").is_disabled()
    assert page.locator(".side[data-side=front] img").get_attribute("alt") == "Photo of the front: purple.png"
    check_accessible(page)
    picture(page, "page_sides_390")


@pytest.mark.spec("BX16", "X40")
def test_two_sides_are_one_card(browser, server, bundle):
    "Two places, each filled by choosing or dropping; the server's answer to both; two drugs in them get no name."
    here, visit = load_bundle(bundle), Visit(browser, server)
    with visit as page:
        fill_two_sides(page)
        check_accessible(page)
        picture(page, "page_sides_1280")
        page.click("#ask-sides")
        check_sides_card(page, here.predict_sides(RED["buffer"], BACK["buffer"]))
        put(page, "#drop", RED, BLUE)
        page.click("#ask-sides")
        assert REASONS["contradiction"].split(".")[0] in card(page, "+ blue.png").locator(".pill.unknown").inner_text()
        assert [url.partition("?")[2] for url in visit.asked if "/predict" in url] == ["two_side=true"] * 2
        check_add_a_back(page)


def test_a_model_of_one_side_is_not_asked_about_two(browser, server):
    with Visit(browser, server, key=None) as page:
        told = server.ask("/version")[1]
        told["bundle"]["two_side"] = False
        page.route("**/version", lambda route: route.fulfill(json=told))
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.locator("[data-t=mode_two_side_told]", has_text="함께 볼 수 없습니다").wait_for()
        assert page.locator("input[value=two_side]").is_disabled()
        give(page, PURPLE)
        assert page.get_by_role("button", name="뒷면 사진도").count() == 0


def test_a_busy_server_is_asked_again_when_it_says(browser, server):
    "429 and 503: the wait is shown, nobody is asked before it is over, and the answer comes; other errors are words."
    with Visit(browser, server) as page:
        now = page.evaluate("Date.now() / 1000")
        page.clock.install(time=now)
        page.clock.pause_at(now + 3600)
        codes, when = ["too_many_requests", "busy"], []

        def refuse(route):
            when.append(page.evaluate("Date.now()"))
            if not codes:
                return route.continue_()
            code = codes.pop(0)
            headers = {"Retry-After": "7"}
            return route.fulfill(status=REFUSALS[code], headers=headers, json=dict(error=dict(code=code, message="no")))

        page.route("**/predict*", refuse)
        page.set_input_files("#files", [RED])
        for seconds in ("7", "[1-7]"):  # the clock may move on between the second refusal and this look at it
            page.locator(".card", has_text=re.compile(f"{seconds}초 뒤에 다시 묻습니다")).wait_for()
            for _ in range(8):
                page.clock.run_for(1000)
        page.locator(".pill.drug").wait_for()
        assert len(when) == 3 and min(b - a for a, b in zip(when, when[1:])) >= 7000


def test_every_error_of_the_server_is_said_in_both_languages(browser, server):
    with Visit(browser, server) as page:
        codes = [
            c for c, status in REFUSALS.items() if c not in ("key_missing", "key_wrong") and status not in (429, 503)
        ]
        told = iter(codes)

        def refuse(route):
            code = next(told)
            error = dict(code=code, message=f"english {code}", fix=None, request_id="r")
            route.fulfill(status=REFUSALS[code] if REFUSALS[code] != 499 else 400, json=dict(error=error))

        page.route("**/predict*", refuse)
        for code in codes:
            give(page, colour_photo(f"{code}.png", (0, 0, 0)))
        for language in ("ko", "en"):
            page.select_option("#language", language)
            words = page.evaluate(f"WORDS.{language}.errors")
            for code in codes:
                shown = (
                    page.locator(".card")
                    .filter(has=page.locator("h3", has_text=re.compile(f"^{code}.png$")))
                    .inner_text()
                )
                assert all(text in shown for text in (*words[code], f"english {code}")), code
        page.unroute("**/predict*")
        page.locator(".card").first.get_by_role("button", name="Ask again").click()
        page.locator(".pill").first.wait_for()


@pytest.mark.spec("X40")
def test_the_files_hold_what_the_command_line_writes(browser, server, bundle):
    "The rows and the JSON of `pillsnap predict --out`; but a spreadsheet takes nothing for a formula."
    with Visit(browser, server) as page:
        photos = [RED, PURPLE, GREY, LETTER]
        give(page, *photos)
        with page.expect_download() as got:
            page.click("#csv")
        text = Path(got.value.path()).read_text(encoding="utf-8")
        with page.expect_download() as got:
            page.click("#json")
        told = json.loads(Path(got.value.path()).read_text(encoding="utf-8"))
    here = load_bundle(bundle)
    for photo, answer in zip(photos[:3], told):
        assert answer | {"timings": 0} == here.predict(photo["buffer"], "single") | dict(photo=photo["name"], timings=0)
    rows = list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))
    expected = [row for answer in told for row in answer_rows(answer)]
    assert text.startswith("\ufeff" + ",".join(COLUMNS)) and len(rows) == len(expected) == 4
    for row, want in zip(rows, expected):
        for column in COLUMNS:
            text = "" if want[column] is None else want[column]
            if isinstance(text, float):
                assert float(row[column]) == text
            else:
                assert row[column].removeprefix("'") == str(text)
    assert rows[3]["photo"] == "'=letter.png" and not [c for row in rows for c in row.values() if c.startswith("=")]


def test_right_and_wrong_are_appended_to_the_servers_file(browser, server):
    "Two clicks, two lines; the lines of before stay, byte by byte."
    file = server.env_file.with_name("feedback.jsonl")
    with Visit(browser, server) as page:
        give(page, RED, PURPLE)
        before = file.read_bytes() if file.exists() else b""
        card(page, RED["name"]).get_by_role("button", name="맞음").click()
        card(page, RED["name"]).get_by_text("맞음으로 기록됨").wait_for()
        first = file.read_bytes()
        wrong = card(page, PURPLE["name"])
        wrong.get_by_role("button", name="틀림").click()
        wrong.locator("form input").fill("573")
        wrong.get_by_role("button", name="보내기").click()
        wrong.get_by_text("숫자 여섯 자리").wait_for()
        check_accessible(page)
        wrong.locator("form input").fill("k-000573")
        wrong.get_by_role("button", name="보내기").click()
        wrong.get_by_text("틀림으로 기록됨").wait_for()
        assert page.locator("#feedback-file").is_hidden()
        assert first.startswith(before) and file.read_bytes().startswith(first)
        right, other = read_remarks(file)[-2:]
    assert (right.right, right.drug, right.size) == (True, "K-000001", len(RED["buffer"]))
    assert (other.right, other.drug, other.answer, other.who) == (False, "K-000573", "shortlist", KeyRing.name(KEY))
    assert right.bundle == server.ask("/version")[1]["bundle"]["digest"]


def test_drugs_with_names_of_any_kind_have_remarks_and_pictures(browser, tmp_path):
    "Imported classes are named after folders: Korean, with blanks; each can be right, wrong, or another one."
    place, keys = tmp_path / "export", ("red pill", "가나정 10mg", "마바정")
    front = place / "thumbnails" / "000000_front.jpg"
    front.parent.mkdir(parents=True)
    Image.new("RGB", (96, 96), PILLS["K-000001"]).save(front)
    pictures = {"red pill": {"front": dict(file=front.name, sha256=sha256_file(front))}}
    looks = dict(drug_shape="원형", color_class1="하양", print_front="AB")
    drugs = {k: looks | size for k, size in zip(keys, (dict(leng_long=8.0), dict(thick=3.0), dict(print_front="CD")))}
    colour_bundle(place, keys=keys, thumbnails=pictures, drugs=drugs)
    file = tmp_path / "feedback.jsonl"
    with Server(tmp_path, place, "--no-auth", "--workers", "1", "--feedback", str(file), env="") as server:
        assert server.ask("/version", key=None)[1]["bundle"]["keys"] == "folder"
        with Visit(browser, server, key=None) as page:
            give(page, RED, BLUE)
            card(page, RED["name"]).locator(".references img").first.wait_for()
            listed = server.ask("/predict?pipeline=single", [RED["buffer"]], key=None)[1]["items"][0]["top_k"][1:]
            assert {c["differs"]["by"] for c in listed} == {"unrecorded", "look"}
            assert all(c["differs"]["text"] in card(page, RED["name"]).text_content() for c in listed)
            card(page, RED["name"]).get_by_role("button", name="맞음").click()
            card(page, RED["name"]).get_by_text("맞음으로 기록됨").wait_for()
            blue = card(page, BLUE["name"])
            blue.get_by_role("button", name="틀림").click()
            blue.locator("form select").select_option("가나정 10mg")
            blue.locator("form input").fill("새 알약 (2024)")
            blue.get_by_role("button", name="보내기").click()
            blue.get_by_text("틀림으로 기록됨").wait_for()
    right, other = read_remarks(file)
    assert (right.kcode, right.right, other.kcode, other.should) == ("red pill", True, "마바정", "새 알약 (2024)")


def test_without_keys_none_is_asked_for_and_feedback_is_downloaded(browser, bundle, tmp_path):
    with Server(tmp_path, bundle, "--no-auth", "--workers", "1", env="") as server:
        assert server.ask("/version", key=None)[1]["feedback"] is False
        with Visit(browser, server, key=None) as page:
            give(page, RED)
            assert page.locator("#key-dialog").is_hidden() and page.locator("#key-button").is_hidden()
            card(page, RED["name"]).get_by_role("button", name="맞음").click()
            with page.expect_download() as got:
                page.click("#feedback-file")
            (remark,) = read_remarks(got.value.path())
            assert (remark.right, remark.drug) == (True, "K-000001") and remark.when.endswith("+00:00")


def test_photos_come_by_keyboard_paste_drop_and_camera(browser, server):
    chosen: list = []
    with Visit(browser, server, PHONE) as page:
        page.on(
            "filechooser", lambda chooser: chosen.append(chooser)
        )  # before the key is pressed: it takes the browser a moment
        page.locator("#data-note").wait_for()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.id") == "files":
                break
        assert page.evaluate("document.activeElement.id") == "files"
        page.keyboard.press("Enter")
        assert until(lambda: page.wait_for_timeout(50) or chosen, 60)
        chosen[0].set_files([RED])
        page.locator(".pill.drug").wait_for()
        send = """([name, bytes]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
            const event = name === 'dropped.png'
                ? new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true})
                : new ClipboardEvent('paste', {clipboardData: data, bubbles: true});
            document.querySelector('#drop').dispatchEvent(event);
        }"""
        for name in ("dropped.png", "pasted.png"):
            page.evaluate(send, [name, list(RED["buffer"])])
            card(page, name).locator(".pill.drug").wait_for()
        page.set_viewport_size(DESK)
        page.click("#camera-button")
        assert until(lambda: page.evaluate("document.querySelector('#video').videoWidth") > 0, 60)
        check_accessible(page)
        page.click("#shoot")
        card(page, "camera_").locator(".pill").wait_for()
        assert page.locator("#camera-dialog").is_hidden() and page.locator(".card").count() == 4
        page.click("#clear")
        assert page.locator(".card").count() == 0 and page.locator("#answers").is_hidden()


def test_the_pages_words_are_those_of_the_card(browser, server):
    "Korean as the card says it; every reason, fact, hint and error in both languages."
    paths = """language => { const found = [];
        const walk = (value, at) => { if (value && typeof value === 'object' && !Array.isArray(value))
            Object.entries(value).forEach(([k, v]) => walk(v, `${at}/${k}`)); else found.push(at); };
        walk(WORDS[language], ''); return found; }"""
    with Visit(browser, server) as page:
        korean = page.evaluate("WORDS.ko")
        assert page.evaluate(paths, "ko") == page.evaluate(paths, "en")
        apart = page.evaluate("Object.fromEntries(Object.entries(WORDS.ko.differs).map(([k, f]) => [k, f('{}')]))")
        used = page.evaluate("document.querySelectorAll('[data-t]').length")
        empty = page.evaluate("[...document.querySelectorAll('[data-t]')].filter(e => !e.textContent).length")
    assert korean["reasons"] == REASONS and apart == cards.TOLD_APART
    assert {k: v for k, v in korean["fields"].items() if k in cards.CARD} == {k: v for k, (v, _) in cards.CARD.items()}
    assert korean["kinds"] == cardview.VERDICTS and korean["no_pill_told"] == cardview.NO_PILL
    assert korean["hints"] == cardview._HINT and korean["views"] == cardview._VIEW
    assert korean["sides"] == cards.PICTURES
    assert korean["missing"] == cards.MISSING and korean["score_lines"] == cards.SCORE_LINES
    assert set(korean["errors"]) == {*REFUSALS, "offline"} and used > 30 and empty == 0
