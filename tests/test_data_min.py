"""The data path in five checks, on one small rendered delivery: splits, samples, batches, loaders, meta (SPEC TL21)."""

import dataclasses
import json
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import RunFolder
from pillsnap.core.logs import logged_lines
from pillsnap.core.settings import AugmentClassification
from pillsnap.dataset import datasets as D
from pillsnap.dataset import loaders as L
from pillsnap.dataset.photoloader import PhotoLoader, _init_worker
from pillsnap.dataset.sampling import EpochSampler, balanced_weights
from pillsnap.dataset.sources import train_rows
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob
from pillsnap.delivery.classmap import ClassMap
from pillsnap.photos import caches as C
from pillsnap.photos.augmentation import DRAWS, build_transforms_classification, randaugment_ops, risky_settings
from pillsnap.photos.caches import PhotoCache, View, box_of
from pillsnap.photos.images import IMAGENET_MEAN, IMAGENET_STD, crop_view, normalise, open_image_safely, whole_view

SMALL = (
    "pack.enabled=false",
    "data.progressive_validation.stage_0.max_samples=null",
    "evaluation.min_eval_samples=6",
    "data.classification.img_size=64",
)


MANY = pd.DataFrame({"path": ["a.jpg"] * 5000})


@pytest.fixture(scope="module")
def stage(tmp_path_factory, delivery):
    "The shared delivery, converted and split; every photo of the stage."
    from pillsnap.dataset.conversion import convert_delivery

    root = tmp_path_factory.mktemp("datamin") / "run"
    convert_delivery(delivery, root)
    SplitsJob(near_duplicates=False)._cut(RunFolder(root), load_config("smoke", SMALL))
    return load_split_data(root, 0)


@pytest.fixture(scope="module")
def cfg():
    return load_config("smoke", SMALL)


@pytest.fixture()
def singles(stage):
    return stage.train[stage.train["kind"] == "single"].reset_index(drop=True)


# 1 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL21")
def test_1_splits_are_there_and_apart(stage):
    assert len(stage.train) and len(stage.val) and set(stage.val["path"]) <= set(stage.eval_set["path"])
    assert not set(stage.train["group_id"]) & set(stage.eval_set["group_id"])
    assert all((stage.root / p).is_file() for p in stage.train["path"])
    assert set(stage.train.loc[stage.train["kind"] == "single", "class_key"]) == set(stage.class_map)


# 2 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL21", "TL3", "X72")
def test_2_samples_are_what_is_served(stage, singles):
    "Validation shows exactly the two served views, with the class map's number."
    img = open_image_safely(stage.root / singles.path[3])["image"]
    for view, ref in (("whole", whole_view(img, 64)), ("crop", crop_view(img, box_of(singles.bbox[3]), 64, 0.1))):
        s = D.PillsnapClsDataset(singles, stage.class_map, stage.root, 64, view=view)[3]
        assert (
            set(s) == {"image", "label", "path"}
            and s["path"] == singles.path[3]
            and s["label"] == sorted(stage.class_map).index(singles.class_key[3])
        )
        assert np.array_equal(s["image"].numpy(), normalise(ref[None])[0])


@pytest.mark.spec("TL3")
def test_2_a_dataset_never_raises_in_an_epoch(stage, singles, tmp_path):
    (tmp_path / "text.png").write_text("no photo")
    (tmp_path / "cut.png").write_bytes((stage.root / singles.path[0]).read_bytes()[:5000])
    rows = pd.DataFrame(
        [
            dict(path=p, class_key=singles.class_key[0], bbox=b)
            for p, b in (
                ("gone.png", ""),
                ("text.png", ""),
                ("cut.png", ""),
                (str(stage.root / singles.path[0]), "[9000, 9000, 5, 5]"),
                (str(stage.root / singles.path[0]), "not json"),
            )
        ]
    )
    for train in (False, True):
        d = D.PillsnapClsDataset(rows, stage.class_map, tmp_path, 64, train=train, view="crop", crop_view_prob=1.0)
        got = [d[i] for i in range(len(d))]
        assert all(s["_skip"] and s["error"] and s["stage"] and s["path"] == p for s, p in zip(got, rows.path)), got
    det = D.PillsnapDetDataset(rows.assign(bbox="[1, 1, 5, 5]"), tmp_path, 64)
    assert [("_skip" in det[i]) for i in range(len(det))] == [
        p in ("gone.png", "text.png", "cut.png") for p in det.paths
    ]
    with pytest.raises(PillsnapError, match="K-999999"):
        D.PillsnapClsDataset(rows.assign(class_key="K-999999"), stage.class_map, tmp_path, 64)


