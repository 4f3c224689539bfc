"Answers from exported files alone: `pillsnap predict` (SPEC SV4, EX3, X38)."

import json
import struct
import subprocess
import sys
import zlib

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from jsonschema import validate
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from terminal import typed

from pillsnap.core.container import content_digest
from pillsnap.core.errors import PillsnapError
from pillsnap.core.logs import logged_lines
from pillsnap.delivery.classmap import ClassMap
from pillsnap.deployment import runtime as P
from pillsnap.deployment.batch import predict_command
from pillsnap.models.pipeline import answer_schema

KEYS = ("K-000010", "K-000020", "K-000030")


def save_onnx(path, size, weight, bias, shape=None):
    "Mean colour times a matrix."
    nodes = [
        helper.make_node("GlobalAveragePool", ["image"], ["g"]),
        helper.make_node("Flatten", ["g"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["z"]),
    ]
    init = [numpy_helper.from_array(np.asarray(v, np.float32), n) for v, n in ((weight, "w"), (bias, "b"))]
    if shape:
        nodes.append(helper.make_node("Reshape", ["z", "s"], ["out"]))
        init.append(numpy_helper.from_array(np.array(shape), "s"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("out" if shape else "z", TensorProto.FLOAT, None)],
        init,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def save_networks(export) -> None:
    "A classifier that answers by colour, and a detector that always finds the same two pills."
    save_onnx(export / "classifier.onnx", 48, np.eye(3) * 3, np.zeros(3))
    save_onnx(
        export / "detector.onnx",
        64,
        np.zeros((3, 10)),
        np.array([[20, 20, 16, 16, 0.9], [44, 44, 16, 16, 0.8]], np.float32).T.ravel(),
        [-1, 5, 2],
    )


def drug_record(i: int) -> dict:
    "The metadata of the i-th drug."
    return dict(
        dl_name=f"가나{i}정",
        dl_company="한빛샘제약(주)",
        print_front="HB",
        print_back="",
        di_etc_otc_code="전문의약품",
        drug_shape="원형",
        color_class1="하양",
        leng_long=8,
        leng_short=8,
        thick=3.5,
        di_edi_code="642500340,A01508511",
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder with an exported bundle that answers by colour."
    run = tmp_path_factory.mktemp("run")
    export = run / "export"
    export.mkdir()
    save_networks(export)
    P.write_bundle(
        export,
        P.BundleContent(
            ClassMap(KEYS),
            P.model_entry(export / "classifier.onnx", 48, "by hand", 17),
            P.model_entry(export / "detector.onnx", 64, "by hand", 17),
            drugs={k: drug_record(i) for i, k in enumerate(KEYS)},
            temperature=1.2,
            calibrated=True,
        ),
        created="2026-01-01T00:00:00+00:00",
        git_sha="nogit",
        data="synthetic",
        data_hash="0" * 64,
        scorecard=None,
    )
    Image.fromarray(np.full((90, 70, 3), (30, 200, 40), np.uint8)).save(run / "green.png")
    return run


BLOCKED = """import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {'torch', 'torchvision', 'fastai', 'timm', 'ultralytics', 'matplotlib'}: \
raise ImportError('blocked: '+name)
sys.meta_path.insert(0, Block())
from pillsnap.cli import main
main(['predict', *sys.argv[1:]])
"""


@pytest.mark.spec("SV4")
@pytest.mark.parametrize("mode", ["single", "combo"])
def test_command_without_torch(run, mode):
    "The whole command line, with everything heavy blocked, gives the JSON that a notebook gets."
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(run / "green.png"), "--mode", mode, "--run", str(run), "--json"],
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout), P.load_bundle(run).predict(run / "green.png", mode)
    validate(there, answer_schema())
    assert {**there, "timings": 0} == {**here, "timings": 0}
    assert there["mode_used"] == there["mode_requested"] == mode
    assert there["items"][0]["name"] == "가나1정" and len(there["items"]) == (1 if mode == "single" else 2)


@pytest.mark.spec("SV4")
def test_card_in_korean(run):
    done = typed("predict", run / "green.png", "--run", run)
    assert done.returncode == 0, done.stderr
    for text in ("가나1정", "한빛샘제약(주)", "전문의약품", "8 × 8 × 3.5 mm", "보정된 확률 (온도 1.20)", "정보 없음"):
        assert text in done.stdout, text
    assert "Traceback" not in done.stderr


def png(w, h):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")


@pytest.mark.spec("CF5")
@pytest.mark.parametrize(
    "content, why",
    [
        (b"Dear pharmacist,", "no photo that can be read"),
        (b"", "empty"),
        (png(30000, 30000), "exceed the bound"),
        (None, "no such file"),
        ("1x1", "cannot show a pill"),
    ],
)
def test_bad_photo_is_refused(run, tmp_path, content, why):
    photo = tmp_path / "photo.png"
    if content == "1x1":
        Image.new("RGB", (1, 1)).save(photo)
    elif content is not None:
        photo.write_bytes(content)
    with pytest.raises(PillsnapError, match=why):
        predict_command([photo], "single", run)


def test_a_table_of_answers_says_how_many_photos_could_not_be_read(run, tmp_path, capsys):
    "Beside exit status 1, a line that counts all photos would say that all is well."
    Image.new("RGB", (64, 64), (200, 60, 60)).save(tmp_path / "a.png")
    (tmp_path / "letter.png").write_text("Dear pharmacist,")
    predict_command([tmp_path], "single", run, out=tmp_path / "t.csv")
    assert "2 of 2 photos in" in (told := capsys.readouterr().err) and "1 of them could not be read" in told


def test_photos_that_cannot_be_opened_are_counted(run, tmp_path):
    "A telephone's HEIC beside a JPEG: who asked for a folder hears of it; a folder of nothing else is refused."
    Image.new("RGB", (64, 64), (200, 60, 60)).save(tmp_path / "a.jpg")
    (tmp_path / "phone").mkdir()
    for name in ("b.heic", "c.HEIC", "d.tif"):
        (tmp_path / "phone" / name).write_bytes(b"")
    with logged_lines() as said:
        predict_command([tmp_path], "single", run, out=tmp_path / "t.csv")
    assert [s for s in said if "2 × .heic, 1 × .tif" in s and "convert" in s]
    with pytest.raises(PillsnapError, match="2 × .heic") as refused:
        predict_command([tmp_path / "phone"], "single", run)
    assert "convert" in str(refused.value)


def test_a_table_that_cannot_be_written_is_told_before_a_photo_is_answered(run, monkeypatch):
    monkeypatch.setattr(P.Bundle, "predict", lambda *_, **__: pytest.fail("a photo was answered"))
    with pytest.raises(PillsnapError, match="no file can be written here"):
        predict_command([run / "green.png"], "single", run, out="/proc/answers.csv")


@pytest.mark.spec("CF5")
def test_bad_photo_on_the_command_line(run, tmp_path):
    (tmp_path / "letter.png").write_text("Dear pharmacist,")
    done = typed("predict", tmp_path / "letter.png", "--run", run, "--json")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.splitlines() == [
        "pillsnap: this is a text file, no photo that can be read",
        f"  where: {tmp_path / 'letter.png'}",
        "  to do: give the photo itself",
    ]


@pytest.mark.spec("SV4")
@pytest.mark.parametrize("mode", ["auto", "COMBO", ""])
def test_bad_mode_on_the_command_line(run, mode):
    done = typed("predict", run / "green.png", "--run", run, "--mode", mode)
    assert done.returncode != 0 and "mode" in done.stderr and "Traceback" not in done.stderr


def test_nothing_exported(tmp_path):
    with pytest.raises(PillsnapError, match="no exported model"):
        P.load_bundle(tmp_path)


@pytest.mark.spec("SV4", "SG8")
@pytest.mark.parametrize("mode", ["single", "combo"])
@pytest.mark.parametrize("seed", range(5))
def test_mode_on_the_command_line_is_what_was_asked(run, tmp_path, capsys, mode, seed):
    "Noise: nothing to be sure of, and a detector that sees two pills everywhere."
    from pillsnap.cli import main

    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60 + seed, 90, 3), np.uint8)).save(
        tmp_path / "noise.png"
    )
    with pytest.raises(SystemExit) as e:
        main(["predict", str(tmp_path / "noise.png"), "--mode", mode, "--run", str(run), "--json"])
    a = json.loads(capsys.readouterr().out)
    assert (
        not e.value.code
        and a["mode_used"] == a["mode_requested"] == mode
        and len(a["items"]) == (1 if mode == "single" else 2)
    )


