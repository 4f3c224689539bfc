"""Sealed test photos: found without being opened, scored once, through the ledger."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from terminal import typed

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_text, sha256_file
from pillsnap.core.jobs import RunFolder, run_id
from pillsnap.core.records import Metric, Provenance
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob, smoke_splits
from pillsnap.delivery.capture import parse_name
from pillsnap.evaluation import heldout as H
from pillsnap.evaluation.final import RESULTS, UNKNOWN_DRUGS, final_test_evaluation
from pillsnap.evaluation.ledger import append_ledger, read_ledger, record_decision
from pillsnap.evaluation.openranking import ranking_records

ROOT = Path(__file__).resolve().parents[1]


def new_run(root, delivery, preset="smoke", *overrides):
    "A run folder, converted and split, with its configuration."
    root.mkdir(parents=True)
    (root / "delivery").symlink_to(delivery)
    run, cfg = (
        RunFolder(root),
        load_config(
            preset,
            [
                f"paths.exp_dir={root}",
                f"paths.root={root / 'delivery'}",
                "data.source=synthetic",
                "train.num_threads=1",
                *overrides,
            ],
        ),
    )
    smoke_splits(run, cfg)
    save_text(yaml.safe_dump({"base": None, **cfg.to_dict()}, allow_unicode=True), root / "config.yaml")
    return run, cfg


def add_classifier(root, cfg, seed=0):
    from pillsnap.models.factory import fresh_classifier_checkpoint

    cm = load_split_data(root, cfg.data.progressive_validation.current_stage).class_map
    return fresh_classifier_checkpoint(
        root / "checkpoints" / "classifier" / "best.pt", "test_resnet", cm, 64, seed=seed
    )


@pytest.fixture(scope="module")
def series(tmp_path_factory, delivery):
    """The delivery with seven series of one photo for each side of each Validation drug; the last drug has three.

    The last two series of the first drug show the second drug, so their photos must be taken for that one.
    """
    root = tmp_path_factory.mktemp("series")
    (root / "data").mkdir()
    (root / "data" / "train").symlink_to(delivery / "data" / "train")
    photos = {}
    for photo in sorted((delivery / "data" / "val" / "images").rglob("single/*/*/*.png")):
        photos.setdefault((photo.parent.name, parse_name(photo.stem).side), photo)
    first, second, last = sorted({drug for drug, _ in photos})
    for (drug, side), photo in photos.items():
        folder = root / photo.parent.relative_to(delivery)
        folder.mkdir(parents=True, exist_ok=True)
        for n in range(3 if drug == last else 7):
            shown = photos[second, side] if drug == first and n > 4 else photo
            capture = replace(parse_name(photo.stem), back=n // 3, light=n % 3)
            shutil.copy(shown, folder / f"{capture.stem()}.png")
    told = read_json(delivery / "SYNTHETIC.json")
    told["counts"]["val_single"] = len(list(root.rglob("data/val/**/*.png")))
    (root / "SYNTHETIC.json").write_text(json.dumps(told))
    return root


@pytest.fixture(scope="module")
def made(tmp_path_factory, series):
    "A two-stage run with an untrained classifier and no detector."
    root = tmp_path_factory.mktemp("heldout") / "run"
    run, cfg = new_run(root, series)
    add_classifier(root, cfg)
    run_id(root)
    return root, cfg


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "run", symlinks=True)
    record_decision(tmp_path / "run", "kim", "a rehearsal")
    return tmp_path / "run"


def ask(root, **change):
    return dict(reason="release 1.0", confirm=run_id(root)) | change


def kinds(root):
    return [e["kind"] for e in read_ledger(root)]


# ---- which photos ---------------------------------------------------------------------------------


@pytest.mark.spec("X74", "X80", "SP4")
def test_sealed_photos_are_those_that_no_part_holds(made):
    root, cfg = made
    data, manifest = load_split_data(root, 0), pd.read_csv(root / "manifest.csv", dtype=str, keep_default_na=False)
    rows = H.sealed_rows(root, data)
    read = set(pd.concat([data.train, data.val, data.eval_set])["path"])
    names = set(pd.read_csv(root / "artifacts/test_known.csv")["group_id"])
    assert (
        len(rows)
        and set(rows["path"]) == set(manifest.loc[manifest["group_id"].isin(names), "path"])
        and not set(rows["path"]) & read
    )
    assert not set(rows["group_id"]) & set(manifest.loc[manifest["path"].isin(read), "group_id"])
    known, others = H.closed_set_photos(rows, data)
    assert others == 0 and len(known) == len(rows)
    no_first = data.train[data.train["class_key"] != data.class_map.keys[0]]
    known, others = H.closed_set_photos(rows, H.replace(data, train=no_first))
    assert others == ((rows["kind"] == "single") & (rows["class_key"] == data.class_map.keys[0])).sum() > 0
    assert data.class_map.keys[0] not in set(known.loc[known["kind"] == "single", "class_key"])


@pytest.mark.spec("X80", "X81")
def test_a_part_that_is_not_held_out_is_refused_and_stays_sealed(copy, delivery, tmp_path):
    (copy / "artifacts" / "test_known.csv").rename(copy / "gone")
    with pytest.raises(PillsnapError):
        final_test_evaluation(copy, **ask(copy))
    (copy / "gone").rename(copy / "artifacts" / "test_known.csv")
    overlay = copy / "artifacts" / "duplicates.json"
    data = load_split_data(copy, 0)
    pair = [H.sealed_rows(copy, data)["path"][0], data.train["path"][0], "same picture"]
    overlay.write_text(json.dumps(read_json(overlay) | {"pairs": [pair]} if overlay.exists() else {"pairs": [pair]}))
    with pytest.raises(PillsnapError, match="LEAK"):
        final_test_evaluation(copy, **ask(copy))
    assert kinds(copy) == ["decision"]
    run, cfg = new_run(tmp_path / "leaky", delivery, "smoke", "data.group_by=image")
    add_classifier(run.root, cfg)
    record_decision(run.root, "kim", "a rehearsal")
    with pytest.raises(PillsnapError, match="LEAKY_SPLIT"):
        final_test_evaluation(run.root, **ask(run.root))
    assert kinds(run.root) == ["decision"]


# ---- the seal ------------------------------------------------------------------------------------

HOOK = """
import json, os, sys
events = []
def watch(event, args):
    if event == "open" and args and isinstance(args[0], (str, bytes, os.PathLike)): \
