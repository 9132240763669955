"""Linear heads solved to the optimum: convex, so no learning rate, no epochs and no luck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from tlauto.losses import ByImage, Loss
from tlauto.training.axes import Axes, Stretch, principal_axes
from tlauto.training.lbfgs import HISTORY, minimise
from tlauto.training.model import Rescale
from tlauto.training.rows import BLOCK, Rows
from tlauto.training.threads import threads_for

FOLDS = 5
GRID = tuple(float(10.0**power) for power in np.arange(-6, 1.1, 0.5))
"""L2 penalties that cross-validation chooses from: half of |W|² times this, on top of the mean loss in
units of the loss of a head that says nothing."""

FIRST = 10  # index of the penalty in `GRID` that is tried first: 0.1

TOGETHER = 2**24
"""Numbers that the minimiser may keep of problems solved side by side: 64 MiB."""

STEP = 0.01  # of logits, to measure how a loss bends


class Optimum(NamedTuple):
    """Heads that were solved side by side.

    Attributes:
        heads: (B, K, W + 1) along the problem's axes, the bias last.
        losses: (B,) means over each one's rows, without the penalty.
    """

    heads: torch.Tensor
    losses: torch.Tensor


@dataclass(frozen=True)
class Problem:
    """A linear head W (D, K), b (K,) on scaled features, under any loss that is convex in the logits.

    Features that are not in memory are read in blocks at each step. It is solved along their principal
    axes, where heads are (K, W + 1): `inwards` and `outwards` lead there and back.

    Attributes:
        features: (N, D), centred.
        targets: (N,) or (N, K), as the task encodes them.
        loss: of (outputs (n, K), targets of the same rows).
        num_outputs: K.
        output: from raw logits to what `loss` reads; None where that is the same.
        axes: `principal_axes(features)`, found when they are needed unless they are given.
        others: losses of further heads, one each, which are solved beside that of `loss`; they share its
            function (`ByImage`). Without any, all heads have `loss`.
    """

    features: Rows
    targets: torch.Tensor
    loss: Loss
    num_outputs: int
    output: Rescale | None = None
    axes: Axes | None = None
    others: tuple[Loss, ...] = ()

    def solve(
        self,
        penalties: Sequence[float],
        rows: Sequence[torch.Tensor],
        *,
        tolerance: float = 3e-4,
        start: torch.Tensor | None = None,
    ) -> Optimum:
        """The heads of B penalties, each fitted on its own rows.

        All are solved side by side: what costs is one product with the features a step. With the outputs
        first, products of few rows with many take a third of the time of those of many columns with few.

        Args:
            rows: of each problem, ascending.
            tolerance: see `lbfgs.minimise`.
            start: heads (B, K, W + 1) to start from, zeros by default.
        """
        count, width = self._axes.rows.shape
        together = max(1, TOGETHER // (2 * HISTORY * (width + 1) * self.num_outputs))
        with torch.no_grad(), threads_for(count * width * self.num_outputs * min(together, len(penalties))):
            found = []
            for first in range(0, len(penalties), together):
                some = slice(first, first + together)
                begin = None if start is None else start[some]
                whose = torch.arange(len(penalties), device=self.targets.device)[some]
                found.append(self._solve(list(penalties[some]), rows[some], whose, tolerance, begin))
            return Optimum(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def inwards(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads (B, D + 1, K), the bias last, along the axes (B, K, W + 1)."""
        heads = heads.transpose(1, 2)
        return torch.cat([self._axes.inwards(heads[:, :, :-1]), heads[:, :, -1:]], dim=2)

    def outwards(self, heads: torch.Tensor) -> torch.Tensor:
        """The reverse."""
        heads = torch.cat([self._axes.outwards(heads[:, :, :-1]), heads[:, :, -1:]], dim=2)
        return heads.transpose(1, 2).contiguous()

    def answers(self, heads: torch.Tensor, whose: torch.Tensor | None = None) -> torch.Tensor:
        """Outputs (N, K) of all rows, by the first of the heads (B, K, W + 1).

        Args:
            whose: the head (N,) that answers for each row, instead.
        """
        found = []
        for part, _, logits in self._logits(heads):
            order = torch.arange(logits.shape[2], device=logits.device)
            found.append(logits[0].T if whose is None else logits[whose[part], :, order])
        outputs = torch.cat(found)
        return outputs if self.output is None else self.output(outputs)

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
        rows: Sequence[torch.Tensor],
        whose: torch.Tensor,
        tolerance: float,
        start: torch.Tensor | None,
    ) -> Optimum:
        axes, outputs = self._axes, self.num_outputs
        width, place = axes.rows.shape[1], self.targets.device
        penalty = torch.tensor(penalties, device=place)[:, None, None]
        at_zero, curvature = (found[whose] if self.others else found for found in self._at_zero)
        shares = torch.zeros(len(rows), at_zero.shape[1], device=place)
        for own, share in zip(rows, shares, strict=True):
            share[own] = 1 / len(own)
        unit = (shares * at_zero).sum(dim=1).clamp_min(1e-12)
        shares /= unit[:, None]
        # Steps in units of the curvature, (B, 1, …): the bias sees the mean of ones.
        bends = (curvature / unit)[:, None, None]
        along, beside = (bends * part + penalty for part in (axes.squares, axes.rest))
        inwards = Stretch(axes, along**-0.5, beside**-0.5, bends**-0.5)
        pull = penalty.expand(-1, 1, width + 1).clone()
        pull[:, :, -1] = 0  # no penalty on the bias

        def objective(points: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            everyone = len(which) == len(rows)
            stretch = inwards if everyone else inwards.of(which)
            heads = stretch(points.view(len(points), outputs, width + 1))
            losses, slopes = self._losses(heads, shares if everyone else shares[which], whose[which])
            pulled = heads * (pull if everyone else pull[which])
            values = losses + (heads * pulled).sum(dim=(1, 2)) / 2
            return values, stretch(slopes.add_(pulled)).flatten(1)

        if start is None:
            start = torch.zeros(len(rows), outputs, width + 1, device=place)
        begin = inwards.inverse()(start).flatten(1)
        points, values = minimise(objective, begin, tolerance=tolerance)
        heads = inwards(points.view_as(start))
        return Optimum(heads, (values - (heads.square() * pull).sum(dim=(1, 2)) / 2) * unit)

    def _losses(
        self, heads: torch.Tensor, shares: torch.Tensor, whose: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B,) of heads (B, K, W + 1), each row counted by its share (B, N), and their slopes.

        Args:
            whose: numbers (B,) of the heads.
        """
        count, outputs, _ = heads.shape
        totals: list[torch.Tensor] = []
        for part, block, logits in self._logits(heads):
            losses, slopes = self._by_image(part, logits, whose)
            share = shares[:, part]
            slopes.mul_(share[:, None])
            down = (slopes.view(count * outputs, -1) @ block).view(count, outputs, -1)
            found = [(losses * share).sum(dim=1), torch.cat([down, slopes.sum(dim=2, keepdim=True)], dim=2)]
            totals = [a + b for a, b in zip(totals, found, strict=True)] if totals else found
        return totals[0], totals[1]

    def _logits(self, heads: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Rows in blocks (n, W), as slices, with what heads (B, K, W + 1) give before `output`, (B, K, n)."""
        count, outputs, width = heads.shape
        weights = heads[:, :, :-1].reshape(-1, width - 1)
        for part, block in self._axes.rows.blocks(beside=count * outputs):
            logits = (weights @ block.T).view(count, outputs, -1)
            yield part, block, logits.add_(heads[:, :, -1:])

    def _by_image(
        self, part: slice, logits: torch.Tensor, whose: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses (B, n) of the rows of a slice, for the heads of these numbers, and slopes (B, K, n)."""
        by_image = self._of_all if logits.shape[2] == len(self.targets) else self._of(part)
        if self.others and len(whose) <= len(self.others):
            by_image = by_image.of(whose)
        if self.output is None:
            return by_image(logits)
        mean, std = self.output.mean[:, None], self.output.std[:, None]
        losses, slopes = by_image(logits * std + mean)
        return losses, slopes * std

    def _of(self, part: slice) -> ByImage:
        return side_by_side([loss.by_image(self.targets[part]) for loss in (self.loss, *self.others)])

    @cached_property
    def _of_all(self) -> ByImage:
        return self._of(slice(None))

    @cached_property
    def _at_zero(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of heads that say nothing, one for each loss (L): each row's loss (L, N), and how it bends along
        one logit on average (L,).

        The second derivative's mean diagonal (Hutchinson 1989), by differences of slopes.
        """
        random, each, bends = torch.Generator().manual_seed(0), [], torch.zeros(())
        whose = torch.arange(1 + len(self.others), device=self.targets.device)
        for part, share in self._pieces(len(self.targets)):
            shape = (1, self.num_outputs, len(self.targets[part]))
            signs = torch.randint(0, 2, shape, generator=random).mul_(2).sub_(1).to(whose.device)
            signs = signs.expand(len(whose), -1, -1)
            each.append(self._by_image(part, torch.zeros_like(signs, dtype=torch.float32), whose)[0])
            ahead, behind = (self._by_image(part, step * signs, whose)[1] for step in (STEP, -STEP))
            bends = bends.to(whose.device) + share * ((ahead - behind) * signs).mean(dim=(1, 2)) / (2 * STEP)
        return torch.cat(each, dim=1), bends.clamp_min(1e-6)

    def _pieces(self, count: int) -> Iterator[tuple[slice, float]]:
        """Slices of `count` rows whose outputs are held at a time, and their shares of all."""
        size = max(1, BLOCK // self.num_outputs)
        for start in range(0, count, size):
            end = min(start + size, count)
            yield slice(start, end), (end - start) / count


def side_by_side(each: Sequence[ByImage]) -> ByImage:
    """The losses of several heads, one each, of one function."""
    tensors = zip(*(one.tensors for one in each), strict=True)
    return ByImage(each[0].function, tuple(torch.cat(parts) for parts in tensors))


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
    names, whose = torch.unique(folds, return_inverse=True)
    learned = [torch.nonzero(folds != name)[:, 0] for name in names]

    def held_out(penalty: float, start: torch.Tensor | None) -> tuple[float, torch.Tensor, torch.Tensor]:
        heads = problem.solve([penalty] * len(names), learned, start=start).heads
        outputs = problem.answers(heads, whose)
        return problem.mean_loss(outputs), outputs, heads

    at, tried = FIRST, {FIRST}
    loss, outputs, heads = held_out(GRID[at], None)
    for stride in (-2, 2, -1, 1):
        while 0 <= at + stride < len(GRID) and at + stride not in tried:
            tried.add(at + stride)
            one = held_out(GRID[at + stride], heads)
            if one[0] >= loss:
                break
            (loss, outputs, heads), at = one, at + stride
    return CrossValidated(GRID[at], outputs, loss, problem.outwards(heads))


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
