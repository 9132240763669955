"""Networks that can be cut before one of their stages: an optional part of the Backbone contract.

Standard library only at import; torch types appear in annotations alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Split(Protocol):
    """A backbone cut in two before one of its stages.

    Both halves run the backbone's own modules, in the mode they are in: what learns in the suffix
    has the names, and goes into the checkpoints, that it always had.
    """

    def prefix(self, images: torch.Tensor) -> torch.Tensor:
        """Activations (N, C, H, W) or (N, L, C) before the stage, of normalised images (N, 3, H, W)."""
        ...

    def suffix(self, activations: torch.Tensor, kind: Literal["pooled", "unpooled"]) -> torch.Tensor:
        """The backbone's features from these activations, which it may overwrite."""
        ...


@runtime_checkable
class Splittable(Protocol):
    """What a `Backbone` may offer besides: then frozen stages run once for all epochs and trials."""

    def split(self, stage: int) -> Split | None:
        """The backbone cut before `stages[stage]`; None where that is not possible.

        No parameter of `stages[stage:]` may have a part in the prefix, and prefix and suffix together
        must give what the backbone gives. `stage` is at least 1.
        """
        ...


def split_of(backbone: object, stage: int) -> Split | None:
    """The split that a backbone offers before a stage (from 0); None when it offers none there."""
    return backbone.split(stage) if isinstance(backbone, Splittable) and stage > 0 else None
