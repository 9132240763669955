"""Coordinates in which the loss of a linear head bends about equally in all directions.

Along the principal axes of the features it bends about as much as they scatter, which makes the steps
of a minimiser the right ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

WIDE = 2048
"""Features of which, when they are not in memory, all axes are found: a matrix of 16 MiB. Of more, the
axes of a sample are, and the loss is taken to bend equally in all directions beside those."""

SAMPLE = 512  # images


@dataclass(frozen=True)
class Axes:
    """Principal axes of features, and the rows that a minimiser multiplies heads with.

    Small features are rotated once, into as many coordinates (W) as there are axes; of others, which are
    read anew at each step, W is D and it is the heads that are rotated.

    Attributes:
        basis: (D, A), orthonormal.
        rows: the features (N, W).
        squares: mean square (A,) along each axis.
        rest: mean square along any direction beside them.
        is_rotated: whether `rows` are.
    """

    basis: torch.Tensor
    rows: Rows
    squares: torch.Tensor
    rest: float
    is_rotated: bool

    @property
    def bytes(self) -> int | None:
        """Of memory that they take; None when their rows are mapped."""
        rows = self.rows.bytes
        return None if rows is None else rows + self.basis.nbytes

    def inwards(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads (B, K, D) in the coordinates (B, K, W) of the rows."""
        return heads @ self.basis if self.is_rotated else heads

    def outwards(self, heads: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        return heads @ self.basis.T if self.is_rotated else heads


@dataclass(frozen=True)
class Stretch:
    """Makes heads (B, K, W + 1), the bias last, longer or shorter by the direction that their weights have.

    A symmetric map, so gradients are stretched in the same way.

    Attributes:
        along, beside: by how much along the axes (B, 1, A) and beside them (B, 1, 1).
        bias: the same for the bias (B, 1, 1).
    """

    axes: Axes
    along: torch.Tensor
    beside: torch.Tensor
    bias: torch.Tensor

    def __call__(self, heads: torch.Tensor) -> torch.Tensor:
        """The stretched heads, or gradients."""
        if self.axes.is_rotated:
            return heads * self._whole
        weights, basis = heads[:, :, :-1], self.axes.basis
        turned = ((self.along - self.beside) * (weights @ basis)) @ basis.T
        return torch.cat([self.beside * weights + turned, heads[:, :, -1:] * self.bias], dim=2)

    def of(self, which: torch.Tensor) -> Stretch:
        """That of some of the heads (b,)."""
        return Stretch(self.axes, self.along[which], self.beside[which], self.bias[which])

    def inverse(self) -> Stretch:
        """The way back."""
        return Stretch(self.axes, 1 / self.along, 1 / self.beside, 1 / self.bias)

    @cached_property
    def _whole(self) -> torch.Tensor:
        return torch.cat([self.along, self.bias], dim=2)


def principal_axes(features: Rows) -> Axes:
    """The axes of what the rows span: at most as many as rows.

    The optimum under an L2 penalty lies in their span.
    """
    x, (count, width) = features.whole, features.shape
    if x is not None:
        is_wide = count < width and bool(x.any())
        values, basis = _of_rows(x) if is_wide else _eigen(x.T @ x)
        rotated = Rows(Stored((x @ basis,)), lambda part: part, features.device, limit=2**62)
        return Axes(basis, rotated, values.clamp_min(0) / count, 0.0, is_rotated=True)
    if width <= WIDE:
        moments = torch.zeros(width, width, device=features.device)
        for _, block in features.blocks():
            moments += block.T @ block
        values, basis = _eigen(moments)
        return Axes(basis, features, values.clamp_min(0) / count, 0.0, is_rotated=False)
    return _sampled(features)


def _sampled(features: Rows) -> Axes:
    """The axes of some rows; how much scatters along and beside them, of others."""
    count, width = features.shape
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    half = min(SAMPLE, count // 2)
    _, basis = _of_rows(features.take(order[:half]))
    others = features.take(order[half : 2 * half])
    squares = (others @ basis).square().mean(dim=0)
    total = float(others.square().sum(dim=1).mean())
    rest = max(total - float(squares.sum()), 0.0) / max(1, width - basis.shape[1])
    return Axes(basis, features, squares, rest, is_rotated=False)


def _of_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (A,) and axes (D, A) of fewer rows (N, D) than features, by their products."""
    values, vectors = _eigen(x @ x.T)
    is_sound = values > 1e-6 * values[-1]
    values = values[is_sound]
    return values, x.T @ (vectors[:, is_sound] * values.rsqrt())


def _eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix; Apple's GPUs leave that to the CPU."""
    place = matrix.device
    values, vectors = torch.linalg.eigh(matrix.cpu() if place.type == "mps" else matrix)
    return values.to(place), vectors.to(place)
