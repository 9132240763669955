"""Many small smooth problems minimised side by side, by L-BFGS."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tlauto import pulse

Objective = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of points (A, P) and the numbers (A,) of their problems: values (A,) and gradients (A, P)."""

HISTORY = 5  # with 10 an optimum takes hardly fewer steps, each with twice as many of these products
HALVINGS = 12
ENOUGH = 1e-4  # Armijo's constant: the share of the predicted decrease that a step must bring


def minimise(
    objective: Objective, start: torch.Tensor, *, steps: int = 200, tolerance: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """The minimisers (B, P) of B independent problems from `start` (B, P), and the values (B,) there.

    Each problem has its own curvature pairs and step length and leaves the batch when it is done, so
    the result does not depend on which problems run beside it, up to rounding. One evaluation of all
    of them is one large product instead of many small ones.

    Args:
        steps: most steps of each problem.
        tolerance: a problem ends when its gradient's largest entry is below this share of the one at
            zero or at `start`, whichever is larger, or when a step no longer lowers its value.

    Source: Liu & Nocedal 1989, "On the limited memory BFGS method", with backtracking to Armijo's
    condition; pairs without positive curvature are left out.
    """
    active = torch.arange(len(start), device=start.device)
    x = start.clone()
    value, gradient = objective(x, active)
    answer, reached = start.clone(), value.clone()
    origin = objective(torch.zeros_like(x), active)[1] if bool(x.any()) else gradient
    limit = tolerance * torch.maximum(_largest(gradient), _largest(origin))
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for _ in range(steps):
        pulse.tick()
        going = _largest(gradient) > limit
        if not bool(going.all()):
            answer[active[~going]], reached[active[~going]] = x[~going], value[~going]
            active, x, value, gradient, limit = (t[going] for t in (active, x, value, gradient, limit))
            pairs = [(s[going], y[going], r[going]) for s, y, r in pairs]
        if not len(active):
            return answer, reached
        new, new_value, new_gradient = _line_search(
            objective, active, x, value, gradient, _direction(gradient, pairs)
        )
        pairs = [*pairs, _pair(new - x, new_gradient - gradient)][-HISTORY:]
        # Where even a tiny step does not help, rounding has the last word.
        limit = torch.where(new_value < value, limit, torch.inf)
        x, value, gradient = new, new_value, new_gradient
    answer[active], reached[active] = x, value
    return answer, reached


def _largest(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.abs().amax(dim=1)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products (A,) of the rows of two (A, P); a `bmm` takes ten times as long."""
    found: torch.Tensor = torch.linalg.vecdot(a, b)
    return found


def _pair(step: torch.Tensor, change: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Step, gradient change and 1 / (their product); 0 where the curvature is not positive."""
    product = _product(step, change)
    lengths = torch.linalg.vector_norm(step, dim=1) * torch.linalg.vector_norm(change, dim=1)
    is_sound = product > 1e-10 * lengths
    return step, change, torch.where(is_sound, 1 / product.clamp_min(1e-30), 0.0)


def _direction(
    gradient: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """The two-loop recursion, problem by problem (A, P)."""
    if not pairs:
        downhill: torch.Tensor = -gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1.0)
        return downhill
    q = gradient.clone()
    weights = []
    for step, change, inverse in reversed(pairs):
        weight = inverse * _product(step, q)
        weights.append(weight)
        q.addcmul_(change, weight[:, None], value=-1)
    step, change, inverse = pairs[-1]
    scale = 1 / (inverse * _product(change, change)).clamp_min(1e-30)
    q *= torch.where(inverse > 0, scale, 1.0)[:, None]
    for (step, change, inverse), weight in zip(pairs, reversed(weights), strict=True):
        q.addcmul_(step, (weight - inverse * _product(change, q))[:, None])
    # Rounding may have left a direction that does not descend.
    descends = _product(q, gradient)[:, None] > 0
    direction: torch.Tensor = torch.where(descends, q, gradient).neg_()
    return direction


def _line_search(
    objective: Objective, active: torch.Tensor, x: torch.Tensor, value: torch.Tensor,
    gradient: torch.Tensor, direction: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The longest of the steps 1, 1/2, 1/4 … that lowers each value enough; no step where none does."""
    slope = _product(direction, gradient)
    tried = x + direction
    found, slopes = objective(tried, active)
    is_enough = found <= value + ENOUGH * slope
    if bool(is_enough.all()):
        return tried, found, slopes  # nearly always
    new, new_value, new_gradient = x.clone(), value.clone(), gradient.clone()
    left = torch.arange(len(x), device=x.device)
    length = 1.0
    for halving in range(HALVINGS):
        if halving:
            tried = x[left] + length * direction[left]
            found, slopes = objective(tried, active[left])
            is_enough = found <= value[left] + ENOUGH * length * slope[left]
        rows = left[is_enough]
        new[rows], new_value[rows], new_gradient[rows] = (
            tried[is_enough], found[is_enough], slopes[is_enough],
        )  # fmt: skip
        left = left[~is_enough]
        if not len(left):
            break
        length /= 2
    return new, new_value, new_gradient
