"""BM3: one COCO file to YOLO text labels, beside ultralytics, datumaro, globox and pylabel.

Each side reads the same file and writes a text per photo into a folder of its own. The photos themselves exist (1×1
pixel) for those that insist on them.
Peers that cannot be imported are named as absent. `--peers PYTHON` lets another interpreter run those that this one
lacks, one process for each round;
it times the conversion alone, without its own start and imports.
"""

import contextlib
import importlib
import io
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from harness import arguments, compare, finish

ROUND = count()
# conversions of ours in a turn, of which the mean counts: one alone takes a tenth of a second, which a busy moment
# decides
AGAIN = 8


def write_coco(root: Path, n: int) -> Path:
    "A COCO file of n photos with one to four boxes each, and the photos."
    rng, annotations = random.Random(3), []
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    png = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
        "0000000c4944415408d763f8cfc000000301010018dd8db00000000049454e44ae426082"
    )
    for i in range(n):
        (root / "images" / f"p{i:06d}.png").write_bytes(png)
        for _ in range(rng.choice((1, 1, 3, 4))):
            w, h = rng.randint(80, 400), rng.randint(80, 400)
            box = [rng.randint(0, 976 - w), rng.randint(0, 1280 - h), w, h]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=rng.randint(1, 50),
                    bbox=box,
                    area=w * h,
                    iscrowd=0,
                    ignore=0,
                    segmentation=[],
                )
            )
    images = [dict(id=i + 1, file_name=f"p{i:06d}.png", width=976, height=1280) for i in range(n)]
    coco = dict(
        info={},
        licenses=[],
        images=images,
        annotations=annotations,
        categories=[dict(id=k, name=f"K-{k:06d}", supercategory="pill") for k in range(1, 51)],
    )
    path = root / "annotations" / "instances_train.json"
    path.write_text(json.dumps(coco), encoding="utf-8")
    return path


def with_ultralytics(coco: Path, out: Path) -> None:
    from ultralytics.data.converter import convert_coco

    convert_coco(str(coco.parent), save_dir=str(out), use_segments=False, use_keypoints=False, cls91to80=False)


def with_datumaro(coco: Path, out: Path) -> None:
    import datumaro

    datumaro.Dataset.import_from(str(coco.parent.parent), "coco_instances").export(str(out), "yolo", save_media=False)


def with_globox(coco: Path, out: Path) -> None:
    import globox

    globox.AnnotationSet.from_coco(coco).save_yolo_v5(out, label_to_id={f"K-{k:06d}": k - 1 for k in range(1, 51)})


def with_pylabel(coco: Path, out: Path) -> None:
    from pylabel import importer

    out.mkdir(parents=True)
    importer.ImportCoco(str(coco), path_to_images=str(coco.parent.parent / "images"), name="x").export.ExportToYoloV5(
        output_path=str(out / "labels")
    )


PEERS = {"ultralytics": with_ultralytics, "datumaro": with_datumaro, "globox": with_globox, "pylabel": with_pylabel}


def timed(name: str, coco: Path, out: Path) -> float:
    "Seconds of one peer's conversion in this process, what it prints swallowed."
    importlib.import_module(name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        t0 = time.perf_counter()
        PEERS[name](coco, out)
        seconds = time.perf_counter() - t0
    shutil.rmtree(out, ignore_errors=True)
    return seconds


def peer(name: str, coco: Path, n: int, root: Path, other: str):
    "A callable that gives photos/s, or why there is none."

    def here() -> float:
        return n / timed(name, coco, root / f"{name}{next(ROUND)}")

    def there() -> float:
        said = subprocess.run(
            [other, __file__, "--one", name, str(coco), str(root / f"{name}{next(ROUND)}")],
            capture_output=True,
            text=True,
            check=True,
        )
        return n / float(said.stdout.splitlines()[-1])

    for run in (here, there) if other else (here,):
        try:
            run()
            return run
        except (ImportError, subprocess.CalledProcessError) as e:
            why = (
                "not installed: "
                f"{(e.stderr or '').strip().splitlines()[-1] if isinstance(e, subprocess.CalledProcessError) else e}"
            )
    return why[:110]


def main() -> None:
    a = arguments(__doc__, n=5000, peers="", tmp="/dev/shm" if Path("/dev/shm").is_dir() else "")
    from pillsnap.dataset.conversion import convert_coco_to_yolo

    n = 60 if a.quick else a.n
    with tempfile.TemporaryDirectory(dir=a.tmp or None) as tmp:
        tmp = Path(tmp)
        coco = write_coco(tmp / "coco", n)

        def ours() -> float:
            seconds = 0.0
            for _ in range(AGAIN):
                out = tmp / f"ours{next(ROUND)}"
                t0 = time.perf_counter()
                convert_coco_to_yolo(coco, out)
                seconds += time.perf_counter() - t0
                assert len(list((out / "labels").iterdir())) == n
                shutil.rmtree(out)
            return AGAIN * n / seconds

        finish(
            compare(
                "BM3",
                "COCO to YOLO texts",
                {"pillsnap": ours},
                {k: peer(k, coco, n, tmp, a.peers) for k in PEERS},
                n,
                a.repeats,
                "photos/s",
                "one COCO file, 2.25 boxes a photo; on a RAM disk, so that converters are compared and not the disk"
                if a.tmp == "/dev/shm"
                else "one COCO file, 2.25 boxes a photo",
                quick=a.quick,
                out=a.out,
            )
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(timed(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])))
    else:
        main()
