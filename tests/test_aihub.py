"""The AI Hub format and the truth guard: reading, judging, counting; the class map; archives."""

import json
import os
import random
import stat
import sys
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pillsnap.core.errors import PillsnapError
from pillsnap.delivery.annotations import IMAGE_KEYS, MAX_JSON_BYTES, Annotation, read_annotation
from pillsnap.delivery.archives import extract_archives
from pillsnap.delivery.capture import capture_group, parse_name
from pillsnap.delivery.classmap import ClassMap, keys_fingerprint
from pillsnap.delivery.faults import Fault, FaultReason
from pillsnap.delivery.names import parse_archive
from pillsnap.delivery.tree import find_delivery, index_photos, overlap_in_words, sealed_codes, walk_tree
from pillsnap.delivery.truth import audit, audit_command, check_labels

A, B, C, D = "K-000250", "K-000573", "K-002483", "K-006192"
APART = ([10, 10, 100, 90], [300, 40, 80, 80], [600, 900, 120, 110], [50, 700, 60, 70])


def record(code, name, bbox, area=None, n_boxes=1, **image):
    "One annotation file in the delivered form, written from the published field list."
    img = (
        dict.fromkeys(IMAGE_KEYS, "")
        | dict(
            file_name=f"{name}.png",
            width=976,
            height=1280,
            drug_N=code,
            dl_mapping_code=code,
            dl_idx=str(int(code[2:]) - 1),
            dl_name="가나다정 5밀리그램",
            dl_company="가나다제약(주)",
            di_edi_code="642500340,A01508511",
            thick=4.1,
            leng_long=12,
            item_seq=200500254,
            id=1,
        )
        | image
    )
    area = (
        area
        if area is not None
        else bbox[2] * bbox[3]
        if isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(v, int) for v in bbox)
        else 0
    )
    ann = dict(area=area, iscrowd=0, bbox=bbox, category_id=1, ignore=0, segmentation=[], id=1, image_id=1)
    return dict(
        images=[img],
        type="instances",
        annotations=[ann] * n_boxes,
        categories=[dict(supercategory="pill", id=1, name="Drug")],
    )


def put(path, obj, encoding="utf-8"):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        (obj if isinstance(obj, str) else json.dumps(obj, ensure_ascii=False, indent="\t")).encode(encoding)
    )
    return path


def combo(root, codes, boxes=APART, la=70, flat=False, archive="TL_1_combo", **kw):
    "All records of a combo photo, a folder per K-code, or (flat) none."
    group = "K-" + "-".join(c[2:] for c in codes)
    name = f"{group}_0_2_0_2_{la}_000_200"
    for c, b in zip(codes, boxes):
        folder = Path(root) / "combination" / archive / f"{group}_json"
        put(folder / f"{name}_{c}.json" if flat else folder / c / f"{name}.json", record(c, name, b, **kw))
    return name


def single(root, code, lo=0, bbox=None, encoding="utf-8", **kw):
    name = f"{code}_0_2_0_2_70_{lo:03d}_200"
    return put(
        Path(root) / "single" / "TL_1_single" / f"{code}_json" / f"{name}.json",
        record(code, name, APART[0] if bbox is None else bbox, **kw),
        encoding,
    )


# ---- the audit
# ----------------------------------------------------------------------------------------------------------------------

KEYS = [
    "files",
    "unparsable",
    "photos",
    "annotations",
    "drugs",
    "incomplete_photos",
    "missing_pills",
    "boxes_outside",
    "identical_box_photos",
    "overlapping_box_photos",
    "area_mismatch",
    "dl_idx_mismatch",
    "code_mismatch",
    "metadata_conflicts",
    "json_without_image",
    "edi_codes_per_drug",
    "null_metadata_drugs",
]


@pytest.mark.spec("BX4")
def test_the_public_originals():
    "The original annotation files that are public give the counts of the data notes, exactly and in a few seconds."
    folder = os.environ.get("PILLSNAP_ORIGINALS")
    if not folder:
        pytest.skip(
            "PILLSNAP_ORIGINALS is not set: it names the folder of the 4,526 public original annotation files, "
            "which may not be redistributed"
        )
    got = audit(folder)
    assert list(got)[:17] == KEYS
    assert [got[k] for k in KEYS] == [
        4526,
        0,
        1489,
        4526,
        73,
        850,
        1136,
        2,
        5,
        2,
        18,
        0,
        0,
        0,
        None,
        {1: 33, 2: 38, 3: 1, 4: 1},
        ["K-016548"],
    ]


