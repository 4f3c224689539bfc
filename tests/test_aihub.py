"""The AI Hub format and the truth guard: reading, checking, counting; the class map; archives."""

import json
import os
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
from pillsnap.delivery.annotations import IMAGE_KEYS, Annotation, read_annotation
from pillsnap.delivery.archives import extract_archives
from pillsnap.delivery.capture import capture_group, parse_name
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
    if area is None:
        whole = isinstance(bbox, list) and len(bbox) == 4 and all(isinstance(v, int) for v in bbox)
        area = bbox[2] * bbox[3] if whole else 0
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


@pytest.mark.spec("BX4")
def test_the_public_originals():
    "The original annotation files that are public give the counts of the data notes, exactly and in a few seconds."
    folder = os.environ.get("PILLSNAP_ORIGINALS")
    if not folder:
        pytest.skip(
            "PILLSNAP_ORIGINALS is not set: it names the folder of the 4,526 public original annotation files, "
            "which may not be redistributed"
        )
    want = dict(
        files=4526,
        unparsable=0,
        photos=1489,
        annotations=4526,
        drugs=73,
        incomplete_photos=850,
        missing_pills=1136,
        boxes_outside=2,
        identical_box_photos=5,
        overlapping_box_photos=2,
        area_mismatch=18,
        dl_idx_mismatch=0,
        code_mismatch=0,
        metadata_conflicts=0,
        json_without_image=None,
        edi_codes_per_drug={1: 33, 2: 38, 3: 1, 4: 1},
        null_metadata_drugs=["K-016548"],
    )
    got = audit(folder)
    assert {k: got[k] for k in want} == want


def plant_combos(root):
    "Combo photos that lack records, or whose boxes touch, overlap, repeat or leave the photo."
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


def plant_singles(root):
    "Single photos with wrong areas, numbers and codes, conflicting metadata, another encoding and empty fields."
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


def plant_broken_files(root):
    "Four files that are no annotation, and three that are not looked at."
    for i, text in enumerate(("", "{", "[]", '{"images": []}')):
        put(root / "single" / "TL_1_single" / f"broken_{i}.json", text)
    put(root / "single" / "TL_1_single" / "._hidden.json", "{")
    put(root / "__MACOSX" / "x.json", "{")
    put(root / "readme.txt", "no annotation")


def planted(root):
    "A tree with known faults; returns what an audit must find."
    plant_combos(root)
    plant_singles(root)
    plant_broken_files(root)
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
    assert {k: got[k] for k in want} == want
    assert got["refused"] == {"json_unparsable": 2, "json_structure": 2} and got["cp949_files"] == 1


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
    want = planted(tmp_path / "labels")
    got = audit_command(tmp_path / "labels", None, tmp_path / "out" / "audit.json")
    out = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert (
        out["edi_codes_per_drug"] == {"0": 1, "2": 4}
        and out["json_without_image"] is None
        and out["missing_pills"] == got["missing_pills"] == 4
    )
    assert out.keys() >= want.keys() and [p.name for p in (tmp_path / "out").iterdir()] == ["audit.json"]
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
    assert overlap_in_words([A], sealed_codes(d)) == (
        "AI Hub's Validation part: 4 drugs, 1 of them in Training; the final test uses the others as unknown drugs."
    )


# ---- reading whatever comes
# ----------------------------------------------------------------------------------------------------------


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


# ---- archives
# ----------------------------------------------------------------------------------------------------------------------


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
