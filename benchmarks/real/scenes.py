"""Synthetic photos for the detector that is measured on real ones: pills alone, in twos and threes, in heaps, and none.

Every photo is drawn by the package's renderer; no pixel of a real photo is in it. The pills are invented drugs. Coins,
caps, keys, fingers and other things lie beside pills and alone, with no box.
"""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from pillsnap.core.files import ensure_dir
from pillsnap.synth.catalogue import Catalogue, make_catalogue
from pillsnap.synth.draws import rng_for
from pillsnap.synth.drugs import Drug
from pillsnap.synth.files import loose_box
from pillsnap.synth.objects import draw_thing, object_photos
from pillsnap.synth.renderer import Shot, map_res, photograph_solids
from pillsnap.synth.scene import Pose
from pillsnap.synth.solids import Solid, solid

SIZES = ((320, 426), (426, 320), (360, 360), (256, 456))
DOMAINS = {"wild": 0.85, "phone": 0.1, "studio": 0.05}
OFTEN = {"capsule": 2.0, "gel": 5.0}  # more common in photos from kitchens than in catalogues
DRUGS = 400  # invented
LONG = 1.5  # power of a pill's length over its width by which it is drawn more often
FAR = 6.0  # a single pill is seen from near, or from up to so many times as far
AIR = 0.1  # of a box's longer side, at most, on each side
LEAST = 5  # pixels: a smaller box is no label
BESIDE = 0.45  # share of the photos of few pills in which other things lie beside them
THING_RES = 16.0  # map pixels per mm of a thing, at most
Placed = list[tuple[Solid, Pose]]


def _heap(drugs: list[Drug], n: int, width: float, rng: np.random.Generator) -> list[tuple[Drug, Pose]]:
    "Up to n pills side by side, none over another by more than a third."
    placed: list[tuple[Drug, Pose]] = []
    for _ in range(12 * n):
        if len(placed) == n:
            break
        x, y = rng.normal(0, width / 4, 2) if rng.random() < 0.5 else rng.uniform(-width / 2, width / 2, 2)
        drug = drugs[rng.integers(len(drugs))]
        near = 0.5 * (drug.body.long_mm + drug.body.short_mm) * rng.uniform(0.66, 1.1)
        if all(np.hypot(x - p.x, y - p.y) > near for _, p in placed):
            placed.append((drug, Pose(float(x), float(y), float(rng.uniform(0, 360)), int(rng.integers(2)))))
    return placed


def _turn(rng: np.random.Generator) -> float:
    "An angle: people lay a long pill along the table's edge as often as askew."
    edge = 90.0 * rng.integers(4) + rng.normal(0, 10)
    return float(edge if rng.random() < 0.5 else rng.uniform(0, 360))


def _what(catalogue: Catalogue, rng: np.random.Generator) -> tuple[list[tuple[Drug, Pose]], float]:
    "The pills of one photo, and how many millimetres wide it is at least."
    kind = rng.choice(3, p=(0.64, 0.18, 0.18))
    often = np.array([OFTEN.get(d.body.form, 1.0) * (d.body.long_mm / d.body.short_mm) ** LONG for d in catalogue])
    drugs = rng.choice(catalogue.drugs, (1, 4, 1 + 3 * (rng.random() < 0.4))[kind], p=often / often.sum())
    if kind == 0:
        pose = Pose(0.0, 0.0, _turn(rng), int(rng.integers(2)))
        away = FAR ** rng.random()
        return [(drugs[0], pose)], float(max(10.0, 1.05 * drugs[0].body.long_mm) * away)
    n = int(rng.integers(2, 5)) if kind == 1 else int(rng.integers(5, 36))
    long = max(d.body.long_mm for d in drugs)
    width = float(np.sqrt(n) * long * rng.uniform(1.1, 2.2))
    return _heap(drugs, n, width, rng), 0.8 * width if kind == 2 else width


def _step(field: float) -> float:
    "Widths in steps of a fifth, so that the maps of a pill are drawn once for many photos."
    return float(10 * 1.2 ** np.ceil(np.log(field / 10) / np.log(1.2)))


def _radius(s: Solid) -> float:
    "The radius of the circle around a solid, mm."
    return float(np.hypot(*s.rim.T).max())


