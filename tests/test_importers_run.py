"""A folder of a person's own photos, without boxes and with hardly a fact, goes through every job to an answer."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from fastai.callback.core import Callback
from typer.testing import CliRunner

from pillsnap import load_bundle, run
from pillsnap.cli import app
from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.dataset import focus
from pillsnap.dataset.loaders import validation_loader
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob
from pillsnap.delivery.index import read_manifest, write_manifest
from pillsnap.deployment.export import ExportJob
from pillsnap.evaluation.checks import jobs_before, not_applicable, without_boxes
from pillsnap.evaluation.evaluation import EvaluationJob
from pillsnap.models.card import MISSING
from pillsnap.models.cardview import card_rows
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.detector import DetectorJob
from pillsnap.training.learner import Outputs
from pillsnap.training.retrieval import RetrievalJob
from pillsnap.training.trainer import train_classification_stage

NAMES = ("Aspirin 100", "타이레놀", "blue capsule")
SMALL = """
base: own
data:
  classification: {img_size: 64}
pack: {enabled: false}
splits: {min_photos: 1}
train:
  num_threads: 1
  leak_gap: false
  classification: {epochs: 1, batch_size: 16, warmup_steps: 1}
evaluation: {latency_warmup: 1, latency_runs: 4, condition_photos: 4, objects: 4}
export: {compare_photos: 8, calibration_photos: 8}
"""
FACTS = "class,dl_name,dl_company,print_front\n타이레놀,타이레놀정500밀리그람,한국얀센,TYLENOL\n"


@pytest.fixture(scope="module")
def own(delivery, tmp_path_factory) -> Path:
    "A folder per drug of real-looking photos, with names that a telephone gives."
    root = tmp_path_factory.mktemp("photos") / "my pills"
    names = dict(zip(sorted({p.parent.name for p in delivery.rglob("single/*/K-*/*.png")}), NAMES))
    for k, name in names.items():
        for i, photo in enumerate(sorted(delivery.rglob(f"single/*/{k}/*.png"))):
            link = root / name / f"IMG_{i:04d}.png"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(photo)
    return root


@pytest.fixture(scope="module")
def own_run(own, tmp_path_factory) -> Path:
    "The photos imported, and every job run."
    folder = tmp_path_factory.mktemp("own")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "drugs.csv").write_text(FACTS)
    to = ["--out", str(folder / "run"), "--drugs", str(folder / "drugs.csv"), "--config", str(folder / "small.yaml")]
    done = CliRunner().invoke(app, ["import", str(own), *to])
    assert done.exit_code == 0, done.output
    for job in (SplitsJob, ClassifierJob, EvaluationJob, ExportJob):
        job(str(folder / "run"), str(folder / "run" / "config.yaml")).run()
    return folder / "run"


@pytest.mark.spec("IM1")
@pytest.mark.spec("IM4")
def test_photos_without_boxes_go_through_every_job_to_an_answer(own_run, own):
    stages = {p.stem: read_json(p)["status"] for p in (own_run / "stages").glob("*.json")}
    assert stages == dict.fromkeys(("conversion", "splits", "classifier", "evaluation", "export"), "finished")
    metrics = read_json(own_run / "reports" / "evaluation.json")["metrics"]
    head = read_json(own_run / "manifest.json")
    kept = {(m["data"], m["data_hash"]) for m in metrics.values()}
    assert kept == {("other:my-pills", head["data_hash"])} and metrics["accuracy"]["n"] >= 3
    notes = read_json(own_run / "reports" / "scorecard.json")["notes"]
    assert head["grouping"]["caution"] and head["grouping"]["caution"] in notes
    got = CliRunner().invoke(app, ["predict", "--run", str(own_run), str(own / "타이레놀" / "IMG_0000.png"), "--json"])
    assert got.exit_code == 0, got.output


@pytest.mark.spec("SG1", "SG2", "IM4")
def test_without_boxes_the_gate_asks_for_no_detector_and_says_why(own_run, tmp_path):
    card = read_json(own_run / "reports" / "scorecard.json")
    (row,) = (p for p in card["gate"]["points"] if p["name"] == "map50")
    assert (row["verdict"], "map50" in card["gate"]["not_measured"]) == ("NOT_ASKED", False)
    why = "the imported photos have no boxes, so no detector was trained and none is asked for"
    assert row["note"] == why and why in card["gate"]["notes"]
    assert {"detection_map50", "detection_model_loading"} <= set(card["advice"]["does_not_apply"])
    boxed = load_config("two_stage").project
    assert (not_applicable(boxed, own_run)["detection_map50"], "detector" in jobs_before(boxed, own_run)) == (
        why,
        False,
    )
    text = (own_run / "reports" / "scorecard.md").read_text()
    assert why in text and "no detector was trained in this run" in text
    with_a_box, _ = read_manifest(own_run / "manifest.csv")
    with_a_box.loc[0, "bbox"] = "[1, 2, 30, 40]"
    write_manifest(with_a_box, read_json(own_run / "manifest.json"), tmp_path / "manifest.csv")
    assert without_boxes(own_run) == why and without_boxes(tmp_path) == ""


@pytest.mark.spec("CT11")
def test_the_average_of_a_persons_own_photos_warms_up(own_run):
    last = load_ckpt(own_run / "checkpoints" / "classifier" / "last.pt")
    steps = last["position"]["callbacks"]["ema_warm_up"]["done"]
    assert steps == last["scheduler_state"]["steps"] == 2


class GivenPhotos(Callback):
    "Paths of the photos that the network gets in validation, one view after the other."

    run_train = False

    def before_fit(self):
        self.paths = []

    def after_pred(self):
        self.paths += self.learn.meta["paths"]


def validated(own_run, folder, boxes):
    "The validation photos of a training of one epoch with some boxes, what the network saw, and the views' scores."
    data, cfg = load_split_data(own_run, 0), load_config(str(own_run / "config.yaml"), ["inference.focus=off"])
    val = data.val.assign(bbox=[boxes] * 2 + [""] * (len(data.val) - 2))
    given = GivenPhotos()
    done = train_classification_stage(replace(data, val=val), cfg, Outputs(folder, quiet=True), cbs=[given])
    return val["path"].tolist(), given.paths, done.learn


@pytest.mark.spec("CT21")
def test_a_photo_in_which_no_pill_was_located_looks_the_same_in_both_views(own_run, monkeypatch):
    "So its whole view answers for its located crop."
    located = focus.focused_rows
    monkeypatch.setattr(focus, "focused_rows", lambda *a: (t := located(*a)).assign(bbox=["", *t["bbox"][1:]]))
    data = load_split_data(own_run, 0)
    cfg = load_config(str(own_run / "config.yaml"), ["inference.focus=locator", "dataloader.num_workers=0"])
    crops, whole = (validation_loader(data.val, data, cfg, view, False) for view in ("focus", "whole"))
    unlocated = [not box for box in crops.dataset.bboxes]
    assert unlocated[0] and not all(unlocated), "one photo is shown whole, in another a pill is located"
    by_view = [{p: x for images, _, m in dl for p, x in zip(m["paths"], images)} for dl in (crops, whole)]
    same = [bool((by_view[0][p] == by_view[1][p]).all()) for p in crops.dataset.paths]
    assert same == unlocated


@pytest.mark.spec("CT21", "IM4")
def test_a_photo_without_a_box_is_validated_once(own_run, tmp_path):
    photos, seen, learn = validated(own_run, tmp_path, "")
    assert seen == photos
    assert learn.by_view["crop"] == learn.by_view["whole"] and learn.by_view["crop"]["n"] == len(photos) > 2
    assert learn.answers_by_view["crop"]["paths"] == photos


@pytest.mark.spec("CT21")
def test_the_crops_of_a_mixed_set_are_those_of_its_boxes_and_its_whole_photos(own_run, tmp_path):
    photos, seen, learn = validated(own_run, tmp_path, "[20, 20, 60, 60]")
    assert seen == photos + photos[:2]
    whole, crop = (learn.answers_by_view[v] for v in ("whole", "crop"))
    confidence = {v: dict(zip(a["paths"], a["confidence"].tolist())) for v, a in (("whole", whole), ("crop", crop))}
    assert sorted(crop["paths"]) == sorted(photos) and len(crop["labels"]) == len(photos)
    for k, path in enumerate(photos):
        assert (confidence["whole"][path] == confidence["crop"][path]) == (k >= 2), path
    assert learn.by_view["crop"]["val_loss"] != learn.by_view["whole"]["val_loss"]


@pytest.mark.spec("IM4")
def test_the_detector_says_in_one_sentence_why_not(own_run, capsys):
    run("detector", run_dir=own_run)
    assert "left out, because these photos have no boxes to learn from" in capsys.readouterr().out
    with pytest.raises(PillsnapError, match="no boxes, so no detector can be trained"):
        DetectorJob.check_inputs(own_run, load_config(str(own_run / "config.yaml")))


@pytest.mark.spec("IM4")
def test_a_card_shows_what_nobody_said_as_missing(own_run, own):
    pipeline = load_bundle(own_run)
    (pill,) = pipeline.predict(str(own / NAMES[0] / "IMG_0001.png"))["items"]
    cards = {c["kcode"]: card_rows(c) for c in pill["top_k"]}
    assert set(cards) == set(NAMES)
    assert (cards["타이레놀"]["제조사"], cards["타이레놀"]["앞면 표시"]) == ("한국얀센", "TYLENOL")
    assert {v for k, v in cards[NAMES[0]].items() if k != "품목코드"} == {MISSING}


RETRIEVAL = """
base: retrieval
data:
  classification: {img_size: 48}
  progressive_validation: {current_stage: 0, stage_0: {max_samples: null, max_classes: null}}
