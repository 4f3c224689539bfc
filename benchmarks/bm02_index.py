"""BM2: a delivery of annotations becomes one index, end to end, beside the naive way.

Ours reads, checks, compares photos and drugs, quarantines, and writes a checked Arrow file. The naive way is what
most scripts do: one process,
`json.load` per file, a YOLO text per photo. Both begin with a folder and end with files on disk.
"""

import json
import os
import tempfile
from itertools import count
from pathlib import Path

from harness import arguments, compare, finish

from pillsnap.dataset.conversion import index_labels
from pillsnap.synth.writer import write_delivery


def naive(labels: Path, out: Path) -> int:
    "Find, parse, convert, write: nothing is checked."
    out.mkdir()
    n = 0
    for path in labels.rglob("*.json"):
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        image, (x, y, w, h) = record["images"][0], record["annotations"][0]["bbox"]
        width, height = image["width"], image["height"]
        with open(out / (os.path.splitext(image["file_name"])[0] + ".txt"), "a", encoding="utf-8") as f:
            f.write(f"0 {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}\n")
        n += 1
    return n


def main() -> None:
    a = arguments(__doc__, n=60_000, workers=0)
    n = 600 if a.quick else a.n
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        ledger = write_delivery(
            tmp / "d", drugs=max(n // 1000, 4), photos=min(1000, n // 4), combos=0, labels_only=True, progress=False
        )
        labels, files = tmp / "d/data/train/labels", ledger["counts"]["train_single"]

        def ours() -> None:
            assert index_labels(labels, tmp / "train.arrow", workers=a.workers or None)["rows"] == files

        def one_process() -> None:
            assert index_labels(labels, tmp / "train.arrow", workers=1)["rows"] == files

        rounds = count()

        def plain() -> None:
            assert naive(labels, tmp / f"naive{next(rounds)}") == files

        finish(
            compare(
                "BM2",
                "annotations to one index",
                {"pillsnap": ours, "pillsnap, one process": one_process},
                {"naive one-process json → txt": plain},
                files,
                a.repeats,
                "annotations/s",
                "files in the page cache; processes started before the clock",
                quick=a.quick,
                out=a.out,
            )
        )


if __name__ == "__main__":
    main()
