"""MLflow (the extra `mlflow`)."""

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_partial.trackers.base import Row, Tracker, needed

_METRICS = 1000  # as many as MLflow takes in a call
_OUTCOMES = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@dataclasses.dataclass
class MLflow(Tracker):
    """Tells MLflow of numbers as metrics and of texts as artifacts.

    Args:
        uri: the tracking server or a store, such as 'sqlite:///mlflow.db'; None is what MLflow takes:
            MLFLOW_TRACKING_URI, or a database in the working directory.
        experiment: its name; made if there is none.

    Raises:
        UserError: MLflow is not installed.

    Examples:
        >>> MLflow(experiment="distillation").uri is None
        True
    """

    uri: str | None = None
    experiment: str = "dist_partial"

    def __post_init__(self) -> None:
        needed("mlflow", "MLflow")
        self._client: Any = None
        self._run = ""

    def begin(self, folder: Path, known: str) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        self._client = mlflow.MlflowClient(tracking_uri=self.uri)
        if known:
            self._client.update_run(known, status="RUNNING")
            self._run = known
        else:
            found = self._client.get_experiment_by_name(self.experiment)
            identifier = found.experiment_id if found else self._client.create_experiment(self.experiment)
            self._run = self._client.create_run(identifier, run_name=folder.name).info.run_id
        return self._run

    def log(self, rows: Sequence[Row]) -> None:
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        metrics = [Metric(name, value, now, row.step) for row in rows for name, value in row.numbers.items()]
        for i in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._run, metrics=metrics[i : i + _METRICS])

    def text(self, name: str, text: str, step: int) -> None:
        self._client.log_text(self._run, text, f"step_{step}/{name}" if step else name)

    def end(self, outcome: str) -> None:
        self._client.set_terminated(self._run, _OUTCOMES[outcome])
