"The narrow family: one preprocessing in training, evaluation, export and answers."

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json
from pillsnap.core.jobs import RunFolder
from pillsnap.dataset.datasets import MemorySource
from pillsnap.dataset.loaders import classification_set
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.delivery.index import read_manifest
from pillsnap.deployment.export import ExportJob
from pillsnap.deployment.runtime import content_digest, load_bundle
from pillsnap.evaluation.answers import load_evaluator
from pillsnap.photos import unified as U
from pillsnap.photos.caches import SizedLRUCache
from pillsnap.photos.golden import check_golden
from pillsnap.photos.images import normalise, open_image_safely, whole_view
from pillsnap.photos.intake import InferencePreprocessor
from pillsnap.photos.unified import UnifiedPreprocessor, unified_preprocessor

GOLDEN = Path(__file__).resolve().parents[1] / "examples" / "preprocessing"
SYNTH = dict(drugs=4, photos=12, combos=4, seed=42, width=160, height=208)
TINY = (
    "data.source=synthetic",
    "data.progressive_validation.current_stage=0",
    "data.progressive_validation.stage_0.max_samples=null",
    "train.classification.backbone=test_resnet",
    "train.classification.pretrained=false",
    "data.classification.img_size=64",
    "train.num_threads=1",
    "dataloader.num_workers=0",
    "evaluation.latency_warmup=1",
    "evaluation.latency_runs=2",
    "evaluation.min_eval_samples=12",
    "export.compare_photos=4",
    "export.compare_detector_photos=2",
    *(f"synth.{k}={v}" for k, v in SYNTH.items()),
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "An exported narrow run with untrained weights, and its configuration."
    root = tmp_path_factory.mktemp("narrow") / "run"
    root.mkdir()
    given = (*TINY, f"paths.exp_dir={json.dumps(str(root))}")
    cfg = load_config("narrow", given)
    job = ExportJob(run_dir=str(root), config="narrow", overrides=given)
    job.smoke(RunFolder(root, "export"), cfg)
    (root / "checkpoints" / "detector" / "best.pt").unlink()  # the narrow family has none
    cfg = load_config("narrow", (*given, f"paths.root={json.dumps(str(root / 'delivery'))}"))
    job.run()
    return root, cfg


class Seen:
    "A classifier that keeps what it was shown."

    def __init__(self, inner):
        self.inner, self.size, self.shown = inner, inner.size, []

    def outputs(self, x):
        self.shown.append(x)
        return self.inner.outputs(x)

    def logits(self, x):
        return self.outputs(x)[0]


@pytest.mark.spec("NM1", "NM2", "BX18")
def test_training_evaluation_and_the_bundle_show_the_network_the_same_numbers(exported):
    "Of one photo: the validation set's tensor, the evaluator's view, the bundle's input and the definition."
    from dataclasses import replace

    root, cfg = exported
    data, unified = load_split_data(root, 0), unified_preprocessor(cfg)
    rows = data.val[data.val["kind"] == "single"].head(3)
    val = classification_set(rows, data, cfg)
    bundle = load_bundle(root, device="cpu").pipeline()
    seen = Seen(bundle.classifier)
    answering = replace(bundle, classifier=seen)
    evaluator = load_evaluator(root, data, cfg.data, "cpu", unified=unified)
    for i, path in enumerate(rows["path"]):
        image = open_image_safely(data.root / path)["image"]
        defined = normalise(U._by_numpy(centred(image), 64, 2.0, 8)[None])
        assert not np.array_equal(defined, normalise(whole_view(image, 64)[None]))  # the test can tell
        assert np.array_equal(unified(image), defined[0])
        assert np.allclose(val[i]["image"].numpy(), defined[0], atol=1e-6)
        assert np.array_equal(normalise(evaluator.pipeline.views(image, "single").images[0][None]), defined)
        answering.predict(data.root / path)
        assert np.array_equal(seen.shown[-1], defined)


def centred(image):
    side = min(image.shape[:2])
    y, x = ((n - side) // 2 for n in image.shape[:2])
    return image[y : y + side, x : x + side]


@pytest.mark.spec("NM1")
def test_training_windows_are_cut_from_the_served_picture(exported):
    root, cfg = exported
    data = load_split_data(root, 0)
    train = classification_set(data.train[data.train["kind"] == "single"], data, cfg, train=True)
    image = open_image_safely(data.root / train.photo(0).path)["image"]
    views = train.draw_views([0])
    views.windows, views.flips = np.array([[0, 0, 1, 1.0]]), np.array([False])
    out = np.empty((1, 64, 64, 3), np.uint8)
    assert train.fetch(views, out) == [None]
    assert np.array_equal(out[0], UnifiedPreprocessor(64).pixels(image))
    train.source = MemorySource(train.source, lru=SizedLRUCache(10**6))  # the same from a kept canvas
    for _ in range(2):
        out[:] = 0
        assert train.fetch(views, out) == [None] and np.array_equal(out[0], UnifiedPreprocessor(64).pixels(image))


@pytest.mark.spec("NM1", "BX18")
def test_the_bundle_names_each_step_outside_its_graph(exported):
    root, cfg = exported
    said = read_json(root / "export" / "bundle.json")["preprocessing"]
    assert said["unified"] == unified_preprocessor(cfg).get_config() and said["unified"]["version"] == "1.0.0"
    assert said["outside_graph"] == ["upright", "center_crop", "resize", "clahe", "normalise", "chw"]
    assert said["inside_graph"] == [] and said["input"]["shape"] == ["batch", 3, 64, 64]
    assert not (root / "export" / "classifier_uint8.onnx").exists()  # its graph could not hold CLAHE
    assert read_json(root / "export" / "bundle.json")["classifier_uint8"] is None


@pytest.mark.spec("NM1")
@pytest.mark.parametrize("change", [{"version": "0.9.0"}, {"interpolation": "cubic"}, {"clahe_clip_limit": 3.0}, None])
def test_a_bundle_of_another_preprocessing_is_refused(exported, tmp_path, change):
    import shutil

    root, _ = exported
    shutil.copytree(root / "export", tmp_path / "export")
    path = tmp_path / "export" / "bundle.json"
    meta = read_json(path)
    if change is None:
        del meta["preprocessing"]["unified"]
    else:
        meta["preprocessing"]["unified"] |= change
    del meta["digest"]
    save_json({**meta, "digest": content_digest(meta)}, path)
    with pytest.raises(PillsnapError, match="preprocessing"):
        load_bundle(tmp_path, device="cpu")


@pytest.mark.spec("NM1")
def test_the_definition_equals_opencv_without_opencv(monkeypatch):
    "Every step, on photos of odd sizes; then again as on a machine without OpenCV."
    rng = np.random.default_rng(5)
    unified = UnifiedPreprocessor()
    for h, w in ((700, 513), (64, 97), (1024, 1024)):
        image = cv2.GaussianBlur(rng.integers(0, 256, (h, w, 3), dtype=np.uint8), (9, 9), 0)
        square = cv2.resize(np.ascontiguousarray(centred(image)), (512, 512), interpolation=cv2.INTER_LINEAR)
        lab = cv2.cvtColor(square, cv2.COLOR_RGB2LAB)
        lab[..., 0] = cv2.createCLAHE(2.0, (8, 8)).apply(np.ascontiguousarray(lab[..., 0]))
        expected = cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)
        assert np.array_equal(unified.pixels(image), expected)
        with monkeypatch.context() as m:
            m.setattr(U, "_opencv", lambda: None)
            assert np.array_equal(unified.pixels(image), expected)


def test_an_opencv_that_differs_is_not_used(monkeypatch):
    U._opencv.cache_clear()
    real = cv2.cvtColor
    monkeypatch.setattr(cv2, "cvtColor", lambda img, code: np.minimum(real(img, code), 254))
    assert U._opencv() is None
    monkeypatch.undo()
    U._opencv.cache_clear()
    assert U._opencv() is cv2


def test_a_pack_is_refused(exported, monkeypatch):
    "Before one is built."
    monkeypatch.delattr("pillsnap.dataset.sources._open_pack")
    root, cfg = exported
    tree = cfg.to_dict()
    tree["dataloader"]["source"] = "pack"
    data = load_split_data(root, 0)
    with pytest.raises(PillsnapError, match="a pack holds scaled photos"):
        classification_set(data.val, data, type(cfg).model_validate(tree))


@pytest.mark.spec("X60")
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_exif_orientation_gives_the_same_input(tmp_path, turn):
    rng = np.random.default_rng(0)
    image = Image.fromarray(cv2.resize(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8), (70, 90)))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposes that undo each orientation
    stored = image if turn == 1 else image.transpose(Image.Transpose(back[turn]))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    opened = open_image_safely(tmp_path / "a.png")["image"]
    assert np.array_equal(UnifiedPreprocessor(64)(opened), UnifiedPreprocessor(64)(np.asarray(image)))


