"""The planner: what it foretells is what a small run then takes, and what it says of the rest is arithmetic on that."""

import errno
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pillsnap import planner as L
from pillsnap.core.config import load_config
from pillsnap.core.device import cpu_has_bf16
from pillsnap.core.errors import PillsnapError
from pillsnap.photos.images import whole_view
from pillsnap.photos.pack import Pack, build_pack
from pillsnap.planner import (
    MemoryFootprint,
    Probe,
    footprint,
    gpu_bytes,
    gpu_rate,
    make_plans,
    plan_stage,
    print_plan,
    probe,
    ram_plan,
    render_samples,
    step_peak,
    vram_table,
    walk_to_photos,
)

STATION = Probe(
    cpus=8,
    ram=128 << 30,
    ram_free=120 << 30,
    disk_free=2 << 40,
    sampled=24,
    data="manifest",
    photo_bytes=1.86e6,
    read_bytes_s=400e6,
    open_s=520.0,
    make_s=320.0,
    pack_s=2400.0,
    pack_bytes=106e3,
    worker_bytes=400 << 20,
    seconds=20.0,
)
CFG = load_config("two_stage")


@pytest.mark.spec("BX21")
def test_the_estimate_is_what_a_small_run_takes(tmp_path):
    "Size of the pack within a fifth; building and reading within a factor of three, on a machine that others use too."
    (tmp_path / "photos").mkdir()
    rows = render_samples(tmp_path / "photos", n=48, pills=2)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(L, "photos_to_probe", lambda *a: (tmp_path / "photos", rows.sample(12, random_state=0), "manifest"))
        seen = probe(CFG, run_root=tmp_path, seconds=1.6, workers=1)
    t0 = time.perf_counter()
    head = build_pack(rows, tmp_path / "photos", tmp_path / "pack", workers=1, progress=False)
    built = time.perf_counter() - t0
    assert abs(len(rows) * seen.pack_bytes / sum(s["bytes"] for s in head["shards"]) - 1) < 0.2
    pack, t0 = Pack(tmp_path / "pack"), time.perf_counter()
    for p in rows["path"]:
        whole_view(pack.photo(p), 384)
    read = time.perf_counter() - t0
    assert 1 / 3 < len(rows) / seen.make_s / built < 3 and 1 / 3 < len(rows) / seen.pack_s / read < 3, (
        seen,
        built,
        read,
    )
    assert abs(seen.photo_bytes / np.mean([(tmp_path / "photos" / p).stat().st_size for p in rows["path"]]) - 1) < 0.1
    assert seen.seconds < 60 and {p.name for p in tmp_path.iterdir()} == {"photos", "pack"}, (
        "the probe left something behind"
    )


@pytest.mark.spec("BX21")
def test_the_stages_are_arithmetic_on_the_rates():
    plans = make_plans(CFG, STATION, 315.0)
    assert plans.photos.tolist() == [5000, 25_000, 100_000, 500_000]
    four = plan_stage(CFG, STATION, 4, 315.0)
    assert (
        four.delivery_gb == pytest.approx(930)
        and four.pack_gb == pytest.approx(53)
        and four.feed_delivery == pytest.approx(400e6 / 1.86e6)
    )
    assert (
        four.epoch_pack == pytest.approx(500_000 * 0.85 / 315 / 3600)
        and four.epoch_delivery == pytest.approx(500_000 * 0.85 / (400e6 / 1.86e6) / 3600)
        and four.waits_for == "gpu"
    )
    assert four.pack_hours == pytest.approx(500_000 / (400e6 / 1.86e6) / 3600), "the disk is slower than the processors"
    assert plan_stage(CFG, replace(STATION, read_bytes_s=4e9), 4).pack_hours == pytest.approx(500_000 / 320 / 3600)
    assert plan_stage(CFG, STATION, 4).waits_for == "processors" and plan_stage(CFG, STATION, 4).feed_pack == 2400
    for key, worse in (("read_bytes_s", 40e6), ("open_s", 52.0)):
        assert plan_stage(CFG, replace(STATION, **{key: worse}), 4).epoch_delivery > 4 * four.epoch_delivery
    tight = plan_stage(CFG, replace(STATION, ram_free=20 << 30, read_bytes_s=20e6, disk_free=40e9), 4, 315.0)
    assert (tight.pack_cached, tight.waits_for, tight.pack_fits) == (False, "disk", False)


@pytest.mark.spec("TL17")
def test_the_memory_adds_up():
    for more in (
        [],
        ["dataloader.ram_optimization.cache_policy=hotset", "dataloader.ram_optimization.hotset_size_images=60000"],
    ):
        for seen in (STATION, replace(STATION, ram=16 << 30, ram_free=12 << 30)):
            t = ram_plan(load_config("two_stage", more), seen)
            assert t.bytes.sum() == seen.ram and set(t.how) <= {"measured", "estimated", "declared"}
    t = ram_plan(load_config("two_stage", more), STATION).set_index("use").bytes
    assert (
        t["hotset"] == 60_000 * 384 * 384 * 3
        and t["8 loader workers"] == 8 * (400 << 20)
        and t["4,096 views ahead"] == 8 * 8 * 64 * 384 * 384 * 3
    )
    assert t["pack in the page cache"] == 53e9


