"The scripts that measure on photos of real pills, on made-up repositories: what they refuse, and that they measure."

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageDraw

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.records import Metric, Provenance
from pillsnap.training.monitoring import early_stopping

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT / "benchmarks" / "real"
sys.path.insert(0, str(REAL))

import folders
import reference_network
import reference_views
import rp1_folders
import rp2_detector
import rp3_peers
import rp4_reference
import rp5_synthetic
import scenes
import sources


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")
    return subprocess.run(["git", *who, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def boxed(folder: Path) -> None:
    "Eleven photos of a bright disc each on noise, and a table of its boxes; the last is a copy of the first."
    (folder / "images").mkdir(parents=True)
    rows, rng = ["filename,xmin,ymin,xmax,ymax,class"], np.random.default_rng(0)
    for k in range(11):
        page = Image.fromarray(rng.integers(0, 90, (12, 16, 3), np.uint8)).resize((160, 120))
        x, y = (int(v) for v in rng.integers(10, 60, 2))
        ImageDraw.Draw(page).ellipse((x, y, x + 40, y + 30), fill=(240, 220, 200))
        if k == 10:
            page = Image.open(folder / "images/p00.jpg")
            rows.append(rows[1].replace("p00", "p10"))
        else:
            rows.append(f"p{k:02d}.jpg,{x},{y},{x + 40},{y + 30},pill")
        page.save(folder / f"images/p{k:02d}.jpg", quality=95)
    rows.append("p03.jpg,0,0,0,0,pill")
    (folder / "all_labels.csv").write_text("\n".join(rows) + "\n")


def pictures(folder: Path) -> None:
    "Front and back of six pills, three in each half."
    (folder / rp4_reference.FOLDER).mkdir(parents=True)
    names = [n for n in (f"pill-{k}" for k in range(400)) if sources._first_half(f"epillID/{n}_0_0.jpg")]
    halves = [
        [n for n in names if (hashlib.sha256(n.encode()).hexdigest()[1] in "01234567") == h] for h in (True, False)
    ]
    for k, name in enumerate(halves[0][:3] + halves[1][:3]):
        for side in (0, 1):
            page = Image.new("RGB", (96, 96))
            hue = (40 * k + 20 * side) % 256
            ImageDraw.Draw(page).ellipse(
                (3, 3, 92, 92), fill=Image.new("HSV", (1, 1), (hue, 190, 220)).convert("RGB").getpixel((0, 0))
            )
            page.save(folder / rp4_reference.FOLDER / f"{name}_0_{side}.jpg", quality=97)


DRUGS, SCENES, COPIES = ("Alpha 5 MG", "beta 1 MG", "gamma 2.5 MG"), 14, 3


def foldered(folder: Path) -> None:
    "A folder per drug: scenes of patches, and each scene three times, more or less compressed."
    rng = np.random.default_rng(3)
    for drug in DRUGS:
        for k in range(SCENES):
            patches = rng.integers(20, 200, (6, 6, 3), np.uint8)
            for copy in range(COPIES):
                part = folder / "Dataset" / ("valid" if copy == 2 else "train") / drug
                part.mkdir(parents=True, exist_ok=True)
                page = Image.fromarray(patches).resize((96, 96), Image.Resampling.BICUBIC)
                page.save(part / f"{drug.split()[0]}({k})-{copy}.jpg", quality=97 - 3 * copy)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    "Two repositories, their sources and the lists of their files."
    root, found = tmp_path_factory.mktemp("clones"), {}
    for name, make in (("andrewtrainor", boxed), ("epillid", pictures), ("abhiram", foldered)):
        make(folder := root / name)
        git(folder, "init", "-q")
        git(folder, "add", ".")
        git(folder, "commit", "-qm", "photos")
        s = sources.SOURCES[name]
        found[name] = sources.Source(s.repository, git(folder, "rev-parse", "HEAD"), s.files, s.what)
        listed = sources.write_list(name, folder, root / "lists", found)
        assert listed == {"andrewtrainor": 12, "epillid": 12, "abhiram": 3 * SCENES * COPIES}[name]
    return root, found


def opened(made_up, name="andrewtrainor", folder=None):
    root, found = made_up
    return sources.open_clone(name, folder or root / name, root / "lists", found)


@pytest.fixture
def copy(made_up, tmp_path):
    git(tmp_path, "clone", "-q", str(made_up[0] / "andrewtrainor"), "copy")
    return tmp_path / "copy"


def test_an_absent_folder_and_a_folder_without_git_are_refused(made_up, tmp_path):
    with pytest.raises(PillsnapError, match="no such folder"):
        opened(made_up, folder=tmp_path / "nowhere")
    (tmp_path / "plain").mkdir()
    with pytest.raises(PillsnapError, match="no commit"):
        opened(made_up, folder=tmp_path / "plain")


def test_another_commit_is_refused(made_up, copy):
    assert opened(made_up, folder=copy).check() == 12
    (copy / "more.txt").write_text("later")
    git(copy, "add", ".")
    git(copy, "commit", "-qm", "later")
    with pytest.raises(PillsnapError, match="is at .*, not at"):
        opened(made_up, folder=copy)


def test_a_changed_and_a_missing_photo_are_refused(made_up, copy):
    clone = opened(made_up, folder=copy)
    photo = copy / "images/p04.jpg"
    photo.write_bytes(photo.read_bytes() + b"x")
    with pytest.raises(PillsnapError, match="not the listed one"):
        clone.read("images/p04.jpg")
    photo.unlink()
    with pytest.raises(PillsnapError, match="not in this clone"):
        clone.check()


def test_pictures_kept_for_others_are_never_listed():
    for line in (REAL / "photos/epillid.sha256").read_text(encoding="utf-8").splitlines():
        name = line.rsplit("/", 1)[1].removesuffix(".jpg")[: -len("_0_0")]
        assert hashlib.sha256(name.encode()).hexdigest()[0] in "01234567"


def test_every_list_names_its_files_once_by_sha256():
    for name, source in sources.SOURCES.items():
        rows = [line.split("  ", 1) for line in (REAL / f"photos/{name}.sha256").read_text("utf-8").splitlines()]
        assert len(rows) == len({p for _, p in rows}) > 60
        assert all(len(h) == 64 and source.takes(p) for h, p in rows)
        assert len(source.commit) == 40


def test_published_figures_are_of_the_listed_photos():
    "Each published figure names a source at its commit, and the hash of that source's list."
    known = {}
    for name, source in sources.SOURCES.items():
        rows = [line.split("  ", 1) for line in (REAL / f"photos/{name}.sha256").read_text("utf-8").splitlines()]
        clone = sources.Clone(source, REAL, {p: h for h, p in rows})
        known[clone.data] = clone.data_hash
    found = {p.stem: json.loads(p.read_text("utf-8")) for p in sorted((REAL / "results").glob("*.json"))}
    assert found
    for row, result in found.items():
        assert result["id"] == row
        for m in map(Metric.from_dict, result["figures"]):
            assert known[m.data] == m.data_hash, m.name
            assert m.measured and m.n and m.commit and m.hardware
            assert m.note.startswith("95 %: "), "an interval"


@pytest.fixture(scope="module")
def own_photos(made_up, tmp_path_factory):
    "The folder per drug as imported, and its clone."
    clone = opened(made_up, "abhiram")
    return clone, rp1_folders.imported(clone, tmp_path_factory.mktemp("folders"))


def remembered(folder: Path) -> None:
    "The answers of one who knows the groups that it was trained on, and nothing else."
    stage = folder / "artifacts" / "stage0"
    known, eval_set = (pd.read_csv(stage / f"manifest_{k}.csv") for k in ("train", "eval_set"))
    t = eval_set[eval_set["split"] == "clean"].rename(columns={"group_id": "group", "class_key": "true"})
    t["answered"] = t["true"].where(t["group"].isin(set(known["group_id"])), "nothing")
    t.to_csv(folder / rp1_folders.NAMED)
    safe = t.assign(covered=True, answer="drug", right=t["true"] == t["answered"])
    safe.to_csv(folder / "reports" / "safe_answers.csv")


@pytest.mark.spec("RP1")
def test_only_the_split_by_photo_rewards_remembering_near_copies(own_photos, tmp_path):
    clone, first = own_photos
    a = argparse.Namespace(abhiram=clone.folder, minutes=1, epochs=1, size=64)
    runs = []
    for by in ("capture", "image"):
        folder = rp1_folders.started(first, tmp_path / by)
        more = (f"data.group_by={by}", "evaluation.min_eval_samples=24", *folders.SHARES)
        rp1_folders.SplitsJob(str(folder), "own", rp1_folders.settings(a, folder, *more)).run()
        remembered(folder)
        runs.append(folder)
    prov = Provenance(clone.data, clone.data_hash, "b" * 64)
    found = {m.name: m for m in rp1_folders.classifier_figures(*runs, prov, 1.0, "a test")}
    assert found["accuracy_by_near_copies"].value == 0.0
    assert found["accuracy_by_photo"].value > 0.5
    assert found["leak_gap"].value == found["accuracy_by_photo"].value
    assert found["safe_single_answer_accuracy"].value == 0.0
    assert all(m.note.startswith("95 %: ") and "groups of near-copies" in m.note for m in found.values())
    low, high = (float(v) for v in found["leak_gap"].note.split(",")[0].removeprefix("95 %: ").split(" to "))
    assert 0 < low < found["leak_gap"].value < high <= 1


def test_an_import_of_other_photos_than_the_listed_ones_is_refused(made_up, tmp_path):
    git(tmp_path, "clone", "-q", str(made_up[0] / "abhiram"), "more")
    extra = tmp_path / "more" / "Dataset" / "train" / DRUGS[0]
    (extra / "extra.jpg").write_bytes((extra / "Alpha(0)-0.jpg").read_bytes())
    with pytest.raises(PillsnapError, match="1 photos are not listed"):
        rp1_folders.imported(opened(made_up, "abhiram", tmp_path / "more"), tmp_path / "work")


class Searcher:
    "Refuses every drug but those that were enrolled; names those by the folder of the photo."

    def __init__(self):
        self.known, self.codes, self.seen = {}, {}, []

    def enrol(self, export, key, photos, name, by):
        assert (export / "bundle.json").is_file()
        self.known[name], self.codes[name] = photos, key

    def predict(self, photo, mode):
        self.seen.append(photo)
        key = photo.parent.name
        said = "drug" if key in self.known else "unknown"
        return {"items": [{"answer": said, "top_k": [{"kcode": self.codes.get(key, "another")}]}]}


@pytest.mark.spec("RP1")
def test_a_drug_is_asked_for_by_other_groups_than_it_was_enrolled_by(own_photos, tmp_path, monkeypatch):
    clone, first = own_photos
    rows, _ = rp1_folders.read_manifest(first / "manifest.csv")
    out = rp1_folders.left_out(rows["class_key"].tolist(), 2)
    assert len(out) == 2
    assert out == rp1_folders.left_out(sorted(rows["class_key"], reverse=True), 2)
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "bundle.json").write_text("{}")
    one = Searcher()
    monkeypatch.setattr(rp1_folders, "load_bundle", lambda *_, **__: one)
    monkeypatch.setattr(rp1_folders, "enrol_drug", one.enrol)
    mine = rows[rows["class_key"].isin(out)]
    answers = rp1_folders.outside(tmp_path / "run", mine, clone.folder / rp1_folders.FOLDER, tmp_path)
    group = dict(zip((clone.folder / rp1_folders.FOLDER / p for p in mine["path"]), mine["group_id"]))
    shown = {group[p] for photos in one.known.values() for p in photos}
    assert len(shown) == 4, "two groups a drug"
    assert not {group[p] for p in one.seen[len(mine) :]} & shown
    assert len(one.seen) == 2 * len(mine) - sum(g in shown for g in mine["group_id"])
    prov = Provenance(clone.data, clone.data_hash, "b" * 64)
    found = {m.name: m.value for m in rp1_folders.outside_figures(*answers, prov, 1.0, "a test")}
    assert found == {
        "left_out_refused": 1.0,
        "left_out_named": 0.0,
        "enrolled_recall_at_1": 1.0,
        "enrolled_named_rightly": 1.0,
        "enrolled_named_wrongly": 0.0,
    }


class Perfect:
    "A detector that knows where the discs are."

    size = 160

    def __init__(self, shift=0.0):
        self.shift = shift

    def raw(self, x):
        bright = x.mean(1)[0] > 0.7
        rows, cols = np.nonzero(bright)
        x0, x1, y0, y1 = cols.min(), cols.max() + 1, rows.min(), rows.max() + 1
        box = [(x0 + x1) / 2 + self.shift, (y0 + y1) / 2, x1 - x0, y1 - y0, 0.9]
        return np.array(box, np.float32).reshape(1, 5, 1)


@pytest.mark.spec("RP2")
def test_boxes_are_measured_on_every_photo_with_near_copies_in_one_group(made_up, tmp_path):
    clone = opened(made_up)
    truth = sources.boxes_of(clone, *rp2_detector.TABLES["andrewtrainor"])
    assert len(truth) == 11
    assert all(len(b) == 1 for b in truth.values())
    groups = dict(zip(truth, sources.groups_of(clone, list(truth))))
    assert groups["images/p00.jpg"] == groups["images/p10.jpg"]
    assert len(set(groups.values())) == 10
    both = rp2_detector.answers({"good": Perfect(), "off": Perfect(60.0)}, clone, truth, groups)
    good, off = both["good"], both["off"]
    found = {m.name: m for m in rp2_detector.figures("zero_shot", clone, good, 1.0, "a test")}
    assert found["zero_shot_map50"].value > 0.99
    assert found["zero_shot_map50"].n == 11
    assert {m.value for m in rp2_detector.figures("x", clone, off, 1.0, "") if m.name == "x_map50"} == {0.0}
    path = sources.write_result("RP2", "a test", list(found.values()), tmp_path)
    kept = [Metric.from_dict(d) for d in json.loads(path.read_text("utf-8"))["figures"]]
    assert {m.data for m in kept} == {f"other:andrewtrainor/Pill_Object_Detection@{clone.source.commit[:12]}"}
    assert all(m.data_hash == clone.data_hash and m.measured for m in kept)


@pytest.mark.spec("RP2")
def test_fine_tuning_and_measuring_share_no_group(made_up, monkeypatch):
    clone = opened(made_up)
    tune, rest = rp2_detector.parts(clone)
    groups = dict(zip(clone.photos, sources.groups_of(clone, clone.photos)))
    assert sorted(tune + rest) == clone.photos
    assert not {groups[p] for p in tune} & {groups[p] for p in rest}


@pytest.mark.spec("RP2")
def test_all_trainings_get_the_same_photos_and_epochs(made_up, tmp_path, monkeypatch):
    "The same tree, epochs and photos to be measured on for the fine-tuned detector and the two from scratch."
    clone, runs, measured = opened(made_up), [], {}

    def trained(tree, folder, size, epochs, start=None):
        photos = sorted(p.read_bytes() for p in (tree / "images" / "train").iterdir())
        runs.append((folder.name, photos, size, epochs, start))
        return dict(seconds=1.0, epochs=epochs)

    def asked(detectors, clone, photos):
        measured.update({name: (detector, photos) for name, detector in detectors.items()})
        return dict.fromkeys(detectors, []), 1.0

    monkeypatch.setattr(rp2_detector, "plan", lambda *a: a)
    monkeypatch.setattr(rp2_detector, "train", lambda p, start: trained(p[0], p[1], p[2].size, p[2].epochs, start))
    monkeypatch.setattr(rp2_detector, "train_theirs", trained)
    monkeypatch.setattr(rp2_detector, "open_detector", lambda path, lazy: path.parent.name)
    monkeypatch.setattr(rp2_detector, "open_theirs", lambda folder, size: folder.name)
    monkeypatch.setattr(rp2_detector, "asked", asked)
    monkeypatch.setattr(rp2_detector, "figures", lambda name, clone, lines, seconds, note: [(name, note)])
    a = argparse.Namespace(work=tmp_path, photos="0,2,4", tune_steps=8, size=64)
    start = tmp_path / "synthetic" / "best.pt"
    told = dict(rp2_detector.fine_tuned(a, start, clone))
    assert [r[0] for r in runs] == [f"{k}{n}" for n in (2, 4) for k in ("tuned", "scratch", "ultralytics")]
    for first in (0, 3):
        assert all(r[1:4] == runs[first][1:4] for r in runs[first : first + 3])
        assert [r[4] for r in runs[first : first + 3]] == [start, None, None]
    assert [(len(r[1]), r[3]) for r in runs[::3]] == [(2, 32), (4, 16)]
    rest = rp2_detector.parts(clone)[1]
    assert all(photos == rest for _, photos in measured.values())
    assert measured["ultralytics_4"][0] == "ultralytics4"
    assert measured["tuned_0"][0] == "synthetic"
    assert list(told) == list(measured)
    assert told["scratch_2"].startswith("2 real photos, 32 epochs")


@pytest.mark.spec("RP2")
def test_photos_that_chose_a_setting_are_left_out_of_the_second_figure(made_up, tmp_path, monkeypatch):
    "A detector that is right on the groups that chose alone, and one after half of the time that finds nothing."
    clone = opened(made_up)
    groups = sources.groups_of(clone, clone.photos)
    chose = rp2_detector.choosing(groups)
    assert len(chose) == len(set(groups)) // 3 > 0
    right = {p for p, g in zip(clone.photos, groups) if g in chose}
    kinds = {tmp_path / "half.pt": set(), tmp_path / "best.pt": right}
    by_truth = rp2_detector.boxes_of(clone, *rp2_detector.TABLES["andrewtrainor"])

    def answers(detectors, clone, truth, groups, tta):
        "With four views, every pill is found."
        empty = np.zeros((0, 4)), np.zeros(0)
        lines = {}
        for name, detector in detectors.items():
            given = [(p, (b, np.ones(len(b))) if tta or p in detector.known else empty) for p, b in truth.items()]
            lines[name] = [
                dict(part="clean", group=groups[p], truth=truth[p], photo=p, boxes=b, confidence=c)
                for p, (b, c) in given
            ]
        return lines

    def found(path, lazy):
        return argparse.Namespace(known=kinds[path], size=96)

    monkeypatch.setattr(rp2_detector, "open_detector", found)
    monkeypatch.setattr(rp2_detector, "answers", answers)
    monkeypatch.setattr(rp2_detector, "clone_key", lambda clone: "davidooff")
    monkeypatch.setitem(rp2_detector.TABLES, "davidooff", rp2_detector.TABLES["andrewtrainor"])
    metrics, curve = rp2_detector.zero_shot(clone, dict(zip((30.0, 60.0), kinds)), [128], "a test")
    m = {f.name: f for f in metrics}
    n = len(by_truth) - len(right)
    assert (m["davidooff_zero_shot_map50"].n, m["davidooff_zero_shot_rest_map50"].n) == (11, n)
    assert m["davidooff_zero_shot_rest_map50"].value == 0.0 < m["davidooff_zero_shot_map50"].value
    assert m["davidooff_zero_shot_128px_map50"].value == m["davidooff_zero_shot_map50"].value
    assert (m["davidooff_zero_shot_tta_map50"].n, m["davidooff_zero_shot_tta_rest_map50"].n) == (11, n)
    assert m["davidooff_zero_shot_tta_rest_map50"].value > 0.99
    assert [(x["seconds"], x["size"]) for x in curve] == [(30.0, 96), (60.0, 96)]
    assert [x["map50"] for x in curve] == [0.0, m["davidooff_zero_shot_map50"].value]


@pytest.mark.spec("RP2")
def test_photos_with_a_misplaced_box_are_left_out_of_a_figure_of_their_own(made_up, tmp_path, monkeypatch):
    "The figure on all photos stays; the list names photos of the set alone."
    clone = opened(made_up)
    truth = rp2_detector.boxes_of(clone, *rp2_detector.TABLES["andrewtrainor"])
    groups = dict(zip(truth, sources.groups_of(clone, list(truth))))
    wrong = ["images/p00.jpg", "images/p03.jpg"]
    (tmp_path / "davidooff.misplaced.txt").write_text("".join(f"{p}\n" for p in wrong))
    assert sources.misplaced("davidooff", tmp_path) == set(wrong)
    assert sources.misplaced("andrewtrainor", tmp_path) == set()
    lines = [
        dict(part="clean", group=groups[p], truth=b, photo=p, boxes=b + 500 * (p in wrong), confidence=np.ones(len(b)))
        for p, b in truth.items()
    ]
    found = {m.name: m for m in rp2_detector.cleaned("davidooff", clone, lines, 1.0, "a test", tmp_path)}
    chose = rp2_detector.choosing(list(groups.values()))
    rest = [p for p in truth if groups[p] not in chose]
    n = {name: found[f"davidooff_zero_shot_{name}_map50"].n for name in ("rest", "well_boxed", "rest_well_boxed")}
    assert n == dict(rest=len(rest), well_boxed=9, rest_well_boxed=len(set(rest) - set(wrong)))
    assert found["davidooff_zero_shot_well_boxed_map50"].value > 0.99
    assert "2 photos whose box lies beside its pill are left out" in found["davidooff_zero_shot_well_boxed_map50"].note


def test_every_photo_with_a_misplaced_box_is_one_of_its_source():
    for name in sources.SOURCES:
        listed = (sources.HERE / "photos" / f"{name}.sha256").read_text(encoding="utf-8")
        known = {line.split("  ", 1)[1] for line in listed.splitlines() if line}
        assert sources.misplaced(name) <= known
    assert len(sources.misplaced("davidooff")) == 68


@pytest.mark.spec("RP2")
def test_a_training_takes_all_its_epochs_and_keeps_weights_on_its_way(tmp_path, monkeypatch):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "photo").write_text("one")
    monkeypatch.setattr(rp2_detector, "load_ultralytics", lambda folder: None)
    p = rp2_detector.plan(tmp_path / "tree", tmp_path / "run", rp2_detector.Part(64, 40))
    assert p.args["epochs"] == 40
    assert not early_stopping([0.5, *[0.1] * 39], **p.rule)[0], "few photos validate: a pause says nothing"
    clock = [100.0]
    monkeypatch.setattr(rp2_detector.time, "process_time", lambda: clock[0])

    def trained(plan, hooks):
        for epoch in range(4):
            clock[0] += 20
            (plan.folder / "last.pt").write_text(str(epoch))
            hooks["on_model_save"](None)
        return argparse.Namespace(history=[0] * 4)

    monkeypatch.setattr(rp2_detector, "train_detector", trained)
    (tmp_path / "run" / "after7.pt").write_text("of a call that was stopped")
    assert rp2_detector.train(p, None, (15, 45, 50)) == dict(seconds=80.0, epochs=4)
    assert {f.stem: f.read_text() for f in p.folder.glob("after*.pt")} == {"after20": "0", "after60": "2"}
    assert rp2_detector.train(p, None, ()) == dict(seconds=80.0, epochs=4), "not again"


