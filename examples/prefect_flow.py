"""The stages of a run as a Prefect flow; a failed stage is tried again and continues where it stood.

Classifier and detector do not need one another: with two GPUs they run at the same time, each in a run folder that has
the splits.
"""

import subprocess

from prefect import flow, task

CONFIG = "two_stage"


@task(retries=3, retry_delay_seconds=60)
def stage(name: str, run_dir: str) -> None:
    "One stage by the command line; the executed notebook lies in the run folder."
    subprocess.run(["pillsnap", "run", name, "--config", CONFIG, "--run-dir", run_dir], check=True)


@flow
def pillsnap(run_dir: str = "_runs/two_stage") -> None:
    for name in ("conversion", "splits", "classifier", "detector", "evaluation", "export"):
        stage(name, run_dir)


if __name__ == "__main__":
    pillsnap()
