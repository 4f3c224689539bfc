"""RP4: real pills known from one picture a side, looked for in rendered views of the same pills.

    python benchmarks/real/rp4_reference.py --epillid CLONE --minutes 8

Pills are divided by the hash of their name. One half trains a small network to tell whether two views, turned alike,
show one surface (`--minutes 0`: no network, but colours in rings, which need no training). The other half, at least 500
pills, is enrolled from its two reference pictures, each turned in steps. Each pill is then photographed by the
renderer's phone on another ground, in other light, at another angle (a real surface in a synthetic scene), front and
back. Recall@1 among all enrolled pills: from one side, and from both. `--work` keeps views and weights.
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from sources import OUT, Clone, open_clone, provenance, write_result

from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir
from pillsnap.core.records import Metric
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.intervals import share_words
from pillsnap.models.gallery import Gallery, GalleryPart, class_scores, unit_vectors
from pillsnap.photos.images import crop_view
from pillsnap.synth.cutouts import RealPill, cut_out, real_pill
from pillsnap.synth.draws import rng_for
from pillsnap.synth.files import loose_box
from pillsnap.synth.renderer import Shot, photograph
from pillsnap.synth.scene import Pose

FOLDER = "dataset_small/epillIDsmall"
TURNS = 24  # copies of a reference picture in the gallery
SQUASH = 0.94  # a pill on a table is seen from above, but not quite
WIDTH, HEIGHT = 488, 640  # of a photo, pixels
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


def rendered(pill: RealPill, side: int, k: int, size: int) -> tuple[np.ndarray, float]:
    "A phone's view of one side in a scene, cut out by its label's box, and the angle at which the pill lies."
    rng = rng_for(11, "phone", pill.name, side, k)
    back, light, latitude = int(rng.integers(3)), int(rng.integers(3)), int(rng.choice((60, 70, 75, 90)))
    shot, angle = Shot(back, light, latitude, WIDTH, HEIGHT, 31.0, "phone"), float(rng.uniform(0, 360))
    image, [extent] = photograph([(pill, Pose(0.0, 0.0, angle, side))], shot, rng)
    x, y, w, h = loose_box(extent, shot, rng)
    return crop_view(image, np.array([x, y, x + w, y + h]), size), angle


class Plate:
    "A reference picture and the pixels of its pill."

    def __init__(self, pill: RealPill, side: int):
        bgr = cv2.imread(pill.sides[side].path)
        assert bgr is not None
        mask = cut_out(bgr[..., ::-1])
        ys, xs = np.nonzero(mask)
        cut = np.s_[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        self.page = np.where(mask[..., None], bgr[..., ::-1], np.uint8(128))[cut]
        inside = np.argwhere(mask[cut][::3, ::3])[:, ::-1] * 3.0 + 1
        self.points = np.concatenate([inside, np.ones((len(inside), 1))], 1)  # homogeneous x, y of the pill

    def _turn(self, angle: float, squash: float) -> tuple[np.ndarray, np.ndarray]:
        "The matrix that turns the picture, and the pill's bounding box after it: x0, y0, x1, y1."
        h, w = self.page.shape[:2]
        turn = np.diag([1, squash, 1]) @ np.vstack([cv2.getRotationMatrix2D((w / 2, h / 2), -angle, 1.0), [0, 0, 1]])
        at = (turn @ self.points.T)[:2]
        return turn, np.concatenate([at.min(1), at.max(1)])

    def reach(self, angle: float) -> float:
        "The longer side of the pill's box at an angle, in pixels of the picture."
        box = self._turn(angle, SQUASH)[1]
        return float(max(box[2:] - box[:2]))

    def laid(self, angle: float, size: int, squash: float = SQUASH) -> np.ndarray:
        "The pill as it looks when it lies on grey at an angle in degrees, cut out like a view of a photo."
        turn, box = self._turn(angle, squash)
        zoom, middle = size / (1.25 * max(box[2:] - box[:2])), (box[:2] + box[2:]) / 2
        move = np.array([[zoom, 0, size / 2 - zoom * middle[0]], [0, zoom, size / 2 - zoom * middle[1]]])
        page = cv2.GaussianBlur(self.page, (0, 0), max(0.3, 0.45 / zoom))
        return cv2.warpAffine(page, move @ turn, (size, size), borderValue=(128, 128, 128))

    def turned(self, size: int) -> list[np.ndarray]:
        "The reference at all angles of the gallery."
        return [self.laid(360 * k / TURNS, size) for k in range(TURNS)]


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


def spun(view: np.ndarray, angle: float, zoom: float, size: int, rng: np.random.Generator) -> np.ndarray:
    "A larger view turned by an angle and zoomed, shifted and scaled a little, in other light, blurred and noisy."
    n, zoom = len(view), zoom * size / len(view) * rng.uniform(0.95, 1.05)
    m = cv2.getRotationMatrix2D((n / 2, n / 2), -angle, zoom)
    m[:, 2] += size / 2 - n / 2 + rng.normal(0, 0.015 * size, 2)
    out = cv2.warpAffine(view, m, (size, size), flags=cv2.INTER_AREA, borderMode=cv2.BORDER_REFLECT)
    out = cv2.GaussianBlur(out, (0, 0), rng.uniform(0.1, 0.9)).astype(np.float32)
    tilt = np.linspace(-1, 1, size, dtype=np.float32)
    shade = 1 + rng.normal(0, 0.06) * tilt[None, :, None] + rng.normal(0, 0.06) * tilt[:, None, None]
    light = np.exp(rng.normal(0, 0.12) + rng.normal(0, 0.05, 3)).astype(np.float32)
    return (out * shade * light + rng.normal(0, 2.5, out.shape)).clip(0, 255).astype(np.uint8)


def network(size: int, dim: int = 256):
    "Keeps where things are: two views are alike where their turned surfaces lie over one another."
    from torch import nn

    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    last = size // 16
    layers = block(3, 24) + block(24, 48) + block(48, 64) + block(64, 64)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * last * last, dim))


def as_input(views: np.ndarray):
    "Views as a tensor [N, 3, S, S]."
    import torch

    x = torch.from_numpy(np.ascontiguousarray(views)).permute(0, 3, 1, 2).float() / 255
    return (x - 0.5) / 0.25


class Pairs:
    "Rendered views of pills and their reference pictures, in batches of sides that look alike."

    def __init__(self, pills: Sequence[RealPill], size: int, work: Path):
        self.size = size
        self.plates = [Plate(p, s) for p in pills for s in (0, 1)]
        kept = work / "views.npz"
        if not kept.is_file():
            made = [rendered(p, s, 0, size * 4 // 3) for p in pills for s in (0, 1)]
            np.savez(kept, views=np.stack([v for v, _ in made]), angles=np.array([a for _, a in made]))
        with np.load(kept) as f:
            self.views, self.angles = f["views"], f["angles"]
        flat = ring_colours(np.stack([p.laid(0, size) for p in self.plates]))
        self.near = np.argsort(((flat[:, None] - flat[None]) ** 2).sum(-1), 1)

    def batch(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        "Views in scenes and references turned like them, n each; half of them are neighbours by colour."
        n = min(n, len(self.plates))
        first = rng.integers(len(self.plates))
        alike = self.near[first, :n]
        other = rng.choice(len(self.plates), n, replace=False)
        at = np.unique(np.concatenate([rng.choice(alike, n // 2, replace=False), other]))
        at = rng.permutation(at)[:n]
        seen, known = [], []
        for i, more in zip(at, rng.uniform(0, 360, len(at))):
            plate, angle = self.plates[i], self.angles[i]
            zoom = plate.reach(angle) / plate.reach(angle + more)
            seen.append(spun(self.views[i], more, zoom, self.size, rng))
            askew = rng.uniform(-0.5, 0.5) * 360 / TURNS
            known.append(plate.laid(angle + more + askew, self.size, rng.uniform(0.88, 1)))
        return np.stack(seen), np.stack(known)


def trained(pills: Sequence[RealPill], minutes: float, size: int, work: Path) -> tuple[Embed, str]:
    "A network that learned to tell the sides of these pills apart; InfoNCE (van den Oord et al. 2018), both ways."
    import torch
    from torch.nn import functional as F

    torch.manual_seed(5)
    torch.set_num_threads(1)
    net, rng = network(size), np.random.default_rng(5)
    weights, log = work / "network.pt", work / "network.txt"
    if not weights.is_file():
        pairs, steps, limit = Pairs(pills, size, work), 0, 60 * minutes
        optimizer, began = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05), time.process_time()
        while (spent := time.process_time() - began) < limit:
            for g in optimizer.param_groups:
                g["lr"] = 2e-3 * 0.5 * (1 + np.cos(np.pi * spent / limit)) + 1e-5
            seen, known = (F.normalize(v) for v in net(as_input(np.concatenate(pairs.batch(64, rng)))).chunk(2))
            own, cosines = torch.arange(len(seen)), 20 * seen @ known.T
            loss = F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps += 1
            if steps % 50 == 0:
                print(f"{spent:.0f} s, {steps} steps, loss {float(loss.detach()):.3f}", flush=True)
        torch.save(net.state_dict(), weights)
        log.write_text(f"{steps} steps of 64 pairs in {minutes:g} min of one core")
    net.load_state_dict(torch.load(weights, weights_only=True))
    net.eval()

    def embed(some: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return torch.cat([net(as_input(some[i : i + 128])) for i in range(0, len(some), 128)]).numpy()

    return embed, f"four convolutions at {size} px, {log.read_text()}, trained on {len(pills)} other pills"


def recall(pills: Sequence[RealPill], embed: Embed, size: int) -> dict[str, np.ndarray]:
    "Whether each pill is the first answer: from its front, its back, and both."
    vectors = unit_vectors(np.concatenate([embed(np.stack(Plate(p, s).turned(size))) for p in pills for s in (0, 1)]))
    ids = np.repeat(np.arange(len(pills)), 2 * TURNS)
    views = np.tile(np.repeat([0, 1], TURNS), len(pills)).astype(np.int8)
    keys = ClassMap(tuple(p.kcode for p in pills))
    gallery = Gallery((GalleryPart(vectors, ids, views),), keys, 1.0)
    scores = []
    for s in (0, 1):
        seen = np.stack([rendered(p, s, 0, size)[0] for p in pills])
        scores.append(class_scores(gallery, unit_vectors(embed(seen))))
    own = np.arange(len(pills))
    said = dict(front=scores[0], back=scores[1], both=scores[0] + scores[1])
    return {k: v.argmax(1) == own for k, v in said.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epillid", type=Path, required=True, help="clone of Phongbwb/Pilldetection")
    p.add_argument("--minutes", type=float, default=8, help="of training on one core; 0: colours in rings")
    p.add_argument("--size", type=int, default=96, help="side of a view, pixels")
    p.add_argument("--work", type=Path, default=OUT / "rp4", help="folder of views and weights")
    p.add_argument("--most", type=int, default=100_000, help="pills, to try the script")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP4.json")
    a = p.parse_args()
    clone = open_clone("epillid", a.epillid)
    pills = pills_of(clone, a.most)
    learned, kept = [q for q in pills if is_trained_on(q)], [q for q in pills if not is_trained_on(q)]
    how: tuple[Embed, str] = (ring_colours, "colours in rings, not trained")
    if a.minutes:
        how = trained(learned, a.minutes, a.size, ensure_dir(a.work))
    t0, prov = time.perf_counter(), provenance(clone)
    hits = recall(kept, how[0], a.size)
    took = time.perf_counter() - t0
    single = np.concatenate([hits["front"], hits["back"]])
    told = f"{len(kept)} pills enrolled from one picture a side; real surface, synthetic scene; {how[1]}"
    found: list[Metric] = []
    for name, h, g in (
        ("single", single, np.tile(np.arange(len(kept)), 2)),
        ("both", hits["both"], np.arange(len(kept))),
    ):
        note = f"{share_words(h, g, 'pills')}; {told}"
        found.append(prov.metric(f"recall_at_1_{name}", float(h.mean()), len(h), took, note=note))
    for m in found:
        print(m, m.note)
    print(write_result("RP4", __doc__.splitlines()[0], found, a.out, training=how[1]))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