def _beside(pills: Placed, field: float, res: float, rng: np.random.Generator) -> Placed:
    "One to four things around pills, none over another."
    taken, things = [(p.x, p.y, _radius(s)) for s, p in pills], []
    for _ in range(rng.integers(1, 5)):
        s = draw_thing(rng, min(res, THING_RES))
        near, r = max((k for _, _, k in taken), default=0.0), _radius(s)
        for _ in range(8):
            a, far = rng.uniform(0, 2 * np.pi), near + 0.5 * r + rng.uniform(0.02, 0.7) * field
            x, y = float(far * np.cos(a)), float(far * np.sin(a))
            if all(np.hypot(x - u, y - v) > k + 0.8 * r for u, v, k in taken):
                taken.append((x, y, r))
                things.append((s, Pose(x, y, float(rng.uniform(0, 360)))))
                break
    return things


def _moved(placed: Placed, dx: float, dy: float) -> Placed:
    "The same solids, moved together, mm."
    return [(s, replace(p, x=p.x + dx, y=p.y + dy)) for s, p in placed]


def scene(
    i: int,  # number of the photo
    catalogue: Catalogue,  # invented drugs
    seed: int,  # same seed and number, same photo
) -> tuple[np.ndarray, np.ndarray]:  # uint8 RGB, boxes [m, 4] x, y, w, h in pixels
    "One photo with boxes; every twelfth shows no pill: a coin, print or a finger alone, or things on any ground."
    rng = rng_for(seed, "scene", i)
    if i % 24 == 23:
        kind = i // 24 % 8
        return next(islice(object_photos(8, "validation", 320, 426, seed + i), kind, None)).image, np.zeros((0, 4))
    drugs, field = _what(catalogue, rng)
    width, height = SIZES[rng.integers(len(SIZES))]
    domain = str(rng.choice(list(DOMAINS), p=list(DOMAINS.values())))
    back, light, latitude = int(rng.integers(3)), int(rng.integers(3)), int(rng.choice((60, 70, 75, 90)))
    shot = Shot(back, light, latitude, width, height, _step(field), domain)
    no_pill = i % 24 == 11
    pills = [] if no_pill else [(solid(d, p.side, map_res(shot)), p) for d, p in drugs]
    things = []
    if len(pills) < 5 and rng.random() < (0.9 if no_pill else BESIDE):
        things = _beside(pills, field, map_res(shot), rng)
        free = max(0.0, 0.5 * field - max((np.hypot(p.x, p.y) + _radius(s) for s, p in pills), default=0.0))
        dx, dy = (float(v) for v in rng.uniform(-free, free, 2))
        pills, things = _moved(pills, dx, dy), _moved(things, dx, dy)
    image, extents = photograph_solids(things + pills, shot, rng)
    extents = extents[len(things) :]
    boxes = np.array([loose_box(e, shot, rng) for e in extents if e[2] - e[0] >= LEAST and e[3] - e[1] >= LEAST])
    return image, _looser(boxes.reshape(-1, 4).astype(float), width, height, rng)


def _looser(boxes: np.ndarray, width: int, height: int, rng: np.random.Generator) -> np.ndarray:
    "Boxes x, y, w, h as people draw them on a phone's photo: up to a tenth of the pill too large on each side."
    air = rng.uniform(0, AIR, boxes.shape) * boxes[:, 2:].max(1, initial=0)[:, None]
    low = (boxes[:, :2] - air[:, :2]).clip(0)
    high = np.minimum(boxes[:, :2] + boxes[:, 2:] + air[:, 2:], (width, height))
    return np.concatenate([low, high - low], 1)


def write_tree(
    folder: Path,  # gets images/{train,val} and labels/{train,val}; what is there already stays
    train: int,  # photos to train on
    val: int,  # photos that choose the epoch
    seed: int = 8,  # of all of them
) -> Path:  # the folder
    "A detector's folder of synthetic photos."
    catalogue = make_catalogue(DRUGS, seed)
    for k in range(train + val):
        split, name = "train" if k < train else "val", f"s{k:05d}"
        if not (folder / "labels" / split / f"{name}.txt").is_file():
            write_photo(folder, split, name, *scene(k, catalogue, seed))
    return folder


def write_photo(folder: Path, split: str, name: str, image: np.ndarray, boxes: np.ndarray) -> None:
    "One photo and its label file; boxes [m, 4] x, y, w, h in pixels."
    h, w = image.shape[:2]
    photos, labels = (ensure_dir(folder / part / split) for part in ("images", "labels"))
    Image.fromarray(image).save(photos / f"{name}.jpg", quality=94)
    rows = [f"0 {(x + bw / 2) / w:.6f} {(y + bh / 2) / h:.6f} {bw / w:.6f} {bh / h:.6f}" for x, y, bw, bh in boxes]
    (labels / f"{name}.txt").write_text("\n".join(rows) + "\n" if rows else "", encoding="utf-8")
