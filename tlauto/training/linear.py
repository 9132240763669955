"""Linear heads solved to the optimum: convex, so no learning rate, no epochs and no luck."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch.nn import functional

from tlauto.training.axes import Axes, principal_axes
from tlauto.training.lbfgs import HISTORY, minimise
from tlauto.training.rows import BLOCK, Rows
from tlauto.training.threads import threads_for

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FOLDS = 5
GRID = tuple(float(10.0**power) for power in np.arange(-6, 1.1, 0.5))
"""L2 penalties that cross-validation chooses from: half of |W|² times this, on top of the mean loss in
units of the loss of a head that says nothing."""

FIRST = 10  # index of the penalty in `GRID` that is tried first: 0.1

TOGETHER = 2**24
"""Numbers that the minimiser may keep of problems solved side by side: 64 MiB."""


@dataclass(frozen=True)
class Problem:
    """A linear head W (D, K), b (K,) on scaled features, under any mean loss that is convex in logits.

    Features that are not in memory are read in blocks at each step. Losses are means over rows, so those
    of all rows are the blocks' by their shares of the rows.

    Attributes:
        features: (N, D), centred.
        targets: (N,) or (N, K), as the task encodes them.
        loss: mean loss of (outputs (n, K), targets of the same rows).
        output: from raw logits (n, K) to what `loss` reads.
        num_outputs: K.
        axes: `principal_axes(features)`, found when they are needed unless they are given.
    """

    features: Rows
    targets: torch.Tensor
    loss: Loss
    output: Callable[[torch.Tensor], torch.Tensor]
    num_outputs: int
    axes: Axes | None = None

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
            rows: of each problem, ascending.
            tolerance: see `lbfgs.minimise`.
            start: heads (B, D + 1, K) to start from, zeros by default.
        """
        axes = self._axes
        count, width = axes.rows.shape
        together = max(1, TOGETHER // (2 * HISTORY * (width + 1) * self.num_outputs))
        with threads_for(count * width * self.num_outputs * min(together, len(penalties))):
            if start is not None:
                start = start.transpose(1, 2)
                start = torch.cat([axes.inwards(start[:, :, :-1]), start[:, :, -1:]], dim=2)
            parts = []
            for first in range(0, len(penalties), together):
                some = slice(first, first + together)
                begin = None if start is None else start[some]
                parts.append(self._solve(list(penalties[some]), list(rows[some]), tolerance, begin))
            heads = torch.cat(parts)
            heads = torch.cat([axes.outwards(heads[:, :, :-1]), heads[:, :, -1:]], dim=2)
            return heads.transpose(1, 2).contiguous()

    def answers(self, head: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs (n, K) of one head (D + 1, K) for some rows, all by default."""
        batches = self.features.batches(rows, beside=self.num_outputs)
        weights, bias = head[:-1].T, head[-1]
        return torch.cat([self.output(functional.linear(batch, weights, bias)) for batch in batches])

    def mean_loss(self, outputs: torch.Tensor) -> float:
        """The loss of outputs (N, K) of all rows."""
        return float(sum(
            self.loss(outputs[part], self.targets[part]) * share for part, share in self._pieces(len(outputs))
        ))  # fmt: skip

    @cached_property
    def _axes(self) -> Axes:
        return self.axes or principal_axes(self.features)

    def _solve(
        self,
        penalties: list[float],
        rows: list[torch.Tensor],
        tolerance: float,
        start: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same in the coordinates of the axes: heads (B, K, W + 1).

        With the outputs first: products of few rows with many take a third of the time of those of many
        columns with few.
        """
        axes, x = self._axes, self._axes.rows
        width, outputs = x.shape[1], self.num_outputs
        penalty = torch.tensor(penalties, device=x.device)
        unit = torch.stack([self._loss_at_zero(r) for r in rows]).clamp_min(1e-12)
        # Steps in units of the curvature, (B, 1, …): the bias sees the mean of ones.
        bends = self._curvature / unit[:, None, None]
        along, beside = (bends * part + penalty[:, None, None] for part in (axes.squares, axes.rest))
        inwards = tuple(scale**-0.5 for scale in (along, beside, bends))
        pull = penalty[:, None, None].expand(-1, 1, width + 1).clone()
        pull[:, :, -1] = 0  # no penalty on the bias

        def stretched(points: torch.Tensor, scales: Sequence[torch.Tensor]) -> torch.Tensor:
            """Points (A, P) as heads (A, K, W + 1), or gradients by heads as those by points."""
            heads = points.view(len(points), outputs, width + 1)
            lengths, others, biases = scales
            slopes = axes.stretched(heads[:, :, :-1], lengths, others)
            return torch.cat([slopes, heads[:, :, -1:] * biases], dim=2)

        def objective(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            everyone = len(which) == len(rows)
            scales = inwards if everyone else tuple(scale[which] for scale in inwards)
            heads = stretched(points, scales)
            some = rows if everyone else [rows[b] for b in which.tolist()]
            losses, slopes = self._losses(heads, some, unit if everyone else unit[which])
            pulled = heads * (pull if everyone else pull[which])
            values = losses + (heads * pulled).sum(dim=(1, 2)) / 2
            return values, stretched((slopes + pulled).flatten(1), scales).flatten(1)

        if start is None:
            start = torch.zeros(len(rows), outputs, width + 1, device=x.device)
        begin = stretched(start.flatten(1), [1 / scale for scale in inwards])
        return stretched(minimise(objective, begin.flatten(1), tolerance=tolerance), inwards)

    def _losses(
        self, heads: torch.Tensor, rows: Sequence[torch.Tensor], unit: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean losses (B,) of heads (B, K, W + 1) on their rows, in units, and their slopes by the heads."""
        x, (count, outputs, width) = self._axes.rows, heads.shape
        weights = heads[:, :, :-1].reshape(-1, width - 1)
        units = (1 / unit).unbind()
        totals: list[torch.Tensor] = []
        for part, block in x.blocks(beside=count * outputs):
            logits = (weights @ block.T).view(count, outputs, len(block)) + heads[:, :, -1:]
            own = [one.T.contiguous().requires_grad_() for one in logits]
            with torch.enable_grad():
                shares = [self._share(one, some, part) for one, some in zip(own, rows, strict=True)]
                slopes = torch.cat([slope.T for slope in torch.autograd.grad(shares, own, units)])
            found = [torch.stack(shares).detach() / unit, slopes @ block, slopes.sum(dim=1)]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        values, down, sums = totals
        return values, torch.cat([down, sums[:, None]], dim=1).view(count, outputs, width)

    def _share(self, logits: torch.Tensor, rows: torch.Tensor, part: slice) -> torch.Tensor:
        """What the rows within a block, of logits (n, K), add to the mean loss of all of them (m,)."""
        if len(logits) == len(self.targets):
            if len(rows) == len(logits):
                return self.loss(self.output(logits), self.targets)
            return self.loss(self.output(logits.index_select(0, rows)), self.targets.index_select(0, rows))
        ends = torch.tensor([part.start, part.start + len(logits)], device=rows.device)
        first, end = torch.searchsorted(rows, ends).tolist()
        if first == end:
            return logits.sum() * 0
        here = rows[first:end]
        share: float = (end - first) / len(rows)
        taken = logits.index_select(0, here - part.start)
        return share * self.loss(self.output(taken), self.targets.index_select(0, here))

    def _loss_at_zero(self, rows: torch.Tensor) -> torch.Tensor:
        """The mean loss of a head that says nothing."""
        found = torch.zeros((), device=rows.device)
        for part, share in self._pieces(len(rows)):
            here = rows[part]
            nothing = torch.zeros(len(here), self.num_outputs, device=rows.device)
            found = found + self.loss(self.output(nothing), self.targets[here]) * share
        return found

    @cached_property
    def _curvature(self) -> float:
        """The loss' second derivative by one logit, times rows, on average at zero (Hutchinson 1989)."""
        place, random, found = self.targets.device, torch.Generator().manual_seed(0), 0.0
        for part, share in self._pieces(len(self.targets)):
            targets = self.targets[part]
            logits = torch.zeros(len(targets), self.num_outputs, device=place, requires_grad=True)
            signs = (torch.randint(0, 2, logits.shape, generator=random) * 2.0 - 1).to(place)
            with torch.enable_grad():
                loss = self.loss(self.output(logits), targets) * share
                (slopes,) = torch.autograd.grad(loss, logits, create_graph=True)
                (bends,) = torch.autograd.grad((slopes * signs).sum(), logits, allow_unused=True)
            found += 0.0 if bends is None else float((bends * signs).sum()) / self.num_outputs
        return max(found, 1e-6)

    def _pieces(self, count: int) -> Iterator[tuple[slice, float]]:
        """Slices of `count` rows whose outputs are held at a time, and their shares of all."""
        size = max(1, BLOCK // self.num_outputs)
        for start in range(0, count, size):
            end = min(start + size, count)
            yield slice(start, end), (end - start) / count


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
    best, at, tried = _held_out(problem, folds, GRID[FIRST], None), FIRST, {FIRST}
    for stride in (-2, 2, -1, 1):
        while 0 <= at + stride < len(GRID) and at + stride not in tried:
            tried.add(at + stride)
            one = _held_out(problem, folds, GRID[at + stride], best.heads)
            if one.loss >= best.loss:
                break
            best, at = one, at + stride
    return best


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
    return CrossValidated(penalty, outputs, problem.mean_loss(outputs), heads)


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
