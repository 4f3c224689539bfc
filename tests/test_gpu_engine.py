"""The training engine's GPU path, as far as a CPU can show it: injected errors, counted compilations, counted waits."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from boards import Board
from fastai.callback.core import Callback
from test_memory import Painted, table
from test_stop_and_go import CM
from torch import nn

from pillsnap.core.config import load_config
from pillsnap.core.device import enable_tf32
from pillsnap.core.settings import OomPolicy
from pillsnap.dataset.datasets import PillsnapClsDataset
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.sampling import EpochSampler
from pillsnap.training import batchsearch, presets
from pillsnap.training import compilation as compilation_module
from pillsnap.training.learner import Outputs, build_learner
from pillsnap.training.presets import ClassifierSettings


class SmallNet(nn.Module):
    "A convolution, batch norm, dropout and a head."

    def __init__(self):
        super().__init__()
        self.body, self.head = (
            nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()),
            nn.Linear(256, 3),
        )

    def forward(self, x):
        return self.head(self.body(x))

    def get_classifier(self):
        return self.head


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return SmallNet()


def photo_learner(*overrides, net=None, tb=None, photos=26, val=13, device="cpu"):
    "A Learner as a training makes it: 26 photos in batches of eight, a validation of 13, whose last batch is short."
    cfg = load_config(
        "smoke",
        [
            "data.classification.img_size=32",
            "train.classification={epochs: 2, batch_size: 8, lr: 0.01, amp: false}",
            *overrides,
        ],
    )
    d = PillsnapClsDataset(table(photos), CM, Painted(), 32, True, seed=7)
    train = PhotoLoader(d, 8, EpochSampler(d, 1), drop_last=True)
    valid = PhotoLoader(PillsnapClsDataset(table(val), CM, Painted(), 32), 8)
    return build_learner(
        ClassifierSettings.from_config(cfg),
        net or small_net(),
        nn.CrossEntropyLoss(),
        train,
        {"whole": valid},
        3,
        device,
        out=Outputs(tb=tb, quiet=tb is None),
    )


@pytest.fixture
def compiled(monkeypatch):
    "Graphs that were compiled, in order; a CPU compiles too, with a compiler that only counts."
    graphs = []

    def counter(graph, inputs):
        graphs.append(tuple(inputs[-1].shape) if inputs else ())
        return graph.forward

    monkeypatch.setattr(compilation_module, "resolve_compile", lambda *_: ("reduce-overhead", "the test says so"))
    monkeypatch.setattr(compilation_module, "compile_arguments", lambda mode: {"backend": counter})
    yield graphs
    torch.compiler.reset()


@pytest.mark.spec("CT8")
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.classification.mixing={mixup: 0.4, prob: 1.0}", "train.classification.grad_accum_steps=2"),
        ("optimization.channels_last=false",),
    ],
)
def test_training_compiles_nothing_that_was_not_rehearsed(compiled, monkeypatch, overrides):
    """Layout, precision, sizes of batches and modes are those of the rehearsal, which stands inside the fallback; a
    compiler that fails later would end the run."""
    monkeypatch.setattr(presets, "select_amp_dtype", lambda *a: torch.bfloat16)
    learn = photo_learner(*overrides)
    rehearsed = len(compiled)
    assert rehearsed >= 2, "training and validation are two graphs"
    learn.fit(2)
    assert len(compiled) == rehearsed and learn.rows[-1]["classification"]["n"] == 13


@pytest.mark.spec("CT8", "CT21")
def test_validation_is_rehearsed_without_tf32(compiled):
    "Training may round to TF32 and validation may not; torch.compile makes a graph for each."
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    enable_tf32(True)
    try:
        learn = photo_learner()
        rehearsed = len(compiled)
        learn.fit(1)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert len(compiled) == rehearsed >= 2


@pytest.mark.spec("CT8")
def test_a_frozen_backbone_is_rehearsed_frozen_and_thawed(compiled):
    "The first epochs of a retrieval model keep the backbone still; the graph after that is another one."
    learn = photo_learner("train.classification.freeze_backbone_epochs=1")
    rehearsed = len(compiled)
    assert rehearsed >= 3, "frozen, thawed, validation"
    learn.fit(2)
    assert len(compiled) == rehearsed


class Tight(SmallNet):
    "A network with memory for so many photos; more fail in the forward pass, with an error of one's choice."

    def __init__(self, capacity, times=10**9, error=None):
        super().__init__()
        self.capacity, self.times, self.error = (
            capacity,
            times,
            error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        )

    def forward(self, x):
        if self.training and len(x) > self.capacity and self.times > 0:
            self.times -= 1
            raise self.error
        return super().forward(x)


def tight_learner(*overrides, tb=None, capacity=4, times=10**9, error=None, epochs=1):
    "A Learner whose network has memory for four of eight photos."
    torch.manual_seed(0)
    learn = photo_learner(
        "train.oom={max_retries: 4, max_grad_accum: 8, min_batch: 1, cooldown_sec: 2, escalate_to_fp16: false}",
        *overrides,
        net=Tight(capacity, times, error),
        tb=tb,
    )
    learn.slept = []
    learn.oom_guard.sleep = learn.slept.append
    return learn


# as torch 2.11, cuBLAS and cuDNN 9 word it
FULL = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "GET was unable to find an engine to execute this computation",
    "FIND was unable to find an engine to execute this computation",
    "CUDA error: out of memory",
    (
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 40000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
]


@pytest.mark.spec("CT14")
@pytest.mark.parametrize("said", FULL)
def test_every_way_to_say_that_memory_ran_out_is_understood(said):
    "The batch is tried again, and the log names the sentence."
    learn = tight_learner(times=1, error=RuntimeError(said))
    learn.fit(1)
    (event,) = learn.oom_guard.events
    assert (event["action"], event["error"]) == ("empty_cache", said[:160])


@pytest.mark.parametrize(
    "said",
    [
        "mat1 and mat2 shapes cannot be multiplied (8x8 and 9x16)",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_COMPILATION_FAILED",
        "CUDA error: device-side assert triggered",
    ],
)
def test_what_is_not_about_memory_ends_the_run(said):
    with pytest.raises(RuntimeError, match=said.split("(")[0]):
        tight_learner(times=1, error=RuntimeError(said)).fit(1)


@pytest.mark.spec("CT14")
def test_each_error_waits_and_is_a_point():
    "Cache, then two halves: two waits of train.oom.cooldown_sec, and for each answer the retries and the state."
    board = Board()
    learn = tight_learner(tb=board)
    learn.fit(1)
    assert [e["action"] for e in learn.oom_guard.events] == ["empty_cache", "microbatching"]
    assert learn.slept == [2.0, 2.0]
    assert board.of("oom/retries") == [(0.0, 1), (1.0, 2)] and board.of("oom/state") == [(0.0, 1), (2.0, 2)]


@pytest.mark.spec("CT14")
def test_four_fifths_of_the_memory_is_a_warning_and_a_point():
    board = Board()
    learn = photo_learner(tb=board)
    shares = iter([0.5, 0.5, 0.85, 0.85])  # at the start and the end of two epochs
    learn.oom_guard.share = lambda: next(shares)
    learn.fit(2)
    assert board.of("oom/memory_warning") == [(0.85, 2)]


@pytest.mark.spec("CT14")
@pytest.mark.parametrize("mode, times", [("constant", 1.0), ("declared", 2.0)])
def test_a_smaller_step_scales_the_weight_decay_only_where_it_is_declared(mode, times):
    """Half the photos a step, half the rate, twice the steps: their product with the weight decay stays, unless the
    sources' scaling is asked for."""
    learn = tight_learner(
        "train.classification.weight_decay=0.04",
        "train.oom.max_grad_accum=1",
        f"train.oom.wd_scale_mode={mode}",
        "train.classification.scheduler=reduce_on_plateau",
        "train.classification.warmup_steps=0",
    )
    learn.fit(1)
    assert [e["action"] for e in learn.oom_guard.events] == ["empty_cache", "global_batch_change"]
    h = learn.opt.hypers[-1]
    assert (h["wd"], h["lr"]) == (pytest.approx(0.04 * times), pytest.approx(0.005))


