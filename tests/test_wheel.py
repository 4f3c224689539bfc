"""A wheel carries the stage notebooks and presets, so that `pillsnap run` works from `pip install`, in an empty
folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "The wheel built from a copy of the repository, unpacked as pip would, without its dependencies."
    import shutil

    tmp = tmp_path_factory.mktemp("wheel")
    src = tmp / "src"
    shutil.copytree(
        ROOT,
        src,
        ignore=shutil.ignore_patterns(".venv", ".git", "_runs", "build", "*.egg-info", "__pycache__", "_docs", "_proc"),
    )
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp), str(src)],
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = tmp.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp / "site")
    return tmp / "site"


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
    env = {**os.environ, "PYTHONPATH": str(installed)}
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
