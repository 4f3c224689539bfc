"The server: `pillsnap serve` in a process of its own, with its workers, asked over sockets."

import http.client
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from jsonschema import validate
from terminal import search_path

from pillsnap.client import Client
from pillsnap.core.container import PackedFiles, write_packed
from pillsnap.core.errors import PillsnapError
from pillsnap.core.signing import sign_files
from pillsnap.dataset.feedback import read_remarks
from pillsnap.deployment.admission import KeyRing
from pillsnap.deployment.runtime import load_bundle
from pillsnap.models.pipeline import answer_schema
from pillsnap.photos.unified import UnifiedPreprocessor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
from server_parts import KEY, OTHER, PILLS, Server, colour_bundle, file_limit, pill_photo, two_sided_bundle, until

# no rate that a test could reach, and patience with a machine that does other things as well
FREE = ("--limit", "per_minute=1000000", "--limit", "wait_seconds=60")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    "It answers one photo, and two sides."
    return two_sided_bundle(tmp_path_factory.mktemp("bundle") / "export")


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    "Two workers, no rate that a test could reach, a file for what people say."
    folder = tmp_path_factory.mktemp("server")
    with Server(folder, bundle, *FREE, "--feedback", str(folder / "feedback.jsonl")) as running:
        yield running


def same(a: dict, b: dict) -> bool:
    return {**a, "timings": 0} == {**b, "timings": 0}


@pytest.mark.spec("SV1")
def test_the_server_answers_as_the_bundle_does(server, bundle):
    "Each photo format, each mode, top-k, a batch: the same JSON as in this process, with the EDI codes in it."
    here = load_bundle(bundle)
    for kind in ("PNG", "JPEG", "BMP", "WEBP"):
        photo = pill_photo("K-000003", kind=kind)
        status, told, headers = server.ask("/predict?pipeline=single&top_k=2", [photo])
        assert status == 200 and same(told, here.predict(photo, "single", 2)), told
        assert told["items"][0]["kcode"] == "K-000003" and told["items"][0]["edi_codes"] == ["642500340", "A01508511"]
        assert headers["cache-control"] == "no-store" and headers["x-content-type-options"] == "nosniff"
        validate(told, answer_schema())
    photos = [pill_photo(k) for k in PILLS]
    status, told, _ = server.ask("/batch?pipeline=combo", photos, name="photos")
    assert status == 200 and all(same(a, here.predict(p, "combo")) for a, p in zip(told["answers"], photos))


@pytest.mark.spec("SV1")
@pytest.mark.parametrize("limit, most", [("queue=3", 4), ("per_minute=5", 5), ("batch_photos=6", 6)])
def test_a_batch_that_no_limit_would_ever_let_through_is_told_its_size(tmp_path, bundle, limit, most):
    "It is not told to ask again later."
    with Server(tmp_path, bundle, *FREE, "--workers", "1", "--limit", limit) as running:
        assert running.ask("/version")[1]["limits"]["batch_photos"] == most
        status, told, _ = running.ask("/batch", [pill_photo()] * (most + 1), name="photos")
        assert status == 422 and str(most) in told["error"]["message"] + told["error"]["fix"], told


class CutAnswers(http.server.BaseHTTPRequestHandler):
    "A server whose first answer is cut off, and whose second one comes late."

    protocol_version = "HTTP/1.1"
    asked = 0

    def log_message(self, *args) -> None:
        "Nothing is printed."

    def do_POST(self) -> None:
        type(self).asked += 1
        n = self.asked
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"n": n}).encode()
        if n == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 50 * (n == 1)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = n == 1


def test_the_client_answers_after_a_cut_answer_and_after_ctrl_c():
    "The error is the program's own, and no later photo gets the answer of an earlier one."
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), CutAnswers)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    client = Client(f"http://127.0.0.1:{listening.server_port}")
    with pytest.raises(PillsnapError, match="the server cannot be reached"):
        client.predict(b"first")
    with pytest.raises(KeyboardInterrupt):
        client.predict(b"second")
    assert client.predict(b"third") == {"n": 3}
    listening.shutdown()


