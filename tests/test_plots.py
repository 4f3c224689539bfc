"""Pictures that a person reads figures and drug codes from."""

import re
from pathlib import Path

import matplotlib
import nbformat
import pytest
from PIL import Image

from pillsnap.core.plots import HOUSE_DPI, use_house_style

ROOT = Path(__file__).resolve().parents[1]


def test_letters_are_not_hinted():
    "The hinted font draws an 8 like a 0 in small labels; nbs/core/070_plots measures it."
    with matplotlib.rc_context():
        matplotlib.rcParams["text.hinting"] = "default"
        use_house_style()
        assert matplotlib.rcParams["text.hinting"] == "none" and matplotlib.rcParams["savefig.dpi"] == HOUSE_DPI >= 160


def test_every_picture_of_a_run_has_the_house_resolution(smoke_run):
    pictures = sorted((smoke_run / "reports").glob("*.png"))
    assert len(pictures) >= 10
    low = {p.name: Image.open(p).info.get("dpi") for p in pictures}
    assert {name: dpi for name, dpi in low.items() if not dpi or round(dpi[0]) < 160} == {}


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_nobody_asks_for_a_coarser_picture(path):
    "`save_fig` knows the resolution; a `savefig` of one's own would miss the hinting and the date."
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "#| export" in cell.source and "def save_fig(" not in cell.source:
            assert not re.search(r"\.savefig\(|\bdpi\s*=", cell.source), cell.source[:200]