def planted(root):
    "A tree with known faults; returns what an audit must find."
    combo(root, [A, B, C, D])  # complete
    combo(root, [A, B, C], APART[:2])  # lacks C
    combo(root, [A, B, C, D], APART[:1], 75)  # lacks three
    combo(root, [A, B], [APART[0], APART[0]], 75)  # one box for two
    combo(
        root, [A, B], [[0, 0, 1000, 1000][:2] + [900, 900], [0, 0, 900, 901]], 90
    )  # IoU .9989: overlapping, not identical
    combo(root, [A, C], [[0, 0, 100, 100], [0, 0, 100, 30]], 70)  # IoU .3: overlapping
    combo(root, [A, C], [[0, 0, 100, 100], [0, 0, 100, 29]], 75)  # IoU .29: nothing
    combo(root, [A, D], [[0, 0, 976, 1280], [1, 0, 976, 20]], 70)  # the edge is inside; one pixel more is not
    combo(root, [A, D], [[6567, 10, 20, 20], [10, 8889, 20, 20]], 75)  # far outside
    single(root, B, 0, area=7)
    single(root, B, 20, area=None)  # one wrong area
    single(root, B, 40, dl_idx="573")
    single(root, B, 60, dl_idx="")  # dl_idx = K; not given
    single(root, B, 80, dl_mapping_code="K-000574")
    single(root, B, 100, dl_mapping_code=None)
    single(root, C, 0, dl_company="다른제약(주)")
    single(root, C, 20, dl_material="x")
    single(root, C, 40, dl_material=None, encoding="cp949")
    for lo in (0, 20):
        single(root, "K-000007", lo, chart=None, drug_shape=None if lo else "원형", di_edi_code="")
    for i, text in enumerate(("", "{", "[]", '{"images": []}')):
        put(root / "single" / "TL_1_single" / f"broken_{i}.json", text)
    put(root / "single" / "TL_1_single" / "._hidden.json", "{")
    put(root / "__MACOSX" / "x.json", "{")
    put(root / "readme.txt", "no annotation")
    return dict(
        files=4 + 2 + 1 + 2 + 2 + 2 + 2 + 2 + 2 + 6 + 3 + 2 + 4,
        unparsable=4,
        photos=9 + 6 + 3 + 2,
        annotations=30,
        drugs=5,
        incomplete_photos=2,
        missing_pills=4,
        boxes_outside=3,
        identical_box_photos=1,
        overlapping_box_photos=2,
        area_mismatch=1,
        dl_idx_mismatch=1,
        code_mismatch=1,
        metadata_conflicts=3,
        json_without_image=None,
        edi_codes_per_drug={0: 1, 2: 4},
        null_metadata_drugs=["K-000007"],
    )


@pytest.mark.spec("BX4", "DM9")
def test_planted_faults_are_counted_exactly(tmp_path):
    want = planted(tmp_path)
    got = audit(tmp_path)
    assert list(got)[:17] == KEYS
    assert {k: got[k] for k in KEYS} == want
    assert got["refused"] == {"json_unparsable": 2, "json_structure": 2} and got["cp949_files"] == 1


@pytest.mark.spec("BX4")
@pytest.mark.parametrize(
    "bbox,reason",
    [
        (None, "box_empty"),
        ([], "box_empty"),
        ([1, 2, 3], "box_short"),
        ([1, 2, 3, 4, 5], "box_short"),
        (["1", 2, 3, 4], "box_string"),
        ("1 2 3 4", "box_string"),
        ([1, 2, None, 4], "box_string"),
        ([1.0, 2, 3, 4], "box_float"),
        ([1, 2, -3, 4], "box_negative"),
        ([1, 2, 3, 0], "box_zero"),
        ([-1, 2, 3, 4], "box_outside"),
        ([1, 2, 3, 1279], "box_outside"),
        ([0, 0, 976, 1280], None),
    ],
)
def test_every_broken_box_has_its_own_word(tmp_path, bbox, reason):
    p = single(tmp_path, A, bbox=APART[0])
    r = json.loads(p.read_text(encoding="utf-8"))
    r["annotations"][0]["bbox"] = bbox
    put(p, r)
    (pill,) = check_labels(tmp_path).photos[p.stem].pills
    assert (str(pill.fault) if pill.fault else None) == reason
    got = audit(tmp_path)
    assert got["box_faults"] == ({reason: 1} if reason else {}) and got["boxes_outside"] == (reason == "box_outside")


