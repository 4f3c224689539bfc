"""Break the program on purpose, one change at a time, and see whether the test that guards it fails.

    python scripts/campaigns/mutations.py                 every breakage; exit status 1 if one is not caught
    python scripts/campaigns/mutations.py --only leak     those whose name contains a word
    python scripts/campaigns/mutations.py --part 1/2      the first of two parts, to run them side by side
    python scripts/campaigns/mutations.py --list          names and tests, nothing is run

Each breakage is applied to a copy of the checkout. Its test must pass on the untouched copy and fail on the broken one.
A breakage that could not be tried is reported, the others go on, and the exit status is 1.
"""

import argparse
import compileall
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "pillsnap",
    "nbs",
    "tests",
    "configs",
    "scripts",
    "benchmarks",
    "examples",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "Makefile",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "constraints.txt",
    "_quarto.yml",
    ".gitignore",
)


@dataclass(frozen=True)
class Mutation:
    "One deliberate breakage."

    name: str  # what is broken, in words
    file: str  # the file it is in, from the repository's root
    old: str  # the text that stands there; exactly once
    new: str  # what it is replaced by
    test: str  # the pytest node that must fail


MUTATIONS: list[Mutation] = [
    Mutation(
        "a pair is answered where one of its photos shows several pills",
        "pillsnap/models/twoside.py",
        "[k > 1 for k in pills]",
        "[k > 9 for k in pills]",
        "tests/test_twoside.py::test_a_photo_of_several_pills_spoils_a_pair",
    ),
    Mutation(
        "one drug is named for a photo of several pills",
        "pillsnap/models/pipeline.py",
        '    pills = 1 if mode == "combo" else views.found',
        "    pills = 1",
        "tests/test_second_look.py::test_a_photo_of_several_pills_gets_no_name_in_single_mode",
    ),
    Mutation(
        "a held-out part of the retrieval family is scored on whole photos",
        "pillsnap/evaluation/heldout.py",
        '    view = "whole" if focus == "off" else "focus"',
        '    view = "whole"',
        "tests/test_heldout.py::test_retrieval_is_scored_on_what_the_product_shows_the_network",
    ),
    Mutation(
        "a classifier that was trained again is exported with the old answer rule",
        "pillsnap/deployment/export.py",
        'if measured.get("weights", {}).get(name) != sha',
        "if False",
        "tests/test_export_compare.py::test_what_was_not_evaluated_is_not_exported_with_the_evaluations_rule",
    ),
    Mutation(
        "photos may be cropped in another way than the rule was fitted to",
        "pillsnap/deployment/export.py",
        '    if measured.get("view") != view:\n',
        "    if False:\n",
        "tests/test_export_compare.py::test_what_was_not_evaluated_is_not_exported_with_the_evaluations_rule",
    ),
    Mutation(
        "one of several processes rehearses the whole batch",
        "pillsnap/training/compilation.py",
        'getattr(loader, "world_size", 1)',
        'getattr(loader, "world", 1)',
        "tests/test_gpu_engine.py::test_the_rehearsed_sizes_are_those_that_a_process_gets",
    ),
    Mutation(
        "a batch that does not reach the GPU ends the run",
        "pillsnap/dataset/photoloader.py",
        "    images, labels = self._upload(views, images.permute(0, 3, 1, 2))\n",
        "    images = self._send(images.permute(0, 3, 1, 2))\n"
        "    labels = to_device(self.labels[torch.from_numpy(views.rows)], self.device)\n",
        "tests/test_gpu_engine.py::test_a_batch_that_does_not_reach_the_gpu_is_sent_once_more",
    ),
    Mutation(
        "the detector's validation may use TF32",
        "pillsnap/training/detectortrainer.py",
        "        with full_fp32():\n",
        "        if True:\n",
        "tests/test_detector.py::test_the_detector_counts_its_memory_errors_and_validates_without_tf32",
    ),
    Mutation(
        "a resumed detector forgets its memory errors",
        "pillsnap/training/detectortrainer.py",
        '    self.oom_events = self.history[-1]["detection"].get("oom_events", 0)\n',
        "",
        "tests/test_detector.py::test_the_detector_counts_its_memory_errors_and_validates_without_tf32",
    ),
    Mutation(
        "crashes of the retrieval's training are not looked for",
        "pillsnap/evaluation/figures.py",
        'for s in (*BEFORE, "retrieval", "interleaved") if',
        "for s in BEFORE if",
        "tests/test_evaluation.py::test_a_crash_of_any_job_before_the_evaluation_is_seen",
    ),
    Mutation(
        "a small photo is enlarged from the pack",
        "pillsnap/dataset/datasets.py",
        "        if self.files is not None and photo.path in self.small:\n",
        "        if False:\n",
        "tests/test_pack.py::test_small_photos_are_read_from_their_files",
    ),
    Mutation(
        "no clean photos for the other families",
        "pillsnap/dataset/families.py",
        "        return [StageQuota(p.current_stage, cap, None, clean(p.current_stage))]\n",
        "        return [StageQuota(p.current_stage, cap, None, wanted or 0)]\n",
        "tests/test_splits.py::test_a_folder_of_ids_becomes_a_split",
    ),
    Mutation(
        "a like name is enrolled as a drug of its own",
        "pillsnap/deployment/enrol.py",
        "if k != key and same_name(k) == same_name(key)",
        "if k != key and k == key",
        "tests/test_gallery.py::test_a_folders_name_is_enrolled_beside_k_codes",
    ),
    Mutation(
        "the data card is silent about enrolments",
        "pillsnap/deployment/bundling.py",
        "data_card(root, meta, bundle.known).encode()",
        "data_card(root, meta).encode()",
        "tests/test_gallery.py::test_two_who_enrol_at_once_lose_nothing_and_the_file_keeps_it",
    ),
    Mutation(
        "the worst epoch is kept",
        "pillsnap/core/settings.py",
        "        if self.mode != better:\n",
        "        if False:\n",
        "tests/test_config.py::test_the_worst_epoch_cannot_be_asked_for",
    ),
    Mutation(
        "copies of one photo are trained as two drugs",
        "pillsnap/dataset/importers.py",
        "    df = _drop_contradictions(df, sort.quarantine)\n",
        "",
        "tests/test_importers.py::test_one_photo_in_the_folders_of_two_drugs_is_left_out_everywhere",
    ),
    Mutation(
        "the last photo of a COCO number gets the boxes of all",
        "pillsnap/dataset/labelfiles.py",
        '    twice = _repeated(str(image.get("id")) for image in images)\n',
        "    twice: set[str] = set()\n",
        "tests/test_importers.py::test_a_number_of_two_photos_or_two_drugs_names_none[images]",
    ),
    Mutation(
        "the last name of a COCO number counts",
        "pillsnap/dataset/labelfiles.py",
        "{i: n for i, n in pairs if i not in unclear}",
        "{i: n for i, n in pairs}",
        "tests/test_importers.py::test_a_number_of_two_photos_or_two_drugs_names_none[categories]",
    ),
    Mutation(
        "a box outside its photo is imported",
        "pillsnap/dataset/importers.py",
        "    if reason := box_fault(box, *size, whole=False):\n        return None, reason\n",
        "    box_fault(box, *size, whole=False)\n",
        "tests/test_importers.py::test_each_fault_has_its_bucket_and_nothing_is_invented[yolo]",
    ),
    Mutation(
        "classes that differ in case alone are two drugs",
        "pillsnap/dataset/importers.py",
        "many in same.values() if len(many) > 1 for",
        "many in same.values() if len(many) > 9 for",
        "tests/test_importers.py::test_each_fault_has_its_bucket_and_nothing_is_invented[folder]",
    ),
    Mutation(
        "an imported photo keeps the pills without a fault",
        "pillsnap/dataset/importers.py",
        "    if kept and (self.keep or len(kept) == len(got)):",
        "    if kept:",
        "tests/test_importers.py::test_two_numbers_of_one_name_are_two_classes_that_nobody_can_tell_apart",
    ),
    Mutation(
        "a label takes a photo of that name from another folder",
        "pillsnap/dataset/labelfiles.py",
        'if p in photos and f"/{p}".endswith(ending)]',
        "if p in photos]",
        "tests/test_importers.py::test_a_label_of_another_folder_is_not_taken_for_this_photo",
    ),
    Mutation(
        "every photo is a burst of its own",
        "pillsnap/dataset/bursts.py",
        "or seconds - ended > PAUSE:",
        "or seconds - ended >= 0:",
        "tests/test_importers.py::test_photos_of_one_burst_stay_on_one_side[None]",
    ),
    Mutation(
        "near-copies do not join bursts",
        "pillsnap/dataset/bursts.py",
        'group = join_groups(bursts, df["path"].map(dict(zip(one["path"], dup.dup_id))))',
        "group = bursts",
        "tests/test_importers.py::test_a_column_groups_photos_and_a_near_copy_joins_two_bursts",
    ),
    Mutation(
        "the numbers of an import's classes are lost in the export",
        "pillsnap/dataset/labelexport.py",
        "    return kept\n",
        '    return dict(enumerate(keys, 1 if form == "coco" else 0))\n',
        "tests/test_importers.py::test_coco_comes_back_equal",
    ),
    Mutation(
        "an import forgets that leakage cannot be excluded",
        "pillsnap/dataset/importers.py",
        "        grouping=grouping.to_dict(),",
        '        grouping=grouping.to_dict() | {"caution": ""},',
        "tests/test_importers.py::test_where_nothing_says_what_belongs_together_the_caution_is_printed_and_kept",
    ),
    Mutation(
        "a detector is trained without boxes",
        "pillsnap/core/runner.py",
        'spec.feature == "combo_detection" and _without_boxes(root / "manifest.json")',
        'spec.feature == "" and _without_boxes(root / "manifest.json")',
        "tests/test_importers_run.py::test_the_detector_says_in_one_sentence_why_not",
    ),
    Mutation(
        "an API key is compared by its first characters",
        "pillsnap/deployment/admission.py",
        "return hashlib.sha256(key.encode()).digest()",
        "return hashlib.sha256(key[:8].encode()).digest()",
        "tests/test_server.py::test_without_the_right_key_nothing_is_answered",
    ),
    Mutation(
        "API keys are compared with ==",
        "pillsnap/deployment/admission.py",
        "if hmac.compare_digest(known, digest):",
        "if known == digest:",
        "tests/test_server.py::test_keys_are_compared_in_constant_time",
    ),
    Mutation(
        "the server's queue has no bound",
        "pillsnap/deployment/service.py",
        "settings.workers + limits.queue, held)",
        "10**9, held)",
        "tests/test_server.py::test_a_full_queue_refuses_at_once_and_loses_nothing",
    ),
    Mutation(
        "a reload switches to a bundle that was not tested",
        "pillsnap/deployment/workers.py",
        "        self_test(bundle)\n",
        "",
        "tests/test_server.py::test_a_reload_switches_to_a_bundle_that_works_and_to_no_other",
    ),
    Mutation(
        "a reload switches before the new bundle is verified",
        "pillsnap/deployment/workers.py",
        "new = Fleet(plan, self.fleet.size).ready()",
        "new = Fleet(plan, self.fleet.size)",
        "tests/test_server.py::test_a_file_is_verified_before_it_answers",
    ),
    Mutation(
        "the server does not ask who signed a file",
        "pillsnap/deployment/workers.py",
        "plan.threads, key=plan.signed_by)",
        "plan.threads)",
        "tests/test_server.py::test_a_file_is_verified_before_it_answers",
    ),
    Mutation(
        "a rollback leads to a release that was taken out",
        "pillsnap/deployment/releases.py",
        "back = self.find(left.before)",
        "back = self.releases()[1]",
        "tests/test_operations.py::test_five_releases_are_kept_with_their_checksums",
    ),
    Mutation(
        "the link to the current release is turned before the file is there",
        "pillsnap/deployment/releases.py",
        '        self._store(file, new, key)\n        self._turn(new, "release")\n',
        '        self._turn(new, "release")\n        self._store(file, new, key)\n',
        "tests/test_operations.py::test_a_release_that_is_killed_leaves_one_that_answers",
    ),
    Mutation(
        "old logs are deleted by their name alone",
        "pillsnap/deployment/logfiles.py",
        "    line = _first_line(path)\n",
        "    return True\n    line = _first_line(path)\n",
        "tests/test_operations.py::test_the_servers_log_is_rotated",
    ),
    Mutation(
        "a job on a cluster that goes on asks every photo again",
        "pillsnap/deployment/cluster.py",
        "left = [photo for photo in files if photo not in journal]",
        "left = list(files)",
        "tests/test_cluster.py::test_a_killed_job_goes_on_and_asks_no_photo_twice",
    ),
    Mutation(
        "the server in a container runs as root",
        "examples/serving/Dockerfile",
        "USER 10001:10001\n",
        "",
        "tests/test_serving_files.py::test_the_image_runs_the_server_as_nobody",
    ),
    Mutation(
        "each worker counts a key's photos for itself",
        "pillsnap/deployment/service.py",
        "KeyRates(limits.per_minute)",
        "KeyRates(limits.per_minute * settings.workers)",
        "tests/test_server.py::test_the_rate_of_a_key_holds_over_all_workers",
    ),
    Mutation(
        "pages of every origin may call the server",
        "pillsnap/deployment/server.py",
        "allow_origins=app.state.origins",
        'allow_origins=["*"]',
        "tests/test_server.py::test_only_listed_origins_may_call",
    ),
    Mutation(
        "a file that is no photo gets 422 in place of 415",
        "pillsnap/deployment/admission.py",
        '"not_a_photo": 415',
        '"not_a_photo": 422',
        "tests/test_server.py::test_what_is_no_photo_is_refused_with_its_status",
    ),
    Mutation(
        "feedback overwrites what was said before",
        "pillsnap/core/files.py",
        'open(path, "a+b", buffering=0)',
        'open(path, "w+b", buffering=0)',
        "tests/test_server.py::test_what_people_say_is_appended_by_all_writers",
    ),
    Mutation(
        "the page reads a drug's name as HTML",
        "pillsnap/web/app.js",
        "made.append(child);",
        'typeof child === "string" ? made.insertAdjacentHTML("beforeend", child) : made.append(child);',
        "tests/test_web_page.py::test_each_kind_of_answer_is_a_card",
    ),
    Mutation(
        "a worker's photo is lost with the worker",
        "pillsnap/deployment/workers.py",
        "for _ in range(ATTEMPTS):",
        "for _ in range(1):",
        "tests/test_server.py::test_a_killed_worker_loses_no_request",
    ),
    Mutation(
        "onnxruntime reports its use to its maker",
        "pillsnap/__init__.py",
        '_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")',
        '_os.environ.setdefault("ORT_DISABLE_TELEMETRY", "0")',
        "tests/test_extras.py::test_onnxruntime_reports_to_nobody",
    ),
    Mutation(
        "int8 report from fp32 answers",
        "pillsnap/deployment/variants.py",
        "    pipelines = {p: v.pipeline(like) for p, v in variants.items()}\n",
        '    pipelines = {p: variants["fp32"].pipeline(like) for p in variants}\n',
        "tests/test_quantise.py::test_a_precision_is_measured_by_its_own_answers_and_refused",
    ),
    Mutation(
        "int8 calibrated on photos of the evaluation set",
        "pillsnap/deployment/quantise.py",
        '    rows = data.train if combos else data.train[data.train["kind"] == "single"]\n',
        '    rows = data.eval_set if combos else data.train[data.train["kind"] == "single"]\n',
        "tests/test_quantise.py::test_int8_is_calibrated_on_training_photos_alone",
    ),
    Mutation(
        "EXIF ignored before the graph that takes pixels",
        "pillsnap/deployment/pixelgraph.py",
        "        image = read_photo(photo)\n",
        (
            "        import io\n\n        from PIL import Image\n\n"
            "        stored = not isinstance(photo, np.ndarray)\n"
            "        image = np.asarray(Image.open(io.BytesIO(photo))) if stored else photo\n"
        ),
        "tests/test_export_compare.py::test_the_caller_of_the_pixel_graph_turns_a_photo_by_its_exif[6]",
    ),
    Mutation(
        "EXIF ignored in the contract of the graph's input",
        "pillsnap/deployment/pixelgraph.py",
        '"orientation": "upright: the caller applies EXIF before, the graph cannot see it",',
        '"orientation": "as stored",',
        "tests/test_export_compare.py::test_the_bundle_lists_the_graph_that_takes_pixels_with_its_contract",
    ),
    Mutation(
        "a changed byte in a bundle's file is accepted",
        "pillsnap/core/container.py",
        "if len(data) != member.size or zlib.crc32(data) != member.crc or own != listed:",
        "if len(data) != member.size:",
        "tests/test_bundle_file.py::test_one_changed_byte_anywhere_is_refused",
    ),
    Mutation(
        "a bundle's members are checked only when they are read",
        "pillsnap/deployment/runtime.py",
        "        files.check()  # what was read already is not read again",
        "        pass",
        "tests/test_bundle_file.py::test_one_changed_byte_anywhere_is_refused",
    ),
    Mutation(
        "the headers of a bundle's file are not compared",
        "pillsnap/core/container.py",
        "        if directory[position:end] != member.directory_entry():",
        "        if False:",
        "tests/test_bundle_file.py::test_one_changed_byte_anywhere_is_refused",
    ),
    Mutation(
        "a bundle's signature is not asked for",
        "pillsnap/deployment/runtime.py",
        "    if key is not None:\n        _check_signed(files, key)",
        "    if False:\n        _check_signed(files, key)",
        "tests/test_bundle_file.py::test_what_only_a_signature_tells",
    ),
    Mutation(
        "a signature that cannot be checked passes",
        "pillsnap/core/signing.py",
        "    except ModuleNotFoundError as e:\n        what",
        "    except ModuleNotFoundError as e:\n        raise SystemExit(0)\n        what",
        "tests/test_bundle_file.py::test_the_commands_need_the_base_alone",
    ),
    Mutation(
        "the model card shows another figure than the evaluation",
        "pillsnap/deployment/modelcard.py",
        "    return plain_number(metric.value), metric.n, metric.note",
        "    return plain_number(min(1.0, metric.value + 0.1)), metric.n, metric.note",
        "tests/test_bundle_file.py::test_the_cards_figures_are_the_runs",
    ),
    Mutation(
        "a field of the evidence card is dropped",
        "pillsnap/models/card.py",
        "        for f, (_, keys) in CARD.items()\n    }",
        '        for f, (_, keys) in CARD.items()\n        if f != "score_back"\n    }',
        "tests/test_card.py::test_every_field_of_a_record_is_on_every_card",
    ),
    Mutation(
        "a benchmark's required ratio is lowered",
        "benchmarks/harness.py",
        '"BM1": {"json.load": 3.5,',
        '"BM1": {"json.load": 3.0,',
        "tests/test_benchmarks.py::test_the_required_ratios_are_those_of_the_contract",
    ),
    Mutation(
        "a benchmark's bound on memory is raised",
        "benchmarks/harness.py",
        '"kb_per_epoch": 100.0',
        '"kb_per_epoch": 1000.0',
        "tests/test_benchmarks.py::test_the_required_ratios_are_those_of_the_contract",
    ),
    Mutation(
        "copies to the GPU are waited for",
        "pillsnap/core/device.py",
        "return t.to(device, non_blocking=True)",
        "return t.to(device)",
        "tests/test_gpu_path.py::test_the_loader_hands_batches_to_a_gpu_without_waiting",
    ),
    Mutation(
        "augmentation on a GPU leaves the network's layout",
        "pillsnap/photos/augmentation.py",
        "        if not (on_gpu and channels_last):",
        "        if True:",
        "tests/test_gpu_path.py::test_augmentation_on_a_gpu_waits_for_nothing_and_gives_the_cpus_numbers",
    ),
    Mutation(
        "validation reads the GPU after each batch",
        "pillsnap/training/callbacks.py",
        "        self.waiting.append(self.numbers(logits, y))",
        "        self.waiting.append(self.numbers(logits, y)); float(self.waiting[-1][-1][0, 0])",
        "tests/test_gpu_path.py::test_validation_reads_the_gpu_at_its_end_and_not_before",
    ),
    Mutation(
        "a boxed data set is asked for no detector",
        "pillsnap/evaluation/checks.py",
        """    if (read_manifest(header.with_suffix(".csv"))[0]["bbox"] != "").any():""",
        "    if False:",
        "tests/test_importers_run.py::test_without_boxes_the_gate_asks_for_no_detector_and_says_why",
    ),
    Mutation(
        "a family without a detector is asked for one",
        "pillsnap/evaluation/checks.py",
        'if project.family != "two_stage":\n        return',
        'if project.family == "":\n        return',
        "tests/test_gallery.py::test_the_gate_of_a_family_without_a_detector_asks_for_none",
    ),
    Mutation(
        "photos without a box are asked for a detector",
        "pillsnap/evaluation/scorecard.py",
        '{"no_detector": why_no_detector(cfg.project, root)}',
        "{}",
        "tests/test_importers_run.py::test_without_boxes_the_gate_asks_for_no_detector_and_says_why",
    ),
    Mutation(
        "the average of a person's own photos holds the random start",
        "configs/own.yaml",
        "ema: {decay: 0.9, warmup: true}",
        "ema: {decay: 0.9}",
        "tests/test_importers_run.py::test_the_average_of_a_persons_own_photos_warms_up",
    ),
    Mutation(
        "a resumed average warms up once more",
        "pillsnap/training/callbacks.py",
        '        self.done = s["done"]',
        "        self.done = 0",
        "tests/test_stop_and_go.py::test_a_worker_that_dies_costs_what_was_done_since_the_last_save",
    ),
    Mutation(
        "a resumed training draws other random numbers",
        "pillsnap/training/saving.py",
        '_remaining_batches(self, ckpt), ckpt["rng_state"]',
        "_remaining_batches(self, ckpt), rng_state()",
        "tests/test_stop_and_go.py::test_a_worker_that_dies_costs_what_was_done_since_the_last_save",
    ),
    Mutation(
        "photos without a box are validated in each view",
        "pillsnap/training/trainer.py",
        '        rows = data.val[~data.val["path"].isin(_unboxed(val_dl))]',
        "        rows = data.val",
        "tests/test_importers_run.py::test_a_photo_without_a_box_is_validated_once",
    ),
    Mutation(
        "the second view forgets the photos without a box",
        "pillsnap/training/callbacks.py",
        "        self.waiting, self.seen = (list(v) for v in self.learn.taken_over)",
        "        self.waiting, self.seen = [], []",
        "tests/test_importers_run.py::test_the_crops_of_a_mixed_set_are_those_of_its_boxes_and_its_whole_photos",
    ),
    Mutation(
        "the clock marks drugs with a value from the host",
        "pillsnap/training/monitoring.py",
        "self.drugs.index_fill_(0, labels, True)",
        "self.drugs[labels] = True",
        "tests/test_gpu_path.py::test_the_clock_marks_drugs_without_waiting",
    ),
    Mutation(
        "validation in TF32",
        "pillsnap/training/callbacks.py",
        "        with full_fp32():\n            self._validate_views(ds_idx, dl)  # TF32 is for training only",
        "        self._validate_views(ds_idx, dl)  # TF32 is for training only",
        "tests/test_gpu_path.py::test_training_may_use_tf32_and_validation_does_not",
    ),
    Mutation(
        "exact search in TF32",
        "pillsnap/models/neighbours.py",
        (
            "    with full_fp32():\n"
            "        got = [(q @ gallery.T).topk(min(k, len(gallery)), dim=1) for q in queries.split(block)]"
        ),
        "    got = [(q @ gallery.T).topk(min(k, len(gallery)), dim=1) for q in queries.split(block)]",
        "tests/test_gpu_path.py::test_vectors_and_their_search_do_not_use_tf32",
    ),
    Mutation(
        "a warm start copies the head's rows by number",
        "pillsnap/training/warmstart.py",
        "source, target = [of.id(k) for k in shared], [to.id(k) for k in shared]",
        "source = target = list(range(len(shared)))",
        "tests/test_warm_start.py::test_rows_and_answers_of_the_shared_drugs_are_the_smaller_stages",
    ),
    Mutation(
        "a warm start does not look at the validation photos",
        "pillsnap/training/warmstart.py",
        "if n := photos_in_common(train, data):",
        "if False:",
        "tests/test_warm_start.py::test_a_checkpoint_that_was_trained_on_validation_photos_is_refused",
    ),
    Mutation(
        "a configuration lowers what a gate asks",
        "pillsnap/evaluation/gates.py",
        "if target_accuracy is not None and target_accuracy < accuracy:",
        "if False:",
        "tests/test_gates.py::test_a_configuration_makes_a_gate_stricter_and_never_laxer",
    ),
    Mutation(
        "an export forgets the mode it was configured with",
        "pillsnap/deployment/export.py",
        "return dict(mode=cfg.data.default_mode,",
        'return dict(mode="single",',
        "tests/test_export_compare.py::test_the_bundle_keeps_what_the_configuration_says_of_answering",
    ),
    Mutation(
        "a CPU's latency under the GPU's name",
        "pillsnap/evaluation/latency.py",
        "machine = hardware(on_gpu(setup.provider))",
        "machine = hardware()",
        "tests/test_gpu_path.py::test_the_export_is_timed_by_every_provider_and_says_by_which",
    ),
    Mutation(
        "the cosine head in TF32",
        "pillsnap/models/factory.py",
        "    with full_fp32():\n        return F.linear(x, weight)",
        "    return F.linear(x, weight)",
        "tests/test_gpu_path.py::test_the_cosine_head_does_not_use_tf32_forwards_or_backwards",
    ),
    Mutation(
        "onnxruntime looks for CUDA by itself",
        "pillsnap/deployment/runtime.py",
        "        ort.preload_dlls()  # finds CUDA's libraries where pip has put them",
        "        pass  # finds CUDA's libraries where pip has put them",
        "tests/test_gpu_path.py::test_cudas_libraries_are_loaded_before_a_session_that_needs_them",
    ),
    Mutation(
        "nan_loss=False: a training that ended at NaN is not told to the advisor",
        "pillsnap/evaluation/checks.py",
        "nan_loss=ended_in_nan(root)",
        "nan_loss=False",
        "tests/test_evaluation.py::test_a_training_whose_loss_is_no_number_is_critical_by_its_code",
    ),
    Mutation(
        "corruption=0.: the advisor hears of no unreadable photo",
        "pillsnap/evaluation/checks.py",
        'corruption=unreadable_share(doc["corruption"], training_corruption(history))',
        "corruption=0.",
        "tests/test_evaluation.py::test_photos_that_training_cannot_open_are_critical",
    ),
    Mutation(
        "corruption of training is left out",
        "pillsnap/evaluation/checks.py",
        'unreadable_share(doc["corruption"], training_corruption(history))',
        'unreadable_share(doc["corruption"], None)',
        "tests/test_evaluation.py::test_photos_that_training_cannot_open_are_critical",
    ),
    Mutation(
        "a sealed photo is read before the ledger says open",
        "pillsnap/evaluation/final.py",
        "        opening = open_sealed(root, request)\n",
        "        got = score_part(p)\n        opening = open_sealed(root, request)\n",
        "tests/test_heldout.py::test_the_ledger_says_open_before_the_first_sealed_photo_is_read",
    ),
    Mutation(
        "letters of pictures are hinted, so that an 8 looks like a 0",
        "pillsnap/core/plots.py",
        '"text.hinting": "none"',
        '"text.hinting": "default"',
        "tests/test_plots.py::test_letters_are_not_hinted",
    ),
    Mutation(
        "a green light beside a gate that is not GO",
        "pillsnap/evaluation/menu.py",
        'return "🟢" if status == "GO" else',
        'return "🟢" if status else',
        "tests/test_advisor.py::test_green_is_a_gate_that_is_go",
    ),
    Mutation(
        "menu letters too pale to be read",
        "pillsnap/evaluation/menu.py",
        '"missed": "#9a6700"}',
        '"missed": "#d4a72c"}',
        "tests/test_colours.py::test_the_advisors_menu_can_be_read",
    ),
    Mutation(
        "class counts that are all alike",
        "pillsnap/training/trainer.py",
        "class_counts(train_dl.dataset.labels, n), list(",
        "class_counts(train_dl.dataset.labels, n)*0+1, list(",
        "tests/test_engine.py::test_class_weights_reach_the_loss_of_a_training",
    ),
    Mutation(
        "turns in the ratio 1:1 whatever is configured",
        "pillsnap/training/interleaved.py",
        "TurnTaker(cfg.train.interleave_ratio,",
        "TurnTaker((1, 1),",
        "tests/test_interleave.py::test_steps_come_in_the_configured_ratio",
    ),
    Mutation(
        "weight decay that is always scaled",
        "pillsnap/training/memory.py",
        '        wd_scale=old / new if policy.wd_scale_mode == "declared" else 1.0,',
        "        wd_scale=old / new,",
        "tests/test_gpu_engine.py::test_a_smaller_step_scales_the_weight_decay_only_where_it_is_declared",
    ),
    Mutation(
        "weight decay that is never scaled",
        "pillsnap/training/memory.py",
        '        wd_scale=old / new if policy.wd_scale_mode == "declared" else 1.0,',
        "        wd_scale=1.0,",
        "tests/test_gpu_engine.py::test_a_smaller_step_scales_the_weight_decay_only_where_it_is_declared",
    ),
    Mutation(
        "no wait after an out-of-memory error",
        "pillsnap/training/memory.py",
        "        )\n    self.sleep(self.policy.cooldown_sec)",
        "        )\n    pass",
        "tests/test_gpu_engine.py::test_each_error_waits_and_is_a_point",
    ),
    Mutation(
        "no oom points in TensorBoard",
        "pillsnap/training/memory.py",
        ('    if self.tb:\n        number = float(("S0", "S1", "S2", "S3", "end").index(act.state))'),
        ('    if False:\n        number = float(("S0", "S1", "S2", "S3", "end").index(act.state))'),
        "tests/test_gpu_engine.py::test_each_error_waits_and_is_a_point",
    ),
    Mutation(
        "no memory warning in TensorBoard",
        "pillsnap/training/memory.py",
        '            "above 80 % the next larger photo may not fit"\n        )\n        if self.tb:',
        '            "above 80 % the next larger photo may not fit"\n        )\n        if False:',
        "tests/test_gpu_engine.py::test_four_fifths_of_the_memory_is_a_warning_and_a_point",
    ),
    Mutation(
        "the batch that is found is no point in TensorBoard",
        "pillsnap/training/batchsearch.py",
        "    if tb:",
        "    if False:",
        "tests/test_gpu_engine.py::test_the_batch_that_is_found_is_a_point",
    ),
    Mutation(
        "memory is no point in TensorBoard",
        "pillsnap/training/memory.py",
        "    def after_epoch(self):\n        if self.tb:",
        "    def after_epoch(self):\n        if False:",
        "tests/test_gpu_engine.py::test_memory_stands_beside_the_batch_size_in_each_epoch",
    ),
    Mutation(
        "a resumed run begins its epoch anew",
        "pillsnap/training/saving.py",
        '    if hasattr(learn.dls.train, "load_state_dict"):',
        "    if False:",
        "tests/test_stop_and_go.py::test_a_worker_that_dies_costs_what_was_done_since_the_last_save",
    ),
    Mutation(
        "the rehearsal compiles another memory layout",
        "pillsnap/training/compilation.py",
        "torch.channels_last if self.channels_last else torch.contiguous_format",
        "torch.contiguous_format",
        "tests/test_gpu_engine.py::test_training_compiles_nothing_that_was_not_rehearsed",
    ),
    Mutation(
        "recorded graphs stay when memory ran out",
        "pillsnap/core/device.py",
        "    if graphs:\n        torch.compiler.reset()",
        "    pass",
        "tests/test_gpu_engine.py::test_recorded_graphs_go_before_the_batch_is_tried_again",
    ),
    Mutation(
        "CUDA is started before a notebook forks",
        "pillsnap/core/device.py",
        "return torch.cuda.device_count()",
        "return torch.cuda.device_count() if torch.cuda.is_available() else 0",
        "tests/test_distributed.py::test_the_launcher_of_gpus_forks_before_cuda_is_started",
    ),
    Mutation(
        "the time is broadcast at every batch",
        "pillsnap/training/distributed.py",
        "if self.read % self.every == 0:",
        "if True:",
        "tests/test_distributed.py::test_the_time_is_asked_for_rarely",
    ),
    Mutation(
        "cuDNN's internal error is not about memory",
        "pillsnap/core/device.py",
        "|CUDNN_STATUS_INTERNAL_ERROR(_",
        "|CUDNN_STATUS_NEVER(_",
        "tests/test_gpu_engine.py::test_every_way_to_say_that_memory_ran_out_is_understood",
    ),
    Mutation(
        "ultralytics' default batch is called found",
        "pillsnap/training/detectortrainer.py",
        '"using default batch-size" in t',
        '"no such words" in t',
        "tests/test_detector.py::test_a_default_batch_is_not_called_a_search",
    ),
    Mutation(
        "the splits job always groups by capture",
        "pillsnap/dataset/splits.py",
        "group_by=cfg.data.group_by",
        'group_by="capture"',
        "tests/test_splits.py::test_the_job_groups_by_what_the_configuration_says",
    ),
    Mutation(
        "the splits job seals nothing",
        "pillsnap/dataset/splits.py",
        "test_known_ratio=cfg.data.test_known_ratio",
        "test_known_ratio=0.",
        "tests/test_splits.py::test_the_job_seals_the_share_that_the_configuration_says",
    ),
    Mutation(
        "an image split is cut by group",
        "pillsnap/dataset/assignment.py",
        'photo_rank(df.assign(role=""), seed)',
        'photo_rank(df.assign(role="", path=df["group_id"]), seed)',
        "tests/test_splits.py::test_the_image_split_leaks_and_the_group_split_does_not",
    ),
    Mutation(
        "training photos are scored",
        "pillsnap/evaluation/answers.py",
        'in data.eval_set[~data.eval_set["path"].isin(partly)].groupby("path"',
        'in pd.concat([data.train, data.eval_set]).groupby("path"',
        "tests/test_evaluation.py::test_what_is_scored_is_the_evaluation_set_and_nothing_of_training",
    ),
    Mutation(
        "the headline counts photos that selected the checkpoint",
        "pillsnap/evaluation/measurements.py",
        'single_records(scores.of("clean"), answers.keys, prov)',
        "single_records(scores, answers.keys, prov)",
        "tests/test_evaluation.py::test_figures_can_be_reckoned_again_from_the_predictions",
    ),
    Mutation(
        "scored photos are not compared with training",
        "pillsnap/evaluation/figures.py",
        "touching = photos_touching_training(photos, data.train)",
        "touching = []",
        "tests/test_evaluation.py::test_an_evaluation_set_that_touches_training_was_not_measured",
    ),
    Mutation(
        "the gate forgives an evaluation set that touches training",
        "pillsnap/evaluation/gates.py",
        "lambda v: v == 0, Reason.LEAK",
        "lambda v: v >= 0, Reason.LEAK",
        "tests/test_gates.py::test_one_photo_of_training_and_nothing_was_measured",
    ),
    Mutation(
        "an image split may earn a GO",
        "pillsnap/evaluation/figures.py",
        'kept = by != "image" or',
        "kept = True or",
        "tests/test_evaluation.py::test_an_image_split_is_named_and_never_goes",
    ),
    Mutation(
        "the advisor's thresholds are not passed on",
        "pillsnap/evaluation/scorecard.py",
        "facts, cfg.evaluation.advisor_thresholds)",
        "facts)",
        "tests/test_evaluation.py::test_the_thresholds_of_the_configuration_reach_the_advisor",
    ),
    Mutation(
        "hard cases copy the mode that was asked",
        "pillsnap/evaluation/hardcases.py",
        '                "mode_used": s.modes[i],',
        '                "mode_used": "single",',
        "tests/test_evaluation.py::test_the_mode_that_answered_is_what_is_reported",
    ),
    Mutation(
        "an answer copies the mode that was asked",
        "pillsnap/models/pipeline.py",
        "mode_used=views.mode_used",
        "mode_used=mode",
        "tests/test_api_min.py::test_an_answer_says_which_branch_ran",
    ),
    Mutation(
        "a crash is forgotten after the next attempt",
        "pillsnap/core/jobs.py",
        "attempts=[*_past_attempts(read_record(run.root, self.name)), now]",
        "attempts=[now]",
        "tests/test_core.py::test_a_record_keeps_every_attempt",
    ),
    Mutation(
        "the imbalance has a floor under its clock",
        "pillsnap/evaluation/figures.py",
        (
            '        "class_imbalance_ratio",\n'
            "        float(n.max() / n.min()) if len(n) else None,\n"
            "        len(n),\n"
            "        time.perf_counter() - t0,\n"
            '        note="train singles",\n'
            '        kind="computed",'
        ),
        (
            '        "class_imbalance_ratio", float(n.max() / n.min()) if len(n) else None, len(n), 1e-3, note="train '
            'singles"'
        ),
        "tests/test_evaluation.py::test_the_imbalance_is_measured_whatever_the_number_of_drugs",
    ),
    Mutation(
        "calibration photos give the headline too",
        "pillsnap/evaluation/answers.py",
        "self.parts, object) == part)",
        'self.parts, object) != "val")',
        "tests/test_evaluation.py::test_figures_can_be_reckoned_again_from_the_predictions",
    ),
    Mutation(
        "progress fills a log",
        "pillsnap/core/logs.py",
        'EVERY = {"terminal": 0.1, "notebook": 0.5, "log": 30.0}  # seconds from one frame to the next',
        'EVERY = {"terminal": 0.1, "notebook": 0.5, "log": 0.01}  # seconds from one frame to the next',
        "tests/test_progress.py::test_in_a_log_seconds_of_work_are_silent",
    ),
    Mutation(
        "a stage without its inputs makes its folder",
        "pillsnap/core/runner.py",
        "spec.job_class().check_inputs(root, cfg)",
        "pass",
        "tests/test_progress.py::test_a_job_without_its_inputs_leaves_no_folder",
    ),
    Mutation(
        "a frame of progress is a new output of the notebook",
        "pillsnap/core/logs.py",
        "if self.handle is None:",
        "if True:",
        "tests/test_progress.py::test_an_executed_notebook_keeps_the_last_frame_alone",
    ),
    Mutation(
        "augmentation that does not fit ends the run",
        "pillsnap/dataset/photoloader.py",
        "            if not is_oom(e) or n == 1:\n                raise",
        "            raise",
        "tests/test_gpu_engine.py::test_augmentation_that_does_not_fit_is_done_in_parts",
    ),
    Mutation(
        "a kernel search for every number of crops",
        "pillsnap/models/yolo.py",
        "        with full_fp32(), without_kernel_search():",
        "        with full_fp32():",
        "tests/test_gpu_engine.py::test_a_detector_answers_without_a_search_and_in_full_fp32",
    ),
    Mutation(
        "the leak-gap twin is held to the rule it breaks on purpose",
        "pillsnap/evaluation/figures.py",
        'or bool(data.header.get("leak_gap_twin"))',
        "or False",
        "tests/test_evaluation.py::test_only_the_leak_gap_twin_may_part_capture_groups",
    ),
    Mutation(
        "the detector says nothing of its memory",
        "pillsnap/training/detectortrainer.py",
        'self.plan.tb.add_scalars(memory, row["epoch"])',
        "pass",
        "tests/test_detector.py::test_memory_stands_beside_the_batch_size_in_each_epoch_of_the_detector",
    ),
    Mutation(
        "one GPU is given to accelerate",
        "pillsnap/training/distributed.py",
        "    if n == 1:",
        "    if n == 0:",
        "tests/test_distributed.py::test_one_gpu_trains_in_this_process",
    ),
    Mutation(
        "confusions are sorted by count instead of harm",
        "pillsnap/evaluation/atlas.py",
        "key=lambda c: (-c.harm, -c.count, c.true, c.answered)",
        "key=lambda c: (-c.count, -c.harm, c.true, c.answered)",
        "tests/test_atlas.py::test_one_harmful_error_stands_before_many_harmless_ones",
    ),
    Mutation(
        "two runs are compared photo by photo, without capture groups",
        "pillsnap/evaluation/groupfigures.py",
        "codes, names = pd.factorize(np.asarray(groups, object), sort=True)",
        "codes, names = pd.factorize(np.arange(len(groups)), sort=True)",
        "tests/test_diff.py::test_equal_runs_are_within_noise_nineteen_times_of_twenty",
    ),
    Mutation(
        "the clean photos are read and the run record does not say so",
        "pillsnap/evaluation/measurements.py",
        'count_reading(root, clean_part(data.stage), "evaluation", sum(p.part == "clean" for p in photos))',
        "pass",
        "tests/test_evaluation.py::test_each_evaluation_that_opens_the_clean_photos_is_counted",
    ),
    Mutation(
        "a located box is kept in other coordinates",
        "pillsnap/dataset/focus.py",
        "{x1 - x0}, {y1 - y0}",
        "{x1}, {y1}",
        "tests/test_second_look.py::test_validation_shows_what_the_product_sees",
    ),
    Mutation(
        "an answer from a crop says that it saw the whole photo",
        "pillsnap/models/pipeline.py",
        '[boxes[0]], [scores[0]], "crop", 1)',
        '[boxes[0]], [scores[0]], "whole", 1)',
        "tests/test_second_look.py::test_no_photo_changes_the_mode_and_every_answer_names_its_view",
    ),
    Mutation(
        "the checkpoint is chosen by whole photos, which the product does not see",
        "pillsnap/dataset/loaders.py",
        'view = "whole" if focus == "off" else "focus"',
        'view = "whole"',
        "tests/test_second_look.py::test_training_validates_by_the_path_first",
    ),
    Mutation(
        "the threshold of the unknown score is taken from test unknowns",
        "pillsnap/evaluation/openset.py",
        "threshold = unknown_threshold(score(calib.logits, calib.embedding), calib.groups, share)",
        "threshold = float(np.quantile(score(test.logits, test.embedding), share))",
        "tests/test_openset.py::test_score_and_threshold_do_not_depend_on_test_unknowns",
    ),
    Mutation(
        "the unknown score is chosen on test unknowns",
        "pillsnap/evaluation/openset.py",
        'compare_scores(train, known["calib"], unknown["validation"], names, interval=False)',
        'compare_scores(train, known["calib"], unknown["test"], names, interval=False)',
        "tests/test_openset.py::test_score_and_threshold_do_not_depend_on_test_unknowns",
    ),
    Mutation(
        "training crops do not err as the locator does",
        "pillsnap/dataset/loaders.py",
        "StageFocus(data, cfg).errors() if train and focused else None",
        "None",
        "tests/test_second_look.py::test_training_crops_err_as_the_locator_does",
    ),
    Mutation(
        "a condition is called weak without a correction for the number of conditions",
        "pillsnap/evaluation/strata.py",
        "holm([strata[i].p for i in tested])",
        "[strata[i].p for i in tested]",
        "tests/test_conditions.py::test_without_a_weakness_none_is_named",
    ),
    Mutation(
        "an interval counts photos of one capture group as independent",
        "pillsnap/evaluation/intervals.py",
        "worth = n / (1 + ((size**2).sum() / n - 1) * rho)",
        "worth = n",
        "tests/test_intervals.py::test_the_interval_holds_the_truth_in_nineteen_of_twenty_evaluations",
    ),
    Mutation(
        "the answer rule's quantile is off by one rank",
        "pillsnap/evaluation/conformal.py",
        "confidence_level=1 - alpha, conformity_score=scorer",
        "confidence_level=1 - alpha - 1 / (len(p) + 1), conformity_score=scorer",
        "tests/test_safe_answer.py::test_the_threshold_has_the_rank_of_the_theory",
    ),
    Mutation(
        "the answer rule is fitted to the clean groups",
        "pillsnap/evaluation/conformal.py",
        'photos.of("calib"), str(settings.score), ""',
        'photos.of("clean"), str(settings.score), ""',
        "tests/test_safe_answer.py::test_only_calibration_photos_fit_the_rule",
    ),
    Mutation(
        "the answer rule parts twins into clusters of their own",
        "pillsnap/evaluation/conformal.py",
        "drugs = np.flatnonzero(names == name)",
        "drugs = np.flatnonzero(names == name)[:1]",
        "tests/test_safe_answer.py::test_twins_share_one_threshold_and_their_groups",
    ),
    Mutation(
        "the answer rule counts photos instead of groups",
        "pillsnap/evaluation/conformal.py",
        "for at in draw_one_each(groups, draws)]",
        "for at in [np.arange(len(p))]]",
        "tests/test_safe_answer.py::test_a_capture_group_counts_once_however_many_photos_it_has",
    ),
    Mutation(
        "the back of a real pill shows its front",
        "pillsnap/synth/cutouts.py",
        "picture = _read_picture(pill.sides[side])",
        "picture = _read_picture(pill.sides[0])",
        "tests/test_cutouts.py::test_each_side_shows_its_own_picture",
    ),
    Mutation(
        "a cut-out that changed is rendered",
        "pillsnap/synth/cutouts.py",
        "if hashlib.sha256(data).hexdigest() != picture.sha256:",
        "if not data:",
        "tests/test_cutouts.py::test_a_changed_picture_is_never_rendered_in_silence",
    ),
    Mutation(
        "the dark half of a capsule is not cut out",
        "pillsnap/synth/cutouts.py",
        "(inner > 0) | (differs > 0.45",
        "(inner > 1) | (differs > 0.45",
        "tests/test_cutouts.py::test_two_colours_and_a_dark_print_are_one_pill",
    ),
    Mutation(
        "a record of a real pill does not say so",
        "pillsnap/synth/cutouts.py",
        'chart=f"{SURFACE}: front',
        'chart=f"front',
        "tests/test_cutouts.py::test_every_record_says_what_it_is_and_names_both_pictures",
    ),
    Mutation(
        "the wild domain's draws change a phone's photos",
        "pillsnap/synth/renderer.py",
        'everyday = shot.domain == "wild" and rng.random() < 0.6',
        'everyday = rng.random() < 0.6 and shot.domain == "wild"',
        "tests/test_synth.py::test_phone_photos_do_not_change",
    ),
    Mutation(
        "wild pills lie in the middle of the photo",
        "pillsnap/synth/renderer.py",
        "placed = _anywhere(placed, scene.camera, rng)",
        "pass",
        "tests/test_synth.py::test_wild_photos_show_pills_near_and_far_and_anywhere",
    ),
    Mutation(
        "a clone at another commit is measured",
        "benchmarks/real/sources.py",
        "if (found := _head(folder)) != source.commit:",
        "if not (found := _head(folder)):",
        "tests/test_real_scripts.py::test_another_commit_is_refused",
    ),
    Mutation(
        "a photo that changed is measured",
        "benchmarks/real/sources.py",
        "if hashlib.sha256(data).hexdigest() != self.listed[path]:",
        "if not data:",
        "tests/test_real_scripts.py::test_a_changed_and_a_missing_photo_are_refused",
    ),
    Mutation(
        "near-copies of photos to fine-tune on are measured",
        "benchmarks/real/rp2_detector.py",
        "if groups[p] not in mine]",
        "if p not in tune[::2]]",
        "tests/test_real_scripts.py::test_fine_tuning_and_measuring_share_no_group",
    ),
    Mutation(
        "photos that no list names are imported and measured",
        "benchmarks/real/folders.py",
        "^ set(clone.photos)",
        "& set()",
        "tests/test_real_scripts.py::test_an_import_of_other_photos_than_the_listed_ones_is_refused",
    ),
    Mutation(
        "near-copies of the photos that a drug was enrolled by are asked for",
        "benchmarks/real/rp1_folders.py",
        'rows[~rows["group_id"].isin(shown)]',
        "rows",
        "tests/test_real_scripts.py::test_a_drug_is_asked_for_by_other_groups_than_it_was_enrolled_by",
    ),
    Mutation(
        "the leak gap is the split by near-copies minus the split by photo",
        "benchmarks/real/rp1_folders.py",
        "gap = shares[1].point - shares[0].point",
        "gap = shares[0].point - shares[1].point",
        "tests/test_real_scripts.py::test_only_the_split_by_photo_rewards_remembering_near_copies",
    ),
    Mutation(
        "reference pictures are turned the wrong way",
        "benchmarks/real/reference_views.py",
        "np.diag([1, np.sin(a)]) @ spin(turn)",
        "np.diag([1, np.sin(a)]) @ spin(-turn)",
        "tests/test_real_scripts.py::test_a_reference_is_laid_as_the_pill_lies_in_its_scene",
    ),
    Mutation(
        "a rolled camera is taken for a level one",
        "benchmarks/real/reference_views.py",
        "np.array([0, -np.cos(a)])).then(spin(-roll))",
        "np.array([0, -np.cos(a)])).then(spin(roll))",
        "tests/test_real_scripts.py::test_a_reference_is_laid_as_the_pill_lies_in_its_scene",
    ),
    Mutation(
        "views to train on are turned another way than their references",
        "benchmarks/real/reference_network.py",
        "roll).then(change)\n        return seen",
        "roll)\n        return seen",
        "tests/test_real_scripts.py::test_views_and_references_of_a_batch_lie_alike",
    ),
    Mutation(
        "pills that are held back are trained on",
        "benchmarks/real/rp4_reference.py",
        "Pairs([pills[k] for k in mine], size, views, work)",
        "Pairs(pills, size, views, work)",
        "tests/test_real_scripts.py::test_training_leaves_out_the_pills_that_are_held_back_and_is_not_repeated",
    ),
    Mutation(
        "the back's photo answers for the front's too",
        "benchmarks/real/rp4_reference.py",
        "([s[k::2] for s in scores] for k in (0, 1))",
        "((s[k::2] for s in scores) for k in (0, 1))",
        "tests/test_real_scripts.py::test_each_photo_is_compared_with_both_sides_and_two_photos_show_two_sides",
    ),
    Mutation(
        "two photos of a pill may show one side",
        "benchmarks/real/rp4_reference.py",
        "np.maximum(front + straight, back + crossed)",
        "np.maximum(front, back) + np.maximum(crossed, straight)",
        "tests/test_real_scripts.py::test_a_pill_is_not_named_by_one_side_shown_twice",
    ),
    Mutation(
        "ultralytics' own training gets fewer epochs than ours",
        "benchmarks/real/rp2_detector.py",
        "train_theirs(tree, folder, a.size, epochs)",
        "train_theirs(tree, folder, a.size, epochs // 2)",
        "tests/test_real_scripts.py::test_all_trainings_get_the_same_photos_and_epochs",
    ),
    Mutation(
        "the sharpest calibration photo says which photo is too unsharp",
        "pillsnap/evaluation/conformal.py",
        "UNSHARP * min(calib.sharp)",
        "UNSHARP * max(calib.sharp)",
        "tests/test_safe_answer.py::test_a_view_is_too_unsharp_below_two_thirds_of_the_least_sharp_calibration_photo",
    ),
    Mutation(
        "the least of several drawn thresholds is taken, not the median",
        "pillsnap/evaluation/conformal.py",
        "[len(fits) // 2]",
        "[0]",
        "tests/test_safe_answer.py::test_sets_hold_the_true_drug_in_as_many_new_groups_as_promised[lac]",
    ),
    Mutation(
        "a damaged record of the pack is taken for a photo",
        "pillsnap/photos/pack.py",
        'if zlib.crc32(data) != r["crc"]:',
        "if False:",
        "tests/test_pack.py::test_one_bit_is_noticed",
    ),
    Mutation(
        "a process works before all are connected",
        "pillsnap/training/distributed.py",
        "            torch.distributed.barrier()",
        "            pass",
        "tests/test_distributed.py::test_no_process_works_and_leaves_before_all_are_connected",
    ),
    Mutation(
        "photos with a misplaced box stay in the figure without them",
        "benchmarks/real/rp2_detector.py",
        'if x["photo"] not in wrong]',
        'if x["photo"]]',
        "tests/test_real_scripts.py::test_photos_with_a_misplaced_box_are_left_out_of_a_figure_of_their_own",
    ),
    Mutation(
        "a coin beside a pill is labelled as a pill",
        "benchmarks/real/scenes.py",
        "    extents = extents[len(things) :]\n",
        "",
        "tests/test_real_scripts.py::test_things_lie_beside_pills_and_get_no_box",
    ),
    Mutation(
        "things lie over pills",
        "benchmarks/real/scenes.py",
        "> k + 0.8 * r for u, v, k in taken",
        "> 0 for u, v, k in taken",
        "tests/test_real_scripts.py::test_things_lie_beside_pills_and_get_no_box",
    ),
    Mutation(
        "photos that chose a setting of the detector count as kept aside",
        "benchmarks/real/rp2_detector.py",
        'if x["group"] not in chose]',
        'if x["group"]]',
        "tests/test_real_scripts.py::test_photos_that_chose_a_setting_are_left_out_of_the_second_figure",
    ),
    Mutation(
        "a fine-tuning stops after seven epochs without a better figure on two photos",
        "benchmarks/real/rp2_detector.py",
        "rule = dict(patience=part.epochs,",
        "rule = dict(patience=7,",
        "tests/test_real_scripts.py::test_a_training_takes_all_its_epochs_and_keeps_weights_on_its_way",
    ),
    Mutation(
        "a trainer whose drugs stand in another order is scored",
        "benchmarks/real/rp3_peers.py",
        "if abs(counted - trained.claimed) > APART:",
        "if abs(counted - trained.claimed) > 1:",
        "tests/test_real_scripts.py::test_another_order_of_the_drugs_is_noticed",
    ),
    Mutation(
        "the other trainers do not get every training photo",
        "benchmarks/real/rp3_peers.py",
        "found[part] = t.assign(file=[str(f) for f in files])",
        "found[part] = t.assign(file=[str(f) for f in files]).iloc[1:]",
        "tests/test_real_scripts.py::test_all_trainers_get_the_same_photos",
    ),
    Mutation(
        "the lead over another trainer is its lead over PillSnap",
        "benchmarks/real/folders.py",
        'more = (mine["true"] == mine["answered"]).astype(float) - (other["true"] == other["answered"])',
        'more = (other["true"] == other["answered"]).astype(float) - (mine["true"] == mine["answered"])',
        "tests/test_real_scripts.py::test_the_lead_is_counted_photo_by_photo",
    ),
    Mutation(
        "pills are cut out of validation photos, and rendered for training",
        "benchmarks/real/rp5_synthetic.py",
        "taken = cut_outs(data.train,",
        "taken = cut_outs(data.val,",
        "tests/test_real_scripts.py::test_every_share_of_rendered_photos_trains_equally_long_on_training_photos",
    ),
    Mutation(
        "an epoch of few photos is shorter",
        "benchmarks/real/rp5_synthetic.py",
        "np.resize(np.random.default_rng(7).permutation(len(rows)), n)",
        "np.random.default_rng(7).permutation(len(rows))[:n]",
        "tests/test_real_scripts.py::test_every_share_of_rendered_photos_trains_equally_long_on_training_photos",
    ),
    Mutation(
        "a pill that is cut by the edge of its picture is rendered",
        "benchmarks/real/rp5_synthetic.py",
        "x > 1 and y > 1 and x + bw < w - 1 and y + bh < h - 1",
        "bool(bw)",
        "tests/test_real_scripts.py::test_both_sides_are_cut_out_whole_or_not_at_all",
    ),
    Mutation(
        "a published figure is of other photos",
        "benchmarks/real/photos/epillid.sha256",
        "epillIDsmall/0002-3229_0_0.jpg",
        "epillIDsmall/0002-3228_0_0.jpg",
        "tests/test_real_scripts.py::test_published_figures_are_of_the_listed_photos",
    ),
    Mutation(
        "the narrow limit of a photo counts 1000 bytes to the kilobyte",
        "pillsnap/deployment/serversettings.py",
        "self.narrow_photo_kb * 1024",
        "self.narrow_photo_kb * 1000",
        "tests/test_server.py::test_the_narrow_family_has_its_own_limit_of_a_photo",
    ),
    Mutation(
        "the narrow network answers without CLAHE",
        "pillsnap/photos/unified.py",
        "return whole_view(img, size) if unified is None else unified.sized(size).pixels(img)",
        "return whole_view(img, size) if unified is None else unified.sized(size).square(img)",
        "tests/test_narrow.py::test_training_evaluation_and_the_bundle_show_the_network_the_same_numbers",
    ),
    Mutation(
        "the narrow server's tensor has its colours swapped",
        "pillsnap/photos/intake.py",
        "normalise(np.stack([self.unified.pixels(self._upright(p)) for p in photos]))",
        "normalise(np.stack([self.unified.pixels(self._upright(p)[..., ::-1]) for p in photos]))",
        "tests/test_narrow.py::test_the_committed_golden_vectors_are_what_this_version_makes",
    ),
    Mutation(
        "narrow photos are cut from a pack",
        "pillsnap/dataset/sources.py",
        "    PackSource.refuse(views)  # before a pack is built for nothing\n",
        "",
        "tests/test_narrow.py::test_a_pack_is_refused",
    ),
    Mutation(
        "more real photos are mixed in than three to seven",
        "pillsnap/dataset/studioreal.py",
        "of_real = min(real, int(studio / ratio + 1e-9))",
        "of_real = real",
        "tests/test_narrow.py::test_the_mix_is_three_to_seven_and_says_where_it_is_not",
    ),
    Mutation(
        "the mix states the share that was asked for",
        "pillsnap/dataset/studioreal.py",
        "abs(studio / n - self.studio_share)",
        "abs(self.studio_share - self.studio_share)",
        "tests/test_narrow.py::test_the_mix_is_three_to_seven_and_says_where_it_is_not",
    ),
    Mutation(
        "real photos of one capture are parted by the split",
        "pillsnap/dataset/studioreal.py",
        'group = f"real_{drug}_{_capture_of(path.name)}"',
        'group = f"real_{drug}_{path.name}"',
        "tests/test_narrow.py::test_no_capture_of_a_real_photo_is_on_two_sides_of_the_split",
    ),
    Mutation(
        "the export leaves the narrow targets without size and time",
        "pillsnap/deployment/export.py",
        "_, words = write_narrow_targets(root)",
        'words = "MB of classifier.onnx"',
        "tests/test_narrow.py::test_the_evaluation_and_the_export_write_the_targets",
    ),
    Mutation(
        "rendered photos count as real ones",
        "pillsnap/evaluation/narrowtargets.py",
        'eval_set.loc[eval_set["domain"] == "real", "path"]',
        'eval_set["path"]',
        "tests/test_narrow.py::test_studio_photos_and_rendered_ones_are_no_real_ones",
    ),
    Mutation(
        "photos of two different drugs are answered as one pill",
        "pillsnap/models/twoside.py",
        "agree = together >= ONE_DRUG * apart and found.sets[:, found.p.argmax()].all()",
        "agree = True",
        "tests/test_twoside.py::test_two_drugs_in_two_photos_are_refused",
    ),
    Mutation(
        "the other side is blamed for a photo that spoils a pair",
        "pillsnap/models/twoside.py",
        "list(PICTURES)[list(wrong).index(True)]",
        "list(PICTURES)[list(wrong).index(False)]",
        "tests/test_twoside.py::test_the_photo_that_spoils_a_pair_is_named",
    ),
    Mutation(
        "one photo is in many pairs",
        "pillsnap/evaluation/pairs.py",
        "for i, j, _ in _matched(*views)]",
        "for i in views[0] for j in views[1]]",
        "tests/test_twoside.py::test_no_photo_and_no_capture_group_is_in_two_pairs",
    ),
    Mutation(
        "clean pairs fit the rule of pairs",
        "pillsnap/evaluation/pairs.py",
        'calib, fit = pairs[pairs["part"] == "calib"], _Fit',
        'calib, fit = pairs[pairs["part"] != "val"], _Fit',
        "tests/test_twoside.py::test_clean_photos_fit_nothing",
    ),
    Mutation(
        "the server answers two sides from the front alone",
        "pillsnap/deployment/workers.py",
        "bundle.predict_sides(task.photo, task.back, task.topk)",
        "bundle.predict(task.photo, task.mode, task.topk)",
        "tests/test_server.py::test_two_sides_are_answered_as_the_bundle_does",
    ),
    Mutation(
        "the photo of the back is not checked before a worker opens it",
        "pillsnap/deployment/server.py",
        "for photo, side in zip(photos, PICTURES):",
        "for photo, side in zip(photos[:1], PICTURES):",
        "tests/test_server.py::test_what_two_sides_need_is_said",
    ),
    Mutation(
        "the page sends the front of a pill without its back",
        "pillsnap/web/app.js",
        "for (const photo of [entry.file, entry.back])",
        "for (const photo of [entry.file])",
        "tests/test_web_page.py::test_two_sides_are_one_card",
    ),
    Mutation(
        "a changed gallery is answered with",
        "pillsnap/models/gallery.py",
        "if not path.is_file() or sha256_file(path) != sha256:",
        "if not path.is_file():",
        "tests/test_gallery.py::test_a_changed_gallery_is_refused",
    ),
    Mutation(
        "a gallery's journal may be rewritten",
        "pillsnap/models/enrolment.py",
        'if entry["action"] not in ACTIONS or entry != journal_line(entries, entry["action"], **given):',
        'if entry["action"] not in ACTIONS:',
        "tests/test_gallery.py::test_two_who_enrol_at_once_lose_nothing_and_the_file_keeps_it",
    ),
    Mutation(
        "an undone step of a gallery's journal counts on",
        "pillsnap/models/enrolment.py",
        'if e["seq"] in undone or e["action"] == "undo":',
        'if e["action"] == "undo":',
        "tests/test_gallery.py::test_an_enrolled_drug_is_named_and_the_others_do_not_move",
    ),
    Mutation(
        "a trained drug of a gallery may be enrolled again, without calibration",
        "pillsnap/deployment/enrol.py",
        "if same_name(key) in {same_name(k) for k in known.trained.class_map.keys}:",
        "if same_name(key) in set():",
        "tests/test_gallery.py::test_what_could_harm_is_not_enrolled",
    ),
    Mutation(
        "one side photographed twice counts as a pair",
        "pillsnap/models/twoside.py",
        "member = (member & one_side) | prediction_sets(p[None], rule.fused)[0]",
        "member = prediction_sets(p[None], rule.fused)[0]",
        "tests/test_twoside.py::test_one_side_photographed_twice_keeps_what_both_photos_leave_open",
    ),
    Mutation(
        "a widening is kept under another rule",
        "pillsnap/models/enrolment.py",
        'self.entries[-1].get("rule") != rule_digest(rule)',
        "False",
        "tests/test_gallery.py::test_what_a_widening_rests_on_is_checked",
    ),
    Mutation(
        "an enrolment goes into the gallery of an export that was made anew",
        "pillsnap/deployment/enrol.py",
        'known.trained.meta["digest"] != bundle.known.trained.meta["digest"]',
        "False",
        "tests/test_gallery.py::test_what_a_widening_rests_on_is_checked",
    ),
    Mutation(
        "a photo that the connection does not carry is sent all the same",
        "pillsnap/web/photodrop.js",
        'file.size <= model.get("most_bytes")',
        "true",
        "tests/test_menu_browser.py::test_photos_are_dropped_pasted_and_taken_in_jupyterlab",
    ),
    Mutation(
        "the photos of one drop are answered one by one",
        "pillsnap/deployment/photodrop.py",
        'if len(self._arrived[drop]) == content["of"]:',
        "if self._arrived[drop]:",
        "tests/test_menu_browser.py::test_photos_are_dropped_pasted_and_taken_in_jupyterlab",
    ),
    Mutation(
        "a gallery scores a drug by its farthest reference photo",
        "pillsnap/models/gallery.py",
        "out[:, mine] = np.maximum(out[:, mine], np.maximum.reduceat(cosines, first, axis=1))",
        "out[:, mine] = np.maximum(out[:, mine], np.minimum.reduceat(cosines, first, axis=1))",
        "tests/test_gallery.py::test_the_bundle_answers_by_the_nearest_photo",
    ),
    Mutation(
        "a JPEG's colour profile is not looked for",
        "pillsnap/photos/images.py",
        "mark in (0xE1, 0xE2) for",
        "mark in (0xE1,) for",
        "tests/test_images.py::test_a_photo_in_another_colour_space_is_read_in_srgb",
    ),
    Mutation(
        "a photo's colour profile is not applied",
        "pillsnap/photos/images.py",
        "    return to_srgb(im, profile)\n",
        '    return im.convert("RGB")\n',
        "tests/test_images.py::test_a_photo_in_another_colour_space_is_read_in_srgb",
    ),
    Mutation(
        "a colour profile that makes white black is applied",
        "pillsnap/photos/colourprofiles.py",
        "after[0, 0].min() < 240",
        "after[0, 0].min() < 0",
        "tests/test_images.py::test_a_broken_colour_profile_is_ignored_with_one_line",
    ),
    Mutation(
        "OpenCV reads a photo without its colour profile",
        "pillsnap/photos/images.py",
        '    if any(mark in b for mark in (b"iCCP"',
        '    if any(mark in b"" for mark in (b"iCCP"',
        "tests/test_images.py::test_a_decoder_that_ignores_the_profile_is_not_asked",
    ),
    Mutation(
        "a remark takes a letter that turns the writing direction",
        "pillsnap/dataset/feedback.py",
        "\\u2028-\\u202e",
        "\\u2028-\\u2029",
        "tests/test_answers_shown.py::test_a_remark_takes_every_name_that_an_import_gives",
    ),
    Mutation(
        "a remark takes K-codes and other plain ASCII alone",
        "pillsnap/dataset/feedback.py",
        '_KEY = rf"[^ {_HIDDEN}][^{_HIDDEN}]{{0,254}}"',
        '_KEY = "[!-~]{1,64}"',
        "tests/test_answers_shown.py::test_a_remark_takes_every_name_that_an_import_gives",
    ),
    Mutation(
        "the last word of an option is taken for the drug",
        "pillsnap/deployment/identify.py",
        "self.options.get(typed, typed)",
        '" ".join(typed.split()[-1:])',
        "tests/test_answers_shown.py::test_the_app_stores_remarks_about_drugs_with_any_name",
    ),
    Mutation(
        "a remark that cannot be stored raises in the app",
        "pillsnap/deployment/identify.py",
        "except (PillsnapError, ValidationError) as e:",
        "except PillsnapError as e:",
        "tests/test_answers_shown.py::test_a_remark_that_cannot_be_stored_is_told",
    ),
    Mutation(
        "the page takes K-codes alone",
        "pillsnap/web/app.js",
        'state.version.bundle.keys === "kcode"',
        'state.version.bundle.keys !== ""',
        "tests/test_web_page.py::test_drugs_with_names_of_any_kind_have_remarks_and_pictures",
    ),
    Mutation(
        "a reference picture is named after its class key",
        "pillsnap/deployment/thumbnails.py",
        "{data.class_map.id(key):06d}_{side}.jpg",
        "{key}_{side}.jpg",
        "tests/test_answers_shown.py::test_reference_pictures_of_drugs_with_any_name_can_be_read",
    ),
    Mutation(
        "a table does not say that no rule checked a name",
        "pillsnap/deployment/batch.py",
        '"reason": item["reason"], ',
        '"reason": None, ',
        "tests/test_answers_shown.py::test_a_name_that_no_rule_checked_says_so_in_tables_and_lines",
    ),
    Mutation(
        "a line does not say that no rule checked a name",
        "pillsnap/deployment/batch.py",
        'if verdict_kind(item) == "unjudged" else ""',
        'if verdict_kind(item) == "" else ""',
        "tests/test_answers_shown.py::test_a_name_that_no_rule_checked_says_so_in_tables_and_lines",
    ),
    Mutation(
        "a CSV table holds formulas of others",
        "pillsnap/deployment/batch.py",
        "{column: _cell(value) for column",
        "{column: value for column",
        "tests/test_answers_shown.py::test_a_spreadsheet_takes_no_cell_for_a_formula",
    ),
    Mutation(
        "two drops at once are mixed",
        "pillsnap/deployment/photodrop.py",
        'drop = str(content["drop"])',
        'drop = ""',
        "tests/test_answers_shown.py::test_two_drops_at_once_lose_no_photo",
    ),
    Mutation(
        "a card says that sizes are alike which no record holds",
        "pillsnap/models/card.py",
        '_ALIKE = {"shape", "colour_front", "size_mm"}',
        '_ALIKE = {"shape", "colour_front"}',
        "tests/test_card.py::test_no_card_says_that_records_are_alike_which_do_not_exist",
    ),
    Mutation(
        "drugs without any imprint are called the same",
        "pillsnap/models/card.py",
        '{"imprint_front", "imprint_back"} <= set(lacking)',
        '{"none"} <= set(lacking)',
        "tests/test_card.py::test_what_one_record_holds_of_a_size_is_compared_with_the_same_of_the_other",
    ),
    Mutation(
        "a length is compared with a thickness",
        "pillsnap/models/card.py",
        "    if not any(a is not None and b is not None for a, b in sizes):\n",
        "    if not list(sizes):\n",
        "tests/test_card.py::test_what_one_record_holds_of_a_size_is_compared_with_the_same_of_the_other",
    ),
    Mutation(
        "a page of another site reloads a server without keys",
        "pillsnap/deployment/server.py",
        'if method == "POST" and origin not in own',
        'if method == "PUT" and origin not in own',
        "tests/test_server.py::test_without_keys_pages_of_other_sites_change_nothing_and_reload_reads_model_path",
    ),
    Mutation(
        "a reload takes the file's earlier values",
        "pillsnap/deployment/server.py",
        "    service.watch.refresh(now=True)\n",
        "",
        "tests/test_server.py::test_without_keys_pages_of_other_sites_change_nothing_and_reload_reads_model_path",
    ),
    Mutation(
        "a reload waits for the next look at the file",
        "pillsnap/deployment/server.py",
        "service.watch.refresh(now=True)",
        "service.watch.refresh()",
        "tests/test_server.py::test_without_keys_pages_of_other_sites_change_nothing_and_reload_reads_model_path",
    ),
    Mutation(
        "copies of one photo show two drugs",
        "pillsnap/dataset/importers.py",
        "    df = _drop_contradictions(df, sort.quarantine)\n",
        "",
        "tests/test_importers.py::test_one_photo_in_the_folders_of_two_drugs_is_left_out_everywhere",
    ),
    Mutation(
        "a box in fractions is taken for pixels",
        "pillsnap/dataset/importers.py",
        "if not relative and min(box[2:]) > 0 and in_fractions(box):",
        "if False:",
        "tests/test_importers.py::test_a_box_in_fractions_of_its_photo_is_not_taken_for_pixels",
    ),
    Mutation(
        "corners in fractions of a VOC file are shifted by a pixel",
        "pillsnap/dataset/labelfiles.py",
        "if in_fractions([x0 + 1, y0 + 1, x1, y1]):",
        "if False:",
        "tests/test_importers.py::test_a_box_in_fractions_of_its_photo_is_not_taken_for_pixels",
    ),
    Mutation(
        "nobody says what to do with fractions",
        "pillsnap/dataset/importers.py",
        '        fix = f"{_FRACTIONS}; {fix}"\n',
        "        pass\n",
        "tests/test_importers.py::test_a_box_in_fractions_of_its_photo_is_not_taken_for_pixels",
    ),
    Mutation(
        "a YOLO export keeps COCO's numbers",
        "pillsnap/dataset/labelexport.py",
        'if form == "yolo" and sorted(kept) != list(range(len(kept))):',
        "if False:",
        "tests/test_importers.py::test_ultralytics_accepts_a_yolo_export_of_coco_labels",
    ),
    Mutation(
        "a YOLO export is found from one folder alone",
        "pillsnap/dataset/labelexport.py",
        'doc = dict(train="images"',
        'doc = dict(path=".", train="images"',
        "tests/test_importers.py::test_ultralytics_accepts_a_yolo_export_of_coco_labels",
    ),
    Mutation(
        "a COCO export has no photos",
        "pillsnap/dataset/labelexport.py",
        '        _link_photos(places, Path(header["root"]), new, progress)\n',
        '        if form != "coco":\n            _link_photos(places, Path(header["root"]), new, progress)\n',
        "tests/test_importers.py::test_an_exported_folder_of_coco_labels_can_be_used_as_it_is",
    ),
    Mutation(
        "two photos share one YOLO label",
        "pillsnap/dataset/labelexport.py",
        "if times[yolo_label(place)[0]] > 1:",
        "if False:",
        "tests/test_importers.py::test_photos_that_differ_in_their_ending_alone_keep_their_own_yolo_labels",
    ),
    Mutation(
        "a table is read with commas alone",
        "pillsnap/dataset/labelfiles.py",
        "    return max(_SEPARATORS, key=columns)",
        '    return ","',
        "tests/test_importers.py::test_a_table_is_read_as_any_spreadsheet_saves_it",
    ),
    Mutation(
        "a table of facts is read with commas alone",
        "pillsnap/dataset/labelfiles.py",
        "    return max(_SEPARATORS, key=columns)",
        '    return ","',
        "tests/test_importers.py::test_the_table_of_facts_is_read_as_any_spreadsheet_saves_it",
    ),
    Mutation(
        "a label file in capitals is not seen",
        "pillsnap/dataset/labelfiles.py",
        "if os.path.splitext(p)[1].lower() in endings]",
        "if os.path.splitext(p)[1] in endings]",
        "tests/test_importers.py::test_a_table_is_read_as_any_spreadsheet_saves_it",
    ),
    Mutation(
        "a table that lacks a column is passed over",
        "pillsnap/dataset/labelfiles.py",
        '    if form == "auto" and not found:\n',
        "    if False:\n",
        "tests/test_importers.py::test_a_table_that_is_not_understood_is_not_passed_over_in_silence",
    ),
    Mutation(
        "a gallery invents the side that an imported photo shows",
        "pillsnap/training/retrieval.py",
        "Reference(keys[label], int(side), str(group), path)",
        "Reference(keys[label], abs(int(side)), str(group), path)",
        "tests/test_importers_run.py::test_retrieval_answers_from_photos_without_boxes",
    ),
    Mutation(
        "two processes write to a gallery's journal at once",
        "pillsnap/deployment/enrol.py",
        "    with nobody_enrols(folder):\n        known",
        "    if folder:\n        known",
        "tests/test_gallery.py::test_two_who_enrol_at_once_lose_nothing_and_the_file_keeps_it",
    ),
    Mutation(
        "a drug with two references counts as enrolled by five",
        "pillsnap/evaluation/openranking.py",
        "all(len(r) >= n for (k, _), r in",
        "all(len(r) >= 1 for (k, _), r in",
        "tests/test_heldout.py::test_unknown_drugs_are_refused_by_the_rule_of_the_run",
    ),
    Mutation(
        "a label in other capitals finds no photo",
        "pillsnap/dataset/labelfiles.py",
        " or self._among(self.folded, name.casefold(), beside.casefold())",
        "",
        "tests/test_importers.py::test_capitals_of_a_photos_name_need_not_be_those_of_its_label",
    ),
    Mutation(
        "a label in other capitals names one of two photos",
        "pillsnap/dataset/labelfiles.py",
        "if p.casefold() not in alike}",
        "if p}",
        "tests/test_importers.py::test_capitals_of_a_photos_name_need_not_be_those_of_its_label",
    ),
    Mutation(
        "linked folders of photos are passed over",
        "pillsnap/dataset/labelfiles.py",
        "os.walk(root, followlinks=True)",
        "os.walk(root)",
        "tests/test_importers.py::test_films_links_and_one_drug_alone_are_told",
    ),
    Mutation(
        "classes that are one word are a list of letters",
        "pillsnap/dataset/labelfiles.py",
        "        if isinstance(names, str):\n",
        "        if False:\n",
        "tests/test_importers.py::test_classes_that_are_one_word_are_no_list_of_letters",
    ),
    Mutation(
        "nobody says that the drugs have too few photos",
        "pillsnap/dataset/splits.py",
        "    if not splits.classes:\n",
        "    if False:\n",
        "tests/test_importers.py::test_two_photos_of_two_drugs_are_too_few_and_it_is_said",
    ),
    Mutation(
        "the server's limit of a narrow photo is a number of its own",
        "pillsnap/deployment/serversettings.py",
        "ImageValidator.most_kilobytes,",
        "10_240,",
        "tests/test_narrow.py::test_the_gateway_and_the_server_share_the_limit_of_a_photo",
    ),
    Mutation(
        "a photo is read as a table of labels",
        "pillsnap/dataset/labelfiles.py",
        "if (ending := source.suffix.lower()) not in kinds:",
        'if (ending := source.suffix.lower() if source.suffix.lower() in kinds else ".csv") not in kinds:',
        "tests/test_importers.py::test_a_file_that_holds_no_labels_is_refused_by_what_it_is",
    ),
    Mutation(
        "a mistyped K-code makes a known drug known twice",
        "pillsnap/deployment/enrol.py",
        "if found and not shares_name:",
        "if False:",
        "tests/test_gallery.py::test_what_could_harm_is_not_enrolled",
    ),
    Mutation(
        "one shot, saved twice, is enrolled as front and back",
        "pillsnap/deployment/enrol.py",
        "any(same_shot(image, earlier) for earlier in images)",
        "any(np.array_equal(image, earlier) for earlier in images)",
        "tests/test_gallery.py::test_what_could_harm_is_not_enrolled",
    ),
    Mutation(
        "copies of one shot are two sides",
        "pillsnap/models/twoside.py",
        "SAME_SHOT = 2.5",
        "SAME_SHOT = 0.5",
        "tests/test_twoside.py::test_one_shot_saved_twice_is_no_front_and_back",
    ),
    Mutation(
        "two sides that look alike are one shot",
        "pillsnap/models/twoside.py",
        "np.percentile(apart, 99) <= SAME_SHOT",
        "np.median(apart) <= SAME_SHOT",
        "tests/test_twoside.py::test_one_shot_saved_twice_is_no_front_and_back",
    ),
    Mutation(
        "two sides are offered although not one pair was calibrated",
        "pillsnap/evaluation/pairs.py",
        "if n >= LEAST_PAIRS:",
        "if n >= 0:",
        "tests/test_twoside.py::test_without_pairs_there_is_no_rule_of_pairs_and_no_promise",
    ),
    Mutation(
        "a pair's unknown score divides by a share of 0",
        "pillsnap/evaluation/pairs.py",
        'calib["unit"].nunique() * share < 1',
        'calib["unit"].nunique() < 1 / share',
        "tests/test_twoside.py::test_no_known_drug_need_be_refused",
    ),
    Mutation(
        "a bundle does not say why it needs one photo",
        "pillsnap/deployment/runtime.py",
        'self.meta.get("why_no_pairs") or ',
        "",
        "tests/test_gallery.py::test_a_bundle_without_calibrated_pairs_says_why_it_needs_one_photo",
    ),
    Mutation(
        "a quantised bundle answers no pair",
        "pillsnap/deployment/variants.py",
        "pair_rule=measured.pairs,",
        "pair_rule=None,",
        "tests/test_quantise.py::test_each_precision_answers_both_sides_by_a_rule_of_its_own",
    ),
    Mutation(
        "without faiss, an index gives cosines it was not calibrated with",
        "pillsnap/models/gallery.py",
        "return ExactSearch(vectors)",
        "return None",
        "tests/test_gallery.py::test_an_index_without_faiss_gives_the_cosines_it_was_calibrated_with",
    ),
    Mutation(
        "a pair is called calibrated after an enrolment",
        "pillsnap/deployment/runtime.py",
        "fused=None, calibrated=False,",
        "fused=None,",
        "tests/test_gallery.py::test_a_pair_is_not_called_calibrated_after_an_enrolment",
    ),
    Mutation(
        "a heap of pills counts as none",
        "pillsnap/photos/locator.py",
        "return Located.of([((box * float(factor)).clip(0, [w, h, w, h]), 0.0) for box in rough])",
        "return Located.of([])",
        "tests/test_second_look.py::test_a_heap_gets_no_name_in_single_mode",
    ),
    Mutation(
        "a refused photo passes drugs in a pair",
        "pillsnap/models/twoside.py",
        "found = replace(found, sets=found.sets & np.array(usable)[:, None])",
        "found = replace(found)",
        "tests/test_twoside.py::test_a_photo_that_gets_no_answer_shows_no_drug_beside_another_photo",
    ),
    Mutation(
        "the coverage of a widened rule must stay",
        "pillsnap/deployment/enrol.py",
        'float(bundle.meta["temperature"]), trained)',
        'float(bundle.meta["temperature"]))',
        "tests/test_gallery.py::test_an_enrolment_that_is_undone_leaves_the_rule_as_it_was",
    ),
    Mutation(
        "a backup is made while somebody enrols",
        "pillsnap/deployment/backup.py",
        'with nobody_enrols(run / "export" / "gallery"):',
        "if run:",
        "tests/test_gallery.py::test_a_copy_holds_the_gallery_of_one_moment[backup]",
    ),
    Mutation(
        "a bundle's file replaces one before it answers",
        "pillsnap/core/container.py",
        "        if check is not None:\n            check(tmp)\n",
        "",
        "tests/test_gallery.py::test_a_bundle_that_could_not_be_made_leaves_the_earlier_one",
    ),
    Mutation(
        "a precision is deleted before the next is written",
        "pillsnap/deployment/variants.py",
        "    shutil.rmtree(new, ignore_errors=True)\n    try:",
        "    shutil.rmtree(folder, ignore_errors=True)\n    try:",
        "tests/test_quantise.py::test_a_disk_that_is_full_leaves_the_earlier_precision",
    ),
    Mutation(
        "the client keeps its connection after Ctrl-C",
        "pillsnap/client.py",
        "belongs to no question\n            self.connection.close()\n",
        "belongs to no question\n",
        "tests/test_server.py::test_the_client_answers_after_a_cut_answer_and_after_ctrl_c",
    ),
    Mutation(
        "a batch may be larger than the queue",
        "pillsnap/deployment/service.py",
        "min(self.limits.batch_photos, self.limits.per_minute, self.gate.places)",
        "self.limits.batch_photos",
        "tests/test_server.py::test_a_batch_that_no_limit_would_ever_let_through_is_told_its_size",
    ),
    Mutation(
        "copies are looked for among the first drugs alone",
        "pillsnap/dataset/duplicates.py",
        ', "rows": sha256_text(rows)}',
        "}",
        "tests/test_splits.py::test_copies_are_looked_for_again_when_more_drugs_are_split",
    ),
    Mutation(
        "photos of several pills have no copies",
        "pillsnap/dataset/bursts.py",
        '        kind="single",\n        bbox=one["bbox"].where(~several, ""),',
        '        bbox=one["bbox"].where(~several, ""),',
        "tests/test_importers.py::test_a_copy_of_a_photo_is_in_its_group_however_many_pills_it_shows",
    ),
    Mutation(
        "a photo that lost a pill is one of a single drug",
        "pillsnap/dataset/importers.py",
        "_row(photo.path, check, len(got) > 1, *pill)",
        "_row(photo.path, check, len(kept) > 1, *pill)",
        "tests/test_importers.py::test_of_a_photo_that_lost_a_pill_the_classifier_sees_the_crop_alone",
    ),
    Mutation(
        "a read error is kept as a photo's own",
        "pillsnap/dataset/opening.py",
        ' if not s.detail.startswith("read:"))',
        ")",
        "tests/test_conversion.py::test_photos_that_could_not_be_read_once_are_read_the_next_time",
    ),
    Mutation(
        "a relabelled photo keeps its wrong series",
        "pillsnap/dataset/overlay.py",
        'out["group_id"] = _joined_series(df, kind == "relabel", new)',
        'out["group_id"] = df["group_id"]',
        "tests/test_triage.py::test_a_relabelled_photo_is_split_with_the_series_of_the_drug_that_it_shows",
    ),
    Mutation(
        "two sizes of a photo are not compared",
        "pillsnap/delivery/truth.py",
        "if len({p.size for p in photo.pills}) > 1:",
        "if len({p.size for p in photo.pills}) > 9:",
        "tests/test_conversion.py::test_records_that_state_two_sizes_of_one_photo_give_no_box",
    ),
    Mutation(
        "a model of another split meets the sealed photos",
        "pillsnap/evaluation/heldout.py",
        "        _check_training(run.root, data.stage, path.absolute())",
        "        pass",
        "tests/test_heldout.py::test_a_model_of_another_split_never_meets_the_sealed_photos",
    ),
    Mutation(
        "a ledger without its last lines is accepted",
        "pillsnap/evaluation/ledger.py",
        "    if len(entries) < n or (n and",
        "    if n < 0 and (n and",
        "tests/test_advisor.py::test_a_ledger_that_lost_its_last_lines_is_refused",
    ),
    Mutation(
        "a ledger that is a line ahead of run.json is refused",
        "pillsnap/evaluation/ledger.py",
        "    if len(entries) < n or (n and",
        "    if len(entries) != n or (n and",
        "tests/test_advisor.py::test_a_line_that_was_written_just_before_the_program_died_is_kept",
    ),
    Mutation(
        "the GO of one model opens the sealed test to another",
        "pillsnap/evaluation/heldout.py",
        'if sha not in done.get("models", {}).values())',
        "if not sha)",
        "tests/test_heldout.py::test_a_go_or_a_decision_holds_for_the_models_that_it_was_about",
    ),
    Mutation(
        "figures of other settings are kept",
        "pillsnap/evaluation/evaluation.py",
        "    if changed := config_diff(",
        "    if False and config_diff(",
        "tests/test_evaluation.py::test_a_measurement_with_other_settings_is_not_kept",
    ),
    Mutation(
        "a manifest of another delivery is up to date",
        "pillsnap/core/jobs.py",
        '_settings_read(cfg, rec["settings"], root), ignore=())',
        '_settings_read(cfg, rec["settings"], root))',
        "tests/test_conversion.py::test_the_job_renders_converts_and_reports",
    ),
    Mutation(
        "two programs write the ledger at once",
        "pillsnap/evaluation/ledger.py",
        "        lock.acquire()",
        "        pass",
        "tests/test_advisor.py::test_of_two_who_write_the_ledger_at_once_no_line_is_lost",
    ),
    Mutation(
        "a reason's line separator ends a line of the ledger",
        "pillsnap/evaluation/ledger.py",
        'enumerate(path.read_bytes().removesuffix(b"\\n").split(b"\\n"), 1)',
        'enumerate(path.read_text(encoding="utf-8").splitlines(), 1)',
        "tests/test_advisor.py::test_a_reason_may_hold_any_character",
    ),
    Mutation(
        "a killed kernel is a traceback",
        "pillsnap/core/runner.py",
        "except DeadKernelError as e:",
        "except ZeroDivisionError as e:",
        "tests/test_processes.py::test_a_killed_kernel_is_told_with_the_command_that_goes_on",
    ),
    Mutation(
        "a run with a failed job cannot be shown",
        "pillsnap/runs.py",
        "r.get('verdict') or r['status']",
        "r['verdict'] or r['status']",
        "tests/test_processes.py::test_a_run_whose_job_failed_is_shown",
    ),
    Mutation(
        "logits that are not finite name the first drug",
        "pillsnap/evaluation/reports.py",
        "np.where(answered, p.argmax(1), -1)",
        "p.argmax(1)",
        "tests/test_metrics.py::test_a_network_that_overflows_answers_nothing",
    ),
    Mutation(
        "an evaluation of another view is up to date",
        "pillsnap/evaluation/measurements.py",
        '    "inference.focus",\n',
        "",
        "tests/test_evaluation.py::test_an_evaluation_of_another_view_is_not_up_to_date",
    ),
    Mutation(
        "the step that ends an epoch is not tried again",
        "pillsnap/training/memory.py",
        "_step_at_once(self) if guard is None else guard.flush()",
        "_step_at_once(self)",
        "tests/test_gpu_engine.py::test_the_window_that_ends_an_epoch_is_tried_again",
    ),
    Mutation(
        "an open window does not keep its gradients' scale",
        "pillsnap/training/memory.py",
        "            p.grad = g * times",
        "            p.grad = g.clone()",
        "tests/test_gpu_engine.py::test_an_escalation_to_fp16_keeps_the_batches_of_an_open_window",
    ),
    Mutation(
        "a resumed process draws the first one's dropout",
        "pillsnap/training/distributed.py",
        "        if self.rank:\n            key",
        "        if self.rank and not self.iter:\n            key",
        "tests/test_stop_and_go.py::test_a_second_process_draws_on_where_it_stood",
    ),
    Mutation(
        "a number sign in an override begins a comment",
        "pillsnap/core/config.py",
        """        if text.startswith(("[", "{", '"', "'")):""",
        "        if True:",
        "tests/test_config.py::test_the_name_of_a_folder_is_taken_as_it_stands",
    ),
    Mutation(
        "a later override drops its neighbours",
        "pillsnap/core/config.py",
        "        layer = _merge(layer, one)",
        "        _put(layer, dotted.strip(), _parse_value(value, dotted))",
        "tests/test_config.py::test_later_overrides_take_precedence_key_by_key",
    ),
    Mutation(
        "an infinite learning rate is a setting",
        "pillsnap/core/settings.py",
        "allow_inf_nan=False",
        "allow_inf_nan=True",
        "tests/test_config.py::test_a_refused_setting_says_why",
    ),
    Mutation(
        "a copied run folder has another delivery",
        "pillsnap/core/jobs.py",
        "    inside = photos.is_relative_to(os.path.abspath(root))",
        "    inside = False",
        "tests/test_conversion.py::test_a_run_folder_may_be_copied_with_its_photos",
    ),
    Mutation(
        "photos of a telephone are passed over in silence",
        "pillsnap/deployment/batch.py",
        "        if others:\n            logger",
        "        if False:\n            logger",
        "tests/test_predict.py::test_photos_that_cannot_be_opened_are_counted",
    ),
    Mutation(
        "a table's folder is looked at when all photos are answered",
        "pillsnap/deployment/batch.py",
        "    check_writable(Path(out).parent)\n",
        "",
        "tests/test_predict.py::test_a_table_that_cannot_be_written_is_told_before_a_photo_is_answered",
    ),
    Mutation(
        "a missing CUDA is not told on the command line",
        "pillsnap/deployment/runtime.py",
        "        logger.warning(reason)",
        "        logger.info(reason)",
        "tests/test_predict.py::test_a_missing_provider_is_told_on_the_command_line",
    ),
    Mutation(
        "an annotation that stands twice is two pills",
        "pillsnap/dataset/importers.py",
        "for _, j, one_drug in _identical(got) if one_drug}",
        "for _, j, one_drug in _identical(got) if False}",
        "tests/test_importers.py::test_an_annotation_that_stands_twice_counts_once",
    ),
    Mutation(
        "two drugs in one box count as one",
        "pillsnap/dataset/importers.py",
        "for _, j, one_drug in _identical(got) if one_drug}",
        "for _, j, one_drug in _identical(got)}",
        "tests/test_importers.py::test_an_annotation_that_stands_twice_counts_once",
    ),
    Mutation(
        "grey pictures show a drug without weight",
        "pillsnap/training/distributed.py",
        "labels.new_zeros(2) if weight is None else weight.argmax().expand(2)",
        "labels.new_zeros(2)",
        "tests/test_gpu_engine.py::test_a_process_without_a_photo_adds_nothing_where_the_first_drug_weighs_nothing",
    ),
    Mutation(
        "resumed moments keep the layout of the file",
        "pillsnap/training/saving.py",
        "torch.empty_like(p).copy_(v)",
        "v",
        "tests/test_gpu_engine.py::test_resumed_moments_lie_in_memory_as_the_weights_do",
    ),
    Mutation(
        "a resumed segmentation leaves its moments on the CPU",
        "pillsnap/training/segmentation.py",
        "v.to(p.device) if torch.is_tensor(v) else v",
        "v",
        "tests/test_segmentation.py::test_a_resumed_optimizer_is_where_its_weights_are",
    ),
    Mutation(
        "too many open files are a photo's fault in LMDB",
        "pillsnap/dataset/datasets.py",
        'if isinstance(got, dict) and got.get("errno"):',
        'if isinstance(got, dict) and got.get("none"):',
        "tests/test_memory.py::test_a_fault_of_the_machine_is_not_kept_as_a_photos_own",
    ),
    Mutation(
        "a name in NFD gets no training weight",
        "pillsnap/dataset/narrow.py",
        'unicodedata.normalize("NFC", str(entry["kcode"]))',
        'str(entry["kcode"])',
        "tests/test_narrow.py::test_korean_names_are_one_name_however_they_are_composed",
    ),
    Mutation(
        "another machine's folder means nothing",
        "pillsnap/dataset/labelfiles.py",
        'f"/{folder}/{own}" if folder in self.folders else f"/{own}"',
        'f"/{own}"',
        "tests/test_importers.py::test_a_full_path_of_another_machine_keeps_its_own_folder",
    ),
    Mutation(
        "a COCO file may use a number twice",
        "pillsnap/dataset/yolotree.py",
        "if len({str(e.id) for e in listed}) < len(listed):",
        "if not listed:",
        "tests/test_conversion.py::test_a_coco_file_whose_numbers_repeat_is_refused",
    ),
    Mutation(
        "the page keeps the facts of an earlier bundle",
        "pillsnap/web/app.js",
        "if (!same) await readVersion();",
        "if (!same && !bundle) await readVersion();",
        "tests/test_web_page.py::test_after_a_reload_the_page_says_what_is_true_of_the_bundle_that_answers",
    ),
    Mutation(
        "a narrow terminal cuts the card's text",
        "pillsnap/models/cardview.py",
        't.add_column(overflow="fold")  # rich cuts',
        "t.add_column()  # rich cuts",
        "tests/test_card.py::test_a_narrow_terminal_loses_no_character_of_the_card",
    ),
    Mutation(
        "torch writes checkpoints to the file itself",
        "pillsnap/core/checkpoints.py",
        """    content = io.BytesIO()
    torch.save(state, content)
    with open(path, "wb") as f:
        f.write(content.getbuffer())
""",
        """    with open(path, "wb") as f:
        torch.save(state, f)
""",
        "tests/test_core.py::test_a_save_may_be_interrupted_at_any_line",
    ),
    Mutation(
        "processes that want one folder do not wait",
        "pillsnap/core/files.py",
        'return FileLock(ensure_dir(path.parent) / f".{path.name}.lock", fallback_to_soft=False)',
        "return suppress()",
        "tests/test_distributed.py::test_what_all_processes_want_one_of_them_makes",
    ),
    Mutation(
        "a card shows another network's figures",
        "pillsnap/deployment/bundling.py",
        "if exported and found and exported not in found:",
        "if exported and not found:",
        "tests/test_bundle_file.py::test_a_card_never_shows_another_networks_figures",
    ),
]


