"""The GPU campaign, as far as a machine without a GPU can try it.

What it says without one, how it compares, what it does with checks that fail or hang, and that its checks run.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "campaigns"
sys.path[:0] = [str(SCRIPTS), str(ROOT / "benchmarks")]

import gpu as campaign_script
from gpu import (
    CHECKS,
    STOPS,
    Check,
    arguments,
    campaign,
    missing,
    selection,
    verdict_of,
)

SCHEMA = {
    "type": "object",
    "required": ["id", "what", "rehearsal", "when", "machine", "seconds", "checks"],
    "properties": {
        "id": {"const": "GPU"},
        "rehearsal": {"type": "boolean"},
        "seconds": {"type": "number"},
        "machine": {
            "type": "object",
            "required": ["device", "driver", "memory_gb", "cores", "ram_gb", "system", "versions"],
            "properties": {"versions": {"type": "object", "required": ["python"]}},
        },
        "checks": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "title", "limit", "verdict", "seconds", "parts", "when", "error", "output", "facts"],
                "additionalProperties": False,
                "properties": {
                    "id": {"pattern": r"^GP\d+$"},
                    "verdict": {"enum": ["PASSED", "MISSED", "FAILED", "NOT_MEASURED", "REHEARSED"]},
                    "title": {"type": "string", "minLength": 1},
                    "limit": {"type": "string", "minLength": 1},
                    "seconds": {"type": "number", "minimum": 0},
                    "error": {"type": "string"},
                    "when": {"pattern": r"^20\d\d-"},
                    "output": {"type": "string"},
                    "facts": {"type": "object"},
                    "parts": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["name", "value", "limit", "passed", "required", "unit", "note"],
                            "properties": {"passed": {"type": ["boolean", "null"]}},
                        },
                    },
                },
            },
        },
    },
}


def read(path: Path) -> dict:
    "A campaign's JSON, checked against its schema."
    import jsonschema

    doc = json.loads(path.read_text(encoding="utf-8"))
    jsonschema.validate(doc, SCHEMA)
    return doc


# ---- without a GPU


def test_without_a_gpu_it_says_so_and_ends_well(tmp_path):
    "Status 0, plain words, fifteen rows that say NOT_MEASURED and why."
    out = tmp_path / "GPU.json"
    r = subprocess.run(
        [sys.executable, str(SCRIPTS / "gpu.py"), "--out", str(out)],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert r.returncode == 0, r.stderr
    assert (
        "There is no GPU to measure on: torch" in r.stdout
        and "Nothing was measured" in r.stdout
        and "15 NOT_MEASURED" in r.stdout
    )
    doc = read(out)
    assert sorted(c["id"] for c in doc["checks"]) == sorted(f"GP{k}" for k in range(1, 16)) and not doc["rehearsal"]
    assert {c["verdict"] for c in doc["checks"]} == {"NOT_MEASURED"} and all(
        "no CUDA device" in c["error"] or "without CUDA" in c["error"] for c in doc["checks"]
    )


def test_a_persons_own_campaign_does_not_overwrite_the_published_one():
    assert Path("_runs/bench/GPU.json") == campaign_script.DEFAULT_OUT


def test_the_order_is_cheap_first_and_compilation_last():
    ids = [c.id for c in CHECKS]
    assert ids[0] == STOPS == "GP1" and ids[-2:] == ["GP9", "GP7"] and len(set(ids)) == 15
    assert ids.index("GP2") < ids.index("GP3") < ids.index("GP13")


def test_arguments_are_checked(capsys):
    for given, said in (
        (["--only", "GP21"], "there is no check 'GP21'; did you mean GP2?"),
        (["--only", "latency"], "there is no check 'latency'"),
        (["--device", "cpu"], "add --rehearse"),
    ):
        with pytest.raises(SystemExit) as stop:
            arguments(given)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    assert [c.id for c in arguments(["--only", "gp3", "GP1"]).checks] == ["GP1", "GP3"], "in the campaign's order"
    assert selection([], CHECKS) == list(CHECKS)


# ---- how it compares


def part(passed, required=True, **more):
    return dict(
        name="figure", value=1.0, limit="≤ 1", passed=passed, required=required, unit="", note="why not", **more
    )


@pytest.mark.parametrize(
    "parts, verdict",
    [
        ([part(True)], "PASSED"),
        ([part(True), part(False)], "MISSED"),
        ([part(None), part(False)], "MISSED"),
        ([part(True), part(None)], "NOT_MEASURED"),
        ([part(True), part(None, False)], "PASSED"),
        ([part(None, False)], "NOT_MEASURED"),
        ([], "NOT_MEASURED"),
    ],
)
def test_verdict_of_parts(parts, verdict):
    "One miss is a miss; what was asked for and not measured is not passed."
    assert verdict_of(parts)[0] == verdict
    assert verdict != "NOT_MEASURED" or verdict_of(parts)[1]


FAKES = """
import os, subprocess, sys, time
from pathlib import Path
def P(value, passed):
    return dict(name="figure", value=value, limit="<= 1", passed=passed, required=True, unit="ms", note="")
