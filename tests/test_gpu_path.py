"""What can be shown of the GPU's path without one: the host never waits, numbers are the CPU's, the layout fits."""

import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import TrainEvalCallback
from fastai.optimizer import OptimWrapper
from gpu_stand_in import HostReads, StandInGpu
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from pillsnap.core.container import FolderFiles
from pillsnap.core.settings import AugmentClassification
from pillsnap.dataset import datasets as D
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.sampling import EpochSampler
from pillsnap.delivery.classmap import ClassMap
from pillsnap.models.metrics import topk_accuracy
from pillsnap.models.neighbours import embed_photos, nearest
from pillsnap.photos.augmentation import _OPS, COL, DRAWS, TimmPolicy, build_transforms_classification, randaugment_ops
from pillsnap.photos.images import IMAGENET_MEAN, IMAGENET_STD
from pillsnap.training.callbacks import PillLearner, PillLoaders, Unpack, Validate, batch_mass
from pillsnap.training.monitoring import AsyncScalar, Clock, History

OFF = {"randaugment": False, "hflip": False, "color_jitter": (0.0, 0.0, 0.0, 0.0)}
SETTINGS = {
    "default": {},
    "all": {"rotation": 20.0, "erasing": 0.5},
    "demo": {"randaugment": False, "color_jitter": (0.2, 0.2, 0.2, 0.0), "rotation": 30.0},
    "narrow": {"randaugment": False, "color_jitter": (0.2, 0.2, 0.2, 0.1), "rotation": 30.0, "erasing": 0.2},
    "nothing": OFF,
}

GOLDEN = {  # of the pixel (40, 20) of the fourth photo, its three numbers; means of the channels; standard deviation
    "default": (-0.734442, -0.762500, 0.654188, 0.018041, 0.165039, 0.484517, 0.988580),
    "all": (-0.022308, -0.370132, 0.270346, 0.033164, 0.169473, 0.411697, 0.919446),
    "demo": (0.098914, -0.261544, 0.040978, 0.026142, 0.179002, 0.457872, 1.015680),
    "narrow": (0.093469, -0.267111, 0.204952, 0.046285, 0.204861, 0.444400, 0.979922),
    "nothing": (-0.833547, -1.002801, 0.461351, 0.067171, 0.213324, 0.504719, 1.001799),
}


