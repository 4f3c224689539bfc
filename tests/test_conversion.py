"""Conversion: labels and photos become a manifest, a YOLO tree, drug metadata and a list of what was left out."""

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.core.jobs import why_stale
from pillsnap.dataset import opening
from pillsnap.dataset.conversion import ConversionJob, convert_delivery
from pillsnap.dataset.drugs import (
    build_drug_metadata_mapping,
    get_drug_metadata_from_class_id,
)
from pillsnap.dataset.matching import discover_detection_data
from pillsnap.dataset.yolotree import check_yolo_tree, coco_to_yolo, write_yolo_tree
from pillsnap.delivery.annotations import DRUG_KEYS, IMAGE_KEYS
from pillsnap.delivery.classmap import ClassMap
from pillsnap.delivery.faults import FaultReason
from pillsnap.delivery.index import COLUMNS, read_manifest

A, B, C, D = "K-000250", "K-000573", "K-002483", "K-006192"
BOXES = ([5, 5, 20, 20], [40, 40, 20, 30], [5, 60, 12, 14], [70, 4, 20, 20])
CFG = load_config("two_stage")


def paint(path, key="x", size=(96, 120), fmt=None):
    rng = np.random.default_rng(abs(hash(str(key))) % 2**32)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path, format=fmt)
    return Path(path)


def photo_of(root, codes, stem, archive=None):
    group = "K-" + "-".join(c[2:] for c in codes)
    sub = f"single/{archive or 'TS_1_single'}" if len(codes) == 1 else f"combination/{archive or 'TS_1_combo'}"
    return Path(root) / "data/train/images" / sub / group / f"{stem}.png"


def label_of(root, codes, stem, k, archive=None):
    group = "K-" + "-".join(c[2:] for c in codes)
    sub = f"single/{archive or 'TL_1_single'}" if len(codes) == 1 else f"combination/{archive or 'TL_1_combo'}"
    return Path(root) / "data/train/labels" / sub / f"{group}_json" / ("" if len(codes) == 1 else k) / f"{stem}.json"


def add(  # noqa: PLR0913 - each part of a photo by its name
    root, codes, lo=0, la=70, boxes=BOXES, labelled=None, paint_it=True, back=2, **image
):
    "A photo and its records; returns its name."
    stem = f"K-{'-'.join(c[2:] for c in codes)}_0_{back}_0_2_{la}_{lo:03d}_200"
    for k, b in zip(codes if labelled is None else labelled, boxes):
        img = (
            dict.fromkeys(IMAGE_KEYS, "")
            | dict(
                file_name=f"{stem}.png",
                width=96,
                height=120,
                drug_N=k,
                dl_mapping_code=k,
                dl_idx=str(int(k[2:]) - 1),
                dl_name=f"약 {k}",
                di_edi_code=f"642{k[2:]},A0{k[2:]}",
                di_etc_otc_code="일반의약품",
                drug_shape="원형",
                chart=None,
                id=1,
            )
            | image
        )
        p = label_of(root, codes, stem, k)
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(
            json.dumps(
                dict(images=[img], type="instances", annotations=[dict(bbox=b, area=b[2] * b[3])], categories=[]),
                ensure_ascii=False,
            ),
            encoding="utf-8",
        )
    if paint_it:
        paint(photo_of(root, codes, stem), stem)
    return stem


@pytest.fixture
def small(tmp_path):
    "Two drugs, three singles, one combo; every file good."
    root = tmp_path / "aihub"
    for lo in (0, 20):
        add(root, [A], lo)
    add(root, [B])
    add(root, [A, B])
    return root


def csv_rows(path):
    return pd.read_csv(path, dtype=str, keep_default_na=False)


