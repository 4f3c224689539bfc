"A retrieval run from training to the answer: gallery, evaluation, export, bundle, enrolment."

import itertools
import json
import multiprocessing
import shutil
import threading
import time
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.delivery.classmap import ClassMap


@pytest.fixture
def export(gallery_run, tmp_path) -> Path:
    "The export of the run, to enrol drugs in."
    return Path(shutil.copytree(gallery_run / "export", tmp_path / "export"))


def known_photos(run: Path, n: int = 10) -> list[Path]:
    "Photos of trained drugs that were not trained on."
    rows = pd.read_csv(run / "artifacts" / "stage0" / "manifest_eval_set.csv")
    return [run / "delivery" / p for p in rows["path"].drop_duplicates()[:n]]


@pytest.mark.spec("RT9")
def test_the_gallery_is_the_training_part_and_says_where_it_comes_from(gallery_run):
    from pillsnap.core.files import sha256_file
    from pillsnap.models.gallery import load_gallery

    gallery, rows = load_gallery(gallery_run / "gallery"), pd.read_csv(gallery_run / "gallery" / "photos.csv")
    train = pd.read_csv(gallery_run / "artifacts" / "stage0" / "manifest_train.csv")
    vectors = gallery.parts[0].vectors
    assert isinstance(vectors, np.memmap) and vectors.dtype == np.float32 and vectors.shape == (len(rows), 32)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert set(rows["path"]) == set(train["path"]) and not set(rows["path"]) & {
        str(p.relative_to(gallery_run / "delivery")) for p in known_photos(gallery_run, 1000)
    }
    assert [gallery.class_map.key(i) for i in gallery.ids] == rows["key"].tolist()
    assert gallery.parts[0].views.tolist() == rows["side"].tolist() and set(rows["side"]) == {0, 1}
    assert gallery.meta["network"] == sha256_file(gallery_run / "checkpoints" / "retrieval" / "best.pt")
    assert gallery.meta["data_hash"] == read_json(gallery_run / "manifest.json")["data_hash"]


@pytest.mark.spec("RT9", "EX2")
def test_the_bundle_answers_by_the_nearest_photo(gallery_run):
    "Each answer is that of an exhaustive search by hand; torch and ONNX agree on it."
    from pillsnap.deployment.runtime import load_bundle
    from pillsnap.models.pipeline import read_photo
    from pillsnap.photos.images import normalise

    bundle, rows = load_bundle(gallery_run, device="cpu"), pd.read_csv(gallery_run / "gallery" / "photos.csv")
    vectors, pipeline = np.load(gallery_run / "gallery" / "vectors.npy"), bundle.pipeline()
    for photo in known_photos(gallery_run, 4):
        answer = bundle.predict(photo, topk=6)
        view = pipeline.views(read_photo(photo), "single").images[0]
        vector = bundle.classifier.outputs(normalise(view[None]))[1][0]
        cosine = pd.Series(vectors @ vector).groupby(rows["key"]).max().sort_values(ascending=False)
        assert [t["kcode"] for t in answer["items"][0]["top_k"][:3]] == cosine.index[:3].tolist()
        assert answer["items"][0]["answer"] in ("drug", "shortlist", "unknown") and answer["hashes"]["gallery"]
    report = read_json(gallery_run / "reports" / "export.json")
    checks = {c["check"]: c["verdict"] for c in report["checks"] if c["model"] == "classifier"}
    assert report["passed"] is True and checks["embedding, relative error"] == checks["top-1 equal"] == "PASS"


@pytest.mark.spec("RT9", "BX19")
def test_a_changed_gallery_is_refused(export):
    from pillsnap.deployment.runtime import load_bundle

    path = export / "gallery" / "vectors.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(PillsnapError, match="missing or was changed"):
        load_bundle(export, device="cpu")


@pytest.mark.spec("RT9")
def test_the_evaluation_of_a_retrieval_run_fits_a_safe_answer(gallery_run):
    rule, doc = (
        read_json(gallery_run / "reports" / "answer_rule.json"),
        read_json(gallery_run / "reports" / "evaluation.json"),
    )
    assert len(rule["thresholds"]) == doc["classes"] == 6 and rule["unknown"]["score"] in (
        "max_logit",
        "knn",
        "mahalanobis",
    )
    assert "checkpoints/retrieval/best.pt" in doc["inputs"] and doc["metrics"]["set_coverage"]["n"] > 0
    assert read_json(gallery_run / "reports" / "scorecard.json")["rows"]


