"""The core modules: files that survive, figures with provenance, logs, seeds, checkpoints, pictures."""

import errno
import io
import json
import logging
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pillsnap.core.checkpoints import (
    FIELDS,
    class_map_difference,
    load_ckpt,
    plain,
    rng_state,
    save_ckpt,
)
from pillsnap.core.config import load_config
from pillsnap.core.device import cuda_mem_mb, needs_scaler, pick_device, select_amp_dtype, set_seed
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import (
    PARTIAL,
    FolderLock,
    atomic_path,
    canonical_json,
    ensure_dir,
    get_git_sha,
    read_json,
    remove_partials,
    save_json,
    save_text,
    sha256_file,
    sha256_text,
)
from pillsnap.core.logs import (
    STEP_TAGS,
    VAL_TAGS,
    StepTimer,
    TBWriter,
    TensorBoardHandler,
    build_logger,
    step_line,
    with_tags,
)
from pillsnap.core.records import MIN_SECONDS_PER_SAMPLE, Metric, Provenance, hardware, metric_table

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, *args, **kw) -> subprocess.CompletedProcess:
    "Run a piece of Python in a process of its own."
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        **kw,
    )


def partials(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*" + PARTIAL)]


@pytest.fixture
def logger(tmp_path):
    "A logger of this test's own, closed afterwards."
    name = f"pillsnap.test.{tmp_path.name}"
    yield build_logger(tmp_path / "logs", name), tmp_path / "logs" / f"{name}.log"
    log = logging.getLogger(name)
    for h in list(log.handlers):
        log.removeHandler(h)
        h.close()


# ---------------------------------------------------------------- files


@pytest.mark.spec("CF2")
def test_json_goes_out_and_comes_back_readable(tmp_path):
    obj = {
        "name": "타이레놀정",
        "n": np.int64(3),
        "acc": np.float32(0.5),
        "ids": np.arange(3),
        "p": Path("a/b"),
        "empty": None,
    }
    f = save_json(obj, tmp_path / "new" / "folder" / "x.json")
    text = f.read_bytes().decode("utf-8")
    assert "타이레놀정" in text and '\n  "n": 3' in text and text.endswith("}\n")
    assert read_json(f) == {"name": "타이레놀정", "n": 3, "acc": 0.5, "ids": [0, 1, 2], "p": "a/b", "empty": None}
    assert partials(tmp_path) == []


@pytest.mark.spec("CF2")
@pytest.mark.parametrize(
    "bad, where",
    [(math.nan, "the value"), ({"a": [1, {"b": math.inf}]}, "a[1].b"), ({"v": np.array([1.0, np.nan])}, "v[1]")],
)
def test_json_refuses_what_is_no_number_and_says_where(tmp_path, bad, where):
    f = save_json({"kept": 1}, tmp_path / "x.json")
    with pytest.raises(PillsnapError, match=re.escape(where)):
        save_json(bad, f)
    assert read_json(f) == {"kept": 1} and partials(tmp_path) == []


@pytest.mark.spec("CF2", "CF5")
@pytest.mark.parametrize("content", [b"", b"{", b'{"a": NaN}', b'{"a": Infinity}', "정제".encode("cp949"), None])
def test_a_broken_json_file_is_named(tmp_path, content):
    f = tmp_path / "broken.json"
    if content is not None:
        f.write_bytes(content)
    with pytest.raises(PillsnapError) as e:
        read_json(f)
    assert e.value.where == f and str(f) in str(e.value)


def test_canonical_json_is_one_per_tree():
    assert (
        canonical_json({"b": [1, 2], "a": {"d": 1, "c": 2}})
        == '{"a":{"c":2,"d":1},"b":[1,2]}'
        == canonical_json({"a": {"c": 2, "d": 1}, "b": [1, 2]})
    )


def test_hashes_are_sha256(tmp_path):
    big = os.urandom(3_000_000)
    (tmp_path / "big").write_bytes(big)
    import hashlib

    assert sha256_file(tmp_path / "big") == hashlib.sha256(big).hexdigest()
    assert sha256_text("정") == hashlib.sha256("정".encode()).hexdigest()


@pytest.mark.spec("CF2")
def test_ensure_dir_makes_and_keeps(tmp_path):
    d = ensure_dir(tmp_path / "a" / "b")
    (d / "x").touch()
    assert ensure_dir(d) == d and (d / "x").exists()


@pytest.mark.spec("CF5")
@pytest.mark.parametrize(
    "no, says",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "input/output error"),
        (errno.EMFILE, "too many files"),
        (errno.EFBIG, "larger than this system allows"),
    ],
)
@pytest.mark.parametrize("call", ["os.replace", "os.fsync"])
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, no, says, call):
    f = save_text("old", tmp_path / "x.txt")

    def refuse(*a, **kw):
        raise OSError(no, os.strerror(no))

    monkeypatch.setattr(call, refuse)
    with pytest.raises(PillsnapError, match=says) as e:
        save_text("new", f)
    assert e.value.where == f and e.value.fix and f.read_text() == "old" and partials(tmp_path) == []


