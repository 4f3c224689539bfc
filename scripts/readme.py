#!/usr/bin/env python
"""Make README.md from nbs/index.ipynb, without Quarto. `--check` only compares (exit status 1 when they differ)."""

import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
SOURCE = (
    "https://github.com/pillsnap/pillsnap/blob/main/"  # the site links to the repository, README.md to its neighbours
)


def readme() -> str:
    "The index notebook as GitHub reads it: hidden cells dropped, pictures found from the repository's root."
    nb = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    nb.cells = [c for c in nb.cells if not (c.cell_type == "code" and c.source.lstrip().startswith("#| hide"))]
    text, _ = MarkdownExporter().from_notebook_node(nb)
    for site, here in (
        ("](images/", "](nbs/images/"),
        ("](results.ipynb)", "](nbs/results.ipynb)"),
        ("](benchmarks.ipynb)", "](nbs/benchmarks.ipynb)"),
        ("](real_pills.ipynb)", "](nbs/real_pills.ipynb)"),
        ("](limits.ipynb)", "](nbs/limits.ipynb)"),
        ("](guide/", "](nbs/guide/"),
        ("](deployment/", "](nbs/deployment/"),
        ('src="images/', 'src="nbs/images/'),
        (f"]({SOURCE}", "]("),
    ):
        text = text.replace(site, here)
    lines = [line.rstrip() for line in text.splitlines()]
    head = "<!-- made from nbs/index.ipynb by scripts/readme.py; edit the notebook -->\n\n"
    return head + "\n".join(lines).strip() + "\n"


if __name__ == "__main__":
    path = ROOT / "README.md"
    if "--check" in sys.argv:
        sys.exit(
            0
            if path.exists() and path.read_text(encoding="utf-8") == readme()
            else "README.md is out of step with nbs/index.ipynb: run python scripts/readme.py"
        )
    path.write_text(readme(), encoding="utf-8")