retrieval: {min_image_size: 64, warmup_epochs: 1}
splits: {min_photos: 1}
dataloader: {num_workers: 0}
train:
  num_threads: 1
  classification: {backbone: test_resnet, pretrained: false, batch_size: 16, amp_dtype: fp32, lr: 3.0e-3}
evaluation: {latency_warmup: 1, latency_runs: 3, condition_photos: 2, objects: 2}
export: {compare_photos: 4, calibration_photos: 4, uint8_graph: false}
"""


@pytest.mark.spec("IM4")
def test_retrieval_answers_from_photos_without_boxes(own, tmp_path):
    (tmp_path / "small.yaml").write_text(RETRIEVAL)
    root, to = tmp_path / "run", ["--config", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["import", str(own), *to])
    assert done.exit_code == 0, done.output
    where = str(root), str(root / "config.yaml")
    SplitsJob(*where).run()
    RetrievalJob(*where, epochs=2).run()
    for job in (EvaluationJob, ExportJob):
        job(*where).run()
    stages = {p.stem: read_json(p)["status"] for p in (root / "stages").glob("*.json")}
    assert stages == dict.fromkeys(("conversion", "splits", "retrieval", "evaluation", "export"), "finished")
    assert read_json(root / "reports" / "metrics.json")["history"]
    head, metrics = read_json(root / "manifest.json"), read_json(root / "reports" / "evaluation.json")["metrics"]
    kept = {(m["data"], m["data_hash"]) for m in metrics.values()}
    assert kept == {("other:my-pills", head["data_hash"])} and metrics["accuracy"]["n"] >= 3
    gallery = pd.read_csv(root / "gallery" / "photos.csv")
    train = pd.read_csv(root / "artifacts" / "stage0" / "manifest_train.csv")
    assert set(gallery["path"]) == set(train["path"]) and set(gallery["key"]) == set(NAMES)
    assert set(gallery["side"]) == {-1}  # nobody said which side a photo shows
    known = gallery[gallery["key"] == NAMES[1]]["path"].iloc[0]
    (pill,) = load_bundle(root).predict(str(own / known))["items"]
    assert pill["top_k"][0]["kcode"] == NAMES[1]
    assert {c["kcode"] for c in pill["top_k"]} == set(NAMES)
