#!/usr/bin/env python
"""Broken and unusual photos by the ten thousand. Skipped with a named reason or read right; never a crash,
never a wrong colour.

Small pictures of known pixels are stored in every way of the contract's list, some are cut off, some have bytes
changed, and all get an ending at random. A process
of its own opens them with `open_image_safely`, so that a decoder that dies is seen and named. A cut file, and a PNG
with changed bytes (it has checksums), must give
the undamaged picture or none; the other formats carry no checksum, so changed bytes must only not break anything.
Then the same files lie in a delivery that is
converted, and in one whose photos break after its conversion and which is loaded. usage: rs2_photos.py [--cases
20000] [--seed 1] [--quick] [--out FOLDER]
"""

import io
import logging
import os
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness import arguments, finish, machine, save

from pillsnap.dataset.conversion import convert_delivery
from pillsnap.dataset.datasets import PillsnapClsDataset
from pillsnap.dataset.photoloader import PhotoLoader
from pillsnap.delivery.classmap import ClassMap
from pillsnap.photos.colourprofiles import display_p3_profile
from pillsnap.photos.images import open_image_safely
from pillsnap.synth.writer import write_delivery

TURNS = (
    None,
    Image.FLIP_LEFT_RIGHT,
    Image.ROTATE_180,
    Image.FLIP_TOP_BOTTOM,
    Image.TRANSPOSE,
    Image.ROTATE_90,
    Image.TRANSVERSE,
    Image.ROTATE_270,
)  # for EXIF 1 to 8
EXACT, LOSSY = 0.0, 6.0  # mean difference allowed, in levels of 255
SUFFIXES = (".png", ".jpg", ".bmp", ".webp", "")
Readable = tuple[bytes, np.ndarray, float]  # a file, the pixels that must come out, the mean difference allowed


def picture(rng: random.Random, w: int = 0, h: int = 0) -> np.ndarray:
    "No two corners, rows or channels alike, smooth enough for a lossy format."
    w, h = w or rng.randint(24, 120), h or rng.randint(24, 120)
    y, x = np.mgrid[:h, :w]
    return np.stack(
        [x * 200 // w + 20, y * 200 // h + 20, (x + 2 * y) * 200 // (w + 2 * h) + rng.randrange(50)], -1
    ).astype(np.uint8)


def enc(im: Image.Image | np.ndarray, kind: str = "PNG", **k) -> bytes:
    out = io.BytesIO()
    (im if isinstance(im, Image.Image) else Image.fromarray(im)).save(out, kind, **k)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(head: bytes, rows: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def three(grey: np.ndarray) -> np.ndarray:
    "A grey picture in three equal channels."
    return np.repeat(grey[..., None], 3, -1)


def formats(a: np.ndarray) -> dict[str, Readable]:
    "The picture in each file format."
    im = Image.fromarray(a)
    return {
        "png": (enc(im), a, EXACT),
        "bmp": (enc(im, "BMP"), a, EXACT),
        "webp": (enc(im, "WEBP", lossless=True), a, EXACT),
        "tiff": (enc(im, "TIFF"), a, EXACT),
        "jpeg": (enc(im, "JPEG", quality=95), a, LOSSY),
        "progressive jpeg": (enc(im, "JPEG", quality=95, progressive=True), a, LOSSY),
        "rgb jpeg": (enc(im, "JPEG", quality=95, keep_rgb=True), a, LOSSY),
        "cmyk jpeg": (enc(im.convert("CMYK"), "JPEG", quality=95), a, LOSSY),
        "lossy webp": (enc(im, "WEBP", quality=95), a, LOSSY),
    }


def modes(a: np.ndarray) -> dict[str, Readable]:
    "The picture in grey, in other depths, with a palette, moving, with transparency, and two tiny parts of it."
    im, h, w = Image.fromarray(a), *a.shape[:2]
    grey = np.round(a @ (0.299, 0.587, 0.114)).astype(np.uint8)
    indexed = im.quantize(16)
    flat = np.array(indexed.getpalette()[:48], np.uint8).reshape(-1, 3)[np.asarray(indexed)]
    alpha = im.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(im.size))
    deep = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a.astype(np.uint16) * 257)
    return {
        "grey png": (enc(grey), three(grey), EXACT),
        "grey jpeg": (enc(grey, "JPEG", quality=95), three(grey), LOSSY),
        "16-bit grey": (enc(Image.fromarray(grey.astype(np.uint16) * 257)), three(grey), EXACT),
        "16-bit rgb": (png(struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0), deep), a, EXACT),
        "1 bit": (enc(Image.fromarray(grey > 120)), three((grey > 120).astype(np.uint8) * 255), EXACT),
        "palette": (enc(indexed), flat, EXACT),
        "palette + alpha": (enc(indexed, transparency=3), flat, EXACT),
        "gif": (enc(indexed, "GIF"), flat, EXACT),
        "animated gif": (enc(indexed, "GIF", save_all=True, append_images=[indexed.rotate(180)]), flat, EXACT),
        "animated png": (enc(im, save_all=True, append_images=[im.rotate(180)]), a, EXACT),
        "animated webp": (enc(im, "WEBP", lossless=True, save_all=True, append_images=[im.rotate(180)]), a, EXACT),
        "alpha": (enc(alpha), a, EXACT),
        "grey + alpha": (enc(Image.merge("LA", (Image.fromarray(grey), alpha.split()[3]))), three(grey), EXACT),
        "transparent colour": (enc(im, transparency=tuple(map(int, a[0, 0]))), a, EXACT),
        "1×1": (enc(a[:1, :1]), a[:1, :1], EXACT),
        "one row": (enc(a[:1]), a[:1], EXACT),
    }