@pytest.mark.spec("BX16", "SV1")
def test_two_sides_are_answered_as_the_bundle_does(server, bundle):
    "Front and back in this order, as the command line and the client say it; two drugs in two photos get no name."
    here, client = load_bundle(bundle), Client(f"http://127.0.0.1:{server.port}", KEY)
    front, back, other = pill_photo(), pill_photo(size=(300, 260), kind="JPEG"), pill_photo("K-000003")
    before = server.figure('answers_total{answer="drug",mode="two_side"}')
    status, told, _ = server.ask("/predict?two_side=true&top_k=2", [front, back])
    assert status == 200 and same(told, here.predict_sides(front, back, 2)), told
    assert same(client.predict_sides(front, back, 2), told) and server.ask("/version")[1]["bundle"]["two_side"] is True
    validate(told, answer_schema())
    assert (told["answer"], told["items"][0]["kcode"], told["two_side"]) == ("drug", "K-000002", True)
    assert server.figure('answers_total{answer="drug",mode="two_side"}') == before + 2
    turned = server.ask("/predict?two_side=true", [back, front])[1]
    assert (turned["hashes"]["photo"], turned["hashes"]["photo_back"]) == tuple(
        told["hashes"][k] for k in ("photo_back", "photo")
    )
    for photos, reason in (((front, other), "contradiction"), ((front, front), "same_photo")):
        told = server.ask("/predict?two_side=true", photos)[1]
        assert (told["answer"], told["items"][0]["reason"]) == ("unknown", reason)


@pytest.mark.spec("BX16", "SV1")
def test_what_two_sides_need_is_said(server, tmp_path, bundle):
    "Which photo is bad; one photo, three, or two without two_side; a mode of many pills; a bundle without a rule."
    good, broken = pill_photo(), pill_photo()[:900]
    for photos, status, words in (
        ([b"Dear pharmacist,", good], 415, "the photo of the front"),
        ([good, b"Dear pharmacist,"], 415, "the photo of the back"),
        ([good, broken], 422, "the photo of the back"),
        ([good], 422, "two sides are two photos"),
        ([good] * 3, 422, "more than 2 photo"),
        ([good, bytes(20_000_001)], 413, "a photo may have 20 MB"),
    ):
        got, told, _ = server.ask("/predict?two_side=true", photos)
        assert (got, words in told["error"]["message"]) == (status, True), told
    for query, photos in (("two_side=true&pipeline=combo", 2), ("two_side=1", 2), ("two_side=false", 2), ("", 2)):
        assert server.ask(f"/predict?{query}", [good] * photos)[0] == 422, query
    assert server.ask("/batch?two_side=true", [good] * 2, name="photos")[0] == 422
    plain, kept = colour_bundle(tmp_path / "plain"), tmp_path / "kept"
    place = tmp_path / "model"
    place.symlink_to(plain)
    with Server(tmp_path / "server", place, *FREE, "--workers", "1", "--keep", str(kept)) as server:
        status, told, _ = server.ask("/predict?two_side=true", [good, good])
        assert (status, told["error"]["code"]) == (422, "two_side_unavailable")
        assert server.ask("/version")[1]["bundle"]["two_side"] is False and not list(kept.glob("*/*"))
        place.unlink()
        place.symlink_to(bundle)
        assert server.ask("/reload", method="POST")[0] == 200
        back = pill_photo(kind="JPEG")
        assert server.ask("/predict?two_side=true", [good, back])[0] == 200
    files = {p.name.partition("-0")[2]: p.read_bytes() for p in kept.glob("*/*")}
    assert (files[".png"], files["-back.jpg"], len(files)) == (good, back, 3)


@pytest.mark.spec("SV1", "X40")
@pytest.mark.parametrize("mode", ["single", "combo"])
def test_the_mode_is_what_was_asked(server, mode):
    "Under its name and under its older one; a photo that hints at many pills changes nothing."
    for photo in (pill_photo(), pill_photo(size=(900, 700))):
        for query in (f"pipeline={mode}", f"mode={mode}", f"mode={mode}&pipeline={mode}"):
            status, told, _ = server.ask(f"/predict?{query}", [photo])
            assert (status, told["mode_requested"], told["mode_used"]) == (200, mode, mode)
    other = {"single": "combo", "combo": "single"}[mode]
    for query in (f"pipeline={mode}&mode={other}", f"pipeline={mode}&pipeline={mode}", "pipeline=auto", "modus=combo"):
        status, told, _ = server.ask(f"/predict?{query}", [pill_photo()])
        assert (status, told["error"]["code"]) == (422, "bad_request")


@pytest.mark.spec("SV1", "SV3")
def test_without_the_right_key_nothing_is_answered(server):
    "Also with a key that begins, or ends, as the right one does."
    wrong = ["x", KEY[:-1], KEY[:8] + "x" * 24, KEY + "0", "0" + KEY[1:], f"{KEY},{OTHER}", KEY.upper()]
    for path in ("/predict", "/batch"):
        assert server.ask(path, [pill_photo()], key=None)[0] == 401
        assert {server.ask(path, [pill_photo()], key=key)[0] for key in wrong} == {403}
    for path, method in (("/version", "GET"), ("/metrics", "GET"), ("/reload", "POST")):
        asked = [server.ask(path, key=key, method=method)[0] for key in (None, "", *wrong)]
        assert asked == [401, 401] + [403] * len(wrong), path
    assert [server.ask("/health", key=None)[0], server.ask("/predict", [pill_photo()], key=OTHER)[0]] == [200, 200]