@pytest.mark.spec("CF5")
def test_a_path_below_a_regular_file_bites_root_too(tmp_path):
    (tmp_path / "file").write_text("kept")
    for call in (
        lambda: save_json({}, tmp_path / "file" / "x.json"),
        lambda: ensure_dir(tmp_path / "file" / "a" / "b"),
        lambda: build_logger(tmp_path / "file" / "logs", "pillsnap.test.below"),
        lambda: FolderLock(tmp_path / "file").__enter__(),
    ):
        with pytest.raises(PillsnapError) as e:
            call()
        assert str(tmp_path / "file") in str(e.value) and e.value.fix
    assert (tmp_path / "file").read_text() == "kept"


def test_an_error_in_the_block_passes_through_untouched(tmp_path):
    save_text("old", tmp_path / "x")
    for exc in (
        ValueError("v"),
        KeyboardInterrupt(),
        FileNotFoundError(2, "gone", "elsewhere"),
        IsADirectoryError(errno.EISDIR, "dir", "elsewhere"),
        OSError("cannot identify image file"),
    ):
        with pytest.raises(type(exc)) as e, atomic_path(tmp_path / "x") as p:
            p.write_text("half")
            raise exc
        assert e.value is exc
    assert (tmp_path / "x").read_text() == "old" and partials(tmp_path) == []


def test_the_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    save_text("x", tmp_path / "x")
    assert calls == ["fsync", "replace", "fsync"]  # content, name, folder
    calls.clear()
    with atomic_path(tmp_path / "y", durable=False) as p:
        p.write_text("y")
    assert calls == ["replace"]


def test_kill_9_at_random_moments_never_shows_half_a_file(tmp_path):
    f = save_json(["x" * 200_000, 0], tmp_path / "x.json")
    code = textwrap.dedent("""
        import sys
        from pillsnap.core.files import save_json
        print("go", flush=True)
        for i in range(10**9): save_json(["xy"[i%2]*200_000, i], sys.argv[1])
    """)
    rng, torn = random.Random(0), 0
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-c", code, str(f)], stdout=subprocess.PIPE, cwd=ROOT)
        child.stdout.readline()
        time.sleep(rng.uniform(0.005, 0.06))
        child.kill()
        child.wait()
        child.stdout.close()
        text, _ = read_json(f)
        assert len(text) == 200_000 and len(set(text)) == 1
        torn += len(partials(tmp_path))
        assert {p.name for p in tmp_path.glob("*.json")} == {"x.json"}
        remove_partials(tmp_path)
    assert torn > 0, "no kill hit a write: the test proves nothing"
    assert partials(tmp_path) == []


@pytest.mark.spec("CF2")
def test_git_sha_is_that_of_this_checkout_or_nogit(tmp_path, monkeypatch):
    from pillsnap.core import files

    r = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True)
    files._sha_of.cache_clear()
    if r.returncode == 0 and Path(r.stdout.split()[0]) == ROOT:
        assert get_git_sha().removesuffix("-dirty") == r.stdout.split()[1]
    else:
        assert get_git_sha() == "nogit"
    assert get_git_sha(tmp_path) == "nogit" and get_git_sha(ROOT / "nbs") == "nogit", (
        "somebody else's repository around us is not our commit"
    )
    if shutil.which("git"):
        repo = ensure_dir(tmp_path / "theirs")
        for cmd in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "1"],
        ):
            (repo / "a").write_text("1")
            subprocess.run(["git", "-C", str(repo), *cmd], check=True)
        assert re.fullmatch("[0-9a-f]{40}", get_git_sha(repo)) and get_git_sha(ensure_dir(repo / "lib")) == "nogit"
        (repo / "a").write_text("2")
        files._sha_of.cache_clear()
        assert get_git_sha(repo).endswith("-dirty")
    files._sha_of.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert get_git_sha() == "nogit"
    files._sha_of.cache_clear()


# ---------------------------------------------------------------- record

H = "a" * 64
GOOD = Metric("accuracy", 0.94, 220, "measured", "aihub", H, "b" * 64, "c" * 40, 9.0, "2× CPU, 8 GiB, no GPU")


@pytest.mark.spec("BX2")
@pytest.mark.parametrize(
    "field, value",
    [
        ("value", None),
        ("value", math.nan),
        ("value", math.inf),
        ("value", -math.inf),
        ("value", "0.94"),
        ("value", [0.94]),
        ("n", 0),
        ("n", -1),
        ("n", None),
        ("n", 220.0),
        ("n", "220"),
        ("n", True),
        ("seconds", None),
        ("seconds", 0),
        ("seconds", -9.0),
        ("seconds", math.nan),
        ("seconds", math.inf),
        ("seconds", "9"),
        ("seconds", True),
        ("how", "declared"),
        ("how", "estimated"),
        ("data_hash", ""),
        ("data_hash", None),
        ("data_hash", "none"),
        ("data_hash", H[:63]),
        ("data_hash", H + "\n"),
        ("class_map_hash", ""),
        ("class_map_hash", None),
        ("commit", ""),
        ("commit", None),
        ("hardware", ""),
        ("hardware", None),
    ],
)
def test_a_figure_with_one_lame_field_is_not_measured(field, value):
    assert GOOD.measured
    m = replace(GOOD, **{field: value})
    assert not m.measured and len(m.doubts()) == 1


