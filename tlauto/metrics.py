"""Metrics with intervals: one implementation for a value and for its bootstrap.

Every metric is written for weighted images, `weights` (R, N), and gives R values: all ones gives the
metric itself, the counts of R resamples give its bootstrap distribution in a few matrix products.

Targets are what `Task.targets` makes, predictions what `Task.predict` makes: class indices (N,) with
probabilities (N, K); multi-hot (N, K) with probabilities (N, K); values (N,) with values (N,).
Averages over classes are macro averages over the classes that occur in the targets: a class that has
no image says nothing. For a metric that is not defined there (AUC of a single class) the value is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tlauto.errors import ConfigError, DataError, did_you_mean
from tlauto.intervals import how_many, interval, middle, resamples

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

UNBALANCED = 3.0
"""Ratio of the largest to the smallest class beyond which accuracy misleads."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        tasks: the tasks it is defined for.
        higher_is_better: False for errors and losses, whose score is the negative value.
        weighted: (targets, predictions, weights (R, N)) to R values; NaN where it is not defined.
        counts: it only asks which labels are true and which are predicted.
        is_rank: it sorts the predictions, so that its bootstrap is slow.
    """

    name: str
    tasks: tuple[str, ...]
    higher_is_better: bool
    weighted: Callable[[Array, Array, Array], Array]
    counts: bool = False
    is_rank: bool = False

    @property
    def best(self) -> float:
        """The score of perfect answers: 1, or 0 for errors and losses."""
        return 1.0 if self.higher_is_better else 0.0

    def compute(self, targets: Array, predictions: Array) -> float:
        """The metric's value, NaN where it is not defined; raises DataError for unusable arrays."""
        import numpy as np

        _check(targets, predictions)
        return float(self.weighted(targets, predictions, np.ones((1, len(targets))))[0])