@pytest.mark.spec("CT14")
def test_recorded_graphs_go_before_the_batch_is_tried_again(compiled, monkeypatch):
    """empty_cache does not touch their pool, so the compiled code goes too and is made again; the weights are those
    of a run without the error."""

    class Full(Callback):
        order, left = 9, 1

        def after_pred(self):
            if self.training and self.iter == 1 and self.left:
                self.left = 0
                raise torch.OutOfMemoryError("CUDA out of memory (planted)")

    calm = photo_learner()
    calm.fit(1)
    hit, resets, reset = photo_learner(), [], torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(len(compiled)), reset())[1])
    hit.oom_guard.sleep = lambda seconds: None
    hit.add_cb(Full())
    hit.fit(1)
    assert len(resets) == 1 and len(compiled) > resets[0], "what was compiled before is gone, and was compiled again"
    for k, v in calm.model.state_dict().items():
        assert torch.equal(v, hit.model.state_dict()[k]), k


@pytest.mark.spec("CT14", "CT20")
def test_memory_stands_beside_the_batch_size_in_each_epoch():
    "After a halving the next point shows both, and without a GPU the memory of the processes."
    board = Board()
    learn = tight_learner("train.classification.epochs=2", tb=board)
    learn.fit(2)
    assert board.of("memory/batch_size") == [(4.0, 1), (4.0, 2)] and board.of("memory/grad_accum") == [
        (2.0, 1),
        (2.0, 2),
    ]
    used = board.of("memory/used_mb")
    assert [s for _, s in used] == [1, 2] and all(10 < v < 1e5 for v, _ in used)


