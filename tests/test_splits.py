"""Splits: what may not be parted stays together, whatever is fed in; stages nest; what is kept is checked."""

import json
import logging
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import copy_run

from pillsnap.core.errors import PillsnapError
from pillsnap.dataset import splitfiles
from pillsnap.dataset.assignment import image_level_split
from pillsnap.dataset.families import drop_small_photos, photo_id, stage_quotas
from pillsnap.dataset.grouping import group_keys, hold_out_drugs, tidy_records
from pillsnap.dataset.roles import StageQuota
from pillsnap.dataset.splitfiles import (
    load_split_data,
    load_splits,
    make_splits,
    sealed_groups,
)
from pillsnap.dataset.splits import SplitsJob, write_detector_tree
from pillsnap.delivery.index import read_manifest

QUIET = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
logging.getLogger("pillsnap.dataset.assignment").addFilter(
    lambda r: r.levelno > logging.WARNING
)  # the notices are asserted as `notes`


def delivery_of(drugs, combos, dups=()) -> pd.DataFrame:
    "Rows of a manifest: `drugs` lists the photos of each group of each drug."
    rows = [
        dict(path=f"s/K-{d:06d}_{g}_{v}.png", class_key=f"K-{d:06d}", kind="single", group_id=f"K-{d:06d}_{g}")
        for d, groups in enumerate(drugs)
        for g, n in enumerate(groups)
        for v in range(n)
    ]
    for c in range(combos):
        code = f"K-c{c:03d}"
        rows += [
            dict(path=f"c/{code}_{v}.png", class_key=f"K-{(c + k) % len(drugs):06d}", kind="combo", group_id=code)
            for v in range(3)
            for k in range(3)
        ]
    df = pd.DataFrame(rows).assign(dup_id="")
    for name, a, b in dups:
        df.loc[[a % len(df), b % len(df)], "dup_id"] = f"d{name}"
    return df


@st.composite
def deliveries(draw):
    drugs = draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=8), min_size=1, max_size=7))
    dups = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 10**6), st.integers(0, 10**6)), max_size=4))
    return delivery_of(drugs, draw(st.integers(0, 4)), dups)


def full(drugs=20, groups=18, views=4, combos=10) -> pd.DataFrame:
    return delivery_of([[views] * groups] * drugs, combos)


def sides(sp, df, group_by):
    "The groups of each part, as the splitter groups them."
    tidy = tidy_records(df)
    of = dict(zip(tidy["path"], group_keys(tidy, group_by)))
    return {k: {of[p] for p in getattr(sp, k)["path"]} for k in ("train", "val", "eval_set", "test")}


@pytest.mark.spec("BX1", "X46")
@QUIET
@given(
    deliveries(),
    st.sampled_from(["capture", "drug", "image"]),
    st.integers(0, 10**6),
    st.sampled_from([(0.85, 0.15), (0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (0.5, 0.5)]),
    st.one_of(st.none(), st.integers(2, 60)),
    st.integers(0, 40),
    st.booleans(),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_no_group_crosses(  # noqa: PLR0913 - hypothesis gives each by its name
    df, group_by, seed, ratio, samples, gate, stratified, sealed
):
    "No group lies on two sides, for every grouping, ratio, size and seed; no training group is evaluated."
    sp = make_splits(
        df,
        split_ratio=ratio,
        seed=seed,
        group_by=group_by,
        max_samples=samples,
        min_eval_samples=gate,
        stratified=stratified,
        test_known_ratio=sealed,
    )
    g = sides(sp, df, group_by)
    for a, b in combinations(("train", "val", "test"), 2):
        assert not g[a] & g[b], (a, b, g[a] & g[b])
    assert not g["eval_set"] & (g["train"] | g["test"])

    def part(name):
        return sp.eval_set[sp.eval_set["split"] == name]

    assert set(part("val")["path"]) == set(sp.val["path"]) and set(sp.eval_set["split"]) <= {"val", "calib", "clean"}
    tidy = tidy_records(df)
    of = dict(zip(tidy["path"], group_keys(tidy, group_by)))
    names = {k: {of[p] for p in part(k)["path"]} for k in ("val", "calib", "clean")}
    for a, b in combinations(names, 2):
        assert not names[a] & names[b], (a, b, names[a] & names[b])
    if not gate:
        assert set(sp.eval_set["split"]) <= {"val"}


@pytest.mark.spec("BX1")
@QUIET
@given(deliveries(), st.integers(0, 99))
def test_duplicates_stay_together(df, seed):
    "Photos of one duplicate set are all on one side, even from different groups and drugs."
    sp = make_splits(df, seed=seed)
    for _, d in df[df["dup_id"] != ""].groupby("dup_id"):
        where = {k for k in ("train", "val", "test") if set(getattr(sp, k)["path"]) & set(d["path"])}
        assert len(where) <= 1, where


@pytest.mark.spec("BX20", "SP5", "SP10")
@QUIET
@given(
    deliveries(),
    st.integers(0, 99),
    st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 4), st.integers(0, 30), st.integers(1, 6)), min_size=2, max_size=4
    ),
)
def test_stages_nest(df, seed, steps):
    "Classes and samples of a small stage lie in every larger one; no validation photo is ever trained on."
    quotas, n, c, combos = [], 0, 0, 0
    for i, (dn, dc, gate, more) in enumerate(steps, 1):
        n, c, combos = n + dn, c + dc, combos + more
        quotas.append(StageQuota(i, n, c, gate, combos))
    stages = [make_splits(df, seed=seed, quotas=quotas, stage=q.stage) for q in quotas]
    p = [{k: set(getattr(s, k)["path"]) for k in ("train", "val", "eval_set", "test")} for s in stages]
    for a, b in combinations(range(len(stages)), 2):
        assert set(stages[a].classes) <= set(stages[b].classes)
        assert (
            p[a]["train"] <= p[b]["train"]
            and p[a]["val"] <= p[b]["val"]
            and p[a]["eval_set"] <= p[b]["eval_set"]
            and p[a]["test"] == p[b]["test"]
        )
    for a in range(len(stages)):
        singles = sum((getattr(stages[a], k)["kind"] == "single").sum() for k in ("train", "val"))
        assert singles <= quotas[a].max_samples and len(stages[a].classes) <= quotas[a].max_classes
        assert (
            pd.concat([stages[a].train, stages[a].val]).query("kind == 'combo'")["path"].nunique()
            <= quotas[a].max_combos
        )
        for b in range(len(stages)):
            assert not p[a]["train"] & (p[b]["val"] | p[b]["eval_set"] | p[b]["test"])


