"""Which freezing strategy the next trial should try: the one that promises the most for its seconds.

On a CPU a trial that trains the backbone may take a hundred times as long as one on cached features, on
a GPU five times. Whether it is worth that depends on the images, and the trials so far tell.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence

from tlauto.study import TrialRecord

SPREAD = 0.03
"""Standard deviation of scores within a strategy, before its trials have shown it."""

CURIOSITY = 0.05
"""Least share of the trials that each strategy gets, so that no early bad luck is final."""


def pick_strategy(
    trials: Sequence[TrialRecord], costs: Mapping[str, float], backbones: Sequence[str], *, seed: str
) -> str:
    """A strategy, drawn in proportion to its expected improvement per second.

    Source: Snoek et al. 2012 (arXiv:1206.2944), section 3.2, "expected improvement per second". A
    strategy's scores are taken as normal; before its first trial their mean is the best score so far.

    Args:
        costs: seconds of a trial, by strategy.
        backbones: those that may still be proposed; trials on others say nothing.
        seed: the same, the same pick.
    """
    names = sorted(costs)
    known = [t for t in trials if t.score is not None and t.params.get("backbone") in backbones]
    scores = [float(t.score) for t in known if t.score is not None]
    if not scores or len(names) == 1:
        return random.Random(seed).choice(names)
    best = max(scores)
    values = {}
    for name in names:
        own = [float(t.score) for t in known if t.params.get("strategy") == name and t.score is not None]
        values[name] = expected_improvement(own, best) / max(costs[name], 1e-3)
    total = sum(values.values())
    shares = [max(CURIOSITY, values[name] / total if total > 0 else 1.0) for name in names]
    return random.Random(seed).choices(names, weights=shares)[0]


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
