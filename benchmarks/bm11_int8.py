"""BM11: a network in eight bits beside the same network in float32, both by onnxruntime on the CPU, one photo at a
time, two threads.

EfficientNetV2-S at 384 pixels and YOLO11m at 640, the sizes that a full run trains, with random weights: the speed of a
network does not depend on what it has learnt. They are quantised by the code that `pillsnap quantise` uses. Its price
in answers depends on what a network has learnt, so it is read from a run that was quantised (`--run`) and shown beside
the ratio. OpenVINO stands in the table where it is installed; it has no bound.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from harness import arguments, compare, finish, optional

from pillsnap.core.files import read_json
from pillsnap.deployment.graph import RawHead, export_onnx
from pillsnap.deployment.quantise import to_int8
from pillsnap.deployment.runtime import open_session
from pillsnap.models.factory import WithEmbedding
from pillsnap.models.yolo import build_yolo_model

DRUGS, THREADS, PHOTOS = 1000, 2, 8  # of the classifier; of a session; in one turn
PRICE = ("accuracy", "accuracy_lost", "coverage", "set_size", "mAP@0.5")


def classifier(name: str, size: int, path: Path) -> None:
    network = timm.create_model(name, num_classes=DRUGS, pretrained=False)
    export_onnx(WithEmbedding(network), size, path, names=("image", "logits", "embedding"))


def detector(name: str, size: int, path: Path) -> None:
    export_onnx(RawHead(build_yolo_model(name)), size, path, names=("image", "raw"))


def inputs(size: int, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.random((1, 3, size, size), dtype=np.float32) for _ in range(n)]


def by_onnxruntime(model: bytes, photos: list[np.ndarray]) -> Callable[[], None]:
    session = open_session(model, "cpu", THREADS)

    def run() -> None:
        for x in photos:
            session.run(None, {"image": x})

    return run


def by_openvino(model: bytes, photos: list[np.ndarray]) -> Callable[[], None] | str:
    found = optional("openvino")
    if isinstance(found, str):
        return found
    how = {"INFERENCE_NUM_THREADS": THREADS, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = found.compile_model(found.Core().read_model(model), "CPU", how)

    def run() -> None:
        for x in photos:
            compiled([x])

    return run


def price_of(run: str) -> dict[str, Any]:
    "What int8 costs in answers, from the report of a quantised run."
    path = Path(run) / "reports" / "quantised.json"
    if not run or not path.is_file():
        return {
            "run": None,
            "note": "no run was given, or it was not quantised: --run RUN after `pillsnap quantise RUN`",
        }
    report = read_json(path)
    wanted = {f"{p}_{f}" for p in ("fp32", "int8") for f in PRICE}
    figures = {
        m["name"]: dict(value=m["value"], n=m["n"], note=m["note"]) for m in report["metrics"] if m["name"] in wanted
    }
    return {"run": report["run_id"], "data": report["data"], "lost": report["lost"].get("int8", []), "figures": figures}


def measure(what: str, make: Callable[[str, int, Path], None], name: str, size: int, a: Any) -> list[str]:
    "One network, in both precisions."
    torch.manual_seed(0)
    photos = inputs(size, 2 if a.quick else PHOTOS)
    with TemporaryDirectory() as folder:
        make(name, size, Path(folder) / "plain.onnx")
        plain = (Path(folder) / "plain.onnx").read_bytes()
    small = to_int8(plain, photos[:2])
    megabytes = f"{len(plain) / 1e6:.0f} MB in float32, {len(small) / 1e6:.0f} MB in int8, random weights"
    return compare(
        "BM11_detector" if make is detector else "BM11",
        what,
        {"onnxruntime int8": by_onnxruntime(small, photos)},
        {
            "onnxruntime fp32": by_onnxruntime(plain, photos),
            "OpenVINO fp32": by_openvino(plain, photos),
            "OpenVINO int8": by_openvino(small, photos),
        },
        len(photos),
        a.repeats,
        note=megabytes,
        quick=a.quick,
        out=a.out,
        extra={"price": price_of(a.run), "threads": THREADS},
    )


if __name__ == "__main__":
    networks = dict(backbone="tf_efficientnetv2_s", yolo="11m")
    a = arguments(__doc__, size=384, detector_size=640, run="", **networks)
    named = {"tf_efficientnetv2_s": "EfficientNetV2-S"}.get(a.backbone, a.backbone)
    missed = measure(f"{named} at {a.size} pixels, batch 1, {THREADS} threads", classifier, a.backbone, a.size, a)
    what = f"YOLO{a.yolo} at {a.detector_size} pixels, batch 1, {THREADS} threads"
    missed += measure(what, detector, a.yolo, a.detector_size, a)
    price = price_of(a.run)
    print(f"price of int8: {price.get('note') or 'run ' + str(price['run']) + ', ' + str(price['data'])}")
    for name, f in price.get("figures", {}).items():
        print(f"  {name:<22} {f['value'] if f['value'] is None else round(f['value'], 4)}, n={f['n']}, {f['note']}")
    finish(missed)