@pytest.mark.spec("BX21")
def test_what_is_declared_is_called_so():
    assert (
        gpu_rate("NVIDIA GeForce RTX 5080")[0] == 315
        and gpu_rate("rtx5080")[1].startswith("declared")
        and gpu_rate(None) == (None, "unknown: no GPU named")
        and gpu_rate("anything", 99.0)[0] == 99.0
    )
    with pytest.raises(PillsnapError, match="nobody has declared"):
        gpu_rate("RTX 9999")
    said = print_plan(CFG, replace(STATION, data="synthetic"), *gpu_rate("RTX 5080"))
    assert (
        "declared: RTX 5080 trains 315 to 420" in said
        and "synthetic photos" in said
        and "500,000" in said
        and "estimated: every stage" in said
    )
    assert "an epoch lasts as long as the loader needs" in print_plan(CFG, STATION, *gpu_rate(None))


@pytest.mark.spec("BX21")
def test_the_sealed_part_is_not_entered(delivery, monkeypatch):
    seen, real = [], os.listdir
    monkeypatch.setattr(L.os, "listdir", lambda p: (seen.append(Path(p)), real(p))[1])
    paths, inner = walk_to_photos(delivery, 24, (".png",)), walk_to_photos(delivery / "data", 24, (".png",))
    assert (
        len(paths) == 24 == len(set(paths))
        and all(p.startswith("data/train/images/") for p in paths)
        and all(p.startswith("train/images/") for p in inner)
        and inner
    )
    assert all("val" not in p.relative_to(delivery).parts for p in seen)
    assert walk_to_photos(delivery, 24, (".bmp",)) == []


@pytest.mark.spec("BX21", "SP4")
def test_a_sealed_root_is_refused_and_a_test_folder_passed_by(delivery, tmp_path):
    with pytest.raises(PillsnapError, match="sealed test"):
        walk_to_photos(delivery / "data" / "val", 24, (".png",))
    for s in ("val", "test", "photos"):
        (tmp_path / s).mkdir()
        (tmp_path / s / f"{s}.png").touch()
    assert walk_to_photos(tmp_path, 24, (".png",)) == ["photos/photos.png"]


