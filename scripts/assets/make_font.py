#!/usr/bin/env python
"""Make pillsnap/assets/PillSnapGothic.ttf from NanumGothic: Latin, Hangul and symbols, without Hanja and hinting.

usage: python scripts/assets/make_font.py NanumGothic.ttf [OUT]

Needs fontTools (it comes with matplotlib) and the source font (Debian: fonts-nanum). Same input, same bytes.
The SIL Open Font License reserves the names Nanum and NanumGothic, so what is modified must carry another name:
it is called "PillSnap Gothic". Its licence and its authors stay what they were (pillsnap/assets/OFL.txt).
"""

import sys
from pathlib import Path

from fontTools import subset
from fontTools.ttLib import TTFont

FAMILY, POSTSCRIPT = "PillSnap Gothic", "PillSnapGothic-Regular"
OUT = Path(__file__).resolve().parents[2] / "pillsnap" / "assets" / "PillSnapGothic.ttf"
HANJA = [(0x2E80, 0x2FDF), (0x3400, 0x9FFF), (0xF900, 0xFAFF)]  # CJK ideographs and radicals; no drug name uses them
NAMES = {
    1: FAMILY,
    2: "Regular",
    3: f"{FAMILY} 1.0",
    4: FAMILY,
    5: "Version 1.0",
    6: POSTSCRIPT,
    10: "Modified from a typeface of NHN (NAVER) Corporation: Hanja and hinting removed.",
    13: "This Font Software is licensed under the SIL Open Font License, Version 1.1.",
    14: "http://scripts.sil.org/OFL",
}


def main(src: str, out: str | Path = OUT) -> None:
    font = TTFont(src, recalcTimestamp=False)
    keep = [c for c in font.getBestCmap() if not any(a <= c <= b for a, b in HANJA)]
    options = subset.Options(
        hinting=False,
        desubroutinize=True,
        glyph_names=False,
        notdef_outline=True,
        recalc_timestamp=False,
        legacy_kern=True,
    )
    options.drop_tables += ["TSI0", "TSI1", "TSI2", "TSI3", "TSI5", "gasp"]
    s = subset.Subsetter(options)
    s.populate(unicodes=keep)
    s.subset(font)
    rename(font)
    font.save(out)
    print(f"{out}: {len(font.getBestCmap())} characters, {Path(out).stat().st_size / 1e6:.2f} MB")


def rename(font: TTFont) -> None:
    copyright_ = font["name"].getDebugName(0)
    font["name"].names = []
    for i, text in {0: copyright_, **NAMES}.items():
        font["name"].setName(text, i, 3, 1, 0x409)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    main(*sys.argv[1:])
