"""A dataset that was read, checked and split: what the workers get, as one JSON file."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tlauto.errors import DataError

Target = int | float | tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One image.

    Attributes:
        path: relative to the dataset's root, `/`-separated; absolute when it lies outside.
        target: class index (multiclass), class indices (multilabel) or value (regression).
        split: `train`, `val` or `test`.
        sha256: of the file's bytes.
        group: number shared by images that must stay together (copies, or one value of the group
            column); -1 for an image that belongs to none.
    """

    path: str
    target: Target
    split: str
    sha256: str
    group: int = -1


@dataclass(frozen=True)
class Dataset:
    """Images with targets and split.

    Attributes:
        root: absolute folder that item paths are relative to.
        task: `multiclass`, `multilabel` or `regression`.
        classes: class names in index order; empty for regression.
        fingerprint: hash of contents, labels and given splits; not of the root or of our own split.
        modality: what the items are; `image`.
    """

    root: str
    task: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    fingerprint: str
    modality: str = "image"

    def part(self, *splits: str) -> tuple[Item, ...]:
        """The items of these splits, in order."""
        return self.once(splits, lambda: tuple(item for item in self.items if item.split in splits))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once and kept as long as the dataset: a worker reads it for many trials.

        It must follow from the dataset and the key alone, and nobody may change it.
        """
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept

    @cached_property
    def _kept(self) -> dict[Hashable, Any]:
        return {}

    def file(self, item: Item) -> Path:
        """The absolute path of an item."""
        return Path(self.root, item.path)

    def to_json(self) -> str:
        """The dataset as JSON; `from_json` reads it."""
        facts = json.dumps(asdict(replace(self, items=())))
        # One by one: as plain data, the items of many images would take several times the text.
        items = ", ".join(json.dumps(asdict(item)) for item in self.items)
        return facts.replace('"items": []', f'"items": [{items}]', 1)

    @classmethod
    def from_json(cls, text: str) -> Dataset:
        """The dataset written by `to_json`; raises DataError when it is not one."""
        try:
            data: dict[str, Any] = json.loads(text, object_hook=_items_at_once)
            items = tuple(item if isinstance(item, Item) else Item(**item) for item in data.pop("items"))
            return cls(**{**data, "classes": tuple(data["classes"]), "items": items})
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"this is not a tlauto dataset file: {error}") from None


def _items_at_once(data: dict[str, Any]) -> dict[str, Any] | Item:
    """An item as soon as it is read, so that many are never all there as plain data."""
    if "sha256" not in data:
        return data
    target = data["target"]
    return Item(**{**data, "target": tuple(target) if isinstance(target, list) else target})
