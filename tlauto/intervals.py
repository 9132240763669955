"""Intervals of 95 % for metrics: Wilson's for shares, otherwise the bootstrap over images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from tlauto.metrics import Metric

    Array = np.ndarray[Any, Any]

RESAMPLES = 1000
"""Bootstrap resamples; rank metrics on much data take fewer, never under 100."""
_RANK_BUDGET = 4e7  # values that the resamples of one rank metric may visit: about 1 s on a core
_CHUNK = 2_000_000  # resampled weights held at once: 16 MB


def interval(
    metric: Metric, value: float, targets: Array, predictions: Array, *, seed: int
) -> tuple[float, float]:
    """The 95 % interval of a metric that has this value: Wilson's for accuracy and for a perfect share of
    classes, otherwise the bootstrap percentiles over images."""
    import numpy as np

    if metric.name == "accuracy":
        return wilson(value, len(targets))
    if value == 1 and "regression" not in metric.tasks:
        # Resamples of a perfect result are all perfect; Wilson says what so many images can prove.
        return wilson(value, len(targets))
    alike = _alike(targets, predictions) if metric.counts else None
    if alike is not None:
        first, shares = alike
        weights = np.random.default_rng(seed).multinomial(len(targets), shares, size=RESAMPLES)
        return middle(metric.weighted(targets[first], predictions[first], weights.astype(float)), value)
    drawn = resamples(len(targets), how_many(metric, predictions), seed)
    values = [metric.weighted(targets, predictions, weights) for weights in drawn]
    return middle(np.concatenate(values), value)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n images. Source: Wilson 1927, J. Am. Stat. Assoc. 22, 209-212."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the interval ends there exactly; rounding must not push it off its own value.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def middle(values: Array, fallback: float) -> tuple[float, float]:
    """The middle 95 % of the values that are defined; `fallback` twice when none is."""
    import numpy as np

    defined = values[~np.isnan(values)]
    if not len(defined):
        return fallback, fallback
    low, high = np.percentile(defined, (2.5, 97.5))
    return float(low), float(high)


def resamples(n: int, count: int, seed: int) -> Iterator[Array]:
    """How often each of n images was drawn, (R, N) at a time, `count` resamples in all."""
    import numpy as np

    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // n)
    for start in range(0, count, step):
        rows = min(step, count - start)
        drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float32)


def how_many(metric: Metric, predictions: Array) -> int:
    """How many resamples of predictions (N, …) a metric's interval takes."""
    if not metric.is_rank:
        return RESAMPLES
    return int(min(RESAMPLES, max(100, _RANK_BUDGET // max(1, predictions.size))))


def _alike(targets: Array, predictions: Array) -> tuple[Array, Array] | None:
    """One image (M,) of each kind with the same true and predicted labels, and the kinds' shares (M,).

    How many images of each kind a bootstrap sample holds is multinomial, and a dozen kinds are drawn in a
    tenth of the time of a few hundred images. None where there are too many kinds for that.
    """
    import numpy as np

    from tlauto.metrics import indicators

    labels = np.concatenate(indicators(targets, predictions), axis=1).astype(bool)
    _, first, counts = np.unique(np.packbits(labels, axis=1), axis=0, return_index=True, return_counts=True)
    is_worth_it = len(first) <= min(len(targets) // 4, _CHUNK // RESAMPLES)
    return (first, counts / len(targets)) if is_worth_it else None
