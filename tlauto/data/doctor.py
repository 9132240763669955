"""Examine every image of a dataset and say what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tlauto.data.checks import LOOK_SIDE, FileCheck, check_files
from tlauto.data.duplicates import MOST_IMAGES_TO_TURN, joined, near_pairs, same_groups
from tlauto.data.raw import RawDataset, Record, classes_of
from tlauto.data.report import DoctorReport, Groups
from tlauto.data.words import counted

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray

# Grey levels of 255: an image without any above looks black.
_DARK = 16


def examine(
    raw: RawDataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    memory: Path | None = None,
) -> DoctorReport:
    """Decode every image fully, in threads, and report what was found; nothing is changed.

    Args:
        progress: called with (images done, all images).
        workers: threads; None is one per usable core.
        memory: a file that remembers results, so that unchanged images are not decoded again.
    """
    files = [str(raw.file(record)) for record in raw.records]
    checks, looks = check_files(files, memory=memory, workers=workers, progress=progress)
    good = [(record, check) for record, check in zip(raw.records, checks, strict=True) if not check.problem]
    records = [record for record, _ in good]
    seen = [place for place, check in enumerate(checks) if not check.problem]
    found = _Duplicates(good, looks, seen)
    return DoctorReport(
        root=raw.root,
        kind=raw.kind,
        task=raw.task,
        total=len(raw.records),
        unreadable=tuple((r.path, c.problem) for r, c in zip(raw.records, checks, strict=True) if c.problem),
        strays=raw.strays,
        hidden=raw.hidden,
        exact=_paths(records, found.exact),
        near=_paths(records, found.near),
        turned=_paths(records, found.turned),
        leaks=_paths(records, _straddling(records, found.exact)),
        near_leaks=_paths(records, _straddling(records, found.near + found.turned)),
        conflicts=_paths(records, [g for g in found.exact if len({records[i].label for i in g}) > 1]),
        dark=tuple(
            r.path for r, place in zip(records, seen, strict=True) if _brightest(looks[place]) < _DARK
        ),
        class_counts=_class_counts(raw, records),
        split_counts=_tally(record.split for record in records if record.split),
        modes=_tally(check.mode for _, check in good),
        formats=_tally(check.format for _, check in good),
        rotated=sum(check.is_rotated for _, check in good),
        animated=sum(check.is_animated for _, check in good),
        sides=_sides([check for _, check in good]),
        notes=_notes(raw, found),
        checks={record.path: check for record, check in zip(raw.records, checks, strict=True)},
    )


class _Duplicates:
    """Groups of indices into the usable images, whose looks lie at the places `seen`."""

    def __init__(self, good: Sequence[tuple[Record, FileCheck]], looks: Array, seen: Sequence[int]) -> None:
        size = len(good)
        self.exact = same_groups([check.pixels for _, check in good])
        # Of equal images one stands for all.
        doubles = {index for group in self.exact for index in group[1:]}
        single = [index for index in range(size) if index not in doubles]
        among = [seen[index] for index in single]
        self.is_too_large_to_turn = len(single) > MOST_IMAGES_TO_TURN
        self.near = self._groups(size, [(single[a], single[b]) for a, b in near_pairs(looks, among)])
        turned = [] if self.is_too_large_to_turn else near_pairs(looks, among, turned=True)
        home = joined(size, self.near)
        pairs = [(single[a], single[b]) for a, b in turned]
        # A symmetric picture is also its own mirror image: already told.
        self.turned = self._groups(size, [(a, b) for a, b in pairs if home[a] != home[b]])

    def _groups(self, size: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
        if not pairs:
            return []
        # The copies of an image belong to every group it belongs to.
        touched = {index for pair in pairs for index in pair}
        copies = [group for group in self.exact if group[0] in touched]
        return same_groups([home + 1 for home in joined(size, [*pairs, *copies])])


def _brightest(look: Array) -> int:
    """The highest grey level of a look (1072,), 0 to 255."""
    return int(look[: LOOK_SIDE**2].max())


def _notes(raw: RawDataset, found: _Duplicates) -> tuple[str, ...]:
    notes = list(raw.notes)
    if raw.hidden:
        hidden = counted(len(raw.hidden), "hidden file or folder", "hidden files or folders")
        notes.append(f"{hidden} not looked into, e.g. {raw.hidden[0]}")
    if found.is_too_large_to_turn:
        notes.append(f"rotated copies are not looked for among more than {MOST_IMAGES_TO_TURN:,} images")
    return tuple(notes)


def _paths(records: Sequence[Record], groups: Iterable[Sequence[int]]) -> Groups:
    return tuple(sorted(tuple(sorted(records[index].path for index in group)) for group in groups))


def _straddling(records: Sequence[Record], groups: Iterable[Sequence[int]]) -> list[Sequence[int]]:
    return [group for group in groups if len({records[i].split for i in group} - {None}) > 1]


def _class_counts(raw: RawDataset, records: Sequence[Record]) -> dict[str, int]:
    """Usable images per class, classes of unusable images included."""
    if raw.task == "regression":
        return {}
    counts = dict.fromkeys(classes_of([record.label for record in raw.records]), 0)
    for record in records:
        for name in record.label if isinstance(record.label, tuple) else (str(record.label),):
            counts[name] += 1
    return counts


def _tally(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _sides(checks: Sequence[FileCheck]) -> tuple[int, int, int]:
    if not checks:
        return 0, 0, 0
    longer = sorted(max(check.width, check.height) for check in checks)
    shortest = min(min(check.width, check.height) for check in checks)
    return shortest, longer[len(longer) // 2], longer[-1]