@pytest.mark.spec("SP10")
@QUIET
@given(deliveries(), st.integers(0, 99), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(df, seed, rnd):
    "The same seed gives the same tables, however the rows came in."
    order = list(range(len(df)))
    rnd.shuffle(order)
    a, b = (make_splits(d, seed=seed, max_samples=20) for d in (df, df.iloc[order]))
    for k in ("train", "val", "eval_set", "test"):
        pd.testing.assert_frame_equal(getattr(a, k), getattr(b, k))
    assert a.params == b.params


@pytest.mark.spec("SP1")
@QUIET
@given(st.lists(st.integers(1, 12), min_size=2, max_size=12), st.integers(0, 99))
def test_a_drug_with_two_groups_is_trained_and_validated(groups, seed):
    "Two groups or more: at least one in val and one in train. One group: train, and a warning that names it."
    sp = make_splits(delivery_of([[2] * g for g in groups], 0), seed=seed)
    for i, g in enumerate(groups):
        k = f"K-{i:06d}"
        assert (sp.train["class_key"] == k).any()
        assert (sp.val["class_key"] == k).any() == (g > 1)
    single = [f"K-{i:06d}" for i, g in enumerate(groups) if g == 1]
    assert bool(single) == any("no photo in val" in n for n in sp.notes)
    if single:
        assert single[0] in next(n for n in sp.notes if "no photo in val" in n)


@pytest.mark.spec("SP10")
def test_samples_count_singles_and_combos_come_whole():
    "Without a quota of their own combos come all, in every stage, of any drug."
    quotas = [StageQuota(1, 50, 3), StageQuota(2, 300, 10)]
    a, b = (make_splits(full(), quotas=quotas, stage=i) for i in (1, 2))
    for s, q in ((a, quotas[0]), (b, quotas[1])):
        assert sum((x["kind"] == "single").sum() for x in (s.train, s.val)) == q.max_samples
        combos = set(pd.concat([s.train, s.val, s.test]).query("kind == 'combo'")["path"])
        assert combos == set(full().query("kind == 'combo'")["path"])
        assert set(s.train.query("kind == 'combo'")["class_key"]) - set(s.classes)
    assert set(a.train.query("kind == 'combo'")["path"]) == set(b.train.query("kind == 'combo'")["path"])


@pytest.mark.spec("SP10")
def test_combos_have_a_nested_quota_of_their_own():
    """Exactly so many photos, of any drug, with all their pills, .15 of them validating; every stage has all clean
    combos in its evaluation set; singles do not notice."""
    quotas = [StageQuota(1, 50, 3, 9, 20), StageQuota(2, 300, 10, 20, 60), StageQuota(3, 600, 20, 30)]
    s = [make_splits(full(combos=40), quotas=quotas, stage=q.stage) for q in quotas]
    combos = [
        {k: set(getattr(x, k).query("kind == 'combo'")["path"]) for k in ("train", "val", "eval_set", "test")}
        for x in s
    ]
    assert [(len(c["train"]), len(c["val"])) for c in combos[:2]] == [(17, 3), (51, 9)]
    clean = set(s[0].eval_set.query("kind == 'combo' and split == 'clean'")["path"])
    assert len(clean) == 18 and len(combos[2]["train"] | combos[2]["val"] | combos[2]["test"] | clean) == 120, (
        "the last stage takes all"
    )
    for c in combos:
        assert c["eval_set"] == c["val"] | clean
    for a, b in combinations(combos, 2):
        assert (
            a["train"] < b["train"]
            and a["val"] < b["val"]
            and not (a["train"] | b["train"]) & (a["eval_set"] | b["eval_set"])
        )
    assert (s[0].train.query("kind == 'combo'").groupby("path").size() == 3).all() and set(
        s[0].train.query("kind == 'combo'")["class_key"]
    ) - set(s[0].classes)
    plain = make_splits(full(combos=40), quotas=[q._replace(max_combos=None) for q in quotas], stage=1)
    for k in ("train", "val", "eval_set", "test"):
        assert list(getattr(plain, k).query("kind == 'single'")["path"]) == list(
            getattr(s[0], k).query("kind == 'single'")["path"]
        )
    with pytest.raises(PillsnapError, match="cannot hold the .* of the stage before"):
        make_splits(full(combos=40), quotas=[quotas[1], StageQuota(3, 600, 20, 0, 30)])


@pytest.mark.spec("SP10", "SP5")
def test_the_four_stages_bring_their_combos():
    from pillsnap.core.config import load_config

    def of(*more):
        return [(q.stage, q.max_combos) for q in stage_quotas(load_config("two_stage", list(more)))]

    first, second, third, last = (n for _, n in of())
    assert 0 < first < second < third and last is None, "each stage has more, the last has all"
    asked = [f"data.progressive_validation.stage_{i}.max_combos={700 + i}" for i in (1, 2, 3, 4)]
    assert of(*asked) == [(1, 701), (2, 702), (3, 703), (4, 704)]
    for demo in ("demo", "smoke"):
        assert [(q.stage, q.max_combos) for q in stage_quotas(load_config(demo))] == [(0, None)], (
            "the demo's combos are few and all are trained on"
        )


@pytest.mark.spec("SP10")
def test_seed_42_is_pinned():
    "The draw is fixed for ever: drugs of the first stage and a few of its photos."
    sp = make_splits(full(), seed=42, max_samples=40, max_classes=3)
    assert sp.classes == ["K-000002", "K-000010", "K-000012"]
    assert sorted(sp.val.query("kind == 'single'")["path"])[:2] == ["s/K-000002_13_2.png", "s/K-000010_15_2.png"]


@pytest.mark.spec("SG1", "X71", "X82")
def test_clean_photos_are_what_the_gate_asks_for():
    """Photos of groups that neither train, select nor calibrate, outside max_samples; where there are too few it is
    said."""
    sp = make_splits(full(), max_samples=600, max_classes=20, min_eval_samples=400)
    clean, calib = (sp.eval_set.query(f"kind == 'single' and split == '{k}'") for k in ("clean", "calib"))
    assert (len(clean), len(calib)) == (400, 200) and set(clean["class_key"]) == set(sp.classes) and not sp.notes
    assert (len(sp.train.query("kind == 'single'")), len(sp.val.query("kind == 'single'"))) == (510, 90)
    groups = [set(d["group_id"]) for d in (clean, calib, sp.train, sp.val, sp.test)]
    assert all(groups) and not any(a & b for a, b in combinations(groups, 2))
    short = make_splits(full(), max_samples=1300, min_eval_samples=400)
    clean = short.eval_set.query("kind == 'single' and split == 'clean'")
    assert (
        "NOT_ENOUGH_SAMPLES: the gate asks for 400 clean" in short.notes[0]
        and len(short.train.query("kind == 'single'")) >= 1000
    )
    assert clean.groupby("class_key")["group_id"].nunique().tolist() == [1] * 20, (
        "one group of every drug, and no more than training can spare"
    )
    every = make_splits(full(), min_eval_samples=100)
    n = {k: len(getattr(every, k).query("kind == 'single'")) for k in ("train", "val")}
    assert (every.eval_set.query("kind == 'single'")["split"] == "clean").sum() == 100 and abs(
        n["val"] / (n["train"] + n["val"]) - 0.15
    ) < 0.01


def test_an_interrupted_write_leaves_nothing_that_vouches(tmp_path, monkeypatch):
    "splits.json goes first and comes last: a half-written folder is no split."
    make_splits(full(), persist_path=tmp_path / "splits.json")
    monkeypatch.setattr(
        splitfiles,
        "_write_table",
        lambda df, path: (
            (_ for _ in ()).throw(OSError("disk full")) if "val" in path.name else df.to_csv(path, index=False)
        ),
    )
    with pytest.raises(OSError):
        make_splits(full(), persist_path=tmp_path / "splits.json", max_samples=100)
    with pytest.raises(PillsnapError, match="no finished split"):
        load_splits(tmp_path)


@pytest.mark.spec("BX1")
def test_the_image_split_leaks_and_the_group_split_does_not():
    sp = make_splits(full(combos=0))
    both = pd.concat([sp.train, sp.val])
    tr, va = image_level_split(both, (len(sp.train), len(sp.val)), 42)
    assert (len(tr), len(va)) == (len(sp.train), len(sp.val)) and not set(tr["path"]) & set(va["path"])
    assert len(set(va["group_id"]) & set(tr["group_id"])) > 0.9 * va["group_id"].nunique()
    assert set(tr["path"]) | set(va["path"]) == set(both["path"])
    assert va["class_key"].value_counts().between(9, 12).all()
    assert not set(sp.val["group_id"]) & set(sp.train["group_id"])
    pd.testing.assert_frame_equal(
        image_level_split(both.sample(frac=1, random_state=0), (0.85, 0.15), 3)[1],
        image_level_split(both, (0.85, 0.15), 3)[1],
    )


# on a real, rendered delivery ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, delivery):
    "The shared delivery, converted and split for the demo's stage."
    from pillsnap.dataset.conversion import convert_delivery

    root = tmp_path_factory.mktemp("splits") / "run"
    convert_delivery(delivery, root)
    job = SplitsJob(run_dir=str(root), config="smoke")
    return root, job.run()


@pytest.mark.spec("BX1")
def test_planted_near_duplicates_are_found_and_nothing_else(run, delivery):
    "Every planted copy is linked to its source, no other pair is, and no pair is parted."
    root, _ = run
    planted = {
        frozenset(Path(n[k]).name for k in ("source", "copy"))
        for n in json.loads((delivery / "SYNTHETIC.json").read_text())["near_duplicates"]
    }
    report = json.loads((root / "artifacts" / "duplicates.json").read_text())
    assert planted and {frozenset(Path(p).name for p in pair[:2]) for pair in report["pairs"]} == planted
    data = load_split_data(root, 0)
    for pair in planted:
        where = {k for k in ("train", "eval_set") if any(Path(p).name in pair for p in getattr(data, k)["path"])}
        assert len(where) <= 1


@pytest.mark.spec("SP6")
def test_no_photo_is_copied_and_the_saving_is_computed(run):
    root, res = run
    assert not [p for p in (root / "artifacts").rglob("*") if p.suffix in (".png", ".jpg")]
    assert not (root / "yolo_data").exists()
    s = json.loads((root / "reports" / "splits.json").read_text())["storage"]
    data = load_split_data(root, 0)
    paths = set(pd.concat([data.train, data.val])["path"])
    assert (
        s["photos_bytes"] == sum((data.root / p).stat().st_size for p in paths)
        and abs(s["saved"] - (1 - s["lists_bytes"] / s["photos_bytes"])) < 1e-12
    )
    assert any(f"{s['saved']:.2%} saved" in n for n in res.notes)


@pytest.mark.spec("SP5", "SP6")
def test_the_detector_sees_the_stage_and_only_it(run, tmp_path):
    "Its tree is a view made when it is asked for: linked, kept while the split stands, made anew after another."
    from pillsnap.core.jobs import RunFolder

    copy = tmp_path / "run"
    folder = RunFolder(copy_run(run[0], copy))

    def seen():
        y, data = write_detector_tree(folder, 0), load_split_data(copy, 0)
        for part in ("train", "val"):
            names = {p.stem for p in (y / "images" / part).iterdir()}
            assert (
                names
                == {Path(p).stem for p in getattr(data, part)["path"]}
                == {p.stem for p in (y / "labels" / part).iterdir()}
            )
        assert all(p.is_symlink() and p.exists() for p in (y / "images").rglob("*.png"))
        return y.stat().st_ino, len(list((y / "images" / "train").iterdir()))

    (first, n), (again, _) = seen(), seen()
    SplitsJob(
        run_dir=str(copy),
        config="smoke",
        overrides=("data.progressive_validation.stage_0.max_samples=60",),
        near_duplicates=False,
    ).run()
    (other, fewer) = seen()
    assert first == again != other and fewer < n


@pytest.mark.spec("BX20", "SP5")
def test_four_stages_in_one_folder(run):
    "Stages cut one after the other, as a user would; one cut with another seed is refused."
    root, _ = run
    sizes = [
        f"data.progressive_validation.stage_{i}.{k}={v}"
        for i, (n, c) in enumerate(((20, 2), (40, 4), (80, 6), (90, 6)), 1)
        for k, v in (("max_samples", n), ("max_classes", c))
    ]

    def cut(stage, *more, **kw):
        return SplitsJob(
            run_dir=str(root),
            config="smoke",
            overrides=(*sizes, "evaluation.min_eval_samples=8", *more),
            stage_n=stage,
            **kw,
        ).run()

    for stage in (2, 1, 4):
        cut(stage)
    d = {i: load_split_data(root, i) for i in (1, 2, 4)}
    assert [len(d[i].class_map) for i in (1, 2, 4)] == [2, 4, 6]
    for a, b in ((1, 2), (2, 4)):
        assert set(d[a].train["path"]) <= set(d[b].train["path"]) and set(d[a].class_map) <= set(d[b].class_map)
        assert not set(d[a].eval_set["path"]) & set(d[b].train["path"])
    with pytest.raises(PillsnapError, match="seal other groups|does not nest"):
        cut(2, seed=7)
    with pytest.raises(PillsnapError, match="does not nest"):
        cut(2, "data.split_ratio=[0.5, 0.5]")


@pytest.mark.spec("CF5")
def test_one_drug_alone_stops_in_words(run, tmp_path):
    from pillsnap.delivery.index import read_manifest, write_manifest

    root, _ = run
    df, head = read_manifest(root / "manifest.csv")
    write_manifest(
        df[(df["kind"] == "single") & (df["kcode"] == df["kcode"].min())],
        {k: v for k, v in head.items() if k not in ("data_hash", "rows", "columns")},
        tmp_path / "manifest.csv",
    )
    with pytest.raises(PillsnapError, match="single photos of 1 drug: telling drugs apart needs two"):
        SplitsJob(run_dir=str(tmp_path), config="smoke").run()
    assert not (tmp_path / "artifacts" / "stage0").exists()


@pytest.mark.spec("BX1")
def test_a_knot_of_duplicates_stops_and_shows(run, tmp_path):
    "Every photo of one drug the same: its groups are tied, the stage stops, the picture is there."
    from pillsnap.delivery.index import read_manifest, write_manifest

    root, _ = run
    df, head = read_manifest(root / "manifest.csv")
    mine = (df["kcode"] == df["kcode"].min()) & (df["kind"] == "single")
    df.loc[mine, "sha1"] = "0" * 40
    write_manifest(
        df, {k: v for k, v in head.items() if k not in ("data_hash", "rows", "columns")}, tmp_path / "manifest.csv"
    )
    with pytest.raises(PillsnapError, match="duplicates tie 18 photos together"):
        SplitsJob(run_dir=str(tmp_path), config="smoke", near_duplicates=False).run()
    assert (tmp_path / "reports" / "splits_duplicates.png").stat().st_size > 1000


MADE = ("artifacts", "stages", "yolo_data", "tb", "reports")  # what the splits job makes anew


def cut_again(run, to, *overrides):
    "The shared run's manifest, cut in another folder by the job with other settings."
    root, _ = run
    copy_run(root, to, *MADE)
    res = SplitsJob(run_dir=str(to), config="smoke", overrides=overrides, near_duplicates=False).run()
    return load_split_data(to, 0), res


@pytest.mark.spec("X46", "X81")
def test_the_job_groups_by_what_the_configuration_says(run, tmp_path):
    """capture: no group on two sides. image: groups are parted, and the job says so. drug: what validates is never
    trained."""
    capture, said = cut_again(run, tmp_path / "capture")
    assert (
        not set(capture.train["group_id"]) & set(capture.eval_set["group_id"])
        and "no group is on two sides" in said.verdict
    )
    image, said = cut_again(run, tmp_path / "image", "data.group_by=image")
    assert set(image.train["group_id"]) & set(image.eval_set["group_id"]) and not set(image.train["path"]) & set(
        image.eval_set["path"]
    )
    assert image.header["params"]["group_by"] == "image" and "leaks" in said.verdict
    drug, _ = cut_again(run, tmp_path / "drug", "data.group_by=drug")
    assert not set(drug.val.query("kind == 'single'")["class_key"]) & set(drug.train["class_key"])


@pytest.mark.spec("X74")
def test_the_job_seals_the_share_that_the_configuration_says(run, tmp_path):
    for ratio in (0.0, 0.05, 0.3):
        data, _ = cut_again(run, tmp_path / f"seal{ratio}", f"data.test_known_ratio={ratio}")
        sealed = data.header["counts"]["test"]["singles"]
        assert abs(sealed - ratio * 108) <= 3 and (ratio == 0) == (sealed == 0), (ratio, sealed)
        assert len(sealed_groups(tmp_path / f"seal{ratio}")) == data.header["counts"]["test"]["groups"]


@pytest.mark.spec("SP4")
def test_nothing_below_data_val_is_opened(run, tmp_path):
    "The stage, run under an audit hook, never opens a file of the sealed tree."
    import subprocess
    import sys

    root, _ = run
    code = (
        "import sys\nopened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "from pillsnap.dataset.splits import SplitsJob\n"
        f"SplitsJob(run_dir={str(tmp_path / 'run')!r}, config='smoke').run()\n"
        "bad = [p for p in opened if '/data/val/' in p]\n"
        "assert opened and not bad, bad[:3]\n"
        "print('clean', len(opened))"
    )
    copy_run(root, tmp_path / "run", *MADE)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and "clean" in out.stdout, out.stderr[-2000:]


FEW = settings(QUIET, max_examples=25)


# families, left-out drugs, decisions ---------------------------------------------------------------------------------


@pytest.mark.spec("BX9", "X46")
@FEW
@given(deliveries(), st.integers(0, 99), st.sampled_from([0.05, 0.3, 0.9]))
def test_left_out_drugs_are_nowhere_else(df, seed, share):
    """No left-out drug in any known photo, combos included; nothing is lost; a larger share holds the smaller one's
    drugs."""
    if df["class_key"].nunique() < 2:
        return
    try:
        known, out = hold_out_drugs(df, share, seed)
    except PillsnapError as e:
        assert "one drug" in str(e)
        return
    new = set(out.loc[out["kind"] == "single", "class_key"])
    assert (
        new
        and not new & set(known["class_key"])
        and len(known) + len(out) == len(df)
        and not set(known["path"]) & set(out["path"])
    )
    assert new <= set(hold_out_drugs(df, 0.95, seed)[1]["class_key"])
    tied = df[(df["kind"] == "single") & (df["dup_id"] != "")].groupby("dup_id")["class_key"].agg(set)
    assert all(not t & new or t <= new for t in tied)


@pytest.mark.spec("BX1", "BX9")
@FEW
@given(deliveries(), st.integers(0, 99), st.sampled_from([(0.85, 0.15), (0.7, 0.15, 0.15)]))
def test_by_drug_no_drug_is_trained_and_validated(df, seed, ratio):
    "group_by: drug. What val and test hold as singles appears in no training photo, not even in a combo."
    sp = make_splits(df, split_ratio=ratio, seed=seed, group_by="drug")

    def drugs(d):
        return set(d.loc[d["kind"] == "single", "class_key"])

    assert not drugs(sp.val) & set(sp.train["class_key"]) and not drugs(sp.test) & set(
        pd.concat([sp.train, sp.val])["class_key"]
    )


@st.composite
def id_folders(draw):
    "Records of a retrieval folder: some IDs appear in two classes, some hold a small photo."
    rows = []
    for i in range(draw(st.integers(3, 14))):
        for v in range(draw(st.integers(1, 4))):
            c = f"c{draw(st.integers(0, 2))}" if draw(st.booleans()) else f"c{i % 3}"
            rows.append(
                dict(
                    path=f"{c}/{i:04d}_{v}.jpg",
                    class_key=c,
                    kind="single",
                    group_id=photo_id(f"{c}/{i:04d}_{v}.jpg"),
                    width=draw(st.sampled_from([200, 224, 300])),
                    height=400,
                )
            )
    return pd.DataFrame(rows).drop_duplicates("path", ignore_index=True)


@pytest.mark.spec("SP9", "BX1")
@FEW
@given(id_folders(), st.integers(0, 99))
def test_an_id_is_in_one_split_and_a_small_photo_takes_its_id_along(df, seed):
    kept, notes = drop_small_photos(df, 224)
    small = set(df.loc[df["width"] < 224, "group_id"])
    assert set(kept["group_id"]) == set(df["group_id"]) - small and bool(notes) == bool(small)
    if kept.empty:
        return
    sp = make_splits(kept, split_ratio=(0.7, 0.15, 0.15), seed=seed)
    ids = [set(getattr(sp, k)["group_id"]) for k in ("train", "val", "test")]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2]) and set.union(*ids) == set(kept["group_id"])


