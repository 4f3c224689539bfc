"""Reading at size: the quick readers, the index, several processes, archives in pieces, labels alone, and what the
campaigns and benchmarks rest on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pyarrow as pa
import pytest
from terminal import search_path

from pillsnap.core.errors import PillsnapError
from pillsnap.dataset.conversion import convert_delivery, index_labels
from pillsnap.dataset.matching import discover_detection_data
from pillsnap.dataset.yolotree import check_yolo_tree
from pillsnap.delivery import truth
from pillsnap.delivery.annotations import AnnotationReader, parse_json, read_by_keys
from pillsnap.delivery.archives import extract_archive, extract_archives
from pillsnap.delivery.classmap import ClassMap
from pillsnap.delivery.faults import FaultReason
from pillsnap.delivery.index import COLUMNS, Index, read_index, read_manifest, write_index
from pillsnap.delivery.names import archives_in
from pillsnap.delivery.tree import find_delivery, index_photos, label_files, sealed_codes, walk_tree
from pillsnap.delivery.truth import audit, check_labels, equal_parts, merge, read_part
from pillsnap.synth.writer import write_delivery

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "PYTHONPATH": search_path(ROOT)}


def script(path):
    "A script as a module."
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    "5,100 annotations of six drugs and some combinations, without photos."
    out = tmp_path_factory.mktemp("labels")
    write_delivery(
        out / "d",
        drugs=6,
        photos=840,
        combos=6,
        seed=5,
        width=244,
        height=320,
        labels_only=True,
        progress=False,
        workers=1,
    )
    return out / "d"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, faulty_delivery):
    "A small delivery with every fault, and its conversion."
    run = tmp_path_factory.mktemp("faulty") / "run"
    return faulty_delivery, convert_delivery(faulty_delivery, run), run


# ---- one answer, whichever way it is found
# ---------------------------------------------------------------------------------------------


@pytest.mark.spec("BM1", "RS3")
def test_quick_and_careful_reader_agree_on_damaged_files():
    got = script("scripts/campaigns/rs3_annotations.py").campaign(700, seed=11)
    assert (
        got["failed"] == 0 and sum(v for k, v in got["counts"].items() if k.startswith("json_") or k == "read") == 700
    )
    assert (
        got["counts"]["read"] > 50
        and len([k for k in got["counts"] if k.startswith("json_")]) >= 4
        and got["counts"]["name refused"] > 20
    )


@pytest.mark.spec("BM1")
def test_a_drugs_words_are_believed_byte_for_byte_only(labels, tmp_path):
    files = label_files(labels / "data/train/labels/single")[0][:3]
    read = AnnotationReader()
    first, second = read(files[0]), read(files[1])
    assert first.drug is second.drug and first.photo != second.photo
    text = Path(files[2]).read_text("utf-8")
    p = tmp_path / "x.json"
    p.write_text(text.replace(first.drug.dl_company, first.drug.dl_company + "!"), encoding="utf-8")
    changed = read(p)
    assert changed.typed and changed.drug is not first.drug and changed.drug.dl_company.endswith("!")
    p.write_text(
        text.replace('"id": 1\n\t\t}\n\t],\n\t"type"', '"id": 1,\n"dl_name": "다른 약"\n\t\t}\n\t],\n\t"type"'),
        encoding="utf-8",
    )
    assert "다른 약" in p.read_text("utf-8") and read(p).drug.dl_name == "다른 약", "a key told twice is not overlooked"


@pytest.mark.spec("BM1")
def test_drugs_in_turn_and_words_in_other_places_are_read_as_alone(labels, tmp_path):
    "A reader looks first where the file before had its drug's words."
    by_drug = {}
    for f in label_files(labels / "data/train/labels/single")[0]:
        by_drug.setdefault(Path(f).parent.name, []).append(Path(f).read_text("utf-8"))
    texts = [t for turn in zip(*list(by_drug.values())[:3]) for t in turn][:24]
    assert len({parse_json(t)["images"][0]["drug_N"] for t in texts}) == 3
    shifted = [t.replace('"drug_S": "', '"drug_S": "' + "x" * (k % 3)) for k, t in enumerate(texts)]
    before = [
        t.replace('"imgfile":', '"dl_idx": "7",\n"imgfile":') for t in texts[:3]
    ]  # the first of two, which JSON lets the second replace
    within = [t.replace('"drug_S": "', '"drug_S": "\\"dl_idx\\"') for t in texts[:3]]
    read = AnnotationReader()
    for k, t in enumerate([*texts, *shifted, *before, *texts[:3], *within]):
        p = tmp_path / f"{k}.json"
        p.write_text(t, encoding="utf-8")
        got, alone = read(p), read_by_keys(p, p.read_bytes())
        assert (got.photo, got.drug, got.boxes) == (alone.photo, alone.drug, alone.boxes), k
    assert read.last[0] > 200 and len(read.known) == 3


@pytest.mark.spec("BM2", "DM9")
def test_plain_photos_and_looked_at_photos_give_the_same(faulty, monkeypatch):
    root, _, _ = faulty
    quick, rows = audit(root, root / "data/train/images"), discover_detection_data(root)
    assert len(check_labels(root / "data/train/labels").plain) > 20
    monkeypatch.setattr(truth, "is_plain", lambda *a: False)
    assert len(check_labels(root / "data/train/labels").plain) == 0
    assert audit(root, root / "data/train/images") == quick
    assert discover_detection_data(root).equals(rows)


@pytest.mark.spec("BM2")
def test_parts_of_any_size_and_processes_give_the_same(labels):
    files, _ = label_files(labels / "data/train/labels")
    want = check_labels(labels / "data/train/labels", workers=1)
    for e in (merge(map(read_part, equal_parts(files, 37))), check_labels(labels / "data/train/labels", workers=2)):
        assert (
            e.plain.equals(want.plain)
            and e.irregular == want.irregular
            and e.counts == want.counts
            and {k: d.counts for k, d in e.drugs.items()} == {k: d.counts for k, d in want.drugs.items()}
        )
    assert (
        sum(len(n) for p in equal_parts(files, 37) for _, n in p) == len(files) == want.counts["files"]
        and max(sum(len(n) for _, n in p) for p in equal_parts(files, 37)) == 37
    )


@pytest.mark.spec("BM2", "DM9")
def test_a_photo_told_of_in_two_parts_is_plain_no_longer(labels, tmp_path):
    one = Path(label_files(labels / "data/train/labels/single")[0][0])
    code = one.parent.name
    for n in (1, 2):
        (tmp_path / f"TL_{n}_single" / code).mkdir(parents=True)
        (tmp_path / f"TL_{n}_single" / code / one.name).write_bytes(one.read_bytes())
    files, _ = label_files(tmp_path)
    for e in (merge(map(read_part, equal_parts(files, 1))), check_labels(tmp_path)):
        assert (
            len(e.plain) == 0
            and [p.fault for p in e.photos[one.stem].pills] == [None, FaultReason.DUPLICATE_JSON]
            and e.photos[one.stem].pills[0].label == files[0]
        )


@pytest.mark.spec("BM2")
def test_a_cluster_of_two_workers_gives_the_same(labels, tmp_path):
    distributed = pytest.importorskip("distributed")
    want = index_labels(labels, tmp_path / "here.arrow", workers=1)
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        with joblib.parallel_config(backend="dask", n_jobs=2):
            got = index_labels(labels, tmp_path / "there.arrow")
        seen = client.run(lambda: "pillsnap.delivery.truth" in sys.modules)
    assert got["data_hash"] == want["data_hash"] and sum(seen.values()) >= 1, "the parts were read by the workers"


# ---- the index
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("BM2", "SP6")
def test_the_index_holds_the_manifest(faulty):
    _, c, run = faulty
    df, head = read_manifest(run / "index/train.arrow")
    csv, h = read_manifest(run / "manifest.csv")
    assert df.equals(csv) and tuple(df.columns) == COLUMNS and df.equals(c.rows)
    assert (
        head["data_hash"] == h["data_hash"]
        and head["class_map"] == h["class_map"]
        and head["counts"] == h["counts"]
        and head["root"] == h["root"]
    )
    few, _ = read_index(run / "index/train.arrow", ["kcode", "bbox"], ClassMap(c.rows.kcode))
    assert list(few) == ["kcode", "bbox"]
    assert (run / "index/train.arrow").stat().st_size < 3 * (run / "manifest.csv").stat().st_size


@pytest.mark.spec("SP4")
def test_of_the_sealed_test_the_index_knows_folder_names(faulty, monkeypatch):
    root, c, run = faulty
    df, head = read_index(run / "index/val.arrow")
    assert (
        set(df.kcode) == sealed_codes(find_delivery(root))
        and set(df.split) == {"val"}
        and (df.width == -1).all()
        and not df.bbox.any()
    )
    assert not any(p.endswith((".png", ".json")) for p in df.path)


@pytest.mark.spec("BX8", "RS6")
def test_a_changed_index_is_refused(faulty, tmp_path):
    _, _, run = faulty
    raw = (run / "index/train.arrow").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for at in rng.integers(len(raw) // 4, len(raw) - 200, 30):
        bad = bytearray(raw)
        bad[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.arrow").write_bytes(bad)
        try:
            t = Index(tmp_path / "x.arrow").table()
        except PillsnapError:
            refused += 1
            continue
        assert t.equals(Index(run / "index/train.arrow").table()), f"byte {at}: a changed row got through"
    assert refused >= 10
    with pytest.raises(PillsnapError, match="no index|cannot be opened|damaged"):
        (tmp_path / "x.arrow").write_bytes(raw[: len(raw) // 2])
        Index(tmp_path / "x.arrow")


def test_large_indexes_are_written_in_batches(tmp_path):
    n = 70_000
    row = {
        c: pa.repeat(pa.scalar(1), n)
        if c in ("stage_min", "width", "height", "state", "back", "side", "light", "latitude", "longitude", "size")
        else pa.array([f"{c}{i}" for i in range(n)])
        for c in COLUMNS
    }
    write_index(pa.table(row), {}, tmp_path / "x.arrow")
    i = Index(tmp_path / "x.arrow")
    assert len(i) == n and i.table(["path"]).num_rows == n and i.table(["path"])["path"][66_000].as_py() == "path66000"


@pytest.mark.spec("BM2", "DM14")
def test_labels_alone_are_indexed_with_the_photos_they_expect(faulty, labels, tmp_path):
    root, c, _ = faulty
    head = index_labels(root, tmp_path / "bare.arrow")
    df, _ = read_index(tmp_path / "bare.arrow")
    both = df.merge(c.rows, on="sample_id")
    assert (
        len(both) == len(c.rows)
        and (both.path_x == both.path_y).all()
        and (both.bbox_x == both.bbox_y).all()
        and set(df.sha1) == {""}
    )
    assert head["quarantine"] and "json_unparsable" in (tmp_path / "bare.quarantine.csv").read_text("utf-8")
    head = index_labels(labels, tmp_path / "x.arrow")
    assert head["counts"]["photos"] == 6 * 840 + 6 * 3 and head["source"] == "synthetic"


# ---- labels alone, scripts without a guard
# ---------------------------------------------------------------------------------------------


@pytest.mark.spec("BX5")
def test_labels_alone_are_a_delivery_without_photos(labels, tmp_path):
    ledger = json.loads((labels / "SYNTHETIC.json").read_text())
    got = audit(labels)
    assert (
        got["files"] == got["annotations"] == len(list((labels / "data/train").rglob("*.json")))
        and not list(labels.rglob("*.png"))
        and ledger["labels_only"]
    )
    assert [
        got[k]
        for k in (
            "unparsable",
            "incomplete_photos",
            "boxes_outside",
            "identical_box_photos",
            "area_mismatch",
            "dl_idx_mismatch",
            "code_mismatch",
            "metadata_conflicts",
            "files_missing_keys",
        )
    ] == [0] * 9
    kw = dict(drugs=3, photos=9, combos=1, seed=5, labels_only=True, progress=False)
    a, b = write_delivery(tmp_path / "a", **kw, workers=1), write_delivery(tmp_path / "b", **kw, workers=2)
    assert a["digest"] == b["digest"] != write_delivery(tmp_path / "c", **(kw | dict(seed=6)), workers=1)["digest"]
    with pytest.raises(PillsnapError, match="labels alone"):
        write_delivery(tmp_path / "e", **kw, faults=True)


@pytest.mark.spec("BX5")
def test_a_plain_script_may_render_in_two_processes(tmp_path):
    (tmp_path / "s.py").write_text(
        "from pillsnap.synth.writer import write_delivery\n"
        f"print(write_delivery({str(tmp_path / 'd')!r}, drugs=3, photos=3, combos=0, width=64, height=80, "
        "progress=False, workers=2)['files'])"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "s.py")], capture_output=True, text=True, timeout=300, env=ENV, cwd=tmp_path
    )
    assert done.returncode == 0 and int(done.stdout) > 9, done.stderr[-2000:]


# ---- archives
# ----------------------------------------------------------------------------------------------------------------------


def cut_into_pieces(archive: Path) -> bytes:
    "Replace an archive by three pieces as AI Hub delivers them; its content."
    raw = archive.read_bytes()
    archive.unlink()
    third = len(raw) // 3
    for at in range(0, len(raw), third):
        Path(f"{archive}.part{at}").write_bytes(raw[at : at + third])
    return raw


def stop_at_the_third_file():
    "A progress callback that stops its caller when it is called for the third time."
    done = []

    def stop(n):
        done.append(n)
        if len(done) == 3:
            raise KeyboardInterrupt

    return stop


@pytest.mark.spec("RS4", "DM14")
def test_archives_in_pieces_and_a_second_call_after_a_stop(tmp_path):
    kw = dict(drugs=3, photos=2, combos=1, seed=1, width=64, height=80, progress=False, workers=1)
    write_delivery(tmp_path / "plain", **kw)
    write_delivery(tmp_path / "zips", zip_parts=True, **kw)
    with pytest.raises(PillsnapError, match="empty") as e:
        convert_delivery(tmp_path / "zips", tmp_path / "run")
    assert "unpack the 2 archives" in str(e.value)
    raw = cut_into_pieces(next((tmp_path / "zips/data").rglob("TS_1_단일.zip")))
    a, pieces = next(x for x in archives_in(walk_tree(tmp_path / "zips").files) if len(x[1]) > 1)
    assert a.folder.name == "TS_1_single" and [int(p.rsplit("part", 1)[1]) for p in pieces] == sorted(
        int(p.rsplit("part", 1)[1]) for p in pieces
    )
    target = tmp_path / "out" / a.folder
    with pytest.raises(KeyboardInterrupt):
        extract_archive(pieces, target, stop_at_the_third_file())
    assert not target.exists() and walk_tree(tmp_path / "out").files == [], "nothing half-unpacked is seen"
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.png")}
    assert len(kept) == 2
    extract_archives(tmp_path / "zips", tmp_path / "out", workers=2)
    assert all(p.stat().st_mtime_ns == kept[p.name] for p in target.rglob("*.png") if p.name in kept)

    def files(d):
        return {p.relative_to(d).as_posix(): p.read_bytes() for p in (d / "data").rglob("*") if p.is_file()}

    assert files(tmp_path / "out") == files(tmp_path / "plain")
    (tmp_path / "out/data/train/images/single/TS_2_단일.zip").write_bytes(raw)
    assert index_photos(tmp_path / "out/data/train/images").faults == [], "an archive in the tree is no broken photo"
    Path(pieces[1]).unlink()
    with pytest.raises(PillsnapError, match="broken"):
        extract_archive([p for p in pieces if Path(p).exists()], tmp_path / "lost")


@pytest.mark.spec("RS4")
def test_hostile_foreign_and_damaged_archives(capsys):
    """Refused in words or unpacked byte by byte; nothing beside the target is touched, and entries that share their
    bytes cannot fill a disk."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        got = script("scripts/campaigns/rs4_archives.py").campaign(56, seed=2)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert (
        [g for g in got if g[1] not in ("unpacked", "refused")] == []
        and ("overlapping", "refused") in got
        and ("cp949", "unpacked") in got
    )


