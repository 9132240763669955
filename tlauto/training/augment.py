"""Augmentation in four levels, a batch at a time, each image with draws of its own.

The draws are made on the host (`Augment.plan`), where they are the same for every device; the pixels are
changed where the windows are. Whatever moves pixels is one resampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tlauto.contracts import ImageInput
from tlauto.training.draws import uniforms
from tlauto.training.geometry import crop, flip, resample, turn
from tlauto.training.operators import TRIVIAL, Operator, brightness, contrast, saturation

Draws = dict[str, np.ndarray]

# Each level draws all of them, so that an image's crop is the same whatever else is done to it.
DRAWS = (
    "area", "ratio", "left", "top", "flip", "angle", "across", "along", "brightness", "contrast",
    "saturation", "operator", "strength", "sign",
)  # fmt: skip


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


@dataclass(frozen=True)
class Plan:
    """What happens to each image of a batch.

    Attributes:
        matrices: (B, 2, 3) float32, where each place of the result lies in the window (`geometry`).
        changes: operators of colour in their order, and of how many images.
        rows: (M,) int64, those images, operator after operator; ascending within each.
        strengths: (M,) float32, how much each of them changes.
    """

    matrices: torch.Tensor
    changes: tuple[tuple[Operator, int], ...]
    rows: torch.Tensor
    strengths: torch.Tensor

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Plan:
        """The same with its tensors moved elsewhere."""
        matrices, rows, strengths = map(move, (self.matrices, self.rows, self.strengths))
        return replace(self, matrices=matrices, rows=rows, strengths=strengths)


class Augment:
    """From windows (B, R, R, 3) uint8 to augmented crops (B, 3, size, size) float32."""

    def __init__(self, level: str, image_input: ImageInput) -> None:
        self.level = LEVELS[level]
        self.input = image_input

    def plan(self, keys: np.ndarray) -> Plan | None:
        """What happens to images with these keys (B, W) uint64, of which each decides one image's draws.

        None is the centre crop.
        """
        if self.level == Level():
            return None
        draws = dict(zip(DRAWS, uniforms(keys, len(DRAWS)).T, strict=True))
        matrices, found = self._movements(draws), list(self._changes(draws))
        return Plan(
            torch.from_numpy(matrices[:, :2].astype(np.float32)),
            tuple((operator, len(rows)) for operator, rows, _ in found),
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(rows for _, rows, _ in found)])),
            torch.from_numpy(np.concatenate([[], *(s for _, _, s in found)]).astype(np.float32)),
        )

    def __call__(self, windows: torch.Tensor, plan: Plan) -> torch.Tensor:
        """Crops float32 from 0 to 255, on the device that windows and plan are on."""
        images = resample(windows, plan.matrices, self.input.size)
        counts = [count for _, count in plan.changes]
        parts = torch.split(plan.rows, counts), torch.split(plan.strengths, counts)
        for (change, count), rows, strengths in zip(plan.changes, *parts, strict=True):
            if count == len(images):
                images = change(images, strengths)
            else:
                images[rows] = change(images[rows], strengths)
        return images

    def _movements(self, draws: Draws) -> np.ndarray:
        """Matrices (B, 3, 3) of all that moves pixels."""
        moved: np.ndarray = _random_crop(self.level, draws) @ flip(draws["flip"] < 0.5)
        if self.level.shear:
            most = math.radians(self.level.shear)
            angle, across, along = (most * _signed(draws[name]) for name in ("angle", "across", "along"))
            moved = moved @ turn(angle, across=np.tan(across), along=np.tan(along))
        if self.level.trivial:
            moved = moved @ self._trivial_turn(draws)
        return moved

    def _trivial_turn(self, draws: Draws) -> np.ndarray:
        """TrivialAugment's operators that move pixels; shifts are whole pixels of the result."""
        kinds, strengths = trivial_draws(draws)
        names = np.array([operator.name for operator in TRIVIAL])[kinds]

        def of(name: str) -> np.ndarray:
            return np.where(names == name, strengths, 0.0)

        right, down = np.round(of("shift_x")) / self.input.size, np.round(of("shift_y")) / self.input.size
        angle, across, along = np.radians(of("rotate")), of("shear_x"), of("shear_y")
        return turn(angle, across=across, along=along, right=right, down=down)

    def _changes(self, draws: Draws) -> Iterator[tuple[Operator, np.ndarray, np.ndarray]]:
        """Operators of colour, each with the images (n,) that it changes and its strengths (n,)."""
        everything = np.arange(len(draws["area"]))
        if self.level.colour:
            for change in (brightness, contrast, saturation):
                yield change, everything, self.level.colour * _signed(draws[change.__name__])
        if self.level.trivial:
            kinds, strengths = trivial_draws(draws)
            for kind, operator in enumerate(TRIVIAL):
                rows = everything[kinds == kind]
                if operator.change and len(rows):
                    yield operator.change, rows, strengths[rows]


def trivial_draws(draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """The place (B,) in `TRIVIAL` of each image's operator, chosen evenly, and its strength (B,)."""
    kinds = (draws["operator"] * len(TRIVIAL)).astype(np.int64)
    strongest = np.array([operator.strongest for operator in TRIVIAL])
    is_signed = np.array([operator.is_signed for operator in TRIVIAL])
    sign = np.where(is_signed[kinds] & (draws["sign"] < 0.5), -1.0, 1.0)
    return kinds, sign * strongest[kinds] * draws["strength"]


def mixup(
    images: torch.Tensor, targets: torch.Tensor, alpha: float, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) and soft targets (N, K), each mixed with the next of the batch.

    One mixing weight, drawn from Beta(alpha, alpha), serves the whole batch.
    """
    weight = float(random.beta(alpha, alpha))
    return images.lerp(images.roll(1, 0), 1 - weight), targets.lerp(targets.roll(1, 0), 1 - weight)


def _random_crop(level: Level, draws: Draws) -> np.ndarray:
    """A random part of the window, zoomed to the whole: zoom and shift in one."""
    area = level.area + (1 - level.area) * draws["area"]
    ratio = level.ratio ** _signed(draws["ratio"])
    width, height = np.minimum(1, np.sqrt(area * ratio)), np.minimum(1, np.sqrt(area / ratio))
    return crop(draws["left"] * (1 - width), draws["top"] * (1 - height), width, height)


def _signed(draws: np.ndarray) -> np.ndarray:
    """From [0, 1) to [-1, 1)."""
    return 2 * draws - 1
