"""A planted leak is found: near-duplicates inflate the image split and leave the group split honest (SPEC BX1,
section 8)."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from pillsnap.core.config import load_config
from pillsnap.core.records import Provenance
from pillsnap.dataset.loaders import validation_loader
from pillsnap.dataset.splitfiles import SplitData, make_splits
from pillsnap.delivery.classmap import ClassMap
from pillsnap.training.leakgap import groups_on_both_sides, image_level_data, leak_gap_record

DRUGS, GROUPS, VIEWS, SIDE = 4, 18, 6, 12
CFG = load_config(
    "smoke",
    [
        f"data.classification.img_size={SIDE * 3}",
        "dataloader.ram_optimization.cache_policy=labels_only",
        "pack.enabled=false",
    ],
)


def draw(rng, drug, series, near_duplicates):
    "A photo: a faint sign of the drug, under a loud pattern that is the series' own, or the photo's own."
    sign = np.zeros((SIDE, SIDE))
    sign[drug * 2 : drug * 2 + 2] = 14
    loud = (series if near_duplicates else rng).normal(0, 40, (SIDE, SIDE))
    grey = np.clip(128 + sign + loud + rng.normal(0, 4, (SIDE, SIDE)), 0, 255).astype(np.uint8)
    return np.repeat(np.repeat(grey, 3, 0), 3, 1)[..., None].repeat(3, 2)


def delivery(root, near_duplicates, seed=0):
    "Photos with capture names; the rows of their manifest."
    rng, rows = np.random.default_rng(seed), []
    for d in range(DRUGS):
        for g in range(GROUPS):
            back, side, light = g % 3, g // 3 % 2, g // 6
            for v in range(VIEWS):
                path = f"K-{d + 1:06d}/K-{d + 1:06d}_0_{back}_{side}_{light}_70_{v * 20:03d}_200.png"
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw(rng, d, np.random.default_rng([seed, d, g]), near_duplicates)).save(root / path)
                rows.append(
                    dict(
                        path=path,
                        class_key=f"K-{d + 1:06d}",
                        kcode=f"K-{d + 1:06d}",
                        kind="single",
                        bbox=f"[0, 0, {SIDE * 3}, {SIDE * 3}]",
                    )
                )
    return pd.DataFrame(rows)


def stage_of(root, rows):
    s = make_splits(rows, split_ratio=(0.7, 0.3), test_known_ratio=0.0, seed=42)
    return SplitData(
        s.train,
        s.val,
        s.eval_set,
        ClassMap(s.classes),
        {"root": str(root), "source": "synthetic", "data_hash": "0" * 64, "params": s.params},
        0,
    )


def pixels(rows, stage):
    "What the classifier would see, as features."
    got = [(x.flatten(1).numpy(), y.numpy()) for x, y, _ in validation_loader(rows, stage, CFG, "whole")]
    return np.concatenate([x for x, _ in got]), np.concatenate([y for _, y in got])


def accuracy(stage, fresh=None):
    "A linear classifier, trained on the stage's train photos; scored on val, and on photos of series it never met."
    model = LogisticRegression(C=0.01, max_iter=200).fit(*pixels(stage.train, stage))
    out = [float(model.score(*pixels(stage.val, stage)))]
    return out + [float(model.score(*pixels(fresh, stage)))] if fresh is not None else out


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    "Accuracies with and without near-duplicates, by split."
    out = {}
    for planted in (True, False):
        root = tmp_path_factory.mktemp("leak")
        group = stage_of(root, delivery(root, planted))
        fresh = delivery(root / "fresh", planted, seed=1)
        fresh["path"] = "fresh/" + fresh["path"]
        image = image_level_data(group, 42)
        out[planted] = dict(
            zip(("group", "truth"), accuracy(group, fresh)),
            image=accuracy(image)[0],
            shared=groups_on_both_sides(image),
            own=groups_on_both_sides(group),
            n=(len(group.val), len(image.val)),
            trained=(len(group.train), len(image.train)),
        )
    return out


@pytest.mark.spec("BX1")
def test_a_planted_leak_inflates_the_image_split_and_not_the_group_split(figures):
    f = figures[True]
    assert f["n"][0] == f["n"][1] and f["trained"][0] == f["trained"][1]  # equal size
    assert f["shared"] > 0.95 and f["own"] == 0
    assert f["image"] > f["truth"] + 0.15, f  # it claims what it cannot do
    assert abs(f["group"] - f["truth"]) < 0.12, f
    assert f["truth"] > 1.2 / DRUGS, f  # and there is something to learn at all


@pytest.mark.spec("BX1")
def test_the_gap_follows_the_leak(figures):
    gap = {p: f["image"] - f["group"] for p, f in figures.items()}
    assert gap[True] - gap[False] > 0.05, gap
    assert abs(gap[False]) < 0.12, gap  # nothing planted, nothing found


@pytest.mark.spec("BX1", "BX2")
def test_the_record_carries_both_figures_and_their_provenance():
    prov = Provenance("synthetic", "a" * 64, "b" * 64)
    rec = leak_gap_record(dict(acc=0.7, n=120), dict(acc=0.95, n=118), prov, (30.0, 31.0), 0.9)
    assert (
        abs(rec["leak_gap"]["value"] - 0.25) < 1e-9
        and rec["leak_gap"]["n"] == 118
        and rec["leak_gap"]["seconds"] == 61.0
    )
    assert (rec["image_split"]["value"], rec["group_split"]["value"]) == (0.95, 0.7) and "90%" in rec["image_split"][
        "note"
    ]