@pytest.mark.spec("BX4")
def test_identical_boxes_lose_both_and_overlapping_none(tmp_path):
    same = combo(tmp_path, [A, B], [APART[0], APART[0]])
    near = combo(tmp_path, [A, C], [[0, 0, 100, 100], [0, 0, 100, 50]])
    e = check_labels(tmp_path)
    assert [p.fault for p in e.photos[same].pills] == [FaultReason.BOX_IDENTICAL] * 2
    assert [p.fault for p in e.photos[near].pills] == [None, None]


@pytest.mark.spec("BX4")
@pytest.mark.parametrize("change", ["drug_N", "dl_mapping_code", "folder", "combo folder", "file_name"])
def test_any_of_the_code_sources_may_lie(tmp_path, change):
    name = combo(tmp_path, [A, B])
    p = tmp_path / f"combination/TL_1_combo/K-000250-000573_json/{B}/{name}.json"
    r = json.loads(p.read_text(encoding="utf-8"))
    img = r["images"][0]
    if change == "drug_N":
        img["drug_N"] = C
    if change == "dl_mapping_code":
        img["dl_mapping_code"] = C
    if change == "file_name":
        img["file_name"] = img["file_name"].replace("000573", "002483")
    put(p, r)
    if change == "folder":
        p.parent.rename(p.parent.with_name(C))
    if change == "combo folder":
        p.parent.parent.rename(p.parent.parent.with_name("K-000250-000999_json"))
    got = audit(tmp_path)
    assert got["code_mismatch"] == (2 if change == "combo folder" else 1)
    assert got["metadata_conflicts"] == 0, "a file whose codes disagree is not heard on a drug"


@pytest.mark.spec("BX4")
def test_a_disputed_file_is_not_heard_on_either_drug(tmp_path):
    """Its drug_N names another drug of the tree, whose metadata it would contradict; and without folders the file
    name alone tells."""
    name = combo(tmp_path / "x", [A, B])
    single(tmp_path / "x", C, dl_company="다른제약(주)")
    p = tmp_path / "x" / f"combination/TL_1_combo/K-000250-000573_json/{B}/{name}.json"
    r = json.loads(p.read_text(encoding="utf-8"))
    r["images"][0] |= dict(drug_N=C, dl_mapping_code=C, dl_idx="2482")
    put(tmp_path / "x/loose.json", r)
    p.unlink()
    got = audit(tmp_path / "x")
    assert (got["code_mismatch"], got["metadata_conflicts"], got["dl_idx_mismatch"], got["missing_pills"]) == (
        1,
        0,
        0,
        1,
    )


@pytest.mark.spec("DM9")
@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda r: r | dict(images=r["images"] * 2), FaultReason.STRUCTURE),
        (lambda r: r | dict(annotations=[]), FaultReason.STRUCTURE),
        (lambda r: [r], FaultReason.STRUCTURE),
        (lambda r: r | dict(x=float("nan")), FaultReason.UNPARSABLE),
        (lambda r: r["images"][0].update(drug_N="K-12") or r, FaultReason.FIELD),
        (lambda r: r["images"][0].update(file_name=None) or r, FaultReason.FIELD),
        (lambda r: r["images"][0].update(width=0) or r, FaultReason.FIELD),
        (lambda r: r["images"][0].pop("height") and r, FaultReason.FIELD),
    ],
)
def test_what_is_no_record_is_refused_with_its_reason(tmp_path, change, reason):
    r = record(A, f"{A}_0_2_0_2_70_000_200", APART[0])
    assert isinstance(read_annotation(put(tmp_path / "ok.json", r)), Annotation)
    assert read_annotation(put(tmp_path / "x.json", json.dumps(change(r)))).reason is reason


