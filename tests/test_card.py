"""The evidence card: every field in the JSON, in the terminal and on the page; its pictures are of training photos."""

import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from jsonschema import ValidationError, validate
from PIL import Image
from rich.console import Console

from pillsnap.core.container import FolderFiles
from pillsnap.core.files import sha256_file
from pillsnap.core.jobs import RunFolder
from pillsnap.delivery.classmap import ClassMap
from pillsnap.models.card import CARD, MISSING, SCORE_LINES, drug_card, told_apart
from pillsnap.models.cardview import Answer, answer_card
from pillsnap.models.pipeline import Pipeline, answer_schema

KEYS = ("K-000001", "K-000002", "K-000003")
META = dict(temperature=1.0, calibrated=True, data="aihub")
FULL = dict(dl_name="가나정", di_edi_code="642165000,A01508511", leng_long=9.5, leng_short=8.5, thick=4.25)
FULL |= {keys[0]: f"value of {f}" for f, (_, keys) in CARD.items() if f != "size_mm"}


class Constant:
    "A classifier that is always as sure."

    size = 32

    def logits(self, x):
        return np.tile(np.array([[2.0, 1.0, 0.0]], np.float32), (len(x), 1))


def ask(metadata, **kwargs) -> dict:
    "The answer to a grey photo."
    pipeline = Pipeline(Constant(), ClassMap(KEYS), metadata=metadata, **kwargs)
    return pipeline.predict(np.full((64, 64, 3), 128, np.uint8))


def printed(answer) -> str:
    "The card as a terminal shows it."
    console = Console(width=200, file=io.StringIO(), force_terminal=False, force_jupyter=False)
    console.print(answer_card(answer, META))
    return console.file.getvalue()


@pytest.mark.spec("BX11")
def test_every_field_of_a_record_is_on_every_card():
    answer = ask({"K-000001": FULL})
    validate(json.loads(json.dumps(answer)), answer_schema())
    text, page = printed(answer), Answer(answer, META, np.zeros((64, 64, 3), np.uint8))._repr_html_()
    for field, (label, _) in CARD.items():
        value = "9.5 × 8.5 × 4.25 mm" if field == "size_mm" else f"value of {field}"
        assert answer["items"][0]["card"][field] == ([9.5, 8.5, 4.25] if field == "size_mm" else value)
        for shown in (text, page):
            assert label in shown and value in shown, field
    assert all(code in text and code in page for code in ("642165000", "A01508511"))


@pytest.mark.spec("BX11")
@pytest.mark.parametrize("field", list(CARD))
def test_a_field_that_a_record_lacks_is_shown_as_missing(field):
    label, keys = CARD[field]
    answer = ask({"K-000001": {k: v for k, v in FULL.items() if k not in keys}})
    assert answer["items"][0]["card"][field] is None
    row = next(line for line in printed(answer).splitlines() if line.strip("│ ").startswith(label))
    assert MISSING in row


@pytest.mark.spec("BX11")
@pytest.mark.parametrize("field", list(CARD))
def test_the_schema_refuses_an_answer_without_a_field(field):
    answer = json.loads(json.dumps(ask({"K-000001": FULL})))
    for card in (answer["items"][0]["card"], answer["items"][0]["top_k"][1]["card"]):
        kept = card.pop(field)
        with pytest.raises(ValidationError, match=field):
            validate(answer, answer_schema())
        card[field] = kept


@pytest.mark.spec("BX11")
def test_what_differs_names_both_values_and_only_what_differs():
    twin = FULL | {"print_front": "Y", "line_front": "-"}
    other = ask({"K-000001": FULL, "K-000002": twin})["items"][0]["top_k"][1]["differs"]
    assert {d["field"] for d in other["fields"]} == {"imprint_front", "score_front"}
    assert other["fields"][0] == dict(field="imprint_front", first="value of imprint_front", here="Y")
    text = printed(ask({"K-000001": FULL, "K-000002": twin}))
    assert "앞면 표시 value of imprint_front → Y" in text and SCORE_LINES["-"] in text


def delivery(root) -> SimpleNamespace:
    "A stage with one training photo of each of two drugs, and an evaluation photo of the third."
    rows = []
    for n, k in enumerate(KEYS):
        Image.fromarray(np.random.default_rng(n).integers(40, 220, (80, 80, 3), np.uint8)).save(root / f"{k}.png")
        rows.append(dict(sample_id=k, path=f"{k}.png", class_key=k, kind="single", side=n % 2, latitude=90))
    photos = pd.DataFrame(rows).assign(group_id=list(KEYS), bbox="[10, 10, 50, 50]")
    return SimpleNamespace(train=photos[:2], eval_set=photos[2:], val=photos[:0], class_map=ClassMap(KEYS), root=root)


def told(*records: dict) -> dict:
    "What a card says of the second of two drugs."
    return told_apart(*map(drug_card, records))


ALIKE = dict(drug_shape="원형", color_class1="하양", leng_long=8.0, leng_short=8.0, thick=3.0, print_front="AB")


