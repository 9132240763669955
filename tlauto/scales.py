"""Networks that can be run on larger images: an optional part of the Backbone contract.

Standard library only at import.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

from tlauto.contracts import Backbone, ImageInput
from tlauto.errors import TrialError

STRIDE = 32
"""Sizes are multiples of this many pixels, by which common networks divide their maps' sides."""


@runtime_checkable
class Scalable(Protocol):
    """What a `Backbone` may offer besides: then trials may run it on images of another size."""

    def resize(self, input: ImageInput) -> None:
        """Take images like these from now on, and state the shapes of the features that they give."""
        ...


def scaled(wanted: ImageInput, scale: float) -> ImageInput:
    """The same with images of about `scale` times the size, what lies around the crop in proportion.

    The size is a multiple of `STRIDE`, and above the old one where `scale` is above 1. A scale of 1 changes
    nothing.
    """
    size = scaled_size(wanted.size, scale)
    return replace(wanted, size=size, resize=round(wanted.resize * size / wanted.size))


def scaled_size(size: int, scale: float) -> int:
    """The side of such images, in pixels: that many times `size`, to the next multiple of `STRIDE`."""
    if scale == 1.0:
        return size
    least = STRIDE * (size // STRIDE + 1) if scale > 1 else STRIDE
    return max(least, STRIDE * round(size * scale / STRIDE))


def is_scalable(backbone: Backbone) -> bool:
    """Whether a backbone can be run on images of another size than its own."""
    return backbone.input.resizable and isinstance(backbone, Scalable)


def at_scale(backbone: Backbone, scale: float, *, id: str) -> Backbone:
    """The backbone, which takes images of so many times its own size from now on.

    Raises: TrialError when it takes no other size than its own.
    """
    if scale == 1.0:
        return backbone
    if not (backbone.input.resizable and isinstance(backbone, Scalable)):
        size = backbone.input.size
        raise TrialError(
            f"'image.scale' is {scale:g}, but {id} takes images of {size} x {size} pixels only; "
            f"leave the parameter out or take another backbone"
        )
    backbone.resize(scaled(backbone.input, scale))
    return backbone
