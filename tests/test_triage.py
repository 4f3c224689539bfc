"""Label triage: planted wrong labels are found, decisions are written once and applied, a click in a browser counts."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.core.errors import PillsnapError
from pillsnap.dataset.conversion import convert_delivery
from pillsnap.dataset.grouping import apply_decisions, toy_delivery
from pillsnap.dataset.overlay import Decision, Overlay, apply_overlay
from pillsnap.dataset.triage import (
    issues_of_run,
)


def label_of(photo: Path, root: Path) -> Path:
    "The annotation file of a single photo."
    return next(iter(root.glob(f"data/train/labels/single/*/*/{photo.stem}.json")))


def box_of(photo: Path, root: Path) -> list[int]:
    return json.loads(label_of(photo, root).read_text(encoding="utf-8"))["annotations"][0]["bbox"]


def shrink_box(photo: Path, root: Path) -> None:
    "Make the photo's box a third as wide and high, with the area that fits it."
    x, y, w, h = box_of(photo, root)
    j = json.loads(label_of(photo, root).read_text(encoding="utf-8"))
    j["annotations"][0] |= {"bbox": [x, y, w // 3, h // 3], "area": (w // 3) * (h // 3)}
    label_of(photo, root).write_text(json.dumps(j, ensure_ascii=False), encoding="utf-8")


def plant_photo_issues(root: Path) -> dict[str, Path]:
    "Copy one photo to another drug's, blur one, darken one; which photos these are, and a further one."
    from PIL import Image, ImageFilter

    photos = sorted(root.glob("data/train/images/single/*/*/*.png"))

    def drug(p):
        return p.stem.split("_")[0]

    source, copy = photos[0], next(p for p in photos if drug(p) != drug(photos[0]))
    Image.open(source).save(copy, compress_level=1)  # the same pixels, other bytes, another drug
    soft, dark = photos[5], photos[7]
    Image.open(soft).filter(ImageFilter.GaussianBlur(4)).save(soft)
    Image.open(dark).point(lambda v: v * 0.3).save(dark)
    return dict(source=source, copy=copy, soft=soft, dark=dark, boxed=photos[9])


@pytest.mark.spec("BX22")
def test_copies_under_two_drugs_blur_dark_and_boxes_are_listed(delivery, tmp_path):
    import shutil

    from pillsnap.dataset.splits import SplitsJob

    mine = tmp_path / "aihub"
    shutil.copytree(delivery, mine)
    planted = plant_photo_issues(mine)
    assert box_of(planted["copy"], mine) != box_of(planted["source"], mine)  # the copy's box is its own drug's
    shrink_box(planted["boxed"], mine)
    convert_delivery(mine, tmp_path / "run")
    SplitsJob(run_dir=str(tmp_path / "run"), config="smoke").run()
    issues = issues_of_run(tmp_path / "run")
    names = {k: p.name for k, p in planted.items()}

    def of(kind):
        return [Path(p).name for p in issues.loc[issues["kind"] == kind, "path"]]

    assert set(of("conflict")) >= {names["source"], names["copy"]}
    assert set(issues.head(2)["kind"]) == {"conflict"}
    assert of("blurred")[:1] == [names["soft"]] and of("dark")[:1] == [names["dark"]]
    assert names["boxed"] in of("box")[:2]


@pytest.mark.spec("BX22", "BX1")
def test_a_relabelled_photo_is_split_with_the_series_of_the_drug_that_it_shows(tmp_path):
    df = toy_delivery(drugs=3, views=6)
    wrong, right = sorted(set(df["class_key"]))[:2]
    mine = df[df["class_key"] == wrong].drop_duplicates("group_id")["path"]
    overlay = Overlay(tmp_path)
    for path in mine:
        overlay.add(Decision(path, wrong, "relabel", to=right, who="kim"))
    decided, _ = apply_decisions(df, tmp_path)
    group = decided.set_index("path")["group_id"]
    assert all(group[path] == group[path.replace(wrong, right)] for path in mine)


@pytest.mark.spec("BX22")
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["keep", "drop", "relabel"]), st.text(max_size=12)), max_size=12
    )
)
def test_the_overlay_is_append_only_and_applying_is_pure(tmp_path_factory, given_):
    """Whatever is decided: every line stays, the last about a pill holds, the table that went in is unchanged,
    equal in gives equal out."""
    o = Overlay(tmp_path_factory.mktemp("o") / "overlay.jsonl")
    df = pd.DataFrame({"path": [f"{i}.png" for i in range(6)], "class_key": ["K-1", "K-2"] * 3, "kind": "single"})
    want, bytes_ = {}, b""
    for i, what, why in given_:
        k = df.loc[i, "class_key"]
        o.add(Decision(f"{i}.png", k, what, {"K-1": "K-2", "K-2": "K-1"}[k] if what == "relabel" else "", why))
        want[i] = what
        assert o.path.read_bytes().startswith(bytes_)
        bytes_ = o.path.read_bytes()
    before, got = df.copy(), apply_overlay(df, o)
    pd.testing.assert_frame_equal(df, before)
    pd.testing.assert_frame_equal(apply_overlay(df, o), got)
    assert len(o.lines()) == len(given_) and len(o) == len(want)
    label = dict(zip(got["path"], got["class_key"]))
    for i in range(6):
        what, k = want.get(i, "keep"), df.loc[i, "class_key"]
        assert label.get(f"{i}.png") == {"keep": k, "drop": None, "relabel": {"K-1": "K-2", "K-2": "K-1"}[k]}[what]


@pytest.mark.spec("BX22", "RS7")
def test_two_pages_write_at_once_and_no_line_is_torn(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from pillsnap.dataset.overlay import Decision, Overlay\n"
        "o = Overlay(sys.argv[1])\n"
        "for i in range(60): o.add(Decision(f'{sys.argv[2]}{i}.png', 'K-1', 'drop', why='왜'*300))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "o.jsonl"), name], env=os.environ) for name in "ab"
    ]
    assert [p.wait(60) for p in both] == [0, 0]
    assert len(Overlay(tmp_path / "o.jsonl").lines()) == len(Overlay(tmp_path / "o.jsonl")) == 120


def test_a_full_disk_loses_nothing(tmp_path):
    "A write that fails is a plain error, and what stood in the file stands."
    o = Overlay(tmp_path / "file" / "overlay.jsonl")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PillsnapError):
        o.add(Decision("a.png", "K-1", "keep"))
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.spec("BX22")
def test_the_command_writes_a_page_for_the_run(delivery, tmp_path, capsys):
    "`pillsnap triage RUN` without a terminal: the page is in the run folder, runs there, and its command is printed."
    import nbformat
    from nbclient import NotebookClient

    from pillsnap.cli import main

    run = tmp_path / "run"
    convert_delivery(delivery, run)
    with pytest.raises(SystemExit) as end:
        main(["triage", str(run), "--who", "tester"])
    page = run / "notebooks" / "triage.ipynb"
    assert end.value.code in (0, None) and f"jupyter lab {page}" in capsys.readouterr().out
    nb = nbformat.read(page, 4)
    NotebookClient(nb, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(run)}}).execute()
    shown = "".join(o.data.get("text/html", "") for c in nb.cells for o in c.get("outputs", []) if "data" in o)
    assert "1 of " in shown and "<img" in shown and all(" alt='" in tag for tag in shown.split("<img")[1:])
    with pytest.raises(SystemExit) as end:
        main(["triage", str(tmp_path / "nowhere")])
    assert end.value.code == 2 and "no manifest.csv" in capsys.readouterr().err