# ---- golden vectors


@pytest.mark.spec("BX18", "NM2", "X60")
def test_the_committed_golden_vectors_are_what_this_version_makes(monkeypatch):
    "To the last bit, with OpenCV and without."
    server = InferencePreprocessor()
    assert [r.verdict for r in check_golden(server.prepare_for_model, GOLDEN)] == ["exact"] * 13
    monkeypatch.setattr(U, "_opencv", lambda: None)
    assert [r.verdict for r in check_golden(server.prepare_for_model, GOLDEN)] == ["exact"] * 13
    golden = read_json(GOLDEN / "golden.json")
    assert golden["config"] == UnifiedPreprocessor().get_config()
    assert {p["file"] for p in golden["photos"]} >= {f"exif_{k}.png" for k in range(1, 9)}


@pytest.mark.spec("BX18")
def test_the_check_of_any_program():
    "A program that writes zeros fails on every photo; one of another length is named."

    def check(command):
        words = [sys.executable, str(GOLDEN / "check.py"), "--command", command]
        return subprocess.run(words, capture_output=True, text=True)

    zeros = check(f"head -c {4 * 3 * 512 * 512} /dev/zero")
    assert zeros.returncode == 1 and zeros.stdout.count("fails") == 13
    short = check("head -c 400 /dev/zero")
    assert short.returncode == 1 and "the tensor has 100 numbers" in short.stderr