def test_keys_are_compared_in_constant_time(monkeypatch):
    "Every key is compared, by hmac.compare_digest, whichever is right."
    import hmac

    from pillsnap.deployment.admission import KeyRing

    compared, real = [], hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    ring = KeyRing([KEY, OTHER, "c3" * 16])
    for key in (KEY, OTHER, "wrong"):
        compared.clear()
        ring.find(key)
        assert len(compared) == 3 and all(len(a) == len(b) == 32 for a, b in compared)


@pytest.mark.spec("SV1")
def test_what_is_no_photo_is_refused_with_its_status(server):
    "413 for too much, 415 for what is no photo or no form, 422 for a broken photo or form; one form of error."
    huge = pill_photo()
    bomb = huge[:16] + (30_000).to_bytes(4, "big") * 2 + huge[24:]
    asked = {
        (415, "not_a_photo"): [b"Dear pharmacist,", b"%PDF-1.7 ...", b"\0\0\0\x20ftypheic", os.urandom(999)],
        (413, "too_large"): [huge + bytes(20_000_001)],
        (413, "too_many_pixels"): [bomb],
        (422, "photo_unreadable"): [huge[: len(huge) // 2], b"", pill_photo(size=(20, 20))],
    }
    for (status, code), photos in asked.items():
        for photo in photos:
            got, told, headers = server.ask("/predict", [photo])
            assert (got, told["error"]["code"]) == (status, code), photo[:20]
            assert set(told["error"]) == {"code", "message", "fix", "request_id"} and told["error"]["message"]
            assert told["error"]["request_id"] == headers["x-request-id"]
    assert server.ask("/predict", [huge], name="picture")[0] == 422
    assert server.ask("/predict", [huge, huge])[0] == 422
    assert server.ask("/batch", [huge] * 17, name="photos")[0] == 422
    assert server.ask("/predict", method="POST")[1]["error"]["code"] == "not_multipart"
    assert [server.ask("/predict")[0], server.ask("/nothing")[0]] == [405, 404]
    status, told, _ = server.ask("/batch", [huge, b"a letter", huge[:99]], name="photos")
    assert [a.get("error", a).get("code", "ok") for a in told["answers"]] == ["ok", "not_a_photo", "photo_unreadable"]


@pytest.mark.spec("X69", "NM4")
def test_the_narrow_family_has_its_own_limit_of_a_photo(server, tmp_path):
    "10,240 kB of 1024 bytes and not one byte more for a narrow bundle; 20 MB elsewhere; each limit can be set."
    limit = 10_240 * 1024
    photo = pill_photo()
    full, above = (photo + bytes(n - len(photo)) for n in (limit, limit + 1))
    narrow = colour_bundle(tmp_path / "export", unified=UnifiedPreprocessor(64))
    with Server(tmp_path / "s", narrow, *FREE) as running:
        assert running.ask("/predict", [full])[0] == 200
        status, told, _ = running.ask("/predict", [above])
        assert (status, told["error"]["code"]) == (413, "too_large") and "10.4858 MB" in told["error"]["message"]
        assert running.ask("/batch", [above, photo], name="photos")[0] == 413
        assert running.ask("/version")[1]["limits"]["photo_mb"] == limit / 1e6
    with Server(tmp_path / "t", narrow, *FREE, "--limit", "narrow_photo_kb=1") as running:
        assert running.ask("/predict", [photo + bytes(1024)])[0] == 413
    assert server.ask("/predict", [above])[0] == 200 and server.ask("/version")[1]["limits"]["photo_mb"] == 20


@pytest.mark.spec("SV1")
def test_the_rate_of_a_key_holds_over_all_workers(tmp_path, bundle):
    "Of 90 requests on connections of their own, 60 are answered, whichever worker answers; another key has its own."
    patient = ("--workers", "3", "--limit", "wait_seconds=60")
    with Server(tmp_path, bundle, *patient) as server, ThreadPoolExecutor(12) as pool:
        asked = list(pool.map(lambda _: server.ask("/predict", [pill_photo()]), range(90)))
        statuses = [status for status, _, _ in asked]
        assert sorted(set(statuses)) == [200, 429] and statuses.count(200) == 60
        after = {int(headers["retry-after"]) for status, _, headers in asked if status == 429}
        assert after and min(after) >= 1 and max(after) <= 61
        assert server.ask("/batch", [pill_photo()] * 16, key=OTHER, name="photos")[0] == 200
        left = [server.ask("/predict", [pill_photo()], key=OTHER)[0] for _ in range(45)]
        assert left == [200] * 44 + [429]


def test_what_people_say_is_appended_by_all_writers(server):
    "Forty requests with two keys while another process writes too: every remark is there, whole, with its key's name."
    file = server.env_file.with_name("feedback.jsonl")
    said = dict(photo="a" * 64, size=9, mode="single", pill=1, answer="drug", kcode="K-000001", right=False)

    def say(number):
        body = json.dumps(said | dict(size=number + 1)).encode()
        headers = {"X-API-Key": (KEY, OTHER)[number % 2], "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/feedback", body, headers)
        return connection.getresponse().status

    code = "import sys; from pillsnap.dataset.feedback import Remark, add_remark\n"
    code += f"for n in range(40): add_remark(sys.argv[1], Remark(**{said | dict(pill=2)}), 'lab')"
    with subprocess.Popen([sys.executable, "-c", code, file], cwd=ROOT) as other, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(say, range(40))) == [200] * 40
        assert other.wait(60) == 0
    remarks = read_remarks(file)
    assert sorted(r.size for r in remarks if r.who != "lab") == list(range(1, 41))
    assert {r.who for r in remarks} == {KeyRing.name(KEY), KeyRing.name(OTHER), "lab"}
    assert sum(r.who == "lab" for r in remarks) == 40 and not server.figure("held_bytes")
    wrong = [{**said, "right": 1}, {**said, "note": "x"}, {**said, "photo": "../../etc"}, [], {**said, "who": "me"}]
    for body in wrong:
        headers = {"X-API-Key": KEY, "Content-Type": "application/json"}
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        connection.request("POST", "/feedback", json.dumps(body), headers)
        assert connection.getresponse().status == 422
    assert len(read_remarks(file)) == 80


@pytest.mark.spec("SV2")
def test_only_listed_origins_may_call(server):
    def preflight(origin):
        connection = socket.create_connection(("127.0.0.1", server.port))
        connection.sendall(
            f"OPTIONS /predict HTTP/1.1\r\nHost: a\r\nOrigin: {origin}\r\nAccess-Control-Request-Method: POST\r\n"
            "Access-Control-Request-Headers: x-api-key\r\nConnection: close\r\n\r\n".encode()
        )
        with connection, connection.makefile("rb") as answer:
            return answer.read().decode().lower()

    for origin in ("http://localhost:3000", "https://pillsnap.co.kr", "https://api.pillsnap.co.kr"):
        assert f"access-control-allow-origin: {origin}" in preflight(origin)
    for origin in ("https://evil.kr", "http://pillsnap.co.kr", "https://pillsnap.co.kr.evil.kr", "null"):
        assert "access-control-allow-origin" not in preflight(origin)


def test_a_full_queue_refuses_at_once_and_loses_nothing(server):
    "With workers that stand still, 18 photos find a place (2 workers, 16 waiting); the others are refused in a moment."
    with ThreadPoolExecutor(40) as pool:
        with server.stopped_workers():
            accepted = [pool.submit(server.ask, "/predict", [pill_photo()]) for _ in range(18)]
            assert until(lambda: server.figure("queue_photos") == 16)
            began = time.monotonic()
            refused = list(pool.map(lambda _: server.ask("/predict", [pill_photo()]), range(20)))
            assert time.monotonic() - began < 5
        assert {(status, told["error"]["code"]) for status, told, _ in refused} == {(503, "busy")}
        assert all(int(headers["retry-after"]) >= 1 for _, _, headers in refused)
        assert [done.result()[0] for done in accepted] == [200] * 18
    assert server.figure("queue_photos") == 0 and server.figure("held_bytes") == 0


@pytest.mark.spec("RS8")
def test_a_killed_worker_loses_no_request(server):
    "kill -9 of both workers, each with a photo that it has not answered: others answer for them."
    lost = server.figure("workers_lost")
    with ThreadPoolExecutor(2) as pool, server.stopped_workers() as held:
        asked = [pool.submit(server.ask, "/predict", [pill_photo("K-000001")]) for _ in range(2)]
        assert until(lambda: server.figure("open_requests") >= 3)
        time.sleep(0.2)
        for worker in held:
            worker.send_signal(signal.SIGKILL)
        assert [(s, told["items"][0]["kcode"]) for s, told, _ in (a.result() for a in asked)] == [(200, "K-000001")] * 2
    assert server.ask("/health")[1]["workers"] == 2 and server.figure("workers_lost") == lost + 2


@pytest.mark.spec("RS8")
def test_a_worker_that_hangs_is_replaced(tmp_path, bundle):
    with Server(tmp_path, bundle, "--workers", "1", "--limit", "answer_seconds=4") as server, server.stopped_workers():
        began = time.monotonic()
        assert server.ask("/predict", [pill_photo()])[0] == 200
        assert 3.9 < time.monotonic() - began < 60 and server.figure("workers_lost") == 1


def bad_bundles(root: Path) -> tuple[Path, Path]:
    "A bundle whose network gives numbers that are not finite, and one with a file that was changed."
    broken, spoiled = colour_bundle(root / "broken", broken=True), colour_bundle(root / "spoiled")
    (spoiled / "classifier.onnx").write_bytes((spoiled / "classifier.onnx").read_bytes()[:-1] + b"\0")
    return broken, spoiled


def reload_to(server, place: Path, folder: Path | None):
    "Let the server's MODEL_PATH lead to another bundle (None: nowhere), and ask it to reload."
    place.unlink(missing_ok=True)
    if folder:
        place.symlink_to(folder)
    return server.ask("/reload", method="POST")


@pytest.mark.spec("RS8")
def test_a_reload_switches_to_a_bundle_that_works_and_to_no_other(tmp_path, bundle):
    "Under load: a broken bundle, a changed one and a missing one are refused, a good one is taken; all are answered."
    place, new = tmp_path / "model", colour_bundle(tmp_path / "new", data="other:toy")
    broken, spoiled = bad_bundles(tmp_path)
    place.symlink_to(bundle)
    env = f"API_KEY={KEY}\nMODEL_PATH={place}\n"
    seen, stop = [], threading.Event()

    def keep_asking(server):
        while not stop.is_set():
            seen.append(server.ask("/predict", [pill_photo()]))

    with Server(tmp_path / "server", place, *FREE, env=env) as server, ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(keep_asking, server) for _ in range(3)]
        try:
            first = server.ask("/version")[1]["bundle"]["digest"]
            told = []
            for folder in (broken, spoiled, None):
                status, answer, _ = reload_to(server, place, folder)
                told.append((status, answer["error"]["code"], answer["error"]["message"]))
                if folder is broken:
                    server.workers()[0].send_signal(signal.SIGKILL)  # the next one loads what the others have
                assert server.ask("/version")[1]["bundle"]["digest"] == first
            status, answer, _ = reload_to(server, place, new)
        finally:
            stop.set()
        assert [t[:2] for t in told] == [(409, "reload_refused")] * 3
        assert "not finite" in told[0][2] and "sha256 differs" in told[1][2] and "no exported model" in told[2][2], told
        assert (status, answer["before"]["digest"], answer["after"]["data"]) == (200, first, "other:toy")
        assert all(a.result() is None for a in asking)
        assert [t["error"] for s, t, _ in seen if s != 200] == [] and len(seen) >= 3  # each of the three clients
        assert {t["hashes"]["bundle"] for _, t, _ in seen} <= {first, answer["after"]["digest"]}
        assert server.ask("/predict", [pill_photo()])[1]["hashes"]["bundle"] == answer["after"]["digest"]
        assert until(lambda: len(server.workers()) == 2)  # those of the earlier bundle have ended


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    "A private and a public key."
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    made = ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private]
    for args in (made, ["ec", "-in", private, "-pubout", "-out", public]):
        subprocess.run(["openssl", *args], check=True, capture_output=True)
    return private, public