@pytest.mark.spec("RP2")
def test_small_photos_train_first_and_their_weights_go_on_at_full_size(tmp_path, monkeypatch):
    runs = []

    def train(p, start, marks):
        tree, folder, part = p
        runs.append((folder.name, part.size, part.epochs, start, list(marks)))
        folder.mkdir(parents=True)
        (folder / f"after{90 if part.size == 64 else 70}.pt").touch()
        return dict(seconds=100.0 if part.size == 64 else 500.0, epochs=part.epochs)

    monkeypatch.setattr(rp2_detector, "write_tree", lambda folder, train, val: folder)
    monkeypatch.setattr(rp2_detector, "plan", lambda *a: a)
    monkeypatch.setattr(rp2_detector, "train", train)
    sizes = dict(first_size=64, first_epochs=3, size=96, epochs=2, lr=1e-3, mosaic=0.3)
    note, weights = rp2_detector.train_on_scenes(argparse.Namespace(work=tmp_path, scenes=80, **sizes))
    small, full = tmp_path / "small", tmp_path / "synthetic"
    assert [r[:4] for r in runs] == [("small", 64, 3, None), ("synthetic", 96, 2, small / "best.pt")]
    assert runs[1][4] == [50, 200, 500], "counted from its own beginning"
    assert list(weights.items()) == [
        (90.0, small / "after90.pt"),
        (170.0, full / "after70.pt"),
        (600.0, full / "best.pt"),
    ]
    assert note == "80 synthetic photos, 3 epochs at 64 px and 2 epochs at 96 px in 600 s of one core"


