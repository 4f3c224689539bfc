"""The classifier's stage in several gloo processes: one stage, whoever shares it, and whoever continues with it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
from fastai.callback.core import Callback
from test_memory import Painted, table
from test_smoke_train import split_folder
from test_stop_and_go import CM
from torch import nn

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.core.jobs import RunFolder, read_record, why_stale
from pillsnap.core.logs import logged_lines
from pillsnap.dataset import sources, splits
from pillsnap.dataset.datasets import PillsnapClsDataset
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.training import distributed
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.distributed import why_not_connected

# CUDA_VISIBLE_DEVICES: on a machine with a GPU these processes compute on the CPU too
ENV = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")} | {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
}
together = pytest.mark.skipif(
    bool(why_not_connected()), reason=f"two processes of this machine cannot talk to each other: {why_not_connected()}"
)
OVER = [
    "data.classification.img_size=64",
    "train.classification.epochs=1",
    "train.classification.batch_size=8",
    "train.num_threads=1",
]


def two_processes(run, overrides) -> list[str]:
    "The command line of the classifier's job in two processes."
    command = [sys.executable, "-m", "pillsnap", "distributed", "classifier", "--run-dir", str(run)]
    return [*command, "--config", "smoke", "--processes", "2", *overrides]


@pytest.fixture(scope="module")
def split_run(tmp_path_factory, delivery):
    "A run folder with a split, and nothing that is made of it."
    return split_folder(tmp_path_factory.mktemp("split") / "run", delivery)


SHARED = {
    "the detector's folder": (splits, "write_yolo_tree"),
    "the pack": (sources, "build_stage_pack"),
    "the photo database": (sources, "lmdb_converter"),
}


@pytest.mark.spec("BX10")
@pytest.mark.parametrize("what", SHARED)
def test_what_all_processes_want_one_of_them_makes(split_run, tmp_path, what, monkeypatch):
    "They ask at the same moment; the others wait and take what the first has made."
    root, n = tmp_path / "run", 3
    shutil.copytree(split_run, root, symlinks=True)
    cfg, data = load_config("smoke", [f"paths.exp_dir={root}"]), load_split_data(root, 0)
    photos = PillsnapClsDataset(data.val, data.class_map, data.root, 32, False)
    ask = {
        "the detector's folder": lambda: splits.write_detector_tree(RunFolder(root, "detector"), 0),
        "the pack": lambda: sources._open_pack(data, cfg),
        "the photo database": lambda: sources._build_lmdb(photos, data, root, {}, sources._used_views(photos)),
    }[what]
    module, name = SHARED[what]
    made, real, gate = [], getattr(module, name), threading.Barrier(n)

    def make(*args, **kwargs):
        made.append(name)
        time.sleep(0.3)
        return real(*args, **kwargs)

    def together_with_others(_):
        gate.wait()
        return ask()

    monkeypatch.setattr(module, name, make)
    with ThreadPoolExecutor(n) as pool:
        found = list(pool.map(together_with_others, range(n)))
    assert made == [name] and len(found) == n and all(f is not None for f in found)


@together
def test_two_processes_are_one_job(tmp_path, delivery):
    "Started as `accelerate launch` starts them; the first alone writes."
    run = split_folder(tmp_path / "run", delivery, *OVER)
    r = subprocess.run(two_processes(run, OVER), env=ENV, capture_output=True, text=True, timeout=580)
    assert r.returncode == 0, (r.stdout + r.stderr)[-3000:]
    log = (run / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    steps = re.findall(r"\[train\] e=1/1 s=(\d+)/(\d+)", log)
    photos = int(re.search(r"loaders: (\d+) train samples", log)[1])
    assert [int(a) for a, _ in steps] == list(range(1, photos // 8 + 1)), (
        "a batch is a batch, whoever shares it; one process logs"
    )
    assert load_ckpt(run / "checkpoints" / "classifier" / "last.pt")["epoch"] == 1
    assert (
        read_record(run, "classifier")["status"] == "finished"
        and why_stale(run, "classifier", load_config("smoke", [*OVER, f"paths.exp_dir={run}"])) is None
    )
    assert len(list((run / "tb").glob("*/events*"))) == len(list((run / "tb").iterdir())), (
        "one TensorBoard file per stage"
    )


def stopped_once_saved(command: list[str], checkpoint: Path) -> tuple[int, str]:
    "Start a training, send SIGTERM as soon as the checkpoint is there; its exit status and what it printed."
    p = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 240
        while p.poll() is None and not checkpoint.exists() and time.monotonic() < end:
            time.sleep(0.05)
        p.send_signal(signal.SIGTERM)
        said = p.communicate(timeout=240)[0]
    finally:
        p.kill()
    return p.returncode, said


@together
@pytest.mark.spec("BX10", "CT15")
def test_two_processes_save_when_they_are_asked_to_stop(tmp_path, delivery):
    "SIGTERM at the command, as a scheduler sends it: the first process saves in mid-epoch and says so."
    run, over = (
        split_folder(tmp_path / "run", delivery, *OVER),
        [
            *OVER[:1],
            *OVER[2:],
            "train.classification.epochs=500",
            "train.classification.saving.every_steps=2",
            "train.classification.early_stopping.patience=500",
        ],
    )
    last = run / "checkpoints" / "classifier" / "last.pt"
    status, said = stopped_once_saved(two_processes(run, over), last)
    log = (run / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    epoch, batches = re.search(
        r"stopped by SIGTERM in epoch (\d+), (?:after (\d+) batches|which is over)", log
    ).groups()
    assert status and "ended with status" in said and read_record(run, "classifier")["status"] == "interrupted", said[
        -2000:
    ]
    ckpt = load_ckpt(last)
    assert (ckpt["epoch"], ckpt["position"]["batch"]) == (
        (int(epoch) - 1, int(batches)) if batches else (int(epoch), 0)
    )


# a network without batch statistics or dropout, plain SGD (AdamW would make a step of rounding errors), windows of
# two batches, a save after every batch
WORLD = [
    "data.classification.img_size=64",
    "train.num_threads=1",
    (
        "train.classification={backbone: test_convnext, batch_size: 8, grad_accum_steps: 2, epochs: 2, amp: false, "
        "optimizer: sgd, lr: 0.02, drop_rate: 0.0, ema: {enabled: true, decay: 0.9}, saving: {every_minutes: 1.0e-9}}"
    ),
]
STOP = (1, 2)  # the third batch of the second epoch, in the middle of a window
STAGE = textwrap.dedent("""
    import json, sys
    sys.path.insert(0, sys.argv[1])
    from test_distributed import watched_stage
    from pillsnap.training.distributed import launch_from_notebook
    run, world, stop, over = sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]), sys.argv[5:]
    launch_from_notebook(watched_stage, (stop, run, over), world)
