"""The synthetic delivery (SPEC BX5): what it holds, that it repeats itself, that it cannot be solved blind, and
what lies where."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from terminal import search_path

from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import canonical_json
from pillsnap.delivery.capture import capture_group, parse_name
from pillsnap.synth.catalogue import make_catalogue
from pillsnap.synth.command import synth_command
from pillsnap.synth.draws import rng_for
from pillsnap.synth.faults import IN_FILES, IN_LABEL
from pillsnap.synth.files import file_length, png_bytes, render_task, run_tasks
from pillsnap.synth.plan import plan_delivery
from pillsnap.synth.records import NULL_KEYS
from pillsnap.synth.renderer import Shot, photograph
from pillsnap.synth.scene import LAMPS, Pose
from pillsnap.synth.sheet import photo_and_boxes
from pillsnap.synth.writer import UNFINISHED, claim_folder, write_delivery

TINY = dict(drugs=4, photos=6, combos=2, seed=42, width=98, height=128)
QUIET = dict(progress=False, workers=1)
ROOT = Path(__file__).resolve().parents[1]


def tree(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def labels(root: Path) -> list[tuple[Path, dict]]:
    return [(p, json.loads(p.read_text("utf-8"))) for p in sorted(root.rglob("*.json"))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "tiny"
    write_delivery(out, **TINY, **QUIET)
    return out


# DATA.md section 3, written out: a list taken from the code would agree with any mistake in it
KEYS = [
    "file_name",
    "width",
    "height",
    "imgfile",
    "drug_N",
    "drug_S",
    "back_color",
    "drug_dir",
    "light_color",
    "camera_la",
    "camera_lo",
    "size",
    "dl_idx",
    "dl_mapping_code",
    "dl_name",
    "dl_name_en",
    "img_key",
    "dl_material",
    "dl_material_en",
    "dl_custom_shape",
    "dl_company",
    "dl_company_en",
    "di_company_mf",
    "di_company_mf_en",
    "item_seq",
    "di_item_permit_date",
    "di_class_no",
    "di_etc_otc_code",
    "di_edi_code",
    "chart",
    "drug_shape",
    "thick",
    "leng_long",
    "leng_short",
    "print_front",
    "print_back",
    "color_class1",
    "color_class2",
    "line_front",
    "line_back",
    "img_regist_ts",
    "form_code_name",
    "mark_code_front_anal",
    "mark_code_back_anal",
    "mark_code_front_img",
    "mark_code_back_img",
    "mark_code_front",
    "mark_code_back",
    "change_date",
    "id",
]


# ---- the drugs
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX5")
def test_catalogue_has_the_awkwardness_of_real_records():
    cat = make_catalogue(300, seed=3)
    records = [d.record for d in cat if d.kcode not in cat.blank]
    assert [d.number for d in cat] == sorted({d.number for d in cat}) and all(
        r["dl_idx"] == str(int(r["dl_mapping_code"][2:]) - 1) for r in records
    )
    codes = [c for r in records for c in r["di_edi_code"].split(",")]
    assert all(re.fullmatch(r"\d{9}|[AEW]\d{8}", c) for c in codes) and {
        r["di_edi_code"].count(",") for r in records
    } >= {0, 1}
    assert {type(r[k]) for r in records for k in ("thick", "leng_long", "leng_short")} == {int, float}
    assert (
        any("분할선" in r["print_front"] for r in records)
        and any("마크" in r["print_front"] for r in records)
        and any(", 투명" in r["color_class1"] for r in records)
    )
    assert {d.body.form for d in cat} == {"tablet", "capsule", "gel"} and {
        "원형",
        "타원형",
        "장방형",
        "육각형",
        "팔각형",
        "삼각형",
        "기타",
    } <= {d.body.shape for d in cat}
    [blank] = cat.blank
    assert {k for k, v in cat[blank].record.items() if v is None} == set(NULL_KEYS) and len(NULL_KEYS) == 18
    assert len({r["dl_name"] for r in records}) > 0.99 * len(records)


@pytest.mark.spec("BX5")
def test_twins_differ_in_their_imprint_only():
    cat = make_catalogue(12, seed=42)
    a, b = (cat[k] for k in cat.twins[0])
    shot = Shot(latitude=75, width=96, height=96, field=14)

    def take(d, side):
        return photograph([(d, Pose(turn=30, side=side))], shot, rng_for(1))[0].astype(int)

    for side in (0, 1):
        gap = np.abs(take(a, side) - take(b, side)).max(-1)
        assert (gap > 25).sum() > 60, "the letters are there to be seen, on both sides"
    polished = [replace(d, imprint=replace(d.imprint, front="", back="")) for d in (a, b)]
    assert all((take(polished[0], s) == take(polished[1], s)).all() for s in (0, 1)), (
        "without letters they are one pill"
    )
    assert (
        a.name != b.name
        and a.record["dl_company"] + a.record["di_edi_code"] != b.record["dl_company"] + b.record["di_edi_code"]
    )


# ---- the tree
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX5")
def test_tree_is_a_delivery(tiny):
    single = re.compile(
        r"data/(train|val)/(labels/single/[TV]L_1_single/(K-\d{6})_json"
        r"/\3_0_[012]_[01]_[012]_(60|70|75|90)_\d{3}_200\.json"
        r"|images/single/[TV]S_1_single/(K-\d{6})/\5_.*_200\.png)"
    )
    combo = re.compile(
        r"data/(train|val)/(labels/combination/[TV]L_1_combo/(K(-\d{6}){3,4})_json/K-\d{6}"
        r"/\3_0_2_[01]_2_(70|75|90)_000_200\.json"
        r"|images/combination/[TV]S_1_combo/(K(-\d{6}){3,4})/\6_.*_200\.png)"
    )
    files = [f for f in tree(tiny) if f.startswith("data/")]
    assert all(single.fullmatch(f) or combo.fullmatch(f) for f in files)
    ledger = json.loads((tiny / "SYNTHETIC.json").read_text("utf-8"))
    pngs = [f for f in files if f.endswith(".png")]
    assert (
        len(pngs) == sum(ledger["counts"].values())
        and ledger["counts"]["train_single"] == 24
        and ledger["counts"]["train_combo"] == 6
    )
    for f in pngs:
        n = len(parse_name(Path(f).stem).codes)
        assert (n == 1) == ("/single/" in f) and sum(Path(f).stem in g for g in files if g.endswith(".json")) == n, (
            "one label a pill"
        )


@pytest.mark.spec("BX5")
def test_labels_are_records_of_the_format(tiny):
    for path, j in labels(tiny / "data"):
        im, [note] = j["images"][0], j["annotations"]
        assert list(j) == ["images", "type", "annotations", "categories"] and list(im) == KEYS and len(KEYS) == 50
        assert "\n\t\t" in path.read_text("utf-8") and path.read_bytes()[:1] == b"{", "tabs, no byte order mark"
        x, y, w, h = note["bbox"]
        assert (
            all(type(v) is int for v in note["bbox"])
            and note["area"] == w * h
            and 0 <= x < x + w <= im["width"]
            and 0 <= y < y + h <= im["height"]
        )
        assert j["categories"] == [{"supercategory": "pill", "id": 1, "name": "Drug"}] and (
            im["id"],
            note["id"],
            note["image_id"],
            note["category_id"],
        ) == (1, 1, 1, 1)
        c = parse_name(path.stem)
        assert im["drug_N"] in c.codes and im["file_name"] == im["imgfile"] == path.stem + ".png"
        assert (im["camera_la"], im["camera_lo"], im["drug_dir"]) == (c.latitude, c.longitude, ("앞면", "뒷면")[c.side])
        assert im["light_color"] == ("전구색", "주광색", "주백색")[c.light] and im["back_color"].endswith("배경")


@pytest.mark.parametrize(
    "drugs, combos, val_combos",
    [(3, 0, 0), (3, 1, 1), (12, 40, 1), (16, 40, 5), (16, 80, 5), (20, 80, 6)],  # 16 drugs leave 4 for val: 5 combos
)
def test_val_asks_for_no_more_combinations_than_its_drugs_give(drugs, combos, val_combos):
    counts = plan_delivery(drugs=drugs, photos=4, combos=combos).ledger["counts"]
    assert counts["val_combo"] == 3 * val_combos


# ---- same seed, same bytes
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX5")
def test_the_digest_is_that_of_the_files(tiny):
    "Equal digests mean equal bytes: the notebook of the writer compares deliveries by them."
    ledger, said = load(tiny / "SYNTHETIC.json"), {k: v for k, v in tree(tiny).items() if k.startswith("data/")}
    assert (
        ledger["files"] == len(said) and ledger["digest"] == hashlib.sha256(canonical_json(said).encode()).hexdigest()
    )


# ---- killed, repeated, refused
# -------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX5", "RS1")
def test_killed_rendering_is_gone_on_with(tmp_path):
    spec = dict(drugs=3, photos=14, combos=1, seed=1, width=195, height=256)
    code = (
        "import os\n"
        "from pillsnap.synth import writer\n"
        "run_tasks = writer.run_tasks\n"
        "def killed_after_eight(*given):\n"
        "    for photos, part in enumerate(run_tasks(*given)):\n"
        f"        if photos == 8: os.killpg(0, {int(signal.SIGKILL)})\n"
        "        yield part\n"
        "if __name__ == '__main__':\n"
        "    writer.run_tasks = killed_after_eight\n"
        f"    writer.write_delivery({str(tmp_path / 'k')!r}, **{spec!r}, progress=False, workers=2)\n"
    )
    script = tmp_path / "render.py"
    script.write_text(code)
    p = subprocess.run(
        [sys.executable, str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path(ROOT)},
        start_new_session=True,
        timeout=120,
    )
    assert p.returncode == -signal.SIGKILL
    assert (tmp_path / "k" / UNFINISHED).is_file() and not (tmp_path / "k" / "SYNTHETIC.json").exists(), (
        "not to be mistaken for finished"
    )
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "k").rglob("*.png") if not f.name.startswith(".")}
    with pytest.raises(PillsnapError, match="another synthetic delivery"):
        write_delivery(tmp_path / "k", **(spec | {"photos": 5}), **QUIET)
    ledger = write_delivery(tmp_path / "k", **spec, **QUIET)
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items()) and len(kept) >= 8, "what was there was kept"
    assert not (tmp_path / "k" / UNFINISHED).exists() and not list((tmp_path / "k").rglob("*.partial"))
    assert ledger["digest"] == write_delivery(tmp_path / "whole", **spec, **QUIET)["digest"]


def test_a_photo_that_was_cut_off_is_taken_again(tiny, tmp_path):
    plan = plan_delivery(**TINY)
    claim_folder(tmp_path / "d", plan)
    list(run_tasks(tmp_path / "d", plan.tasks[:2], 1, False))
    (tmp_path / "d" / plan.tasks[0].image).write_bytes(b"\x89PNG")
    (tmp_path / "d" / plan.tasks[1].labels[0][0]).unlink()
    assert write_delivery(tmp_path / "d", **TINY, **QUIET)["digest"] == load(tiny / "SYNTHETIC.json")["digest"]


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(drugs=0), "1 to 20,000"),
        (dict(photos=1297), "1,296"),
        (dict(drugs=2, combos=1), "needs 3 drugs"),
        (dict(drugs=3, combos=2), "1 combinations"),
        (dict(width=10), "64 to 8192"),
        (dict(domain="scanner"), "studio"),
        (dict(combos=-1), "fewer than no"),
        (dict(drugs=3, photos=2, combos=1, faults=True), "too few photos"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(bad, says, tmp_path):
    with pytest.raises(PillsnapError) as e:
        write_delivery(tmp_path / "x", **({"photos": 2, "combos": 0} | bad), **QUIET)
    assert says in str(e.value) and not (tmp_path / "x").exists()


# ---- how it looks
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dome():
    d = next(
        d
        for d in make_catalogue(80, seed=5, blank=False)
        if d.body.profile == "deep" and d.body.shape == "원형" and d.body.form == "tablet" and d.body.score == ("", "")
    )
    return replace(d, imprint=replace(d.imprint, front="", back=""))


def shot_of(d, light=2, latitude=90, back=2, turn=0.0, px=160, **k):
    im, [e] = photograph([(d, Pose(turn=turn))], Shot(back, light, latitude, px, px, 14.0, **k), rng_for(3))
    return im.astype(float), e


@pytest.mark.spec("BX5")
def test_shading_follows_the_lamp(dome):
    def tilt(im, e):  # which way the dome gets brighter
        x0, y0, x1, y1 = e
        cx, cy, r = (x0 + x1) // 2, (y0 + y1) // 2, int(0.3 * (x1 - x0))
        m = im[cy - r : cy + r, cx - r : cx + r].mean(-1)
        return np.array([m[:, r:].mean() - m[:, :r].mean(), m[r:].mean() - m[:r].mean()])

    from pillsnap.synth.scene import towards

    for light in range(3):
        t = tilt(*shot_of(dome, light))
        assert np.hypot(*t) > 2 and t @ towards(LAMPS[light])[:2] > 0, "the flank towards the lamp is the bright one"
    warm, day = (shot_of(dome, light, px=96)[0][48 - 8 : 48 + 8, 48 - 8 : 48 + 8].mean((0, 1)) for light in (0, 1))
    assert warm[2] / warm[0] < day[2] / day[0] - 0.08, "colour temperature"


@pytest.mark.spec("BX5")
def test_latitude_shows_the_side_wall_and_flattens(dome):
    sizes, darkness = {}, {}
    for la in (60, 75, 90):
        im, (x0, y0, x1, y1) = shot_of(dome, 2, la)
        sizes[la], c = (y1 - y0) / (x1 - x0), (x0 + x1) // 2
        darkness[la] = (
            im[(y0 + y1) // 2 - 6 : (y0 + y1) // 2 + 6, c - 6 : c + 6].mean()
            - im[y1 - 7 : y1 - 3, c - 3 : c + 3].mean()
        )
    flat = next(
        d
        for d in make_catalogue(200, seed=5, blank=False)
        if d.body.form == "tablet" and d.body.shape == "원형" and d.body.thick_mm / d.body.long_mm < 0.42
    )
    assert (lambda e: (e[3] - e[1]) / (e[2] - e[0]))(shot_of(flat, 2, 60)[1]) < 1.08 * (
        np.sin(np.deg2rad(60)) + 0.5 * flat.body.thick_mm / flat.body.long_mm
    )
    assert abs(sizes[90] - 1) < 0.05 and darkness[60] > darkness[90] + 15, "from the side the wall shows"


@pytest.mark.spec("BX5")
def test_the_turntable_turns_the_pill_and_not_the_light(dome):
    long = next(d for d in make_catalogue(80, seed=5, blank=False) if d.body.form == "capsule")
    _, [(x0, y0, x1, y1)] = photograph([(long, Pose(turn=0))], Shot(2, 2, 90, 160, 160, 28.0), rng_for(3))
    _, [(u0, v0, u1, v1)] = photograph([(long, Pose(turn=90))], Shot(2, 2, 90, 160, 160, 28.0), rng_for(3))
    assert (x1 - x0) > 1.8 * (y1 - y0) and (v1 - v0) > 1.8 * (u1 - u0)
    same = replace(dome, body=replace(dome.body, coat="sugar"))
    a, b = (shot_of(same, 0, turn=t)[0].mean(-1) for t in (0.0, 120.0))
    assert np.abs(cv2.GaussianBlur(a - b, (0, 0), 3)).max() < 12, "a plain dome looks the same however it is turned"


@pytest.mark.spec("BX5")
def test_score_line_imprint_and_shadow_are_there():
    cat = make_catalogue(200, seed=5, blank=False)
    scored = next(
        d
        for d in cat
        if d.body.score[0] == "-" and d.body.shape == "원형" and not d.imprint.ink and d.body.coat == "film"
    )
    im, _ = shot_of(replace(scored, imprint=replace(scored.imprint, front="분할선")), 2, 90)
    row = im[80, 80 - 30 : 80 + 30].mean(-1)
    assert row.min() < np.median(row) - 15, "a groove across the middle"
    bare, lettered = (
        shot_of(
            replace(scored, body=replace(scored.body, score=("", "")), imprint=replace(scored.imprint, front=t)), 2, 90
        )[0].mean(-1)
        for t in ("", "W8")
    )
    assert (np.abs(bare - lettered) > 12).sum() > 60, "letters can be read"
    im, (x0, y0, x1, y1) = shot_of(scored, 0, 90)
    right, left = im[y1 - 12 : y1 + 2, x1 + 2 : x1 + 7].mean(), im[y0 : y0 + 14, x0 - 7 : x0 - 2].mean()
    assert right < left - 10, "the warm lamp stands at the upper left, its shadow falls to the lower right"


@pytest.mark.spec("BX5")
def test_boxes_hold_the_pill_with_a_margin(tiny):
    tasks = [
        t
        for t in plan_delivery(**TINY).tasks
        if not t.image.startswith("data/val") and t.shift == (0, 0) and t.shot.back == 0
    ]
    for t in tasks[:8]:
        image, [(x, y, w, h)] = photo_and_boxes(tiny, t)
        bright = image.astype(int).max(-1) > 60  # on black, whatever is bright is pill
        inside = bright[y : y + h, x : x + w].sum()
        assert inside > 0.995 * bright.sum(), "the whole pill is in its box"
        rows, cols = np.nonzero(bright.any(1))[0], np.nonzero(bright.any(0))[0]
        assert w * h < 1.6 * (rows[-1] - rows[0] + 1) * (cols[-1] - cols[0] + 1)


@pytest.mark.spec("BX5")
def test_phone_photos_are_of_another_world():
    spec = dict(drugs=3, photos=6, combos=1, seed=9, width=98, height=128)
    mean = {}
    for domain in ("studio", "phone"):
        tasks = [t for t in plan_delivery(**spec, domain=domain).tasks if len(t.pills) == 1]
        mean[domain] = np.array(
            [
                photograph(list(t.pills), t.shot, rng_for(*t.words, "photo"))[0][:6].mean((0, 1))
                for t in tasks
                if t.shot.back == 2
            ]
        )
    assert mean["phone"].std(0).mean() > 2 * mean["studio"].std(0).mean(), "any table"


STUDIO = {  # means of three patches of photos that were rendered before the phone domain had tables of its own
    "K-009822_0_2_0_0_90_020_200": (205.094, 205.728, 178.491),
    "K-009822_0_1_1_0_70_280_200": (46.379, 207.768, 142.549),
    "K-009822_0_2_0_2_60_240_200": (204.397, 218.429, 202.353),
}


@pytest.mark.spec("BX5")
def test_studio_photos_do_not_change():
    "The phone's tables, light and lens draw no random number of a studio photo: each pixel stays what it was."
    spec = dict(drugs=3, photos=6, combos=1, seed=9, width=98, height=128)
    for task in plan_delivery(**spec).tasks[:3]:
        image = photograph(list(task.pills), task.shot, rng_for(*task.words, "photo"))[0]
        patches = image.reshape(8, 16, 7, 14, 3).mean((1, 3))
        found = [float(patches[at]) for at in ((0, 1, 0), (3, 3, 1), (6, 5, 2))]
        assert np.allclose(found, STUDIO[task.stem], atol=0.02), task.stem


PHONE = {  # the same of phone photos that were rendered before the wild domain was added
    "K-009822_0_2_0_0_90_020_200": (81.183, 102.228, 41.353),
    "K-009822_0_1_1_0_70_280_200": (101.411, 174.58, 41.004),
    "K-009822_0_2_0_2_60_240_200": (67.393, 221.241, 38.121),
}


@pytest.mark.spec("BX5")
def test_phone_photos_do_not_change():
    spec = dict(drugs=3, photos=6, combos=1, seed=9, width=98, height=128, domain="phone")
    for task in plan_delivery(**spec).tasks[:3]:
        image = photograph(list(task.pills), task.shot, rng_for(*task.words, "photo"))[0]
        patches = image.reshape(8, 16, 7, 14, 3).mean((1, 3))
        found = [float(patches[at]) for at in ((0, 1, 0), (3, 3, 1), (6, 5, 2))]
        assert np.allclose(found, PHONE[task.stem], atol=0.02), task.stem


@pytest.mark.spec("BX5")
def test_wild_photos_show_pills_near_and_far_and_anywhere():
    spec = dict(drugs=3, photos=7, combos=0, seed=9, width=98, height=128)
    found = {"phone": [], "wild": []}
    for domain, boxes in found.items():
        for t in plan_delivery(**spec, domain=domain).tasks[:21]:
            [(x0, y0, x1, y1)] = photograph(list(t.pills), t.shot, rng_for(*t.words, "photo"))[1]
            assert 0 <= x0 < x1 <= 98
            assert 0 <= y0 < y1 <= 128
            boxes.append(((x0 + x1) / 196, (y0 + y1) / 256, np.sqrt((x1 - x0) * (y1 - y0))))
    wild, phone = (np.array(found[d]) for d in ("wild", "phone"))
    assert wild[:, :2].std(0).mean() > 1.5 * phone[:, :2].std(0).mean(), "anywhere in the photo"
    assert np.ptp(np.log(wild[:, 2])) > np.ptp(np.log(phone[:, 2])) + 0.3, "near and far"


@pytest.mark.spec("BX5", "BX17")
def test_phone_photos_keep_the_form_of_a_delivery(tmp_path):
    "Names and records are those of the studio's delivery; pixels, boxes and the ledger's domain differ."
    spec = dict(drugs=3, photos=4, combos=1, seed=9, width=98, height=128)
    written = {d: write_delivery(tmp_path / d, **spec, domain=d, **QUIET) for d in ("studio", "phone")}
    names = {d: sorted(p.relative_to(tmp_path / d) for p in (tmp_path / d / "data").rglob("*.*")) for d in written}
    assert names["studio"] == names["phone"]
    assert [written[d]["domain"] for d in written] == ["studio", "phone"]
    for path in names["studio"]:
        if path.suffix != ".json":
            assert (tmp_path / "studio" / path).read_bytes() != (tmp_path / "phone" / path).read_bytes()
            continue
        a, b = (json.loads((tmp_path / d / path).read_text(encoding="utf-8")) for d in written)
        assert a["images"] == b["images"], "the record of the drug and of the capture"
        x, y, w, h = b["annotations"][0]["bbox"]
        assert 0 <= x < x + w <= 98 and 0 <= y < y + h <= 128


# ---- not to be solved without looking at the pill
# ------------------------------------------------------------------------------------


def linear_score(x, y):
    "Accuracy of a ridge classifier under the photo-level split, the one that leaks most."
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return cross_val_score(
        make_pipeline(StandardScaler(), RidgeClassifier(alpha=10.0)),
        x,
        y,
        cv=StratifiedKFold(4, shuffle=True, random_state=0),
    ).mean()


@dataclass(frozen=True)
class Surroundings:
    "What photos of six drugs show, a row each: their drug, their scene, and what a look past the pill gives."

    drug: np.ndarray
    scene: np.ndarray  # background and light
    border: np.ndarray  # colours along the four edges
    noise: np.ndarray  # of each edge
    place: np.ndarray  # x and y of the pill
    size: np.ndarray  # bytes of the file
    pill: np.ndarray  # small pictures of the middle, for comparison


def edges(p: np.ndarray) -> tuple[np.ndarray, ...]:
    "The four edges of a photo, six pixels wide."
    return (p[:6], p[-6:], p[:, :6].swapaxes(0, 1), p[:, -6:].swapaxes(0, 1))


def shrunk(p: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    "The mean colours of a part of a photo, as one row."
    return cv2.resize(p.astype(np.float32), size, interpolation=cv2.INTER_AREA).ravel()


@pytest.fixture(scope="module")
def surroundings() -> Surroundings:
    n, m = 6, 36
    tasks = plan_delivery(drugs=n, photos=m, combos=0, seed=11, width=98, height=128).tasks[: n * m]
    kept = [t for t in tasks if t.shift == (0, 0)]
    photos = [photograph(list(t.pills), t.shot, rng_for(*t.words, "photo"))[0] for t in kept]
    lengths = [file_length(98, 128, rng_for(*t.words, "length", t.stem)) for t in kept]
    return Surroundings(
        drug=np.array([t.pills[0][0].number for t in kept]),
        scene=np.array([f"{t.shot.back}{t.shot.light}" for t in kept]),
        border=np.stack([np.concatenate([shrunk(s, (6, 1)) for s in edges(p)]) for p in photos]),
        noise=np.stack([[s.astype(float).std() for s in edges(p)] for p in photos]),
        place=np.array([[t.pills[0][1].x, t.pills[0][1].y] for t in kept]),
        size=np.array([len(png_bytes(p, k)) for p, k in zip(photos, lengths)], float),
        pill=np.stack([shrunk(p[24:104, 14:84], (14, 16)) for p in photos]),
    )


@pytest.mark.spec("BX5")
def test_border_noise_and_place_do_not_tell_the_drug(surroundings):
    s, n = surroundings, len(np.unique(surroundings.drug))
    assert n == 6
    limit = 1 / n + 3 * np.sqrt(1 / n * (1 - 1 / n) / len(s.drug))
    scores = {k: linear_score(getattr(s, k), s.drug) for k in ("border", "noise", "place")}
    assert all(score < limit for score in scores.values()), (scores, limit)
    assert linear_score(s.pill, s.drug) > 0.35, "while the pill itself tells"


@pytest.mark.spec("BX5")
def test_neither_surroundings_nor_file_size_differ_between_drugs(surroundings):
    "A sharper look: what remains when background and light are taken out, compared between drugs by an F-test."
    from scipy.stats import f_oneway

    s = surroundings

    def p_value(x):
        rest = x - np.array([x[s.scene == k].mean() for k in s.scene])
        return f_oneway(*(rest[s.drug == k] for k in np.unique(s.drug))).pvalue

    values = {
        "brightness": np.log(s.border.mean(1)),
        "colour": np.log(s.border[:, 0::3].mean(1) / s.border[:, 2::3].mean(1)),
        "noise": s.noise.mean(1),
        "size": s.size,
        "x": s.place[:, 0],
        "y": s.place[:, 1],
    }
    low = {k: p for k, v in values.items() if (p := p_value(v)) < 0.005}
    assert not low, f"these differ between drugs: {low}"


# ---- planted
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX5", "BX1")
def test_near_duplicates_cross_capture_groups_within_a_drug(tiny):
    ledger = json.loads((tiny / "SYNTHETIC.json").read_text("utf-8"))
    assert len(ledger["near_duplicates"]) >= 2
    for n in ledger["near_duplicates"]:
        a, b = (parse_name(Path(n[k]).stem) for k in ("source", "copy"))
        assert a.codes == b.codes and capture_group(a) != capture_group(b)
        x, y = (cv2.imread(str(tiny / n[k])).astype(float) for k in ("source", "copy"))
        dx, dy = n["shift"]
        moved = cv2.warpAffine(
            x, np.array([[1, 0, dx], [0, 1, dy]], float), x.shape[1::-1], borderMode=cv2.BORDER_REPLICATE
        )
        assert 0 < np.abs(moved - y).mean() < 3 and (tiny / n["source"]).read_bytes() != (tiny / n["copy"]).read_bytes()


def load(p):
    return json.loads(p.read_text("utf-8"))


@pytest.fixture(scope="module")
def spoilt(faulty_delivery):
    "A delivery with every fault, and its ledger."
    return faulty_delivery, load(faulty_delivery / "SYNTHETIC.json")


@pytest.fixture(scope="module")
def planted(spoilt) -> dict[str, Path]:
    "The file of each planted fault."
    out, ledger = spoilt
    return {f: out / p for f, (p,) in ledger["planted_faults"].items()}


def iou(a, b) -> float:
    "Intersection over union of two boxes x, y, width, height."
    w, h = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0]), min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    i = max(w, 0) * max(h, 0)
    return i / (a[2] * a[3] + b[2] * b[3] - i)


@pytest.mark.spec("BX5")
def test_the_ledgers_wrong_boxes_are_on_the_disk(planted):
    assert set(planted) == {*IN_LABEL, *IN_FILES} and len(set(planted.values())) == len(planted), "one fault a file"

    def box(f):
        return load(planted[f])["annotations"][0]["bbox"]

    assert (
        box("box_negative")[2] < 0 and box("box_zero")[2] == 0 and box("box_empty") == [] and len(box("box_short")) == 3
    )
    assert (
        isinstance(box("box_float")[0], float) and isinstance(box("box_string")[0], str) and box("box_outside")[0] > 98
    )

    def siblings(f):
        return [tuple(load(p)["annotations"][0]["bbox"]) for p in planted[f].parents[1].glob(f"*/{planted[f].name}")]

    assert max(Counter(siblings("identical_boxes")).values()) == 2
    mine = tuple(box("overlapping_boxes"))
    others = Counter(siblings("overlapping_boxes")) - Counter([mine])
    assert 0.3 <= max(iou(mine, b) for b in others) < 0.5


@pytest.mark.spec("BX5")
def test_the_ledgers_wrong_records_are_on_the_disk(planted):
    note = load(planted["area_mismatch"])["annotations"][0]
    assert note["area"] != note["bbox"][2] * note["bbox"][3]
    im = load(planted["dl_idx_mismatch"])["images"][0]
    assert int(im["dl_idx"]) != int(im["drug_N"][2:]) - 1
    im = load(planted["code_mismatch"])["images"][0]
    assert im["dl_mapping_code"] != im["drug_N"]
    im = load(planted["metadata_conflict"])["images"][0]
    assert {
        load(p)["images"][0]["dl_company"] == im["dl_company"]
        for p in planted["metadata_conflict"].parent.glob("*.json")
        if p not in planted.values()
    } == {False}
    with pytest.raises(json.JSONDecodeError):
        load(planted["json_unparsable"])
    with pytest.raises(UnicodeDecodeError):
        load(planted["json_cp949"])
    assert json.loads(planted["json_cp949"].read_text("cp949"))["images"][0]["drug_S"] == "정상알약"


@pytest.mark.spec("BX5")
def test_the_ledgers_missing_and_broken_files_are_on_the_disk(spoilt, planted):
    out, _ = spoilt

    def photo(label):
        return next(iter((out / "data/train/images").rglob(label.stem + ".png")), None)

    assert photo(planted["json_without_image"]) is None and planted["json_without_image"].is_file()
    assert (
        not list((out / "data/train/labels").rglob(planted["image_without_json"].stem + ".json"))
        and planted["image_without_json"].is_file()
    )
    assert not planted["incomplete_combo"].exists() and photo(planted["incomplete_combo"]) is not None
    assert (
        planted["photo_truncated"].read_bytes()[:4] == b"\x89PNG" and cv2.imread(str(planted["photo_is_text"])) is None
    )
    assert planted["hidden_file"].with_name("._" + planted["hidden_file"].name).is_file()
    assert planted["index_picture"].with_name(planted["index_picture"].stem + "_index.png").is_file()
    for f in ("duplicate_annotation", "duplicate_photo"):
        assert Path(str(planted[f]).replace("_1_", "_99_", 1)).read_bytes() == planted[f].read_bytes()


@pytest.mark.spec("BX5")
def test_nothing_else_is_wrong(spoilt):
    out, ledger = spoilt
    planted = {out / p for [p] in ledger["planted_faults"].values()}
    clean = plan_delivery(**{k: ledger[k] for k in ("drugs", "photos", "combos", "seed", "width", "height")})
    for t in clean.tasks:
        touched = {out / t.image, *(out / label for label, _ in t.labels)} & planted
        if touched:
            continue
        files = render_task(t)
        assert all((out / p).read_bytes() == b for p, b in files.items()), (
            "a photo without a planted fault is the photo of the clean delivery"
        )
        break
    extra = {p.relative_to(out).as_posix() for p in (out / "data").rglob("*") if p.is_file()} - {
        p for t in clean.tasks for p in (t.image, *(label for label, _ in t.labels))
    }
    assert len(extra) == 4, "hidden file, index picture, two duplicates"
    missing = {p for t in clean.tasks for p in (t.image, *(label for label, _ in t.labels)) if not (out / p).exists()}
    assert len(missing) == 3, "a photo, a single's label, a combo's label"


@pytest.mark.spec("BX4", "BX5")
def test_the_truth_guard_counts_what_was_planted(spoilt):
    from pillsnap.delivery.truth import audit

    out, ledger = spoilt
    a = audit(out / "data/train/labels", out / "data/train/images")
    for key in (
        "unparsable",
        "incomplete_photos",
        "missing_pills",
        "boxes_outside",
        "identical_box_photos",
        "overlapping_box_photos",
        "area_mismatch",
        "dl_idx_mismatch",
        "code_mismatch",
        "metadata_conflicts",
        "json_without_image",
    ):
        assert a[key] == 1, key
    assert (
        a["null_metadata_drugs"] == ledger["null_metadata"]
        and a["drugs"] == ledger["drugs"]
        and sum(a["edi_codes_per_drug"].values()) == ledger["drugs"]
    )


# ---- the command
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_says_where_things_are(tmp_path, capsys):
    ledger = synth_command(tmp_path / "d", **TINY, faults=False, workers=1)
    said = capsys.readouterr().out
    sheet = cv2.imread(str(tmp_path / "d" / "contact_sheet.png"))
    assert str(tmp_path / "d" / "contact_sheet.png") in said and "SYNTHETIC.json" in said and "1 twin pairs" in said
    assert (
        sheet is not None and sheet.shape[0] > 300 and sheet.shape[1] > 800 and ledger["counts"]["train_single"] == 24
    )


@pytest.mark.parametrize("drugs, combos", [(1, 0), (2, 0), (3, 1), (4, 5), (7, 40)])
def test_the_default_number_of_combinations_fits_the_drugs(tmp_path, capsys, drugs, combos):
    from pillsnap.cli import main

    with pytest.raises(SystemExit) as e:
        main(
            [
                "synth",
                "--out",
                str(tmp_path / "d"),
                "--drugs",
                str(drugs),
                "--photos",
                "2",
                "--width",
                "98",
                "--height",
                "128",
                "--workers",
                "1",
                "--labels-only",
            ]
        )
    assert e.value.code == 0
    ledger = json.loads((tmp_path / "d" / "SYNTHETIC.json").read_text(encoding="utf-8"))
    assert ledger["combos"] == combos and ledger["counts"]["train_combo"] == 3 * combos
    assert (f"{combos} instead of 40, because {drugs} drugs give no more" in capsys.readouterr().out) == (combos < 40)


@pytest.mark.spec("BX9")
def test_objects_of_the_families_share_nothing(tmp_path):
    "Neither a pixel nor a make; the command writes what the function draws, and the same seed the same bytes."
    from pillsnap.synth.objects import FAMILIES, OBJECTS, object_photos, write_objects

    runs = [write_objects(tmp_path / k, len(OBJECTS), 96, 128, seed=3) for k in "ab"]
    assert runs[0] == runs[1] and set(runs[0].values()) == set(OBJECTS) and len(runs[0]) == 2 * len(OBJECTS)
    for path in runs[0]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes()
    drawn = {f: list(object_photos(24, f, 96, 128)) for f in FAMILIES}
    pixels = [p.image.tobytes() for photos in drawn.values() for p in photos if p.kind != "plain"]
    assert len(drawn) == 3 and len(set(pixels)) == len(pixels) == 3 * 21
    assert not any(path.startswith("sealed") for path in runs[0]), "what the final test draws is not written"
    for kind in OBJECTS:
        if kind not in ("plain", "noise"):
            assert all(p.image.std() > 1 for p in drawn["test"] if p.kind == kind), kind
