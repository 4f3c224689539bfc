"""BM1: reading annotation files, files per second: typed decoding beside json.load and orjson.

Every side opens each file and parses it; ours also checks all 50 keys and their types, and says why when it refuses.
"""

import json
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from harness import arguments, compare, finish, optional

from pillsnap.delivery.annotations import AnnotationReader
from pillsnap.delivery.faults import Fault
from pillsnap.delivery.tree import label_files
from pillsnap.synth.writer import write_delivery


def by_folder(files: list[str]) -> list[tuple[str, list[str]]]:
    "The files' folders, each with the names in it."
    return [(folder, [f.name for f in group]) for folder, group in groupby(map(Path, files), lambda f: str(f.parent))]


def contenders(folders: list[tuple[str, list[str]]]) -> tuple[Callable, Callable, Callable | str]:
    "Ours, json.load and orjson (or why it is absent); each reads the folder whose number it is given."
    orjson = optional("orjson")
    paths = [[f"{folder}/{name}" for name in names] for folder, names in folders]

    def ours(part: int) -> None:
        folder, names = folders[part]
        assert sum(1 for _ in AnnotationReader().folder(folder, names)) == len(names)

    def with_json(part: int) -> None:
        for f in paths[part]:
            with open(f, encoding="utf-8") as io:
                json.load(io)

    def with_orjson(part: int) -> None:
        for f in paths[part]:
            with open(f, "rb") as io:
                orjson.loads(io.read())

    return ours, with_json, orjson if isinstance(orjson, str) else with_orjson


def main() -> None:
    a = arguments(__doc__, n=20_000)
    n = 400 if a.quick else a.n
    with tempfile.TemporaryDirectory() as tmp:
        write_delivery(tmp, drugs=max(n // 500, 4), photos=min(500, n // 4), combos=0, labels_only=True, progress=False)
        files = label_files(Path(tmp) / "data/train/labels")[0][:n]
        folders = by_folder(files)
        ours, with_json, with_orjson = contenders(folders)
        assert not any(
            isinstance(got, Fault) for got in map(AnnotationReader(), files)
        )  # and all sides find the files in memory
        finish(
            compare(
                "BM1",
                "annotation files read",
                {"pillsnap": ours},
                {"json.load": with_json, "orjson": with_orjson},
                len(files),
                a.repeats,
                "files/s",
                "one process, files in the page cache, folder by folder in turn",
                quick=a.quick,
                out=a.out,
                parts=len(folders),
            )
        )


if __name__ == "__main__":
    main()
