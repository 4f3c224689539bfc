"""A small bundle that answers by colour, and a server in a process of its own: for the server's tests and campaign."""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from pillsnap.client import photo_form
from pillsnap.delivery.classmap import ClassMap, kind_of
from pillsnap.deployment.runtime import BundleContent, model_entry, write_bundle
from pillsnap.models.decision import AnswerRule
from pillsnap.models.twoside import PairRule

PILLS = {"K-000001": (205, 60, 60), "K-000002": (60, 150, 80), "K-000003": (70, 90, 205)}
ORIGIN = dict(
    created="2026-01-01T00:00:00+00:00", git_sha="nogit", data="synthetic", data_hash="0" * 64, scorecard=None
)
KEY, OTHER = "a1" * 16, "b2" * 20


def save_onnx(path: Path, size: int, weight: Any, bias: Any, shape: Sequence[int] = ()) -> None:
    "Mean colour times a matrix, the mean colour as embedding; `shape` makes the output a detector's."
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["g"]),
        helper.make_node("Flatten", ["g"], ["embedding"]),
        helper.make_node("Gemm", ["embedding", "w", "b"], ["z"]),
    ]
    init = [numpy_helper.from_array(np.asarray(v, np.float32), n) for v, n in ((weight, "w"), (bias, "b"))]
    if shape:
        nodes.append(helper.make_node("Reshape", ["z", "s"], ["out"]))
        init.append(numpy_helper.from_array(np.array(shape), "s"))
    outputs = ["out"] if shape else ["z", "embedding"]
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        init,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def colour_bundle(
    folder: Path, data: str = "synthetic", broken: bool = False, keys: Sequence[str] = tuple(PILLS), **content: Any
) -> Path:
    "An export that names a photo by its colour and finds two pills in combo; `broken`: its answers are not finite."
    from pillsnap.photos.images import IMAGENET_MEAN, IMAGENET_STD

    folder.mkdir(parents=True, exist_ok=True)
    c = (np.array(list(PILLS.values())) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    save_onnx(folder / "classifier.onnx", 64, 0.8 * c.T * (np.nan if broken else 1), -0.4 * (c**2).sum(1))
    two = np.array([[40.0, 40, 26, 26, 0.9], [64.0, 96, 30, 30, 0.8]]).T
    save_onnx(folder / "detector.onnx", 128, np.zeros((3, 10)), two.ravel(), [-1, 5, 2])
    record = dict(print_front="HB", drug_shape="원형", di_edi_code="642500340,A01508511")
    drugs = {k: record | dict(dl_name=f"약 {k}") for k in keys}
    classes = ClassMap(tuple(keys), kind_of(keys))
    entries = [model_entry(folder / f"{n}.onnx", s, "by hand", 17) for n, s in (("classifier", 64), ("detector", 128))]
    own: dict[str, Any] = dict(drugs=drugs, temperature=1.5, calibrated=True)
    write_bundle(folder, BundleContent(classes, *entries, **(own | content)), **(ORIGIN | dict(data=data)))
    return folder


def two_sided_bundle(folder: Path, **content: Any) -> Path:
    "A colour bundle that answers two sides too."
    classes = ClassMap(tuple(PILLS))
    rule = AnswerRule("lac", 0.05, (0.8,) * 3, max_list=2, temperature=0.5, class_map=classes.fingerprint)
    pairs = PairRule(0.5, class_map=classes.fingerprint)
    own: dict[str, Any] = dict(rule=rule, pair_rule=pairs, temperature=0.5, answering=dict(focus="locator"))
    return colour_bundle(folder, **(own | content))


def pill_photo(kcode: str = "K-000002", size: tuple[int, int] = (240, 320), kind: str = "PNG") -> bytes:
    "A disc of a pill's colour on grey, as a file."
    image = Image.new("RGB", size, (150, 150, 150))
    x, y, r = size[0] / 2, size[1] / 2, min(size) * 0.4
    ImageDraw.Draw(image).ellipse([x - r, y - r, x + r, y + r], fill=PILLS[kcode])
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


class Server:
    "`pillsnap serve` in a process of its own, with its log in a file."

    def __init__(
        self,
        folder: Path,
        bundle: Path | str,
        *options: str,
        env: str = f"API_KEY={KEY},{OTHER}\n",
        log_dir: Path | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.log_dir, options = log_dir, (*options, "--log-dir", str(log_dir)) if log_dir else options
        self.env_file, self.log_file = folder / ".env", folder / "log.jsonl"
        self.env_file.touch(mode=0o600)
        self.env_file.write_text(env)
        argv = [
            "serve",
            *(("--bundle", str(bundle)) if bundle else ()),
            "--env-file",
            str(self.env_file),
            "--port",
            "0",
            *options,
        ]
        began = time.monotonic()
        with open(self.log_file, "wb") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "pillsnap", *argv], stderr=log, cwd=folder)
        self.port = self._port()
        self.start_seconds = time.monotonic() - began

    def _port(self) -> int:
        "The port, from the line that says that the server is ready."
        for _ in range(6000):
            if found := re.search(r"http://127\.0\.0\.1:(\d+) answers", self.log()):
                return int(found[1])
            if self.process.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"the server did not start:\n{self.log()}")

    def log(self) -> str:
        files = [self.log_file, *(sorted(self.log_dir.glob("server-*")) if self.log_dir else ())]
        return "".join(file.read_text(encoding="utf-8") for file in files)

    def lines(self) -> list[dict[str, Any]]:
        "What was logged."
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def workers(self) -> list[psutil.Process]:
        "The answering processes."
        return psutil.Process(self.process.pid).children()

    def memory(self) -> int:
        "Resident bytes of the server and its workers."
        return sum(p.memory_info().rss for p in [psutil.Process(self.process.pid), *self.workers()])

    def ask(
        self, path: str, photos: Sequence[bytes] = (), key: str | None = KEY, name: str = "photo", method: str = ""
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        "Status, JSON (or bytes) and headers of one request, on a connection of its own."
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        body, kind = photo_form(name, photos) if photos else (None, "")
        headers = ({"X-API-Key": key} if key is not None else {}) | ({"Content-Type": kind} if kind else {})
        try:
            connection.request(method or ("POST" if photos else "GET"), path, body, headers)
            response = connection.getresponse()
            data = response.read()
        finally:
            connection.close()
        told = json.loads(data) if "json" in response.headers.get("content-type", "") else data
        return response.status, told, response.headers

    def figure(self, name: str) -> float:
        "A figure of /metrics; 0 where it does not stand there yet. Labels are a part of the name."
        text = self.ask("/metrics")[1].decode()
        found = re.search(rf"^pillsnap_{re.escape(name)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0

    @contextmanager
    def stopped_workers(self) -> Iterator[list[psutil.Process]]:
        "Workers that neither answer nor end, until the block does."
        held = self.workers()
        for worker in held:
            worker.send_signal(signal.SIGSTOP)
        try:
            yield held
        finally:
            for worker in held:
                if worker.is_running():
                    worker.send_signal(signal.SIGCONT)

    def stop(self) -> int:
        "SIGTERM, and the exit status."
        if self.process.poll() is None:
            self.process.terminate()
        return self.process.wait(60)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def file_limit(n: int) -> None:
    "Let this process open up to n files, where the system allows it."
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(n, hard), hard))


def until(true: Any, seconds: float = 20) -> bool:
    "Wait for a condition."
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


os.environ.setdefault("OMP_NUM_THREADS", "1")