@pytest.mark.spec("RS4")
def test_an_entry_that_swallows_the_next_is_noticed(tmp_path):
    """One changed byte: the first entry's comment becomes as long as the second entry; Python's reader then sees
    one file and says nothing."""
    import zipfile

    with zipfile.ZipFile(tmp_path / "TS_7_combo.zip", "w") as z:
        for name in ("K/a.png", "K/b.png"):
            z.writestr(name, "x")
    raw = bytearray((tmp_path / "TS_7_combo.zip").read_bytes())
    first = raw.find(b"PK\1\2")
    raw[first + 32] = raw.find(b"PK\5\6") - raw.find(b"PK\1\2", first + 1)
    (tmp_path / "TS_7_combo.zip").write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "TS_7_combo.zip") as z:
        assert z.namelist() == ["K/a.png"] and z.testzip() is None
    with pytest.raises(PillsnapError, match="holds 1 entries and should hold 2"):
        extract_archives(tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))


# ---- COCO, YOLO, scripts
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("DM8", "BM2")
def test_the_index_shows_itself_as_a_yolo_tree_on_request(faulty, tmp_path, capsys):
    """`pillsnap index --yolo` lays out what the index holds; without it nothing but the index and its quarantine is
    written."""
    from pillsnap.cli import main

    root, _, _ = faulty
    for more in ([], ["--yolo", str(tmp_path / "y")]):
        with pytest.raises(SystemExit) as e:
            main(["index", str(root), "--out", str(tmp_path / "i" / "train.arrow"), "--workers", "1", *more])
        assert (
            e.value.code == 0 and (tmp_path / "y").exists() == bool(more) and not list((tmp_path / "i").glob("*yolo*"))
        )
    rows, head = read_index(tmp_path / "i" / "train.arrow")
    links = {p.stem: p for p in (tmp_path / "y" / "images" / "train").iterdir()}
    assert (
        set(links)
        == {Path(p).stem for p in rows.path}
        == {p.stem for p in (tmp_path / "y" / "labels" / "train").iterdir()}
        and "YOLO" in capsys.readouterr().out
    )
    there = [s for s, p in links.items() if p.exists()]
    assert len(there) > 0.9 * len(links) and all(links[s].resolve().is_relative_to(root.resolve()) for s in there)


