"Photos that a person should look at: listed with mode, view, answer and reason, pictures bounded in number."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pillsnap.core.config import load_config
from pillsnap.core.jobs import RunFolder
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation import hardcases as H
from pillsnap.evaluation.answers import Answers, ComboAnswer, Combos, Evaluator, Scores
from pillsnap.evaluation.measurements import Measurements
from pillsnap.evaluation.openset import OpenSet
from pillsnap.evaluation.safeanswers import SafeAnswers
from pillsnap.models.decision import AnswerRule
from pillsnap.models.pipeline import BADGE, Pipeline
from pillsnap.models.unknown import UnknownRule, UnknownScore, unknown_rule_to_dict

KEYS = [f"K-{i:06d}" for i in range(1, 7)]
CONTRACT = {"gating_score", "mode_used", "mode_requested", "single_confidence", "fallback_reason", "view", "reason"}


class Size:
    size = 16


def singles(n, sure=9.0):
    "Photos of the first drug; the classifier's logits favour drug i."
    logits = np.zeros((n, 6))
    logits[np.arange(n), np.arange(n) % 6] = sure
    same = {"groups": ["g"] * n, "parts": ["clean"] * n, "modes": ["single"] * n, "views": ["crop"] * n}
    boxes = [np.array([4.0, 4, 30, 24])] * n
    paths = [f"{i:03d}.png" for i in range(n)]
    return Scores(
        logits, logits, logits, np.zeros(n, int), paths=paths, boxes=boxes, seconds=1.0, found=[1] * n, **same
    )


def rows(scores, *rule, unknown=None):
    return H.hard_singles(Answers(KEYS, 1.0, scores, None, None), *rule, unknown=unknown)


@pytest.mark.spec("EV4")
def test_a_single_is_listed_for_its_badge_its_answer_or_its_mode():
    sure = singles(1)
    assert rows(sure) == []
    (low,) = rows(singles(1, sure=0.1))
    assert low["hints"] == ["low_confidence"] and low["badge"] == BADGE and low["single_confidence"] < 0.3
    (several,) = rows(replace(sure, found=[3], views=["whole"], boxes=[None]))
    assert several["hints"] == ["multi_object_hint"] and several["view"] == "whole" and several["boxes"] == []
    (misrouted,) = rows(replace(sure, modes=["combo"]))
    assert (misrouted["mode_requested"], misrouted["mode_used"]) == ("single", "combo") and misrouted["badge"] is None
    for row in (low, several, misrouted):
        assert set(row) >= CONTRACT and row["fallback_reason"] is None and row["gating_score"] is None


@pytest.mark.spec("EV4")
def test_what_the_answer_rule_says_is_what_is_listed():
    "No drug, a short list, or an unknown drug; one drug is no hard case."

    def rule(threshold):
        return AnswerRule("lac", 0.05, (threshold,) * 6, unknown={"threshold": 5.0})

    flat = singles(1, sure=2.0)
    assert rows(flat, rule(0.5)) == []
    (listed,) = rows(flat, replace(rule(0.99), max_list=6))
    assert listed["answer"] == "shortlist" and listed["shortlist"] == KEYS and listed["reason"] == "several_drugs"
    (empty,) = rows(flat, rule(0.1))
    assert (empty["answer"], empty["reason"], empty["shortlist"]) == ("unknown", "empty_set", [])
    (strange,) = rows(flat, rule(0.5), unknown=[6.0])
    assert (strange["answer"], strange["reason"]) == ("unknown", "unknown_score")


