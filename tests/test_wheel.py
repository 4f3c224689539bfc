"""A wheel carries the stage notebooks and presets, so that `pillsnap run` works from `pip install`, in an empty
folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from terminal import search_path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    "The wheel, unpacked as pip would, without its dependencies."
    site = tmp_path_factory.mktemp("wheel") / "site"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(site)
    return site


@pytest.mark.spec("BX15")
def test_the_wheel_carries_what_a_run_needs(installed):
    from pillsnap.cli import PIPELINE

    have = {p.relative_to(installed / "pillsnap").as_posix() for p in (installed / "pillsnap").rglob("*")}
    assert {f"_resources/nbs/{s.notebook}.ipynb" for s in PIPELINE} <= have
    assert {f"_resources/configs/{n}.yaml" for n in ("demo", "smoke", "two_stage")} <= have
    assert any(p.startswith("assets/") and p.endswith(".ttf") for p in have) and "assets/OFL.txt" in have
    assert {"web/index.html", "web/app.css", "web/words.js", "web/app.js"} <= have


@pytest.mark.spec("BX15")
def test_a_job_runs_from_the_wheel_in_an_empty_folder(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": search_path(installed)}
    r = subprocess.run(
        [sys.executable, "-m", "pillsnap", "run", "all", "--config", "smoke", "--only", "conversion"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    assert (tmp_path / "_runs" / "smoke" / "manifest.csv").exists()
    nb = (tmp_path / "_runs" / "smoke" / "notebooks" / "408_conversion.ipynb").read_text(encoding="utf-8")
    assert (
        str(installed)
        in subprocess.run(
            [sys.executable, "-c", "import pillsnap; print(pillsnap.__file__)"],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert '"parameters"' in nb