def folder_of_ids(root: Path) -> Path:
    "Two classes of twenty IDs with two photos each; one photo of ID 7 of each class is too narrow."
    from PIL import Image

    rng = np.random.default_rng(0)
    for c in ("가나정", "다라정"):
        (root / c).mkdir(parents=True)
        for i in range(20):
            for v in range(2):
                Image.fromarray(rng.integers(0, 255, (230, 100 if (i, v) == (7, 1) else 230, 3), dtype=np.uint8)).save(
                    root / c / f"{c[0]}{i:03d}_{v}.jpg"
                )
    return root


@pytest.mark.spec("SP9")
@pytest.mark.filterwarnings("error:Glyph")  # Korean class names are drawn, not boxes
def test_a_folder_of_ids_becomes_a_split(tmp_path):
    """70:15:15 by ID through the stage itself; class names are checked; the test part is listed, not loaded by any
    stage."""
    shop = folder_of_ids(tmp_path / "shop")

    def job(*more):
        return SplitsJob(
            run_dir=str(tmp_path / "run"),
            config="smoke",
            overrides=(
                "project.family=retrieval",
                "evaluation.min_eval_samples=0",
                f"paths.root={json.dumps(str(shop))}",
                *more,
            ),
        )

    res = job().run()
    lists = json.loads((tmp_path / "run/artifacts/retrieval/splits.json").read_text())
    ids = {k: {photo_id(r["path"]) for r in rows} for k, rows in lists.items()}
    assert {k: len(v) for k, v in ids.items()} == {"train": 26, "val": 6, "test": 6} and len(
        set.union(*ids.values())
    ) == 38
    assert any("smaller than 224 pixels" in n for n in res.notes) and not {"가007", "다007"} & set.union(*ids.values())
    data = load_split_data(tmp_path / "run", 0)
    assert (
        data.class_map.keys == ("가나정", "다라정")
        and not {photo_id(p) for p in pd.concat([data.train, data.eval_set])["path"]} & ids["test"]
    )
    job("retrieval.min_image_size=64").run()
    assert "가007" in {
        photo_id(r["path"])
        for rows in json.loads((tmp_path / "run/artifacts/retrieval/splits.json").read_text()).values()
        for r in rows
    }
    job("evaluation.min_eval_samples=null").run()
    later = set(load_split_data(tmp_path / "run", 0).eval_set["split"])
    assert not {"clean", "calib"} & set(data.eval_set["split"]) and {"clean", "calib"} <= later, later
    with pytest.raises(PillsnapError, match="did you mean 가나정"):
        job('retrieval.class_names=["가나점","다라정"]').run()


