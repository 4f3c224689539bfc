"`Pipeline.predict`: the mode is what was asked for, whatever is in the photo (SPEC SV4, X39)."

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import validate

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.delivery.classmap import ClassMap
from pillsnap.models.pipeline import (
    ANSWERS,
    BADGE,
    LOW_CONFIDENCE,
    MODES,
    Pipeline,
    Thresholds,
    answer_schema,
    class_probabilities,
    detect,
)

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("K-000001", "K-000002", "K-000003", "K-000004", "K-000005", "K-000006")
WORLD = ClassMap(KEYS)


class FixedClassifier:
    "The same logits for every view; remembers the views."

    size = 32

    def __init__(self, logits):
        self.row, self.seen = np.asarray(logits, np.float32), []

    def logits(self, x):
        self.seen.append(x)
        return np.repeat(self.row[None], len(x), 0)


class FixedDetector:
    "The same raw boxes for every photo; counts the calls."

    size = 64

    def __init__(self, boxes):
        self.boxes, self.calls = boxes, 0

    def raw(self, x):
        self.calls += 1
        return np.array(self.boxes, np.float32).reshape(-1, 5).T[None]


def sure(k, of=6):
    return [9.0 if i == k else 0.0 for i in range(of)]


@pytest.mark.spec("SV4")
def test_an_answer_says_which_branch_ran(monkeypatch):
    "mode_used comes from the code that made the views; the request is not copied into it."
    photo = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    det = FixedDetector([(32, 32, 20, 20, 0.9)])
    pipeline = Pipeline(FixedClassifier(sure(0)), WORLD, det, Thresholds(max_det=9))
    made = {m: pipeline.views(photo, m) for m in MODES}
    assert {m: v.mode_used for m, v in made.items()} == {m: m for m in MODES} and det.calls == 1
    assert made["single"].boxes == [None] and len(made["combo"].boxes) == 1
    monkeypatch.setattr(Pipeline, "views", lambda *a: made["combo"])
    answer = pipeline.predict(photo, "single")
    assert (answer["mode_requested"], answer["mode_used"]) == ("single", "combo")


def test_a_detector_is_asked_about_four_views_where_that_is_configured():
    "And about none in single mode, where the classifier sees the whole photo."
    photo = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    data = load_config("demo", ["data.detection.tta=true"]).data
    det = FixedDetector([(32, 32, 20, 20, 0.9)])
    pipeline = Pipeline(FixedClassifier(sure(0)), WORLD, det, Thresholds.configured(data))
    pipeline.predict(photo, "single")
    assert det.calls == 0
    answer = pipeline.predict(photo, "combo")
    assert det.calls == 4
    # the same box in the input is the same box of the photo in the first two views, and another one in the smaller two
    assert [round(i["box_confidence"], 3) for i in answer["items"]] == [0.45]
    assert answer["items"][0]["box"] == [14.0, 22.0, 34.0, 42.0]
    plain = Pipeline(FixedClassifier(sure(0)), WORLD, det, Thresholds.configured(load_config("demo").data))
    plain.predict(photo, "combo")
    assert det.calls == 5


photos = st.builds(
    lambda w, h, seed: np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8),
    st.integers(32, 90),
    st.integers(32, 90),
    st.integers(0, 99),
)
boxes = st.lists(
    st.tuples(st.floats(0, 64), st.floats(0, 64), st.floats(1, 40), st.floats(1, 40), st.floats(0, 1)),
    min_size=1,
    max_size=9,
)
logits = st.lists(st.floats(-8, 8), min_size=6, max_size=6)


@pytest.mark.spec("SV4", "CF6")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    photo=photos,
    mode=st.sampled_from(MODES),
    found=boxes,
    scores=logits,
    count=st.one_of(st.none(), st.integers(0, 12)),
    conf=st.floats(0, 1),
    temperature=st.floats(0.3, 5),
)
def test_mode_is_what_was_asked(  # noqa: PLR0913 - hypothesis gives each by its name
    photo, mode, found, scores, count, conf, temperature
):
    "However many pills a photo hints at and however unsure the classifier is."
    det = FixedDetector(found)
    pipeline = Pipeline(FixedClassifier(scores), WORLD, det, Thresholds(conf=conf), temperature=temperature)
    a = pipeline.predict(photo, mode, box_count=count)
    assert a["mode_used"] == a["mode_requested"] == mode
    assert det.calls == (mode == "combo"), "single must not even look for boxes, combo must"
    assert a["answer"] in ANSWERS and (mode == "combo" or a["answer"] == "drug")
    assert mode == "single" or a["badge"] is None
    validate(json.loads(json.dumps(a, allow_nan=False)), answer_schema())


