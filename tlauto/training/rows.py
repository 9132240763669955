"""Scaled features by row, in memory or mapped from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tlauto.training.batches import to_device
from tlauto.training.stored import Features

IN_MEMORY = 2**27
"""Bytes of scaled features that are kept as a whole in main memory: a fraction of what Python and
PyTorch take themselves. More are scaled as they are read, so memory does not grow with the images."""

ON_DEVICE = 2**30
"""The same for the memory of a GPU."""

BLOCK = 2**21  # numbers handled at a time where they are not: 8 MiB in single precision

Norm = Callable[[torch.Tensor], torch.Tensor]


class Rows:
    """Features (N, C) or (N, C, H, W) by row, scaled by `norm`.

    Up to `limit` bytes are scaled and moved to the device once, as a whole; more stay mapped from
    the cache.

    Attributes:
        shape: of all.
        whole: all of them, scaled, where they are small.
    """

    def __init__(
        self, features: Features, norm: Norm, device: torch.device, *, limit: int | None = None
    ) -> None:
        if limit is None:
            limit = IN_MEMORY if device.type == "cpu" else ON_DEVICE
        self.device, self.norm, self.shape = device, norm, features.shape
        is_small = 4 * len(features) * features.row_numbers <= limit
        self.whole = norm(features.tensor().to(device)) if is_small else None
        # Not those that are in memory now: who keeps these rows is not to hold on to a file of the cache.
        self._features = None if is_small else features

    @property
    def bytes(self) -> int | None:
        """Of memory that they take; None when they are mapped."""
        return None if self.whole is None else self.whole.nbytes

    @property
    def features(self) -> Features:
        """Where they are read from, when they are not in memory."""
        assert self._features is not None
        return self._features

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The scaled features (B, C) or (B, C, H, W) of these rows, on the device."""
        if self.whole is not None:
            return self.whole.index_select(0, rows.to(self.device))
        return self.norm(to_device(self.features.take(rows.cpu()), self.device))

    def blocks(self, *, beside: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, as slices with their scaled features on the device.

        Args:
            beside: numbers that a row becomes, such as logits: many make the blocks smaller.
        """
        size = self._block(beside)
        if self.whole is not None:
            for start in range(0, len(self), size):
                yield slice(start, start + size), self.whole[start : start + size]
            return
        for part, features in self.features.blocks(size):
            yield part, self.norm(to_device(features, self.device))

    def batches(self, rows: torch.Tensor | None = None, *, beside: int = 0) -> Iterator[torch.Tensor]:
        """The scaled features of these rows (n,) in blocks.

        By default all rows, not copied: for who only reads them. A head may work in place.
        """
        if rows is None:
            yield from (block for _, block in self.blocks(beside=beside))
            return
        for some in torch.split(rows, self._block(beside)):
            yield self.take(some)

    def _block(self, beside: int) -> int:
        """Rows at a time; those that are in memory already take no more by being read."""
        width = self.features.row_numbers if self.whole is None else 1
        return max(1, BLOCK // max(width, beside, 1))
