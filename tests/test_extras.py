"""`pip install pillsnap` answers: no torch, small; a missing extra is named with the command that brings it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINING = {"torch", "torchvision", "fastai", "timm", "ultralytics", "jupyterlab", "matplotlib", "pandas"}


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory) -> Path:
    "An empty environment with the wheel and what the wheel asks for, no extra."
    tmp = tmp_path_factory.mktemp("base")
    subprocess.run([sys.executable, "-m", "venv", tmp / "venv"], check=True)
    install = [tmp / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "-q", "install", wheel]
    done = subprocess.run([*install, "-c", ROOT / "constraints.txt"], capture_output=True, text=True)
    if done.returncode and "No matching distribution" in done.stderr:
        pytest.skip("no package index is reached from here")
    assert done.returncode == 0, done.stderr[-2000:]
    return tmp / "venv"


def call(venv: Path, folder: Path, *args: object) -> subprocess.CompletedProcess:
    "A command of the environment, in an empty folder, without this checkout on the path."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [venv / "bin" / args[0], *map(str, args[1:])], cwd=folder, env=env, capture_output=True, text=True
    )


@pytest.mark.spec("HS2")
def test_the_base_is_small_and_has_nothing_of_training(base):
    site = next((base / "lib").glob("python3*/site-packages"))
    size = sum(p.stat().st_size for p in site.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6
    assert size <= 350, f"{size:.0f} MB"
    assert not {p.name for p in site.iterdir()} & TRAINING


@pytest.mark.spec("SV4", "EX3", "HS2")
def test_the_base_answers_from_an_export(base, smoke_run, tmp_path):
    "The same JSON as in the environment that trained; several photos, a table, and a notebook's card."
    from pillsnap.deployment.runtime import load_bundle

    photos = sorted((smoke_run / "delivery").rglob("*_75_*.png"))[:3]
    done = call(base, tmp_path, "pillsnap", "predict", photos[0], "--mode", "single", "--run", smoke_run, "--json")
    assert done.returncode == 0, done.stderr
    here = load_bundle(smoke_run).predict(photos[0], "single")
    assert json.loads(done.stdout) | {"timings": 0} == dict(here) | {"timings": 0}
    (tmp_path / "letter.png").write_text("Dear pharmacist,")
    asked = [*photos, tmp_path / "letter.png", "--mode", "single", "--run", smoke_run, "--out", tmp_path / "rows.csv"]
    done = call(base, tmp_path, "pillsnap", "predict", *asked)
    rows = (tmp_path / "rows.csv").read_text(encoding="utf-8-sig").splitlines()
    assert done.returncode == 1 and len(rows) == 5 and "text file" in rows[-1]
    code = "import sys, pillsnap; print(pillsnap.load_bundle(sys.argv[1]).predict(sys.argv[2])._repr_html_())"
    card = call(base, tmp_path, "python", "-c", code, smoke_run, photos[0])
    here_card = load_bundle(smoke_run).predict(photos[0])._repr_html_()
    assert card.returncode == 0 and card.stdout.count("<img") == here_card.count("<img") >= 2, card.stderr


@pytest.mark.spec("BX6", "HS2")
def test_the_base_reads_one_file(base, smoke_run, tmp_path):
    "Made where the run is, read where neither torch nor the signing library is; the signature is not called good."
    from pillsnap.deployment.bundling import bundle_file
    from pillsnap.deployment.runtime import load_bundle

    key, pub = tmp_path / "key.pem", tmp_path / "key.pub"
    subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    subprocess.run(["openssl", "ec", "-in", key, "-pubout", "-out", pub], check=True, capture_output=True)
    file = bundle_file(smoke_run, tmp_path / "pills.pillsnap", key).where
    photo = sorted((smoke_run / "delivery").rglob("*_75_*.png"))[0]
    done = call(base, tmp_path, "pillsnap", "predict", photo, "--bundle", file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) | {"timings": 0} == load_bundle(smoke_run).predict(photo) | {"timings": 0}
    assert call(base, tmp_path, "pillsnap", "verify", file).returncode == 0
    done = call(base, tmp_path, "pillsnap", "verify", file, "--key", pub)
    assert done.returncode == 2 and 'pip install "pillsnap[sign]"' in done.stderr, done.stdout


@pytest.mark.parametrize(
    "command, extra",
    [
        (("pillsnap", "run", "all"), "train"),
        (("pillsnap", "predict", "p.png", "--out", "rows.parquet", "--run", "RUN"), "train"),
        (("python", "-c", "import pillsnap; pillsnap.load_splits"), "train"),
        (("python", "-c", "import pillsnap; pillsnap.identify"), "lab"),
        (("pillsnap", "serve", "--bundle", "RUN"), "serve"),
    ],
    ids=["a command", "a format", "a name", "the app", "the server"],
)
def test_a_missing_extra_is_named(base, smoke_run, tmp_path, command, extra):
    photo = sorted((smoke_run / "delivery").rglob("*_75_*.png"))[0]
    shutil.copy(photo, tmp_path / "p.png")
    (tmp_path / "RUN").symlink_to(smoke_run)
    done = call(base, tmp_path, *command)
    assert done.returncode and f'pip install "pillsnap[{extra}]"' in done.stderr, done.stderr


@pytest.mark.spec("SV1")
def test_the_server_needs_nothing_of_training(tmp_path):
    "Base and [serve]: with everything else blocked, it starts and answers."
    sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
    from server_parts import Server, colour_bundle, pill_photo

    blocked = TRAINING | {"cv2", "scipy", "sklearn", "onnx", "numba", "pyarrow", "joblib", "lmdb", "cachetools"}
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {sorted(blocked)!r}:\n"
        "            raise ModuleNotFoundError('blocked', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    bundle, before = colour_bundle(tmp_path / "export"), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "site"), str(ROOT), before or ""])
    try:
        with Server(tmp_path / "server", bundle) as server:
            assert server.ask("/predict?pipeline=combo", [pill_photo(kind="WEBP")])[0] == 200
            assert server.ask("/predict?pipeline=single", [pill_photo(size=(2000, 2500))])[0] == 200
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.mark.spec("HS3")
def test_import_is_quick_and_names_are_lazy():
    "`import pillsnap` brings no module of others; each name it offers is there."
    code = "import sys; before = set(sys.modules); import pillsnap; print(len(set(sys.modules) - before))"
    few = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(few.stdout) <= 2
    import pillsnap

    assert len(pillsnap.__all__) <= 14
    for name in pillsnap.__all__:
        assert getattr(pillsnap, name).__doc__ and f"    {name} " in pillsnap.__doc__
    with pytest.raises(AttributeError, match="it offers load_config"):
        _ = pillsnap.a_name_that_is_gone


def test_onnxruntime_reports_to_nobody(tmp_path):
    "Its telemetry begins with a file in the temporary folder when it is imported; none is there after an answer."
    code = "import os, sys, pillsnap.deployment.runtime; print(os.listdir(sys.argv[1]), os.environ[sys.argv[2]])"
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    argv = [sys.executable, "-c", code, tmp_path, "ORT_DISABLE_TELEMETRY"]
    done = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "1"]