def packed(export: Path, file: Path, key: Path | None = None) -> Path:
    "An export as one file, signed where there is a key."
    parts = {p.name: p for p in sorted(export.iterdir())}
    write_packed(file, parts, key and (lambda digests: sign_files(digests, key)))
    return file


def with_a_flipped_byte(file: Path) -> bytes:
    "The content of a file, with another classifier."
    content, member = bytearray(file.read_bytes()), PackedFiles(file).members["classifier.onnx"]
    content[(member.begin + member.end) // 2] ^= 1
    return bytes(content)


@pytest.mark.spec("BX6", "RS6", "RS8")
def test_a_file_is_verified_before_it_answers(tmp_path, bundle):
    "With a key: a flipped byte, no signature and another's signature are refused; the present file answers on."
    (private, public), (stranger, _) = key_pair(tmp_path, "maker"), key_pair(tmp_path, "stranger")
    place = packed(bundle, tmp_path / "pills.pillsnap", private)
    new = colour_bundle(tmp_path / "new", data="other:toy")
    flipped = with_a_flipped_byte(packed(new, tmp_path / "new.pillsnap", private))
    offered = {
        "the sha256 of classifier.onnx differs": flipped,
        "this bundle has none": packed(new, tmp_path / "plain.pillsnap").read_bytes(),
        "made with another key": packed(new, tmp_path / "other.pillsnap", stranger).read_bytes(),
    }

    def replace_by(content: bytes) -> None:
        (tmp_path / "copy").write_bytes(content)
        os.replace(tmp_path / "copy", place)

    with Server(tmp_path / "server", place, *FREE, "--key", str(public)) as server:
        first = server.ask("/version")[1]["bundle"]["digest"]
        for reason, content in offered.items():
            replace_by(content)
            status, told, _ = server.ask("/reload", method="POST")
            assert (status, told["error"]["code"]) == (409, "reload_refused") and reason in told["error"]["message"]
            status, told, _ = server.ask("/predict", [pill_photo()])
            assert (status, told["hashes"]["bundle"]) == (200, first)
        replace_by((tmp_path / "new.pillsnap").read_bytes())
        status, told, _ = server.ask("/reload", method="POST")
        assert (status, told["before"]["digest"], told["after"]["data"]) == (200, first, "other:toy")
        answer = server.ask("/predict", [pill_photo()])[1]
    assert same(answer, load_bundle(new).predict(pill_photo()))


@pytest.mark.spec("RS6")
@pytest.mark.parametrize("harm", ["a flipped byte", "no signature", "a folder"])
def test_a_server_does_not_start_from_what_is_not_verified(tmp_path, bundle, harm):
    private, public = key_pair(tmp_path, "maker")
    file = packed(bundle, tmp_path / "pills.pillsnap", None if harm == "no signature" else private)
    if harm == "a flipped byte":
        file.write_bytes(with_a_flipped_byte(file))
    with pytest.raises(AssertionError, match=r"the server did not start[^$]*(sha256|signature is required)"):
        Server(tmp_path / "server", bundle if harm == "a folder" else file, *FREE, "--key", str(public))


@pytest.mark.spec("SV3")
def test_keys_are_rotated_without_a_restart(tmp_path, bundle):
    fresh = "c3" * 16
    with Server(tmp_path, bundle) as server:
        server.env_file.write_text(f"API_KEY={OTHER},{fresh}\n")
        assert until(lambda: server.ask("/version", key=fresh)[0] == 200)
        assert [server.ask("/version", key=k)[0] for k in (KEY, OTHER)] == [403, 200]
        server.env_file.write_text("API_KEY=short\n")
        time.sleep(1.1)
        assert server.ask("/version", key=fresh)[0] == 200 and "the earlier settings stay" in server.log()


@pytest.mark.spec("RS8", "SV3")
def test_no_key_and_no_photo_is_kept_or_logged(tmp_path, bundle):
    "Keys in every place that a client can choose; nothing is written below the folder, nor in the temporary folder."
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    before = dict(os.environ)
    os.environ.update(env)
    try:
        with Server(tmp_path / "server", bundle) as server:
            photo = pill_photo(size=(1500, 1500), kind="BMP")  # 6.7 MB, more than form parsers keep in memory
            assert server.ask("/predict", [photo])[0] == 200
            wrong = "f00d" * 9
            server.ask(f"/{KEY}?key={KEY}", key=wrong)
            server.ask(f"/predict?{KEY}={KEY}", [photo])
            server.ask("/predict", [KEY.encode()], name=KEY)
            server.ask("/predict", [photo], key=wrong, method="POST")
            assert server.ask("/predict", method=KEY)[0] == 400  # by the HTTP parser
            server.stop()
            log = server.log()
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert not any(secret in log for secret in (KEY, OTHER, wrong)) and "Traceback" not in log
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [".env", "log.jsonl"]
    lines = [json.loads(line) for line in log.splitlines()]
    asked = [line for line in lines if line["message"] == "request"]
    assert len(asked) == 5 and all(line["id"] and line["status"] and line["ms"] >= 0 for line in asked)


def test_photos_are_kept_only_where_keep_says(tmp_path, bundle):
    "A folder that cannot be written costs no answer, and is counted."
    photo = pill_photo()
    with Server(tmp_path / "a", bundle, "--keep", str(tmp_path / "kept")) as server:
        answer = server.ask("/predict", [photo])[1]
    files = {p.suffix: p for p in (tmp_path / "kept").rglob("*.*")}
    assert files[".png"].read_bytes() == photo and json.loads(files[".json"].read_text()) == answer
    (tmp_path / "file").touch()
    with Server(tmp_path / "b", bundle, "--keep", str(tmp_path / "file" / "below")) as server:
        assert server.ask("/predict", [photo])[0] == 200 and server.figure("not_kept_total") == 1


@pytest.mark.spec("RS8")
def test_slow_and_cut_bodies_end_in_time_and_hold_nothing(tmp_path, bundle):
    with Server(tmp_path, bundle, "--limit", "body_seconds=1", "--limit", "header_seconds=1") as server:
        head = (
            f"POST /predict HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nContent-Length: 9000\r\n"
            "Content-Type: multipart/form-data; boundary=B\r\n\r\n"
        ).encode()

        def status_of(data):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(data)
                return connection.recv(100).split(b" ")[1]

        assert [status_of(head + b"--B\r\n"), status_of(head[:40])] == [b"408", b"408"]
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + b"--B\r\n")  # and gone
        assert until(lambda: any(line.get("code") == "client_gone" for line in server.lines()))
        assert server.figure("held_bytes") == 0 and server.ask("/predict", [pill_photo()])[0] == 200