@pytest.mark.spec("BX2")
def test_a_report_typed_by_hand_does_not_pass():
    "Constants for a whole report, and the duration of a unit test."
    report = [
        dict(GOOD.to_dict(), name=k, value=v, n=n, seconds=0.0015)
        for k, v, n in [
            ("accuracy", 0.92, 5000),
            ("macro_f1", 0.88, 5000),
            ("top5", 0.98, 2000),
            ("mAP@0.5", 0.85, 1000),
        ]
    ]
    assert not any(Metric.from_dict(d).measured for d in json.loads(json.dumps(report)))
    assert Metric.from_dict(dict(report[0], seconds=95.0)).measured, "only the duration was wrong with it"


@pytest.mark.spec("BX2")
@pytest.mark.parametrize("n", [1, 74, 76, 1000, 1_000_000])
def test_the_duration_floor_is_twenty_microseconds_a_sample(n):
    assert MIN_SECONDS_PER_SAMPLE == 20e-6
    assert replace(GOOD, n=n, seconds=n * 20.1e-6).measured
    assert not replace(GOOD, n=n, seconds=n * 19.9e-6).measured


@pytest.mark.spec("BX2")
def test_what_opens_no_photo_is_exempt_by_kind_and_by_nothing_else():
    "Counting the drugs of a table takes microseconds; saying so is no excuse for a figure without a duration."
    counted = replace(GOOD, name="class_imbalance_ratio", n=5000, seconds=1e-5, kind="computed")
    assert counted.measured and not replace(counted, kind="photos").measured
    for seconds in (None, 0, -1.0, math.nan):
        assert not replace(counted, seconds=seconds).measured
    assert GOOD.kind == "photos"
    with pytest.raises(PillsnapError, match="one of photos, computed"):
        replace(GOOD, kind="known")


@pytest.mark.spec("BX2")
def test_honest_work_passes():
    "The cheapest thing this project does to a photo takes longer than the floor."
    from PIL import Image

    buf = io.BytesIO()
    Image.new("RGB", (122, 160), (200, 200, 200)).save(buf, "PNG")
    t0 = time.perf_counter()
    for _ in range(200):
        np.asarray(Image.open(io.BytesIO(buf.getvalue()))).mean()
    assert Provenance("synthetic", H, H).metric("brightness", 200.0, n=200, seconds=time.perf_counter() - t0).measured


@pytest.mark.spec("BX2")
def test_a_figure_keeps_its_provenance_through_json(tmp_path):
    p = Provenance("synthetic", H, "b" * 64)
    m = p.metric("accuracy", np.float32(0.5), n=np.int64(10), seconds=np.float64(2.0), note="demo")
    assert (m.data, m.data_hash, m.class_map_hash, m.how, m.commit, m.hardware) == (
        "synthetic",
        H,
        "b" * 64,
        "measured",
        get_git_sha(),
        hardware(),
    )
    assert type(m.n) is int and type(m.value) is float and m.measured
    back = Metric.from_dict(read_json(save_json(m.to_dict(), tmp_path / "m.json")))
    assert back == m and set(m.to_dict()) == {
        "name",
        "value",
        "n",
        "how",
        "data",
        "data_hash",
        "class_map_hash",
        "commit",
        "seconds",
        "hardware",
        "note",
        "kind",
    }
    nan = p.metric("macro_f1", torch.tensor(math.nan), n=0, seconds=1.0)
    assert not Metric.from_dict(read_json(save_json(nan.to_dict(), tmp_path / "m.json"))).measured
    for broken in ({"name": "x"}, [], "x", {**m.to_dict(), "measured": True}):
        with pytest.raises(PillsnapError, match="no metric record"):
            Metric.from_dict(broken)
    for field in ("how", "data"):
        with pytest.raises(PillsnapError, match="one of"):
            Metric.from_dict({**m.to_dict(), field: "trust me"})


@pytest.mark.spec("BX2")
def test_synthetic_real_and_quoted_figures_never_share_a_column():
    rows = metric_table(
        [
            replace(GOOD, data=d, how=h, value=v)
            for d, h, v in [
                ("aihub", "measured", 0.8),
                ("synthetic", "measured", 0.9),
                ("aihub", "declared", 0.85),
                ("synthetic", "declared", 0.85),
                ("aihub", "estimated", 0.7),
            ]
        ]
    )
    assert rows == [{"metric": "accuracy", "aihub": 0.8, "synthetic": 0.9, "estimated": 0.7, "declared": 0.85}]
    assert metric_table([replace(GOOD, n=0)]) == [{"metric": "accuracy"}]


