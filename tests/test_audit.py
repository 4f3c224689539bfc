"""The audit: a look at a finished conversion that changes nothing, through the command a person types."""

import json
import shutil

import pandas as pd
import pytest
from runs import copy_run

from pillsnap.core.errors import PillsnapError
from pillsnap.core.jobs import read_record
from pillsnap.dataset.audit import AuditJob, box_measures, measure_sample, sample_photos
from pillsnap.dataset.conversion import convert_delivery
from pillsnap.delivery.index import read_manifest


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory, delivery):
    "The shared delivery, converted and audited; and what stood in the folder before."
    root = tmp_path_factory.mktemp("audit") / "run"
    convert_delivery(delivery, root)
    before = {
        p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and not p.is_symlink()
    }
    return root, before, AuditJob(run_dir=str(root), config="smoke").run()


@pytest.mark.spec("DM11")
def test_the_summary_is_what_the_manifest_says(looked_at):
    root, _, res = looked_at
    s, (df, head) = json.loads((root / "reports/audit.json").read_text()), read_manifest(root / "manifest.csv")
    assert s["photos"] == s["sampled"] == df["path"].nunique() and s["drugs"] == 6 and s["broken_ratio"] == 0
    assert s["resolution"]["width"] == {"mean": 244.0, "median": 244.0, "var": 0.0, "min": 244.0, "max": 244.0} and s[
        "aspect_histogram"
    ] == {"0.7-0.8": s["sampled"]}
    per = df.groupby("kcode")["path"].nunique().sort_values(ascending=False, kind="stable")
    assert [(t["class"], t["photos"]) for t in s["top_classes"]] == list(per.head(10).items())
    b = box_measures(df)
    assert s["bbox"]["n"] == len(df) and abs(s["bbox"]["w"]["median"] - b["w"].median()) < 1e-9
    assert s["metadata_mapping"]["state"] == "complete" and head["sealed"]["words"] in res.notes


@pytest.mark.spec("DM11")
def test_at_most_three_thousand_photos_are_opened_and_rare_drugs_among_them():
    df = pd.DataFrame(
        {
            "path": [f"{i}.png" for i in range(9000)],
            "class_key": ["rare" if i < 2 else f"k{i % 5}" for i in range(9000)],
        }
    )
    assert len(sample_photos(df, 3000)) == 3000 and (sample_photos(df, 12)["class_key"] == "rare").sum() == 2
    opened = []

    def counting(rows, *_, **__):
        opened.append(len(rows))
        raise InterruptedError

    import pillsnap.dataset.audit as A

    real, A.measure_photos = A.measure_photos, counting
    try:
        with pytest.raises(InterruptedError):
            measure_sample(df, ".", sample=5000)
    finally:
        A.measure_photos = real
    assert opened == [3000]


@pytest.mark.spec("DM11")
def test_no_shape_falls_out_of_the_histogram(delivery, tmp_path):
    """A strip and a column, cut from two photos after the conversion: both are in the bins, and the stage says how
    many there are."""
    from PIL import Image

    shutil.copytree(delivery, tmp_path / "delivery", symlinks=True)
    convert_delivery(tmp_path / "delivery", tmp_path / "run")
    df = read_manifest(tmp_path / "run" / "manifest.csv")[0]
    for path, size in zip(df.loc[df["kind"] == "single", "path"], ((244, 60), (30, 320))):
        with Image.open(tmp_path / "delivery" / path) as im:
            small = im.resize(size)
        small.save(tmp_path / "delivery" / path)
    res = AuditJob(run_dir=str(tmp_path / "run"), config="smoke", near_duplicates=False).run()
    s = json.loads((tmp_path / "run/reports/audit.json").read_text())
    assert s["aspect_histogram"] == {"under 0.3": 1, "0.7-0.8": s["sampled"] - 2, "3.3 and over": 1}
    assert {r["what"]: r["n"] for r in res.table}["narrower than 0.3 or wider than 3.3 times their height"] == 2


def test_it_changes_nothing(looked_at):
    "Every file that was there has its bytes; new are only reports, duplicates, logs and the record."
    root, before, _ = looked_at
    assert {k: (root / k).read_bytes() for k in before} == before
    new = {
        p.relative_to(root).parts[0]
        for p in root.rglob("*")
        if p.is_file() and not p.is_symlink() and p.relative_to(root).as_posix() not in before
    }
    assert new <= {"reports", "artifacts", "logs", "stages", "run.json", "config.yaml", ".lock", ".run.lock"}, new


def test_the_command_runs_it_aside(looked_at, tmp_path, capsys):
    "`pillsnap run audit --run DIR` takes the folder's own settings; `run all` does not know it."
    from pillsnap.cli import PIPELINE, main, own_config

    root, _, _ = looked_at
    copy = tmp_path / "run"
    copy_run(root, copy, "stages")
    settings = (copy / "config.yaml").read_text()
    assert (
        own_config("", copy) == str(copy / "config.yaml")
        and own_config("demo", copy) == "demo"
        and own_config("two_stage", copy) == "two_stage"
    )
    with pytest.raises(SystemExit) as e:
        main(["run", "audit", "--run", str(copy), "-p", "sample=20"])
    assert e.value.code == 0 and read_record(copy, "audit")["status"] == "finished"
    assert json.loads((copy / "reports/audit.json").read_text())["sampled"] == 20
    assert "synth" in settings and (copy / "config.yaml").read_text().split("paths:")[0] == settings.split("paths:")[0]
    assert (copy / "notebooks/440_audit.ipynb").is_file() and "audit" not in {s.name for s in PIPELINE}


@pytest.mark.spec("RS7")
def test_two_runs_on_one_folder(looked_at, tmp_path):
    "While one run holds the folder a second audit or splits stage is told who has it, and leaves no trace."
    import os
    import subprocess
    import sys

    from pillsnap.dataset.splits import SplitsJob

    root, _, _ = looked_at
    copy = tmp_path / "run"
    copy_run(root, copy)
    code = (
        "import sys, time\n"
        "from pillsnap.core.files import FolderLock\n"
        "with FolderLock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(copy)], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as other:
        try:
            assert other.stdout.readline().strip() == "held"

            def state():
                return {
                    p.relative_to(copy).as_posix(): (p.stat().st_mtime_ns, p.stat().st_size)
                    for p in copy.rglob("*")
                    if p.is_file() and p.name != ".lock" and "logs" not in p.parts
                }

            before = state()
            for job in (SplitsJob, AuditJob):
                with pytest.raises(PillsnapError, match=str(other.pid)):
                    job(run_dir=str(copy), config="smoke").run()
            assert state() == before
        finally:
            other.kill()
    assert AuditJob(run_dir=str(copy), config="smoke").run().record["status"] == "finished"  # the dead hold nothing