# ---- studio and real photos


@pytest.fixture(scope="module")
def mixed(exported, tmp_path_factory):
    "A run whose conversion mixed the rendered delivery with phone photos, and its split."
    from pillsnap.dataset.conversion import ConversionJob
    from pillsnap.dataset.splits import SplitsJob

    delivered = exported[0] / "delivery"
    home = tmp_path_factory.mktemp("mix")
    phone, run = home / "phone", home / "run"
    rng = np.random.default_rng(3)
    drugs = sorted(read_manifest(exported[0] / "manifest.csv")[1]["class_map"]["keys"])
    for drug, captures in zip(drugs, (20, 14, 2)):
        (phone / drug).mkdir(parents=True)
        for i in range(captures):
            picture = cv2.resize(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8), (90, 120))
            for k in range(2):
                Image.fromarray(picture).save(phone / drug / f"shot{i}_{k}.jpg", quality=95 - k)
    given = (f"paths.root={json.dumps(str(delivered))}", f"narrow.real_photos={json.dumps(str(phone))}", *TINY)
    given += ("narrow.least_photos=10",)
    ConversionJob(run_dir=str(run), config="narrow", overrides=given).run()
    SplitsJob(run_dir=str(run), config="narrow", overrides=given, stage_n=0, near_duplicates=False).run()
    return run, drugs, load_split_data(run, 0)


@pytest.mark.spec("DM16", "DM17", "X54")
def test_the_mix_is_three_to_seven_and_says_where_it_is_not(mixed):
    run, drugs, _ = mixed
    stats = read_json(run / "narrow_dataset" / "integration_stats.json")
    one = stats["per_class"]
    assert [(one[k]["studio"], one[k]["real"]) for k in drugs] == [(12, 28), (12, 28), (6, 4), (10, 0)]
    assert [one[k]["warnings"] for k in drugs[:2]] == [[], []] and one[drugs[0]]["studio_share"] == 0.3
    assert one[drugs[2]]["warnings"] == ["studio share 0.60, not 0.30"]  # what was taken, not what was asked for
    assert one[drugs[3]]["warnings"] == ["studio share 1.00, not 0.30"]
    assert (stats["total_studio"], stats["total_real"], stats["total_combined"]) == (40, 60, 100)
    studio = {p.parent.name for p in (run / "narrow_dataset" / "studio").glob("*/*") if p.is_symlink()}
    assert studio == set(drugs)
    for p in (run / "narrow_dataset" / "combined").glob("*/*"):
        assert p.is_symlink() == p.name.startswith("studio_")


@pytest.mark.spec("DM17")
def test_no_capture_of_a_real_photo_is_on_two_sides_of_the_split(mixed):
    run, drugs, data = mixed
    parts = {"train": data.train, "val": data.val, "eval_set": data.eval_set}
    shots = [{p.rpartition("_")[0] for p in d.loc[d["domain"] == "real", "path"]} for d in parts.values()]
    assert all(shots) and not (shots[0] & shots[1] or shots[0] & shots[2])
    assert {d for part in parts.values() for d in part["domain"]} == {"studio", "real"}
    assert data.header["source"] == "synthetic"  # rendered photos in it: never a figure of real ones
    for row in data.train.drop_duplicates("domain").itertuples():
        assert "image" in open_image_safely(data.root / row.path)


# ---- targets