@pytest.mark.spec("TL3")
def test_2_detection_boxes_move_with_the_letterbox(stage):
    "The box's corners in the square, taken back to the photo, are the manifest's."
    rows = stage.train[stage.train["kind"] == "combo"]
    d = D.PillsnapDetDataset(rows, stage.root, 160)
    s = d[0]
    want = np.array([box_of(b) for b in rows[rows["path"] == d.paths[0]]["bbox"]])
    h, w = open_image_safely(stage.root / d.paths[0])["image"].shape[:2]
    scale, dx, dy = 160 / max(h, w), (160 - round(w * 160 / h)) // 2, 0
    c = s["label"][:, 1:].numpy() * 160
    got = (np.c_[c[:, :2] - c[:, 2:] / 2, c[:, :2] + c[:, 2:] / 2] - [dx, dy, dx, dy]) / scale
    assert (
        np.allclose(got, want, atol=0.01)
        and s["image"].shape == (3, 160, 160)
        and s["image"].min() >= 0
        and s["image"].max() <= 1
    )
    assert len(want) >= 3


def check_windows_and_mirror(a, draws):
    "A window keeps most of the photo and nearly its shape, and half of the views are mirrored if that is asked for."
    tf = build_transforms_classification(64, a)
    w = tf.windows(draws, np.zeros(len(draws), bool))
    side = w[:, 2:] - w[:, :2]
    assert (
        side.prod(1).min() > 0.79
        and (side[:, 0] / side[:, 1]).min() >= 0.9
        and (side[:, 0] / side[:, 1]).max() <= 1.1
        and w.min() >= 0
        and w.max() <= 1
    )
    assert (
        abs(tf.flips(draws).mean() - 0.5) < 0.03
        and not build_transforms_classification(64, AugmentClassification(hflip=False)).flips(draws).any()
    )


def check_colours(draws):
    "Brightness, contrast and hue change the colours within their bounds, before they are normalised."
    grey = torch.full((512, 3, 8, 8), 100, dtype=torch.uint8)

    def only(**kw):
        return build_transforms_classification(
            8, AugmentClassification(**{"randaugment": False, "hflip": False, "color_jitter": (0, 0, 0, 0), **kw})
        )

    def back(x):
        return x * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)

    bright = back(only(color_jitter=(0.2, 0, 0, 0))(grey, draws[:512]))[:, 0, 0, 0] * 255
    assert (
        80 <= bright.min() + 0.1 < 82 and 118 < bright.max() < 120.1
    )  # brightness .8 to 1.2, on colours and not on normalised numbers
    assert (
        back(only(color_jitter=(0, 0, 0, 0.05))(grey, draws[:512])) * 255 - 100
    ).abs().max() < 0.1  # hue leaves grey alone
    white = back(only(color_jitter=(0.9, 0.9, 0.9, 0.05))((torch.rand(64, 3, 8, 8) * 255).byte(), draws[:64]))
    assert white.min() > -1e-5 and white.max() < 1 + 1e-5
    assert (
        torch.equal(only()(grey, draws[:512]), build_transforms_classification(8, train=False)(grey))
        or (only()(grey, draws[:512]) - build_transforms_classification(8, train=False)(grey)).abs().max() < 1e-5
    )


@pytest.mark.spec("TL1")
def test_2_training_views_are_augmented_bytes_then_normalised(stage, singles):
    """Crops keep the imprint, half are mirrored, colours change within their bounds and before normalisation;
    mirror and hue are warned of."""
    a, draws = AugmentClassification(), np.random.default_rng(0).random((4000, DRAWS))
    check_windows_and_mirror(a, draws)
    check_colours(draws)
    assert (
        any("mirror" in x for x in risky_settings(a))
        and any("hue" in x for x in risky_settings(a))
        and not risky_settings(AugmentClassification(hflip=False, color_jitter=(0, 0, 0, 0)))
    )
    policy = AugmentClassification(hflip=False, color_jitter=(0, 0, 0, 0), auto_augment="rand-m8-n2-mstd0.5")
    assert [x for x in risky_settings(policy) if "inverts" in x]
    s = D.PillsnapClsDataset(singles, stage.class_map, stage.root, 64, train=True, augment=a)[0]["image"]
    assert s.dtype == torch.float32 and s.shape == (3, 64, 64) and s.min() > -2.2 and s.max() < 2.7