@pytest.mark.spec("DM1")
def test_one_photo_in_many_files_is_one_photo(tmp_path):
    name = combo(tmp_path, [A, B, C, D])
    e = check_labels(tmp_path)
    assert (
        list(e.photos) == [name]
        and [p.kcode for p in e.photos[name].pills] == [A, B, C, D]
        and not e.photos[name].missing()
    )
    assert audit(tmp_path)["photos"] == 1


@pytest.mark.spec("DM7")
def test_both_combo_depths(tmp_path):
    "With a folder per K-code, and without that level."
    deep, flat = combo(tmp_path, [A, B]), combo(tmp_path, [A, B, C], flat=True)
    e = check_labels(tmp_path)
    assert {n: len(e.photos[n].pills) for n in (deep, flat)} == {deep: 2, flat: 3} and audit(tmp_path)[
        "incomplete_photos"
    ] == 0


@pytest.mark.spec("BX4")
def test_a_pill_told_twice(tmp_path):
    "The same box in two files is one pill; two different boxes are none, because nobody knows which is right."
    for flat in (False, True):
        combo(tmp_path, [A, B], flat=flat)
    e = check_labels(tmp_path)
    (photo,) = e.photos.values()
    assert Counter(p.fault for p in photo.pills) == {None: 2, FaultReason.DUPLICATE_JSON: 2}
    combo(tmp_path, [A, B], [[1, 1, 50, 50], APART[1]], flat=True)
    (photo,) = check_labels(tmp_path).photos.values()
    assert [p.kcode for p in photo.pills if not p.fault] == [B]


@pytest.mark.spec("BX4")
def test_json_without_image(tmp_path):
    for lo in (0, 20, 40):
        single(tmp_path / "labels", A, lo)
    combo(tmp_path / "labels", [A, B])
    for lo in (0, 20):
        put(tmp_path / f"images/single/TS_1_single/{A}/{A}_0_2_0_2_70_{lo:03d}_200.png", "x")
    put(tmp_path / "images/extra.png", "x")
    put(tmp_path / "images/combo_index.png", "x")
    put(tmp_path / "images/._a.png", "x")
    got = audit(tmp_path / "labels", tmp_path / "images")
    assert (got["json_without_image"], got["image_without_json"]) == (3, 1), (
        "one single, and two files of the combo photo"
    )
    assert audit(tmp_path / "labels")["json_without_image"] is None


@pytest.mark.spec("BX4")
def test_the_command_prints_and_writes(tmp_path, capsys):
    planted(tmp_path / "labels")
    got = audit_command(tmp_path / "labels", None, tmp_path / "out" / "audit.json")
    out = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert (
        out["edi_codes_per_drug"] == {"0": 1, "2": 4}
        and out["json_without_image"] is None
        and out["missing_pills"] == got["missing_pills"] == 4
    )
    assert list(out)[:17] == KEYS and [p.name for p in (tmp_path / "out").iterdir()] == ["audit.json"]
    said = capsys.readouterr().out
    assert "missing_pills" in said and "not counted" in said and "K-000007" in said


@pytest.mark.spec("BX4")
def test_the_json_names_the_files_behind_each_count(tmp_path):
    planted(tmp_path / "labels")
    for lo in (0, 20):
        put(tmp_path / f"images/{A}_0_2_0_2_70_{lo:03d}_200.png", "x")
    put(tmp_path / "images/extra.png", "x")
    got = audit_command(tmp_path / "labels", tmp_path / "images", tmp_path / "audit.json")
    assert got["image_without_json"]
    out = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    files = out["files_of"]
    assert out["labels"] == str(tmp_path / "labels")
    counted = {
        k
        for k in (
            "unparsable",
            "incomplete_photos",
            "boxes_outside",
            "identical_box_photos",
            "overlapping_box_photos",
            "area_mismatch",
            "dl_idx_mismatch",
            "code_mismatch",
            "metadata_conflicts",
            "json_without_image",
            "image_without_json",
            "duplicate_annotations",
            "files_missing_keys",
            "unread_names",
        )
        if got[k]
    }
    assert len(counted) >= 8 and counted == set(files) & set(got), (counted, set(files))
    for k in counted - {"boxes_outside", "area_mismatch"}:
        assert len(files[k]) == got[k], (k, files[k], got[k])
    for k in ("code_mismatch", "dl_idx_mismatch", "area_mismatch", "boxes_outside", "json_without_image"):
        assert files[k] and all((tmp_path / "labels" / f).is_file() for f in files[k]), k
    assert audit_command(tmp_path / "labels") == audit(tmp_path / "labels")