@pytest.mark.spec("NM10", "NM11", "NM12")
def test_the_evaluation_and_the_export_write_the_targets(exported, tmp_path):
    "The evaluation knows neither time nor size; the export fills them in. Rendered photos are never real ones."
    import shutil

    from pillsnap.deployment.export import _narrow_note
    from pillsnap.evaluation.evaluation import EvaluationJob

    root, given = tmp_path / "run", tuple(f for f in TINY if not f.startswith("evaluation.latency"))
    shutil.copytree(exported[0], root)
    given += ("evaluation.latency_warmup=0", "evaluation.latency_runs=1", "evaluation.objects=0")
    given += (f"paths.exp_dir={json.dumps(str(root))}", f"paths.root={json.dumps(str(root / 'delivery'))}")
    kept = read_json(root / "reports" / "export.json")
    (root / "reports" / "export.json").unlink()
    result = EvaluationJob(run_dir=str(root), config="narrow", overrides=given, user_choice="1").run()
    told = read_json(root / "reports" / "narrow_targets.json")
    assert [r["figure"].split()[0] for r in told["rows"]] == ["top-1", "top-5", "top-1", "ms", "MB"]
    assert any(n.startswith("narrow targets:") for n in result.notes)
    assert [r["verdict"] for r in told["rows"][2:]] == ["NOT_MEASURED"] * 3
    failed = (root / "reports" / "failure_list.csv").read_text().splitlines()
    assert len(failed) - 1 == told["failures"] > 0  # untrained weights
    save_json(kept, root / "reports" / "export.json")
    assert "MB of classifier.onnx" in _narrow_note(root)[0]
    rows = read_json(root / "reports" / "narrow_targets.json")["rows"]
    assert rows[4]["value"] == (root / "export" / "classifier.onnx").stat().st_size / 1e6 and rows[4]["verdict"] == "GO"
    assert rows[3]["verdict"] == "NOT_MEASURED" and "NOT_COMPARABLE" in rows[3]["note"]


@pytest.mark.spec("NM10")
def test_studio_photos_and_rendered_ones_are_no_real_ones(tmp_path):
    import pandas as pd

    from pillsnap.core.records import Provenance
    from pillsnap.evaluation.narrowtargets import narrow_records, narrow_verdicts

    def real_row(data, domains):
        prov = Provenance(data, "d" * 64, "c" * 64)
        metrics = {k: prov.metric(k, 1.0, 4, 1.0).to_dict() for k in ("accuracy", "top5")}
        (tmp_path / "artifacts" / "stage1").mkdir(parents=True, exist_ok=True)
        save_json({"stage": 1, "metrics": metrics}, tmp_path / "reports" / "evaluation.json")
        table = pd.DataFrame(dict(path=list("abcd"), group=list("wxyz"), true=list("AABB"), answered=list("AABA")))
        table.assign(part="clean").to_csv(tmp_path / "reports" / "predictions_single.csv", index=False)
        eval_set = table.assign(domain=domains)
        eval_set.to_csv(tmp_path / "artifacts" / "stage1" / "manifest_eval_set.csv", index=False)
        return narrow_verdicts(narrow_records(tmp_path))[2]

    some = real_row("other:phones", ["real", "studio", "real", "real"])
    assert (some.n, some.verdict) == (3, "NO_GO") and abs(some.value - 2 / 3) < 1e-9
    assert real_row("other:phones", ["studio"] * 4).verdict == "NOT_MEASURED"
    assert real_row("synthetic", ["real"] * 4).verdict == "NOT_MEASURED"


@pytest.mark.spec("NM1", "NM12")
def test_the_demo_preset_is_of_the_family():
    "Another size and network, the family's steps and augmentation; the declared preprocessing is what is applied."
    from pillsnap.dataset.narrow import preprocessing_applied

    demo, narrow = load_config("narrow_demo"), load_config("narrow")
    size = demo.data.classification.img_size
    assert unified_preprocessor(demo) == unified_preprocessor(narrow).sized(size)
    assert all(i["applied"] for i in preprocessing_applied(demo.narrow.preprocessing, size).values())
    assert demo.data.augment.classification == narrow.data.augment.classification
    assert demo.data.source == "synthetic" and demo.data.progressive_validation.current_stage == 0


@pytest.mark.spec("NM4")
def test_the_gateway_and_the_server_share_the_limit_of_a_photo():
    code = (
        "from pillsnap.photos import intake\n"
        "intake.ImageValidator.most_kilobytes = 7\n"
        "from pillsnap.deployment.serversettings import ServerLimits\n"
        "print(ServerLimits().photo_bytes(narrow=True))"
    )
    root = Path(__file__).resolve().parents[1]
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert told.stdout.split() == [str(7 * 1024)]


def test_korean_names_are_one_name_however_they_are_composed(tmp_path):
    from pillsnap.dataset.families import photo_id
    from pillsnap.dataset.narrow import class_mapping, read_drug_list, training_weights

    apart, composed = (unicodedata.normalize(form, "타이레놀") for form in ("NFD", "NFC"))
    listed = [dict(kcode=apart, drug_name="x", training_config=dict(weight=3.0)), dict(kcode="K-000002")]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    drugs = read_drug_list(tmp_path / "list.json")
    weights = training_weights(drugs, [composed, "K-000002"])
    assert weights[0] == 3 * weights[1] and composed in json.dumps(class_mapping(drugs, [composed]), ensure_ascii=False)
    assert photo_id(f"a/{apart}_1.jpg") == photo_id(f"b/{composed}_2.jpg") == composed