def profiled(a: np.ndarray) -> dict[str, Readable]:
    "The picture's numbers as Display P3, whose colours must come out in sRGB, and with a profile that is cut off."
    im, p3 = Image.fromarray(a), display_p3_profile()
    known = ImageCms.ImageCmsProfile(io.BytesIO(p3))
    back = ImageCms.profileToProfile(
        im, known, ImageCms.createProfile("sRGB"), renderingIntent=1
    )  # what P3's bytes show
    shown = np.asarray(back)
    return {
        "png in display p3": (enc(im, icc_profile=p3), shown, EXACT),
        "jpeg in display p3": (enc(im, "JPEG", quality=95, icc_profile=p3), shown, LOSSY),
        "webp in display p3": (enc(im, "WEBP", lossless=True, icc_profile=p3), shown, EXACT),
        "png, broken profile": (enc(im, icc_profile=p3[:300]), a, EXACT),
        "jpeg, broken profile": (enc(im, "JPEG", quality=95, icc_profile=p3[:300]), a, LOSSY),
    }


def turned(a: np.ndarray) -> dict[str, Readable]:
    "The picture stored in each of EXIF's eight orientations."
    im, out = Image.fromarray(a), {}
    for note, turn in enumerate(TURNS, 1):
        exif, lying = Image.Exif(), im if turn is None else im.transpose(turn)
        exif[0x0112] = note
        out |= {
            f"exif {note} {k}": (enc(lying, k, exif=exif, **more), a, d)
            for k, more, d in (
                ("PNG", {}, EXACT),
                ("JPEG", dict(quality=95), LOSSY),
                ("WEBP", dict(lossless=True), EXACT),
            )
        }
    return out


def readable(a: np.ndarray) -> dict[str, Readable]:
    "One picture in every way that must be read."
    return formats(a) | modes(a) | profiled(a) | turned(a)


