"""One file of a real run: the same answers, no changed byte, no hostile content, cards whose figures are the run's."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pillsnap.core.container import PackedFiles, content_digest, write_packed
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json
from pillsnap.core.records import plain_number
from pillsnap.core.signing import sign_files
from pillsnap.deployment.bundling import bundle_file, verify_file
from pillsnap.deployment.modelcard import FIGURES
from pillsnap.deployment.runtime import load_bundle


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    "A folder with two pairs of keys: signing.pem and signing.pub, other.pem and other.pub."
    folder = tmp_path_factory.mktemp("keys")
    for name in ("signing", "other"):
        for args in (["ecparam", "-name", "prime256v1", "-genkey", "-noout"], ["ec", "-in", f"{name}.pem", "-pubout"]):
            out = f"{name}.{'pub' if args[0] == 'ec' else 'pem'}"
            subprocess.run(["openssl", *args, "-out", out], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def signed(smoke_run, keys, tmp_path_factory) -> Path:
    "A signed file of the smoke run."
    return bundle_file(smoke_run, tmp_path_factory.mktemp("file") / "pills.pillsnap", keys / "signing.pem").where


def contents(path: Path) -> dict[str, bytes]:
    "The members of a bundle's file, without its manifest and its signature."
    files = PackedFiles(path)
    return {name: files.read(name) for name in files.members if name not in ("manifest.json", "signature.json")}


@pytest.mark.spec("BX6")
def test_the_file_answers_as_the_run(smoke_run, signed):
    "Single and combo, with the same pictures in the card; nothing is unpacked beside the file."
    there, here = load_bundle(smoke_run, device="cpu"), load_bundle(signed, device="cpu")
    for photo in sorted((smoke_run / "delivery").rglob("*_75_*.png"))[:3]:
        for mode in ("single", "combo"):
            answers = [bundle.predict(photo, mode) for bundle in (there, here)]
            assert answers[0] | {"timings": 0} == answers[1] | {"timings": 0}
            assert answers[0]._repr_html_().count("<img") == answers[1]._repr_html_().count("<img") > 0
    assert [p.name for p in signed.parent.iterdir()] == [signed.name]


BLOCKED = """import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'torchvision', 'fastai', 'timm', 'ultralytics', 'matplotlib', 'pandas',
                                  'cv2', 'scipy', 'model_signing', 'OpenSSL', 'sigstore', 'onnx', 'markdown_it'}:
            raise ModuleNotFoundError('blocked: ' + name, name=name)
