"""A person's own photos: five formats become one data set that every job takes, and go back to COCO and YOLO."""

import csv
import json
import random
import unicodedata
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import ExifTags, Image
from typer.testing import CliRunner

from pillsnap.cli import app
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.dataset import importers
from pillsnap.dataset.assignment import split_delivery
from pillsnap.dataset.grouping import tidy_records
from pillsnap.dataset.importers import NO_BOXES, import_command, import_photos
from pillsnap.dataset.labelexport import export_labels
from pillsnap.dataset.roles import SplitSettings
from pillsnap.dataset.splits import SplitsJob
from pillsnap.delivery.index import read_manifest

DATA = load_config("own").data
NAMES = ("Aspirin 100", "타이레놀", "blue capsule")
BOXES = (("Aspirin 100", [10, 12, 30, 40]), ("타이레놀", [50.25, 5, 40, 30.5]), ("blue capsule", [0, 50, 120, 46]))
SIZE = (120, 96)


def wanted(form: str = "auto", **more):
    "The configuration's block data for an import."
    return DATA.model_copy(update={"imports": DATA.imports.model_copy(update={"format": form, **more})})


def paint(path: Path, seed: int = 0, size=SIZE, taken: datetime | None = None) -> Path:
    "A photo of noise, with the time at which it was taken."
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if taken:
        exif[ExifTags.Base.Model] = "Galaxy"
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = taken.strftime("%Y:%m:%d %H:%M:%S")
    noise = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)
    return path


def coco_of(photos: dict[str, list], first: int = 5) -> dict:
    "A COCO document of photos → pills (name, box)."
    names = {n: first + 2 * i for i, n in enumerate(NAMES)}
    images = [dict(id=i, file_name=p, width=SIZE[0], height=SIZE[1]) for i, p in enumerate(photos, 1)]
    pills = [(i, *pill) for i, pills in enumerate(photos.values(), 1) for pill in pills]
    return dict(
        images=images,
        annotations=[dict(id=k, image_id=i, category_id=names[n], bbox=b) for k, (i, n, b) in enumerate(pills, 1)],
        categories=[dict(id=i, name=n) for n, i in names.items()],
    )


def yolo_line(name: str, box: list) -> str:
    (x, y, w, h), (width, height) = box, SIZE
    return f"{NAMES.index(name)} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}"


def write_coco(root: Path, photos: dict[str, list]) -> None:
    (root / "labels.json").write_text(json.dumps(coco_of(photos)))


def write_yolo(root: Path, photos: dict[str, list]) -> None:
    (root / "data.yaml").write_text(yaml.safe_dump(dict(names=list(NAMES)), allow_unicode=True))
    for path, pills in photos.items():
        label = (root / path.replace("images/", "labels/")).with_suffix(".txt")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text("".join(yolo_line(*p) + "\n" for p in pills))


def write_voc(root: Path, photos: dict[str, list]) -> None:
    for path, pills in photos.items():
        top = f"<annotation><filename>{Path(path).name}</filename><size><width>120</width><height>96</height></size>"
        for name, (x, y, w, h) in pills:  # VOC counts pixels from one
            corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            top += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
        label = (root / "Annotations" / Path(path).name).with_suffix(".xml")
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(f"{top}</annotation>")


def write_csv(root: Path, photos: dict[str, list]) -> None:
    with open(root / "boxes.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["filename", "class", "xmin", "ymin", "xmax", "ymax", "session"])
        for path, pills in photos.items():
            table.writerows([path, n, x, y, x + w, y + h, Path(path).stem[0]] for n, (x, y, w, h) in pills)


WRITERS = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc, "csv": write_csv}


def boxed(root: Path, form: str) -> dict[str, list]:
    "Photos of one pill and of several, labelled in a format."
    photos = {f"images/{i}.png": [BOXES[i % 3]] for i in range(5)} | {"images/s.png": list(BOXES[1:])}
    for i, path in enumerate(photos):
        paint(root / path, i)
    WRITERS[form](root, photos)
    return photos


def close(box: str, true: list) -> bool:
    return np.allclose(json.loads(box), true, atol=1e-3)


@pytest.mark.spec("IM1")
@pytest.mark.parametrize("form", WRITERS)
def test_each_format_of_boxes_becomes_one_manifest(tmp_path, form):
    photos = boxed(tmp_path / "own", form)
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    rows, header = read_manifest(tmp_path / "run" / "manifest.csv")
    assert not made.quarantine.out and header["labels"]["format"] == form
    for path, pills in photos.items():
        got = rows[rows["path"] == path]
        assert list(got["class_key"]) == [n for n, _ in pills], path
        assert all(close(b, true) for b, (_, true) in zip(got["bbox"], pills)), (path, list(got["bbox"]))
        assert set(got["kind"]) == {"combo" if len(pills) > 1 else "single"}
    counts = {k: header["counts"][k] for k in ("photos", "singles", "combos", "pills", "boxes", "drugs")}
    assert counts == dict(photos=6, singles=5, combos=1, pills=7, boxes=7, drugs=3)


