"The files around the notebooks agree with one another."

import re
import shlex
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
INI = ConfigParser(delimiters=["="])
INI.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = INI["DEFAULT"]

from mutations import MUTATIONS


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def pins():
    lines = [line.split("#")[0].strip() for line in text("constraints.txt").splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("which", [key for key in SETTINGS if key.endswith("requirements")])
def test_every_requirement_is_pinned_within_its_range(which):
    have = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in pins())}
    for r in map(Requirement, shlex.split(SETTINGS[which])):
        assert canonicalize_name(r.name) in have, f"{r.name} has no pin"
        assert r.specifier.contains(have[canonicalize_name(r.name)]), (
            f"{r} is pinned to {have[canonicalize_name(r.name)]}"
        )


def test_constraints_are_plain_pins():
    "Name and version alone: no address, no option, no local build; each name once."
    lines = pins()
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.]*", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_torch_and_torchvision_are_a_pair():
    have = dict(line.split("==") for line in pins())
    assert (have["torch"], have["torchvision"]) == ("2.11.0", "0.26.0")
    wants = {r.name: r.specifier for r in map(Requirement, shlex.split(SETTINGS["train_requirements"]))}
    assert not wants["torch"].contains(Version("2.13.0")), "no torchvision fits torch 2.13"


def test_only_one_opencv():
    assert [line for line in pins() if line.lower().startswith("opencv")] == ["opencv-python==5.0.0.93"]


def test_setuptools_fits_torch():
    "torch asks for setuptools < 82, and pip freeze does not list it."
    assert Version(dict(line.split("==") for line in pins())["setuptools"]) < Version("82")


@pytest.mark.spec("CF7")
def test_python_311_and_312():
    assert SETTINGS["min_python"] == "3.11" and "<3.13" in text("setup.py")
    assert yaml.safe_load(text(".github/workflows/test.yml"))["jobs"]["test"]["strategy"]["matrix"][
        "python-version"
    ] == ["3.11", "3.12"]


def test_nbdev_settings_that_matter():
    assert SETTINGS["allowed_cell_metadata_keys"].split() == ["tags"], "nbdev_clean would strip the parameters tag"
    assert SETTINGS["update_pyproject"] == "False" and SETTINGS["doc_path"] == "_docs" and SETTINGS["nbs_path"] == "nbs"


# ---- make

TARGETS = {"demo", "golden", "test", "lab", "docs", "help", "clean"}


def test_makefile_has_its_targets_and_lists_them():
    assert set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M)) >= TARGETS
    if shutil.which("make"):
        out = subprocess.run(
            ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert set(re.findall(r"^  make ([a-z-]+) ", out, re.M)) >= TARGETS


def test_make_test_does_all_in_order():
    command = ["make", "-n", "--no-print-directory", "test"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = ("ruff format", "ruff check", "in_step.sh clean", "in_step.sh export", "nbdev_test", "python -m pytest")
    at = [out.index(step) for step in steps]
    assert at == sorted(at)
    assert "pytest" in out.splitlines()[-1], "pytest's summary is the last line"


def test_ci_runs_make_test_without_asking():
    ci = text(".ci/run")
    assert (
        ci.startswith("#!/usr/bin/env bash\n#")
        and "set -euo pipefail" in ci
        and ci.index("make --no-print-directory types") < ci.index("make --no-print-directory test </dev/null")
        and "chromium" in ci
    )
    tests = text(".github/workflows/test.yml")
    assert "bash .ci/run" in tests and "make check" in tests and "make docs" in text(".github/workflows/docs.yml")


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
@pytest.mark.skipif(bool(shutil.which("quarto")), reason="quarto is installed: make docs would build the site")
def test_make_docs_says_what_is_missing():
    "`-o setup`: as if the environment were ready."
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", "setup", "docs"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "quarto" in done.stdout and "quarto.org" in done.stdout


@pytest.mark.spec("OP4")
def test_commands_of_the_readme_exist():
    if not (ROOT / "README.md").exists():
        pytest.skip("README.md is not written yet")
    used = set(re.findall(r"^\s*(?:\$ )?make ([a-z-]+)\s*(?:#.*)?$|`make ([a-z-]+)`", text("README.md"), re.M))
    used = {a or b for a, b in used}
    assert {"demo", "test"} <= used and used <= set(re.findall(r"^([a-z-]+):", text("Makefile"), re.M)), used
    for path in set(re.findall(r"(?<![\w/])(scripts/[\w/.]+\.sh)", text("README.md"))):
        assert (ROOT / path).is_file(), path


# ---- licence, docs, changelog


def test_licence_is_apache_with_a_plain_word_on_agpl():
    lic = text("LICENSE")
    for part in (
        "Apache License\n                           Version 2.0, January 2004",
        "END OF TERMS AND CONDITIONS",
        "Grant of Patent License",
        "APPENDIX: How to apply",
        "ultralytics",
        "AGPL-3.0",
        "AI Hub",
    ):
        assert part in lic, part
    assert SETTINGS["license"] == "apache2" and 'license="Apache-2.0"' in text("setup.py")


def test_changelog_has_this_version():
    assert f"## {SETTINGS['version']}" in text("CHANGELOG.md")


def test_quarto_file_is_at_the_root_and_linked():
    link = ROOT / "nbs/_quarto.yml"
    assert link.is_symlink() and link.readlink() == Path("../_quarto.yml") and link.resolve() == ROOT / "_quarto.yml"
    q = yaml.safe_load(text("_quarto.yml"))
    assert q["project"]["type"] == "website" and q["metadata-files"] == ["nbdev.yml", "sidebar.yml"]
    assert (ROOT / "nbs" / q["format"]["html"]["css"]).is_file()


@pytest.mark.parametrize("name", ["test", "docs"])
def test_workflows_parse(name):
    w = yaml.safe_load(text(f".github/workflows/{name}.yml"))
    assert w["name"] == name and all("runs-on" in j and "timeout-minutes" in j for j in w["jobs"].values())


@pytest.mark.spec("CF7")
def test_no_path_of_this_machine_in_the_tree():
    "Neither this checkout's folder nor the home of whoever wrote it, nor a drive letter."
    for p in sorted(
        [
            *ROOT.glob("*.*"),
            *ROOT.glob("nbs/**/*.ipynb"),
            *ROOT.glob("pillsnap/**/*.py"),
            *ROOT.glob("scripts/**/*.sh"),
            *ROOT.glob("configs/*.yaml"),
            ROOT / "Makefile",
        ]
    ):
        if not p.is_file() or p.suffix == ".png":
            continue
        body = p.read_text(encoding="utf-8")
        assert f"{ROOT}/" not in body and f"{Path.home()}/" not in body, p
        if p.suffix in (".sh", ".yaml", ".py"):
            assert not re.search(r"['\"][A-Za-z]:\\\\?[A-Za-z]", body), p


def test_every_breakage_can_be_applied_and_has_its_test():
    "A breakage whose text is gone, or whose test has another name, proves nothing."
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)
    texts = {f: (ROOT / f).read_text(encoding="utf-8") for f in {m.file for m in MUTATIONS}}
    assert [m.name for m in MUTATIONS if texts[m.file].count(m.old) != 1 or m.old == m.new] == []
    named = {m.test.partition("[")[0] for m in MUTATIONS}
    defined = {
        f"{f}::{name}"
        for f in {t.partition("::")[0] for t in named}
        for name in re.findall(r"^(?:async )?def (test_\w+)", (ROOT / f).read_text(encoding="utf-8"), re.M)
    }
    assert named - defined == set()
