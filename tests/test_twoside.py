"Answers from both sides of a pill: twins that only the back tells apart, and what must never be named."

import io
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from sklearn.linear_model import LogisticRegression

from pillsnap.core.errors import PillsnapError
from pillsnap.core.settings import AnswerSettings
from pillsnap.delivery.capture import Capture, capture_group
from pillsnap.delivery.classmap import ClassMap
from pillsnap.deployment.runtime import load_bundle
from pillsnap.evaluation.calibration import fit_temperature
from pillsnap.evaluation.conformal import ScoredPhotos, fit_answer_rule
from pillsnap.evaluation.intervals import group_bootstrap
from pillsnap.evaluation.pairs import SidePhotos, answer_pairs, fit_pair_rule, paired_photos
from pillsnap.models.cardview import sides_alone
from pillsnap.models.decision import AnswerRule
from pillsnap.models.pipeline import answer_schema, softmax
from pillsnap.models.twoside import PairRule, decide_pair, same_shot
from pillsnap.photos.images import crop_view
from pillsnap.photos.locator import locate
from pillsnap.synth.catalogue import make_catalogue
from pillsnap.synth.draws import rng_for
from pillsnap.synth.renderer import Shot, photograph
from pillsnap.synth.tasks import Session, single_task

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "campaigns"))
from server_parts import PILLS, pill_photo, two_sided_bundle

SETTINGS = AnswerSettings(alpha=0.1)  # twelve pairs of calibration groups; .05 needs twenty
PARTS = ("train", "calib", "clean")


def seen(task) -> np.ndarray:
    "Where the edges of a rendered pill run: eight directions in 64 cells of its crop."
    image, _ = photograph(list(task.pills), task.shot, rng_for(*task.words, "photo"))
    down, right = np.gradient(crop_view(image, locate(image).boxes[0], 64).astype(np.float32).mean(2))
    direction = np.minimum((np.arctan2(down, right) % np.pi / np.pi * 8).astype(int), 7)
    found, cell = np.zeros((8, 8, 8)), np.mgrid[:64, :64] // 8
    np.add.at(found, (*cell, direction), np.hypot(down, right))
    found = np.sqrt(found)
    return (found / (np.linalg.norm(found, axis=2, keepdims=True) + 5)).ravel()


@pytest.fixture(scope="module")
def twins() -> SidePhotos:
    "Two pairs of drugs with one front each: logits of 288 rendered photos by a classifier trained on a third of them."
    drugs = list(make_catalogue(4, seed=5, twins=2, blank=False, back_twins=2))
    session, rows = Session("train", Shot(width=244, height=320), 5), []
    for (label, drug), side, back, light, latitude in product(
        enumerate(drugs), (0, 1), range(3), range(3), (60, 70, 75, 90)
    ):
        capture = Capture((drug.kcode,), 0, back, side, light, latitude, 0, 200)
        task = single_task(drug, label, capture, session)
        rows.append((seen(task), label, task.image, capture_group(capture), PARTS[(back + light) % 3]))
    x, labels, paths, groups, parts = map(list, zip(*rows))
    fit = np.array(parts) == "train"
    model = LogisticRegression(C=0.1, max_iter=300).fit(np.array(x)[fit], np.array(labels)[fit])
    return SidePhotos(model.decision_function(np.array(x)), np.array(labels), paths, groups, parts)


@pytest.fixture(scope="module")
def answered(twins):
    "The rules, fitted to the calibration photos, and their answers to the clean pairs."
    calib = np.array(twins.parts) == "calib"
    t = fit_temperature(twins.logits[calib], twins.labels[calib])
    photos = ScoredPhotos(softmax(twins.logits, t), twins.labels, twins.groups, twins.paths, twins.parts)
    clusters = ["white", "yellow", "yellow", "white"]  # by K-code
    sides = fit_answer_rule(photos, clusters, SETTINGS, t)
    pairs = paired_photos(twins)
    return answer_pairs(twins, pairs, sides, fit_pair_rule(twins, pairs, sides, clusters, SETTINGS))


