"""BM13: memory of a training run over its epochs, workers included: the Theil-Sen slope of the last two thirds, ours only (the baseline is the run's own first epoch)."""
import time

import numpy as np
import psutil
import torch
from harness import arguments, compare, finish
from loading import our_loader, still
from photos import photo_tree, size_note

LIMIT = .05   # percent of the first epoch's memory that an epoch may add; noise, not growth


def resident() -> float:
    "MB of this process and its workers, shared pages counted once per process group (PSS where the system tells it)."
    me = psutil.Process()
    return sum(getattr(p.memory_full_info(), "pss", p.memory_info().rss) for p in [me, *me.children(recursive=True)])/1e6


def theil_sen(y: list[float]) -> float:
    "Median of the slopes of all pairs: one epoch out of line moves nothing."
    y = np.asarray(y)
    i, j = np.triu_indices(len(y), 1)
    return float(np.median((y[j]-y[i])/(j-i)))


def training(loader, epochs: int) -> list[float]:
    "MB after each epoch of a small network that really trains."
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 12))
    opt, seen = torch.optim.SGD(net.parameters(), .1), []
    for _ in range(epochs):
        for x, y, _ in loader:
            torch.nn.functional.cross_entropy(net(x), y).backward()
            opt.step(); opt.zero_grad()
        seen.append(resident())
    return seen


if __name__ == "__main__":
    a = arguments(__doc__, n=512, epochs=18)
    n, epochs = (64, 6) if a.quick else (a.n, a.epochs)
    still()
    root, rows = photo_tree("jpg", n)
    curves, missed = {}, []

    def slope(engine: str):
        def run() -> float:
            loader = our_loader(root, rows, size=128, engine=engine)
            loader.raw = False
            curves[engine] = mb = training(loader, epochs)
            return 100*theil_sen(mb[len(mb)//3:])/mb[0]
        return run

    t0 = time.time()
    runs = {f"PhotoLoader, 2 {e}": slope(e) for e in ("threads", "processes")}
    figures = {}
    for name, run in runs.items():
        figures[name] = run()
    missed = [f"BM13: {v:+.3f} % of memory an epoch with {k}, at most {LIMIT} %" for k, v in figures.items() if v > LIMIT and not a.quick]
    compare("BM13", f"memory of a training run over {epochs} epochs, workers included", {k: (lambda v=v: v) for k, v in figures.items()}, {}, n, repeats=1, unit="% of memory an epoch",
            note=f"{size_note(root, rows)}; {time.time()-t0:.0f} s; at most {LIMIT} %", better="lower", quick=a.quick, out=a.out, extra={"mb_after_epoch": {k: [round(v, 1) for v in c] for k, c in curves.items()}, "limit": LIMIT, "missed_slope": missed})
    finish(missed)
