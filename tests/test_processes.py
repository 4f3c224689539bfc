"""The processes that a command starts: gone soon after their work, also when the command itself was killed."""

import os
import signal
import subprocess
import sys
import time

import joblib
import psutil
import pytest
from joblib.parallel import ThreadingBackend

from pillsnap.core.processes import IDLE, processes

WORK = """
import psutil, sys, time
from pathlib import Path
from pillsnap.dataset.conversion import index_labels
from pillsnap.synth.writer import write_delivery
root = Path(sys.argv[1])
write_delivery(root/"aihub", drugs=2, photos=2, combos=0, seed=1, width=244, height=320, workers=2, progress=False)
index_labels(root/"aihub", root/"index.arrow", workers=2)
print(*(p.pid for p in psutil.Process().children(recursive=True)), flush=True)
"""


def gone(pids: list[int], within: float) -> bool:
    "Whether none of them runs any more, at the latest after so many seconds."
    end = time.time() + within
    while (
        left := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE]
    ) and time.time() < end:
        time.sleep(0.2)
    return not left


def start(code: str, tmp_path) -> tuple[subprocess.Popen, list[int]]:
    p = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = [int(w) for w in p.stdout.readline().split()]
    assert len(pids) >= 2, "it worked in two processes"
    return p, pids


def test_a_script_ends_at_once_and_leaves_nothing(tmp_path):
    p, pids = start(WORK, tmp_path)
    assert p.wait(60) == 0 and gone(pids, 20)


def test_a_session_that_goes_on_gets_its_memory_back(tmp_path):
    p, pids = start(WORK + "time.sleep(600)", tmp_path)
    workers = [q for q in pids if "LokyProcess" in " ".join(psutil.Process(q).cmdline())]
    try:
        assert len(workers) == 2 and gone(workers, IDLE + 60) and p.poll() is None
    finally:
        p.kill()
        p.wait()


def test_processes_of_a_killed_parent_end(tmp_path):
    p, pids = start(WORK + "time.sleep(600)", tmp_path)
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    assert gone(pids, IDLE + 60)


class Cluster(ThreadingBackend):
    "A backend from outside: it takes the work, and no argument it does not know."

    calls = []

    def configure(self, n_jobs=1, parallel=None, **kwargs):
        self.calls.append(kwargs)
        return super().configure(n_jobs, parallel, **kwargs)


@pytest.mark.parametrize("default", [False, True])
def test_a_backend_from_outside_takes_the_work(default):
    Cluster.calls = []
    joblib.register_parallel_backend("cluster", Cluster)
    try:
        if default:
            joblib.register_parallel_backend("cluster", Cluster, make_default=True)
            got = processes(2)(joblib.delayed(os.getpid)() for _ in range(4))
        else:
            with joblib.parallel_config(backend="cluster", n_jobs=2):
                got = processes()(joblib.delayed(os.getpid)() for _ in range(4))
    finally:
        joblib.parallel.DEFAULT_BACKEND = "loky"
        del joblib.parallel.BACKENDS["cluster"]
    assert set(got) == {os.getpid()} and Cluster.calls and "idle_worker_timeout" not in Cluster.calls[0]


def test_a_time_chosen_from_outside_stays():
    with joblib.parallel_config(backend="loky", n_jobs=2, idle_worker_timeout=77):
        pool = processes()
    assert (
        "idle_worker_timeout" not in pool._backend_kwargs
        and processes(2)._backend_kwargs["idle_worker_timeout"] == IDLE
    )


@pytest.mark.spec("RS5")
def test_a_killed_kernel_is_told_with_the_command_that_goes_on(tmp_path):
    "The likeliest end of a long training is the system's out-of-memory killer."
    import nbformat

    from pillsnap.core import runner
    from pillsnap.core.config import load_config

    cell = nbformat.v4.new_code_cell
    given = cell(
        "run_dir: str = ''\nconfig: str = ''\noverrides: list = []\nseed: int = 1", metadata={"tags": ["parameters"]}
    )
    killed = cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    kernel = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    nbformat.write(nbformat.v4.new_notebook(cells=[given, killed], metadata=kernel), tmp_path / "killed.ipynb")

    class Killed(runner.JobSpec):
        path = tmp_path / "killed.ipynb"

    job = Killed("audit", "killed", "pillsnap.dataset.audit:AuditJob")
    with pytest.raises(runner.JobFailed) as told:
        runner.run_job(job, tmp_path / "run", load_config("demo"), resume="pillsnap run all --from audit")
    assert "its process was killed" in str(told.value) and "go on with: pillsnap run all --from audit" in str(
        told.value
    )


def test_a_run_whose_job_failed_is_shown(tmp_path):
    import pillsnap
    from pillsnap.core.jobs import Job

    class Failing(Job):
        name = "classifier"

        def work(self, run, cfg):
            raise ValueError("no luck")

    with pytest.raises(ValueError, match="no luck"):
        Failing(run_dir=str(tmp_path)).run()
    shown = pillsnap.load_run(tmp_path)
    assert "classifier: failed" in str(shown) and "classifier" in shown._repr_html_()
