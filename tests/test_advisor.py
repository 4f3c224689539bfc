"""The advisor's rules, its menu's record, and who may read the sealed test."""

import json
import multiprocessing
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import is_interactive
from pillsnap.core.records import Provenance
from pillsnap.core.settings import setting
from pillsnap.evaluation import advisor as A
from pillsnap.evaluation.advisor import (
    ADVISOR_TARGETS,
    Check,
    Facts,
    OptimizationAdvisor,
    evaluate_and_recommend,
    generate_optimization_suggestions,
    performance_score,
    score_bars,
)
from pillsnap.evaluation.latency import Latency
from pillsnap.evaluation.ledger import LEDGER, append_ledger, read_ledger, record_decision
from pillsnap.evaluation.menu import (
    advisor_menu,
    build_menu,
    read_advice,
    record_choice,
    static_html,
    static_text,
    write_advice,
)

ROOT = Path(__file__).resolve().parents[1]
AIHUB = Provenance(data="aihub", data_hash="d" * 64, class_map_hash="c" * 64)
SYN = Provenance(data="synthetic", data_hash="d" * 64, class_map_hash="c" * 64)


def rec(v, n=300, prov=AIHUB):
    return prov.metric("m", v, n=n, seconds=60.0)


def on_protocol(ms):
    return Latency(
        "any", 95, 1, "fp16", 20, replace(rec(ms, 200), hardware="NVIDIA GeForce RTX 5080 16 GiB"), "torch cuda"
    )


def at_target(stage):
    "Every target of a stage exactly met."
    prov = SYN if stage == 0 else AIHUB
    return {
        t.name: on_protocol(t.value) if t.unit == "ms" else rec(t.value, prov=prov)
        for t in ADVISOR_TARGETS[stage].targets
    }


def checked(stage):
    return {c: Check(True, evidence="reports/x.json") for c in ADVISOR_TARGETS[stage].checks}


WANT = {
    1: (
        dict(
            detection_map50=0.30,
            detection_ms=50,
            accuracy=0.40,
            classification_ms=10,
            gpu_memory_gb=14,
            data_loading_s=2,
        ),
        (),
        ("pipeline_complete", "detection_model_loading", "classification_model_loading", "onnx_conversion_success"),
    ),
    2: (
        dict(
            detection_map50=0.50,
            detection_map=0.35,
            detection_precision=0.45,
            detection_recall=0.40,
            accuracy=0.60,
            macro_f1=0.55,
            top5=0.80,
            batch_size=8,
            throughput=100,
            class_imbalance_ratio=10,
            convergence_stability=0.1,
            memory_efficiency=1.5,
        ),
        ("class_imbalance_ratio", "convergence_stability", "memory_efficiency"),
        (
            "auto_batch_tuning_success",
            "tensorboard_logging",
            "class_balance_verification",
            "memory_optimization_working",
        ),
    ),
    3: (
        dict(
            detection_map50=0.70,
            detection_map=0.50,
            detection_recall=0.75,
            detection_precision=0.70,
            accuracy=0.75,
            macro_f1=0.70,
            top5=0.90,
            per_class_min_f1=0.30,
            multi_batch_size=32,
            memory_stable_hours=12,
            api_response_time=100,
        ),
        ("multi_batch_size", "memory_stable_hours", "api_response_time"),
        ("scalability_test_pass", "multi_batch_processing", "memory_leak_test", "stability_test_pass"),
    ),
    4: (
        dict(
            detection_map50=0.85,
            detection_map=0.65,
            detection_recall=0.90,
            detection_precision=0.85,
            accuracy=0.92,
            macro_f1=0.88,
            top5=0.98,
            per_class_min_accuracy=0.85,
            inference_ms=30,
            throughput=200,
            api_uptime=0.999,
        ),
        ("api_uptime",),
        ("full_dataset_processing", "production_api_deployment", "cloudflare_tunnel_setup", "automated_monitoring"),
    ),
}
LOWER = {
    "detection_ms",
    "classification_ms",
    "gpu_memory_gb",
    "data_loading_s",
    "class_imbalance_ratio",
    "convergence_stability",
    "memory_efficiency",
    "api_response_time",
    "inference_ms",
}


@pytest.mark.spec("SG2", "SG3", "SG4", "SG5")
@pytest.mark.parametrize("stage", WANT)
def test_targets_are_the_contracts(stage):
    figures, advanced, checks = WANT[stage]
    got = A.get_stage_target(stage)
    assert {t.name: t.value for t in got.targets} == figures and got.checks == checks
    assert {t.name for t in got.targets if not t.scored} == set(advanced) and {
        t.name for t in got.targets if t.lower
    } == LOWER & set(figures)