def test_synthetic_scenes_have_boxes_inside_and_some_show_no_pill(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "DRUGS", 12)
    folder = scenes.write_tree(tmp_path, 3, 1)
    photos = sorted(folder.rglob("*.jpg"))
    assert [p.parent.name for p in photos] == ["train"] * 3 + ["val"]
    for p in photos:
        rows = np.array(
            [[float(v) for v in r.split()] for r in (folder / "labels" / p.parent.name / f"{p.stem}.txt").open()]
        )
        assert (rows[:, 1:] > 0).all()
        assert (rows[:, 1:3] - rows[:, 3:] / 2 > -1e-5).all()
        assert (rows[:, 1:3] + rows[:, 3:] / 2 < 1 + 1e-5).all()
    before = photos[0].stat().st_mtime_ns
    scenes.write_tree(tmp_path, 3, 1)
    assert photos[0].stat().st_mtime_ns == before
    for i in (11, 23):
        image, boxes = scenes.scene(i, scenes.make_catalogue(12, 8), 8)
        assert image.ndim == 3
        assert not len(boxes)


def test_things_lie_beside_pills_and_get_no_box(monkeypatch):
    "With things in every photo, the boxes are those of the pills, and no thing covers one."
    drawn = []

    def photograph(placed, shot, rng):
        drawn.append(placed)
        return np.zeros((shot.height, shot.width, 3), np.uint8), [(9 * k, 9, 9 * k + 8, 17) for k in range(len(placed))]

    monkeypatch.setattr(scenes, "BESIDE", 1.0)
    monkeypatch.setattr(scenes, "photograph_solids", photograph)
    catalogue = scenes.make_catalogue(12, 8)
    for i in range(10):
        monkeypatch.setattr(scenes, "_what", lambda catalogue, rng: ([(catalogue.drugs[0], scenes.Pose())], 40.0))
        _, boxes = scenes.scene(i, catalogue, 8)
        *things, pill = [(p.x, p.y, scenes._radius(s)) for s, p in drawn[-1]]
        assert len(boxes) == 1 and 1 <= len(things) <= 4
        for n, (x, y, r) in enumerate(things):
            assert all(np.hypot(x - u, y - v) > k + 0.79 * r for u, v, k in [pill, *things[:n]])