@pytest.fixture
def nothing_to_free(monkeypatch):
    "Between two candidates a search frees memory and compiled code; on a CPU there is none, and looking takes long."
    monkeypatch.setattr(batchsearch, "release_memory", lambda **_: None)


@pytest.mark.spec("CT13", "CT20")
def test_the_batch_that_is_found_is_a_point(nothing_to_free):
    "As a training asks for it, on a GPU whose memory holds 27 photos below the headroom: 24, a multiple of eight."
    from pillsnap.training.batchsize import BatchSizeChoice

    board, net = Board(), small_net()
    net.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    seen = []
    cfg = load_config(
        "smoke",
        [
            "data.classification.img_size=32",
            "train.classification={auto_batch_tune: true, auto_batch_max: 64, batch_size: 64, amp: false}",
            "optimization.torch_compile=none",
        ],
    )
    gpu = torch.device("cuda")
    choice = BatchSizeChoice(
        ClassifierSettings.from_config(cfg), 1, gpu, tb=board, memory_share=lambda: 0.88 * seen[-1] / 27
    )
    n = choice.choose(net, 3)
    assert n == 24 and board.of("perf/auto_batch_found") == [(24.0, 0)]


def test_the_search_measures_the_step_that_training_will_do(nothing_to_free, monkeypatch):
    """Candidates run eagerly; the answer is tried once more, compiled as training compiles it. Blocks keep their
    inputs alone where training keeps no more."""
    from pillsnap.training import batchsize

    probes = []

    def probe(_model, _criterion, _optimizer, settings, _share):
        tried = []
        probes.append((settings, tried))
        return lambda bs, fp16: tried.append(bs) or (bs / 50 if settings.compiled else 0.5)

    monkeypatch.setattr(batchsize, "step_probe", probe)
    for over, arguments, found in (
        (["optimization.torch_compile=none"], None, 64),
        (["optimization.torch_compile=max-autotune"], {"mode": "max-autotune"}, 32),
        (["optimization.torch_compile=none", "optimization.cuda_graphs=true"], {"backend": "cudagraphs"}, 32),
    ):
        probes.clear()
        cfg = load_config(
            "two_stage", ["train.classification.amp=false", "optimization.grad_checkpointing=true", *over]
        )
        choice = batchsize.BatchSizeChoice(ClassifierSettings.from_config(cfg), 1, torch.device("cuda"))
        assert choice.choose(small_net(), 3) == found
        assert [s.compiled for s, _ in probes] == [None, arguments][: 1 + (arguments is not None)]
        assert all(s.grad_checkpointing for s, _ in probes)
        assert [set(tried) for _, tried in probes] == [{64}, {64, 48, 32}][: len(probes)]


