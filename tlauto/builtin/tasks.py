"""Tasks: how targets become arrays, the loss, the metrics, and answers from logits.

Their parameters are sampled as `loss.*`. Losses are computed in 32 bits whatever the logits are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlauto.builtin.losses import BinaryCrossEntropy, CrossEntropy, Residual
from tlauto.contracts import Task
from tlauto.errors import ConfigError, DataError, did_you_mean
from tlauto.losses import Loss
from tlauto.space import Choice, Float, Scalar, Space, number

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

MAX_POS_WEIGHT = 100.0
"""Most that a rare label's positives count: beyond it a handful of images would drown the rest."""


class Multiclass:
    """Each image has exactly one of K classes: cross-entropy."""

    name = "multiclass"
    space: Space = {
        "label_smoothing": Float(0.0, 0.2, default=0.0),
        "class_weights": Choice(("none", "balanced"), "none"),
    }
    metrics: tuple[str, ...] = (
        "accuracy", "balanced_accuracy", "precision", "recall", "f1", "roc_auc", "map", "log_loss",
    )  # fmt: skip

    def num_outputs(self, classes: Sequence[str]) -> int:
        """One logit per class."""
        return len(classes)

    def targets(self, values: Sequence[Any], classes: Sequence[str]) -> Array:
        """Class indices (N,) int64; raises DataError for an index without a class."""
        import numpy as np

        indices = np.asarray(values, dtype=np.int64).reshape(-1)
        _check_indices(indices, classes)
        return indices

    def loss(self, train_targets: Array, num_outputs: int, params: Mapping[str, Scalar]) -> Loss:
        """Cross-entropy with label smoothing; `balanced` weighs each image by its class' rarity.

        Weights are N / (classes that occur * images of the class), so their mean over the training
        images is 1 and the learning rate keeps its meaning. Takes indices (N,) or soft (N, K).
        """
        import numpy as np

        counts = np.bincount(train_targets, minlength=num_outputs)
        present = counts > 0
        balanced = np.divide(
            len(train_targets) / present.sum(), counts, out=np.ones(num_outputs), where=present
        )
        weights = balanced if params["class_weights"] == "balanced" else np.ones(num_outputs)
        return CrossEntropy(weights, number(params["label_smoothing"]))

    def predict(self, logits: Array) -> Array:
        """Probabilities (N, K) that sum to 1."""
        import numpy as np

        shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        probabilities: Array = (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)
        return probabilities


class Multilabel:
    """Each image has any number of K labels: binary cross-entropy for each."""

    name = "multilabel"
    space: Space = {"pos_weight": Choice(("none", "balanced"), "none")}
    metrics: tuple[str, ...] = ("map", "f1", "precision", "recall", "accuracy", "roc_auc", "log_loss")

    def num_outputs(self, classes: Sequence[str]) -> int:
        """One logit per label."""
        return len(classes)

    def targets(self, values: Sequence[Any], classes: Sequence[str]) -> Array:
        """Multi-hot (N, K) float32 from tuples of label indices; raises DataError for an unknown one."""
        import numpy as np

        hot = np.zeros((len(values), len(classes)), dtype=np.float32)
        for row, labels in zip(hot, values, strict=True):
            indices = np.asarray(labels, dtype=np.int64).reshape(-1)
            _check_indices(indices, classes)
            row[indices] = 1
        return hot

    def loss(self, train_targets: Array, num_outputs: int, params: Mapping[str, Scalar]) -> Loss:
        """Binary cross-entropy, mean over images and labels.

        `balanced` weighs a label's positives by its negatives per positive, at most 100.
        """
        import numpy as np

        positives = train_targets.sum(axis=0)
        rarity = np.divide(
            len(train_targets) - positives, positives, out=np.ones(num_outputs), where=positives > 0
        ).clip(1 / MAX_POS_WEIGHT, MAX_POS_WEIGHT)
        return BinaryCrossEntropy(rarity if params["pos_weight"] == "balanced" else np.ones(num_outputs))

    def predict(self, logits: Array) -> Array:
        """Probabilities (N, K), each label's by itself."""
        import numpy as np

        # By tanh, which does not overflow where exp does.
        probabilities: Array = (0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))).astype(np.float32)
        return probabilities


class Regression:
    """Each image has a number; logits and predictions are in its own unit.

    The model must therefore scale its output: training's classifier multiplies what the head gives
    by the training targets' standard deviation and adds their mean.
    """

    name = "regression"
    space: Space = {"kind": Choice(("mse", "huber"), "mse")}
    metrics: tuple[str, ...] = ("r2", "rmse", "mae")

    def num_outputs(self, classes: Sequence[str]) -> int:
        """One."""
        return 1

    def targets(self, values: Sequence[Any], classes: Sequence[str]) -> Array:
        """Values (N,) float32; raises DataError for one that is not a finite number."""
        import numpy as np

        targets = np.asarray(values, dtype=np.float32).reshape(-1)
        if not np.isfinite(targets).all():
            raise DataError("a regression target is not a finite number; correct or remove it")
        return targets

    def loss(self, train_targets: Array, num_outputs: int, params: Mapping[str, Scalar]) -> Loss:
        """Mean squared or Huber loss of residuals divided by the training targets' deviation.

        So the loss of guessing the mean is 1 (squared) in any unit, and learning rates carry over.
        Huber's is quadratic within one deviation and linear beyond. Takes (N, 1) and (N,) or (N, 1).
        Raises: DataError when all training targets are equal.
        """
        deviation = float(train_targets.astype(float).std())
        if not deviation:
            raise DataError(f"all training targets are {train_targets[0]:g}; there is nothing to learn")
        return Residual(deviation, is_huber=params["kind"] == "huber")

    def predict(self, logits: Array) -> Array:
        """Values (N,) in the targets' unit."""
        import numpy as np

        return logits.reshape(-1).astype(np.float32)


TASKS: dict[str, Task] = {task.name: task for task in (Multiclass(), Multilabel(), Regression())}


def task(name: str) -> Task:
    """The task of that name; raises ConfigError when there is none."""
    if name not in TASKS:
        raise ConfigError(f"no task '{name}'{did_you_mean(name, TASKS)} (known: {', '.join(TASKS)})")
    return TASKS[name]


def _check_indices(indices: Array, classes: Sequence[str]) -> None:
    if len(indices) and not 0 <= indices.min() <= indices.max() < len(classes):
        raise DataError(f"a target is not one of the {len(classes)} classes of the dataset")
