"""RP4: real pills known from one picture a side, looked for in rendered views of the same pills.

    python benchmarks/real/rp4_reference.py --epillid CLONE --minutes 10

Pills are divided by the hash of their name. With one half a network learns to tell pills apart (`--minutes 0`: no
network, but colours in rings, which need no training). The other half, at least 500 pills, is enrolled from its two
reference pictures; each is then photographed by the renderer's phone on another ground, in other light, at another
angle (a real surface in a synthetic scene), front and back. Recall@1 among all enrolled pills: from one side, and from
both.
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
from pillsnap.core.records import Metric
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.intervals import share_words
from pillsnap.models.gallery import Gallery, GalleryPart, class_scores, unit_vectors
from pillsnap.photos.images import crop_view, normalise
from pillsnap.synth.cutouts import RealPill, real_pill
from pillsnap.synth.draws import rng_for
from pillsnap.synth.files import loose_box
from pillsnap.synth.renderer import Shot, photograph
from pillsnap.synth.scene import Pose

FOLDER = "dataset_small/epillIDsmall"
TURNS = 8  # copies of a reference picture in the gallery
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


def rendered(pill: RealPill, side: int, k: int, domain: str, size: int) -> np.ndarray:
    "A view of one side in a scene, cut out by its label's box; the k-th of its domain."
    rng = rng_for(11, domain, pill.name, side, k)
    shot = Shot(int(rng.integers(3)), int(rng.integers(3)), int(rng.choice((60, 70, 75, 90))), 244, 320, 31.0, domain)
    image, [extent] = photograph([(pill, Pose(0.0, 0.0, float(rng.uniform(0, 360)), side))], shot, rng)
    x, y, w, h = loose_box(extent, shot, rng)
    return crop_view(image, np.array([x, y, x + w, y + h]), size)


def reference(pill: RealPill, side: int, size: int) -> list[np.ndarray]:
    "The reference picture, turned; its ground is grey."
    from pillsnap.synth.cutouts import cut_out  # the picture itself, without a scene

    bgr = cv2.imread(pill.sides[side].path)
    assert bgr is not None
    picture = bgr[..., ::-1]
    page = np.where(cut_out(picture)[..., None], picture, np.uint8(128))
    h, w = page.shape[:2]
    out = []
    for k in range(TURNS):
        turn = cv2.getRotationMatrix2D((w / 2, h / 2), 360 * k / TURNS, 0.84)
        turned = cv2.warpAffine(page, turn, (w, h), borderValue=(128, 128, 128))
        out.append(cv2.resize(turned, (size, size), interpolation=cv2.INTER_AREA))
    return out


def ring_colours(views: np.ndarray) -> np.ndarray:
    "Means and spreads of colour in five rings about the middle: the same for a turned view."
    size = views.shape[1]
    far = np.hypot(*(np.mgrid[:size, :size] - (size - 1) / 2)) / (size / 2)
    rings = [(far >= k * 0.16) & (far < (k + 1) * 0.16) for k in range(5)]
    lab = np.stack([cv2.cvtColor(v, cv2.COLOR_RGB2LAB) for v in views]).astype(np.float32) / 255
    lab[..., 0] *= 0.5  # exposure tells little
    parts = [f(lab[:, r], axis=1) for r in rings for f in (np.mean, np.std)]
    vectors = np.concatenate(parts, 1)
    return vectors - vectors.mean(0)


def trained(pills: Sequence[RealPill], minutes: float, size: int, views: int) -> tuple[Embed, str]:
    "A network that learned to tell the sides of these pills apart."
    import torch

    from pillsnap.models.factory import build_classification_model
    from pillsnap.models.heads import ArcFaceCriterion

    torch.manual_seed(5)
    torch.set_num_threads(1)
    sides = [(p, s) for p in pills for s in (0, 1)]
    images, labels = [], []
    for c, (p, s) in enumerate(sides):
        images += [rendered(p, s, k, "phone" if k % 2 else "studio", size) for k in range(views)] + reference(
            p, s, size
        )
        labels += [c] * (views + TURNS)
    x, y, rng = np.stack(images), np.array(labels), np.random.default_rng(5)
    net = build_classification_model("test_resnet", len(sides), pretrained=False, head=dict(dim=256, scale=32.0))
    loss, steps = ArcFaceCriterion(32.0, 0.1), 0
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.02)
    began, limit = time.process_time(), 60 * minutes
    while (spent := time.process_time() - began) < limit:
        for g in optimizer.param_groups:
            g["lr"] = 2e-3 * 0.5 * (1 + np.cos(np.pi * spent / limit)) + 1e-5
        at = rng.choice(len(x), 64)
        batch = np.stack([_varied(x[i], rng) for i in at])
        out = net.train()(torch.from_numpy(normalise(batch)))
        optimizer.zero_grad()
        loss(out, torch.from_numpy(y[at])).backward()
        optimizer.step()
        steps += 1
    network = net.eval()

    def embed(some: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            parts = [network.embed(torch.from_numpy(normalise(some[i : i + 64]))) for i in range(0, len(some), 64)]
        return torch.cat(parts).numpy()

    return (
        embed,
        f"test_resnet at {size} px, {steps} steps of 64 views in {minutes:g} min of one core, {len(pills)} pills",
    )


def _varied(view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "A view turned, scaled and in other light."
    n = len(view)
    turn = cv2.getRotationMatrix2D((n / 2, n / 2), rng.uniform(0, 360), rng.uniform(0.85, 1.15))
    turned = cv2.warpAffine(view, turn, (n, n), borderMode=cv2.BORDER_REPLICATE)
    return (turned * rng.uniform(0.75, 1.25) * rng.uniform(0.92, 1.08, 3)).clip(0, 255).astype(np.uint8)


def recall(pills: Sequence[RealPill], embed: Embed, size: int) -> dict[str, np.ndarray]:
    "Whether each pill is the first answer: from its front, its back, and both."
    refs = [reference(p, s, size) for p in pills for s in (0, 1)]
    vectors = unit_vectors(embed(np.stack([v for r in refs for v in r])))
    ids = np.repeat(np.arange(len(pills)), 2 * TURNS)
    views = np.tile(np.repeat([0, 1], TURNS), len(pills)).astype(np.int8)
    keys = ClassMap(tuple(p.kcode for p in pills))
    gallery = Gallery((GalleryPart(vectors, ids, views),), keys, 1.0)
    scores = [class_scores(gallery, unit_vectors(embed(np.stack([rendered(p, s, 0, "phone", size) for p in pills]))))
              for s in (0, 1)]  # fmt: skip
    own = np.arange(len(pills))
    said = dict(front=scores[0], back=scores[1], both=scores[0] + scores[1])
    return {k: v.argmax(1) == own for k, v in said.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--epillid", type=Path, required=True, help="clone of Phongbwb/Pilldetection")
    p.add_argument("--minutes", type=float, default=10, help="of training on one core; 0: colours in rings")
    p.add_argument("--size", type=int, default=112, help="side of a view, pixels")
    p.add_argument("--views", type=int, default=4, help="rendered views of each side to train on")
    p.add_argument("--most", type=int, default=100_000, help="pills, to try the script")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP4.json")
    a = p.parse_args()
    clone = open_clone("epillid", a.epillid)
    pills = pills_of(clone, a.most)
    learned, kept = [q for q in pills if is_trained_on(q)], [q for q in pills if not is_trained_on(q)]
    how: tuple[Embed, str] = (ring_colours, "colours in rings, not trained")
    if a.minutes:
        how = trained(learned, a.minutes, a.size, a.views)
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