def test_an_annotation_that_stands_twice_counts_once(tmp_path):
    "The same drug in the same box, as an export that was merged twice lists it; another drug there stays refused."
    photos = {"images/twice.png": [BOXES[0], BOXES[0]], "images/mixed.png": [BOXES[0], (NAMES[1], BOXES[0][1])]}
    photos |= {"images/pair.png": [BOXES[0], BOXES[0], BOXES[2]], "images/other.png": [BOXES[1]]}
    for i, path in enumerate(photos):
        paint(tmp_path / "own" / path, i)
    WRITERS["coco"](tmp_path / "own", photos)
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    pills = made.rows.groupby("path")["kind"].agg(list).to_dict()
    assert pills == {
        "images/other.png": ["single"],
        "images/pair.png": ["combo", "combo"],
        "images/twice.png": ["single"],
    }
    assert listed(tmp_path / "run") == dict(identical_boxes=1)
    remarks = (tmp_path / "run" / "reports" / "remarks.csv").read_text()
    assert remarks.count("identical_boxes") == 2 and "twice" in remarks


def table_of(root: Path, name: str, sep: str, encoding: str) -> Path:
    "Two photos and a table of their boxes, as a spreadsheet saves it."
    photos = {f"images/{i}.png": [BOXES[i]] for i in range(2)}
    for i, path in enumerate(photos):
        paint(root / path, i)
    write_csv(root, photos)
    text = (root / "boxes.csv").read_text(encoding="utf-8")
    (root / "boxes.csv").unlink()
    (root / name).write_bytes(text.replace(",", sep).encode(encoding))
    return root / name


@pytest.mark.spec("IM1")
@pytest.mark.parametrize(
    ("name", "sep", "encoding"),
    [
        ("boxes.csv", ";", "cp949"),
        ("boxes.csv", ";", "utf-8-sig"),
        ("BOXES.CSV", "\t", "utf-8"),
        ("boxes.tsv", "\t", "utf-16"),
        ("boxes.csv", "|", "utf-8"),
        ("boxes.csv", ",", "cp949"),
    ],
)
def test_a_table_is_read_as_any_spreadsheet_saves_it(tmp_path, name, sep, encoding):
    table_of(tmp_path / "own", name, sep, encoding)
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    assert made.header["labels"]["format"] == "csv" and not made.quarantine.out
    assert list(made.rows["class_key"]) == [n for n, _ in BOXES[:2]]
    assert all(close(b, true) for b, (_, true) in zip(made.rows["bbox"], BOXES))


@pytest.mark.spec("IM4")
@pytest.mark.parametrize(
    "text", ['class;dl_name;print_front\n{};정제; "A;B"\n', "dl_name\tclass\tprint_front\n정제\t{}\tA;B\n"]
)
def test_the_table_of_facts_is_read_as_any_spreadsheet_saves_it(tmp_path, text):
    (tmp_path / "drugs.csv").write_text(text.format(NAMES[1]), encoding="cp949")
    drug = importers.read_drugs(tmp_path / "drugs.csv")[NAMES[1]]
    assert [drug.fact(k) for k in ("dl_name", "print_front", "dl_company")] == ["정제", "A;B", None]


@pytest.mark.parametrize(("columns", "lacks"), [("사진,class,xmin", "photos"), ("filename,약,xmin", "drugs")])
def test_a_table_that_is_not_understood_is_not_passed_over_in_silence(tmp_path, columns, lacks):
    file = table_of(tmp_path / "own", "boxes.csv", ",", "utf-8")
    file.write_text("\n".join([columns + ",ymin,xmax,ymax,session", *file.read_text().splitlines()[1:]]))
    shown = CliRunner().invoke(app, ["import", str(tmp_path / "own"), "--out", str(tmp_path / "run")])
    assert f"no column names the {lacks}" in str(shown.exception)
    assert "boxes.csv" in str(shown.exception)


@pytest.mark.spec("IM1")
@pytest.mark.parametrize("form", ["coco", "voc", "csv"])
def test_capitals_of_a_photos_name_need_not_be_those_of_its_label(tmp_path, form):
    photos = boxed(tmp_path / "own", form)
    for path in photos:
        (tmp_path / "own" / path).rename((tmp_path / "own" / path).with_suffix(".PNG"))
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    assert not made.quarantine.out and set(made.rows["path"]) == {p.replace(".png", ".PNG") for p in photos}
    if form == "csv":  # two photos that differ in capitals alone: a label in other capitals means neither
        table = tmp_path / "own" / "boxes.csv"
        table.write_text(table.read_text(encoding="utf-8").replace("images/0.png", "images/0.Png"), encoding="utf-8")
        (tmp_path / "own" / "images" / "0.png").write_bytes((tmp_path / "own" / "images" / "1.PNG").read_bytes())
        made = import_photos(tmp_path / "own", tmp_path / "run 2", wanted())
        assert reasons(made) == dict(photo_missing=1, photo_unlabelled=2)