@pytest.mark.spec("TL1", "X52")
def test_2_randaugment_draws_two_operations_that_keep_the_colour():
    draws = np.random.default_rng(1).random((5000, DRAWS))
    ops = randaugment_ops(draws, 331)
    names = set(ops[0][0])
    assert (
        len(ops) == 2
        and names == set(ops[1][0])
        and not names & {"Solarize", "Equalize", "AutoContrast"}
        and {"Rotate", "ShearX", "Sharpness", "Contrast"} <= names
    )
    for name, full in (("Rotate", 30), ("ShearX", 0.3), ("Brightness", 0.9), ("TranslateX", 150.0)):
        m = np.abs(ops[0][1][ops[0][0] == name])
        assert np.allclose(sorted(set(m.round(4))), [round(full * k / 30, 4) for k in (7, 8, 9)], atol=1e-3), name


# 3 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL21", "TL4")
def test_3_collate_keeps_the_good_and_names_the_rest(caplog):
    good = [{"image": torch.full((3, 8, 8), float(i)), "label": i, "path": f"{i}.png"} for i in range(3)]
    bad = {"_skip": True, "error": "broken", "stage": "final", "path": "x.png"}
    images, labels, meta = D.safe_collate([good[0], bad, good[2]])
    assert images[:, 0, 0, 0].tolist() == [0.0, 2.0] and labels.tolist() == [0, 2] and labels.dtype == torch.int64
    assert (
        meta == {"paths": ["0.png", "2.png"], "skipped": [{"path": "x.png", "stage": "final", "error": "broken"}]}
        and not caplog.messages
    )
    images, labels, meta = D.safe_collate([bad, bad])
    assert (
        len(images) == len(labels) == 0
        and meta["paths"] == []
        and len(meta["skipped"]) == 2
        and "all 2 photos of a batch were skipped" in caplog.text
    )


# 4 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL21", "TL6", "X66")
@pytest.mark.parametrize("batch", (4, 5, 7, 500))
def test_4_validation_drops_nothing_and_keeps_its_order(stage, batch):
    "Whatever the batch size, with drop_last: true and a weighted sampler asked for."
    cfg = load_config(
        "smoke",
        [
            *SMALL,
            f"train.classification.batch_size={batch}",
            "dataloader.drop_last=true",
            "data.imbalance.use_weighted_sampler=true",
            "data.imbalance.use_class_weights=false",
        ],
    )
    train_dl, val_dl, _ = L.build_classification_loaders(stage, cfg)
    seen = [p for *_, m in val_dl for p in m["paths"]]
    assert seen == stage.val[stage.val["kind"] == "single"]["path"].tolist() and not val_dl.drop_last
    assert type(val_dl.sampler).__name__ == "SequentialSampler"
    assert train_dl.drop_last == (len(train_dl.dataset) >= batch) and len(train_dl) >= 1


@pytest.mark.spec("TL5")
def test_4_threads_and_processes_deliver_the_same(stage, cfg):
    """One thread or three, or two spawned processes with a shared cache, two epochs: the same pictures in the same
    order, and other ones in the second epoch."""
    rows = stage.train.head(40)[lambda d: d["kind"] == "single"]
    none = L.classification_set(rows, stage, cfg, train=True, cache=False)
    cache = PhotoCache(rows, stage.root, list(none.views.values()), shared=True)
    assert cache.data.is_shared()
    many = L.classification_set(rows, stage, cfg, train=True, cache=cache)
    ways = [
        (none, {}),
        (none, dict(num_workers=1)),
        (many, dict(num_workers=3, prefetch_factor=3)),
        (many, dict(num_workers=2, engine="processes")),
    ]
    loaders = [PhotoLoader(d, 8, EpochSampler(d, 1), **kw) for d, kw in ways]
    epochs = []
    for _ in range(2):
        ((first, *others),) = [[list(loader) for loader in loaders]]
        for other in others:
            for (x, y, m), (x2, y2, m2) in zip(first, other, strict=True):
                assert m == m2 and torch.equal(x, x2) and torch.equal(y, y2)
        epochs.append({p: i for x, _, m in first for p, i in zip(m["paths"], x)})
    assert epochs[0].keys() == epochs[1].keys() and not any(torch.equal(epochs[0][p], epochs[1][p]) for p in epochs[0])


