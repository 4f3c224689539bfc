"""GP7 to GP10: compilation, memory that runs out, and the largest batch."""

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fastai.callback.core import Callback
from torch import nn

from pillsnap.core.device import enable_tf32, set_seed

from .setup import (
    CLASSES,
    Gpu,
    Neighbour,
    Part,
    Size,
    Stopwatch,
    at_least,
    at_most,
    coloured_batches,
    cores,
    holds,
    make_learner,
    network,
    patch_loader,
    relative,
    settings,
    told,
)

# ---- GP8 and GP9: memory runs out


class FakeShortage:
    "For a rehearsal: the network raises as CUDA would for more than `most` photos in training."

    def __init__(self, model: nn.Module, most: int):
        self.most = most
        model.register_forward_pre_hook(self.refuse)

    def refuse(self, model: nn.Module, args: tuple) -> None:
        if model.training and len(args[0]) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (rehearsed)")


def cut_in_halves(batches: list[tuple]) -> list[tuple]:
    "Each batch as two of half the size."
    from pillsnap.training.memory import split_batch

    return [part for b in batches for part in split_batch(b, -(-len(b[1]) // 2))]


class Held(Callback):
    "Bytes of tensors and bytes that torch holds after the last training batch, and how many batches there were."

    order, run_valid = 1003, False

    def __init__(self, gpu: Gpu):
        self.gpu = gpu

    def after_train(self) -> None:
        self.gpu.sync()
        self.allocated, self.reserved, self.batches = self.gpu.allocated(), self.gpu.reserved(), self.iter + 1


def train_once(
    gpu: Gpu,
    cfg: Any,
    batches: list,
    short: float | None = None,
    before: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    "One epoch from the same weights; `short`: a ballast leaves so many bytes free before the first batch."
    gpu.clear()
    base = gpu.allocated()
    net, held = network(cfg, gpu.device), Held(gpu)
    learn = make_learner(cfg, net, batches, {"whole": batches[:1]}, gpu.device, [held])
    first = {k: v.detach().clone().cpu() for k, v in net.state_dict().items()}
    before()
    gpu.clear()
    began = gpu.begin_peak()
    ballast = None if short is None else gpu.ballast(short)
    if short is not None and not gpu.there:
        FakeShortage(net, -(-len(batches[0][1]) // 2))
    learn.fit(1)
    weight = 0 if ballast is None else ballast.numel()
    end = {k: v.detach().cpu() for k, v in net.state_dict().items()}
    out = dict(start=first, end=end, events=list(learn.oom_guard.events), batches=held.batches)
    out |= dict(need=gpu.peak() - began, allocated=held.allocated - base - weight, reserved=held.reserved - weight)
    del ballast, learn, net, held
    gpu.clear()
    return out


def answers(run: dict[str, Any]) -> list[str]:
    "What the guard did about each error of a run."
    return [f"{e['state']} {e['action']}" for e in run["events"]]


def memory_settings(s: Size, batch: int, accum: int) -> Any:
    "fp32, plain SGD, and no way out but smaller batches: an out-of-memory error must end where accumulation ends."
    c = "train.classification"
    plain = (f"{c}.amp=false", f"{c}.tf32=false", f"{c}.optimizer=sgd", f"{c}.lr=0.01", f"{c}.epochs=1000")
    over = ("train.oom.escalate_to_fp16=false", f"{c}.grad_accum_steps={accum}")
    return settings(s, *plain, *over, batch=batch, img=224)


def out_of_memory(device: str, tiny: bool, _work: Path) -> tuple[list[Part], dict[str, Any]]:
    """GP8: a real out-of-memory error in eager training.

    The step's peak is measured. Then a ballast leaves three quarters of it, and the run must end
    where two half batches a step end.
    """
    s, gpu = Size(tiny), Gpu(device)
    batch = s.of(32, 4)
    set_seed(42, True)
    enable_tf32(False)
    whole = coloured_batches(s.of(6, 2), batch, s.of(224, 64), gpu.device)
    one, two = memory_settings(s, batch, 1), memory_settings(s, batch // 2, 2)
    if gpu.there:
        train_once(gpu, one, whole)  # libraries take their own memory the first time
    plain = train_once(gpu, one, whole)
    want = train_once(gpu, two, cut_in_halves(whole))
    got = train_once(gpu, one, whole, short=gpu.quarter_short(s, plain["need"]))
    names, moved = answers(got), relative(got["end"], want["end"], want["start"])
    left = (got["allocated"] - want["allocated"]) / 1e6
    done = names == ["S0 empty_cache", "S2 microbatching"]
    return [
        holds("what the guard did", done, ", ".join(names) or "nothing: no error came", "S0, then half batches"),
        at_most("weights against accumulation", moved, 1e-3, note="difference over how far the weights moved, norms"),
        at_most("tensors left over", left, 5, "MB", "beside the run without an error"),
        told("a step needs", plain["need"] / 1e9, "GB"),
    ], dict(events=got["events"])


def fresh_compiler(gpu: Gpu) -> None:
    "Forget everything that torch.compile holds in this process; what it wrote to the disk stays."
    import torch._dynamo

    torch._dynamo.reset()
    gpu.clear()


def first_shortage(train: Callable[[float], dict[str, Any]], need: float) -> tuple[dict[str, Any], float]:
    "The first run with an error, and the share of the need that was left free: recording may need less than its peak."
    for share in (0.75, 0.6, 0.45):
        run = train(share * need)
        if run["events"]:
            break
    return run, share


def out_of_memory_compiled(device: str, tiny: bool, _work: Path) -> tuple[list[Part], dict[str, Any]]:
    """GP9: as GP8, with reduce-overhead.

    What the rehearsal compiled and recorded is dropped before the ballast is taken, so that memory
    runs out while training compiles and records its own.
    """
    s, gpu = Size(tiny), Gpu(device)
    batch, c = s.of(64, 4), "train.classification"
    mode = f"optimization.torch_compile={'reduce-overhead' if gpu.there else 'none'}"

    def make(size: int, accum: int) -> Any:
        over = (mode, f"{c}.amp_dtype=bf16", f"{c}.grad_accum_steps={accum}", f"{c}.epochs=1000")
        return settings(s, *over, batch=size, img=224, backbone="resnet18")

    def train(size: int, accum: int, batches: list, short: float | None = None) -> dict[str, Any]:
        fresh_compiler(gpu)
        return train_once(gpu, make(size, accum), batches, short, lambda: fresh_compiler(gpu))

    set_seed(42)
    enable_tf32(True)
    whole = coloured_batches(s.of(8, 2), batch, s.of(224, 64), gpu.device)
    plain = train(batch, 1, whole)
    want = train(batch // 2, 2, cut_in_halves(whole))
    need = s.of(plain["need"], max(plain["need"], 512e6))
    got, share = first_shortage(lambda short: train(batch, 1, whole, short), need)
    names = answers(got)
    finite = all(bool(v.isfinite().all()) for v in got["end"].values() if v.is_floating_point())
    said = f"{got['batches']} of {len(whole)} batches, weights {'finite' if finite else 'not finite'}"
    note = f"{share:.0%} of a step's {plain['need'] / 1e9:.2f} GB were free"
    out = [
        holds("the run ends", got["batches"] == len(whole) and finite, said, "all batches, finite"),
        holds("memory ran out", "S2 microbatching" in names, ", ".join(names) or "never", "half batches", note),
    ]
    if gpu.there:
        beside = f"{got['reserved'] / 1e9:.2f} and {want['reserved'] / 1e9:.2f} GB with half batches from the start"
        out.append(at_most("memory held at the end", 100 * (got["reserved"] / want["reserved"] - 1), 5, "%", beside))
    return out, dict(events=got["events"])


# ---- GP10: batch search and planner


def batch_search(device: str, tiny: bool, work: Path) -> tuple[list[Part], dict[str, Any]]:
    """GP10: the search of a training job while another process holds all but 24 GB.

    Then full steps with the loader, and the planner's figure for that batch.
    """
    from pillsnap.planner import footprint
    from pillsnap.training.batchsize import BatchSizeChoice
    from pillsnap.training.presets import ClassifierSettings

    s, gpu, c = Size(tiny), Gpu(device), "train.classification"
    img, steps = s.of(384, 64), s.of(20, 2)
    over = [f"{c}.auto_batch_max=512", f"{c}.epochs=1000", f"{c}.amp_dtype=bf16"]
    cfg = settings(s, *over, batch=64)
    set_seed(42)
    enable_tf32(True)
    net, planned = network(cfg, gpu.device), footprint(network(cfg, torch.device("cpu")), img, True)
    with Neighbour(gpu, min(24e9, 0.6 * gpu.free()), work) as beside:
        choice = BatchSizeChoice(ClassifierSettings.from_config(cfg), 1, gpu.device)
        n, unsearched = choice.choose(net, CLASSES), choice.why_not_searched()
        cfg = settings(s, *over, f"{c}.batch_size={n}")
        train = patch_loader(cfg, n * steps, gpu.device, workers=s.of(max(1, min(14, cores() - 2)), 1))
        learn = make_learner(cfg, net, train, {"whole": coloured_batches(1, 4, img, gpu.device)}, gpu.device)
        gpu.clear()
        gpu.begin_peak()
        learn.fit(1)
        peak = gpu.peak()
    events = learn.oom_guard.events
    note = f"{steps} steps of {n} photos, another process held {beside.held / 1e9:.1f} GB"
    out = [
        at_most("out-of-memory errors in full steps", len(events), 0, note=note),
        holds("the batch size was searched for", unsearched is None or not gpu.there, unsearched or "yes", "yes"),
        holds("batch that the search found", n > 0, n, "at least one"),
    ]
    if gpu.there:
        apart, both = (
            100 * abs(planned.at(n) / peak - 1),
            f"{planned.at(n) / 1e9:.2f} and {peak / 1e9:.2f} GB of tensors",
        )
        out.append(at_most("planner's memory beside the measured peak", apart, 15, "%", both))
    return out, dict(batch=n, events=events)


# ---- GP7: compiled


class Recorded:
    "Counts CUDA graphs as they are recorded."

    def __enter__(self) -> "Recorded":
        self.count = 0
        try:
            from torch._inductor.cudagraph_trees import CUDAGraphTreeManager as Manager
        except ImportError:  # without triton there is nothing to count
            self.manager = None
            return self
        self.manager, self.was = Manager, Manager.record_function

        def counted(manager: Any, *args: Any) -> Any:
            self.count += 1
            return self.was(manager, *args)

        Manager.record_function = counted
        return self

    def __exit__(self, *_: Any) -> None:
        if self.manager is not None:
            self.manager.record_function = self.was


class AtEpochEnd(Callback):
    "A figure at the end of every epoch."

    order = 1004

    def __init__(self, ask: Callable[[], Any]):
        self.ask, self.seen = ask, []

    def after_epoch(self) -> None:
        self.seen.append(self.ask())


def train_compiled(s: Size, gpu: Gpu, mode: str, train: list, valid: list, epochs: int) -> dict[str, Any]:
    "Milliseconds a step, graphs by epoch, and the last epoch's training loss, in a mode of torch.compile."
    c = "train.classification"
    over = (f"{c}.drop_rate=0.2", f"{c}.ema={{enabled: true, decay: 0.9}}", f"{c}.amp_dtype=bf16", f"{c}.lr=0.0005")
    cfg = settings(s, f"optimization.torch_compile={mode}", *over, f"{c}.epochs={epochs}")
    set_seed(42)
    began = time.perf_counter()
    with Recorded() as graphs:
        watch, count = Stopwatch(gpu, 2, len(train) - 1), AtEpochEnd(lambda: graphs.count)
        views = {"whole": valid, "crop": valid}
        learn = make_learner(cfg, network(cfg, gpu.device), train, views, gpu.device, [watch, count])
        torch.manual_seed(1)  # building compiles, which may have drawn numbers
        learn.fit(epochs)
    out = dict(ms=statistics.median(watch.ms[1:]), graphs=count.seen, loss=learn.rows[-1]["train_loss"])
    del learn
    gc.collect()
    return out | dict(seconds=round(time.perf_counter() - began, 1))


def compiled(device: str, tiny: bool, _work: Path) -> tuple[list[Part], dict[str, Any]]:
    "GP7: the default classifier, eager and with reduce-overhead; the last batch of both validations is short."
    from torch._dynamo.utils import counters

    s, gpu = Size(tiny), Gpu(device)
    steps, epochs, img, batch = s.of(20, 5), s.of(3, 2), s.of(384, 64), s.of(48, 4)
    enable_tf32(True)
    train = coloured_batches(steps, batch, img, gpu.device)
    valid = coloured_batches(2, batch, img, gpu.device, seed=1, last=batch // 3)
    if gpu.there:
        from torch._inductor import config as inductor

        inductor.fallback_random = True  # the same dropout as eager, so that losses can be compared
    eager = train_compiled(s, gpu, "none", train, valid, epochs)
    fast = train_compiled(s, gpu, "reduce-overhead" if gpu.there else "none", train, valid, epochs)
    graphs, skips = fast["graphs"], counters["inductor"]["cudagraph_skips"]
    loss = 100 * abs(fast["loss"] / eager["loss"] - 1)
    out = [
        at_most("CUDA graphs", graphs[-1], 4),
        at_most("graphs recorded after epoch 1", graphs[-1] - graphs[0], 0),
        at_most("graphs that were skipped", skips, 0),
        at_most("training loss beside eager", loss, 1, "%", f"{fast['loss']:.4f} and {eager['loss']:.4f}, last epoch"),
        at_least("speed beside eager", eager["ms"] / fast["ms"], 1.1, "×", f"{fast['ms']:.1f}, {eager['ms']:.1f} ms"),
    ]
    if gpu.there:
        out.append(at_least("graphs are recorded at all", graphs[-1], 1))
    return out, dict(seconds_compiled=fast["seconds"], graphs_by_epoch=graphs)