@pytest.mark.spec("IM2")
def test_a_full_path_of_another_machine_keeps_its_own_folder(tmp_path):
    "Where a photo is missing, its box goes to no photo of the same name in another folder."
    for n, name in enumerate(("A/001.png", "A/002.png", "B/002.png")):  # B/001.png is missing
        paint(tmp_path / "src" / name, n)
    pills = [(d, n) for d in "AB" for n in ("001", "002")]
    table = [f"D:\\data\\{d}\\{n}.png,drug {d},5,5,30,30" for d, n in pills]
    (tmp_path / "src" / "l.csv").write_text("\n".join(["path,label,xmin,ymin,xmax,ymax", *table]))
    made = import_photos(tmp_path / "src", tmp_path / "run", DATA)
    found = [("A/001.png", "drug A"), ("A/002.png", "drug A"), ("B/002.png", "drug B")]
    assert sorted(zip(made.rows["path"], made.rows["class_key"])) == found and set(made.rows["kind"]) == {"single"}
    assert reasons(made) == {"photo_missing": 1}


@pytest.mark.spec("IM2")
def test_of_a_photo_that_lost_a_pill_the_classifier_sees_the_crop_alone(tmp_path):
    "`incomplete_combo: keep`: two pills lie there, so the whole photo is no photo of one drug."
    photos = {"a.png": [BOXES[0], (NAMES[1], [100, 80, 90, 90])], "b.png": [BOXES[0]], "c.png": [BOXES[1]]}
    for n, name in enumerate(photos):
        paint(tmp_path / "src" / name, n)
    write_coco(tmp_path / "src", photos)
    made = import_photos(tmp_path / "src", tmp_path / "run", DATA.model_copy(update={"incomplete_combo": "keep"}))
    (row,) = made.rows[made.rows["path"] == "a.png"].itertuples()
    assert (row.class_key, row.kind, row.view) == (NAMES[0], "combo", "crop")


@pytest.mark.spec("IM3")
@pytest.mark.parametrize("pills", [1, 2])
def test_a_copy_of_a_photo_is_in_its_group_however_many_pills_it_shows(tmp_path, pills):
    "The same scene, saved again with another quality."
    photos = {}
    for n in range(6):
        paint(tmp_path / "src" / f"photo{n}.png", n)
        for quality, name in ((95, f"photo{n}.jpg"), (90, f"photo{n}-copy.jpg")):
            Image.open(tmp_path / "src" / f"photo{n}.png").save(tmp_path / "src" / name, quality=quality)
            photos[name] = list(BOXES[:pills])
        (tmp_path / "src" / f"photo{n}.png").unlink()
    write_coco(tmp_path / "src", photos)
    rows = import_photos(tmp_path / "src", tmp_path / "run", DATA).rows
    groups = rows.groupby(rows["path"].str[:6])["group_id"]
    assert groups.nunique().eq(1).all() and rows["group_id"].nunique() == 6


@pytest.mark.spec("IM2")
def test_films_links_and_one_drug_alone_are_told(tmp_path):
    for i in range(2):
        paint(tmp_path / "elsewhere" / f"{i}.JPG", i)
    (tmp_path / "own" / "more").mkdir(parents=True)
    (tmp_path / "own" / "aspirin").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "own" / "again").symlink_to(tmp_path / "own" / "more")
    (tmp_path / "own" / "more" / "pills.MOV").write_bytes(b"a film")
    to = ["--out", str(tmp_path / "run")]
    shown = CliRunner().invoke(app, ["import", str(tmp_path / "own"), *to])
    assert shown.exit_code == 0, shown.output
    assert "one drug alone" in shown.output and listed(tmp_path / "run") == dict(extension=1, duplicate_path=1)
    rows, _ = read_manifest(tmp_path / "run" / "manifest.csv")
    assert list(rows["path"]) == ["aspirin/0.JPG", "aspirin/1.JPG"]
    gone = CliRunner().invoke(app, ["import", str(tmp_path / "nowhere"), *to])
    assert "there is nothing here" in str(gone.exception)


def test_photos_of_a_telephone_are_to_be_converted(tmp_path):
    (tmp_path / "own" / "aspirin").mkdir(parents=True)
    (tmp_path / "own" / "aspirin" / "IMG_1.HEIC").write_bytes(b"")
    with pytest.raises(PillsnapError, match="1 × extension") as refused:
        import_photos(tmp_path / "own", tmp_path / "run", wanted())
    assert "convert the others" in str(refused.value)


