"ONNX answers as torch does, or there is no bundle (SPEC EX1, EX2, X55, X56)."

import copy
import io
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from runs import linked_run

from pillsnap.core.checkpoints import load_ckpt, save_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json, sha256_file
from pillsnap.core.jobs import RunFolder
from pillsnap.core.logs import logged_lines
from pillsnap.core.records import Metric
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.delivery.classmap import ClassMap
from pillsnap.deployment import comparison as C
from pillsnap.deployment import export as E
from pillsnap.deployment import graph as G
from pillsnap.deployment import pixelgraph as P
from pillsnap.deployment.runtime import OnnxClassifier, OnnxDetector, load_bundle
from pillsnap.models.factory import TorchClassifier, WithEmbedding, build_classification_model, load_classifier
from pillsnap.models.pipeline import Pipeline, Thresholds, detector_input, read_photo, view_settings
from pillsnap.models.yolo import TorchDetector, build_yolo_model, load_detector
from pillsnap.photos.images import crop_view, cut_square, normalise, whole_view

FAST = (
    "evaluation.latency_warmup=1",
    "evaluation.latency_runs=3",
    "export.compare_photos=12",
    "export.compare_detector_photos=6",
)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    "A run folder in which everything before the export was done, with untrained models."
    root = tmp_path_factory.mktemp("ready")
    E.ExportJob().smoke(RunFolder(root, "export"), load_config("smoke", [f"paths.exp_dir={json.dumps(str(root))}"]))
    return root


@pytest.fixture
def run(ready, tmp_path):
    "A copy to spoil; the photos stay where they are."
    return linked_run(ready, tmp_path / "run")


@pytest.fixture(scope="module")
def exported(ready, tmp_path_factory):
    "One good export, and what it handed back."
    root = calibrated(linked_run(ready, tmp_path_factory.mktemp("exported") / "run"))
    save_json({"rows": []}, root / "reports/scorecard.json")
    return root, job(root, "inference.top_k=3", "inference.lazy_load_detector=false", "data.default_mode=combo").run()


def calibrated(root):
    "The run with a temperature of its weights."
    names = [f"checkpoints/{m}/best.pt" for m in ("classifier", "detector")]
    found = dict(
        temperature=2.5,
        ece_after=0.01,
        class_map=load_split_data(root, 0).class_map.fingerprint,
        weights={n: sha256_file(root / n) for n in names},
        view=view_settings("locator", Thresholds()),
    )
    save_json(found, root / "reports/calibration.json")
    return root


def job(root, *more):
    return E.ExportJob(run_dir=str(root), config="smoke", overrides=FAST + more)


def perturbed(model, share=0.01):
    "Every weight a little off."
    m, g = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(1 + share * torch.randn(p.shape, generator=g))
    return m


# ---- the file


