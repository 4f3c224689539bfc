#!/usr/bin/env python
"""Hostile, foreign and damaged archives. Each is refused in words or unpacked safely.

An archive of the delivery gets an entry that climbs out, is absolute, is a link or a device, is encrypted, swells,
shares its body, lies about its length or clashes with another; or
names in CP949, UTF-8, half-letters (NFD); or it comes in pieces, cut off, or with changed bytes. A process of its own
unpacks it through `extract_archives`, with a
bound on the bytes it may write. Afterwards nothing may have changed beside the target, no link may lie anywhere, a
refused archive may have no folder, an accepted
one must hold the files it was made of, byte by byte. usage: rs4_archives.py [--cases 800] [--seed 1] [--quick] [--out
FOLDER]
"""

import io
import os
import random
import resource
import shutil
import stat
import struct
import sys
import tempfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness import arguments, finish, machine, save

from pillsnap.core.errors import PillsnapError
from pillsnap.delivery.archives import extract_archives

NAME, FOLDER = "TS_7_조합.zip", "data/train/images/combination/TS_7_combo"
MOST_MB = 40  # what a refused or accepted archive of a few kB may write
Entries = dict[str, bytes]


class Korean(zipfile.ZipInfo):
    "An entry as an old Korean zip tool writes it: the name in CP949, and no mark that says so."

    def _encodeFilenameFlags(self):  # noqa: N802 - name given by the library
        return self.filename.encode("cp949"), self.flag_bits & ~0x800


class Raw(zipfile.ZipInfo):
    "An entry whose name is written as it stands; zipfile would tidy it."

    def _encodeFilenameFlags(self):  # noqa: N802 - name given by the library
        return self.filename.encode("utf-8"), self.flag_bits | 0x800


def entry(name: str, cls: type = Raw, mode: int = 0) -> zipfile.ZipInfo:
    info = cls("x", (2020, 1, 1, 0, 0, 0))
    info.filename, info.orig_filename, info.external_attr, info.compress_type = (
        name,
        name,
        mode << 16,
        zipfile.ZIP_DEFLATED,
    )
    return info


def good(rng: random.Random) -> Entries:
    "What an archive of the delivery may hold."
    return {
        f"K-000250-000573/K-000250-000573_0_2_0_2_70_{i:03d}_200.png": rng.randbytes(rng.choice((0, 1, 300, 4000)))
        for i in range(rng.randint(1, 6))
    }


