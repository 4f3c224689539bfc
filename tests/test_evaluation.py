"""The evaluation stage on a small synthetic run: what it reads, what it writes, and what it refuses."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from terminal import search_path

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json, sha256_file
from pillsnap.core.jobs import RunFolder, readings, record_path, why_stale
from pillsnap.core.records import Metric, Provenance
from pillsnap.dataset.splitfiles import SplitData, load_split_data
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation import answers as A
from pillsnap.evaluation import checks as K
from pillsnap.evaluation import evaluation as E
from pillsnap.evaluation import figures as R
from pillsnap.evaluation import measurements as P
from pillsnap.evaluation import scorecard as S
from pillsnap.evaluation.advisor import ADVISOR_TARGETS, Check, evaluate_and_recommend, get_stage_target
from pillsnap.evaluation.gates import simple_stage_evaluation
from pillsnap.evaluation.ledger import read_ledger
from pillsnap.evaluation.menu import advisor_word, read_advice
from pillsnap.models.metrics import detection_ap
from pillsnap.models.pipeline import Pipeline

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("evaluation.latency_warmup=1", "evaluation.latency_runs=4", "train.num_threads=1")
# What `made` measured already, and a repeated evaluation may leave out.
LEAN = (*QUICK, "evaluation.objects=0", "evaluation.condition_photos=0", "evaluation.hard_case_pictures=0")

HOOK = """
import json, os, sys
opened = []
def watch(event, args):
    if event in ("open", "os.listdir", "os.scandir") and args and isinstance(args[0], (str, bytes, os.PathLike)): \