@pytest.mark.spec("RP4")
def test_enrolled_pictures_are_found_in_rendered_views_of_the_same_pill(made_up):
    pills = rp4_reference.pills_of(opened(made_up, "epillid"), 100)
    kept = [p for p in pills if not rp4_reference.is_trained_on(p)]
    assert (len(pills), len(kept)) == (6, 3)
    asked = rp4_reference.asked_for(pills, range(6), 64)
    hits = rp4_reference.recall(pills, rp4_reference.ring_colours, 64, asked)
    assert hits["both"].sum() >= 5
    assert hits["front"].sum() >= 3
    some = rp4_reference.Asked(asked.pills[4:], asked.views[8:])
    part = rp4_reference.recall(pills, rp4_reference.ring_colours, 64, some)
    assert all(np.array_equal(part[k], hits[k][4:]) for k in hits), "two pills, looked for among all six"
    rng = np.random.default_rng(0)
    by_chance = rp4_reference.recall(pills, lambda v: rng.normal(size=(len(v), 8)), 64, asked)
    assert by_chance["both"].sum() < 4


def named(pills, photos, fronts, backs):
    "Which photos name each pill first: vectors of a front's and a back's photo, and of all fronts and backs."
    found = []
    for pill in range(len(pills)):
        answers = iter([photos, *([v] * (len(rp4_reference.HEIGHTS) * rp4_reference.TURNS) for v in [*fronts, *backs])])
        asked = rp4_reference.Asked(np.array([pill]), np.zeros((2, 16, 16, 3), np.uint8))
        hits = rp4_reference.recall(pills, lambda _, a=answers: np.array(next(a), float), 16, asked)
        found.append([k for k in hits if hits[k][0]])
    return found


