"""The pack: the same bytes however it was interrupted, and refused when it is not what it says."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.delivery.classmap import ClassMap
from pillsnap.photos import pack as P
from pillsnap.photos.caches import Photo, View
from pillsnap.photos.images import crop_view, open_image_safely, psnr, shrink
from pillsnap.photos.pack import Pack, Plan, build_pack, estimate_pack
from pillsnap.photos.stagepack import build_stage_pack, pack_settings

ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
}


def smooth(seed: int, w=61, h=80) -> np.ndarray:
    "A picture with structure at every scale; odd on purpose."
    small = np.random.default_rng(seed).integers(0, 256, (9, 7, 3), np.uint8)
    return np.array(Image.fromarray(small).resize((w, h), Image.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> SimpleNamespace:
    """100 photos with a box each, some at the edge; one is a text, one is missing, one has a box outside, one has
    three boxes."""
    root, rows, rng = tmp_path_factory.mktemp("photos"), [], random.Random(0)
    for i in range(100):
        Image.fromarray(smooth(i)).save(root / f"{i:03}.{'png' if i % 3 else 'jpg'}", quality=95)
        box = [rng.randrange(0, 40), rng.randrange(0, 55), rng.randrange(9, 21), rng.randrange(9, 25)]
        rows.append(dict(path=f"{i:03}.{'png' if i % 3 else 'jpg'}", bbox=json.dumps(box), class_key=f"K-{i % 5:06}"))
    (root / rows[10]["path"]).write_text("words")
    (root / rows[11]["path"]).unlink()
    rows[20]["bbox"] = "[6567, 8889, 3, 3]"
    rows += [{**rows[30], "bbox": b} for b in ("[1, 1, 9, 9]", "[30, 40, 12, 12]")]
    return SimpleNamespace(
        root=root,
        rows=pd.DataFrame(rows),
        cmap=ClassMap(sorted({r["class_key"] for r in rows})),
        good=[r for k, r in enumerate(rows) if k not in (10, 11, 20)],
    )


@pytest.fixture(scope="module")
def built(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "jpeg"
    build_pack(photos.rows, photos.root, out, workers=1, progress=False, manifest_hash="m" * 64, class_map=photos.cmap)
    return out


@pytest.fixture(scope="module")
def raw(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packs") / "raw"
    build_pack(photos.rows, photos.root, out, codec="raw", workers=1, progress=False)
    return out


def files(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.suffix in (".bin", ".arrow")
    }


def kept(folder: Path) -> dict[str, str]:
    "What the header says, without the hour."
    return {k: v for k, v in json.loads((folder / "pack.json").read_text()).items() if k not in ("made", "sha256")}


@pytest.mark.spec("BM7")
def test_the_raw_pack_holds_the_very_pixels(photos, raw):
    "Every photo at half scale, every crop as the photo itself would give it, at every padding up to the margin."
    pack = Pack(raw)
    for r in photos.good:
        full = open_image_safely(photos.root / r["path"])["image"]
        assert np.array_equal(pack.photo(r["path"]), shrink(full, 2))
        x, y, w, h = json.loads(r["bbox"])
        for padding in (0, 0.1, 0.17, 0.25):
            assert np.array_equal(
                crop_view(*pack.crop(r["path"], r["bbox"]), 32, padding),
                crop_view(full, [x, y, x + w, y + h], 32, padding),
            ), (r, padding)
    assert np.array_equal(pack.photo(photos.good[0]["path"], reduce=2), shrink(pack.photo(photos.good[0]["path"]), 2))


@pytest.mark.spec("BM6")
def test_the_jpeg_pack_is_the_photo_within_its_quality(photos, built, raw):
    a, b = Pack(built), Pack(raw)
    for r in photos.good:
        assert psnr(a.photo(r["path"]), b.photo(r["path"])) > 36
        (ours, box), (theirs, same_box) = (p.crop(r["path"], r["bbox"]) for p in (a, b))
        assert np.array_equal(ours, theirs) and np.array_equal(box, same_box), "a crop lost something"
    h, w, _ = b.photo(photos.good[0]["path"]).shape
    assert a.photo(photos.good[0]["path"], reduce=2).shape == (-(-h // 2), -(-w // 2), 3)
    assert (a.header["codec"], a.header["quality"], a.header["scale"]) == ("jpeg", 95, 0.5)


def test_skips_are_named_and_listed(photos, built):
    pack = Pack(built)
    text, gone, outside = (photos.rows.iloc[k] for k in (10, 11, 20))
    assert (
        pack.photo(text.path)["stage"] == "final"
        and pack.photo(gone.path)["stage"] == "read"
        and pack.crop(outside.path, outside.bbox)["stage"] == "crop"
    )
    assert isinstance(pack.photo(outside.path), np.ndarray)
    assert (
        set(pack.skipped["path"]) == {text.path, gone.path, outside.path}
        and pack.header["skipped"] == 3
        and len(pack) == 100
    )
    for got in (pack.photo("no/such.png"), pack.crop(text.path, "[0, 0, 1, 1]")):
        assert got["_skip"] and got["stage"] == "pack"


def test_order_and_workers_change_no_byte(photos, built, tmp_path):
    build_pack(
        photos.rows.sample(frac=1, random_state=1),
        photos.root,
        tmp_path / "p",
        workers=2,
        progress=False,
        manifest_hash="m" * 64,
        class_map=photos.cmap,
    )
    assert files(tmp_path / "p") == files(built) and kept(tmp_path / "p") == kept(built)


def test_a_finished_pack_is_found_and_not_made_again(photos, built, monkeypatch):
    monkeypatch.setattr(P, "photo_records", lambda *a: pytest.fail("opened a photo again"))
    head = build_pack(photos.rows, photos.root, built, progress=False, manifest_hash="m" * 64, class_map=photos.cmap)
    assert head == Pack(built).header
    with pytest.raises(PillsnapError, match="other photos, or of other settings"):
        build_pack(
            photos.rows, photos.root, built, quality=90, progress=False, manifest_hash="m" * 64, class_map=photos.cmap
        )


BUILD = textwrap.dedent("""
    import sys, pandas as pd
    from pillsnap.photos import pack
    {before}
    pack.build_pack(pd.read_json(sys.argv[1]), sys.argv[2], sys.argv[3], workers={workers}, progress=False, \
manifest_hash="m" * 64)
""")


def child(photos, out: Path, before="", workers=1, **kw) -> subprocess.Popen:
    table = out.parent / "rows.json"
    if not table.exists():
        photos.rows.to_json(table)
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            BUILD.format(before=textwrap.dedent(before).strip(), workers=workers),
            str(table),
            str(photos.root),
            str(out),
        ],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kw,
    )


@pytest.mark.spec("RS1")
def test_killed_anywhere_and_called_again(photos, tmp_path):
    """kill -9 after a random number of system-visible steps (records, renames, syncs); then the same call ends as
    if nobody had come by."""
    build_pack(photos.rows, photos.root, tmp_path / "quiet", workers=1, progress=False, manifest_hash="m" * 64)
    step = """
        import os, signal, random
        real, left = {w}, [{n}]
        def watched(*a, **k):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return real(*a, **k)
        {w} = watched"""
    rng = random.Random(1)
    for w, n in (
        ("pack.photo_records", rng.randrange(14, 112)),
        ("os.replace", 1),
        ("os.replace", 2),
        ("os.replace", rng.randrange(3, 8)),
        ("os.replace", 10),
        ("os.fsync", rng.randrange(3, 20)),
        ("pack._close", 1),
        ("pack.shutil.rmtree", 1),
    ):
        out = tmp_path / f"{w}{n}"
        p = child(photos, out, step.format(w=w, n=n))
        err = p.communicate()[1]
        assert p.returncode == -signal.SIGKILL, (w, n, err)
        whole = {f.name for f in out.glob("shard_*.bin")}
        assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in out.glob("shard_*.bin")} == {
            k: v for k, v in files(tmp_path / "quiet").items() if k in whole
        }, "a half-written shard under its final name"
        build_pack(photos.rows, photos.root, out, workers=1, progress=False, manifest_hash="m" * 64)
        assert (
            files(out) == files(tmp_path / "quiet")
            and kept(out) == kept(tmp_path / "quiet")
            and not list(out.rglob("*.partial"))
        ), (w, n)


@pytest.mark.spec("RS5")
def test_a_lost_worker_is_said_and_costs_its_shard(photos, tmp_path):
    before = """
        import os, pathlib
        real = pack.write_shard
        def dies(part, digest, k, root, out):
            if k == 1 and not (flag := pathlib.Path(out).parent/"died").exists(): flag.touch(); os._exit(9)
            return real(part, digest, k, root, out)
        pack.write_shard = dies"""
    p = child(photos, tmp_path / "p", before, workers=2)
    err = p.communicate()[1]
    assert (
        p.returncode == 1
        and "a worker was lost" in err
        and "the same command continues" in err
        and not (tmp_path / "p" / "pack.json").exists()
    )
    build_pack(photos.rows, photos.root, tmp_path / "p", workers=1, progress=False, manifest_hash="m" * 64)
    assert Pack(tmp_path / "p").verify() == []


@pytest.mark.spec("RS5")
@pytest.mark.parametrize("what, workers", (("full", 1), ("full", 2), ("handles", 1), ("read-only", 1)))
def test_a_disk_that_says_no(photos, tmp_path, what, workers):
    "Limits that bite root as well: a file may not grow, no file may be opened, a file system that refuses a rename."
    before = {
        "full": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))",
        "handles": (
            "import resource; real = pack._make_shards\n"
            "def few(*a):\n"
            "    resource.setrlimit(resource.RLIMIT_NOFILE, (4, 4)); real(*a)\n"
            "pack._make_shards = few"
        ),
        "read-only": (
            "import os, errno\n"
            "def refuse(a, b): raise OSError(errno.EROFS, 'Read-only file system')\n"
            "os.replace = refuse"
        ),
    }[what]
    said = {"full": "larger than this system allows", "handles": "too many files are open", "read-only": "read-only"}[
        what
    ]
    p = child(photos, tmp_path / "p", before, workers)
    err = p.communicate()[1]
    assert p.returncode == 1 and "PillsnapError" in err and said in err, err
    assert not (tmp_path / "p" / "pack.json").exists()
    build_pack(
        photos.rows, photos.root, tmp_path / "p", workers=1, progress=False, manifest_hash="m" * 64, class_map=None
    )
    assert Pack(tmp_path / "p").verify() == []


@pytest.mark.spec("RS5")
def test_the_machines_trouble_is_never_the_photos(photos, tmp_path):
    """With ever more file handles: an error each time, until there are enough; then no photo is called broken that
    is not."""
    before = """
        import resource
        from pillsnap.core.errors import PillsnapError
        real, hard, told = pack._make_shards, resource.getrlimit(resource.RLIMIT_NOFILE)[1], 0
        def few(*a):
            global told
            for n in range(3, 40):
                resource.setrlimit(resource.RLIMIT_NOFILE, (n, hard))
                try: real(*a); break
                except PillsnapError as e: told += "too many files are open" in str(e)
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard)); print("told", told > 1, flush=True)
        pack._make_shards = few"""
    p = child(photos, tmp_path / "p", before)
    out, err = p.communicate()
    assert (p.returncode, out) == (0, "told True\n"), err
    assert Pack(tmp_path / "p").header["skipped"] == 3
    with pytest.raises(PillsnapError, match="none of .* photos opens"):
        build_pack(photos.rows, tmp_path / "unmounted", tmp_path / "q", progress=False)

    def eio(*a, **k):
        return {"_skip": True, "stage": "read", "error": "Input/output error", "errno": errno.EIO}

    with pytest.MonkeyPatch.context() as m:
        m.setattr(P, "open_image_safely", eio)
        with pytest.raises(PillsnapError, match="input/output error"):
            build_pack(photos.rows, photos.root, tmp_path / "r", workers=1, progress=False)


@pytest.mark.spec("RS5")
def test_too_little_space_is_said_before_it_starts(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(P.shutil, "disk_usage", lambda p: SimpleNamespace(free=50_000))
    with pytest.raises(PillsnapError, match="GB are free"):
        build_pack(photos.rows, photos.root, tmp_path / "p", workers=1, progress=False)
    assert not list((tmp_path / "p").glob("shard*"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PillsnapError, match="not a folder|is a file|in the way"):
        build_pack(photos.rows, photos.root, tmp_path / "file" / "p", progress=False)


@pytest.mark.spec("RS5")
def test_opening_without_handles_is_said(built):
    code = (
        "import resource\n"
        "from pillsnap.photos.pack import Pack\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))\n"
        f"Pack({str(built)!r})"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV)
    assert r.returncode == 1 and "PillsnapError" in r.stderr and "too many files are open" in r.stderr, r.stderr


@pytest.mark.spec("RS7")
def test_two_builders_at_once(photos, tmp_path):
    "The second is told who is there; the first is not disturbed."
    p = child(
        photos,
        tmp_path / "p",
        (
            "import time; real = pack._close\n"
            "def slow(*a):\n"
            "    print('in', flush=True); time.sleep(30); return real(*a)\n"
            "pack._close = slow"
        ),
    )
    assert p.stdout.readline() == "in\n"
    with pytest.raises(PillsnapError, match=f"another run holds this folder \\(process {p.pid}\\)"):
        build_pack(photos.rows, photos.root, tmp_path / "p", progress=False)
    p.kill()
    p.wait()
    p.stdout.close()
    p.stderr.close()


@pytest.mark.spec("RS6")
def test_one_bit_is_noticed(photos, built, tmp_path):
    "40 bits over header and index stop the opening; one in a shard spoils one record or is found by `verify`."
    rng = random.Random(0)
    for name in ["index.arrow"] * 20 + ["pack.json"] * 20 + ["shard_00001.bin"] * 5:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(built, copy)
        data = bytearray((copy / name).read_bytes())
        at = rng.randrange(len(data) - 1)
        data[at] ^= 1 << rng.randrange(7)
        (copy / name).write_bytes(data)
        if name.startswith("shard"):
            try:
                pack = Pack(copy)
            except PillsnapError:
                assert at < len(P.MAGIC)
                continue
            assert pack.verify() == [name]
            bad = [
                r["path"]
                for r in photos.good
                for got in (pack.photo(r["path"]), pack.crop(r["path"], r["bbox"]))
                if isinstance(got, dict)
            ]
            assert len(bad) == 1
            assert (
                "checksum"
                in (
                    pack.photo(bad[0])
                    if isinstance(pack.photo(bad[0]), dict)
                    else next(
                        g
                        for r in photos.good
                        if r["path"] == bad[0]
                        for g in [pack.crop(r["path"], r["bbox"])]
                        if isinstance(g, dict)
                    )
                )["error"]
            )
        else:
            with pytest.raises(PillsnapError):
                Pack(copy)


@pytest.mark.spec("RS6")
def test_a_shard_cut_or_grown_is_refused_and_made_again(photos, built, tmp_path):
    "Refused by the reader; a builder that was interrupted trusts no shard whose length is not what its part says."
    for change in (lambda b: b[:-1], lambda b: b + b"x"):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(built, copy)
        shard = copy / "shard_00001.bin"
        shard.write_bytes(change(shard.read_bytes()))
        with pytest.raises(PillsnapError, match="changed after it was built"):
            Pack(copy)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(P, "_close", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_pack(
                photos.rows,
                photos.root,
                tmp_path / "p",
                workers=1,
                progress=False,
                manifest_hash="m" * 64,
                class_map=photos.cmap,
            )
    shard = tmp_path / "p" / "shard_00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    build_pack(
        photos.rows,
        photos.root,
        tmp_path / "p",
        workers=1,
        progress=False,
        manifest_hash="m" * 64,
        class_map=photos.cmap,
    )
    assert files(tmp_path / "p") == files(built)


def made_older(folder: Path, finished: bool) -> None:
    "Make a pack look like one of version 2, or like the rest of an interrupted build of that version."
    for name in ("pack.json", "plan.json"):
        note = json.loads((folder / name).read_text())
        assert note["schema"] == "pillsnap.pack/3"
        (folder / name).write_text(json.dumps(note | {"schema": "pillsnap.pack/2", "plan": "of before"}))
    if not finished:
        (folder / "pack.json").unlink()


def default_settings() -> dict:
    cfg = load_config("two_stage")
    return pack_settings(cfg.pack, cfg.data)


def stage_of(photos, root: Path) -> SimpleNamespace:
    parts = dict(train=photos.rows[:40], val=photos.rows[40:], eval_set=photos.rows[:0])
    return SimpleNamespace(**parts, class_map=photos.cmap, header={"data_hash": "m" * 64}, root=root, stage=0)


@pytest.mark.spec("RS6")
@pytest.mark.parametrize("finished", [True, False])
def test_an_earlier_versions_pack_is_refused_and_a_stage_builds_its_own_again(photos, tmp_path, finished):
    stage, settings = stage_of(photos, photos.root), default_settings()
    pack = build_stage_pack(stage, tmp_path, settings, workers=1, progress=False)
    first, out = files(pack.path), pack.path
    made_older(out, finished)
    with pytest.raises(PillsnapError, match="no pack of this version") as told:
        build_pack(photos.rows, photos.root, out, progress=False)
    assert f"remove the folder {out}" in str(told.value)
    with pytest.raises(PillsnapError, match="no pack of this version" if finished else "no finished pack"):
        Pack(out)
    with pytest.raises(PillsnapError, match="photos opens"):
        build_stage_pack(stage_of(photos, tmp_path / "away"), tmp_path, settings, workers=1, progress=False)
    assert P.is_older(out) and files(out) == first, "without the delivery the old pack is the only one"
    again = build_stage_pack(stage, tmp_path, settings, workers=1, progress=False)
    assert files(again.path) == first and not P.is_older(out) and len(again) == 100


@pytest.mark.spec("RS1")
@pytest.mark.parametrize("step", ["unlink", "rmtree"])
def test_killed_while_an_earlier_versions_pack_is_removed(photos, tmp_path, monkeypatch, step):
    "After any number of removed files the folder still counts as an earlier version's; the next call goes on."
    stage, settings = stage_of(photos, photos.root), default_settings()
    out = build_stage_pack(stage, tmp_path, settings, workers=1, progress=False).path
    first = files(out)
    where, real = (Path, Path.unlink) if step == "unlink" else (P.shutil, P.shutil.rmtree)
    for n in range(1, 8 if step == "unlink" else 2):
        made_older(out, finished=True)
        calls = itertools.count(1)

        def killed(*a, calls=calls, last=n, **k):
            if next(calls) == last:
                raise KeyboardInterrupt
            return real(*a, **k)

        with monkeypatch.context() as m:
            m.setattr(where, step, killed)
            with pytest.raises(KeyboardInterrupt):
                build_stage_pack(stage, tmp_path, settings, workers=1, progress=False)
        assert P.is_older(out), n
        assert files(build_stage_pack(stage, tmp_path, settings, workers=1, progress=False).path) == first


@pytest.mark.spec("RS6")
def test_nothing_is_unpickled(built, photos, tmp_path):
    "A pickle that stands where a record, the index or the header stood is refused; none is looked into."

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "boom"),)

    for name in ("index.arrow", "pack.json", "shard_00000.bin"):
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(built, copy)
        (copy / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(PillsnapError):
            Pack(copy)
    code = textwrap.dedent(f"""
        import sys
        from pillsnap.photos.pack import Pack
        sys.addaudithook(lambda event, args: (_ for _ in ()).throw(SystemExit("unpickled")) \
if event.startswith(("pickle.", "marshal.")) else None)
        p = Pack({str(built)!r}); [p.photo(x) for x in p.table["path"].to_pylist()]; print("clean")""")
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENV).stdout == "clean\n"
        and not (tmp_path / "boom").exists()
    )


def test_threads_read_what_one_reads(photos, built):
    pack, want = Pack(built), {r["path"]: Pack(built).photo(r["path"]) for r in photos.good}
    wrong = []

    def read(seed):
        for r in random.Random(seed).sample(photos.good, 60):
            if not np.array_equal(pack.photo(r["path"]), want[r["path"]]):
                wrong.append(r)

    ts = [threading.Thread(target=read, args=(k,)) for k in range(4)]
    for t in ts:
        t.start()
    for t in ts:
        t.join()
    assert not wrong


def test_opening_is_cheap_and_travels_by_its_path(built):
    "A worker gets the path; the index is searched where it lies, without a dict of names."
    pack = Pack(built)
    assert len(pickle.dumps(pack)) < 3000
    again = pickle.loads(pickle.dumps(pack))
    assert np.array_equal(again.photo("001.png"), pack.photo("001.png"))
    assert all(v.base is not None or not v.flags.owndata for v in pack._col.values()), "an index column was copied"


def test_more_than_is_stored_is_said(photos, built, tmp_path):
    def view(kind, size, padding=0.1):
        return SimpleNamespace(kind=kind, size=size, padding=padding)

    pack = Pack(built)
    assert pack.can_serve(view("whole", 31)) is True and pack.can_serve(view("crop", 400, 0.25)) is True
    no = pack.can_serve(view("whole", 32))
    assert not no and "32 pixels are asked for" in no and not pack.can_serve(view("crop", 8, 0.26))
    build_pack(photos.rows[:3], photos.root, tmp_path / "flat", crops=False, scale=1.0, workers=1, progress=False)
    flat = Pack(tmp_path / "flat")
    assert (
        flat.can_serve(view("whole", 61)) is True
        and flat.can_serve(view("whole", 500)) is True
        and "no crops" in flat.can_serve(view("crop", 8))
    )
    assert flat.photo("001.png").shape == (80, 61, 3)


@pytest.mark.spec("IM1")
@pytest.mark.parametrize("small", [2, 9])
def test_small_photos_are_read_from_their_files(tmp_path, caplog, small):
    "Of twelve photos a few have 40 pixels less than a view; they are served as without a pack, and the log says so."
    from pillsnap.dataset.sources import open_source

    sizes = [(121, 150)] * small + [(400, 480)] * (12 - small)
    rows = [
        dict(path=f"{i:02}.png", bbox="", class_key=f"K-{i % 3:06}", kind="single", width=w, height=h)
        for i, (w, h) in enumerate(sizes)
    ]
    for i, row in enumerate(rows):
        Image.fromarray(smooth(i)).resize((row["width"], row["height"])).save(tmp_path / row["path"])
    table, cmap = pd.DataFrame(rows), ClassMap(tuple({r["class_key"] for r in rows}))
    header = {"data_hash": "m" * 64}
    stage = SimpleNamespace(
        train=table[::2], val=table[1::2], eval_set=table[:0], class_map=cmap, header=header, root=tmp_path, stage=0
    )
    given = [f"paths.exp_dir={tmp_path / 'run'}", "pack.enabled=true", "data.classification.img_size=126"]
    with caplog.at_level("INFO", "pillsnap.dataset.sources"):
        source = open_source(stage, load_config("own", given))
    said = "2 small photos are read from their files" if small == 2 else "9 of 12 photos"
    assert said in caplog.text and (tmp_path / "run" / "artifacts").exists() == (small == 2)
    files, view = open_source(stage, load_config("own", [*given, "dataloader.source=delivery"])), View("whole", 161)
    for i, row in enumerate(rows):
        a, b = np.zeros((2, 161, 161, 3), np.uint8)
        photo = Photo(row["path"], "", row["width"], row["height"])
        assert source.view(photo, view, a) is None and files.view(photo, view, b) is None
        assert np.array_equal(a, b) if i < small or small == 9 else 0 < np.abs(a.astype(int) - b).mean() < 3
    with pytest.raises(PillsnapError, match="cannot serve the whole view"):
        open_source(stage, load_config("own", [*given, "dataloader.source=pack"]))


def test_the_estimate_is_near(photos, built):
    est = estimate_pack(photos.rows, photos.root, workers=1, sample=40)
    size = sum(s["bytes"] for s in Pack(built).header["shards"])
    assert (
        abs(est["bytes"] / size - 1) < 0.15
        and est["how"] == "estimated"
        and (est["photos"], est["sampled"]) == (100, 40)
    )


@pytest.mark.parametrize("scale", (1.0, 0.5, 0.3, 0.25))
def test_scales(photos, tmp_path, scale):
    build_pack(
        photos.rows[:4], photos.root, tmp_path / "p", scale=scale, codec="raw", crops=False, workers=1, progress=False
    )
    h, w, _ = Pack(tmp_path / "p").photo("001.png").shape
    assert abs(h - 80 * scale) <= 1 and abs(w - 61 * scale) <= 1


def test_the_pack_block_is_the_plans_default():
    "One set of defaults: the configuration and the plan."
    import inspect

    settings, sig = default_settings(), inspect.signature(Plan).parameters
    assert {k: sig[k].default for k in settings} == settings


def test_the_command(smoke_run, tmp_path, capsys):
    "Estimate, build, build again: by the command line, from a run's own splits and configuration."
    from pillsnap.cli import main
    from pillsnap.dataset.sources import open_source
    from pillsnap.dataset.splitfiles import load_split_data

    run = tmp_path / "run"
    shutil.copytree(smoke_run, run, symlinks=True, ignore=shutil.ignore_patterns("pack", "checkpoints", "export"))

    def main_ok(*a):
        return pytest.raises(SystemExit, main, list(a)).value.code in (0, None)

    assert (
        main_ok("pack", "--run", str(run), "--estimate")
        and "estimated from" in capsys.readouterr().out
        and not (run / "artifacts/stage0/pack").exists()
    )
    assert main_ok("pack", "--run", str(run), "--workers", "1") and "0 without a record" in capsys.readouterr().out
    stage = load_split_data(run, 0)
    pack = Pack(run / "artifacts/stage0/pack", stage.header["data_hash"], stage.class_map)
    for part in (stage.train, stage.val, stage.eval_set):
        for r in part.itertuples():
            assert isinstance(pack.photo(r.path), np.ndarray) and isinstance(pack.crop(r.path, r.bbox), tuple)
    assert (
        pytest.raises(SystemExit, main, ["pack", "--run", str(run), "--codec", "raw"]).value.code == 2
        and "other settings" in capsys.readouterr().err
    )
    first = files(pack.path)
    made_older(pack.path, finished=True)
    source = open_source(stage, load_config("smoke", [f"paths.exp_dir={run}", "pack.enabled=true"]))
    assert files(source.pack.path) == first and not P.is_older(pack.path), "training builds an earlier version's again"
