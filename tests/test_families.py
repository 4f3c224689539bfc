"""Three families, one engine: each preset trains a tiny network on synthetic pills and reaches a stated figure."""

import pytest
import torch

from pillsnap.core.checkpoints import load_ckpt
from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import read_json, save_json
from pillsnap.core.jobs import RunFolder, read_record
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.dataset.splits import SplitsJob, smoke_splits

SYNTH = dict(drugs=6, photos=48, combos=4, seed=42, width=160, height=208)
# Only what a CPU needs: a small network, small photos, few epochs, a rate for few steps. All else is the preset's.
TINY = (
    "data.source=synthetic",
    "data.progressive_validation.current_stage=0",
    "data.progressive_validation.stage_0.max_samples=null",
    "retrieval.min_image_size=64",
    "train.classification.backbone=test_resnet",
    "train.classification.pretrained=false",
    "data.classification.img_size=48",
    "train.classification.batch_size=16",
    "train.classification.amp_dtype=fp32",
    "train.classification.lr=0.003",
    "train.num_threads=1",
    "dataloader.num_workers=0",
    "dataloader.ram_optimization.cache_policy=hotset",
    *(f"synth.{k}={v}" for k, v in SYNTH.items()),
)


@pytest.fixture(scope="module")
def pills(tmp_path_factory):
    "6 drugs with 48 small photos each. Read only."
    from pillsnap.synth.writer import write_delivery

    out = tmp_path_factory.mktemp("families") / "aihub"
    write_delivery(out, **SYNTH, workers=2, progress=False)
    return out


def split_for(family, pills, root, *overrides):
    "A run folder of a family, converted and split, and the overrides that belong to it."
    root.mkdir()
    (root / "delivery").symlink_to(pills)
    given = (*TINY, f"paths.root={root / 'delivery'}", f"paths.exp_dir={root}", *overrides)
    smoke_splits(RunFolder(root, "splits"), load_config(family, given))
    return given


def crossed(stage):
    return set(stage.train["group_id"]) & set(stage.val["group_id"])


def test_two_stage_learns(pills, tmp_path):
    from pillsnap.training.classifier import ClassifierJob

    given = split_for(
        "two_stage",
        pills,
        tmp_path / "run",
        "evaluation.min_eval_samples=6",
        "train.classification.warmup_steps=10",
        "data.augment.classification.randaugment=false",
        "data.augment.classification.hflip=false",
    )
    res = ClassifierJob(run_dir=str(tmp_path / "run"), config="two_stage", overrides=given, epochs=7).run()
    assert [r["view"][:5] for r in res.table] == ["locat", "whole"] and res.table[0]["accuracy"] >= 0.6


@pytest.mark.spec("NM6", "NM7", "NM8", "NM9", "TL19", "X28")
def test_narrow_has_the_settings_of_its_source():
    stated = load_config("narrow")
    c, a = stated.train.classification, stated.data.augment.classification
    assert (c.backbone, c.drop_rate, c.drop_path_rate, c.declared_classes, stated.data.classification.img_size) == (
        "tf_efficientnetv2_s",
        0.3,
        0.2,
        100,
        512,
    )
    assert (
        c.epochs,
        c.warmup_epochs,
        c.warmup_factor,
        c.lr,
        c.min_lr,
        c.weight_decay,
        c.label_smoothing,
        c.grad_clip,
        c.betas,
        c.eps,
        c.scheduler,
        c.batch_size,
    ) == (50, 3, 1e-3, 1e-3, 1e-6, 5e-4, 0.1, 1.0, (0.9, 0.999), 1e-8, "cosine_min_lr", 32)
    assert (c.mixing.mixup, c.mixing.cutmix, c.mixing.cutmix_minmax, c.mixing.prob) == (0.2, 1.0, (0.1, 1.0), 0.5)
    assert (c.saving.every_epochs, c.saving.keep_best, stated.train.step_log_interval, c.early_stopping.monitor) == (
        5,
        3,
        100,
        "top1",
    )
    assert (a.rotation, a.color_jitter, a.erasing, a.crop_scale_min, a.hflip, a.randaugment) == (
        30,
        (0.2, 0.2, 0.2, 0.1),
        0.2,
        0.8,
        False,
        False,
    )


@pytest.mark.spec("NM6", "NM12", "DM15", "TL19")
def test_narrow_learns_as_its_source_states_it(pills, tmp_path):
    from pillsnap.training.classifier import ClassifierJob

    drugs = sorted({p.name for p in (pills / "data" / "train" / "images" / "single").glob("*/K-*")})
    top = save_json(
        {
            "drugs": [
                dict(kcode=k, drug_name=f"약 {i}", training_config={"weight": 1.0 + (i == 0)})
                for i, k in enumerate(drugs[:5])
            ]
        },
        tmp_path / "top_100_drugs.json",
    )
    # no clean photos: the few photos are divided 80/10/10, as the source divides them
    given = split_for("narrow", pills, tmp_path / "run", f"narrow.drug_list={top}", "evaluation.min_eval_samples=0")
    stage = load_split_data(tmp_path / "run", 0)
    assert list(stage.class_map) == drugs[:5] and not crossed(stage)
    job = ClassifierJob(run_dir=str(tmp_path / "run"), config="narrow", overrides=given, epochs=12)
    res = job.run()
    log = (tmp_path / "run" / "logs" / "pillsnap.classifier.log").read_text(encoding="utf-8")
    assert "training weights of top_100_drugs.json, 1 to 2" in log and "100 declared" in log
    assert [r["view"] for r in res.table] == ["whole photo (single)"] and res.table[0]["accuracy"] >= 0.5
    rows = read_json(tmp_path / "run" / "reports" / "metrics.json")["history"]
    assert len(rows) == 12 and all({"acc", "top1", "top5", "macro_f1"} <= set(r["classification"]) for r in rows)
    assert (tmp_path / "run" / "reports" / "classifier_curves.png").stat().st_size > 10_000