@pytest.mark.spec("RS8")
def test_a_thousand_requests_at_once(tmp_path, bundle):
    "Each is answered: 200 for those that found a place, 503 with Retry-After for all others; then it goes on."
    import asyncio

    from pillsnap.client import photo_form

    file_limit(4096)
    body, kind = photo_form("photo", [pill_photo()])
    head = f"POST /predict HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nContent-Type: {kind}\r\nConnection: close\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def one(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        got = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        return got.split(b"\r\n\r\n")[0].lower()

    async def thousand(port):
        return await asyncio.gather(*(one(port) for _ in range(1000)))

    with Server(tmp_path, bundle, *FREE) as server:
        heads = asyncio.run(thousand(server.port))
        statuses = [head.split(b" ")[1] for head in heads]
        assert set(statuses) <= {b"200", b"503"} and statuses.count(b"200") >= 18
        assert all(b"retry-after: " in head for head, s in zip(heads, statuses) if s == b"503")
        assert server.ask("/predict", [pill_photo()])[0] == 200 and server.figure("held_bytes") == 0
        assert server.memory() < 1.5e9


@pytest.mark.spec("SV3")
@pytest.mark.parametrize(
    "options, env, reason",
    [
        ((), "", "API_KEY is missing"),
        ((), "API_KEY=short\n", "has 5 characters"),
        (("--no-auth", "--host", "0.0.0.0"), "", "would answer everybody"),
        ((), f"API_KEY={KEY}\nCORS_ALLOW_ORIGINS=*\n", "every page on the web"),
        (("--limit", "queue=-1"), f"API_KEY={KEY}\n", "queue"),
    ],
    ids=["no key", "short key", "open to all", "CORS *", "limit"],
)
def test_an_unsafe_start_is_refused(tmp_path, bundle, options, env, reason):
    (tmp_path / ".env").write_text(env)
    argv = [sys.executable, "-m", "pillsnap", "serve", "--bundle", str(bundle), "--port", "0", *options]
    done = subprocess.run(
        argv,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": search_path(ROOT)},
    )
    assert done.returncode == 2 and reason in done.stderr and "Traceback" not in done.stderr
    assert KEY not in done.stderr