def test_the_hardware_line_knows_a_gpu_without_importing_torch(monkeypatch):
    from pillsnap.core import records as record

    assert re.match(r"\d+× \S.*, \d+ GiB, ", hardware())
    gpu = SimpleNamespace(name="NVIDIA GeForce RTX 5080", total_memory=16 * 2**30)
    monkeypatch.setitem(
        sys.modules,
        "torch",
        SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, get_device_properties=lambda i: gpu)),
    )
    assert hardware().endswith(", NVIDIA GeForce RTX 5080 16 GiB")
    monkeypatch.delitem(sys.modules, "torch")
    assert record._gpu() == "no GPU" or "NVIDIA" in record._gpu()
    assert (
        python("import sys, pillsnap.core.records as r; r.hardware(); sys.exit('torch' in sys.modules)").returncode == 0
    )


# ---------------------------------------------------------------- log


@pytest.mark.spec("CF2", "CF4")
def test_one_logger_console_and_file(tmp_path, logger, capsys):
    log, path = logger
    before = list(log.handlers)
    again = build_logger(path.parent, log.name)
    assert (
        again is log
        and log.handlers == before
        and [type(h).__name__ for h in log.handlers if "pillsnap" in type(h).__module__]
        == ["ConsoleHandler", "LogFile"]
    )
    again.info("약품 12개")
    assert capsys.readouterr().err == "약품 12개\n"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO 약품 12개\n", path.read_text(encoding="utf-8"))
    assert not log.propagate, "a parent with handlers would say everything twice"


@pytest.mark.spec("CF4")
def test_a_decision_is_one_line_and_one_tag(tmp_path, logger):
    log, path = logger
    tb = TBWriter(tmp_path / "tb")
    log.addHandler(TensorBoardHandler(tb))
    log.info("workers: 2, because there are 2 CPUs", extra={"step": 3})
    log.info("no decision, so no text")
    tb.close()
    lines = [line.split(" INFO ")[1] for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == ["workers: 2, because there are 2 CPUs", "no decision, so no text"]
    assert {t.split("/text_summary")[0] for t in events(tmp_path / "tb").Tags()["tensors"]} == {"decisions/workers"}


@pytest.mark.spec("CF5")
def test_a_full_disk_costs_the_log_file_and_nothing_else(tmp_path):
    r = python(
        """
        import resource, sys
        from pillsnap.core.logs import build_logger
        log = build_logger(sys.argv[1], "demo")
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        for i in range(50): log.info(f"line {i} of the run")
    """,
        tmp_path,
    )
    assert r.returncode == 0 and r.stderr.count("the run continues without it") == 1 and "Traceback" not in r.stderr
    assert r.stderr.count("of the run") == 50, "the console has them all"


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    acc = EventAccumulator(str(folder))
    acc.Reload()
    return acc


@pytest.mark.spec("CT20")
def test_the_curves_have_the_names_of_the_contract(tmp_path):
    tb = TBWriter(tmp_path / "tb")
    assert not (tmp_path / "tb").exists(), "nothing before the first figure"
    tb.add_scalars(with_tags(dict(loss=0.5, lr=1e-3, data=0.01, comp=0.2, thr=300.0, cuda=9021.0), STEP_TAGS), 7)
    tb.add_scalars(with_tags(dict(val_loss=0.4, acc=0.9, macro_f1=0.88, top5=1.0, n=220), VAL_TAGS), 7)
    tb.close()
    acc = events(tmp_path / "tb")
    assert set(acc.Tags()["scalars"]) == {
        "train/loss",
        "train/lr",
        "perf/data_time",
        "perf/compute_time",
        "perf/throughput",
        "perf/cuda_mem",
        "val/loss",
        "val/accuracy",
        "val/macro_f1",
        "val/top5",
    }
    got = {t: (acc.Scalars(t)[0].step, round(acc.Scalars(t)[0].value, 6)) for t in acc.Tags()["scalars"]}
    assert (
        got["perf/throughput"] == (7, 300.0)
        and got["val/accuracy"] == (7, 0.9)
        and got["perf/data_time"] == (7, 0.01)
        and got["perf/compute_time"] == (7, 0.2)
    )


def test_curves_and_decisions_are_written_without_torch(tmp_path):
    r = python(
        """
        import sys
        from pillsnap.core.logs import TBWriter
        tb = TBWriter(sys.argv[1])
        tb.add_scalar("perf/num_workers", 4.0, 2)
        tb.add_text("decisions/workers", "workers: 4 of 8 cores", 2)
        tb.close()
        assert "torch" not in sys.modules
    """,
        tmp_path,
    )
    assert r.returncode == 0, r.stderr
    acc = events(tmp_path)
    assert [(e.step, e.value) for e in acc.Scalars("perf/num_workers")] == [(2, 4.0)]
    (text,) = acc.Tensors("decisions/workers/text_summary")
    assert text.step == 2 and text.tensor_proto.string_val == [b"workers: 4 of 8 cores"]


@pytest.mark.spec("CF2")
@pytest.mark.parametrize("how", ["absent", "full"])
def test_tensorboard_may_fail_the_run_may_not(tmp_path, monkeypatch, capsys, how):
    build_logger()
    if how == "absent":
        monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    else:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        def full(*a, **kw):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(EventFileWriter, "add_event", full)
    tb = TBWriter(tmp_path / "tb")
    for i in range(3):
        tb.add_scalar("train/loss", 0.5, i)
    tb.add_text("decisions/x", "y")
    tb.close()
    assert capsys.readouterr().err.count("TensorBoard") == 1


@pytest.mark.spec("CT18")
def test_the_step_line_to_the_character():
    assert (
        step_line(3, 30, 120, 1563, 0.81230001, 1.95e-4, 0.0122, 0.2008, 300.06, 9021.2)
        == "[train] e=3/30 s=120/1563 loss=0.8123 lr=1.95e-04 data=0.012s comp=0.201s thr=300.1/s cuda=9021MB"
    )
    assert (
        step_line(1, 1, 1, 2, 12.5, 0.0, 0.0, 0.0, 0.0)
        == "[train] e=1/1 s=1/2 loss=12.5000 lr=0.00e+00 data=0.000s comp=0.000s thr=0.0/s cuda=0MB"
    )


@pytest.mark.spec("CF2")
def test_the_timer_tells_waiting_from_computing():
    now = [100.0]
    timer = StepTimer(now=lambda: now[0])
    for wait, work, n in [(0.1, 0.2, 8), (0.3, 0.2, 8), (0.1, 0.4, 4)]:
        now[0] += wait
        timer.data_done()
        now[0] += work
        timer.compute_done(n)
    assert timer.read() == pytest.approx(dict(data=0.5 / 3, comp=0.8 / 3, thr=20 / 1.3, steps=3))
    now[0] += 0.5
    timer.data_done()
    now[0] += 0.5
    timer.compute_done(16)
    assert timer.read() == pytest.approx(dict(data=0.5, comp=0.5, thr=16.0, steps=1)), (
        "an interval starts where the last one ended"
    )
    now[0] += 60
    timer.start()
    now[0] += 0.1
    timer.data_done()
    now[0] += 0.1
    timer.compute_done(2)
    assert timer.read() == pytest.approx(dict(data=0.1, comp=0.1, thr=10.0, steps=1)), (
        "a validation between two epochs is nobody's data time"
    )


# ---------------------------------------------------------------- device


@pytest.mark.spec("CT22", "CF2")
def test_one_seed_for_every_generator():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), torch.randperm(100)[0].item()

    set_seed(42)
    a = draw()
    set_seed(42, False)
    assert draw() == a
    set_seed(43)
    b = draw()
    assert all(x != y for x, y in zip(a[:3], b[:3])), "each of the three generators moved"
    set_seed(2**32 + 5)  # beyond numpy's range


