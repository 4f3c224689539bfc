"`pillsnap predict --backend dask` on a cluster of two worker processes: the table of one machine, also after a kill."

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cloudpickle
import pandas as pd
import pytest
from distributed import Client, LocalCluster

from pillsnap import cli
from pillsnap.core.container import write_packed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "campaigns"))
from server_parts import PILLS, colour_bundle, pill_photo

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers know pillsnap, not this file
N = 61


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    export = colour_bundle(folder / "export")
    return write_packed(folder / "pills.pillsnap", {p.name: p for p in sorted(export.iterdir())}).where


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    "A folder of 60 photos and a letter."
    folder = tmp_path_factory.mktemp("photos")
    for number in range(N - 1):
        kcode = list(PILLS)[number % len(PILLS)]
        (folder / f"{number:03d}.png").write_bytes(pill_photo(kcode, size=(200 + number, 300)))
    (folder / "letter.png").write_text("Dear pharmacist,")
    return folder


@pytest.fixture(scope="module")
def cluster():
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as running:
        running.wait_for_workers(2, timeout=60)
        yield running


@pytest.fixture
def client(cluster):
    with Client(cluster, set_as_default=False) as joined:
        yield joined


def typed(*args: object) -> int:
    "The exit status of a command in this process."
    try:
        cli.main([str(a) for a in args])
    except SystemExit as e:
        return e.code or 0
    return 0


def command(photos, bundle, cluster, out, *more: str) -> list[str]:
    asked = ["predict", photos, "--bundle", bundle, "--backend", "dask", "--scheduler", cluster.scheduler_address]
    return [str(a) for a in [*asked, "--out", out, *more]]


def of_one_machine(photos, bundle, out, *more: str) -> pd.DataFrame:
    assert typed("predict", photos, "--bundle", bundle, "--out", out, *more) == 1  # the letter is no photo
    return pd.read_parquet(out)


def count_photos(seconds: float) -> None:
    "On a worker: write down what is asked, and take longer for it."
    from pillsnap.deployment import cluster as module

    real, module.asked = getattr(module, "real", module.predict_photos), []
    module.real = real

    def counted(paths, *args, **kwargs):
        for path in paths:
            module.asked.append(path)
            time.sleep(seconds)
            yield from real([path], *args, **kwargs)

    module.predict_photos = counted


def asks_and_kills(pid: str, photos: int, typed: list[str]) -> subprocess.Popen:
    "The command in a process that sends kill -9, once, when this many answers are in its journal."
    code = (
        "import os, sys; from pillsnap import cli; from pillsnap.deployment.cluster import Journal\n"
        "add, killed = Journal.add, []\n"
        "def add_and_kill(self, answers, stamps):\n"
        "    add(self, answers, stamps)\n"
        f"    if len(self.at) > {photos} and not killed: killed.append(1); os.kill({pid}, {int(signal.SIGKILL)})\n"
        "Journal.add = add_and_kill\n"
        "cli.main(sys.argv[1:])"
    )
    return subprocess.Popen([sys.executable, "-c", code, *typed])


def running_tasks(dask_worker) -> int:
    return len(dask_worker.state.executing)


def counted_photos() -> list[str]:
    from pillsnap.deployment import cluster as module

    return module.asked


@pytest.mark.parametrize("mode", ["single", "combo"])
def test_the_table_is_that_of_one_machine(photos, bundle, cluster, tmp_path, mode):
    "Photo by photo, in their order, with a photo that cannot be read as a line with its error."
    local = of_one_machine(photos, bundle, tmp_path / "local.parquet", "--mode", mode)
    assert typed(*command(photos, bundle, cluster, tmp_path / "there.parquet", "--mode", mode)) == 1
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "there.parquet"), local)
    assert local["photo"].nunique() == N and local["error"].notna().sum() == 1
    assert len(local) == (N if mode == "single" else 2 * (N - 1) + 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["local.parquet", "there.parquet"]


def test_a_killed_job_goes_on_and_asks_no_photo_twice(photos, bundle, cluster, client, tmp_path):
    "kill -9 of the asking process in the middle; the next call asks what is missing, and no other photo."
    local = of_one_machine(photos, bundle, tmp_path / "local.parquet")
    out = tmp_path / "there.parquet"
    journal = tmp_path / "there.parquet.journal"
    client.run(count_photos, 0.05)
    asking = asks_and_kills("os.getpid()", 16, command(photos, bundle, cluster, out))
    assert asking.wait(120) == -signal.SIGKILL
    stored = journal.read_bytes().count(b"\n") - 1
    assert 16 <= stored < N and not out.exists()
    while any(client.run(running_tasks).values()):  # what the lost process had asked for; nobody gets its answers
        time.sleep(0.05)
    client.run(count_photos, 0.0)
    assert typed(*command(photos, bundle, cluster, out)) == 1
    asked = Counter(path for paths in client.run(counted_photos).values() for path in paths)
    assert sum(asked.values()) == len(asked) == N - stored
    pd.testing.assert_frame_equal(pd.read_parquet(out), local)
    assert not journal.exists()


def test_a_lost_worker_costs_no_photo(photos, bundle, cluster, client, tmp_path):
    local = of_one_machine(photos, bundle, tmp_path / "local.parquet")
    out = tmp_path / "there.parquet"
    client.run(count_photos, 0.05)
    lost = next(iter(client.run(os.getpid).values()))
    asking = asks_and_kills(str(lost), 8, command(photos, bundle, cluster, out))
    assert asking.wait(120) == 1
    assert lost not in client.run(os.getpid).values()
    pd.testing.assert_frame_equal(pd.read_parquet(out), local)


def set_version(version: str) -> None:
    import pillsnap

    pillsnap.__version__ = version


def test_a_job_that_would_answer_differently_is_refused(photos, bundle, cluster, client, tmp_path, capsys):
    "Another version on a worker, another bundle in the journal, no scheduler: exit status 2, and words."
    client.wait_for_workers(2)
    worker = next(iter(client.scheduler_info()["workers"]))
    client.run(set_version, "0.0.1", workers=[worker])
    try:
        assert typed(*command(photos, bundle, cluster, tmp_path / "a.parquet")) == 2
    finally:
        import pillsnap

        client.run(set_version, pillsnap.__version__, workers=[worker])
    assert "has pillsnap 0.0.1" in capsys.readouterr().err
    (tmp_path / "b.parquet.journal").write_text('{"schema": "pillsnap-journal/1", "digest": "another"}\n')
    assert typed(*command(photos, bundle, cluster, tmp_path / "b.parquet")) == 2
    assert "begun with another bundle" in capsys.readouterr().err
    refused = command(photos, bundle, cluster, tmp_path / "c.csv")
    assert typed(*refused) == 2 and "a Parquet file" in capsys.readouterr().err
    assert sorted(tmp_path.glob("*.parquet")) == []