@pytest.mark.spec("BX16")
def test_twins_with_one_front_are_told_apart_by_both_sides_and_not_by_one(answered):
    t, units = answered.table, answered.table["unit"]
    assert answered.rule.fused is not None and (len(t), units.nunique()) == (48, 12)
    gained = (t["right"].astype(float) - t["front_right"]).to_numpy()
    low, _ = group_bootstrap(lambda at: {"gain": float(gained[at].mean())}, units)["gain"]
    assert low > 0.2 and t["right"].mean() > 0.95 and t["front_right"].mean() < 0.7
    assert (t["front_answer"] == "drug").mean() < 0.2 < 0.8 < (t["answer"] == "drug").mean()
    named = t[t["answer"] == "drug"]
    assert named["right"].all() and t["covered"].mean() >= 0.9


@pytest.mark.spec("BX16")
def test_no_photo_and_no_capture_group_is_in_two_pairs(twins):
    pairs = paired_photos(twins)
    used = [*pairs["front"], *pairs["back"]]
    assert len(used) == len(set(used)) == 288 and pairs["same_setting"].all()
    for side in ("front", "back"):
        groups = {(unit, twins.groups[i]) for unit, i in zip(pairs["unit"], pairs[side])}
        assert len(groups) == pairs["unit"].nunique() == len({g for _, g in groups})


@pytest.mark.spec("BX16")
def test_without_pairs_there_is_no_rule_of_pairs_and_no_promise(twins):
    "Photos whose names say no side, and a few calibration pairs."
    sides, clusters = AnswerRule("lac", 0.1, (0.9,) * 4), ["all"] * 4
    nameless = replace(twins, paths=[f"photo_{i}.jpg" for i in range(len(twins.paths))])
    pairs = paired_photos(twins)
    units = pairs.loc[pairs["part"] == "calib", "unit"].unique()
    left = pairs[(pairs["part"] != "calib") | pairs["unit"].isin(units[:4])]
    for photos, table, n in ((nameless, paired_photos(nameless), 0), (twins, left, 4)):
        with pytest.raises(PillsnapError, match=f"there are {n} pairs of calibration groups .* 5 are needed"):
            fit_pair_rule(photos, table, sides, clusters, SETTINGS)
    five = pairs[(pairs["part"] != "calib") | pairs["unit"].isin(units[:5])]
    assert fit_pair_rule(twins, five, sides, clusters, SETTINGS).groups == 5


@pytest.mark.spec("BX16")
def test_no_known_drug_need_be_refused(twins):
    "The settings allow a share of 0: then a pair is held to the threshold of single photos."
    unknown = {"threshold": 7.0}
    photos = replace(twins, unknown=np.linspace(0, 1, len(twins.paths)))
    none = AnswerSettings(alpha=0.1, unknown_refused=0)
    sides, pairs = AnswerRule("lac", 0.1, (0.9,) * 4, unknown=unknown), paired_photos(twins)
    assert fit_pair_rule(photos, pairs, sides, ["all"] * 4, none).unknown == 7.0


@pytest.mark.spec("BX16")
def test_clean_photos_fit_nothing(twins):
    "Whatever the clean photos show, the rule of pairs is the same."
    calib, clusters = np.array(twins.parts) == "calib", ["all"] * 4
    t, pairs = fit_temperature(twins.logits[calib], twins.labels[calib]), paired_photos(twins)
    other = replace(twins, logits=np.where(calib[:, None], twins.logits, -3 * twins.logits))
    assert len(pairs[pairs["part"] == "clean"]) == 48
    sides = AnswerRule("lac", 0.1, (0.9,) * 4, temperature=t)
    first, second = (fit_pair_rule(p, pairs, sides, clusters, SETTINGS) for p in (twins, other))
    assert first == second and first.fused is not None


@pytest.mark.spec("BX16")
def test_two_drugs_in_two_photos_are_refused(answered):
    refused = answered.mixed["answer"] == "unknown"
    assert refused.mean() >= 0.9 and (answered.mixed["answer"] == "drug").mean() <= 0.05
    assert (answered.mixed.loc[refused, "reason"] == "contradiction").all()


