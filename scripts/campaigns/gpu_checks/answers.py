"""GP14 and GP15: answering, by torch, by onnxruntime and by exact search."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from pillsnap.core.device import enable_tf32, set_seed

from .loop import rendered_photos
from .setup import (
    CLASSES,
    Gpu,
    Part,
    Size,
    absent,
    at_least,
    at_most,
    coloured_batches,
    drug_keys,
    holds,
    settings,
)


def fresh_classifier(s: Size, work: Path, device: torch.device) -> tuple[nn.Module, int]:
    "The default classifier with random weights, from a checkpoint, and its input's side; batch norms have seen photos."
    from pillsnap.models.factory import fresh_classifier_checkpoint, load_classifier

    img, keys = s.of(384, 64), drug_keys(CLASSES)
    backbone = s.of("tf_efficientnetv2_s", "test_resnet")
    model = load_classifier(
        fresh_classifier_checkpoint(work / "fresh" / "best.pt", backbone, keys, img), keys, device
    ).model
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.reset_running_stats()
            m.momentum = None
    model.train()
    with torch.no_grad():
        for x, _, _ in coloured_batches(s.of(4, 2), s.of(32, 8), img, device, seed=3):
            model(x)
    return model.eval(), img


# ---- GP14: latency


def latency_pairs(s: Size, gpu: Gpu, work: Path) -> dict[tuple[str, bool], list[float]]:
    "Milliseconds of single calls by scope, and whether a synchronisation was added; both kinds take turns in blocks."
    from pillsnap.core.records import Provenance
    from pillsnap.evaluation.answers import EvalPhoto, Evaluator, measure_scopes
    from pillsnap.models.factory import TorchClassifier
    from pillsnap.models.pipeline import Pipeline

    blocks, keys = s.of(8, 2), drug_keys(CLASSES)
    cfg = settings(s, f"evaluation.latency_runs={s.of(40, 3)}", f"evaluation.latency_warmup={s.of(5, 1)}")
    model, img = fresh_classifier(s, work, gpu.device)
    root, rows = rendered_photos(96, "jpg")
    shots = [EvalPhoto(p, "", "single", np.zeros((0, 4)), ()) for p in rows["path"][:8]]
    calls = Evaluator(Pipeline(TorchClassifier(model, img), keys), root, cfg.data).latency_calls(shots)
    waited = {scope: lambda call=call: (call(), gpu.sync()) for scope, call in calls.items()}
    prov, ms = Provenance("synthetic", "0" * 64, keys.fingerprint), {(k, w): [] for k in calls for w in (False, True)}
    for block in range(blocks + 1):  # the first warms up
        for added, group in ((False, calls), (True, waited)):
            _, timings = measure_scopes(group, prov, cfg.evaluation, gpu.device)
            for scope, t in timings.items():
                ms[scope, added] += list(t) if block else []
    return ms


def latency(device: str, tiny: bool, work: Path) -> list[Part]:
    "GP14: the evaluation's own protocol, beside the same calls with an explicit synchronisation."
    s, gpu = Size(tiny), Gpu(device)
    set_seed(42)
    ms = latency_pairs(s, gpu, work)
    p95, out = {k: float(np.percentile(v, 95)) for k, v in ms.items()}, []
    for scope, limit in (("single", 50), ("classifier", 10)):
        calls = ms[scope, False]
        out.append(
            at_most(f"{scope} p95", p95[scope, False], limit, "ms", f"p50 {np.median(calls):.2f}, {len(calls)} calls")
        )
    for scope in ("single", "classifier"):
        plain, added = p95[scope, False], p95[scope, True]
        both = f"{added:.2f} and {plain:.2f} ms"
        out.append(at_most(f"{scope} p95 with synchronisation", 100 * abs(added / plain - 1), 2, "%", both))
    return out


# ---- GP15: onnxruntime and exact search


def onnx_beside_torch(s: Size, gpu: Gpu, work: Path) -> list[Part]:
    "The exported classifier on onnxruntime's CUDA provider against torch in true fp32, batches 1 to 8."
    import onnxruntime as ort

    from pillsnap.core.device import full_fp32
    from pillsnap.deployment.comparison import logit_gap
    from pillsnap.deployment.graph import export_onnx, open_axes
    from pillsnap.deployment.runtime import OnnxClassifier

    wanted, title = "CUDAExecutionProvider", "logits against torch, the worst of batches 1 to 8"
    there = ort.get_available_providers()
    if gpu.there and wanted not in there:
        why = f"onnxruntime {ort.__version__} has {', '.join(there)}; install onnxruntime-gpu instead of onnxruntime"
        return [absent("onnxruntime's provider", wanted, why), absent(title, "≤ 0.0001", why)]
    model, img = fresh_classifier(s, work, gpu.device)
    path = work / "classifier.onnx"
    export_onnx(model, img, path, open_axes(s.of("tf_efficientnetv2_s", "test_resnet"), model))
    runner = OnnxClassifier(path.read_bytes(), img, "cuda" if gpu.there else "cpu")
    used, gaps, rng = runner.session.get_providers()[0], [], np.random.default_rng(0)
    with torch.inference_mode(), full_fp32():
        for n in range(1, s.of(8, 2) + 1):
            x = rng.standard_normal((n, 3, img, img), np.float32)
            want = model.float()(torch.from_numpy(x).to(gpu.device)).cpu().numpy()
            gaps.append(logit_gap(want, runner.logits(x)))
    return [
        holds("onnxruntime's provider", used == (wanted if gpu.there else "CPUExecutionProvider"), used, wanted),
        at_most(title, max(g["relative_error"] for g in gaps), 1e-4),
        at_least("top-1 equal", min(g["top1_equal"] for g in gaps), 1),
    ]


def hard_vectors(n: int, queries: int, dim: int = 512) -> tuple[torch.Tensor, torch.Tensor]:
    "Unit vectors in fp64: a gallery of twins that differ by little, and queries near them."
    g = torch.Generator().manual_seed(0)

    def unit(rows: int) -> torch.Tensor:
        return nn.functional.normalize(torch.randn(rows, dim, generator=g, dtype=torch.float64))

    base = unit(n // 2)
    gallery = torch.cat([base, nn.functional.normalize(base + 3e-3 * unit(n // 2))])
    pick = torch.randint(0, n // 2, (queries,), generator=g)
    return gallery, nn.functional.normalize(base[pick] + 0.2 * unit(queries))


def search_beside_fp64(s: Size, gpu: Gpu) -> list[Part]:
    "The project's exact search where TF32 is switched on, as in a training process; TF32 cannot tell the twins apart."
    from pillsnap.models.neighbours import nearest

    gallery, queries = hard_vectors(s.of(20_000, 64), s.of(512, 8))
    cosines = queries @ gallery.T
    best = cosines.topk(2).values
    gap = best[:, 0] - best[:, 1]
    clear = gap > 2e-6  # nearer ones are equal in fp32
    enable_tf32(True)
    _, rows = nearest(gallery.float().to(gpu.device), queries.float().to(gpu.device), 5)
    same = (rows[:, 0].cpu() == cosines.argmax(1))[clear]
    note = f"{int(clear.sum())} of {len(queries)} queries; the best two differ by {float(gap.median()):.1e}"
    return [at_least("search: top-1 as in fp64", float(same.float().mean()), 1, note=note)]


def onnx_and_search(device: str, tiny: bool, work: Path) -> list[Part]:
    "GP15."
    s, gpu = Size(tiny), Gpu(device)
    set_seed(42)
    return [*onnx_beside_torch(s, gpu, work), *search_beside_fp64(s, gpu)]
