"""README.md is the index notebook, and says what a newcomer needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.spec("OP4")
@pytest.mark.parametrize("script", ["readme.py", "sidebar.py"])
def test_what_scripts_make_of_the_notebooks_is_in_step(script):
    r = subprocess.run([sys.executable, str(ROOT / "scripts" / script), "--check"], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@pytest.mark.spec("OP4")
@pytest.mark.parametrize(
    "topic",
    [
        "CUDA driver",
        "torchvision::nms",
        "out of memory",
        "opset",
        "ExecutionProvider",
        "CORS",
        "Cloudflare",
        "## Security",
        "AGPL-3.0",
        "make demo",
        "make test",
    ],
)
def test_readme_covers(topic):
    assert topic in README


@pytest.mark.spec("OP4")
def test_every_target_picture_and_link_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets
    for link in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.spec("OP4")
def test_every_override_and_command_in_the_readme_is_accepted():
    from pillsnap.cli import app
    from pillsnap.core.config import load_config

    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    for line in re.findall(r"^pillsnap .*$", README, re.M):
        words = line.split("#")[0].split()
        assert words[1] in commands, line
        load_config("two_stage", [w for w in words if re.match(r"[a-z_]+(\.\w+)+=", w)])