@pytest.mark.spec("SG2", "SG3", "SG4", "SG5")
@pytest.mark.parametrize("stage", ADVISOR_TARGETS)
def test_exactly_at_every_target_is_met_and_one_hair_less_is_not(stage):
    m = at_target(stage)
    a = evaluate_and_recommend(stage, Facts(m, checked(stage)))
    assert (a.reason, a.performance_score, a.n_measured) == ("all_targets_met", 1.0, a.n_targets)
    for t in A.get_stage_target(stage).targets:
        off = t.value * (1.001 if t.lower else 0.999)
        worse = m | {t.name: on_protocol(off) if t.unit == "ms" else rec(off, prov=SYN if stage == 0 else AIHUB)}
        b = evaluate_and_recommend(stage, Facts(worse, checked(stage)))
        assert (b.reason == "all_targets_met") == (not t.scored), t.name
        gone = evaluate_and_recommend(stage, Facts({k: v for k, v in m.items() if k != t.name}, checked(stage)))
        assert (t.name in gone.not_measured) == t.scored and (gone.performance_score < 1) == t.scored


@pytest.mark.spec("SG6")
@given(st.lists(st.floats(0, 2), min_size=3, max_size=3))
@settings(max_examples=200, deadline=None)
def test_the_table_of_annex_3(shares):
    names = ("accuracy", "detection_map50", "class_coverage")
    target = {t.name: t.value for t in ADVISOR_TARGETS[0].targets}
    values = {k: min(1.0, s * target[k]) for k, s in zip(names, shares)}
    a = evaluate_and_recommend(0, Facts({k: rec(v, prov=SYN) for k, v in values.items()}, checked(0)))
    score = sum(min(1.0, v / target[k]) for k, v in values.items()) / 3
    assert a.performance_score == pytest.approx(score)
    if all(v >= target[k] for k, v in values.items()):
        want = ("RECOMMEND_PROCEED", "🟢", "all_targets_met")
    elif score >= 0.7:
        want = ("RECOMMEND_PROCEED", "🟢", "sufficient_performance")
    elif score >= 0.5:
        want = ("SUGGEST_OPTIMIZE", "🟡", "performance_below_target")
    else:
        want = ("WARN_STOP", "🔴", "performance_too_low")
    if min(abs(score - t) for t in (0.5, 0.7)) > 1e-6:
        assert (a.recommendation, a.colour, a.reason) == want
    assert len(a.suggestions) <= 3 and len(a.user_options) == 3 and a.user_choice is None
    json.dumps(a.to_dict(), allow_nan=False)


@pytest.mark.spec("SG6")
def test_options_are_the_contracts():
    def labels(f):
        return [label for _, label in evaluate_and_recommend(0, f).user_options]

    def f(s):
        return Facts(
            {
                k: rec(s * t, prov=SYN)
                for k, t in (("accuracy", 0.9), ("detection_map50", 0.9), ("class_coverage", 1.0))
            },
            checked(0),
        )

    assert labels(f(1)) == ["Next stage", "Optimise more here", "Detailed report"]
    assert labels(f(0.8)) == ["Go on with what there is", "Apply the advice and retry", "Set hyper-parameters by hand"]
    assert labels(f(0.6)) == ["Apply the advice and retry", "Go on (at risk)", "Detailed debugging"]
    assert (
        labels(f(0.2))
        == labels(replace(f(1), checks={}))
        == ["Strong optimisation and retry", "Review the architecture", "Check the data"]
    )


@pytest.mark.spec("SG6")
def test_order_of_decision_broken_then_mandatory_then_score():
    m, ok = at_target(1), checked(1)
    assert (
        evaluate_and_recommend(1, Facts(m, ok, oom_events=5, corruption=0.01, nan_loss=False)).reason
        == "all_targets_met"
    )
    for broken, reason in (
        (dict(oom_events=6), "repeated_oom"),
        (dict(nan_loss=True), "nan_loss"),
        (dict(corruption=0.0101), "data_corruption"),
    ):
        a = evaluate_and_recommend(1, Facts(m, {}, **broken))
        assert (a.recommendation, a.reason, a.colour) == ("CRITICAL", reason, "🔴") and a.message.startswith(
            "Fix this first"
        )
    for name in ok:
        for bad in (Check(False, evidence="x"), Check(None, evidence="x"), Check(True), Check(True, declared_by="kim")):
            a = evaluate_and_recommend(1, Facts(m, ok | {name: bad}))
            assert (a.recommendation, a.reason) == ("WARN_STOP", "mandatory_check_failed") and name in a.message
        assert (
            evaluate_and_recommend(1, Facts(m, {k: v for k, v in ok.items() if k != name})).reason
            == "mandatory_check_failed"
        )