@pytest.mark.spec("SV4")
@settings(max_examples=60, deadline=None)
@given(mode=st.text(max_size=9).filter(lambda s: s not in MODES))
def test_no_other_mode(mode):
    with pytest.raises(PillsnapError, match="mode"):
        Pipeline(FixedClassifier(sure(0)), WORLD).predict(np.zeros((40, 40, 3), np.uint8), mode)


@pytest.mark.spec("SV4")
def test_auto_is_refused_with_its_reason():
    with pytest.raises(PillsnapError, match="no automatic mode"):
        Pipeline(FixedClassifier(sure(0)), WORLD).predict(np.zeros((40, 40, 3), np.uint8), "auto")


@pytest.mark.spec("SV4")
def test_signature_of_the_source():
    '`predict_pipeline(image, mode="single", conf_threshold=.3)`.'
    import inspect

    from pillsnap.aliases import predict_pipeline

    p = inspect.signature(predict_pipeline).parameters
    assert list(p)[:3] == ["image", "mode", "conf_threshold"]
    assert (p["mode"].default, p["conf_threshold"].default) == ("single", 0.3)
    photo, det = np.zeros((64, 64, 3), np.uint8), FixedDetector([[20, 20, 20, 20, 0.35]])
    parts = dict(classifier=FixedClassifier(sure(2)), class_map=WORLD, detector=det)
    for mode, conf, found in (("single", 0.3, 1), ("combo", 0.3, 1), ("combo", 0.4, 0)):
        a, b = (
            predict_pipeline(photo, mode, conf, **parts),
            Pipeline(**parts, thresholds=Thresholds(conf)).predict(photo, mode),
        )
        assert a | {"timings": 0} == b | {"timings": 0} and len(a["items"]) == found


@pytest.mark.spec("SV4")
def test_combo_without_a_detector_stops():
    with pytest.raises(PillsnapError, match="there is no detector"):
        Pipeline(FixedClassifier(sure(0)), WORLD).predict(np.zeros((40, 40, 3), np.uint8), "combo")


@pytest.mark.spec("SG8")
def test_badge_changes_nothing_else():
    photo, det = np.zeros((64, 64, 3), np.uint8), FixedDetector([[20, 20, 20, 20, 0.9], [45, 45, 18, 18, 0.9]])
    pipeline = Pipeline(FixedClassifier(sure(2)), WORLD, det)
    plain, hinted = pipeline.predict(photo), pipeline.predict(photo, box_count=2)
    assert (plain["badge"], plain["hints"]) == (None, []) and (hinted["badge"], hinted["hints"]) == (
        BADGE,
        ["multi_object_hint"],
    )
    drop = ("badge", "hints", "timings")
    assert {k: v for k, v in plain.items() if k not in drop} == {k: v for k, v in hinted.items() if k not in drop}


@pytest.mark.spec("SG8")
@pytest.mark.parametrize("logits, unsure", [(sure(1), False), ([0.0] * 6, True)])
def test_low_confidence_gets_the_badge(logits, unsure):
    a = Pipeline(FixedClassifier(logits), WORLD).predict(np.zeros((40, 40, 3), np.uint8))
    assert LOW_CONFIDENCE == 0.30 and (a["items"][0]["confidence"] < 0.30) == unsure
    assert (a["badge"] == "combo 권장") == unsure and a["hints"] == ["low_confidence"] * unsure


@pytest.mark.spec("TL11")
def test_combo_threshold_iou_and_limit():
    "conf .3, iou .5, at most 100: the defaults of the pipeline."
    photo = np.zeros((640, 640, 3), np.uint8)

    def count(found, **kw):
        pipeline = Pipeline(FixedClassifier(sure(0)), WORLD, FixedDetector(found), Thresholds(**kw))
        return len(pipeline.predict(photo, "combo")["items"])

    assert count([[10, 10, 8, 8, 0.29], [30, 30, 8, 8, 0.31]]) == 1
    assert count([[10, 10, 8, 8, 0.29], [30, 30, 8, 8, 0.31]], conf=0.2) == 2
    assert count([[20, 20, 10, 10, 0.9], [23, 20, 10, 10, 0.8]]) == 1  # IoU .54
    assert count([[20, 20, 10, 10, 0.9], [24, 20, 10, 10, 0.8]]) == 2  # IoU .43
    assert count([[x, y, 2, 2, 0.9] for x in range(2, 62, 5) for y in range(2, 62, 5)]) == 100