@pytest.mark.spec("RT9", "BX16")
def test_a_bundle_without_calibrated_pairs_says_why_it_needs_one_photo(gallery_run):
    from pillsnap.deployment.runtime import load_bundle
    from pillsnap.deployment.workers import bundle_facts

    record = read_json(gallery_run / "reports" / "evaluation.json")["metrics"]["pair_accuracy"]
    why = "there are 0 pairs of calibration groups with a front and a back"
    assert record["value"] is None and record["note"].startswith(why)
    assert not (gallery_run / "reports" / "pair_rule.json").exists()
    bundle, photos = load_bundle(gallery_run, device="cpu"), known_photos(gallery_run, 2)
    with pytest.raises(PillsnapError, match=f"from both sides of a pill: {why}"):
        bundle.predict_sides(*photos)
    assert bundle_facts(bundle)["two_side"] is False


@pytest.mark.spec("RT11")
def test_weights_are_stored_in_float32_whatever_trained_them(gallery_run):
    from pillsnap.core.checkpoints import load_ckpt
    from pillsnap.models.factory import load_classifier

    path = gallery_run / "checkpoints" / "retrieval" / "best.pt"
    ckpt = load_ckpt(path)
    assert ckpt["config_snapshot"]["train"]["classification"]["amp_dtype"] == "bf16"
    weights = [v for v in ckpt["model_state"].values() if v.is_floating_point()]
    assert weights and all(v.dtype == torch.float32 and v.device.type == "cpu" for v in weights)
    assert next(load_classifier(path, device="meta").model.parameters()).device.type == "meta"


@pytest.mark.spec("RT12")
def test_without_faiss_the_answers_are_the_same(gallery_run, monkeypatch):
    "The search that is always there is numpy's; a CPU trains and answers without autocast in half precision."
    from pillsnap.models import search
    from pillsnap.models.gallery import class_scores, load_gallery

    gallery = load_gallery(gallery_run / "gallery")
    q = np.asarray(gallery.parts[0].vectors[::3])
    monkeypatch.setattr(search, "have_faiss", lambda: False)
    chosen = search.choose_search(np.asarray(gallery.parts[0].vectors), q, exact_up_to=1)
    assert chosen.search.kind == "exact" and "faiss is not installed" in chosen.reason
    assert np.allclose(class_scores(gallery, q).max(1), chosen.search(q, 1)[0][:, 0], atol=1e-6)


@pytest.mark.spec("RT12")
def test_an_index_without_faiss_gives_the_cosines_it_was_calibrated_with(tmp_path, monkeypatch):
    "A drug beyond the 64 nearest photos has the cosine -1, whoever searches."
    from pillsnap.delivery.classmap import ClassMap
    from pillsnap.models import gallery as G
    from pillsnap.models.search import ChosenSearch, FaissSearch

    pytest.importorskip("faiss")
    keys, near = ClassMap(("K-000001", "K-000002")), np.random.default_rng(0).normal(0, 0.05, (101, 4))
    vectors = G.unit_vectors(near + np.eye(4)[[0] * 100 + [1]])
    rows = [G.Reference(keys.key(int(i == 100)), 0, "", "") for i in range(101)]
    chosen = ChosenSearch(FaissSearch(vectors, "hnsw", 128), 1.0, 128, "a test")
    G.write_gallery(tmp_path, vectors, rows, keys, chosen, scale=9.0)
    asked = np.eye(4, dtype=np.float32)[:1]
    told = G.class_scores(G.load_gallery(tmp_path), asked)
    monkeypatch.setattr(G, "have_faiss", lambda: False)
    assert told[0, 1] == -1 and np.allclose(G.class_scores(G.load_gallery(tmp_path), asked), told, atol=1e-6)