# ---- the bundle


@pytest.fixture
def copy(run, tmp_path):
    import shutil

    return shutil.copytree(run / "export", tmp_path / "export")


@pytest.mark.spec("BX8")
@pytest.mark.parametrize("file", ["classifier.onnx", "detector.onnx", "bundle.json"])
@pytest.mark.parametrize("where", [0.1, 0.5, 0.9])
def test_one_flipped_byte_is_refused(copy, file, where):
    data = bytearray((copy / file).read_bytes())
    data[int(len(data) * where)] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(PillsnapError):
        P.load_bundle(copy)


@pytest.mark.spec("BX8")
def test_permuted_class_map_is_refused_even_when_signed_again(copy):
    meta = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    meta["class_map"]["keys"].reverse()
    meta["digest"] = content_digest(meta)
    (copy / "bundle.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(PillsnapError, match="fingerprint"):
        P.load_bundle(copy)


@pytest.mark.parametrize("key", sorted(P.REQUIRED))
def test_a_bundle_that_lacks_a_part(copy, key):
    meta = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    del meta[key]
    (copy / "bundle.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(PillsnapError, match=key):
        P.load_bundle(copy)


def test_a_file_name_cannot_lead_out_of_the_folder(copy, tmp_path):
    (tmp_path / "evil.onnx").write_bytes((copy / "classifier.onnx").read_bytes())
    (copy / "classifier.onnx").unlink()
    meta = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    meta["classifier"]["file"] = "../evil.onnx"
    meta["digest"] = content_digest(meta)
    (copy / "bundle.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(PillsnapError, match="cannot be read"):
        P.load_bundle(copy)


def test_no_detector_means_single_only(copy):
    meta = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    P.write_bundle(
        copy,
        P.BundleContent(ClassMap(KEYS), meta["classifier"], drugs=meta["drugs"]),
        **{k: meta[k] for k in ("created", "git_sha", "data", "data_hash", "scorecard")},
    )
    bundle, photo = P.load_bundle(copy), np.full((80, 80, 3), 90, np.uint8)
    assert (
        bundle.predict(photo)["mode_used"] == "single"
        and bundle.meta["temperature"] == 1
        and not bundle.meta["calibrated"]
    )
    with pytest.raises(PillsnapError, match="there is no detector"):
        bundle.predict(photo, "combo")


def test_the_bundle_decides_where_the_caller_says_nothing(copy, run):
    "Default mode, number of drugs, and whether the detector is loaded at once; a caller's own word stands above."
    meta = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    own = {k: meta[k] for k in ("created", "git_sha", "data", "data_hash", "scorecard")}

    def rewrite(said):
        parts = {k: meta[k] for k in ("classifier", "detector", "drugs")}
        P.write_bundle(copy, P.BundleContent(ClassMap(KEYS), **parts, answering=said), **own)

    rewrite(dict(mode="combo", top_k=2, lazy_load_detector=False))
    bundle = P.load_bundle(copy)
    assert bundle.detector.model is not None and P.load_bundle(copy, lazy_load_detector=True).detector.model is None
    a, b = bundle.predict(run / "green.png"), bundle.predict(run / "green.png", "single", 3)
    assert (a["mode_requested"], a["mode_used"], len(a["items"][0]["top_k"])) == ("combo", "combo", 2)
    assert (b["mode_used"], len(b["items"][0]["top_k"])) == ("single", 3)
    told = json.loads(typed("predict", run / "green.png", "--run", copy, "--json").stdout)
    assert (told["mode_used"], len(told["items"][0]["top_k"])) == ("combo", 2)
    rewrite({})
    bundle = P.load_bundle(copy)
    assert bundle.detector.model is None and bundle.predict(run / "green.png")["mode_used"] == "single"
    rewrite(dict(mode="auto"))
    with pytest.raises(PillsnapError, match="there is no automatic mode"):
        P.load_bundle(copy)


def test_a_bundle_from_before_these_settings_still_answers(copy, run):
    meta = json.loads((copy / "bundle.json").read_text(encoding="utf-8"))
    del meta["answering"]
    meta["digest"] = content_digest(meta)
    (copy / "bundle.json").write_text(json.dumps(meta), encoding="utf-8")
    a = P.load_bundle(copy).predict(run / "green.png")
    assert a["mode_used"] == "single" and len(a["items"][0]["top_k"]) == len(KEYS)


@pytest.mark.spec("DT5")
def test_detector_session_waits_for_the_first_combo_photo(run, monkeypatch):
    opened, real = [], P.open_session
    monkeypatch.setattr(
        P, "open_session", lambda *a, **kw: opened.append(a[3] if len(a) > 3 else kw["where"]) or real(*a, **kw)
    )
    bundle = P.load_bundle(run)
    for _ in range(3):
        bundle.predict(run / "green.png")
    assert [p.name for p in opened] == ["classifier.onnx"]
    for _ in range(3):
        bundle.predict(run / "green.png", "combo")
    assert [p.name for p in opened] == ["classifier.onnx", "detector.onnx"]


WATCHED = """import json, os, sys
from dataclasses import replace
import numpy as np
from pillsnap.deployment.runtime import load_bundle
bundle = load_bundle(sys.argv[1])
pipeline, opened = replace(bundle.pipeline(), focus="locator"), []
sys.addaudithook(lambda e, a: opened.append(os.fsdecode(a[0])) \
if e == "open" and isinstance(a[0], (str, bytes, os.PathLike)) else None)
photo = np.full((320, 244, 3), (30, 60, 150), np.uint8)
photo[100:150, 80:140] = 220, 200, 60
a = pipeline.predict(photo, "single")
print(json.dumps(dict(view=a["view"], box=a["items"][0]["box"], detector=[p for p in opened if "detector" in p])))
pipeline.predict(photo, "combo")
print(json.dumps([p for p in opened if "detector" in p]))
"""


@pytest.mark.spec("FX1", "X38")
def test_single_finds_the_pill_without_the_detectors_file(run):
    "The pill is located and no file with detector in its name is opened; combo opens it, so the watch sees it."
    done = subprocess.run([sys.executable, "-c", WATCHED, str(run)], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    single, combo = (json.loads(line) for line in done.stdout.splitlines())
    assert single["view"] == "crop" and single["detector"] == [] and combo
    assert np.abs(np.array(single["box"]) - [80, 100, 140, 150]).max() < 5


# ---- execution providers


@pytest.mark.spec("EX3")
def test_missing_provider_falls_back_with_one_line(run, monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with logged_lines() as said:
        bundle = P.load_bundle(run, device="cuda")
    assert len(said) == 1 and "CUDAExecutionProvider was asked for" in said[0] and "running on the CPU" in said[0]
    assert bundle.classifier.session.get_providers() == ["CPUExecutionProvider"]
    assert bundle.predict(run / "green.png")["items"][0]["kcode"] == "K-000020"


@pytest.mark.spec("EX3")
@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime has CUDA")
def test_a_missing_provider_is_told_on_the_command_line(run):
    asked = [sys.executable, "-m", "pillsnap", "predict", run / "green.png", "--run", run, "--device", "cuda"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0 and "running on the CPU" in done.stderr


@pytest.mark.spec("EX3")
def test_provider_that_does_not_start_is_named(run, monkeypatch):
    "The build lists CUDA, the session ends up without it (no driver)."
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    real = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda model, options, providers: real(model, options, providers=["CPUExecutionProvider"]),
    )
    with logged_lines() as said:
        P.load_bundle(run, device="auto")
    assert len(said) == 1 and "CUDAExecutionProvider did not start; running on CPUExecutionProvider" in said[0]


@pytest.mark.spec("EX3")
def test_nothing_is_said_when_nothing_was_given_up(run):
    with logged_lines() as said:
        P.load_bundle(run, device="cpu")
    assert said == []
    with pytest.raises(PillsnapError, match="no device 'tpu'"):
        P.load_bundle(run, device="tpu")
