"""A dataset as it was found, before any image was opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

Label = str | tuple[str, ...] | float

TASKS = ("multiclass", "multilabel", "regression")
"""The tasks that labels can be read as."""


@dataclass(frozen=True, slots=True)
class Record:
    """One labelled image file.

    Attributes:
        path: relative to the root, `/`-separated; absolute when it lies outside.
        label: class name (multiclass), class names (multilabel) or value (regression).
        split: `train`, `val` or `test` when the dataset says so.
        group: images of one group must stay in one split.
    """

    path: str
    label: Label
    split: str | None = None
    group: str | None = None


@dataclass(frozen=True)
class RawDataset:
    """What a reader found.

    Attributes:
        root: absolute folder that record paths are relative to.
        kind: `folder`, `split folders` or `manifest`.
        task: one of `TASKS`.
        records: sorted by path.
        strays: files that are neither images nor manifests, relative to the root.
        hidden: hidden files and folders that were not looked into, relative to the root.
        notes: sentences on what was guessed or passed over.
    """

    root: str
    kind: str
    task: str
    records: tuple[Record, ...]
    strays: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def file(self, record: Record) -> Path:
        """The absolute path of a record."""
        return Path(self.root, record.path)


def classes_of(labels: list[Label]) -> tuple[str, ...]:
    """Class names in index order: by value when all are whole numbers, else alphabetical."""
    names: set[str] = set()
    for label in labels:
        names.update(label if isinstance(label, tuple) else [str(label)])
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