class NotTriedError(Exception):
    "Why a breakage could not be tried."


def run_tests(copy: Path, tests: Sequence[str], timeout: float, *options: str) -> subprocess.CompletedProcess[str]:
    "Run tests in a copy of the checkout; NotTriedError where pytest could not run them."
    env = {
        **os.environ,
        "PYTHONPATH": str(copy),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PILLSNAP_OFFLINE": "1",
    }
    quiet = ["-q", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", f"--basetemp={copy.parent / 'pytest'}"]
    command = [sys.executable, "-m", "pytest", *quiet, *options, *tests]
    r = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=timeout)
    if r.returncode not in (0, 1):  # 1: tests failed; others: pytest could not run them
        raise NotTriedError(
            f"the test could not be run (pytest's exit status {r.returncode}):\n{r.stdout[-2000:]}{r.stderr[-2000:]}"
        )
    return r


def passing(copy: Path, tests: Sequence[str], timeout: float) -> tuple[set[str], str]:
    "The tests that pass in a copy of the checkout, and what pytest said of the others; they share their fixtures."
    said = run_tests(copy, tests, timeout * len(tests), "-rfEsp").stdout
    verdicts = re.findall(r"^(PASSED|FAILED|ERROR) (\S+?::[^\s\[]+)(?:\[.*)?", said, re.M)
    failed = {test for verdict, test in verdicts if verdict != "PASSED"}
    good = {test for verdict, test in verdicts if verdict == "PASSED"} - failed
    return {t for t in tests if t.split("[")[0] in good}, said[said.find("short test summary") :]