def pictures(n: int, size: int, seed: int = 0) -> torch.Tensor:
    "Smooth colours with edges, uint8 [n, 3, size, size], laid out as the loader's buffers are."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = 128 + 80 * np.sin(
        x[..., None] * rng.uniform(2, 7, (n, 1, 1, 3)) + y[..., None] * rng.uniform(2, 7, (n, 1, 1, 3))
    )
    waves[:, size // 3 : size // 2, size // 4 : size // 2] += 40
    return torch.from_numpy(waves.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def draws_of(n: int, seed: int = 1) -> np.ndarray:
    "Numbers as a sample's dice give them, [n, DRAWS]."
    draws = np.full((n, DRAWS), 0.999)  # the last two columns came later, and nothing is blurred unless asked for
    draws[:, :-2] = np.random.default_rng(seed).random((n, DRAWS - 2))
    return draws


def number(op: str) -> float:
    "What must be drawn for an operation of RandAugment."
    return (_OPS.index(op) + 0.5) / len(_OPS)


class Drawn(D.Source):
    "Pictures that are in memory, a different one for each path."

    def view(self, photo, view, out, window=None, flip=False):
        np.copyto(out, pictures(1, len(out), int(photo.path[:-4]))[0].permute(1, 2, 0).numpy())


def photos(n: int, **kw) -> D.PillsnapClsDataset:
    "A set of n pictures of three drugs."
    keys = ["K-000001", "K-000002", "K-000003"]
    rows = pd.DataFrame({"path": [f"{i}.png" for i in range(n)], "class_key": [keys[i % 3] for i in range(n)]})
    return D.PillsnapClsDataset(rows, ClassMap(keys), Drawn(), 32, **kw)


# The stand-in itself ------------------------------------------------------------------------------------------------


def rows_of(x: torch.Tensor) -> torch.Tensor:
    "Row numbers that are on the GPU."
    return x.long().clamp(0, 1)


# Each of these lines makes a host wait for a real GPU.
WAITS = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
    "mask": lambda x: x[x > 0],
    "masked put": lambda x: x.__setitem__(x > 0, 1.0),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "host rows": lambda x: x[torch.tensor([0, 2])],
    "list of rows": lambda x: x[[0, 2]],
    "scalar put": lambda x: x.__setitem__(rows_of(x), 1.0),
    "new tensor": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "to": lambda x: torch.ones(3).to("cuda"),
    "pageable": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "pinned, but waits": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "equal": lambda x: torch.equal(x, x),
    "copy_": lambda x: x.copy_(torch.ones(4)),
    "fetch": lambda x: torch.zeros(4).copy_(x),
}
# These do not.
FREE = {
    "pinned": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "rows": lambda x: x[rows_of(x)],
    "rows put": lambda x: x.__setitem__(x.long(), x + 1),
    "slice put": lambda x: x[1:3].__setitem__(slice(0, 1), 0.0),
    "masked_fill": lambda x: x.masked_fill_(x > 0, 2.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "full": lambda x: torch.full((2,), 3.0, device="cuda"),
    "index_fill_": lambda x: x.index_fill_(0, rows_of(x), 1.0),
    "arange": lambda x: torch.arange(4, device="cuda") + x,
    "layout": lambda x: x.view(1, 1, 2, 2).contiguous(memory_format=torch.channels_last),
}


def test_the_stand_in_sees_every_kind_of_wait():
    for name, line in WAITS.items():
        with StandInGpu() as gpu:
            line(gpu.put(torch.arange(4.0)))
        assert gpu.waits, name
    for name, line in FREE.items():
        with StandInGpu() as gpu:
            out = line(gpu.put(torch.arange(4.0)))
        assert not gpu.waits and (out is None or out.device == torch.device("cuda:0")), (name, gpu.waits)
    with StandInGpu() as gpu, pytest.raises(RuntimeError, match="same device"):
        gpu.put(torch.ones(3)) + torch.ones(3)


# Augmentation -------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL1")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_augmentation_on_a_gpu_waits_for_nothing_and_gives_the_cpus_numbers(name, channels_last):
    x, draws, a = pictures(24, 64), draws_of(24), AugmentClassification(**SETTINGS[name])
    want = build_transforms_classification(64, a)(x.clone(memory_format=torch.preserve_format), draws)
    with StandInGpu() as gpu:
        got = build_transforms_classification(64, a, channels_last=channels_last)(gpu.put(x), draws)
    assert gpu.waits == []
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert got.dtype == torch.float32
    assert (gpu.get(got) - want).abs().max() < 1e-4


@pytest.mark.spec("TL1")
@pytest.mark.parametrize("channels_last", [True, False])
def test_validation_on_a_gpu_waits_for_nothing_and_gives_the_cpus_numbers(channels_last):
    x = pictures(5, 64)
    with StandInGpu() as gpu:
        got = build_transforms_classification(64, train=False, channels_last=channels_last)(gpu.put(x))
    assert gpu.waits == []
    assert got.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(gpu.get(got), build_transforms_classification(64, train=False)(x))


def test_augmented_batches_are_those_of_the_first_version():
    """Numbers of one pixel and of all, written down before the GPU's path was rebuilt: a run on a CPU must not change.

    Photos that drop bits are left out: they do it before they are turned now."""
    ops = randaugment_ops(draws_of(24), 64)
    same = torch.from_numpy((ops[0][0] != "Posterize") & (ops[1][0] != "Posterize"))
    for name, kw in SETTINGS.items():
        got = build_transforms_classification(64, AugmentClassification(**kw))(pictures(24, 64), draws_of(24))[same]
        found = [*got[3, :, 20, 40].tolist(), *got.mean((0, 2, 3)).tolist(), got.std().item()]
        assert np.allclose(found, GOLDEN[name], rtol=0, atol=2e-5), name


@pytest.mark.spec("TL1", "X52")
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("magnitude", [7, 8, 9])
@pytest.mark.parametrize("op", _OPS)
def test_each_operation_of_randaugment_is_torchvisions(op, magnitude, device):
    "Alone in the chain, with either sign; to the rounding down of bytes that torchvision works on."
    size = 331  # where torchvision's shifts are whole pixels
    tf = build_transforms_classification(size, AugmentClassification(**{**OFF, "randaugment": True}))
    x = pictures(2, size)
    draws = np.full((2, DRAWS), 0.999)
    draws[:, COL["op1"]], draws[:, COL["op2"]] = number(op), number("Identity")
    draws[:, COL["much1"]], draws[:, COL["sign1"]] = (magnitude - 6.5) / 3, [0.2, 0.8]
    if device == "gpu":
        with StandInGpu() as gpu:
            got = gpu.get(tf(gpu.put(x), draws))
    else:
        got = tf(x.clone(memory_format=torch.preserve_format), draws)
    got = (got * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) * 255
    much, signed = v2.RandAugment._AUGMENTATION_SPACE[op]
    level = float(much(31, size, size)[magnitude]) if much(31, size, size) is not None else 0.0
    for k, sign in enumerate((-1, 1)):
        v = level * sign if signed else level
        if op.startswith("Translate"):
            v = -v  # the same two signs in the other order
        bilinear, grey = v2.InterpolationMode.BILINEAR, [128.0] * 3
        want = v2.RandAugment()._apply_image_or_video_transform(x[k], op, v, bilinear, {torch.Tensor: grey})
        if op.startswith("Shear"):  # about the middle, where torchvision keeps the corner
            shear = [np.degrees(np.arctan(v)) if op == f"Shear{c}" else 0.0 for c in "XY"]
            want = v2.functional.affine(x[k], 0.0, [0, 0], 1.0, shear, bilinear, grey)
        diff, turned = (got[k] - want).abs(), op in ("Rotate", "ShearX", "ShearY")
        if turned or op.startswith("Translate"):
            diff = diff[..., 40:-40, 40:-40]  # the border is filled in another way
        assert diff.max() <= (5 if turned else 1.5) and diff.mean() < 1, (op, v, diff.max(), diff.mean())


def test_a_turn_does_not_make_noise_of_dropped_bits():
    "A flat colour that is turned and posterized stays flat, on every device."
    tf = build_transforms_classification(64, AugmentClassification(**{**OFF, "randaugment": True}))
    x = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    draws = np.full((1, DRAWS), 0.5)
    draws[:, COL["op1"]], draws[:, COL["op2"]] = number("Rotate"), number("Posterize")
    middle = tf(x, draws)[0, 0, 16:-16, 16:-16]
    assert middle.max() - middle.min() < 1e-4


# timm's policies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rand-m8-n2-mstd0.5-inc1", "original", "augmix-m5-w2", "3a"])
def test_a_policy_gives_timms_pictures_and_leaves_everybodys_dice_alone(name):
    import random

    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform

    makers = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}
    hparams = {"translate_const": int(64 * 0.45), "img_mean": (128, 128, 128)}
    theirs = makers.get(name[:4], auto_augment_transform)(name, hparams)
    ours = pickle.loads(pickle.dumps(TimmPolicy(name, 64)))
    for k, x in enumerate(pictures(6, 64).permute(0, 2, 3, 1).numpy()):
        u = (k + 0.5) / 6
        random.seed(int(u * 2**31))
        np.random.seed(int(u * 2**31))
        want = np.asarray(theirs(Image.fromarray(np.ascontiguousarray(x))))
        before = random.getstate(), np.random.get_state()[1].copy()
        assert np.array_equal(ours(x, u), want)
        assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])