def test_a_bundle_that_cannot_be_used_stops_the_start(tmp_path):
    broken = colour_bundle(tmp_path / "broken", broken=True)
    (tmp_path / ".env").write_text(f"API_KEY={KEY}\n")
    argv = [sys.executable, "-m", "pillsnap", "serve", "--bundle", str(broken), "--port", "0"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "not finite" in done.stderr and str(broken) in done.stderr


def test_without_keys_other_sites_cannot_reach_it(tmp_path, bundle):
    "A page whose name was bound to 127.0.0.1 sends its own name as Host."
    with Server(tmp_path, bundle, "--no-auth", env="") as server:
        assert server.ask("/predict", [pill_photo()], key=None)[0] == 200
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"GET /version HTTP/1.1\r\nHost: evil.kr\r\nConnection: close\r\n\r\n")
            assert connection.recv(100).split(b" ")[1] == b"403"


def test_without_keys_pages_of_other_sites_change_nothing_and_reload_reads_model_path(tmp_path, bundle):
    "A form of another site needs no preflight; a reload a moment after the file was written loads what it names now."
    other = colour_bundle(tmp_path / "other")

    def post(port, path, origin):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        headers = {"Content-Type": "text/plain"} | ({"Origin": origin} if origin else {})
        connection.request("POST", path, b"", headers)
        response = connection.getresponse()
        told = json.loads(response.read())
        return told["error"]["code"] if "error" in told else told

    with Server(tmp_path, bundle, "--no-auth", "--workers", "1", env="") as server:
        for origin in (
            "https://evil.kr",
            f"http://127.0.0.1:{server.port + 1}",
            f"http://evil.kr:{server.port}",
            "null",
        ):
            for path in ("/reload", "/predict", "/batch"):
                assert post(server.port, path, origin) == "origin_wrong"
        assert server.ask("/health", key=None)[0] == 200
    env = tmp_path / "named"
    env.mkdir()
    argv = ["--no-auth", "--workers", "1"]
    with Server(env, "", *argv, env=f"MODEL_PATH={bundle}\n") as server:
        digest = server.ask("/version", key=None)[1]["bundle"]["digest"]
        for named in (other, bundle, other):
            server.env_file.write_text(f"MODEL_PATH={named}\n\n" if named == other else f"MODEL_PATH={named}\n")
            told = post(server.port, "/reload", f"http://127.0.0.1:{server.port}")
            assert (told["after"]["digest"] == digest) == (named == bundle)
        assert "digest" in post(server.port, "/reload", "https://pillsnap.co.kr")["after"]


