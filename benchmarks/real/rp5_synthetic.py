"""RP5: what rendered photos add to real ones: the same classifier with 0, 25 and 100 % rendered photos added.

    python benchmarks/real/rp5_synthetic.py --abhiram CLONE

One training photo of each drug shows its front and its back on grey. Both are cut out, and the package's renderer draws
them in new scenes, as `pillsnap synth --cutouts` does: other grounds, lights and angles. The classifier is trained with
all real photos, with a few a drug and with none, and with rendered photos added to them. Every training takes the same
number of steps: its photos are repeated until an epoch is as long as the longest. So all have the same schedule, and
nobody gains by longer training. All are validated on the same real photos and scored on the same clean ones.
`--work` keeps every run: a second call goes on where the first stopped.
"""

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from folders import FOLDER, NAMED, UNIT, difference, imported, named, split_by
from sources import OUT, Clone, open_clone, write_result

from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir, read_json, save_json
from pillsnap.core.records import Metric, Provenance
from pillsnap.dataset.splitfiles import SplitData, load_split_data
from pillsnap.evaluation.intervals import share_words
from pillsnap.photos.images import crop_view, open_image_safely
from pillsnap.synth.cutouts import RealPill, load_cutouts
from pillsnap.synth.draws import rng_for
from pillsnap.synth.files import loose_box
from pillsnap.synth.renderer import Shot, photograph
from pillsnap.synth.scene import Pose
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.learner import Outputs
from pillsnap.training.trainer import train_classification_stage

DIFFERS = 18  # levels from the ground, of the channel that differs most
WIDTH, HEIGHT, FIELD = 360, 480, 31.0  # of a rendered photo: pixels, and millimetres across
VIEW = 224  # side of a rendered photo as it is kept, pixels
ALL = 10_000  # photos a drug