@pytest.mark.spec("CT14")
def test_augmentation_that_does_not_fit_is_done_in_parts(monkeypatch, caplog):
    """On a GPU it takes several times the batch, before the guard of the training step sees anything. Batches are
    the same, and the log says it once."""

    def loader():
        return PhotoLoader(PillsnapClsDataset(table(26), CM, Painted(), 32, True, seed=7), 8)

    calm = list(loader())
    tight, finish, asked = loader(), PillsnapClsDataset.finish, []

    def planted(self, images, looks):
        asked.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return finish(self, images, looks)

    monkeypatch.setattr(PillsnapClsDataset, "finish", planted)
    with caplog.at_level("WARNING", "pillsnap.dataset.photoloader"):
        got = list(tight)
    assert asked[:2] == [8, 4] and max(asked[2:]) == 2 and len(got) == len(calm) == 4
    for (a, b, m), (x, y, k) in zip(got, calm):
        assert torch.equal(a, x) and torch.equal(b, y) and m["paths"] == k["paths"]
    assert [r.getMessage() for r in caplog.records] == [
        (
            f"out of memory: {b} photos at once are augmented instead of {a} (CUDA out of memory. Tried to allocate "
            "1.00 GiB)"
        )
        for a, b in ((8, 4), (4, 2))
    ]
    monkeypatch.setattr(
        PillsnapClsDataset, "finish", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes do not fit"))
    )
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(loader())


@pytest.mark.spec("CT14", "SG6")
def test_a_batch_that_does_not_reach_the_gpu_is_sent_once_more(monkeypatch, caplog):
    "The run counts the error and goes on; a second error in a row, and an error of another kind, end it."
    left, errors, send = [1], [], PhotoLoader._send

    def planted(self, images):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return send(self, images)

    def loader():
        out = PhotoLoader(PillsnapClsDataset(table(20), CM, Painted(), 32, True, seed=7), 8)
        out.on_oom = errors.append
        return out

    calm = list(loader())
    monkeypatch.setattr(PhotoLoader, "_send", planted)
    with caplog.at_level("WARNING", "pillsnap.dataset.photoloader"):
        got = list(loader())
    assert len(got) == len(calm) == 3 and all(torch.equal(a[0], b[0]) for a, b in zip(got, calm))
    assert errors == ["CUDA out of memory. Tried to allocate 1.00 GiB"]
    (said,) = (r.getMessage() for r in caplog.records)
    assert said.startswith("out of memory: a batch of 8 photos is sent to the device once more")
    left[:] = [1, 1]
    with pytest.raises(torch.OutOfMemoryError):
        list(loader())
    monkeypatch.setattr(PhotoLoader, "_send", lambda *a: (_ for _ in ()).throw(RuntimeError("no such device")))
    with pytest.raises(RuntimeError, match="no such device"):
        list(loader())
    assert len(errors) == 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_rehearsed_sizes_are_those_that_a_process_gets(world_size):
    "Each of several processes gets its part of a batch; a rehearsal of the whole batch may not fit on one GPU."
    for rank in range(world_size):
        data = PillsnapClsDataset(table(21), CM, Painted(), 16, True, seed=7)
        loader = PhotoLoader(data, 8, drop_last=False).shard(rank, world_size)
        delivered = dict.fromkeys(len(labels) for _, labels, _ in loader)
        assert compilation_module.batch_sizes(loader) == tuple(delivered)


