"""RP4's network: it is trained to tell whether two views, turned alike, show one surface."""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from reference_views import TURNS, VIEW, Plate, Shown, look, rendered, spin

from pillsnap.core.device import select_amp_dtype
from pillsnap.models.gallery import unit_vectors
from pillsnap.photos.images import crop_view
from pillsnap.synth.cutouts import RealPill

WIDE, KEPT = 2.0, 192  # side of a view kept for training, in lengths of the pill, and in pixels
CURVE = (2, 8, 16)  # minutes of training after which the pills that are held back are asked
Embed = Callable[[np.ndarray], np.ndarray]  # uint8 views [N, S, S, 3] → vectors [N, D]


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
            pairs = [[*block(width, width, 1), *block(width, width, 1)[:2]] for _ in range(2)]
            self.fine = nn.ModuleList(nn.Sequential(*p) for p in pairs)
            self.what = nn.Sequential(nn.Conv2d(width, dim, 1, bias=False), nn.BatchNorm2d(dim, affine=False))
            self.where = nn.Conv2d(width, 1, 1)
            self.scale = nn.Parameter(torch.tensor(3.0))  # logarithm of what cosines are multiplied by

        def forward(self, x):
            x = self.coarse(x.contiguous(memory_format=torch.channels_last))
            for pair in self.fine:
                x = torch.relu(x + pair(x))
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
