"""Both trackers pass the suite, wherever they are told to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from tlauto_trackers.mlflow import MLflow
from tlauto_trackers.tensorboard import TensorBoard

from tlauto.testing import TrackerSuite


class TestTensorBoard(TrackerSuite):
    tracker = TensorBoard()


class TestTensorBoardInAFolderOfTheUsers(TrackerSuite):
    tracker = TensorBoard()

    def where(self, folder: Path) -> str:
        return str(folder / "somewhere else")


# MLflow and SQLAlchemy warn each other's developers.
@pytest.mark.filterwarnings("ignore")
class TestMLflow(TrackerSuite):
    tracker = MLflow()
