"""Crop, flip, rotate and shear in one resampling: what torchvision does one after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from tlauto.training.geometry import SHRINK, crop, flip, resample, turn

SIZE = 32
BILINEAR = F.InterpolationMode.BILINEAR


def smooth(count: int, edge: int) -> torch.Tensor:
    """Images (count, 3, edge, edge) uint8 whose details are many pixels wide."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, (edge, edge), mode="bicubic") * 255).clamp(0, 255).byte()


def moved(images: torch.Tensor, matrices: np.ndarray, size: int = SIZE) -> torch.Tensor:
    """Images (N, 3, R, R) uint8 through `resample`."""
    rows = torch.from_numpy(matrices[:, :2].astype(np.float32)).expand(len(images), 2, 3)
    return resample(images.permute(0, 2, 3, 1), rows, size)


def ones(count: int = 1) -> np.ndarray:
    return np.ones(count)


WHOLE = crop(0 * ones(), 0 * ones(), ones(), ones())


def test_nothing_changes_nothing() -> None:
    images = smooth(3, SIZE)
    assert torch.allclose(moved(images, WHOLE), images.float(), atol=1e-3)


def test_a_flip_is_torchvisions() -> None:
    images = smooth(2, SIZE)
    found = moved(images, flip(np.array([True, False])))
    assert torch.allclose(found[0], F.horizontal_flip(images[0]).float(), atol=1e-3)
    assert torch.allclose(found[1], images[1].float(), atol=1e-3)


@pytest.mark.parametrize(("right", "down"), [(5, 0), (-3, 0), (0, 7), (-31, 2)])
def test_a_shift_by_whole_pixels_is_torchvisions(right: int, down: int) -> None:
    images = smooth(1, SIZE)
    found = moved(images, turn(right=right / SIZE * ones(), down=down / SIZE))
    expected = F.affine(images, angle=0, translate=[right, down], scale=1.0, shear=[0, 0])
    white = torch.full_like(images, 255)
    covered = F.affine(white, angle=0, translate=[right, down], scale=1.0, shear=[0, 0]).float() / 255
    assert torch.allclose(found * covered, expected.float(), atol=1e-2)
    # The outermost pixels are there twice; what is further out is black.
    beyond = torch.nn.functional.max_pool2d(covered, 3, stride=1, padding=1) == 0
    assert beyond.any() and (found[beyond] == 0).all()


@pytest.mark.parametrize(
    ("angle", "across", "along"),
    [(30, 0, 0), (-135, 0, 0), (0, 40, 0), (0, -40, 0), (0, 0, 25), (9, -7, 4), (-120, 20, -30)],
)
def test_rotation_and_shear_are_torchvisions(angle: float, across: float, along: float) -> None:
    images = smooth(1, SIZE)
    slopes = {"across": math.tan(math.radians(across)), "along": math.tan(math.radians(along))}
    found = moved(images, turn(math.radians(angle) * ones(), **slopes))

    def theirs(image: torch.Tensor) -> torch.Tensor:
        shear = [float(across), float(along)]
        return F.affine(image, angle=angle, translate=[0, 0], scale=1.0, shear=shear, interpolation=BILINEAR)

    # At the border theirs begins to fade to black a pixel before ours.
    coverage = theirs(torch.full_like(images, 255)).float()
    assert (coverage == 255).float().mean() > 0.3
    assert (found - theirs(images).float()).abs()[coverage == 255].max() <= 0.51  # theirs is rounded
    beyond = torch.nn.functional.max_pool2d(coverage, 5, stride=1, padding=2) == 0
    assert (found[beyond] == 0).all()


@pytest.mark.parametrize(
    "box", [(0, 0, 40, 40), (4, 4, 32, 32), (8, 3, 24, 30), (0, 20, 20, 20), (11, 0, 29, 37)]
)
def test_a_crop_is_torchvisions_up_to_its_antialiasing(box: tuple[int, int, int, int]) -> None:
    left, top, width, height = box
    images = smooth(2, 40)
    matrices = crop(*(np.array([number / 40]) for number in box))
    expected = F.resized_crop(images, top, left, height, width, [SIZE, SIZE], antialias=True).float()
    # Theirs stays within the crop; at its border ours sees the pixel beside it.
    difference = (moved(images, matrices) - expected).abs()[..., 1:-1, 1:-1]
    assert difference.mean() < 1  # of 255; theirs is rounded, a quarter on average
    assert difference.max() < 5


def test_movements_compose_as_if_done_one_after_the_other() -> None:
    images = smooth(1, 40)
    box = (0.2, 0.1, 0.7, 0.8)
    whole = crop(*(np.array([number]) for number in box)) @ flip(np.array([True]))
    found = moved(images, whole @ turn(math.radians(20) * ones()))
    once = F.horizontal_flip(F.resized_crop(images, 4, 8, 32, 28, [SIZE, SIZE]))
    expected = F.affine(once, angle=20, translate=[0, 0], scale=1.0, shear=[0, 0], interpolation=BILINEAR)
    is_inside = F.affine(torch.full_like(once, 255), 20, [0, 0], 1.0, [0, 0], interpolation=BILINEAR) == 255
    assert (found - expected.float()).abs()[is_inside].mean() < 1


def test_a_crop_at_the_edge_of_the_window_has_no_dark_border() -> None:
    white = torch.full((1, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    corner = crop(0.4 * ones(), 0.4 * ones(), 0.6 * ones(), 0.6 * ones())
    assert torch.allclose(moved(white, corner), torch.full((1, 3, SIZE, SIZE), 255.0), atol=1e-3)
    assert torch.allclose(moved(white, WHOLE), torch.full((1, 3, SIZE, SIZE), 255.0), atol=1e-3)


def test_beyond_the_window_it_is_black() -> None:
    white = torch.full((1, 3, SIZE, SIZE), 255, dtype=torch.uint8)
    found = moved(white, turn(math.radians(45) * ones()))
    assert (found[..., 0, 0] == 0).all() and (found[..., 16, 16] > 254).all()


def test_a_window_much_larger_than_the_crop_does_not_alias() -> None:
    stripes = torch.zeros(1, 3, 4 * SIZE, 4 * SIZE, dtype=torch.uint8)
    assert SHRINK < 4
    stripes[..., ::4] = 255  # every fourth column: without antialiasing, all or nothing of them is seen
    found = moved(stripes, WHOLE)
    assert found.mean().item() == pytest.approx(255 / 4, rel=0.05)
    assert found[..., 2:-2].std() < 32


def test_an_image_is_the_same_whatever_its_batch() -> None:
    images = smooth(6, 40)
    random = np.random.default_rng(0)
    sides = random.uniform(0.5, 1, (2, 6))
    matrices = crop(random.uniform(0, 1, 6) * (1 - sides[0]), 0 * ones(6), *sides)
    matrices = matrices @ turn(random.uniform(-2, 2, 6), across=random.uniform(-1, 1, 6))
    together = moved(images, matrices)
    for i in range(6):
        assert torch.equal(moved(images[i : i + 1], matrices[i : i + 1])[0], together[i])
