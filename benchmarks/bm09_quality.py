"""BM9: what fast decoding costs in picture quality, against a full decode by Pillow and its antialiased resize.

Rendered photos of full size, on every background and in every light, as PNG and as JPEG. Each is opened at the scale
that `reduce_for` allows
for 384, 224 and 160 pixels, and compared with the careful way: at least 48 dB and SSIM .995, in the mean over the
photos, by the worst of the ways.
OpenCV's default resize and the pack's JPEG stand in the table too; neither has a bound. A last table says what it buys,
in photos per second.
"""

import io
from pathlib import Path

import cv2
import numpy as np
from harness import LIMITS, arguments, compare, finish
from PIL import Image

from pillsnap.photos.images import open_image_safely, psnr, reduce_for, shrink, ssim, whole_view
from pillsnap.synth.catalogue import make_catalogue
from pillsnap.synth.draws import rng_for
from pillsnap.synth.renderer import Shot, photograph, single_pose

SIZES = (384, 224, 160)


def encoded(im: np.ndarray, fmt: str) -> bytes:
    b = io.BytesIO()
    Image.fromarray(im).save(b, fmt, **({"quality": 95} if fmt == "JPEG" else {}))
    return b.getvalue()


def photos(n: int) -> list[np.ndarray]:
    out = []
    for i, drug in enumerate(make_catalogue(max(n, 2), 9)):
        if i == n:
            break
        shot, rng = (
            Shot(back=i % 3, light=i // 3 % 3, latitude=(60, 70, 75, 90)[i % 4], width=976, height=1280, field=28.6),
            rng_for(9, i),
        )
        out.append(photograph([(drug, single_pose(i % 2, 20 * i, shot, rng))], shot, rng)[0])
    return out


def square(im: np.ndarray) -> Image.Image:
    h, w = im.shape[:2]
    return Image.fromarray(im[(h - w) // 2 :][:w])


def careful(b: bytes, size: int) -> np.ndarray:
    "Every pixel decoded by Pillow, then its widening triangle filter."
    return np.asarray(
        square(np.asarray(Image.open(io.BytesIO(b)).convert("RGB"))).resize((size, size), Image.Resampling.BILINEAR)
    )


def fast(b: bytes, size: int) -> np.ndarray:
    return whole_view(open_image_safely(b, reduce=reduce_for(976, size))["image"], size)


def careless(b: bytes, size: int) -> np.ndarray:
    return cv2.resize(np.asarray(square(open_image_safely(b)["image"])), (size, size))


def packed(b: bytes, size: int) -> np.ndarray:
    from simplejpeg import decode_jpeg, encode_jpeg

    return whole_view(
        decode_jpeg(encode_jpeg(shrink(open_image_safely(b)["image"], 2), quality=95, colorsubsampling="444")), size
    )


def compare_quality(files: dict[str, list[bytes]], quick: bool, out: Path) -> list[str]:
    "Each way's difference from the careful one, in dB and as SSIM; what missed its bound, in words."
    ways = {f"{fmt} at 1/{reduce_for(976, s)}, for {s}": (fast, fmt, s) for fmt in files for s in SIZES}
    others = {
        "OpenCV's default resize, for 384": (careless, "PNG", 384),
        "JPEG pack (q95, half scale), for 384": (packed, "PNG", 384),
    }
    missed: list[str] = []
    for id, what, measure, floor, unit in (
        ("BM9", "picture quality of fast decoding, dB", psnr, LIMITS["BM9"]["decibels"], "dB"),
        ("BM9_ssim", "picture quality of fast decoding, SSIM", ssim, LIMITS["BM9_ssim"]["ssim"], "SSIM"),
    ):
        each = {k: [measure(careful(b, s), f(b, s)) for b in files[fmt]] for k, (f, fmt, s) in (ways | others).items()}
        mean = {k: float(np.mean(v)) for k, v in each.items()}
        ours = {"the worst of these ways": min(mean[k] for k in ways)} | {k: mean[k] for k in ways}
        peers = {f"required: {floor:g}": floor} | {k: mean[k] for k in others}
        missed += compare(
            id,
            what,
            {k: (lambda v=v: v) for k, v in ours.items()},
            {k: (lambda v=v: v) for k, v in peers.items()},
            len(files["PNG"]),
            1,
            unit,
            "means over photos; nothing is timed, so one round says all",
            quick=quick,
            out=out,
            extra={"worst_photo": {k: min(v) for k, v in each.items()}},
        )
    return missed


def compare_speed(fmt: str, files: list[bytes], repeats: int, quick: bool, out: Path) -> list[str]:
    "What the fast way buys, in photos per second."
    return compare(
        f"BM9_speed_{fmt.lower()}",
        f"one thread, {fmt} in memory to 384 pixels",
        {"fast": lambda: [fast(b, 384) for b in files] and None},
        {"Pillow, in full": lambda: [careful(b, 384) for b in files] and None},
        len(files),
        repeats,
        note="not required; what the above buys",
        quick=quick,
        out=out,
    )


def main() -> None:
    a = arguments(__doc__, n=18)
    cv2.setNumThreads(1)
    raw = photos(2 if a.quick else a.n)
    files = {fmt: [encoded(im, fmt) for im in raw] for fmt in ("JPEG", "PNG")}
    missed = compare_quality(files, a.quick, a.out)
    for fmt in files:
        missed += compare_speed(fmt, files[fmt], a.repeats, a.quick, a.out)
    finish(missed)


if __name__ == "__main__":
    main()