def test_the_client_says_what_the_server_says(server):
    client = Client(f"http://127.0.0.1:{server.port}", KEY)
    assert client.predict(pill_photo("K-000003"), "single", 1)["items"][0]["kcode"] == "K-000003"
    assert [a["answer"] for a in client.batch([pill_photo()] * 2)] == ["drug"] * 2
    assert client.health()["status"] == "ok" and client.version()["bundle"]["drugs"] == 3
    with pytest.raises(PillsnapError, match="text file") as e:
        client.predict(b"a letter")
    assert e.value.code == "not_a_photo" and e.value.fix == "give the photo itself"
    with pytest.raises(PillsnapError, match="not known"):
        Client(f"http://127.0.0.1:{server.port}", "wrong" * 9).version()


@pytest.mark.spec("RS8")
def test_stopping_answers_what_was_accepted(tmp_path, bundle):
    with Server(tmp_path, bundle) as server, ThreadPoolExecutor(4) as pool:
        with server.stopped_workers():
            asked = [pool.submit(server.ask, "/predict", [pill_photo()]) for _ in range(4)]
            assert until(lambda: server.figure("open_requests") >= 5)
            time.sleep(0.3)
            server.process.terminate()
            time.sleep(0.3)
        assert [a.result()[0] for a in asked] == [200] * 4
        workers = server.workers()
        server.stop()
        assert not any(w.is_running() for w in workers)


