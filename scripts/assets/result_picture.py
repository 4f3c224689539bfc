#!/usr/bin/env python
"""The picture on the first page: photos of a finished run, answered by its exported models. usage: result_picture.py RUN [OUT]"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pillsnap.core.plots import COLOURS, draw_boxes, save_fig, use_house_style, use_korean_font
from pillsnap.data.boxes import iou_matrix
from pillsnap.data.caches import box_of
from pillsnap.data.splits import load_stage
from pillsnap.deployment.predict import load_bundle

ROOT = Path(__file__).resolve().parents[2]


def main(run: Path, out: Path) -> None:
    "Two held-out combos in mode combo, wrong names in red, and two held-out singles in mode single with their first three drugs."
    import matplotlib.pyplot as plt
    use_house_style(); use_korean_font()
    bundle, stage = load_bundle(run), load_stage(run, 0)
    combos = sorted(set(stage.val[stage.val.kind == "combo"].path))[:4:3]
    singles = stage.val[stage.val.kind == "single"].groupby("class_key").path.first().iloc[[1, 6]]
    fig, axes = plt.subplots(1, 4, figsize=(11, 4.1), width_ratios=[1, 1, 1, 1])
    for ax, path in zip(axes, [*combos, *singles]):
        photo = np.asarray(Image.open(stage.root/path).convert("RGB"))
        answer = bundle.predict(photo, mode="combo" if path in combos else "single")
        if path in combos:
            boxes, truth = np.array([i["box"] for i in answer["items"]]), stage.val[stage.val.path == path]
            true = truth.class_key.to_numpy()[iou_matrix(boxes, np.stack([box_of(b) for b in truth.bbox])).argmax(1)]
            right = [i["kcode"] == t for i, t in zip(answer["items"], true)]
            photo = draw_boxes(photo, boxes, [f"{i['name'] or i['kcode']} {i['confidence']:.0%}{'' if ok else ', wrong'}" for i, ok in zip(answer["items"], right)], [COLOURS[2] if ok else "#c62828" for ok in right])
        else:
            ax.text(.5, -.03, "\n".join(f"{t['name'] or t['kcode']}  {t['confidence']:.0%}" for t in answer["items"][0]["top_k"][:3]),
                    transform=ax.transAxes, ha="center", va="top", fontsize=8)
        ax.imshow(photo); ax.set_axis_off(); ax.set_title(f"mode {answer['mode_used']}", fontsize=9)
    save_fig(fig, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT/"nbs"/"images"/"result.png")
