"""The configuration tree against the contract's Annex 1, feature sets, and the rules of a refused setting."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pillsnap.core.config import ALIASES, RETIRED, all_keys, load_config, preset_names, resolve_aliases
from pillsnap.core.errors import PillsnapError
from pillsnap.core.settings import active_features, setting

ROOT = Path(__file__).resolve().parents[1]

# Annex 1, key by key: the canonical name and its resolved default in the two_stage family.
ANNEX1 = {
    "project.name": "pillsnap",
    "project.family": "two_stage",
    "paths.root": "./data",
    "data.task": "two_stage",
    "data.pipeline_strategy": "user_controlled",
    "data.default_mode": "single",
    "data.auto_fallback": False,
    "data.extensions": (".jpg", ".jpeg", ".png", ".bmp", ".webp"),
    "data.ignore_hidden": True,
    "data.verify_on_build": True,
    "data.broken_policy": "skip",
    "data.incomplete_combo": "skip",
    "data.grayscale_policy": "rgb",
    "data.rgba_policy": "drop_alpha",
    "data.split_ratio": (0.85, 0.15),
    "data.group_by": "capture",
    "data.test_known_ratio": 0.05,
    "data.test_data_source": "aihub_validation",
    "data.test_usage_policy": "final_evaluation_only",
    "data.max_samples": None,
    "data.detection.img_size": 640,
    "data.detection.conf_threshold": 0.3,
    "data.detection.iou_threshold": 0.5,
    "data.detection.max_detections": 100,
    "data.classification.img_size": 384,
    "data.classification.crop_padding": 0.1,
    "data.progressive_validation.current_stage": 1,
    "data.progressive_validation.stage_1.max_samples": 5000,
    "data.progressive_validation.stage_1.max_classes": 50,
    "data.progressive_validation.stage_1.target_accuracy": 0.78,
    "data.progressive_validation.stage_1.allow_success_on_time_cap": True,
    "data.progressive_validation.stage_1.time_limit_hours": 2,
    "data.progressive_validation.stage_1.min_samples_required": 1000,
    "data.progressive_validation.stage_1.min_class_coverage": 30,
    "data.progressive_validation.stage_2.max_samples": 25000,
    "data.progressive_validation.stage_2.max_classes": 250,
    "data.progressive_validation.stage_2.target_accuracy": 0.82,
    "data.progressive_validation.stage_3.max_samples": 100000,
    "data.progressive_validation.stage_3.max_classes": 1000,
    "data.progressive_validation.stage_3.target_accuracy": 0.85,
    "data.progressive_validation.stage_3.max_latency_ms": 200,
    "data.progressive_validation.stage_4.max_samples": 500000,
    "data.progressive_validation.stage_4.max_classes": 4523,
    "data.progressive_validation.stage_4.target_accuracy": 0.85,
    "data.progressive_validation.stage_4.max_latency_ms": 200,
    "data.augment.detection.randaugment": False,
    "data.augment.detection.mosaic": 0.5,
    "data.augment.detection.mixup": 0.1,
    "data.augment.detection.hflip": True,
    "data.augment.detection.scale": (0.5, 1.5),
    "data.augment.classification.randaugment": True,
    "data.augment.classification.color_jitter": (0.2, 0.2, 0.2, 0.05),
    "data.augment.classification.hflip": True,
    "data.augment.classification.auto_augment": None,
    "data.augment.classification.crop_scale_min": 0.8,
    "data.imbalance.use_class_weights": True,
    "data.imbalance.method": "inv_freq",
    "data.imbalance.beta": 0.9999,
    "data.imbalance.use_weighted_sampler": False,
    "dataloader.num_workers": 8,
    "dataloader.autotune_workers": True,
    "dataloader.pin_memory": True,
    "dataloader.pin_memory_device": "cuda",
    "dataloader.prefetch_factor": 6,
    "dataloader.prefetch_per_stage": {1: 4, 2: 6, 3: 8, 4: 8},
    "dataloader.persistent_workers": True,
    "dataloader.drop_last": True,
    "dataloader.multiprocessing_context": "spawn",
    "dataloader.ram_optimization.cache_policy": "labels_only",
    "dataloader.ram_optimization.cache_labels": True,
    "dataloader.ram_optimization.preload_samples": 0,
    "dataloader.ram_optimization.hotset_size_images": 0,
    "dataloader.ram_optimization.use_lmdb": False,
    "train.seed": 42,
    "train.deterministic": False,
    "train.strategy": "sequential",
    "train.interleave_ratio": (1, 1),
    "train.resume": "auto",
    "train.classification.backbone": "tf_efficientnetv2_s",
    "train.classification.pretrained": "auto",
    "train.classification.epochs": 30,
    "train.classification.lr": 2e-4,
    "train.classification.weight_decay": 1e-4,
    "train.classification.optimizer": "adamw",
    "train.classification.scheduler": "cosine",
    "train.classification.warmup_steps": 500,
    "train.classification.batch_size": 64,
    "train.classification.auto_batch_tune": True,
    "train.classification.auto_batch_max": 64,
    "train.classification.amp": True,
    "train.classification.amp_dtype": "auto",
    "train.classification.tf32": True,
    "train.classification.channels_last": True,
    "train.classification.grad_accum_steps": 1,
    "train.classification.grad_clip": 1.0,
    "train.classification.label_smoothing": 0.1,
    "train.classification.crop_view_prob": 0.5,
    "train.classification.ema.enabled": False,
    "train.classification.ema.decay": 0.9998,
    "train.classification.early_stopping.monitor": "macro_f1",
    "train.classification.early_stopping.mode": "max",
    "train.classification.early_stopping.patience": 7,
    "train.classification.early_stopping.min_delta": 0.0,
    "train.detection.model": "yolo11m",
    "train.detection.epochs": 50,
    "train.detection.auto_batch_tune": True,
    "train.detection.auto_batch_max": 16,
    "train.detection.early_stopping.monitor": "mAP@0.5",
    "train.detection.early_stopping.mode": "max",
    "train.detection.early_stopping.patience": 7,
    "train.auto_batch_vram_headroom": 0.88,
    "train.oom.max_retries": 4,
    "train.oom.max_grad_accum": 8,
    "train.oom.min_batch": 1,
    "train.oom.cooldown_sec": 2,
    "train.oom.escalate_to_fp16": True,
    "train.oom.reset_after_clean_steps": 200,
    "train.oom.wd_scale_mode": "constant",
    "train.stage_overrides": {},
    "train.step_log_interval": 50,
    "train.profile_interval": 50,
    "optimization.torch_compile": "auto",
    "optimization.channels_last": True,
    "optimization.cuda_graphs": False,
    "optimization.grad_checkpointing": False,
    "inference.lazy_load_detector": True,
}


@pytest.mark.spec("CF1")
def test_the_tree_is_annex_1():
    cfg = load_config("two_stage")
    assert {k: setting(cfg, k) for k in ANNEX1} == ANNEX1
    assert set(ANNEX1) <= set(all_keys())


@pytest.mark.spec("SP5")
def test_four_stages_grow():
    p = load_config("two_stage").data.progressive_validation
    assert [(p.stage(n).max_samples, p.stage(n).max_classes) for n in (1, 2, 3, 4)] == [
        (5000, 50),
        (25000, 250),
        (100000, 1000),
        (500000, 4523),
    ]


@pytest.mark.parametrize("preset", preset_names())
def test_presets_hold_only_what_differs_and_resolve(preset):
    cfg = load_config(preset)
    assert cfg.train.oom.max_retries == 4 and cfg.notes == []
    assert "/mnt" not in str(cfg.to_dict()) and not re.search(r"[A-Z]:\\", str(cfg.to_dict()))


@pytest.mark.spec("CF3")
def test_feature_sets_are_cumulative_and_the_presets_use_advanced():
    mvp = ("single_classification", "basic_api", "simple_export")
    advanced = ("combo_detection", "optimization", "monitoring")
    production = ("scaling", "security", "automation")
    sets = {s: active_features(s) for s in ("mvp", "advanced", "production")}
    assert sets == {"mvp": mvp, "advanced": mvp + advanced, "production": mvp + advanced + production}
    assert {load_config(p).project.active_feature_set for p in ("demo", "two_stage")} == {"advanced"}


@pytest.mark.spec("CF3")
def test_mvp_never_imports_the_detector():
    code = (
        "import sys; from pillsnap.cli import PIPELINE, run_pipeline; "
        "run_pipeline(PIPELINE, 'smoke', ['project.active_feature_set=mvp'], sys.argv[1], only='detector');"
        "assert not {'ultralytics', 'pillsnap.training.detector', 'torch'} & set(sys.modules)"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as d:
        r = subprocess.run([sys.executable, "-c", code, d], capture_output=True, text=True)
    assert r.returncode == 0 and "left out" in r.stdout, r.stderr


@pytest.mark.spec("CF8")
@pytest.mark.parametrize("old", sorted(ALIASES))
def test_the_sources_spellings_are_read(old):
    cfg = load_config("two_stage")
    value = {
        "train.ema": "{enabled: true}",
        "train.early_stopping": "{patience: 3}",
        "loss.use_class_weights": "false",
        "train.pretrained": "false",
        "train.scheduler": "onecycle",
        "train.optimizer": "sgd",
        "train.amp": "false",
        "train.tf32": "false",
        "train.amp_dtype": "fp16",
        "train.auto_batch_tune": "false",
        "data.pipeline_mode": "combo",
        "pipeline_mode": "combo",
        "optimization.compile": "none",
        "train.backbone": "resnet18",
        "model.backbone": "resnet18",
        "data.root": "./here",
        "data.detection.coco_json_path": "./here",
        "data.detection.yolo_output_dir": "./there",
        "loss.label_smoothing": "0.2",
        "train.label_smoothing": "0.2",
        "retrieval.image_size": "480",
        "retrieval.scheduler_type": "onecycle",
        "retrieval.crop_scale_min": "0.5",
        "retrieval.plateau_factor": "0.3",
    }.get(old, "3")
    new = load_config("two_stage", [f"{old}={value}"])
    assert new.notes == [f"{old} is read as {ALIASES[old]}"]
    assert setting(new, ALIASES[old]) != setting(cfg, ALIASES[old])


@pytest.mark.spec("CF8")
@pytest.mark.parametrize("old", sorted(RETIRED))
def test_keys_with_nothing_left_to_do_are_accepted_and_said(old):
    cfg = load_config("two_stage", [f"{old}=3"])
    assert len(cfg.notes) == 1 and old in cfg.notes[0] and cfg.digest() == load_config("two_stage").digest()


@pytest.mark.spec("CF1")
@pytest.mark.parametrize(
    "override,said",
    [
        ("train.sead=7", "did you mean train.seed"),
        ("train.clasification.lr=1", "train.classification.lr"),
        ("data.auto_fallback=true", "never switches"),
        ("data.broken_policy=keep", "nothing is invented"),
        ("data.split_ratio=[0.9, 0.3]", "add up to 1"),
        ("paths.root=C:\\data", "drive letters"),
        ("train.classification.lr=-1", "greater than 0"),
        ("data.imbalance.use_weighted_sampler=true", "twice"),
        ("train.oom=null", "memory policy"),
        ("train.oom.min_batch=null", "train.oom.min_batch"),
        ("project.family=other", "project.family"),
        ("train.classification.lr=.inf", "finite"),
        ("train.seed=010", "YAML reads the number 010 as 8"),
        ("data.split_ratio=[0.8, 0.2", "where: data.split_ratio"),
        ("nonsense", "key=value"),
    ],
)
def test_a_refused_setting_says_why(override, said):
    with pytest.raises(PillsnapError, match=re.escape(said)):
        load_config("two_stage", [override])


@pytest.mark.parametrize("folder", ["photos #2", "a: b", "2024-11-25", "2024-13-45", "# photos", "*/photos"])
def test_the_name_of_a_folder_is_taken_as_it_stands(folder):
    assert load_config("demo", [f"paths.root={folder}"]).paths.root == folder


def test_later_overrides_take_precedence_key_by_key():
    cfg = load_config("demo", ["train.classification.epochs=3", "train.classification={lr: 0.5}", "train.seed=1"])
    assert (cfg.train.classification.epochs, cfg.train.classification.lr, cfg.train.seed) == (3, 0.5, 1)
    cfg = load_config("demo", ["train={seed: 1}", "train.seed=2"])
    assert cfg.train.seed == 2


@pytest.mark.spec("CF1")
def test_overrides_beat_files_beat_bases(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: demo\ntrain: {seed: 1, classification: {epochs: 3}}\n")
    cfg = load_config(tmp_path / "mine.yaml", ["train.seed=2"])
    assert (cfg.train.seed, cfg.train.classification.epochs, cfg.data.source) == (2, 3, "synthetic")


@pytest.mark.spec("CF1", "CF5")
def test_a_typo_on_the_command_line_is_plain_text_and_status_2(tmp_path):
    (tmp_path / "c.yaml").write_text("train: {sead: 7}\n")
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "pillsnap",
            "run",
            "all",
            "--config",
            str(tmp_path / "c.yaml"),
            "--run-dir",
            str(tmp_path / "r"),
        ],
        capture_output=True,
        text=True,
    )
    assert r.returncode == 2 and "did you mean train.seed" in r.stderr and "Traceback" not in r.stderr
    assert not (tmp_path / "r").exists(), "nothing half-written"


TOP_LEVEL = ("mnt", "home", "root", "data")  # where somebody's own files lie


@pytest.mark.spec("CF7")
def test_python_versions_and_no_absolute_paths():
    ini = (ROOT / "settings.ini").read_text()
    assert "min_python = 3.11" in ini and "<3.13" in (ROOT / "setup.py").read_text()
    for p in [*(ROOT / "pillsnap").rglob("*.py"), *(ROOT / "configs").glob("*.yaml")]:
        text = p.read_text(encoding="utf-8")
        assert not re.search(rf"[\"'](/(?:{'|'.join(TOP_LEVEL)})/|[A-Z]:\\\\)", text), (
            f"{p.name} names an absolute path"
        )


def test_two_names_for_one_setting_must_agree():
    assert resolve_aliases({"train": {"lr": 1}})[0] == {"train": {"classification": {"lr": 1}}}
    with pytest.raises(PillsnapError, match="two things"):
        resolve_aliases({"train": {"lr": 1, "classification": {"lr": 2}}})


def test_the_worst_epoch_cannot_be_asked_for():
    "A preset that inherits `mode: min` and watches an accuracy would keep its worst epoch, and every preset is tried."
    for name in preset_names():
        stop = load_config(name).train.classification.early_stopping
        assert stop.mode == ("min" if stop.monitor == "val_loss" else "max"), name
    with pytest.raises(PillsnapError, match="keeps the worst epoch of recall@1"):
        load_config("demo", ["train.classification.early_stopping.monitor=recall@1"])
    with pytest.raises(PillsnapError, match="keeps the worst epoch of val_loss"):
        load_config("narrow", ["train.classification.early_stopping.monitor=val_loss"])
