#!/usr/bin/env python
"""Broken annotations by the hundred thousand. No uncaught exception, and everything counted.

A good record is damaged in bytes, in structure and in values; each result is read by the quick reader and by the
careful one, which must agree, and its boxes are checked. File names are damaged likewise and read by the name parser.
usage: rs3_annotations.py [--cases 100000]
[--seed 1] [--out FILE.json]
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from pillsnap.delivery.annotations import IMAGE_KEYS, Annotation, AnnotationReader, read_by_keys
from pillsnap.delivery.capture import parse_name
from pillsnap.delivery.faults import Fault, FaultReason
from pillsnap.delivery.truth import LabelEvidence
from pillsnap.synth.catalogue import make_catalogue
from pillsnap.synth.records import annotation

VALUES = (
    None,
    "",
    " ",
    0,
    -1,
    1.5,
    10**20,
    1e308,
    True,
    False,
    [],
    {},
    [[]],
    "K-000001",
    "가나다",
    "\ud83d\ude00",
    "../x",
    "\\u0000",
    "NaN",
    [1, 2, 3, 4],
    {"a": [1]},
)
BYTES = (
    b"",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\\ud800",
    b"NaN",
    b"-",
    b"1e999",
    b'"dl_idx"',
    b'"id"',
    "정".encode("cp949"),
    b"\n",
)


def byte_damages(raw: bytes, a: int, b: int, rng: random.Random) -> tuple[Callable[[], bytes], ...]:
    "What may happen to the bytes from `a` to `b`."
    return (
        lambda: raw[:a] + rng.choice(BYTES) + raw[b:],
        lambda: raw[:a] + rng.choice(BYTES) + raw[a:],
        lambda: raw[:a],
        lambda: raw[:b] + raw[a:],
        lambda: raw[:a] + bytes(rng.randrange(256) for _ in range(b - a)[:8]) + raw[b:],
    )


def damage_bytes(raw: bytes, rng: random.Random) -> bytes:
    "Cut, swap, insert, repeat."
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        a, b = sorted((rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)))
        b = min(b, a + rng.choice((1, 1, 3, 40, len(raw))))
        raw = rng.choice(byte_damages(raw, a, b, rng))() or b" "
    return raw


def damage_record(r: dict, rng: random.Random) -> dict:
    "Other values, missing keys, repeated lists."
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.choice(
            (
                r,
                r["images"][0]
                if isinstance(r.get("images"), list) and r["images"] and isinstance(r["images"][0], dict)
                else r,
                r["annotations"][0]
                if isinstance(r.get("annotations"), list) and r["annotations"] and isinstance(r["annotations"][0], dict)
                else r,
            )
        )
        if not where:
            continue
        key, how = rng.choice(sorted(where)), rng.randrange(5)
        if how == 0:
            del where[key]
        elif how == 1 and isinstance(where[key], list):
            where[key] = where[key] * rng.choice((0, 2, 3))
        elif how == 2 and key == "bbox":
            where[key] = [
                rng.choice((0, -5, 10, 976, 99999, 1.0, 0.5, "7", None, True))
                for _ in range(rng.choice((0, 3, 4, 4, 4, 5)))
            ]
        else:
            where[key] = rng.choice(VALUES)
    return r


def damage_name(name: str, rng: random.Random) -> str:
    "A file name with something wrong."
    chars = list(name)
    for _ in range(rng.choice((1, 1, 2, 6))):
        i = rng.randrange(len(chars) + 1)
        chars[i : i + rng.randrange(3)] = rng.choice(
            ("", "-", "_", "K-000573", "٣", "３", "\n", " ", "k", "/", "..", "000", "가", "\x00")
        )
    return "".join(chars)


def same(a: Annotation | Fault, b: Annotation | Fault) -> bool:
    "Both readers say one thing."
    if isinstance(a, Fault) or isinstance(b, Fault):
        return isinstance(a, Fault) and isinstance(b, Fault) and a.reason == b.reason
    return all(
        repr(getattr(a, k)) == repr(getattr(b, k))
        for k in ("photo", "drug", "boxes", "areas", "width", "height", "encoding")
    )


def damaged(text: str, kind: str, rng: random.Random) -> bytes:
    "An annotation with damage of this kind, one in twenty in another encoding."
    raw = text.encode()
    if kind == "record":
        record = damage_record(json.loads(text), rng)
        layout = dict(ensure_ascii=rng.random() < 0.5, indent=rng.choice(("\t", None)))
        raw = json.dumps(record, **layout).encode("utf-8", "replace")
    if rng.random() < 0.05:
        raw = raw.decode("utf-8", "replace").encode("cp949", "replace")
    return damage_bytes(raw, rng) if kind == "bytes" else raw


def read_damaged_name(rng: random.Random) -> str:
    "How a damaged name ends: read as it stands, or refused."
    name = damage_name("K-000573_0_2_0_2_70_040_200", rng)
    try:
        if parse_name(name).stem() != name:
            raise AssertionError(f"{name!r} is read as another name")
    except ValueError:
        return "name refused"
    return "name read"


def good_annotations() -> list[str]:
    "An annotation of each of six drugs, without damage."
    return [
        json.dumps(
            annotation(d, f"{d.kcode}_0_2_0_2_70_040_200", (10, 20, 30, 40), 976, 1280), ensure_ascii=False, indent="\t"
        )
        for d in make_catalogue(6, 3)
    ]


def count_boxes(e: LabelEvidence, said: Counter) -> None:
    "Close the evidence and count its boxes and their faults; an error if a box was lost."
    counts, pills = e.close().counts, sum(len(p.pills) for p in e.irregular.values())
    if counts["annotations"] != pills:
        raise AssertionError("a box was lost")
    said["boxes checked"] += pills
    said.update(f"fault {p.fault}" for t in e.irregular.values() for p in t.pills if p.fault)


def campaign(cases: int, seed: int = 1) -> dict:
    "Damage, read twice, check, count."
    rng, said, good, read = random.Random(seed), Counter(), good_annotations(), AnnotationReader()
    t0, e, names = time.perf_counter(), LabelEvidence(), 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as tmp:
        path = Path(tmp) / "x.json"
        for i in range(cases):
            text = rng.choice(good)
            kind = rng.choice(("bytes", "bytes", "record", "record", "record", "name", "whole"))
            raw = damaged(text, kind, rng)
            path.write_bytes(raw)
            got = read(str(path))
            if not same(got, read_by_keys(str(path), raw)):
                raise AssertionError(f"case {i} of seed {seed}: the two readers differ on {raw[:200]!r}")
            if isinstance(got, Fault):
                said[str(FaultReason(got.reason))] += 1
            else:
                said["read"] += 1
                e.add(got)
                _ = got.edi_codes, got.image  # neither may raise
            if kind == "name":
                names += 1
                said[read_damaged_name(rng)] += 1
            if len(e.irregular) > 200 or i % 500 == 499 or i == cases - 1:
                count_boxes(e, said)
                e = LabelEvidence()
    return dict(
        id="RS3",
        what="damaged annotations and names",
        seed=seed,
        trials=cases,
        names=names,
        seconds=round(time.perf_counter() - t0, 1),
        failed=0,
        keys=len(IMAGE_KEYS),
        counts=dict(sorted(said.items())),
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cases", type=int, default=100_000)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path)
    a = p.parse_args()
    result = campaign(a.cases, a.seed)
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    print(text, end="")
    if a.out:
        a.out.write_text(text, encoding="utf-8")
    sys.exit(0)