def outlines(rgb: np.ndarray) -> list[np.ndarray]:
    "The outlines of whole pills on the grey of these pictures; rulers, labels and cut pills are left out."
    h, w = rgb.shape[:2]
    calm = cv2.medianBlur(rgb, 5).astype(np.int16)
    grey = (np.ptp(calm, axis=2) < 12) & (abs(calm.mean(2) - 120) < 25)
    if grey.mean() < 0.05:
        return []
    differs = (np.abs(calm - np.median(calm[grey], 0)).max(2) > DIFFERS).astype(np.uint8)
    thin = max(3, min(h, w) // 60) | 1
    differs = cv2.morphologyEx(differs, cv2.MORPH_OPEN, np.ones((thin, thin), np.uint8))
    found = []
    for line in cv2.findContours(differs, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]:
        x, y, bw, bh = cv2.boundingRect(line)
        area, inside = cv2.contourArea(line), x > 1 and y > 1 and x + bw < w - 1 and y + bh < h - 1
        if inside and area > 0.03 * h * w and area > 0.95 * cv2.contourArea(cv2.convexHull(line)):
            found.append(line)
    return found


def both_sides(rgb: np.ndarray) -> list[np.ndarray]:
    "Front and back with an alpha channel, where a picture shows two pills of one size; nothing otherwise."
    found = outlines(rgb)
    if len(found) != 2 or not 0.8 < cv2.contourArea(found[0]) / cv2.contourArea(found[1]) < 1.25:
        return []
    sides = []
    for line in found:
        mask = np.zeros(rgb.shape[:2], np.uint8)
        cv2.drawContours(mask, [line], -1, 255, cv2.FILLED)
        x, y, w, h = cv2.boundingRect(line)
        sides.append(cv2.copyMakeBorder(np.dstack([rgb, mask])[y : y + h, x : x + w], 6, 6, 6, 6, cv2.BORDER_CONSTANT))
    return sides


def cut_outs(rows: pd.DataFrame, root: Path, folder: Path) -> pd.DataFrame:
    "Cut both sides out of one training photo of each drug, the largest that shows them; returns those photos."
    taken = []
    for drug, mine in rows.groupby("class_key"):
        order = mine.assign(pixels=mine["width"] * mine["height"]).sort_values(["pixels", "path"], ascending=[0, 1])
        for row in order.drop_duplicates("sha1").itertuples():
            sides = both_sides(open_image_safely(root / str(row.path))["image"])
            if sides:
                break
        else:
            raise PillsnapError(f"no training photo of {drug} shows both sides", where=root)
        for name, side in zip(("front", "back"), sides):
            cv2.imwrite(str(ensure_dir(folder) / f"{drug}_{name}.png"), cv2.cvtColor(side, cv2.COLOR_RGBA2BGRA))
        taken.append(row.Index)
    return rows.loc[taken]


def rendered(pill: RealPill, k: int) -> np.ndarray:
    "The k-th rendered photo of a pill, cut out with more or less ground around it; uint8 RGB."
    rng = rng_for(5, "synthetic", pill.name, k)
    back, light, latitude = int(rng.integers(3)), int(rng.integers(3)), int(rng.choice((70, 75, 90)))
    shot = Shot(back, light, latitude, WIDTH, HEIGHT, FIELD, str(rng.choice(["studio", "phone"])))
    image, [extent] = photograph([(pill, Pose(0.0, 0.0, float(rng.uniform(0, 360)), k % 2))], shot, rng)
    x, y, w, h = loose_box(extent, shot, rng)
    return crop_view(image, np.array([x, y, x + w, y + h]), VIEW, float(rng.uniform(0, 0.3)))


def synthetic_rows(rows: pd.DataFrame, cutouts: Path, folder: Path, n: int) -> pd.DataFrame:
    "Rows of n rendered photos, drug after drug; the first of them are those of a smaller number."
    pills = load_cutouts(cutouts).pills
    models = rows.drop_duplicates("class_key").set_index("class_key", drop=False)
    found = []
    for i in range(n):
        pill, k = pills[i % len(pills)], i // len(pills)
        path = ensure_dir(folder / pill.name) / f"{k:05d}.jpg"
        if not path.is_file():
            cv2.imwrite(str(path), rendered(pill, k)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])
        own = dict(sample_id=f"synthetic/{i}", path=str(path.absolute()), group_id=f"synthetic/{i}", dup_id="")
        own |= dict(width=VIEW, height=VIEW, sha1=hashlib.sha1(path.read_bytes()).hexdigest())
        found.append(models.loc[pill.name].to_dict() | own)
    return pd.DataFrame(found, columns=rows.columns)


def few(rows: pd.DataFrame, taken: pd.DataFrame, n: int) -> pd.DataFrame:
    "At most n real photos a drug, each of another group of near-copies; the photo that was cut out is the first."
    if n >= ALL:
        return rows
    order = rows.assign(
        later=~rows["path"].isin(taken["path"]), drawn=[hashlib.sha256(p.encode()).hexdigest() for p in rows["path"]]
    )
    order = order.sort_values(["later", "drawn"]).drop_duplicates("group_id")
    return rows.loc[sorted(order.groupby("class_key").head(n).index)]


