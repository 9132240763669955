"""What an examination found, as plain data and as sentences."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tlauto.data.checks import FileCheck
from tlauto.data.words import counted

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
        dark: images without any grey level above 15 of 255.
        class_counts: usable images per class (empty for regression).
        split_counts: usable images per given split.
        imbalance: largest class over smallest; None for fewer than two classes.
        modes, formats: usable images per Pillow mode and format.
        rotated, animated: images that EXIF rotates; images with more than one frame.
        sides: shortest side, median longer side and longest side, in pixels.
        checks: the `FileCheck` of every record, usable or not, without its `look`.
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
    dark: tuple[str, ...]
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
    def shorter_side(self) -> int:
        """The median length of the shorter sides of the usable images, in pixels; 0 without any."""
        sides = [min(check.width, check.height) for check in self.checks.values() if not check.problem]
        return statistics.median_low(sides) if sides else 0

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
            "almost_black": list(self.dark),
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


# --- sentences -------------------------------------------------------------------------------------


def _warnings(report: DoctorReport) -> Iterable[str]:
    yield from _copies(report.leaks, "identical images in more than one split")
    if report.unreadable:
        path, reason = report.unreadable[0]
        yield f"{counted(len(report.unreadable), 'unreadable file')} left out, e.g. {path}: {reason}"
    yield from _copies(report.conflicts, "identical images with different labels")
    yield from _copies(report.near_leaks, "nearly identical images in more than one split")
    yield from _copies(_without(report.exact, report.leaks + report.conflicts), "identical images")
    yield from _copies(_without(report.near + report.turned, report.near_leaks), "nearly identical images")
    yield from _class_warnings(report)
    if report.strays:
        yield f"{counted(len(report.strays), 'file')} of other kinds ignored, e.g. {report.strays[0]}"
    if report.dark:
        # 12-bit camera data in 16-bit files is the usual cause.
        dark = f"{counted(len(report.dark), 'image')} almost black, e.g. {report.dark[0]}"
        yield f"{dark} (scale 16-bit files up that use only their low bits)"


def _class_warnings(report: DoctorReport) -> Iterable[str]:
    empty = [name for name, count in report.class_counts.items() if not count]
    if empty:
        yield f"no usable image of {counted(len(empty), 'class', 'classes')}: {', '.join(empty[:6])}"
    small = [f"{name} ({count})" for name, count in report.class_counts.items() if 0 < count < FEW_IMAGES]
    if small:
        what = counted(len(small), "class", "classes")
        yield f"{what} with fewer than {FEW_IMAGES} images: {', '.join(small[:6])}"
    if report.task == "multiclass" and report.imbalance is not None and report.imbalance > 3:
        yield f"unbalanced: the largest class has {report.imbalance:.1f} times the images of the smallest"


def _copies(groups: Groups, what: str) -> Iterable[str]:
    if groups:
        images = sum(map(len, groups))
        yield f"{counted(len(groups), 'group')} of {what} ({images} images), e.g. {' = '.join(groups[0][:2])}"


def _without(groups: Groups, told: Groups) -> Groups:
    known = set(told)
    return tuple(group for group in groups if group not in known)