def test_nothing_to_audit_is_said(tmp_path):
    with pytest.raises(PillsnapError, match="does not exist"):
        audit(tmp_path / "none")
    with pytest.raises(PillsnapError, match="no JSON"):
        audit(tmp_path)
    single(tmp_path / "l", A)
    with pytest.raises(PillsnapError, match="photos does not exist"):
        audit(tmp_path / "l", tmp_path / "none")


def test_a_delivery_may_be_named_by_its_root(tmp_path):
    single(tmp_path / "data/train/labels", A)
    single(tmp_path / "data/val/labels", B)
    assert audit(tmp_path)["drugs"] == 1
    with pytest.raises(PillsnapError, match="sealed"):
        audit(tmp_path / "data/val/labels")


# ---- the sealed test
# -----------------------------------------------------------------------------------------------------------------

OPENED: list[str] = []
sys.addaudithook(
    lambda event, args: OPENED.append(str(args[0])) if event == "open" and args and isinstance(args[0], str) else None
)


@pytest.mark.spec("SP4")
def test_the_sealed_test_is_known_by_folder_names_alone(tmp_path):
    single(tmp_path / "data/train/labels", A)
    put(tmp_path / "data/train/images/x.png", "x")
    single(tmp_path / "data/val/labels", A)
    single(tmp_path / "data/val/labels", B)
    combo(tmp_path / "data/val/labels", [C, D])
    d = find_delivery(tmp_path)
    OPENED.clear()
    assert sealed_codes(d) == {A, B, C, D}
    check_labels(d.labels)
    index_photos(d.images)
    check_labels(tmp_path)
    assert len(walk_tree(tmp_path).sealed) == 1
    assert not [p for p in OPENED if f"{os.sep}val{os.sep}" in p]
    assert [p for p in OPENED if f"{os.sep}train{os.sep}" in p], "the hook sees what is opened"
    assert overlap_in_words([A], sealed_codes(d)).startswith("1 of the 4 drugs")


# ---- reading whatever comes
# ----------------------------------------------------------------------------------------------------------


def test_encodings_and_their_order(tmp_path):
    r = record(A, f"{A}_0_2_0_2_70_000_200", APART[0])
    for encoding, said in (("utf-8", "utf-8"), ("utf-8-sig", "utf-8"), ("cp949", "cp949")):
        a = read_annotation(put(tmp_path / f"{encoding}.json", r, encoding))
        assert a.image == r["images"][0] and a.encoding == said
    bad = read_annotation(put(tmp_path / "utf-16.json", r, "utf-16"))
    assert bad.reason in (FaultReason.ENCODING, FaultReason.UNPARSABLE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=6), c, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(raw=st.binary(max_size=300))
def test_any_bytes_give_a_record_or_a_reason(tmp_path, raw):
    (tmp_path / "x.json").write_bytes(raw)
    assert isinstance(read_annotation(tmp_path / "x.json"), (Annotation, Fault))


@FUZZ
@pytest.mark.spec("DM9", "BX4")
@given(
    key=st.sampled_from(
        ["file_name", "width", "height", "drug_N", "dl_mapping_code", "dl_idx", "di_edi_code", "chart", "thick"]
    ),
    value=JSON,
    where=st.sampled_from(["image", "bbox", "area", "images", "annotations", "top"]),
    drop=st.booleans(),
)
def test_any_value_anywhere_is_read_checked_and_counted(tmp_path, key, value, where, drop):
    "Whatever stands in any place: the audit counts every file, and never raises."
    r = record(A, f"{A}_0_2_0_2_70_000_200", APART[0])
    if where == "image":
        r["images"][0].pop(key) if drop else r["images"][0].__setitem__(key, value)
    elif where in ("bbox", "area"):
        r["annotations"][0].pop(where) if drop else r["annotations"][0].__setitem__(where, value)
    elif where == "top":
        r = value
    else:
        r[where] = value
    put(tmp_path / f"{A}_json" / "x.json", json.dumps(r))
    got = audit(tmp_path)
    assert got["files"] == 1 and got["unparsable"] + got["photos"] == 1 and json.dumps(got)