def test_each_photo_is_compared_with_both_sides_and_two_photos_show_two_sides(made_up):
    "The front's photo is most like the first pill's front, the back's like the third's back; both like the second's."
    pills = rp4_reference.pills_of(opened(made_up, "epillid"), 100)[:3]
    fronts = [[1, 0, 0, 0.1], [0.9, 0, 0.3, 0], [0, 0, 1, 0.1]]
    backs = [[0, 0, 1, 1], [0.3, 0.9, 0, 0], [0, 1, 0, 0.05]]
    assert named(pills, [[1, 0, 0, 0], [0, 1, 0, 0]], fronts, backs) == [["front"], ["both"], ["back"]]


def test_a_pill_is_not_named_by_one_side_shown_twice(made_up):
    "Both photos are like one side of the first pill; the second has two sides that are nearly as alike."
    pills = rp4_reference.pills_of(opened(made_up, "epillid"), 100)[:2]
    fronts, backs = [[1, 0.1, 0], [0.9, 0.3, 0]], [[0, 0, 1], [0.9, 0, 0.3]]
    assert named(pills, [[1, 0, 0], [1, 0, 0]], fronts, backs) == [["front", "back"], ["both"]]


@pytest.fixture(scope="module")
def halves(made_up):
    "A half red, half blue pill: the halves of view and reference agree only at the pill's own angle."
    folder = made_up[0] / "halves"
    folder.mkdir()
    page = Image.new("RGB", (120, 70))
    ImageDraw.Draw(page).rounded_rectangle((3, 3, 116, 66), 31, fill=(200, 40, 40))
    halves = np.asarray(page).copy()
    halves[:, 60:] = halves[:, 60:, ::-1]
    page = Image.fromarray(halves)
    for side in (0, 1):
        page.save(folder / f"halves_0_{side}.png")
    return rp4_reference.real_pill("halves", folder / "halves_0_0.png", folder / "halves_0_1.png")


