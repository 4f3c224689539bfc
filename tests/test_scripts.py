"The shell scripts, run for real with a stand-in for the trainer (SPEC OP3), and the checks of `make test`."

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["scripts/train.sh", "scripts/core/setup_venv.sh", "scripts/core/in_step.sh", ".ci/run"]


def sh(*args, cwd=ROOT, **env):
    return subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        env={**os.environ, **{k: str(v) for k, v in env.items()}},
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def venv(tmp_path):
    "An environment whose python is this one and whose `pillsnap` does as it is told."
    executable(tmp_path / "venv/bin/python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    executable(
        tmp_path / "venv/bin/pillsnap",
        '#!/bin/bash\necho "trainer got: $*"\necho "a warning" >&2\n'
        '[ -z "${METRICS:-}" ] || printf \'{"latest": {"acc": 0.91}}\' > "$METRICS"\nexit "${TRAINER_EXIT:-0}"\n',
    )
    return tmp_path / "venv"


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_executable_and_parse(script):
    assert os.stat(ROOT / script).st_mode & stat.S_IXUSR
    assert sh("bash", "-n", ROOT / script).returncode == 0


@pytest.mark.parametrize("script", ["scripts/train.sh", "scripts/core/setup_venv.sh", "scripts/core/in_step.sh"])
def test_help(script):
    done = sh(ROOT / script, "--help")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}")
    assert sh(ROOT / script, "--no-such-option").returncode == 2


@pytest.mark.spec("OP3")
def test_train_success(venv, tmp_path):
    "Folders, the core configuration, both logs, metrics.json, status 0."
    run = tmp_path / "a run"
    done = sh(
        ROOT / "scripts/train.sh",
        "--config",
        "smoke",
        "--stage",
        "classifier",
        "train.seed=7",
        f"paths.exp_dir={run}",
        VENV=venv,
        METRICS=run / "reports/metrics.json",
    )
    assert done.returncode == 0, done.stderr
    assert {"logs", "tb", "reports", "checkpoints", "export", "notebooks", "hard_cases"} <= {
        p.name for p in run.iterdir()
    }
    assert "seed 7" in done.stdout and "test_resnet" in done.stdout and str(run) in done.stdout
    assert f"trainer got: run classifier --config smoke train.seed=7 paths.exp_dir={run}" in done.stdout
    assert "SUCCESS" in done.stdout and '{"latest": {"acc": 0.91}}' in done.stdout.partition("SUCCESS")[2]
    out, err = ((run / "logs" / f"train.{k}").read_text() for k in ("out", "err"))
    assert "trainer got:" in out and "a warning" not in out
    assert "a warning" in err and "trainer got:" not in err


@pytest.mark.spec("OP3")
@pytest.mark.parametrize(
    "status, word",
    [
        (1, "FAILED (1)"),
        (2, "REFUSED (2)"),
        (3, "FAILED (3)"),
        (127, "NOT STARTED (127)"),
        (130, "INTERRUPTED (130)"),
        (137, "KILLED (137)"),
        (139, "CRASHED (139)"),
        (143, "TERMINATED (143)"),
    ],
)
def test_train_returns_the_trainers_status(venv, tmp_path, status, word):
    "Each with its message; nothing is printed as a success."
    done = sh(
        ROOT / "scripts/train.sh",
        f"paths.exp_dir={tmp_path / 'run'}",
        VENV=venv,
        TRAINER_EXIT=status,
        METRICS=tmp_path / "metrics.json",
    )
    assert (
        done.returncode == status
        and word in done.stdout
        and "SUCCESS" not in done.stdout
        and "latest" not in done.stdout
    )
    assert "a warning" in done.stderr


