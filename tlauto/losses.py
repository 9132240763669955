"""A task's loss: its mean for who trains step by step, and image by image, with slopes, for who solves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ByImage:
    """A loss on given targets: from logits (B, K, N) to losses (B, N) and their slopes (B, K, N).

    Attributes:
        function: of the logits and `tensors`; what it returns is the caller's to change.
        tensors: what it has to know of the targets, one for all B heads, (1, …), or one for each, (B, …).
    """

    function: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    tensors: tuple[torch.Tensor, ...]

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and slopes of B heads."""
        return self.function(logits, *self.tensors)

    def of(self, which: torch.Tensor) -> ByImage:
        """That of some of the heads (b,), where each has its own."""
        return ByImage(self.function, tuple(tensor[which] for tensor in self.tensors))


@runtime_checkable
class Loss(Protocol):
    """A mean over images of what each adds, convex in the logits."""

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean for logits (N, K), to be differentiated; targets may be soft (N, K) after mixup."""
        ...

    def by_image(self, targets: torch.Tensor) -> ByImage:
        """The same for many steps on the same targets, without autograd, which takes ten times as long.

        Losses with the same `function` are solved side by side, whatever their tensors are.
        """
        ...