def refused(side: int = 30_000) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    "What must never be a picture: bytes and the steps that may say so."
    size = struct.pack("<I", side)[:3]
    tags = ((256, side), (257, side), (258, 8), (262, 1), (273, 8), (278, side), (279, 1))
    tiff = (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags)
        + bytes(4)
    )
    return {
        "empty": (b"", ("read",)),
        "text": (b"a note, not a photo", ("final",)),
        "json": (b'{"images": []}', ("final",)),
        "zip": (b"PK\3\4" + bytes(60), ("final",)),
        "html": (b"<!DOCTYPE html><html>404</html>", ("final",)),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ("final",)),
        "zeros": (bytes(5000), ("final",)),
        "huge png": (png(struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), bytes(300)), ("bound",)),
        "huge jpeg": (b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", side, side) + bytes(40), ("bound",)),
        "huge bmp": (
            b"BM" + bytes(8) + struct.pack("<IIiiHHIIiiII", 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
            ("bound",),
        ),
        "huge webp": (b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X\x0a\0\0\0" + bytes(4) + size + size, ("bound",)),
        "huge gif": (
            b"GIF89a"
            + struct.pack("<HH", side, side)
            + b"\x80\0\0"
            + bytes(6)
            + b","
            + struct.pack("<HHHH", 0, 0, side, side)
            + b"\0\x02\x02\x44\x01\0;",
            ("bound", "final"),
        ),
        "huge tiff": (tiff, ("bound", "final")),
    }


def case(rng: random.Random, ways: dict, never: dict) -> tuple[str, bytes, np.ndarray | tuple[str, ...] | None, float]:
    """Kind, bytes, what must come out (pixels or the steps that may refuse it; None: anything but a crash),
    difference allowed."""
    if rng.random() < 0.1:
        kind = rng.choice(sorted(never))
        return kind, *never[kind], 0.0
    kind = rng.choice(sorted(ways))
    b, want, allowed = ways[kind]
    how = rng.choice(("whole", "cut", "changed"))
    if how == "whole":
        return kind, b, want, allowed
    if how == "cut":
        return f"{kind}, cut", b[: rng.randrange(1, len(b))], want, allowed
    b = bytearray(b)
    for _ in range(rng.choice((1, 1, 2, 8))):
        b[rng.randrange(len(b))] = rng.randrange(256)
    return f"{kind}, changed", bytes(b), want if b[:4] == b"\x89PNG" else None, allowed


def outcome(kind: str, r: dict, want, allowed: float) -> str:
    "`read right`, `skipped: stage`, `read`; anything else is what went wrong."
    damaged = kind.endswith((", cut", ", changed"))
    if r.get("_skip"):
        must = ("bound", "final", "read") if damaged else ()
        if isinstance(want, tuple):
            must = want
        return (
            f"skipped: {r['stage']}"
            if r["stage"] in must and r["error"]
            else f"skipped by {r['stage']} ({r['error'][:80]})"
        )
    img = r["image"]
    if isinstance(want, tuple) or img.dtype != np.uint8 or img.ndim != 3 or img.shape[2] != 3:
        return f"a picture {img.shape} {img.dtype} of it"
    if want is None:
        return "read"
    off = np.abs(img.astype(int) - want).mean() if img.shape == want.shape else np.inf
    return "read right" if off <= allowed else f"another picture: {img.shape}, {off:.2f} levels off"


def opener(cases: list, folder: Path, write: int) -> None:
    "Open each case from a file and from memory; one line each."
    with os.fdopen(write, "w", encoding="utf-8") as out:
        for i, (kind, b, want, allowed, suffix) in enumerate(cases):
            (path := folder / f"photo{suffix}").write_bytes(b)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                ends = {outcome(kind, open_image_safely(src), want, allowed) for src in (path, b)}
                end = ends.pop() if len(ends) == 1 else f"the file and its bytes differ: {sorted(ends)}"
            except BaseException as e:
                end = f"raised {type(e).__name__}: {e}"
            if (
                swelled := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            ) > 200_000:  # kB; a header of 30,000² promises 2.7 GB
                end = f"took {swelled / 1000:.0f} MB"
            out.write(f"{i}\t{' '.join(end.split())}\n")
            out.flush()


def opened(cases: list, folder: Path) -> list[str]:
    "How each case ended, by processes of their own: one that dies costs one case."
    ends = []
    while len(ends) < len(cases):
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.close(read)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            opener(cases[len(ends) :], folder, write)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as f:
            ends += [line.rstrip("\n").partition("\t")[2] for line in f]
        if status := os.waitpid(pid, 0)[1]:
            ends.append(f"the process died of {status}")
    return ends


def kinds_of_a_delivery(a: np.ndarray) -> tuple[dict[str, bytes], dict[str, tuple[bytes, set[str]]]]:
    "Files that a conversion must keep, and files that it must leave out, each with the reasons that are right."
    kinds = readable(a)
    good = {k: b for k, (b, want, _) in kinds.items() if want.shape == a.shape}
    bad = {k: (b, {"photo_too_large"} if "bound" in s else {"photo_broken"}) for k, (b, s) in refused().items()} | {
        k: (kinds[k][0], {"photo_too_small"}) for k in ("1×1", "one row")
    }
    bad |= {f"{k}, cut": (good[k][: len(good[k]) // 2], {"photo_broken"}) for k in ("png", "jpeg", "webp", "bmp")}
    bad["huge gif"][1].add("photo_broken"), bad["huge tiff"][1].add("photo_broken")
    return good, bad


def loaded(d: PillsnapClsDataset, most: int) -> list[tuple[str, str]]:
    "How both engines load a dataset of which they can show so many photos."
    ends = []
    for engine in ("threads", "processes"):
        how = {"multiprocessing_context": "spawn"} if engine == "processes" else {}
        got = [len(x) for x, *_ in PhotoLoader(d, 16, engine=engine, num_workers=2, **how)]
        ends.append((f"loaded by {engine}", "every batch" if sum(got) == most else f"wrongly {got}"))
    return ends


def in_a_delivery(work: Path, seed: int) -> list[tuple[str, str]]:
    "The same kinds among good photos, before a conversion and after one: kind and end of each."
    rng, ends = random.Random(seed), []
    write_delivery(work / "d", drugs=3, photos=36, combos=0, seed=3, width=98, height=128, progress=False, workers=1)
    photos = sorted((work / "d/data/train/images").rglob("*.png"))
    good, bad = kinds_of_a_delivery(picture(rng, 98, 128))
    placed = dict(zip([*good, *bad], rng.sample(photos, len(good) + len(bad))))
    whole = {p: p.read_bytes() for p in placed.values()}
    plain = convert_delivery(work / "d", work / "plain")
    for kind, path in placed.items():
        path.write_bytes(good.get(kind) or bad[kind][0])
    c = convert_delivery(work / "d", work / "run")
    said, kept = {Path(f.path).name: str(f.reason) for f in c.quarantine.out}, {Path(p).name for p in c.rows.path}
    for kind, path in placed.items():
        end = "kept" if path.name in kept else said.get(path.name, "lost without a word")
        right = {"kept"} if kind in good else bad[kind][1]
        ends.append((f"converted: {kind}", end if end in right else f"wrongly {end}"))
    all_kept = len(kept) == len(photos) - len(bad) and len(whole) == len(placed)
    ends.append(("converted: the rest", "kept" if all_kept else f"wrongly {len(kept)} of {len(photos)} kept"))
    d = PillsnapClsDataset(plain.rows.assign(class_key=plain.rows.kcode), ClassMap(plain.rows.kcode), work / "d", 48)
    # the two small ones can be shown, whatever a conversion thinks of them
    return ends + loaded(d, len(d) - len(bad) + 2)


def campaign(cases: int, seed: int = 1) -> list[tuple[str, str]]:
    "Every case with its end."
    rng = random.Random(seed)
    ways, never = [readable(picture(rng)) for _ in range(max(1, cases // 100))], refused()
    planned = [(*case(rng, ways[i // 100 % len(ways)], never), rng.choice(SUFFIXES)) for i in range(cases)]
    with tempfile.TemporaryDirectory() as tmp:
        ends = opened(planned, Path(tmp))
        return [(kind, end) for (kind, *_), end in zip(planned, ends, strict=True)] + in_a_delivery(Path(tmp), seed)


def wrong(end: str) -> bool:
    return end not in ("read right", "read", "kept", "every batch") and not end.startswith(("skipped: ", "photo_"))


def main() -> None:
    a = arguments(__doc__, cases=20_000, seed=1)
    logging.disable(logging.WARNING)
    cases = 600 if a.quick else a.cases
    t0, got = time.perf_counter(), campaign(cases, a.seed)
    bad, ends = [g for g in got if wrong(g[1])], Counter(end for _, end in got)
    for end, n in ends.most_common(20):
        print(f"{n:7,} × {end}")
    print(
        f"RS2: {len(got):,} photos of {len({k for k, _ in got})} kinds, {len(bad)} that ended otherwise than they must"
    )
    if not a.quick:
        save(
            dict(
                id="RS2",
                what="broken and unusual photos",
                seed=a.seed,
                trials=len(got),
                kinds=len({k for k, _ in got}),
                failed=len(bad),
                seconds=round(time.perf_counter() - t0, 1),
                when=time.strftime("%Y-%m-%d", time.gmtime()),
                ends=dict(ends.most_common()),
                machine=machine(),
            ),
            a.out,
        )
    finish(f"RS2: {kind}: {end}" for kind, end in bad)


if __name__ == "__main__":
    main()
