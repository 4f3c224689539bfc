"""RP3: the classifier beside three other trainers: same photos, split and input size, equal minutes of one core.

    python benchmarks/real/rp3_peers.py --abhiram CLONE --minutes 1,2

All train from scratch, each with its own defaults, for as many epochs as fit into the minutes (two short runs of its
own say how many), with one thread, and keep a checkpoint by their own rule on the same validation photos. One function
asks all of them about the same clean photos. timm and fastai train the network that PillSnap trains; ultralytics has
its own. The photos of the other three are shrunk beforehand, outside their minutes, because they open every photo in
every epoch; fastai's search for a learning rate is outside them, too. PillSnap opens the originals once, inside its
minutes. `--work` keeps every run: a second call goes on where the first stopped.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from folders import FOLDER, UNIT, difference, imported, split_by
from PIL import Image
from sources import OUT, Clone, open_clone, write_result

from pillsnap.core.device import pick_device
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import ensure_dir, read_json, save_json
from pillsnap.core.records import Metric, Provenance
from pillsnap.dataset.splitfiles import SplitData, load_split_data
from pillsnap.evaluation.answers import eval_photos, load_evaluator
from pillsnap.evaluation.intervals import share_words
from pillsnap.models.yolo import load_ultralytics
from pillsnap.training.classifier import ClassifierJob

PILOTS = 1, 4  # epochs of the two short runs that say how long an epoch takes
APART = 0.02  # what a trainer says of its checkpoint and what is counted here may differ by: other rounding, no more
SEED = 0
Predict = Callable[[pd.DataFrame], np.ndarray]  # rows with path and file → scores [n, C]


@dataclass(frozen=True)
class Task:
    "What all trainers get."

    tree: Path  # train/DRUG/*.jpg, val/DRUG/*.jpg and clean/DRUG/*.jpg, shrunk
    rows: dict[str, pd.DataFrame]  # train, val and clean: path, group, true, file
    size: int  # side of the network's input, pixels
    backbone: str  # of PillSnap, timm and fastai
    classes: tuple[str, ...]  # drugs
    a: argparse.Namespace  # of the command line
    first: Path  # the import


@dataclass(frozen=True)
class Trained:
    "What a trainer leaves behind."

    classes: Sequence[str]  # drugs in the order of its scores
    predict: Predict
    claimed: float  # what it says its checkpoint reaches on the validation photos
    curve: list[float]  # accuracy on them after each epoch
    seconds: float  # of the process, for training and choosing the checkpoint
    how: str  # network, optimizer, augmentation and rule of the checkpoint, for a note


def parts(data: SplitData) -> dict[str, pd.DataFrame]:
    "The photos of a split: path, group and drug of each, once."
    found = dict(train=data.train, val=data.val, clean=data.eval_set[data.eval_set["split"] == "clean"])
    named = {"group_id": "group", "class_key": "true"}
    return {k: t.drop_duplicates("path")[["path", *named]].rename(columns=named) for k, t in found.items()}


def shrunk(photo: Path, out: Path, side: int) -> Path:
    "A copy of a photo whose shorter side has at most so many pixels."
    with Image.open(photo) as page:
        page.draft("RGB", (2 * side, 2 * side))
        page = page.convert("RGB")
    scale = min(1.0, side / min(page.size))
    page.resize([max(1, round(v * scale)) for v in page.size], Image.Resampling.LANCZOS).save(out, quality=95)
    return out


def tree_of(clone: Clone, rows: dict[str, pd.DataFrame], folder: Path, side: int) -> dict[str, pd.DataFrame]:
    "The photos as a folder per part and drug; the rows with the file of each."
    found = {}
    for part, t in rows.items():
        files = []
        for k, (path, true) in enumerate(zip(t["path"], t["true"])):
            out = ensure_dir(folder / part / true) / f"{k:05d}.jpg"
            files.append(out if out.is_file() else shrunk(clone.folder / FOLDER / path, out, side))
        found[part] = t.assign(file=[str(f) for f in files])
    return found


def own_classifier(task: Task, epochs: int, folder: Path) -> Trained:
    "PillSnap: its training job with the preset for a person's own photos."
    folder, over = split_by(task.a, task.first, folder, "capture")
    job, began = ClassifierJob(str(folder), "own", over, epochs=epochs), time.process_time()
    job.run()
    seconds, report = time.process_time() - began, read_json(folder / "reports" / "classifier.json")
    data = load_split_data(folder, 0)
    evaluator = load_evaluator(folder, data, job.cfg.data, pick_device(), focus=job.cfg.inference.focus)
    photos = {p.path: p for p in eval_photos(data)}

    def predict(rows: pd.DataFrame) -> np.ndarray:
        found = evaluator.singles([photos[p] for p in rows["path"]])
        assert list(found.paths) == rows["path"].tolist()
        return found.single

    curve = [next(iter(r["views"].values()))["acc"] for r in report["history"]]
    c = job.cfg.train.classification
    turned = f"turned by up to {job.cfg.data.augment.classification.rotation:g} degrees"
    how = (
        f"{task.backbone}, AdamW {c.lr:g}, {c.scheduler}, batch {c.batch_size}, {turned}, moving average of the weights"
    )
    keys = [data.class_map.key(k) for k in range(len(data.class_map))]
    how = f"{how}, {c.amp_dtype}, {c.early_stopping.monitor} chooses"
    return Trained(keys, predict, curve[report["best_epoch"] - 1], curve, seconds, how)


def ultralytics_classify(task: Task, epochs: int, folder: Path) -> Trained:
    "Ultralytics: `classify train` of yolo11n-cls with its defaults."
    yolo = load_ultralytics(ensure_dir(folder))
    began = time.process_time()
    model = yolo.YOLO("yolo11n-cls.yaml")
    model.add_callback("on_train_start", lambda _: torch.set_num_threads(1))
    where = dict(project=str(folder), name="run", exist_ok=True, plots=False, verbose=False)
    model.train(
        data=str(task.tree),
        epochs=epochs,
        imgsz=task.size,
        device="cpu",
        workers=0,
        pretrained=False,
        seed=SEED,
        **where,
    )
    seconds = time.process_time() - began
    table = pd.read_csv(folder / "run" / "results.csv")
    best = yolo.YOLO(folder / "run" / "weights" / "best.pt")

    def predict(rows: pd.DataFrame) -> np.ndarray:
        asked = [
            best.predict(f, imgsz=task.size, device="cpu", verbose=False, save=False)[0].probs.data.numpy()
            for f in rows["file"]
        ]
        return np.stack(asked)

    how = "yolo11n-cls, optimizer auto, batch 16, RandAugment, mirrored, erased, top-1 and top-5 choose"
    claimed = float(model.trainer.metrics["metrics/accuracy_top1"])
    curve = table["metrics/accuracy_top1"].astype(float).tolist()
    return Trained([best.names[k] for k in range(len(best.names))], predict, claimed, curve, seconds, how)


def timm_loaders(task: Task, net: Any, batch: int = 128) -> tuple[Any, Any, Any]:
    "Loaders of timm's train.py: training, validation, and a function that opens a file as in validation."
    from timm.data import create_dataset, create_loader, create_transform, resolve_data_config

    seen = resolve_data_config({"input_size": (3, task.size, task.size)}, model=net)
    same = dict(input_size=seen["input_size"], mean=seen["mean"], std=seen["std"], num_workers=0)
    same |= dict(batch_size=batch, use_prefetcher=False, persistent_workers=False, device=torch.device("cpu"))
    train, val = (create_dataset("", task.tree, split=k, is_training=k == "train") for k in ("train", "val"))
    given = dict(interpolation=seen["interpolation"], crop_pct=seen["crop_pct"])
    pages = create_transform(seen["input_size"], mean=seen["mean"], std=seen["std"], **given)
    return (
        create_loader(train, is_training=True, interpolation="random", **same),
        create_loader(val, is_training=False, **given, **same),
        lambda f: pages(Image.open(f).convert("RGB")),
    )


def timm_recipe(task: Task, epochs: int, folder: Path) -> Trained:
    "timm: the loop of its train.py with that script's defaults."
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    torch.manual_seed(SEED)
    began = time.process_time()
    net = timm.create_model(task.backbone, pretrained=False, num_classes=len(task.classes))
    train, val, opened = timm_loaders(task, net)
    optimizer = create_optimizer_v2(net, "sgd", lr=0.1 * 128 / 256, weight_decay=2e-5, momentum=0.9)
    warm = dict(warmup_epochs=min(5, epochs - 1), warmup_lr=1e-5)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, **warm)
    loss, curve, best = LabelSmoothingCrossEntropy(0.1), list[float](), ensure_dir(folder) / "best.pt"
    for epoch in range(epochs):
        net.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss(net(images), labels).backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            hits = [(net(images).argmax(1) == labels).float() for images, labels in val]
        curve.append(float(torch.cat(hits).mean()))
        if curve[-1] >= max(curve):
            torch.save(net.state_dict(), best)
        schedule.step(epoch + 1)
    seconds = time.process_time() - began
    net.load_state_dict(torch.load(best, weights_only=True))

    def predict(rows: pd.DataFrame) -> np.ndarray:
        with torch.inference_mode():
            return np.concatenate([net(opened(f)[None]).numpy() for f in rows["file"]])

    number = val.dataset.reader.class_to_idx
    how = (
        f"{task.backbone}, SGD 0.05, cosine, batch 128, random crops, mirrored, colour jitter, smoothing, top-1 chooses"
    )
    return Trained(sorted(number, key=number.__getitem__), predict, max(curve), curve, seconds, how)


def fastai_learner(task: Task, epochs: int, folder: Path) -> Trained:
    "fastai: `vision_learner(pretrained=False)` as in its book: presizing, lr_find, fit_one_cycle, SaveModelCallback."
    from fastai.callback.schedule import lr_find  # noqa: F401 - a method of Learner
    from fastai.callback.tracker import SaveModelCallback
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, set_seed, vision_learner

    set_seed(SEED)
    augment = aug_transforms(size=task.size, min_scale=0.75)
    given = dict(item_tfms=Resize(2 * task.size), batch_tfms=augment, num_workers=0, device=torch.device("cpu"))
    dls = ImageDataLoaders.from_folder(task.tree, train="train", valid="val", **given)
    learn = vision_learner(dls, task.backbone, pretrained=False, metrics=accuracy, path=ensure_dir(folder))
    rate = folder.parent / "fastai_lr.json"
    with learn.no_bar(), learn.no_logging():
        if not rate.is_file():  # as many steps as ten epochs: not of its minutes
            save_json(dict(lr=float(learn.lr_find(show_plot=False).valley)), rate)
        began, lr = time.process_time(), read_json(rate)["lr"]
        learn.fit_one_cycle(epochs, lr, cbs=SaveModelCallback())
        curve = [float(row[2]) for row in learn.recorder.values]
        claimed = float(learn.validate()[1])
    seconds = time.process_time() - began

    def predict(rows: pd.DataFrame) -> np.ndarray:
        with learn.no_bar(), learn.no_logging():
            return learn.get_preds(dl=dls.test_dl(rows["file"].tolist()))[0].numpy()

    how = f"{task.backbone} with fastai's head, Adam {lr:.1g} by lr_find, one cycle, batch 64, aug_transforms, "
    return Trained(list(dls.vocab), predict, claimed, curve, seconds, how + "validation loss chooses")


TRAINERS: dict[str, Callable[[Task, int, Path], Trained]] = {
    "pillsnap": own_classifier,
    "ultralytics": ultralytics_classify,
    "timm": timm_recipe,
    "fastai": fastai_learner,
}


def named(task: Task, trained: Trained, part: str) -> pd.DataFrame:
    "The first name that a trainer gives to each photo of a part."
    rows = task.rows[part]
    scores = np.asarray(trained.predict(rows))
    if scores.shape != (len(rows), len(task.classes)) or set(trained.classes) != set(task.classes):
        raise PillsnapError(f"{scores.shape} scores for {len(rows)} photos of {len(task.classes)} drugs", where=part)
    names = [trained.classes[k] for k in scores.argmax(1)]
    return rows[["path", "group", "true"]].assign(answered=names)


def scored(task: Task, trained: Trained) -> pd.DataFrame:
    "The clean photos as a trainer names them; PillsnapError where its own accuracy is not the one counted here."
    val = named(task, trained, "val")
    counted = float((val["true"] == val["answered"]).mean())
    if abs(counted - trained.claimed) > APART:
        raise PillsnapError(
            f"the trainer says {trained.claimed:.3f} of the validation photos, {counted:.3f} are counted here",
            fix="its drugs stand in another order, or its photos are opened in another way",
        )
    return named(task, trained, "clean").assign(val=counted)


def epochs_that_fit(seconds: Sequence[float], limit: float) -> int:
    "Epochs of a run of so many seconds, from what the two short runs took; at least two."
    each = (seconds[1] - seconds[0]) / (PILOTS[1] - PILOTS[0])
    return max(2, round((limit - (seconds[0] - PILOTS[0] * each)) / max(each, 1e-3)))


def measured(task: Task, name: str, minutes: float, work: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    "What one trainer reaches in so many minutes; a finished run is read."
    folder, pilots = work / f"{name}_{minutes:g}min", work / f"{name}_pilots.json"
    if not (folder / "result.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        if not pilots.is_file():
            spent = [TRAINERS[name](task, n, work / f"{name}_pilot{n}").seconds for n in PILOTS]
            save_json(dict(seconds=spent), pilots)
        epochs = epochs_that_fit(read_json(pilots)["seconds"], 60 * minutes)
        trained = TRAINERS[name](task, epochs, folder)
        scored(task, trained).to_csv(folder / "clean.csv", index=False)
        kept = dict(epochs=epochs, seconds=trained.seconds, curve=trained.curve, how=trained.how)
        save_json(kept | dict(validation=trained.claimed), folder / "result.json")
    return pd.read_csv(folder / "clean.csv"), read_json(folder / "result.json")


def figures(
    found: dict[str, tuple[pd.DataFrame, dict[str, Any]]],  # trainer → its clean photos and its run
    minutes: float,
    prov: Provenance,
) -> list[Metric]:
    "Accuracy of each trainer, and PillSnap's lead over each of the others on the same photos."
    out = []
    for name, (t, run) in found.items():
        hit = t["true"] == t["answered"]
        told = f"{run['epochs']} epochs in {run['seconds']:.0f} s of one core; {run['how']}"
        note = f"{share_words(hit, t['group'], UNIT)}; {told}"
        out.append(prov.metric(f"accuracy_{name}_{minutes:g}min", float(hit.mean()), len(t), run["seconds"], note=note))
    mine = found["pillsnap"][0]
    for name, (t, run) in found.items():
        if name == "pillsnap":
            continue
        lead, words = difference(mine, t)
        note = f"{words}; PillSnap minus {name}, photo by photo"
        out.append(prov.metric(f"lead_over_{name}_{minutes:g}min", lead, len(t), run["seconds"], note=note))
    return out


def task_of(a: argparse.Namespace, clone: Clone) -> tuple[Task, Provenance]:
    "The photos of the first benchmark's split, as the trainers get them."
    first = imported(clone, a.work)
    folder, _ = split_by(a, first, a.work / "split", "capture")
    data = load_split_data(folder, 0)
    tree = a.work / f"photos_{a.size}"
    rows = tree_of(clone, parts(data), tree, 2 * a.size)
    classes = tuple(data.class_map.key(k) for k in range(len(data.class_map)))
    prov = Provenance(clone.data, clone.data_hash, data.class_map.fingerprint)
    return Task(tree, rows, a.size, "test_resnet", classes, a, first), prov


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--abhiram", type=Path, required=True, help="clone of abhiram-bogisetty/PillDetection")
    p.add_argument("--work", type=Path, default=OUT / "rp3", help="folder of the runs")
    p.add_argument("--out", type=Path, default=OUT, help="folder of RP3.json")
    p.add_argument("--minutes", default="1,2", help="of one core that each training gets; several: one table each")
    p.add_argument("--size", type=int, default=128, help="side of the input, pixels; ultralytics asks for steps of 32")
    a = p.parse_args()
    budgets = sorted(float(m) for m in a.minutes.split(","))
    a.minutes = 60 * max(budgets)  # the wall clock stops no run: its epochs were counted beforehand
    torch.set_num_threads(1)
    clone = open_clone("abhiram", a.abhiram)
    task, prov = task_of(a, clone)
    found, curves = list[Metric](), dict[str, Any]()
    for minutes in budgets:
        runs = {name: measured(task, name, minutes, a.work) for name in TRAINERS}
        found += figures(runs, minutes, prov)
        curves[f"{minutes:g}"] = {k: dict(seconds=r["seconds"], accuracy=r["curve"]) for k, (_, r) in runs.items()}
    for m in found:
        print(m, m.note)
    told = {k: len(t) for k, t in task.rows.items()}
    print(write_result("RP3", __doc__.splitlines()[0], found, a.out, photos=told, size=a.size, validation=curves))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