@pytest.mark.spec("SG6")
def test_latency_off_the_protocols_hardware_scores_nothing():
    m = at_target(1)
    m["detection_ms"] = replace(m["detection_ms"], metric=replace(m["detection_ms"].metric, hardware="2× CPU"))
    m["classification_ms"] = rec(5.0)
    bars = {b.name: b for b in score_bars(1, Facts(m))}
    assert bars["detection_ms"].verdict == bars["classification_ms"].verdict == "NOT_COMPARABLE" and performance_score(
        list(bars.values())
    ) == pytest.approx(4 / 6)


FAR, MISSED = {"detection_map50": rec(0.2)}, {"accuracy": rec(0.35)}


@pytest.mark.spec("SG6")
@pytest.mark.parametrize(
    "facts, override",
    [
        (dict(oom_events=1), "train.classification.batch_size=32"),
        (dict(vram_share=0.91), "train.classification.channels_last=false"),
        (dict(gpu_memory_gb=14.1), "train.detection.batch_size=8"),
        (dict(plateau=True), "train.classification.lr=2e-05"),
        (dict(val_drop=True), "train.classification.early_stopping.patience=10"),
        (dict(data_loading_s=3.1, cpus=12), "dataloader.num_workers=12"),
        (
            dict(data_loading_s=3.1, settings={"dataloader.num_workers": 8}),
            "dataloader.ram_optimization.cache_policy=lmdb",
        ),
        (dict(metrics=dict(detection_map50=rec(0.239))), "train.detection.epochs=100"),
        (dict(metrics=dict(accuracy=rec(0.319))), "train.classification.epochs=60"),
        (dict(oom_events=1, settings={"train.classification.batch_size": 6}), "train.classification.batch_size=3"),
        (dict(detector_plateau=True, metrics=FAR), "train.detection.lr=0.005"),
        (dict(detector_plateau=True, metrics=FAR, settings={"train.detection.lr": 0.002}), "train.detection.lr=0.001"),
        (dict(detector_overfit=True, metrics=FAR), "data.augment.detection.mosaic=1.0"),
        (dict(overfit=True, metrics=MISSED), "train.classification.drop_rate=0.2"),
        (
            dict(
                overfit=True,
                metrics=MISSED,
                settings={"train.classification.drop_rate": 0.5, "train.classification.label_smoothing": 0.0},
            ),
            "train.classification.label_smoothing=0.1",
        ),
        (
            dict(metrics=MISSED | {"class_imbalance_ratio": rec(10.5)}),
            "data.imbalance.use_class_weights=false data.imbalance.use_weighted_sampler=true",
        ),
    ],
)
def test_each_rule_and_its_override(facts, override):
    s = generate_optimization_suggestions(1, Facts(**facts))
    assert override in [x.override for x in s] and all(
        x.rule in ("detector_far", "classifier_near", "keep_decoded", "more_workers")
        for x in s
        if x.override != override
    )
    tree = load_config("two_stage", override.split()).to_dict()
    for key, value in (o.split("=") for o in override.split()):
        node = setting(tree, key)
        assert str(node).lower() == value.lower() or float(node) == float(value)


@pytest.mark.spec("SG6")
@pytest.mark.parametrize(
    "quiet",
    [
        dict(oom_events=1, settings={"train.classification.batch_size": 1}),
        dict(data_loading_s=9.0, cpus=4, settings={"dataloader.num_workers": 4, "pack.enabled": True}),
        dict(
            data_loading_s=9.0,
            cpus=4,
            settings={"dataloader.num_workers": 4, "dataloader.ram_optimization.cache_policy": "hotset"},
        ),
        dict(oom_events=0),
        dict(vram_share=0.90),
        dict(gpu_memory_gb=14.0),
        dict(plateau=False),
        dict(val_drop=False),
        dict(data_loading_s=3.0, cpus=16, settings={"dataloader.num_workers": 1}),
        dict(overfit=True, detector_plateau=True, detector_overfit=True),
        dict(metrics={"class_imbalance_ratio": rec(269.0)}),
        dict(overfit=False, metrics={"accuracy": rec(0.4), "class_imbalance_ratio": rec(269.0)}),
        {},
    ],
)
def test_no_rule_fires_at_its_limit(quiet):
    assert generate_optimization_suggestions(1, Facts(**quiet)) == []