@pytest.mark.spec("CT22")
def test_deterministic_sets_the_switches_and_warns_only(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        set_seed(42, True)
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))  # has no deterministic kernel
    finally:
        set_seed(42, False)
    assert (
        not torch.are_deterministic_algorithms_enabled()
        and not torch.backends.cudnn.deterministic
        and torch.backends.cudnn.benchmark
    )


def test_the_device_is_said_with_its_reason(monkeypatch, capsys):
    build_logger()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device().type == "cpu"
    assert re.fullmatch(r"device: cpu, because torch finds no GPU.*\n", capsys.readouterr().err)
    with pytest.raises(PillsnapError, match="torch finds none"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d: "NVIDIA H200")
    assert pick_device().type == "cuda" and "NVIDIA H200" in capsys.readouterr().err
    assert pick_device("cpu").type == "cpu"


@pytest.mark.spec("CT5")
@pytest.mark.parametrize(
    "bf16, want, got",
    [
        (True, "auto", torch.bfloat16),
        (False, "auto", torch.float16),
        (False, "bf16", torch.float16),
        (True, "bf16", torch.bfloat16),
        (True, "fp16", torch.float16),
        (True, "fp32", None),
    ],
)
def test_precision_on_a_gpu(monkeypatch, capsys, bf16, want, got):
    build_logger()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    assert select_amp_dtype(want, torch.device("cuda")) == got
    assert capsys.readouterr().err.count("\n") == 1
    assert needs_scaler(got) == (got == torch.float16)


@pytest.mark.spec("CT5")
def test_precision_on_a_cpu_is_full_unless_asked(monkeypatch):
    for has_it, asked in ((True, torch.bfloat16), (False, None)):  # an emulated bf16 is slower than float32
        monkeypatch.setattr("pillsnap.core.device.cpu_has_bf16", lambda has_it=has_it: has_it)
        assert select_amp_dtype("auto", torch.device("cpu")) is None
        assert select_amp_dtype("bf16", "cpu") == asked
    with pytest.raises(PillsnapError, match="fp8"):
        select_amp_dtype("fp8", "cpu")