@pytest.mark.spec("OP3")
def test_train_killed_by_a_signal(venv, tmp_path):
    executable(venv / "bin/pillsnap", "#!/bin/bash\necho begins\nkill -9 $$\n")
    done = sh(ROOT / "scripts/train.sh", f"paths.exp_dir={tmp_path / 'run'}", VENV=venv)
    assert (
        done.returncode == 137
        and "KILLED (137)" in done.stdout
        and "begins" in (tmp_path / "run/logs/train.out").read_text()
    )


@pytest.mark.spec("OP3")
def test_train_keeps_the_logs_of_an_earlier_run(venv, tmp_path):
    for seed in (1, 2):
        sh(ROOT / "scripts/train.sh", f"train.seed={seed}", f"paths.exp_dir={tmp_path / 'run'}", VENV=venv)
    out = (tmp_path / "run/logs/train.out").read_text()
    assert out.count("trainer got:") == 2 and "train.seed=1" in out and "train.seed=2" in out


@pytest.mark.spec("OP3", "CF5")
@pytest.mark.parametrize(
    "args, word",
    [
        (["train.sead=7"], "did you mean train.seed"),
        (["--config", "dem"], "did you mean demo"),
        (["seven"], "not an override"),
        (["--confg", "demo"], "no such option"),
    ],
)
def test_train_refuses_before_it_makes_anything(venv, tmp_path, args, word):
    done = sh(ROOT / "scripts/train.sh", *args, VENV=venv, cwd=tmp_path)
    assert done.returncode == 2 and word in done.stderr and "trainer got" not in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"venv"}


# ---- set-up


@pytest.fixture
def checkout(tmp_path):
    "The files that set-up looks at, in a folder of their own."
    for f in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "scripts/core/setup_venv.sh"):
        (tmp_path / "co" / f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / f, tmp_path / "co" / f)
    return tmp_path / "co"


def recorder(path, version="3.11", fail=""):
    "A python that makes environments of itself and writes down what pip is asked."
    executable(
        path,
        f'''#!/bin/bash
[ "$1" = -c ] && case "$2" in *version_info*) echo {version};; *cv2*) [ "{fail}" != cv2 ];; esac && exit
[ "$1" = -V ] && {{ echo "Python {version}.9"; exit; }}
[ "$2" = venv ] && {{ mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; }}
[ "$2" = pip ] && {{ echo "$*" >> pip.log; [ "{fail}" != pip ]; exit; }}
exit 1
''',
    )
    return path


@pytest.mark.spec("OP3")
def test_setup_installs_once_from_the_pins(checkout, tmp_path):
    py = recorder(tmp_path / "python3.11")
    first = sh(checkout / "scripts/core/setup_venv.sh", PYTHON=py)
    assert first.returncode == 0, first.stderr
    log = (checkout / "pip.log").read_text()
    assert "install" in log and "-e .[train,lab,serve,dev] -c constraints.txt" in log
    assert (
        sh(checkout / "scripts/core/setup_venv.sh", PYTHON=py).stdout == ""
        and (checkout / "pip.log").read_text() == log
    )
    with open(checkout / "constraints.txt", "a") as f:
        f.write("# changed\n")
    sh(checkout / "scripts/core/setup_venv.sh", PYTHON=py)
    assert (checkout / "pip.log").read_text() == log * 2


@pytest.mark.spec("OP3")
def test_setup_that_failed_is_repeated(checkout, tmp_path):
    py = recorder(tmp_path / "python3.11", fail="pip")
    assert sh(checkout / "scripts/core/setup_venv.sh", PYTHON=py).returncode != 0
    recorder(checkout / ".venv/bin/python")
    assert sh(checkout / "scripts/core/setup_venv.sh", PYTHON=py).returncode == 0
    assert (checkout / "pip.log").read_text().count(".[train,lab,serve,dev]") == 2