@pytest.mark.spec("RT2", "RT3", "RT8", "RT13", "SP9", "X32")
def test_retrieval_learns_stops_and_goes_on(pills, tmp_path):
    from pillsnap.models.factory import load_classifier
    from pillsnap.models.neighbours import embed_photos, recall_at_k
    from pillsnap.training.retrieval import RetrievalJob, recall_callback

    root = tmp_path / "run"
    without_clean = "evaluation.min_eval_samples=0"  # the few photos are divided 70/15/15, as the source divides them
    given = split_for(
        "retrieval", pills, root, "retrieval.embedding_dim=64", "retrieval.warmup_epochs=2", without_clean
    )
    stage, cfg = load_split_data(root, 0), load_config("retrieval", given)
    assert not crossed(stage)
    res = RetrievalJob(run_dir=str(root), config="retrieval", overrides=given, epochs=8).run()
    log = (root / "logs" / "pillsnap.retrieval.log").read_text(encoding="utf-8")
    for line in (
        "sampler: 6 classes x 4 photos in a batch, 24 photos a step",
        "margin: 0 radians from epoch 1",
        "margin: 0.5 radians from epoch 3",
        "backbone: trained from here on",
        "arcface_s=48 retrieval.arcface_m_finetune=0.3 is advised",
        "cudnn.benchmark: on, every batch is 48 px",
    ):
        assert log.count(line) == 1, line
    assert torch.backends.cudnn.benchmark
    rows = load_ckpt(root / "checkpoints" / "retrieval" / "last.pt")["history"]
    recall = [r["classification"]["recall@1"] for r in rows]
    loaded = load_classifier(root / "checkpoints" / "retrieval" / "best.pt", stage.class_map)
    model, kept = loaded.model, loaded.checkpoint
    assert kept["best_metric"] == max(recall) == res.table[0]["value"] >= 0.7 and kept["head"] == {
        "dim": 64,
        "scale": 64.0,
    }
    before = recall_callback(stage, cfg)
    untrained = recall_at_k(embed_photos(fresh(model), before.gallery), embed_photos(fresh(model), before.queries))
    assert res.table[0]["value"] > untrained["recall@1"] + 0.1, "colours alone already give a random network something"


def fresh(model):
    "The same network before it learned."
    import timm

    from pillsnap.models.factory import CosineClassifier

    torch.manual_seed(0)
    return CosineClassifier(
        timm.create_model("test_resnet", num_classes=2), model.directions.out_features, model.neck[0].out_features
    )


def run_until_killed(job, monkeypatch):
    "Run a retrieval job that is interrupted at the end of its second epoch."
    from fastai.callback.core import Callback

    from pillsnap.training import retrieval

    class Kill(Callback):
        order = 99

        def after_epoch(self):
            if self.epoch == 1:
                raise KeyboardInterrupt

    train = retrieval.train_classification_stage
    monkeypatch.setattr(
        retrieval, "train_classification_stage", lambda *a, cbs=(), **k: train(*a, cbs=[*cbs, Kill()], **k)
    )
    with pytest.raises(KeyboardInterrupt):
        job.run()
    monkeypatch.undo()


@pytest.mark.spec("RT8", "X73")
def test_retrieval_goes_on_where_it_was_killed(pills, tmp_path, monkeypatch):
    "The same command after an interruption ends where an undisturbed run ends; another margin is refused."
    from pillsnap.training.retrieval import RetrievalJob

    tiny = (
        "data.max_samples=72",
        "retrieval.embedding_dim=16",
        "retrieval.warmup_epochs=1",
        "data.classification.img_size=32",
    )
    ends = {}
    for name in ("straight", "killed"):
        given = split_for("retrieval", pills, tmp_path / name, *tiny)
        job = RetrievalJob(run_dir=str(tmp_path / name), config="retrieval", overrides=given, epochs=3)
        last = tmp_path / name / "checkpoints" / "retrieval" / "last.pt"
        if name == "killed":
            run_until_killed(job, monkeypatch)
            assert read_record(tmp_path / name, "retrieval")["status"] == "interrupted"
            last.rename(last.with_name("latest_model.pt"))  # the name its source gives it (X76)
        job.run()
        ends[name] = load_ckpt(last)
    assert ends["killed"]["epoch"] == 3 and [r["classification"]["recall@1"] for r in ends["killed"]["history"]] == [
        r["classification"]["recall@1"] for r in ends["straight"]["history"]
    ]
    assert all(torch.equal(v, ends["straight"]["model_state"][k]) for k, v in ends["killed"]["model_state"].items())
    other = RetrievalJob(
        run_dir=str(tmp_path / "killed"),
        config="retrieval",
        overrides=(*given, "retrieval.arcface_m_finetune=0.3", "train.resume=last"),
        epochs=3,
    )
    with pytest.raises(PillsnapError, match="arcface_m_finetune: 0.5 -> 0.3"):
        other.run()


