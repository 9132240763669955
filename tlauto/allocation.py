"""Which freezing strategy the next trial should try: the one that promises the most for what it costs.

Whether training the backbone is worth its time depends on the images, and the trials so far tell. What
it costs is taken from the table here, never from the clock: a search that is run again must propose the
same.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence

from tlauto.contracts import FreezeStrategy, trains_backbone
from tlauto.study import TrialRecord

TRAINING = {"cpu": 100.0}
"""Seconds of a trial that trains the backbone over those of one on cached features, by kind of device.
On two cores 30 to 120 s stand against 0.6 s on 244 photos, 240 to 500 s against 4 s on 1,564."""

TRAINING_ELSEWHERE = 15.0
"""The same on a GPU, where fixed costs weigh more."""

SUFFIX = {"partial": 0.3}
"""Share of that for strategies whose first stages run once (bench/partial.py)."""

SPREAD = 0.03
"""Standard deviation of scores within a strategy, before its trials have shown it."""

CURIOSITY = 0.02
"""Least share of the trials that each strategy gets, so that no early bad luck is final."""

LAST = 2
"""So many trials a slot are the last of a budget."""


def cost_of(strategy: FreezeStrategy, device: str) -> float:
    """What a trial with a strategy costs, in trials on cached features, on a kind of device."""
    if not trains_backbone(strategy):
        return 1.0
    return TRAINING.get(device, TRAINING_ELSEWHERE) * SUFFIX.get(strategy.name, 1.0)


def pick_strategy(
    trials: Sequence[TrialRecord], costs: Mapping[str, float], backbones: Sequence[str], *, seed: str
) -> str:
    """A strategy, drawn in proportion to its expected improvement over its cost.

    Source: Snoek et al. 2012 (arXiv:1206.2944), section 3.2, "expected improvement per second". A
    strategy's scores are taken as normal; before its first trial their mean is the best score so far.

    Args:
        costs: of a trial, by strategy.
        backbones: those that may still be proposed; trials on others say nothing.
        seed: the same, the same pick.
    """
    return _draw(costs, _shares(trials, costs, backbones), seed)


def pick_next(
    trials: Sequence[TrialRecord], costs: Mapping[str, float], backbones: Sequence[str], *, seed: str,
    most: int | None, slots: int,
) -> str:  # fmt: skip
    """As `pick_strategy`, but of the last trials of a budget the dearest come first.

    Those are drawn together and put in order: where several slots work, one that is given a long trial
    last keeps all others waiting. Source: longest processing time first, Graham 1969, "Bounds on
    multiprocessing timing anomalies".

    Args:
        most: trials in all; None when only time limits them.
        slots: trials that run at once; with one, order is nothing to gain by.
    """
    started = sum(t.counts or t.state == "running" for t in trials)
    last = LAST * slots
    if slots == 1 or most is None or not most - last <= started < most:
        return pick_strategy(trials, costs, backbones, seed=f"{seed}/{len(trials)}")
    shares = _shares(trials, costs, backbones)
    drawn = [_draw(costs, shares, f"{seed}/last/{i}") for i in range(last)]
    return sorted(drawn, key=lambda name: -costs[name])[started - (most - last)]


def _draw(costs: Mapping[str, float], shares: Sequence[float] | None, seed: str) -> str:
    names, source = sorted(costs), random.Random(seed)
    return source.choice(names) if shares is None else source.choices(names, weights=shares)[0]


def _shares(
    trials: Sequence[TrialRecord], costs: Mapping[str, float], backbones: Sequence[str]
) -> list[float] | None:
    """The weight of each strategy, by name; None where there is nothing to choose by."""
    names = sorted(costs)
    known = [t for t in trials if t.score is not None and t.params.get("backbone") in backbones]
    scores = [float(t.score) for t in known if t.score is not None]
    if not scores or len(names) == 1:
        return None
    best = max(scores)
    values = {}
    for name in names:
        own = [float(t.score) for t in known if t.params.get("strategy") == name and t.score is not None]
        values[name] = expected_improvement(own, best) / costs[name]
    total = sum(values.values())
    return [max(CURIOSITY, values[name] / total if total > 0 else 1.0) for name in names]


def expected_improvement(scores: Sequence[float], best: float) -> float:
    """How much better than `best` the next of some normal scores will be, on average; at least 0.

    One score of `best` and a deviation of `SPREAD` (of `best`, where it is larger than 1) are believed
    in advance.
    """
    spread = SPREAD * max(1.0, abs(best))
    mean = (best + sum(scores)) / (1 + len(scores))
    scatter = sum((score - mean) ** 2 for score in scores)
    deviation = math.sqrt((spread**2 + scatter) / (1 + len(scores)))
    normal = statistics.NormalDist()
    z = (mean - best) / deviation
    return max(0.0, deviation * (normal.pdf(z) + z * normal.cdf(z)))
