"""Changes of colour for a whole batch, each image by a strength of its own.

The arithmetic is that of torchvision's functions of the same names for one uint8 image, but for the
rounding between one operator and the next: values stay real numbers from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torchvision.transforms.v2 import functional as F

Operator = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of images (n, 3, H, W) float32 from 0 to 255, which it may overwrite, and strengths (n,)."""


def brightness(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Times 1 + strength."""
    return images.mul_(1 + _each(strengths)).clamp_(0, 255)


def contrast(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Away from the image's mean grey, or towards it."""
    # Sums of whole numbers are exact (those of a line below 2^24), so their order does not matter.
    total = _grey(images).sum(3).long().sum((1, 2))
    return _blend(_each(total / images[0, 0].numel()), images, strengths)


def saturation(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Away from the pixel's own grey, or towards it."""
    return _blend(_grey(images), images, strengths)


def sharpness(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Away from a smoothed image, or towards it; the outermost pixels stay."""
    lines = images[..., :-2, :] + images[..., 1:-1, :] + images[..., 2:, :]
    around = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:]  # sums of 3 x 3 pixels
    inner = images[..., 1:-1, 1:-1]
    _blend(around.add_(inner, alpha=4).div_(13).round_(), inner, strengths)
    return images


def posterize(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Without the lowest bits, as many as the strength."""
    step = torch.exp2(_each(strengths).round())
    return images.round_().div_(step).floor_().mul_(step)


def solarize(images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """Inverted from 255 - strength upwards."""
    return torch.where(images >= 255 - _each(strengths), 255 - images, images)


def autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel stretched to reach from 0 to 255."""
    images.round_()  # or the errors of interpolation would be stretched where a channel is all the same
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    is_flat = low == high
    low, scale = low.masked_fill(is_flat, 0), ((high - low) / 255).masked_fill(is_flat, 1)
    return images.sub_(low).div_(scale)


def equalize(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Each channel's histogram made flat."""
    flat: torch.Tensor = F.equalize(images.round_().to(torch.uint8))
    return flat.float()


@dataclass(frozen=True)
class Trivial:
    """An operator of TrivialAugment.

    Attributes:
        strongest: its largest strength; the least is 0.
        is_signed: whether the strength may be negative as well.
        change: of colour; None where it moves pixels (`augment` knows the name) or does nothing.
    """

    name: str
    strongest: float = 0.0
    is_signed: bool = False
    change: Operator | None = None


# The wide space of Müller & Hutter 2021 (arXiv:2103.10158), table 2.
TRIVIAL = (
    Trivial("identity"),
    Trivial("shear_x", 0.99, is_signed=True),
    Trivial("shear_y", 0.99, is_signed=True),
    Trivial("shift_x", 32.0, is_signed=True),
    Trivial("shift_y", 32.0, is_signed=True),
    Trivial("rotate", 135.0, is_signed=True),
    Trivial("brightness", 0.99, is_signed=True, change=brightness),
    Trivial("saturation", 0.99, is_signed=True, change=saturation),
    Trivial("contrast", 0.99, is_signed=True, change=contrast),
    Trivial("sharpness", 0.99, is_signed=True, change=sharpness),
    Trivial("posterize", 6.0, change=posterize),
    Trivial("solarize", 255.0, change=solarize),
    Trivial("autocontrast", change=autocontrast),
    Trivial("equalize", change=equalize),
)


def _each(strengths: torch.Tensor) -> torch.Tensor:
    return strengths[:, None, None, None]


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Luma (n, 1, H, W) of ITU-R BT.601, whole numbers as for uint8."""
    red, green, blue = images.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()[:, None]


def _blend(other: torch.Tensor, images: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
    """The images made `other` by strength -1, left by 0, and as far beyond themselves by 1; in place."""
    return images.mul_(1 + _each(strengths)).sub_(other * _each(strengths)).clamp_(0, 255)
