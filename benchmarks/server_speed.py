#!/usr/bin/env python
"""The server beside the same sessions without HTTP, a plain FastAPI handler, LitServe and BentoML, two workers each.

Each contender answers the same photo from the same bundle, single mode, with one thread a session. In rounds, in
turn: answers a second at saturation (eight clients), then p95 with requests at random times (Poisson). The rate of
those requests is half of what the same sessions reach when threads of one process call them; and once more half of
what two processes reach without HTTP, which is more than one process can. The clients run on the same cores, for all
alike, and they send the photo over HTTP; in the two comparisons without HTTP the photo is there already.
usage: server_speed.py --bundle RUN [--photo FILE] [--seconds 6] [--repeats 5] [--peers-python PYTHON] [--out FOLDER]
       server_speed.py --network tf_efficientnetv2_s --size 384    a large network with random weights instead of a run
"""

import contextlib
import http.client
import multiprocessing
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [
    str(Path(__file__).resolve().parents[1] / "scripts" / "campaigns"),
    str(Path(__file__).resolve().parent),
]
from harness import arguments, finish, machine, save
from server_parts import KEY, Server, colour_bundle, pill_photo

from pillsnap.client import photo_form

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = {"saturation": 0.9, "p95_at_half_load": 1.15}  # of the same sessions called in this process
THREADS, PROCESSES = "threads of one process", "two processes, no HTTP"
PHOTO = (976, 1280)  # pixels of a photo as AI Hub delivers it
FASTAPI = """
import os
from fastapi import FastAPI, UploadFile
from pillsnap.deployment.runtime import load_bundle
bundle, app = load_bundle(os.environ["BUNDLE"], "cpu", 1), FastAPI()

@app.get("/health")
def health(): return "ok"

@app.post("/predict")
def predict(photo: UploadFile): return dict(bundle.predict(photo.file.read(), "single"))
"""
LITSERVE = """
import os, sys
import litserve
from fastapi import Request
from pillsnap.deployment.runtime import load_bundle

class Api(litserve.LitAPI):
    def setup(self, device): self.bundle = load_bundle(os.environ["BUNDLE"], "cpu", 1)
    def decode_request(self, request: Request): return request["photo"].file.read()
    def predict(self, photo): return dict(self.bundle.predict(photo, "single"))
    def encode_response(self, answer): return answer

if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=2)
    server.run(port=int(sys.argv[1]), host="127.0.0.1", generate_client_file=False, log_level="error")
"""
BENTOML = """
import os
from pathlib import Path
import bentoml
from pillsnap.deployment.runtime import load_bundle

@bentoml.service(workers=2)
class Pills:
    def __init__(self): self.bundle = load_bundle(os.environ["BUNDLE"], "cpu", 1)

    @bentoml.api
    def predict(self, photo: Path) -> dict: return dict(self.bundle.predict(photo.read_bytes(), "single"))
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


class Process:
    "A peer in processes of its own; ready when it answers the photo."

    def __init__(self, argv: list[Any], port: int, folder: Path, bundle: Path):
        paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
        env = os.environ | dict(BUNDLE=str(bundle), PYTHONPATH=paths, BENTOML_DO_NOT_TRACK="1", OMP_NUM_THREADS="1")
        self.port, self.log = port, folder / f"{port}.log"
        with open(self.log, "wb") as log:
            argv = list(map(str, argv))
            self.process = subprocess.Popen(argv, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
            process.kill()  # each by itself: BentoML's workers leave the group
        self.process.wait()


def asker(port: int, photo: bytes) -> Callable[[], None]:
    "One request on a connection that stays open; raises where it is not answered."
    body, kind = photo_form("photo", [photo])
    headers = {"Content-Type": kind, "X-API-Key": KEY}
    own = threading.local()

    def ask() -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            own.connection.request("POST", "/predict", body, headers)
            response = own.connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException):
            del own.connection
            raise
        if response.status != 200 or b'"mode_used"' not in data:
            raise OSError(f"status {response.status}: {data[:200]!r}")

    return ask


def _loop(pipe: Any, bundle: Path, photo: bytes) -> None:
    "A process that answers without HTTP."
    from pillsnap.deployment.runtime import load_bundle

    loaded = load_bundle(bundle, "cpu", 1)
    loaded.predict(photo, "single")
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the benchmark has ended
        while pipe.recv():
            loaded.predict(photo, "single")
            pipe.send("done")


class Bare:
    "Two processes with the same sessions, without HTTP: the most that can be had."

    def __init__(self, bundle: Path, photo: bytes):
        self.free: list[Any] = []
        self.lock = threading.Semaphore(2)
        for _ in range(2):
            here, there = multiprocessing.get_context("spawn").Pipe()
            multiprocessing.get_context("spawn").Process(target=_loop, args=(there, bundle, photo), daemon=True).start()
            here.recv()
            self.free.append(here)

    def ask(self) -> None:
        with self.lock:
            pipe = self.free.pop()
            pipe.send(True)
            pipe.recv()
            self.free.append(pipe)


def threads(bundle: Path, photo: bytes) -> Callable[[], None]:
    "Two sessions in this process, asked by threads."
    from pillsnap.deployment.runtime import load_bundle

    sessions = [load_bundle(bundle, "cpu", 1) for _ in range(2)]
    lock = threading.Semaphore(2)

    def ask() -> None:
        with lock:
            session = sessions.pop()
            try:
                session.predict(photo, "single")
            finally:
                sessions.append(session)

    return ask


def saturation(ask: Callable[[], None], seconds: float, clients: int = 8) -> float:
    "Answers a second."
    end, done = time.monotonic() + seconds, []

    def client() -> None:
        while time.monotonic() < end:
            ask()
            done.append(1)

    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        _ = [f.result() for f in [pool.submit(client) for _ in range(clients)]]
    return len(done) / (time.monotonic() - began)


def p95(ask: Callable[[], None], rate: float, seconds: float, seed: int) -> float:
    "Milliseconds from the moment that a request is due, with requests at random times."
    rng, due, found = random.Random(seed), 0.0, []
    times = []
    while due < seconds:
        due += rng.expovariate(rate)
        times.append(due)
    began = time.monotonic()

    def one(at: float) -> None:
        ask()
        found.append(1e3 * (time.monotonic() - began - at))

    with ThreadPoolExecutor(32) as pool:
        for at in times:
            time.sleep(max(0, began + at - time.monotonic()))
            pool.submit(one, at)
    return statistics.quantiles(found, n=20)[-1] if len(found) > 20 else max(found)


def network_bundle(folder: Path, name: str, size: int, drugs: int = 1000) -> Path:
    "A bundle of a timm network with random weights: how long an answer takes does not depend on what was learnt."
    import timm
    from server_parts import ORIGIN

    from pillsnap.delivery.classmap import ClassMap
    from pillsnap.deployment.graph import export_onnx
    from pillsnap.deployment.runtime import BundleContent, model_entry, write_bundle
    from pillsnap.models.factory import WithEmbedding

    folder.mkdir(parents=True)
    network = timm.create_model(name, num_classes=drugs, pretrained=False)
    path = folder / "classifier.onnx"
    export_onnx(WithEmbedding(network), size, path, names=("image", "logits", "embedding"))
    codes = ClassMap(tuple(f"K-{k:06d}" for k in range(1, drugs + 1)))
    write_bundle(folder, BundleContent(codes, model_entry(path, size, name, 17)), **ORIGIN)
    return folder


def peers(folder: Path, bundle: Path, python: str) -> dict[str, Process]:
    "Those that are installed."
    for name, text in (("plain_api", FASTAPI), ("lit_api", LITSERVE), ("bento_api", BENTOML)):
        (folder / f"{name}.py").write_text(text)
    ports = [free_port() for _ in range(3)]
    quiet = ["--log-level", "error", "--workers", "2"]
    argv = {
        "plain FastAPI": [sys.executable, "-m", "uvicorn", "plain_api:app", "--port", ports[0], *quiet],
        "LitServe": [python, folder / "lit_api.py", ports[1]],
        "BentoML": [python, "-m", "bentoml", "serve", "bento_api:Pills", "--port", ports[2]],
    }
    return {name: Process(a, port, folder, bundle) for (name, a), port in zip(argv.items(), ports)}


def wait_for(ask: Callable[[], None], seconds: float = 60) -> str:
    "Empty when it answers; else why it does not."
    end, why = time.monotonic() + seconds, ""
    while time.monotonic() < end:
        try:
            ask()
            return ""
        except OSError as e:
            why = str(e)
            time.sleep(0.2)
    return why


def contents(a: Any, folder: Path) -> tuple[Path, bytes]:
    "The bundle and the photo that every contender answers."
    photo = Path(a.photo).read_bytes() if a.photo else pill_photo(size=PHOTO if a.network else (488, 640))
    if a.network:
        return network_bundle(folder / "export", a.network, a.size), photo
    return Path(a.bundle).resolve() if a.bundle else colour_bundle(folder / "export"), photo


def network_name(a: Any) -> str:
    "What answers, in words."
    if a.network:
        return f"{a.network} at {a.size} pixels, random weights, photos of {PHOTO[0]}×{PHOTO[1]} pixels"
    return "a run" if a.bundle else "answers by colour"


def main() -> None:
    a = arguments(__doc__ or "", bundle="", photo="", seconds=6.0, peers_python=sys.executable, network="", size=384)
    if a.quick:
        a.seconds = 1.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, photo = contents(a, folder)
        server = Server(folder / "ours", bundle, "--limit", "per_minute=1000000000", "--limit", "queue=64")
        others = peers(folder, bundle, a.peers_python)  # they start later: the server's start is timed without them
        asks = {"PillSnap": asker(server.port, photo), THREADS: threads(bundle, photo)}
        asks[PROCESSES] = Bare(bundle, photo).ask
        missing = {}
        for name, other in others.items():
            if why := wait_for(ask := asker(other.port, photo)):
                missing[name] = f"{why}: {other.log.read_text(errors='replace')[-300:]}"
            else:
                asks[name] = ask
        found: dict[str, dict[str, list[float]]] = {n: dict(per_second=[], p95_ms=[], p95_busy_ms=[]) for n in asks}
        loads = []
        try:
            for turn in range(a.repeats):
                for n in sorted(asks, key=lambda _: random.random()):
                    found[n]["per_second"].append(saturation(asks[n], a.seconds))
                for figure, rival in (("p95_ms", THREADS), ("p95_busy_ms", PROCESSES)):
                    half = found[rival]["per_second"][-1] / 2
                    for n in sorted(asks, key=lambda _: random.random()):
                        if n != THREADS or rival == THREADS:  # the other rate is more than threads can answer
                            found[n][figure].append(p95(asks[n], half, a.seconds, turn))
                loads.append(round(os.getloadavg()[0], 2))
        finally:
            server.stop()
            for other in others.values():
                other.stop()
    report(a, server, found, missing, loads)


def ratio(one: dict[str, list[float]], other: dict[str, list[float]], figure: str) -> float | None:
    "The median of the rounds' ratios."
    pairs = list(zip(one[figure], other[figure]))
    return round(statistics.median(x / y for x, y in pairs), 3) if pairs else None


def report(a: Any, server: Server, found: dict[str, Any], missing: dict[str, str], loads: list[float]) -> None:
    "The table, the file, and what was missed."
    rows = {}
    for n, f in found.items():
        rows[n] = dict(
            per_second=round(statistics.median(f["per_second"]), 2),
            p95_ms=round(statistics.median(f["p95_ms"]), 1),
            p95_busy_ms=round(statistics.median(f["p95_busy_ms"]), 1) if f["p95_busy_ms"] else None,
            of_threads=ratio(f, found[THREADS], "per_second"),
            p95_of_threads=ratio(f, found[THREADS], "p95_ms"),
            of_processes=ratio(f, found[PROCESSES], "per_second"),
            p95_of_processes=ratio(f, found[PROCESSES], "p95_busy_ms"),
        )
        print(f"{n:26} {rows[n]}")
    for n, why in missing.items():
        print(f"{n:26} not measured: {why}")
    ours = rows["PillSnap"]
    missed = [f"saturation {ours['of_threads']}"] * (ours["of_threads"] < REQUIRED["saturation"])
    missed += [f"p95 at half load {ours['p95_of_threads']}"] * (ours["p95_of_threads"] > REQUIRED["p95_at_half_load"])
    record = dict(
        id=f"SERVER_{a.network}" if a.network else "SERVER",
        what="answers a second at saturation and p95 at half load, two workers",
        bundle=network_name(a),
        start_seconds=round(server.start_seconds, 2),
        repeats=a.repeats,
        seconds_each=a.seconds,
        load_average=loads,
        rows=rows,
        missing=missing,
        when=time.strftime("%Y-%m-%d", time.gmtime()),
        machine=machine(),
    )
    if not a.quick:
        save(record, a.out)
    finish(missed)


if __name__ == "__main__":
    main()