# ---- boxes and labels
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("DM8")
def test_the_yolo_tree_and_a_split_that_replaces_it(small, tmp_path):
    import yaml

    out = tmp_path / "run"
    c, y = convert_delivery(small, out), out / "yolo_data"
    assert not y.exists(), "a view, made on request"
    write_yolo_tree(c.rows, small, y)
    assert sorted(p.relative_to(y).as_posix() for p in y.rglob("*") if p.is_dir()) == [
        "images",
        "images/train",
        "images/val",
        "labels",
        "labels/train",
        "labels/val",
    ]
    assert yaml.safe_load((y / "data.yaml").read_text()) == {
        "train": "images/train",
        "val": "images/val",
        "nc": 1,
        "names": ["pill"],
    }
    links = list((y / "images/train").iterdir())
    assert len(links) == 4 and all(p.is_symlink() and p.resolve().is_relative_to(small.resolve()) for p in links), (
        "linked, not copied"
    )
    paths = sorted(c.rows.path.unique())
    write_yolo_tree(c.rows, small, y, {paths[0]: "train", paths[1]: "val"})
    found = {s: [p.stem for p in (y / f"images/{s}").iterdir()] for s in ("train", "val")}
    assert found == {"train": [Path(paths[0]).stem], "val": [Path(paths[1]).stem]} and check_yolo_tree(y) == []
    assert [p.name for p in out.iterdir() if p.name.startswith(".yolo")] == []