def alike(a, b):
    "How well two views agree in red against blue."
    return np.corrcoef(*((v.astype(float)[..., 0] - v[..., 2]).ravel() for v in (a, b)))[0, 1]


@pytest.mark.spec("RP4")
def test_a_reference_is_laid_as_the_pill_lies_in_its_scene(halves):
    plate, right, rolled = rp4_reference.Plate(halves, 0), [], []
    for k in range(4):
        shown = rp4_reference.rendered(halves, 0, k)
        turn, height, roll = shown.pose
        laid = [plate.laid(reference_views.look(turn + more, height, roll), 64) for more in (0, 180)]
        other = plate.laid(reference_views.look(turn, height, -roll), 64)
        right.append(alike(shown.view(64), laid[0]))
        rolled.append(alike(shown.view(64), other))
        assert right[-1] > 0.6
        assert alike(shown.view(64), laid[1]) < 0
    assert np.mean(right) > np.mean(rolled) + 0.01, "the camera was rolled"


def test_recall_is_told_for_plain_and_for_printed_sides(halves, made_up):
    plain = rp4_reference.pills_of(opened(made_up, "epillid"), 100)[:3]
    assert rp4_reference.relief(rp4_reference.Plate(halves, 0)) > 3 * rp4_reference.relief(
        rp4_reference.Plate(plain[0], 0)
    )
    hits = dict(front=np.array([False, True, False, True]), back=np.array([True, True, False, True]))
    quarters = rp4_reference.by_relief([*plain, halves], hits)
    assert quarters[3] == 1.0, "both sides of the last"
    assert np.mean(quarters) == np.mean(np.concatenate(list(hits.values())))


@pytest.mark.spec("RP4")
def test_views_and_references_of_a_batch_lie_alike(halves, tmp_path):
    pairs, rng = rp4_reference.Pairs([halves], 64, 2, tmp_path), np.random.default_rng(0)
    for _ in range(6):
        batch = pairs.batch(2, rng)
        assert sorted(batch.at) == [0, 1], "each side once"
        for seen, known, cover in zip(batch.seen, batch.known, batch.cover):
            assert alike(seen, known) > 0.6
            assert 0.2 < (cover > 127).mean() < 0.7
    again = rp4_reference.Pairs([halves], 64, 2, tmp_path)
    assert np.array_equal(again.views, pairs.views)


