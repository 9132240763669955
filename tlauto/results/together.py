"""Several networks that answer together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

BATCH = 256  # files whose answers are held at a time


class Answering(Protocol):
    """What answers for image files: one network or several."""

    def rows(
        self, paths: Iterable[str], *, on_unreadable: Callable[[str, str], None] | None = None
    ) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """Each readable file's path with its probabilities (K,), or its value () for regression."""
        ...


class Together:
    """The weighted mean of what several networks answer; the weights add up to 1."""

    def __init__(self, predictors: Sequence[Answering], weights: Sequence[float]) -> None:
        self.predictors = tuple(predictors)
        self.weights = tuple(weights)

    def rows(
        self, paths: Iterable[str], *, on_unreadable: Callable[[str, str], None] | None = None
    ) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """As `Answering.rows`. A file is read once by each network, each at its own size."""
        remaining = iter(paths)
        while batch := list(islice(remaining, BATCH)):
            first = list(self.predictors[0].rows(batch, on_unreadable=on_unreadable))
            readable = [path for path, _ in first]
            sums = [self.weights[0] * answer for _, answer in first]
            for predictor, weight in zip(self.predictors[1:], self.weights[1:], strict=True):
                for i, (_, answer) in enumerate(predictor.rows(readable)):
                    sums[i] = sums[i] + weight * answer
            yield from zip(readable, sums, strict=True)