@pytest.mark.spec("BX16")
def test_sets_of_pairs_hold_the_drug_as_often_as_asked():
    "Calibration and clean pairs of a doubtful classifier, with thresholds of pairs and without."
    rng, classes, n = np.random.default_rng(0), 6, 200
    labels = rng.integers(0, classes, 2 * n)
    sides = rng.normal(size=(2, 2 * n, classes)) * 1.5
    sides[:, np.arange(2 * n), labels] += 2.0
    codes = [f"K-{i:06d}" for i in range(2 * n)]
    names = [Capture((code,), 0, 0, side, 0, 90, 0, 200).stem() for side in (0, 1) for code in codes]
    parts = (["calib"] * n + ["clean"] * n) * 2
    photos = SidePhotos(np.concatenate(sides), np.r_[labels, labels], names, names, parts)
    t, clusters = fit_temperature(photos.logits, photos.labels), ["all"] * classes
    alone = ScoredPhotos(softmax(photos.logits, t), photos.labels, names, names, parts)
    single, pairs = fit_answer_rule(alone, clusters, AnswerSettings(), t), paired_photos(photos)
    own = answer_pairs(photos, pairs, single, fit_pair_rule(photos, pairs, single, clusters, AnswerSettings())).table
    shared = answer_pairs(photos, pairs, single, PairRule(2 * t)).table
    assert len(own) > 150 and own["covered"].mean() > 0.91 and shared["covered"].mean() > 0.86
    assert own["set_size"].mean() < 0.6 * classes  # not by holding every drug


@pytest.mark.spec("BX16")
def test_one_side_photographed_twice_keeps_what_both_photos_leave_open():
    "Photos of one side err alike; the rule of pairs is fitted to fronts and backs, which do not."
    rng, classes, n = np.random.default_rng(0), 6, 600
    labels = np.tile(rng.integers(0, classes, 2 * n), 3)
    error = rng.normal(size=(2, 2 * n, classes)) * 1.5
    logits = np.concatenate([*error, error[0]]) + rng.normal(size=(6 * n, classes)) * 0.3  # front, back, front again
    logits[np.arange(6 * n), labels] += 3.0
    names = [Capture((f"K-{i:06d}",), 0, 0, side, 0, 90, 0, 200).stem() for side in (0, 1) for i in range(2 * n)]
    parts = (["calib"] * n + ["clean"] * n) * 2
    photos, clusters = SidePhotos(logits[: 4 * n], labels[: 4 * n], names, names, parts), ["all"] * classes
    calib = np.array(parts) == "calib"
    t = fit_temperature(photos.logits[calib], photos.labels[calib])
    alone = ScoredPhotos(softmax(photos.logits, t), photos.labels, names, names, parts)
    sides, pairs = fit_answer_rule(alone, clusters, AnswerSettings(), t), paired_photos(photos)
    rule = fit_pair_rule(photos, pairs, sides, clusters, AnswerSettings())
    told = [decide_pair(logits[[i, 4 * n + i]], sides, rule) for i in range(n, 2 * n)]
    y = labels[n : 2 * n]
    wrong = [d.said.answer == "drug" and d.said.ids[0] != k for d, k in zip(told, y)]
    assert rule.fused is not None and rule.calibrated
    assert np.mean([d.member[k] for d, k in zip(told, y)]) > 0.95 and np.mean(wrong) < 0.015
    assert np.mean([d.member.mean() for d in told]) < 0.6  # not by holding every drug