def check_lists(lists: dict, card: dict) -> None:
    "Every row of the three lists has a path, a drug and its number in the sorted class map."
    assert set(lists) == {"train", "val", "test"} and all(
        set(r) == {"path", "label", "kcode"} for rows in lists.values() for r in rows
    )
    assert {r["kcode"]: r["label"] for rows in lists.values() for r in rows} == {
        k: i for i, k in enumerate(sorted(set(card["class_distribution"])))
    }


def check_augmentation(card: dict) -> None:
    "The card declares its source's augmentation, and says of each item whether it is applied, and if not, why."
    declared = {
        "rotation": 30.0,
        "color_jitter": [0.2, 0.2, 0.2, 0.1],
        "crop_scale": [0.8, 1.0],
        "crop_ratio": [0.9, 1.1],
        "blur_kernel": 5,
        "blur_sigma": [0.1, 2.0],
    }
    assert {k: v for k, v in card["augmentation"].items() if k != "applied"} == declared
    for block in ("preprocessing", "augmentation"):
        told = card[block]["applied"]
        assert set(told) == set(card[block]) - {"applied", "version"}
        assert all(v == {"applied": True} or (v["applied"] is False and len(v["why"]) > 10) for v in told.values())
    undone = {
        k for block in ("preprocessing", "augmentation") for k, v in card[block]["applied"].items() if not v["applied"]
    }
    assert undone >= {"crop_ratio", "blur_kernel", "blur_sigma"} and not undone & {"use_clahe", "interpolation", "mean"}