@pytest.mark.spec("BX11")
@pytest.mark.parametrize("lacks", ("drug_shape", "color_class1", "size"))
def test_no_card_says_that_records_are_alike_which_do_not_exist(lacks):
    "For the imprint's sentence both records hold shape, colour and size; for the sentence of twins an imprint as well."
    keys = ("leng_long", "leng_short", "thick") if lacks == "size" else (lacks,)
    bare = {k: v for k, v in ALIKE.items() if k not in keys}
    assert told(ALIKE, ALIKE | dict(print_front="CD"))["by"] == "imprint"
    assert told(bare, bare | dict(print_front="CD")) | dict(fields=[]) == dict(
        by="look", text="겉모습이 다릅니다: 앞면 표시.", fields=[]
    )
    assert told(ALIKE, ALIKE)["by"] == "same"
    label = {"drug_shape": "모양", "color_class1": "색상 앞", "size": "크기"}[lacks]
    for first, other in ((bare, bare), (ALIKE, bare), (bare, ALIKE)):
        said = told(first, other)
        assert said["by"] == "unrecorded" and label in said["text"], (first, other)


@pytest.mark.spec("BX11")
def test_what_one_record_holds_of_a_size_is_compared_with_the_same_of_the_other():
    "Length against thickness is no comparison, and a pill without imprint no twin; turned pills are compared turned."
    plain = {k: v for k, v in ALIKE.items() if not k.startswith(("leng", "thick"))}
    assert told(plain | dict(leng_long=8.0), plain | dict(thick=3.0))["by"] == "unrecorded"
    assert "크기" in told(plain | dict(leng_long=8.0), plain | dict(thick=3.0))["text"]
    assert told(plain | dict(leng_long=8.0), plain | dict(leng_long=8.1, thick=3.0))["by"] == "same"
    blank = ALIKE | dict(print_front="")
    assert told(blank, blank)["by"] == "unrecorded" and "앞면 표시" in told(blank, blank)["text"]
    colours = dict(color_class1="하양", color_class2="하양")
    turned = ALIKE | colours | dict(print_front="", print_back="AB")
    assert told(ALIKE | colours, turned)["by"] == "same"
    assert told(dict(leng_long="8.0", print_front="A"), dict(leng_long="9.5", print_front="A"))["by"] == "look"


@pytest.mark.spec("BX11")
def test_reference_pictures_are_of_training_photos_and_can_be_left_out(tmp_path):
    from pillsnap.deployment.export import _thumbnails

    data, run = delivery(tmp_path), RunFolder(tmp_path / "run", "export")
    made = _thumbnails(run, True, data)
    folder = tmp_path / "run/export/thumbnails"
    assert {k: list(sides) for k, sides in made.entries.items()} == {"K-000001": ["front"], "K-000002": ["back"]}
    assert made.total == sum(p.stat().st_size for p in folder.iterdir()) and len(made.missing) == 4
    entry = made.entries["K-000001"]["front"]
    assert sha256_file(folder / entry["file"]) == entry["sha256"]
    left_out = _thumbnails(run, False, data)
    assert left_out.entries == {} and not folder.exists()


@pytest.mark.spec("BX11")
@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_broken_reference_picture_never_breaks_an_answer(tmp_path, harm):
    folder = tmp_path / "thumbnails"
    folder.mkdir()
    Image.new("RGB", (96, 96)).save(folder / "a.jpg")
    entry = dict(file="a.jpg", sha256=sha256_file(folder / "a.jpg"))
    meta = META | {"thumbnails": {"K-000001": {"front": entry}}}
    answer = ask({"K-000001": FULL}, pictures={"K-000001": {"front": "thumbnails/a.jpg"}})
    shown = Answer(answer, meta, "gone.png", FolderFiles(tmp_path))
    assert shown._repr_html_().count("<img") == 1
    (folder / "a.jpg").unlink() if harm == "gone" else (folder / "a.jpg").write_bytes(b"x")
    page = shown._repr_html_()
    assert page.count("<img") == 0 and "사진을 읽을 수 없음" in page and "value of maker" in page


def test_a_narrow_terminal_loses_no_character_of_the_card():
    "A size that lost a digit, or an ingredient that lost its salt, is another pill."
    from pillsnap.models.cardview import _facts

    facts = dict(dl_name="쿠에타핀정 25밀리그램", dl_material="쿠에티아핀푸마르산염, 유당수화물·전분")
    facts |= dict(leng_long="20.4", leng_short="9", thick="5.9", dl_company="한빛샘제약회사", edi_codes=["642500340"])
    item = dict(
        answer="drug", box=None, top_k=[dict(kcode="K-000001", edi_codes=facts["edi_codes"], card=drug_card(facts))]
    )

    def shown(width: int) -> str:
        console = Console(width=width, file=io.StringIO())
        console.print(_facts(item))
        return re.sub(r"\s", "", console.file.getvalue())

    whole = sorted(shown(400))
    assert "쿠에티아핀푸마르산염" in shown(400) and all(sorted(shown(w)) == whole for w in range(40, 120))
