"""Photos to measure loaders with: 976 x 1280, rendered by the project, a folder per drug, made once in a temporary
folder.

A dozen are rendered and each is varied three times (shifted, brighter); every further file is a hard link to one of
them, so that n files exist,
are opened and are decoded, and the disk is no part of the measurement: all of it lies in the page cache, for us and
for the peers.
"""

import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import simplejpeg
from PIL import Image

WIDTH, HEIGHT, DRUGS = 976, 1280, 12


def rendered(k: int, seed: int = 3) -> tuple[np.ndarray, list[int]]:
    "One photo and its box, as the synthetic delivery has them."
    from pillsnap.synth.catalogue import make_catalogue
    from pillsnap.synth.draws import rng_for
    from pillsnap.synth.renderer import Shot, photograph, single_pose

    drug, rng = list(make_catalogue(DRUGS, seed))[k % DRUGS], rng_for(seed, k)
    shot = Shot(back=k % 3, light=k // 3 % 3, latitude=75, width=WIDTH, height=HEIGHT, field=28.6)
    img, extents = photograph([(drug, single_pose(0, 20 * k, shot, rng))], shot, rng)
    x0, y0, x1, y1 = map(int, extents[0])
    return img, [x0, y0, x1 - x0, y1 - y0]


def encode(img: np.ndarray, ext: str) -> bytes:
    "As AI Hub's photos are: PNG, or a JPEG of a phone's quality."
    if ext == "jpg":
        return simplejpeg.encode_jpeg(np.ascontiguousarray(img), quality=96, colorsubsampling="420")
    out = io.BytesIO()
    Image.fromarray(img).save(out, "PNG")
    return out.getvalue()


def photo_tree(ext: str, n: int, distinct: int = 48) -> tuple[Path, pd.DataFrame]:
    "A folder of n files for ImageFolder, and the manifest rows that the project reads."
    distinct = min(distinct, max(4, n // 16))  # a quick run renders few
    root = Path(tempfile.gettempdir()) / f"pillsnap-bench-{os.getuid()}" / f"{ext}-{n}-{distinct}-v6"
    keys, rows = [f"K-{d + 1:06d}" for d in range(DRUGS)], root / "rows.json"
    if not rows.exists():
        boxes = []
        for k in range(distinct):
            if k % 4 == 0:
                img, box = rendered(k // 4)
            data = encode(
                np.clip(np.roll(img, 7 * (k % 4), 1).astype(np.int16) + 3 * (k % 4), 0, 255).astype(np.uint8), ext
            )
            (root / keys[k % DRUGS]).mkdir(parents=True, exist_ok=True)
            (root / keys[k % DRUGS] / f"{k:06d}.{ext}").write_bytes(data)
            boxes.append(box)
        for k in range(distinct, n):
            to = root / keys[k % DRUGS] / f"{k:06d}.{ext}"
            to.parent.mkdir(parents=True, exist_ok=True)
            if not to.exists():
                os.link(root / keys[(k % distinct) % DRUGS] / f"{k % distinct:06d}.{ext}", to)
        rows.write_text(json.dumps(boxes))
    boxes = json.loads(rows.read_text())
    table = [
        dict(
            path=f"{keys[k % DRUGS]}/{k:06d}.{ext}",
            class_key=keys[k % DRUGS],
            bbox=json.dumps(boxes[k % distinct]),
            width=WIDTH,
            height=HEIGHT,
            kind="single",
        )
        for k in range(n)
    ]
    return root, pd.DataFrame(table)


def rows_only(n: int) -> pd.DataFrame:
    "Manifest rows without files."
    return pd.DataFrame(
        [
            dict(
                path=f"{k}.jpg", class_key=f"K-{k % DRUGS + 1:06d}", bbox="", width=WIDTH, height=HEIGHT, kind="single"
            )
            for k in range(n)
        ]
    )


def size_note(root: Path, rows: pd.DataFrame) -> str:
    "What the files are, for the table's caption."
    kb = np.mean([(root / p).stat().st_size for p in rows["path"][:48]]) / 1e3
    return f"{WIDTH}x{HEIGHT}, {kb:.0f} kB a file, warm page cache"
