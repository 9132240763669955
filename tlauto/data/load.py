"""From a path to a dataset in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tlauto.data.dataset import Dataset
from tlauto.data.doctor import examine
from tlauto.data.readers import read
from tlauto.data.report import DoctorReport
from tlauto.data.split import make_dataset


def load_dataset(
    path: str | Path,
    *,
    task: str = "auto",
    seed: int = 0,
    allow_leaks: bool = False,
    label_column: str | None = None,
    path_column: str | None = None,
    group_column: str | None = None,
    memory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Dataset, DoctorReport]:
    """Read, examine and split: the dataset, and what was found on the way.

    See `read`, `examine` and `make_dataset` for the arguments. Raises: DataError.
    """
    raw = read(path, label_column=label_column, path_column=path_column, group_column=group_column, task=task)
    report = examine(raw, progress=progress, memory=memory)
    return make_dataset(raw, report, seed=seed, allow_leaks=allow_leaks), report
