"""The locator on a rendered delivery: tight boxes, none where there is no pill, several on combinations."""

import json

import numpy as np
import pytest
from PIL import Image

from pillsnap.photos.boxes import iou_matrix, xywh_to_xyxy
from pillsnap.photos.locator import locate


def labelled(delivery, kind):
    "Photos of the training tree, each with its group, its pixels and its true boxes, in the order of their names."
    found = {}
    for label in sorted(delivery.glob(f"data/train/labels/{kind}/**/*.json")):
        record = json.loads(label.read_text(encoding="utf-8"))
        found.setdefault(record["images"][0]["file_name"], []).append(record["annotations"][0]["bbox"])
    photos = {p.name: p for p in delivery.glob(f"data/train/images/{kind}/**/*.png")}
    for name, boxes in found.items():
        yield name.split("_")[0], np.asarray(Image.open(photos[name])), xywh_to_xyxy(np.array(boxes, float))


@pytest.mark.spec("FX1")
def test_the_box_of_a_single_photo_fits(delivery):
    "All groups of a rendered delivery; the worst drug counts, not only the median."
    overlaps = {}
    for group, image, true in labelled(delivery, "single"):
        found = locate(image)
        assert len(found.boxes) == len(found.scores) == 1
        assert found.boxes.dtype == np.float32 and 0 < found.scores[0] <= 1
        overlaps.setdefault(group, []).append(iou_matrix(found.boxes, true)[0, 0])
    everything = np.concatenate(list(overlaps.values()))
    assert len(overlaps) == 6 and len(everything) >= 100
    assert np.median(everything) >= 0.92
    assert (everything > 0.5).mean() >= 0.98
    assert min(np.median(v) for v in overlaps.values()) >= 0.85


@pytest.mark.spec("FX1")
def test_a_combination_is_several_finds_each_on_its_pill(delivery):
    n = 0
    for _, image, true in labelled(delivery, "combination"):
        found = locate(image)
        assert len(found) == len(true) >= 2
        assert iou_matrix(true, found.boxes).max(1).min() > 0.5
        assert (np.diff(found.scores) <= 0).all()  # the surest first
        n += 1
    assert n >= 4


def nothing(kind):
    rng, shape = np.random.default_rng(7), (320, 244, 3)
    return {
        "noise": lambda: rng.integers(0, 256, shape, dtype=np.uint8),
        "grey noise": lambda: np.repeat(rng.integers(0, 256, (320, 244, 1), dtype=np.uint8), 3, 2),
        "faint noise": lambda: rng.normal(128, 8, shape).clip(0, 255).astype(np.uint8),
        "white": lambda: np.full(shape, 255, np.uint8),
        "black": lambda: np.zeros(shape, np.uint8),
        "ramp": lambda: np.broadcast_to(np.linspace(0, 255, 320)[:, None, None], shape).astype(np.uint8),
        "stripes": lambda: np.broadcast_to((np.arange(320) // 20 % 2 * 255)[:, None, None], shape).astype(np.uint8),
        "patches": lambda: np.kron(rng.integers(0, 256, (20, 16, 3)), np.ones((16, 16, 1))).astype(np.uint8)[:, :244],
    }[kind]()


@pytest.mark.spec("FX1")
@pytest.mark.parametrize("kind", ["noise", "grey noise", "faint noise", "white", "black", "ramp", "stripes", "patches"])
def test_nothing_is_found_where_nothing_lies(kind):
    assert len(locate(nothing(kind))) == 0


@pytest.mark.spec("FX1")
def test_boxes_are_in_pixels_of_the_photo(delivery):
    "A larger photo has a larger box, a shifted pill a shifted one, a mirrored photo a mirrored one."
    _, image, _ = next(labelled(delivery, "single"))
    x0, y0, x1, y1 = locate(image).boxes[0]
    larger = np.asarray(Image.fromarray(image).resize((244 * 3, 320 * 3), Image.Resampling.BICUBIC))
    assert iou_matrix(locate(larger).boxes / 3, [[x0, y0, x1, y1]])[0, 0] > 0.93
    mirrored = locate(np.ascontiguousarray(image[:, ::-1])).boxes
    assert iou_matrix(mirrored, [[244 - x1, y0, 244 - x0, y1]])[0, 0] > 0.93
    lower = locate(np.ascontiguousarray(np.roll(image, 30, axis=0)[34:])).boxes
    assert iou_matrix(lower, [[x0, y0 - 4, x1, y1 - 4]])[0, 0] > 0.93
    turned = locate(np.ascontiguousarray(image.transpose(1, 0, 2))).boxes
    assert iou_matrix(turned, [[y0, x0, y1, x1]])[0, 0] > 0.93


@pytest.mark.spec("FX1")
def test_odd_photos_get_an_answer_inside_themselves():
    rng = np.random.default_rng(3)
    for h, w in ((32, 32), (33, 479), (1, 1), (7, 300), (161, 159), (640, 33)):
        for image in (rng.integers(0, 256, (h, w, 3), dtype=np.uint8), np.full((h, w, 3), 90, np.uint8)):
            image[h // 3 : h // 2, w // 3 : w // 2] = 250, 40, 40
            boxes = locate(image).boxes
            assert boxes.shape == (len(boxes), 4) and np.isfinite(boxes).all()
            assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= [w, h]).all() and (boxes[:, 2:] > boxes[:, :2]).all()
