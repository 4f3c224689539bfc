"Operations as a person types them: release, roll back under a running server, back up and restore, rotate, units."

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
import yaml

from pillsnap import cli
from pillsnap.core.container import write_packed
from pillsnap.core.files import sha256_file
from pillsnap.deployment.bundling import verify_file
from pillsnap.deployment.operations import INSIDE_ONLY, systemd_units, tunnel_config
from pillsnap.deployment.releases import ReleaseHome
from pillsnap.deployment.runtime import load_bundle
from pillsnap.deployment.serversettings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
from server_parts import Server, colour_bundle, pill_photo


def typed(*args: object) -> subprocess.CompletedProcess:
    "A command of the program, in this process; its exit status and what it printed."
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(a) for a in args])
        except SystemExit as e:
            status = e.code or 0
    return subprocess.CompletedProcess(args, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    "Seven bundles, each of other content."
    folder, made = tmp_path_factory.mktemp("bundles"), []
    for number in range(7):
        export = colour_bundle(folder / f"export{number}", data=f"other:toy{number}")
        parts = {p.name: p for p in sorted(export.iterdir())}
        made.append(write_packed(folder / f"pills{number}.pillsnap", parts).where)
    return made


@pytest.mark.spec("OP2")
def test_from_a_release_to_a_rollback_under_a_running_server(tmp_path, files):
    "The server answers from the second release, and after the rollback byte for byte as before it."
    home = tmp_path / "home"
    assert typed("ops", "release", files[0], "--home", home).returncode == 0
    first = load_bundle(files[0]).meta["digest"]
    with Server(tmp_path / "server", home / "current.pillsnap", "--limit", "wait_seconds=60") as server:
        before = server.ask("/predict", [pill_photo()])[1]
        assert before["hashes"]["bundle"] == first
        done = typed("ops", "release", files[1], "--home", home)
        assert done.returncode == 0 and "-> 0002-" in done.stdout, done.stderr
        assert server.ask("/version")[1]["bundle"]["digest"] == first, "nothing changes before the reload"
        assert server.ask("/reload", method="POST")[0] == 200
        assert server.ask("/version")[1]["bundle"]["data"] == "other:toy1"
        shown = typed("ops", "rollback", "--home", home, "--dry-run")
        assert shown.returncode == 0 and "would go back to 0001-" in shown.stdout
        assert server.ask("/reload", method="POST")[1]["after"]["data"] == "other:toy1", "--dry-run changes nothing"
        done = typed("ops", "rollback", "--home", home)
        assert done.returncode == 0 and "-> 0001-" in done.stdout, done.stderr
        assert server.ask("/reload", method="POST")[1]["after"]["digest"] == first
        after = server.ask("/predict", [pill_photo()])[1]
    assert before | {"timings": 0} == after | {"timings": 0}


@pytest.mark.spec("OP2")
def test_five_releases_are_kept_with_their_checksums(tmp_path, files):
    home = ReleaseHome(tmp_path / "home")
    for file in files:
        home.release(file)
    assert [r.number for r in home.releases()] == [7, 6, 5, 4, 3]
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=home.store, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 5
    assert len(list(home.store.glob("*.pillsnap"))) == len(list(home.store.glob("*.json"))) == 5
    for number in (6, 5, 4, 3):
        assert home.roll_back()[1].number == number
    done = typed("ops", "rollback", "--home", home.folder)
    assert done.returncode == 2 and "not kept any more" in done.stderr and home.current().number == 3
    done = typed("ops", "rollback", "--home", tmp_path / "mistyped")
    assert done.returncode == 2 and "no release before" in done.stderr and not (tmp_path / "mistyped").exists()


KILLED = """import os, shutil, signal, sys
from pillsnap.deployment.releases import ReleaseHome
step, home, file = sys.argv[1:]
def half(source, target):
    open(target, "wb").write(open(source, "rb").read()[:5000])
    os.kill(os.getpid(), signal.SIGKILL)
def gone(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if step == "while it is copied":
    shutil.copyfile = half
if step == "before the link is turned":
    ReleaseHome._turn = gone
if step == "before old ones are deleted":
    ReleaseHome._prune = gone
ReleaseHome(home).release(file)
"""


@pytest.mark.spec("OP2")
@pytest.mark.parametrize(
    "step, number",
    [("while it is copied", 5), ("before the link is turned", 5), ("before old ones are deleted", 6)],
)
def test_a_release_that_is_killed_leaves_one_that_answers(tmp_path, files, step, number):
    "And the next one goes on: nothing is left over, nothing is lost."
    home = ReleaseHome(tmp_path / "home")
    for file in files[:5]:
        home.release(file)
    done = subprocess.run([sys.executable, "-c", KILLED, step, home.folder, files[5]], check=False)
    assert done.returncode == -signal.SIGKILL
    current = home.current()
    assert current.number == number and verify_file(home.link).meta["digest"] == current.digest
    last = home.release(files[6])
    assert home.current() == last and last.before == current.name and len(home.releases()) == 5
    assert not list(home.folder.rglob("*.partial"))
    assert home.roll_back()[1] == current


@pytest.mark.spec("OP2", "RS6")
def test_what_does_not_verify_is_not_released(tmp_path, files):
    home = tmp_path / "home"
    assert typed("ops", "release", files[0], "--home", home).returncode == 0
    seen = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.pillsnap").write_bytes(content)
    for wrong in (tmp_path / "flipped.pillsnap", tmp_path / "none.pillsnap", tmp_path):
        done = typed("ops", "release", wrong, "--home", home)
        assert done.returncode == 2 and done.stderr.startswith("pillsnap: ") and "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in home.rglob("*") if p.is_file() and p.name != ".lock"} == {
        p: c for p, c in seen.items() if p.name != ".lock"
    }


