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
class Basis:
    """Orthonormal columns: `left` (D, A), or the product of `left` (D, N) and `right` (N, A).

    Of features that are wider than there are rows the axes are sums of rows. The product is a matrix as
    large as the features, takes as long as finding the axes does, and a few heads do without it.
    """

    left: torch.Tensor
    right: torch.Tensor | None = None

    @property
    def bytes(self) -> int:
        """Of memory that it takes."""
        return self.left.nbytes + (0 if self.right is None else self.right.nbytes)

    def into(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads (B, K, D) along the columns (B, K, A)."""
        turned = heads @ self.left
        return turned if self.right is None else turned @ self.right

    def out_of(self, heads: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        return (heads if self.right is None else heads @ self.right.T) @ self.left.T


@dataclass(frozen=True)
class Axes:
    """Principal axes of features, and the rows that a minimiser multiplies heads with.

    Small features are rotated once, into as many coordinates (W) as there are axes; of others, which are
    read anew at each step, W is D and it is the heads that are rotated.

    Attributes:
        basis: the axes (D, A).
        rows: the features (N, W).
        squares: mean square (A,) along each axis.
        rest: mean square along any direction beside them.
        is_rotated: whether `rows` are.
    """

    basis: Basis
    rows: Rows
    squares: torch.Tensor
    rest: float
    is_rotated: bool

    @property
    def bytes(self) -> int | None:
        """Of memory that they take; None when their rows are mapped."""
        rows = self.rows.bytes
        return None if rows is None else rows + self.basis.bytes

    def inwards(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads (B, K, D) in the coordinates (B, K, W) of the rows."""
        return self.basis.into(heads) if self.is_rotated else heads

    def outwards(self, heads: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        return self.basis.out_of(heads) if self.is_rotated else heads


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
        turned = basis.out_of((self.along - self.beside) * basis.into(weights))
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
        if count < width and bool(x.any()):
            products = x @ x.T
            values, right = _of_rows(products)
            basis, rotated = Basis(x.T, right), products @ right
        else:
            values, vectors = _eigen(x.T @ x)
            basis, rotated = Basis(vectors), x @ vectors
        rows = Rows(Stored((rotated,)), lambda part: part, features.device, limit=2**62)
        return Axes(basis, rows, values.clamp_min(0) / count, 0.0, is_rotated=True)
    if width <= WIDE:
        moments = torch.zeros(width, width, device=features.device)
        for _, block in features.blocks():
            moments += block.T @ block
        values, vectors = _eigen(moments)
        return Axes(Basis(vectors), features, values.clamp_min(0) / count, 0.0, is_rotated=False)
    return _sampled(features)


def _sampled(features: Rows) -> Axes:
    """The axes of some rows; how much scatters along and beside them, of others."""
    count, width = features.shape
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    half = min(SAMPLE, count // 2)
    some = features.take(order[:half])
    basis = some.T @ _of_rows(some @ some.T)[1]
    others = features.take(order[half : 2 * half])
    squares = (others @ basis).square().mean(dim=0)
    total = float(others.square().sum(dim=1).mean())
    rest = max(total - float(squares.sum()), 0.0) / max(1, width - basis.shape[1])
    return Axes(Basis(basis), features, squares, rest, is_rotated=False)


def _of_rows(products: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (A,) and axes, as sums (N, A) of the rows, of fewer rows than features, by products (N, N)."""
    values, vectors = _eigen(products)
    is_sound = values > 1e-6 * values[-1]
    values = values[is_sound]
    return values, vectors[:, is_sound] * values.rsqrt()


def _eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix; Apple's GPUs leave that to the CPU."""
    place = matrix.device
    values, vectors = torch.linalg.eigh(matrix.cpu() if place.type == "mps" else matrix)
    return values.to(place), vectors.to(place)