@FUZZ
@given(
    stem=st.text(alphabet="K-_0123456789９٣ \n", max_size=40)
    | st.from_regex(r"K-\d{6}(-\d{6}){0,3}(_\d){4}_\d\d_\d{3}_\d{1,6}", fullmatch=False)
)
def test_names_are_read_or_refused(stem):
    try:
        c = parse_name(stem)
    except ValueError as e:
        assert repr(stem) in str(e)
    else:
        assert c.stem() == stem or stem.split("_")[-1].startswith("0") or capture_group(c)


def test_deep_and_huge_json(tmp_path):
    assert read_annotation(put(tmp_path / "deep.json", "[" * 50_000)).reason is FaultReason.UNPARSABLE
    assert read_annotation(put(tmp_path / "long.json", "9" * 5000)).reason is FaultReason.UNPARSABLE
    big = put(tmp_path / "big.json", " " * (MAX_JSON_BYTES + 1))
    assert (
        read_annotation(big).reason is FaultReason.UNREADABLE
        and read_annotation(tmp_path).reason is FaultReason.UNREADABLE
    )


# ---- walking and matching
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("DM9")
def test_links_repeats_and_hidden_files(tmp_path):
    single(tmp_path / "t", A)
    first = next((tmp_path / "t").rglob("*.json"))
    (tmp_path / "t/again").symlink_to(tmp_path / "t/single")
    (tmp_path / "t/up").symlink_to(tmp_path)
    (tmp_path / "t/gone.json").symlink_to("nowhere")
    (tmp_path / "t/twin.json").symlink_to(first)
    single(tmp_path / "elsewhere", B)
    (tmp_path / "t/more").symlink_to(tmp_path / "elsewhere")
    put(tmp_path / "t/.hidden/x.json", "{")
    w = walk_tree(tmp_path / "t")
    assert len(w.files) == 2 and w.hidden == 1
    assert Counter(f.reason for f in w.faults) == {FaultReason.DUPLICATE_PATH: 3, FaultReason.SYMLINK: 1}
    got = audit(tmp_path / "t")
    assert got["files"] == 2 and got["tree_faults"] == {"broken_symlink": 1, "duplicate_path": 3}


@pytest.mark.spec("DM6")
def test_photos_by_extension(tmp_path):
    for n in ("a.png", "b.JPG", "c.webp", "d.txt", "d_index.png", "._a.png"):
        put(tmp_path / n, "x")
    p = index_photos(tmp_path)
    assert (
        sorted(p.paths) == ["a", "b", "c"]
        and (p.index, p.hidden) == (1, 1)
        and [f.reason for f in p.faults] == [FaultReason.EXTENSION]
    )
    assert sorted(index_photos(tmp_path, [".png"]).paths) == ["a"] and sorted(
        index_photos(tmp_path, [".png"], ignore_hidden=False).paths
    ) == ["._a", "a"]


@pytest.mark.spec("DM7", "DM14")
@pytest.mark.parametrize(
    "single_name,combo_name",
    [
        ("TL_1_단일", "TL_8_조합"),
        ("TL_1_single", "TL_8_combo"),
        (unicodedata.normalize("NFD", "TL_1_단일"), "TL_8_조합".encode("cp949").decode("cp437")),
    ],
)
def test_korean_and_english_folders_are_one(tmp_path, single_name, combo_name):
    name = f"{A}_0_2_0_2_70_000_200"
    put(tmp_path / "single" / single_name / f"{A}_json" / f"{name}.json", record(A, name, APART[0]))
    combo(tmp_path, [A, B], archive=combo_name)
    got = audit(tmp_path)
    assert (got["files"], got["photos"], got["code_mismatch"]) == (3, 2, 0)
    assert (
        str(parse_archive(single_name).folder) == "data/train/labels/single/TL_1_single"
        and str(parse_archive(combo_name).folder) == "data/train/labels/combination/TL_8_combo"
    )


