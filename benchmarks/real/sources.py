"""Public repositories with photos of real pills, as local clones: the commit is fixed, and each photo is known by hash.

Nothing is downloaded here and nothing of a repository is kept in this one, except the names and hashes of its files:

    git clone https://github.com/Davidooff/AI-pill-detection CLONE
    python benchmarks/real/sources.py davidooff CLONE          # checks a clone against benchmarks/real/photos
    python benchmarks/real/sources.py davidooff CLONE --list   # writes that list anew, for another commit

A clone may be partial: only the listed files must be there. Another commit, a missing folder, and a file that is
missing or changed are refused.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pillsnap.core.errors import PillsnapError
from pillsnap.core.files import save_json, sha256_text
from pillsnap.core.records import Metric, Provenance
from pillsnap.dataset.duplicates import near_pairs, thumbnail_of

HERE = Path(__file__).resolve().parent
OUT = Path("_runs/real")  # below the working folder: a person's own run never replaces the published results


def _first_half(path: str) -> bool:
    "Whether a picture belongs to the pills that are measured here; the others are kept aside."
    pill = re.sub(r"_0_[01]\.jpg$", "", path.rsplit("/", 1)[-1])
    return hashlib.sha256(pill.encode()).hexdigest()[0] in "01234567"


@dataclass(frozen=True)
class Source:
    "A public repository at one commit."

    repository: str  # owner/name on GitHub
    commit: str  # 40 hexadecimal digits
    files: str  # pattern of the files that are read, on the whole path
    what: str  # what its photos show

    def takes(self, path: str) -> bool:
        "Whether a file of the repository is read."
        return bool(re.fullmatch(self.files, path)) and ("epillID" not in path or _first_half(path))


SOURCES = {
    "davidooff": Source(
        "Davidooff/AI-pill-detection",
        "4f03d16a4fd9ab965466eddfdde57c4b885bee4e",
        r"DataSet/(train|valid)/(.*\.jpg|_annotations\.csv)",
        "phone photos of one pill each on everyday grounds, a box each; some boxes are wrong",
    ),
    "andrewtrainor": Source(
        "andrewtrainor/Pill_Object_Detection",
        "df51e5b9a9cc74147b6efbe5c0e8eb6665855cc6",
        r"images/.*\.jpg|all_labels\.csv",
        "heaps of up to 120 capsules and close-ups, all boxed",
    ),
    "epillid": Source(
        "Phongbwb/Pilldetection",
        "7cf80ebf31ca4bbd8d313b5912aefdf36aea78b0",
        r"dataset_small/epillIDsmall/.*_0_[01]\.jpg",
        "one reference picture of the front and one of the back of each pill, on black",
    ),
    "abhiram": Source(
        "abhiram-bogisetty/PillDetection",
        "091d89af4b6542e44315a80f94c6833791d7ca28",
        r"Dataset/(train|valid)/.*\.(jpg|jpeg|png)",
        "reference pictures of 20 drugs in a folder each, many of them near-copies",
    ),
}


@dataclass(frozen=True)
class Clone:
    "A local clone whose commit was checked."

    source: Source  # what it should be
    folder: Path  # where it is
    listed: dict[str, str]  # path → sha256 of every file that is read

    @property
    def data(self) -> str:
        "The name of the data in every record."
        return f"other:{self.source.repository}@{self.source.commit[:12]}"

    @property
    def data_hash(self) -> str:
        "One hash of all names and contents."
        return sha256_text("".join(f"{h}  {p}\n" for p, h in sorted(self.listed.items())))

    def read(self, path: str) -> bytes:
        "A listed file; PillsnapError where it is missing or was changed."
        file = self.folder / path
        if not file.is_file():
            raise PillsnapError("a listed file is not in this clone", where=file, fix="check it out again")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.listed[path]:
            raise PillsnapError("this file is not the listed one", where=file, fix="check it out again")
        return data

    @cached_property
    def photos(self) -> list[str]:
        "Paths of the listed photos."
        return [p for p in sorted(self.listed) if p.lower().endswith((".jpg", ".jpeg", ".png"))]

    def check(self) -> int:
        "Read every listed file; returns how many there are."
        for path in self.listed:
            self.read(path)
        return len(self.listed)


def _head(folder: Path) -> str:
    "The commit that a clone shows."
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def open_clone(
    name: str,  # key of SOURCES
    folder: str | Path,  # the clone
    lists: Path = HERE / "photos",  # one list of hashes a source
    sources: dict[str, Source] | None = None,  # others than SOURCES, in tests
) -> Clone:  # PillsnapError for an absent folder, another commit, or no list
    "A clone of a named repository at its commit."
    source, folder = (sources or SOURCES)[name], Path(folder)
    if not folder.is_dir():
        fix = f"git clone https://github.com/{source.repository} {folder}"
        raise PillsnapError("there is no such folder", where=folder, fix=fix)
    if (found := _head(folder)) != source.commit:
        raise PillsnapError(
            f"this clone of {source.repository} is at {found[:12] or 'no commit'}, not at {source.commit[:12]}",
            where=folder,
            fix=f"git -C {folder} checkout {source.commit}",
        )
    path = lists / f"{name}.sha256"
    if not path.is_file():
        raise PillsnapError("there is no list of its photos", where=path, fix=f"sources.py {name} {folder} --list")
    rows = [line.split("  ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return Clone(source, folder, {p: h for h, p in rows})


def write_list(name: str, folder: Path, lists: Path = HERE / "photos", sources: dict[str, Source] | None = None) -> int:
    "Write names and hashes of the files that are read; returns how many."
    source = (sources or SOURCES)[name]
    shown = ["git", "-C", str(folder), "ls-tree", "-r", "-z", "--name-only", "HEAD"]
    names = subprocess.run(shown, capture_output=True, check=True).stdout.decode().split("\0")
    taken = sorted(p for p in names if p and source.takes(p))
    rows = [f"{hashlib.sha256((folder / p).read_bytes()).hexdigest()}  {p}\n" for p in taken]
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{name}.sha256").write_text("".join(rows), encoding="utf-8")
    return len(rows)


def boxes_of(
    clone: Clone,  # with a table of boxes
    tables: Sequence[str],  # its files, beside or above their photos
    photos: str = "",  # folder of the photos, where it is not the table's
) -> dict[str, np.ndarray]:  # photo → [n, 4] x0, y0, x1, y1, pixels
    "The boxes of the listed photos; boxes without an area are left out."
    found: dict[str, list[list[float]]] = defaultdict(list)
    for table in tables:
        for row in csv.DictReader(io.StringIO(clone.read(table).decode("utf-8"))):
            path = f"{photos or table.rsplit('/', 1)[0]}/{row['filename']}"
            x0, y0, x1, y1 = (float(row[k]) for k in ("xmin", "ymin", "xmax", "ymax"))
            if path in clone.listed and x1 > x0 and y1 > y0:
                found[path].append([x0, y0, x1, y1])
    return {p: np.array(b) for p, b in sorted(found.items())}


def misplaced(name: str, lists: Path = HERE / "photos") -> set[str]:
    """Photos of a source whose box lies beside its pill: the photo was turned, and its box was not.

    A person looked at all photos of the source with their boxes drawn, and no detector's answer.
    """
    path = lists / f"{name}.misplaced.txt"
    return set(path.read_text(encoding="utf-8").split("\n")) - {""} if path.is_file() else set()


def groups_of(clone: Clone, photos: Sequence[str]) -> list[str]:
    "A group for each photo: near-copies of one another are in one group."
    thumbs = [thumbnail_of(clone.folder / p, None) for p in photos]
    grey = np.stack([t[0] if t else np.zeros((64, 64), np.uint8) for t in thumbs])
    first = list(range(len(photos)))
    for i, j in near_pairs(grey, np.arange(len(photos))):
        a, b = sorted((first[i], first[j]))
        first = [a if k == b else k for k in first]
    return [f"g{k}" for k in first]


def provenance(clone: Clone) -> Provenance:
    "Where the figures of a clone come from."
    return Provenance(clone.data, clone.data_hash, sha256_text("pill"))


def write_result(row: str, what: str, metrics: Sequence[Metric], out: Path, **more: Any) -> Path:
    "One row's result as JSON: every figure with n, data, hash, commit and machine."
    figures = [m.to_dict() for m in metrics]
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return save_json(dict(id=row, what=what, figures=figures, when=when, **more), out / f"{row}.json")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", choices=sorted(SOURCES))
    p.add_argument("clone", type=Path)
    p.add_argument("--list", action="store_true", help="write the list instead of checking it")
    a = p.parse_args()
    if a.list:
        print(f"{write_list(a.name, a.clone)} files listed")
        return
    clone = open_clone(a.name, a.clone)
    print(json.dumps(dict(data=clone.data, files=clone.check(), photos=len(clone.photos), sha256=clone.data_hash)))


if __name__ == "__main__":
    try:
        main()
    except PillsnapError as e:
        sys.exit(str(e))
