"""TensorBoard and MLflow for tlauto: `tlauto search --track tensorboard --track mlflow`."""

from __future__ import annotations

import tlauto
from tlauto.trackers import Tracker
from tlauto_trackers.mlflow import MLflow
from tlauto_trackers.tensorboard import TensorBoard


@tlauto.hookimpl
def trackers() -> list[Tracker]:
    """TensorBoard and MLflow."""
    return [TensorBoard(), MLflow()]