@pytest.mark.spec("RT6", "RT8")
def test_retrieval_goes_on_on_another_card(pills, tmp_path, monkeypatch):
    """Begun on a card whose table says four batches a step, gone on with on a CPU, where nothing says so: still
    four, and a line about it."""
    from fastai.callback.core import Callback

    from pillsnap.training import retrieval

    class Kill(Callback):
        order = 99

        def after_epoch(self):
            raise KeyboardInterrupt

    given = split_for(
        "retrieval",
        pills,
        tmp_path / "run",
        "data.max_samples=72",
        "retrieval.embedding_dim=16",
        "retrieval.warmup_epochs=1",
        "data.classification.img_size=32",
    )
    job = retrieval.RetrievalJob(run_dir=str(tmp_path / "run"), config="retrieval", overrides=given, epochs=2)
    train = retrieval.train_classification_stage
    monkeypatch.setattr(retrieval, "current_gpu", lambda: retrieval.Gpu("Tesla T4", 16, False))
    monkeypatch.setattr(
        retrieval, "train_classification_stage", lambda *a, cbs=(), **k: train(*a, cbs=[*cbs, Kill()], **k)
    )
    with pytest.raises(KeyboardInterrupt):
        job.run()
    monkeypatch.undo()
    job.run()
    last, log = (
        load_ckpt(tmp_path / "run" / "checkpoints" / "retrieval" / "last.pt"),
        (tmp_path / "run" / "logs" / "pillsnap.retrieval.log").read_text(encoding="utf-8"),
    )
    assert last["epoch"] == 2 and last["config_snapshot"]["train"]["classification"]["grad_accum_steps"] == 4
    assert (
        log.count(
            "resume: 4 batches per step and precision fp32, as the run began; this machine alone would take 1 and fp32"
        )
        == 1
    )


@pytest.mark.spec("SP9", "RT1")
def test_a_folder_of_classes_trains_too(tmp_path):
    "R's own data: one folder per class, {ID}_{sequence}.jpg, no annotation at all."
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for c, colour in (("가", (200, 60, 60)), ("나", (60, 200, 60)), ("다", (60, 60, 200))):
        (tmp_path / "data" / c).mkdir(parents=True)
        for i in range(8):
            for s in range(2):
                Image.fromarray(np.clip(rng.normal(colour, 25, (40, 48, 3)), 0, 255).astype("uint8")).save(
                    tmp_path / "data" / c / f"{c}{i}_{s}.jpg"
                )
    from pillsnap.cli import pipeline_of
    from pillsnap.training.retrieval import RetrievalJob

    given = (
        *(o for o in TINY if not o.startswith(("data.source", "retrieval.min"))),
        "retrieval.min_image_size=32",
        "data.classification.img_size=32",
        "retrieval.embedding_dim=8",
        "retrieval.warmup_epochs=1",
        f"paths.root={tmp_path / 'data'}",
        f"paths.exp_dir={tmp_path / 'run'}",
    )
    jobs = ["splits", "retrieval", "evaluation", "export"]
    assert [s.name for s in pipeline_of(load_config("retrieval", given))] == jobs
    SplitsJob(
        run_dir=str(tmp_path / "run"), config="retrieval", overrides=given, stage_n=0, near_duplicates=False
    ).run()
    res = RetrievalJob(run_dir=str(tmp_path / "run"), config="retrieval", overrides=given, epochs=2).run()
    assert res.table[0]["value"] == 1.0 and {"가", "나", "다"} == set(load_split_data(tmp_path / "run", 0).class_map)


def test_the_retrieval_job_refuses_another_family(pills, tmp_path):
    from pillsnap.training.retrieval import RetrievalJob

    given = split_for("two_stage", pills, tmp_path / "run")
    with pytest.raises(PillsnapError, match="--config retrieval"):
        RetrievalJob(run_dir=str(tmp_path / "run"), config="two_stage", overrides=given).run()


@pytest.mark.parametrize("family", ["narrow", "retrieval"])
def test_no_clock_of_another_family_ends_the_run(family):
    "Stage 1 of two_stage stops after two hours (SPEC SG7); fifty epochs of these take longer."
    stage = load_config(family).data.progressive_validation.stage()
    assert stage.time_limit_hours is None and stage.max_samples is None and not stage.allow_success_on_time_cap


@pytest.mark.spec("RT2", "X53")
def test_a_margin_is_never_mixed():
    with pytest.raises(PillsnapError, match="ArcFace"):
        load_config("retrieval", ["train.classification.mixing.mixup=0.2"])
