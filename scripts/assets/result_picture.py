#!/usr/bin/env python
"""The picture on the first page: photos of a finished run, answered by its exported models. usage:
result_picture.py RUN [OUT]"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from pillsnap.core.plots import COLOURS, colour_legend, draw_boxes, save_fig, use_house_style, wrap_title
from pillsnap.dataset.splitfiles import load_split_data
from pillsnap.deployment.runtime import load_bundle
from pillsnap.photos.boxes import iou_matrix
from pillsnap.photos.caches import box_of

ROOT = Path(__file__).resolve().parents[2]
RIGHT, WRONG = COLOURS[2], "#c62828"


def chosen_photos(val: pd.DataFrame) -> tuple[list[str], list[str]]:
    "Two validation photos of several pills and two of one pill, of different scenes and drugs."
    combos = sorted(set(val[val.kind == "combo"].path))
    singles = val[val.kind == "single"].groupby("class_key").path.first()
    return combos[:4:3], list(singles.iloc[[1, min(6, len(singles) - 1)]])


def named(item: dict[str, Any]) -> str:
    "A pill's name, short enough for a label; its code where it has no name."
    return wrap_title(item["name"] or item["kcode"], 14, lines=1)


def answered_combo(photo: np.ndarray, items: list[dict[str, Any]], truth: pd.DataFrame) -> np.ndarray:
    "The photo with a box and a name for each pill that was found; a wrong name is red."
    if not items:
        return photo
    boxes = np.array([item["box"] for item in items])
    true = truth.class_key.to_numpy()[iou_matrix(boxes, np.stack([box_of(b) for b in truth.bbox])).argmax(1)]
    colours = [RIGHT if item["kcode"] == key else WRONG for item, key in zip(items, true)]
    return draw_boxes(photo, boxes, [f"{named(item)} {item['confidence']:.0%}" for item in items], colours)


def main(run: Path, out: Path) -> None:
    "Two combos in mode combo, wrong names in red, and two singles in mode single with their first three drugs."
    import matplotlib.pyplot as plt

    use_house_style()
    bundle, stage = load_bundle(run), load_split_data(run, 0)
    combos, singles = chosen_photos(stage.val)
    fig, axes = plt.subplots(1, len(combos) + len(singles), figsize=(11, 4.6))
    for ax, path in zip(axes, [*combos, *singles]):
        photo = np.asarray(Image.open(stage.root / path).convert("RGB"))
        answer = bundle.predict(photo, mode="combo" if path in combos else "single")
        if path in combos:
            photo = answered_combo(photo, answer["items"], stage.val[stage.val.path == path])
        else:
            lines = [
                f"{wrap_title(t['name'] or t['kcode'], 26, lines=1)}  {t['confidence']:.0%}"
                for t in answer["items"][0]["top_k"][:3]
            ]
            ax.text(0.5, -0.03, "\n".join(lines), transform=ax.transAxes, ha="center", va="top", fontsize=8)
        ax.imshow(photo)
        ax.set_axis_off()
        ax.set_title(f"mode {answer['mode_used']}", fontsize=9)
    save_fig(colour_legend(fig, {"named rightly": RIGHT, "named wrongly": WRONG}), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "nbs" / "images" / "result.png")