@pytest.mark.spec("EX1")
@pytest.mark.parametrize("backbone, free", [("test_resnet", True), ("tf_efficientnetv2_b0", False)])
def test_opset_17_and_open_axes(tmp_path, backbone, free):
    "Batch always; height and width only where the architecture does not freeze them (X55)."
    torch.manual_seed(0)
    m = timm.create_model(backbone, num_classes=5, pretrained=False).eval()
    assert G.export_onnx(m, 64, tmp_path / "m.onnx", G.open_axes(backbone, m)) == 17
    f = onnx.load(tmp_path / "m.onnx")
    assert [o.version for o in f.opset_import if o.domain in ("", "ai.onnx")] == [17]
    dims = [d.dim_param or d.dim_value for d in f.graph.input[0].type.tensor_type.shape.dim]
    assert dims == (["batch", 3, "height", "width"] if free else ["batch", 3, 64, 64])
    x = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    assert np.allclose(
        OnnxClassifier((tmp_path / "m.onnx").read_bytes(), 64, "cpu").logits(x),
        TorchClassifier(m, 64).logits(x),
        atol=1e-4,
    )
    assert not m.training and [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.spec("EX1")
def test_newer_exporter_at_18_with_a_reason(tmp_path, monkeypatch):
    def fails(*a):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(G, "_trace", fails)
    m = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 3)).eval()
    with logged_lines() as said:
        assert G.export_onnx(m, 64, tmp_path / "m.onnx") == 18
    assert len(said) == 1 and "opset 17 failed" in said[0] and "no such operator" in said[0] and "18" in said[0]
    monkeypatch.setattr(G, "_capture", fails)
    with pytest.raises(PillsnapError, match="neither exporter"):
        G.export_onnx(m, 64, tmp_path / "n.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


# ---- the comparison


@pytest.mark.spec("EX2")
def test_limits_are_the_contracts():
    assert {k: C.LIMITS[k] for k in ("mse", "max_dp", "relative", "iou", "map")} == dict(
        mse=1e-6, max_dp=1e-3, relative=1e-4, iou=0.95, map=0.01
    )
    e = load_config("two_stage").export
    assert e.opset == 17 and e.compare_photos >= 200 and e.compare_detector_photos >= 100


Z = np.random.default_rng(0).normal(size=(200, 30))


def failing(gap):
    return {c.name for c in C.check_logits(gap, 200) if not c.passed}


GOOD = dict(mse_probability=0.0, mse_logits=0.0, max_dp=0.0, relative_error=0.0, top1_equal=1.0)


@pytest.mark.spec("EX2")
@pytest.mark.parametrize(
    "figure, inside, outside, name",
    [
        ("mse_probability", 1e-6, 1.1e-6, "probability MSE"),
        ("max_dp", 1e-3, 1.1e-3, "largest change of a probability"),
        ("top1_equal", 1.0, 0.9999, "top-1 equal"),
    ],
)
def test_each_limit_decides_alone(figure, inside, outside, name):
    assert failing(GOOD | {figure: inside}) == set() and failing(GOOD | {figure: outside}) == {name}


@pytest.mark.spec("EX2")
def test_relative_error_decides_where_float32_ends():
    "X56: the figure is published, and ≤ 1e-4 decides."
    assert failing(GOOD | dict(mse_logits=1e-2, relative_error=1e-4)) == set()
    assert failing(GOOD | dict(mse_logits=1e-2, relative_error=1.1e-4)) == {"logit MSE"}
    assert failing(GOOD | dict(mse_logits=1e-6, relative_error=1.0)) == set()
    (check,) = [
        c for c in C.check_logits(GOOD | dict(mse_logits=1e-2, relative_error=1e-5), 1) if c.name == "logit MSE"
    ]
    assert check.value == 1e-2 and "relative error" in check.note


@pytest.mark.spec("EX2")
def test_probability_error_alone_would_pass_strangers():
    a, b = (np.random.default_rng(s).normal(size=(50, 4523)) for s in (1, 2))
    assert failing(C.logit_gap(a, b)) == {"logit MSE", "largest change of a probability", "top-1 equal"}


B, S = np.array([[10.0, 10, 60, 60], [80, 80, 140, 150]]), np.array([0.9, 0.8])


def box_verdicts(a, b, ap=(0.9, 0.9), raw=0.0):
    return {c.name: c.passed for c in C.check_boxes(C.pair_boxes(a, b), ap, raw, len(a))}


@pytest.mark.spec("EX2")
def test_box_limits():
    good = {
        "smallest IoU of matched boxes": True,
        "unmatched boxes": True,
        "mAP@.5 difference": True,
        "head, largest relative difference": True,
    }
    assert box_verdicts([(B, S)], [(B, S)]) == good
    wide = B.copy()
    wide[0, 2] += 2.5  # IoU 50/52.5 = .952
    assert box_verdicts([(B, S)], [(wide, S)]) == good
    wide[0, 2] += 0.3  # IoU 50/52.8 = .947
    assert box_verdicts([(B, S)], [(wide, S)]) == good | {"smallest IoU of matched boxes": False}
    assert box_verdicts([(B, S)], [(B[:1], S[:1])]) == good | {"unmatched boxes": False}
    assert box_verdicts([(B[:1], S[:1])], [(B, S)]) == good | {"unmatched boxes": False}
    assert box_verdicts([(B[:0], S[:0])], [(B, S)])["unmatched boxes"] is False
    assert box_verdicts([(B, S)], [(B, S)], ap=(0.80, 0.8099)) == good
    assert box_verdicts([(B, S)], [(B, S)], ap=(0.80, 0.8101)) == good | {"mAP@.5 difference": False}


@pytest.mark.spec("EX2")
def test_nothing_found_is_not_a_pass():
    v = box_verdicts([(B[:0], S[:0])], [(B[:0], S[:0])], ap=(float("nan"),) * 2)
    assert [v[k] for k in ("smallest IoU of matched boxes", "unmatched boxes", "mAP@.5 difference")] == [None] * 3
    assert (
        C.Comparison(checks=[C.ExportCheck("a", 1.0, "", 1, True), C.ExportCheck("b", None, "", 0, None)]).passed
        is None
    )
    assert C.Comparison().passed is None


@pytest.fixture(scope="module")
def photos(ready):
    return list(C.open_photos(C.photo_order(load_split_data(ready, 0), "combo"), 16))


@pytest.mark.spec("EX2", "CF6")
def test_classifier_passes_and_a_perturbed_one_fails(photos, tmp_path):
    torch.manual_seed(0)
    m = timm.create_model("test_resnet", num_classes=9, pretrained=False).eval()
    m.get_classifier().weight.data.mul_(100)
    for model, passes in ((m, True), (perturbed(m, 0.001), False)):
        G.export_onnx(WithEmbedding(model), 96, tmp_path / "m.onnx", names=("image", "logits", "embedding"))
        c = C.compare_classifiers(
            TorchClassifier(m, 96), OnnxClassifier((tmp_path / "m.onnx").read_bytes(), 96, "cpu"), photos
        )
        assert c.passed is passes and c.n == 16 and len(c.torch[0]) == c.gap["views"] > 32, c.checks


@pytest.mark.spec("EX2", "CF6", "DT4")
def test_detector_passes_and_a_perturbed_one_fails(photos, tmp_path):
    torch.manual_seed(0)
    m = G.livened(build_yolo_model("11n"), detector_input([p.image for p in photos[:8]], 96))
    for model, passes in ((m, True), (perturbed(m, 0.001), False)):
        G.export_onnx(G.RawHead(model), 96, tmp_path / "d.onnx", names=("image", "raw"))
        c = C.compare_detectors(
            TorchDetector(m, 96), OnnxDetector((tmp_path / "d.onnx").read_bytes(), 96, "cpu"), photos, keep=4
        )
        assert c.passed is passes and c.gap["boxes"] >= 20 and c.n == 16 and len(c.shown) == 4, c.checks


@pytest.mark.spec("EX2")
@pytest.mark.parametrize("spoil", ["BGR", "no normalisation", "another class first"])
def test_the_usual_mistakes_are_caught(photos, spoil):
    "On real photos; the runner stands for an export gone wrong."
    torch.manual_seed(0)
    ours = TorchClassifier(timm.create_model("test_resnet", num_classes=9, pretrained=False), 96)

    class Wrong:
        size = 96

        def outputs(self, x):
            if spoil == "BGR":
                return ours.outputs(x[:, ::-1])
            if spoil == "no normalisation":
                return ours.outputs(x * 0.225 + 0.45)
            logits, embedding = ours.outputs(x)
            return np.roll(logits, 1, axis=1), embedding

    assert C.compare_classifiers(ours, Wrong(), photos).passed is False


@pytest.mark.spec("EX2")
def test_an_embedding_of_another_layer_is_caught(photos):
    "The logits agree and the second output does not."
    torch.manual_seed(0)
    ours = TorchClassifier(timm.create_model("test_resnet", num_classes=9, pretrained=False), 96)

    class Wrong:
        size = 96

        def outputs(self, x):
            logits, embedding = ours.outputs(x)
            return logits, np.maximum(embedding - embedding.mean(), 0)

    assert C.compare_classifiers(ours, ours, photos).passed is True
    failed = [c.name for c in C.compare_classifiers(ours, Wrong(), photos).checks if not c.passed]
    assert failed == ["embedding, relative error"]


@pytest.mark.spec("EX1")
@pytest.mark.parametrize("head", [None, {"dim": 24, "scale": 16.0}])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_vit", "test_mambaout"])
def test_the_logits_are_the_last_layer_of_the_embedding(backbone, head):
    "For four kinds of network and for the cosine head; the logits are those of the network alone."
    torch.manual_seed(0)
    size = 160 if backbone == "test_vit" else 64
    model = build_classification_model(backbone, 7, pretrained=False, head=head).eval()
    x = np.random.default_rng(0).standard_normal((3, 3, size, size)).astype(np.float32)
    runner = TorchClassifier(model, size, batch=2)
    logits, embedding = runner.outputs(x)
    assert np.allclose(logits, runner.logits(x), atol=1e-5) and embedding.ndim == 2 and len(embedding) == 3
    last = model.classify if head else model.get_classifier()
    with torch.no_grad():
        assert np.allclose(last(torch.from_numpy(embedding)).numpy(), logits, atol=1e-5)


def test_photos_are_of_the_stage_and_never_sealed(ready):
    stage = load_split_data(ready, 0)
    rel = [p.relative_to(stage.header["root"]).as_posix() for p, _ in C.photo_order(stage)]
    assert len(rel) == len(set(rel)) and set(rel) == set(stage.train.path) | set(stage.val.path) | set(
        stage.eval_set.path
    )
    assert all("/train/" in f"/{r}" for r in rel)


# ---- the stage


@pytest.mark.spec("EX1", "EX2", "BX15")
def test_the_job_writes_bundle_and_report(exported):
    run, res = exported
    for f in ("export/classifier.onnx", "export/detector.onnx", "export/bundle.json", "reports/export.json"):
        assert (run / f).is_file(), f
    facts = read_json(run / "reports/export.json")
    assert facts["passed"] is True and {c["verdict"] for c in facts["checks"]} == {"PASS"}, facts["checks"]
    assert {c["model"] for c in facts["checks"]} == {"classifier", "classifier_uint8", "detector"}
    metrics = {m["name"]: Metric.from_dict(m) for m in facts["metrics"]}
    stage = load_split_data(run, 0)
    for name in ("export_classifier_mse_probability", "export_classifier_mse_logits", "export_detector_min_iou"):
        m = metrics[name]
        assert m.measured and (m.data, m.data_hash, m.class_map_hash) == (
            "synthetic",
            stage.header["data_hash"],
            stage.class_map.fingerprint,
        ), m.doubts()
    assert (metrics["export_classifier_top1_equal"].n, metrics["export_detector_boxes"].n) == (12, 6)
    scopes = {(r["scope"], r["percentile"]) for r in facts["latency"]}
    assert scopes == {(s, q) for s in ("onnx_single", "onnx_combo") for q in (50, 95)}
    assert {f.name for f in res.figures} == {"export_logits.png", "export_boxes.png", "export_latency.png"} and all(
        f.is_file() for f in res.figures
    )
    b = load_bundle(run)
    assert (
        b.meta["digest"] == facts["bundle"]
        and b.meta["data"] == "synthetic"
        and b.meta["classifier"]["opset"] == b.meta["detector"]["opset"] == 17
    )
    assert list(b.class_map) == list(stage.class_map) and all(b.meta["drugs"][k]["dl_name"] for k in b.class_map)


@pytest.mark.spec("EX2", "SV4")
def test_the_bundle_answers_as_torch_does(exported):
    "End to end: file, crop, class, name; in both modes."
    run, _ = exported
    b, stage = load_bundle(run), load_split_data(run, 0)
    loaded = load_classifier(run / "checkpoints/classifier/best.pt", stage.class_map)
    det = load_detector(run / "checkpoints/detector/best.pt")
    ours = Pipeline(
        TorchClassifier(loaded.model, loaded.img_size),
        loaded.class_map,
        TorchDetector(det.model, det.img_size),
        metadata=b.meta["drugs"],
        temperature=2.5,
        focus="locator",
    )
    for path, _ in C.photo_order(stage, "combo")[:3]:
        for mode in ("single", "combo"):
            x, y = ours.predict(path, mode), b.predict(path, mode)
            assert x["mode_used"] == y["mode_used"] == mode and x["answer"] == y["answer"]
            assert [i["kcode"] for i in x["items"]] == [i["kcode"] for i in y["items"]] and [
                i["name"] for i in x["items"]
            ] == [i["name"] for i in y["items"]]
            for i, j in zip(x["items"], y["items"]):
                assert i["confidence"] == pytest.approx(j["confidence"], abs=1e-4) and (i["box"] is None) == (
                    mode == "single"
                )
                if i["box"]:
                    assert i["box"] == pytest.approx(j["box"], abs=0.1)


def test_the_bundle_keeps_what_the_configuration_says_of_answering(exported):
    "`pillsnap predict` and a notebook answer as the run's configuration says where nobody names a mode or a number."
    b = load_bundle(exported[0])
    assert (
        b.meta["answering"] == dict(mode="combo", top_k=3, lazy_load_detector=False, focus="locator")
        and b.detector.model is not None
    )
    answer = b.predict(read_json(exported[0] / "reports/export.json")["timed_photo"])
    assert answer["mode_used"] == "combo" and all(len(i["top_k"]) == 3 for i in answer["items"])


@pytest.mark.spec("EX2")
@pytest.mark.parametrize("model", ["classifier", "detector"])
def test_no_bundle_for_a_model_that_differs(run, monkeypatch, model):
    "Also the bundle of an earlier, good export is gone."
    (run / "export").mkdir()
    (run / "export/bundle.json").write_text("{}")
    real = E.export_onnx

    def wrong(m, size, path, *a, **kw):
        return real(perturbed(m) if model in path.name else m, size, path, *a, **kw)

    monkeypatch.setattr(E, "export_onnx", wrong)
    with pytest.raises(PillsnapError, match=f"{model} DOES NOT AGREE"):
        job(run).run()
    assert not (run / "export/bundle.json").exists()
    facts = read_json(run / "reports/export.json")
    failing = {model, "classifier_uint8"} if model == "classifier" else {model}  # made of the same wrong file
    assert (
        facts["passed"] is False
        and facts["bundle"] is None
        and {c["model"] for c in facts["checks"] if c["verdict"] == "FAIL"} == failing
    )
    with pytest.raises(PillsnapError, match="no exported model"):
        load_bundle(run)


def test_without_a_detector(run, monkeypatch, capsys):
    "Single mode only, said in one line; ultralytics is not even imported."
    (run / "checkpoints/detector/best.pt").unlink()
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    res = job(run).run()
    assert "no detector" in res.verdict and not (run / "export/detector.onnx").exists()
    assert "single mode only" in (run / "logs/pillsnap.export.log").read_text(encoding="utf-8")
    b = load_bundle(run)
    assert b.detector is None and {r["scope"] for r in read_json(run / "reports/export.json")["latency"]} == {
        "onnx_single"
    }
    with pytest.raises(PillsnapError, match="default mode is combo, and this run has no detector"):
        job(run, "data.default_mode=combo").run()


@pytest.mark.spec("BX8")
def test_checkpoint_of_another_class_map_stops(run):
    path = run / "checkpoints/classifier/best.pt"
    ckpt = load_ckpt(path)
    keys = list(ckpt["class_map"]["keys"])
    keys[0] = "K-999999"
    save_ckpt(path, **{**ckpt, "class_map": ClassMap(keys).to_dict()})
    with pytest.raises(PillsnapError, match="class map"):
        job(run).run()
    assert not (run / "export/bundle.json").exists()


def test_nothing_trained(run):
    (run / "checkpoints/classifier/best.pt").unlink()
    with pytest.raises(PillsnapError, match="no trained classifier"):
        job(run).run()


def test_temperature_and_scorecard_of_the_evaluation(exported):
    b = load_bundle(exported[0])
    assert (b.meta["temperature"], b.meta["calibrated"]) == (2.5, True) and b.meta["scorecard"] == sha256_file(
        exported[0] / "reports/scorecard.json"
    )


@pytest.mark.spec("BX3", "FX3")
@pytest.mark.parametrize(
    "change, said",
    [
        ("classifier", "other weights than checkpoints/classifier/best.pt"),
        ("detector", "other weights than checkpoints/detector/best.pt"),
        ("inference.focus=off", "looked at photos in another way"),
        ("data.classification.crop_padding=0.6", "looked at photos in another way"),
    ],
)
def test_what_was_not_evaluated_is_not_exported_with_the_evaluations_rule(exported, tmp_path, change, said):
    "Thresholds of other weights or of other views would name drugs; the earlier bundle stays."
    run = calibrated(linked_run(exported[0], tmp_path / "run"))
    before = (run / "export/bundle.json").read_bytes()
    if "=" not in change:
        path = run / f"checkpoints/{change}/best.pt"
        ckpt = load_ckpt(path)
        path.unlink()  # a link
        save_ckpt(path, **{**ckpt, "epoch": 9})
    with pytest.raises(PillsnapError, match=said):
        job(run, *([change] if "=" in change else [])).run()
    assert (run / "export/bundle.json").read_bytes() == before


@pytest.mark.spec("BX8")
def test_calibration_of_another_class_map_stops(run):
    cm = load_split_data(run, 0).class_map
    assert E.calibrated_temperature(run, cm) == (1.0, False)
    save_json({"temperature": 2.5, "ece_after": 0.01, "class_map": "0" * 64}, run / "reports/calibration.json")
    with pytest.raises(PillsnapError, match="another class map"):
        E.calibrated_temperature(run, cm)


def test_a_changed_parameter_changes_the_output(ready):
    stage = load_split_data(ready, 0)
    assert C.photo_order(stage, seed=1) != C.photo_order(stage, seed=2)
    assert C.photo_order(stage, "single")[0][0] != C.photo_order(stage, "combo")[0][0]


# ---- the graph that takes pixels


@pytest.mark.spec("BX6", "EX1")
def test_the_bundle_lists_the_graph_that_takes_pixels_with_its_contract(exported):
    "The input of the file is what the entry says; orientation and locator are named as the caller's."
    run, _ = exported
    meta = load_bundle(run).meta
    entry = meta["classifier_uint8"]
    assert (entry["opset"], meta["classifier"]["opset"]) == (18, 17) and entry["checkpoint"] == meta["classifier"][
        "checkpoint"
    ]
    graph = onnx.load(run / "export" / entry["file"]).graph
    (given,) = graph.input
    dims = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
    assert (given.name, dims) == (entry["input"]["name"], entry["input"]["shape"]) == ("photo", ["height", "width", 3])
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8 and entry["input"]["dtype"] == "uint8"
    assert "the caller applies EXIF" in entry["input"]["orientation"]
    assert "not in the graph" in entry["input"]["locator"]
    assert [o.name for o in graph.output] == list(entry["outputs"]) == ["logits", "embedding", "view"]


@pytest.mark.spec("BX6", "EX2")
def test_the_graph_that_takes_pixels_answers_as_torch_on_any_size(exported):
    "Torch gets Pillow's view of the same pixels, whole and cut, smaller than the input, odd, tall and wide."
    run, _ = exported
    asked, stage = P.open_pixel_graph(load_bundle(run), "cpu"), load_split_data(run, 0)
    loaded = load_classifier(run / "checkpoints/classifier/best.pt", stage.class_map)
    ours = TorchClassifier(loaded.model, loaded.img_size)
    path, boxes = next((p, b) for p, b in C.photo_order(stage) if len(b))
    photo = read_photo(path)
    sizes = [photo.shape[1::-1], (33, 91), (91, 33), (loaded.img_size,) * 2, (loaded.img_size + 1, 203), (1201, 902)]
    for w, h in sizes:
        odd = np.asarray(Image.fromarray(photo).resize((w, h)))
        logits, embedding, view = asked.ask(odd)
        pillow = whole_view(odd, ours.size)
        same, by_pillow = ours.outputs(normalise(view[None])), ours.outputs(normalise(pillow[None]))
        assert np.abs(view.astype(int) - pillow).max() <= 2
        assert all(c.passed for c in C.check_logits(C.logit_gap(same[0], logits), 1)), (w, h)
        assert C.embedding_gap(same[1], embedding)["embedding_relative_error"] <= 1e-4
        assert C.logit_gap(by_pillow[0], logits)["max_dp"] <= C.PIXEL_LIMITS["max_dp"]
    cut = asked.ask(photo, boxes[0], 0.1)
    want = ours.outputs(normalise(crop_view(photo, boxes[0], ours.size, 0.1)[None]))[0]
    assert C.logit_gap(want, cut[0])["max_dp"] <= C.PIXEL_LIMITS["max_dp"]
    assert np.array_equal(cut[0], asked.outputs(cut_square(photo, boxes[0], 0.1))[0])


@pytest.mark.spec("BX6")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_caller_of_the_pixel_graph_turns_a_photo_by_its_exif(exported, orientation):
    "Eight ways to hold a camera, one answer; the pixels as stored have another one."
    run, _ = exported
    asked = P.open_pixel_graph(load_bundle(run), "cpu")
    upright = read_photo(C.photo_order(load_split_data(run, 0))[0][0])[:150, :200]
    back = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (1, 1), 6: (1, 0), 7: (3, 1), 8: (3, 0)}[orientation]
    stored = np.rot90(upright[:, ::-1] if back[1] else upright, back[0])
    file, exif = io.BytesIO(), Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG", exif=exif)
    assert np.array_equal(read_photo(file.getvalue()), upright)
    assert np.array_equal(asked.ask(file.getvalue())[0], asked.ask(upright)[0])
    same = np.array_equal(asked.ask(np.ascontiguousarray(stored))[2], asked.ask(upright)[2])
    assert same == (orientation == 1)


