"""A GPU that the CPU plays: tensors that say they are on cuda:0, and a list of every wait of the host.

Real numbers are computed, by the CPU's kernels, so a test can compare what the GPU's branch of a function returns with
what the CPU's branch returns. What would make the host wait for a real GPU is written down: values that are read, masks
whose count decides a shape, copies from memory that is not page-locked, index lists on the wrong side.

    with StandInGpu() as gpu:
        x = gpu.put(torch.rand(8))    # as if it had been computed there
        y = step(x)
    assert gpu.waits == []
    gpu.get(y)                        # the numbers, without a mark in the list

`HostReads` lists the same reads of a loop that runs on the CPU, where copies cannot be told apart.
"""

import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[1]
READS = {aten._local_scalar_dense.default: "a value is read", aten.equal.default: "two tensors are compared"}
SHAPES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}  # the GPU counts first
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._unsafe_index.Tensor,
    aten._index_put_impl_.default,
}


def where() -> str:
    "The innermost line of the package, or of a test, that asked for it."
    stack = traceback.extract_stack()
    ours = [f for f in stack if f.filename.startswith(str(ROOT)) and f.filename != __file__]
    ours = [f for f in ours if "/.venv/" not in f.filename]
    package = [f for f in ours if f.filename.startswith(str(ROOT / "pillsnap"))]
    f = (package or ours or stack)[-1]
    return f"{Path(f.filename).name}:{f.lineno} {f.line}"


class OnGpu(torch.Tensor):
    "A tensor that says it is on cuda:0; its numbers lie in `held`, on the CPU."

    @staticmethod
    def __new__(cls, held):
        where = dict(strides=held.stride(), storage_offset=held.storage_offset())
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), **where, dtype=held.dtype, device="cuda:0")

    def __init__(self, held):
        self.held = held

    def __repr__(self, **kwargs):
        return f"OnGpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called outside of `with StandInGpu()`")


def bare(tree):
    "The CPU tensors behind the wrappers."
    return tree_map(lambda v: v.held if isinstance(v, OnGpu) else v, tree)


class StandInGpu(TorchDispatchMode):
    "While it is entered, `cuda` is a device; `waits` lists where a real one would have made the host wait."

    def __init__(self):
        super().__init__()
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch does not look for a driver under such a mode
        self.waits, self.pinned, self._of = [], {}, {}

    def __enter__(self):
        self._lift = torch._C._only_lift_cpu_tensors()
        torch._C._ensureCUDADeviceGuardSet()  # switching to a device that is not there does nothing
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU and copied
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._lift)
        return super().__exit__(*error)

    def put(self, t: torch.Tensor) -> OnGpu:
        "A tensor as if it had been computed on the GPU."
        return self._wrap(t)

    def get(self, t: torch.Tensor) -> torch.Tensor:
        "The numbers of a tensor of the GPU."
        return t.held if isinstance(t, OnGpu) else t

    def pin(self, t: torch.Tensor) -> torch.Tensor:
        "Say of a CPU tensor that its memory is page-locked."
        self.pinned[t.untyped_storage().data_ptr()] = t
        return t

    def is_pinned(self, t: torch.Tensor) -> bool:
        a = t.untyped_storage().data_ptr()
        return any(p <= a < p + k.untyped_storage().nbytes() for p, k in self.pinned.items())

    @contextmanager
    def as_cuda(self, monkeypatch):
        "torch.cuda says that there is a GPU, and all its events have happened."

        class Event:
            def __init__(self, **kwargs):
                pass

            def record(self, stream=None):
                pass

            def query(self):
                return True

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1.0

        with monkeypatch.context() as m:
            m.setattr(torch.cuda, "is_available", lambda: True)
            m.setattr(torch.cuda, "Event", Event)
            yield self

    def _wrap(self, v):
        if not isinstance(v, torch.Tensor) or isinstance(v, OnGpu):
            return v
        return OnGpu(v)

    def _note(self, what):
        self.waits.append(f"{what}: {where()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        there = [v for v in flat if isinstance(v, OnGpu)]
        if func is aten.is_pinned.default:
            return not there and self.is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self.pin(args[0].clone())
        pin = kwargs.pop("pin_memory", None)
        if func is aten._to_copy.default:
            return self._to(func, args[0], kwargs, pin)
        if func is aten.copy_.default and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
            return self._across(*args)
        makes = str(kwargs.get("device", "cpu")).startswith("cuda")
        if not there and not makes:
            out = func(*args, **kwargs)
            return self.pin(out) if pin else out
        if makes:
            kwargs["device"] = torch.device("cpu")
        self._look(func, args, kwargs, flat)
        out = func(*bare(args), **bare(kwargs))
        if func is aten._local_scalar_dense.default or func is aten.equal.default:
            return out
        same = {id(v.held): v for v in there}  # an operation in place gives back what it was given
        return tree_map(lambda v: same[id(v)] if id(v) in same else self._wrap(v), out)

    def _look(self, func, args, kwargs, flat):
        if func in READS:
            self._note(READS[func])
        if func in SHAPES:
            self._note(f"{func} waits for a count")
        if func in INDEXED:
            for i in args[1]:
                if i is None:
                    continue
                if i.dtype in (torch.bool, torch.uint8):
                    self._note("a mask picks")
                elif not isinstance(i, OnGpu):
                    self._note("an index list is copied from the host")
            if len(args) > 2 and not isinstance(args[2], OnGpu):
                self._note("a value is copied from the host")
            return
        mixed = [v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, OnGpu) and v.dim()]
        if mixed:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found cuda:0 and cpu!")

    def _to(self, func, t, kwargs, pin):
        device = kwargs.pop("device", None)
        target = t.device if device is None else torch.device(device)
        out = func(bare(t), **{k: v for k, v in kwargs.items() if k != "non_blocking"})
        if target.type == "cpu":
            if isinstance(t, OnGpu) and not kwargs.get("non_blocking"):
                self._note("a tensor is fetched")
            return self.pin(out) if pin else out
        if not isinstance(t, OnGpu):
            if not kwargs.get("non_blocking"):
                self._note("a copy is waited for")
            elif not self.is_pinned(t):
                self._note("a copy from memory that is not page-locked")
        return self._wrap(out)

    def _across(self, to, t, non_blocking=False):
        if isinstance(to, OnGpu):
            if t.dim() and not (non_blocking and self.is_pinned(t)):
                self._note("a copy from memory that is not page-locked" if non_blocking else "a copy is waited for")
        elif not (non_blocking and self.is_pinned(to)):
            self._note("a tensor is fetched")
        bare(to).copy_(bare(t))
        return to


class HostReads(TorchDispatchMode):
    "Counts the reads and the counts of a loop that runs on the CPU, by the line that asks."

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in INDEXED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if func in READS or func in SHAPES or masks:
            self.waits.append(f"{func}: {where()}")
        return func(*args, **(kwargs or {}))