@pytest.mark.spec("SG6")
def test_at_most_three_are_shown_and_thresholds_can_be_set():
    f = Facts(
        dict(detection_map50=rec(0.1), accuracy=rec(0.1)),
        oom_events=2,
        vram_share=0.99,
        gpu_memory_gb=15.0,
        plateau=True,
        val_drop=True,
        data_loading_s=9.0,
        cpus=16,
    )
    assert len(generate_optimization_suggestions(1, f)) == 9 and [
        s.rule for s in evaluate_and_recommend(1, f).suggestions
    ] == ["repeated_oom", "vram_above_90", "gpu_above_14_gb"]
    assert (
        A.THRESHOLDS == (1.0, 0.7, 0.5) and A.OOM_LIMIT == 5 and A.CORRUPTION_LIMIT == 0.01 and A.MAX_SUGGESTIONS == 3
    )
    f = Facts(
        {"accuracy": rec(0.9, prov=SYN), "detection_map50": rec(0.9, prov=SYN), "class_coverage": rec(0.4, prov=SYN)},
        checked(0),
    )
    assert (
        OptimizationAdvisor().evaluate(0, f).reason == "sufficient_performance"
        and OptimizationAdvisor((1.0, 0.9, 0.85)).evaluate(0, f).reason == "performance_too_low"
    )


@pytest.mark.spec("SG6")
@pytest.mark.parametrize("stage", ADVISOR_TARGETS)
def test_what_a_family_cannot_have_is_listed_and_costs_nothing(stage):
    "A family without a detector reaches PROCEED; a detector target that applies and is missing still costs its bar."
    why, m = "this family has no detector", at_target(stage)
    gone = {k: why for k in [*m, *ADVISOR_TARGETS[stage].checks] if k.startswith("detection_")}
    left = {k: v for k, v in m.items() if k not in gone}, {k: v for k, v in checked(stage).items() if k not in gone}
    a = evaluate_and_recommend(stage, Facts(*left, not_applicable=gone))
    assert (
        (a.recommendation, a.reason, a.performance_score) == ("RECOMMEND_PROCEED", "all_targets_met", 1.0)
        and a.does_not_apply == gone
        and not set(gone) & {b.name for b in a.bars}
    )
    b = evaluate_and_recommend(stage, Facts(*left))
    assert b.performance_score < 1 and set(b.not_measured) == {k for k in gone if k in m} and not b.does_not_apply


@pytest.mark.spec("SG5", "SG6")
def test_what_was_not_measured_is_named_with_its_reason_beside_the_score():
    m = {k: v for k, v in at_target(2).items() if k not in ("batch_size", "memory_efficiency")} | {
        "macro_f1": replace(rec(0.9), value=None, n=0, note="no photo")
    }
    a = evaluate_and_recommend(2, Facts(m, checked(2)))
    assert (
        set(a.not_measured) == {"batch_size", "macro_f1"}
        and "batch_size, macro_f1" in a.message.replace("macro_f1, batch_size", "batch_size, macro_f1")
        and "2 of 9" in a.message
    )
    assert (
        set(a.unmeasured) == {"batch_size", "macro_f1", "memory_efficiency"}
        and "no photo" in a.unmeasured["macro_f1"]
        and all(a.unmeasured.values())
    )
    checks = checked(2) | {
        "auto_batch_tuning_success": Check(None, note="the search needs a GPU"),
        "tensorboard_logging": Check(False, evidence="tb", note="no curve"),
    }
    a = evaluate_and_recommend(2, Facts(m, checks))
    assert (
        a.checks["auto_batch_tuning_success"] == "not measured: the search needs a GPU"
        and a.checks["tensorboard_logging"] == "failed: tb; no curve"
        and a.checks["class_balance_verification"].startswith("passed: ")
    )
    assert (
        "auto_batch_tuning_success (not measured: the search needs a GPU)" in a.message
        and "class_balance_verification" not in a.message
    )


def test_the_advisor_changes_nothing():
    settings = {"train.classification.batch_size": 64}
    f = Facts(dict(accuracy=rec(0.1)), oom_events=2, settings=settings)
    before = repr(f)
    assert evaluate_and_recommend(1, f) == evaluate_and_recommend(1, f) and repr(f) == before