def fine(device, tiny, work): return [P(.5, True)], {"device": "A card", "built_for": ["sm_90"], "more": 3}
def beyond(device, tiny, work): return [P(.5, True), P(2., False)]
def raises(device, tiny, work): print("some output before"); raise ValueError("it broke")
def dies(device, tiny, work): os._exit(7)
def needs(device, tiny, work): import a_package_that_nobody_has
def lost(device, tiny, work): import pillsnap.a_module_that_is_gone
def hangs(device, tiny, work):
    p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["PILLSNAP_TEST_PID"]).write_text(str(p.pid))
    time.sleep(600)
"""


@pytest.fixture
def fakes(tmp_path):
    "A module of checks that end in every way, and what makes a check of one of them."
    (tmp_path / "fakes.py").write_text(textwrap.dedent(FAKES))
    return lambda name, id="GP1", seconds=60, needs=(): Check(
        id, f"a check that {name}", "≤ 1", f"{tmp_path / 'fakes.py'}:{name}", seconds, needs
    )


def run(checks, tmp_path, **kw) -> tuple[int, dict]:
    "The exit status, and the JSON's rows by id."
    status = campaign(checks, "cuda", out=tmp_path / "out" / "GPU.json", no_gpu="", **kw)
    doc = read(tmp_path / "out" / "GPU.json")
    return status, {c["id"]: c for c in doc["checks"]} | {"doc": doc}


def test_every_way_a_check_can_end(fakes, tmp_path, monkeypatch, capsys):
    "Passed, missed, raised, died, a package that is missing: each has its verdict, and the campaign continues."
    status, rows = run(
        [
            fakes("fine", "GP1"),
            fakes("beyond", "GP2"),
            fakes("raises", "GP3"),
            fakes("dies", "GP4"),
            fakes("needs", "GP5"),
            fakes("fine", "GP6", needs=("json", "a_second_one")),
        ],
        tmp_path,
    )
    said = capsys.readouterr()
    assert status == 1 and {k: rows[k]["verdict"] for k in ("GP1", "GP2", "GP3", "GP4", "GP5", "GP6")} == dict(
        GP1="PASSED", GP2="MISSED", GP3="FAILED", GP4="FAILED", GP5="NOT_MEASURED", GP6="NOT_MEASURED"
    )
    assert (
        rows["GP3"]["error"] == "ValueError: it broke"
        and "some output before" in rows["GP3"]["output"]
        and "fakes.py" in rows["GP3"]["output"]
    ), "the traceback is kept"
    assert (
        "status 7" in rows["GP4"]["error"]
        and rows["GP5"]["error"] == "not installed: a_package_that_nobody_has"
        and rows["GP6"]["error"] == "not installed: a_second_one"
    )
    assert rows["doc"]["machine"]["device"] == "A card" and rows["doc"]["machine"]["built_for"] == ["sm_90"], (
        "the first check names the card"
    )
    assert (
        "missed or failed: GP2, GP3, GP4" in said.err
        and re.search(r"^GP1 +PASSED", said.out, re.M)
        and "! figure: 2 ms (<= 1)" in said.out
    )


def test_a_module_of_the_project_that_is_gone_is_a_failure(fakes, tmp_path):
    "Only a package that somebody did not install excuses a check."
    status, rows = run([fakes("lost", "GP2")], tmp_path)
    assert status == 1 and rows["GP2"]["verdict"] == "FAILED" and "a_module_that_is_gone" in rows["GP2"]["error"]


def test_checks_can_be_added_to_an_earlier_campaign(fakes, tmp_path, monkeypatch, capsys):
    "Rows that are measured again replace their own; figures of two cards do not come together."
    assert run([fakes("fine", "GP1"), fakes("beyond", "GP2"), fakes("fine", "GP3")], tmp_path)[0] == 1
    status, rows = run([fakes("fine", "GP2")], tmp_path, add=True)
    assert status == 0 and [c["id"] for c in rows["doc"]["checks"]] == ["GP1", "GP2", "GP3"]
    assert {c["verdict"] for c in rows["doc"]["checks"]} == {"PASSED"} and rows["doc"]["machine"]["device"] == "A card"
    monkeypatch.setattr(campaign_script, "_card", lambda: dict(device="Another card", driver="1", memory_gb=8.0))
    with pytest.raises(ValueError, match="holds figures of A card, and this is Another card"):
        run([fakes("fine", "GP2")], tmp_path, add=True)
    with pytest.raises(ValueError, match="holds a campaign"):
        run([fakes("fine", "GP2")], tmp_path, add=True, tiny=True)


def test_passed_ends_well(fakes, tmp_path):
    assert run([fakes("fine", "GP1"), fakes("fine", "GP2"), fakes("needs", "GP3")], tmp_path)[0] == 0


def test_a_check_that_hangs_is_ended_with_what_it_started(fakes, tmp_path, monkeypatch):
    "It fails after its time, the next one runs, and no process is left behind."
    monkeypatch.setenv("PILLSNAP_TEST_PID", str(tmp_path / "pid"))
    t0 = time.monotonic()
    status, rows = run([fakes("hangs", "GP2", seconds=5), fakes("fine", "GP3")], tmp_path)
    assert (
        status == 1
        and rows["GP2"]["verdict"] == "FAILED"
        and rows["GP2"]["error"] == "no end within 5 s"
        and rows["GP3"]["verdict"] == "PASSED"
        and time.monotonic() - t0 < 60
    )
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 5
    while (
        alive := Path(f"/proc/{pid}/stat").exists()
        and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive


def test_nothing_is_measured_after_the_first_check_did_not_pass(fakes, tmp_path):
    status, rows = run([fakes("beyond", "GP1"), fakes("fine", "GP2")], tmp_path)
    assert status == 1 and rows["GP2"]["verdict"] == "NOT_MEASURED" and rows["GP2"]["error"] == "GP1 did not pass"


def test_the_campaigns_time_is_limited(fakes, tmp_path):
    "A check that the campaign has no time for is not measured; that is no failure of the check."
    status, rows = run([fakes("fine", "GP2"), fakes("hangs", "GP3", seconds=600)], tmp_path, minutes=0.0)
    assert (
        status == 0
        and {rows[k]["verdict"] for k in ("GP2", "GP3")} == {"NOT_MEASURED"}
        and "time was used up" in rows["GP3"]["error"]
    )


def test_a_rehearsal_never_passes(fakes, tmp_path, capsys):
    status, rows = run([fakes("fine", "GP1"), fakes("beyond", "GP2"), fakes("raises", "GP3")], tmp_path, tiny=True)
    assert (
        status == 1
        and [rows[k]["verdict"] for k in ("GP1", "GP2", "GP3")] == ["REHEARSED", "REHEARSED", "FAILED"]
        and rows["doc"]["rehearsal"]
    )
    assert capsys.readouterr().out.startswith("REHEARSAL")


def test_packages_that_the_checks_name_are_here():
    "A name that is misspelt would make its check unmeasured for ever."
    assert {n for c in CHECKS for n in missing(c.needs)} <= {"triton"}


@pytest.mark.skipif(not (ROOT / "benchmarks/results/GPU.json").exists(), reason="no campaign has been published yet")
def test_the_published_campaign_is_whole():
    doc = read(ROOT / "benchmarks/results/GPU.json")
    assert (
        not doc["rehearsal"]
        and doc["machine"]["device"]
        and sorted(int(c["id"][2:]) for c in doc["checks"]) == list(range(1, 16))
    )
    assert not [c["id"] for c in doc["checks"] if c["verdict"] in ("MISSED", "FAILED")]


# ---- the checks themselves, with tiny sizes on the CPU


@pytest.fixture
def as_before():
    "Switches and generators of torch that a check sets for its own process."
    import cv2
    import torch

    from pillsnap.core.checkpoints import rng_state, set_rng_state

    c, was = torch.backends.cudnn, rng_state()
    kept = (
        torch.are_deterministic_algorithms_enabled(),
        c.deterministic,
        c.benchmark,
        c.allow_tf32,
        torch.get_float32_matmul_precision(),
        cv2.getNumThreads(),
    )
    yield
    torch.use_deterministic_algorithms(kept[0], warn_only=True)
    c.deterministic, c.benchmark, c.allow_tf32 = kept[1:4]
    torch.set_float32_matmul_precision(kept[4])
    cv2.setNumThreads(kept[5])
    set_rng_state(was)


def rehearse(function, tmp_path) -> dict:
    "The parts of a check by name, with tiny sizes."
    got = function("cpu", True, tmp_path)
    parts = got[0] if isinstance(got, tuple) else got
    return {p["name"] if isinstance(p, dict) else p.name: p if isinstance(p, dict) else vars(p) for p in parts}


def test_preflight(tmp_path):
    from gpu_checks.preflight import compatible, preflight

    assert rehearse(preflight, tmp_path)["error of a bf16 convolution"]["passed"]
    cu130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
    assert [compatible(card, cu130) for card in ((9, 0), (8, 9), (12, 0), (12, 1), (7, 0), (10, 3))] == [
        True,
        True,
        True,
        True,
        False,
        True,
    ]
    assert (
        not compatible((11, 0), ["sm_90", "sm_100"])
        and compatible((11, 0), ["sm_90", "compute_90"])
        and compatible((9, 0), ["sm_90a"])
    )


def test_host_syncs_are_listed_by_line(tmp_path, as_before, monkeypatch):
    "A wait within the five rounds is counted and named; one before them is not."
    import warnings

    from gpu_checks import loop

    from pillsnap.training.callbacks import Unpack

    clean = rehearse(loop.host_syncs, tmp_path)
    assert all(p["passed"] for p in clean.values()) and clean["host synchronisations in five rounds"]["value"] == 0
    before = Unpack.before_batch

    def waits(self):
        if self.training and self.iter in (1, 6):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        before(self)

    monkeypatch.setattr(Unpack, "before_batch", waits)
    found = rehearse(loop.host_syncs, tmp_path)["host synchronisations in five rounds"]
    assert not found["passed"] and found["value"] == 1 and "test_gpu_campaign.py" in found["note"]


def test_augmentation_is_compared_photo_by_photo(tmp_path, as_before, monkeypatch):
    from gpu_checks import loop

    assert all(p["passed"] for p in rehearse(loop.augmentation, tmp_path).values())
    made, loaders = loop.patch_loader, []

    def swapped(*args, **kw):
        "The first of the two loaders confuses two photos of its second batch."
        loaders.append(None)
        batches = list(made(*args, **kw))
        if len(loaders) == 1:
            x = batches[1][0].clone()
            x[[0, 1]] = x[[1, 0]]
            batches[1] = (x, *batches[1][1:])
        return batches

    monkeypatch.setattr(loop, "patch_loader", swapped)
    assert not rehearse(loop.augmentation, tmp_path)["mean difference of the worst photo"]["passed"]


def test_out_of_memory_is_held_against_accumulation(tmp_path, as_before, monkeypatch):
    "The guard's half batches end at accumulation's weights; a guard that loses photos does not."
    from gpu_checks import limits

    from pillsnap.training import memory

    good = rehearse(limits.out_of_memory, tmp_path)
    assert (
        all(p["passed"] for p in good.values() if p["required"])
        and good["what the guard did"]["value"] == "S0 empty_cache, S2 microbatching"
    )
    cut = memory.split_batch
    monkeypatch.setattr(
        memory,
        "split_batch",
        lambda batch, size: (
            [(x[:1], y[:1], *m) for x, y, *m in cut(batch, size)] if len(batch[1]) > size else cut(batch, size)
        ),
    )
    monkeypatch.setattr(
        limits, "cut_in_halves", lambda batches: [p for b in batches for p in cut(b, -(-len(b[1]) // 2))]
    )
    assert not rehearse(limits.out_of_memory, tmp_path)["weights against accumulation"]["passed"]


def test_precisions(tmp_path, as_before, monkeypatch):
    from gpu_checks import loop

    # a CPU that only emulates bf16 would choose float32
    monkeypatch.setattr("pillsnap.core.device.cpu_has_bf16", lambda: True)
    parts = rehearse(loop.precisions, tmp_path)
    assert parts["types of autocast"]["value"] == "float32, bfloat16, float16" and parts["losses are finite"]["passed"]


def test_search_finds_what_fp64_finds(as_before, monkeypatch):
    "The vectors are such that TF32's rounding would show."
    import torch
    from gpu_checks import answers

    from pillsnap.models import neighbours as retrieval

    def run():
        return answers.search_beside_fp64(answers.Size(True), answers.Gpu("cpu"))[0]

    assert run().passed
    exact, coarse = (
        retrieval.nearest,
        lambda v: (v.view(torch.int32) & ~0x1FFF).view(torch.float32),
    )  # TF32 keeps ten bits of the mantissa
    monkeypatch.setattr(retrieval, "nearest", lambda gallery, queries, k: exact(coarse(gallery), coarse(queries), k))
    assert not run().passed


def test_share_of_the_time_in_which_kernels_run():
    from gpu_checks.loop import kernel_share

    assert kernel_share([("a", 0, 40), ("b", 20, 50), ("c", 60, 100), ("Memcpy HtoD (Pinned -> Device)", 50, 60)]) == (
        0.9,
        3,
    )
    assert kernel_share([("a", 0, 10), ("b", 50, 70), ("c", 80, 100)], 0.5) == (0.8, 2) and kernel_share([]) == (0.0, 0)
