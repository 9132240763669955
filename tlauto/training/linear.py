"""Linear heads solved to the optimum: convex, so no learning rate, no epochs and no luck."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tlauto.training.lbfgs import minimise
from tlauto.training.rows import Rows

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FOLDS = 5
GRID = tuple(float(10.0**power) for power in np.arange(-6, 1.1, 0.5))
"""L2 penalties that cross-validation chooses from: half of |W|² times this, on top of the mean loss in
units of the loss of a head that says nothing."""

FIRST = (3, 6, 9, 12)  # indices of `GRID` that are tried first; then the neighbours of the best

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
        tolerance: float = 1e-3,
    ) -> torch.Tensor:
        """Heads (B, D + 1, K), the bias last, of B penalties, each fitted on its own rows.

        All are solved side by side: what costs is one product with the features a step.

        Args:
            tolerance: see `lbfgs.minimise`.
        """
        basis = _row_space(self.features)
        x = self.features if basis is None else _projected(self.features, basis)
        together = max(1, TOGETHER // (len(x) * self.num_outputs))
        parts = []
        for first in range(0, len(penalties), together):
            some = slice(first, first + together)
            parts.append(self._solve(x, list(penalties[some]), list(rows[some]), tolerance))
        heads = torch.cat(parts)
        if basis is None:
            return heads
        return torch.cat([basis @ heads[:, :-1], heads[:, -1:]], dim=1)

    def _solve(
        self, x: Rows, penalties: list[float], rows: list[torch.Tensor], tolerance: float
    ) -> torch.Tensor:
        width, outputs = x.features.shape[1], self.num_outputs
        penalty = torch.tensor(penalties, device=x.device)
        nothing = torch.zeros(len(x), outputs, device=x.device)
        unit = torch.stack([self._mean_loss(nothing, r) for r in rows]).clamp_min(1e-12)

        def objective(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            heads = points.view(len(points), width + 1, outputs)
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
            gradient = torch.cat([down, slopes.sum(dim=0)[:, None]], dim=1)
            return values, gradient.reshape(len(points), -1)

        start = torch.zeros(len(rows), (width + 1) * outputs, device=x.device)
        return minimise(objective, start, tolerance=tolerance).view(len(rows), width + 1, outputs)

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
    """

    penalty: float
    outputs: torch.Tensor
    loss: float


def cross_validate(problem: Problem, folds: torch.Tensor) -> CrossValidated:
    """Choose the L2 penalty by the mean loss on held-out folds.

    The loss, not the score: on a few hundred images the score ties and jumps. A coarse grid comes
    first, then the neighbours of the best until it stays the best.

    Args:
        folds: (N,) number of the fold that each row is held out in.
    """
    found: dict[int, CrossValidated] = {}
    wanted = list(FIRST)
    while wanted:
        found |= dict(zip(wanted, _held_out(problem, folds, [GRID[i] for i in wanted]), strict=True))
        best = min(found, key=lambda i: found[i].loss)
        wanted = [i for i in (best - 1, best + 1) if 0 <= i < len(GRID) and i not in found]
    return found[best]


def _held_out(problem: Problem, folds: torch.Tensor, penalties: Sequence[float]) -> list[CrossValidated]:
    names = torch.unique(folds)
    held_out = [torch.nonzero(folds == name)[:, 0] for name in names]
    learned = [torch.nonzero(folds != name)[:, 0] for name in names]
    heads = problem.solve([p for p in penalties for _ in names], learned * len(penalties))
    found = []
    for penalty, own in zip(penalties, torch.split(heads, len(names)), strict=True):
        outputs = torch.empty(len(folds), problem.num_outputs, device=folds.device)
        for head, rows in zip(own, held_out, strict=True):
            outputs[rows] = problem.answers(head, rows)
        loss = float(problem.loss(outputs, problem.targets))
        found.append(CrossValidated(penalty, outputs, loss))
    return found


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


def _row_space(features: Rows) -> torch.Tensor | None:
    """An orthonormal basis (D, N) of what the rows span, when that is much smaller than D.

    The optimum under an L2 penalty lies in it, so nothing is lost.
    """
    if 2 * len(features) > features.features.shape[1] or not features.is_small:
        return None
    basis: torch.Tensor = torch.linalg.qr(features.features.T).Q
    return basis


def _projected(features: Rows, basis: torch.Tensor) -> Rows:
    return Rows(features.features @ basis, lambda rows: rows, features.device)