# ---- the menu's record ---------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    a = evaluate_and_recommend(
        0,
        Facts(
            {
                "accuracy": rec(0.8, prov=SYN),
                "detection_map50": rec(0.9, prov=SYN),
                "class_coverage": rec(1.0, prov=SYN),
            },
            checked(0),
        ),
    )
    write_advice(tmp_path, a, {"status": "NO_GO", "label": "demo, synthetic", "reasons": ["ACC_BELOW_TARGET"]})
    return tmp_path


@pytest.mark.spec("SG6", "BX15")
def test_headless_prints_the_menu_and_records_no_choice(run, capsys):
    assert not is_interactive()
    r = advisor_menu(run)
    assert r["user_choice"] is None and read_advice(run)["user_choice"] is None
    page, text = static_html(r), static_text(r)
    assert page.index("Gate NO GO: ACC_BELOW_TARGET") < page.index(
        f"{int(100 * r['performance_score'])} %"
    ) and text.startswith("🔴 gate NO GO")
    for part in (r["message"], r["suggestions"][0]["override"], *(o["label"] for o in r["user_options"])):
        assert part in page and part in text
    assert "no choice" in text.lower() and "No choice recorded" in page and "button" not in page


@pytest.mark.spec("SG6")
def test_a_kernel_of_jupyters_server_gets_buttons_and_the_runner_does_not(monkeypatch):
    class Shell:
        kernel, user_ns = object(), {}

    monkeypatch.setattr("IPython.get_ipython", lambda: Shell)
    monkeypatch.setenv("JPY_SESSION_NAME", "/x/nb.ipynb")
    monkeypatch.delenv("PILLSNAP_NOTEBOOK", raising=False)
    assert is_interactive()
    monkeypatch.setenv("PILLSNAP_NOTEBOOK", "sha")
    assert not is_interactive()
    monkeypatch.delenv("PILLSNAP_NOTEBOOK")
    monkeypatch.delenv("JPY_SESSION_NAME")
    assert not is_interactive()


@pytest.mark.parametrize(
    "status, dot", [("GO", "🟢"), ("NO_GO", "🔴"), ("NOT_MEASURED", "⚪"), ("TIME_CAP_SUCCESS", "🟡")]
)
def test_green_is_a_gate_that_is_go(status, dot):
    "On the scorecard too the gate's word comes first, and the advisor's is no headline beside a gate that is not GO."
    from pillsnap.evaluation.scorecard import scorecard_markdown

    metrics = {"accuracy": rec(0.95), "detection_map50": rec(0.95), "class_coverage": rec(1.0), "macro_f1": rec(0.95)}
    advice = evaluate_and_recommend(0, Facts(metrics, checked(0))).to_dict() | {"user_choice": None}
    gate = {"status": status, "label": "demo", "reasons": [], "not_measured": [], "notes": []}
    card = {
        "stage": 0,
        "run_id": "r",
        "made": "today",
        "hardware": "h",
        "data": "aihub",
        "gate": gate,
        "advice": advice,
        "rows": [],
        "latency": [],
        "notes": [],
        "split": "group",
        "do_not_rely_on": [],
        "without_clean_photo": [],
        "confusions": [],
        "names": {},
    }
    page = scorecard_markdown(card)
    assert advice["recommendation"] == "RECOMMEND_PROCEED" and f"**Gate: {dot} {status}**" in page
    assert ("🟢" in page) == (status == "GO") and page.index("Gate: ") < page.index("RECOMMEND PROCEED")
    assert ("the gate decides" in page) == (status != "GO")


def test_make_test_runs_the_notebooks_as_a_person_sees_them(monkeypatch):
    "nbdev_test's shell has no kernel: with the variable that `make test` sets, it is shown what JupyterLab shows."
    recipe = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "nbdev_test" in line)
    (name,) = re.findall(r"\b(JPY_SESSION_NAME)=\S+ nbdev_test", recipe)

    class Shell:
        user_ns = {}

    monkeypatch.setattr("IPython.get_ipython", lambda: Shell)
    for other in ("PILLSNAP_NOTEBOOK", "PILLSNAP_HEADLESS", "COLAB_RELEASE_TAG", name):
        monkeypatch.delenv(other, raising=False)
    assert not is_interactive()
    monkeypatch.setenv(name, "notebook")
    assert is_interactive()