@pytest.mark.spec("SP7", "SP8")
def test_the_narrow_family_writes_its_two_files(run, tmp_path):
    root, _ = run
    narrow = tmp_path / "run"
    copy_run(root, narrow, *MADE)
    SplitsJob(
        run_dir=str(narrow),
        config="smoke",
        overrides=("project.family=narrow", "evaluation.min_eval_samples=0"),
        near_duplicates=False,
    ).run()
    lists, card = (json.loads((narrow / "artifacts/narrow" / f).read_text()) for f in ("splits.json", "manifest.json"))
    check_lists(lists, card)
    assert list(card) == [
        "dataset_name",
        "version",
        "created_date",
        "num_classes",
        "total_images",
        "splits",
        "class_distribution",
        "preprocessing",
        "augmentation",
    ]
    assert (
        card["num_classes"] == 6
        and card["total_images"] == 108 == sum(card["splits"].values())
        and abs(card["splits"]["test"] - 10.8) <= 4
    )
    check_augmentation(card)
    assert not (narrow / "yolo_data").exists()


@pytest.fixture
def decided(run, tmp_path):
    "A copy of the shared run's manifest, and what a stage cut of it with the decisions given."
    from pillsnap.dataset.overlay import Decision, Overlay

    root, _ = run
    copy = tmp_path / "run"
    copy_run(root, copy, *MADE)

    def cut(*decisions):
        for d in decisions:
            Overlay(copy).add(Decision(*d))
        return copy, SplitsJob(run_dir=str(copy), config="smoke", near_duplicates=False).run()

    return cut


