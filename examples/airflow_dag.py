"""The stages of a run as an Airflow DAG, by Airflow's papermill provider (apache-airflow-providers-papermill).

Each task executes one stage notebook with the run folder as its parameter; the folder's own config.yaml says the rest,
so begin the folder once with `pillsnap run conversion --config two_stage --run-dir RUN`. A stage that was killed goes
on when its task is retried.
"""

from datetime import datetime
from pathlib import Path

from airflow import DAG
from airflow.providers.papermill.operators.papermill import PapermillOperator

from pillsnap.core.config import resource_dir

RUN = "/data/runs/two_stage"  # a folder that all workers see
STAGES = [
    "dataset/460_splits",
    "training/640_classifier",
    "training/650_detector",
    "evaluation/770_evaluation",
    "deployment/840_export",
]

with DAG("pillsnap", start_date=datetime(2026, 1, 1), schedule=None, catchup=False, default_args={"retries": 3}) as dag:
    before = None
    for name in STAGES:
        task = PapermillOperator(
            task_id=name.split("_")[-1],
            input_nb=str(resource_dir("nbs") / f"{name}.ipynb"),
            output_nb=f"{RUN}/notebooks/{Path(name).name}.ipynb",
            parameters={"run_dir": RUN},
        )
        if before is not None:
            before >> task
        before = task
