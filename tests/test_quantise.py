"Smaller networks and their price (SPEC BX24): calibrated on training photos, measured as themselves, refused in words."

import errno
import json
from dataclasses import replace
from itertools import product

import numpy as np
import onnx
import pytest
from runs import linked_run

from pillsnap.core.checkpoints import load_ckpt, save_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json
from pillsnap.core.jobs import RunFolder, readings
from pillsnap.core.settings import AnswerSettings
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.delivery.capture import Capture
from pillsnap.deployment import export as E
from pillsnap.deployment import variants as V
from pillsnap.deployment.runtime import load_bundle
from pillsnap.evaluation.answers import Evaluator, eval_photos
from pillsnap.evaluation.measurements import clean_part
from pillsnap.evaluation.openset import Shown, SingleOutputs
from pillsnap.models.factory import TorchClassifier, load_classifier
from pillsnap.models.pipeline import Pipeline
from pillsnap.photos.images import normalise, open_image_safely

PARTS = ("val", "calib", "clean")
FAST = ("evaluation.latency_warmup=1", "evaluation.latency_runs=3", "export.compare_photos=4", "evaluation.objects=4")


def learn_by_heart(root):
    "Set the head of an untrained classifier so that it names every photo of the evaluation set."
    data, path = load_split_data(root, 0), root / "checkpoints/classifier/best.pt"
    loaded = load_classifier(path, data.class_map)
    runner = TorchClassifier(loaded.model, loaded.img_size)
    photos = [p for p in eval_photos(data) if p.kind == "single" and data.class_map.id(p.keys[0]) >= 0]
    pipeline = Pipeline(runner, data.class_map, focus="locator")
    images = [open_image_safely(data.root / p.path)["image"] for p in photos]
    _, e = runner.outputs(normalise(np.stack([pipeline.views(i, "single").images[0] for i in images])))
    wanted = 8 * np.eye(len(data.class_map))[[data.class_map.id(p.keys[0]) for p in photos]]
    middle = e.mean(0)
    weight = np.linalg.lstsq(e - middle, wanted, rcond=1e-4)[0].T
    checkpoint = load_ckpt(path, class_map=data.class_map.to_dict())
    head = [k for k in checkpoint["model_state"] if k.endswith(("fc.weight", "classifier.weight"))][-1]
    like = checkpoint["model_state"][head]
    checkpoint["model_state"][head] = like.new_tensor(weight)
    checkpoint["model_state"][head.replace("weight", "bias")] = like.new_tensor(-weight @ middle)
    save_ckpt(path, **checkpoint)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "An export whose float32 classifier is right on the whole evaluation set."
    root = tmp_path_factory.mktemp("quantised") / "run"
    cfg = load_config("smoke", [f"paths.exp_dir={json.dumps(str(root))}"])
    E.ExportJob().smoke(RunFolder(root, "export"), cfg)
    learn_by_heart(root)
    E.ExportJob(run_dir=str(root), config="smoke", overrides=FAST).run()
    return root


@pytest.fixture
def run(exported, tmp_path):
    "A copy to quantise; the photos stay where they are."
    return linked_run(exported, tmp_path / "run")


def other_drugs(model, _inputs):
    "A network that names other drugs: the rows of its last layer have moved on by one. The detector stays."
    network = onnx.load_from_string(model)
    stored = {t.name: t for t in network.graph.initializer}
    last = next((n for n in reversed(network.graph.node) if n.op_type == "Gemm"), None)
    for name in last.input[1:] if last else ():
        moved = np.roll(onnx.numpy_helper.to_array(stored[name]), 1, axis=0)
        stored[name].CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(moved), name))
    return network.SerializeToString()


@pytest.mark.spec("BX24")
def test_a_precision_is_measured_by_its_own_answers_and_refused(run, monkeypatch):
    "It names other drugs than float32: its accuracy is its own, nothing is written, and an older bundle is gone."
    monkeypatch.setattr(V, "to_int8", other_drugs)
    (run / "export_int8").mkdir()
    before = len(readings(run, clean_part(0)))
    with pytest.raises(PillsnapError, match="not written: int8: accuracy falls from 1.0000 to 0.0000"):
        V.quantise(run, ["int8"])
    assert not (run / "export_int8").exists()
    report = read_json(run / "reports/quantised.json")
    figures = {m["name"]: m["value"] for m in report["metrics"]}
    assert (figures["fp32_accuracy"], figures["int8_accuracy"], figures["int8_agreement"]) == (1, 0, 0)
    assert figures["int8_accuracy_lost"] == 1 and report["written"] == {} and report["lost"]["int8"]
    assert report["clean_readings"] == len(readings(run, clean_part(0))) == before + 1


@pytest.mark.spec("BX24")
def test_a_loss_is_written_when_it_is_asked_for_and_the_report_keeps_it(run, monkeypatch):
    monkeypatch.setattr(V, "to_int8", other_drugs)
    V.quantise(run, ["int8"], accept_loss=True)
    report = read_json(run / "reports/quantised.json")
    assert report["lost"]["int8"] and report["written"]["int8"]["folder"] == "export_int8"
    assert load_bundle(run / "export_int8").meta["variant"]["precision"] == "int8"


