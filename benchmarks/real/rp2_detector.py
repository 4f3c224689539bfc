"""RP2: the detector on real photos with boxes.

    python benchmarks/real/rp2_detector.py --davidooff CLONE --andrewtrainor CLONE

Zero-shot: trained on synthetic photos alone (benchmarks/real/scenes.py), small ones first and then at the size of the
answers; mAP@.5 on every boxed photo, on those that chose no setting of the training, and without the photos whose box
lies beside its pill (photos/davidooff.misplaced.txt); once as the photos are, and once with the answers on four views
of each put together (`data.detection.tta`). `--photos 16,64` fine-tunes copies on that many real photos of the first
set and measures them on the photos of other near-copy groups, beside two detectors trained from scratch with the same
photos and epochs: one by PillSnap, one by ultralytics' own training with its own settings. `--work` keeps photos and
weights: a second call with the same arguments goes on where the first stopped, and one with others is refused.
"""

import argparse
import copy
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import write_photo, write_tree
from sources import HERE, OUT, Clone, boxes_of, groups_of, misplaced, open_clone, provenance, write_result

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

CURVE = (75, 150, 300, 600)  # seconds of one core after which the detector is asked as well
EVERY = 10**6  # steps that a training should have, so that gradients are never summed over batches
CHOSEN_ON = 3  # one of so many groups of the first set chose the settings of the training

TABLES = {
    "davidooff": (("DataSet/train/_annotations.csv", "DataSet/valid/_annotations.csv"), ""),
    "andrewtrainor": (("all_labels.csv",), "images"),
}


@dataclass(frozen=True)
class Part:
    "One part of a training."

    size: int  # side of the input, pixels
    epochs: int  # as many as that, however the validation goes
    batch: int = 8  # photos a step
    lr: float = 2e-3  # of AdamW, to begin with
    mosaic: float = 0.3  # share of the photos that are joined with three others


def plan(tree: Path, folder: Path, part: Part) -> TrainPlan:
    "How a detector is trained on a folder of photos."
    over = [f"data.detection.img_size={part.size}", f"train.detection.epochs={part.epochs}", "train.num_threads=1"]
    over += [f"train.detection.lr={part.lr}", f"train.detection.batch_size={part.batch}"]
    over += [f"data.augment.detection.mosaic={part.mosaic}", "data.augment.detection.mixup=0"]
    over += ["train.detection.close_mosaic=2"]
    cfg = load_config("demo", over)
    device = pick_device()
    amp = select_amp_dtype(cfg.train.detection.amp_dtype, device)
    work = ensure_dir(folder / "ultralytics")
    load_ultralytics(work)
    data_hash = fingerprint(tree)
    assert data_hash is not None
    known = dict(config_snapshot=cfg.to_dict(), class_map=PILL.to_dict(), backbone=yolo_name("yolo11n"))
    fixed = known | dict(img_size=part.size, data_hash=data_hash)
    args = detector_args(DetectorSettings.from_config(cfg), tree, work, device, amp)
    rule = dict(patience=part.epochs, min_delta=0.0, mode="max")
    return TrainPlan("yolo11n", tree, folder, args, fixed, rule=rule, amp=amp, least_steps=EVERY)


def train(p: TrainPlan, start: Path | None = None, marks: Sequence[float] = ()) -> dict[str, Any]:
    "Train, or take what an earlier call trained; keeps the weights of the first epoch after each mark in seconds."
    hooks, began, left = {}, time.process_time(), sorted(marks)

    def keep(_: Any) -> None:
        took = time.process_time() - began
        if left and took >= left[0]:
            shutil.copy(p.folder / "last.pt", p.folder / f"after{took:.0f}.pt")
            left[:] = [m for m in left if m > took]

    hooks["on_model_save"] = keep
    if start is not None:
        weights = load_ckpt(start)
        state = weights.get("ema_state") or weights["model_state"]
        hooks["on_pretrain_routine_end"] = lambda t: [m.load_state_dict(state) for m in (t.model, t.ema.ema)]

    def run() -> int:
        for old in p.folder.glob("after*.pt"):  # of a call that was stopped
            old.unlink()
        return len(train_detector(p, hooks).history)

    return timed(p.folder, run)


