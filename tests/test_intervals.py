"""The interval of a share and the bootstrap by capture group: what they promise, and that nothing else computes one."""

import ast
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from pillsnap.core.records import Provenance
from pillsnap.evaluation.conditions import build_panel
from pillsnap.evaluation.heldout import answer_intervals
from pillsnap.evaluation.intervals import (
    DRAWS,
    LEAST_GROUPS,
    effective_photos,
    group_bootstrap,
    group_correlation,
    group_counts,
    percentile_interval,
    share_interval,
    share_words,
)
from pillsnap.evaluation.scorepage import interval_of
from pillsnap.models.metrics import macro_f1

PACKAGE = Path(__file__).resolve().parents[1] / "pillsnap"

groups_of_hits = st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=30)


def flat(groups: list[list[bool]]) -> tuple[np.ndarray, np.ndarray]:
    "Hits and names of capture groups."
    return np.concatenate([np.array(g, bool) for g in groups]), np.repeat(np.arange(len(groups)), [*map(len, groups)])


# ---- the interval of a share ---------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(groups_of_hits, st.randoms(use_true_random=False))
def test_the_interval_holds_the_share_whatever_the_order_and_the_names(groups, random):
    hits, names = flat(groups)
    low, high = share_interval(hits, names)
    assert 0 <= low <= hits.mean() <= high <= 1 and 0 < effective_photos(hits, names) <= len(hits) + 1e-9
    order = [*range(len(hits))]
    random.shuffle(order)
    again = share_interval(hits[order], [f"g {names[i]}" for i in order])
    assert again == pytest.approx((low, high))
    assert share_interval(~hits, names) == pytest.approx((1 - high, 1 - low)), "the misses have the mirrored interval"


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 200))
def test_photos_of_different_groups_have_the_exact_binomial_interval(n, k):
    assume(k <= n)
    exact = binomtest(k, n).proportion_ci()
    assert share_interval(np.arange(n) < k, np.arange(n)) == pytest.approx((exact.low, exact.high), abs=1e-9)


@pytest.mark.spec("BX17")
@settings(max_examples=60, deadline=None)
@given(groups_of_hits, st.integers(2, 12))
def test_copies_of_photos_do_not_narrow_the_interval(groups, times):
    "A group of copies is a group whose photos are all alike."
    hits, _ = flat(groups)
    one, copied = np.arange(len(hits)), np.repeat(np.arange(len(hits)), times)
    assert effective_photos(np.repeat(hits, times), copied) <= effective_photos(hits, one) + 0.5
    low, high = share_interval(hits, one)
    again = share_interval(np.repeat(hits, times), copied, correlation=1.0)
    assert again == pytest.approx((low, high), abs=1e-9)


def test_the_correlation_is_that_of_the_groups_the_photos_were_drawn_from():
    rng, sizes = np.random.default_rng(0), np.tile([2, 4, 9], 1500)
    names = np.repeat(np.arange(len(sizes)), sizes)
    for rho in (0.1, 0.4, 0.8):
        k = 1 / rho - 1
        hits = rng.random(len(names)) < np.repeat(rng.beta(0.9 * k, 0.1 * k, len(sizes)), sizes)
        assert group_correlation(hits, names) == pytest.approx(rho, abs=0.04)
    assert group_correlation(rng.random(len(names)) < 0.9, names) < 0.03


@pytest.mark.spec("BX17")
@pytest.mark.parametrize("share, correlation", [(0.95, 0.3), (0.95, 0.9), (0.97, 0.9), (0.98, 0.9)])
def test_the_interval_holds_the_truth_in_nineteen_of_twenty_evaluations(share, correlation):
    "240 photos of 40 groups that are alike, nearly all right; a simpler interval holds the truth in half the cases."
    rng, names, k, held = np.random.default_rng(7), np.repeat(np.arange(40), 6), 1 / correlation - 1, 0
    for _ in range(300):
        chance = rng.beta(share * k, (1 - share) * k, 40)
        low, high = share_interval(rng.random(240) < np.repeat(chance, 6), names)
        held += low <= share <= high
    assert held / 300 >= 0.92


def test_answers_without_a_mistake_count_groups():
    assert share_interval(np.ones(240), np.repeat(np.arange(40), 6))[0] == pytest.approx(0.025 ** (1 / 40))
    assert share_interval([True] * 9, ["a"] * 9)[0] == pytest.approx(0.025)


# ---- the bootstrap -------------------------------------------------------------------------------


@pytest.mark.spec("BX7")
def test_the_bootstrap_draws_whole_groups():
    names, seen = np.repeat(np.arange(12), 5), set()

    def figures(at):
        counts = np.bincount(at, minlength=60).reshape(12, 5)
        seen.update(map(tuple, counts))
        return {"photos": len(at), "groups": (counts > 0).any(1).sum()}

    found = group_bootstrap(figures, names, draws=200)
    assert all(len(set(row)) == 1 for row in seen) and {0, 1, 2} <= {row[0] for row in seen}
    assert "photos" not in found, "the same in every sample: that makes no figure certain"
    assert 5 <= found["groups"][0] < found["groups"][1] <= 12