@pytest.mark.spec("TL5", "BX10")
@pytest.mark.parametrize("engine", ("threads", "processes"))
def test_4_a_position_in_mid_epoch_is_kept_exactly(stage, cfg, engine):
    """Stopped after every possible batch and resumed elsewhere: the two halves are the epoch; draws with
    replacement included."""
    d = L.classification_set(stage.train, stage, cfg, train=True)
    weights = balanced_weights(d.labels, len(stage.class_map))

    def new(**kw):
        return PhotoLoader(d, 16, EpochSampler(d, 5, weights), **kw)

    loader = new()
    straight = [x for _ in range(2) for x, *_ in loader]
    n = len(new())
    assert n >= 4
    for stop in [1, n] if engine == "processes" else range(1, n + 1):
        a, before = new(num_workers=2), []
        for k, (x, *_) in enumerate(a, 1):
            before.append(x)
            if k == stop:
                state = json.loads(json.dumps(a.state_dict()))
                break
        b = new(num_workers=1, engine=engine)
        b.load_state_dict(state)
        after = [x for x, *_ in b] + ([x for x, *_ in b] if stop < n else [])
        assert len(before) + len(after) == 2 * n
        assert not [
            (k, float((x - y).abs().max()))
            for k, (x, y) in enumerate(zip(before + after, straight))
            if not torch.equal(x, y)
        ]


@pytest.mark.spec("TL9")
def test_4_a_photo_that_is_drawn_twice_looks_different(stage, cfg, singles):
    d = L.classification_set(singles, stage, cfg, train=True)
    seen = {}
    for x, _, m in PhotoLoader(d, 16, EpochSampler(d, 5, [1.0] * 3 + [0.0] * (len(d) - 3))):
        for p, i in zip(m["paths"], x):
            seen.setdefault(p, []).append(i)
    assert len(seen) == 3 and all(not torch.equal(v[0], v[1]) for v in seen.values())


@pytest.mark.spec("TL4")
@pytest.mark.parametrize("workers", (0, 2))
def test_4_a_batch_of_broken_photos_stops_nobody(stage, cfg, tmp_path, workers, caplog):
    rows = stage.train[stage.train["kind"] == "single"].head(9)
    rows = rows.assign(path=[p if k not in (0, 3, 4, 5) else f"gone{k}.png" for k, p in enumerate(rows["path"])])
    loader = PhotoLoader(D.PillsnapClsDataset(rows, stage.class_map, stage.root, 64), 3, num_workers=workers)
    got = list(loader)
    assert [len(y) for _, y, _ in got] == [2, 3] and all(len(x) == len(y) == len(m["paths"]) for x, y, m in got)
    assert [[s["path"] for s in m["skipped"]] for *_, m in got] == [
        ["gone0.png"],
        ["gone3.png", "gone4.png", "gone5.png"],
    ] and "all 3 photos" in caplog.text
    assert [p for *_, m in got for p in m["paths"]] == [p for p in rows["path"] if "gone" not in p]


class Numbered(D.Source):
    "Photos that show their own number; those of `gone` do not open."

    def __init__(self, gone):
        self.gone = gone

    def view(self, photo, view, out, window=None, flip=False):
        n = int(photo.path)
        if n in self.gone:
            return {"_skip": True, "error": "gone", "stage": "open"}
        out[:] = n
        return None