def zipped(entries: list[tuple[zipfile.ZipInfo, bytes]]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z, warnings.catch_warnings(action="ignore"):  # one path twice
        for info, data in entries:
            z.writestr(info, data)
    return out.getvalue()


def with_one(rng: random.Random, bad: zipfile.ZipInfo, data: bytes = b"x") -> bytes:
    "A good archive with one bad entry, anywhere in it."
    entries = [(entry(k), v) for k, v in good(rng).items()]
    entries.insert(rng.randint(0, len(entries)), (bad, data))
    return zipped(entries)


def patched(raw: bytes, where: dict[bytes, tuple[int, bytes]]) -> bytes:
    "Bytes at an offset of every header that begins with a mark."
    out = bytearray(raw)
    for mark, (at, value) in where.items():
        k = -1
        while (k := raw.find(mark, k + 1)) >= 0:
            out[k + at : k + at + len(value)] = value
    return bytes(out)


CENTRAL, LOCAL = b"PK\1\2", b"PK\3\4"
CLIMBS = (
    "../x.png",
    "K/../../x.png",
    "K/../../../../../../x.png",
    "..",
    "a/..",
    "/x.png",
    "//x.png",
    "/etc/pillsnap.png",
    "C:/x.png",
    "c:x.png",
    "K\\..\\..\\x.png",
    "\\\\host\\x.png",
    "K/\0.png",
    "./../x.png",
)


def climbing(rng: random.Random) -> bytes:
    return with_one(rng, entry(rng.choice(CLIMBS)))


def climbing_in_cp949(rng: random.Random) -> bytes:
    return with_one(rng, entry(f"../메모/{rng.randrange(9)}.png", Korean))


def link(rng: random.Random) -> bytes:
    return with_one(rng, entry("K/link", mode=stat.S_IFLNK | 0o777), rng.choice((b"/etc", b"../../..", b".")))


def link_and_a_file_through_it(_rng: random.Random) -> bytes:
    return zipped([(entry("K", mode=stat.S_IFLNK | 0o777), b"../../../../.."), (entry("K/x.png"), b"x")])


def device(rng: random.Random) -> bytes:
    return with_one(
        rng, entry("K/x", mode=rng.choice((stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)) | 0o666)
    )


def encrypted(rng: random.Random) -> bytes:
    return patched(
        zipped([(entry(k), v) for k, v in good(rng).items()]), {CENTRAL: (8, b"\x01\x08"), LOCAL: (6, b"\x01\x08")}
    )


def bomb(rng: random.Random) -> bytes:
    return with_one(rng, entry("K/bomb.png"), bytes(rng.choice((3_000_000, 50_000_000))))


def says_it_is_huge(rng: random.Random) -> bytes:
    return patched(
        zipped([(entry(k), v) for k, v in good(rng).items()]),
        {CENTRAL: (24, (rng.choice((300_000_000, 0xFFFFFFF0))).to_bytes(4, "little"))},
    )


def too_long_a_name(rng: random.Random) -> bytes:
    return with_one(rng, entry("K/" + rng.choice(("가", "x")) * rng.choice((256, 5000)) + ".png"))


def one_path_twice(rng: random.Random) -> bytes:
    return zipped(
        [(entry("K/x.png"), b"1"), (entry(rng.choice(("K/x.png", "K/X.PNG", "K//x.png", "./K/x.png"))), b"2")]
    )


def a_file_and_a_folder(rng: random.Random) -> bytes:
    return zipped(rng.sample([(entry("K/x"), b"1"), (entry("K/x/y.png"), b"2")], 2))


def longer_than_it_says(rng: random.Random) -> bytes:
    "8 MB that declare 1,000 bytes."
    return patched(
        zipped([(entry("K/x.png"), rng.randbytes(100) * 80_000)]),
        {CENTRAL: (24, (1000).to_bytes(4, "little")), LOCAL: (22, (1000).to_bytes(4, "little"))},
    )


def overlapping(rng: random.Random) -> bytes:
    "Sixty entries that share one body, each of which swells a hundredfold only: quoted overlap (Fifield 2019)."
    pack = zlib.compressobj(9, wbits=-15)
    data = rng.randbytes(20_000) + bytes(2_000_000)
    body, whole, files = pack.compress(data) + pack.flush(), data, []
    for i in reversed(range(60)):
        name = b"K/%02d.png" % i
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, zlib.crc32(whole), len(body), len(whole), len(name), 0)
        header = LOCAL + fields + name
        files.insert(0, (fields, name, len(header)))
        body, whole = (
            header + body,
            header + whole,
        )  # what the entry before it unpacks to: this header, quoted, and what follows
        if i:
            body = b"\0" + struct.pack("<HH", len(header), len(header) ^ 0xFFFF) + body
    at, central = 0, b""
    for fields, name, n in files:
        central, at = central + CENTRAL + b"\x14\0" + fields + struct.pack("<HHHII", 0, 0, 0, 0, at) + name, at + n + 5
    return body + central + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 60, 60, len(central), len(body), 0)


HOSTILE: tuple[Callable[[random.Random], bytes], ...] = (
    climbing,
    climbing_in_cp949,
    link,
    link_and_a_file_through_it,
    device,
    encrypted,
    bomb,
    says_it_is_huge,
    too_long_a_name,
    one_path_twice,
    a_file_and_a_folder,
    longer_than_it_says,
    overlapping,
)


def foreign(rng: random.Random) -> tuple[str, bytes, Entries]:
    "A sound archive with names as they come, and what must lie there."
    kind = rng.choice(
        ("cp949", "utf-8", "utf-8 without a mark", "half-letters", "own name on top", "folders as entries", "empty")
    )
    files = {
        f"K-000250-000573/메모 {i} 정제.png": rng.randbytes(rng.choice((0, 2000))) for i in range(rng.randint(1, 5))
    }
    if kind == "empty":
        return kind, zipped([]), {}
    if kind == "half-letters":
        return kind, zipped([(entry(unicodedata.normalize("NFD", k)), v) for k, v in files.items()]), files
    raw = zipped(
        [
            (entry(("TS_7_조합/" if kind == "own name on top" else "") + k, Korean if kind == "cp949" else Raw), v)
            for k, v in files.items()
        ]
        + [(entry("K-000250-000573/", mode=stat.S_IFDIR | 0o755), b"")] * (kind == "folders as entries")
    )
    return (
        kind,
        patched(raw, {CENTRAL: (8, b"\0\0"), LOCAL: (6, b"\0\0")}) if kind == "utf-8 without a mark" else raw,
        files,
    )


def damaged(rng: random.Random) -> tuple[str, bytes, Entries]:
    "A good archive cut off or with changed bytes; what it holds, if it is still believed."
    files = good(rng)
    raw, kind = (
        bytearray(zipped([(entry(k), v) for k, v in files.items()])),
        rng.choice(("cut", "changed", "changed", "headers changed")),
    )
    if kind == "cut":
        return kind, bytes(raw[: rng.randrange(len(raw))]), files
    first = raw.find(CENTRAL) if kind == "headers changed" else 0
    for _ in range(rng.choice((1, 2, 5))):
        raw[rng.randrange(first, len(raw))] = rng.randrange(256)
    return kind, bytes(raw), files


