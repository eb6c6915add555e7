"""Where else a run is watched: MLflow, Weights & Biases, Trackio, Prometheus, or a class of one's own."""

from dist_partial.trackers.base import Row, Tracker
from dist_partial.trackers.following import Following
from dist_partial.trackers.mlflow import MLflow
from dist_partial.trackers.prometheus import Prometheus
from dist_partial.trackers.trackio import Trackio
from dist_partial.trackers.wandb import WandB

__all__ = ["Following", "MLflow", "Prometheus", "Row", "Tracker", "Trackio", "WandB"]