@pytest.mark.spec("TL4", "BX10")
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 60),
    batch=st.integers(1, 9),
    drop=st.booleans(),
    gone=st.sets(st.integers(0, 59)),
    seed=st.integers(0, 3),
    workers=st.sampled_from((0, 2)),
    train=st.booleans(),
    data=st.data(),
)
def test_4_skips_keep_training_batches_full_and_the_position_exact(  # noqa: PLR0913 - hypothesis gives each by its name
    n, batch, drop, gone, seed, workers, train, data
):
    """Training: the photos that open, in the epoch's order, `batch` at a time. Validation: as cut. Both: a stop
    after any batch and another loader give the rest, and each skip is told once."""
    rows = pd.DataFrame({"path": [str(i) for i in range(n)], "class_key": "K-000059"})
    d = D.PillsnapClsDataset(rows, ClassMap(["K-000059", "K-000573"]), Numbered(gone), 8, train)

    def new():
        return PhotoLoader(d, batch, EpochSampler(d, seed), drop_last=drop, num_workers=workers, raw=True)

    order = EpochSampler(range(n), seed)
    order = list(order)
    cut = [order[k : k + batch] for k in range(0, n - n % batch if drop else n, batch)]
    good = [i for i in (order if train else sum(cut, [])) if i not in gone]
    want = (
        [good[k : k + batch] for k in range(0, len(good), batch)]
        if train
        else [[i for i in c if i not in gone] for c in cut]
    )
    want = [w for w in want if w and not (train and drop and len(w) < batch)]
    a, got = new(), []
    for x, _, m in a:
        got.append([int(i) for i in m["paths"]])
        assert x[:, 0, 0, 0].tolist() == got[-1]
    assert got == want and (train or set(a.skipped) == {str(i) for i in sum(cut, []) if i in gone})
    assert (a.state_dict()["epoch"], a.state_dict()["batch"], a.state_dict()["row"]) == (1, 0, 0)
    if not want:
        return
    stop, b, c, before, told = data.draw(st.integers(1, len(want))), new(), new(), [], []
    for _, _, m in b:
        before.append([int(i) for i in m["paths"]])
        told += m["skipped"]
        if len(before) == stop:
            break
    c.load_state_dict(json.loads(json.dumps(b.state_dict())))
    if b.state_dict()["epoch"] == 1:
        assert stop == len(want)
        return
    for _, _, m in c:
        before.append([int(i) for i in m["paths"]])
        told += m["skipped"]
    assert before == want and len({t["path"] for t in told}) == len(told)


@pytest.mark.spec("TL7", "X15")
def test_4_the_number_of_workers_is_measured(stage, cfg, monkeypatch, tmp_path):
    "Slow photos in every thread: more threads wait less, the choice and its table reach meta, the log and TensorBoard."
    monkeypatch.setattr(L, "AUTOTUNE_WARMUP", 1)
    monkeypatch.setattr(L, "AUTOTUNE_STEPS", 3)
    monkeypatch.setattr(L.os, "sched_getaffinity", lambda _: range(2))
    slow = D.MemorySource.view

    def late(self, *a, **kw):
        time.sleep(0.004)
        return slow(self, *a, **kw)

    monkeypatch.setattr(D.MemorySource, "view", late)
    monkeypatch.setattr(L, "worker_count", lambda *a: (1, "workers: 1"))
    tags = []
    tb = type("TB", (), {"add_scalar": lambda self, *a: tags.append(a), "add_text": lambda self, *a: None})()
    train_dl, _, meta = L.build_classification_loaders(
        stage, load_config("smoke", [*SMALL, "dataloader.autotune_workers=true", "dataloader.num_workers=1"]), tb=tb
    )
    times = {r["workers"]: r["data_time"] for r in meta["autotune"]}
    assert (
        list(times) == [0, 1, 2]
        and times[2] < times[0]
        and train_dl.num_workers == meta["num_workers"] == min(times, key=times.get)
        and ("perf/num_workers", train_dl.num_workers, 0) in tags
    )
    assert "autotune:" in L.summary(meta)[-1]


@pytest.mark.spec("TL5")
def test_4_a_worker_process_begins_with_generators_of_its_own():
    "numpy's and Python's generators follow torch's seed, which differs from worker to worker; one thread each."
    kept, threads, got = torch.get_rng_state(), torch.get_num_threads(), []
    try:
        for seed in (5, 6, 5):
            torch.manual_seed(seed)
            _init_worker(0)
            got.append((np.random.rand(), random.random(), torch.get_num_threads()))
    finally:
        torch.set_rng_state(kept)
        torch.set_num_threads(threads)
    assert got[0] == got[2] and got[0][0] != got[1][0] and got[0][1] != got[1][1] and got[0][2] == 1


