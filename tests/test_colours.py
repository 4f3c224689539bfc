"""Colours that a person reads: contrast of at least 4.5 to 1 (WCAG AA), in both themes of the site, and no request
to a font host."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from pillsnap.core.records import Provenance
from pillsnap.evaluation.advisor import Facts, evaluate_and_recommend
from pillsnap.evaluation.menu import static_html, write_advice

ROOT = Path(__file__).resolve().parents[1]
LEAST = 4.5
NAMED = {"white": "#ffffff", "black": "#000000", "red": "#ff0000"}


def rgb(colour: str) -> list[int]:
    colour = NAMED.get(colour, colour).lstrip("#")
    full = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    return [int(full[i : i + 2], 16) for i in (0, 2, 4)]


def luminance(colour: str) -> float:
    "Relative luminance of an sRGB colour (WCAG 2.1)."
    linear = [c / 255 / 12.92 if c / 255 <= 0.03928 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_what_the_standard_says():
    assert round(contrast("#000", "#fff"), 2) == 21 and round(contrast("#767676", "#ffffff"), 2) == 4.54
    assert round(contrast("#00bc8c", "#f8f9fa"), 1) == 2.3, (
        "linked code in the dark theme before it had colours of its own"
    )


class Inked(HTMLParser):
    "Words of a page that styles itself in place, each with its colour and what lies behind it."

    RESTYLED = ("code", "td", "th", "tr", "a")  # themes give these colours of their own: they must bring theirs
    EMPTY = ("img", "br", "input", "hr")

    def __init__(self):
        super().__init__()
        self.stack, self.words, self.bare = [("#000000", "#ffffff", True)], [], []

    def handle_starttag(self, tag, attrs):
        style = dict(attrs).get("style") or ""
        ink = re.search(r"(?<![-\w])color:\s*(#\w+|\w+)", style)
        paper = re.search(r"background(?:-color)?:\s*(#\w+)", style)
        before = self.stack[-1]
        own = bool(ink and paper) or (before[2] and tag not in self.RESTYLED)
        if tag == "img" and not dict(attrs).get("alt"):
            self.bare.append(tag)
        if tag not in self.EMPTY:
            self.stack.append((ink[1] if ink else before[0], paper[1] if paper else before[1], own))

    def handle_endtag(self, tag):
        if tag not in self.EMPTY:
            self.stack.pop()

    def handle_data(self, data):
        if data.strip():
            ink, paper, own = self.stack[-1]
            self.words.append((data.strip(), ink, paper, own))


def faint(page: str) -> list[tuple]:
    "Words that are hard to read, or whose colours the page's theme decides."
    reader = Inked()
    reader.feed(page)
    assert len(reader.words) > 3 and not reader.bare, "an <img> without alt"
    return [(text, ink, paper) for text, ink, paper, own in reader.words if not own or contrast(ink, paper) < LEAST]


@pytest.mark.parametrize("status", ["", "GO", "NO_GO", "NOT_MEASURED", "TIME_CAP_SUCCESS"])
@pytest.mark.parametrize("accuracy", [0.95, 0.75, 0.3])
def test_the_advisors_menu_can_be_read(tmp_path, status, accuracy):
    prov = Provenance(data="synthetic", data_hash="a" * 64, class_map_hash="b" * 64)
    advice = evaluate_and_recommend(
        0,
        Facts(
            {"accuracy": prov.metric("m", accuracy, n=220, seconds=20.0)}, {}, settings={"train.detection.epochs": 10}
        ),
    )
    page = static_html(
        write_advice(
            tmp_path, advice, {"status": status, "label": "demo", "reasons": ["ACC_BELOW_TARGET"]} if status else None
        )
    )
    assert faint(page) == []
    assert faint(
        "<div style='background:#fff;color:#222'><span style='color:#d4a72c'>one</span><b>two</b> <i>three</i> "
        "<code>four</code></div>"
    ) == [("one", "#d4a72c", "#fff"), ("four", "#222", "#fff")]


def variables(name: str) -> dict[str, str]:
    "The Sass variables of a theme file of the site."
    return dict(
        re.findall(r"^\$([\w-]+):\s*(.+?)\s*(?:!default)?;", (ROOT / "nbs" / name).read_text(encoding="utf-8"), re.M)
    )


@pytest.mark.parametrize("name", ["theme-light.scss", "theme-dark.scss"])
def test_the_themes_can_be_read_and_ask_no_font_host(name):
    theme = variables(name)
    pairs = [
        (theme[ink], theme[paper])
        for ink, paper in (
            ("body-color", "body-bg"),
            ("link-color", "body-bg"),
            ("link-color", "code-bg"),
            ("code-color", "code-bg"),
        )
    ]
    assert [p for p in pairs if contrast(*p) < LEAST] == []
    assert theme["web-font-path"] == "false", "Quarto's themes import a font from a host unless this is false"
    assert theme["font-family-sans-serif"].startswith("system-ui")
    assert "http" not in (ROOT / "nbs" / name).read_text() + (ROOT / "nbs" / "styles.css").read_text()


def test_the_site_uses_its_themes():
    html = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["format"]["html"]
    assert {kind: files[-1] for kind, files in html["theme"].items()} == {
        "light": "theme-light.scss",
        "dark": "theme-dark.scss",
    }


def test_wide_things_scroll_on_a_narrow_screen():
    css = (ROOT / "nbs" / "styles.css").read_text(encoding="utf-8")
    assert "overflow-wrap: anywhere" in css and re.search(r"table[^{]*\{[^}]*overflow-x: auto", css)
