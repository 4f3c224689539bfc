"""Kill a job at random moments, several times in one folder, and give it its command again."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def in_time(trials: list[dict]) -> list[dict]:
    "Kills that came before the job had finished."
    return [t for t in trials if not t["too_late"]]


def killed(
    start: Callable[[], BaseProcess],  # begins the job, or goes on with it
    found: Callable[[bool], object],  # what lies in the folder after a kill; given whether it came too late
    longest: float,  # seconds; each kill comes after a random part of them
    rng: random.Random,
    most: int,  # kills in time
) -> list[dict]:
    "Kill up to five runs of a job in one folder, at most `most` of them in time; then let it finish."
    trials, late = [], False
    for _ in range(5):
        p, after = start(), rng.uniform(0, longest)
        time.sleep(after)
        os.kill(p.pid, signal.SIGKILL)
        p.join()
        late = p.exitcode == 0
        trials.append(dict(after_s=round(after, 3), too_late=late, found=found(late)))
        print(trials[-1], flush=True)
        if late or len(in_time(trials)) == most:
            break
    if not late:
        start().join()
    return trials