@pytest.mark.spec("TL5")
def test_4_prefetch_per_stage_and_nothing_without_workers(monkeypatch):
    cfg = load_config(
        "two_stage", ["dataloader.num_workers=3", "train.stage_overrides={stage_2: {num_workers_override: 2}}"]
    )
    monkeypatch.setattr(L.os, "sched_getaffinity", lambda _: range(16))

    def options(s, d=cfg.dataloader):
        return L.loader_options(d, cfg.train.stage_overrides, s, MANY, False)

    assert [options(s)[0]["prefetch_factor"] for s in (1, 2, 3, 4)] == [4, 6, 8, 8]
    assert [options(s)[0]["num_workers"] for s in (1, 2)] == [3, 2]
    o, lines = options(1, load_config("two_stage", ["dataloader.num_workers=0"]).dataloader)
    assert (o["prefetch_factor"], o["persistent_workers"], o["multiprocessing_context"]) == (None, False, None)
    assert torch.cuda.is_available() or any("pin_memory: off" in x for x in lines)


def test_4_lightning_iterates_it_like_a_plain_loop(stage, cfg):
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    loader, _, _ = L.build_classification_loaders(stage, cfg)
    loader.sampler.set_epoch(0)
    plain = [(meta["paths"], images) for images, _, meta in loader]
    seen = []

    class Loop(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, len(stage.class_map))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, i):
            images, labels, meta = batch
            seen.append((meta["paths"], images.clone()))
            return torch.nn.functional.cross_entropy(self.net(images.mean((1, 2, 3), keepdim=False)[:, None]), labels)

    loader.sampler.set_epoch(0)
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Loop(), train_dataloaders=loader)
    assert [p for p, _ in seen] == [p for p, _ in plain] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(seen, plain, strict=True)
    )


def test_4_the_dataset_leaves_torchs_generator_alone(stage, singles):
    d = D.PillsnapClsDataset(singles, stage.class_map, stage.root, 64, train=True)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    d[0]
    [None for _ in PhotoLoader(d, 8, EpochSampler(d, 1), num_workers=2)]
    assert torch.equal(torch.rand(3), want)


# 5 -----------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL21", "TL10")
def test_5_meta_and_summary(stage, cfg):
    with logged_lines() as lines:
        _, _, meta = L.build_classification_loaders(stage, cfg)
    n = {k: int((getattr(stage, k)["kind"] == "single").sum()) for k in ("train", "val")}
    pills = train_rows(stage.train, stage.class_map, cfg.train.classification)
    assert (meta["train_count"], meta["val_count"], meta["test_count"], meta["img_size"]) == (
        len(pills),
        n["val"],
        stage.header["counts"]["test"]["singles"],
        64,
    )
    assert (
        meta["combo_crops"] == int((pills["kind"] == "combo").sum()) > 0
        and meta["train_count"] - meta["combo_crops"] == n["train"]
    )
    assert meta["class_names"] == sorted(stage.class_map) and meta["class_to_idx"] == {
        k: i for i, k in enumerate(sorted(stage.class_map))
    }
    assert (
        meta["splits_json"],
        meta["test_usage_policy"],
        meta["weights_used"],
        meta["sampler_used"],
        meta["skipped_files"],
    ) == ("artifacts/stage0/splits.json", "final_evaluation_only", "inv_freq", "none", [])
    assert (
        (
            f"{len(pills):,} train samples ({meta['combo_crops']:,} of them pills of combos) and {n['val']:,} val "
            "photos of 6 drugs at 64 px"
        )
        in "\n".join(lines)
        and "drop_last" in "\n".join(lines)
        and "prefetch" in "\n".join(lines)
    )


@pytest.mark.spec("TL10")
def test_5_meta_has_the_types_that_other_programs_read(stage, cfg):
    "Counts are integers, what was used for the balance is named, and the whole survives JSON."
    weighted = load_config(
        "smoke", [*SMALL, "data.imbalance.use_class_weights=false", "data.imbalance.use_weighted_sampler=true"]
    )
    effective = load_config("smoke", [*SMALL, "data.imbalance.method=effective_num"])
    by_class = load_config("smoke", [*SMALL, "project.family=retrieval", "data.imbalance.use_class_weights=false"])
    used = [("inv_freq", "none"), ("none", "weighted"), ("effective_num", "none"), ("none", "class_balanced")]
    for c, names in zip((cfg, weighted, effective, by_class), used):
        meta = L.build_classification_loaders(stage, c)[2]
        assert all(type(meta[k]) is int for k in ("train_count", "val_count", "test_count", "img_size")), meta
        assert (meta["weights_used"], meta["sampler_used"]) == names and json.loads(json.dumps(meta))[
            "class_to_idx"
        ] == meta["class_to_idx"]
        assert f"class weights {names[0]}, sampler {names[1]};" in "\n".join(L.summary(meta))
    assert meta["test_count"] == stage.header["counts"]["test"]["singles"] > 0