""")


class Shares(Callback):
    """Writes down a share before its gradients meet the others'; the first process is killed after batch `stop`, when
    it is saved."""

    order, run_valid = 99, False

    def __init__(self, run: str, rank: int, stop=None):
        self.run, self.rank, self.stop = run, rank, stop

    def after_pred(self):
        with open(f"{self.run}/seen.jsonl", "a") as f:
            print(json.dumps([self.epoch, self.iter, self.learn.meta["paths"]]), file=f)

    def after_batch(self):
        if [self.epoch, self.iter] == self.stop and not self.rank:
            os.kill(os.getpid(), 9)


class Alone(ClassifierJob):
    def work(self, run, cfg):
        return super().work(run, cfg, [Shares(str(run.root), 0)])


def watched_stage(stop, run: str, over: list[str]) -> None:
    "The classifier's stage in one of several processes."
    plain = distributed.shared_callbacks

    def watched(train, accelerator):
        return [*plain(train, accelerator), Shares(run, accelerator.process_index, stop)]

    distributed.shared_callbacks = watched
    distributed.run_rank("classifier", run, "smoke", over)


def stage(run: Path, world: int, stop=None) -> str:
    "What the classifier's stage says in so many processes; one of them is this one."
    if world == 1:
        with logged_lines() as said, mock.patch.object(torch.cuda, "is_available", return_value=False):
            Alone(run_dir=str(run), config="smoke", overrides=tuple(WORLD), epochs=2).run()
        return "\n".join(said)
    r = subprocess.run(
        [sys.executable, "-c", STAGE, str(Path(__file__).parent), str(run), str(world), json.dumps(stop), *WORLD],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert bool(r.returncode) == bool(stop), r.stderr[-2000:]
    return r.stdout + r.stderr


def seen(run: Path, first=(0, 0), last=(9, 9)) -> list[tuple]:
    "Rows that were seen in batches `first` to `last`, with their epoch, in order."
    rows = [json.loads(line) for line in (run / "seen.jsonl").read_text().splitlines()]
    return sorted((e, p) for e, i, paths in rows if first <= (e, i) <= last for p in paths)


@pytest.fixture(scope="module")
def killed(delivery, tmp_path_factory):
    "A stage of two processes whose first was killed in mid-epoch; and the same stage in one process, undisturbed."
    root = tmp_path_factory.mktemp("world")
    for name in ("two", "straight"):
        split_folder(root / name, delivery, *WORLD)
    said = stage(root / "two", 2, STOP)
    assert re.search(r"PillsnapError: process [01] of 2 failed: ", said), said[-2000:]
    stage(root / "straight", 1)
    return root


@together
@pytest.mark.spec("BX10", "CT12", "CT16")
@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_processes_goes_on(killed, tmp_path, world):
    """Begun by two, killed in the middle of an epoch and of a window, gone on with by one and by three: every photo
    once, the weights of one undisturbed process."""
    run = tmp_path / "run"
    shutil.copytree(killed / "two", run, symlinks=True)
    ckpt = load_ckpt(run / "checkpoints" / "classifier" / "last.pt")
    assert (ckpt["epoch"], ckpt["position"]["batch"], ckpt["position"]["callbacks"]["accumulate"]["count"]) == (1, 3, 1)
    before = seen(run, last=STOP)
    (run / "seen.jsonl").unlink()
    said = stage(run, world)
    assert "after epoch 1 of 2 and 3 batches of the next" in said, said[-2000:]
    after, whole = seen(run), seen(killed / "straight")
    assert after and sorted(before + after) == whole and seen(run, first=(STOP[0], STOP[1] + 1)) == after
    a, b = (load_ckpt(f / "checkpoints" / "classifier" / "last.pt") for f in (killed / "straight", run))
    start = load_ckpt(killed / "two" / "checkpoints" / "classifier" / "last.pt")["model_state"]
    moved = max((a["model_state"][k] - v).abs().max() for k, v in start.items())
    for part in ("model_state", "ema_state"):
        for k, v in a[part].items():
            torch.testing.assert_close(
                b[part][k], v, rtol=1e-4, atol=1e-3 * float(moved), msg=lambda m, part=part, k=k: f"{part} {k}: {m}"
            )
    one, other = (read_json(f / "reports" / "metrics.json")["history"] for f in (killed / "straight", run))
    assert [r["train_loss"] for r in other] == pytest.approx([r["train_loss"] for r in one], rel=1e-4)
    assert [r["classification"]["n"] for r in other] == [r["classification"]["n"] for r in one]


class Torn(Painted):
    "Photos of which some cannot be opened."

    bad = {"0.png", "1.png", "2.png", "9.png"}

    def open(self, photo, view, reduce=1):
        if photo.path in self.bad:
            raise OSError("torn")
        return super().open(photo, view, reduce)


BROKEN = textwrap.dedent("""
    import sys
    sys.path.insert(0, sys.argv[1])
    from test_distributed import broken_share
    from pillsnap.training.distributed import launch_from_notebook
    launch_from_notebook(broken_share, (sys.argv[2],))
