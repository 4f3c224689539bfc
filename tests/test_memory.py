"""What is kept in memory: one buffer per job, a database that many read, and no growth (SPEC TL12-TL16, BX14)."""

import errno
import multiprocessing as mp
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.dataset.datasets import DeliverySource, MemorySource, PillsnapClsDataset, Source
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.sampling import EpochSampler
from pillsnap.delivery.classmap import ClassMap
from pillsnap.photos.caches import LMDBImageCache, Photo, PhotoCache, SizedLRUCache, View
from pillsnap.training.learner import Outputs, build_learner
from pillsnap.training.presets import ClassifierSettings

VIEW = View("whole", 16)


def table(n):
    return pd.DataFrame(
        dict(
            path=[f"{i}.png" for i in range(n)],
            class_key=[f"K-{i % 3:06d}" for i in range(n)],
            bbox="",
            width=64,
            height=64,
        )
    )


class Painted(Source):
    "Photos that are made up on the spot: each a colour of its own."

    def open(self, photo, view, reduce=1):
        return np.full((64, 64, 3), int(photo.path.split(".")[0]) % 251, np.uint8), None


def read_all(path, keys, out):
    "In a process of its own: every record, several times; how many were right."
    db = LMDBImageCache(path)
    out.put(sum(int(db.get(k, "", VIEW)[0, 0, 0]) == int(k) for _ in range(20) for k in keys))


@pytest.mark.spec("TL13")
def test_many_processes_read_one_database(tmp_path):
    "Six readers at once, and one that came by pickle from an open database; a reader cannot write."
    keys = [str(i) for i in range(40)]
    writer = LMDBImageCache(tmp_path / "db", readonly=False, map_size="16MB")
    assert writer.put_many((k, "", VIEW, np.full((16, 16, 3), int(k), np.uint8)) for k in keys) == 40
    writer.close()
    db = LMDBImageCache(tmp_path / "db")
    assert len(db) == 40 and len(pickle.loads(pickle.dumps(db))) == 40 and b"lmdb.Environment" not in pickle.dumps(db)
    context, out = mp.get_context("fork"), mp.get_context("fork").Queue()
    readers = [context.Process(target=read_all, args=(tmp_path / "db", keys, out)) for _ in range(6)]
    for p in readers:
        p.start()
    assert [out.get(timeout=60) for _ in readers] == [800] * 6
    for p in readers:
        p.join()
    with pytest.raises(Exception, match="(?i)read-only|permission|denied"):
        db.put_many(iter([("x", "", VIEW, np.zeros((16, 16, 3), np.uint8))]))


@pytest.mark.spec("TL13")
def test_a_database_holds_no_pickle(tmp_path):
    db = LMDBImageCache(tmp_path / "db", readonly=False, map_size="1MB")
    db.put_many(
        iter([("a", "", VIEW, np.ones((16, 16, 3), np.uint8)), ("b", "", VIEW, {"error": "broken", "stage": "final"})])
    )
    with db.env.begin() as t:
        raw = [bytes(v) for _, v in t.cursor()]
    assert all(v[:4] == b"PSv1" for v in raw)
    for v in raw:
        with pytest.raises(pickle.UnpicklingError):
            pickle.loads(v)
    with db.env.begin(write=True) as t:
        for k, _ in list(t.cursor()):
            t.put(k, pickle.dumps(np.ones(3)))
    with pytest.raises(PillsnapError, match="damaged"):
        db.get("a", "", VIEW)


@pytest.mark.spec("TL14", "X13")
def test_the_budget_is_the_jobs():
    "Eight workers keep an eighth each; the least recent goes first, and never more than one pass is needed to find it."
    assert SizedLRUCache().budget == 34_359_738_368 and SizedLRUCache(workers=8).budget * 8 == 34_359_738_368
    img, rng = np.zeros((16, 16, 3), np.uint8), np.random.default_rng(0)
    lru, model = SizedLRUCache(5 * img.nbytes), []
    for k in map(str, rng.integers(0, 12, 600)):
        if rng.random() < 0.5:
            hit = lru.get(k, "", VIEW) is not None
            assert hit == (k in model)
            if hit:
                model.remove(k)
                model.append(k)
        else:
            lru.put(k, "", VIEW, img)
            if k in model:
                model.remove(k)
            model = [*model, k][-5:]
        assert lru.nbytes == len(lru) * img.nbytes == len(model) * img.nbytes


@pytest.mark.spec("TL15")
def test_the_order_is_database_then_recent_then_disk(tmp_path):
    asked = []

    class Told:
        def __init__(self, name, holds):
            self.name, self.holds = name, holds

        def get(self, path, bbox, view):
            asked.append(self.name)
            return np.full((16, 16, 3), 7, np.uint8) if path in self.holds else None

        def put(self, *a):
            asked.append(f"{self.name} put")

    class Disk(Painted):
        def open(self, *a, **kw):
            asked.append("disk")
            return super().open(*a, **kw)

    m, out = MemorySource(Disk(), Told("lmdb", {"1.png"}), Told("lru", {"2.png"})), np.empty((16, 16, 3), np.uint8)
    for p in "123":
        assert m.view(Photo(f"{p}.png"), VIEW, out) is None
        asked.append("|")
    assert asked == ["lmdb", "|", "lmdb", "lru", "|", "lmdb", "lru", "disk", "lru put", "|"] and out[0, 0, 0] == 3