@pytest.mark.spec("DM7")
def test_the_delivery_is_found_or_its_absence_explained(tmp_path):
    with pytest.raises(PillsnapError, match="does not exist"):
        find_delivery(tmp_path / "none")
    with pytest.raises(PillsnapError, match="no delivery"):
        find_delivery(tmp_path)
    with pytest.raises(PillsnapError, match="not a folder"):
        find_delivery(put(tmp_path / "file", "x"))
    put(tmp_path / "TL_1_단일.zip", "x")
    with pytest.raises(PillsnapError) as e:
        find_delivery(tmp_path)
    assert "unpack the 1 archives" in str(e.value)
    (tmp_path / "data/train/labels").mkdir(parents=True)
    with pytest.raises(PillsnapError, match="no photos"):
        find_delivery(tmp_path)
    (tmp_path / "data/train/images").mkdir()
    assert find_delivery(tmp_path).images == tmp_path / "data/train/images"
    put(tmp_path / "SYNTHETIC.unfinished.json", "{}")
    with pytest.raises(PillsnapError, match="not rendered to its end"):
        find_delivery(tmp_path)


# ---- archives
# ----------------------------------------------------------------------------------------------------------------------


class KoreanInfo(zipfile.ZipInfo):
    "An entry whose name is CP949 and does not say so."

    def _encodeFilenameFlags(self):  # noqa: N802 - name given by the library
        return self.filename.encode("cp949"), self.flag_bits & ~0x800