@pytest.mark.spec("DM13")
def test_the_script_lays_out_and_checks(faulty, tmp_path):
    root, c, _ = faulty

    def run(*a):
        return subprocess.run(
            [str(ROOT / "scripts/prepare_yolo.sh"), *map(str, a)], capture_output=True, text=True, env=ENV, timeout=300
        )

    done = run(root, tmp_path / "y")
    assert done.returncode == 0 and f"({c.rows.path.nunique()} label files, 0 problems)" in done.stdout, done.stderr[
        -2000:
    ]
    tree = tmp_path / "y/yolo_data"
    assert check_yolo_tree(tree) == []
    first = sorted((tree / "labels/train").iterdir())[0]
    first.write_text("1 .5 .5 .1 .1\n0 .5 .5 1.5 .1\n")
    (tree / "labels/train/orphan.txt").write_text("0 .5 .5 .1 .1\n")
    said = " ".join(check_yolo_tree(tree))
    assert "class 1" in said and "out of range" in said and "orphan: a label without photo" in said
    assert run().returncode == 2 and "usage" in run().stdout


@pytest.mark.spec("BM1", "BM2", "BM14")
@pytest.mark.parametrize("name", ["bm01_parse", "bm02_index", "bm14_scaling"])
def test_benchmarks_run(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / f"benchmarks/{name}.py"), "--quick", "--repeats", "1", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=ENV,
        timeout=500,
    )
    assert done.returncode == 0 and not list(tmp_path.iterdir()), done.stderr[-2000:]


