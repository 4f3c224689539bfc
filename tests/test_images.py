"""Opening photos, and the two views: upright, the right colours, bounded, and never an exception."""

import contextlib
import io
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pillsnap.photos import images as I
from pillsnap.photos.boxes import (
    letterbox,
    unletterbox,
)
from pillsnap.photos.images import (
    header_size,
    open_image_safely,
)


def picture(w=60, h=80) -> np.ndarray:
    "No two corners, rows or channels alike: every flip and every swap shows."
    y, x = np.mgrid[:h, :w]
    return np.stack([x * 3 % 256, y * 2 % 256, (x + 2 * y) % 256], -1).astype(np.uint8)


def enc(a, fmt="PNG", **k) -> bytes:
    b = io.BytesIO()
    (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(b, fmt, **k)
    return b.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(w, h) -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(300)))
        + chunk(b"IEND", b"")
    )


TURNS = {
    1: None,
    2: Image.FLIP_LEFT_RIGHT,
    3: Image.ROTATE_180,
    4: Image.FLIP_TOP_BOTTOM,
    5: Image.TRANSPOSE,
    6: Image.ROTATE_90,
    7: Image.TRANSVERSE,
    8: Image.ROTATE_270,
}


@pytest.mark.spec("DM10")
def test_exif_is_applied_by_the_second_decoder_too():
    "A broken side note sends a sideways photo to OpenCV: still upright, still RGB."
    e = Image.Exif()
    e[0x0112] = 6
    good = enc(Image.fromarray(picture()).transpose(Image.ROTATE_90), "PNG", exif=e)
    note = chunk(b"tEXt", b"Comment\0x")
    r = open_image_safely(good[:33] + note[:-4] + b"\0\0\0\0" + good[33:])
    assert r["stage"] == "OpenCV" and np.array_equal(r["image"], picture())


