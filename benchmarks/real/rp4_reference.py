"""RP4: real pills known from one picture a side, looked for in rendered views of the same pills.

    python benchmarks/real/rp4_reference.py --epillid CLONE

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from reference_network import Embed, Pairs, embedder, fitted, network
from reference_views import HEIGHTS, TURNS, Plate, relief, rendered
from sources import OUT, Clone, open_clone, provenance, write_result

from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir, read_json, save_json
from pillsnap.core.records import Metric
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.intervals import share_words
from pillsnap.models.gallery import Gallery, GalleryPart, class_scores, unit_vectors
from pillsnap.synth.cutouts import RealPill, real_pill

FOLDER = "dataset_small/epillIDsmall"


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
        words = f"seven convolutions at {size} px, {told}, trained on {len(mine)} other pills in {views} scenes a side"
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
    p.add_argument("--minutes", type=float, default=45, help="of training on one core; 0: colours in rings")
    p.add_argument("--size", type=int, default=128, help="side of a view, pixels")
    p.add_argument("--scenes", type=int, default=5, help="rendered for each side to train on")
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