def test_the_api_is_the_one_that_was_published():
    "The OpenAPI document, with its examples; a change is written with scripts/assets/openapi.py and read in the diff."
    sys.path.insert(0, str(ROOT / "scripts" / "assets"))
    import openapi

    document = openapi.document()
    published = json.loads((ROOT / "tests" / "golden" / "openapi.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(document)) == published
    assert document["components"]["schemas"]["Answer"] == {k: v for k, v in answer_schema().items() if k != "$schema"}
    shown = document["paths"]["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["examples"]
    assert [example["value"].get("two_side") for example in shown.values()] == [None, True]
    for example in shown.values():
        validate(example["value"], answer_schema())


def test_the_lines_of_the_documentation_work(server, tmp_path):
    "Each curl line of the chapter, with the port of this server."
    import nbformat

    chapter = nbformat.read(ROOT / "nbs" / "deployment" / "866_serving.ipynb", 4)
    text = "\n".join(c.source for c in chapter.cells if c.cell_type == "markdown")
    lines = [line for line in text.splitlines() if line.startswith(("KEY=", "curl "))]
    assert len(lines) == 9
    for name, size in (("pill", (240, 320)), ("front", (240, 320)), ("back", (260, 300))):
        (tmp_path / f"{name}.jpg").write_bytes(pill_photo(size=size, kind="JPEG"))
    (tmp_path / ".env").write_text(f"API_KEY={KEY}\n")
    script = "\n".join(["set -e", lines[0], *(f"{line} --fail-with-body; echo" for line in lines[1:])])
    script = script.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [a["mode_used"] for a in said if "mode_used" in a] == ["single", "combo", "single"] and len(said) == 7
    assert [a.get("two_side") for a in said if "mode_used" in a] == [None, None, True]


@pytest.mark.spec("RS8")
def test_the_api_keeps_its_word(server, tmp_path):
    "A short run of schemathesis with all its checks; the campaign does 20,000 cases."
    import rs8_server

    before = len(server.lines())  # an earlier test fills the queue on purpose
    found = rs8_server.fuzz(server, tmp_path, examples=25, seed=1)
    assert found["failures"] == [] and found["cases"] > 150, found
    assert not [line for line in server.lines()[before:] if line.get("status", 0) >= 500]
