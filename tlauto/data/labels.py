"""What labels mean: guess the task from their text, or read them as the task that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tlauto.data.raw import TASKS, Label
from tlauto.errors import DataError, did_you_mean

# Whole numbers are classes unless there are so many of them that they must be measurements.
_MOST_NUMBERED_CLASSES = 100
_FEWEST_PER_NUMBERED_CLASS = 5


@dataclass(frozen=True)
class Cell:
    """One label as written: where (for messages), and its text or the texts of a JSON list."""

    where: str
    value: str | tuple[str, ...]


def check_task(task: str) -> None:
    """Raises DataError unless `task` is `auto` or one that labels can be read as."""
    if task != "auto" and task not in TASKS:
        raise DataError(f"no task '{task}', only auto, {', '.join(TASKS)}{did_you_mean(task, TASKS)}")


def read_labels(cells: Sequence[Cell], *, task: str = "auto") -> tuple[str, list[Label], list[str]]:
    """The task, one label per cell, and notes on what was guessed.

    Raises: DataError naming the first cell that does not fit the task.
    """
    check_task(task)
    notes: list[str] = []
    if task == "auto":
        task, notes = _guess(cells)
    if task == "regression":
        return task, [_number(cell) for cell in cells], notes
    if task == "multilabel":
        return task, [_names(cell) for cell in cells], notes
    return task, [_name(cell) for cell in cells], notes


def _guess(cells: Sequence[Cell]) -> tuple[str, list[str]]:
    if any(isinstance(cell.value, tuple) or "|" in cell.value for cell in cells):
        return "multilabel", []
    texts = [cell.value for cell in cells if isinstance(cell.value, str)]
    values = [value for value in map(_parse, texts) if value is not None]
    # One typing error among measurements must not turn them into hundreds of classes.
    if len(values) < 0.8 * len(texts) or not values:
        return "multiclass", []
    if any(not value.is_integer() for value in values):
        return "regression", []
    distinct = len(set(values))
    if distinct > _MOST_NUMBERED_CLASSES or (
        distinct > 20 and len(values) < _FEWEST_PER_NUMBERED_CLASS * distinct
    ):
        return "regression", [
            f"{distinct} different whole numbers as labels are taken as values "
            f"(regression); --task multiclass takes them as classes"
        ]
    note = f"{distinct} different whole numbers as labels are taken as classes; --task regression takes "
    return "multiclass", [note + "them as values"]


def _parse(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number(cell: Cell) -> float:
    value = _parse(cell.value) if isinstance(cell.value, str) else None
    if value is None:
        shown = "empty" if cell.value in ("", ()) else f"'{_shown(cell)}', which is not a finite number"
        raise DataError(
            f"{cell.where}: the target is {shown}; correct or remove it, or name a class task with --task"
        )
    return value


def _names(cell: Cell) -> tuple[str, ...]:
    parts = cell.value.split("|") if isinstance(cell.value, str) else cell.value
    # No name at all is a real answer: nothing of what is looked for is in the image.
    return tuple(sorted({part.strip() for part in parts if part.strip()}))


def _name(cell: Cell) -> str:
    if isinstance(cell.value, tuple) and len(cell.value) != 1:
        raise DataError(
            f"{cell.where}: the label is the list '{_shown(cell)}' and multiclass needs exactly one; "
            f"use --task multilabel"
        )
    name = cell.value if isinstance(cell.value, str) else cell.value[0]
    if not name.strip():
        raise DataError(f"{cell.where}: the label is empty; fill it in or remove the row")
    return name.strip()


def _shown(cell: Cell) -> str:
    return cell.value if isinstance(cell.value, str) else "|".join(cell.value)
