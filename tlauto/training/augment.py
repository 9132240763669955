"""Augmentation in four levels, each image with draws of its own.

torchvision's v2 operators do the work; the draws come from a NumPy generator given with each image
instead of torch's global one, so that images can be prepared in several threads and still be the
same on every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from tlauto.contracts import ImageInput
from tlauto.training.pixels import centre_crop

Random = np.random.Generator
Operator = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Level:
    """What one augmentation level does.

    Attributes:
        area: smallest part of the window's area that a random crop keeps; 1 is the centre crop.
        ratio: largest ratio of a crop's sides.
        shear: largest rotation and shear, degrees.
        colour: largest relative change of brightness, contrast and saturation.
        trivial: apply TrivialAugment (Müller & Hutter 2021, arXiv:2103.10158).
        mixup: alpha of mixup (Zhang et al. 2018, arXiv:1710.09412); 0 is off.
    """

    area: float = 1.0
    ratio: float = 1.0
    shear: float = 0.0
    colour: float = 0.0
    trivial: bool = False
    mixup: float = 0.0


LEVELS = {
    "none": Level(),
    "light": Level(area=0.7, ratio=4 / 3),
    "medium": Level(area=0.5, ratio=4 / 3, shear=10, colour=0.2),
    "strong": Level(area=0.35, ratio=4 / 3, trivial=True, mixup=0.2),
}


class Augment:
    """From a window (R, R, 3) uint8 to an augmented crop (3, size, size) uint8."""

    def __init__(self, level: str, image_input: ImageInput) -> None:
        self.level = LEVELS[level]
        self.input = image_input
        self.is_identity = level == "none"

    def __call__(self, window: np.ndarray, random: Random) -> torch.Tensor:
        """The crop; `random` decides all draws."""
        if self.is_identity:
            return _as_image(centre_crop(window, self.input))
        image = random_crop(_as_image(window), self.input.size, self.level, random)
        if random.random() < 0.5:
            image = F.horizontal_flip(image)
        if self.level.shear:
            image = _rotate_and_shear(image, self.level.shear, random)
        if self.level.colour:
            image = _change_colours(image, self.level.colour, random)
        if self.level.trivial:
            image = trivial_augment(image, random)
        return image


def random_crop(image: torch.Tensor, size: int, level: Level, random: Random) -> torch.Tensor:
    """A random part of (3, R, R), zoomed to (3, size, size); this is zoom and shift in one."""
    edge = image.shape[-1]
    area = random.uniform(level.area, 1.0) * edge * edge
    log_ratio = math.log(level.ratio)
    ratio = math.exp(random.uniform(-log_ratio, log_ratio))
    width = min(edge, max(1, round(math.sqrt(area * ratio))))
    height = min(edge, max(1, round(math.sqrt(area / ratio))))
    top = int(random.integers(0, edge - height + 1))
    left = int(random.integers(0, edge - width + 1))
    crop: torch.Tensor = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    return crop


def trivial_augment(image: torch.Tensor, random: Random) -> torch.Tensor:
    """One operator, chosen evenly, at a strength chosen evenly: TrivialAugment, wide space."""
    operator, strongest, is_signed = TRIVIAL[int(random.integers(len(TRIVIAL)))]
    strength = strongest * float(random.random())
    if is_signed and random.random() < 0.5:
        strength = -strength
    return operator(image, strength)


def mixup(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, random: Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) and soft targets (N, K), each mixed with the next of the batch.

    One mixing weight, drawn from Beta(alpha, alpha), serves the whole batch.
    """
    weight = float(random.beta(alpha, alpha))
    return images.lerp(images.roll(1, 0), 1 - weight), targets.lerp(targets.roll(1, 0), 1 - weight)


def _as_image(window: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(window)).permute(2, 0, 1)  # (3, H, W)


def _affine(
    image: torch.Tensor,
    *,
    angle: float = 0.0,
    shift: tuple[int, int] = (0, 0),
    shear: tuple[float, float] = (0.0, 0.0),
) -> torch.Tensor:
    moved: torch.Tensor = F.affine(
        image,
        angle=angle,
        translate=list(shift),
        scale=1.0,
        shear=list(shear),
        interpolation=F.InterpolationMode.BILINEAR,
    )
    return moved


def _rotate_and_shear(image: torch.Tensor, most: float, random: Random) -> torch.Tensor:
    angle, across, along = random.uniform(-most, most, 3).tolist()
    return _affine(image, angle=angle, shear=(across, along))


def _change_colours(image: torch.Tensor, most: float, random: Random) -> torch.Tensor:
    brightness, contrast, saturation = random.uniform(1 - most, 1 + most, 3).tolist()
    image = F.adjust_brightness(image, brightness)
    image = F.adjust_contrast(image, contrast)
    changed: torch.Tensor = F.adjust_saturation(image, saturation)
    return changed


def _degrees(strength: float) -> float:
    return math.degrees(math.atan(strength))


# Operator, its largest strength, and whether the strength has a random sign.
TRIVIAL: tuple[tuple[Operator, float, bool], ...] = (
    (lambda image, _: image, 0.0, False),
    (lambda image, s: _affine(image, shear=(_degrees(s), 0.0)), 0.99, True),
    (lambda image, s: _affine(image, shear=(0.0, _degrees(s))), 0.99, True),
    (lambda image, s: _affine(image, shift=(round(s), 0)), 32.0, True),
    (lambda image, s: _affine(image, shift=(0, round(s))), 32.0, True),
    (lambda image, s: _affine(image, angle=s), 135.0, True),
    (lambda image, s: F.adjust_brightness(image, 1 + s), 0.99, True),
    (lambda image, s: F.adjust_saturation(image, 1 + s), 0.99, True),
    (lambda image, s: F.adjust_contrast(image, 1 + s), 0.99, True),
    (lambda image, s: F.adjust_sharpness(image, 1 + s), 0.99, True),
    (lambda image, s: F.posterize(image, 8 - round(s)), 6.0, False),
    (lambda image, s: F.solarize(image, 255.0 - s), 255.0, False),
    (lambda image, _: F.autocontrast(image), 0.0, False),
    (lambda image, _: F.equalize(image), 0.0, False),
)
