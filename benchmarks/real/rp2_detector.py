"""RP2: the detector on real photos with boxes.

    python benchmarks/real/rp2_detector.py --davidooff CLONE --andrewtrainor CLONE

Zero-shot: trained on synthetic photos alone (benchmarks/real/scenes.py), mAP@.5 on every boxed photo. `--photos 16,64`
fine-tunes copies on that many real photos of the first set and measures them on the photos of other near-copy groups,
beside two detectors trained from scratch with the same photos and epochs: one by PillSnap, one by ultralytics' own
training with its own settings. `--work` keeps photos and weights: a second call with the same arguments goes on where
the first stopped, and one with others is refused.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import write_photo, write_tree
from sources import OUT, Clone, boxes_of, groups_of, open_clone, provenance, write_result

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.device import pick_device, select_amp_dtype
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir, read_json, save_json
from pillsnap.core.jobs import fingerprint
from pillsnap.core.records import Metric
from pillsnap.evaluation.groupfigures import box_figures
from pillsnap.models.pipeline import detect
from pillsnap.models.yolo import PILL, TorchDetector, load_ultralytics, open_detector, yolo_name
from pillsnap.photos.images import open_image_safely
from pillsnap.training.detectorsettings import DetectorSettings, TrainPlan, detector_args
from pillsnap.training.detectortrainer import train_detector

TABLES = {
    "davidooff": (("DataSet/train/_annotations.csv", "DataSet/valid/_annotations.csv"), ""),
    "andrewtrainor": (("all_labels.csv",), "images"),
}


def plan(tree: Path, folder: Path, size: int, epochs: int, start: Path | None = None) -> TrainPlan:
    "How a detector is trained on a folder of photos, from scratch or from the weights of another."
    over = [f"data.detection.img_size={size}", f"train.detection.epochs={epochs}", "train.num_threads=1"]
    over += ["data.augment.detection.mosaic=0.3", "data.augment.detection.mixup=0", "train.detection.close_mosaic=2"]
    if start is not None:
        over += ["train.detection.lr=5e-4"]
    cfg = load_config("demo", over)
    device = pick_device()
    amp = select_amp_dtype(cfg.train.detection.amp_dtype, device)
    work = ensure_dir(folder / "ultralytics")
    load_ultralytics(work)
    data_hash = fingerprint(tree)
    assert data_hash is not None
    fixed = dict(config_snapshot=cfg.to_dict(), class_map=PILL.to_dict(), backbone=yolo_name("yolo11n"), img_size=size)
    args = detector_args(DetectorSettings.from_config(cfg), tree, work, device, amp)
    return TrainPlan("yolo11n", tree, folder, args, {**fixed, "data_hash": data_hash}, amp=amp, least_steps=1000)


def train(p: TrainPlan, start: Path | None = None) -> dict[str, Any]:
    "Train, or take what an earlier call trained; returns the processor's seconds and the epochs."
    hooks = {}
    if start is not None:
        weights = load_ckpt(start)
        state = weights.get("ema_state") or weights["model_state"]
        hooks["on_pretrain_routine_end"] = lambda t: [m.load_state_dict(state) for m in (t.model, t.ema.ema)]
    return timed(p.folder, lambda: len(train_detector(p, hooks).history))


def train_theirs(tree: Path, folder: Path, size: int, epochs: int) -> dict[str, Any]:
    "Ultralytics' own training of the same network from scratch, with its own settings; it keeps its best epoch."
    yolo = load_ultralytics(ensure_dir(folder))
    about = dict(path=str(tree.absolute()), train="images/train", val="images/val", names={0: "pill"})
    data = save_json(about, tree / "data.yaml")  # JSON is YAML
    where = dict(project=str(folder.parent.absolute()), name=folder.name, exist_ok=True, device="cpu", workers=0)

    def run() -> int:
        yolo.YOLO("yolo11n.yaml").train(data=str(data), epochs=epochs, imgsz=size, plots=False, verbose=False, **where)
        return epochs

    return timed(folder, run)


def open_theirs(folder: Path, size: int) -> TorchDetector:
    "The detector that ultralytics trained, to answer as PillSnap's do."
    network = load_ultralytics().YOLO(folder / "weights" / "best.pt").model
    return TorchDetector(network.float().fuse(verbose=False), size)


def timed(folder: Path, run: Callable[[], int]) -> dict[str, Any]:
    "Run a training that returns its epochs, or take what an earlier call wrote of it; with the processor's seconds."
    torch.set_num_threads(1)
    if not (kept := folder / "seconds.txt").is_file():
        began = time.process_time()
        epochs = run()
        kept.write_text(f"{time.process_time() - began:.1f} {epochs}")
    seconds, epochs = kept.read_text().split()
    return dict(seconds=float(seconds), epochs=int(epochs))


def answers(detector: Any, clone: Clone, truth: dict[str, np.ndarray], groups: dict[str, str]) -> list[dict[str, Any]]:
    "What a detector reports on photos with boxes, as the evaluation keeps it."
    lines = []
    for path, boxes in truth.items():
        got = open_image_safely(clone.read(path))
        if "image" not in got:
            raise PillsnapError(f"a photo cannot be read: {got['error']}", where=path)
        found, scores = detect(detector, got["image"], 0.001, 0.5, 300)
        lines.append(dict(part="clean", group=groups[path], boxes=found, confidence=scores, truth=boxes, photo=path))
    return lines


def figures(name: str, clone: Clone, lines: list[dict[str, Any]], seconds: float, note: str) -> list[Metric]:
    "Average precision, precision and recall with intervals by group of near-copies."
    by_name, prov = box_figures(lines), provenance(clone)
    n = len(lines)
    return [
        prov.metric(f"{name}_{k.removeprefix('detection_')}", f.point, n, seconds, note=f"{f.words()}; {note}")
        for k, f in by_name.items()
    ]


def measure(detector: Any, name: str, clone: Clone, note: str, photos: list[str] | None = None) -> list[Metric]:
    "A detector on all boxed photos of a clone, or on some of them."
    truth = boxes_of(clone, *TABLES[clone_key(clone)])
    truth = truth if photos is None else {p: truth[p] for p in photos}
    groups = dict(zip(truth, groups_of(clone, list(truth))))
    t0 = time.perf_counter()
    lines = answers(detector, clone, truth, groups)
    pills = sum(len(x["truth"]) for x in lines)
    return figures(name, clone, lines, time.perf_counter() - t0, f"{pills} pills; {note}")


def clone_key(clone: Clone) -> str:
    "The short name of a clone's repository."
    return "davidooff" if clone.source.repository.startswith("Davidooff") else "andrewtrainor"


def parts(clone: Clone, seed: int = 3) -> tuple[list[str], list[str]]:
    "Photos to fine-tune on, in random order, and photos to measure on: half each, whole groups of near-copies."
    truth = boxes_of(clone, *TABLES[clone_key(clone)])
    groups = dict(zip(truth, groups_of(clone, list(truth))))
    names = sorted(set(groups.values()))
    rng = np.random.default_rng(seed)
    mine = set(rng.permutation(names)[: len(names) // 2].tolist())
    tune = [p for p in truth if groups[p] in mine]
    return [tune[i] for i in rng.permutation(len(tune))], [p for p in truth if groups[p] not in mine]


def real_tree(folder: Path, clone: Clone, photos: list[str]) -> Path:
    "Real photos as a detector's folder; the first eighth chooses the epoch as well."
    shutil.rmtree(folder, ignore_errors=True)
    truth = boxes_of(clone, *TABLES[clone_key(clone)])
    for k, path in enumerate(photos):
        image, b = open_image_safely(clone.read(path))["image"], truth[path]
        boxes = np.concatenate([b[:, :2], b[:, 2:] - b[:, :2]], 1)
        for split in ("train", "val") if k < max(1, len(photos) // 8) else ("train",):
            write_photo(folder, split, f"r{k:05d}", image, boxes)
    return folder


def fine_tuned(a: argparse.Namespace, start: Path, clone: Clone) -> list[Metric]:
    "The detector after n real photos, and two that saw only these, trained by PillSnap and by ultralytics."
    out, (tune, rest) = [], parts(clone)
    for n in (int(x) for x in a.photos.split(",") if x.strip() and int(x)):
        tree = real_tree(a.work / f"real{n}", clone, tune[:n])
        epochs = max(4, a.tune_steps * 8 // n)
        for name, first in (("tuned", start), ("scratch", None), ("ultralytics", None)):
            folder = a.work / f"{name}{n}"
            if name == "ultralytics":
                told, detector = train_theirs(tree, folder, a.size, epochs), open_theirs(folder, a.size)
            else:
                told = train(plan(tree, folder, a.size, epochs, first), first)
                detector = open_detector(folder / "best.pt", lazy=False)
            note = f"{n} real photos, {told['epochs']} epochs, {told['seconds']:.0f} s of one core"
            out += measure(detector, f"{name}_{n}", clone, note, rest)
    note = "no real photo, on the same photos as the others"
    return out + measure(open_detector(start, lazy=False), "tuned_0", clone, note, rest)


def check_arguments(work: Path, own: dict[str, int]) -> None:
    "Keep what the photos and weights of a folder are made with; PillsnapError where it was something else."
    kept = ensure_dir(work) / "arguments.json"
    trained = any(work.glob("*/seconds.txt"))
    if (found := read_json(kept) if kept.is_file() else None) != own and (trained or found is not None):
        what = f"this folder was begun with {found or 'arguments that it does not say'}, and asked for is {own}"
        raise PillsnapError(what, where=work, fix="repeat those arguments, or name another folder with --work")
    save_json(own, kept)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--davidooff", type=Path, required=True, help="clone of Davidooff/AI-pill-detection")
    p.add_argument("--andrewtrainor", type=Path, help="clone of andrewtrainor/Pill_Object_Detection")
    p.add_argument("--work", type=Path, default=OUT / "rp2", help="folder of synthetic photos and weights")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP2.json")
    p.add_argument("--scenes", type=int, default=2000, help="synthetic photos to train on")
    p.add_argument("--epochs", type=int, default=8, help="of the synthetic training")
    p.add_argument("--size", type=int, default=256, help="side of the detector's input")
    p.add_argument("--also", default="", help="further sides of the input to answer at, such as 512")
    p.add_argument("--photos", default="0", help="real photos to fine-tune on, such as 0,16,64,256")
    p.add_argument("--tune-steps", type=int, default=200, help="steps of a fine-tuning, at least 4 epochs")
    a = p.parse_args()
    clones = [open_clone(k, c) for k, c in (("davidooff", a.davidooff), ("andrewtrainor", a.andrewtrainor)) if c]
    check_arguments(a.work, dict(scenes=a.scenes, epochs=a.epochs, size=a.size, tune_steps=a.tune_steps))
    tree = write_tree(a.work / "scenes", a.scenes, max(8, a.scenes // 11))
    told = train(plan(tree, a.work / "synthetic", a.size, a.epochs))
    note = f"{a.scenes} synthetic photos, {told['epochs']} epochs at {a.size} px in {told['seconds']:.0f} s of one core"
    weights, found = a.work / "synthetic" / "best.pt", []
    for clone in clones:
        detector = open_detector(weights, lazy=False)
        found += measure(detector, f"{clone_key(clone)}_zero_shot", clone, f"no real photo; {note}")
        for size in (int(x) for x in a.also.split(",") if x.strip()):
            detector.size = size
            words = f"no real photo; {note}, answers at {size} px"
            found += measure(detector, f"{clone_key(clone)}_zero_shot_{size}px", clone, words)
    if any(int(x) for x in a.photos.split(",") if x.strip()):
        found += fine_tuned(a, weights, clones[0])
    for m in found:
        print(m, m.note)
    path = write_result("RP2", __doc__.splitlines()[0], found, a.out, training=note)
    print(path)


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
