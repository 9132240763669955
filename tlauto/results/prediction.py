"""What a model answers for one image, from the outputs of its task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

THRESHOLD = 0.5
"""Probability from which a class of a multilabel model counts as present."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        path: as it was given.
        labels: the answer: the most probable class (multiclass), the classes of probability
            0.5 or more (multilabel), or nothing (regression).
        probabilities: class to probability, the most probable first; as many as were asked for, and
            never fewer than `labels`.
        value: the answer of a regression model, in the unit of its training data; else None.
    """

    path: str
    labels: tuple[str, ...] = ()
    probabilities: Mapping[str, float] | None = None
    value: float | None = None

    @property
    def label(self) -> str | None:
        """The first of `labels`, or None."""
        return self.labels[0] if self.labels else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `path` with `labels` and `probabilities`, or with `value`."""
        if self.value is not None:
            return {"path": self.path, "value": self.value}
        return {
            "path": self.path,
            "labels": list(self.labels),
            "probabilities": dict(self.probabilities or {}),
        }


def prediction(path: str, output: np.ndarray, *, task: str, classes: Sequence[str], top_k: int) -> Prediction:
    """The answer from one row of `Task.predict`: probabilities (K,), or a value () for regression."""
    import numpy as np

    if task == "regression":
        return Prediction(path, value=float(output))
    # Stable: of two equal probabilities the class that comes first wins, as argmax has it.
    order = [int(i) for i in np.argsort(-output, kind="stable")]
    present = order[:1] if task == "multiclass" else [i for i in order if output[i] >= THRESHOLD]
    shown = order[: max(top_k, len(present))]
    return Prediction(
        path,
        labels=tuple(classes[i] for i in present),
        probabilities={classes[i]: float(output[i]) for i in shown},
    )
