"""What can be shown of the GPU's path without one: the host never waits, numbers are the CPU's, the layout fits."""
import pickle
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from gpu_stand_in import StandInGpu
from PIL import Image
from torchvision.transforms import v2

from pillsnap.core.config import AugmentClassification
from pillsnap.data import datasets as D
from pillsnap.data import loaders as L
from pillsnap.data.augment import COL, DRAWS, _OPS, TimmPolicy, build_transforms_classification, randaugment_ops
from pillsnap.data.classmap import ClassMap
from pillsnap.data.images import IMAGENET_MEAN, IMAGENET_STD
from pillsnap.data.sampling import EpochSampler

OFF = {"randaugment": False, "hflip": False, "color_jitter": (0., 0., 0., 0.)}
SETTINGS = {
    "default": {},
    "all": {"rotation": 20., "erasing": .5},
    "demo": {"randaugment": False, "color_jitter": (.2, .2, .2, 0.), "rotation": 30.},
    "narrow": {"randaugment": False, "color_jitter": (.2, .2, .2, .1), "rotation": 30., "erasing": .2},
    "nothing": OFF}

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
    waves = 128 + 80*np.sin(x[..., None]*rng.uniform(2, 7, (n, 1, 1, 3)) + y[..., None]*rng.uniform(2, 7, (n, 1, 1, 3)))
    waves[:, size//3:size//2, size//4:size//2] += 40
    return torch.from_numpy(waves.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)


def draws_of(n: int, seed: int = 1) -> np.ndarray:
    "Numbers as a sample's dice give them, [n, DRAWS]."
    return np.random.default_rng(seed).random((n, DRAWS))


def number(op: str) -> float:
    "What must be drawn for an operation of RandAugment."
    return (_OPS.index(op) + .5) / len(_OPS)


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

def test_the_stand_in_sees_every_kind_of_wait():
    "Each of these lines makes a host wait for a real GPU; the lines of the second part do not."
    rows = lambda x: x.long().clamp(0, 1)
    waits = {
        "item": lambda x: x[0].item(),
        "float": lambda x: float(x[0]),
        "bool": lambda x: bool((x > 0).any()),
        "if": lambda x: 1 if x.sum() > 0 else 0,
        "cpu": lambda x: x.cpu(),
        "numpy": lambda x: x.cpu().numpy(),
        "mask": lambda x: x[x > 0],
        "masked put": lambda x: x.__setitem__(x > 0, 1.),
        "nonzero": lambda x: x.nonzero(),
        "masked_select": lambda x: x.masked_select(x > 0),
        "unique": lambda x: x.unique(),
        "host rows": lambda x: x[torch.tensor([0, 2])],
        "list of rows": lambda x: x[[0, 2]],
        "scalar put": lambda x: x.__setitem__(rows(x), 1.),
        "new tensor": lambda x: torch.tensor([1., 2.], device="cuda"),
        "to": lambda x: torch.ones(3).to("cuda"),
        "pageable": lambda x: torch.ones(3).to("cuda", non_blocking=True),
        "pinned, but waits": lambda x: torch.ones(3).pin_memory().to("cuda"),
        "equal": lambda x: torch.equal(x, x),
        "copy_": lambda x: x.copy_(torch.ones(4)),
        "fetch": lambda x: torch.zeros(4).copy_(x)}
    free = {
        "pinned": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
        "rows": lambda x: x[rows(x)],
        "rows put": lambda x: x.__setitem__(x.long(), x + 1),
        "slice put": lambda x: x[1:3].__setitem__(slice(0, 1), 0.),
        "masked_fill": lambda x: x.masked_fill_(x > 0, 2.),
        "where": lambda x: torch.where(x > 0, x, 0.),
        "full": lambda x: torch.full((2,), 3., device="cuda"),
        "index_fill_": lambda x: x.index_fill_(0, rows(x), 1.),
        "arange": lambda x: torch.arange(4, device="cuda") + x,
        "layout": lambda x: x.view(1, 1, 2, 2).contiguous(memory_format=torch.channels_last)}
    for name, line in waits.items():
        with StandInGpu() as gpu:
            line(gpu.put(torch.arange(4.)))
        assert gpu.waits, name
    for name, line in free.items():
        with StandInGpu() as gpu:
            out = line(gpu.put(torch.arange(4.)))
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
    size = 331   # where torchvision's shifts are whole pixels
    tf = build_transforms_classification(size, AugmentClassification(**{**OFF, "randaugment": True}))
    x = pictures(2, size)
    draws = np.full((2, DRAWS), .999)
    draws[:, COL["op1"]], draws[:, COL["op2"]] = number(op), number("Identity")
    draws[:, COL["much1"]], draws[:, COL["sign1"]] = (magnitude - 6.5) / 3, [.2, .8]
    if device == "gpu":
        with StandInGpu() as gpu:
            got = gpu.get(tf(gpu.put(x), draws))
    else:
        got = tf(x.clone(memory_format=torch.preserve_format), draws)
    got = (got*torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1))*255
    much, signed = v2.RandAugment._AUGMENTATION_SPACE[op]
    level = float(much(31, size, size)[magnitude]) if much(31, size, size) is not None else 0.
    for k, sign in enumerate((-1, 1)):
        v = level*sign if signed else level
        if op.startswith("Translate"):
            v = -v   # the same two signs in the other order
        bilinear, grey = v2.InterpolationMode.BILINEAR, [128.]*3
        want = v2.RandAugment()._apply_image_or_video_transform(x[k], op, v, bilinear, {torch.Tensor: grey})
        if op.startswith("Shear"):   # about the middle, where torchvision keeps the corner
            shear = [np.degrees(np.arctan(v)) if op == f"Shear{c}" else 0. for c in "XY"]
            want = v2.functional.affine(x[k], 0., [0, 0], 1., shear, bilinear, grey)
        diff, turned = (got[k] - want).abs(), op in ("Rotate", "ShearX", "ShearY")
        if turned or op.startswith("Translate"):
            diff = diff[..., 40:-40, 40:-40]   # the border is filled in another way
        assert diff.max() <= (5 if turned else 1.5) and diff.mean() < 1, (op, v, diff.max(), diff.mean())


