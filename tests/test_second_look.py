"""Single mode looks where the pill is, with one path for training, selection, evaluation and answers."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import validate
from PIL import Image, ImageDraw
from test_memory import Painted, table
from test_smoke_train import split_folder
from test_stop_and_go import CM, net

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config, preset_names
from pillsnap.dataset.datasets import DeliverySource, PackSource, Photo, PillsnapClsDataset
from pillsnap.dataset.focus import StageFocus, locate_photos
from pillsnap.dataset.loaders import build_classification_loaders
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.answers import Evaluator, eval_photos
from pillsnap.models.decision import AnswerRule
from pillsnap.models.pipeline import Pipeline, answer_schema
from pillsnap.photos.caches import View
from pillsnap.photos.images import crop_view, open_image_safely, ssim
from pillsnap.photos.locator import locate
from pillsnap.photos.pack import Pack, build_pack
from pillsnap.synth.catalogue import make_catalogue
from pillsnap.synth.draws import rng_for
from pillsnap.synth.renderer import Shot, photograph, single_pose
from pillsnap.training.learner import Outputs, build_learner
from pillsnap.training.presets import ClassifierSettings
from pillsnap.training.trainer import build_training

CM3 = ClassMap(["K-000001", "K-000002", "K-000003"])


class Pixels:
    "A classifier that answers by the mean of each third of a view, so that another view is another answer."

    size = 32

    def logits(self, x):
        return x.mean((2, 3)).astype(np.float32)


def table_top(pills, noise=0, seed=0):
    "Discs on a grey table, [320, 240, 3]: (x, y, radius) of each."
    im = Image.new("RGB", (240, 320), (150, 150, 150))
    for x, y, r in pills:
        ImageDraw.Draw(im).ellipse([x - r, y - r, x + r, y + r], fill=(200, 60, 60))
    rough = np.random.default_rng(seed).integers(-noise, noise + 1, (320, 240, 3))
    return (np.asarray(im).astype(int) + rough).clip(0, 255).astype(np.uint8)


@pytest.mark.spec("BX3", "X39")
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.booleans(), st.sampled_from(["locator", "off"]))
def test_a_photo_of_several_pills_gets_no_name_in_single_mode(n, ruled, focus):
    "With a rule and without one; where nothing looks for pills, they are not counted. The mode stays."
    rule = AnswerRule("lac", 0.05, (0.99,) * 3) if ruled else None
    pipeline = Pipeline(Pixels(), CM3, rule=rule, focus=focus)
    photo = table_top([(50 + 140 * (k % 2), 60 + 180 * (k // 2), 26) for k in range(n)])
    answer = pipeline.predict(photo, "single")
    several = answer["items"][0]["reason"] == "several_pills"
    assert several == (focus == "locator") and (not several or answer["answer"] == "unknown")
    assert answer["mode_used"] == answer["mode_requested"] == "single"
    assert pipeline.predict(table_top([(120, 160, 30)]), "single")["items"][0]["reason"] != "several_pills"


@pytest.mark.spec("BX3", "X39")
@pytest.mark.parametrize("n", [12, 13, 16, 25])
def test_a_heap_gets_no_name_in_single_mode(n):
    "However many pills lie there, they are several."
    photo = table_top([(40 + 40 * (k % 5), 40 + 60 * (k // 5), 13) for k in range(n)])
    answer = Pipeline(Pixels(), CM3, focus="locator").predict(photo, "single")
    assert (answer["answer"], answer["items"][0]["reason"], answer["view"]) == ("unknown", "several_pills", "whole")
    assert locate(photo).boxes[:, :2].min() >= 0 and (locate(photo).boxes[:, 2:] <= (240, 320)).all()


@pytest.mark.spec("FX2", "SV4")
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 4), st.sampled_from([0, 3, 127]), st.sampled_from(["off", "locator"]), st.none() | st.integers(0, 5)
)
@example(1, 0, "locator", None)
@example(3, 0, "locator", 3)
def test_no_photo_changes_the_mode_and_every_answer_names_its_view(n, noise, focus, counted):
    places = [(60, 80, 26), (170, 90, 24), (70, 230, 28), (175, 235, 22)][:n]
    pipeline = Pipeline(Pixels(), CM, focus=focus)
    answer = pipeline.predict(table_top(places, noise), "single", box_count=counted)
    validate(answer, answer_schema())
    assert (answer["mode_requested"], answer["mode_used"]) == ("single", "single")
    assert (answer["view"] == "crop") == (answer["items"][0]["box"] is not None)
    if focus == "off" or noise == 127:
        assert answer["view"] == "whole"
    elif noise == 0:
        assert answer["view"] == ("crop" if n == 1 else "whole")
        assert ("multi_object_hint" in answer["hints"]) == (n > 1 or (counted or 0) > 1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory, delivery):
    "The split of a small rendered delivery, with its run folder."
    root = tmp_path_factory.mktemp("focus")
    split_folder(root, delivery)
    return SimpleNamespace(
        root=root, data=load_split_data(root, 0), cfg=load_config("smoke", [f"paths.exp_dir={root}"])
    )


@pytest.mark.spec("FX3")
def test_validation_shows_what_the_product_sees(stage):
    _, val_dl, meta = build_classification_loaders(stage.data, stage.cfg)
    assert meta["val_view"] == "focus" and val_dl.dataset.view == "crop"
    seen = torch.cat([x for x, _, _ in val_dl])
    pipeline = Pipeline(Pixels(), stage.data.class_map, focus="locator")
    pipeline.classifier.size = stage.cfg.data.classification.img_size
    evaluator = Evaluator(pipeline, stage.data.root, stage.cfg.data)
    rows = stage.data.val[stage.data.val["kind"] == "single"]
    photos = list(eval_photos(SimpleNamespace(eval_set=rows.assign(split="val", dup_id=""))))
    ours = [pipeline.views(image, "single").images[0] for _, image in evaluator.opened(photos, "photos")]
    by_path = {p.path: view for p, view in zip(photos, ours)}
    for path, x in zip(val_dl.dataset.paths, seen):
        rgb = x.permute(1, 2, 0) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
        got = (rgb.clamp(0, 1) * 255).round().byte().numpy()
        assert np.abs(got.astype(int) - by_path[path]).max() <= 1, path  # JPEG is not asked: the photos are PNG


@pytest.mark.spec("FX3")
def test_training_crops_err_as_the_locator_does(stage, monkeypatch):
    asked = []
    monkeypatch.setattr(StageFocus, "errors", lambda self: asked.append(self) or np.full((3, 4), 0.25, np.float32))
    train_dl, _, _ = build_classification_loaders(stage.data, stage.cfg)
    assert asked and torch.equal(train_dl.dataset.errors, torch.full((3, 4), 0.25))
    whole = load_config("smoke", [f"paths.exp_dir={stage.root}", "inference.focus=off"])
    train_dl, val_dl, meta = build_classification_loaders(stage.data, whole)
    assert train_dl.dataset.errors is None and meta["val_view"] == "whole" and val_dl.dataset.view == "whole"


class Coloured(Painted):
    "Photos in the colour of their drug."

    def open(self, photo, view, reduce=1):
        return np.full((64, 64, 3), 80 * (int(photo.path.split(".")[0]) % 3) + 20, np.uint8), None


def relabelled(rows):
    "The same photos, each under the next drug's label."
    keys = list(CM)
    return rows.assign(class_key=[keys[(keys.index(k) + 1) % len(keys)] for k in rows["class_key"]])


@pytest.mark.spec("FX3", "CT14")
def test_an_epoch_that_is_best_by_the_whole_photo_and_worse_by_the_path_is_not_chosen(tmp_path):
    stop = "early_stopping: {monitor: val_loss, mode: min}"
    cfg = load_config("smoke", [f"train.classification={{epochs: 4, lr: 0.02, amp: false, {stop}}}"])
    rows = table(60)

    def loader(rows, train=False):
        return PhotoLoader(PillsnapClsDataset(rows, CM, Coloured(), 16, train, seed=7), 6)

    # what the network learns makes it better by the second view and worse by the first
    views = {"focus": loader(relabelled(rows[:24])), "whole": loader(rows[:24])}
    fixed = dict(config_snapshot=cfg.to_dict(), class_map=CM.to_dict(), backbone="test_resnet", img_size=16)
    learn = build_learner(
        ClassifierSettings.from_config(cfg),
        net(),
        torch.nn.CrossEntropyLoss(),
        loader(rows, True),
        views,
        3,
        fixed=fixed,
        out=Outputs(tmp_path, quiet=True),
    )
    learn.fit(4)
    loss = {v: [r["views"][v]["val_loss"] for r in learn.rows] for v in views}
    best = load_ckpt(tmp_path / "best.pt")["epoch"]
    assert int(np.argmin(loss["whole"])) != int(np.argmin(loss["focus"]))
    assert best == int(np.argmin(loss["focus"])) + 1


@pytest.mark.spec("FX3")
def test_training_validates_by_the_path_first(stage):
    learn, _ = build_training(stage.data, stage.cfg, Outputs(quiet=True))
    assert list(learn.passes) == ["focus", "whole"]


@pytest.fixture(scope="module", params=["png", "jpg"])
def rendered(request, tmp_path_factory):
    "Photos of one pill at the delivery's full size, with true boxes."
    root, rows = tmp_path_factory.mktemp("rendered"), []
    for i, drug in enumerate(make_catalogue(4, 3).drugs[:4]):
        shot, rng = Shot(i % 3, i % 3, 70), rng_for(3, "photo", i)
        image, (extent,) = photograph([(drug, single_pose(0, 40 * i, shot, rng))], shot, rng)
        Image.fromarray(image).save(root / f"{i}.{request.param}", quality=95)
        x0, y0, x1, y1 = (float(v) for v in extent)
        rows.append(
            dict(path=f"{i}.{request.param}", bbox=json.dumps([x0, y0, x1 - x0, y1 - y0]), class_key=f"K-00000{i}")
        )
    return SimpleNamespace(root=root, rows=pd.DataFrame(rows))


@pytest.mark.spec("FX4")
@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_a_located_crop_from_the_pack_is_that_of_the_delivery(rendered, tmp_path, codec):
    "At the size of every preset, and cut from the window at full resolution; crops are stored without loss."
    sizes = {load_config(name).data.classification.img_size for name in preset_names()}
    assert {144, 384} <= sizes
    build_pack(rendered.rows, rendered.root, tmp_path / "pack", codec=codec, workers=1, progress=False)
    pack = Pack(tmp_path / "pack")
    located = locate_photos(rendered.rows["path"].tolist(), rendered.root, {})
    assert (located["found"] == 1).all()
    for row in located.itertuples():
        full = open_image_safely(rendered.root / row.path)["image"]
        box = locate(full).boxes[0]
        img, corners = pack.crop(row.path, row.bbox)
        assert corners[2] - corners[0] > 0.9 * (box[2] - box[0]), "cut from the whole photo at half size"
        for size in sizes:
            ours, theirs = crop_view(img, corners, size), crop_view(full, box, size)
            assert ssim(ours, theirs) >= 0.995 and np.array_equal(ours, theirs), (row.path, size)


@pytest.mark.spec("FX4")
@pytest.mark.parametrize("codec", ["jpeg", "raw"])
def test_loaders_serve_the_same_crops_from_pack_and_delivery(rendered, tmp_path, codec):
    "The true box and a located one, as validation, calibration and evaluation read them."
    build_pack(rendered.rows, rendered.root, tmp_path / "pack", codec=codec, workers=1, progress=False)
    located = locate_photos(rendered.rows["path"].tolist(), rendered.root, {})
    for name in preset_names():
        cfg = load_config(name)
        view = View("crop", cfg.data.classification.img_size, cfg.data.classification.crop_padding)
        pack, delivery = PackSource(Pack(tmp_path / "pack"), [view]), DeliverySource(rendered.root)
        for row in (*rendered.rows.itertuples(), *located.itertuples()):
            photo = Photo(row.path, row.bbox, 976, 1280)
            a, b = np.zeros((2, view.size, view.size, 3), np.uint8)
            assert pack.view(photo, view, a) is None and delivery.view(photo, view, b) is None
            assert b.any() and np.array_equal(a, b), (name, row.path)
