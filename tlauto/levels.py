"""Features of more than the last stage of a network: an optional part of the Backbone contract.

Standard library only at import; torch types appear in annotations alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch


class Level(NamedTuple):
    """What one stage hands to the next: channels, each with its mean over so many parts of the map."""

    channels: int
    cells: int

    @property
    def width(self) -> int:
        """Numbers an image."""
        return self.channels * self.cells


@runtime_checkable
class Levelled(Protocol):
    """What a `Backbone` may offer besides: then heads on cached features may read all its stages.

    Attributes:
        level_shape: the levels, stem first; the last are the pooled features, in one cell.
    """

    level_shape: tuple[Level, ...]

    def levels(self, images: torch.Tensor) -> torch.Tensor:
        """All levels (N, F) of normalised images (N, 3, H, W) in order, each level's cells by channel."""
        ...


def level_shape_of(backbone: object) -> tuple[Level, ...]:
    """The levels that a backbone offers besides its pooled features; empty when it offers none."""
    shape = backbone.level_shape if isinstance(backbone, Levelled) else ()
    return shape if len(shape) > 1 else ()


def width_of(shape: tuple[Level, ...], *, kind: str) -> int:
    """Numbers an image of features of a kind: `grid` is all cells of all levels, `levels` their means."""
    return sum(level.width if kind == "grid" else level.channels for level in shape)


def read_from(
    features: str | None, *, mirror: object = False, beside: Sequence[str] = (), scale: float = 1.0
) -> str:
    """What to say after the name of a head that reads more than a backbone's end; else nothing.

    Args:
        beside: ids of further backbones that it reads.
        scale: of the images, over those that the backbone was pretrained on.
    """
    stages = {"levels": " on all stages", "grid": " on all stages, by quarters"}.get(features or "", "")
    more = ["with mirror images"] if mirror else []
    more += [f"with {' and '.join(beside)}"] if beside else []
    more += [f"images {scale:g} times as large"] if scale != 1.0 else []
    return ", ".join([stages, *more])