@pytest.mark.spec("BX16")
def test_one_shot_saved_twice_is_no_front_and_back():
    "Copies of a shot are told from two photos of a pill whose sides look alike, turned over or not."
    drugs, shot = make_catalogue(4, seed=5, twins=0, blank=False).drugs, Shot(width=320, height=419)

    def taken(drug, side, seed):
        capture = Capture((drug.kcode,), 0, seed % 3, side, seed % 2, 90, 0, 200)
        task = single_task(drug, 0, capture, Session("train", shot, seed))
        return photograph(list(task.pills), task.shot, rng_for(*task.words, "photo"))[0]

    def copy(photo, kind, scale, quality):
        image, content = Image.fromarray(photo), io.BytesIO()
        image.resize([round(scale * s) for s in image.size]).save(content, kind, quality=quality)
        return np.array(Image.open(content))

    for seed, drug in enumerate(drugs):
        body = replace(drug.body, score=("", ""), shape="원형", long_mm=8, short_mm=8, profile="convex", coat="film")
        blank = replace(drug, body=body, imprint=replace(drug.imprint, front="", back="", mark=0))
        front, back, again = taken(blank, 0, seed), taken(blank, 1, seed), taken(blank, 0, seed + 6)
        for how in (("JPEG", 1, 95), ("JPEG", 1, 40), ("JPEG", 0.5, 75), ("WEBP", 1, 60), ("JPEG", 1.4, 80)):
            assert same_shot(front, copy(front, *how)), how
        assert not same_shot(front, back) and not same_shot(front, again) and not same_shot(front, copy(back, *how))


@pytest.mark.spec("BX16")
def test_the_photo_that_spoils_a_pair_is_named():
    sides = AnswerRule("lac", 0.05, (0.9,) * 3, least_sharpness=0.4)
    rule, sure = PairRule(1.0, unknown=3.0), [[5.0, 0.0, 0.0]] * 2
    for unknown, sharp, reason in (
        ((4, 1), (1, 1), "unknown_score_front"),
        ((1, 4), (1, 1), "unknown_score_back"),
        ((1, 1), (0.1, 1), "unsharp_front"),
        ((1, 1), (1, 0.1), "unsharp_back"),
        ((1, 1), (1, 1), "one_drug"),
    ):
        assert decide_pair(sure, sides, rule, unknown, sharp).said.reason == reason


@pytest.mark.spec("BX16", "BX3")
def test_a_photo_of_several_pills_spoils_a_pair():
    "Nobody can say whose other side the second photo shows; the photo is named."
    rule = AnswerRule("lac", 0.1, (0.9, 0.9))
    logits = np.array([[9.0, 0.0], [9.0, 0.0]])
    said = [decide_pair(logits, rule, PairRule(1.0), pills=p).said for p in ((1, 1), (0, 1), (3, 1), (1, 2), (2, 2))]
    assert [s.answer for s in said] == ["drug", "drug", "unknown", "unknown", "unknown"]
    assert [s.reason for s in said[2:]] == ["several_pills_front", "several_pills_back", "several_pills"]


@pytest.mark.spec("BX16", "BX3")
@pytest.mark.parametrize("wrong", ["blurred", "two pills"])
def test_a_photo_that_gets_no_answer_shows_no_drug_beside_another_photo(tmp_path, wrong):
    "What the front is refused for alone, it is refused for in a pair: the card names no drug for it."
    rule = AnswerRule("lac", 0.05, (0.8,) * 3, max_list=2, temperature=0.5, least_sharpness=0.4)
    rule = replace(rule, class_map=ClassMap(tuple(PILLS)).fingerprint)
    bundle = load_bundle(two_sided_bundle(tmp_path / "export", rule=rule), device="cpu")
    pill, back = Image.open(io.BytesIO(pill_photo())), pill_photo(size=(300, 260))
    front = pill.filter(ImageFilter.GaussianBlur(14))
    if wrong == "two pills":
        front = Image.new("RGB", (480, 320), (150, 150, 150))
        front.paste(pill, (0, 0))
        front.paste(pill, (240, 0))
    alone = bundle.predict(np.asarray(front), "single")["items"][0]["reason"]
    assert alone == {"blurred": "unsharp", "two pills": "several_pills"}[wrong]
    answer = bundle.predict_sides(np.asarray(front), back)
    assert answer["answer"] == "unknown" and [p["set_size"] for p in answer["photos"]] == [0, 1]
    told = sides_alone(answer)
    assert told[0] == "앞면 사진만 보면: 기준을 통과한 약이 없습니다" and "약 K-000002" in told[1]


@pytest.mark.spec("BX16")
def test_an_answer_says_two_side_or_nothing_of_it():
    schema = json.loads(json.dumps(answer_schema()))
    assert schema["properties"]["two_side"] == {"const": True} and "two_side" not in schema["required"]