def test_no_links_means_copies_and_a_line(small, tmp_path, monkeypatch, caplog):
    def refuse(*a, **k):
        raise OSError("no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(os, "link", refuse)
    c = convert_delivery(small, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        write_yolo_tree(c.rows, small, tmp_path / "run/yolo_data")
    assert "makes no symbolic links" in caplog.text and "'copy': 4" in caplog.text
    assert all(p.is_file() and not p.is_symlink() for p in (tmp_path / "run/yolo_data/images/train").iterdir())


# ---- drug metadata
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("DM3")
def test_drug_metadata_layout(small, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        m = build_drug_metadata_mapping(small / "data/train/labels", tmp_path / "drug_metadata.json")
    assert "Drug metadata mapping saved" in caplog.text
    text = (tmp_path / "drug_metadata.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "drug_metadata.json") == m
    assert '\n  "drug_metadata"' in text and "약 K-000250" in text and "\\u" not in text, "indent 2, Korean as it is"
    assert {"edi_to_class_id", "drug_metadata", "num_classes", "created_at"} <= set(m) and m["num_classes"] == 2
    entry = m["drug_metadata"]["1"]
    assert set(DRUG_KEYS) | {"edi_code", "edi_codes", "class_id", "kcode", "drug_type"} == set(entry)
    assert (
        entry["class_id"],
        entry["kcode"],
        entry["edi_codes"],
        entry["drug_type"],
        entry["chart"],
        entry["color_class1"],
    ) == (1, B, ["642000573", "A0000573"], "일반의약품", None, None)
    assert m["edi_to_class_id"] == {"642000250": 0, "A0000250": 0, "642000573": 1, "A0000573": 1}
    assert ClassMap.from_dict(m["class_map"]).keys == (A, B)


@pytest.mark.spec("DM5")
def test_metadata_from_class_id_is_one_lookup(small, tmp_path):
    m = build_drug_metadata_mapping(small, tmp_path / "m.json")

    class OneLook(dict):
        "A table that may be asked, and not be walked through."

        def __iter__(self):
            raise AssertionError("a scan")

        keys = values = items = __iter__

    fast = {**m, "drug_metadata": OneLook(m["drug_metadata"])}
    assert get_drug_metadata_from_class_id(0, fast)["kcode"] == A
    assert get_drug_metadata_from_class_id(2, fast) == {"error": "metadata_not_found", "class_id": 2}


@pytest.mark.spec("DM3")
def test_class_numbers_follow_the_sorted_map_and_not_the_folders(tmp_path):
    root = tmp_path / "d"
    archives = root / "data/train/labels/single"
    add(root, [D])
    (archives / "TL_1_single").rename(archives / "TL_0_single")  # the last drug's archive is met first
    for k in (A, C):
        add(root, [k])
    m = convert_delivery(root, tmp_path / "run").drugs
    assert [m["drug_metadata"][str(i)]["kcode"] for i in range(3)] == [A, C, D]


def test_an_edi_code_of_two_drugs_is_remarked(tmp_path):
    root = tmp_path / "d"
    add(root, [A], di_edi_code="111")
    add(root, [B], di_edi_code="111,222")
    c = convert_delivery(root, tmp_path / "run")
    assert c.header["remarks"] == {"edi_shared": 1} and c.drugs["edi_to_class_id"] == {"111": 0, "222": 1}


# ---- what is left out
# ----------------------------------------------------------------------------------------------------------------


# What convert_delivery must write to quarantine.csv of a tree of `faulty_tree`, by reason.
PLANTED_FAULTS = dict(
    incomplete_combo=1,
    box_outside=1,
    partial_combo=2,
    identical_boxes=2,
    box_empty=1,
    box_short=1,
    box_string=1,
    box_float=1,
    box_negative=1,
    box_zero=1,
    dl_idx_mismatch=1,
    code_mismatch=1,
    json_without_image=1,
    photo_size=1,
    image_without_json=1,
    photo_broken=2,
    photo_too_small=1,
    photo_too_large=1,
    json_unparsable=1,
    broken_symlink=1,
    extension=1,
    duplicate_photo=1,
)


def plant_wrong_records(root):
    "Records that are missing or whose boxes, numbers and codes are wrong."
    add(root, [A, C], labelled=[A])  # incomplete
    add(root, [A, D], boxes=[[5, 5, 20, 20], [90, 5, 20, 20]])  # outside → the rest is partial
    add(root, [B, C], boxes=[BOXES[0], BOXES[0]])  # identical
    add(root, [B, D], boxes=[[0, 0, 20, 20], [8, 0, 20, 20]])  # overlap: kept
    for i, b in enumerate(([], [1, 2, 3], ["1", 2, 3, 4], [1.5, 2, 3, 4], [9, 9, -3, 3], [9, 9, 0, 3])):
        s = add(root, [C], 20 * i)
        p = label_of(root, [C], s, C)
        r = json.loads(p.read_text(encoding="utf-8"))
        r["annotations"][0]["bbox"] = b
        p.write_text(json.dumps(r), encoding="utf-8")
    add(root, [D], 0, dl_idx="1")
    add(root, [D], 20, dl_mapping_code=A)
    add(root, [D], 60, width=95)
    s = add(root, [D], 200)
    label_of(root, [D], s, D).write_text("{")


def plant_broken_photos(root):
    "A photo or its record is missing; a photo is no photo, cut off, too small or too large."
    add(root, [D], 40, paint_it=False)
    paint(photo_of(root, [D], f"{D}_0_2_0_2_70_080_200"))  # no JSON
    s = add(root, [D], 100)
    photo_of(root, [D], s).write_text("사진이 아닙니다", encoding="utf-8")
    s = add(root, [D], 120)
    p = photo_of(root, [D], s)
    p.write_bytes(p.read_bytes()[:500])
    s = add(root, [D], 140, width=1, height=1, boxes=[[0, 0, 1, 1]])
    paint(photo_of(root, [D], s), size=(1, 1))
    s = add(root, [D], 160)
    p = photo_of(root, [D], s)
    raw = bytearray(p.read_bytes())
    raw[16:24] = (30000).to_bytes(4, "big") * 2
    p.write_bytes(raw)


def plant_strange_files(root):
    "A link to nothing, files that are no photos, and a photo's name a second time."
    images = root / "data/train/images"
    (images / "gone.png").symlink_to("nowhere")
    (images / "notes.txt").write_text("x")
    (images / "K-1_index.png").write_text("x")
    (images / "._x.png").write_text("x")
    s = add(root, [D], 180)
    paint(photo_of(root, [D], s, "TS_2_single"), "other")  # the name again, in another archive


def faulty_tree(root):
    "A delivery with three good photos of A and B, and every fault of PLANTED_FAULTS."
    add(root, [A])
    add(root, [B])
    add(root, [A, B])
    plant_wrong_records(root)
    plant_broken_photos(root)
    plant_strange_files(root)
    return root


@pytest.mark.spec("DM9", "BX4")
def test_every_planted_fault_lands_in_its_own_bucket(tmp_path):
    c = convert_delivery(faulty_tree(tmp_path / "d"), tmp_path / "run")
    rows = csv_rows(tmp_path / "run/quarantine.csv")
    assert list(rows.columns) == ["path", "reason", "detail"]
    assert Counter(rows.reason) == Counter(PLANTED_FAULTS)
    assert c.header["quarantine"] == dict(sorted(Counter(rows.reason).items())) and set(rows.reason) <= {
        str(r) for r in FaultReason
    }
    assert c.header["remarks"] == {"overlapping_boxes": 1} and c.report["passed_over"] == {
        "index_pictures": 1,
        "hidden_files": 1,
    }
    assert sorted(Path(p).stem.split("_0_")[0] for p in c.rows.path.unique()) == sorted(
        [A, B, "K-000250-000573", "K-000573-006192", D]
    )
    assert "TS_1_single" in c.rows[c.rows.kcode == D].path.iloc[-1], "the photo beside its label is the one"
    assert not rows.path.str.startswith("/").any()


@pytest.mark.spec("BX4")
def test_a_wrong_area_is_recomputed_and_a_conflict_reported(tmp_path):
    root = tmp_path / "d"
    s = add(root, [A])
    add(root, [A], 20, dl_company="다른 곳")
    p = label_of(root, [A], s, A)
    r = json.loads(p.read_text(encoding="utf-8"))
    r["annotations"][0]["area"] = 1
    p.write_text(json.dumps(r), encoding="utf-8")
    c = convert_delivery(root, tmp_path / "run")
    assert c.header["remarks"] == {"area_mismatch": 1, "metadata_conflict": 1} and len(c.rows) == 2
    assert "recomputed as 400" in (tmp_path / "run/reports/remarks.csv").read_text(encoding="utf-8")


@pytest.mark.spec("DM9")
def test_bad_deliveries_have_clear_errors_and_leave_no_manifest(tmp_path):
    def refused(root, match, left=()):
        out = tmp_path / f"run_{abs(hash(str(root)))}"
        with pytest.raises(PillsnapError, match=match):
            convert_delivery(root, out)
        assert (
            not (out / "manifest.csv").exists()
            and not (out / "yolo_data").exists()
            and sorted(p.name for p in out.glob("*.csv")) == list(left)
        )

    refused(tmp_path / "missing", "does not exist")
    (tmp_path / "empty/data/train/labels").mkdir(parents=True)
    (tmp_path / "empty/data/train/images").mkdir()
    refused(tmp_path / "empty", "empty: there are no annotation files")
    add(tmp_path / "nophotos", [A], paint_it=False)
    (tmp_path / "nophotos/data/train/images").mkdir()
    refused(tmp_path / "nophotos", "empty: there are no photos")
    for lo in (0, 20):
        photo_of(tmp_path / "broken", [A], add(tmp_path / "broken", [A], lo)).write_text("text")
    refused(tmp_path / "broken", "no usable photo is left.*2 × photo_broken", ["quarantine.csv"])


@pytest.mark.spec("DM9")
def test_one_drug_is_enough(tmp_path):
    add(tmp_path / "d", [A])
    c = convert_delivery(tmp_path / "d", tmp_path / "run")
    assert c.header["class_map"]["keys"] == [A] and c.header["counts"]["photos"] == 1


@pytest.mark.spec("DM6")
def test_discovery_opens_photos_and_obeys_its_settings(small, tmp_path):
    stem = add(small, [B], 40)
    photo_of(small, [B], stem).write_text("text")
    turned = add(small, [B], 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    p = photo_of(small, [B], turned)
    p.unlink()
    paint(p.with_suffix(".jpg"), size=(120, 96))
    Image.open(p.with_suffix(".jpg")).save(p.with_suffix(".jpg"), exif=exif)
    df = discover_detection_data(small)
    names = {Path(q).stem for q in df.path}
    assert turned in names, "a photo on its side is measured upright, and found by its stem"
    assert stem not in names and df[df.path.str.endswith(".jpg")].iloc[0][["width", "height"]].tolist() == [96, 120]
    only = load_config("two_stage", ["data.extensions=['.jpg']"]).data
    assert {Path(q).suffix for q in discover_detection_data(small, c=only).path} == {".jpg"}
    blind = load_config("two_stage", ["data.verify_on_build=false"]).data
    got = discover_detection_data(small, c=blind)
    assert stem in {Path(q).stem for q in got.path} and set(got.sha1) == {""}
    grey = photo_of(small, [A], f"{A}_0_2_0_2_70_000_200")
    Image.open(grey).convert("L").save(grey)
    assert grey.stem not in {
        Path(q).stem
        for q in discover_detection_data(small, c=load_config("two_stage", ["data.grayscale_policy=skip"]).data).path
    }


# ---- the manifest
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("DM7")
def test_manifest_rows_say_how_a_photo_was_taken(small, tmp_path):
    c = convert_delivery(small, tmp_path / "run")
    df, header = read_manifest(tmp_path / "run/manifest.csv")
    pd.testing.assert_frame_equal(df, c.rows)
    assert tuple(df.columns) == COLUMNS and df.sample_id.is_unique
    one, two = df[df.kind == "single"].iloc[1], df[df.kind == "combo"].iloc[0]
    assert one[
        ["kcode", "view", "group_id", "longitude", "latitude", "back", "light", "side", "width", "height", "bbox"]
    ].tolist() == [A, "whole", f"{A}_0_2_2", 20, 70, 2, 2, 0, 96, 120, "[5, 5, 20, 20]"]
    assert two[["view", "group_id"]].tolist() == ["crop", "K-000250-000573"]
    import hashlib

    for r in df.itertuples():
        assert hashlib.sha1((Path(header["root"]) / r.path).read_bytes()).hexdigest() == r.sha1
    assert header["source"] == "aihub" and ClassMap.from_dict(header["class_map"]).keys == (A, B)


def test_one_delivery_one_manifest(small, tmp_path):
    import shutil

    add(small, [C, D])
    a = convert_delivery(small, tmp_path / "a")
    assert a.rows.path.is_monotonic_increasing
    shutil.copytree(small, tmp_path / "copy")
    b = convert_delivery(tmp_path / "copy", tmp_path / "b")
    assert (tmp_path / "a/manifest.csv").read_bytes() == (tmp_path / "b/manifest.csv").read_bytes() and a.header[
        "data_hash"
    ] == b.header["data_hash"]
    add(small, [B], 20)
    assert convert_delivery(small, tmp_path / "c").header["data_hash"] != a.header["data_hash"]


def test_a_changed_manifest_is_refused_and_a_moved_run_is_not(small, tmp_path):
    inside = tmp_path / "run/delivery"
    inside.parent.mkdir()
    small.rename(inside)
    convert_delivery(inside, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    df, header = read_manifest(tmp_path / "moved/manifest.csv")
    assert all((Path(header["root"]) / p).is_file() for p in df.path)
    text = (tmp_path / "moved/manifest.csv").read_text()
    (tmp_path / "moved/manifest.csv").write_text(text.replace(A, C))
    with pytest.raises(PillsnapError, match="do not fit"):
        read_manifest(tmp_path / "moved/manifest.csv")
    with pytest.raises(PillsnapError):
        read_manifest(tmp_path / "moved/none.csv")
    with pytest.raises(PillsnapError, match="no manifest"):
        read_manifest(tmp_path / "moved/drug_metadata.json")


def test_a_synthetic_delivery_is_synthetic_for_ever(small, tmp_path):
    (small / "SYNTHETIC.json").write_text(json.dumps({"domain": "phone"}))
    c = convert_delivery(small, tmp_path / "run", load_config("two_stage", ["data.source=aihub"]).data)
    assert c.header["source"] == "synthetic" and set(c.rows.domain) == {"phone"}


@pytest.mark.spec("SP4")
def test_the_sealed_test_is_reported_and_not_opened(small, tmp_path):
    from test_aihub import OPENED

    for code in (A, D):
        p = small / f"data/val/labels/single/VL_1_single/{code}_json/x.json"
        p.parent.mkdir(parents=True)
        p.write_text("{}")
        paint(small / f"data/val/images/single/VS_1_single/{code}/x.png")
    OPENED.clear()
    c = convert_delivery(small, tmp_path / "run")
    assert not [p for p in OPENED if f"{os.sep}data{os.sep}val{os.sep}" in p]
    assert (
        c.header["sealed"]["drugs"] == 2
        and c.header["sealed"]["known"] == 1
        and c.header["sealed"]["words"].startswith("AI Hub's Validation part: 2 drugs, 1 of them in Training")
    )


# ---- interrupted, full, or run twice
# ---------------------------------------------------------------------------------------------------


def test_a_second_run_opens_only_what_changed(small, tmp_path, monkeypatch):
    looked = []
    real = opening.check_photo
    monkeypatch.setattr(opening, "check_photo", lambda p, **k: looked.append(Path(p).name) or real(p, **k))
    a = convert_delivery(small, tmp_path / "run")
    assert len(looked) == 4
    looked.clear()
    b = convert_delivery(small, tmp_path / "run")
    assert looked == [] and b.header["data_hash"] == a.header["data_hash"]
    paint(photo_of(small, [B], f"{B}_0_2_0_2_70_000_200"), "new")
    convert_delivery(small, tmp_path / "run")
    assert looked == [f"{B}_0_2_0_2_70_000_200.png"]
    journal = tmp_path / "run/artifacts/photos.seen"
    journal.write_bytes(journal.read_bytes()[:-30])
    looked.clear()
    convert_delivery(small, tmp_path / "run")
    assert len(looked) == 1
    looked.clear()
    convert_delivery(small, tmp_path / "run", load_config("two_stage", ["data.grayscale_policy=skip"]).data)
    assert len(looked) == 4, "another policy begins anew"


def test_processes_see_what_threads_see(tmp_path, monkeypatch):
    "Many photos are opened by processes: the same answers, broken ones too, and the same journal."
    for lo in range(0, 160, 20):
        add(tmp_path / "d", [A], lo)
    paths = sorted(str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").rglob("*.png"))
    (tmp_path / "d" / paths[3]).write_text("no photo")
    monkeypatch.setattr(opening, "CHUNK", 3)

    def look(n):
        return opening.check_photos(
            tmp_path / "d", paths, opening.PhotoJournal(tmp_path / f"j{n}", "rgb"), workers=2, progress=False
        )

    few = look(0)
    monkeypatch.setattr(opening, "MANY", 1)
    many = look(1)
    assert (
        few == many
        and len(few) == 8
        and few[paths[3]].reason == "photo_broken"
        and (tmp_path / "j0").read_text() == (tmp_path / "j1").read_text()
    )


def test_killed_in_the_middle_it_goes_on(tmp_path):
    "kill -9 while photos are opened; the same call ends with the manifest of an undisturbed run."
    root = tmp_path / "d"
    for lo in range(0, 360, 20):
        add(root, [A], lo)
        add(root, [B], lo)
    code = (
        "import os, sys; from pillsnap.dataset import conversion, opening as c\n"
        "note = c.PhotoJournal.note\n"
        "def note_and_end(self, rows):\n"
        "    note(self, rows)\n"
        f"    if len(self.path.read_bytes().splitlines()) > 8: os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "c.PhotoJournal.note, c.CHUNK = note_and_end, 4\n"
        "conversion.convert_delivery(sys.argv[1], sys.argv[2])"
    )
    seen = tmp_path / "run/artifacts/photos.seen"
    p = subprocess.run([sys.executable, "-c", code, str(root), str(tmp_path / "run")])
    assert p.returncode == -signal.SIGKILL, "it was still at work"
    assert not (tmp_path / "run/manifest.csv").exists() and len(seen.read_bytes().splitlines()) > 8
    again, whole = convert_delivery(root, tmp_path / "run"), convert_delivery(root, tmp_path / "other")
    assert again.header["data_hash"] == whole.header["data_hash"] and again.header["counts"]["photos"] == 36


def test_a_full_disk_is_said_and_nothing_half_is_left(small, tmp_path):

    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); import signal; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from pillsnap.dataset.conversion import convert_delivery; convert_delivery(sys.argv[1], sys.argv[2])"
    )
    r = subprocess.run(
        [sys.executable, "-B", "-c", code, str(small), str(tmp_path / "run")], capture_output=True, text=True
    )
    assert r.returncode != 0 and "PillsnapError" in r.stderr and "larger than this system allows" in r.stderr
    assert not (tmp_path / "run/manifest.csv").exists() and not list((tmp_path / "run").rglob("*.partial"))
    assert convert_delivery(small, tmp_path / "run").header["counts"]["photos"] == 4


# ---- the job
# ----------------------------------------------------------------------------------------------------------------------

OVER = ("synth.drugs=3", "synth.photos=3", "synth.combos=1", "synth.width=96", "synth.height=128")


def test_the_job_renders_converts_and_reports(tmp_path):
    over = (*OVER, f"paths.root={tmp_path / 'delivery'}")
    res = ConversionJob(run_dir=str(tmp_path / "run"), config="smoke", overrides=over).run()
    df, header = read_manifest(tmp_path / "run/manifest.csv")
    assert header["source"] == "synthetic" and header["counts"]["photos"] == 3 * 3 + 3 == df.path.nunique()
    report = read_json(tmp_path / "run/reports/conversion.json")
    assert (
        report["data_hash"] == header["data_hash"]
        and report["audit"]["photos"] == 12
        and sum(report["conditions"]["light"].values()) == 12
    )
    assert {p.name for p in res.figures} == {
        f"conversion_{n}.png" for n in ("class_balance", "conditions", "captures", "boxes")
    } and all(Image.open(p).size[0] > 200 for p in res.figures)
    assert (
        header["data_hash"][:12] in res.verdict
        and any("synthetic" in n for n in res.notes)
        and any("Validation part" in n for n in res.notes)
    )
    before = (tmp_path / "delivery/SYNTHETIC.json").stat().st_mtime_ns
    ConversionJob(run_dir=str(tmp_path / "run"), config="smoke", overrides=over).run()
    assert (tmp_path / "delivery/SYNTHETIC.json").stat().st_mtime_ns == before, "rendered once"

    def stale(root: Path) -> tuple[str, list[str]] | None:
        return why_stale(tmp_path / "run", "conversion", load_config("smoke", [*OVER, f"paths.root={root}"]))

    assert stale(tmp_path / "delivery") is None and stale(os.path.relpath(tmp_path / "delivery")) is None
    reason, changed = stale(tmp_path / "another")
    assert reason == "its settings changed" and changed == [
        f"paths.root: {tmp_path / 'delivery'} -> {tmp_path / 'another'}"
    ]


def test_a_run_folder_may_be_copied_with_its_photos(tmp_path):
    "Photos in the run folder are the same ones after a move; the copy's job does not run again."
    run, copy = tmp_path / "run", tmp_path / "copy"

    def settings(root: Path) -> list[str]:
        return [*OVER, f"paths.root={root / 'delivery'}"]

    ConversionJob(run_dir=str(run), config="smoke", overrides=settings(run)).run()
    shutil.copytree(run, copy, symlinks=True)
    assert why_stale(copy, "conversion", load_config("smoke", settings(copy))) is None
    assert why_stale(copy, "conversion", load_config("smoke", settings(run)))[1]


def test_the_jobs_seed_is_the_deliverys(tmp_path):
    assert ConversionJob(config="smoke", seed=7).cfg.synth.seed == 7


def test_somebodys_data_is_not_rendered_over(small, tmp_path):
    before = sorted(p.as_posix() for p in small.rglob("*"))
    with pytest.raises(PillsnapError, match="not rendered here"):
        ConversionJob(run_dir=str(tmp_path / "run"), config="smoke", overrides=(*OVER, f"paths.root={small}")).run()
    assert sorted(p.as_posix() for p in small.rglob("*") if p.name != ".lock") == before


def test_a_half_rendered_delivery_is_not_taken_for_whole(tmp_path):
    from pillsnap.synth.files import run_tasks
    from pillsnap.synth.plan import plan_delivery
    from pillsnap.synth.writer import claim_folder

    kw = dict(drugs=3, photos=3, combos=1, seed=42, width=96, height=128)
    plan = plan_delivery(**kw)
    root = tmp_path / "delivery"
    claim_folder(root, plan)
    list(run_tasks(root, plan.tasks[:4], 1, False))
    with pytest.raises(PillsnapError, match="not rendered to its end"):
        convert_delivery(root, tmp_path / "x")
    ConversionJob(run_dir=str(tmp_path / "run"), config="smoke", overrides=(*OVER, f"paths.root={root}")).run()
    assert read_manifest(tmp_path / "run/manifest.csv")[1]["counts"]["photos"] == 12


@pytest.mark.spec("BX4", "BX5")
def test_the_renderers_faults_land_where_they_were_planted(faulty_delivery, tmp_path):
    planted = set(read_json(faulty_delivery / "SYNTHETIC.json")["planted_faults"])
    c = convert_delivery(faulty_delivery, tmp_path / "run")
    q, r = c.header["quarantine"], c.header["remarks"]
    for fault in planted & {str(x) for x in FaultReason} - {"overlapping_boxes", "area_mismatch", "metadata_conflict"}:
        assert q.get(fault) == (2 if fault == "identical_boxes" else 1), fault
    assert r == dict.fromkeys(("area_mismatch", "metadata_conflict", "overlapping_boxes"), 1)
    assert q["photo_broken"] == len({"photo_truncated", "photo_is_text"} & planted) and c.report["passed_over"] == {
        "index_pictures": 1,
        "hidden_files": 1,
    }
    assert len(planted) >= 20


@pytest.mark.spec("BX4")
def test_records_that_state_two_sizes_of_one_photo_give_no_box(tmp_path):
    "In which of the two a box was drawn, nobody can tell; the other photos stay."
    from pillsnap.synth.writer import write_delivery

    root = tmp_path / "delivery"
    write_delivery(root, drugs=4, photos=4, combos=2, seed=1, width=122, height=160, progress=False)
    labels = sorted((root / "data" / "train" / "labels" / "combination").rglob("*.json"))
    stem = labels[0].stem
    other = [p for p in labels if p.stem == stem][-1]
    record = json.loads(other.read_text())
    for key in ("width", "height"):
        record["images"][0][key] *= 2
    box = [2 * v for v in record["annotations"][0]["bbox"]]
    record["annotations"][0] |= dict(bbox=box, area=box[2] * box[3])
    other.write_text(json.dumps(record, ensure_ascii=False))
    made = convert_delivery(root, tmp_path / "run")
    assert not made.rows["path"].str.contains(stem).any() and len(made.rows)
    assert set(made.header["quarantine"]) == {FaultReason.SIZE, FaultReason.PARTIAL}


@pytest.mark.spec("RS5")
@pytest.mark.parametrize("fault", [errno.EACCES, errno.EIO])
def test_photos_that_could_not_be_read_once_are_read_the_next_time(tmp_path, monkeypatch, fault):
    "A disk that comes back changes neither size nor time of a file."
    from pillsnap.synth.writer import write_delivery

    root = tmp_path / "delivery"
    write_delivery(root, drugs=2, photos=4, combos=0, seed=1, width=98, height=128, progress=False)
    bad, real = sorted(root.rglob("*.png"))[:3], Path.read_bytes

    def refused(self):
        if self in bad:
            raise OSError(fault, "not now")
        return real(self)

    with monkeypatch.context() as m:
        m.setattr(Path, "read_bytes", refused)
        m.setattr(opening, "open_in_parallel", lambda job, todo, _workers: ((todo, job(todo)) for todo in [list(todo)]))
        first = convert_delivery(root, tmp_path / "run")
    again = convert_delivery(root, tmp_path / "run")
    assert len(again.rows) == len(convert_delivery(root, tmp_path / "fresh").rows) == len(first.rows) + 3


@pytest.mark.spec("DM1")
def test_a_coco_file_whose_numbers_repeat_is_refused(tmp_path):
    "The boxes of one photo would lie on another."
    image = dict(width=100, height=100)
    doc = dict(
        images=[dict(id=1, file_name="images\\a.png", **image), dict(id=2, file_name="b.png", **image)],
        annotations=[dict(id=1, image_id=1, category_id=1, bbox=[10, 10, 20, 20])],
        categories=[dict(id=1, name="A"), dict(id=2, name="B")],
    )
    for what in ("images", "categories"):
        twice = doc | {what: [e | dict(id=1) for e in doc[what]]}
        (tmp_path / "twice.json").write_text(json.dumps(twice))
        with pytest.raises(PillsnapError, match="have one number"):
            coco_to_yolo(tmp_path / "twice.json", tmp_path / "out")
    (tmp_path / "good.json").write_text(json.dumps(doc))
    coco_to_yolo(tmp_path / "good.json", tmp_path / "good")
    assert sorted(p.name for p in (tmp_path / "good" / "labels").iterdir()) == ["a.txt"]