def zipped(path, entries, info=zipfile.ZipInfo, attr=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for name, data in entries.items():
            i = info(name, (2021, 1, 1, 0, 0, 0))
            i.external_attr = attr
            z.writestr(i, data, zipfile.ZIP_DEFLATED)
    return path


def tree(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


@pytest.mark.spec("DM14")
def test_archives_become_the_english_tree(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    zipped(src / "라벨/TL_1_단일.zip", {f"{A}_json/a.json": "{}"})
    zipped(src / "원천/TS_1_조합.zip", {"TS_1_조합/K-000250-000573/메모.png": "p", "TS_1_조합/": ""}, KoreanInfo)
    zipped(src / "2.Validation/VL_1_단일.zip", {"K-000001_json/b.json": "{}"})
    put(src / "other.zip", "x")
    assert extract_archives(src, dst) == {
        "data/train/images/combination/TS_1_combo": 1,
        "data/train/labels/single/TL_1_single": 1,
        "data/val/labels/single/VL_1_single": 1,
    }
    want = {
        f"data/train/labels/single/TL_1_single/{A}_json/a.json": b"{}",
        "data/train/images/combination/TS_1_combo/K-000250-000573/메모.png": b"p",
        "data/val/labels/single/VL_1_single/K-000001_json/b.json": b"{}",
    }
    assert tree(dst) == want
    assert set(extract_archives(src, dst).values()) == {0} and tree(dst) == want, "what is there is left alone"


@pytest.mark.spec("DM14")
@pytest.mark.parametrize(
    "name", ["../x.json", "a/../../x.json", "/x.json", "C:/x.json", "a\\..\\x.json", "..", "a/" + "n" * 300]
)
def test_a_path_that_leads_out_condemns_the_archive(tmp_path, name):
    zipped(tmp_path / "s/TL_1_단일.zip", {"K-000250_json/good.json": "{}", name: "x"})
    with pytest.raises(PillsnapError, match="refused"):
        extract_archives(tmp_path / "s", tmp_path / "d")
    assert not tree(tmp_path / "d") and not (tmp_path / "x.json").exists()


@pytest.mark.spec("DM14")
def test_links_bombs_repeats_and_damage_are_refused(tmp_path):
    bad = {
        "link": lambda p: zipped(p, {"a": "/etc/passwd"}, attr=(stat.S_IFLNK | 0o777) << 16),
        "bomb": lambda p: zipped(p, {"a": "0" * 5_000_000}),
        "twice": lambda p: zipped(p, {"a.json": "1", "A.json": "2"}),
        "cut": lambda p: p.write_bytes(zipped(p, {"a": os.urandom(5000)}).read_bytes()[:-200]),
        "flipped": lambda p: p.write_bytes(
            (lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:])(zipped(p, {"a": os.urandom(5000)}).read_bytes())
        ),
    }
    for what, make in bad.items():
        p = tmp_path / what / "TL_1_단일.zip"
        p.parent.mkdir()
        make(p)
        with pytest.raises(PillsnapError, match="refused|broken"):
            extract_archives(p.parent, tmp_path / f"{what}_out")
        assert not (tmp_path / f"{what}_out/data/train/labels/single/TL_1_single").exists(), what


@pytest.mark.spec("DM14")
def test_a_synthetic_delivery_in_archives_is_the_same_delivery(tmp_path):
    from pillsnap.synth.writer import write_delivery

    kw = dict(drugs=3, photos=2, combos=1, seed=1, width=64, height=80, progress=False, workers=1)
    write_delivery(tmp_path / "plain", **kw)
    write_delivery(tmp_path / "zips", zip_parts=True, **kw)
    with pytest.raises(PillsnapError, match="empty") as e:
        from pillsnap.dataset.conversion import convert_delivery

        convert_delivery(tmp_path / "zips", tmp_path / "run")
    assert "unpack the 2 archives" in str(e.value)
    extract_archives(tmp_path / "zips", tmp_path / "zips")
    a, b = ({k: v for k, v in tree(tmp_path / d / "data").items() if not k.endswith(".zip")} for d in ("plain", "zips"))
    assert a == b
    assert index_photos(tmp_path / "zips/data/train/images").faults == [], (
        "an archive beside its folder is no broken photo"
    )


# ---- the class map
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX8")
def test_order_of_arrival_never_matters():
    keys = [f"K-{i:06d}" for i in random.Random(1).sample(range(999999), 200)]
    m = ClassMap(keys)
    for seed in range(5):
        random.Random(seed).shuffle(keys)
        assert (
            ClassMap(keys) == m
            and ClassMap(keys).fingerprint == m.fingerprint
            and [m.key(m.id(k)) for k in keys] == keys
        )
    assert list(m) == sorted(keys)


@pytest.mark.spec("BX8")
def test_the_fingerprint_is_pinned():
    "Stored fingerprints must hold in a later version: sha256 of the canonical JSON of kind and ordered keys."
    import hashlib

    text = '{"keys":["K-000250","K-000573"],"kind":"kcode"}'
    assert ClassMap([B, A]).fingerprint == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.spec("BX8")
def test_a_permuted_map_stops(tmp_path):
    m = ClassMap([A, B, C])
    d = m.to_dict()
    assert ClassMap.from_dict(json.loads(json.dumps(d))) == m
    m.check(d, "x")
    swapped = {**d, "keys": [B, A, C]}
    for bad in (
        swapped,
        {**swapped, "fingerprint": keys_fingerprint(swapped["keys"])},
        {**d, "kind": "folder"},
        {**d, "keys": [A, B]},
        {"keys": [A]},
        {},
    ):
        with pytest.raises(PillsnapError):
            ClassMap.from_dict(bad)
        with pytest.raises(PillsnapError):
            m.check(bad, "best.pt")


@pytest.mark.spec("BX8")
def test_the_difference_is_said_in_drugs():
    with pytest.raises(PillsnapError) as e:
        ClassMap([A, B, C]).check(ClassMap([A, B, D]), "best.pt")
    assert "lacks K-002483" in str(e.value) and "has K-006192" in str(e.value) and "best.pt" in str(e.value)
    with pytest.raises(PillsnapError, match="folder and not kcode"):
        ClassMap([A]).check(ClassMap([A], kind="folder"), "x")


@pytest.mark.spec("BX8")
def test_folder_names_in_two_unicode_forms_are_one_key():
    nfd = unicodedata.normalize("NFD", "타이레놀")
    m = ClassMap([nfd, "타이레놀", "게보린"], kind="folder")
    assert len(m) == 2 and m.id(nfd) == m.id("타이레놀") == 1 and m.id("없음") == -1