@pytest.mark.spec("OP2")
def test_a_backup_of_a_run_is_restored_and_answers(smoke_run, tmp_path):
    shutil.copytree(smoke_run, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("delivery", "yolo_data"))
    done = typed("ops", "backup", tmp_path / "run", "--out", tmp_path / "run.tar.gz")
    assert done.returncode == 0 and "read back" in done.stdout, done.stderr
    (tmp_path / "there").mkdir()
    subprocess.run(["tar", "-xzf", tmp_path / "run.tar.gz", "-C", tmp_path / "there"], check=True)
    restored = tmp_path / "there" / "run"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=restored, capture_output=True, text=True)
    assert checked.returncode == 0 and checked.stdout.count(": OK") > 30
    for folder in ("checkpoints", "export", "reports"):
        names = {p.relative_to(smoke_run) for p in (smoke_run / folder).rglob("*") if p.is_file()}
        assert names and all(sha256_file(restored / n) == sha256_file(smoke_run / n) for n in names)
    photo = sorted((smoke_run / "delivery").rglob("*_75_*.png"))[0]
    answers = [load_bundle(root).predict(photo, "single") | {"timings": 0} for root in (smoke_run, restored)]
    assert answers[0] == answers[1]


@pytest.mark.spec("OP2")
def test_the_servers_log_is_rotated(tmp_path, files):
    "What the server wrote is compressed after a week and deleted after a month; other files stay, whatever their age."
    logs = tmp_path / "logs"
    with Server(tmp_path / "server", files[0], log_dir=logs) as server:
        assert server.ask("/health")[0] == 200
    (log,) = logs.glob("server-*.jsonl")
    content = log.read_bytes()
    assert b'"path": "/health"' in content
    others = {"server-2020-01-01.jsonl": b"not JSON\n", "access.log": content, "server.jsonl": content}
    for name, text in others.items():
        (logs / name).write_bytes(text)
        os.utime(logs / name, (0, 0))
    assert "0 log files" in typed("ops", "rotate", logs).stdout, "it is of today"
    os.utime(log, (time.time() - 8 * 86_400,) * 2)
    assert typed("ops", "rotate", logs, "--dry-run").stdout.startswith("would compress") and log.exists()
    assert typed("ops", "rotate", logs).returncode == 0
    packed = log.with_name(f"{log.name}.gz")
    assert gzip.decompress(packed.read_bytes()) == content and not log.exists()
    assert time.time() - packed.stat().st_mtime > 7 * 86_400
    os.utime(packed, (time.time() - 31 * 86_400,) * 2)
    assert typed("ops", "rotate", logs).returncode == 0 and not packed.exists()
    assert {p.name: p.read_bytes() for p in logs.iterdir()} == others


