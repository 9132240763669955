"""Scaled features by row, in memory or mapped from the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from tlauto.training.batches import to_device

ON_DEVICE = 2**30  # bytes of features that are kept on the device as a whole
BLOCK = 8192  # rows scaled at a time when they are not

Norm = Callable[[torch.Tensor], torch.Tensor]


class Rows:
    """Features (N, C) or (N, C, H, W) by row, scaled by `norm`.

    Up to `limit` bytes are scaled and moved to the device once, as a whole; more stay mapped from
    the cache.
    """

    def __init__(
        self, features: torch.Tensor, norm: Norm, device: torch.device, *, limit: int = ON_DEVICE
    ) -> None:
        self.device, self.norm = device, norm
        self.is_small = features.element_size() * features.numel() <= limit
        self.features = self.norm(features.to(self.device)) if self.is_small else features

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """The scaled features (B, C) or (B, C, H, W) of these rows, on the device."""
        taken = self.features.index_select(0, rows.to(self.features.device))
        return taken if self.is_small else self.norm(to_device(taken, self.device))

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All rows in order, as slices with their scaled features on the device."""
        size = len(self) if self.is_small else BLOCK
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            features = self.features[part]
            yield part, features if self.is_small else self.norm(to_device(features, self.device))
