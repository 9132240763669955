"""A task's loss: its mean for who trains step by step, and image by image, with slopes, for who solves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

ByImage = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""From logits (B, K, N) to losses (B, N) and their slopes (B, K, N)."""


@runtime_checkable
class Loss(Protocol):
    """A mean over images of what each adds, convex in the logits."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean for logits (N, K), to be differentiated; targets may be soft (N, K) after mixup."""
        ...

    def by_image(self, targets: torch.Tensor) -> ByImage:
        """The same for many steps on the same targets, without autograd, which takes ten times as long.

        Returns: a function of the logits (B, K, N) of B heads, to the losses (B, N) and their slopes
        (B, K, N) by the logits, which are the caller's to change.
        """
        ...