def test_a_policy_runs_where_photos_are_opened_and_not_in_the_training_thread(monkeypatch):
    seen, call = set(), TimmPolicy.__call__

    def watched(self, x, u):
        seen.add(threading.current_thread())
        return call(self, x, u)

    monkeypatch.setattr(TimmPolicy, "__call__", watched)
    a = AugmentClassification(auto_augment="rand-m8-n2-mstd0.5", hflip=False)
    d = photos(24, train=True, crop_view_prob=0.0, augment=a)

    def epoch(**kw):
        return torch.cat([x for x, _, _ in PhotoLoader(d, 8, EpochSampler(d, 1), **kw)])

    threads = epoch(num_workers=2)
    assert seen and threading.main_thread() not in seen
    assert torch.equal(threads, epoch()) and torch.equal(threads, epoch(num_workers=1, engine="processes"))


# The loader ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("TL5")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kw", [{}, {"num_workers": 2}])
def test_the_loader_hands_batches_to_a_gpu_without_waiting(train, kw, monkeypatch):
    d = photos(20, train=train, channels_last=True, augment=AugmentClassification(rotation=10.0, erasing=0.3))
    host = [(x, y) for x, y, _ in PhotoLoader(d, 8, EpochSampler(d, 1), **kw)]
    with StandInGpu() as gpu, gpu.as_cuda(monkeypatch):
        loader = PhotoLoader(d, 8, EpochSampler(d, 1), device="cuda", pin_memory=True, **kw)
        there = [(x, y) for x, y, _ in loader]
        assert all(x.device == y.device == torch.device("cuda:0") for x, y in there)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in there)
    assert gpu.waits == []
    for (x, y), (a, b) in zip(there, host, strict=True):
        assert (gpu.get(x) - a).abs().max() < 1e-4 and torch.equal(gpu.get(y), b)


