"""Do two trainings in turn take less time than one after the other, and does the
processor wait less?

Each round trains detector and classifier one after the other and in turn, in folders with the same photos and
settings, in alternating
order. Waiting is what the step lines say: data / (data + comp) over all steps of both sides. Figures go to
`results/IT1_interleave.json`.
"""

import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from harness import arguments, finish, machine, save

from pillsnap.core.config import load_config
from pillsnap.core.jobs import RunFolder
from pillsnap.dataset.splits import smoke_splits
from pillsnap.training.classifier import ClassifierJob
from pillsnap.training.detector import DetectorJob
from pillsnap.training.interleaved import InterleavedJob

OVER = (
    "dataloader.ram_optimization.cache_policy=labels_only",
)  # photos are opened for every batch: there must be something to wait for


def waiting(root: Path) -> float:
    "Share of the step time in which a side waited for photos."
    text = "".join(
        (root / "logs" / f"pillsnap.{side}.log").read_text(encoding="utf-8") for side in ("detector", "classifier")
    )
    pairs = [(float(d), float(c)) for d, c in re.findall(r"\[train\].* data=([\d.]+)s comp=([\d.]+)s", text)]
    return sum(d for d, _ in pairs) / sum(d + c for d, c in pairs)


def sequential(root: Path, epochs: int) -> None:
    for job in (ClassifierJob, DetectorJob):
        job(run_dir=str(root), config="smoke", overrides=OVER, epochs=epochs).run()


def in_turn(root: Path, epochs: int) -> None:
    InterleavedJob(
        run_dir=str(root), config="smoke", overrides=OVER, detector_epochs=epochs, classifier_epochs=epochs
    ).run()


def trained(train: Callable[[Path, int], None], root: Path, delivery: Path | None, epochs: int) -> dict:
    "Split the delivery (None: render one) and train in a fresh folder; the training's seconds and its waiting."
    run = RunFolder(root, "splits")
    if delivery is not None:
        (root / "delivery").symlink_to(delivery)
    smoke_splits(run, load_config("smoke", [*OVER, f"paths.exp_dir={root}"]))
    t0 = time.perf_counter()
    train(root, epochs)
    return dict(seconds=round(time.perf_counter() - t0, 2), waiting=round(waiting(root), 3))


def measure(repeats: int, epochs: int) -> list[dict]:
    "Train both ways in each round, in alternating order, on the photos that the first training renders."
    rounds, delivery = [], None
    ways = (("sequential", sequential), ("interleaved", in_turn))
    with tempfile.TemporaryDirectory() as tmp:
        for k in range(-1, repeats):  # round -1 pays for imports and is not counted
            row = {}
            for name, train in ways if k % 2 else ways[::-1]:
                root = Path(tmp) / f"{name}{k}"
                row[name] = trained(train, root, delivery, epochs)
                delivery = delivery or root / "delivery"
            if k >= 0:
                rounds.append(row)
                print(row, flush=True)
    return rounds


def main() -> None:
    a = arguments(__doc__, epochs=3)
    epochs = 1 if a.quick else a.epochs
    rounds = measure(a.repeats, epochs)

    def mid(name, key):
        return statistics.median(r[name][key] for r in rounds)

    ratio = statistics.median(r["interleaved"]["seconds"] / r["sequential"]["seconds"] for r in rounds)
    print(
        f"in turn / one after the other: {ratio:.2f}; "
        f"waiting {mid('sequential', 'waiting'):.0%} -> {mid('interleaved', 'waiting'):.0%}"
    )
    save(
        dict(
            id="IT1_interleave",
            what="detector and classifier in turn against one after the other",
            claim="idle 50 -> 10 %, time -30 %",
            epochs=epochs,
            rounds=rounds,
            time_ratio=round(ratio, 3),
            waiting_sequential=mid("sequential", "waiting"),
            waiting_interleaved=mid("interleaved", "waiting"),
            quick=a.quick,
            machine=machine(),
        ),
        a.out,
    )
    finish([])


if __name__ == "__main__":
    main()
