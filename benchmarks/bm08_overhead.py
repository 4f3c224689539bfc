"""BM8: what the loader itself costs a sample, over a source that only hands out bytes that are there; microseconds,
2 workers."""

import time

import numpy as np
import torch
from harness import arguments, compare, finish
from loading import BATCH, SIZE, WORKERS, our_loader, still
from photos import rows_only

if __name__ == "__main__":
    from pillsnap.dataset.datasets import Source

    a = arguments(__doc__, n=4096)
    n = 512 if a.quick else a.n
    still()
    picture = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)

    class Ready(Source):
        "A picture that is in memory: nothing is left but the loader."

        def view(self, _photo, _view, out, _window=None, _flip=False):
            np.copyto(out, picture)

    class Bytes(torch.utils.data.Dataset):
        "The same for torch's DataLoader."

        def __len__(self):
            return n

        def __getitem__(self, i):
            return torch.from_numpy(picture.copy()).permute(2, 0, 1), i % 12

    def micros(loader):
        def run() -> float:
            t0 = time.perf_counter()
            got = sum(len(b[1]) for b in loader)
            assert got == n
            return (time.perf_counter() - t0) / n * 1e6

        return run

    theirs = torch.utils.data.DataLoader(
        Bytes(), BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, prefetch_factor=3
    )
    finish(
        compare(
            "BM8",
            f"the loader's own cost at {SIZE} pixels, batch {BATCH}, {WORKERS} workers",
            {"PhotoLoader, threads": micros(our_loader(Ready(), rows_only(n)))},
            {"DataLoader, uint8": micros(theirs)},
            n,
            a.repeats,
            unit="µs/photo",
            better="lower",
            quick=a.quick,
            out=a.out,
        )
    )
