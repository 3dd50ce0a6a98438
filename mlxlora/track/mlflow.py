"""MLflow, where MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say; else as MLflow chooses."""

import os
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from mlxlora.config import RunConfig
from mlxlora.track.figures import settings
from mlxlora.track.known import known

LONGEST_PARAM = 6000  # characters, as MLflow allows
STATES = {"finished": "FINISHED", "early stop": "FINISHED", "interrupted": "KILLED"}


class Mlflow:
    """One run there for one run here, also when it is resumed."""

    def __init__(self, directory: Path, run: RunConfig, update: int, new: bool) -> None:
        self._client = client = MlflowClient()
        self._id = known(directory, "mlflow", lambda: _begin(client, directory, run))
        client.update_run(self._id, status="RUNNING")
        self.where = f"{client.tracking_uri}, run {self._id}"

    def figures(self, update: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        told = [Metric(name, value, now, update) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=told)

    def text(self, update: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/{update:08d}.txt")

    def close(self, reason: str) -> None:
        self._client.set_terminated(self._id, STATES.get(reason, "FAILED"))


def _begin(client: MlflowClient, directory: Path, run: RunConfig) -> str:
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "mlxlora")
    found = client.get_experiment_by_name(name)
    experiment = found.experiment_id if found else client.create_experiment(name)
    begun = client.create_run(experiment, run_name=directory.name)
    told = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in settings(run).items()]
    client.log_batch(begun.info.run_id, params=told)
    return str(begun.info.run_id)