@pytest.mark.spec("BX22")
def test_decisions_are_applied_before_the_split_and_counted(decided):
    """A dropped photo is in no part, a relabelled one carries its new drug, the manifest's file stays as it was,
    the stage is stale."""
    from pillsnap.core.jobs import why_stale

    copy, _ = decided()
    cfg = SplitsJob(run_dir=str(copy)).cfg
    assert why_stale(copy, "splits", cfg) is None
    raw, d = (copy / "manifest.csv").read_bytes(), load_split_data(copy, 0)
    one, two = (r for r in d.train.query("kind == 'single'").drop_duplicates("class_key").head(2).itertuples())
    combo = d.train.query("kind == 'combo'").iloc[0]
    _, res = decided(
        (one.path, one.class_key, "drop"),
        (two.path, two.class_key, "relabel", one.class_key),
        (combo.path, combo.class_key, "drop"),
        ("gone.png", "K-000001", "drop"),
    )
    d = load_split_data(copy, 0)
    everything = pd.concat([d.train, d.val, d.eval_set])
    assert not {one.path, combo.path} & set(everything["path"]) and (copy / "manifest.csv").read_bytes() == raw
    said = [n for n in res.notes if "overlay.jsonl" in n]
    assert said and "2 dropped (2 photos), 1 relabelled; 1 are about photos that are not in this delivery" in said[0]
    assert set(everything.loc[everything["path"] == two.path, "class_key"]) <= {one.class_key}
    assert not set(d.train["group_id"]) & set(d.eval_set["group_id"])
    assert not any("cut them again" in n or "cut it again" in n for n in res.notes)
    SplitsJob(run_dir=str(copy), config="smoke", near_duplicates=False, stage_n=1).run()
    _, res = decided((two.path, two.class_key, "keep"))
    assert any("stage1 of this folder was cut from other photos or labels" in n for n in res.notes)
    from pillsnap.dataset.overlay import Decision, Overlay

    Overlay(copy).add(Decision(two.path, two.class_key, "drop"))
    assert why_stale(copy, "splits", cfg) == ("its input overlay.jsonl changed", [])