def train_on_scenes(a: argparse.Namespace) -> tuple[str, dict[float, Path]]:
    "Train on rendered photos, small ones first; what was done in words, and weights by the seconds they took."
    tree = write_tree(a.work / "scenes", a.scenes, max(8, a.scenes // 40))
    first, last = a.work / "small", a.work / "synthetic"
    marks, found, begun, words, start = list(CURVE), {}, 0.0, [], None
    for folder, size, epochs, lr in ((first, a.first_size, a.first_epochs, 2e-3), (last, a.size, a.epochs, a.lr)):
        if not epochs:
            continue
        part = Part(size, epochs, lr=lr, mosaic=a.mosaic)
        told = train(plan(tree, folder, part), start, [m - begun for m in marks if m > begun])
        found |= {begun + float(p.stem.removeprefix("after")): p for p in folder.glob("after*.pt")}
        begun, start = begun + told["seconds"], folder / "best.pt"
        words.append(f"{told['epochs']} epochs at {size} px")
    note = f"{a.scenes} synthetic photos, {' and '.join(words)} in {begun:.0f} s of one core"
    return note, dict(sorted(found.items())) | {begun: last / "best.pt"}


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


def answers(
    detectors: Mapping[str, Any],  # by name
    clone: Clone,
    truth: Mapping[str, np.ndarray],  # photo → boxes
    groups: Mapping[str, str],  # photo → group of near-copies
    tta: bool = False,  # ask about four views of a photo
) -> dict[str, list[dict[str, Any]]]:
    "What detectors report on photos with boxes, as the evaluation keeps it; every photo is opened once."
    lines: dict[str, list[dict[str, Any]]] = {name: [] for name in detectors}
    for path, boxes in truth.items():
        got = open_image_safely(clone.read(path))
        if "image" not in got:
            raise PillsnapError(f"a photo cannot be read: {got['error']}", where=path)
        known = dict(part="clean", group=groups[path], truth=boxes, photo=path)
        for name, detector in detectors.items():
            found, scores = detect(detector, got["image"], 0.001, 0.5, 300, tta)
            lines[name].append(known | dict(boxes=found, confidence=scores))
    return lines


def figures(name: str, clone: Clone, lines: list[dict[str, Any]], seconds: float, note: str) -> list[Metric]:
    "Average precision, precision and recall with intervals by group of near-copies."
    by_name, prov = box_figures(lines), provenance(clone)
    n, pills = len(lines), sum(len(x["truth"]) for x in lines)
    return [
        prov.metric(
            f"{name}_{k.removeprefix('detection_')}", f.point, n, seconds, note=f"{f.words()}; {pills} pills; {note}"
        )
        for k, f in by_name.items()
    ]


def asked(
    detectors: Mapping[str, Any], clone: Clone, photos: Sequence[str] | None = None, tta: bool = False
) -> tuple[dict[str, list], float]:
    "Answers of detectors on all boxed photos of a clone, or on some of them; and the seconds that one took."
    truth = boxes_of(clone, *TABLES[clone_key(clone)])
    groups = dict(zip(truth, groups_of(clone, list(truth))))
    t0 = time.perf_counter()
    lines = answers(detectors, clone, truth if photos is None else {p: truth[p] for p in photos}, groups, tta)
    return lines, (time.perf_counter() - t0) / max(1, len(detectors))


def clone_key(clone: Clone) -> str:
    "The short name of a clone's repository."
    return "davidooff" if clone.source.repository.startswith("Davidooff") else "andrewtrainor"


def choosing(groups: Sequence[str], seed: int = 5) -> set[str]:
    "The groups whose photos chose the settings of the training: a third of them, drawn once."
    names = sorted(set(groups))
    return set(np.random.default_rng(seed).permutation(names)[: len(names) // CHOSEN_ON].tolist())


def sized(detector: Any, size: int) -> Any:
    "The same network, to answer at another size of the input."
    other = copy.copy(detector)
    other.size = size
    return other


def cleaned(  # noqa: PLR0913 - what figures() takes, and a test's lists
    key: str,  # short name of the source
    clone: Clone,
    lines: list[dict[str, Any]],  # the detector's answers on every photo
    seconds: float,
    note: str,
    lists: Path = HERE / "photos",  # the lists of the sources
    suffix: str = "",  # of the figures' names
) -> list[Metric]:
    "The figures on photos that chose no setting, on photos whose box is where the pill is, and on those that are both."
    chose, wrong = choosing([x["group"] for x in lines]), misplaced(key, lists)
    rest = [x for x in lines if x["group"] not in chose]
    main = f"{key}_zero_shot{suffix}"
    found = figures(f"{main}_rest", clone, rest, seconds, f"{note}; photos that chose no setting")
    for name, some in (("well_boxed", lines), ("rest_well_boxed", rest)):
        right = [x for x in some if x["photo"] not in wrong]
        left_out = f"{len(some) - len(right)} photos whose box lies beside its pill are left out"
        also = "; photos that chose no setting" if some is rest else ""
        found += figures(f"{main}_{name}", clone, right, seconds, f"{note}; {left_out}{also}")
    return found


def zero_shot(
    clone: Clone,
    weights: Mapping[float, Path],  # by the seconds that they took; the last is the detector
    also: Sequence[int],  # further sizes of the input to answer at
    note: str,
) -> tuple[list[Metric], list[dict[str, Any]]]:
    "The detector on all boxed photos, on those that chose no setting, and at other sizes; the curve of the training."
    *earlier, last = weights
    detector, key = open_detector(weights[last], lazy=False), clone_key(clone)
    detectors: dict[Any, Any] = {s: open_detector(weights[s], lazy=False) for s in earlier} | {last: detector}
    lines, seconds = asked(detectors | {f"{size}px": sized(detector, size) for size in also}, clone)
    note, main = f"no real photo; {note}", f"{key}_zero_shot"
    found = figures(main, clone, lines[last], seconds, note)
    if key == "davidooff":
        found += cleaned(key, clone, lines[last], seconds, note)
    views, seconds = asked({"": detector}, clone, tta=True)
    note_tta = f"{note}; four views of a photo, mirrored and smaller, are put together"
    found += figures(f"{main}_tta", clone, views[""], seconds, note_tta)
    if key == "davidooff":
        found += cleaned(key, clone, views[""], seconds, note_tta, suffix="_tta")
    for size in also:
        found += figures(f"{main}_{size}px", clone, lines[f"{size}px"], seconds, f"{note}, answers at {size} px")
    told = [(s, d.size, box_figures(lines[s])["detection_map50"].point) for s, d in detectors.items()]
    return found, [dict(photos=key, n=len(lines[last]), seconds=s, size=size, map50=v) for s, size, v in told]


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
    tune, rest = parts(clone)
    detectors = {"tuned_0": open_detector(start, lazy=False)}
    notes = {"tuned_0": "no real photo, on the same photos as the others"}
    for n in (int(x) for x in a.photos.split(",") if x.strip() and int(x)):
        tree = real_tree(a.work / f"real{n}", clone, tune[:n])
        epochs = max(4, a.tune_steps * 8 // n)
        for name, first, lr in (("tuned", start, 5e-4), ("scratch", None, 2e-3), ("ultralytics", None, None)):
            folder = a.work / f"{name}{n}"
            if name == "ultralytics":
                told, detector = train_theirs(tree, folder, a.size, epochs), open_theirs(folder, a.size)
            else:
                told = train(plan(tree, folder, Part(a.size, epochs, lr=lr)), first)
                detector = open_detector(folder / "best.pt", lazy=False)
            detectors[f"{name}_{n}"] = detector
            notes[f"{name}_{n}"] = f"{n} real photos, {told['epochs']} epochs, {told['seconds']:.0f} s of one core"
    lines, seconds = asked(detectors, clone, rest)
    return [f for name in detectors for f in figures(name, clone, lines[name], seconds, notes[name])]


def check_arguments(work: Path, own: dict[str, float]) -> None:
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
    p.add_argument("--scenes", type=int, default=2800, help="synthetic photos to train on")
    p.add_argument("--first-epochs", type=int, default=9, help="of the synthetic training, on small photos")
    p.add_argument("--first-size", type=int, default=160, help="side of the input in these, pixels")
    p.add_argument("--epochs", type=int, default=11, help="of the synthetic training, at the size of the answers")
    p.add_argument("--size", type=int, default=256, help="side of the detector's input, pixels")
    p.add_argument("--lr", type=float, default=1.5e-3, help="learning rate that these epochs begin with")
    p.add_argument("--mosaic", type=float, default=0.3, help="share of the synthetic photos joined with three others")
    p.add_argument("--also", default="", help="further sides of the input to answer at, such as 512")
    p.add_argument("--photos", default="0", help="real photos to fine-tune on, such as 0,16,64,256")
    p.add_argument("--tune-steps", type=int, default=128, help="steps of a fine-tuning, at least 4 epochs")
    a = p.parse_args()
    clones = [open_clone(k, c) for k, c in (("davidooff", a.davidooff), ("andrewtrainor", a.andrewtrainor)) if c]
    shaping = ("scenes", "first_epochs", "first_size", "epochs", "size", "lr", "mosaic", "tune_steps")
    check_arguments(a.work, {k: getattr(a, k) for k in shaping})
    note, weights = train_on_scenes(a)
    found, curve = [], []
    for clone in clones:
        more, line = zero_shot(clone, weights, [int(x) for x in a.also.split(",") if x.strip()], note)
        found, curve = found + more, curve + line
    write_result("RP2", __doc__.splitlines()[0], found, a.out, training=note, curve=curve)
    if any(int(x) for x in a.photos.split(",") if x.strip()):
        found += fine_tuned(a, list(weights.values())[-1], clones[0])
    for m in found:
        print(m, m.note)
    print(write_result("RP2", __doc__.splitlines()[0], found, a.out, training=note, curve=curve))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
