"""Which trials answer together, chosen by predictions that are already paid for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlauto.joined import backbones_of
from tlauto.ranking import rank
from tlauto.study import TrialRecord

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

CANDIDATES = 10
PER_BACKBONE = 2  # candidates: two heads on the same backbones mostly make the same mistakes
ROUNDS = 12
WORTH = 0.02
"""Least share of the loss that an ensemble must save: a second model costs its running time for ever."""

TOGETHER = -1  # stands for the cross-validated trials as one model
SUREST = 1e-3  # probabilities are not believed beyond this: one sure mistake must not decide


@dataclass(frozen=True)
class Answers:
    """What one trial answered for images that were held out from it.

    Attributes:
        val: for the rows of the validation part.
        train: for those of the training part, when the trial was cross-validated.
    """

    val: Array
    train: Array | None = None


@dataclass(frozen=True)
class Library:
    """The answers of some trials, by number, with the targets of both parts.

    `train_targets` is empty when no trial was cross-validated.
    """

    answers: Mapping[int, Answers]
    val_targets: Array
    train_targets: Array


def candidates(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials that may join, best first, few on the same backbones."""
    taken: list[TrialRecord] = []
    complete = [trial for trial in trials if trial.state == "complete" and trial.score is not None]
    for trial in sorted(complete, key=rank, reverse=True):
        same = sum(set(backbones_of(other)) == set(backbones_of(trial)) for other in taken)
        if same < PER_BACKBONE and len(taken) < CANDIDATES:
            taken.append(trial)
    return taken


def select(task: str, library: Library, *, first: int, most: int) -> dict[int, float]:
    """Weights by trial number, adding up to 1, of the trials that answer together; `first` is among them.

    Trials that were cross-validated are weighed on all images to learn from. What they answer together
    is then weighed, as one model, against the trials that only answered for the validation part.
    """
    import numpy as np

    proven = {n: a for n, a in library.answers.items() if a.train is not None}
    others = {n: a.val for n, a in library.answers.items() if a.train is None}
    if not proven:
        return choose(task, library.val_targets, others, first=first, most=most)
    targets = np.concatenate([library.train_targets, library.val_targets])
    rows = {n: np.concatenate([a.train, a.val]) for n, a in proven.items() if a.train is not None}
    start = first if first in proven else next(iter(proven))
    inner = choose(task, targets, rows, first=start, most=most)
    if not others:
        return inner
    together = mean([proven[n].val for n in inner], list(inner.values()))
    pool = {TOGETHER: together, **others}
    begin = first if first in others else TOGETHER
    outer = choose(task, library.val_targets, pool, first=begin, most=most)
    share = outer.pop(TOGETHER, 0.0)
    weights = {**{n: share * weight for n, weight in inner.items() if share}, **outer}
    return _largest(weights, first, most)


def _largest(weights: Mapping[int, float], first: int, most: int) -> dict[int, float]:
    """`first` and the largest others, at most `most`, adding up to 1 again."""
    others = sorted((n for n in weights if n != first), key=lambda n: (-weights[n], n))
    kept = [first, *others[: most - 1]]
    total = sum(weights[n] for n in kept)
    return {n: weights[n] / total for n in kept}


def choose(
    task: str, targets: Array, answers: Mapping[int, Array], *, first: int, most: int
) -> dict[int, float]:
    """Weights by trial number, adding up to 1, of the trials whose mean answer has the lowest loss.

    Greedy selection with replacement from `first`, the best trial by itself: each round adds the
    trial that lowers the loss most. `first` alone unless the others save `WORTH` of its loss.

    Args:
        answers: by trial number, (N, K) probabilities or (N,) values for the same rows.
        most: different trials.

    Source: Caruana et al. 2004, "Ensemble Selection from Libraries of Models", with the loss instead
    of the score, which a few hundred rows tell apart better.
    """
    loss = _loss(task, targets)
    picks, total = [first], answers[first].astype("float64")
    alone = lowest = loss(total)
    best = [first]
    for _ in range(ROUNDS):
        open_to = answers if len(set(picks)) < most else set(picks)
        tried = {number: loss((total + answers[number]) / (len(picks) + 1)) for number in open_to}
        number = min(tried, key=lambda n: (tried[n], n))
        picks, total = [*picks, number], total + answers[number]
        if tried[number] < lowest:
            lowest, best = tried[number], list(picks)
    if lowest > (1 - WORTH) * alone:
        best = [first]
    return {number: best.count(number) / len(best) for number in dict.fromkeys(best)}


def read_library(folders: Mapping[int, Path]) -> Library:
    """The answers that trials left in their folders; those whose file is gone are left out."""
    import numpy as np

    answers: dict[int, Answers] = {}
    val_targets, train_targets = np.empty(0), np.empty(0)
    for number, folder in folders.items():
        try:
            with np.load(folder / "predictions.npz", allow_pickle=False) as file:
                answers[number] = Answers(file["predictions"], file.get("held_out"))
                val_targets = file["targets"]
                train_targets = file["held_out_targets"] if "held_out" in file else train_targets
        except (OSError, ValueError, KeyError):
            continue
    return Library(answers, val_targets, train_targets)


def mean(answers: Sequence[Array], weights: Sequence[float]) -> Array:
    """The weighted mean of answers (N, …); the weights add up to 1."""
    import numpy as np

    total: Array = np.tensordot(np.asarray(weights), np.stack(answers), axes=1)
    return total


def _loss(task: str, targets: Array) -> Callable[[Array], float]:
    """Mean loss of answers: log loss of classes, squared error of values."""
    import numpy as np

    def squared(values: Array) -> float:
        return float(((values - targets) ** 2).mean())

    def one_of(probabilities: Array) -> float:
        right = probabilities[np.arange(len(targets)), targets]
        return float(-np.log(np.clip(right, SUREST, 1)).mean())

    def any_of(probabilities: Array) -> float:
        sure = np.clip(probabilities, SUREST, 1 - SUREST)
        return float(-np.where(targets > 0.5, np.log(sure), np.log(1 - sure)).mean())

    return {"regression": squared, "multiclass": one_of}.get(task, any_of)
