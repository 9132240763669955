"""Fixtures that many tests share: small real images, and the folders that hold real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 200), "grey": (128, 128, 128)}


def write_patch(path: Path, colour: tuple[int, int, int], *, seed: int, size: int = 48) -> None:
    """A noisy colour patch with a random bright square: easy to classify, never twice the same."""
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.normal(0, 25, (size, size, 3))
    row, column = rng.integers(0, size - 12, 2)
    pixels[row : row + 12, column : column + 12] += rng.uniform(30, 90)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="session")
def make_patches() -> Callable[..., Path]:
    """Write a folder of class folders of colour patches: `make_patches(folder, per_class=14)`."""

    def make(root: Path, *, per_class: int = 14, classes: int = 3, size: int = 48) -> Path:
        for index, (label, colour) in enumerate(list(COLOURS.items())[:classes]):
            for i in range(per_class):
                write_patch(root / label / f"{label}{i:03d}.png", colour, seed=1000 * index + i, size=size)
        return root

    return make


@pytest.fixture
def patches(tmp_path: Path, make_patches: Callable[..., Path]) -> Callable[..., Path]:
    """Make a folder of class folders of colour patches: `patches(per_class=12, classes=3)`."""

    def make(*, name: str = "patches", per_class: int = 12, **sizes: int) -> Path:
        return make_patches(tmp_path / name, per_class=per_class, **sizes)

    return make


@pytest.fixture(scope="session")
def bench_data() -> Path:
    """The folder of real datasets; tests that use it are skipped when TLAUTO_BENCH_DATA is unset."""
    return _folder("TLAUTO_BENCH_DATA", "real datasets")


@pytest.fixture(scope="session")
def real_weights() -> Path:
    """The folder of real weights; tests that use it are skipped when TLAUTO_WEIGHTS is unset."""
    return _folder("TLAUTO_WEIGHTS", "real pretrained weights")


def _folder(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value or not Path(value).is_dir():
        pytest.skip(f"{variable} does not name a folder of {what}")
    return Path(value)