sys.meta_path.insert(0, Block())
from pillsnap.cli import main
main(sys.argv[1:])
"""


@pytest.mark.spec("BX6", "SV4")
def test_the_commands_need_the_base_alone(smoke_run, signed, keys):
    "Answers and checks without torch; a signature that cannot be checked is not called good."

    def typed(*args):
        argv = [sys.executable, "-c", BLOCKED, *map(str, args)]
        return subprocess.run(argv, capture_output=True, text=True, encoding="utf-8")

    photo = sorted((smoke_run / "delivery").rglob("*_75_*.png"))[0]
    done = typed("predict", photo, "--mode", "combo", "--bundle", signed, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"timings": 0} == load_bundle(signed).predict(photo, "combo") | {"timings": 0}
    done = typed("verify", signed)
    assert done.returncode == 0 and "it was not checked" in done.stdout, done.stderr
    done = typed("verify", signed, "--key", keys / "signing.pub")
    assert done.returncode == 2 and "holds" not in done.stdout, done.stdout
    assert "the signature was not checked" in done.stderr and 'pip install "pillsnap[sign]"' in done.stderr


def places(path: Path) -> list[int]:
    "Bytes of every kind: header, name and content of each member, directory, end record."
    files = PackedFiles(path)
    at = [p for m in files.members.values() for p in (m.start + 10, m.begin - 1, m.begin, m.end - 1)]
    at += [(m.begin + m.end) // 2 for m in files.members.values()]
    last, size = max(m.end for m in files.members.values()), path.stat().st_size
    return [*at, *range(last, last + 200, 7), *range(size - 22, size)]


@pytest.mark.spec("BX6", "RS6")
def test_one_changed_byte_anywhere_is_refused(signed, tmp_path):
    "Also in the cards, the licences, the pictures and the signature, which no answer reads."
    data, changed = bytearray(signed.read_bytes()), tmp_path / "changed.pillsnap"
    for n, at in enumerate(places(signed)):
        data[at] ^= 1 << (n % 8)
        changed.write_bytes(data)
        with pytest.raises(PillsnapError):
            load_bundle(changed, device="cpu")
        data[at] ^= 1 << (n % 8)
    changed.write_bytes(data)
    load_bundle(changed, device="cpu")


@pytest.mark.spec("BX6", "RS6")
@pytest.mark.parametrize(
    "harm", ["a drug's name", "another model", "the signature taken off", "a signature of another"]
)
def test_what_only_a_signature_tells(signed, keys, tmp_path, harm):
    "A file whose every sha256 is right, made by somebody else."
    parts, old = contents(signed), PackedFiles(signed).read("signature.json")
    sign = {"the signature taken off": None, "a signature of another": lambda d: sign_files(d, keys / "other.pem")}
    if harm == "a drug's name":
        meta = json.loads(parts["bundle.json"])
        next(iter(meta["drugs"].values()))["dl_name"] = "다른정"
        parts["bundle.json"] = json.dumps(meta | {"digest": content_digest(meta)}).encode()
    if harm == "another model":
        parts["classifier.onnx"] = parts["detector.onnx"]
        with pytest.raises(PillsnapError, match="sha256 differs"):
            load_bundle(write_packed(tmp_path / "forged.pillsnap", parts).where)
    forged = write_packed(tmp_path / "forged.pillsnap", parts, sign.get(harm, lambda _: old)).where
    for check in (verify_file, load_bundle):
        with pytest.raises(PillsnapError, match=r"signature (does not hold|is required)|sha256 differs"):
            check(forged, key=keys / "signing.pub")


def at_random(meta: dict, draw) -> None:
    "Replace or remove one value of a bundle's content."
    part = meta
    while True:
        key = draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part))))
        inner = part[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.integers(0, 3)) == 0:
            break
        part = inner
    junk = [None, True, 0, -1, 1e308, 10**30, "", "../../etc/passwd", "\ud800", [], {}, [[]], {"a": []}, ["K-000001"]]
    if draw(st.booleans()) and isinstance(part, dict):
        del part[key]
    else:
        part[key] = draw(st.sampled_from(junk))


@pytest.mark.spec("RS6")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_content_is_refused_or_answered(signed, tmp_path, monkeypatch, data):
    "A bundle.json with something odd in it and every digest right: an error in words, or a bundle; never a pickle."
    monkeypatch.setattr(pickle, "loads", pytest.fail)
    monkeypatch.setattr(pickle, "Unpickler", pytest.fail)
    parts = {name: c for name, c in contents(signed).items() if name.endswith((".json", ".onnx", ".jpg"))}
    meta = json.loads(parts["bundle.json"])
    at_random(meta, data.draw)
    try:
        meta["digest"] = content_digest(meta)
        parts["bundle.json"] = json.dumps(meta).encode()
        bundle = load_bundle(write_packed(tmp_path / "odd.pillsnap", parts).where, device="cpu")
        bundle.predict(np.full((90, 70, 3), 120, np.uint8), "single")._repr_html_()
    except PillsnapError as e:
        assert e.what


@pytest.mark.spec("BX6")
def test_the_cards_figures_are_the_runs(smoke_run, signed):
    "Each figure of the model card with its n, as the evaluation wrote it; what was not measured has no value."
    parts, metrics = contents(signed), read_json(smoke_run / "reports" / "evaluation.json")["metrics"]
    card = parts["MODEL_CARD.md"].decode()
    rows = {m[1]: (m[2], m[3]) for m in re.finditer(r"^\|[^|]*\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", card, re.M)}
    assert list(rows) == [name for figures in FIGURES.values() for name in figures]
    shown = {name: row for name, row in rows.items() if row[0] != "NOT_MEASURED"}
    assert len(shown) > 10
    for name, (value, n) in shown.items():
        assert (value, n) == (plain_number(metrics[name]["value"]), str(metrics[name]["n"])), name
    for name in rows.keys() - shown:
        assert name not in metrics or metrics[name]["value"] is None or not metrics[name]["seconds"], name
    assert "Synthetic data" in card and "AGPL-3.0" in parts["LICENSES/README.md"].decode()
    counts = read_json(smoke_run / "reports" / "conversion.json")["counts"]
    assert f"{counts['photos']:,} photos" in parts["DATA_CARD.md"].decode()
    assert parts["scorecard.json"] == (smoke_run / "reports" / "scorecard.json").read_bytes()


@pytest.mark.spec("BX6")
def test_a_card_never_shows_another_networks_figures(smoke_run, tmp_path):
    "The network was trained again and evaluated after the export: the export holds the older one."
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run, symlinks=True, ignore=shutil.ignore_patterns("delivery", "stages"))
    bundle_file(run, tmp_path / "first.pillsnap")
    report = run / "reports" / "evaluation.json"
    measured = read_json(report)
    for name in ("classifier", "detector"):
        inputs = measured["inputs"] | {f"checkpoints/{name}/best.pt": "b" * 64}
        save_json(measured | {"inputs": inputs}, report)
        with pytest.raises(PillsnapError, match=f"an older {name} than the one that was evaluated"):
            bundle_file(run, tmp_path / "second.pillsnap")
    assert not (tmp_path / "second.pillsnap").exists()