@pytest.mark.spec("SG6")
def test_a_click_is_written_and_a_second_one_changes_ones_mind(run):
    buttons = build_menu(run).children[2].children
    assert [b.description for b in buttons] == [o["label"] for o in read_advice(run)["user_options"]] and len(
        buttons
    ) == 3
    buttons[1].click()
    assert read_advice(run)["choice"]["via"] == "widget"
    buttons[2].click()
    r = read_advice(run)
    assert r["user_choice"] == r["user_options"][2]["id"] and [c["id"] for c in r["earlier_choices"]] == [
        r["user_options"][1]["id"]
    ]
    assert (buttons[1].icon, buttons[2].icon) == ("", "check")


@pytest.mark.spec("SG6")
def test_choices_by_parameter(run):
    assert advisor_menu(run, user_choice="2")["user_choice"] == read_advice(run)["user_options"][1]["id"]
    assert advisor_menu(run, user_choice=1)["choice"]["via"] == "parameter"
    for bad in ("0", "4", "nonsense", -1):
        with pytest.raises(PillsnapError):
            record_choice(run, bad)
    assert read_advice(run)["choice"]["via"] == "parameter"
    with pytest.raises(PillsnapError, match="run the evaluation job first"):
        advisor_menu(run / "nowhere")


# ---- the sealed test -----------------------------------------------------------------------------


@pytest.mark.spec("BX7")
def test_an_altered_ledger_is_refused(tmp_path):
    for i in range(4):
        append_ledger(tmp_path, "gate", stage=4, status="NO_GO", n=i)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines()
    for broken in (
        [lines[1], *lines[:1], *lines[2:]],
        lines[1:],
        lines[:1] + lines[2:],
        [lines[0].replace("NO_GO", "GO"), *lines[1:]],
        ["{not json", *lines[1:]],
    ):
        path.write_text("\n".join(broken) + "\n")
        with pytest.raises(PillsnapError, match="altered"):
            read_ledger(tmp_path)
    path.write_text("\n".join(lines) + "\n")
    assert [e["n"] for e in read_ledger(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.spec("BX7", "X80")
@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_ledger_that_lost_its_last_lines_is_refused(tmp_path, left):
    "Without the line of its opening, the sealed test could be opened a second time."
    for kind in ("decision", "open", "result"):
        append_ledger(tmp_path, kind, stage=4, opening=2)
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines(keepends=True)
    if left:
        path.write_text("".join(lines[:left]))
    else:
        path.unlink()
    for use in (read_ledger, lambda run: append_ledger(run, "open")):
        with pytest.raises(PillsnapError, match=f"lost lines: run.json knows 3, the file has {left}"):
            use(tmp_path)
    path.write_text("".join(lines))
    assert len(read_ledger(tmp_path)) == 3


def test_a_line_that_was_written_just_before_the_program_died_is_kept(tmp_path, monkeypatch):
    "The ledger may be a line ahead of run.json, never behind it."
    append_ledger(tmp_path, "gate", stage=4, status="NO_GO")
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("pillsnap.evaluation.ledger.change_run_record", mock.Mock(side_effect=KeyboardInterrupt))
        append_ledger(tmp_path, "open")
    append_ledger(tmp_path, "result", opening=2)
    assert [e["kind"] for e in read_ledger(tmp_path)] == ["gate", "open", "result"]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_a_reason_may_hold_any_character(tmp_path, mark):
    record_decision(tmp_path, "kim", f"shown to{mark}the team")
    record_decision(tmp_path, "lee", "again")
    assert [e["by"] for e in read_ledger(tmp_path)] == ["kim", "lee"]


@pytest.mark.parametrize("line", [b"[1]\n", b"\xff\n", b""])
def test_what_is_no_ledger_is_said_to_be_none(tmp_path, line):
    (tmp_path / LEDGER).write_bytes(line)
    with pytest.raises(PillsnapError, match="altered at line 1"):
        read_ledger(tmp_path)


def decide_often(root, who: str) -> None:
    for n in range(20):
        record_decision(root, who, f"reason {n}")


@pytest.mark.spec("X80")
def test_of_two_who_write_the_ledger_at_once_no_line_is_lost(tmp_path):
    "An opening that disappeared would let the sealed test be opened a second time."
    both = [multiprocessing.Process(target=decide_often, args=(tmp_path, who)) for who in ("kim", "lee")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert Counter(e["by"] for e in read_ledger(tmp_path)) == {"kim": 20, "lee": 20}