@pytest.mark.spec("BX19", "BX16")
def test_a_pair_is_not_called_calibrated_after_an_enrolment(export, strangers):
    from pillsnap.core.container import content_digest
    from pillsnap.core.files import save_json
    from pillsnap.deployment.enrol import enrol_drug
    from pillsnap.deployment.runtime import load_bundle
    from pillsnap.deployment.workers import bundle_facts
    from pillsnap.models.cardview import _card_notes
    from pillsnap.models.twoside import PairRule

    meta = read_json(export / "bundle.json")
    rule = PairRule(2.0, calibrated=True, class_map=meta["class_map"]["fingerprint"], pairs=40, groups=10)
    meta |= {"pair_rule": rule.to_dict()}
    save_json({**meta, "digest": content_digest(meta)}, export / "bundle.json")

    def told():
        bundle = load_bundle(export, device="cpu")
        answer = bundle.predict_sides(*strangers[1][:2])
        return _card_notes(answer, answer.meta)[0], bundle_facts(bundle)["two_side_calibrated"]

    (before, fitted), _, (after, still) = told(), enrol_drug(export, "K-990001", strangers[0][:2]), told()
    assert "보정된 확률" in before and fitted and "보정되지 않은 확률" in after and not still


def check_names_go_to_the_nearest(bundle, new: str, photos: list[Path], before: list[dict], after: list[dict]) -> None:
    "After an enrolment a photo has the candidate that it had, unless the new drug is the nearest of all."
    from pillsnap.models.gallery import class_scores
    from pillsnap.models.pipeline import read_photo
    from pillsnap.photos.images import normalise

    gallery, pipeline, number = bundle.classifier.gallery, bundle.pipeline(), bundle.class_map.id(new)
    first = [
        (old["items"][0]["top_k"][0]["kcode"], now["items"][0]["top_k"][0]["kcode"]) for old, now in zip(before, after)
    ]
    for photo, (was, is_now) in zip(photos, first, strict=True):
        view = pipeline.views(read_photo(photo), "single").images[0]
        s = class_scores(gallery, bundle.classifier.outputs(normalise(view[None]))[1])[0]
        assert is_now == (new if s.argmax() == number else was)


@pytest.mark.spec("SG1")
def test_the_gate_of_a_family_without_a_detector_asks_for_none(gallery_run):
    gate = json.loads((gallery_run / "reports" / "scorecard.json").read_text())["gate"]
    (row,) = (p for p in gate["points"] if p["name"] == "map50")
    assert (row["verdict"], row["note"]) == ("NOT_ASKED", "the retrieval family has no detector")
    assert "map50" not in gate["not_measured"]


@pytest.mark.spec("BX19")
def test_an_enrolled_drug_is_named_and_the_others_do_not_move(gallery_run, export, strangers):
    from pillsnap.deployment.enrol import enrol_drug, undo_enrolment, unenrol_drug
    from pillsnap.deployment.runtime import load_bundle

    def asked(photos):
        bundle = load_bundle(export, device="cpu")
        return bundle, [dict(bundle.predict(p)) | {"timings": 0} for p in photos]

    photos, refs, others = known_photos(gallery_run), strangers[0][:2], strangers[0][2:]
    _, before = asked([*photos, *refs, *others])
    done = enrol_drug(export, "K-990001", refs, "새 알약", "A. Pharmacist")
    bundle, after = asked([*photos, *refs, *others])
    assert "K-990001" in bundle.class_map.keys and done.moved.photos > 0 and done.near[0] != "K-990001"
    n, own = len(photos), [a["items"][0] for a in after[len(photos) :]]
    assert all(i["top_k"][0]["kcode"] == "K-990001" for i in own[:2]), "its own photos"
    assert sum(i["top_k"][0]["kcode"] == "K-990001" for i in own[2:]) > len(others) / 2, "a held-out drug becomes top-1"
    assert not any(t["kcode"] == "K-990001" for a in before for i in a["items"] for t in i["top_k"])
    assert own[0]["name"] == "새 알약" or own[0]["answer"] == "unknown"
    check_names_go_to_the_nearest(bundle, "K-990001", photos, before, after[:n])
    unenrol_drug(export, "K-990001")
    _, gone = asked([*photos, *refs])
    assert [a["items"] for a in gone] == [b["items"] for b in before[: n + 2]]
    undo_enrolment(export)
    _, back = asked([*photos, *refs])
    assert [a["items"] for a in back] == [a["items"] for a in after[: n + 2]]
    assert len({a[0]["hashes"]["gallery"] for a in (before, after, gone, back)}) == 4