def case(rng: random.Random, i: int) -> tuple[str, bytes, Entries | None, bool]:
    "Kind, bytes, what may be unpacked of it (None: nothing), whether it must be."
    if i % 4 == 3:
        kind, raw, files = foreign(rng)
        return kind, raw, files, True
    if i % 2:
        kind, raw, files = damaged(rng)
        return kind, raw, files, False
    how = HOSTILE[i // 2 % len(HOSTILE)]
    return how.__name__.replace("_", " "), how(rng), None, False


def child(src: Path, dst: Path) -> str:
    "Unpack in a process of its own: `done`, `error in words`, or what else it died of."
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (MOST_MB << 20,) * 2)
            extract_archives(src, dst, workers=1)
            end = "done"
        except PillsnapError as e:
            end = f"refused: {e}"
        except BaseException as e:
            end = f"{type(e).__name__}: {e}"
        os.write(write, end.encode("utf-8", "replace")[:2000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, encoding="utf-8", errors="replace") as f:
        end = f.read()
    os.waitpid(pid, 0)
    return end or "died without a word"


def tree(folder: Path) -> dict[str, bytes | str]:
    "Every file, link and odd thing below a folder."

    def content(p: Path) -> bytes | str:
        if p.is_symlink():
            return "link"
        return p.read_bytes() if p.is_file() else "odd"

    there = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*")}
    return {k: content(p) for k, p in there.items() if p.is_symlink() or not p.is_dir()}


def trial(work: Path, rng: random.Random, i: int) -> tuple[str, str]:
    "One archive, unpacked beside a sound one: its kind and `unpacked`, `refused`, or what went wrong."
    kind, raw, files, must = case(rng, i)
    shutil.rmtree(work, ignore_errors=True)
    src, dst = work / "beside/src", work / "beside/dst"
    src.mkdir(parents=True), dst.mkdir()
    (work / "beside/precious.png").write_bytes(b"mine")
    at = rng.randrange(1, len(raw)) if len(raw) > 1 and rng.random() < 0.3 else 0
    for start, piece in ((0, raw[:at]), (at, raw[at:])) if at else ((0, raw),):
        (src / (f"{NAME}.part{start}" if at else NAME)).write_bytes(piece)
    before = tree(work)
    end = child(src, dst)
    there = tree(work)
    target = {
        k.removeprefix(f"beside/dst/{FOLDER}/"): v for k, v in there.items() if k.startswith(f"beside/dst/{FOLDER}/")
    }
    hidden = [k for k in there if k.startswith(f"beside/dst/{FOLDER.rpartition('/')[0]}/.TS_7_combo.part/")]
    if strange := [k for k, v in there.items() if v in ("link", "odd")] + [
        k for k in before if there.get(k) != before[k]
    ]:
        return kind, f"harm done: {strange[:3]}"
    if len(there) != len(before) + len(target) + len(hidden):
        return kind, f"files outside the target: {sorted(there)[:5]}"
    if sum(len(there[k]) for k in there if k not in before) > MOST_MB << 20:
        return kind, "the disk filled up"
    if end.startswith("refused: "):
        if (dst / FOLDER).exists():
            return kind, "refused, and a folder left"
        return kind, "refused, which it must not be" if must else "refused"
    if end != "done" or files is None:
        return kind, f"not refused: {end}, {len(target)} files"
    return (
        kind,
        "unpacked" if target == files else f"other files than it was made of: {sorted(target)[:3]} of {len(target)}",
    )


def campaign(cases: int, seed: int = 1) -> list[tuple[str, str]]:
    "Every case with its end."
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as tmp:
        return [trial(Path(tmp) / "work", rng, i) for i in range(cases)]


def main() -> None:
    a = arguments(__doc__, cases=800, seed=1)
    t0, got = time.perf_counter(), campaign(112 if a.quick else a.cases, a.seed)
    bad, ends = [g for g in got if g[1] not in ("unpacked", "refused")], Counter(f"{kind}: {end}" for kind, end in got)
    for line, n in sorted(ends.items()):
        print(f"{n:5} × {line}")
    refused = sum(end == "refused" for _, end in got)
    print(
        f"RS4: {len(got):,} archives of {len({k for k, _ in got})} kinds, {refused:,} refused in words, "
        f"{len(bad)} that ended otherwise than they must"
    )
    if not a.quick:
        save(
            dict(
                id="RS4",
                what="hostile, foreign and damaged archives",
                seed=a.seed,
                trials=len(got),
                refused=refused,
                unpacked=sum(end == "unpacked" for _, end in got),
                failed=len(bad),
                seconds=round(time.perf_counter() - t0, 1),
                when=time.strftime("%Y-%m-%d", time.gmtime()),
                ends=dict(sorted(ends.items())),
                machine=machine(),
            ),
            a.out,
        )
    finish(f"RS4: {kind}: {end}" for kind, end in bad)


if __name__ == "__main__":
    main()