def compute_all(
    task: str,
    targets: Array,
    predictions: Array,
    *,
    intervals: bool | Collection[str] = False,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """All metrics of a task: name to `{"value": …}`, with `low` and `high` when `intervals`.

    Args:
        intervals: of all metrics, of none, or of those named: a bootstrap of every metric takes half
            a second, longer than many a trial.

    The interval is of 95 %: Wilson's for accuracy and for a perfect share of classes, otherwise the
    bootstrap percentiles over images.
    A metric that is not defined for these targets is left out.
    """
    values: dict[str, dict[str, float]] = {}
    for metric in of_task(task):
        value = metric.compute(targets, predictions)
        if math.isnan(value):
            continue
        values[metric.name] = {"value": value}
        if intervals is True or (intervals and metric.name in intervals):
            low, high = interval(metric, value, targets, predictions, seed=seed)
            values[metric.name] |= {"low": low, "high": high}
    return values


def score(metric: str, targets: Array, predictions: Array) -> float:
    """The metric's value, negated when lower is better; raises DataError where it is not defined."""
    found = get(metric)
    value = found.compute(targets, predictions)
    if math.isnan(value):
        raise DataError(
            f"'{metric}' is not defined for these {len(targets)} images (all have the same target); "
            f"add images of other classes or choose another --metric"
        )
    return value if found.higher_is_better else -value


def compare(metric: str, targets: Array, a: Array, b: Array, *, seed: int = 0) -> dict[str, float | bool]:
    """How much better predictions `a` are than `b` on the same images, by a paired bootstrap.

    Returns: `gain` (> 0 when `a` is better, whatever the metric's direction), its 95 % interval
    `low`, `high`, and `significant`: the interval does not hold 0.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 16.
    """
    import numpy as np

    found = get(metric)
    gain = score(metric, targets, a) - score(metric, targets, b)
    sign = 1.0 if found.higher_is_better else -1.0
    gains = [
        sign * (found.weighted(targets, a, weights) - found.weighted(targets, b, weights))
        for weights in resamples(len(targets), how_many(found, a), seed)
    ]
    low, high = middle(np.concatenate(gains), gain)
    return {"gain": gain, "low": low, "high": high, "significant": low > 0 or high < 0}


def default_metric(task: str, class_counts: Sequence[int]) -> tuple[str, str]:
    """The metric that is the score unless the user names one, and why, as a clause.

    `class_counts` holds the number of images of each class; only multiclass looks at it.
    Raises: ConfigError for an unknown task.
    """
    if task == "multilabel":
        return "map", "it ranks each label's images and needs no threshold"
    if task == "regression":
        return "r2", "it is the share of the targets' variance that is explained"
    if task != "multiclass":
        raise ConfigError(f"no task '{task}'; choose from multiclass, multilabel, regression")
    present = [count for count in class_counts if count > 0]
    if present and max(present) > UNBALANCED * min(present):
        sizes = f"{min(present):,} to {max(present):,} images a class"
        return "balanced_accuracy", f"the classes are unbalanced beyond {UNBALANCED:g}:1 ({sizes})"
    return "accuracy", f"no class is more than {UNBALANCED:g} times as large as another"


def get(name: str) -> Metric:
    """The metric of that name; raises ConfigError, with the closest match, when there is none."""
    if name not in METRICS:
        raise ConfigError(f"no metric '{name}'{did_you_mean(name, METRICS)} (known: {', '.join(METRICS)})")
    return METRICS[name]


def of_task(task: str) -> tuple[Metric, ...]:
    """The metrics that are defined for a task."""
    return tuple(metric for metric in METRICS.values() if task in metric.tasks)


# --- metrics of counts: (R, N) weights times (N, K) indicators -----------------------------------


def indicators(targets: Array, predictions: Array) -> tuple[Array, Array]:
    """Which labels are true and which are predicted, (N, K) each; multilabel cuts at 0.5."""
    import numpy as np

    if targets.ndim == 2:
        return (targets > 0.5).astype(float), (predictions >= 0.5).astype(float)
    classes = np.eye(predictions.shape[1])
    return classes[targets.astype(int)], classes[predictions.argmax(axis=1)]


def _counts(targets: Array, predictions: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Hits, predicted and true counts by class, (R, K) each."""
    true, predicted = indicators(targets, predictions)
    return weights @ (true * predicted), weights @ predicted, weights @ true


def _accuracy(targets: Array, predictions: Array, weights: Array) -> Array:
    true, predicted = indicators(targets, predictions)
    return _mean((true == predicted).all(axis=1), weights)


def _recall(targets: Array, predictions: Array, weights: Array) -> Array:
    hits, _, true = _counts(targets, predictions, weights)
    return _macro(_ratio(hits, true), true > 0)


def _precision(targets: Array, predictions: Array, weights: Array) -> Array:
    hits, predicted, true = _counts(targets, predictions, weights)
    return _macro(_ratio(hits, predicted), true > 0)


def _f1(targets: Array, predictions: Array, weights: Array) -> Array:
    hits, predicted, true = _counts(targets, predictions, weights)
    return _macro(_ratio(2 * hits, predicted + true), true > 0)


def _ratio(part: Array, whole: Array) -> Array:
    """`part / whole`, 0 where nothing was counted."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _macro(values: Array, present: Array) -> Array:
    """Mean over the present classes, (R, K) to (R,); NaN when none is present."""
    import numpy as np

    count = present.sum(axis=1)
    total = np.where(present, values, 0.0).sum(axis=1)
    return _defined(total, count)


# --- metrics of ranks -------------------------------------------------------------------------------


def _roc_auc(targets: Array, predictions: Array, weights: Array) -> Array:
    """Probability that a positive ranks above a negative, ties half; one class against the rest."""

    def area(positive: Array, negative: Array) -> Array:
        below = negative.cumsum(axis=1) - negative
        wins = (positive * (below + 0.5 * negative)).sum(axis=1)
        return _defined(wins, positive.sum(axis=1) * negative.sum(axis=1))

    return _by_rank(area, targets, predictions, weights)


def _average_precision(targets: Array, predictions: Array, weights: Array) -> Array:
    """Precision at each positive from the top down, averaged over the positives of each class."""

    def area(positive: Array, negative: Array) -> Array:
        hits = positive[:, ::-1].cumsum(axis=1)
        precision = _ratio(hits, hits + negative[:, ::-1].cumsum(axis=1))
        return _defined((positive[:, ::-1] * precision).sum(axis=1), positive.sum(axis=1))

    return _by_rank(area, targets, predictions, weights)


def _by_rank(
    area: Callable[[Array, Array], Array], targets: Array, predictions: Array, weights: Array
) -> Array:
    """Macro average over classes of `area`(positives, negatives), both (R, distinct scores) ascending."""
    import numpy as np

    true = indicators(targets, predictions)[0]
    areas = []
    for k in np.flatnonzero(true.any(axis=0)):
        order = np.argsort(predictions[:, k], kind="stable")
        scores = predictions[order, k]
        starts = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
        ranked = weights[:, order]
        positive = np.add.reduceat(ranked * true[order, k], starts, axis=1)
        negative = np.add.reduceat(ranked * (1 - true[order, k]), starts, axis=1)
        areas.append(area(positive, negative))
    if not areas:
        return np.full(len(weights), np.nan)
    values = np.stack(areas, axis=1)  # (R, K)
    return _macro(values, ~np.isnan(values))


def _defined(part: Array, whole: Array) -> Array:
    """`part / whole`, NaN where `whole` is 0."""
    import numpy as np

    quotient: Array = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return quotient


# --- losses and errors ------------------------------------------------------------------------------


def _log_loss(targets: Array, predictions: Array, weights: Array) -> Array:
    import numpy as np

    true = indicators(targets, predictions)[0]
    chances = predictions.astype(float).clip(1e-7, 1 - 1e-7)
    if targets.ndim == 1:
        return _mean(-(true * np.log(chances)).sum(axis=1), weights)
    return _mean(-(true * np.log(chances) + (1 - true) * np.log1p(-chances)).mean(axis=1), weights)


def _mae(targets: Array, predictions: Array, weights: Array) -> Array:
    import numpy as np

    return _mean(np.abs(_residuals(targets, predictions)), weights)


def _rmse(targets: Array, predictions: Array, weights: Array) -> Array:
    import numpy as np

    squares = _mean(_residuals(targets, predictions) ** 2, weights)
    return np.asarray(np.sqrt(squares))


def _r2(targets: Array, predictions: Array, weights: Array) -> Array:
    centred = targets.astype(float) - targets.astype(float).mean()
    variance = _mean(centred**2, weights) - _mean(centred, weights) ** 2
    unexplained = _defined(_mean(_residuals(targets, predictions) ** 2, weights), variance)
    return 1 - unexplained


def _residuals(targets: Array, predictions: Array) -> Array:
    residuals: Array = targets.astype(float) - predictions.astype(float)
    return residuals


def _mean(values: Array, weights: Array) -> Array:
    mean: Array = weights @ values.astype(float) / weights.sum(axis=1)
    return mean


def _check(targets: Array, predictions: Array) -> None:
    import numpy as np

    if not len(targets):
        raise DataError("there are no images to score")
    if len(targets) != len(predictions):
        raise DataError(
            f"there are {len(targets)} targets and {len(predictions)} predictions; they must match"
        )
    if not np.isfinite(predictions).all():
        raise DataError("the predictions hold values that are not finite numbers; the model is unusable")


def _table(metrics: Sequence[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


_CLASSES = ("multiclass", "multilabel")
METRICS: dict[str, Metric] = _table(
    [
        Metric("accuracy", _CLASSES, True, _accuracy, counts=True),
        # For several labels an image is right only when all its labels are: exact match.
        Metric("balanced_accuracy", ("multiclass",), True, _recall, counts=True),
        Metric("precision", _CLASSES, True, _precision, counts=True),
        Metric("recall", _CLASSES, True, _recall, counts=True),
        Metric("f1", _CLASSES, True, _f1, counts=True),
        Metric("roc_auc", _CLASSES, True, _roc_auc, is_rank=True),
        Metric("map", _CLASSES, True, _average_precision, is_rank=True),
        Metric("log_loss", _CLASSES, False, _log_loss),
        Metric("mae", ("regression",), False, _mae),
        Metric("rmse", ("regression",), False, _rmse),
        Metric("r2", ("regression",), True, _r2),
    ]
)
