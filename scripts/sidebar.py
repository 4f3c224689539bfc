#!/usr/bin/env python
"""Write nbs/sidebar.yml, the table of contents of the published docs: one section a wing, in reading order.

`--check` only compares (exit status 1 when the file is out of step with the notebooks).
"""

import re
import sys
from pathlib import Path

import nbformat
import yaml

NBS = Path(__file__).resolve().parents[1] / "nbs"
SECTIONS = {  # folder of nbs/ → heading; "" is nbs/ itself
    "core": "0 Core: files, settings, records",
    "delivery": "1 Delivery: what AI Hub ships",
    "synth": "2 Synth: rendered deliveries",
    "photos": "3 Photos: pixels",
    "dataset": "4 Dataset: what is learnt from",
    "models": "5 Models",
    "training": "6 Training",
    "evaluation": "7 Evaluation",
    "deployment": "8 Deployment",
    "": "9 Commands",
}
FIRST = ("index", "results", "benchmarks", "real_pills", "limits")  # pages of nbs/ that stand above the sections


def title(notebook: Path) -> str:
    "The heading of a notebook's first cell."
    first = nbformat.read(notebook, 4).cells[0].source
    return re.search(r"^# +(.+)", first, re.M)[1]


def entry(notebook: Path) -> dict[str, str]:
    "A chapter's line: its module, its title."
    module = re.sub(r"^\d+_", "", notebook.stem)
    return {"text": f"{module} · {title(notebook)}", "href": notebook.relative_to(NBS).as_posix()}


def sidebar() -> str:
    "The text of nbs/sidebar.yml."
    contents: list = [{"text": title(NBS / f"{page}.ipynb"), "href": f"{page}.ipynb"} for page in FIRST]
    if guide := sorted((NBS / "guide").glob("*.ipynb")):
        pages = [{"text": title(p), "href": p.relative_to(NBS).as_posix()} for p in guide]
        contents.append({"section": "Guide", "contents": pages})
    for folder, heading in SECTIONS.items():
        chapters = sorted((NBS / folder).glob("[0-9]*.ipynb"))
        contents.append({"section": heading, "contents": [entry(p) for p in chapters]})
    head = "# made by scripts/sidebar.py from the notebooks' first cells\n"
    return head + yaml.safe_dump({"website": {"sidebar": {"contents": contents}}}, allow_unicode=True, sort_keys=False)


def main() -> str | int:
    "Exit status: 0, or what is wrong."
    path = NBS / "sidebar.yml"
    if "--check" not in sys.argv:
        path.write_text(sidebar(), encoding="utf-8")
        return 0
    if path.is_file() and path.read_text(encoding="utf-8") == sidebar():
        return 0
    return "nbs/sidebar.yml is out of step with the notebooks: run python scripts/sidebar.py"


if __name__ == "__main__":
    sys.exit(main())
