"""Turn what was read and examined into a dataset with train, val and test parts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tlauto.data.dataset import Dataset, Item, Target
from tlauto.data.duplicates import joined, same_groups
from tlauto.data.fingerprint import fingerprint
from tlauto.data.raw import Label, RawDataset, Record, classes_of
from tlauto.data.report import DoctorReport
from tlauto.data.words import counted
from tlauto.errors import DataError

FEWEST_VALUES = 10
"""Images a regression dataset needs at least."""

_PARTS = ("train", "val", "test")


def make_dataset(
    raw: RawDataset,
    report: DoctorReport,
    *,
    seed: int = 0,
    allow_leaks: bool = False,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
) -> Dataset:
    """The usable images with their targets, each in train, val or test.

    Splits that the dataset gives are kept; a missing val or test part is taken from train. What is
    taken is stratified by class (multilabel: iteratively, rarest first; regression: by quantile) and
    depends on the seed and the paths only. Images of one group (identical, nearly identical, or of
    one value of the group column) never land in different parts of a split made here.

    Args:
        allow_leaks: accept identical images, or one group, in more than one given split.
        val_fraction, test_fraction: of the images that are split here.

    Raises: DataError when no image is usable, there is nothing to tell apart, a class is too small to
    be in every part, or given splits leak.
    Source: Sechidis et al. 2011, "On the Stratification of Multi-Label Data", over groups.
    """
    records = [record for record in raw.records if not report.checks[record.path].problem]
    _require_usable(raw, report, records)
    classes = () if raw.task == "regression" else classes_of([record.label for record in records])
    _require_variety(raw, records, classes)
    given = {record.split for record in records} - {None}
    if given and not allow_leaks:
        _require_no_leaks(report, records)
    fractions = {"val": val_fraction, "test": test_fraction}
    missing = {part: fraction for part, fraction in fractions.items() if part not in given}
    homes = _homes(records, report)
    splits = _split(raw, records, homes, missing, seed)
    _require_train(raw, records, splits)
    sizes, index = Counter(homes), {name: i for i, name in enumerate(classes)}
    items = tuple(
        Item(
            record.path, _target(record.label, index), split, report.checks[record.path].sha256,
            home if sizes[home] > 1 else -1,
        )
        for record, split, home in zip(records, splits, homes, strict=True)
    )  # fmt: skip
    return Dataset(raw.root, raw.task, classes, items, fingerprint(raw, report))


def _target(label: Label, index: Mapping[str, int]) -> Target:
    if isinstance(label, float):
        return label
    if isinstance(label, tuple):
        return tuple(sorted(index[name] for name in label))
    return index[label]


# --- what must hold ---------------------------------------------------------------------------------


def _require_usable(raw: RawDataset, report: DoctorReport, records: Sequence[Record]) -> None:
    if records:
        return
    path, reason = report.unreadable[0] if report.unreadable else ("", "no file is listed")
    raise DataError(
        f"none of the {len(raw.records)} images in '{raw.root}' can be used, first '{path}': {reason}; "
        f"'tlauto doctor' lists them all"
    )


def _require_variety(raw: RawDataset, records: Sequence[Record], classes: Sequence[str]) -> None:
    if len({record.label for record in records}) > 1:
        if raw.task == "regression" and len(records) < FEWEST_VALUES:
            raise DataError(
                f"'{raw.root}' has {counted(len(records), 'usable image')}; regression needs at least "
                f"{FEWEST_VALUES}"
            )
        return
    if raw.task == "regression":
        raise DataError(f"all targets in '{raw.root}' are {records[0].label}; there is nothing to predict")
    if raw.task == "multilabel":
        raise DataError(f"all images in '{raw.root}' have the same labels; there is nothing to tell apart")
    name = classes[0]
    below = {PurePosixPath(record.path).parts[1:2] for record in records if record.path.count("/") > 1}
    if raw.kind == "folder" and len(below) > 1:
        advice = f"if its subfolders are the classes, pass '{raw.root}/{name}'"
    else:
        advice = "add images of at least one other class"
    raise DataError(f"'{raw.root}' has usable images of one class only, '{name}'; {advice}")


def _require_no_leaks(report: DoctorReport, records: Sequence[Record]) -> None:
    if report.leaks:
        raise DataError(
            f"{counted(len(report.leaks), 'group')} of identical images in more than one split of "
            f"'{report.root}', e.g. {' = '.join(report.leaks[0][:3])}; remove the copies, or accept them "
            f"with --allow-leaks ('tlauto doctor --json' lists them all)"
        )
    first: dict[str, Record] = {}
    for record in records:
        if record.group is not None:
            other = first.setdefault(record.group, record)
            if other.split != record.split:
                raise DataError(
                    f"group '{record.group}' lies in more than one split of '{report.root}': {other.path} "
                    f"in {other.split}, {record.path} in {record.split}; move it, or accept it with "
                    f"--allow-leaks"
                )


def _require_train(raw: RawDataset, records: Sequence[Record], splits: Sequence[str]) -> None:
    if "train" not in splits:
        raise DataError(f"'{raw.root}' has no usable train images, only {', '.join(sorted(set(splits)))}")
    if raw.task != "multiclass":
        return
    learned = {record.label for record, split in zip(records, splits, strict=True) if split == "train"}
    for record, split in zip(records, splits, strict=True):
        if record.label not in learned:
            raise DataError(
                f"class '{record.label}' is in the {split} part of '{raw.root}' and not in train "
                f"({', '.join(sorted(map(str, learned))[:6])}); add it to train or remove it"
            )


# --- the split --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Unit:
    """Images that stay together: their indices, and how many of them are of each stratum."""

    members: tuple[int, ...]
    strata: Mapping[str, int]


def _homes(records: Sequence[Record], report: DoctorReport) -> list[int]:
    """Per record the smallest index of its group of copies or of one group value."""
    index = {record.path: number for number, record in enumerate(records)}
    copies = [[index[path] for path in group] for group in report.exact + report.near + report.turned]
    return joined(len(records), copies + same_groups([record.group for record in records]))


def _split(
    raw: RawDataset,
    records: Sequence[Record],
    homes: Sequence[int],
    missing: Mapping[str, float],
    seed: int,
) -> list[str]:
    splits = [record.split or "train" for record in records]
    pool = [index for index, split in enumerate(splits) if split == "train"]
    if not missing or not pool:
        return splits
    units = _units(pool, homes, _strata(raw, [records[index] for index in pool]))
    _require_large_enough(raw, units, ("train", *missing))
    for unit, part in zip(units, _assign(units, missing, random.Random(seed)), strict=True):
        for index in unit.members:
            splits[index] = part
    return splits


def _strata(raw: RawDataset, pool: Sequence[Record]) -> list[tuple[str, ...]]:
    """What must be spread evenly, per record: its class, its classes, or its quantile."""
    if raw.task == "regression":
        order = sorted(range(len(pool)), key=lambda i: (pool[i].label, pool[i].path))
        bins = max(1, min(10, len(pool) // 5))
        rank = {index: position for position, index in enumerate(order)}
        return [(f"{rank[i] * bins // len(pool)}",) for i in range(len(pool))]
    # Images without any label are spread as if "no label" were one.
    return [r.label or ("",) if isinstance(r.label, tuple) else (str(r.label),) for r in pool]


def _units(pool: Sequence[int], homes: Sequence[int], strata: Sequence[tuple[str, ...]]) -> list[_Unit]:
    members: dict[int, list[int]] = {}
    for place, index in enumerate(pool):
        members.setdefault(homes[index], []).append(place)
    # Most images are by themselves, and those of one class share a count: 50,000 would take 15 MB.
    alone = {names: Counter(names) for names in set(strata)}
    units = []
    for home in sorted(members):
        places = members[home]
        counts = alone[strata[places[0]]]
        if len(places) > 1:
            counts = Counter(name for place in places for name in strata[place])
        units.append(_Unit(tuple(pool[place] for place in places), counts))
    return units


def _require_large_enough(raw: RawDataset, units: Sequence[_Unit], parts: Sequence[str]) -> None:
    what = f"to be in {', '.join(parts[:-1])} and {parts[-1]} (at least {len(parts)} different images)"
    if len(units) < len(parts):
        raise DataError(
            f"'{raw.root}' has {counted(len(units), 'different usable image')}, too few {what}; add images"
        )
    if raw.task != "multiclass":
        return
    sizes = Counter(name for unit in units for name in unit.strata)
    small = [f"'{name}' ({count})" for name, count in sorted(sizes.items()) if count < len(parts)]
    if small:
        raise DataError(
            f"too few different images of {', '.join(small[:6])} in '{raw.root}' {what}; add images or "
            f"remove the class"
        )


def _assign(units: Sequence[_Unit], fractions: Mapping[str, float], rng: random.Random) -> list[str]:
    """A part per unit: strata from the rarest to the commonest, large units first."""
    need = _needs(units, fractions)
    held: dict[str, Counter[str]] = {part: Counter() for part in need}
    chosen: dict[int, str] = {}
    order = list(range(len(units)))
    rng.shuffle(order)
    order.sort(key=lambda number: -len(units[number].members))
    having: dict[str, list[int]] = {}
    for number in order:
        for name in units[number].strata:
            having.setdefault(name, []).append(number)
    left = Counter({name: len(numbers) for name, numbers in having.items()})
    while left:
        rarest = min(left, key=lambda name: (left[name], name))
        waiting = [number for number in having[rarest] if number not in chosen]
        for position, number in enumerate(waiting):
            part = _part(rarest, need, held, len(waiting) - position)
            chosen[number] = part
            left.subtract(units[number].strata.keys())
            for name, count in units[number].strata.items():
                need[part][name] -= count
                held[part][name] += count
        del left[rarest]
    return [chosen[number] for number in range(len(units))]


def _needs(units: Sequence[_Unit], fractions: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Images of each stratum that each part should get; at least one where there are enough units."""
    totals: Counter[str] = Counter()
    spread: Counter[str] = Counter()
    for unit in units:
        totals.update(unit.strata)
        spread.update(unit.strata.keys())
    need: dict[str, dict[str, float]] = {"train": {}, **{part: {} for part in fractions}}
    for name, total in totals.items():
        least = 1 if spread[name] > len(fractions) else 0
        for part, fraction in fractions.items():
            need[part][name] = max(least, round(fraction * total))
        need["train"][name] = total - sum(need[part][name] for part in fractions)
    return need


def _part(
    name: str, need: Mapping[str, Mapping[str, float]], held: Mapping[str, Counter[str]], left: int
) -> str:
    """The part that lacks this stratum most; one that has none of it when few units are left."""
    parts = [part for part in _PARTS if part in need]
    without = [part for part in parts if not held[part][name]]
    if left <= len(without):
        parts = without
    return max(parts, key=lambda part: (need[part][name], sum(need[part].values())))