@pytest.mark.spec("CF7")
@pytest.mark.parametrize("version, ok", [("3.10", False), ("3.11", True), ("3.12", True), ("3.13", False)])
def test_setup_takes_python_311_and_312(checkout, tmp_path, version, ok):
    done = sh(checkout / "scripts/core/setup_venv.sh", PYTHON=recorder(tmp_path / "python", version))
    assert (done.returncode == 0) == ok
    assert ok or ("3.11 and 3.12" in done.stderr and not (checkout / ".venv").exists())


def test_setup_names_the_libraries_that_opencv_lacks(checkout, tmp_path):
    "Without root's apt-get it says what to install."
    executable(tmp_path / "bin/id", "#!/bin/sh\necho 1000\n")
    done = sh(
        checkout / "scripts/core/setup_venv.sh",
        PYTHON=recorder(tmp_path / "python3.11", fail="cv2"),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    assert done.returncode != 0 and "libgl1" in done.stderr and "libglib2.0-0" in done.stderr


def test_setup_installs_them_when_it_may(checkout, tmp_path):
    executable(tmp_path / "bin/id", "#!/bin/sh\necho 0\n")
    executable(tmp_path / "bin/apt-get", f'#!/bin/sh\necho "$*" >> "{tmp_path / "apt.log"}"\n')
    sh(
        checkout / "scripts/core/setup_venv.sh",
        PYTHON=recorder(tmp_path / "python3.11", fail="cv2"),
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    asked = (tmp_path / "apt.log").read_text()
    assert "update" in asked and "libgl1 libglib2.0-0" in asked


# ---- clean-check and export-check

SETTINGS = (ROOT / "settings.ini").read_text()


@pytest.fixture
def little(tmp_path):
    "A project of one notebook, exported and clean, outside any git."
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    co = tmp_path / "little"
    (co / "scripts/core").mkdir(parents=True)
    (co / "nbs").mkdir()
    (co / "pillsnap").mkdir()
    shutil.copy2(ROOT / "scripts/core/in_step.sh", co / "scripts/core/in_step.sh")
    (co / "settings.ini").write_text(SETTINGS)
    (co / "pillsnap/__init__.py").write_text('__version__ = "0.1.0"\n')
    nb = new_notebook(
        cells=[
            new_markdown_cell("# One\n\n> A module."),
            new_code_cell("#| default_exp one"),
            new_code_cell("#| export\ndef f(): return 1"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
    )
    nbformat.write(nb, co / "nbs/00_one.ipynb")
    bin = Path(sys.executable).parent
    for tool in ("nbdev_clean", "nbdev_export"):
        assert sh(bin / tool, cwd=co).returncode == 0
    return co


def in_step(co, what):
    return sh(co / "scripts/core/in_step.sh", what, VENV=Path(sys.executable).parents[1])


@pytest.mark.spec("BX15")
def test_in_step_says_yes_and_changes_nothing(little):
    before = {p: p.read_bytes() for p in little.rglob("*") if p.is_file()}
    for what in ("clean", "export"):
        done = in_step(little, what)
        assert done.returncode == 0 and "is in step" in done.stdout, done.stdout + done.stderr
    assert {p: p.read_bytes() for p in little.rglob("*") if p.is_file()} == before


@pytest.mark.spec("BX15")
def test_in_step_finds_a_notebook_that_was_run_and_not_cleaned(little):
    p = little / "nbs/00_one.ipynb"
    p.write_text(p.read_text().replace('"execution_count": null', '"execution_count": 7'))
    before = p.read_text()
    done = in_step(little, "clean")
    assert done.returncode != 0 and "nbdev_clean" in done.stderr and p.read_text() == before


@pytest.mark.spec("BX15")
@pytest.mark.parametrize("change", ["module", "notebook"])
def test_in_step_finds_a_package_that_is_not_the_export(little, change):
    p = little / ("pillsnap/one.py" if change == "module" else "nbs/00_one.ipynb")
    p.write_text(p.read_text().replace("return 1", "return 2"))
    done = in_step(little, "export")
    assert done.returncode != 0 and "nbdev_export" in done.stderr