@pytest.mark.parametrize(
    "name, said", [("photo.jpg", "one photo is no data set"), ("photos.zip", "this is no label file")]
)
def test_a_file_that_holds_no_labels_is_refused_by_what_it_is(tmp_path, name, said):
    paint(tmp_path / "own" / "photo.jpg").with_name("photos.zip").write_bytes(b"PK")
    with pytest.raises(PillsnapError, match=said) as refused:
        import_command(tmp_path / "own" / name, tmp_path / "run")
    assert "unpack an archive" in str(refused.value)


def test_classes_that_are_one_word_are_no_list_of_letters(tmp_path):
    boxed(tmp_path / "own", "yolo")
    (tmp_path / "own" / "data.yaml").write_text("names: aspirin\n")
    with pytest.raises(PillsnapError, match="names is one word"):
        import_photos(tmp_path / "own", tmp_path / "run", wanted())


def test_two_photos_of_two_drugs_are_too_few_and_it_is_said(tmp_path):
    for i in range(2):
        paint(tmp_path / "own" / f"drug {i}" / "1.png", i)
    import_command(tmp_path / "own", tmp_path / "run")
    with pytest.raises(PillsnapError, match="no drug has 2 single photos") as refused:
        SplitsJob(str(tmp_path / "run"), str(tmp_path / "run" / "config.yaml")).run()
    assert "take more photos of each drug" in str(refused.value)


@pytest.mark.spec("IM1")
def test_a_folder_per_drug_is_named_in_nfc_and_its_photos_are_not_copied(tmp_path):
    for i, name in enumerate(NAMES * 2):
        paint(tmp_path / "own" / unicodedata.normalize("NFD", name) / f"IMG {i}.png", i)
    import_photos(tmp_path / "own", tmp_path / "run", wanted())
    rows, header = read_manifest(tmp_path / "run" / "manifest.csv")
    assert set(rows["class_key"]) == set(NAMES) == set(header["class_map"]["keys"])
    assert not [p for p in (tmp_path / "run").rglob("*") if p.suffix == ".png"]
    assert all((Path(header["root"]) / p).is_file() for p in rows["path"])
    assert header["source"] == "other:own" and len(header["data_hash"]) == 64


@pytest.mark.spec("IM1")
def test_coco_comes_back_equal(tmp_path):
    photos = boxed(tmp_path / "own", "coco")
    import_photos(tmp_path / "own", tmp_path / "run", wanted())
    export_labels(tmp_path / "run", tmp_path / "out", "coco")
    before, after = coco_of(photos), read_json(tmp_path / "out" / "labels.json")
    kept = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name")}
    kept["annotations"] = ("id", "image_id", "category_id", "bbox")
    for part, keys in kept.items():
        assert [{k: a[k] for k in keys} for a in after[part]] == [{k: b[k] for k in keys} for b in before[part]]
    assert {a["area"] for a in after["annotations"]} == {w * h for _, (_, _, w, h) in BOXES}