""")


def broken_share(folder: str) -> None:
    """Two epochs over 25 photos in batches of six: the first process has nothing to show in the first batch and in
    the last; the whole network, batch norm and dropout included."""
    from accelerate import Accelerator, PartialState

    from pillsnap.training.callbacks import Accumulate
    from pillsnap.training.distributed import Distributed, EmptyShare
    from pillsnap.training.learner import Outputs, build_learner
    from pillsnap.training.presets import ClassifierSettings

    torch.set_num_threads(1)
    me = PartialState(cpu=True)
    cfg = load_config(
        "smoke", ["train.classification={epochs: 2, lr: 0.01, amp: false, mixing: {mixup: 0.2, prob: 1.0}}"]
    )
    d = PillsnapClsDataset(table(25), CM, Torn(), 16, True, seed=7)
    train = PhotoLoader(d, 6, num_workers=2).shard(me.process_index, me.num_processes)
    val = PhotoLoader(PillsnapClsDataset(table(13), CM, Painted(), 16), 6).shard(
        me.process_index, me.num_processes
    )  # a last batch of one photo
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3)
    )
    s = ClassifierSettings.from_config(cfg)
    learn = build_learner(s, net, nn.CrossEntropyLoss(), train, {"whole": val}, 3, out=Outputs(quiet=True))
    learn.add_cbs([EmptyShare(), Accumulate(), Distributed(Accelerator(cpu=True))])
    learn.fit(2)
    torch.save(
        dict(
            weights=[p.detach() for p in net.parameters()],
            buffers=list(net.buffers()),
            rows=[(r["skipped"], r["classification"]["n"]) for r in learn.rows],
            losses=[r["train_loss"] for r in learn.rows],
            batches=int(learn.history.batches),
        ),
        f"{folder}/{me.process_index}.pt",
    )


@together
@pytest.mark.spec("TL4")
def test_a_share_without_a_readable_photo_keeps_nobody_waiting(tmp_path):
    "Nor one of a last batch that is too small for all; both processes end with the same weights."
    r = subprocess.run(
        [sys.executable, "-c", BROKEN, str(Path(__file__).parent), str(tmp_path)],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    a, b = (torch.load(tmp_path / f"{k}.pt", weights_only=True) for k in range(2))
    for v, w in zip(a["weights"], b["weights"], strict=True):
        assert torch.equal(v, w)
    assert all(torch.isfinite(v).all() for v in [*a["weights"], *a["buffers"], *b["buffers"]])
    assert int(a["buffers"][-1]) == 2 * 3  # batches that batch norm has seen: five an epoch, two of them grey
    assert (
        a["batches"] == b["batches"] == 5 and a["losses"] == b["losses"]
    )  # the two without a photo of the first process are in the loss that it tells
    assert (
        a["rows"] == b["rows"] == [(4, 13), (8, 13)]
    )  # of both processes: skipped photos so far, and photos of the validation


@pytest.mark.spec("BX10")
def test_processes_go_on_where_one_left_off_within_a_batch():
    """One process takes what follows for a photo that is broken, and stops between two batches of the cut; two go
    on with all that is left."""
    d = PillsnapClsDataset(table(25), CM, Torn(), 16, True, seed=7)
    one = PhotoLoader(d, 6)
    first = next(iter(one))[2]
    state = one.state_dict()
    assert state["row"] > 6 and len(first["paths"]) == 6  # three were broken on the way
    shares = [PhotoLoader(d, 6).shard(r, 2) for r in range(2)]
    rest, batches = [], set()
    for s in shares:
        s.load_state_dict(state)
        got = [m for _, _, m in s]
        batches.add(len(got))
        rest += [p for m in got for p in [*m["paths"], *(b["path"] for b in m["skipped"])]]
    assert len(batches) == 1 and sorted([*rest, *first["paths"], *(b["path"] for b in first["skipped"])]) == sorted(
        d.paths
    )


CLOSED = "import torch; from pillsnap.training.distributed import launch_from_notebook; launch_from_notebook(print)"


@together
def test_no_process_works_and_leaves_before_all_are_connected(monkeypatch):
    "A process that left early broke the connection of a slower one: a short job failed on a busy machine."
    connected = torch.multiprocessing.get_context("fork").Event()
    join = torch.distributed.init_process_group

    def slowly(*args, rank: int, **kwargs):
        join(*args, rank=rank, **kwargs)
        if rank == 0:
            time.sleep(1.5)
            connected.set()

    def work():
        assert connected.is_set(), "this process works while another one is not connected yet"

    monkeypatch.setattr(torch.distributed, "init_process_group", slowly)
    distributed.fork_processes(work, (), 2)


def test_a_closed_loopback_is_said_in_one_line():
    "On a machine whose loopback interface is down nothing is started, and the first line says so."
    closed = ["unshare", "--net", "--map-root-user"]
    if not shutil.which("unshare") or subprocess.run([*closed, "true"], capture_output=True).returncode:
        pytest.skip("this system makes no network of its own for a process (unshare)")
    r = subprocess.run([*closed, sys.executable, "-c", CLOSED], env=ENV, capture_output=True, text=True, timeout=240)
    said = r.stderr[r.stderr.rindex("PillsnapError") :].splitlines()
    assert (
        r.returncode
        and "two processes of this machine cannot talk to each other: its loopback interface" in said[0]
        and "ip link set lo up" in said[2]
    )


GPU_LAUNCHER = textwrap.dedent("""
    import sys
    from pathlib import Path
    import torch
    from accelerate import PartialState
    from pillsnap.training import distributed

    def starts_cuda(*args): raise AssertionError("CUDA was started before the fork")
    torch._C._cuda_getDeviceCount = torch.cuda.is_available = starts_cuda
    torch.cuda.device_count = lambda: 2   # as the driver says on a machine with two

    def work(folder):
        me = PartialState(cpu=True)
        Path(folder, str(me.process_index)).write_text(str(me.num_processes))

    distributed.fork_processes(work, (sys.argv[1],), 2)