# Validation, the clock, the loop ------------------------------------------------------------------------------------


def answers(sizes=(8, 8, 3), classes: int = 7, seed: int = 0) -> list:
    "Scores and labels of a few batches, with ties and one NaN row."
    g = torch.Generator().manual_seed(seed)
    scores = [(3 * torch.randn(n, classes, generator=g)).round() for n in sizes]
    out = [(z, torch.randint(0, classes, (len(z),), generator=g)) for z in scores]
    out[1][0][2] = float("nan")
    return out


def validated(batches, loss_func, put=lambda t: t) -> tuple:
    "The scores and answers of a pass, and how many waits there were before its end."
    learn = SimpleNamespace(meta={"paths": ["x"]}, loss_func=loss_func, num_classes=7)
    learn.unboxed, learn.taken_over = PillLearner.unboxed, PillLearner.taken_over
    cb = Validate()
    cb.learn = learn
    cb.before_validate()
    for logits, y in batches:
        learn.pred, learn.yb = put(logits), (put(y),)
        cb.after_pred()
    yield
    cb.after_validate()
    yield learn.scores, learn.answers


@pytest.mark.spec("CT21")
@pytest.mark.parametrize("weighted", [False, True])
def test_validation_reads_the_gpu_at_its_end_and_not_before(weighted):
    w = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 3.0]) if weighted else None
    on_cpu = validated(answers(), nn.CrossEntropyLoss(w))
    next(on_cpu)
    scores, found = next(on_cpu)
    with StandInGpu() as gpu:
        loss = nn.CrossEntropyLoss(None)
        loss.weight = None if w is None else gpu.put(w)
        there = validated(answers(), loss, gpu.put)
        next(there)
        assert gpu.waits == []
        scores_there, found_there = next(there)
        assert len(gpu.waits) == 5, "one copy of each kind"  # labels, guesses, confidence, hits, losses
    assert np.array_equal(found["pred"], found_there["pred"]) and np.array_equal(found["labels"], found_there["labels"])
    for k, v in scores.items():
        assert v == scores_there[k] or np.isnan(v), k


@pytest.mark.spec("CT21")
def test_validation_scores_are_those_of_all_photos_at_once():
    batches = [(z.nan_to_num(0.0), y) for z, y in answers()]
    steps = validated(batches, nn.CrossEntropyLoss())
    next(steps)
    scores, _ = next(steps)
    z, y = (torch.cat(v) for v in zip(*batches))
    assert abs(scores["val_loss"] - nn.functional.cross_entropy(z, y).item()) < 1e-6
    assert abs(scores["top5"] - topk_accuracy(z.numpy(), y.numpy(), 5)) < 1e-9 and scores["n"] == 19