@pytest.mark.spec("IM1")
def test_yolo_comes_back_equal_to_the_last_digit(tmp_path):
    draw, lines = random.Random(4), []
    for _ in range(400):
        w, h = draw.uniform(0.01, 0.9), draw.uniform(0.01, 0.9)
        lines.append((draw.uniform(w / 2, 1 - w / 2), draw.uniform(h / 2, 1 - h / 2), w, h))
    lines += [(0.5, 0.5, 1, 1), (0.1, 0.9, 0.2, 0.2), (0.05, 0.5, 0.1, 1)]  # at the edges
    text = "".join(f"{i % 3} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for i, (x, y, w, h) in enumerate(lines))
    root = tmp_path / "own"
    paint(root / "images" / "a.png", 1, (4000, 3001))
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text(text)
    (root / "data.yaml").write_text(yaml.safe_dump(dict(names=list(NAMES)), allow_unicode=True))
    import_photos(root, tmp_path / "run", wanted())
    export_labels(tmp_path / "run", tmp_path / "out", "yolo")
    assert (tmp_path / "out" / "labels" / "a.txt").read_text().splitlines() == text.splitlines()
    assert list(yaml.safe_load((tmp_path / "out" / "data.yaml").read_text())["names"].values()) == list(NAMES)
    shown = tmp_path / "out" / "images" / "a.png"
    assert shown.is_symlink() and shown.resolve() == (root / "images" / "a.png").resolve()


@pytest.mark.spec("IM1")
def test_a_delivery_goes_to_coco_and_comes_back(smoke_run, tmp_path):
    export_labels(smoke_run, tmp_path / "out", "coco")
    rows, _ = read_manifest(smoke_run / "manifest.csv")
    doc = read_json(tmp_path / "out" / "labels.json")
    some = {i["id"] for i in doc["images"][::9]}  # enough; each photo is opened
    doc["images"] = [i for i in doc["images"] if i["id"] in some]
    doc["annotations"] = [a for a in doc["annotations"] if a["image_id"] in some]
    (tmp_path / "out" / "labels.json").write_text(json.dumps(doc))
    import_photos(tmp_path / "out", tmp_path / "run", wanted())
    back, _ = read_manifest(tmp_path / "run" / "manifest.csv")
    key = ["path", "class_key", "bbox"]
    there = rows[rows["path"].isin({i["file_name"] for i in doc["images"]})]
    assert sorted(map(tuple, back[key].to_numpy())) == sorted(map(tuple, there[key].to_numpy())) and len(back) > 8


@pytest.mark.spec("IM1")
@pytest.mark.parametrize("first", [1, 5])
def test_ultralytics_accepts_a_yolo_export_of_coco_labels(tmp_path, monkeypatch, first):
    from ultralytics.data import utils
    from ultralytics.data.dataset import YOLODataset

    photos = boxed(tmp_path / "own", "coco")
    (tmp_path / "own" / "labels.json").write_text(json.dumps(coco_of(photos, first)))
    import_photos(tmp_path / "own", tmp_path / "run", wanted())
    file = export_labels(tmp_path / "run", tmp_path / "out", "yolo")
    monkeypatch.setattr(utils, "check_font", lambda *_: None)  # would fetch a font for Korean names
    data = utils.check_det_dataset(str(file), autodownload=False)
    assert data["names"] == dict(enumerate(NAMES)) and data["nc"] == len(NAMES)
    seen = YOLODataset(img_path=data["train"], data=data, augment=False)
    got = {f"images/{Path(e['im_file']).name}": [data["names"][int(c)] for c in e["cls"].ravel()] for e in seen.labels}
    assert got == {path: [name for name, _ in pills] for path, pills in photos.items()}
    import_photos(tmp_path / "out", tmp_path / "run 2", wanted())
    before, after = (read_manifest(tmp_path / run / "manifest.csv")[0] for run in ("run", "run 2"))
    assert before[["path", "class_key"]].equals(after[["path", "class_key"]])
    assert all(close(b, json.loads(a)) for b, a in zip(after["bbox"], before["bbox"]))


@pytest.mark.spec("IM1")
def test_an_exported_folder_of_coco_labels_can_be_used_as_it_is(tmp_path):
    photos = boxed(tmp_path / "own", "coco")
    import_photos(tmp_path / "own", tmp_path / "run", wanted())
    file = export_labels(tmp_path / "run", tmp_path / "out", "coco")
    shown = {i["file_name"]: file.parent / i["file_name"] for i in read_json(file)["images"]}
    assert set(shown) == set(photos)
    for name, path in shown.items():
        assert path.is_symlink() and path.samefile(tmp_path / "own" / name), path
    import_photos(tmp_path / "out", tmp_path / "run 2", wanted())
    before, after = (read_manifest(tmp_path / run / "manifest.csv")[0] for run in ("run", "run 2"))
    assert before.equals(after)


def test_photos_that_differ_in_their_ending_alone_keep_their_own_yolo_labels(tmp_path):
    photos = {"images/a.png": [BOXES[0]], "images/a.jpg": [BOXES[1]], "images/b.png": [BOXES[2]]}
    for i, path in enumerate(photos):
        paint(tmp_path / "own" / path, i)
    write_csv(tmp_path / "own", photos)
    import_photos(tmp_path / "own", tmp_path / "run", wanted())
    export_labels(tmp_path / "run", tmp_path / "out", "yolo")
    again = import_photos(tmp_path / "out", tmp_path / "run 2", wanted()).rows
    rows, _ = read_manifest(tmp_path / "run" / "manifest.csv")
    assert sorted(zip(again["sha1"], again["class_key"])) == sorted(zip(rows["sha1"], rows["class_key"]))
    assert len(rows) == 3


def test_an_export_never_writes_over_a_folder_and_needs_boxes(tmp_path):
    for i, name in enumerate(NAMES):
        paint(tmp_path / "own" / name / f"{i}.png", i)
    import_photos(tmp_path / "own", tmp_path / "run", wanted())
    with pytest.raises(PillsnapError, match="no boxes to export"):
        export_labels(tmp_path / "run", tmp_path / "out")
    boxed(tmp_path / "coco", "coco")
    import_photos(tmp_path / "coco", tmp_path / "run 2", wanted())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(PillsnapError, match="something is here already"):
        export_labels(tmp_path / "run 2", tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def reasons(made) -> dict[str, int]:
    return dict(Counter(str(f.reason) for f in made.quarantine.out))


def listed(run_dir: Path) -> dict[str, int]:
    "The reasons in quarantine.csv."
    with open(run_dir / "quarantine.csv", newline="", encoding="utf-8") as f:
        return dict(Counter(row["reason"] for row in csv.DictReader(f)))


def plant_coco(root: Path) -> dict[str, int]:
    photos = {f"images/{n}.png": [BOXES[0]] for n in ("good", "outside", "unknown", "gone", "zero", "broken")}
    photos |= {"images/empty.png": [], "images/two.png": [BOXES[0], ("타이레놀", BOXES[0][1])]}
    photos["images/outside.png"] = [(NAMES[0], [100, 10, 40, 20])]
    photos["images/small.png"] = [BOXES[2]]
    doc = coco_of(photos)
    for i, path in enumerate(p for p in photos if "gone" not in p):
        paint(root / path, i)
    (root / "images" / "broken.png").write_bytes((root / "images" / "broken.png").read_bytes()[:200])
    (root / "images" / "nobody.png").write_bytes((root / "images" / "good.png").read_bytes())
    at = {i["file_name"]: i for i in doc["images"]}
    at["images/zero.png"] |= dict(width=0, height=0)
    at["images/small.png"] |= dict(width=60, height=48)
    doc["annotations"][2]["category_id"] = 99
    doc["annotations"].append(dict(id=50, image_id=77, category_id=5, bbox=[1, 2, 3, 4]))
    (root / "labels.json").write_text(json.dumps(doc))
    whole = dict(photo_missing=1, photo_empty=1, photo_broken=1, label_empty=1, photo_size=1, photo_unlabelled=1)
    return whole | dict(box_outside=1, class_unknown=1, identical_boxes=1, label_unreadable=1)


def plant_yolo(root: Path) -> dict[str, int]:
    photos = {f"images/{n}.png": [BOXES[0]] for n in ("good", "outside", "unknown", "words", "gone", "zero")}
    photos |= {"images/empty.png": [], "images/outside.png": [(NAMES[0], [100, 10, 40, 20])]}
    write_yolo(root, photos)
    for i, path in enumerate(p for p in photos if "gone" not in p):
        paint(root / path, i)
    (root / "images" / "zero.png").write_bytes(b"")
    (root / "labels" / "unknown.txt").write_text("7 0.5 0.5 0.1 0.1\n")
    (root / "labels" / "words.txt").write_text("0 half 0.5 0.1 0.1\n")
    paint(root / "images" / "nobody.png", 50)
    whole = dict(photo_missing=1, photo_empty=1, label_empty=1, photo_unlabelled=1)
    return whole | dict(box_outside=1, class_unknown=1, label_unreadable=1)


def plant_voc(root: Path) -> dict[str, int]:
    photos = {f"images/{n}.png": [BOXES[0]] for n in ("good", "outside", "gone", "cut")}
    photos |= {"images/empty.png": [], "images/outside.png": [(NAMES[0], [100, 10, 40, 20])]}
    write_voc(root, photos)
    for i, path in enumerate(p for p in photos if "gone" not in p):
        paint(root / path, i)
    label = root / "Annotations" / "cut.xml"
    label.write_text(label.read_text()[:60])
    return dict(photo_missing=1, label_empty=1, box_outside=1, label_unreadable=1, photo_unlabelled=1)


def plant_csv(root: Path) -> dict[str, int]:
    photos = {f"images/{n}.png": [BOXES[0]] for n in ("good", "outside", "gone", "words")}
    photos["images/outside.png"] = [(NAMES[0], [100, 10, 40, 20])]
    photos["images/unnamed.png"] = [("", [1, 2, 30, 40])]
    write_csv(root, photos)
    for i, path in enumerate(p for p in photos if "gone" not in p):
        paint(root / path, i)
    table = root / "boxes.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(r.replace(",10,", ",ten,") if "words" in r else r for r in rows) + "\n")
    return dict(photo_missing=1, box_outside=1, box_string=1, class_unknown=1)


def plant_folder(root: Path) -> dict[str, int]:
    paint(root / "good one" / "good.png", 1)
    paint(root / "Aspirin" / "1.png", 2)
    paint(root / "aspirin" / "1.png", 3)
    paint(root / unicodedata.normalize("NFC", "타이레놀") / "1.png", 4)
    paint(root / unicodedata.normalize("NFD", "타이레놀") / "2.png", 5)
    paint(root / "stray.png", 6)
    (root / "good one" / "empty.png").write_bytes(b"")
    (root / "good one" / "text.png").write_text("no photo")
    (root / "good one" / "phone.heic").write_bytes(b"heic")
    return dict(class_names_alike=4, photo_unlabelled=1, photo_empty=1, photo_broken=1, extension=1)


PLANTED = {"coco": plant_coco, "yolo": plant_yolo, "voc": plant_voc, "csv": plant_csv, "folder": plant_folder}


@pytest.mark.spec("IM2")
@pytest.mark.parametrize("form", PLANTED)
def test_each_fault_has_its_bucket_and_nothing_is_invented(tmp_path, form):
    planted = PLANTED[form](tmp_path / "own") if (tmp_path / "own").mkdir() is None else {}
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted(form))
    assert reasons(made) == listed(tmp_path / "run") == made.header["quarantine"] == planted
    rows, _ = read_manifest(tmp_path / "run" / "manifest.csv")
    assert [Path(p).name for p in rows["path"]] == ["good.png"]
    if form != "folder":
        assert close(rows["bbox"].iloc[0], BOXES[0][1]) and rows["class_key"].iloc[0] == NAMES[0]


def fractional(root: Path, form: str) -> None:
    "Photos whose boxes are fractions of them, in a format that counts pixels, and one photo in pixels."
    part, whole = [0.125, 0.25, 0.5, 0.625], [0, 0, 1, 1]
    if form == "voc":  # its writer adds the one from which VOC counts; fractions have no first pixel
        part, whole = [-0.875, -0.75, 1.5, 1.625], [-1, -1, 2, 2]
    photos = {f"images/{n}.png": [(NAMES[0], box)] for n, box in (("a", part), ("b", part), ("whole", whole))}
    photos["images/good.png"] = [BOXES[0]]
    for i, path in enumerate(photos):
        paint(root / path, i)
    WRITERS[form](root, photos)


@pytest.mark.spec("IM2")
@pytest.mark.parametrize("form", ["coco", "voc", "csv"])
def test_a_box_in_fractions_of_its_photo_is_not_taken_for_pixels(tmp_path, form):
    fractional(tmp_path / "own", form)
    shown = CliRunner().invoke(app, ["import", str(tmp_path / "own"), "--out", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    rows, header = read_manifest(tmp_path / "run" / "manifest.csv")
    assert list(rows["path"]) == ["images/good.png"] and close(rows["bbox"].iloc[0], BOXES[0][1])
    assert header["quarantine"] == dict(box_fractions=3) == listed(tmp_path / "run")
    assert "3 boxes are fractions of their photo, where pixels are expected" in shown.output and "YOLO" in shown.output
    (tmp_path / "own" / "images" / "good.png").unlink()
    with pytest.raises(PillsnapError, match="box_fractions") as refused:
        import_photos(tmp_path / "own", tmp_path / "run 2", wanted())
    assert "multiply them by its width and height" in str(refused.value)


@pytest.mark.spec("IM2")
def test_two_numbers_of_one_name_are_two_classes_that_nobody_can_tell_apart(tmp_path):
    photos = boxed(tmp_path / "own", "coco")
    doc = coco_of(photos)
    doc["categories"][2]["name"] = NAMES[0]
    (tmp_path / "own" / "labels.json").write_text(json.dumps(doc))
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    assert list(made.rows["class_key"]) == [NAMES[1]] * 2
    assert reasons(made) == dict(class_names_alike=4, partial_combo=1)


@pytest.mark.spec("IM2")
def test_one_photo_in_the_folders_of_two_drugs_is_left_out_everywhere(tmp_path):
    for i, name in enumerate(("Aspirin/1.png", "Aspirin/2.png", "blue capsule/1.png")):
        paint(tmp_path / "own" / name, i)
    for copy in ("Aspirin/same.png", "blue capsule/wrong.png"):  # the first is kept, as a copy of the same drug
        source = tmp_path / "own" / "Aspirin" / f"{1 + ('wrong' in copy)}.png"
        (tmp_path / "own" / copy).write_bytes(source.read_bytes())
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    assert sorted(made.rows["path"]) == ["Aspirin/1.png", "Aspirin/same.png", "blue capsule/1.png"]
    assert reasons(made) == dict(one_photo_two_classes=2) == listed(tmp_path / "run")


@pytest.mark.spec("IM2")
@pytest.mark.parametrize("what", ["images", "categories"])
def test_a_number_of_two_photos_or_two_drugs_names_none(tmp_path, what):
    photos = boxed(tmp_path / "own", "coco")
    doc = coco_of(photos)
    doc[what][1]["id"] = doc[what][0]["id"]
    (tmp_path / "own" / "labels.json").write_text(json.dumps(doc))
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    kept = {Path(p).name: k for p, k in zip(made.rows["path"], made.rows["class_key"])}
    if what == "images":  # photos 0 and 1; the box of photo 1 has no image any more
        assert set(kept) == {"2.png", "3.png", "4.png", "s.png"} and reasons(made) == dict(label_unreadable=3)
    else:
        assert kept == {"2.png": NAMES[2]} and reasons(made) == dict(class_unknown=5, partial_combo=1)


@pytest.mark.spec("IM2")
def test_a_label_of_another_folder_is_not_taken_for_this_photo(tmp_path):
    paint(tmp_path / "own" / "monday" / "1.png")
    photos = {"tuesday/1.png": [BOXES[0]], "monday/1.png": [BOXES[1]]}
    write_coco(tmp_path / "own", photos)
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted())
    assert list(made.rows["class_key"]) == [BOXES[1][0]] and reasons(made) == {"photo_missing": 1}


def bursts(root: Path, n: int = 8) -> None:
    "Two drugs, n bursts each of three photos a second apart, ten minutes between bursts."
    start, seed = datetime(2024, 5, 3, 9), 0
    for d, name in enumerate(NAMES[:2]):
        for b in range(n):
            for k in range(3):
                seed += 1
                taken = start + timedelta(hours=5 * d, minutes=10 * b, seconds=k)
                paint(root / name / f"{b}_{k}.jpg", seed, taken=taken)


@pytest.mark.spec("IM3")
@pytest.mark.parametrize("rule", [None, r"([^/]+/\d+)_\d\.jpg$"])
def test_photos_of_one_burst_stay_on_one_side(tmp_path, rule):
    bursts(tmp_path / "own")
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted(group=rule))
    assert made.grouping.groups == 16 and made.grouping.photos == 48 and not made.grouping.caution
    by_burst = made.rows.groupby(made.rows["path"].str.rsplit("_", n=1).str[0])["group_id"].nunique()
    assert set(by_burst) == {1} and len(by_burst) == 16
    splits = split_delivery(tidy_records(made.rows), SplitSettings())
    kept = [*splits.train["path"].map(lambda p: (p, "train")), *splits.test["path"].map(lambda p: (p, "test"))]
    kept += zip(splits.eval_set["path"], splits.eval_set["split"])  # the validation photos are among them
    side: dict[str, set[str]] = {}
    for path, name in kept:
        side.setdefault(path.rsplit("_", 1)[0], set()).add(name)
    assert len(side) == 16 and all(len(names) == 1 for names in side.values())
    assert {n for names in side.values() for n in names} == {"train", "val", "test"}


@pytest.mark.spec("IM3")
def test_a_column_groups_photos_and_a_near_copy_joins_two_bursts(tmp_path):
    boxed(tmp_path / "own", "csv")
    made = import_photos(tmp_path / "own", tmp_path / "run", wanted(group="session"))
    assert dict(zip(made.rows["path"], made.rows["group_id"]))["images/3.png"] == "column 3"
    assert made.grouping.by == "column" and made.grouping.groups == 6
    bursts(tmp_path / "two", 2)
    late = tmp_path / "two" / NAMES[0] / "1_0.jpg"
    with Image.open(tmp_path / "two" / NAMES[0] / "0_0.jpg") as early:  # the same picture, taken again
        early.save(late, quality=70, exif=Image.open(late).getexif())
    made = import_photos(tmp_path / "two", tmp_path / "run 2", wanted())
    assert (made.grouping.linked, made.grouping.groups) == (1, 3)


@pytest.mark.spec("IM3")
def test_where_nothing_says_what_belongs_together_the_caution_is_printed_and_kept(tmp_path):
    for i in range(6):
        paint(tmp_path / "own" / NAMES[i % 2] / f"{i}.png", i)
    shown = CliRunner().invoke(app, ["import", str(tmp_path / "own"), "--out", str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    caution = read_json(tmp_path / "run" / "manifest.json")["grouping"]["caution"]
    assert "leakage between training and evaluation photos cannot be excluded" in caution
    assert caution in shown.output and NO_BOXES in shown.output
    assert caution in read_json(tmp_path / "run" / "stages" / "conversion.json")["notes"]


@pytest.mark.parametrize("where", ["group_photos", "save_drug_mapping"])
def test_an_import_that_is_stopped_leaves_nothing_half(tmp_path, monkeypatch, where):
    root = tmp_path / "own"
    for i in range(6):
        paint(root / NAMES[i % 2] / f"{i}.png", i)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(importers, where, stop)
        with pytest.raises(KeyboardInterrupt):
            import_photos(root, tmp_path / "run", wanted())
    assert not (tmp_path / "run" / "manifest.json").exists()
    import_photos(root, tmp_path / "run", wanted())
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    paint(root / NAMES[0] / "new.png", 99)
    with monkeypatch.context() as m:
        m.setattr(importers, where, stop)
        with pytest.raises(KeyboardInterrupt):
            import_photos(root, tmp_path / "run", wanted())
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    assert not list((tmp_path / "run").rglob("*.tmp*"))