@pytest.mark.spec("RP4")
def test_training_leaves_out_the_pills_that_are_held_back_and_is_not_repeated(made_up, tmp_path, monkeypatch):
    pills = rp4_reference.pills_of(opened(made_up, "epillid"), 100)
    monkeypatch.setattr(rp4_reference, "is_held_back", lambda p: p.name == pills[2].name)
    monkeypatch.setattr(reference_network, "CURVE", (0.01, 5))
    seen, kind = [], rp4_reference.Pairs
    monkeypatch.setattr(rp4_reference, "Pairs", lambda some, *a: seen.extend(some) or kind(some, *a))
    embed, how = rp4_reference.trained(pills, 0.02, 32, 1, tmp_path)
    assert seen == pills[:2] + pills[3:]
    assert "5 other pills" in how["training"]
    assert (how["asked"], how["among"]) == (1, 6)
    assert [line["minutes"] for line in how["curve"]] == [0.01, 0.02]
    assert all(line["both"] in (0, 1) for line in how["curve"])
    again, kept = rp4_reference.trained(pills, 60, 32, 1, tmp_path)
    assert kept == how
    views = np.stack([v for p in pills for v in rp4_reference.Plate(p, 0).turned(32)[:2]])
    assert np.array_equal(embed(views), again(views))
    assert np.isfinite(rp4_reference.unit_vectors(embed(views))).all()