@pytest.mark.spec("BX7")
def test_figures_and_runs_share_their_samples():
    "The same seed draws the same groups, in blocks of any size, for one figure or for two."
    names, x = np.repeat([f"g{i:02d}" for i in range(15)], 3), np.random.default_rng(1).random(45)
    both = group_bootstrap(lambda at: {"mean": x[at].mean(), "most": x[at].max()}, names, draws=80)
    assert both["mean"] == group_bootstrap(lambda at: {"mean": x[at].mean()}, names, draws=80)["mean"]
    sums = np.concatenate([*group_counts(15, 80, width=10**6)]) @ x.reshape(15, 3).sum(1) / 45
    assert both["mean"] == pytest.approx(percentile_interval(sums))
    assert sum(len(block) for block in group_counts(3, DRAWS, width=10**6)) == DRAWS


def test_few_groups_give_no_bootstrap_interval():
    def mean(at):
        return {"mean": at.mean()}

    assert group_bootstrap(mean, np.arange(LEAST_GROUPS - 1)) == {}
    assert set(group_bootstrap(mean, np.arange(LEAST_GROUPS), draws=20)) == {"mean"}


# ---- one interval everywhere ---------------------------------------------------------------------


@pytest.mark.spec("BX3", "BX17")
def test_every_place_shows_the_same_interval(tmp_path):
    "The accuracy's record, its headline, the ways to find a pill, the panel's first row and the held-out report."
    from pillsnap.core.files import read_json
    from pillsnap.delivery.classmap import ClassMap
    from pillsnap.evaluation.answers import EvalPhoto, Scores
    from pillsnap.evaluation.figures import single_records
    from pillsnap.evaluation.focus import WHOLE, FocusComparison
    from pillsnap.evaluation.scorepage import headlines

    rng, n = np.random.default_rng(5), 120
    labels, groups = np.repeat(np.arange(4), 30), [f"g{i // 6}" for i in range(n)]
    right = rng.random(n) < np.repeat(rng.beta(8, 1, 20), 6)
    answered = np.where(right, labels, (labels + 1) % 4)
    logits, keys, paths = np.eye(4)[answered], [f"K-{i:06d}" for i in range(4)], [f"{i}.png" for i in range(n)]
    prov = Provenance("synthetic", "a" * 64, ClassMap(keys).fingerprint)
    each = dict(groups=groups, paths=paths, parts=["clean"] * n, modes=["single"] * n, views=["crop"] * n)
    scores = Scores(*[logits] * 3, labels, **each, boxes=[None] * n, seconds=1.0)
    record = single_records(scores, keys, prov)[0]["accuracy"]
    low, high = interval_of(record.note)
    photos = [EvalPhoto(p, g, "single", np.zeros((0, 4)), (keys[y],)) for p, g, y in zip(paths, groups, labels)]
    focus = FocusComparison(photos, labels, 4, {}, {}, {WHOLE: logits}, 1.0)
    table = pd.DataFrame(dict(path=paths, group=groups, drug=[keys[y] for y in labels], right=right))
    for axis in ("background", "light", "side", "latitude", "longitude", "pill size"):
        table[axis] = None
    panel = build_panel(table, table.iloc[:0], {})
    saved = read_json(panel.save(tmp_path / "conditions.json"))
    shown = [
        (focus.row(WHOLE)["low"], focus.row(WHOLE)["high"]),
        interval_of(focus.records(prov)["focus_whole_accuracy"].note),
        (panel.rows()[0]["low"], panel.rows()[0]["high"]),
        (saved["low"], saved["high"]),
        answer_intervals(answered, labels, groups, 4)["accuracy"],
    ]
    for ends in shown:
        assert ends == pytest.approx((low, high), abs=1e-4), shown
    assert f"{share_words(right, groups)}" in record.note and 0.02 < high - low < 0.3
    row = {"figure": "accuracy", "value": record.value, "n": n, "note": record.note, "gate": ""}
    assert headlines([row])[0]["interval"] == f"{low:.3f} to {high:.3f}"


def test_macro_f1_of_the_held_out_part_has_the_interval_of_the_chapter():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 5, 90), np.repeat(np.arange(15), 6)
    answered = np.where(rng.random(90) < 0.8, labels, 0)
    expected = group_bootstrap(lambda at: {"f": macro_f1(answered[at], labels[at], 5)}, groups)["f"]
    assert answer_intervals(answered, labels, groups, 5)["macro_f1"] == expected
    assert set(answer_intervals(answered, labels, groups // 2, 5)) == {"accuracy"}


def test_nothing_else_computes_an_interval():
    "The quantiles of a 95 % interval stand in one module; the renderer's lengths and angles are no quantiles."
    found = []
    for path in sorted(p for p in PACKAGE.rglob("*.py") if p.parent.name != "synth"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = abs(float(node.value)) if isinstance(node, ast.Constant) and type(node.value) in (int, float) else 0
            if round(value, 2) in (1.96, 97.5) or value in (0.025, 0.975):
                found.append(path.relative_to(PACKAGE).as_posix())
    assert set(found) == {"evaluation/intervals.py"}
