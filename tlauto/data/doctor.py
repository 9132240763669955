"""Examine every image of a dataset and say what is wrong with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto.data.checks import FileCheck, check_files
from tlauto.data.duplicates import MOST_IMAGES_TO_TURN, joined, near_pairs, same_groups
from tlauto.data.raw import RawDataset, Record, classes_of

Groups = tuple[tuple[str, ...], ...]

FEW_IMAGES = 10
"""A class with fewer images than this is warned of."""


@dataclass(frozen=True)
class DoctorReport:
    """What an examination found; paths are those of the records, groups are sorted.

    Attributes:
        images: usable images; `total` counts the unusable ones too.
        unreadable: (path, reason) of files that are left out.
        exact: groups of files with the same bytes or the same pixels.
        near: groups that show the same picture, scaled, recompressed or differently exposed.
        turned: groups that show the same picture, rotated or mirrored.
        leaks: groups of `exact` that lie in more than one given split.
        near_leaks: groups of `near` or `turned` that do.
        conflicts: groups of `exact` whose labels differ.
        class_counts: usable images per class (empty for regression).
        split_counts: usable images per given split.
        imbalance: largest class over smallest; None for fewer than two classes.
        modes, formats: usable images per Pillow mode and format.
        rotated, animated: images that EXIF rotates; images with more than one frame.
        sides: shortest side, median longer side and longest side, in pixels.
        checks: the `FileCheck` of every record, usable or not.
    """

    root: str
    kind: str
    task: str
    total: int
    unreadable: tuple[tuple[str, str], ...]
    strays: tuple[str, ...]
    hidden: tuple[str, ...]
    exact: Groups
    near: Groups
    turned: Groups
    leaks: Groups
    near_leaks: Groups
    conflicts: Groups
    class_counts: Mapping[str, int]
    split_counts: Mapping[str, int]
    modes: Mapping[str, int]
    formats: Mapping[str, int]
    rotated: int
    animated: int
    sides: tuple[int, int, int]
    notes: tuple[str, ...]
    checks: Mapping[str, FileCheck]

    @property
    def images(self) -> int:
        """How many images are usable."""
        return self.total - len(self.unreadable)

    @property
    def imbalance(self) -> float | None:
        """Images of the largest class per image of the smallest; None for fewer than two classes."""
        counts = [count for count in self.class_counts.values() if count]
        return max(counts) / min(counts) if len(counts) > 1 else None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what was left out or may spoil a result, worst first."""
        return tuple(_warnings(self))

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, without the single checks; `version` changes with the names."""
        return {
            "version": 1,
            "root": self.root,
            "kind": self.kind,
            "task": self.task,
            "images": self.images,
            "unreadable": [{"path": path, "reason": reason} for path, reason in self.unreadable],
            "classes": dict(self.class_counts),
            "splits": dict(self.split_counts),
            "imbalance": self.imbalance,
            "exact_duplicates": [list(group) for group in self.exact],
            "near_duplicates": [list(group) for group in self.near],
            "turned_duplicates": [list(group) for group in self.turned],
            "leaks": [list(group) for group in self.leaks],
            "near_leaks": [list(group) for group in self.near_leaks],
            "conflicting_labels": [list(group) for group in self.conflicts],
            "modes": dict(self.modes),
            "formats": dict(self.formats),
            "exif_rotated": self.rotated,
            "animated": self.animated,
            "sides": dict(zip(("shortest", "median", "longest"), self.sides, strict=True)),
            "not_images": list(self.strays),
            "hidden": list(self.hidden),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


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
    files = [raw.file(record) for record in raw.records]
    checks = check_files(files, memory=memory, workers=workers, progress=progress)
    good = [(record, check) for record, check in zip(raw.records, checks, strict=True) if not check.problem]
    records = [record for record, _ in good]
    found = _Duplicates(good)
    notes = list(raw.notes)
    if found.is_too_large_to_turn:
        notes.append(f"rotated copies are not looked for among more than {MOST_IMAGES_TO_TURN:,} images")
    return DoctorReport(
        root=raw.root,
        kind=raw.kind,
        task=raw.task,
        total=len(raw.records),
        unreadable=tuple(
            (record.path, check.problem)
            for record, check in zip(raw.records, checks, strict=True)
            if check.problem
        ),
        strays=raw.strays,
        hidden=raw.hidden,
        exact=_paths(records, found.exact),
        near=_paths(records, found.near),
        turned=_paths(records, found.turned),
        leaks=_paths(records, _straddling(records, found.exact)),
        near_leaks=_paths(records, _straddling(records, found.near + found.turned)),
        conflicts=_paths(records, [g for g in found.exact if len({records[i].label for i in g}) > 1]),
        class_counts=_class_counts(raw, records),
        split_counts=_counted(record.split for record in records if record.split),
        modes=_counted(check.mode for _, check in good),
        formats=_counted(check.format for _, check in good),
        rotated=sum(check.is_rotated for _, check in good),
        animated=sum(check.is_animated for _, check in good),
        sides=_sides([check for _, check in good]),
        notes=tuple(notes),
        checks={record.path: check for record, check in zip(raw.records, checks, strict=True)},
    )


class _Duplicates:
    """Groups of indices into the usable images."""

    def __init__(self, good: Sequence[tuple[Record, FileCheck]]) -> None:
        size = len(good)
        self.exact = same_groups([check.pixels for _, check in good])
        # Of equal images one stands for all.
        doubles = {index for group in self.exact for index in group[1:]}
        single = [index for index in range(size) if index not in doubles]
        looks = [good[index][1].look for index in single]
        self.is_too_large_to_turn = len(single) > MOST_IMAGES_TO_TURN
        self.near = self._groups(size, [(single[a], single[b]) for a, b in near_pairs(looks)])
        turned = [] if self.is_too_large_to_turn else near_pairs(looks, turned=True)
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


def _counted(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _sides(checks: Sequence[FileCheck]) -> tuple[int, int, int]:
    if not checks:
        return 0, 0, 0
    longer = sorted(max(check.width, check.height) for check in checks)
    shortest = min(min(check.width, check.height) for check in checks)
    return shortest, longer[len(longer) // 2], longer[-1]


# --- sentences -------------------------------------------------------------------------------------


def _warnings(report: DoctorReport) -> Iterable[str]:
    if report.leaks:
        yield (
            f"{_count(report.leaks, 'group')} of identical images in more than one split, "
            f"e.g. {_example(report.leaks)}"
        )
    if report.unreadable:
        path, reason = report.unreadable[0]
        yield f"{_n(len(report.unreadable), 'unreadable file')} left out, e.g. {path}: {reason}"
    if report.conflicts:
        yield (
            f"{_count(report.conflicts, 'group')} of identical images with different labels, "
            f"e.g. {_example(report.conflicts)}"
        )
    if report.near_leaks:
        yield (
            f"{_count(report.near_leaks, 'group')} of nearly identical images in more than one split, "
            f"e.g. {_example(report.near_leaks)}"
        )
    if report.exact:
        yield f"{_count(report.exact, 'group')} of identical images, e.g. {_example(report.exact)}"
    if report.near or report.turned:
        groups = report.near + report.turned
        yield f"{_count(groups, 'group')} of nearly identical images, e.g. {_example(groups)}"
    yield from _class_warnings(report)
    if report.strays:
        yield f"{_n(len(report.strays), 'file')} not an image, ignored, e.g. {report.strays[0]}"
    if report.hidden:
        hidden = _n(len(report.hidden), "hidden file or folder", "hidden files or folders")
        yield f"{hidden} ignored, e.g. {report.hidden[0]}"


def _class_warnings(report: DoctorReport) -> Iterable[str]:
    empty = [name for name, count in report.class_counts.items() if not count]
    if empty:
        yield f"no usable image of {_n(len(empty), 'class', 'classes')}: {', '.join(empty[:6])}"
    small = [f"{name} ({count})" for name, count in report.class_counts.items() if 0 < count < FEW_IMAGES]
    if small:
        what = _n(len(small), "class", "classes")
        yield f"{what} with fewer than {FEW_IMAGES} images: {', '.join(small[:6])}"
    if report.task == "multiclass" and report.imbalance is not None and report.imbalance > 3:
        yield f"unbalanced: the largest class has {report.imbalance:.1f} times the images of the smallest"


def _n(count: int, one: str, many: str | None = None) -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"


def _count(groups: Groups, what: str) -> str:
    return f"{_n(len(groups), what)} ({sum(map(len, groups))} images)"


def _example(groups: Groups) -> str:
    return " = ".join(groups[0][:2])