@pytest.mark.spec("TL12", "BX14")
def test_workers_share_one_buffer():
    "A hotset sent to a worker is a handle: what the parent writes afterwards, the worker reads."
    rows = table(12)
    cache = PhotoCache(rows, Painted(), [VIEW], shared=True)
    assert cache.data.is_shared() and cache.nbytes == 12 * VIEW.nbytes
    d = PillsnapClsDataset(
        rows, ClassMap(sorted(set(rows.class_key))), MemorySource(DeliverySource("nowhere"), cache), 16
    )
    loader = PhotoLoader(d, 6, num_workers=1, engine="processes", raw=True)
    assert [int(x[0, 0, 0, 0]) for x, *_ in loader] == [0, 6]
    cache.data.fill_(99)  # after the worker was started
    assert [int(x[0, 0, 0, 0]) for x, *_ in loader] == [99, 99]


class Hoarding(Painted):
    "Photos for which a process that opens them keeps 80 MB."

    held = {}

    def open(self, photo, view, reduce=1):
        if mp.parent_process():
            self.held.setdefault(0, bytearray(b"x") * 80_000_000)
        return super().open(photo, view, reduce)


@pytest.mark.spec("BM13", "EV2")
def test_the_history_counts_the_memory_of_workers():
    "Two processes that hold 80 MB each are in the row of the epoch."
    rows, cfg = table(24), load_config("smoke", ["train.classification={epochs: 1, amp: false}"])

    def make(train, source, **o):
        return PhotoLoader(PillsnapClsDataset(rows, ClassMap(sorted(set(rows.class_key))), source, 16, train), 6, **o)

    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3))
    learn = build_learner(
        ClassifierSettings.from_config(cfg),
        net,
        torch.nn.CrossEntropyLoss(),
        make(True, Hoarding(), num_workers=2, engine="processes"),
        {"whole": make(False, Painted())},
        3,
        out=Outputs(quiet=True),
    )
    learn.fit(1)
    own = psutil.Process().memory_info().rss / 1e6
    assert own + 160 < learn.rows[0]["rss_mb"] < own + 160 + 2 * 1000, (
        "and what the two share with this process is not counted three times"
    )


@pytest.mark.spec("BX14", "BM13")
def test_memory_is_flat_over_epochs():
    """Two threads, many epochs, batches that are dropped and epochs that are left: buffers come back, and memory
    does not grow."""
    rows = table(96)
    d = PillsnapClsDataset(rows, ClassMap(sorted(set(rows.class_key))), Painted(), 64, train=True)
    loader, mb = PhotoLoader(d, 16, EpochSampler(d, 1), num_workers=2, raw=True), []
    for e in range(60):
        for k, _ in enumerate(loader):
            if e % 3 == 2 and k == 2:
                break
        mb.append(psutil.Process().memory_info().rss / 1e6)
    y = np.array(mb[20:])
    i, j = np.triu_indices(len(y), 1)
    assert abs(np.median((y[j] - y[i]) / (j - i))) < 0.05, mb  # Theil-Sen, MB an epoch; an epoch's batches have 1.2 MB
    assert loader.buffers.made <= 8


@pytest.mark.spec("TL13", "RS5")
def test_a_fault_of_the_machine_is_not_kept_as_a_photos_own(tmp_path, monkeypatch):
    "Neither in LMDB nor in the table of located pills: too many open files says nothing of the photo."
    from pillsnap.dataset.datasets import lmdb_converter
    from pillsnap.dataset.focus import locate_photos

    Image.new("RGB", (64, 64)).save(tmp_path / "p0.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "p1.png")
    rows = pd.DataFrame(
        dict(path=["p0.png", "p1.png"], class_key=["A", "B"], bbox="", kind="single", width=64, height=64)
    )
    data, real = PillsnapClsDataset(rows, ClassMap(("A", "B")), tmp_path, 32), Path.read_bytes

    def refused(self):
        if self.name == "p1.png":
            raise OSError(errno.EMFILE, "Too many open files")
        return real(self)

    with monkeypatch.context() as m:
        m.setattr(Path, "read_bytes", refused)
        with pytest.raises(PillsnapError, match="too many files are open"):
            lmdb_converter(data, tmp_path / "db")
        locate_photos(["p1.png"], tmp_path, {}, tmp_path / "located.csv")
    assert "p1.png" not in (tmp_path / "located.csv").read_text()
    assert locate_photos(["p1.png"], tmp_path, {}, tmp_path / "located.csv")["found"].tolist() == [0]