@pytest.mark.spec("DM10")
def test_pixel_formats():
    "Each way to store a picture gives its colours; 16 bit is scaled, not cut; alpha is dropped, not blended."
    a, im = picture(), Image.fromarray(picture())
    alpha = im.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(im.size))
    deep = cv2.imencode(".png", a[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    for name, b in {
        "alpha": enc(alpha),
        "16-bit": deep,
        "bmp": enc(im, "BMP"),
        "tiff": enc(im, "TIFF"),
        "webp": enc(im, "WEBP", lossless=True),
    }.items():
        assert np.array_equal(open_image_safely(b)["image"], a), name
    assert (
        np.abs(
            open_image_safely(enc(im.convert("CMYK"), "JPEG", quality=100, subsampling=0))["image"].astype(int) - a
        ).mean()
        < 2
    )
    pal = im.quantize(16)
    pal.info["transparency"] = 0
    assert np.array_equal(
        open_image_safely(enc(pal, "PNG", transparency=0))["image"], np.asarray(im.quantize(16).convert("RGB"))
    )
    grey16 = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert open_image_safely(enc(grey16))["image"][0, :, 1].tolist() == [0, 1, 128, 255]
    for mode in ("L", "1", "LA"):
        assert (np.ptp(open_image_safely(enc(im.convert(mode)))["image"], axis=2) == 0).all()
    frames = enc(pal, "GIF", save_all=True, append_images=[pal.rotate(180)])
    assert open_image_safely(frames)["image"].shape == (80, 60, 3)
    assert open_image_safely(enc(np.float32([[0.5, 2.0]]), "TIFF"))["stage"] == "policy"
    assert open_image_safely(enc(Image.new("RGB", (1, 1), (1, 2, 3))))["image"].tolist() == [[[1, 2, 3]]]


@pytest.mark.spec("DM10")
def test_policies_skip_by_either_decoder():
    grey, alpha = enc(Image.fromarray(picture()).convert("L")), enc(Image.fromarray(picture()).convert("RGBA"))

    def spoil(b):
        return b[:33] + chunk(b"tEXt", b"Comment\0x")[:-4] + b"\0\0\0\0" + b[33:]

    for f in (lambda b: b, spoil):
        assert open_image_safely(f(grey), grayscale_policy="skip")["stage"] == "policy"
        assert open_image_safely(f(alpha), rgba_policy="skip")["stage"] == "policy"
        assert "image" in open_image_safely(f(grey)) and "image" in open_image_safely(f(alpha))


@pytest.mark.spec("DM10")
def test_broken_files_are_records_with_a_stage(tmp_path, caplog):
    png, jpg = enc(picture()), enc(picture(), "JPEG")
    bomb = PngImagePlugin.PngInfo()
    bomb.add_text("x", "a" * (3 << 20), zip=True)
    cases = {
        "missing": (tmp_path / "no.png", "read"),
        "folder": (tmp_path, "read"),
        "empty": (b"", "read"),
        "text": (b"just words", "final"),
        "half png": (png[: len(png) // 2], "final"),
        "half jpeg": (jpg[: len(jpg) // 2], "final"),
        "header only": (png[:40], "final"),
        "broken data": (png[:60] + bytes(20) + png[80:], "final"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "final"),
        "30,000 squared": (png_header(30_000, 30_000), "bound"),
    }
    for name, (src, stage) in cases.items():
        r = open_image_safely(src)
        assert (r["_skip"], r["stage"]) == (True, stage) and r["error"] and "image" not in r, (name, r)
    assert len([m for m in caplog.messages if "stage final" in m]) == 6 and any(
        "PIL" in m and "OpenCV" in m for m in caplog.messages
    )
    assert open_image_safely(enc(picture(), pnginfo=bomb))["stage"] == "OpenCV"


@pytest.mark.spec("DM10")
@pytest.mark.parametrize("fmt", ("PNG", "BMP", "WEBP", "JPEG"))
def test_the_bound_reads_headers_and_decodes_nothing(monkeypatch, fmt):
    "Above the bound no decoder is called at all, for each format that OpenCV might be asked for."
    called = []
    for f in ("_by_fast", "_by_pillow", "_by_opencv"):
        monkeypatch.setattr(I, f, lambda *a, f=f: called.append(f))
    b = enc(picture(), fmt)
    assert header_size(b) == (60, 80)
    assert open_image_safely(b, max_pixels=60 * 80 - 1)["stage"] == "bound" and not called
    if fmt == "PNG":
        assert open_image_safely(png_header(30_000, 30_000))["stage"] == "bound" and not called


def test_a_gif_or_tiff_is_bounded_too():
    assert open_image_safely(enc(picture(), "TIFF"), max_pixels=100)["stage"] == "bound"


@pytest.mark.spec("DM10")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_bytes_raise(data):
    "Random bytes, and photos with random damage."
    base = data.draw(
        st.sampled_from(
            [
                b"",
                enc(picture()),
                enc(picture(), "JPEG"),
                enc(picture(), "WEBP"),
                enc(picture(), "BMP"),
                enc(picture(), "GIF"),
            ]
        )
    )
    b = bytearray(base or data.draw(st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4))):
        if b:
            b[data.draw(st.integers(0, min(len(b) - 1, 120)))] = data.draw(st.integers(0, 255))
    r = open_image_safely(bytes(b[: data.draw(st.integers(0, len(b)))]), max_pixels=1_000_000)
    assert ("image" in r and r["image"].dtype == np.uint8 and r["image"].shape[2] == 3) or (
        r["_skip"] and r["stage"] in ("read", "bound", "policy", "final")
    )


def damaged_files() -> dict[str, tuple[bytes, str | None]]:
    "Photos that are cut off, files that are no photos, and headers that promise too much."
    a = picture()
    png, jpg, webp = enc(a), enc(a, "JPEG", quality=95), enc(a, "WEBP", lossless=True)
    out = {
        f"truncated {n} at {k}": (b[: int(len(b) * k)], "final")
        for n, b in (("png", png), ("jpg", jpg), ("webp", webp))
        for k in (0.02, 0.3, 0.7, 0.8)
    }
    out |= {"a png without its end mark": (png[:-12], None)}  # all of its pixels are there
    out |= {
        "empty": (b"", "read"),
        "text": (b"a note, not a photo", "final"),
        "json": (b'{"images": []}', "final"),
        "zip": (b"PK\3\4" + bytes(60), "final"),
        "html": (b"<!DOCTYPE html><html>404</html>", "final"),
    }
    return out | {
        "30,000 squared png": (png_header(30_000, 30_000), "bound"),
        "30,000 squared jpg": (b"\xff\xd8\xff\xc0\0\x11\x08" + struct.pack(">HH", 30_000, 30_000) + bytes(40), "bound"),
    }


def unusual_photos() -> dict[str, tuple[bytes, str | None]]:
    "One picture in every mode, depth, colour space and shape that must be read."
    a = picture()
    im = Image.fromarray(a)
    alpha = im.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(im.size))
    pal = im.quantize(16)
    out = {f"mode {m}": (enc(im.convert(m)), None) for m in ("RGB", "RGBA", "L", "LA", "1", "P")}
    return out | {
        "16-bit rgb": (cv2.imencode(".png", a[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), None),
        "16-bit grey": (enc(Image.fromarray(a[..., 0].astype(np.uint16) * 257)), None),
        "cmyk": (enc(im.convert("CMYK"), "JPEG", quality=95), None),
        "grey jpg": (enc(im.convert("L"), "JPEG"), None),
        "rgb jpg": (enc(a, "JPEG", keep_rgb=True), None),
        "progressive": (enc(a, "JPEG", progressive=True), None),
        "palette + alpha": (enc(pal, transparency=3), None),
        "rgb + transparent colour": (enc(im, transparency=(9, 6, 9)), None),
        "animated gif": (enc(pal, "GIF", save_all=True, append_images=[pal.rotate(90)]), None),
        "animated png": (enc(im, save_all=True, append_images=[im.rotate(90)]), None),
        "1x1": (enc(im.crop((0, 0, 1, 1))), None),
        "1x1 jpg": (enc(im.crop((0, 0, 1, 1)), "JPEG"), None),
        "alpha": (enc(alpha), None),
        "wide": (enc(im.resize((5000, 1))), None),
    }


def turned_photos() -> dict[str, tuple[bytes, str | None]]:
    "One picture stored in each of EXIF's eight orientations, as PNG, JPEG and WebP."
    im, out = Image.fromarray(picture()), {}
    for note, turn in TURNS.items():
        e = Image.Exif()
        e[0x0112] = note
        lying = im if turn is None else im.transpose(turn)
        out |= {
            f"{n} exif {note}": (enc(lying, f, exif=e, **k), None)
            for n, f, k in (
                ("png", "PNG", {}),
                ("jpg", "JPEG", dict(quality=95)),
                ("webp", "WEBP", dict(lossless=True)),
            )
        }
    return out


# SPEC RS2's list: bytes, and the stage that must refuse them (None: must be read right).
BROKEN = damaged_files() | unusual_photos() | turned_photos()


def patiently(src, m, **k) -> dict:
    "The same photo, with the quick decoders switched off."

    def no(*a):
        raise I._NotPlainError

    with m.context() as c:
        c.setattr(I, "_by_fast", no)
        return open_image_safely(src, **k)


@pytest.mark.spec("RS2")
@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("suffix", (".png", ".jpg"))
def test_every_broken_photo_has_one_answer(tmp_path, monkeypatch, name, suffix):
    """Skipped by the stage that must refuse it, or read right; the quick way, the patient way, a path with the
    wrong ending and bytes all agree to the byte."""
    b, stage = BROKEN[name]
    (tmp_path / f"photo{suffix}").write_bytes(b)
    got, slow, file = open_image_safely(b), patiently(b, monkeypatch), open_image_safely(tmp_path / f"photo{suffix}")
    if stage:
        assert got["stage"] == slow["stage"] == file["stage"] == stage and got["error"] == slow["error"], (got, slow)
    else:
        with Image.open(io.BytesIO(b)) as im:
            up = I.ImageOps.exif_transpose(im)
            want = (
                np.asarray(up.convert("RGB"))
                if up.mode in ("RGB", "CMYK", "L", "P", "1") and "transparency" not in up.info
                else None
            )
        assert np.array_equal(got["image"], slow["image"]) and np.array_equal(got["image"], file["image"])
        assert want is None or np.array_equal(got["image"], want), name
        if "exif" in name:
            assert np.abs(got["image"].astype(int) - picture()).mean() < (4 if "jpg" in name else 0.01)


@pytest.mark.spec("RS2")
@pytest.mark.parametrize("kind", ("RGB", "L", "RGBA"))
def test_a_changed_byte_gives_the_picture_or_none(kind):
    """PNG parts carry checksums; Pillow looks at none of the pixels', and hands out noise for about one changed
    byte in five."""
    b, rng = enc(Image.fromarray(picture()).convert(kind)), np.random.default_rng(0)
    want, noise = open_image_safely(b)["image"], 0
    for at in rng.integers(0, len(b), 150):
        hurt = b[:at] + bytes([b[at] ^ int(rng.integers(1, 256))]) + b[at + 1 :]
        r = open_image_safely(hurt)
        assert "_skip" in r or np.array_equal(r["image"], want), at
        with contextlib.suppress(Exception):
            noise += not np.array_equal(
                np.asarray(Image.open(io.BytesIO(hurt)).convert("RGBA").convert("RGB")),
                np.asarray(Image.open(io.BytesIO(b)).convert("RGBA").convert("RGB")),
            )
    assert noise, "the danger is there"


@pytest.mark.spec("RS2")
def test_the_quick_way_takes_what_is_plain_and_nothing_else(caplog):
    "What a delivery holds goes the quick way; whatever could be turned, recoloured or animated does not."
    quick = {n for n, (b, stage) in BROKEN.items() if open_image_safely(b)["stage"] == "fast"}
    jpegs = {"progressive", "1x1 jpg", "jpg exif 1"}
    assert quick == jpegs | {"mode RGB", "1x1", "wide"}
    with pytest.MonkeyPatch.context() as m:
        m.setitem(sys.modules, "pillsnap.photos.png", None)
        I._png_decoder.cache_clear()
        caplog.clear()
        for _ in range(3):
            assert open_image_safely(enc(picture()))["stage"] == "PIL"
        assert len([x for x in caplog.messages if "PNG photos are read by Pillow" in x]) == 1, (
            "a slower way is said, once"
        )
    I._png_decoder.cache_clear()
    laced = bytearray(enc(picture()))
    laced[28] = 1
    assert not I._plain_png(bytes(laced)) and I._plain_png(enc(picture()))
    from pillsnap.synth.files import png_bytes

    filled = png_bytes(picture(), 20_000)
    assert I._plain_png(filled) and np.array_equal(open_image_safely(filled)["image"], picture()), (
        "a rendered delivery takes the quick way"
    )


@pytest.mark.spec("BM9")
@pytest.mark.parametrize("fmt", ("PNG", "JPEG", "WEBP"))
@pytest.mark.parametrize("note", (1, 6))
@pytest.mark.parametrize("r", (2, 4, 8))
def test_opened_smaller_is_the_mean_of_its_blocks(fmt, note, r):
    "By every decoder, upright, for sides that do not divide; a JPEG's own half size is within a rounding of the same."
    a = np.array(Image.fromarray(picture()).resize((607, 805), Image.BICUBIC))
    e = Image.Exif()
    e[0x0112] = note
    lying = Image.fromarray(a) if TURNS[note] is None else Image.fromarray(a).transpose(TURNS[note])
    b = enc(lying, fmt, exif=e, **{"JPEG": dict(quality=100, subsampling=0), "WEBP": dict(lossless=True)}.get(fmt, {}))
    got, full = open_image_safely(b, reduce=r)["image"], open_image_safely(b)["image"]
    assert got.shape == (-(-805 // r), -(-607 // r), 3)
    if fmt != "JPEG" or note != 1:
        assert np.array_equal(got, I.shrink(full, r))
    else:
        assert I.psnr(got[1:-1, 1:-1], I.shrink(full, r)[1:-1, 1:-1]) > 40
    h, w = 805 // r * r, 607 // r * r
    assert (
        np.abs(I.shrink(full, r)[: h // r, : w // r] - full[:h, :w].reshape(h // r, r, w // r, r, 3).mean((1, 3))).max()
        <= 0.51
    )


@pytest.mark.spec("BM9")
def test_the_yardsticks():
    "dB and SSIM against their definitions on small cases; reduce_for never leaves fewer pixels than the view."
    a = np.array(Image.fromarray(picture()).resize((120, 90)))
    n = np.random.default_rng(0).integers(-9, 10, a.shape)
    b = np.clip(a.astype(int) + n, 0, 255).astype(np.uint8)
    assert (
        I.psnr(a, a) == np.inf
        and I.ssim(a, a) == 1
        and abs(I.psnr(a, b) - 10 * np.log10(255**2 / ((a.astype(float) - b) ** 2).mean())) < 1e-9
    )
    noise = np.random.default_rng(1).integers(0, 256, a.shape, np.uint8)
    assert I.ssim(a, noise) < 0.1 < 0.5 < I.ssim(a, b) < 0.999
    assert I.psnr(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)) == 0
    for short in (100, 488, 976, 1280, 4000):
        for size in (64, 224, 384, 430, 480):
            assert I.reduce_for(short, size) == 1 or short / I.reduce_for(short, size) >= 1.25 * size


@pytest.mark.spec("DT4")
@settings(max_examples=80, deadline=None)
@given(st.integers(8, 1500), st.integers(8, 1500), st.sampled_from([96, 224, 640]), st.integers(0, 10**6))
def test_letterbox_and_back(w, h, size, seed):
    sq, s, pad = letterbox(np.full((h, w, 3), 10, np.uint8), size)
    x = np.sort(np.random.default_rng(seed).uniform(0, 1, (2, 2)), 0) * [w, h]
    box = np.array([[*x[0], *x[1]]])
    assert np.allclose(unletterbox(box * s + np.tile(pad, 2), s, pad, w, h), box, atol=2e-3)
    inside = (sq == 10).all(-1)
    assert sq.shape == (size, size, 3) and set(np.unique(sq)) <= {10, 114}
    rows, cols = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert (
        (cols[0], rows[0]) == pad
        and max(len(rows), len(cols)) == size
        and abs(len(rows) - h * s) <= 0.51 + (h * s < 1)
        and abs(len(cols) - w * s) <= 0.51 + (w * s < 1)
    )


def test_neither_module_imports_torch():
    "The shipped program opens and cuts photos with numpy, Pillow and OpenCV alone."
    code = (
        "import sys\n"
        "for m in ('torch', 'torchvision', 'fastai', 'ultralytics', 'timm', 'matplotlib', 'pandas'): sys.modules[m] = "
        "None\n"
        "import numpy as np\nfrom pillsnap.photos import images, boxes\n"
        "img = np.zeros((30, 20, 3), np.uint8)\n"
        "images.normalise(images.whole_view(img, 16)[None]); images.crop_view(img, [2, 2, 9, 9], 16); "
        "boxes.decode_yolo(np.ones((5, 9))); boxes.letterbox(img, 32); images.open_image_safely(b'x')\n"
        "print('free')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0 and "free" in out.stdout, out.stderr


@pytest.mark.spec("BM9", "DM10")
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_photo_decoded_as_far_as_needed_gives_the_same_view(seed):
    "Windows near the bottom, boxes at every edge, every reduction, odd sizes: the view is that of the whole photo."
    from pillsnap.dataset.datasets import DeliverySource, decode_limits, render_view
    from pillsnap.photos.caches import Photo, View

    g = np.random.default_rng(seed)
    w, h = (int(g.integers(40, 200)) for _ in range(2))
    x, y = int(g.integers(0, w - 8)), int(g.integers(0, h - 8))
    box = [x, y, int(g.integers(6, w - x)), int(g.integers(6, h - y))]
    img = g.integers(0, 256, (h, w, 3), np.uint8)
    with tempfile.TemporaryDirectory() as tmp:
        Image.fromarray(img).save(Path(tmp) / "a.png")
        photo, source = Photo("a.png", str(box), w, h), DeliverySource(tmp)
        for kind in ("whole", "crop"):
            view, size = View(kind, 48, 0.2), int(g.integers(4, 40))
            a, b = np.sort(g.uniform(0, 1, 2)), np.sort(g.uniform(0, 1, 2))
            window, flip = np.array([a[0], b[0], a[1], b[1]]), bool(g.integers(2))
            reduce, _ = decode_limits(photo, view, window, size)
            want, got = np.empty((size, size, 3), np.uint8), np.empty((size, size, 3), np.uint8)
            render_view(*source.open(photo, view, reduce), view, window, flip, want)
            assert source.view(photo, view, got, window, flip) is None
            assert (got == want).all(), (w, h, box, kind, window, reduce)


@pytest.mark.spec("DM10", "CF5")
@pytest.mark.parametrize(
    "content, kind, remedy",
    [
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic" + bytes(40), "a HEIC photo", "Most Compatible"),
        (b"\0\0\0\x18ftypmif1" + bytes(40), "a HEIC photo", "JPEG"),
        (b"\0\0\0\x20ftypisom" + bytes(40), "a video", "one out of it"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "a PDF document", "pdftoppm"),
        (b"PK\x03\x04" + bytes(60), "a ZIP archive", "unpack"),
        ("복용법: 하루 세 번".encode(), "a text file", "the photo itself"),
        ("복용법: 하루 세 번".encode("cp949"), "a text file", "the photo itself"),
        (("가" * 3000).encode(), "a text file", "the photo itself"),
        (b"<html>404</html>", "a web page", "the photo itself"),
    ],
)
def test_a_file_that_is_no_photo_is_named_by_its_first_bytes(tmp_path, content, kind, remedy):
    (tmp_path / "photo.jpg").write_bytes(content)
    got = open_image_safely(tmp_path / "photo.jpg")
    assert got["stage"] == "final" and got["error"].startswith(f"this is {kind}") and remedy in got["fix"], got


@pytest.mark.spec("DM10")
def test_a_broken_photo_is_not_called_something_else():
    for b in (*(b for n, (b, _) in BROKEN.items() if n.startswith("truncated")), bytes(100), b"\x89PNG\r\n\x1a\n"):
        got = open_image_safely(b)
        assert "fix" not in got and "PIL" in got["error"], got


# ---- colour profiles


def in_display_p3(a: np.ndarray) -> tuple[Image.Image, bytes]:
    "An sRGB picture as a phone stores it, and the profile that it writes beside it."
    from PIL import ImageCms

    from pillsnap.photos.colourprofiles import display_p3_profile

    p3 = display_p3_profile()
    known = ImageCms.ImageCmsProfile(io.BytesIO(p3))
    stored = ImageCms.profileToProfile(Image.fromarray(a), ImageCms.createProfile("sRGB"), known, renderingIntent=1)
    return Image.fromarray(np.asarray(stored)), p3  # without the profile that Pillow notes


def colours() -> np.ndarray:
    "Flat fields of colours that sRGB and Display P3 both have."
    true = [(200, 40, 40), (60, 150, 60), (240, 200, 60), (250, 150, 170), (90, 130, 210), (245, 245, 240)]
    return np.array([true], np.uint8).repeat(16, 0).repeat(16, 1)


def gap(got: dict, want: np.ndarray) -> int:
    "The largest difference, away from the fields' edges."
    return int(np.abs(got["image"][8, 8::16].astype(int) - want[8, 8::16]).max())


@pytest.mark.spec("DM10")
def test_a_photo_in_another_colour_space_is_read_in_srgb():
    "Each format, the turned photo of a phone with its thumbnail, and the reduced size."
    from PIL import ImageCms

    a = colours()
    stored, p3 = in_display_p3(a)
    jpeg = dict(quality=95, subsampling=0)
    for fmt, how in {"JPEG": jpeg, "PNG": {}, "WEBP": dict(lossless=True), "TIFF": {}}.items():
        assert gap(open_image_safely(enc(stored, fmt, **how)), a) > 20, "the profile is what tells the colours"
        assert gap(open_image_safely(enc(stored, fmt, icc_profile=p3, **how)), a) <= 4, fmt
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = stored.transpose(Image.ROTATE_90)
    assert gap(open_image_safely(enc(lying, "JPEG", icc_profile=p3, exif=exif, **jpeg)), a) <= 4
    thumbnail = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + enc(stored, "JPEG")  # with a start-of-scan marker of its own
    assert gap(open_image_safely(enc(stored, "JPEG", icc_profile=p3, exif=thumbnail, **jpeg)), a) <= 4
    half = open_image_safely(enc(stored, "JPEG", icc_profile=p3, **jpeg), reduce=2)["image"]
    assert np.abs(half[4, 4::8].astype(int) - a[8, 8::16]).max() <= 4
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = open_image_safely(enc(a, "JPEG", **jpeg))
    named = open_image_safely(enc(a, "JPEG", icc_profile=srgb, **jpeg))
    assert named["stage"] == "fast" and np.array_equal(named["image"], plain["image"])


@pytest.mark.spec("DM10")
def test_a_broken_colour_profile_is_ignored_with_one_line(caplog):
    from pillsnap.photos import colourprofiles as C

    stored, p3 = in_display_p3(colours())
    black = bytearray(p3)  # a tone curve that makes everything black
    for curve in re.finditer(b"para", p3):
        black[curve.start() + 12 : curve.start() + 32] = bytes(20)
    for profile in (b"nonsense" * 40, p3[:300], bytes(black)):
        C._transform.cache_clear()
        caplog.clear()
        for fmt in ("PNG", "JPEG"):
            plain = open_image_safely(enc(stored, fmt))
            assert np.array_equal(open_image_safely(enc(stored, fmt, icc_profile=profile))["image"], plain["image"])
        assert [m for m in caplog.messages if "colour profile is ignored" in m] == caplog.messages
        assert len(caplog.messages) == 1
    grey = Image.fromarray(colours()[..., 0])
    assert np.array_equal(open_image_safely(enc(grey, icc_profile=p3))["image"][..., 1], np.asarray(grey))


@pytest.mark.spec("DM10")
def test_a_decoder_that_ignores_the_profile_is_not_asked():
    "A broken note sends a photo to OpenCV, which would read Display P3 as sRGB."
    stored, p3 = in_display_p3(colours())
    note = chunk(b"tEXt", b"Comment\0x")[:-4] + b"\0\0\0\0"
    for b, stage in ((enc(stored), "OpenCV"), (enc(stored, icc_profile=p3), "final")):
        assert open_image_safely(b[:33] + note + b[33:])["stage"] == stage