def test_a_turn_does_not_make_noise_of_dropped_bits():
    "A flat colour that is turned and posterized stays flat, on every device."
    tf = build_transforms_classification(64, AugmentClassification(**{**OFF, "randaugment": True}))
    x = torch.full((1, 3, 64, 64), 100, dtype=torch.uint8)
    draws = np.full((1, DRAWS), .5)
    draws[:, COL["op1"]], draws[:, COL["op2"]] = number("Rotate"), number("Posterize")
    middle = tf(x, draws)[0, 0, 16:-16, 16:-16]
    assert middle.max() - middle.min() < 1e-4


# timm's policies ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["rand-m8-n2-mstd0.5-inc1", "original", "augmix-m5-w2", "3a"])
def test_a_policy_gives_timms_pictures_and_leaves_everybodys_dice_alone(name):
    import random

    from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
    makers = {"rand": rand_augment_transform, "augm": augment_and_mix_transform}
    hparams = {"translate_const": int(64*.45), "img_mean": (128, 128, 128)}
    theirs = makers.get(name[:4], auto_augment_transform)(name, hparams)
    ours = pickle.loads(pickle.dumps(TimmPolicy(name, 64)))
    for k, x in enumerate(pictures(6, 64).permute(0, 2, 3, 1).numpy()):
        u = (k + .5)/6
        random.seed(int(u*2**31))
        np.random.seed(int(u*2**31))
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
    d = photos(24, train=True, crop_view_prob=0., augment=a)
    epoch = lambda **kw: torch.cat([x for x, _, _ in L.PhotoLoader(d, 8, EpochSampler(d, 1), **kw)])
    threads = epoch(num_workers=2)
    assert seen and threading.main_thread() not in seen
    assert torch.equal(threads, epoch()) and torch.equal(threads, epoch(num_workers=1, engine="processes"))


# The loader ---------------------------------------------------------------------------------------------------------

@pytest.mark.spec("TL5")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kw", [{}, {"num_workers": 2}])
def test_the_loader_hands_batches_to_a_gpu_without_waiting(train, kw, monkeypatch):
    d = photos(20, train=train, channels_last=True, augment=AugmentClassification(rotation=10., erasing=.3))
    host = [(x, y) for x, y, _ in L.PhotoLoader(d, 8, EpochSampler(d, 1), **kw)]
    with StandInGpu() as gpu, gpu.as_cuda(monkeypatch):
        loader = L.PhotoLoader(d, 8, EpochSampler(d, 1), device="cuda", pin_memory=True, **kw)
        there = [(x, y) for x, y, _ in loader]
        assert all(x.device == y.device == torch.device("cuda:0") for x, y in there)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in there)
    assert gpu.waits == []
    for (x, y), (a, b) in zip(there, host, strict=True):
        assert (gpu.get(x) - a).abs().max() < 1e-4 and torch.equal(gpu.get(y), b)