@pytest.mark.spec("EV4", "BX9")
def test_an_evaluation_lists_the_reason_that_the_product_gives(tmp_path):
    "The unknown scores of the evaluation reach the lists, photo by photo, in whatever part the photo is."
    scores = singles(4)
    for path in scores.paths:
        Image.fromarray(np.full((60, 90, 3), 90, np.uint8)).save(tmp_path / path)
    unknown = UnknownRule(UnknownScore("max_logit"), 1.0, 0.02)
    rule = AnswerRule("lac", 0.05, (0.5,) * 6, unknown=unknown_rule_to_dict(unknown))
    by_path = dict(zip(reversed(scores.paths), (0.5, 3.0, 0.0, 2.0)))
    found = OpenSet(unknown, *[pd.DataFrame()] * 3, {}, {}, by_path)
    measured = Measurements(
        data=None,
        prov=None,
        photos=[],
        answers=Answers(KEYS, 1.0, replace(scores, parts=["val", "calib", "clean", "clean"]), None, None),
        calibration=None,
        per_class=pd.DataFrame(),
        metrics={},
        latency=[],
        timings={},
        skipped={},
        no_detector="",
        loading_s=0.0,
        evaluator=Evaluator(Pipeline(Size(), ClassMap(KEYS)), tmp_path, load_config("smoke").data),
        safe=SafeAnswers(rule, pd.DataFrame()),
        open_set=found,
    )
    files, _ = measured.keep_hard_cases(RunFolder(tmp_path / "run", "evaluation"))
    listed = [json.loads(x) for x in files[0].read_text(encoding="utf-8").splitlines()]
    refused = {r["path"] for r in listed if r["reason"] == "unknown_score"}
    assert refused == {path for path, u in by_path.items() if u > 1} and len(refused) == 2
    measured.open_set = None
    files, _ = measured.keep_hard_cases(RunFolder(tmp_path / "run", "evaluation"))
    assert files[0].read_text(encoding="utf-8") == ""


@pytest.mark.spec("EV4")
def test_pictures_are_bounded_and_belong_to_the_worst_cases(tmp_path):
    scores = singles(9, sure=0.5)  # photo 0 is named rightly, the others are wrong
    scores.single[5, 5] = 0.7
    for path in (*scores.paths, "combo.png"):
        Image.fromarray(np.full((600, 900, 3), 90, np.uint8)).save(tmp_path / path)
    items = [{"kcode": KEYS[0], "confidence": 0.9, "box": [10, 10, 90, 90]}] * 3
    combos = Combos([ComboAnswer("combo.png", True, False, 3, 3, 2, 0, "combo", "combo", items)], 1.0)
    answers = Answers(KEYS, 1.0, scores, None, combos)
    evaluator = Evaluator(Pipeline(Size(), ClassMap(KEYS)), tmp_path, load_config("smoke").data)
    folder = tmp_path / "hard_cases"
    for most in (100, 4):
        files, counts = H.save_hard_cases(answers, evaluator, folder, most)
        single, combo = ([json.loads(x) for x in f.read_text(encoding="utf-8").splitlines()] for f in files)
        pictures = [p for r in (*single, *combo) for p in (r["input"], *r["crops"]) if p]
        assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.jpg")) == sorted(pictures)
        assert counts == {"hard_cases": 10, "badges": 9} and len(single) == 9
    kept = [r["path"] for r in single if r["input"]]
    assert len(kept) == 4 and "005.png" in kept and "000.png" not in kept
    assert len(combo[0]["crops"]) == 3 and combo[0]["fallback_reason"] == "manual_combo"
    assert all(max(Image.open(folder / p).size) <= 640 for p in pictures)


def test_a_hard_photo_that_is_gone_has_no_picture_and_stops_nothing(tmp_path):
    answers = Answers(KEYS, 1.0, singles(2, sure=0.1), None, None)
    evaluator = Evaluator(Pipeline(Size(), ClassMap(KEYS)), tmp_path, load_config("smoke").data)
    files, counts = H.save_hard_cases(answers, evaluator, tmp_path / "hard_cases", 5)
    assert counts["hard_cases"] == 2
    assert [json.loads(x)["input"] for x in files[0].read_text(encoding="utf-8").splitlines()] == [None, None]
