"The narrow preprocessing a second time: the page of examples/preprocessing in headless Chromium."

import functools
import http.server
import re
import shutil
import threading
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "preprocessing"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# one mistake each, made with the page's own functions
MISTAKES = {
    "bgr": "p.data.forEach((_, k) => { if (k % 3 === 0) [p.data[k], p.data[k + 2]] = [p.data[k + 2], p.data[k]]; })",
    "rotation lost": "p = await asStored(bytes)",
    "canvas scaling": "p = await scaled(p, 'high')",
    "profile ignored": "p = await asWritten(bytes)",
}


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves the folder without a line for each request."

    def log_message(self, *a):
        pass


@pytest.fixture(scope="module")
def page():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=FOLDER)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_api.sync_playwright() as p:
            browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.set_default_timeout(60_000)
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/index.html")
            yield page
            browser.close()
        server.shutdown()


@pytest.mark.spec("BX18", "NM2", "NM3", "X60")
def test_javascript_makes_the_same_tensors(page):
    "Every golden photo to the last bit, EXIF orientations and the app's JPEG included; the browser converts P3 itself."
    page.wait_for_function("document.getElementById('verdict').textContent !== 'checking …'")
    assert page.text_content("#verdict") in ("13 photos: 12 exact, 0 fail", "13 photos: 13 exact, 0 fail")
    rows = page.locator("tbody tr").all_inner_texts()
    verdicts = {name: verdict for name, *_, verdict, _, _ in (re.split(r"\s+", row.strip()) for row in rows)}
    assert verdicts.pop("display_p3.png") in ("exact", "within")
    assert len(rows) == 13 and set(verdicts.values()) == {"exact"}


HELPERS = """
async function asStored(bytes) {
  const { parts, type } = withoutExif(bytes);
  return decode(new Uint8Array(await new Blob(parts, { type }).arrayBuffer()));
}
async function asWritten(bytes) {
  const { turn, parts, type } = withoutExif(bytes);
  const bitmap = await createImageBitmap(new Blob(parts, { type }), { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  return upright(context.getImageData(0, 0, bitmap.width, bitmap.height).data, bitmap.width, bitmap.height, turn);
}
async function scaled(p, quality) {
  const image = new ImageData(p.w, p.h);
  for (let k = 0; k < p.w * p.h; k++) image.data.set([...p.data.subarray(3 * k, 3 * k + 3), 255], 4 * k);
  const side = Math.min(p.w, p.h), canvas = new OffscreenCanvas(512, 512), context = canvas.getContext("2d");
  context.imageSmoothingQuality = quality;
  context.drawImage(await createImageBitmap(image), (p.w - side) >> 1, (p.h - side) >> 1, side, side, 0, 0, 512, 512);
  return upright(context.getImageData(0, 0, 512, 512).data, 512, 512, 1);
}
"""


@pytest.mark.spec("BX18")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_javascript_is_caught(page, mistake):
    "Exchanged colours, a lost rotation, the canvas's own scaling, an ignored profile: the photos that each spoils."
    failed = page.evaluate(f"""async () => {{
      {HELPERS}
      const results = await checkAll(async (bytes, config) => {{
        let p = await decode(bytes);
        {MISTAKES[mistake]};
        return tensor(prepare(p, config), config.target_size);
      }});
      return results.filter((r) => r.verdict === "fails").map((r) => r.file);
    }}""")
    if mistake == "rotation lost":
        assert failed == [f"exif_{k}.png" for k in range(2, 9)]
    elif mistake == "profile ignored":
        assert failed == ["display_p3.png"]
    else:
        assert len(failed) >= 8 and "exif_1.png" in failed
