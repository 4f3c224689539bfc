"""What people meet of an answer beside its card: tables, lines, reference pictures, remarks, dropped photos."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from pillsnap.core.container import FolderFiles
from pillsnap.dataset.feedback import Remark, read_remarks
from pillsnap.dataset.splitfiles import SplitData
from pillsnap.delivery.classmap import ClassMap
from pillsnap.deployment.batch import _one_line, answer_rows, write_answers
from pillsnap.deployment.identify import RemarkRow
from pillsnap.deployment.photodrop import PhotoDrop
from pillsnap.deployment.thumbnails import write_thumbnails
from pillsnap.models.cardview import Answer
from pillsnap.models.pipeline import Pipeline

NAMES = ("가나정 10mg", "red pill", "pill")  # as an import of folders makes them
SAID = dict(photo="0" * 64, size=1, mode="single", pill=1, answer="drug", right=True)


class FirstDrug:
    "The same logits for every view."

    size = 32

    def __init__(self, first: int = 0):
        self.first = first

    def logits(self, x):
        return np.tile(np.eye(3)[self.first], (len(x), 1))


def answered(keys=NAMES, first: int = 0, **metadata) -> dict:
    "An answer of a model without an answer rule."
    classes = ClassMap(keys, "folder")
    pipeline = Pipeline(FirstDrug(classes.id(keys[first])), classes, hashes={"bundle": "0" * 64}, **metadata)
    return pipeline.predict(np.full((64, 64, 3), 90, np.uint8), "single")


# ---- right or wrong


def test_a_remark_takes_every_name_that_an_import_gives():
    "Korean letters, blanks and a long folder name; no control character, no turned writing direction."
    for key in (*NAMES, "K-000573", "약" * 255, "β-caroten (30µg)"):
        assert Remark(**SAID, kcode=key, should=key).should == key
    for key in ("", " ", "약\n이름", "a\x00", "a\x85b", "약\u202e이름", "a\u200bb", "\ufeffa", "a\u2028b", "약" * 256):
        with pytest.raises(ValidationError):
            Remark(**SAID, kcode=key)


def remark_row(folder: Path, drugs: dict) -> RemarkRow:
    return RemarkRow(Answer(answered(), {"drugs": drugs}, b""), 1, 10, folder / "feedback.jsonl")


def test_the_app_stores_remarks_about_drugs_with_any_name(tmp_path):
    "By a click, by an option of the list, and by a typed key; a part of a name is no drug."
    drugs = {"가나정 10mg": {}, "red pill": {}, "pill": dict(dl_name="다라정"), "정 pill": dict(dl_name="다라")}
    row = remark_row(tmp_path, drugs)
    row.right.click()
    for typed in ("가나정 10mg", "다라정 pill", " red pill ", "pill"):
        row = remark_row(tmp_path, drugs)
        row.wrong.click()
        row.should.value = typed
        row.send.click()
        assert "기록했습니다" in row.told.value, typed
    row = remark_row(tmp_path, drugs)
    row.wrong.click()
    assert len(set(row.should.options)) == 4
    row.should.value = "blue pill"
    row.send.click()
    assert "목록에 없는 약" in row.told.value
    remarks = read_remarks(tmp_path / "feedback.jsonl")
    assert [r.kcode for r in remarks] == ["가나정 10mg"] * 5
    assert [r.should for r in remarks] == ["", "가나정 10mg", "pill", "red pill", "pill"]


def test_options_of_two_drugs_are_never_the_same(tmp_path):
    "A name and a key, put together, may read like another name and another key."
    drugs = {"c": dict(dl_name="a b"), "b c": dict(dl_name="a"), "a b c": {}}
    found = set()
    for n in range(3):
        row = remark_row(tmp_path, drugs)
        row.wrong.click()
        row.should.value = row.should.options[n]
        row.send.click()
        found.add(read_remarks(tmp_path / "feedback.jsonl")[-1].should)
    assert found == set(drugs)


def test_a_remark_that_cannot_be_stored_is_told(tmp_path):
    answer = answered() | {"hashes": dict(photo="no hash", bundle="")}
    row = RemarkRow(Answer(answer, {"drugs": {}}, b""), 1, 10, tmp_path / "feedback.jsonl")
    row.right.click()
    assert "기록하지 못했습니다" in row.told.value and not (tmp_path / "feedback.jsonl").exists()


# ---- reference pictures


def test_reference_pictures_of_drugs_with_any_name_can_be_read(tmp_path):
    "Also where two names differ in case alone, which some file systems take for one."
    from PIL import Image

    keys = (*NAMES, "Red Pill", "K-000010")
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    photo = dict(path="a.png", kind="single", side=0, latitude=90, bbox="[10, 10, 40, 40]")
    rows = pd.DataFrame([photo | dict(class_key=k, group_id=k, sample_id=k) for k in keys])
    classes = ClassMap(keys, "folder")
    made = write_thumbnails(
        SplitData(rows, rows[:0], rows[:0], classes, {"root": str(tmp_path)}), tmp_path / "thumbnails"
    )
    entries = [made.entries[k]["front"] for k in keys]
    assert len({e["file"].lower() for e in entries}) == len(keys)
    for entry in entries:
        assert FolderFiles(tmp_path).read(f"thumbnails/{entry['file']}", entry["sha256"])


# ---- tables and lines


@pytest.mark.spec("BX3")
def test_a_name_that_no_rule_checked_says_so_in_tables_and_lines(tmp_path):
    answer = {"photo": "a.png"} | answered()
    (row,) = answer_rows(answer)
    assert (row["answer"], row["reason"]) == ("drug", "no_rule")
    assert "확률이 가장 높은 약" in _one_line(answer)
    checked = answer | {"items": [answer["items"][0] | {"reason": "one_drug"}]}
    assert "확률이 가장 높은 약" not in _one_line(checked)
    table = pd.read_csv(write_answers([answer, checked], tmp_path / "t.csv"))
    assert table["reason"].tolist() == ["no_rule", "one_drug"]
    assert pd.read_parquet(write_answers([answer], tmp_path / "t.parquet"))["reason"].tolist() == ["no_rule"]


def test_a_spreadsheet_takes_no_cell_for_a_formula(tmp_path):
    "Names and paths come from others; numbers stay numbers."
    keys = ("=1+2", "-b", "@c")
    answer = {"photo": "@SUM(A1).png"} | answered(keys, metadata={"=1+2": {"dl_name": '=HYPERLINK("x")'}})
    answer["items"][0]["box"] = [-1.5, 0.0, 3.0, 4.0]
    text = write_answers([answer, {"photo": "\tx.png", "error": "+1"}], tmp_path / "t.csv").read_text("utf-8-sig")
    first, second = csv.DictReader(io.StringIO(text))
    assert first["name"] == '\'=HYPERLINK("x")' and first["photo"] == "'@SUM(A1).png" and first["left"] == "-1.5"
    assert second["photo"] == "'\tx.png" and second["error"] == "'+1"
    assert not [c for c in (*first.values(), *second.values()) if c.startswith(("=", "+", "@", "\t", "\r"))]
    assert write_answers([answer], tmp_path / "t.jsonl").read_text().startswith('{"photo": "@SUM')


# ---- dropped photos


def test_two_drops_at_once_lose_no_photo():
    "Each photo is a message; messages of two drops, and of two pages, may arrive in turn."
    got = []
    place = PhotoDrop(lambda photos: got.append([name for name, _ in photos]))
    sent = (("a", "A1", 1, 3), ("b", "B1", 1, 2), ("a", "A2", 2, 3), ("b", "B2", 2, 2), ("a", "A3", 3, 3))
    for drop, name, number, of in sent:
        place._handle_custom_msg(dict(drop=drop, name=name, number=number, of=of), [memoryview(b"x")])
    assert got == [["B1", "B2"], ["A1", "A2", "A3"]]
    for n in range(40):  # pages that were closed half-way are forgotten
        place._handle_custom_msg(dict(drop=f"lost {n}", name="x", number=1, of=2), [memoryview(b"x")])
    assert len(place._arrived) <= 8