def test_the_clock_marks_drugs_without_waiting():
    clock = Clock(1.0)
    clock.learn = SimpleNamespace(rows=[], num_classes=6, training=True)
    clock.before_fit()
    with StandInGpu() as gpu:
        for labels in ([1, 3, 3], [4, 1, 1]):
            clock.learn.yb = (gpu.put(torch.tensor(labels)),)
            clock.after_batch()
        assert gpu.waits == []
    assert gpu.get(clock.drugs).tolist() == [False, True, False, True, True, False] and clock.photos == 6


def test_the_weight_of_a_batch_is_made_on_the_gpu():
    labels = torch.tensor([0, 2, 2])
    with StandInGpu() as gpu:
        plain, weighted = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
        weighted.weight = gpu.put(torch.tensor([1.0, 2.0, 4.0]))
        got = [gpu.get(batch_mass(f, gpu.put(labels))) for f in (plain, weighted)]
    assert gpu.waits == [] and [float(v) for v in got] == [3.0, 9.0] and got[0].dtype == torch.float32


def test_the_live_line_does_not_wait_for_its_loss(monkeypatch):
    late = AsyncScalar()
    with StandInGpu() as gpu, gpu.as_cuda(monkeypatch):
        seen = [late.ask(gpu.put(torch.tensor(float(k)))) for k in range(4)]
    assert gpu.waits == [] and np.isnan(seen[0]) and seen[1:] == [0.0, 1.0, 2.0]


@pytest.mark.spec("RT9")
def test_vectors_are_read_once_a_pass():
    class Plain(nn.Module):
        def embed(self, x):
            return x.flatten(1)

    batches = [(torch.rand(4, 1, 1, 3), torch.arange(4), {"paths": list("abcd")}) for _ in range(5)]
    want = embed_photos(Plain(), batches)
    with StandInGpu() as gpu:
        there = [(gpu.put(x), gpu.put(y), m) for x, y, m in batches]
        got = embed_photos(Plain(), there, "cuda")
    assert len(gpu.waits) == 1, "the labels, at the end"
    assert torch.equal(gpu.get(got.vectors), want.vectors) and np.array_equal(got.labels, want.labels)


@pytest.mark.spec("CT19")
def test_no_step_of_a_training_reads_a_number():
    "As many reads in an epoch of 18 batches as in one of 6: ours, fastai's and the optimizer's, in Python and in C++."
    from test_engine import EVERYTHING, toy_learner

    from pillsnap.training.monitoring import Progress, StepLog

    def reads(batches: int) -> list:
        learn = toy_learner(batches, *EVERYTHING)
        learn.add_cbs([StepLog(1000), Progress("log", show=lambda line: None)])
        with HostReads() as host:
            learn.fit(1)
        return host.waits

    few, many = reads(6), reads(18)
    assert len(few) == len(many), [w for w in many if many.count(w) != few.count(w)]


# TF32 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32_training():
    "TF32 as a training switches it on."
    from pillsnap.core.device import enable_tf32

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    enable_tf32(True)
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


