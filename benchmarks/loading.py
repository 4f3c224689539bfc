"""What the loader benchmarks share: our loader, and the peers, each as a callable that works through n photos once."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

BATCH, SIZE, WORKERS = 64, 384, 2


def our_loader(
    source: Any, rows: pd.DataFrame, size: int = SIZE, workers: int = WORKERS, engine: str = "threads", **kw: Any
) -> Any:
    "Random crop + mirror, bytes out, in a new order each epoch."
    from pillsnap.core.settings import AugmentClassification
    from pillsnap.dataset.datasets import PillsnapClsDataset
    from pillsnap.dataset.photoloader import PhotoLoader
    from pillsnap.dataset.sampling import EpochSampler
    from pillsnap.delivery.classmap import ClassMap

    data = PillsnapClsDataset(
        rows,
        ClassMap(sorted(set(rows["class_key"]))),
        source,
        size,
        train=True,
        crop_view_prob=0.0,
        augment=AugmentClassification(randaugment=False, color_jitter=(0, 0, 0, 0)),
    )
    return PhotoLoader(
        data, BATCH, EpochSampler(data, 1), num_workers=workers, engine=engine, prefetch_factor=3, raw=True, **kw
    )


def epoch(loader: Any, n: int) -> Callable[[], None]:
    "One pass; every photo must have come."

    def run() -> None:
        got = sum(len(b[1]) for b in loader)
        assert got == n, f"{got} of {n} photos came"

    return run


def image_folder(root: Path, n: int) -> Callable[[], None]:
    """torchvision: ImageFolder, v2's random crop and mirror on bytes, DataLoader with as many workers, started
    afresh: a copy of this process would come with the heap that our decoder has set."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    chain = v2.Compose(
        [v2.ToImage(), v2.RandomResizedCrop(SIZE, (0.8, 1.0), (0.9, 1.1), antialias=True), v2.RandomHorizontalFlip()]
    )
    return epoch(
        DataLoader(
            ImageFolder(str(root), chain),
            BATCH,
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
            prefetch_factor=3,
            multiprocessing_context="spawn",
        ),
        n,
    )


def dali_pipeline(root: Path, rows: pd.DataFrame) -> Any:
    "DALI's own chain: read, fused decode and random crop, resize, mirror."
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=WORKERS, device_id=None, seed=1)
    def pipe() -> Any:
        data, label = fn.readers.file(
            file_root=str(root),
            files=rows["path"].tolist(),
            labels=pd.factorize(rows["class_key"])[0].tolist(),
            random_shuffle=True,
            name="files",
        )
        img = fn.decoders.image_random_crop(
            data, device="cpu", output_type=types.RGB, random_area=[0.8, 1.0], random_aspect_ratio=[0.9, 1.1]
        )
        return fn.flip(fn.resize(img, resize_x=SIZE, resize_y=SIZE), horizontal=fn.random.coin_flip()), label

    return pipe()


def dali(root: Path, rows: pd.DataFrame, n: int) -> Callable[[], None] | str:
    "NVIDIA DALI on the CPU, with `dali_pipeline`."
    try:
        from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy
    except Exception as e:
        return f"not installed: {e}"
    try:
        loader = DALIGenericIterator(
            dali_pipeline(root, rows),
            ["images", "labels"],
            reader_name="files",
            last_batch_policy=LastBatchPolicy.PARTIAL,
            auto_reset=False,
        )
    except RuntimeError as e:  # its decoder is a package of its own, nvidia-nvimgcodec
        return "does not build: " + next(
            (line for line in str(e).splitlines() if "dlopen" in line), str(e).splitlines()[0]
        )

    begun = []

    def run() -> None:
        if begun:
            # by the clock, and not after it: a reset reads ahead, which would be done in the next contender's time
            loader.reset()
        begun.append(True)
        got = sum(len(b[0]["labels"]) for b in loader)
        assert got == n, f"{got} of {n} photos came"

    return run


def pack_source(root: Path, rows: pd.DataFrame, codec: str) -> Any:
    "A pack of these photos, built once beside them, and again when an earlier version made it."
    from pillsnap.dataset.datasets import PackSource
    from pillsnap.photos.pack import Pack, build_pack, is_older

    out = root.parent / f"{root.name}-pack-{codec}"
    if is_older(out):
        shutil.rmtree(out)
    if not (out / "pack.json").exists():
        build_pack(rows.assign(bbox=""), root, out, codec=codec, workers=WORKERS, progress=False)
    return PackSource(Pack(out))


def ffcv(root: Path, n: int, mode: str, longest: int | None = None) -> Callable[[], None] | str:
    """FFCV: the same photos written once as its own file, whole or with `longest` pixels at most, as JPEG (quality
    95) or raw; its fused random crop and mirror."""
    try:
        from ffcv.fields import IntField, RGBImageField
        from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor
        from ffcv.writer import DatasetWriter
    except Exception as e:
        return f"not installed: {type(e).__name__}: {e}"
    from torchvision.datasets import ImageFolder

    file = root.parent / f"{root.name}-{mode}-{longest or 'whole'}.beton"
    if not file.exists():
        part = file.with_suffix(".part")  # a writer that was interrupted leaves nothing that looks finished
        image = RGBImageField(write_mode=mode, max_resolution=longest, jpeg_quality=95)
        DatasetWriter(str(part), {"image": image, "label": IntField()}, num_workers=WORKERS).from_indexed_dataset(
            ImageFolder(str(root))
        )
        part.rename(file)
    loader = Loader(
        str(file),
        batch_size=BATCH,
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        drop_last=False,
        os_cache=True,
        seed=1,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(0.8, 1.0), ratio=(0.9, 1.1)),
                RandomHorizontalFlip(),
                ToTensor(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    return epoch(loader, n)


def still() -> None:
    "Each worker is one thread, ours and theirs."
    import cv2

    cv2.setNumThreads(1)
    torch.set_num_threads(1)
