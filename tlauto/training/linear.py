"""Linear heads solved to the optimum: convex, so no learning rate, no epochs and no luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from tlauto.training.lbfgs import minimise
from tlauto.training.rows import Rows

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FOLDS = 5
GRID = tuple(float(10.0**power) for power in np.arange(-6, 1.1, 0.5))
"""L2 penalties that cross-validation chooses from: half of |W|² times this, on top of the mean loss in
units of the loss of a head that says nothing."""

FIRST = 10  # index of the penalty in `GRID` that is tried first: 0.1

TOGETHER = 2**26  # numbers of logits that problems solved side by side may hold: 256 MB


@dataclass(frozen=True)
class Problem:
    """A linear head W (D, K), b (K,) on scaled features, under any mean loss that is convex in logits.

    Attributes:
        features: (N, D), centred.
        targets: (N,) or (N, K), as the task encodes them.
        loss: mean loss of (outputs (n, K), targets of the same rows).
        output: from raw logits (n, K) to what `loss` reads.
        num_outputs: K.
    """

    features: Rows
    targets: torch.Tensor
    loss: Loss
    output: Callable[[torch.Tensor], torch.Tensor]
    num_outputs: int

    def solve(
        self,
        penalties: Sequence[float],
        rows: Sequence[torch.Tensor],
        *,
        tolerance: float = 3e-4,
        start: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Heads (B, D + 1, K), the bias last, of B penalties, each fitted on its own rows.

        All are solved side by side: what costs is one product with the features a step.

        Args:
            tolerance: see `lbfgs.minimise`.
            start: heads (B, D + 1, K) to start from, zeros by default.
        """
        axes = self._axes
        if start is not None:
            start = torch.cat([axes.basis.T @ start[:, :-1], start[:, -1:]], dim=1)
        together = max(1, TOGETHER // (len(self.features) * self.num_outputs))
        parts = []
        for first in range(0, len(penalties), together):
            some = slice(first, first + together)
            begin = None if start is None else start[some]
            parts.append(self._solve(list(penalties[some]), list(rows[some]), tolerance, begin))
        heads = torch.cat(parts)
        return torch.cat([axes.basis @ heads[:, :-1], heads[:, -1:]], dim=1)

    @cached_property
    def _axes(self) -> Axes:
        """The features along their own principal axes."""
        return principal_axes(self.features)

    def _solve(
        self,
        penalties: list[float],
        rows: list[torch.Tensor],
        tolerance: float,
        start: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same in the coordinates of the axes."""
        x = self._axes.rows
        width, outputs = x.features.shape[1], self.num_outputs
        penalty = torch.tensor(penalties, device=x.device)
        nothing = torch.zeros(len(x), outputs, device=x.device)
        unit = torch.stack([self._mean_loss(nothing, r) for r in rows]).clamp_min(1e-12)
        # Steps in units of the curvature along each axis, (B, D + 1, 1): the bias sees the mean of ones.
        bends = self._curvature / unit[:, None, None]
        along = bends * self._axes.squares[:, None] + penalty[:, None, None]
        scale = torch.cat([along, bends], dim=1).rsqrt()

        def objective(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            heads = points.view(len(points), width + 1, outputs) * scale[which]
            weights = heads[:, :width].permute(1, 0, 2).reshape(width, -1)
            products = torch.cat([block @ weights for _, block in x.blocks()])
            logits = products.view(len(x), len(points), outputs) + heads[:, width]
            logits.requires_grad_()
            problems = which.tolist()
            with torch.enable_grad():
                losses = torch.stack(
                    [self._mean_loss(logits[:, i], rows[b]) / unit[b] for i, b in enumerate(problems)]
                )
                (slopes,) = torch.autograd.grad(losses.sum(), logits)
            values = losses.detach() + penalty[which] / 2 * heads[:, :width].square().sum(dim=(1, 2))
            flat = slopes.view(len(x), -1)
            products = torch.stack([block.T @ flat[part] for part, block in x.blocks()]).sum(dim=0)
            down = products.view(width, len(points), outputs).permute(1, 0, 2)
            down = down + penalty[which][:, None, None] * heads[:, :width]
            gradient = torch.cat([down, slopes.sum(dim=0)[:, None]], dim=1) * scale[which]
            return values, gradient.reshape(len(points), -1)

        heads = torch.zeros(len(rows), width + 1, outputs, device=x.device) if start is None else start
        found = minimise(objective, (heads / scale).flatten(1), tolerance=tolerance)
        return found.view_as(heads) * scale

    @cached_property
    def _curvature(self) -> float:
        """The loss' second derivative by one logit, times rows, on average at zero (Hutchinson 1989)."""
        logits = torch.zeros(
            len(self.features), self.num_outputs, device=self.targets.device, requires_grad=True
        )
        signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
        signs = signs.to(logits.device)
        with torch.enable_grad():
            loss = self.loss(self.output(logits), self.targets)
            (slopes,) = torch.autograd.grad(loss, logits, create_graph=True)
            (bends,) = torch.autograd.grad((slopes * signs).sum(), logits, allow_unused=True)
        found = 0.0 if bends is None else float((bends * signs).sum()) / self.num_outputs
        return max(found, 1e-6)

    def _mean_loss(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.loss(self.output(logits[rows]), self.targets[rows])

    def answers(self, head: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Outputs (n, K) of one head (D + 1, K) for some rows."""
        return self.output(self.features.take(rows) @ head[:-1] + head[-1])


@dataclass(frozen=True)
class CrossValidated:
    """What cross-validation found for one penalty.

    Attributes:
        penalty: of `GRID`.
        outputs: (N, K) of each row, by a head that has not seen the row's fold.
        loss: mean of all rows.
        heads: (F, D + 1, K), one without each fold.
    """

    penalty: float
    outputs: torch.Tensor
    loss: float
    heads: torch.Tensor


def cross_validate(problem: Problem, folds: torch.Tensor) -> CrossValidated:
    """Choose the L2 penalty by the mean loss on held-out folds.

    The loss, not the score: on a few hundred images the score ties and jumps. From a strong penalty
    towards weaker ones in strides of two, each solved from the heads before, until the loss rises; then
    the neighbours of the best. Weak penalties take the most steps, and most are never tried.

    Args:
        folds: (N,) number of the fold that each row is held out in.
    """
    found: dict[int, CrossValidated] = {}

    def loss_at(place: int, start: int | None) -> float:
        if place not in found:
            heads = None if start is None else found[start].heads
            found[place] = _held_out(problem, folds, GRID[place], heads)
        return found[place].loss

    loss_at(FIRST, None)
    for stride in (-2, 2, -1, 1):
        best = min(found, key=lambda place: found[place].loss)
        while 0 <= best + stride < len(GRID) and loss_at(best + stride, best) < found[best].loss:
            best += stride
    return min(found.values(), key=lambda one: one.loss)


def _held_out(
    problem: Problem, folds: torch.Tensor, penalty: float, start: torch.Tensor | None
) -> CrossValidated:
    names = torch.unique(folds)
    learned = [torch.nonzero(folds != name)[:, 0] for name in names]
    heads = problem.solve([penalty] * len(names), learned, start=start)
    outputs = torch.empty(len(folds), problem.num_outputs, device=folds.device)
    for head, name in zip(heads, names, strict=True):
        rows = torch.nonzero(folds == name)[:, 0]
        outputs[rows] = problem.answers(head, rows)
    return CrossValidated(penalty, outputs, float(problem.loss(outputs, problem.targets)), heads)


def stratified_folds(targets: Sequence[object], groups: Sequence[int], seed: int) -> torch.Tensor:
    """The fold (N,) that each image is held out in; images of one group share theirs.

    Groups are dealt out in the order of their targets, so every fold gets its share of each class, or
    of each range of values.

    Args:
        targets: comparable: class indices, tuples of them, or values.
        groups: numbers; -1 for an image by itself.
    """
    units: dict[tuple[int, int], list[int]] = {}
    for i, group in enumerate(groups):
        units.setdefault((group, -1) if group >= 0 else (-1, i), []).append(i)
    members = list(units.values())
    order = np.random.default_rng(seed).permutation(len(members)).tolist()
    order.sort(key=lambda unit: targets[members[unit][0]])
    folds = torch.zeros(len(groups), dtype=torch.long)
    for place, unit in enumerate(order):
        folds[members[unit]] = place % FOLDS
    return folds


@dataclass(frozen=True)
class Axes:
    """Features in the coordinates of their principal axes.

    Attributes:
        basis: (D, A), orthonormal.
        rows: the features (N, A) along the axes.
        squares: mean square (A,) along each.
    """

    basis: torch.Tensor
    rows: Rows
    squares: torch.Tensor


def principal_axes(features: Rows) -> Axes:
    """The axes of what the rows span: at most as many as rows.

    The optimum under an L2 penalty lies in their span, and along them the loss of a linear head bends
    about as much as the features scatter, which makes the steps of a minimiser the right ones.
    """
    x, count = features.features, len(features)
    if features.is_small and count < x.shape[1] and bool(x.any()):
        values, vectors = _eigen(x @ x.T)
        is_sound = values > 1e-6 * values[-1]
        values, basis = values[is_sound], x.T @ (vectors[:, is_sound] * values[is_sound].rsqrt())
    else:
        values, basis = _eigen(sum((block.T @ block for _, block in features.blocks()), torch.zeros(())))
    along = (
        Rows(x @ basis, lambda part: part, features.device)
        if features.is_small
        else Rows(x, lambda part: features.norm(part) @ basis, features.device, limit=0)
    )
    return Axes(basis, along, values.clamp_min(0) / count)


def _eigen(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, ascending, and vectors of a symmetric matrix; Apple's GPUs leave that to the CPU."""
    place = matrix.device
    values, vectors = torch.linalg.eigh(matrix.cpu() if place.type == "mps" else matrix)
    return values.to(place), vectors.to(place)