def test_a_missed_ratio_is_named_and_kept(tmp_path, capsys, monkeypatch):
    h = script("benchmarks/harness.py")
    monkeypatch.setattr(h, "_wait_until_idle", lambda: None)  # these contenders leave nothing to wait for
    monkeypatch.setitem(h.REQUIRED, "BM0", {"peer": 3.0, "gone": 2.0})
    missed = h.compare(
        "BM0", "x", {"ours": lambda: 1.0}, {"peer": lambda: 2.0, "gone": "not installed: x"}, 1, 2, out=tmp_path
    )
    assert missed == ["BM0: 0.50× of peer, 3× required"] and "not installed" in capsys.readouterr().out
    monkeypatch.setitem(h.REQUIRED, "BM0", {"peer": 1.5})
    assert h.compare("BM0", "x", {"ours": lambda: 1.0}, {"peer": lambda: 2.0}, 1, 2, better="lower", out=tmp_path) == []
    assert json.loads((tmp_path / "BM0.json").read_text())["rows"][1]["verdict"] == "reached"
    with pytest.raises(SystemExit) as e:
        h.finish(missed)
    assert e.value.code == 1


# ---- killed
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.spec("RS1")
def test_a_killed_conversion_ends_as_an_undisturbed_one():
    got = script("scripts/campaigns/rs1_conversion.py").campaign(2, seed=4)
    assert got["trials"] == 2 and got["failed"] == 0


@pytest.mark.spec("RS5")
def test_a_disk_that_says_no_costs_nothing_but_time():
    """Full, read-only, no handles, in conversion, splits and packing: told in words, earlier files stand, the same
    call ends as undisturbed."""
    sys.path.insert(0, str(ROOT / "scripts/campaigns"))
    try:
        got = script("scripts/campaigns/rs5_faults.py").campaign(9, seed=1)
    finally:
        sys.path.pop(0)
    assert len({(t["stage"], t["fault"]) for t in got}) == 9 and sum(t["end"] == "error in words" for t in got) >= 6
    for t in got:
        assert (
            t["end"] in ("done", "error in words")
            and not t["changed"]
            and not t["half_written"]
            and t["again"] == "done"
            and t["same"]
        ), t