@pytest.mark.spec("BX21", "SP4", "X74")
def test_no_photo_of_a_sealed_group_is_opened(delivery, tmp_path):
    """The whole probe under an audit hook, with every unsealed photo asked for; then a run of which everything is
    sealed."""
    from pillsnap.dataset.conversion import convert_delivery
    from pillsnap.dataset.splitfiles import sealed_groups
    from pillsnap.dataset.splits import SplitsJob
    from pillsnap.delivery.index import read_manifest

    run = tmp_path / "run"
    convert_delivery(delivery, run)
    assert sealed_groups(run) == set() and len(L._without_sealed(run)[0]) == len(
        read_manifest(run / "manifest.csv")[0]
    ), "before the first split nothing is sealed"
    SplitsJob(run_dir=str(run), config="smoke", near_duplicates=False).run()
    df, sealed = read_manifest(run / "manifest.csv")[0], sealed_groups(run)
    shut = df["group_id"].isin(sealed)
    assert sealed and {"single", "combo"} <= set(df.loc[shut, "kind"])
    rows = L.photos_to_probe(None, run, CFG.data.extensions, tmp_path, n=10**6)[1]
    assert set(rows["path"]) == set(df.loc[~shut, "path"]) and len(rows) == (~shut).sum(), (
        "every pill of a photo, and no photo of a sealed group"
    )
    code = (
        "import sys\nopened = []\n"
        "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None)\n"
        "from pillsnap import planner as L\nreal = L.photos_to_probe\n"
        "L.photos_to_probe = lambda *a: real(*a, n=10**6)\n"
        "L._everywhere = lambda job, *a, workers: ((r := job(*a))[0]/r[1], r[2])\n"
        "L.processes = lambda n: lambda jobs: None\n"
        f"print(L.probe(L.load_config('smoke'), run_root={str(run)!r}, seconds=8., workers=1).sampled)\n"
        "print(*{p for p in opened if p.endswith('.png')}, sep='\\n')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    n, *opened = out.stdout.splitlines()
    opened = {Path(p).name for p in opened}
    assert int(n) == df.loc[~shut, "path"].nunique() and opened == {Path(p).name for p in df.loc[~shut, "path"]}
    pd.DataFrame({"group_id": df["group_id"].unique(), "kind": "single", "photos": 1}).to_csv(
        run / "artifacts" / "test_known.csv", index=False
    )
    with pytest.raises(PillsnapError, match="shares a group with a sealed one"):
        probe(CFG, run_root=run, seconds=0.4, workers=1)


def test_the_disk_is_read_past_the_page_cache(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(1 << 20))
    told = []
    monkeypatch.setattr(L.os, "posix_fadvise", lambda *a: told.append(a[-1]))
    rate, size = L.read_rate([tmp_path / "a"] * 3, 5)
    assert told == [os.POSIX_FADV_DONTNEED] * 3 and size == 1 << 20 and rate > 0

    def refuse(fd):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(L.os, "fsync", refuse)
    assert L.read_rate([tmp_path / "a"], 5)[1] == 1 << 20, "a read-only delivery is read all the same"


def test_the_command(delivery, tmp_path, capsys):
    from pillsnap.cli import main

    for args, said in (
        (("--root", str(delivery)), "photos of this delivery"),
        (("--root", str(tmp_path)), "there is no photo here"),
    ):
        code = pytest.raises(
            SystemExit,
            main,
            [
                "plan",
                *args,
                "--run",
                str(tmp_path / "new"),
                "--config",
                "smoke",
                "--seconds",
                "0.4",
                "--gpu",
                "RTX 5080",
            ],
        ).value.code
        out = capsys.readouterr()
        assert said in out.out + out.err and code in ((0, None) if "this" in said else (2,))


IN_HALF = pytest.mark.skipif(not cpu_has_bf16(), reason="this CPU computes bf16 in float32 copies, which a GPU has not")


@pytest.mark.spec("BX21")
@pytest.mark.parametrize(
    "name, size, batch, half",
    [
        ("test_efficientnet", 64, 16, False),
        pytest.param("test_efficientnet", 64, 16, True, marks=IN_HALF),
        ("test_convnext", 64, 16, False),
        pytest.param("test_resnet", 96, 24, True, marks=IN_HALF),
    ],
)
def test_the_gpu_memory_is_what_a_small_training_step_takes(name, size, batch, half):
    "Against every allocation of a real step on the CPU: above it, and by less than two fifths."
    timm = pytest.importorskip("timm")
    net = timm.create_model(name, num_classes=10)
    f, real = footprint(net, size, half), step_peak(net, batch, size, half)
    assert real <= f.at(batch) < 1.4 * real, (f.at(batch) / 1e6, real / 1e6)
    n = sum(p.numel() for p in net.parameters())
    assert 16 * n <= f.fixed < 20 * n and footprint(net, size, half, ema=True).fixed - f.fixed == 4 * n
    assert f.most(f.at(17)) == 17 and f.most(0) == 0


@pytest.mark.spec("BX21")
def test_the_gpu_table_follows_the_settings(monkeypatch):
    "Batch overrides, headroom and the GPU's memory; what is not known is said to be unknown."
    monkeypatch.setattr(
        L,
        "footprint",
        lambda model, size, half, ema: MemoryFootprint(10**9, 1e6 * size / 384 * (1 if half else 2), 0.0),
    )
    t = vram_table(
        load_config("two_stage", ["train.stage_overrides={stage_4: {batch_size_override: 8}}"]),
        {"classifier": lambda n: n, "detector": lambda n: n},
        16 * 10**9,
    )
    cls, det = t[t.network == "classifier"], t[t.network == "detector"]
    assert (
        cls.batch.tolist() == [64, 64, 64, 8]
        and det.batch.tolist() == [16] * 4
        and cls["most that fit"].iloc[0] == int((0.88 * 16e9 - L.CUDA_BYTES - 1e9) // 1e6)
    )
    assert (
        "most that fit" not in vram_table(CFG, {"classifier": lambda n: n})
        and gpu_bytes("RTX 5080")[1].startswith("declared")
        and gpu_bytes("RTX 9999") == (None, "unknown: no GPU here, none named")
    )
    said = print_plan(CFG, STATION, *gpu_rate("RTX 5080"), t, gpu_bytes("RTX 5080")[1])
    assert (
        "on no GPU measured" in said
        and "most that fit" in said
        and "most that fit" not in print_plan(CFG, STATION, *gpu_rate("RTX 5080"))
    )


@pytest.mark.spec("BX21")
def test_what_is_measured_is_said_and_the_preparation_counts_into_the_seconds(tmp_path, monkeypatch):
    said, shares = [], []
    monkeypatch.setattr(L, "_everywhere", lambda job, *a, workers: (shares.append(a[-1]), (10.0, 1))[1])
    monkeypatch.setattr(L, "processes", lambda n: list)  # none is started
    seen = probe(CFG, run_root=tmp_path, seconds=30.0, workers=1, say=said.append)
    assert [re.sub(r" for .*|^\d+ ", "", s) for s in said] == [
        "photos to try are prepared",
        "the disk is read",
        "a small pack is made",
        "processes start",
        "photos are opened",
        "pack records are made",
        "the pack is read",
    ]
    assert len(set(shares)) == 1 and sum(shares) <= 30 - seen.seconds + 0.5, (shares, seen.seconds)
    assert "for" in said[-1]
