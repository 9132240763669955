"""Features as they lie in the cache, read by row: nothing is joined, narrowed or widened as a whole."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch

from tlauto.backbone import narrowed
from tlauto.levels import Level, width_of


@dataclass(frozen=True)
class Stored:
    """Features (N, C) or (N, C, H, W) of several parts, one after the other; float32 when they are read.

    Attributes:
        parts: of equal rows, mapped from the cache or in memory, in half or full precision.
        means_of: levels that the parts hold all cells of, to be read as the mean of each; or none.
        key: what these numbers follow from, the same in every trial that reads them; None when nothing
            is to be kept of them between trials.
    """

    parts: tuple[torch.Tensor, ...]
    means_of: tuple[Level, ...] = ()
    key: Hashable = None

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C) or (N, C, H, W), as read."""
        row = (width_of(self.means_of, kind="levels"),) if self.means_of else self.parts[0].shape[1:]
        return (len(self), *row)

    @property
    def row_numbers(self) -> int:
        """Numbers of one row, as read."""
        return math.prod(self.shape[1:])

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The features (B, …) of these rows (B,)."""
        if len(self.parts) == 1:
            return self._read(self.parts[0][rows])
        taken, first = torch.empty(len(rows), *self.shape[1:]), 0
        for part in self.parts:
            here = (rows >= first) & (rows < first + len(part))
            taken[here] = self._read(part[rows[here] - first])
            first += len(part)
        return taken

    def blocks(self, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, up to `size` at a time, as slices with their features."""
        first = 0
        for part in self.parts:
            for start in range(0, len(part), size):
                block = self._read(part[start : start + size])
                yield slice(first + start, first + start + len(block)), block
            first += len(part)

    def tensor(self) -> torch.Tensor:
        """All of them, in memory if they are not there as they are."""
        parts = [self._read(part) for part in self.parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.float()
        return narrowed(rows, self.means_of, to="levels") if self.means_of else rows


@dataclass(frozen=True)
class SideBySide:
    """The features (N, C) of several backbones for the same images, column after column; read like `Stored`.

    Attributes:
        columns: of each backbone, in parts of equal lengths.
    """

    columns: tuple[Stored, ...]

    def __len__(self) -> int:
        return len(self.columns[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C), as read."""
        return (len(self), self.row_numbers)

    @property
    def row_numbers(self) -> int:
        """Numbers of one row, as read."""
        return sum(each.row_numbers for each in self.columns)

    @property
    def key(self) -> Hashable:
        """What these numbers follow from, as for `Stored`."""
        keys = tuple(each.key for each in self.columns)
        return None if None in keys else keys

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The features (B, C) of these rows (B,)."""
        return torch.cat([each.take(rows) for each in self.columns], dim=1)

    def blocks(self, size: int) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, up to `size` at a time, as slices with their features."""
        for blocks in zip(*(each.blocks(size) for each in self.columns), strict=True):
            yield blocks[0][0], torch.cat([block for _, block in blocks], dim=1)

    def tensor(self) -> torch.Tensor:
        """All of them, in memory."""
        return torch.cat([each.tensor() for each in self.columns], dim=1)


Features = Stored | SideBySide