def options_of(line: str) -> dict:
    "What a command line of pillsnap is read as, by its own parser."
    words = shlex.split(line)
    command = typer.main.get_command(cli.app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command.make_context("pillsnap", words).params


@pytest.mark.spec("OP2")
def test_the_units_start_the_server_that_there_is(tmp_path):
    units = systemd_units("/srv/pillsnap", port=8001)
    started = re.search(r"^ExecStart=(.*)$", units["pillsnap.service"], re.M)[1]
    program, _, rest = started.partition(" serve ")
    assert Path(program.split()[0]).is_file()
    asked = options_of(f"serve {rest}")
    assert (asked["port"], asked["host"], asked["auth"]) == (8001, "127.0.0.1", True)
    assert asked["bundle"] == ReleaseHome("/srv/pillsnap").link and asked["env_file"] == Path("/srv/pillsnap/.env")
    rotated = re.search(r"^ExecStart=.* (ops rotate .*)$", units["pillsnap-rotate.service"], re.M)[1]
    assert options_of(rotated)["folder"] == asked["log_dir"] == Path("/srv/pillsnap/logs")
    stop = int(re.search(r"TimeoutStopSec=(\d+)", units["pillsnap.service"])[1])
    assert stop > ServerSettings().limits.answer_seconds + 5, "accepted photos are answered before systemd kills"
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for name, text in units.items():
        (tmp_path / name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / n for n in units)], capture_output=True, text=True
    )
    said = [line for line in checked.stderr.splitlines() if "pillsnap" in line]
    assert said == [], said


@pytest.mark.spec("OP1")
def test_the_tunnel_leads_to_the_server_and_hides_what_is_for_the_machine():
    from pillsnap.deployment.server import router

    config = yaml.safe_load(tunnel_config())
    paths = {route.path for route in router.routes}
    assert {f"/{name}" for name in INSIDE_ONLY} < paths
    first, second, last = config["ingress"]
    hidden = {p for p in paths if re.search(first["path"], p)}
    assert hidden == {"/reload", "/metrics"} and first["service"] == last["service"] == "http_status:404"
    settings = ServerSettings()
    assert second["service"] == f"http://{settings.host}:{settings.port}" == "http://127.0.0.1:8000"
    assert first["hostname"] == second["hostname"] == "api.pillsnap.co.kr" and "hostname" not in last
    assert config["tunnel"] == "pillsnap-tunnel"


@pytest.mark.spec("OP1", "OP2")
def test_files_written_by_hand_stay_and_nothing_is_started(tmp_path):
    "Both generators, twice; then with a file that was changed by hand."
    program = tmp_path / "cloudflared"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    asked = {
        "units/pillsnap.service": ("systemd", "--home", "/srv/pillsnap", "--out", tmp_path / "units"),
        "tunnel/config.yml": ("tunnel", "--out", tmp_path / "tunnel", "--cloudflared", program),
    }
    for name, args in asked.items():
        for _ in range(2):
            assert typed("ops", *args).returncode == 0
        (tmp_path / name).write_text("mine\n")
        done = typed("ops", *args)
        assert done.returncode == 2 and "left as it is" in done.stderr and (tmp_path / name).read_text() == "mine\n"
    assert not (tmp_path / "started").exists()


@pytest.mark.spec("OP2")
def test_the_exported_models_are_timed(tmp_path, files):
    done = typed("ops", "bench", "--bundle", files[0], "--runs", "5", "--out", tmp_path / "bench.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())
    scopes = {row["scope"] for row in rows}
    assert scopes == {"onnx_single", "onnx_combo", "onnx_classifier", "onnx_detector"}
    for row in rows:
        value = row["metric"]["value"]
        assert row["metric"]["n"] == 5 and value > 0 and f"{value:.2f}" in done.stdout
    by = {(row["scope"], row["percentile"]): row["metric"]["value"] for row in rows}
    assert all(by[scope, 50] <= by[scope, 95] for scope in scopes)
    assert by["onnx_classifier", 50] < by["onnx_single", 50], "an answer is more than its model"
