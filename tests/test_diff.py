"""Two runs compared: the figures, their intervals by capture group, and what is not compared."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap import cli
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json
from pillsnap.core.records import Provenance
from pillsnap.evaluation import diff as D
from pillsnap.evaluation import groupfigures as G
from pillsnap.evaluation.safeanswers import SafeAnswers
from pillsnap.models import metrics as M
from pillsnap.models.decision import AnswerRule

GOLDEN = Path(__file__).resolve().parent / "golden" / "diff"


@pytest.fixture
def pair(tmp_path):
    "Copies of the two made-up runs, to be changed."
    for name in "ab":
        shutil.copytree(GOLDEN / name, tmp_path / name)
    return tmp_path / "a", tmp_path / "b"


def change_records(run, **fields):
    "Set fields of every figure of a run."
    path = run / "reports" / "evaluation.json"
    doc = read_json(path)
    for record in [*doc["metrics"].values(), *(r["metric"] for r in doc["latency"])]:
        record.update(fields)
    save_json(doc, path)


def typed(capsys, *argv) -> tuple[int, str, str]:
    "Exit status, output and errors of a command line."
    with pytest.raises(SystemExit) as e:
        cli.main([str(a) for a in argv])
    said = capsys.readouterr()
    return e.value.code or 0, said.out, said.err


# ---- the figures ---------------------------------------------------------------------------------


@pytest.mark.spec("BX7")
def test_the_made_up_runs_give_the_expected_comparison(monkeypatch, capsys):
    monkeypatch.chdir(GOLDEN)
    status, out, _ = typed(capsys, "diff", "a", "b", "--json")
    got, expected = json.loads(out), read_json(GOLDEN / "expected.json")
    assert status == 1 and list(got) == list(expected)  # the detector's boxes became worse
    for key in ("schema", "a", "b", "warnings", "draws", "same_ground", "worse"):
        assert got[key] == expected[key], key
    for key in ("rows", "tests"):
        assert len(got[key]) == len(expected[key])
        for mine, theirs in zip(got[key], expected[key]):
            assert mine == pytest.approx(theirs, abs=1e-9), mine
    status, out, _ = typed(capsys, "diff", "a", "b")
    assert status == 1
    assert [x.split() for x in out.splitlines()] == [
        x.split() for x in (GOLDEN / "expected.txt").read_text(encoding="utf-8").splitlines()
    ]


@pytest.mark.spec("BX7")
def test_what_can_be_counted_by_hand():
    "Of 42 clean photos the second run mends six; of 12 combos it mends four."
    d = D.compare_runs(GOLDEN / "a", GOLDEN / "b")
    rows = {r.figure: r for r in d.rows}
    assert rows["accuracy"].a == pytest.approx(33 / 42) and rows["accuracy"].difference == pytest.approx(6 / 42)
    assert rows["combo_set_accuracy"].difference == pytest.approx(4 / 12)
    named, exact = d.tests
    assert (named.photos, named.groups, named.only_a, named.only_b) == (42, 14, 0, 6)
    assert named.p_photos == pytest.approx(2 * 0.5**6) and exact.p_photos == pytest.approx(2 * 0.5**4)
    assert rows["auroc_unknown"].verdict == "only in B" and rows["auroc_unknown"].difference is None
    assert rows["leak_gap"].verdict == "not measured" and rows["leak_gap"].difference is None
    assert rows["latency_single_p95_ms"].verdict == "no interval"


def random_singles(seed: int, groups: int, per_group: int, drugs: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    n = groups * per_group
    keys = np.array([f"K-{i:06d}" for i in range(drugs)])
    true, said, crop = (keys[rng.integers(0, drugs, n)] for _ in range(3))
    said = np.where(rng.random(n) < 0.6, true, said)
    return pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(n)],
            "group": [f"g{i // per_group:03d}" for i in range(n)],
            "true": true,
            "answered": said,
            "confidence": rng.random(n).round(6),
            "part": rng.choice(["clean", "val", "calib"], n, p=[0.6, 0.2, 0.2]),
            "rank": np.where(said == true, 1, rng.integers(2, 9, n)),
            "answered_crop": crop,
        }
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(2, 30), per_group=st.integers(1, 6), drugs=st.integers(2, 9))
def test_figures_and_weights_are_those_of_the_metrics_on_copied_rows(seed, groups, per_group, drugs):
    "A group of weight w counts as if its photos stood in the table w times."
    t = random_singles(seed, groups, per_group, drugs)
    weights = dict(zip(sorted(set(t["group"])), np.random.default_rng(seed).integers(0, 3, groups)))
    copied = t.loc[t.index.repeat(t["group"].map(weights))]
    clean, key = copied[copied["part"] == "clean"], {k: i for i, k in enumerate(sorted({*t["true"], *t["answered"]}))}
    if not len(clean):
        return
    y, p = clean["true"].map(key).to_numpy(), clean["answered"].map(key).to_numpy()
    expected = {
        "accuracy": M.accuracy(p, y),
        "macro_f1": M.macro_f1(p, y, len(key)),
        "top5": float((clean["rank"] <= 5).mean()),
        "ece_calibrated": M.ece(clean["confidence"].to_numpy(), p == y),
    }
    figures = G.single_figures(t)
    for name, value in expected.items():
        f = figures[name]
        got = f.weighted(np.array([[weights[g] for g in f.groups]]))[0]
        assert got == pytest.approx(value, abs=1e-9), name


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.integers(10, 25), per_group=st.integers(1, 5))
def test_a_run_compared_with_itself_has_no_differences(tmp_path_factory, seed, groups, per_group):
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(GOLDEN / "a", run, dirs_exist_ok=True)
    t = random_singles(seed, groups, per_group, 5)
    t.to_csv(run / "reports" / "predictions_single.csv", index=False)
    doc = read_json(run / "reports" / "evaluation.json")
    for name, f in G.single_figures(t).items():
        doc["metrics"][name]["value"] = f.point
    save_json(doc, run / "reports" / "evaluation.json")
    d = D.compare_runs(run, run, draws=60)
    assert {r.difference for r in d.rows} <= {0.0, None} and not d.worse and not d.warnings
    assert {r.verdict for r in d.rows if r.difference is not None} <= {"within noise", "equal"}
    assert any(r.verdict == "within noise" for r in d.rows)
    assert all(t.only_a == t.only_b == 0 and t.p_photos == 1 for t in d.tests)


@pytest.mark.spec("BX7")
def test_figures_of_the_answer_rule_are_those_of_the_scorecard(tmp_path):
    "The saved answers give each figure again, whatever the shares of names, short lists and refusals."
    rng, n = np.random.default_rng(7), 90
    right = rng.random(n) < 0.8
    t = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "group": [f"g{i // 6:02d}" for i in range(n)]})
    t = t.assign(true="K-000001", top="K-000002", confidence=rng.random(n), right=right)
    t = t.assign(covered=right | (rng.random(n) < 0.5), set_size=rng.integers(1, 5, n), reason="")
    t = t.assign(answer=rng.choice(["drug", "shortlist", "unknown"], n), listed=rng.random(n) < 0.9)
    for stratum in ("background", "light", "latitude", "side", "cluster", "frequency"):
        t[stratum] = "one"
    recorded = SafeAnswers(AnswerRule("lac", 0.05, (0.9,)), t).records(Provenance("synthetic", "a" * 64, "b" * 64))
    t.round(6).to_csv(tmp_path / "safe_answers.csv", index=False)
    figures = G.safe_figures(pd.read_csv(tmp_path / "safe_answers.csv", dtype={"group": str}))
    assert len(figures) == 8
    for name, f in figures.items():
        assert f.point == pytest.approx(recorded[name].value), name


# ---- noise ---------------------------------------------------------------------------------------


def two_runs_of_groups(rng, groups: int, per_group: int, gap: float) -> list[G.GroupFigure]:
    "Two classifiers whose right answers come by whole groups, the second better by gap on average."
    figures, names = [], np.repeat([f"g{i:03d}" for i in range(groups)], per_group)
    for extra in (0.0, gap):
        hit = np.repeat(rng.random(groups) < 0.6 + extra, per_group)
        figures.append(G.share_figure(pd.DataFrame({"group": names.tolist()}), hit))
    return figures


@pytest.mark.spec("BX7")
def test_equal_runs_are_within_noise_nineteen_times_of_twenty():
    "Photos of one group are right together. Intervals that count each photo would hold 0 in about half the cases."
    rng = np.random.default_rng(0)
    held = []
    for i in range(200):
        a, b = two_runs_of_groups(rng, groups=40, per_group=8, gap=0.0)
        low, high = D.percentile_interval(D.bootstrap_difference(a, b, draws=300, seed=i))
        held.append(low <= 0 <= high)
    assert 0.90 <= np.mean(held) <= 0.99, np.mean(held)


def test_a_real_difference_is_found():
    rng = np.random.default_rng(1)
    found = []
    for i in range(40):
        a, b = two_runs_of_groups(rng, groups=150, per_group=2, gap=0.25)
        found.append(D.percentile_interval(D.bootstrap_difference(a, b, draws=300, seed=i))[0] > 0)
    assert np.mean(found) >= 0.9


def test_the_blocks_of_the_bootstrap_do_not_change_its_samples(monkeypatch):
    a, b = two_runs_of_groups(np.random.default_rng(2), groups=20, per_group=3, gap=0.1)
    whole = D.bootstrap_difference(a, b, draws=50)
    many = G.by_group([f"g{i:03d}" for i in range(20)], np.zeros((20, 90_000)), lambda s: s[:, 0])
    assert len(D.bootstrap_difference(many, many, draws=50)) == 50 and len(whole) == 50


def test_runs_that_share_some_groups_are_compared_on_one_draw():
    "The part of the difference that both runs share cancels: the interval is narrower than that of unrelated groups."
    rng = np.random.default_rng(3)
    hit = (rng.random(60) < 0.5).astype(float)

    def figure(prefix: str, first: int) -> G.GroupFigure:
        names = [f"{prefix if i < first else 'shared'}{i:02d}" for i in range(60)]
        return G.share_figure(pd.DataFrame({"group": names}), hit)

    widths = []
    for first in (0, 30, 60):
        low, high = D.percentile_interval(D.bootstrap_difference(figure("x", first), figure("y", first)))
        widths.append(high - low)
    assert widths[0] == 0 and widths[1] < 0.85 * widths[2]


# ---- what is not compared ------------------------------------------------------------------------


@pytest.mark.spec("BX7")
@pytest.mark.parametrize(
    "fields, words, verdict",
    [
        ({"data_hash": "e" * 64}, "measured on other data", "other data"),
        ({"class_map_hash": "e" * 64}, "know other drugs", "other class map"),
        ({"data": "aihub"}, "never compared", "synthetic and aihub data"),
    ],
)
def test_other_data_and_other_drugs_are_said_and_get_no_verdict(pair, capsys, fields, words, verdict):
    a, b = pair
    change_records(b, **fields)
    d = D.compare_runs(a, b)
    both = [r for r in d.rows if r.a is not None and r.b is not None]
    assert {r.verdict for r in both} == {verdict} and not any(r.compared or r.low is not None for r in both)
    assert d.tests == [] and d.worse == [] and words in d.warnings[0]
    assert all(r.difference is None for r in both) == ("data" in fields)
    status, out, _ = typed(capsys, "diff", a, b)
    before_table = out[: out.index("figure ")]
    assert status == 3 and " ".join(words.split()) in " ".join(before_table.split())
    assert words in d.page()


def test_durations_of_another_machine_are_not_compared(pair):
    a, b = pair
    change_records(b, hardware="another machine")
    verdicts = {r.figure: r.verdict for r in D.compare_runs(a, b).rows}
    assert verdicts["latency_single_p95_ms"] == "other machine" and verdicts["accuracy"] == "better"


@pytest.mark.spec("BX7")
def test_answers_of_another_evaluation_give_no_interval(pair):
    a, b = pair
    table = pd.read_csv(b / "reports" / "predictions_single.csv")
    table.loc[table["part"] == "clean", "answered"] = "K-000101"
    table.to_csv(b / "reports" / "predictions_single.csv", index=False)
    (b / "reports" / "predictions_combo.jsonl").unlink()
    rows = {r.figure: r for r in D.compare_runs(a, b).rows}
    for name in ("accuracy", "combo_set_accuracy"):
        assert (rows[name].low, rows[name].verdict) == (None, "no interval") and "saved answers" in rows[name].note
    assert rows["accuracy_selection"].low is not None


def test_few_groups_give_no_interval(pair):
    a, b = pair
    for run in pair:
        t = pd.read_csv(run / "reports" / "predictions_single.csv")
        t["group"] = t["group"].where(t["part"] != "val", "one group")
        t.to_csv(run / "reports" / "predictions_single.csv", index=False)
    row = next(r for r in D.compare_runs(a, b).rows if r.figure == "accuracy_selection")
    assert (row.groups, row.low) == (1, None) and f"{D.LEAST_GROUPS} capture groups" in row.note


@pytest.mark.spec("BX7")
def test_a_run_without_evaluation_is_refused_with_the_command_that_makes_one(pair, tmp_path, capsys):
    a, _ = pair
    (tmp_path / "empty").mkdir()
    with pytest.raises(PillsnapError, match="not been evaluated"):
        D.compare_runs(a, tmp_path / "empty")
    status, out, err = typed(capsys, "diff", tmp_path / "empty", a)
    assert status == 2 and not out and f"pillsnap run evaluation --run-dir {tmp_path / 'empty'}" in err
    assert typed(capsys, "diff", a, tmp_path / "none")[0] == 2


def test_the_exit_status_says_whether_something_became_worse(pair, tmp_path, capsys):
    a, b = pair
    assert typed(capsys, "diff", a, a)[0] == 0
    assert typed(capsys, "diff", a, b)[0] == 1
    page = tmp_path / "page.html"
    assert typed(capsys, "diff", a, a, "--html", page)[0] == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>") and "data:image/png" in page.read_text(
        "utf-8"
    )