@pytest.mark.spec("BX24", "RS5")
def test_a_disk_that_is_full_leaves_the_earlier_precision(run, monkeypatch):
    bundle = load_bundle(run, device="cpu")
    variant = replace(V.exported_networks(bundle), precision="fp16")
    measured = V.Measured("fp16", 1.0, {}, {}, bundle.meta["temperature"], True, bundle.base_rule(), None)
    before = V.write_variant(bundle, variant, measured, run / "export_fp16").meta["digest"]

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(V, "write_bundle", full)
    with pytest.raises(PillsnapError, match="the disk is full"):
        V.write_variant(bundle, variant, measured, run / "export_fp16")
    assert load_bundle(run / "export_fp16", device="cpu").meta["digest"] == before
    assert not list(run.glob(".export_fp16*"))


@pytest.mark.spec("BX24")
def test_both_precisions_are_bundles_that_answer(run):
    "Smaller, named in the report with every figure beside float32's; float16 is not timed where no GPU is."
    V.quantise(run, accept_loss=True)
    report, plain = read_json(run / "reports/quantised.json"), load_bundle(run)
    figures = {m["name"]: m for m in report["metrics"]}
    for p in ("fp32", *V.PRECISIONS):
        for name in ("accuracy", "agreement", "coverage", "set_size", "mAP@0.5", "combos_exact", "megabytes"):
            assert f"{p}_{name}" in figures
    assert figures["fp16_latency"]["value"] is None and "GPU" in figures["fp16_latency"]["note"]
    scopes = {(r["scope"], r["percentile"]) for r in report["latency"]}
    assert scopes == {(f"{p}_{m}", q) for p in ("fp32", "int8") for m in ("single", "combo") for q in (50, 95)}
    photo = next(p for p in eval_photos(load_split_data(run, 0)) if p.kind == "combo")
    for p in V.PRECISIONS:
        small = load_bundle(run / f"export_{p}", device="cpu")
        assert small.meta["digest"] == report["written"][p]["digest"] != plain.meta["digest"]
        assert small.meta["variant"] == {"precision": p, "of": plain.meta["digest"]}
        for mode in ("single", "combo"):
            assert small.predict(run / "delivery" / photo.path, mode)["mode_used"] == mode
    assert figures["int8_megabytes"]["value"] < 0.4 * figures["fp32_megabytes"]["value"]
    assert figures["fp16_agreement"]["value"] == 1


@pytest.mark.spec("BX24", "BX16")
def test_each_precision_answers_both_sides_by_a_rule_of_its_own(exported, tmp_path):
    "The rule of pairs is fitted to what the precision says, and its bundle keeps it; without pairs it says why."
    bundle = load_bundle(exported, device="cpu")
    plain, rng, n = V.exported_networks(bundle), np.random.default_rng(0), len(bundle.class_map)

    def part(name, noise):
        shown = []
        for label, side, light, view in product(range(n), (0, 1), range(3), range(4)):
            stem = Capture((f"K-{label:06d}",), 0, PARTS.index(name), side, light, 90, 20 * view, 200).stem()
            shown.append(Shown(f"{stem}.png", stem[:-8], "known", "K", label))
        logits = 6 * np.eye(n)[[s.label for s in shown]] + rng.normal(0, noise, (len(shown), n))
        return V.Scored(SingleOutputs(shown, logits, logits), [1.0] * len(shown))

    task = V.RunTask(AnswerSettings(alpha=0.1), ["all"] * n, bundle.class_map.fingerprint)
    fine, coarse = ({k: part(k, noise) for k in PARTS} for noise in (0.5, 2.0))
    small = V.Variant("int8", plain.files, plain.sizes)
    a, b = V.fit_and_measure(plain, fine, fine, task), V.fit_and_measure(small, coarse, fine, task)
    assert a.pairs.fused and b.pairs.fused and a.pairs.groups == b.pairs.groups == 3 * n
    assert a.pairs.temperature != b.pairs.temperature and b.clean["pair_coverage"].value > 0.85
    assert a.clean["pair_accuracy"].value == 1 and b.clean["pair_accuracy"].value > b.clean["accuracy"].value
    assert V.write_variant(bundle, small, b, tmp_path / "export_int8").two_sided().rule == b.pairs
    for k in PARTS:
        fine[k].outputs.shown[:] = [replace(s, name=f"{k}{i}.png") for i, s in enumerate(fine[k].outputs.shown)]
    bundle = V.write_variant(bundle, small, V.fit_and_measure(small, fine, fine, task), tmp_path / "export_int8")
    with pytest.raises(PillsnapError, match="from both sides of a pill: there are 0 pairs"):
        bundle.two_sided()


@pytest.mark.spec("BX24")
def test_int8_is_calibrated_on_training_photos_alone(run, monkeypatch):
    "Every photo that is opened for it is of training; no group of the evaluation set is among them."
    data, bundle, seen = load_split_data(run, 0), load_bundle(run, device="cpu"), []
    pipeline = V.exported_networks(bundle).pipeline(bundle.pipeline())
    evaluator = Evaluator(pipeline, data.root, load_config("smoke").data)
    real = Evaluator.opened

    def opened(self, photos, *a, **kw):
        seen.extend(p.path for p in photos)
        return real(self, photos, *a, **kw)

    monkeypatch.setattr(Evaluator, "opened", opened)
    for inputs in V._calibration_inputs(evaluator, data, 256).values():
        assert all(x.shape[0] == 1 and x.dtype == np.float32 for x in inputs)
    groups = dict(zip(data.train.path, data.train.group_id))
    assert set(seen) <= set(data.train.path) and len({groups[p] for p in seen}) > 4
    assert not {groups[p] for p in seen} & (set(data.val.group_id) | set(data.eval_set.group_id))
