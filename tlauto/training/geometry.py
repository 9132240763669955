"""Crop, flip, rotate and shear a whole batch in one resampling.

A movement is a matrix (N, 3, 3) from a place in the result to the place in the image that is seen there.
Places are (x, y, 1) with x and y from -1 to 1, the outer edges of the first and the last pixel. So
`crop @ flip @ turn` is what first crops, then flips, then turns.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

SHRINK = 1.5
"""Most pixels of a window that one pixel of the result steps over.

Bilinear interpolation reads two pixels a side, so it skips none below a step of 2. The steps there are
alias little: no crop is larger than its window, whose side is 1.15 times that of the result for most
networks, where photographs differ by half a level of 255 from an antialiased crop on average; rounding
alone is half of that. A larger window is shrunk to this bound first, with antialiasing.
"""


def crop(left: np.ndarray, top: np.ndarray, width: np.ndarray, height: np.ndarray) -> np.ndarray:
    """A part of the image; all (N,), as shares of its side."""
    return _matrices(width, 0, 2 * left + width - 1, 0, height, 2 * top + height - 1)


def flip(is_flipped: np.ndarray) -> np.ndarray:
    """Left and right exchanged where `is_flipped` (N,)."""
    return _matrices(np.where(is_flipped, -1.0, 1.0), 0, 0, 0, 1, 0)


def turn(
    angle: np.ndarray | float = 0.0,
    *,
    across: np.ndarray | float = 0.0,
    along: np.ndarray | float = 0.0,
    right: np.ndarray | float = 0.0,
    down: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Sheared, rotated and shifted about the centre, in this order; at least one of them is (N,).

    Args:
        angle: clockwise, radians.
        across, along: slopes of the shear: what lies above the centre moves right, what lies to the
            left of it moves down.
        right, down: shift, in shares of the side.

    These are torchvision's conventions (`affine`), of which this is the inverse.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    shear = _matrices(1, across, 0, 0, 1, 0) @ _matrices(1, 0, 0, along, 1, 0)
    shift = _matrices(1, 0, -2 * np.asarray(right), 0, 1, -2 * np.asarray(down))
    turned: np.ndarray = shear @ _matrices(cos, sin, 0, -sin, cos, 0) @ shift
    return turned


def resample(windows: torch.Tensor, matrices: torch.Tensor, size: int) -> torch.Tensor:
    """Moved images (N, 3, size, size) float32 from 0 to 255 of windows (N, R, R, 3) uint8.

    Args:
        matrices: (N, 2, 3) float32, the first two rows of movements.

    What lies more than a pixel beyond the window is black.
    """
    if windows.shape[1] > SHRINK * size:
        windows = _shrunk(windows, math.ceil(SHRINK * size))
    images = _framed(windows)  # (N, 3, R + 2, R + 2)
    grid = _grid(matrices * (windows.shape[1] / images.shape[-1]), size)
    return nn.functional.grid_sample(images, grid, align_corners=False)


def _shrunk(windows: torch.Tensor, edge: int) -> torch.Tensor:
    """The windows (N, edge, edge, 3) float32."""
    images = windows.permute(0, 3, 1, 2).float()
    images = nn.functional.interpolate(images, (edge, edge), mode="bilinear", antialias=True)
    return images.permute(0, 2, 3, 1)


def _framed(windows: torch.Tensor) -> torch.Tensor:
    """Images (N, 3, R + 2, R + 2) float32 with the outermost pixels twice.

    Between the centre of the last pixel and the window's edge there is else only black to mix it with.
    """
    count, edge = windows.shape[:2]
    framed = torch.empty(count, edge + 2, edge + 2, 3, device=windows.device)
    framed[:, 1:-1, 1:-1] = windows
    framed[:, 0], framed[:, -1] = framed[:, 1], framed[:, -2]
    framed[:, :, 0], framed[:, :, -1] = framed[:, :, 1], framed[:, :, -2]
    return framed.permute(0, 3, 1, 2)


def _grid(matrices: torch.Tensor, size: int) -> torch.Tensor:
    """The places (N, size, size, 2) to look at.

    `affine_grid` multiplies matrices by an algorithm that depends on the batch; these sums do not.
    """
    line = (torch.arange(size, device=matrices.device) * 2 + 1) / size - 1
    grid = matrices.new_empty(len(matrices), size, size, 2)
    for axis in (0, 1):
        x, y, shift = matrices[:, axis].unbind(1)
        rows, columns = y[:, None] * line, x[:, None] * line + shift[:, None]
        torch.add(rows[:, :, None], columns[:, None, :], out=grid[..., axis])
    return grid


def _matrices(*numbers: np.ndarray | float) -> np.ndarray:
    """Matrices (N, 3, 3) of the numbers, each (N,) or for all, of their first two rows."""
    cells = np.broadcast_arrays(*numbers, 0.0, 0.0, 1.0)
    return np.stack(cells, axis=-1).reshape(-1, 3, 3)