def test_onnxruntime_on_a_gpu_neither_searches_nor_rounds(monkeypatch):
    "By default its CUDA provider searches for kernels at every new number of crops and computes float32 in TF32."
    from pillsnap.deployment import runtime as predict

    asked = {}

    class Session:
        def __init__(self, model, options, providers):
            asked["providers"] = providers

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    monkeypatch.setattr(
        predict.ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(predict.ort, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(predict.ort, "InferenceSession", Session)
    predict.open_session(b"", "cuda")
    assert asked["providers"] == [
        ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}),
        "CPUExecutionProvider",
    ]


def test_a_detector_answers_without_a_search_and_in_full_fp32(monkeypatch):
    "The number of photos in a pass changes; another training of the process may have left the search on."
    from pillsnap.models.yolo import TorchDetector

    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, x):
            seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32))
            return x[:, :, 0]

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    TorchDetector(Net(), 8).raw(torch.zeros(3, 3, 8, 8).numpy())
    assert seen == [(False, False)] and torch.backends.cudnn.benchmark and torch.backends.cudnn.allow_tf32


class FailsAtTheEnd(Callback):
    "Memory runs out in the step that ends an epoch, before the optimizer moves anything."

    order, run_valid = 12, False

    def __init__(self, times: int):
        self.times = times

    def before_step(self):
        if self.accumulate.flush and self.times > 0:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")


FUSED = partial(torch.optim.AdamW, fused=True)


def window_learner(times: int = 0, folder=None, escalate: bool = False, step=FUSED):
    "Six batches in windows of four: each epoch ends with an open window of two."
    from fastai.callback.core import TrainEvalCallback
    from fastai.optimizer import OptimWrapper

    from pillsnap.training import callbacks as C
    from pillsnap.training.memory import OomGuard
    from pillsnap.training.monitoring import History
    from pillsnap.training.saving import Checkpoint

    torch.manual_seed(1)
    batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,)), {}) for _ in range(6)]
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    policy = OomPolicy(max_retries=4, max_grad_accum=8, min_batch=1, cooldown_sec=0, escalate_to_fp16=escalate)
    cbs = [TrainEvalCallback(), C.Unpack(), C.Accumulate(4), C.Precision(None), C.GradClip(1.0), C.ScaledStep()]
    cbs += [C.EmaCallback(0.9), C.Validate(), History(), OomGuard(policy), FailsAtTheEnd(times)]
    if folder:
        cbs.append(Checkpoint(folder, dict(config_snapshot={}, class_map={}), "macro_f1"))
    learn = C.PillLearner(
        C.PillLoaders(batches, batches[:1]),
        net,
        nn.CrossEntropyLoss(),
        opt_func=lambda p, lr: OptimWrapper(opt=step(p, lr=lr)),
        lr=0.05,
        default_cbs=False,
        cbs=cbs,
    )
    learn.num_classes = 3
    return learn


def fitted(learn, epochs: int = 2):
    "The learner after its epochs; every training draws the same dropout."
    torch.manual_seed(5)
    learn.fit(epochs)
    return learn


def all_weights(learn) -> torch.Tensor:
    held = [*learn.model.state_dict().values(), *learn.ema.shadow.values()]
    return torch.cat([v.float().flatten() for v in held])


@pytest.mark.spec("CT14")
def test_the_window_that_ends_an_epoch_is_tried_again():
    "Three errors change nothing of the training."
    plain, tried = fitted(window_learner()), fitted(window_learner(times=3))
    assert torch.equal(all_weights(plain), all_weights(tried))
    assert [e["action"] for e in tried.oom_guard.events] == ["empty_cache"] * 3


