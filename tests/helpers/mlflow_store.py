"""A store of MLflow's in a folder of a test's own."""

from pathlib import Path
from typing import Any


def store(folder: Path, experiment: str = "dist_partial") -> tuple[str, Any]:
    """Makes a database with an experiment, whose artifacts are in the folder, too; returns its URI and a client.

    Where MLflow itself makes the experiment, artifacts are in `mlruns/` of the working directory.
    """
    import mlflow

    uri = f"sqlite:///{folder}/store.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    client.create_experiment(experiment, artifact_location=(folder / "artifacts").as_uri())
    return uri, client