def enrol_slowly(export: Path, key: str, photos: list[Path], start) -> None:
    "Enrol a drug in a process of its own, which waits a second between reading the journal and writing to it."
    from pillsnap.deployment import enrol

    append = enrol.append_line
    enrol.append_line = lambda *line: (time.sleep(1), append(*line))
    start.wait(120)
    enrol.enrol_drug(export, key, photos, by="both")


@pytest.mark.spec("BX19")
def test_two_who_enrol_at_once_lose_nothing_and_the_file_keeps_it(gallery_run, export, strangers, tmp_path):
    from pillsnap.deployment.bundling import bundle_file, verify_file
    from pillsnap.deployment.enrol import enrol_drug, enrolled_table
    from pillsnap.deployment.runtime import load_bundle

    spawn = multiprocessing.get_context("spawn")
    start, given = spawn.Barrier(2), zip(("K-990001", "K-990002"), strangers)
    people = [spawn.Process(target=enrol_slowly, args=(export, key, photos[:2], start)) for key, photos in given]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert [person.exitcode for person in people] == [0, 0]
    bundle = load_bundle(export, device="cpu")
    assert {"K-990001", "K-990002"} <= set(bundle.class_map.keys) and enrolled_table(export).count("\n") == 1
    assert [e["seq"] for e in bundle.known.entries] == [1, 2]
    run = tmp_path / "run"
    run.mkdir()
    shutil.move(export, run / "export")
    for name in ("manifest.json", "config.yaml"):
        shutil.copy(gallery_run / name, run / name)
    packed = bundle_file(run, tmp_path / "pills.pillsnap")
    told = f"2 drugs enrolled without calibration, gallery {bundle.known.hash}"
    assert told in str(verify_file(packed.where)) and told in packed.read("MODEL_CARD.md").decode()
    journal = f"2 drugs by 4 photos; journal of 2 lines, sha256 of the last `{bundle.known.entries[-1]['hash']}`"
    assert f"- enrolled after the training: {journal}\n" in packed.read("DATA_CARD.md").decode()
    asked = strangers[1][0]
    a, b = (dict(load_bundle(p, device="cpu").predict(asked)) | {"timings": 0} for p in (run, packed.where))
    assert a == b and a["items"][0]["top_k"][0]["kcode"] == "K-990002"
    with pytest.raises(PillsnapError, match="packed file is never changed"):
        enrol_drug(packed.where, "K-990003", [asked])
    journal = run / "export" / "gallery" / "journal.jsonl"
    journal.write_text(journal.read_text().replace("both", "none"))
    with pytest.raises(PillsnapError, match="line 1 of the journal was changed"):
        load_bundle(run, device="cpu")