def broken(copy: Path, m: Mutation) -> str:
    "Apply one breakage; returns the text before it."
    path = copy / m.file
    before = path.read_text(encoding="utf-8")
    if before.count(m.old) != 1:
        raise NotTriedError(f"{m.file} holds {m.old!r} {before.count(m.old)} times; it must stand there once")
    path.write_text(before.replace(m.old, m.new), encoding="utf-8")
    return before


def copied_checkout(folder: Path) -> Path:
    "A copy of what the tests need."
    copy = folder / "pillsnap"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignored)
        elif source.exists():
            shutil.copy2(source, copy / name)
    # compiled modules that Python checks by their content: a breakage may keep a file's size and time
    compileall.compile_dir(copy, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return copy


def is_caught(copy: Path, m: Mutation, timeout: float) -> bool:
    "Whether a breakage fails its test."
    before = broken(copy, m)
    try:
        return run_tests(copy, [m.test], timeout, "-x").returncode == 1
    except subprocess.TimeoutExpired:
        return True
    finally:
        (copy / m.file).write_text(before, encoding="utf-8")


def arguments() -> argparse.Namespace:
    "What was asked on the command line."
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--only", default="", help="a word of the name")
    a.add_argument("--part", default="1/1", help="which of how many parts, for example 2/3")
    a.add_argument("--list", action="store_true", help="show them and stop")
    a.add_argument("--timeout", type=float, default=600, help="seconds for one test")
    return a.parse_args()


def try_all(chosen: Sequence[Mutation], timeout: float) -> list[str]:
    "Apply one breakage after the other and print what its test says; returns those that were not caught."
    failed = []
    with tempfile.TemporaryDirectory() as tmp:
        copy = copied_checkout(Path(tmp))
        tests = sorted({m.test for m in chosen})
        t0 = time.perf_counter()
        healthy, said = passing(copy, tests, timeout)
        print(f"{len(healthy)} of {len(tests)} tests pass without a breakage  {time.perf_counter() - t0:.0f} s")
        if len(healthy) < len(tests):
            print(said)
        for m in chosen:
            t0, why = time.perf_counter(), ""
            try:
                if m.test not in healthy:
                    raise NotTriedError("the test does not pass without any breakage")
                verdict = "caught" if is_caught(copy, m, timeout) else "NOT CAUGHT"
            except NotTriedError as e:
                verdict, why = "NOT TRIED", f"\n{e}"
            print(f"{verdict:10}  {m.name:60}  {m.test}  {time.perf_counter() - t0:.0f} s{why}", flush=True)
            failed += [m.name] if verdict != "caught" else []
    return failed


def main() -> int:
    "Exit status: 0 when every breakage was caught."
    a = arguments()
    part, parts = map(int, a.part.split("/"))
    named = [m for m in MUTATIONS if a.only.lower() in m.name.lower()]
    chosen = sorted(named, key=lambda m: m.test)[part - 1 :: parts]
    if a.list:
        print("\n".join(f"{m.name:60}  {m.test}" for m in chosen))
        return 0
    if not chosen:
        sys.exit(f"no breakage has {a.only!r} in its name")
    failed = try_all(chosen, a.timeout)
    print(f"\n{len(chosen) - len(failed)} of {len(chosen)} caught" + (": not " + "; ".join(failed) if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