def test_a_script_without_its_clone_says_what_to_do():
    words = [sys.executable, str(REAL / "sources.py"), "davidooff", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert "git clone https://github.com/Davidooff/AI-pill-detection" in done.stderr


def test_a_folder_of_weights_is_not_used_with_other_arguments(tmp_path):
    own = dict(scenes=1500, epochs=8, size=256, tune_steps=200)
    rp2_detector.check_arguments(tmp_path / "a", own)
    rp2_detector.check_arguments(tmp_path / "a", own)
    (tmp_path / "b" / "synthetic").mkdir(parents=True)
    (tmp_path / "b" / "synthetic" / "seconds.txt").write_text("336.0 8")  # of a call that did not say
    for folder, asked in (("a", own | dict(scenes=2000)), ("a", own | dict(size=512)), ("b", own)):
        with pytest.raises(PillsnapError, match="this folder was begun with"):
            rp2_detector.check_arguments(tmp_path / folder, asked)
    rp2_detector.check_arguments(tmp_path / "a", own)  # a refusal changes nothing


@pytest.fixture(scope="module")
def peers_task(own_photos, tmp_path_factory):
    "What the trainers of the third benchmark get, of made-up photos; and the import."
    clone, first = own_photos
    work = tmp_path_factory.mktemp("peers")
    a = argparse.Namespace(abhiram=clone.folder, minutes=1, size=64, work=work)
    shutil.copytree(first, work / "import")
    return rp3_peers.task_of(a, clone), clone


@pytest.mark.spec("RP3")
def test_all_trainers_get_the_same_photos(peers_task, tmp_path):
    (task, prov), clone = peers_task
    groups = {k: set(t["group"]) for k, t in task.rows.items()}
    assert not groups["train"] & groups["val"] and not groups["train"] & groups["clean"]
    assert not groups["val"] & groups["clean"]
    for part, t in task.rows.items():
        shown = sorted(str(p) for p in (task.tree / part).rglob("*.jpg"))
        assert shown == sorted(t["file"]), "no photo more and none less than PillSnap's"
        for row in t.itertuples():
            page, copy = (
                np.asarray(Image.open(f), float) for f in (clone.folder / folders.FOLDER / row.path, row.file)
            )
            assert Path(row.file).parent.name == row.true and np.abs(page - copy).mean() < 3
    run, _ = rp3_peers.split_by(task.a, task.first, tmp_path / "own", "capture")
    again = rp3_peers.parts(rp3_peers.load_split_data(run, 0))
    assert all(again[k]["path"].tolist() == t["path"].tolist() for k, t in task.rows.items())


def knowing(task, order, wrong=0, claimed=1.0):
    "A trainer that knows every drug but those of the first photos, with its drugs in some order."

    def predict(rows):
        scores = np.zeros((len(rows), len(order)))
        for i, true in enumerate(rows["true"]):
            k = sorted(task.classes).index(true)
            scores[i, (k + 1) % len(order) if i < wrong else k] = 1
        return scores

    return rp3_peers.Trained(order, predict, claimed, [claimed], 1.0, "by heart")


@pytest.mark.spec("RP3")
def test_another_order_of_the_drugs_is_noticed(peers_task):
    (task, _), _ = peers_task
    good = rp3_peers.scored(task, knowing(task, sorted(task.classes)))
    assert (good["true"] == good["answered"]).all() and len(good) == len(task.rows["clean"])
    with pytest.raises(PillsnapError, match="another order"):
        rp3_peers.scored(task, knowing(task, sorted(task.classes)[::-1]))
    with pytest.raises(PillsnapError, match="scores for"):
        rp3_peers.scored(task, knowing(task, [*sorted(task.classes)[:-1], "delta 1 MG"]))


@pytest.mark.spec("RP3")
def test_the_lead_is_counted_photo_by_photo(peers_task):
    (task, prov), _ = peers_task
    run = dict(epochs=3, seconds=60.0, how="by heart")
    n = len(task.rows["clean"])
    found = {
        name: (rp3_peers.named(task, knowing(task, sorted(task.classes), wrong), "clean"), run)
        for name, wrong in (("pillsnap", 0), ("timm", n // 2), ("fastai", 0))
    }
    m = {f.name: f for f in rp3_peers.figures(found, 2.0, prov)}
    assert m["accuracy_pillsnap_2min"].value == 1.0
    assert m["lead_over_timm_2min"].value == pytest.approx((n // 2) / n)
    assert m["accuracy_timm_2min"].value == pytest.approx(1 - (n // 2) / n)
    assert m["lead_over_fastai_2min"].value == 0.0
    assert all("groups of near-copies" in f.note for f in m.values())
    assert rp3_peers.epochs_that_fit((12.0, 42.0), 182.0) == 18, "2 s to begin with, and 10 s an epoch"
    assert rp3_peers.epochs_that_fit((12.0, 42.0), 5.0) == 2


def two_pills(*boxes):
    "A grey page with rulers' ticks, a blue label and a pill in each box x0, y0, x1, y1."
    page = Image.new("RGB", (300, 260), (118, 119, 120))
    draw = ImageDraw.Draw(page)
    for k in range(0, 300, 12):
        draw.line((k, 196, k, 202), fill=(200, 200, 200))
    draw.rectangle((0, 226, 299, 259), fill=(120, 180, 220))
    for k, box in enumerate(boxes):
        draw.ellipse(box, fill=(230, 200, 60 + 100 * k))
    return np.asarray(page)


@pytest.mark.spec("RP5")
def test_both_sides_are_cut_out_whole_or_not_at_all():
    boxes = (20, 40, 120, 150), (160, 40, 260, 150)
    sides = rp5_synthetic.both_sides(two_pills(*boxes))
    assert len(sides) == 2
    for side in sides:
        inside = side[..., 3] > 0
        assert side.shape[2] == 4 and inside.sum() == pytest.approx(np.pi / 4 * 101 * 111, rel=0.02)
        assert side[inside][:, 0].min() > 200, "no ground"
    assert not rp5_synthetic.both_sides(two_pills(boxes[0])), "one pill"
    assert not rp5_synthetic.both_sides(two_pills(boxes[0], (170, 60, 240, 120))), "another size"
    assert not rp5_synthetic.both_sides(two_pills((-20, 40, 80, 150), boxes[1])), "cut by the picture's edge"


def stand_in_training(monkeypatch, clean: pd.DataFrame) -> tuple[dict, dict]:
    """Replace cutting out, drawing and training. The first result then holds the rows and the length of each training
    that was asked for, the second the rows that pills were cut out of. One training alone answers right."""
    asked, copied = {}, {}

    def cut(rows, root, folder):
        copied["rows"] = rows
        return rows.drop_duplicates("class_key")

    def drawn(rows, cutouts, folder, n):
        return pd.DataFrame([rows.iloc[0].to_dict() | dict(path=f"rendered/{i}") for i in range(n)])

    def train(a, first, name, rows, length):
        asked[name] = (rows, length)
        said = clean["class_key"] if name == "2_a_drug_plus_100" else "nothing"
        given = dict(path=clean["path"], group=clean["group_id"], true=clean["class_key"], answered=said)
        return pd.DataFrame(given), 1.0

    for name, fake in (("cut_outs", cut), ("synthetic_rows", drawn), ("trained", train)):
        monkeypatch.setattr(rp5_synthetic, name, fake)
    return asked, copied


@pytest.mark.spec("RP5")
def test_every_share_of_rendered_photos_trains_equally_long_on_training_photos(own_photos, tmp_path, monkeypatch):
    clone, first = own_photos
    shutil.copytree(first, tmp_path / "import")
    a = argparse.Namespace(
        abhiram=clone.folder, minutes=1, size=64, work=tmp_path, sizes=[2, rp5_synthetic.ALL], shares=[0, 100], epochs=2
    )
    run, _ = rp5_synthetic.split_by(a, tmp_path / "import", tmp_path / "split", "capture")
    data = rp5_synthetic.load_split_data(run, 0)
    asked, copied = stand_in_training(monkeypatch, data.eval_set[data.eval_set["split"] == "clean"])
    found, lines = rp5_synthetic.run(a, clone)
    right = ["accuracy_2_a_drug_plus_100", "gain_2_a_drug_plus_100"]
    assert [f.name for f in found if f.value == 1.0] == right and {f.value for f in found} == {0.0, 1.0}
    assert len({(length, x["steps"]) for (_, length), x in zip(asked.values(), lines)}) == 1
    batch = load_config("own").train.classification.batch_size
    assert all(f" steps of {batch}, test_resnet from scratch, 64 px" in f.note for f in found)
    known = set(data.train["path"])
    assert set(copied["rows"]["path"]) == known, "cut out of training photos alone"
    shares = ("2_a_drug_plus_0", 6, 0), ("2_a_drug_plus_100", 6, 6), ("rendered_only", 0, len(known))
    for name, real, rendered in shares:
        paths = asked[name][0]["path"]
        assert (paths.isin(known).sum(), paths.str.startswith("rendered").sum()) == (real, rendered)
    assert len(asked["all_a_drug_plus_100"][0]) == 2 * len(known) == asked["all_a_drug_plus_0"][1]
    few = data.train[data.train["path"].isin(asked["2_a_drug_plus_0"][0]["path"])]
    assert few["group_id"].is_unique and set(data.train.drop_duplicates("class_key")["path"]) <= set(few["path"])
    longer = rp5_synthetic.repeated(few, 20)["path"].value_counts()
    assert longer.sum() == 20 and len(longer) == 6 and longer.max() - longer.min() <= 1
