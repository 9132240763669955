"""Batched changes of colour: torchvision's, image by image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from tlauto.training.operators import TRIVIAL, Operator

Single = Callable[[torch.Tensor, float], torch.Tensor]

TORCHVISION: dict[str, Single] = {
    "brightness": lambda image, s: F.adjust_brightness(image, 1 + s),
    "saturation": lambda image, s: F.adjust_saturation(image, 1 + s),
    "contrast": lambda image, s: F.adjust_contrast(image, 1 + s),
    "sharpness": lambda image, s: F.adjust_sharpness(image, 1 + s),
    "posterize": lambda image, s: F.posterize(image, 8 - round(s)),
    "solarize": lambda image, s: F.solarize(image, 255.0 - s),
    "autocontrast": lambda image, _: F.autocontrast(image),
    "equalize": lambda image, _: F.equalize(image),
}
COLOURS = [operator for operator in TRIVIAL if operator.change]
SHARES = torch.tensor([-1.0, -0.6, -0.1, 0.0, 0.05, 0.3, 0.7, 1.0])


@pytest.fixture
def images() -> torch.Tensor:
    """Eight images (8, 3, 40, 36) uint8, dark to bright; one is of one colour."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 5, 5, generator=random) * torch.linspace(0.3, 1, 8).view(8, 1, 1, 1)
    smooth = torch.nn.functional.interpolate(coarse, (40, 36), mode="bilinear") * 240
    noisy = (smooth + 15 * torch.rand(smooth.shape, generator=random)).byte()
    noisy[3] = 117
    return noisy


def change_of(operator: object) -> Operator:
    change = getattr(operator, "change", None)
    assert change is not None
    return change  # type: ignore[no-any-return]


def test_every_change_is_compared() -> None:
    assert {operator.name for operator in COLOURS} == set(TORCHVISION)


@pytest.mark.parametrize("operator", COLOURS, ids=lambda operator: operator.name)
def test_a_batch_is_changed_as_torchvision_changes_each_image(operator: object, images: torch.Tensor) -> None:
    name, strongest = operator.name, operator.strongest  # type: ignore[attr-defined]
    is_signed = operator.is_signed  # type: ignore[attr-defined]
    strengths = strongest * (SHARES if is_signed else SHARES.abs())
    ours = change_of(operator)(images.float(), strengths)
    pairs = zip(images, strengths.tolist(), strict=True)
    theirs = torch.stack([TORCHVISION[name](image, strength) for image, strength in pairs])
    assert ours.dtype == torch.float32 and ours.shape == images.shape
    assert ours.min() >= 0 and ours.max() <= 255
    # torchvision drops what is behind the point; a rounding error decides where that is next to nothing.
    difference = (ours.floor() - theirs.float()).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01
    assert not torch.equal(theirs, images), "it must change something"


@pytest.mark.parametrize("operator", COLOURS, ids=lambda operator: operator.name)
def test_an_image_is_changed_the_same_whatever_its_batch(operator: object, images: torch.Tensor) -> None:
    change, strengths = change_of(operator), 0.9 * SHARES.abs()
    together = change(images.float() + 0.3, strengths)
    alone = [change(images[i : i + 1].float() + 0.3, strengths[i : i + 1])[0] for i in range(8)]
    assert torch.equal(together, torch.stack(alone))


def test_an_image_of_one_colour_is_not_stretched_to_noise() -> None:
    resampled = 100 + 1e-4 * torch.rand(1, 3, 8, 8)
    for operator in COLOURS:
        if operator.name in ("autocontrast", "equalize", "contrast", "sharpness"):
            changed = change_of(operator)(resampled.clone(), torch.tensor([0.99]))
            assert np.ptp(changed.numpy()) < 0.01, operator.name