def repeated(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    "The rows, each as often as the others or once more, n in all."
    return rows.iloc[np.resize(np.random.default_rng(7).permutation(len(rows)), n)].reset_index(drop=True)


def trained(
    a: argparse.Namespace,
    first: Path,  # the import
    name: str,  # of the run
    rows: pd.DataFrame,  # to train on
    length: int,  # of an epoch, photos
) -> tuple[pd.DataFrame, float]:  # the clean photos with their first names; seconds of the process
    "Train on some rows and ask for the clean photos; a finished run is read."
    folder, over = split_by(a, first, a.work / name, "capture")
    cfg = ClassifierJob(str(folder), "own", over, epochs=a.epochs).cfg
    if not (folder / "seconds.json").is_file():
        data, began = load_split_data(folder, 0), time.process_time()
        mine = hashlib.sha256("\n".join(rows["sha1"]).encode()).hexdigest()
        data = replace(data, train=repeated(rows, length), header={**data.header, "data_hash": mine})
        train_classification_stage(data, cfg, Outputs(folder / "checkpoints" / "classifier", quiet=True))
        named(folder, cfg)
        save_json(dict(seconds=time.process_time() - began), folder / "seconds.json")
    return pd.read_csv(folder / NAMED), float(read_json(folder / "seconds.json")["seconds"])


def plan(data: SplitData, taken: pd.DataFrame, sizes: Sequence[int], shares: Sequence[int]) -> list[tuple]:
    "Name, real rows and number of rendered photos of each training; the last has no real photo."
    found = []
    for n in sizes:
        real = few(data.train, taken, n)
        for share in shares:
            found.append((f"{'all' if n >= ALL else n}_a_drug_plus_{share}", real, round(len(real) * share / 100)))
    return [*found, ("rendered_only", data.train.iloc[:0], len(data.train))]


def figure(t: pd.DataFrame, name: str, told: str, seconds: float, prov: Provenance) -> Metric:
    "The accuracy of one training on the clean photos."
    hit = t["true"] == t["answered"]
    note = f"{share_words(hit, t['group'], UNIT)}; {told}"
    return prov.metric(f"accuracy_{name}", float(hit.mean()), len(t), seconds, note=note)


def run(a: argparse.Namespace, clone: Clone) -> tuple[list[Metric], list[dict]]:
    "All trainings: their figures, and one line each for a curve."
    first = imported(clone, a.work)
    folder, over = split_by(a, first, a.work / "split", "capture")
    data, c = load_split_data(folder, 0), ClassifierJob(str(folder), "own", over).cfg.train.classification
    taken = cut_outs(data.train, clone.folder / FOLDER, a.work / "cutouts")
    todo = plan(data, taken, a.sizes, a.shares)
    drawn = synthetic_rows(data.train, a.work / "cutouts", a.work / "rendered", max(n for _, _, n in todo))
    length = max(len(real) + n for _, real, n in todo)
    prov = Provenance(clone.data, clone.data_hash, data.class_map.fingerprint)
    found, lines, before = list[Metric](), list[dict](), pd.DataFrame()
    for name, real, n in todo:
        t, seconds = trained(a, first, name, pd.concat([real, drawn.iloc[:n]]), length)
        steps = a.epochs * math.floor(length / c.batch_size)  # a batch that is not full is left out
        told = f"{len(real)} real and {n} rendered photos, {steps} steps of {c.batch_size}, {c.backbone} from scratch"
        told = f"{told}, {a.size} px"
        found.append(figure(t, name, told, seconds, prov))
        before = t if not n else before
        if n and len(real):
            gain, words = difference(t, before)
            note = f"{words}; with {n} rendered photos minus without, photo by photo; {told}"
            found.append(prov.metric(f"gain_{name}", gain, len(t), seconds, note=note))
        lines.append(dict(name=name, real=len(real), rendered=n, steps=steps, seconds=seconds))
        print(found[-1], found[-1].note, flush=True)
    return found, lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--abhiram", type=Path, required=True, help="clone of abhiram-bogisetty/PillDetection")
    p.add_argument("--work", type=Path, default=OUT / "rp5", help="folder of cut-outs, rendered photos and runs")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP5.json")
    p.add_argument("--epochs", type=int, default=15, help="of each training")
    p.add_argument("--size", type=int, default=112, help="side of the network's input, pixels")
    p.add_argument("--sizes", type=int, nargs="+", default=[1, 4, ALL], help=f"real photos a drug; {ALL}: all of them")
    p.add_argument("--shares", type=int, nargs="+", default=[0, 25, 100], help="rendered photos, percent of the real")
    a = p.parse_args()
    a.shares = sorted({0, *a.shares})  # what rendered photos add is counted from none
    a.minutes = 600  # the clock stops no training: all take the same steps
    torch.set_num_threads(1)
    found, lines = run(a, open_clone("abhiram", a.abhiram))
    print(write_result("RP5", __doc__.splitlines()[0], found, a.out, runs=lines))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
