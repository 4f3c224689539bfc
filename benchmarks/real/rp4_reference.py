"""RP4: real pills known from one picture a side, looked for in rendered views of the same pills.

    python benchmarks/real/rp4_reference.py --epillid CLONE --minutes 3

Pills are divided by the hash of their name. One half trains a small network to tell whether two views, turned alike,
show one surface (`--minutes 0`: no network, but colours in rings, which need no training). An eighth of that half is
held back and shows what longer training brings. The other half, at least 500 pills, is enrolled from its two reference
pictures, each laid at several angles. Each pill is then photographed by the renderer's phone on another ground, in
other light, at another angle (a real surface in a synthetic scene), front and back. Recall@1 among all enrolled pills:
from one side, and from both. `--work` keeps views and weights.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from sources import OUT, Clone, open_clone, provenance, write_result

from pillsnap.core.device import select_amp_dtype
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir, read_json, save_json
from pillsnap.core.records import Metric
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.intervals import share_words
from pillsnap.models.gallery import Gallery, GalleryPart, class_scores, unit_vectors
from pillsnap.photos.images import crop_view
from pillsnap.synth.cutouts import RealPill, cut_out, real_pill
from pillsnap.synth.draws import rng_for
from pillsnap.synth.files import loose_box
from pillsnap.synth.renderer import Shot, draw_scene, photograph
from pillsnap.synth.scene import Pose

FOLDER = "dataset_small/epillIDsmall"
TURNS = 24  # copies of a reference picture in the gallery, at each of these heights of the camera, degrees:
HEIGHTS = (90, 68)
WIDTH, HEIGHT = 488, 640  # of a photo, pixels
VIEW = 1.25  # side of a view, in longer sides of the pill's box
WIDE, KEPT = 2.0, 192  # side of a view kept for training, in lengths of the pill, and in pixels
CURVE = (1, 2, 4, 8, 16, 30)  # minutes of training after which the pills that are held back are asked
Embed = Callable[[np.ndarray], np.ndarray]  # uint8 views [N, S, S, 3] → vectors [N, D]


def pills_of(clone: Clone, most: int) -> list[RealPill]:
    "The pills of a clone, each file checked against its hash."
    names = sorted({p.rsplit("/", 1)[1][: -len("_0_0.jpg")] for p in clone.photos})[:most]
    for name in names:
        for side in (0, 1):
            clone.read(f"{FOLDER}/{name}_0_{side}.jpg")
    files = [[clone.folder / FOLDER / f"{name}_0_{side}.jpg" for side in (0, 1)] for name in names]
    return [real_pill(name, *pair, 900_001 + k) for k, (name, pair) in enumerate(zip(names, files))]


def is_trained_on(pill: RealPill) -> bool:
    "Which half a pill belongs to: the second digit of its name's hash."
    return hashlib.sha256(pill.name.encode()).hexdigest()[1] in "01234567"


def is_held_back(pill: RealPill) -> bool:
    "Which pills of the training half train nothing: the third digit of their name's hash."
    return hashlib.sha256(pill.name.encode()).hexdigest()[2] in "01"


class Look(NamedTuple):
    "How a pill is seen."

    plane: np.ndarray  # [2, 2] from its picture to the photo
    up: np.ndarray  # [2] where its height points in the photo

    def then(self, change: np.ndarray) -> "Look":
        return Look(change @ self.plane, change @ self.up)


def spin(degrees: float) -> np.ndarray:
    "The matrix that turns a picture clockwise."
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return np.array([[c, -s], [s, c]])


def look(turn: float, height: float, roll: float = 0.0) -> Look:
    "How a camera sees a pill that lies turned; it stands at a height above the table and is rolled, all in degrees."
    a = np.deg2rad(height)
    return Look(np.diag([1, np.sin(a)]) @ spin(turn), np.array([0, -np.cos(a)])).then(spin(-roll))


class Shown(NamedTuple):
    "A phone's photo of one side in a scene."

    photo: np.ndarray  # uint8 [HEIGHT, WIDTH, 3]
    box: np.ndarray  # as labelled: x0, y0, x1, y1, pixels
    pose: tuple[float, float, float]  # turn of the pill, height and roll of the camera, degrees

    def view(self, size: int) -> np.ndarray:
        return crop_view(self.photo, self.box, size)


def rendered(pill: RealPill, side: int, k: int) -> Shown:
    "One side of a pill in the k-th of its scenes."
    rng = rng_for(11, "phone", pill.name, side, k)
    back, light, latitude = int(rng.integers(3)), int(rng.integers(3)), int(rng.choice((60, 70, 75, 90)))
    shot, turn = Shot(back, light, latitude, WIDTH, HEIGHT, 31.0, "phone"), float(rng.uniform(0, 360))
    camera = draw_scene(shot, deepcopy(rng)).camera
    image, [extent] = photograph([(pill, Pose(0.0, 0.0, turn, side))], shot, rng)
    x, y, w, h = loose_box(extent, shot, rng)
    return Shown(image, np.array([x, y, x + w, y + h]), (turn, camera.latitude, camera.roll))


class Plate:
    "A reference picture, the pixels of its pill, and how thick pills of that outline usually are."

    def __init__(self, pill: RealPill, side: int):
        bgr = cv2.imread(pill.sides[side].path)
        assert bgr is not None
        mask = cut_out(bgr[..., ::-1])
        ys, xs = np.nonzero(mask)
        cut = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        upright = mask[cut].shape[0] > mask[cut].shape[1]
        self.mask = np.ascontiguousarray(np.rot90(mask[cut], upright)).astype(np.uint8) * 255
        page = np.where(mask[..., None], bgr[..., ::-1], np.uint8(128))[cut]
        self.page = np.ascontiguousarray(np.rot90(page, upright))
        self._soft: dict[int, np.ndarray] = {}  # size of a view → the picture, as soft as such a view
        self.short, self.long = self.mask.shape
        self.middle = np.array([self.long / 2, self.short / 2])
        self.outline = cv2.convexHull(np.argwhere(self.mask)[:, ::-1].astype(np.int32))[:, 0] - self.middle
        self.thick = self.short * (0.86 if self.short < 0.5 * self.long else 0.44)

    def box(self, at: Look) -> np.ndarray:
        "The pill's bounding box about the middle of its foot: x0, y0, x1, y1, in pixels of the picture."
        points, rims = self.outline @ at.plane.T, np.outer((0.3 * self.thick, 0.7 * self.thick), at.up)
        return np.concatenate([points.min(0) + rims.min(0), points.max(0) + rims.max(0)])

    def reach(self, at: Look) -> float:
        "The longer side of the pill's box."
        box = self.box(at)
        return float(max(box[2:] - box[:2]))

    def _onto(self, at: Look, size: int) -> np.ndarray:
        "The affine matrix from the picture to a view of the box."
        box, zoom = self.box(at), size / (VIEW * self.reach(at))
        start = self.thick * at.up - at.plane @ self.middle - (box[:2] + box[2:]) / 2
        return np.column_stack([zoom * at.plane, zoom * start + size / 2])

    def laid(self, at: Look, size: int) -> np.ndarray:
        "The pill as it looks when it lies on grey, cut out like a view of a photo."
        if size not in self._soft:
            self._soft[size] = cv2.GaussianBlur(self.page, (0, 0), max(0.3, 0.45 * VIEW * self.long / size))
        return cv2.warpAffine(self._soft[size], self._onto(at, size), (size, size), borderValue=(128, 128, 128))

    def cover(self, at: Look, cells: int) -> np.ndarray:
        "How much of each cell of a view the pill covers: uint8 [cells, cells]."
        mask = cv2.warpAffine(self.mask, self._onto(at, 4 * cells), (4 * cells, 4 * cells))
        return cv2.resize(mask, (cells, cells), interpolation=cv2.INTER_AREA)

    def turned(self, size: int) -> list[np.ndarray]:
        "The reference at all angles of the gallery."
        step = 360 / TURNS
        return [self.laid(look(step * (k + n / 2), h), size) for n, h in enumerate(HEIGHTS) for k in range(TURNS)]


def relief(plate: Plate) -> float:
    "How much print, scores and relief a reference picture shows: the spread of its brightness about its own blur."
    grey = cv2.cvtColor(plate.page, cv2.COLOR_RGB2GRAY).astype(np.float32)
    inside = cv2.erode(plate.mask, np.ones((25, 25), np.uint8)) > 0
    return float((grey - cv2.GaussianBlur(grey, (0, 0), 8))[inside].std())


def by_relief(pills: Sequence[RealPill], hits: dict[str, np.ndarray]) -> list[float]:
    "Recall@1 from one side, for the quarter of sides with the least relief up to that with the most."
    shown = np.array([relief(Plate(p, s)) for s in (0, 1) for p in pills])
    quarter = np.argsort(np.argsort(shown)) * 4 // len(shown)
    right = np.concatenate([hits["front"], hits["back"]])
    return [float(right[quarter == k].mean()) for k in range(4)]


def ring_colours(views: np.ndarray) -> np.ndarray:
    "Means and spreads of colour in five rings about the middle: the same for a turned view."
    size = views.shape[1]
    far = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) / (size / 2)
    rings = [(far >= k * 0.16) & (far < (k + 1) * 0.16) for k in range(5)]
    lab = np.stack([cv2.cvtColor(v, cv2.COLOR_RGB2LAB) for v in views]).astype(np.float32) / 255
    lab[..., 0] *= 0.5  # exposure tells little
    parts = [f(lab[:, r], axis=1) for r in rings for f in (np.mean, np.std)]
    usual = np.tile(np.array([0.3, 0.5, 0.53, 0.05, 0.02, 0.02], np.float32), len(rings))  # a pale pill
    return np.concatenate(parts, 1) - usual


def network(width: int = 64, dim: int = 16) -> Any:
    "A map of what is seen, an eighth of the view's side, times where the pill is: two alike surfaces lie over another."
    import torch
    from torch import nn

    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    class Surfaces(nn.Module):
        def __init__(self):
            super().__init__()
            self.coarse = nn.Sequential(*block(3, 24, 2), *block(24, 48, 2), *block(48, width, 2))
            self.fine = nn.Sequential(*block(width, width, 1), *block(width, width, 1)[:2])
            self.what = nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), nn.BatchNorm2d(dim, affine=False))
            self.where = nn.Conv2d(width, 1, 1)
            self.scale = nn.Parameter(torch.tensor(3.0))  # logarithm of what cosines are multiplied by

        def forward(self, x):
            x = self.coarse(x.contiguous(memory_format=torch.channels_last))
            x = torch.relu(x + self.fine(x))
            where = self.where(x)
            return (self.what(x) * where.sigmoid()).flatten(1).float(), where[:, 0].float()

    return Surfaces()


def as_input(views: np.ndarray):
    "Views as a tensor [N, 3, S, S]."
    import torch

    return (torch.from_numpy(np.ascontiguousarray(views)).permute(0, 3, 1, 2).float() - 127.5) / 64


def fast():
    "Autocast to bfloat16 where this processor has it."
    import torch

    kind = select_amp_dtype("bf16", "cpu")
    return torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None)


def embedder(net: Any) -> Embed:
    "A network's vectors of views."
    import torch

    def embed(views: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), fast():
            return torch.cat([net(as_input(views[i : i + 64]))[0] for i in range(0, len(views), 64)]).numpy()

    net.eval()
    return embed


class Batch(NamedTuple):
    "Views in scenes and references turned like them, n each."

    at: np.ndarray  # [n] number of the side among those that are trained on
    seen: np.ndarray  # uint8 [n, S, S, 3]
    known: np.ndarray  # uint8 [n, S, S, 3]
    cover: np.ndarray  # uint8 [n, S / 8, S / 8] where the pill is


class Pairs:
    "Rendered views of pills and their reference pictures, in batches of sides that look alike."

    def __init__(self, pills: Sequence[RealPill], size: int, views: int, work: Path):
        self.size, self.near = size, None
        self.plates = [Plate(p, s) for p in pills for s in (0, 1)]
        sides = [(p, s) for p in pills for s in (0, 1)]
        for k in range(views):
            if not (kept := work / f"views{k}.npz").is_file():
                made = [self._kept(i, rendered(*side, k)) for i, side in enumerate(sides)]
                np.savez(kept, views=np.stack([v for v, _ in made]), poses=np.array([a for _, a in made]))
        found = [np.load(work / f"views{k}.npz") for k in range(views)]
        self.views = np.stack([f["views"] for f in found], 1)
        self.poses = np.stack([f["poses"] for f in found], 1)

    def _kept(self, i: int, shown: Shown) -> tuple[np.ndarray, tuple[float, float, float]]:
        "A view wide enough to be turned, and its pose."
        wide = WIDE * self.plates[i].long / self.plates[i].reach(look(*shown.pose))  # in sides of the box
        return crop_view(shown.photo, shown.box, KEPT, (wide - 1) / 2), shown.pose

    def mine(self, embed: Embed) -> None:
        "Note for each side the others that a network finds most alike."
        upright = np.stack([p.laid(look(0, 90), self.size) for p in self.plates])
        vectors = unit_vectors(embed(upright))
        cosines, pill = vectors @ vectors.T, np.arange(len(vectors)) // 2
        cosines[pill[:, None] == pill] = -2
        self.near = np.argsort(-cosines, 1)[:, :24]

    def _drawn(self, n: int, rng: np.random.Generator) -> np.ndarray:
        "Numbers of sides: half of them in sevens that look alike, once somebody looked."
        total, some = len(self.plates), []
        if self.near is not None:
            first = rng.choice(total, max(1, min(n, total) // 16))
            some = [k for f in first for k in (f, *rng.permutation(self.near[f])[:7])]
        return np.array(list(dict.fromkeys([*some, *rng.permutation(total)]))[:n])

    def batch(self, n: int, rng: np.random.Generator) -> Batch:
        "n sides, all turned to one angle and mirrored alike."
        at, theta, mirror = self._drawn(n, rng), rng.uniform(0, 360), np.diag([1, rng.choice((-1.0, 1.0))])
        made = [self._pair(i, theta, mirror, rng) for i in at]
        return Batch(at, *(np.stack(part) for part in zip(*made)))

    def _pair(self, i: int, theta: float, mirror: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        "A view and its reference at an angle; the reference is as far off as one of the gallery may be."
        plate, size, k = self.plates[i], self.size, rng.integers(self.views.shape[1])
        turn, height, roll = self.poses[i, k]
        change = mirror @ spin(theta - turn + roll + rng.normal(0, 4))
        true = look(turn, height, roll).then(change)
        zoom = size / KEPT * WIDE * plate.long / (VIEW * plate.reach(true)) * rng.uniform(0.95, 1.05)
        shift = size / 2 - zoom * change @ (KEPT / 2, KEPT / 2) + rng.normal(0, 0.015 * size, 2)
        view = np.column_stack([zoom * change, shift])
        seen = cv2.warpAffine(self.views[i, k], view, (size, size), borderMode=cv2.BORDER_REFLECT)
        askew, lower = rng.uniform(-180, 180) / TURNS, rng.uniform(-9, 9)
        known = look(turn + askew, float(np.clip(height + lower, 50, 90)), roll).then(change)
        return seen, plate.laid(known, size), plate.cover(true, size // 8)


def in_other_light(seen: Any, known: Any) -> Any:
    "Views and references in one tensor: both tinted alike, the views lit from a side, darker or brighter, and noisy."
    import torch

    n, size, normal = len(seen), seen.shape[-1], torch.randn
    across = torch.linspace(-1, 1, size)
    slope = 1 + 0.06 * (normal(n, 1, 1, 1) * across + normal(n, 1, 1, 1) * across[:, None])
    light = slope * torch.exp(0.12 * normal(n, 1, 1, 1) + 0.05 * normal(n, 3, 1, 1))
    tint = torch.exp(0.12 * normal(n, 3, 1, 1))
    both = torch.cat([(seen + 2) * light + 0.03 * normal(1, 3, size, size), known + 2])
    return (both * torch.cat([tint, tint]) - 2).clamp(-2, 2)


def loss_of(net: Any, batch: Batch) -> Any:
    "InfoNCE (van den Oord et al. 2018), both ways, and where the pill is; the two sides of a pill are not told apart."
    import torch
    from torch.nn import functional as F

    with fast():
        vectors, where = net(in_other_light(as_input(batch.seen), as_input(batch.known)))
    seen, known = F.normalize(vectors).chunk(2)
    own, pill = torch.arange(len(seen)), torch.from_numpy(batch.at // 2)
    other_side = (pill[:, None] == pill) & (own[:, None] != own)
    cosines = (net.scale.exp().clamp(max=60) * seen @ known.T).masked_fill(other_side, -1e4)
    cover = torch.from_numpy(batch.cover).float().repeat(2, 1, 1) / 255
    mask = F.binary_cross_entropy_with_logits(where, cover)
    return F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own) + 0.3 * mask


def averaged(mean: Any, net: Any, steps: int) -> None:
    "Move the mean weights towards the present ones."
    import torch

    keep = min(0.998, (1 + steps) / (10 + steps))
    with torch.no_grad():
        for m, w in zip(mean.state_dict().values(), net.state_dict().values()):
            m.copy_(keep * m + (1 - keep) * w if m.is_floating_point() else w)


def fitted(
    pairs: Pairs, minutes: float, ask: Callable[[Embed], dict[str, float]]
) -> tuple[Any, list[dict[str, float]]]:
    "A trained network's mean weights, and what the pills that are held back say after each time of CURVE."
    import torch

    torch.manual_seed(5)
    torch.set_num_threads(1)
    net, rng, limit, spent, steps = network(), np.random.default_rng(5), 60 * minutes, 0.0, 0
    mean, curve, marks = deepcopy(net).eval(), [], [m for m in CURVE if m < minutes] + [minutes]
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    while marks:
        began = time.process_time()
        if steps >= 300 and steps % 400 == 300:
            pairs.mine(embedder(mean))
        for g in optimizer.param_groups:
            g["lr"] = 2e-3 * min(1, steps / 100) * 0.5 * (1 + np.cos(np.pi * min(1, spent / limit))) + 1e-5
        loss = loss_of(net, pairs.batch(64, rng))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
        averaged(mean, net, steps)
        spent += time.process_time() - began
        if steps % 100 == 0:
            print(f"{spent:.0f} s, {steps} steps, loss {float(loss.detach()):.3f}", flush=True)
        if spent >= 60 * marks[0]:
            curve.append(dict(minutes=marks.pop(0), steps=steps) | ask(embedder(mean)))
            print(curve[-1], flush=True)
    return mean, curve


def trained(
    pills: Sequence[RealPill], minutes: float, size: int, views: int, work: Path
) -> tuple[Embed, dict[str, Any]]:
    "A network that learned to tell the sides of these pills apart, or the one of an earlier call; and how."
    import torch

    weights, log = work / "network.pt", work / "network.json"
    if not log.is_file():
        held, mine = ([k for k, p in enumerate(pills) if is_held_back(p) == h] for h in (True, False))
        asked = asked_for(pills, held, size) if held else None

        def ask(embed: Embed) -> dict[str, float]:
            hits = recall(pills, embed, size, asked) if asked else {}
            return {k: float(v.mean()) for k, v in hits.items()}

        net, curve = fitted(Pairs([pills[k] for k in mine], size, views, work), minutes, ask)
        torch.save(net.state_dict(), weights)
        told = f"{curve[-1]['steps']} steps of 64 pairs in {minutes:g} min of one core"
        words = f"five convolutions at {size} px, {told}, trained on {len(mine)} other pills in {views} scenes a side"
        save_json(dict(training=words, asked=len(held), among=len(pills), curve=curve), log)
    net = network()
    net.load_state_dict(torch.load(weights, weights_only=True))
    return embedder(net), read_json(log)


class Asked(NamedTuple):
    "Pills that are looked for, and views of their fronts and backs."

    pills: np.ndarray  # [m] numbers among the enrolled ones
    views: np.ndarray  # uint8 [2 m, S, S, 3] front and back in turn


def asked_for(pills: Sequence[RealPill], which: Sequence[int], size: int, kept: Path | None = None) -> Asked:
    "Views of some pills in the first of their scenes, or those that an earlier call kept."
    if kept is not None and kept.is_file():
        return Asked(np.array(which), np.load(kept))
    views = np.stack([rendered(pills[k], s, 0).view(size) for k in which for s in (0, 1)])
    if kept is not None:
        np.save(kept, views)
    return Asked(np.array(which), views)


def recall(pills: Sequence[RealPill], embed: Embed, size: int, asked: Asked) -> dict[str, np.ndarray]:
    "Whether pills are the first answer among all: from the front, the back, and both, which show different sides."
    keys, queries, scores = ClassMap(tuple(p.kcode for p in pills)), unit_vectors(embed(asked.views)), []
    ids = np.repeat(np.arange(len(pills)), TURNS * len(HEIGHTS))
    for side in (0, 1):
        vectors = unit_vectors(np.concatenate([embed(np.stack(Plate(p, side).turned(size))) for p in pills]))
        part = GalleryPart(vectors, ids, np.full(len(ids), side, np.int8))
        scores.append(class_scores(Gallery((part,), keys, 1.0), queries))
    (front, back), (crossed, straight) = ([s[k::2] for s in scores] for k in (0, 1))
    both = np.maximum(front + straight, back + crossed)
    said = dict(front=np.maximum(front, back), back=np.maximum(crossed, straight), both=both)
    return {k: v.argmax(1) == asked.pills for k, v in said.items()}


def figures(hits: dict[str, np.ndarray], clone: Clone, took: float, told: str) -> list[Metric]:
    "Recall@1 from one side and from both, with intervals by pill."
    prov, n, found = provenance(clone), len(hits["both"]), []
    single = np.concatenate([hits["front"], hits["back"]])
    for name, h, g in (("single", single, np.tile(np.arange(n), 2)), ("both", hits["both"], np.arange(n))):
        note = f"{share_words(h, g, 'pills')}; {told}"
        found.append(prov.metric(f"recall_at_1_{name}", float(h.mean()), len(h), took, note=note))
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epillid", type=Path, required=True, help="clone of Phongbwb/Pilldetection")
    p.add_argument("--minutes", type=float, default=3, help="of training on one core; 0: colours in rings")
    p.add_argument("--size", type=int, default=96, help="side of a view, pixels")
    p.add_argument("--scenes", type=int, default=1, help="rendered for each side to train on")
    p.add_argument("--work", type=Path, default=OUT / "rp4", help="folder of views and weights")
    p.add_argument("--most", type=int, default=100_000, help="pills, to try the script")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP4.json")
    a = p.parse_args()
    clone = open_clone("epillid", a.epillid)
    pills = pills_of(clone, a.most)
    learned, kept = [q for q in pills if is_trained_on(q)], [q for q in pills if not is_trained_on(q)]
    embed, how = ring_colours, dict(training="colours in rings, not trained")
    if a.minutes:
        embed, how = trained(learned, a.minutes, a.size, a.scenes, ensure_dir(a.work))
    began = time.perf_counter()
    asked = asked_for(kept, range(len(kept)), a.size, ensure_dir(a.work) / f"asked-{len(kept)}-{a.size}.npy")
    hits = recall(kept, embed, a.size, asked)
    told = f"{len(kept)} pills enrolled from one picture a side; real surface, synthetic scene; {how['training']}"
    found = figures(hits, clone, time.perf_counter() - began, told)
    for m in found:
        print(m, m.note)
    more = {k: float(hits[k].mean()) for k in ("front", "back")} | dict(by_relief=by_relief(kept, hits))
    print(write_result("RP4", __doc__.splitlines()[0], found, a.out, **how, **more))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