@pytest.mark.spec("TL10")
def test_5_skipped_files_are_named(stage, cfg, tmp_path):
    import shutil

    rows = stage.train[stage.train["kind"] == "single"]
    for p in stage.train["path"].unique():
        (tmp_path / p).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(stage.root / p, tmp_path / p)
    (tmp_path / rows["path"].iloc[2]).write_bytes(b"lost")
    spoilt = dataclasses.replace(stage, val=rows.head(4), header=stage.header | {"root": str(tmp_path)})
    train_dl, val_dl, meta = L.build_classification_loaders(spoilt, cfg)
    assert {e["path"] for e in meta["skipped_files"]} == {rows["path"].iloc[2]} and meta["skipped_files"][0][
        "stage"
    ] == "final"
    assert [len(m["skipped"]) for *_, m in val_dl] == [1]


# memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BX14")
def test_a_cache_that_does_not_fit_is_refused_and_said(stage, cfg, monkeypatch):
    "Before anything is allocated; the loaders then go on without it, with the reason in the log."
    rows = stage.train[stage.train["kind"] == "single"]
    with pytest.raises(PillsnapError, match="hotset_size_images=3 fits"):
        PhotoCache(rows, stage.root, [View("whole", 64)], budget=3 * 64 * 64 * 3 + 5)
    monkeypatch.setattr(C, "free_bytes", lambda shared: 1000)
    with logged_lines() as lines:
        train_dl, _, meta = L.build_classification_loaders(stage, cfg)
    assert train_dl.dataset.source.kept is None and meta["cached_bytes"] == 0 and "hotset: off" in "\n".join(lines)


def test_free_bytes_minds_shared_memory(monkeypatch):
    monkeypatch.setattr(C.psutil, "virtual_memory", lambda: type("M", (), {"available": 10**9})())
    monkeypatch.setattr(C.shutil, "disk_usage", lambda p: type("D", (), {"free": 64 << 20})())
    assert (C.free_bytes(False), C.free_bytes(True)) == (5 * 10**8, 32 << 20)


class Blank(D.Source):
    "No photo is opened: what is left is what a worker holds."

    def view(self, photo, view, out, window=None, flip=False):
        out[:] = len(photo.path)


@pytest.mark.spec("TL5")
def test_a_spawned_workers_memory_does_not_grow_with_the_rows():
    """
    What belongs to one worker alone, with 2,000 rows and with 300,000; the names alone are 30 MB.

    Only pages that the worker wrote are counted. Pages of libraries count as the worker's own until another process
    opens the same library, so that they come and go with what else the machine does.
    """

    def alone(n):
        names = [
            f"data/train/images/single/TS_{k % 81}_single/K-{k % 5000:06d}/K-{k % 5000:06d}_0_2_0_2_70_000_{k:06d}.png"
            for k in range(n)
        ]
        rows = pd.DataFrame(
            {
                "path": names,
                "class_key": "K-000250",
                "bbox": "[100, 200, 300, 400]",
                "width": 976,
                "height": 1280,
                "kind": "single",
            }
        )
        loader = PhotoLoader(
            D.PillsnapClsDataset(rows, ClassMap(["K-000250"]), Blank(), 16, train=True),
            1000,
            engine="processes",
            num_workers=1,
            raw=True,
        )
        before, it = {p.pid for p in psutil.Process().children()}, iter(loader)
        images, _, meta = next(it)
        assert [int(v) for v in images[:, 0, 0, 0]] == [len(p) for p in meta["paths"]]
        mine = [written(p.pid) for p in psutil.Process().children() if p.pid not in before]
        it.close()
        return max(mine) / 1e6

    def written(pid):
        lines = (Path("/proc") / str(pid) / "smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty:"))

    few, many = alone(2_000), alone(300_000)
    assert many < few + 15, (few, many)
