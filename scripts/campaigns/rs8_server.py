#!/usr/bin/env python
"""The server under everything that a stranger may send, and under loss of its workers.

1. schemathesis over the OpenAPI document, two sides and feedback included, with all its checks, at least 20,000 cases;
2. a mixture of good, bad, slow and cut requests while workers are killed and the bundle is changed: what was accepted
   is answered;
3. 1,000 requests at once, several times;
4. a disk that takes no byte, for the log and for --keep;
5. memory over 20,000 answered photos.
usage: rs8_server.py [--cases 20000] [--photos 20000] [--seconds 60] [--out FOLDER]
"""

import asyncio
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "benchmarks"), str(Path(__file__).resolve().parent)]
from harness import arguments, finish, machine, save
from server_parts import KEY, Server, colour_bundle, file_limit, pill_photo, two_sided_bundle

from pillsnap.client import photo_form

FREE = ("--limit", "per_minute=1000000000")
# A photo is bytes to OpenAPI: any bytes are valid there, and most are no photo.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = [200, 401, 403, 413, 415, 422, 429, 503]
"""
HOOKS = """
import schemathesis
from hypothesis import strategies as st
from schemathesis.transport.serialization import Binary
from server_parts import PILLS, pill_photo

PHOTOS = [pill_photo(k, kind=kind) for k in PILLS for kind in ("PNG", "JPEG", "WEBP")]
PHOTOS += [p[: len(p) // 2] for p in PHOTOS] + [p[:30] + bytes(50) + p[80:] for p in PHOTOS]
schemathesis.openapi.format("binary", st.one_of(st.sampled_from(PHOTOS), st.binary(max_size=2000)).map(Binary))
"""


def fuzz(server: Server, folder: Path, examples: int, seed: int) -> dict[str, Any]:
    "Cases and failures of schemathesis; /reload, which takes seconds, gets a hundredth of the examples."
    (folder / "schemathesis.toml").write_text(CONFIG)
    (folder / "photo_hooks.py").write_text(HOOKS)
    here = str(Path(__file__).resolve().parent)
    env = os.environ | {"SCHEMATHESIS_HOOKS": "photo_hooks"}
    env["PYTHONPATH"] = os.pathsep.join([str(folder), here, os.environ.get("PYTHONPATH", "")])
    cases, failures = 0, []
    for which, n in (
        (("--exclude-path", "/reload"), examples),
        (("--include-path", "/reload"), max(1, examples // 100)),
    ):
        command = [Path(sys.executable).parent / "st", "run", f"http://127.0.0.1:{server.port}/openapi.json", *which]
        options = ["-H", f"X-API-Key: {KEY}", "-c", "all", "-n", str(n), "--seed", str(seed), "--continue-on-failure"]
        done = subprocess.run([*command, *options], cwd=folder, env=env, capture_output=True, text=True)
        found = re.search(r"([\d,]+) generated", done.stdout)
        if found is None:
            raise AssertionError(done.stdout[-3000:] + done.stderr[-3000:])
        cases += int(found[1].replace(",", ""))
        if done.returncode:
            failures.append(done.stdout.partition("FAILURES")[2][:6000])
    return dict(cases=cases, failures=failures)


def unfinished(server: Server, wait: bool) -> int:
    "The status that a photo gets of which half arrives; 0 for a client that does not wait for it."
    body, kind = photo_form("photo", [pill_photo()])
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nContent-Type: {kind}\r\n"
    data = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(data)
        return int(connection.recv(100).split(b" ")[1]) if wait else 0


def bad_requests() -> dict[str, tuple[set[int], Callable[[Server], int]]]:
    "Name → the statuses that may come, and how to ask."
    photo = pill_photo()
    bomb = photo[:16] + (30_000).to_bytes(4, "big") * 2 + photo[24:]
    wide = pill_photo(size=(7000, 7000))  # 49 million pixels in a small file: accepted, and decoded
    return {
        "good single": ({200, 503}, lambda s: s.ask("/predict?pipeline=single", [photo])[0]),
        "good two sides": ({200, 503}, lambda s: s.ask("/predict?two_side=true", [photo, photo])[0]),
        "good combo": ({200, 503}, lambda s: s.ask("/predict?pipeline=combo", [photo])[0]),
        "good batch": ({200, 503}, lambda s: s.ask("/batch", [photo] * 4, name="photos")[0]),
        "49 million pixels": ({200, 503}, lambda s: s.ask("/predict", [wide])[0]),
        "no key": ({401}, lambda s: s.ask("/predict", [photo], key=None)[0]),
        "wrong key": ({403}, lambda s: s.ask("/predict", [photo], key="wrong" * 9)[0]),
        "21 MB": ({413, 503}, lambda s: s.ask("/predict", [bytes(21_000_000)])[0]),
        "900 million pixels": ({413, 503}, lambda s: s.ask("/predict", [bomb])[0]),
        "a letter": ({415, 503}, lambda s: s.ask("/predict", [b"Dear pharmacist,"])[0]),
        "half a photo": ({422, 503}, lambda s: s.ask("/predict", [photo[: len(photo) // 2]])[0]),
        "17 photos": ({422, 503}, lambda s: s.ask("/batch", [photo] * 17, name="photos")[0]),
        "slow body": ({408, 503}, lambda s: unfinished(s, wait=True)),
        "cut body": ({0}, lambda s: unfinished(s, wait=False)),
        "two modes": ({422, 503}, lambda s: s.ask("/predict?pipeline=single&mode=combo", [photo])[0]),
    }


def disturb(server: Server, place: Path, rng: random.Random, bundles: dict[str, Path]) -> tuple[str, bool]:
    "Kill a worker, or change the bundle; what happened, and whether the server said the right thing of it."
    if rng.random() < 0.6 and (workers := server.workers()):
        rng.choice(workers).send_signal(signal.SIGKILL)
        return "kill -9 of a worker", True
    which = rng.choice(list(bundles))

    def reload_to(folder: Path) -> int:
        place.unlink()
        place.symlink_to(folder)
        return server.ask("/reload", method="POST")[0]

    status = reload_to(bundles[which])
    if which == "broken":  # workers that start again look at this place
        reload_to(bundles["good"])
    return f"reload of a {which} bundle: {status}", status == (409 if which == "broken" else 200)


def mixture(folder: Path, good: Path, seconds: float, seed: int) -> dict[str, Any]:
    "All kinds at once, from eight clients, while workers die and the bundle changes."
    kinds, told, wrong, stop = bad_requests(), Counter(), [], threading.Event()
    bundles = dict(good=good, other=two_sided_bundle(folder / "other", data="other:toy"))
    bundles["broken"] = colour_bundle(folder / "broken", broken=True)
    place, rng, events, top = folder / "model", random.Random(seed), Counter(), 0
    place.symlink_to(good)

    def client(server: Server, n: int) -> None:
        mine = random.Random(seed * 100 + n)
        while not stop.is_set():
            name = mine.choice(list(kinds))
            try:
                status = kinds[name][1](server)
            except OSError as e:
                status = type(e).__name__  # a request that got no answer
            told[f"{name}: {status}"] += 1
            if status not in kinds[name][0]:
                wrong.append(f"{name}: {status}")

    with Server(folder / "mixture", place, *FREE, "--limit", "body_seconds=3") as server, ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, server, n) for n in range(8)]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(rng.uniform(0.5, 3))
            event, right = disturb(server, place, rng, bundles)
            events[event] += 1
            wrong += [] if right else [event]
            top = max(top, server.memory())
        stop.set()
        _ = [c.result() for c in clients]
        log, held = server.log(), server.figure("held_bytes")
    gone = sum(line.get("code") == "client_gone" for line in server.lines())
    wrong += ["no cut body in the log"] * (not gone) + ["a key in the log"] * (KEY in log)
    wrong += [f"{held} bytes are still held"] * bool(held)
    other = sum(line.get("status", 0) >= 500 and line["status"] != 503 for line in server.lines())
    return dict(told=dict(sorted(told.items())), events=dict(events), wrong=wrong, other_5xx=other, top_mb=top / 1e6)


async def _at_once(port: int, request: bytes, n: int) -> list[bytes]:
    async def one() -> bytes:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            got = await asyncio.wait_for(reader.read(), 120)
            writer.close()
        except OSError as e:
            return type(e).__name__.encode()
        return got[9:12]

    return await asyncio.gather(*(one() for _ in range(n)))


def thousand(server: Server, times: int = 5) -> dict[str, int]:
    "Statuses of 1,000 requests at once, several times."
    file_limit(4096)
    body, kind = photo_form("photo", [pill_photo()])
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    found: Counter = Counter()
    for _ in range(times):
        found.update(status.decode() for status in asyncio.run(_at_once(server.port, request, 1000)))
    return dict(found)


def full_disk(folder: Path, bundle: Path) -> dict[str, int]:
    "Statuses of a server whose log is a full disk and that may write no byte to any file."
    (folder / ".env").touch(mode=0o600)
    (folder / ".env").write_text(f"API_KEY={KEY}\n")
    argv = [sys.executable, "-m", "pillsnap", "serve", "--bundle", str(bundle), "--port", "18431", *FREE]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            [*argv, "--keep", str(folder / "kept")],
            stderr=full,
            cwd=folder,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
    server = Server.__new__(Server)
    server.port = 18431
    try:
        for _ in range(600):
            try:
                server.ask("/health")
                break
            except OSError:
                time.sleep(0.1)
        found = Counter(str(server.ask("/predict", [pill_photo()])[0]) for _ in range(50))
        found["photos that could not be kept"] = int(server.figure("not_kept_total"))
    finally:
        process.terminate()
        process.wait(30)
    return dict(found)


def memory(server: Server, photos: int) -> dict[str, float]:
    "Growth of the resident memory per 1,000 answered photos: Theil-Sen over the last two thirds."
    photo, samples = pill_photo(), []
    statuses: Counter = Counter()

    def some(n: int) -> None:
        from pillsnap.client import Client

        client = Client(f"http://127.0.0.1:{server.port}", KEY)
        for _ in range(n):
            client.predict(photo)
            statuses["200"] += 1

    with ThreadPoolExecutor(4) as pool:
        for step in range(40):
            list(pool.map(some, [photos // 160] * 4))
            samples.append((step * photos / 40 / 1000, server.memory() / 1e6))
    late = samples[len(samples) // 3 :]
    slopes = sorted((b[1] - a[1]) / (b[0] - a[0]) for i, a in enumerate(late) for b in late[i + 1 :])
    slope = slopes[len(slopes) // 2]
    return dict(photos=statuses["200"], first_mb=samples[0][1], last_mb=samples[-1][1], mb_per_1000=round(slope, 4))


def main() -> None:
    a = arguments(__doc__ or "", cases=20000, photos=20000, seconds=60, seed=1)
    if a.quick:
        a.cases, a.photos, a.seconds = 500, 320, 5
    began, missed = time.monotonic(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = two_sided_bundle(folder / "export")
        with Server(folder / "fuzz", bundle, *FREE, "--feedback", str(folder / "feedback.jsonl")) as server:
            fuzzed = fuzz(server, folder, examples=max(5, a.cases // 2), seed=a.seed)
            at_once = thousand(server)
            rss = memory(server, a.photos)
            log = server.log()
        mixed = mixture(folder, bundle, a.seconds, a.seed)
        (folder / "full").mkdir()
        full = full_disk(folder / "full", bundle)
    missed += fuzzed["failures"] + mixed["wrong"]
    missed += [f"{fuzzed['cases']} cases"] * (fuzzed["cases"] < a.cases)
    missed += ["a key in the log"] * (KEY in log) + [f"{mixed['other_5xx']} of status 5xx"] * bool(mixed["other_5xx"])
    missed += [f"at once: {s}" for s in at_once if s not in ("200", "503")]
    missed += [f"full disk: {s}" for s in full if s not in ("200", "photos that could not be kept")]
    missed += [f"memory grows by {rss['mb_per_1000']} MB per 1,000 photos"] * (rss["mb_per_1000"] > 0.5)
    result = dict(
        id="RS8",
        what="the server under strangers, lost workers, reloads and a full disk",
        failed=len(missed),
        seconds=round(time.monotonic() - began, 1),
        when=time.strftime("%Y-%m-%d"),
        schemathesis=dict(cases=fuzzed["cases"], failures=len(fuzzed["failures"])),
        at_once=at_once,
        memory=rss,
        mixture={k: mixed[k] for k in ("told", "events", "top_mb")},
        full_disk=full,
        machine=machine(),
    )
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))
    if not a.quick:
        save(result, a.out)
    finish(missed)


if __name__ == "__main__":
    main()