@pytest.mark.spec("CT14", "BX10")
def test_a_window_that_never_fits_is_saved_open_and_goes_on_later(tmp_path):
    "The error is in words, and the resumed run ends as if nothing had happened."
    from pillsnap.core.checkpoints import load_ckpt
    from pillsnap.core.errors import PillsnapError
    from pillsnap.training.saving import restore

    plain = fitted(window_learner())
    with pytest.raises(PillsnapError, match="the step at the end of an epoch does not fit"):
        fitted(window_learner(times=99, folder=tmp_path))
    saved = load_ckpt(tmp_path / "last.pt")
    assert saved["position"]["batch"] == 6 and saved["position"]["callbacks"]["accumulate"]["count"] == 2
    resumed = window_learner(folder=tmp_path)
    resumed.first_epoch = restore(resumed, saved)
    fitted(resumed)
    assert torch.equal(all_weights(plain), all_weights(resumed))


@pytest.mark.spec("CT14")
@pytest.mark.parametrize("batch", [2, 3, 4])
def test_an_escalation_to_fp16_keeps_the_batches_of_an_open_window(monkeypatch, batch):
    "Gradients that were there are not divided by a scale that they never had."
    from pillsnap.training import callbacks

    real, calls = callbacks.GradScaler, []
    monkeypatch.setattr(callbacks, "GradScaler", lambda device: real(device, init_scale=64.0))

    def trained(fail_at=()):
        learn = window_learner(escalate=True, step=torch.optim.SGD)
        del calls[:]

        def hook(module, _args):
            calls.append(module.training)
            if sum(calls) in fail_at and module.training:
                raise torch.OutOfMemoryError("CUDA out of memory")

        start = all_weights_of(learn.model)
        learn.model[2].p = 0.0
        learn.model.register_forward_pre_hook(hook)
        fitted(learn, 1)
        return all_weights_of(learn.model), start, [e["action"] for e in learn.oom_guard.events]

    plain, start, _ = trained()
    escalated, _, actions = trained((batch, batch + 1))
    assert any("fp16" in action for action in actions), actions
    assert (escalated - plain).norm() < 0.05 * (plain - start).norm()


def all_weights_of(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


@pytest.mark.spec("TL8")
def test_a_process_without_a_photo_adds_nothing_where_the_first_drug_weighs_nothing():
    "Grey pictures of a drug without weight would make every process's weights NaN."

    from pillsnap.training.distributed import EmptyShare

    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 2.0]))
    share, model, none = EmptyShare(), nn.Linear(4, 3), torch.zeros(0, dtype=torch.long)
    share.learn = SimpleNamespace(loss_func=loss, xb=(torch.zeros(0, 4),), yb=(none,), model=model)
    share.had = (0, 0)
    share.before_batch()
    (images,), (labels,) = share.learn.xb, share.learn.yb
    assert len(images) == len(labels) == 2 and torch.isfinite(loss(model(images), labels))


@pytest.mark.spec("BX10")
def test_resumed_moments_lie_in_memory_as_the_weights_do():
    "A fused step reads both without looking at their strides."
    from types import SimpleNamespace

    from fastai.optimizer import OptimWrapper

    from pillsnap.training.saving import restore

    def optimizer(layout):
        weight = nn.Parameter(torch.randn(8, 3, 3, 3).to(memory_format=layout))
        weight.grad = torch.randn_like(weight)
        return weight, OptimWrapper(opt=torch.optim.AdamW([weight], fused=True))

    was, trained = optimizer(torch.channels_last)
    trained.step()
    weight, resumed = optimizer(torch.contiguous_format)
    learn = SimpleNamespace(model=SimpleNamespace(load_state_dict=lambda _s: None), opt=resumed)
    learn.dls = SimpleNamespace(train=[])
    ckpt = dict(model_state={}, optimizer_state=trained.state_dict(), history=[], position=dict(batch=0), epoch=1)
    restore(learn, ckpt)
    (before,), (state,) = trained.opt.state.values(), resumed.opt.state.values()
    for k in ("exp_avg", "exp_avg_sq"):
        assert state[k].stride() == weight.stride() != was.stride() and torch.equal(state[k], before[k])