def heap(path: Path, n: int, side: int) -> Path:
    "A photo of many pills."
    photo = Image.new("RGB", (640, 640), (150, 150, 150))
    step = 640 // round(n**0.5)
    for x, y in itertools.product(range(step // 2, 640, step), repeat=2):
        ImageDraw.Draw(photo).ellipse([x - 30, y - 30, x + 30, y + 30], fill=(220, 220 - 90 * side, 90))
    photo.save(path)
    return path


@pytest.mark.spec("BX19")
def test_what_could_harm_is_not_enrolled(gallery_run, export, strangers):
    from pillsnap.deployment.enrol import enrol_drug, unenrol_drug
    from pillsnap.deployment.runtime import load_bundle
    from pillsnap.deployment.triton import write_triton

    trained, photos = load_bundle(export, device="cpu").class_map.keys[0], strangers[0][:2]
    with pytest.raises(PillsnapError, match="is a drug of training"):
        enrol_drug(export, trained, photos)
    with pytest.raises(PillsnapError, match="is no K-code"):
        enrol_drug(export, "K-99001", photos)
    with pytest.raises(PillsnapError, match="no name of a drug has"):
        enrol_drug(export, "pills/aspirin", photos)
    with pytest.raises(PillsnapError, match="given twice"):
        enrol_drug(export, "K-990001", photos[:1] * 2)
    Image.open(photos[0]).convert("RGB").save(export / "again.jpg", quality=90)
    with pytest.raises(PillsnapError, match="given twice, or a copy of it"):
        enrol_drug(export, "K-990001", [photos[0], export / "again.jpg"])
    with pytest.raises(PillsnapError, match="each side is needed"):
        enrol_drug(export, "K-990001", photos[:1])
    enrol_drug(export, " K-990001", photos, "새 알약")
    with pytest.raises(PillsnapError, match="is enrolled as '새 알약'"):
        enrol_drug(export, "K-990001", strangers[1][:2], "다른 알약")
    with pytest.raises(PillsnapError, match="made K-990001 known already"):
        enrol_drug(export, "K-990002", photos)
    known = read_json(export / "bundle.json")["drugs"][trained]["dl_name"]
    for name, owner in ((f" {known.upper()}", trained), ("새알약", "K-990001")):  # the K-code was mistyped
        with pytest.raises(PillsnapError, match=f"is the name of {owner}: is K-990009 mistyped"):
            enrol_drug(export, "K-990009", strangers[1][:2], name)
    with pytest.raises(PillsnapError, match="새 알약 is the name of K-990001 already"):
        enrol_drug(export, "새 알약", strangers[1][:2])
    two_products = enrol_drug(export, "K-990009", strangers[1][:2], known, shares_name=True)
    for n in (4, 16):
        with pytest.raises(PillsnapError, match="several pills"):
            enrol_drug(export, "K-990010", [heap(export / f"{n}_{side}.png", n, side) for side in (0, 1)])
    assert two_products.line["named_like"] == [trained] and f"{trained} has this name too" in str(two_products)
    with pytest.raises(PillsnapError, match="K-990002 is not enrolled"):
        unenrol_drug(export, "K-990002")
    with pytest.raises(PillsnapError, match="Triton serves networks alone"):
        write_triton(load_bundle(export, device="cpu"), export / "triton")


@pytest.mark.spec("BX19")
@pytest.mark.parametrize("seed", [12, 21, 3])
def test_an_enrolment_that_is_undone_leaves_the_rule_as_it_was(seed, monkeypatch):
    "In worlds where the second drug needs wider thresholds than the first, which stays."
    from pillsnap.deployment import enrol as E
    from pillsnap.models import enrolment as N
    from pillsnap.models.decision import AnswerRule
    from pillsnap.models.gallery import Gallery, GalleryPart, gallery_logits, unit_vectors
    from pillsnap.models.pipeline import softmax

    rng = np.random.default_rng(seed)
    centres = unit_vectors(rng.normal(size=(12, 24)))
    ids = np.repeat(np.arange(12), 8)
    vectors = unit_vectors(centres[ids] + 0.22 * rng.normal(size=(96, 24)))
    classes = ClassMap(tuple(f"K-{i:06d}" for i in range(1, 13)))
    part = GalleryPart(vectors, ids.astype(np.int32), np.zeros(96, np.int8))
    trained = Gallery((part,), classes, 20.0, meta=dict(digest="x"))
    asked = np.repeat(np.arange(12), 10)
    groups = np.repeat(np.arange(36), rng.multinomial(120, np.ones(36) / 36))
    photos = N.CalibrationPhotos(unit_vectors(centres[asked] + 0.32 * rng.normal(size=(120, 24))), asked, groups)
    p = softmax(gallery_logits(trained, photos.vectors), 1.0)
    threshold = float(np.quantile(1 - p[np.arange(120), asked], 0.9))
    rule = AnswerRule("lac", 0.1, (threshold,) * 12, class_map=classes.fingerprint)
    bundle = SimpleNamespace(base_rule=lambda: rule, meta={"temperature": 1.0})
    monkeypatch.setattr(E, "_calibration", lambda _bundle: photos)
    stored = {f"K-10000{n}": unit_vectors(centres[n] + 0.25 * rng.normal(size=(2, 24))) for n in (0, 1)}

    def step(known, **line):
        moved = E._moved(bundle, known, E._after(known, line, stored))
        return E._after(known, line | dict(gallery="x", widened=moved.widened, rule=N.rule_digest(rule)), stored)

    def enrol(known, key):
        sides = [{"sha256": f"{key} {side}", "side": side} for side in (0, 1)]
        return step(known, action="enrol", key=key, name="", photos=sides, vectors={"file": key})

    first = enrol(N.KnownDrugs(trained), "K-100000")
    both = enrol(first, "K-100001")
    undone = step(both, action="undo", undoes=2, key="K-100001")
    assert both.rule(rule) != first.rule(rule)
    assert undone.rule(rule) == first.rule(rule) and undone.gallery(rule).reach == first.gallery(rule).reach


def enrol_meanwhile(export: Path, photos: list[Path]) -> threading.Thread:
    "Another person who begins to enrol now."
    from pillsnap.deployment.enrol import enrol_drug

    other = threading.Thread(target=enrol_drug, args=(export, "K-990002", photos))
    other.start()
    other.join(1)  # a second: more than it needs, if nothing holds it up
    return other


@pytest.mark.spec("BX19")
@pytest.mark.parametrize("kind", ["backup", "bundle"])
def test_a_copy_holds_the_gallery_of_one_moment(gallery_run, strangers, tmp_path, monkeypatch, kind):
    "Somebody enrols while the files are read: what was copied answers, and the enrolment is not lost."
    from pillsnap.deployment import backup, bundling
    from pillsnap.deployment.enrol import enrol_drug
    from pillsnap.deployment.runtime import load_bundle

    run, waiting = tmp_path / "run", []
    shutil.copytree(gallery_run, run, symlinks=True, ignore=shutil.ignore_patterns("delivery", "yolo_data"))
    enrol_drug(run, "K-990001", strangers[0][:2])
    known = len(load_bundle(run, device="cpu").class_map)
    module, name = {"backup": (backup, "_add_file"), "bundle": (bundling, "model_card")}[kind]
    real = getattr(module, name)

    def meanwhile(*args):
        if not waiting and (kind == "bundle" or "export/" in args[1]):
            waiting.append(enrol_meanwhile(run, strangers[1][:2]))
        return real(*args)

    monkeypatch.setattr(module, name, meanwhile)
    if kind == "backup":
        backup.write_backup(run, tmp_path / "run.tar.gz")
        shutil.unpack_archive(tmp_path / "run.tar.gz", tmp_path / "restored", filter="data")
        copy = tmp_path / "restored" / "run"
    else:
        copy = bundling.bundle_file(run, tmp_path / "pills.pillsnap").where
    waiting[0].join()
    assert len(load_bundle(copy, device="cpu").class_map) == known
    assert len(load_bundle(run, device="cpu").class_map) == known + 1


@pytest.mark.spec("RS5")
def test_a_bundle_that_could_not_be_made_leaves_the_earlier_one(gallery_run, tmp_path, monkeypatch):
    from pillsnap.deployment import bundling

    out = tmp_path / "pills.pillsnap"
    before = bundling.bundle_file(gallery_run, out).where.read_bytes()

    def fails(*_args, **_kwargs):
        raise PillsnapError("it does not answer")

    monkeypatch.setattr(bundling, "_answers", fails)
    with pytest.raises(PillsnapError, match="it does not answer"):
        bundling.bundle_file(gallery_run, out)
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [out.name]


@pytest.mark.spec("BX19", "IM1")
def test_a_folders_name_is_enrolled_beside_k_codes(export, strangers):
    "A name as an import gives it, in any spelling, is answered, told from a like one, and taken out again."
    from pillsnap.deployment.enrol import enrol_drug, unenrol_drug
    from pillsnap.deployment.runtime import load_bundle

    enrol_drug(export, unicodedata.normalize("NFD", "비타민 C"), strangers[0][:2])
    bundle = load_bundle(export, device="cpu")
    assert "비타민 C" in bundle.class_map.keys and bundle.class_map.kind == "folder"
    assert bundle.predict(strangers[0][0])["items"][0]["top_k"][0]["kcode"] == "비타민 C"
    with pytest.raises(PillsnapError, match="is known as '비타민 C' already"):
        enrol_drug(export, "비타민 c", strangers[1][:2])
    with pytest.raises(PillsnapError, match="is no K-code"):
        enrol_drug(export, "K-99001", strangers[1][:2])
    unenrol_drug(export, "비타민 C")
    assert load_bundle(export, device="cpu").class_map.kind == "kcode"


@pytest.mark.spec("BX19")
def test_what_a_widening_rests_on_is_checked(export, strangers):
    "Another rule than the journal's, calibration photos that are gone, and an export that was made anew meanwhile."
    from dataclasses import replace

    from pillsnap.core.container import content_digest
    from pillsnap.core.files import save_json
    from pillsnap.deployment.enrol import _check_same, enrol_drug, unenrol_drug
    from pillsnap.deployment.runtime import load_bundle
    from pillsnap.models.enrolment import rule_digest

    enrol_drug(export, "K-990001", strangers[0][:2])
    first, meta = load_bundle(export, device="cpu"), read_json(export / "bundle.json")
    assert not first.known.stale(first.base_rule()) and first.known.rewidened is None
    meta["rule"]["thresholds"] = [t * 0.9 for t in meta["rule"]["thresholds"]]
    save_json({**meta, "digest": content_digest(meta)}, export / "bundle.json")
    bundle = load_bundle(export, device="cpu")
    assert bundle.known.rewidened is not None, "another rule: the widening is computed again"
    line = enrol_drug(export, "K-990002", strangers[1][:2]).line
    assert line["rule"] == rule_digest(bundle.base_rule()) and line["gallery"] == meta["gallery"]["digest"]
    trained = replace(bundle.known.trained, meta={"digest": "another"})
    with pytest.raises(PillsnapError, match="made anew meanwhile"):
        _check_same(bundle, replace(bundle.known, trained=trained))
    (export / "gallery" / "calibration.npz").unlink()
    with pytest.raises(PillsnapError, match="cannot be read"):
        unenrol_drug(export, "K-990001")


@pytest.mark.spec("RT10", "RT8")
def test_create_splits_and_train_work_in_a_folder_of_their_own(gallery_run, tmp_path, monkeypatch, capsys):
    "create_splits deals out the photos, train trains there, and the same line again goes on with what there is."
    from pillsnap.cli import main
    from pillsnap.core import runner

    monkeypatch.setattr(runner, "_execute", lambda stage, out, params, head: stage.job_class()(**params).run() and None)
    root, photos = tmp_path / "run", str(gallery_run / "delivery")
    root.mkdir()
    given = [f"paths.exp_dir={root}", "train.classification.epochs=1"]
    config = load_config(str(gallery_run / "config.yaml"), given).to_dict()
    (root / "config.yaml").write_text(yaml.safe_dump({"base": None, **config}))
    main_ok(main, "create_splits", "--data_dir", photos, "--output_dir", str(root))
    parts = [pd.read_csv(root / "artifacts" / "stage0" / f"manifest_{name}.csv") for name in ("train", "eval_set")]
    assert all(len(p) for p in parts) and not set(parts[0]["group_id"]) & set(parts[1]["group_id"])
    main_ok(main, "train", "--data_dir", photos, "--splits_dir", str(root))
    written = (root / "checkpoints" / "retrieval" / "best.pt").stat().st_mtime_ns
    main_ok(main, "train", "--data_dir", photos, "--splits_dir", str(root))
    assert "retrieval: up to date" in capsys.readouterr().out, "a finished training goes on with what there is"
    assert (root / "checkpoints" / "retrieval" / "best.pt").stat().st_mtime_ns == written
    assert (root / "gallery" / "gallery.json").is_file()


@pytest.mark.spec("RT10", "RT9")
def test_the_sources_commands_work(gallery_run, delivery, tmp_path, capsys):
    "evaluate --checkpoint --split, as the family's source has it; what was enrolled, from a shell."
    from pillsnap.cli import main

    checkpoint = gallery_run / "checkpoints" / "retrieval" / "best.pt"
    copied = tmp_path / "run"
    shutil.copytree(gallery_run, copied, symlinks=True)
    main_ok(main, "evaluate", "--checkpoint", str(copied / checkpoint.relative_to(gallery_run)), "--split", "val")
    said = capsys.readouterr().out
    assert "val of run" in said and "recall@5" in said
    found = read_json(copied / "reports" / "evaluate_val.json")
    assert found["family"] == "retrieval" and found["metrics"]["recall@1"]["n"] > 0
    main_ok(main, "unenrol", "--list", "--gallery", str(copied))
    assert "no drug was enrolled" in capsys.readouterr().out


def main_ok(main, *argv: str) -> None:
    "Run a command that must succeed."
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert not end.value.code