@pytest.mark.spec("CF2")
def test_a_megabyte_is_a_million_bytes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 9_021_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1_000_000)
    assert (cuda_mem_mb(), cuda_mem_mb(peak=False)) == (9021.0, 1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_mem_mb() == 0.0


# ---------------------------------------------------------------- checkpoint

CLASSES = dict(kind="kcode", keys=["K-000059", "K-000250", "K-000573"], fingerprint="f" * 64)


def fresh(seed: int = 0):
    torch.manual_seed(seed)
    m = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    o = torch.optim.AdamW(m.parameters(), lr=0.01)
    return SimpleNamespace(m=m, o=o, s=torch.optim.lr_scheduler.CosineAnnealingLR(o, 10))


def steps(r, n: int):
    for _ in range(n):
        x = torch.randn(16, 4) + random.random() + np.random.rand()
        loss = nn.functional.cross_entropy(r.m(x), torch.randint(0, 3, (16,)))
        r.o.zero_grad()
        loss.backward()
        r.o.step()
        r.s.step()


def write(r, path: Path, **kw) -> Path:
    return save_ckpt(
        path,
        **{
            **dict(
                model_state=r.m.state_dict(),
                optimizer_state=r.o.state_dict(),
                scheduler_state=r.s.state_dict(),
                epoch=1,
                best_metric=0.5,
                config_snapshot=load_config("smoke").to_dict(),
                class_map=CLASSES,
                rng_state=rng_state(),
                sampler_state={"at": 48},
                backbone="tiny",
            ),
            **kw,
        },
    )


@pytest.mark.spec("CT15", "CF2")
def test_a_checkpoint_has_the_contracts_fields_and_loads_without_pickle(tmp_path):
    path = write(fresh(), tmp_path / "checkpoints" / "classifier" / "last.pt")
    raw = torch.load(path, weights_only=True)
    assert set(raw) >= {
        "model_state",
        "optimizer_state",
        "scheduler_state",
        "scaler_state",
        "epoch",
        "best_metric",
        "config_snapshot",
        "class_map",
    }
    assert (
        set(raw) == {*FIELDS, "backbone"}
        and raw["class_map"] == CLASSES
        and raw["config_snapshot"]["train"]["seed"] == 42
    )
    assert load_ckpt(path, CLASSES, "tiny")["sampler_state"] == {"at": 48}


@pytest.mark.spec("BX8", "CT15")
@pytest.mark.parametrize(
    "change, says",
    [
        (dict(keys=["K-000059", "K-000573", "K-000250"]), "the same 3 classes in another order, from number 1 on"),
        (
            dict(keys=["K-000059", "K-000250"]),
            "3 classes in the checkpoint, 2 in the data): only in the checkpoint: K-000573",
        ),
        (
            dict(keys=["K-000059", "K-000250", "K-000600"]),
            "only in the checkpoint: K-000573; only in the data: K-000600",
        ),
        (dict(keys=[f"K-{i:06d}" for i in range(9)]), "K-000000, K-000001, K-000002, K-000003, K-000004 and 4 more"),
        (dict(kind="folder"), "of kind 'kcode', the data's of 'folder'"),
        (dict(fingerprint="0" * 64), "one of the two was altered"),
    ],
)
def test_another_class_map_is_refused_in_plain_words(tmp_path, change, says):
    path = write(fresh(), tmp_path / "best.pt")
    with pytest.raises(PillsnapError) as e:
        load_ckpt(path, {**CLASSES, **change})
    assert says in e.value.what and e.value.where == path and e.value.fix
    assert class_map_difference(CLASSES, CLASSES) is None


@pytest.mark.spec("CT15")
def test_another_network_is_refused_and_the_key_named(tmp_path):
    path = write(fresh(), tmp_path / "best.pt")
    with pytest.raises(PillsnapError, match="holds a tiny, and the configuration asks for a resnet18") as e:
        load_ckpt(path, CLASSES, "resnet18")
    assert "train.classification.backbone=tiny" in e.value.fix


@pytest.mark.spec("CT15")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nothing_is_ever_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    good = torch.load(write(fresh(), tmp_path / "last.pt"), weights_only=True)
    for i, bad in enumerate([{**good, "config_snapshot": Trap()}, {**good, "model_state": {"w": Trap()}}, Trap()]):
        torch.save(bad, tmp_path / f"{i}.pt")
        with pytest.raises(PillsnapError, match="could run code when read"):
            load_ckpt(tmp_path / f"{i}.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(PillsnapError):
        load_ckpt(tmp_path / "plain.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(PillsnapError, match="could run code when read"):
        load_ckpt(tmp_path / "module.pt")
    assert not (tmp_path / "sprung").exists()


INTERRUPTED = """
    import sys, torch
    from pathlib import Path
    from pillsnap.core.checkpoints import load_ckpt, save_ckpt
    path, at, stop = Path(sys.argv[1]) / "last.pt", 0, 0

    def trace(frame, event, _):
        global at
        if frame.f_code.co_filename.endswith(("checkpoints.py", "serialization.py")) and event == "line":
            at += 1
            if at == stop: raise KeyboardInterrupt
        return trace

    def save():
        sys.settrace(trace)
        rest = dict(epoch=0, best_metric=0.0, config_snapshot={}, class_map={})
        try: save_ckpt(path, model_state={"w": torch.ones(3)}, **rest)
        finally: sys.settrace(None)

    save()
    lines = at
    for stop in range(1, lines + 1):
        at = 0
        try: save()
        except KeyboardInterrupt: pass
        else: print("lost at line", stop)
        load_ckpt(path)
    print(lines > 100, sorted(p.name for p in path.parent.iterdir()))
"""


@pytest.mark.spec("CT15")
def test_a_save_may_be_interrupted_at_any_line(tmp_path):
    "Ctrl-C, or a worker that dies: the exception arrives, the file is whole, and the process lives."
    r = python(INTERRUPTED, tmp_path)
    assert (r.returncode, r.stdout) == (0, "True ['last.pt']\n"), r.stderr[-800:]


@pytest.mark.spec("CT15", "CF5")
def test_a_damaged_checkpoint_is_named_never_a_traceback(tmp_path):
    path = write(fresh(), tmp_path / "last.pt")
    whole, rng = path.read_bytes(), random.Random(0)
    for n in [0, 1, 3, *(rng.randrange(len(whole)) for _ in range(20)), len(whole) - 1]:
        (tmp_path / "cut.pt").write_bytes(whole[:n])
        with pytest.raises(PillsnapError):
            load_ckpt(tmp_path / "cut.pt")
    for content in (b"not a checkpoint", b"PK\x03\x04", b"\x80\x02."):
        (tmp_path / "odd.pt").write_bytes(content)
        with pytest.raises(PillsnapError):
            load_ckpt(tmp_path / "odd.pt")
    for other in ({"w": torch.zeros(1)}, [1], torch.zeros(2), {**dict.fromkeys(FIELDS)}):
        torch.save(other, tmp_path / "other.pt")
        with pytest.raises(PillsnapError, match="no PillSnap checkpoint"):
            load_ckpt(tmp_path / "other.pt")
    for odd in (tmp_path / "none.pt", tmp_path, tmp_path / "last.pt" / "below.pt"):
        with pytest.raises(PillsnapError):
            load_ckpt(odd)


@pytest.mark.spec("CT15")
def test_what_could_not_be_read_again_is_not_written(tmp_path):
    from collections import OrderedDict, defaultdict
    from enum import Enum

    from fastcore.foundation import L

    path = write(fresh(), tmp_path / "last.pt")
    before = path.read_bytes()
    for bad in ({"fn": print}, {"s": {1, 2}}, {"c": 1j}, {"m": nn.Linear(1, 1)}):
        with pytest.raises(PillsnapError, match="cannot be kept in a checkpoint") as e:
            write(fresh(), path, history=bad)
        assert e.value.where == f"history.{next(iter(bad))}"
    assert path.read_bytes() == before and partials(tmp_path) == []
    metrics = Enum("Metric_", {"F1": "macro_f1"}, type=str)
    odd = dict(
        i=metrics.F1,
        j=np.array(["K-1", "K-2"]),
        a=np.float32(1),
        b=np.arange(2),
        c=Path("x"),
        d=OrderedDict(z=1),
        e=defaultdict(list, k=[1]),
        f=L(1, 2),
        g=(1, 2),
        h=nn.Parameter(torch.ones(1)),
    )
    got = load_ckpt(write(fresh(), path, odd=odd))["odd"]
    assert got["b"].tolist() == [0, 1] and {k: v for k, v in got.items() if k not in "bh"} == dict(
        i="macro_f1", j=["K-1", "K-2"], a=1.0, c="x", d={"z": 1}, e={"k": [1]}, f=[1, 2], g=(1, 2)
    )
    assert type(got["h"]) is torch.Tensor and type(plain(np.bool_(True))) is bool


# ---------------------------------------------------------------- plots


def test_korean_names_are_drawn_letter_by_letter(tmp_path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from pillsnap.core.plots import save_fig, show_grid, use_korean_font

    def complaints(text, **kw):
        fig = plt.figure()
        fig.text(0.1, 0.5, text, **kw)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            fig.canvas.draw()
        plt.close(fig)
        return [str(w.message) for w in seen if "missing from" in str(w.message)]

    name = "뷁꿻쀍 타이레놀정500밀리그람(아세트아미노펜) ㈜한국 ★☆ → ≥ ≤ × · ° ± ㎎ ㎖ μ − – … “판별 불가”"
    assert len(complaints(name, family="DejaVu Sans")) > 15, "the check itself sees missing letters"
    with matplotlib.rc_context():
        use_korean_font()
        assert complaints(name) == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            f = save_fig(
                show_grid([np.zeros((40, 30, 3), np.uint8)] * 3, [name, "가나정", "K-000573"], cols=2),
                tmp_path / "grid.png",
            )
    assert f.stat().st_size > 2000 and partials(tmp_path) == []


@pytest.mark.parametrize(
    "text, width, out",
    [
        ("타이레놀정500밀리그람(아세트아미노펜)", 14, "타이레놀정500\n밀리그람(아세…"),
        ("one two three", 8, "one two\nthree"),
        ("", 8, ""),
        ("가나다라마바사아자차카", 6, "가나다\n라마…"),
        ("a\nb\nc", 8, "a\nb…"),
        ("K-000573", 20, "K-000573"),
    ],
)
def test_titles_are_wrapped_by_their_width(text, width, out):
    from pillsnap.core.plots import wrap_title

    assert wrap_title(text, width) == out


def test_the_font_carries_its_licence_and_not_the_reserved_name():
    from fontTools.ttLib import TTFont

    from pillsnap.core.plots import font_path

    names = {i: TTFont(font_path())["name"].getDebugName(i) for i in (1, 3, 4, 6, 13)}
    assert (
        not any("nanum" in names[i].lower() for i in (1, 3, 4, 6))
        and "nanum" not in font_path().name.lower()
        and "Open Font License" in names[13]
    )
    licence = (font_path().parent / "OFL.txt").read_text(encoding="utf-8")
    assert "SIL OPEN FONT LICENSE" in licence and "NAVER Corporation" in licence and "Reserved Font Name" in licence
    assert font_path().stat().st_size < 2_500_000


def test_boxes_are_drawn_on_a_copy():
    from pillsnap.core.plots import draw_boxes

    photo = np.full((128, 96, 3), 200, np.uint8)
    out = draw_boxes(photo, [[20, 40, 70, 100], [-10, 90, 500, 400]], ["가나정 0.98", "한쪽 밖"], colour="#D55E00")
    assert (photo == 200).all() and out.shape == photo.shape and out.dtype == np.uint8
    assert out[70, 20].tolist() == [0xD5, 0x5E, 0] and out[70, 45].tolist() == [200] * 3
    assert (draw_boxes(photo, np.zeros((0, 4))) == photo).all()


def test_a_smoke_runs_folder_lives_as_long_as_its_process(tmp_path):
    code = (
        "from pillsnap.core.jobs import Job, JobResult\n"
        "class Little(Job):\n    def work(self, run, cfg): return JobResult('done')\n"
        "root = Little().run().root; print(root, root.is_dir())\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert (Path(said[0]).parent, said[1]) == (tmp_path, "True")
    assert not list(tmp_path.glob("pillsnap_*"))


JOB = """
import os, signal, sys
from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import Job, JobResult
class Little(Job):
    def work(self, run, cfg):
        how = sys.argv[2]
        if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if how == "term": os.kill(os.getpid(), signal.SIGTERM)
        if how == "interrupt": raise KeyboardInterrupt
        if how == "refuse": raise PillsnapError("not like this")
        if how == "crash": raise ValueError("no")
        if how == "claim": return JobResult("done", outputs=[run.root/"nowhere.txt"])
        return JobResult("done")
Little(run_dir=sys.argv[1], config="smoke", overrides=sys.argv[3:]).run()
"""


@pytest.mark.spec("SG1")
def test_a_record_keeps_every_attempt(tmp_path):
    """Ctrl-C and SIGTERM interrupt; an exception fails; kill -9 dies without a word. What crashed under these
    settings is counted, however it ended later."""
    from pillsnap.core.jobs import crashed_attempts, read_record

    ends = {
        "interrupt": "interrupted",
        "term": "interrupted",
        "crash": "failed",
        "refuse": "failed",
        "claim": "failed",
        "kill": "died",
        "finish": "finished",
    }
    for how in ends:
        python(JOB, tmp_path, how)
    rec = read_record(tmp_path, "stage")
    assert [a["status"] for a in rec["attempts"]] == list(ends.values()) and rec["status"] == "finished"
    assert [a["raised"] for a in rec["attempts"]] == [
        "KeyboardInterrupt",
        "KeyboardInterrupt",
        "ValueError",
        "PillsnapError",
        "PillsnapError",
        "",
        "",
    ]
    assert (
        all(a["started"] and (a["seconds"] is None) == (a["status"] == "died") for a in rec["attempts"])
        and "no" in rec["attempts"][2]["error"]
    )
    assert [a["status"] for a in crashed_attempts(rec)] == ["failed"] * 3 + ["died"]
    python(JOB, tmp_path, "finish", "train.leak_gap=true")
    assert (
        len(read_record(tmp_path, "stage")["attempts"]) == 8 and crashed_attempts(read_record(tmp_path, "stage")) == []
    )


@pytest.mark.spec("SG1")
def test_a_restart_of_the_machine_is_no_crash(tmp_path):
    from pillsnap.core.jobs import crashed_attempts, read_record, record_path

    python(JOB, tmp_path, "kill")
    rec = read_record(tmp_path, "stage")
    assert rec["status"] == "running"
    save_json({**rec, "attempts": [{**rec["attempts"][0], "boot": "another"}]}, record_path(tmp_path, "stage"))
    python(JOB, tmp_path, "finish")
    rec = read_record(tmp_path, "stage")
    assert [a["status"] for a in rec["attempts"]] == ["restarted", "finished"] and crashed_attempts(rec) == []