class Watched(nn.Module):
    "A network that writes down which precision it computes with."

    def __init__(self):
        super().__init__()
        self.line, self.precisions = nn.Linear(4, 3), []

    def forward(self, x):
        self.precisions.append((self.training, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return self.line(x)

    embed = forward


TRUE_FP32, TF32 = ("highest", False), ("high", True)


@pytest.mark.spec("CT6", "CT21")
def test_training_may_use_tf32_and_validation_does_not(tf32_training):
    data = [(torch.rand(4, 4), torch.randint(0, 3, (4,)), {"paths": list("abcd"), "skipped": []}) for _ in range(3)]
    model = Watched()

    def opt_func(params, lr):
        return OptimWrapper(opt=torch.optim.SGD(params, lr))

    cbs = [TrainEvalCallback(), Unpack(), Validate(), History()]
    learn = PillLearner(
        PillLoaders(data, data), model, nn.CrossEntropyLoss(), opt_func, 0.1, cbs=cbs, default_cbs=False
    )
    learn.num_classes = 3
    learn.fit(2)
    assert {s[1:] for s in model.precisions if s[0]} == {TF32}
    assert {s[1:] for s in model.precisions if not s[0]} == {TRUE_FP32}
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.spec("RT9")
def test_vectors_and_their_search_do_not_use_tf32(tf32_training, monkeypatch):
    model, seen = Watched(), []
    embed_photos(model, [(torch.rand(2, 4), torch.arange(2), {"paths": ["a", "b"]})])
    assert {s[1:] for s in model.precisions} == {TRUE_FP32}
    matmul = torch.Tensor.__matmul__

    def watched(a, b):
        return (seen.append(torch.get_float32_matmul_precision()), matmul(a, b))[1]

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    nearest(torch.eye(4), torch.eye(4), 2)
    assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"


@pytest.mark.spec("TL1")
def test_colours_do_not_use_tf32(tf32_training, monkeypatch):
    seen, product = [], torch.baddbmm

    def watched(*a):
        return (seen.append(torch.get_float32_matmul_precision()), product(*a))[1]

    monkeypatch.setattr(torch, "baddbmm", watched)
    build_transforms_classification(16)(pictures(2, 16), draws_of(2))
    assert seen == ["highest"]


@pytest.mark.spec("RT2")
def test_the_cosine_head_does_not_use_tf32_forwards_or_backwards(tf32_training, monkeypatch):
    "As a GPU runs it: both products of the head, and the gradients of each."
    import timm

    from pillsnap.models import factory

    seen, linear = [], nn.functional.linear
    net = factory.CosineClassifier(timm.create_model("test_resnet", num_classes=7), 7, dim=16)
    x = torch.rand(4, 3, 32, 32)
    want = net.eval()(x)

    def watched(*a):
        return (seen.append(torch.get_float32_matmul_precision()), linear(*a))[1]

    monkeypatch.setattr(factory.F, "linear", watched)
    monkeypatch.setattr(factory, "linear_fp32", factory._linear_fp32)
    got = net(x)
    assert torch.equal(got, want) and seen == ["highest"] * 2
    got.sum().backward()
    assert seen == ["highest"] * 6 and torch.get_float32_matmul_precision() == "high"
    assert net.directions.weight.grad.abs().sum() > 0 and net.neck[0].weight.grad.abs().sum() > 0


@pytest.mark.spec("RT2")
def test_a_gpu_takes_the_operator_and_a_cpu_the_plain_product(monkeypatch):
    from pillsnap.models import factory

    x, w = torch.rand(4, 5), torch.rand(3, 5)
    calls, op = [], factory._linear_fp32
    monkeypatch.setattr(factory, "_linear_fp32", lambda *a: (calls.append(1), op(*a))[1])
    assert torch.equal(factory.linear_fp32(x, w), nn.functional.linear(x, w)) and not calls
    with StandInGpu() as gpu:
        got = factory.linear_fp32(gpu.put(x), gpu.put(w))
    assert calls and not gpu.waits and torch.equal(gpu.get(got), nn.functional.linear(x, w))


@pytest.mark.spec("X10")
def test_the_evaluation_does_not_use_tf32(tf32_training):
    from pillsnap.models.factory import TorchClassifier

    net = Watched()
    TorchClassifier(net, 2).logits(np.zeros((3, 4), np.float32))
    assert {s[1:] for s in net.precisions} == {TRUE_FP32}


# onnxruntime --------------------------------------------------------------------------------------------------------

GPU_AND_CPU = ["CUDAExecutionProvider", "CPUExecutionProvider"]


class Session:
    "onnxruntime's session, as far as providers go."

    def __init__(self, model, options, providers):
        self.providers = [p if isinstance(p, str) else p[0] for p in providers]  # a provider may stand with its options

    def get_providers(self):
        return self.providers


@pytest.mark.spec("EX3")
@pytest.mark.parametrize("device, asked", [("cuda", 1), ("auto", 1), ("cpu", 0)])
def test_cudas_libraries_are_loaded_before_a_session_that_needs_them(device, asked, monkeypatch):
    from pillsnap.deployment import runtime as P

    order = []
    monkeypatch.setattr(P.ort, "get_available_providers", lambda: GPU_AND_CPU)
    monkeypatch.setattr(P.ort, "preload_dlls", lambda: order.append("libraries"), raising=False)
    monkeypatch.setattr(P.ort, "InferenceSession", lambda *a, **kw: (order.append("session"), Session(*a, **kw))[1])
    session = P.open_session(b"", device)
    assert order == ["libraries"] * asked + ["session"] and session.get_providers() == GPU_AND_CPU[1 - asked :]


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory) -> bytes:
    "A classifier of five drugs at 32 pixels, exported."
    import timm

    from pillsnap.deployment.graph import export_onnx

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("onnx") / "classifier.onnx"
    export_onnx(timm.create_model("test_resnet", num_classes=5).eval(), 32, path)
    return path.read_bytes()


def test_a_float16_network_answers_as_the_float32_one_does(small_onnx):
    from pillsnap.deployment.runtime import OnnxClassifier
    from pillsnap.deployment.timing import in_float16

    half = in_float16(small_onnx)
    x = np.random.default_rng(0).standard_normal((4, 3, 32, 32)).astype(np.float32)
    want, got = (OnnxClassifier(m, 32, "cpu").logits(x) for m in (small_onnx, half))
    assert got.dtype == np.float32 and 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()
    assert len(half) < 0.6 * len(small_onnx)


@pytest.mark.spec("EV6")
@pytest.mark.parametrize("there", [False, True])
def test_the_export_is_timed_by_every_provider_and_says_by_which(there, small_onnx, monkeypatch):
    "With and without CUDA in onnxruntime; the one that is played computes on the CPU and says that it is a GPU."
    from pillsnap.core.records import Provenance, hardware
    from pillsnap.deployment import runtime as P
    from pillsnap.deployment import timing as E
    from pillsnap.evaluation.latency import latency_table

    class OnGpuAsItSays(P.OnnxClassifier):
        provider = "CUDAExecutionProvider"

        def __init__(self, model, size, device="cpu", **kw):
            super().__init__(model, size, "cpu", **kw)

    def bundle(runner):
        entry = {"file": "classifier.onnx", "img_size": 32}
        return P.Bundle(
            FolderFiles("export"), {"classifier": entry}, ClassMap(["K-000001"]), runner(small_onnx, 32, "cpu"), None
        )

    monkeypatch.setattr(P.Bundle, "predict", lambda self, photo, mode: self.classifier.logits(np.zeros((1, 3, 32, 32))))
    monkeypatch.setattr(E.ort, "get_available_providers", lambda: GPU_AND_CPU if there else GPU_AND_CPU[1:])
    monkeypatch.setattr(E, "load_bundle", lambda folder, **kw: bundle(OnGpuAsItSays))
    monkeypatch.setattr(E, "verified_bytes", lambda files, entry: small_onnx)
    monkeypatch.setattr(E, "OnnxClassifier", OnGpuAsItSays)
    monkeypatch.setattr("pillsnap.core.records._gpu", lambda: "NVIDIA GeForce RTX 5080 16 GiB")
    protocol = SimpleNamespace(latency_warmup=20, latency_runs=200)
    rows, ms = E.time_bundle(bundle(P.OnnxClassifier), None, Provenance("synthetic", "0" * 64, "1" * 64), protocol)
    found = [(r.provider, r.precision, r.metric.hardware) for r in rows if r.percentile == 95]
    on_cpu = [("CPUExecutionProvider", "fp32", hardware(gpu=False))]
    on_gpu = [("CUDAExecutionProvider", p, hardware()) for p in ("fp32", "fp16")]
    assert "RTX" not in found[0][2] and found == on_cpu + (on_gpu if there else [])
    assert list(ms) == ["onnx_single", "onnx_single, GPU fp32", "onnx_single, GPU fp16"][: len(found)]
    verdicts = {(t["provider"], t["verdict"]) for t in latency_table(rows) if t["scope"] == "onnx_single"}
    assert verdicts == {("CUDAExecutionProvider", "met") if there else ("CPUExecutionProvider", "NOT_COMPARABLE")}