""")


@together
def test_the_launcher_of_gpus_forks_before_cuda_is_started(tmp_path):
    """accelerate's notebook launcher, with a driver that reports two GPUs: both processes start, and nothing asked
    CUDA itself."""
    r = subprocess.run(
        [sys.executable, "-c", GPU_LAUNCHER, str(tmp_path)], env=ENV, capture_output=True, text=True, timeout=240
    )
    assert r.returncode == 0, r.stderr[-2000:]
    assert "Launching training on 2" in r.stdout, "notebook_launcher says this, debug_launcher says nothing"
    assert {f.name: f.read_text() for f in tmp_path.iterdir()} == {"0": "2", "1": "2"}


def test_one_gpu_trains_in_this_process(monkeypatch, tmp_path):
    "accelerate refuses one process with --multi_gpu, so none is started; two processes are not sent to one GPU."
    ran = []
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(distributed, "run_forwarding_signals", lambda command: pytest.fail(f"started {command}"))
    for kind in (distributed.ClassifierJob, distributed.DetectorJob):
        monkeypatch.setattr(kind, "run", lambda self: ran.append((type(self).__name__, self.seed, self.epochs)))
    for stage in ("classifier", "detector"):
        distributed.distributed_command(
            stage, tmp_path, 0, "smoke", ["train.seed=7", "train.classification.epochs=3", "train.detection.epochs=2"]
        )
    assert ran == [("ClassifierJob", 7, 3), ("DetectorJob", 7, 2)]
    with pytest.raises(PillsnapError, match="2 processes need a GPU each, and this machine has 1"):
        distributed.distributed_command("classifier", tmp_path, 2, "smoke")


@pytest.mark.parametrize("gpus, want", [(0, "2"), (2, "2"), (4, "4")])
def test_one_process_per_gpu(monkeypatch, tmp_path, gpus, want):
    "As many as there are GPUs, two without one."
    commands = []
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(distributed, "run_forwarding_signals", lambda command: commands.append(command) or 0)
    monkeypatch.setattr(distributed, "check_loopback", lambda: None)
    distributed.distributed_command("classifier", tmp_path, 0, "smoke")
    (command,) = commands
    assert command[command.index("--num_processes") + 1] == want and "--multi_gpu" in command


def test_the_time_is_asked_for_rarely(monkeypatch):
    """A message about the time stops the GPU and waits for every process: one in fifty batches, one at the end of
    an epoch, two when a fit begins."""
    from accelerate import Accelerator
    from fastai.callback.core import TrainEvalCallback

    from pillsnap.training.callbacks import Accumulate, PillLearner, PillLoaders, Unpack, Validate
    from pillsnap.training.monitoring import Clock, History

    sent = []
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda objects: sent.append(objects) or objects)
    batch = (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]), {})
    seconds = iter(range(10**6))
    cbs = [
        TrainEvalCallback(),
        Unpack(),
        Accumulate(),
        Validate(),
        History(),
        Clock(9.0, now=lambda: next(seconds)),
        distributed.EmptyShare(),
        distributed.Distributed(Accelerator(cpu=True)),
    ]
    learn = PillLearner(
        PillLoaders([batch] * 120, [batch]), nn.Linear(8, 3), nn.CrossEntropyLoss(), default_cbs=False, cbs=cbs
    )
    learn.num_classes = 3
    learn.fit(2)
    assert len(sent) <= 2 * (120 // 50 + 1) + 2 and not learn.clock.over
    assert learn.rows[-1]["clock"]["hours"] == pytest.approx((len(sent) - 1) / 3600), (
        "the row of an epoch holds the time of its end"
    )