@pytest.mark.spec("TL11")
def test_crops_are_padded_by_a_tenth_and_square():
    "A red square on green: the margin of the crop is a twelfth of its side (.1 of 1.2) on each side."
    photo = np.zeros((320, 320, 3), np.uint8)
    photo[..., 1] = 200
    photo[100:200, 120:220] = (200, 0, 0)
    c = FixedClassifier(sure(0))
    c.size = 120
    Pipeline(c, WORLD, FixedDetector([[34, 30, 20, 20, 0.9]])).predict(photo, "combo")
    red = c.seen[0][0, 0] > 0
    rows = np.flatnonzero(red[60])
    assert red.shape == (120, 120) and abs(rows[0] - 10) <= 1 and abs(rows[-1] - 109) <= 1


@pytest.mark.spec("DT4")
def test_boxes_in_the_grey_margin_are_dropped():
    "A tall photo is letterboxed: what a detector sees in the margin lies outside the photo."
    boxes, scores = detect(FixedDetector([[5, 32, 8, 8, 0.9], [32, 32, 8, 8, 0.8]]), np.zeros((640, 320, 3), np.uint8))
    assert len(boxes) == 1 and scores[0] == pytest.approx(0.8) and np.allclose(boxes[0], [120, 280, 200, 360], atol=1)


def test_temperature_keeps_the_order_and_the_sum():
    v = [np.zeros((32, 32, 3), np.uint8)]
    cold, warm = (class_probabilities(FixedClassifier([1.0, 3.0, 2.0, 0.0, -1.0, 2.5]), v, 6, t)[0] for t in (0.5, 4))
    assert (
        np.argsort(cold).tolist() == np.argsort(warm).tolist()
        and cold.max() > warm.max()
        and cold.sum() == pytest.approx(1)
    )


@pytest.mark.spec("BX8")
def test_another_number_of_drugs_stops():
    with pytest.raises(PillsnapError, match="knows 6 drugs and the class map 5"):
        Pipeline(FixedClassifier(sure(0)), ClassMap(KEYS[:5])).predict(np.zeros((40, 40, 3), np.uint8))


def test_torch_free():
    "The pipeline's module needs neither torch nor anything that brings it."
    import subprocess

    code = (
        "import sys, pillsnap.models.pipeline; print([m for m in ('torch', 'torchvision', 'fastai', 'timm', "
        "'ultralytics', 'matplotlib') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    "A client of the application in this process, with one worker."
    from fastapi.testclient import TestClient

    from pillsnap.deployment.server import create_app
    from pillsnap.deployment.serversettings import ServerSettings

    sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
    from server_parts import KEY, colour_bundle

    folder = tmp_path_factory.mktemp("api")
    (folder / ".env").touch(mode=0o600)
    (folder / ".env").write_text(f"API_KEY={KEY}\n")
    settings = ServerSettings(bundle=colour_bundle(folder / "export"), env_file=folder / ".env", workers=1)
    with TestClient(create_app(settings)) as client:
        client.headers["X-API-Key"] = KEY
        yield client


@pytest.mark.spec("CF6", "SV1")
def test_the_least_that_an_api_does(api):
    "Health without a key; an answer with one; none without."
    from server_parts import pill_photo

    def status(**headers):
        return api.post("/predict", files={"photo": pill_photo()}, headers=headers).status_code

    assert api.get("/health", headers={"X-API-Key": ""}).json()["status"] == "ok"
    answer = api.post("/predict?pipeline=single", files={"photo": pill_photo("K-000001")}).json()
    validate(answer, answer_schema())
    assert answer["items"][0]["kcode"] == "K-000001"
    assert [status(), status(**{"X-API-Key": ""}), status(**{"X-API-Key": "x" * 32})] == [200, 401, 403]


@pytest.mark.spec("CF6", "X40")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mode=st.sampled_from(MODES), name=st.sampled_from(["pipeline", "mode"]), photo=photos)
def test_the_mode_is_what_was_asked_of_the_api(api, mode, name, photo):
    "The same invariant over HTTP, whatever the photo shows."
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(photo).save(out, "PNG")
    told = api.post(f"/predict?{name}={mode}", files={"photo": out.getvalue()})
    if told.status_code == 429:  # the key's rate, which examples of one minute may reach
        return
    assert told.status_code == 200
    assert (told.json()["mode_requested"], told.json()["mode_used"]) == (mode, mode)