def one_by_one(thumbs, drug):
    "Every pair of different drugs, held against each other."
    from pillsnap.dataset import duplicates as D

    h = D.dhash(thumbs)
    return [
        (i, j)
        for i, j in combinations(range(len(thumbs)), 2)
        if drug[i] >= 0 <= drug[j]
        and drug[i] != drug[j]
        and np.bitwise_count(h[i] ^ h[j]).sum() <= D.SAME_BITS
        and D.same_picture(thumbs[i], thumbs[j], D.SAME_MEAN, D.SAME_TAIL)
    ]


@pytest.mark.spec("BX1")
@FEW
@given(st.integers(0, 10**6), st.integers(1, 40))
def test_pictures_under_two_drugs_are_those_of_all_pairs(seed, n):
    """Copies, near copies, plain and black photos: as long as no photo has many partners, the search gives what
    comparing all with all gives."""
    from pillsnap.dataset import duplicates as D

    rng = np.random.default_rng(seed)
    base = [
        rng.integers(0, 256, (16, 16)).repeat(4, 0).repeat(4, 1) if k % 2 else np.full((64, 64), 3 * k)
        for k in range(max(1, n // 3))
    ]
    thumbs = np.stack(
        [(base[rng.integers(len(base))] + rng.integers(0, rng.integers(1, 4), (64, 64))).clip(0, 255) for _ in range(n)]
    ).astype(np.uint8)
    drug = rng.integers(-1, 9, n)
    want, got = one_by_one(thumbs, drug), D.twin_pairs(thumbs, drug)
    if np.bincount(np.array(want, int).ravel(), minlength=1).max() <= D.ENOUGH:
        assert got == want
    assert set(got) <= set(want) and all(
        sum(i in p for p in got) >= min(D.ENOUGH, sum(i in p for p in want)) for i in range(n)
    )


@pytest.mark.spec("BX1", "BM14")
def test_black_photos_cost_no_square(monkeypatch):
    """Fifteen hundred black photos under two hundred drugs, or a thousand of one drug and the rest of another:
    comparisons and pairs grow with the photos."""
    from pillsnap.dataset import duplicates as D

    looked, real = [], D.same_picture
    monkeypatch.setattr(D, "same_picture", lambda *a: looked.append(1) or real(*a))
    thumbs, at = np.zeros((1500, 64, 64), np.uint8), np.arange(1500)
    for drug in (at % 200, at // 1000):
        looked.clear()
        pairs = D.twin_pairs(thumbs, drug)
        assert len(looked) == len(pairs) <= D.ENOUGH * 1500 and len({i for p in pairs for i in p}) == 1500


@pytest.mark.spec("RS7")
def test_two_searches_in_one_folder_do_not_mix(run, tmp_path):
    from pillsnap.core.files import FolderLock
    from pillsnap.dataset import duplicates as D

    df, head = read_manifest(run[0] / "manifest.csv")
    with FolderLock(tmp_path), pytest.raises(PillsnapError, match="another run holds this folder"):
        D.find_duplicates(tidy_records(df).head(4), head["root"], tmp_path, progress=False)


@pytest.mark.spec("BX1")
def test_copies_are_looked_for_again_when_more_drugs_are_split(smoke_run, tmp_path):
    "The search of some drugs says nothing of the others."
    from pillsnap.dataset.duplicates import load_duplicates
    from pillsnap.delivery.index import read_manifest

    df, header = read_manifest(smoke_run / "manifest.csv")
    header = header | {"root": str((smoke_run / header["root"]).resolve())}
    df = tidy_records(df)
    two = sorted(df["class_key"].unique())[:2]
    load_duplicates(df[df["class_key"].isin(two)], header, tmp_path / "run")
    found, fresh = (load_duplicates(df, header, tmp_path / name) for name in ("run", "fresh"))
    assert found.pairs == fresh.pairs and len(fresh.pairs) > 0
    known = {tuple(sorted(p[:2])) for p in load_duplicates(df[df["class_key"].isin(two)], header, tmp_path / "a").pairs}
    assert known < {tuple(sorted(p[:2])) for p in fresh.pairs}
