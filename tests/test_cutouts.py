"Pictures of real pills as the surface of pills in rendered scenes: cut out whole, labelled in every record."

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from pillsnap.cli import app
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, sha256_file
from pillsnap.dataset.conversion import convert_delivery
from pillsnap.delivery.index import read_manifest
from pillsnap.synth.cutouts import SURFACE, cut_out, load_cutouts, real_solid
from pillsnap.synth.draws import rng_for
from pillsnap.synth.renderer import Shot, photograph
from pillsnap.synth.retake import retakeable
from pillsnap.synth.scene import Pose
from pillsnap.synth.writer import write_delivery

COLOURS = {"apple": (70, 150, 60), "brick": (190, 70, 50), "chalk": (236, 236, 230), "denim": (60, 90, 160)}


def draw(path: Path, colour, ground=(0, 0, 0), size=(120, 120), box=(6, 6, 114, 114)) -> None:
    page = Image.new("RGB", size, ground)
    ImageDraw.Draw(page).ellipse(box, fill=colour)
    page.save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        draw(folder / f"{name}_0_0.png", colour)
        draw(folder / f"{name}_0_1.png", tuple(255 - c for c in colour))
    return folder


@pytest.fixture(scope="module")
def scenes(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / "delivery"
    size = dict(drugs=0, photos=4, combos=1, width=122, height=160, val_drugs="same", domain="phone")
    write_delivery(out, **size, cutouts=pictures, workers=1, progress=False)
    return out


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (90, 94, 100)])
def test_the_pill_is_cut_out_of_any_plain_background(tmp_path, ground):
    draw(tmp_path / "a.png", (200, 120, 60), ground, (160, 120), (20, 30, 140, 90))
    mask = cut_out(np.asarray(Image.open(tmp_path / "a.png")))
    assert mask.sum() == pytest.approx(np.pi * 60 * 30, rel=0.03)
    assert mask[60, 80]
    assert not mask[10, 10]


def test_two_colours_and_a_dark_print_are_one_pill():
    page = np.zeros((120, 200, 3), np.uint8)
    page[30:90, 20:100], page[30:90, 100:180] = (28, 30, 60), (240, 240, 236)
    page[50:70, 120:160] = 2
    mask = cut_out(page)
    assert mask[30:90, 20:180].mean() > 0.97
    assert mask.sum() < 1.03 * 60 * 160


def test_the_extent_in_a_scene_is_that_of_the_picture(pictures):
    pill = load_cutouts(pictures).pills[0]
    shot = Shot(2, 2, 90, 488, 640, 31.0)
    _, [(x0, y0, x1, y1)] = photograph([(pill, Pose())], shot, rng_for(0))
    assert [(x1 - x0) * 31 / 488, (y1 - y0) * 31 / 488] == pytest.approx([pill.body.long_mm] * 2, abs=0.25)


def test_each_side_shows_its_own_picture(pictures):
    for pill in load_cutouts(pictures).pills:
        colours = [real_solid(pill, side, 8.0).colour[..., :3].mean((0, 1)) for side in (0, 1)]
        front = np.array(COLOURS[pill.name]) / 255
        for seen, wanted in zip(colours, (front, 1 - front)):
            assert np.abs(seen ** (1 / 2.2) - wanted).max() < 0.08


@pytest.mark.spec("RP4")
def test_every_record_says_what_it_is_and_names_both_pictures(pictures, scenes):
    labels = sorted((scenes / "data").rglob("*.json"))
    assert len(labels) > 16
    hashes = {p.name: sha256_file(p) for p in pictures.iterdir()}
    for path in labels:
        record = json.loads(path.read_text("utf-8"))["images"][0]
        name = record["dl_name"]
        assert record["chart"].startswith(SURFACE)
        assert all(hashes[f"{name}_0_{k}.png"] in record["chart"] for k in (0, 1))
        assert record["drug_N"].startswith("K-9")
        assert not record["dl_company"] + record["dl_material"] + record["print_front"]
    ledger = read_json(scenes / "SYNTHETIC.json")
    assert ledger["surface"] == SURFACE
    for pill in ledger["real_pills"]:
        assert [hashes[pill[k]["file"]] for k in ("front", "back")] == [pill[k]["sha256"] for k in ("front", "back")]


def test_a_delivery_of_cutouts_is_converted_like_any_other(scenes, tmp_path):
    convert_delivery(scenes, tmp_path)
    rows, header = read_manifest(tmp_path / "manifest.csv")
    assert header["source"] == "synthetic"
    assert set(rows.kcode) == {f"K-90000{k}" for k in (1, 2, 3, 4)}
    assert header["counts"]["photos"] == 4 * 4 + 3
    assert not any(header["quarantine"].values())


def test_a_changed_picture_is_never_rendered_in_silence(pictures, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for p in pictures.iterdir():
        (folder / p.name).write_bytes(p.read_bytes())
    size = dict(drugs=0, photos=1, combos=0, width=66, height=80, workers=1, progress=False)
    write_delivery(tmp_path / "out", **size, cutouts=folder)
    pill = load_cutouts(folder).pills[0]
    draw(folder / "apple_0_0.png", (10, 20, 200))
    with pytest.raises(PillsnapError, match="another synthetic delivery"):
        write_delivery(tmp_path / "out", **size, cutouts=folder)
    real_solid.cache_clear()
    with pytest.raises(PillsnapError, match="changed after"):
        real_solid(pill, 0, 8.0)


def test_invented_drugs_are_not_taken_for_cutouts(scenes):
    size = dict(drugs=4, photos=4, combos=1, width=122, height=160, val_drugs="same", domain="phone")
    with pytest.raises(PillsnapError, match="another synthetic delivery"):
        write_delivery(scenes, **size, workers=1, progress=False)
    paths = [p.relative_to(scenes).as_posix() for p in (scenes / "data").rglob("*.png")]
    assert paths
    assert retakeable(scenes, paths) == []


def test_what_shows_no_pill_is_named_with_the_reason(pictures, tmp_path):
    for p in pictures.glob("apple*"):
        (tmp_path / p.name).write_bytes(p.read_bytes())
    draw(tmp_path / "empty_front.png", (0, 0, 0))
    draw(tmp_path / "empty_back.png", (0, 0, 0))
    draw(tmp_path / "single_back.png", (200, 20, 20))
    found = load_cutouts(tmp_path)
    assert [p.name for p in found.pills] == ["apple"]
    assert found.left_out == {
        "empty": "the pill covers 0% of this picture",
        "single": "no picture of its front",
    }
    draw(tmp_path / "apple_front.png", (200, 20, 20))
    with pytest.raises(PillsnapError, match="same side"):
        load_cutouts(tmp_path)


def test_the_command_renders_a_folder_and_says_so(pictures, tmp_path):
    words = ["--photos", "1", "--combos", "0", "--width", "66", "--height", "80", "--workers", "1"]
    got = CliRunner().invoke(app, ["synth", "--out", str(tmp_path / "d"), "--cutouts", str(pictures), *words])
    assert got.exit_code == 0, got.output
    assert "real surface, synthetic scene: 4 pills" in got.output
    assert "train          3 drugs, 3 single" in got.output
    none = CliRunner().invoke(app, ["synth", "--out", str(tmp_path / "e"), "--cutouts", str(tmp_path / "nowhere")])
    assert none.exit_code != 0