events.append(("open", os.path.realpath(os.fsdecode(args[0]))))
    if event == "os.rename": events.append(("rename", os.path.realpath(os.fsdecode(args[1]))))
sys.addaudithook(watch)
from pillsnap.evaluation.final import final_test_command
final_test_command(sys.argv[1], reason="release 1.0", confirm=sys.argv[2])
print("REPORT", json.dumps({"events": events, \
"training": [m for m in sys.modules if m.startswith("pillsnap.training")]}))
"""


@pytest.mark.spec("X62", "X80", "EV5")
def test_the_ledger_says_open_before_the_first_sealed_photo_is_read(copy):
    rows = H.sealed_rows(copy, load_split_data(copy, 0))
    sealed = {os.path.realpath(load_split_data(copy, 0).root / p): kind for p, kind in zip(rows["path"], rows["kind"])}
    r = subprocess.run([sys.executable, "-c", HOOK, str(copy), run_id(copy)], capture_output=True, text=True, cwd=ROOT)
    assert r.returncode == 0, r.stderr[-3000:]
    report = json.loads(r.stdout.split("REPORT ")[1])
    photos = [i for i, (what, p) in enumerate(report["events"]) if what == "open" and p in sealed]
    ledger = [
        i
        for i, (what, p) in enumerate(report["events"])
        if what == "rename" and p == os.path.realpath(copy / "ledger.jsonl")
    ]
    assert photos and len(ledger) == 2 and ledger[0] < photos[0] and photos[-1] < ledger[1]
    assert {report["events"][i][1] for i in photos} == {p for p, kind in sealed.items() if kind == "single"}, (
        "without a detector no combo is read"
    )
    validation = [i for i, (what, p) in enumerate(report["events"]) if what == "open" and "/data/val" in p]
    assert validation and ledger[0] < min(validation) and max(validation) < ledger[1]
    opened = {Path(report["events"][i][1]) for i in validation}
    made = read_json(copy / "delivery" / "SYNTHETIC.json")
    assert {p.parent.name for p in opened} == set(made["val_codes"]) and len(opened) == made["counts"]["val_single"]
    assert kinds(copy) == ["decision", "open", "result"] and report["training"] == []
    assert "SYNTHETIC" in r.stdout and "NEEDS_IMPROVEMENT (SYNTHETIC" in r.stdout


@pytest.mark.spec("X62", "X80")
def test_one_opening_for_both_commands_and_unseal_is_recorded(copy):
    H.evaluate_split(copy, "test", **ask(copy))
    first = (copy / "reports/evaluate_test.json").read_text()
    with pytest.raises(PillsnapError, match="second look needs --unseal"):
        final_test_evaluation(copy, **ask(copy))
    with pytest.raises(PillsnapError, match="second look needs --unseal"):
        H.evaluate_split(copy, "test", **ask(copy))
    assert kinds(copy) == ["decision", "open", "result"]
    doc, _ = final_test_evaluation(copy, **ask(copy, unseal=True))
    H.evaluate_split(copy, "test", **ask(copy, unseal=True))
    opened = [e for e in read_ledger(copy) if e["kind"] == "open"]
    assert [(e["command"], e["unseal"]) for e in opened] == [
        ("evaluate", False),
        ("final-test", True),
        ("evaluate", True),
    ]
    assert (
        opened[1]["seq"] == doc["opening"] and opened[0]["reason"] == "release 1.0" and opened[0]["data"] == "synthetic"
    )
    assert opened[0]["models"] == {
        "checkpoints/classifier/best.pt": sha256_file(copy / "checkpoints/classifier/best.pt")
    }
    kept = list((copy / "reports").glob("evaluate_test_before_*.json"))
    assert len(kept) == 1 and kept[0].read_text() == first, "an earlier result is kept beside the new one"


@pytest.mark.spec("X62", "X80")
@pytest.mark.parametrize("change", ["none", "model", "command", "result"])
def test_an_opening_that_was_cut_off_may_be_completed_with_the_same_models_alone(copy, made, monkeypatch, change):
    def cut_off(*a, **k):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr("pillsnap.evaluation.final.score_part", cut_off)
        with pytest.raises(KeyboardInterrupt):
            final_test_evaluation(copy, **ask(copy))
    assert kinds(copy) == ["decision", "open"] and not (copy / RESULTS).exists()
    if change == "model":
        add_classifier(copy, made[1], seed=5)
        record_decision(copy, "kim", "the new model was looked at")
    if change == "result":
        save_text("{}", copy / RESULTS)
    again = (
        (lambda: H.evaluate_split(copy, "test", **ask(copy)))
        if change == "command"
        else (lambda: final_test_evaluation(copy, **ask(copy)))
    )
    if change != "none":
        with pytest.raises(PillsnapError, match="second look needs --unseal"):
            again()
        return
    doc, _ = again()
    assert kinds(copy) == ["decision", "open", "continue", "result"] and doc["opening"] == 2
    with pytest.raises(PillsnapError, match="second look needs --unseal"):
        again()


@pytest.mark.spec("SP4", "EV5")
def test_without_stage_4_a_decision_a_model_a_reason_and_the_id_it_stays_closed(made, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(made[0], root, symlinks=True)
    with pytest.raises(PillsnapError, match="stage 4 is not done"):
        final_test_evaluation(root, **ask(root))
    verdicts = ((1, "GO"), (4, "NO_GO"), (4, "TIME_CAP_SUCCESS"), (4, "NOT_MEASURED"))
    for stage, status in (*verdicts, (4, "GO"), (4, "NO_GO")):
        append_ledger(root, "gate", stage=stage, status=status, reasons=[], digest="")
        if (stage, status) != (4, "GO"):
            with pytest.raises(PillsnapError, match="stage 4 is not done"):
                final_test_evaluation(root, **ask(root))
    best = root / "checkpoints/classifier/best.pt"
    models = {best.relative_to(root).as_posix(): sha256_file(best)}
    append_ledger(root, "gate", stage=4, status="GO", reasons=[], digest="", models=models)
    with pytest.raises(PillsnapError, match="no reason given"):
        final_test_evaluation(root, **ask(root, reason=""))
    with pytest.raises(PillsnapError, match="not confirmed"):
        final_test_evaluation(root, **ask(root, confirm="yes"))
    best.rename(root / "away.pt")
    with pytest.raises(PillsnapError, match="there is no model"):
        final_test_evaluation(root, **ask(root))
    assert "open" not in kinds(root)
    (root / "away.pt").rename(best)
    final_test_evaluation(root, **ask(root))


@pytest.mark.spec("SP4", "X80")
@pytest.mark.parametrize("line", ["gate", "decision", "before models were named"])
def test_a_go_or_a_decision_holds_for_the_models_that_it_was_about(made, tmp_path, line):
    "A model that is trained after the line was written has not passed any gate."
    root, cfg = tmp_path / "run", made[1]
    shutil.copytree(made[0], root, symlinks=True)
    best = root / "checkpoints/classifier/best.pt"
    about = {"checkpoints/classifier/best.pt": sha256_file(best)}
    if line == "decision":
        record_decision(root, "kim", "a rehearsal")
    else:
        named = {"models": about} if line == "gate" else {}
        append_ledger(root, "gate", stage=4, status="GO", reasons=[], digest="", **named)
    if line != "before models were named":
        add_classifier(root, cfg, seed=5)
        assert sha256_file(best) not in about.values()
    with pytest.raises(PillsnapError, match="done with other models, as line 1 of the ledger says"):
        final_test_evaluation(root, **ask(root))
    record_decision(root, "kim", "the new model was looked at")
    final_test_evaluation(root, **ask(root))


# ---- the result ----------------------------------------------------------------------------------


def check_form(doc: dict) -> None:
    "The result has the contract's keys, goals and words, and says what was not measured."
    assert {
        "test_results",
        "business_goals",
        "recommendation",
        "ready_for_production",
        "improvements",
        "val_test_gap",
    } <= set(doc)
    assert {"accuracy", "macro_f1"} <= set(doc["test_results"]["classification"]) and doc["test_results"]["detection"][
        "mAP_0.5"
    ] is None
    goals = doc["business_goals"]
    assert {k: g["target"] for k, g in goals.items() if k != "overall_target_met"} == {
        "accuracy": 0.92,
        "macro_f1": 0.88,
        "detection_map50": 0.85,
    } and goals["overall_target_met"] is False
    assert (
        doc["recommendation"] == "NEEDS_IMPROVEMENT"
        and doc["ready_for_production"] is False
        and doc["unknown_drugs"]["family"] == "retrieval"
    )
    assert UNKNOWN_DRUGS == ("unknown_refused", "enrolled_recall@1")
    assert "answer rule" in doc["not_measured"]["unknown_refused"] and any(
        line.startswith("unknown_refused") for line in doc["improvements"]
    )
    assert any("synthetic" in line for line in doc["improvements"]) and "synthetic" in doc["label"]


def check_accuracy(root: Path, doc: dict) -> None:
    "The accuracy is that of the predictions on the sealed photos, and lies in its interval."
    records = {k: Metric.from_dict(m) for k, m in doc["metrics"].items()}
    table = pd.read_csv(root / "reports/final_test/predictions_single.csv")
    sealed = H.sealed_rows(root, load_split_data(root, 0))
    assert set(table["path"]) == set(sealed.loc[sealed["kind"] == "single", "path"]) and records["accuracy"].n == len(
        table
    )
    assert (
        records["accuracy"].value == pytest.approx((table["true"] == table["answered"]).mean())
        and records["accuracy"].measured
    )
    low, high = doc["intervals_95"]["accuracy"]
    assert 0 <= low <= records["accuracy"].value <= high <= 1


@pytest.mark.spec("EV5", "X74", "BX2")
def test_the_result_has_the_contracts_form(copy):
    doc, _ = final_test_evaluation(copy, **ask(copy))
    assert doc == read_json(copy / RESULTS)
    check_form(doc)
    check_accuracy(copy, doc)


def write_rule(root, threshold: float) -> Path:
    "An evaluation of the run's classifier, with an answer rule whose unknown score is the largest logit."
    from pillsnap.core.files import save_json
    from pillsnap.models.decision import AnswerRule
    from pillsnap.models.unknown import UnknownRule, UnknownScore, unknown_rule_to_dict

    cm, best = load_split_data(root, 0).class_map, "checkpoints/classifier/best.pt"
    unknown = unknown_rule_to_dict(UnknownRule(UnknownScore("max_logit"), threshold, 0.02))
    rule = AnswerRule("lac", 0.05, (0.999,) * len(cm), max_list=6, class_map=cm.fingerprint, unknown=unknown)
    save_json(rule.to_dict(), root / "reports/answer_rule.json")
    return save_json({"inputs": {best: sha256_file(root / best)}, "metrics": {}}, root / "reports/evaluation.json")


@pytest.mark.spec("X74", "X80", "BX9", "EV5")
@pytest.mark.parametrize(("threshold", "refused"), [(-1e6, 1.0), (1e6, 0.0)])
def test_unknown_drugs_are_refused_by_the_rule_of_the_run(copy, threshold, refused):
    "The sealed drugs and objects are answered by the stored rule, each once, with n and an interval."
    write_rule(copy, threshold)
    doc, _ = final_test_evaluation(copy, **ask(copy))
    made, table = read_json(copy / "delivery/SYNTHETIC.json"), pd.read_csv(copy / "reports/final_test/open_answers.csv")
    strange = table[table["kind"] == "drugs"]
    assert set(strange["what"]) == set(made["val_codes"]) and strange["path"].is_unique
    assert not set(strange["what"]) & set(made["train_codes"])
    for name, kind in (("unknown_refused", "drugs"), ("objects_refused", "objects"), ("known_refused", "known")):
        m, mine = Metric.from_dict(doc["metrics"][name]), table[table["kind"] == kind]
        assert (m.value, m.n, m.measured) == (refused, len(mine), True) and len(mine)
        low, high = doc["intervals_95"][name]
        assert low <= m.value + 1e-9 and m.value <= high + 1e-9 and high - low > 0.01
    looked = pd.read_csv(copy / "reports/final_test/enrolled.csv")
    recall = Metric.from_dict(doc["metrics"]["enrolled_recall@1"])
    assert recall.value == pytest.approx((looked["drug"] == looked["found"]).mean()) and recall.n == len(looked) > 0
    for per_side, drugs, right, n in ((1, 3, 6, 10), (2, 3, 6, 10), (5, 2, 4, 8)):  # the last drug has two references
        ranked = {k: doc["metrics"][f"enrolled_{per_side}_{k}"] for k in ("recall@1", "recall@5", "map", "gap")}
        told = f"{drugs} unknown drugs enrolled by {per_side} photos a side"
        assert all(m["n"] == n and told in m["note"] for m in ranked.values())
        assert ranked["recall@1"]["value"] == pytest.approx(
            right / n
        )  # the four pictures of another drug find that one
        assert right / n <= ranked["recall@5"]["value"] <= 1 and right / n < ranked["map"]["value"] < 1
        assert 0 < ranked["gap"]["value"] < 1
        low, high = doc["intervals_95"].get(f"enrolled_{per_side}_recall@1", (0, 1))
        assert low <= right / n <= high and (high - low < 1) == (n == 10)  # ten groups are asked for
    assert doc["unknown_drugs"] == doc["unknown_drugs"] | {"family": "retrieval", "drugs": 3, "photos": len(strange)}
    assert not [line for line in doc["improvements"] if line.startswith(UNKNOWN_DRUGS)]


@pytest.mark.spec("EV5")
def test_ranks_that_no_unknown_drug_has_series_for_are_not_measured():
    records, intervals = ranking_records({}, Provenance("synthetic", "0" * 64, "1" * 64), 2.0)
    assert len(records) == 12 and not intervals and not any(m.measured for m in records.values())
    for per_side in (1, 2, 5):
        note = records[f"enrolled_{per_side}_gap"].note
        assert f"{per_side + 1} capture groups on a side" in note


@pytest.mark.spec("X74")
def test_a_rule_of_other_checkpoints_refuses_nothing(copy, made):
    "An answer rule counts for the checkpoints that its evaluation measured, and for no others."
    write_rule(copy, -1e6)
    add_classifier(copy, made[1], seed=5)
    record_decision(copy, "kim", "a rehearsal with these checkpoints")
    doc, _ = final_test_evaluation(copy, **ask(copy))
    assert {"unknown_refused", "unknown_auroc", "objects_refused"} <= set(doc["not_measured"])
    assert "no evaluation of these checkpoints" in doc["not_measured"]["unknown_refused"]


@pytest.mark.spec("EV5")
def test_the_gap_is_validation_minus_test_of_the_same_checkpoint(copy):
    from pillsnap.core.files import save_json

    data, models = (
        load_split_data(copy, 0),
        {"checkpoints/classifier/best.pt": sha256_file(copy / "checkpoints/classifier/best.pt")},
    )
    prov = Provenance("synthetic", data.header["data_hash"], data.class_map.fingerprint)
    from pillsnap.evaluation.final import val_test_gap

    save_json(
        {"inputs": models, "metrics": {"accuracy": prov.metric("accuracy", 0.9, 100, 2.0).to_dict()}},
        copy / "reports/evaluation.json",
    )
    test = {"accuracy": prov.metric("accuracy", 0.7, 50, 2.0), "macro_f1": prov.metric("macro_f1", 0.6, 50, 2.0)}
    assert val_test_gap(copy, test, models)["accuracy"]["gap"] == pytest.approx(0.2) and set(
        val_test_gap(copy, test, models)
    ) == {"accuracy"}
    assert "other checkpoints" in val_test_gap(copy, test, dict.fromkeys(models, "0" * 64))["note"]


# ---- the retrieval and the narrow family ---------------------------------------------------------

SMALL = (
    "data.progressive_validation.current_stage=0",
    "data.progressive_validation.stage_0.max_samples=null",
    "evaluation.min_eval_samples=6",
    "retrieval.min_image_size=64",
    "data.classification.img_size=48",
    "dataloader.num_workers=0",
    "train.classification.backbone=test_resnet",
    "train.classification.batch_size=16",
    "synth.drugs=6",
    "synth.photos=18",
    "synth.combos=4",
    "synth.seed=42",
    "synth.width=244",
    "synth.height=320",
)


def save_retrieval_model(root, cfg, stage):
    "An untrained embedding network, and a gallery of vectors that it did not make."
    import torch

    from pillsnap.core.checkpoints import save_ckpt
    from pillsnap.models.factory import build_classification_model
    from pillsnap.models.gallery import Reference, write_gallery
    from pillsnap.models.heads import head_spec

    torch.manual_seed(0)
    head = head_spec(cfg.train.classification.head, cfg.retrieval)
    model = build_classification_model("test_resnet", len(stage.class_map), pretrained=False, head=head)
    path = root / "checkpoints" / "retrieval" / "best.pt"
    save_ckpt(
        path,
        model_state=model.state_dict(),
        epoch=1,
        best_metric=0.0,
        config_snapshot=cfg.to_dict(),
        class_map=stage.class_map.to_dict(),
        backbone="test_resnet",
        img_size=48,
        head=head,
    )
    photos = stage.train.drop_duplicates("path")
    rows = [Reference(r.class_key, int(r.side), r.group_id, r.path) for r in photos.itertuples()]
    vectors = np.random.default_rng(0).normal(size=(len(rows), cfg.retrieval.embedding_dim))
    origin = dict(network=sha256_file(path), data=stage.header["source"], data_hash=stage.header["data_hash"])
    write_gallery(root / "gallery", vectors, rows, stage.class_map, scale=float(head["scale"]), focus="whole", **origin)


def retrieval_run(root, delivery, *overrides):
    run, cfg = new_run(root, delivery, "retrieval", *SMALL, "retrieval.embedding_dim=16", *overrides)
    stage = load_split_data(root, 0)
    save_retrieval_model(root, cfg, stage)
    record_decision(root, "kim", "a rehearsal")
    return run, cfg, stage


@pytest.mark.spec("RT9", "X80")
@pytest.mark.parametrize("split", ["val", "test"])
def test_retrieval_looks_up_val_or_test_among_training_photos(delivery, tmp_path, split):
    run, cfg, stage = retrieval_run(tmp_path / "run", delivery, "retrieval.top_k=7", "retrieval.recall_k_values=[1, 3]")
    doc, got = H.evaluate_split(run.root, split, **(ask(run.root) if split == "test" else {}))
    table = pd.read_csv(run.root / f"reports/evaluate_{split}/neighbours.csv")
    part = stage.val if split == "val" else H.sealed_rows(run.root, stage)
    assert set(table["query"]) == set(part["path"]) and set(table["neighbour"]) <= set(stage.train["path"])
    assert (table.groupby("query").size() == 7).all(), "retrieval.top_k neighbours of each query"
    group = pd.concat([stage.train, part]).drop_duplicates("path").set_index("path")["group_id"]
    assert (table["query"].map(group) != table["neighbour"].map(group)).all(), "no neighbour of the query's own ID"
    hit = table["true"] == table["class"]
    for k in (1, 3):
        assert got.metrics[f"recall@{k}"].value == pytest.approx(
            hit[table["rank"] <= k].groupby(table["query"]).any().mean()
        )
    assert (
        got.metrics["recall@1"].n == part["path"].nunique()
        and got.metrics["recall@1"].measured
        and "recall@5" not in got.metrics
    )
    assert got.metrics["accuracy"].value == got.metrics["recall@1"].value
    assert (table.sort_values(["query", "rank"]).groupby("query")["cosine"].diff().dropna() <= 1e-5).all()
    assert kinds(run.root) == (["decision", "open", "result"] if split == "test" else ["decision"])


@pytest.mark.spec("FX3", "RT9")
@pytest.mark.parametrize("focus, view", [("auto", "focus"), ("off", "whole")])
def test_retrieval_is_scored_on_what_the_product_shows_the_network(delivery, tmp_path, monkeypatch, focus, view):
    "Located crops where answers look at these, whole photos where they do not."
    crops = "train.classification.crop_view_prob=0.5"
    run, _, stage = retrieval_run(tmp_path / "run", delivery, f"inference.focus={focus}", crops)
    seen, load = [], H.validation_loader

    def watched(rows, data, cfg, view="whole", **how):
        seen.append(view)
        return load(rows, data, cfg, view, **how)

    monkeypatch.setattr(H, "validation_loader", watched)
    _, got = H.evaluate_split(run.root, "val")
    assert seen == [view, view] and got.metrics["recall@1"].n == stage.val["path"].nunique()


@pytest.mark.spec("SG6")
def test_a_retrieval_run_can_reach_proceed(delivery, tmp_path):
    from pillsnap.core.files import save_json
    from pillsnap.core.jobs import record_path

    run, cfg, stage = retrieval_run(tmp_path / "run", delivery, "retrieval.recall_k_values=[1, 5]")
    for job in ("splits", "retrieval"):
        save_json(dict(status="finished", seconds=3.0, error_code=""), record_path(run.root, job))
    doc, got = H.evaluate_split(run.root, "val")
    assert doc["advice"]["recommendation"] == read_json(run.root / "reports/advisor.json")["recommendation"] and set(
        doc["advice"]["does_not_apply"]
    ) == {"detection_map50", "detection_model_loading"}
    assert (
        all(said.startswith("passed: ") for said in doc["advice"]["checks"].values())
        and len(doc["advice"]["checks"]) == 2
    )
    p = H.replace(H.load_part(run, cfg, "val"))
    good = H.replace(got, metrics=got.metrics | {"accuracy": H.replace(got.metrics["accuracy"], value=0.95)})
    advice = H.advise_retrieval(p, good)
    assert (advice.recommendation, advice.reason) == ("RECOMMEND_PROCEED", "all_targets_met")
    from unittest import mock

    with mock.patch.object(H, "advisor_facts", wraps=H.advisor_facts) as asked:
        save_json({}, run.root / "reports" / "evaluation.json")  # the evaluation's own advice stays
        save_json({"kept": True}, run.root / "reports" / "advisor.json")
        H.advise_retrieval(p, good)
    assert asked.call_args.args[2]["inputs"] == H.model_digests(p)
    assert read_json(run.root / "reports" / "advisor.json") == {"kept": True}
    record_path(run.root, "retrieval").unlink()
    assert H.advise_retrieval(p, good).reason == "mandatory_check_failed"


@pytest.mark.spec("X80", "SP9")
def test_a_folder_of_classes_without_boxes_can_take_the_final_test(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for c, colour in (("가", (200, 60, 60)), ("나", (60, 200, 60))):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(8):
            for s in range(2):
                Image.fromarray(np.clip(rng.normal(colour, 25, (40, 48, 3)), 0, 255).astype("uint8")).save(
                    tmp_path / "data" / c / f"{c}{i}_{s}.jpg"
                )
    root = tmp_path / "run"
    over = (
        *(o for o in SMALL if not o.startswith("retrieval")),
        "retrieval.min_image_size=32",
        "retrieval.embedding_dim=16",
        f"paths.root={tmp_path / 'data'}",
        f"paths.exp_dir={root}",
        "train.num_threads=1",
    )
    SplitsJob(run_dir=str(root), config="retrieval", overrides=over, stage_n=0, near_duplicates=False).run()
    cfg, stage = load_config(str(root / "config.yaml")), load_split_data(root, 0)
    save_retrieval_model(root, cfg, stage)
    record_decision(root, "kim", "a rehearsal")
    doc, _ = final_test_evaluation(root, **ask(root))
    assert (
        doc["data"] == "other"
        and set(doc["business_goals"]) == {"accuracy", "macro_f1", "overall_target_met"}
        and set(doc["test_results"]) == {"classification", "retrieval"}
    )
    assert doc["metrics"]["accuracy"]["n"] == H.sealed_rows(root, stage)["path"].nunique()


@pytest.mark.spec("X80", "EV5")
def test_the_narrow_tenth_is_scored_without_a_detector(delivery, tmp_path):
    run, cfg = new_run(tmp_path / "run", delivery, "narrow", *SMALL)
    add_classifier(run.root, cfg)
    record_decision(run.root, "kim", "the narrow family has no stage 4")
    doc, got = final_test_evaluation(run.root, **ask(run.root))
    rows = H.sealed_rows(run.root, load_split_data(run.root, 0))
    assert got.metrics["accuracy"].n == rows["path"].nunique() and set(rows["kind"]) == {"single"}
    assert set(doc["business_goals"]) == {"accuracy", "macro_f1", "overall_target_met"}, (
        "a goal about a detector does not apply"
    )


# ---- the commands --------------------------------------------------------------------------------


@pytest.mark.spec("X80", "EV5", "SG5")
def test_decide_evaluate_declare_and_final_test_as_a_person_types_them(made, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(made[0], root, symlinks=True)
    r = typed("evaluate", "--run", root, "--split", "val", "--checkpoint", root / "checkpoints/classifier/best.pt")
    assert r.returncode == 0 and "synthetic" in r.stdout and "chose the checkpoint" in r.stdout, r.stderr
    r = typed("evaluate", "--run", root, "--split", "test", "--reason", "curiosity", "--confirm", run_id(root))
    assert r.returncode == 2 and "pillsnap decide" in r.stderr and "Traceback" not in r.stderr
    r = typed("decide", "--run", root, "--by", "kim", "--reason", "a rehearsal")
    assert r.returncode == 0 and "ledger.jsonl" in r.stdout
    r = typed("final-test", "--run", root, "--reason", "a rehearsal", "--confirm", run_id(root))
    assert r.returncode == 0 and "NEEDS_IMPROVEMENT (SYNTHETIC" in r.stdout, r.stderr
    assert typed("final-test", "--run", root, "--reason", "again", "--confirm", run_id(root)).returncode == 2
    r = typed("declare", "cloudflare_tunnel_setup", "--run", root, "--by", "kim", "--note", "looked at the dashboard")
    said = read_json(root / "reports/checks.json")["cloudflare_tunnel_setup"]
    assert r.returncode == 0 and [said[k] for k in ("passed", "by", "note")] == [True, "kim", "looked at the dashboard"]
    assert said["models"] == {
        p.relative_to(root).as_posix(): sha256_file(p) for p in root.glob("checkpoints/*/best.pt")
    }
    assert typed("declare", "cloudflare_tunnel_setup", "--run", root, "--by", "kim", "--failed").returncode == 0
    assert read_json(root / "reports/checks.json")["cloudflare_tunnel_setup"]["passed"] is False
    r = typed("declare", "all_is_well", "--run", root, "--by", "kim")
    assert r.returncode == 2 and "no mandatory check" in r.stderr
    r = typed("evaluate", "--run", root, "--split", "train")
    assert r.returncode == 2 and "Traceback" not in r.stderr


@pytest.mark.spec("X80")
def test_a_model_of_another_split_never_meets_the_sealed_photos(copy, tmp_path):
    "It may have been trained on them. Nothing is opened."
    from pillsnap.core.files import save_json
    from pillsnap.core.jobs import record_path

    best = copy / "checkpoints" / "classifier" / "best.pt"
    inputs, outputs = {"artifacts/stage0/splits.json": "0" * 64}, {"checkpoints/classifier/best.pt": sha256_file(best)}
    save_json(dict(status="finished", inputs=inputs, outputs=outputs, settings={}), record_path(copy, "classifier"))
    before = kinds(copy)
    with pytest.raises(PillsnapError, match="stays closed: the classifier was trained on another split"):
        H.evaluate_split(copy, "test", **ask(copy))
    record_path(copy, "classifier").unlink()
    other = tmp_path / "other.pt"
    shutil.copy(best, other)
    with pytest.raises(PillsnapError, match="stays closed: this checkpoint is of another run"):
        H.evaluate_split(copy, "test", checkpoint=other, **ask(copy))
    assert kinds(copy) == before
