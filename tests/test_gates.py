"""Stage gates: the contract's figures literally, every way of not knowing, and a second implementation to compare
with."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.core.records import Provenance
from pillsnap.evaluation.gates import (
    EXCUSED_BY_CLOCK,
    STAGE_TARGETS,
    Reason,
    Status,
    TimeCap,
    simple_stage_evaluation,
    stage_gate,
)
from pillsnap.evaluation.latency import (
    LATENCY_TARGETS,
    PROTOCOL_GPU,
    RUNS,
    WARMUP,
    Latency,
    LatencySetup,
    latency_table,
    measure_latency,
    protocol_gap,
)

CAP = TimeCap(
    hours=2.0, stopped_early=True, samples=1000, classes=30, pipeline_complete=True, classification_model_loading=True
)
AIHUB = Provenance(data="aihub", data_hash="d" * 64, class_map_hash="c" * 64)
GPU = "16× AMD Ryzen 7, 125 GiB, NVIDIA GeForce RTX 5080 16 GiB"
WANT = {
    1: (0.78, 220, 0.20, 2000, 0.02),
    2: (0.82, 220, 0.40, 5000, 0.02),
    3: (0.85, 200, 0.70, 10000, 0.01),
    4: (0.85, 200, 0.70, 10000, 0.01),
}  # accuracy, p95, coverage, n, drop


def record(name, value, n=20_000, prov=AIHUB):
    return prov.metric(name, value, n=n, seconds=600.0)


def computed(name, value, n=20_000, prov=AIHUB):
    return prov.metric(name, value, n=n, seconds=1e-4, kind="computed")


def facts(  # noqa: PLR0913 - each fact by its name
    acc=0.95, p95=100.0, n=20_000, coverage=1.0, crashes=True, memory=True, base=None, prov=AIHUB, **change
):
    lat = Latency("single", 95, 1, "fp16", 20, replace(record("latency", p95, 200, prov), hardware=GPU), "torch cuda")
    f = dict(
        accuracy=record("accuracy", acc, n, prov),
        latency_p95_ms=lat,
        n_eval_samples=record("n", n, n, prov),
        class_coverage=record("coverage", coverage, 50, prov),
        no_crashes=record("no_crashes", crashes, 4, prov),
        memory_stable=record("memory_stable", memory, 30, prov),
        split_by_group=computed("split_by_group", True, n, prov),
        train_overlap=computed("train_overlap", 0, n, prov),
    )
    if base is not None:
        f["baseline"] = record("accuracy", base, n, prov)
    return f | change


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_configuration_makes_a_gate_stricter_and_never_laxer(stage):
    "Its accuracy and its latency count where they ask for more; else the stage's figures hold, with a note."
    acc, p95, *_ = WANT[stage]
    reached = facts(acc=acc + 0.01, p95=p95 - 20)
    assert simple_stage_evaluation(stage, reached).status == Status.GO
    r = simple_stage_evaluation(stage, reached, target_accuracy=acc + 0.05)
    assert (r.status, r.reasons) == (Status.NO_GO, ("ACC_BELOW_TARGET",))
    assert any(f"≥ {acc + 0.05:.2f}" in p.asked for p in r.points)
    r = simple_stage_evaluation(stage, reached, max_latency_ms=p95 - 30)
    assert (r.status, r.reasons) == (Status.NO_GO, ("LATENCY_P95_TOO_HIGH",))
    assert any(f"≤ {p95 - 30} ms" in p.asked for p in r.points)
    r = simple_stage_evaluation(stage, facts(acc=acc - 0.05, p95=p95 + 50), target_accuracy=0.1, max_latency_ms=5000)
    assert r.reasons == ("LATENCY_P95_TOO_HIGH", "ACC_BELOW_TARGET") and sum("does not l" in n for n in r.notes) == 2
    assert simple_stage_evaluation(stage, reached, target_accuracy=acc, max_latency_ms=p95).notes == ("first run",)


def test_a_runs_gate_follows_its_own_configuration(tmp_path, monkeypatch):
    "What the evaluation job hands to the gate comes from the stage's block of the run's configuration."
    from pillsnap.core.config import load_config
    from pillsnap.evaluation import scorecard as S

    asked = {}

    class StopError(Exception):
        pass

    def gate(stage, facts, time_cap, target_accuracy, max_latency_ms):
        asked.update(stage=stage, target_accuracy=target_accuracy, max_latency_ms=max_latency_ms)
        raise StopError

    monkeypatch.setattr(S, "read_evaluation", lambda root: ({"stage": 2, "classes": 6}, {}, []))
    monkeypatch.setattr(S, "advisor_facts", lambda *a: type("Facts", (), {"checks": {}})())
    monkeypatch.setattr(S, "simple_stage_evaluation", gate)
    overrides = [f"data.progressive_validation.stage_2.{k}" for k in ("target_accuracy=0.9", "max_latency_ms=120")]
    with pytest.raises(StopError):
        S.gate_and_advise(tmp_path, load_config("two_stage", overrides))
    assert asked == dict(stage=2, target_accuracy=0.9, max_latency_ms=120)


def test_the_demo_has_no_verdict_on_latency_whatever_is_configured():
    assert stage_gate(0, 0.95, 10.0)[0].latency_p95_ms is None and stage_gate(0, 0.95, 10.0)[0].accuracy == 0.95


@pytest.mark.spec("SG1")
def test_constants_are_the_contracts():
    for stage, (acc, p95, cov, n, drop) in WANT.items():
        t = STAGE_TARGETS[stage]
        assert (t.accuracy, t.latency_p95_ms, t.class_coverage, t.n_eval_samples, t.max_drop, t.epsilon) == (
            acc,
            p95,
            cov,
            n,
            drop,
            0.002,
        )
        assert t.memory and t.map50 is None and t.data == ("aihub",) and t.label == ""
    d = STAGE_TARGETS[0]
    assert (d.accuracy, d.map50, d.class_coverage, d.n_eval_samples, d.latency_p95_ms, d.epsilon, d.label) == (
        0.90,
        0.90,
        1.0,
        200,
        None,
        0.0,
        "demo, synthetic",
    )
    assert set(STAGE_TARGETS) == {0, 1, 2, 3, 4}
    assert [str(r) for r in Reason][:7] == [
        "LATENCY_P95_TOO_HIGH",
        "NOT_ENOUGH_SAMPLES",
        "COVERAGE_TOO_LOW",
        "REGRESSION_TOO_LARGE",
        "ACC_BELOW_TARGET",
        "CRASH_DETECTED",
        "MEMORY_UNSTABLE",
    ]
    assert [str(s) for s in Status] == ["GO", "NO_GO", "TIME_CAP_SUCCESS", "NOT_MEASURED"]


@pytest.mark.spec("SG1")
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_every_constant_bites_at_its_edge(stage):
    acc, p95, cov, n, drop = WANT[stage]
    edge = dict(acc=acc - 0.002, p95=float(p95), coverage=cov, n=n)
    assert simple_stage_evaluation(stage, facts(**edge)).status == Status.GO
    for reason, change in (
        ("ACC_BELOW_TARGET", dict(acc=acc - 0.0021)),
        ("LATENCY_P95_TOO_HIGH", dict(p95=p95 + 0.1)),
        ("COVERAGE_TOO_LOW", dict(coverage=cov - 0.001)),
        ("NOT_ENOUGH_SAMPLES", dict(n=n - 1)),
        ("CRASH_DETECTED", dict(crashes=False)),
        ("MEMORY_UNSTABLE", dict(memory=False)),
        ("REGRESSION_TOO_LARGE", dict(base=acc - 0.002 + drop + 0.0005)),
    ):
        r = simple_stage_evaluation(stage, facts(**edge | change))
        assert (r.status, r.reasons) == (Status.NO_GO, (reason,)), change
    assert simple_stage_evaluation(stage, facts(**edge, base=acc - 0.002 + drop)).status == Status.GO


@pytest.mark.spec("SG1")
def test_reasons_come_in_the_contracts_order():
    r = simple_stage_evaluation(4, facts(acc=0.1, p95=900.0, n=5, coverage=0.01, crashes=False, memory=False, base=0.9))
    assert list(r.reasons) == [str(x) for x in Reason][:7] and r.status == Status.NO_GO


@pytest.mark.spec("SG1", "BX2")
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "name",
    [
        "accuracy",
        "latency_p95_ms",
        "n_eval_samples",
        "class_coverage",
        "no_crashes",
        "memory_stable",
        "train_overlap",
        "split_by_group",
    ],
)
def test_an_absent_key_fails_closed(stage, name):
    f = facts()
    assert simple_stage_evaluation(stage, f).status == Status.GO
    for gone in ({k: v for k, v in f.items() if k != name}, f | {name: None}):
        r = simple_stage_evaluation(stage, gone)
        assert r.status == Status.NOT_MEASURED and name in r.not_measured and not r.unlocks_final_test


@pytest.mark.spec("BX2")
@pytest.mark.parametrize(
    "change",
    [
        dict(value=math.nan),
        dict(value=math.inf),
        dict(value=None),
        dict(n=0),
        dict(n=-3),
        dict(how="declared"),
        dict(how="estimated"),
        dict(seconds=1e-5),
        dict(seconds=None),
        dict(seconds=-1.0),
        dict(data="synthetic"),
        dict(data="other"),
        dict(data_hash=""),
        dict(class_map_hash=""),
        dict(hardware=""),
        dict(value=1.5),
        dict(value=-0.1),
    ],
)
@pytest.mark.parametrize("name", ["accuracy", "class_coverage", "no_crashes", "n_eval_samples"])
def test_an_impossible_record_fails_closed(name, change):
    if name == "n_eval_samples" and "value" in change and change["value"] == 1.5:
        change = dict(value=0)
    f = facts()
    r = simple_stage_evaluation(1, f | {name: replace(f[name], **change)})
    assert r.status != Status.GO, r


@pytest.mark.spec("X81")
@pytest.mark.parametrize("stage", [0, 1, 4])
def test_one_photo_of_training_and_nothing_was_measured(stage):
    "Not a NO_GO and no time cap: whatever else is wrong or right, the figures are none."
    for change in (dict(), dict(acc=0.1), dict(crashes=False)):
        f = facts(**change) | {"train_overlap": computed("train_overlap", 1), "map50": record("map50", 0.99)}
        r = simple_stage_evaluation(stage, f, CAP)
        assert (r.status, r.reasons) == (Status.NOT_MEASURED, ("LEAK",)) and not r.unlocks_final_test
        assert {"accuracy", "n_eval_samples", "no_crashes"} <= set(
            r.not_measured
        ) and "train_overlap" not in r.not_measured
        assert "1 of 20000 scored photos" in next(p.note for p in r.points if p.name == "accuracy")


@pytest.mark.spec("X81")
@pytest.mark.parametrize("overlap", [0, 19_000])
def test_a_split_that_leaks_by_construction_is_no_go(overlap):
    f = facts(acc=0.999) | {
        "split_by_group": computed("split_by_group", False),
        "train_overlap": computed("train_overlap", overlap),
    }
    assert (simple_stage_evaluation(1, f).status, simple_stage_evaluation(1, f).reasons) == (
        Status.NO_GO,
        ("LEAKY_SPLIT",),
    )
    assert (
        simple_stage_evaluation(
            1, f | facts(acc=0.749, n=20_000) | {k: f[k] for k in ("split_by_group", "train_overlap")}, CAP
        ).status
        == Status.NO_GO
    )


@pytest.mark.spec("X81", "BX2")
def test_an_overlap_that_was_checked_for_fewer_photos_is_none():
    r = simple_stage_evaluation(1, facts() | {"train_overlap": computed("train_overlap", 0, 19_999)})
    assert r.status == Status.NOT_MEASURED and "checked for 19999 photos" in r.points[0].note


@pytest.mark.spec("BX2")
@pytest.mark.parametrize("name", ["accuracy", "n_eval_samples", "class_coverage", "latency_p95_ms"])
def test_figures_that_take_photos_cannot_be_computed(name):
    f = facts()
    dull = (
        replace(f[name], metric=replace(f[name].metric, kind="computed"))
        if name == "latency_p95_ms"
        else replace(f[name], kind="computed", seconds=1e-4)
    )
    r = simple_stage_evaluation(1, f | {name: dull})
    assert r.status == Status.NOT_MEASURED and name in r.not_measured


@pytest.mark.spec("BX2")
def test_a_hand_made_report_does_not_pass():
    made_up = {
        k: (
            replace(m, metric=replace(m.metric, seconds=0.0015))
            if isinstance(m, Latency)
            else replace(m, seconds=0.0015)
        )
        for k, m in facts(acc=0.99, n=5000).items()
    }
    r = simple_stage_evaluation(1, made_up)
    assert r.status == Status.NOT_MEASURED and {"accuracy", "n_eval_samples", "latency_p95_ms"} <= set(r.not_measured)
    assert (
        simple_stage_evaluation(
            1,
            dict(
                accuracy=0.99,
                n_eval_samples=5000,
                latency_p95_ms=1.5,
                class_coverage=1.0,
                no_crashes=True,
                memory_stable=True,
            ),
        ).status
        == Status.NOT_MEASURED
    )


@pytest.mark.spec("BX2")
def test_figures_that_do_not_belong_together_are_no_measurement():
    f = facts()
    assert simple_stage_evaluation(1, f | {"accuracy": replace(f["accuracy"], n=10)}).status == Status.NOT_MEASURED
    assert (
        simple_stage_evaluation(1, f | {"class_coverage": replace(f["class_coverage"], class_map_hash="e" * 64)}).status
        == Status.NOT_MEASURED
    )
    assert (
        simple_stage_evaluation(1, f | {"accuracy": replace(f["accuracy"], data_hash="e" * 64)}).status
        == Status.NOT_MEASURED
    )
    other = {"baseline": replace(record("accuracy", 0.95), class_map_hash="e" * 64)}
    assert "regression" in simple_stage_evaluation(1, f | other).not_measured


@pytest.mark.spec("SG1")
def test_synthetic_figures_never_open_a_real_gate():
    syn = Provenance(data="synthetic", data_hash="d" * 64, class_map_hash="c" * 64)
    for stage in (1, 2, 3, 4):
        assert simple_stage_evaluation(stage, facts(prov=syn)).status == Status.NOT_MEASURED
    demo = facts(prov=syn, acc=0.9, n=200) | {"map50": record("map50", 0.9, 200, syn)}
    r = simple_stage_evaluation(0, demo)
    assert (r.status, r.label, r.unlocks_final_test) == (Status.GO, "demo, synthetic", False)
    for change, reason in (
        (dict(acc=0.899), "ACC_BELOW_TARGET"),
        (dict(n=199), "NOT_ENOUGH_SAMPLES"),
        (dict(coverage=0.99), "COVERAGE_TOO_LOW"),
        (dict(crashes=False), "CRASH_DETECTED"),
    ):
        assert (
            reason
            in simple_stage_evaluation(
                0, facts(**(dict(prov=syn, acc=0.9, n=200) | change)) | {"map50": record("map50", 0.9, 200, syn)}
            ).reasons
        )
    assert simple_stage_evaluation(0, demo | {"map50": record("map50", 0.899, 200, syn)}).reasons == (
        "MAP_BELOW_TARGET",
    )
    assert simple_stage_evaluation(0, {k: v for k, v in demo.items() if k != "map50"}).status == Status.NOT_MEASURED
    assert (
        "latency_p95_ms" not in [p.name for p in r.points]
        and simple_stage_evaluation(0, demo | {"latency_p95_ms": None}).status == Status.GO
    )


@pytest.mark.spec("SG1")
def test_a_first_run_says_so_and_a_broken_baseline_is_no_first_run():
    assert simple_stage_evaluation(1, facts()).notes == ("first run",)
    assert simple_stage_evaluation(1, facts(base=0.95)).notes == ()
    r = simple_stage_evaluation(1, facts(base=0.95) | {"baseline": replace(record("accuracy", 0.95), value=math.nan)})
    assert r.status == Status.NOT_MEASURED and "first run" not in r.notes


@pytest.mark.spec("SG1", "SG7")
def test_the_clock_excuses_little_and_opens_nothing():
    cap = TimeCap(
        hours=2.0,
        stopped_early=True,
        samples=1000,
        classes=30,
        pipeline_complete=True,
        classification_model_loading=True,
    )
    assert (cap.limit_hours, cap.min_samples, cap.min_classes) == (2.0, 1000, 30)
    low = facts(acc=0.749)
    r = simple_stage_evaluation(1, low, cap)
    assert r.status == Status.TIME_CAP_SUCCESS != Status.GO and not r.unlocks_final_test
    assert (
        not simple_stage_evaluation(4, low, cap).unlocks_final_test
        and simple_stage_evaluation(4, low, cap).status == Status.TIME_CAP_SUCCESS
    )
    for change in (
        dict(hours=1.99),
        dict(stopped_early=False),
        dict(samples=999),
        dict(classes=29),
        dict(pipeline_complete=False),
        dict(classification_model_loading=None),
        dict(hours=None),
        dict(samples=None),
    ):
        assert simple_stage_evaluation(1, low, replace(cap, **change)).status == Status.NO_GO, change
    for change in (dict(crashes=False), dict(memory=False), dict(p95=900.0), dict(base=0.95)):
        assert simple_stage_evaluation(1, facts(acc=0.749, **change), cap).status == Status.NO_GO, change
    assert (
        simple_stage_evaluation(1, {k: v for k, v in low.items() if k != "memory_stable"}, cap).status == Status.NO_GO
    )
    assert simple_stage_evaluation(1, facts(), cap).status == Status.GO
    assert {Reason.ACC_BELOW_TARGET, Reason.NOT_ENOUGH_SAMPLES, Reason.COVERAGE_TOO_LOW} == EXCUSED_BY_CLOCK


def maybe(s):
    return st.one_of(st.none(), s)


@pytest.mark.spec("SG1")
@given(
    stage=st.integers(1, 4),
    acc=maybe(st.floats(0.5, 1)),
    p95=maybe(st.floats(1, 400)),
    n=st.integers(1, 12_000),
    cov=maybe(st.floats(0, 1)),
    ok=maybe(st.booleans()),
    mem=maybe(st.booleans()),
    base=maybe(st.floats(0.5, 1)),
)
@settings(max_examples=300, deadline=None)
def test_a_second_implementation_agrees(  # noqa: PLR0913 - hypothesis gives each by its name
    stage, acc, p95, n, cov, ok, mem, base
):
    f = facts(acc or 0.5, p95 or 1.0, n, cov or 0.0, bool(ok), bool(mem), base)
    for name, v in (
        ("accuracy", acc),
        ("latency_p95_ms", p95),
        ("class_coverage", cov),
        ("no_crashes", ok),
        ("memory_stable", mem),
    ):
        if v is None:
            del f[name]
    a, latency, c, m, d = WANT[stage]
    lines = [
        (p95, p95 is not None and p95 <= latency),
        (n, n >= m),
        (cov, cov is not None and cov >= c),
        (acc, acc is not None and acc >= a - 0.002),
        (acc if base is not None else 1, base is None or (acc is not None and base - acc <= d)),
        (ok, ok is True),
        (mem, mem is True),
    ]
    known = all(v is not None for v, _ in lines)
    missed = any(v is not None and not met for v, met in lines)
    want = Status.GO if known else Status.NOT_MEASURED
    if missed:
        want = Status.NO_GO
    near = any(
        x is not None and abs(x - y) < 1e-6
        for x, y in ((acc, a - 0.002), (cov, c), (p95, latency), ((base or 0) - (acc or 0), d))
    )
    r = simple_stage_evaluation(stage, f)
    assert near or r.status == want
    assert (r.status == Status.GO) == (not r.reasons and not r.not_measured)
    assert r.unlocks_final_test == (stage == 4 and r.status == Status.GO)
    import json

    json.dumps(r.to_dict(), allow_nan=False)


# ---- latency -------------------------------------------------------------------------------------


@pytest.mark.spec("EV6")
def test_the_protocols_figures():
    assert (WARMUP, RUNS, PROTOCOL_GPU) == (20, 200, "RTX 5080")
    rows = {(t.source, t.scope, t.stage): t.ms for t in LATENCY_TARGETS}
    assert rows == {
        ("D-12", "single", 1): 220,
        ("D-12", "single", 2): 220,
        ("D-12", "single", 3): 200,
        ("D-12", "single", 4): 200,
        ("A", "single", None): 150,
        ("A, I/O note", "single", None): 50,
        ("C", "single", 3): 200,
        ("C", "single", 4): 200,
        ("D-14", "detector", 1): 50,
        ("D-14", "classifier", 1): 10,
        ("D-14", "api", 3): 100,
        ("D-14", "single", 4): 30,
        ("N, target", "onnx_single", None): 50,
        ("N, minimum", "onnx_single", None): 100,
    }
    assert [t.stage for t in LATENCY_TARGETS if t.gate] == [1, 2, 3, 4] and {t.percentile for t in LATENCY_TARGETS} == {
        95
    }


@pytest.mark.spec("EV6")
def test_other_hardware_is_shown_without_a_verdict():
    f = facts(p95=1.0)
    for change in (
        dict(precision="fp32"),
        dict(batch=2),
        dict(warmup=19),
        dict(scope="classifier"),
        dict(percentile=50),
        dict(metric=replace(f["latency_p95_ms"].metric, hardware="2× CPU")),
        dict(metric=replace(f["latency_p95_ms"].metric, n=199)),
    ):
        r = simple_stage_evaluation(1, f | {"latency_p95_ms": replace(f["latency_p95_ms"], **change)})
        p = r.points[0]
        assert (r.status, p.verdict, p.value) == (
            Status.NOT_MEASURED,
            Status.NOT_MEASURED,
            1.0,
        ) and "NOT_COMPARABLE" in p.note, change
    assert protocol_gap(f["latency_p95_ms"]) == []


@pytest.mark.spec("EV6")
def test_only_timed_calls_count_and_percentiles_are_ordered():
    calls = []
    rows, ms = measure_latency(lambda: calls.append(1), "nothing", AIHUB, LatencySetup(warmup=3, runs=7))
    assert (
        len(calls) == 10
        and len(ms) == 7
        and [r.percentile for r in rows] == [50, 95]
        and rows[0].metric.value <= rows[1].metric.value
    )
    assert {r["verdict"] for r in latency_table(rows)} == {"NOT_MEASURED"}
