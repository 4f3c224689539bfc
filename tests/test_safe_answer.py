"""One drug, a short list, or no answer: what is promised, what is stored, what is answered."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.core.errors import PillsnapError
from pillsnap.core.records import Provenance
from pillsnap.core.settings import AnswerSettings
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.conformal import (
    ScoredPhotos,
    draw_one_each,
    fit_answer_rule,
    group_threshold,
    least_groups,
    library_threshold,
)
from pillsnap.evaluation.safeanswers import Classes, SafeAnswers, answer_photos
from pillsnap.models.decision import AnswerRule, decide_answer, prediction_sets
from pillsnap.models.pipeline import Pipeline, softmax

pytest.importorskip("mapie")
PER_GROUP = 6


def world(rng, groups, classes=12, noise=0.3, start=0, part="calib"):
    "Photos of capture groups: near-copies of one view each."
    y = rng.integers(classes, size=groups)
    z = rng.normal(0, 1.6, (groups, classes))
    z[np.arange(groups), y] += 5
    z = z[:, None] + rng.normal(0, noise, (groups, PER_GROUP, classes))
    n = groups * PER_GROUP
    names = [f"K-{start + i:06d}_1_0_0" for i in range(groups) for _ in range(PER_GROUP)]
    paths = [f"K-{start + i:06d}_0_{i % 3}_0_{i % 3}_60_{20 * j:03d}_200.png" for i in range(groups) for j in range(6)]
    return ScoredPhotos(softmax(z.reshape(n, classes)), np.repeat(y, PER_GROUP), names, paths, [part] * n)


def joined(*parts):
    lists = ([v for s in parts for v in getattr(s, k)] for k in ("groups", "paths", "parts"))
    return ScoredPhotos(np.concatenate([s.p for s in parts]), np.concatenate([s.labels for s in parts]), *lists)


@st.composite
def calibration(draw):
    "Probabilities with ties, zeros and labels that no photo shows."
    n, c = draw(st.integers(25, 60)), draw(st.integers(3, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    p = rng.dirichlet(np.full(c, draw(st.sampled_from([0.05, 0.3, 2.0]))), n + 20)
    if draw(st.booleans()):
        p = np.round(p * 20) + (p >= p.max(1, keepdims=True))  # equal probabilities, and zeros
        p = p / p.sum(1, keepdims=True)
    return p[:n], rng.integers(c, size=n), p[n:]


@pytest.mark.spec("BX3")
@settings(max_examples=60, deadline=None)
@given(calibration(), st.sampled_from(["lac", "aps", "raps"]), st.sampled_from([0.1, 0.2]))
def test_the_stored_numbers_give_the_sets_of_the_library(data, score, alpha):
    from mapie.classification import SplitConformalClassifier

    from pillsnap.evaluation.conformal import _given

    p, y, new = data
    try:
        fit = library_threshold(p, y, score, alpha)
    except ValueError:
        assert score == "raps"  # it needs two photos of each drug, to choose its penalty
        return
    rule = AnswerRule(score, alpha, (fit.threshold,) * p.shape[1], penalty=fit.penalty, free=fit.free)
    rule = AnswerRule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert max(abs(t - fit.threshold) for t in rule.thresholds) <= 1e-9
    if len(set(y)) < 3 and score != "lac":
        return  # two drugs: the library alone refuses them
    library = SplitConformalClassifier(_given(p.shape[1]), 1 - alpha, score, prefit=True, random_state=0)
    expected = library.conformalize(p, y).predict_set(new)[1][:, :, 0]
    assert (prediction_sets(new, rule) == expected).all()


@pytest.mark.spec("BX3")
@pytest.mark.parametrize("n", [20, 21, 39, 40, 59, 199])
def test_the_threshold_has_the_rank_of_the_theory(n):
    "The ceil((n + 1)(1 - alpha))-th smallest score, and neither neighbour."
    rng = np.random.default_rng(n)
    p = rng.dirichlet(np.ones(7), n)
    y = rng.integers(7, size=n)
    ranked = np.sort(1 - p[np.arange(n), y])
    rank = math.ceil((n + 1) * 0.95 - 1e-9)
    found = group_threshold(p, y, np.array([f"g{i}" for i in range(n)]), "lac", 0.05).threshold
    assert int(np.searchsorted(ranked, found)) + 1 == rank and found == ranked[rank - 1]
    with pytest.raises(ValueError, match="too low"):
        library_threshold(p[: least_groups(0.05) - 1], y[: least_groups(0.05) - 1], "lac", 0.05)


@pytest.mark.spec("BX3")
@pytest.mark.parametrize("score", ["lac", "aps"])
def test_sets_hold_the_true_drug_in_as_many_new_groups_as_promised(score):
    "Exchangeable groups of near-copies: coverage over many repetitions, counted by photos of new groups."
    rng, held, alone = np.random.default_rng(3), [], [f"c{i}" for i in range(12)]
    for _ in range(25):
        rule = fit_answer_rule(world(rng, 40), alone, AnswerSettings(alpha=0.1, score=score))
        new = world(rng, 200, start=1000, part="clean")
        held.append(prediction_sets(new.p, rule)[np.arange(len(new.p)), new.labels].mean())
    assert np.mean(held) >= 0.9 - 2.5 * np.std(held) / 5, np.mean(held)
    assert score != "lac" or np.mean(held) <= 0.94  # and no more than it has to


@pytest.mark.spec("BX3")
def test_a_capture_group_counts_once_however_many_photos_it_has():
    "Copies of a group's photos change neither the threshold nor the number of groups; counted by photo they would."
    rng = np.random.default_rng(8)
    calib, alone = world(rng, 40, noise=0.0), [f"c{i}" for i in range(12)]
    worst = np.argsort(calib.p[np.arange(240), calib.labels])[:PER_GROUP]
    at = np.concatenate([np.arange(240), np.tile(worst, 200)])
    many = ScoredPhotos(
        calib.p[at], calib.labels[at], *([v[i] for i in at] for v in (calib.groups, calib.paths, calib.parts))
    )
    once, often = (fit_answer_rule(s, alone, AnswerSettings(alpha=0.1, score="lac")) for s in (calib, many))
    assert (often.thresholds, often.groups) == (once.thresholds, 40)
    assert library_threshold(many.p, many.labels, "lac", 0.1).threshold > once.thresholds[0] + 1e-6
    assert draw_one_each(many.groups, 5).shape == (5, 40)


@pytest.mark.spec("BX3")
def test_a_view_is_too_unsharp_below_two_thirds_of_the_least_sharp_calibration_photo():
    "The sharpest photo says nothing about the limit, and neither do photos of other parts."
    rng, alone = np.random.default_rng(6), [f"c{i}" for i in range(12)]
    calib, clean = world(rng, 40), world(rng, 40, start=1000, part="clean")
    measured = [*np.linspace(0.3, 0.9, 240), *np.full(240, 0.01)]
    rule = fit_answer_rule(replace(joined(calib, clean), sharp=measured), alone, AnswerSettings(alpha=0.1, score="lac"))
    assert rule.least_sharpness == pytest.approx(0.2)
    sure = np.full(12, 1e-6)
    sure[3] = 1 - 11e-6
    assert [decide_answer(sure, None, rule, s).reason == "unsharp" for s in (0.19, 0.21)] == [True, False]


@pytest.mark.spec("BX3")
def test_only_calibration_photos_fit_the_rule():
    "The clean and the validation photos may hold anything; a group in two parts is refused."
    rng, alone = np.random.default_rng(4), [f"c{i}" for i in range(12)]
    calib = world(rng, 40)
    others = [world(rng, 40, start=1000 * k, part=part) for k, part in ((1, "clean"), (2, "val"))]
    rule = fit_answer_rule(joined(calib, *others), alone, AnswerSettings(alpha=0.1, score="lac"))
    spoilt = [ScoredPhotos(np.full_like(o.p, 1 / 12), o.labels, o.groups, o.paths, o.parts) for o in others]
    assert fit_answer_rule(joined(*spoilt, calib), alone, AnswerSettings(alpha=0.1, score="lac")) == rule
    for o in others:
        both = ScoredPhotos(o.p, o.labels, [calib.groups[0], *o.groups[1:]], o.paths, o.parts)
        with pytest.raises(PillsnapError, match="in the part 'calib' and in another one"):
            fit_answer_rule(joined(calib, both), alone, AnswerSettings(alpha=0.1, score="lac"))
    with pytest.raises(PillsnapError, match="0 calibration groups"):
        fit_answer_rule(joined(*others), alone, AnswerSettings(alpha=0.1, score="lac"))


@pytest.mark.spec("BX3")
def test_twins_share_one_threshold_and_their_groups():
    "Each twin has too few groups for a threshold of its own; the cluster of both has enough."
    rng = np.random.default_rng(5)
    drug = np.arange(96) % 8
    z = rng.normal(0, 1, (96, 8))
    z[np.arange(96), drug] += 6
    z[drug < 2, 1 - drug[drug < 2]] += 5.5
    p = softmax(np.repeat(z, PER_GROUP, 0))
    n = len(p)
    groups = [f"g{i}" for i in range(96) for _ in range(PER_GROUP)]
    photos = ScoredPhotos(p, np.repeat(drug, PER_GROUP), groups, groups, ["calib"] * n)
    rule = fit_answer_rule(photos, ["twins", "twins", *"cdefgh"], AnswerSettings(alpha=0.05, score="lac"))
    assert rule.clusters["twins"] == {"drugs": 2, "groups": 24, "threshold": rule.thresholds[0]}
    assert rule.thresholds[0] == rule.thresholds[1] != rule.thresholds[2]
    assert len(set(rule.thresholds[2:])) == 1  # 12 groups each: the threshold of all groups
    size = prediction_sets(p, rule).sum(1)
    assert size[np.repeat(drug, PER_GROUP) < 2].mean() > 1.3 and size[np.repeat(drug, PER_GROUP) > 1].mean() < 1.1


@pytest.mark.spec("BX3")
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-6, 1), min_size=2, max_size=8),
    st.sampled_from(["lac", "aps", "raps"]),
    st.floats(0, 1.2),
    st.integers(1, 5),
    st.none() | st.floats(allow_nan=True),
)
def test_every_answer_is_one_of_three_and_says_why(weights, score, threshold, most, unknown):
    p = np.array(weights) / np.sum(weights)
    rule = AnswerRule(score, 0.05, (threshold,) * len(p), most, penalty=0.1, free=1.0, unknown={"threshold": 1.0})
    said = decide_answer(p, unknown, rule)
    strange = unknown is not None and not unknown <= 1.0
    size = int(prediction_sets(p[None], rule).sum())
    assert (said.reason == "unknown_score") == strange
    assert {"drug": 1, "unknown": 0}.get(said.answer, len(said.ids)) == len(said.ids) <= most
    assert said.answer == "unknown" or (p[list(said.ids)] <= p[said.ids[0]]).all()
    assert said.answer != "shortlist" or 2 <= len(said.ids) <= 5
    assert said.answer == "unknown" or p[said.ids[0]] == p.max()
    assert strange or (said.answer == "unknown") == (size == 0 or len(set(said.ids)) == 0)
    assert said == decide_answer(p, unknown, rule)  # no luck in it


@pytest.mark.spec("BX3")
def test_strata_and_figures_can_be_counted_again_from_the_rows():
    rng = np.random.default_rng(6)
    alone = [f"c{i}" for i in range(12)]
    rule = fit_answer_rule(world(rng, 60), alone, AnswerSettings(alpha=0.1, score="lac"))
    clean = world(rng, 150, start=5000, part="clean")
    safe = SafeAnswers(rule, answer_photos(clean, rule, Classes([f"K-{i:06d}" for i in range(12)], alone, [9] * 12)))
    t, rec, strata = safe.table, safe.records(Provenance("synthetic", "a" * 64, "b" * 64)), safe.strata()
    assert rec["set_coverage"].value == pytest.approx(t["covered"].mean()) and rec["set_coverage"].n == 900
    assert rec["wrong_per_1000"].value == pytest.approx(1000 * ((t["answer"] == "drug") & ~t["right"]).mean())
    assert rec["set_size"].value == pytest.approx(t["set_size"].mean())
    worst = strata[(strata["n"] >= 60) & ~strata["stratum"].isin(["all", "set_size"])]["coverage"].min()
    assert rec["set_coverage_worst"].value == pytest.approx(worst)
    by_light = strata[strata["stratum"] == "light"]
    assert by_light["n"].sum() == 900 and set(by_light["value"]) == {"warm", "daylight", "neutral white"}
    assert (strata["low"] <= strata["coverage"]).all() and (strata["coverage"] <= strata["high"]).all()


class Torn:
    "Two drugs, equally likely."

    size = 32

    def logits(self, x):
        return np.repeat(np.log([[0.48, 0.47, 0.05]]), len(x), 0).astype(np.float32)


@pytest.mark.spec("BX3")
@pytest.mark.parametrize("threshold, kind, listed", [(0.6, "shortlist", 2), (0.1, "unknown", 0), (0.525, "drug", 1)])
def test_abstaining_never_changes_the_mode(threshold, kind, listed):
    rule = AnswerRule("lac", 0.05, (threshold,) * 3)
    photo = np.full((64, 64, 3), 90, np.uint8)
    answer = Pipeline(Torn(), ClassMap(["K-000001", "K-000002", "K-000003"]), rule=rule).predict(photo, "single")
    assert (answer["answer"], answer["mode_requested"], answer["mode_used"]) == (kind, "single", "single")
    assert len(answer["items"][0]["shortlist"]) == listed and answer["items"][0]["answer"] == kind
