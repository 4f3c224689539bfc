"""Every setting is read by some code, or refused with a sentence."""

import importlib.util
import shutil
from functools import cache
from pathlib import Path

import pytest
from pydantic import create_model

from pillsnap.core.config import load_config
from pillsnap.core.errors import PillsnapError
from pillsnap.core.settings import Config, Data, key

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("unread_keys", ROOT / "scripts" / "core" / "unread_keys.py")
U = importlib.util.module_from_spec(spec)
spec.loader.exec_module(U)
unread_now = cache(U.unread_keys)  # of the package as it is


def test_every_key_is_read_by_some_code():
    assert unread_now() == []


def test_the_exceptions_are_still_true():
    "Each names a key, the text that reads it stands in its file, and the scan does not see the key by itself."
    assert U.stale_entries() == []


def test_a_key_that_nothing_reads_is_found():
    more = create_model("Data", __base__=Data, colour_of_the_tray=(str, key("white", "what no code asks for")))
    tree = U.Tree(create_model("Config", __base__=Config, data=(more, key(more(), "the delivery"))))
    assert set(U.unread_keys(tree=tree)) - set(unread_now()) == {"data.colour_of_the_tray"}


@pytest.mark.parametrize(
    "dotted, decoy",
    [
        ("train.leak_gap", ""),  # read from the whole configuration
        ("train.detection.close_mosaic", ""),  # read from a block that has a short name
        ("train.classification.saving.every_minutes", ""),  # read from a block that an object keeps
        (
            "train.classification.grad_clip",
            "cfg.grad_clip",
        ),  # the same word, but taken from a block that has no such key
    ],
)
def test_a_key_whose_reader_goes_is_found(tmp_path, dotted, decoy):
    unneeded = shutil.ignore_patterns("__pycache__", "assets")
    package = shutil.copytree(ROOT / "pillsnap", tmp_path / "pillsnap", ignore=unneeded)
    name = dotted.rsplit(".", 1)[-1]
    for f in package.rglob("*.py"):
        if f.name != "settings.py" and f".{name}" in (source := f.read_text(encoding="utf-8")):
            f.write_text(source.replace(f".{name}", ".nothing"), encoding="utf-8")
    (package / "more.py").write_text(f"def f(cfg): return {decoy or 1}\n", encoding="utf-8")
    assert set(U.unread_keys(package)) - set(unread_now()) == {dotted}


@pytest.mark.parametrize("dotted", U.Tree().fixed)
def test_a_key_with_one_legal_value_says_why(dotted):
    with pytest.raises(PillsnapError, match=r"; .{25,}\)") as e:
        load_config("two_stage", [f"{dotted}=something_else"])
    assert dotted in str(e.value)