@pytest.mark.spec("BX6")
def test_the_pixel_graph_runs_on_onnxruntime_and_numpy_alone(exported):
    "In a process where PillSnap, torch, onnx and Pillow cannot be imported."
    run, _ = exported
    bundle = load_bundle(run)
    pixels = np.random.default_rng(0).integers(0, 256, (71, 58, 3), dtype=np.uint8)
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "pillsnap", "onnx", "PIL", "pandas", "cv2"), None))
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
pixels = numpy.random.default_rng(0).integers(0, 256, (71, 58, 3), dtype=numpy.uint8)
print(session.run(["logits"], {"photo": pixels})[0].tolist())
"""
    file = run / "export" / bundle.meta["classifier_uint8"]["file"]
    said = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True, check=True)
    assert np.allclose(json.loads(said.stdout), P.open_pixel_graph(bundle, "cpu").outputs(pixels)[0], atol=1e-6)


@pytest.mark.spec("BX6", "EX2")
def test_no_bundle_for_a_pixel_graph_that_differs(run, monkeypatch):
    "A resize without antialiasing: every network agrees, the pixels do not."
    real = P.fit_model

    def careless(*a):
        model = real(*a)
        for setting in next(n for n in model.graph.node if n.op_type == "Resize").attribute:
            if setting.name in ("antialias", "exclude_outside"):
                setting.i = 0
        return model

    monkeypatch.setattr(P, "fit_model", careless)
    with pytest.raises(PillsnapError, match="the uint8 graph DOES NOT AGREE"):
        job(run).run()
    assert not (run / "export/bundle.json").exists()
    failed = [c for c in read_json(run / "reports/export.json")["checks"] if c["verdict"] == "FAIL"]
    assert {c["model"] for c in failed} == {"classifier_uint8"} and "view" in failed[0]["check"]


def test_an_export_without_the_pixel_graph(run, monkeypatch):
    "Switched off, or a classifier that ONNX cannot convert: the bundle is complete, and the log says why."
    monkeypatch.setattr(P.onnx.version_converter, "convert_version", lambda *a: 1 / 0)
    job(run).run()
    assert "no classifier_uint8.onnx" in (run / "logs/pillsnap.export.log").read_text(encoding="utf-8")
    bundle = load_bundle(run)
    assert bundle.meta["classifier_uint8"] is None and not (run / "export/classifier_uint8.onnx").exists()
    with pytest.raises(PillsnapError, match="no graph that takes pixels"):
        P.open_pixel_graph(bundle)