opened.append((event, os.fsdecode(args[0])))
sys.addaudithook(watch)
from pillsnap.evaluation.evaluation import EvaluationJob
res = EvaluationJob(run_dir=sys.argv[1], config="smoke", overrides=json.loads(sys.argv[2])).run()
print("REPORT", json.dumps({"sealed": [o for o in opened if "/data/val" in o[1]], \
"photos": sum("/data/train/images" in p for _, p in opened), \
"training": [m for m in sys.modules if m.startswith("pillsnap.training")], "verdict": res.verdict}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, delivery):
    "A run with untrained models, evaluated in a process that is watched."
    root = tmp_path_factory.mktemp("evaluation") / "run"
    shutil.copytree(delivery, root / "delivery")
    job = E.EvaluationJob(run_dir=str(root), config="smoke", overrides=QUICK)
    P.smoke_evaluation(RunFolder(root, "evaluation"), job.cfg_in(root))
    done = subprocess.run(
        [sys.executable, "-c", HOOK, str(root), json.dumps(QUICK)],
        capture_output=True,
        text=True,
        cwd=root.parent,
        env={**os.environ, "PYTHONPATH": search_path(ROOT), "YOLO_CONFIG_DIR": str(root.parent)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPORT"))[7:])
    return root, report


def json_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


@pytest.fixture
def copy(made, tmp_path):
    "A copy of that run to break."
    shutil.copytree(made[0], tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def no_picture(figure, path: Path) -> Path:
    "An empty file in place of a figure: drawing them is nearly half of so small an evaluation."
    plt.close(figure)
    path.write_bytes(b"")
    return path


def again(root, **change):
    "Measure once more, without pictures; a new measurement leaves out the parts whose tests read the first one."
    kw = dict(run_dir=str(root), config="smoke", overrides=LEAN if change.get("remeasure", True) else QUICK) | change
    with mock.patch.object(E, "save_fig", no_picture):
        return E.EvaluationJob(**kw).run()


@pytest.mark.spec("BX17")
def test_the_panel_of_conditions_is_part_of_an_evaluation(made):
    "Its file has every natural condition of the clean photos; its figures and its picture are the run's."
    root, _ = made
    doc, m, _ = S.read_evaluation(root)
    panel = read_json(root / "reports" / "conditions.json")
    assert panel["photos"] == doc["parts"]["clean"] and panel["sample"] == 6
    by_light = [s for s in panel["strata"] if s["axis"] == "light"]
    assert sum(s["n"] for s in by_light) == panel["photos"]
    right = sum(s["n"] * s["accuracy"] for s in by_light) / panel["photos"]
    assert right == pytest.approx(m["accuracy"].value)
    assert {"blur", "JPEG quality", "white balance", "exposure", "domain"} <= {s["axis"] for s in panel["strata"]}
    assert m["phone_gap"].n == m["accuracy_phone"].n == 6
    assert panel["weak"] == [] and "enough clean photos" in m["weak_conditions"].note, "eight photos prove nothing"
    assert (root / "reports" / "evaluation_conditions.png").is_file()
    figures = {r["figure"] for r in read_json(root / "reports" / "scorecard.json")["rows"]}
    assert {"weakest_condition", "accuracy_phone", "phone_gap"} <= figures


# ---- what it reads -------------------------------------------------------------------------------


@pytest.mark.spec("SP4", "SG1")
def test_the_sealed_test_is_not_opened_and_training_is_not_imported(made):
    root, report = made
    assert report["photos"] > 20 and (root / "delivery/data/val").is_dir()
    assert report["sealed"] == [] and report["training"] == []


def imported(node: ast.AST) -> str:
    "The modules that a statement imports, empty for any other statement."
    if isinstance(node, ast.ImportFrom):
        return node.module or ""
    return " ".join(a.name for a in node.names) if isinstance(node, ast.Import) else ""


def test_the_wing_does_not_know_the_training_wing():
    for path in (ROOT / "pillsnap/evaluation").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = imported(node)
            assert "training" not in name and "deployment" not in name, (path.name, name)


# ---- what it writes ------------------------------------------------------------------------------


@pytest.mark.spec("EV3", "DT2", "BX2")
def test_figures_can_be_reckoned_again_from_the_predictions(made):
    root, _ = made
    doc, m, _ = S.read_evaluation(root)
    every = pd.read_csv(root / "reports/predictions_single.csv")
    t = every[every.part == "clean"]
    assert len(t) == m["accuracy"].n == m["n_eval_samples"].value == doc["parts"]["clean"] and every.path.is_unique
    for part, name in (("val", "selection"), ("calib", "calibration")):
        mine = every[every.part == part]
        assert len(mine) == m[f"accuracy_{name}"].n == doc["parts"][part] > 0 and m[
            f"accuracy_{name}"
        ].value == pytest.approx((mine.true == mine.answered).mean())
    assert m["accuracy"].value == pytest.approx((t.true == t.answered).mean()) == pytest.approx((t["rank"] == 1).mean())
    assert m["top5"].value == pytest.approx((t["rank"] <= 5).mean()) and m[
        "accuracy_crop_true_box"
    ].value == pytest.approx((t.true == t.answered_crop).mean())
    rows = json_lines(root / "reports/predictions_boxes.jsonl")
    assert {r["part"] for r in rows} == {"val", "clean"} and {
        s.path for s in A.eval_photos(load_split_data(root, 0)) if s.part != "calib"
    } == {r["path"] for r in rows}
    rows = [r for r in rows if r["part"] == "clean"]
    ap = detection_ap(
        [(np.array(r["boxes"]), np.array(r["confidence"])) for r in rows], [np.array(r["truth"]) for r in rows]
    )
    assert m["detection_map50"].value == pytest.approx(ap["mAP@0.5"], abs=1e-3) and m["detection_map50"].n == len(rows)
    combos = json_lines(root / "reports/predictions_combo.jsonl")
    assert len(combos) == doc["photos"]["combos"] and all(
        c["mode_used"] == c["mode_requested"] == "combo" for c in combos
    )
    combos = [c for c in combos if c["part"] == "clean"]
    assert m["combo_pill_accuracy"].value == pytest.approx(
        sum(c["right"] for c in combos) / sum(c["pills"] for c in combos)
    )


@pytest.mark.spec("BX2", "EV6")
def test_every_figure_is_a_record(made):
    doc, metrics, latency = S.read_evaluation(made[0])
    for name, m in metrics.items():
        assert m.data == "synthetic" and len(m.class_map_hash) == 64 and m.hardware and m.commit
        assert m.measured or m.note or m.value is None, name
        if m.value is None:
            assert m.n == 0 and m.note, name
    assert {r.scope for r in latency} == {"classifier", "detector", "single", "combo"} and {
        r.percentile for r in latency
    } == {50, 95}
    assert all((r.batch, r.warmup, r.metric.n, r.precision) == (1, 1, 4, "fp32") for r in latency)


@pytest.mark.spec("SG1", "SG6", "BX2")
def test_the_scorecard_holds_both_columns_and_the_label(made):
    root, report = made
    card, text = read_json(root / "reports/scorecard.json"), (root / "reports/scorecard.md").read_text(encoding="utf-8")
    rows = {r["figure"]: r for r in card["rows"]}
    assert (
        card["gate"]["label"] == "demo, synthetic"
        and "demo, synthetic" in text
        and "SYNTHETIC DATA" in text
        and card["gate"]["status"] in ("NO_GO", "NOT_MEASURED")
    )
    assert (
        rows["accuracy"]["gate"].startswith("≥ 0.90")
        and rows["accuracy"]["advisor"].startswith("≥ 0.9")
        and rows["accuracy"]["business"] == ""
    )
    assert rows["combo_set_accuracy"]["how"] == "NOT_MEASURED" and "30 are needed" in rows["combo_set_accuracy"]["note"]
    assert rows["leak_gap"]["how"] == "NOT_MEASURED"
    assert all(
        r["how"] == "measured" and r["data"] == "synthetic" and r["n"] for r in card["rows"] if r["value"] is not None
    )
    assert card["run_id"] == read_json(root / "run.json")["run_id"] and card["run_id"] in text
    for part in (advisor_word(card["advice"], card["gate"]), "no choice", "NOT_COMPARABLE"):
        assert part in text
    assert str(rows["accuracy"]["value"]) in text and report["verdict"].startswith(card["gate"]["status"])


@pytest.mark.spec("SG8", "EV6")
def test_the_badge_is_a_remark_and_the_mode_stays(made):
    root, _ = made
    doc, m, _ = S.read_evaluation(root)
    every = json_lines(root / "hard_cases/single.jsonl")
    assert doc["badges"] == sum(r["badge"] is not None for r in every) and doc["hard_cases"] >= len(every)
    lines = [r for r in every if "low_confidence" in r["hints"]]
    assert len(lines) > 0 and all(
        line["mode_used"] == line["mode_requested"] == "single"
        and line["badge"] == "combo 권장"
        and line["single_confidence"] < 0.3
        for line in lines
    )
    assert m["mode_kept"].value == 1.0 and "combo 권장" in (root / "logs/pillsnap.evaluation.log").read_text(
        encoding="utf-8"
    )
    assert "combo 권장" not in json.dumps(read_advice(root), ensure_ascii=False) and not any(
        "combo 권장" in json.dumps(r, ensure_ascii=False) for r in read_json(root / "reports/scorecard.json")["rows"]
    )


# ---- which photos ---------------------------------------------------------------------------------


def name_the_training(root, **change):
    "Records as the training jobs leave them: the split that they read, the checkpoints that they wrote."
    split = "artifacts/stage0/splits.json"
    for job in ("classifier", "detector"):
        best = f"checkpoints/{job}/best.pt"
        rec = dict(
            stage=job,
            status="finished",
            seconds=3.0,
            settings={},
            inputs={split: sha256_file(root / split)},
            outputs={best: sha256_file(root / best)},
        )
        save_json(rec | change, record_path(root, job))


@pytest.mark.spec("X81", "X82", "BX1")
def test_what_is_scored_is_the_evaluation_set_and_nothing_of_training(made):
    "Exactly the evaluation set; no path, group or near-duplicate of training; no group gives two kinds of figures."
    root, _ = made
    data, every = load_split_data(root, 0), pd.read_csv(root / "reports/predictions_single.csv")
    combos = json_lines(root / "reports/predictions_combo.jsonl")
    boxes = json_lines(root / "reports/predictions_boxes.jsonl")
    eval_set = data.eval_set.drop_duplicates("path").set_index("path")
    scored = {**dict(zip(every.path, every.part)), **{c["path"]: c["part"] for c in combos}}
    assert scored == eval_set["split"].to_dict() and set(scored.values()) == {"val", "calib", "clean"}
    assert {b["path"]: b["part"] for b in boxes} == {p: k for p, k in scored.items() if k != "calib"}
    assert {s.path for s in A.eval_photos(data)} == set(eval_set.index)
    mine = eval_set.loc[list(scored)]
    assert not set(scored) & set(data.train["path"]) and not set(mine["group_id"]) & set(data.train["group_id"])
    assert not (set(mine["dup_id"]) - {""}) & set(data.train["dup_id"])
    assert mine.groupby("group_id")["split"].nunique().max() == 1


@pytest.mark.spec("X81")
@pytest.mark.parametrize("kind", ["path", "group_id", "dup_id"])
def test_each_way_of_touching_training_is_found(made, kind):
    data = load_split_data(made[0], 0)
    todo = A.eval_photos(data)
    assert A.photos_touching_training(todo, data.train) == []
    victim = next(s for s in todo if s.part == "clean")
    row = data.train.iloc[:1].assign(**{kind: {"path": victim.path, "group_id": victim.group, "dup_id": "d9"}[kind]})
    todo = [replace(s, dup="d9") if s is victim else s for s in todo]
    assert victim.path in A.photos_touching_training(todo, row) and victim.path not in A.photos_touching_training(
        todo, data.train
    )


@pytest.mark.spec("X81", "BX2")
def test_an_evaluation_set_that_touches_training_was_not_measured(copy, monkeypatch):
    "Whoever scores training photos gets NOT_MEASURED: LEAK, on the scorecard and in the ledger."
    real = A.eval_photos
    name_the_training(copy)
    again(copy)
    doc, m, _ = S.read_evaluation(copy)
    assert (
        m["train_overlap"].measured
        and m["train_overlap"].value == 0
        and m["train_overlap"].n == len(real(load_split_data(copy, 0)))
    )
    monkeypatch.setattr(
        P,
        "eval_photos",
        lambda data, _: real(replace(data, eval_set=pd.concat([data.train.assign(split="clean"), data.eval_set]))),
    )
    again(copy)
    card = read_json(copy / "reports/scorecard.json")
    assert (card["gate"]["status"], card["gate"]["reasons"]) == ("NOT_MEASURED", ["LEAK"]) and "accuracy" in card[
        "gate"
    ]["not_measured"]
    assert "LEAK" in (copy / "reports/scorecard.md").read_text(encoding="utf-8") and any(
        "LEAK" in n for n in card["notes"]
    )
    assert read_ledger(copy)[-1]["reasons"] == ["LEAK"]


@pytest.mark.spec("X81", "BX2")
def test_the_overlap_is_unknown_where_the_training_rows_are(copy):
    "Without a record, after another split, or with another checkpoint nothing is claimed, and the gate stays shut."
    data = load_split_data(copy, 0)

    def record():
        return R.overlap_record(copy, data, A.eval_photos(data), Provenance("synthetic", "a" * 64, "b" * 64))

    assert not record().measured and "does not say which split" in record().note
    name_the_training(copy)
    assert record().measured and record().value == 0
    name_the_training(copy, inputs={"artifacts/stage0/splits.json": "0" * 64})
    assert not record().measured and "another split" in record().note
    name_the_training(copy, outputs={})
    assert not record().measured and "is not the checkpoint" in record().note
    assert "train_overlap" in simple_stage_evaluation(0, S.gate_facts({"train_overlap": record()}, [])).not_measured


@pytest.mark.spec("X81")
def test_an_image_split_is_named_and_never_goes(tmp_path, delivery):
    "The whole stage on a split that deals photos one by one."
    root = tmp_path / "run"
    shutil.copytree(delivery, root / "delivery")
    settings = (*LEAN, "data.group_by=image", "evaluation.calibration=false")
    job = E.EvaluationJob(run_dir=str(root), config="smoke", overrides=settings)
    P.smoke_evaluation(RunFolder(root, "evaluation"), job.cfg_in(root))
    name_the_training(root)
    again(root, overrides=settings)
    card, text = read_json(root / "reports/scorecard.json"), (root / "reports/scorecard.md").read_text(encoding="utf-8")
    assert card["gate"]["status"] == "NO_GO" and "LEAKY_SPLIT" in card["gate"]["reasons"] and card["split"] == "image"
    assert "THIS SPLIT LEAKS" in text and "data.group_by=image" in text


@pytest.mark.spec("X81")
@pytest.mark.parametrize(
    "group_by, twin, kept",
    [("capture", False, True), ("image", False, False), ("image", True, True), ("image", None, False)],
)
def test_only_the_leak_gap_twin_may_part_capture_groups(copy, group_by, twin, kept):
    "The twin is trained on a leaking split on purpose; every other image-level split misses its gate point."
    data = load_split_data(copy, 0)
    header = {**data.header, "params": {**data.header["params"], "group_by": group_by}}
    header.update({} if twin is None else {"leak_gap_twin": twin})
    record = R.split_record(replace(data, header=header), Provenance("synthetic", "a" * 64, "b" * 64))
    assert record.measured and record.value == kept
    gate = simple_stage_evaluation(0, S.gate_facts({"split_by_group": record}, []))
    assert ("LEAKY_SPLIT" in gate.reasons) is not kept


@pytest.mark.spec("SG3", "BX2")
@pytest.mark.parametrize("drugs", [2, 1000, 4523])
def test_the_imbalance_is_measured_whatever_the_number_of_drugs(drugs):
    "Counted from a table in as long as it takes: no floor under the clock, and no photo that would have to be opened."
    keys = [f"K-{i:06d}" for i in range(drugs)]
    train = pd.DataFrame({"kind": "single", "class_key": [*keys, *keys[:1] * 4]})
    m = R.imbalance_record(
        SplitData(train, train, train, ClassMap(keys), {}, 0), Provenance("synthetic", "a" * 64, "b" * 64)
    )
    assert m.measured and m.kind == "computed" and m.value == 5.0 and 0 < m.seconds < 1 and m.seconds != 1e-3


@pytest.mark.spec("SG8", "EV4")
def test_the_mode_that_answered_is_what_is_reported(copy, monkeypatch):
    "A single that takes combo's branch lowers mode_kept and stands as such in hard_cases."
    real, n = Pipeline.views, []

    def switched(self, image, mode):
        n.append(1)
        return replace(real(self, image, mode), mode_used="combo" if len(n) % 2 else mode)

    monkeypatch.setattr(Pipeline, "views", switched)
    again(copy)
    doc, m, _ = S.read_evaluation(copy)
    singles, combos = doc["photos"]["singles"], doc["photos"]["combos"]
    assert m["mode_kept"].n == singles + combos and m["mode_kept"].value == pytest.approx(
        (singles // 2 + combos) / (singles + combos)
    )
    lines = json_lines(copy / "hard_cases/single.jsonl")
    assert {line["mode_used"] for line in lines} == {"single", "combo"} and {
        line["mode_requested"] for line in lines
    } == {"single"}
    assert any(
        f"{m['mode_kept'].value:.2%} of {m['mode_kept'].n} photos" in t
        for t in read_json(copy / "reports/scorecard.json")["notes"]
    )


@pytest.mark.spec("SG6", "X7")
def test_the_thresholds_of_the_configuration_reach_the_advisor(copy, monkeypatch):
    passed = {check: Check(True, "reports/evaluation.json") for check in get_stage_target(0).checks}
    monkeypatch.setattr(K, "with_declared", lambda measured, _: dict(measured) | passed)

    def advice(thresholds):
        over = (f"evaluation.advisor_thresholds={list(thresholds)}", "evaluation.min_eval_samples=3")
        again(copy, remeasure=False, overrides=(*QUICK, *over))
        return read_advice(copy)

    strict, lax = advice((1.0, 0.999, 0.998)), advice((1.0, 0.001, 0.0))
    assert strict["performance_score"] == lax["performance_score"] and 0 < lax["performance_score"] < 0.9
    assert (strict["reason"], lax["reason"]) == ("performance_too_low", "sufficient_performance")


@pytest.mark.spec("BX7")
def test_a_drug_that_cannot_be_named_stands_on_the_scorecard(copy):
    "Drug, name, what it is mistaken for, share and n, as the predictions of the clean photos have it."
    t = pd.read_csv(copy / "reports/predictions_single.csv").query("part == 'clean'")
    right = (t.true == t.answered).groupby(t.true).mean()
    again(copy, remeasure=False)
    card, text = read_json(copy / "reports/scorecard.json"), (copy / "reports/scorecard.md").read_text(encoding="utf-8")
    rows = card["do_not_rely_on"]
    assert (
        {r["drug"] for r in rows} == set(right[right < R.RELIABLE].index)
        and rows
        and [r["right"] for r in rows] == sorted(r["right"] for r in rows)
    )
    for r in rows:
        mine = t[t.true == r["drug"]]
        wrong = mine.answered[mine.answered != r["drug"]].value_counts()
        assert (
            r["n"] == len(mine)
            and r["share"] == pytest.approx(wrong.max() / len(mine))
            and wrong[r["mistaken_for"]] == wrong.max()
        )
        assert r["name"] and r["mistaken_for_name"] and r["name"] in text
    assert "## Do not rely on" in text
    doc = read_json(copy / "reports/evaluation.json")
    save_json(doc | {"unreliable": []}, copy / "reports/evaluation.json")
    again(copy, remeasure=False)
    assert "is named rightly in 75%" in (copy / "reports/scorecard.md").read_text(encoding="utf-8")


# ---- gates and verdicts --------------------------------------------------------------------------


@pytest.mark.spec("BX15")
def test_a_measurement_with_other_settings_is_not_kept(copy):
    "Figures that were measured with another setting are never shown as those of this one."
    before = read_json(copy / "reports/evaluation.json")
    again(copy, remeasure=False, overrides=(*LEAN, "evaluation.latency_runs=7"))
    after = read_json(copy / "reports/evaluation.json")
    assert after["clean_readings"] == before["clean_readings"] + 1, "it was measured again"
    assert after["settings"]["evaluation.latency_runs"] == 7 != before["settings"]["evaluation.latency_runs"]
    assert "settings changed" in (copy / "logs/pillsnap.evaluation.log").read_text(encoding="utf-8")
    again(copy, remeasure=False, overrides=(*LEAN, "evaluation.latency_runs=7"))
    assert read_json(copy / "reports/evaluation.json") == after


@pytest.mark.spec("BX15", "SG6")
def test_a_kept_measurement_gives_the_same_card_and_a_choice_is_recorded(copy):
    before, lines = read_json(copy / "reports/scorecard.json"), len(read_ledger(copy))
    res = again(copy, remeasure=False, user_choice="2")
    card = read_json(copy / "reports/scorecard.json")
    assert {k: v for k, v in card.items() if k not in ("advice", "baseline")} == {
        k: v for k, v in before.items() if k not in ("advice", "baseline")
    }
    assert (
        read_advice(copy)["user_choice"] == card["advice"]["user_choice"] == read_advice(copy)["user_options"][1]["id"]
    )
    assert len(read_ledger(copy)) == lines == 1 and res.figures
    again(copy, remeasure=False)
    assert read_advice(copy)["choice"]["via"] == "parameter"  # the same advice keeps its choice
    with pytest.raises(PillsnapError, match="no option"):
        again(copy, remeasure=False, user_choice="9")


@pytest.mark.spec("BX7")
def test_each_evaluation_that_opens_the_clean_photos_is_counted(copy, monkeypatch):
    def counted():
        return len(readings(copy, P.clean_part(0))), read_json(copy / "reports/scorecard.json")["clean_readings"]

    assert counted() == (1, 1) and "were read once" in (copy / "reports/scorecard.md").read_text(encoding="utf-8")
    again(copy, remeasure=False)
    assert counted() == (1, 1)  # a kept measurement opens no photo
    again(copy)
    assert counted() == (2, 2) and "were read 2 times" in (copy / "reports/scorecard.md").read_text(encoding="utf-8")
    monkeypatch.setattr(P, "_answer_photos", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again(copy)
    assert len(readings(copy, P.clean_part(0))) == 3  # photos were opened, though no figure came of it
    assert readings(copy, P.clean_part(0))[0]["photos"] == sum(
        p.part == "clean" for p in A.eval_photos(load_split_data(copy, 0))
    )


@pytest.mark.spec("BX8")
def test_other_checkpoints_do_not_get_old_figures(copy):
    from pillsnap.models.factory import fresh_classifier_checkpoint

    made_at = read_json(copy / "reports/evaluation.json")["made"]
    best = copy / "checkpoints/classifier/best.pt"
    keys = read_json(copy / "artifacts/stage0/classes.json")["keys"]
    fresh_classifier_checkpoint(best, "test_resnet", ClassMap([*keys[:-1], "K-999999"]), 96)
    with pytest.raises(PillsnapError, match="K-999999"):
        again(copy, remeasure=False)
    (copy / "checkpoints/detector/best.pt").unlink()
    fresh_classifier_checkpoint(best, "test_resnet", ClassMap(keys), 96, seed=5)
    again(copy, remeasure=False)
    doc, m, latency = S.read_evaluation(copy)
    assert (
        doc["inputs"]["checkpoints/classifier/best.pt"] != read_json(record_path(copy, "evaluation"))["run_id"]
        and "no detector was trained" in doc["absent"]["detector"]
    )
    assert (
        m["accuracy"].measured
        and not m["detection_map50"].measured
        and m["detection_map50"].note == m["combo_pill_accuracy"].note == doc["absent"]["detector"]
    )
    assert {r.scope for r in latency} == {"classifier", "single"}
    card = read_json(copy / "reports/scorecard.json")
    assert (
        "map50" in card["gate"]["not_measured"]
        and card["advice"]["reason"] == "mandatory_check_failed"
        and "detection_model_loading" in card["advice"]["message"]
    )
    assert made_at <= doc["made"]


def test_without_ultralytics_the_single_mode_is_still_measured(copy, monkeypatch):
    import pillsnap.models.yolo as yolo

    def gone(*a, **k):
        raise PillsnapError("the detector needs ultralytics, which cannot be imported here")

    monkeypatch.setattr(yolo, "load_ultralytics", gone)
    again(copy)
    doc, m, _ = S.read_evaluation(copy)
    assert (
        "needs ultralytics" in doc["absent"]["detector"]
        and m["accuracy"].measured
        and "needs ultralytics" in m["detection_map50"].note
    )


PROV = Provenance("synthetic", "a" * 64, "b" * 64)


def recorded(root, job, status="finished", **more):
    "Write the record of a job that took three seconds."
    save_json(dict(status=status, seconds=3.0, settings={}, **more), record_path(root, job))


def all_finished(root):
    "Write a record of each job before the evaluation, finished at its first attempt."
    for s in K.BEFORE:
        recorded(root, s)


@pytest.mark.spec("SG1")
def test_crashes_come_from_the_job_records(tmp_path):
    assert not R.crash_record(tmp_path, PROV).measured
    all_finished(tmp_path)
    assert R.crash_record(tmp_path, PROV).value is True and R.crash_record(tmp_path, PROV).measured
    recorded(tmp_path, "detector", "failed")
    m = R.crash_record(tmp_path, PROV)
    assert m.value is False and "detector: failed" in m.note
    assert "CRASH_DETECTED" in simple_stage_evaluation(0, {"no_crashes": m}).reasons


@pytest.mark.spec("SG1")
def test_a_crash_before_the_last_attempt_is_counted(tmp_path):
    all_finished(tmp_path)

    def attempt(status, raised="", settings="a"):
        return dict(
            status=status, started="", seconds=1.0, error=f"{raised}: no", raised=raised, settings=settings, boot=""
        )

    def after(job, *attempts):
        recorded(tmp_path, job, attempts=[*attempts, attempt("finished")])
        m = R.crash_record(tmp_path, PROV)
        recorded(tmp_path, job)
        return m

    m = after("classifier", attempt("finished"), attempt("failed", "ValueError"), attempt("died"))
    assert (
        m.value is False
        and "classifier: crashed 2 times" in m.note
        and "CRASH_DETECTED" in simple_stage_evaluation(0, {"no_crashes": m}).reasons
    )
    assert after("classifier", attempt("failed", "PillsnapError")).value is False, (
        "a loss that is no number is a crash of the training"
    )
    assert after("conversion", attempt("failed", "PillsnapError")).value is True, (
        "a delivery that is refused in words is no crash"
    )
    assert after("conversion", attempt("failed", "OSError")).value is False
    assert (
        after(
            "detector", attempt("interrupted"), attempt("restarted"), attempt("failed", "ValueError", settings="b")
        ).value
        is True
    )


@pytest.mark.spec("SG1")
@pytest.mark.parametrize("job", ["conversion", "splits", "classifier", "detector", "interleaved", "retrieval"])
def test_a_crash_of_any_job_before_the_evaluation_is_seen(tmp_path, job):
    all_finished(tmp_path)
    recorded(tmp_path, job, "died")
    m = R.crash_record(tmp_path, PROV)
    assert m.value is False and f"{job}: died" in m.note


@pytest.mark.spec("SG1")
def test_the_baseline_is_the_best_there_was(tmp_path):
    prov = Provenance("aihub", "a" * 64, "b" * 64)

    def rec(v, p=prov):
        return p.metric("accuracy", v, n=3000, seconds=60.0)

    now = rec(0.80)
    assert S.best_before(tmp_path, now) is None
    save_json(
        {"accuracy_record": rec(0.83).to_dict(), "baseline": rec(0.87).to_dict()}, tmp_path / "reports/scorecard.json"
    )
    assert S.best_before(tmp_path, now).value == 0.87
    assert (
        "REGRESSION_TOO_LARGE"
        in simple_stage_evaluation(1, S.gate_facts({"accuracy": now}, [], S.best_before(tmp_path, now))).reasons
    )
    assert S.best_before(tmp_path, rec(0.80, Provenance("aihub", "c" * 64, "b" * 64))) is None


@pytest.mark.spec("SG1")
@given(st.lists(st.floats(100, 5000), min_size=9, max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_memory_slope_is_theil_sens(mb):
    "The reported growth is the median slope of all pairs of late points."
    late = mb[len(mb) // 3 :]
    slope = np.median([(late[j] - late[i]) / (j - i) for j in range(len(late)) for i in range(j)])
    record = R.memory_record([{"rss_mb": v, "seconds": 2.0} for v in mb], Provenance("synthetic", "a" * 64, "b" * 64))
    assert record.note == f"grew by {slope * len(late) / late[0]:.2%} over the last {len(late)} of {len(mb)} epochs"
    assert record.value == (slope * len(late) / late[0] <= R.FLAT)


@pytest.mark.spec("SG5")
def test_checks_carry_their_evidence(copy):
    doc, project = read_json(copy / "reports/evaluation.json"), load_config("smoke").project

    def found():
        return K.mandatory_checks(copy, doc, project)

    c = found()
    assert (
        c["classification_model_loading"].counts
        and c["detection_model_loading"].counts
        and not c["pipeline_complete"].counts
        and not c["onnx_conversion_success"].counts
        and c["onnx_conversion_success"].note
    )
    sha = doc["inputs"]["checkpoints/classifier/best.pt"]
    for passed, checkpoint, want in (
        (True, sha, True),
        (False, sha, False),
        (None, sha, False),
        (True, "0" * 64, False),
    ):
        save_json(
            {"passed": passed, "models": {"classifier": {"checkpoint": checkpoint}}}, copy / "reports/export.json"
        )
        assert found()["onnx_conversion_success"].counts == want
    for s in K.BEFORE:
        save_json(dict(status="finished", seconds=3.0, settings={}), record_path(copy, s))
    assert found()["pipeline_complete"].counts
    record_path(copy, "detector").unlink()
    assert (
        not found()["pipeline_complete"].counts
        and K.mandatory_checks(copy, doc, load_config("smoke", ["project.active_feature_set=mvp"]).project)[
            "pipeline_complete"
        ].counts
    )
    K.declare_check(copy, "automated_monitoring", by="kim")
    assert found()["automated_monitoring"].counts


@pytest.mark.spec("SG3", "SG4", "SG5")
def test_every_mandatory_check_is_measured_declared_or_says_why_not(copy):
    doc, project = read_json(copy / "reports/evaluation.json"), load_config("smoke").project
    c = K.mandatory_checks(copy, doc, project)
    assert set(c) == {n for s in ADVISOR_TARGETS.values() for n in s.checks}
    assert all((x.evidence and (copy / x.evidence).exists()) if x.passed is not None else x.note for x in c.values())
    assert c["multi_batch_processing"].counts, "32 photos at once were answered as one by one"
    for name in (
        "auto_batch_tuning_success",
        "tensorboard_logging",
        "stability_test_pass",
        "memory_leak_test",
        "full_dataset_processing",
        "production_api_deployment",
    ):
        assert c[name].passed is None, name


@pytest.mark.spec("SG3")
@pytest.mark.parametrize("ratio, passed", [(1.0, True), (10.0, True), (10.01, False), (269.0, False), (None, None)])
def test_class_balance_is_checked_by_its_ratio(copy, ratio, passed):
    doc = read_json(copy / "reports/evaluation.json")
    m = Metric.from_dict(doc["metrics"]["class_imbalance_ratio"])
    doc["metrics"]["class_imbalance_ratio"] = replace(m, value=ratio, seconds=1.0).to_dict()
    assert K.mandatory_checks(copy, doc, load_config("smoke").project)["class_balance_verification"].passed is passed


@pytest.mark.spec("SG3", "SG4")
def test_tensorboards_files_are_read_and_not_only_there(copy):
    from pillsnap.core.logs import TBWriter

    def check():
        return K.tensorboard_checks(copy)

    TBWriter(copy / "tb/evaluation").add_scalar("eval/x", 1.0, 0)
    assert check()["tensorboard_logging"].passed is None
    tb = TBWriter(copy / "tb/classifier")
    tb.add_scalar("train/loss", 1.0, 1)
    tb.close()
    assert check()["tensorboard_logging"].passed is False and check()["auto_batch_tuning_success"].passed is None
    tb = TBWriter(copy / "tb/classifier")
    tb.add_scalar("val/loss", 1.0, 1)
    tb.add_scalar("perf/auto_batch_found", 32.0, 0)
    tb.close()
    assert (
        check()["tensorboard_logging"].counts
        and check()["auto_batch_tuning_success"].counts
        and (copy / check()["auto_batch_tuning_success"].evidence).is_file()
    )


@pytest.mark.spec("SG5")
def test_the_full_data_set_is_counted(copy):
    assert K.full_dataset_check(copy).passed is None
    shutil.copytree(copy / "artifacts/stage0", copy / "artifacts/stage4")
    head, table = (
        read_json(copy / "artifacts/stage4/splits.json"),
        pd.read_csv(copy / "manifest.csv", dtype=str, keep_default_na=False),
    )
    eval_set = pd.read_csv(copy / "artifacts/stage4/manifest_eval_set.csv")
    eval_set[
        eval_set["path"]
        != eval_set.loc[(eval_set["kind"] == "single") & (eval_set["split"] == "clean"), "path"].iloc[-1]
    ].to_csv(copy / "artifacts/stage4/manifest_eval_set.csv", index=False)  # one photo stands in no part
    left_out = K.full_dataset_check(copy)
    used = {
        p
        for n in ("train", "val", "eval_set")
        for p in pd.read_csv(copy / f"artifacts/stage4/manifest_{n}.csv")["path"]
    } | set(table.loc[table["group_id"].isin(pd.read_csv(copy / "artifacts/test_known.csv")["group_id"]), "path"])
    assert left_out.passed is False and head["classes"] == table.loc[table["kind"] == "single", "class_key"].nunique()
    table[table["path"].isin(used)].to_csv(copy / "manifest.csv", index=False)
    assert K.full_dataset_check(copy).counts
    more = table[table["kind"] == "single"].iloc[:1].assign(class_key="K-999999", path="new.png")
    pd.concat([table[table["path"].isin(used)], more]).to_csv(copy / "manifest.csv", index=False)
    assert K.full_dataset_check(copy).passed is False  # a drug more
    save_json(head | {"unknown": {"K-999999": {"role": "validation"}}}, copy / "artifacts/stage4/splits.json")
    assert K.full_dataset_check(copy).counts  # which the split has set aside
    train = sum(head["counts"][k]["singles"] for k in ("train", "val"))
    table.to_csv(copy / "manifest.csv", index=False)
    for most, passed in ((train, True), (train + 1, False)):
        limits = head["params"] | {"quotas": [[4, most, head["classes"], 0, None]]}
        save_json(head | {"params": limits}, copy / "artifacts/stage4/splits.json")
        assert K.full_dataset_check(copy).passed is passed  # as many as the stage may take


@pytest.mark.spec("SG2")
def test_data_loading_is_the_wait_for_the_first_batch(copy):
    cfg = load_config("smoke", [f"paths.exp_dir={copy}"])
    m = K.data_loading_record(copy, cfg, Provenance("synthetic", "a" * 64, "b" * 64))
    assert m.measured and m.value == m.seconds and 0 < m.n <= cfg.train.classification.batch_size
    doc, metrics, _ = S.read_evaluation(copy)
    assert (
        metrics["data_loading_s"].measured
        and metrics["model_loading_s"].value == doc["loading_s"] != metrics["data_loading_s"].value
    )
    assert K.advisor_facts(copy, cfg, doc, metrics, []).data_loading_s == metrics["data_loading_s"].value


@pytest.mark.spec("SG6")
@pytest.mark.parametrize("change", [["project.family=narrow"], ["project.active_feature_set=mvp"], []])
def test_a_run_without_a_detector_can_reach_proceed(copy, change):
    """The checkpoint of the detector is gone and its figures are not measured; whether that counts is the
    configuration's to say."""
    doc = read_json(copy / "reports/evaluation.json")
    acc = Metric.from_dict(doc["metrics"]["accuracy"])
    doc["metrics"] |= {
        "accuracy": replace(acc, value=0.95).to_dict(),
        "detection_map50": replace(acc, value=None, n=0, seconds=None, note="no detector was trained").to_dict(),
    }
    doc["absent"]["detector"] = "no detector was trained"
    save_json(doc, copy / "reports/evaluation.json")
    for s in ("conversion", "splits", "classifier"):
        save_json(dict(status="finished", seconds=3.0, settings={}), record_path(copy, s))
    _, advice, written = S.gate_and_advise(copy, load_config("smoke", [f"paths.exp_dir={copy}", *change]))
    if change:
        assert (advice.recommendation, advice.performance_score) == ("RECOMMEND_PROCEED", 1.0) and set(
            written["does_not_apply"]
        ) == {"detection_map50", "detection_model_loading"}
    else:
        assert (
            advice.recommendation == "WARN_STOP"
            and "detection_map50" in written["unmeasured"]
            and advice.performance_score < 1
        )


# ---- what the advisor is told of the training ----------------------------------------------------


def trained_run(root, delivery, *overrides):
    "A tiny run, converted and split, its classifier job, and its configuration."
    from pillsnap.dataset.splits import smoke_splits
    from pillsnap.training.classifier import ClassifierJob

    root.mkdir(parents=True)
    (root / "delivery").symlink_to(delivery)
    job = ClassifierJob(
        run_dir=str(root),
        config="smoke",
        overrides=(*QUICK, "data.classification.img_size=48", "train.classification.warmup_steps=1", *overrides),
    )
    smoke_splits(RunFolder(root, "splits"), job.cfg_in(root))
    return job, job.cfg_in(root)


@pytest.mark.spec("SG6")
def test_photos_that_training_cannot_open_are_critical(tmp_path, delivery):
    own = tmp_path / "aihub"
    shutil.copytree(delivery, own)
    job, cfg = trained_run(tmp_path / "run", own)
    stage = load_split_data(tmp_path / "run", 0)
    broken = stage.train.loc[stage.train["kind"] == "single", "path"].unique()[:4]
    for p in broken:
        (stage.root / p).write_text("no photo")
    job.run()
    rows = read_json(tmp_path / "run/reports/metrics.json")["history"]
    assert (
        rows[-1]["skipped"] == len(broken)
        and rows[-1]["asked"] >= stage.train.loc[stage.train["kind"] == "single", "path"].nunique()
        and rows[-1]["batch"] == cfg.train.classification.batch_size
    )
    assert (
        K.training_corruption(rows) == pytest.approx(len(broken) / rows[-1]["asked"])
        and K.training_corruption(rows) > 0.01
    )
    doc = {"corruption": 0.0, "photos": {"singles": 1}, "absent": {}, "metrics": {}, "inputs": {}}
    facts = K.advisor_facts(tmp_path / "run", cfg, doc, {}, [])
    assert facts.corruption == K.training_corruption(rows)
    assert (
        evaluate_and_recommend(0, facts).reason == "data_corruption"
        and evaluate_and_recommend(0, replace(facts, corruption=0.009)).reason != "data_corruption"
    )
    assert K.advisor_facts(tmp_path / "run", cfg, doc | {"corruption": 0.9}, {}, []).corruption == 0.9


@pytest.mark.spec("SG6")
def test_a_training_whose_loss_is_no_number_is_critical_by_its_code(tmp_path, delivery):
    from fastai.callback.core import Callback

    class Spoil(Callback):
        def after_pred(self):
            self.learn.pred = self.pred * float("nan")

    job, cfg = trained_run(tmp_path / "run", delivery)
    with pytest.raises(PillsnapError):
        job.run(cbs=[Spoil()])
    rec = read_json(record_path(tmp_path / "run", "classifier"))
    assert rec["status"] == "failed" and rec["error_code"] == "NAN_LOSS"
    save_json(rec | {"error": "it ended"}, record_path(tmp_path / "run", "classifier"))  # the words do not matter
    doc = {"corruption": 0.0, "photos": {"singles": 1}, "absent": {}, "metrics": {}, "inputs": {}}
    facts = K.advisor_facts(tmp_path / "run", cfg, doc, {}, [])
    assert facts.nan_loss is True and evaluate_and_recommend(0, facts).reason == "nan_loss"
    save_json(
        rec | {"error_code": "", "error": "the training loss became nan"}, record_path(tmp_path / "run", "classifier")
    )
    assert K.advisor_facts(tmp_path / "run", cfg, doc, {}, []).nan_loss is False


# ---- combos --------------------------------------------------------------------------------------


@pytest.mark.spec("SP10")
@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=6),
)
@settings(max_examples=200, deadline=None)
def test_a_combo_is_right_pill_by_pill_or_not_at_all(truth, said):
    "Each pill has one box with its name, and there is no other box; right names in each other's place do not count."

    def place(i):
        return [100 * i, 0, 100 * i + 60, 60]

    shot = A.EvalPhoto("x.png", "g", "combo", np.array([place(i) for i in range(len(truth))], float), tuple(truth))
    items = [
        {"kcode": k, "confidence": 0.9, "box": place(i), "box_confidence": 0.9 - n / 100}
        for n, (k, i) in enumerate(said)
    ]
    a = A.score_combo(
        shot, {"mode_requested": "combo", "mode_used": "combo", "items": items}, ClassMap(["a", "b", "c"])
    )
    assert a.exact == (len(said) == len(truth) and {i: k for k, i in said} == dict(enumerate(truth)))
    assert 0 <= a.right <= a.found <= a.pills == len(truth) and a.found + a.invented == len(said)


@pytest.mark.spec("SP10")
def test_set_accuracy_needs_thirty_photos_of_known_drugs():
    prov = Provenance("synthetic", "a" * 64, "b" * 64)
    ok = A.ComboAnswer("x", True, True, 3, 3, 3, 0, "combo", "combo", [])
    assert R.LEAST_COMBOS == 30
    assert (
        R.combo_records(A.Combos([ok] * 30, 2.0), prov)["combo_set_accuracy"].value == 1.0
        and not R.combo_records(A.Combos([ok] * 29, 2.0), prov)["combo_set_accuracy"].measured
    )
    partly_known = replace(ok, known=False, exact=False, pills=2, right=1)
    mixed = R.combo_records(A.Combos([ok] * 30 + [partly_known] * 9, 2.0), prov)
    assert (mixed["combo_set_accuracy"].value, mixed["combo_set_accuracy"].n) == (1.0, 30) and mixed[
        "combo_pill_accuracy"
    ].value == pytest.approx((90 + 9) / (90 + 18))
    assert not R.combo_records(A.Combos([], 0.0), prov)["combo_set_accuracy"].measured


# ---- the notebook as a job -----------------------------------------------------------------------


@pytest.mark.spec("BX15", "SG6")
def test_papermill_gives_the_same_files_and_asks_nothing(copy, tmp_path):
    import papermill as pm

    before = read_json(copy / "reports/scorecard.json")
    out = tmp_path / "elsewhere" / "out.ipynb"
    out.parent.mkdir()
    pm.execute_notebook(
        str(ROOT / "nbs/evaluation/770_evaluation.ipynb"),
        str(out),
        parameters=dict(run_dir=str(copy), config="smoke", overrides=list(QUICK), remeasure=False),
        kernel_name="python3",
        progress_bar=False,
        cwd=str(out.parent),
    )
    assert (
        read_json(copy / "reports/scorecard.json")["rows"] == before["rows"]
        and read_advice(copy)["user_choice"] is None
    )
    text = out.read_text(encoding="utf-8")
    assert (
        before["run_id"] in text
        and "No choice recorded" in text
        and "widget-view" not in text
        and before["gate"]["status"] in text
    )


@pytest.mark.spec("SP4")
def test_a_run_without_evaluation_says_so(tmp_path):
    with pytest.raises(PillsnapError, match="has not been evaluated"):
        S.read_evaluation(tmp_path)


@pytest.mark.spec("X77")
@pytest.mark.parametrize("asked", ["inference.focus=off", "train.classification.crop_view_prob=0"])
def test_an_evaluation_of_another_view_is_not_up_to_date(smoke_run, asked):
    "What single mode looks at is part of what was measured."
    cfg = str(smoke_run / "config.yaml")
    assert why_stale(smoke_run, "evaluation", load_config(cfg)) is None
    assert why_stale(smoke_run, "evaluation", load_config(cfg, [asked])) is not None


@pytest.mark.spec("X8")
def test_a_mistyped_choice_leaves_a_finished_evaluation_finished(copy):
    "It is refused before the job begins."
    again(copy, remeasure=False)
    before = record_path(copy, "evaluation").read_bytes()
    with pytest.raises(PillsnapError, match="no option '99'"):
        again(copy, user_choice="99")
    assert record_path(copy, "evaluation").read_bytes() == before
