"""The examples for schedulers name stages, notebooks, parameters and commands that exist."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pillsnap.cli import PIPELINE, app
from pillsnap.core.runner import check_parameters

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def literal(tree: ast.Module, name: str):
    return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == name)


def test_the_airflow_dag_runs_job_notebooks_in_the_pipelines_order():
    tree = ast.parse((EXAMPLES / "airflow_dag.py").read_text(encoding="utf-8"))
    stages = literal(tree, "STAGES")
    order = {s.notebook: (i, s) for i, s in enumerate(PIPELINE)}
    assert [order[s][0] for s in stages] == sorted(order[s][0] for s in stages) and len(stages) >= 5
    given = next(n for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "parameters").value
    for s in stages:
        check_parameters(order[s][1].path, [k.value for k in given.keys])


def test_the_prefect_flow_runs_every_job_of_the_sequential_strategy():
    tree = ast.parse((EXAMPLES / "prefect_flow.py").read_text(encoding="utf-8"))
    loop = next(n for n in ast.walk(tree) if isinstance(n, ast.For))
    assert ast.literal_eval(loop.iter) == tuple(s.name for s in PIPELINE if s.strategy in ("", "sequential"))
    compile(tree, "prefect_flow.py", "exec")


def test_the_slurm_script_is_bash_and_its_commands_exist():
    path = EXAMPLES / "slurm_array.sh"
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    text = path.read_text(encoding="utf-8")
    commands = re.findall(r"^pillsnap (\w+) (\w+)", text, re.M)
    known = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert len(commands) == 4 and all(c in known for c, _ in commands)
    assert {s for c, s in commands if c == "run"} <= {s.name for s in PIPELINE} | {"all"}
    assert re.search(r"^#SBATCH --array=", text, re.M)
