"""The figures of `anytime.py`, from curves of scores over time.

A row is a dataset with one seed: `data`, `tested` (a hash of its test images), `results` by contender.
tlauto stands in it as `tlauto` and, with the longer budget, `tlauto long`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from contenders import BUDGETED, Result

RESAMPLES = 10_000
CHUNK = 200  # resamples at once


@dataclass(frozen=True)
class Row:
    """One dataset with one seed; see above."""

    data: str
    seed: int
    tested: str
    results: dict[str, Result]


@dataclass(frozen=True)
class Gain:
    """tlauto against the best alternative at one time on one row.

    Attributes:
        at: seconds: the budget, or tlauto's end when that came later.
        other: the alternative with the best TEST score at that time, which is kind to them.
        ours, theirs: test accuracies.
        differences: (N,) ours right less theirs right, by image of the test part.
    """

    row: Row
    at: float
    other: str
    ours: float
    theirs: float
    differences: np.ndarray


def score_at(result: Result, seconds: float) -> float | None:
    """The test score there was at a time; None before the first."""
    index = _index(result, seconds)
    return None if index is None else result.rows[index][2]


def first_time(result: Result, score: float) -> float | None:
    """When a test score was first reached."""
    return next((at for at, _, test in result.rows if test >= score), None)


def gain(row: Row, ours: str, budget: float) -> Gain | None:
    """None where tlauto, or every alternative, has nothing to show."""
    if ours not in row.results:
        return None
    mine = row.results[ours]
    at = max(budget, mine.rows[-1][0])
    # One that is told its budget too has nothing before its end, which may be a little late.
    patient = {name + ours.removeprefix("tlauto") for name in BUDGETED}
    rivals = {name: result for name, result in row.results.items() if not name.startswith("tlauto")}
    there = {
        name: index
        for name, result in rivals.items()
        if (index := _index(result, float("inf") if name in patient else at)) is not None
    }
    if not there:
        return None
    other = max(there, key=lambda name: rivals[name].rows[there[name]][2])
    theirs, index = rivals[other], there[other]
    differences = _digits(mine.right[-1]) - _digits(theirs.right[index])
    return Gain(row, at, other, mine.rows[-1][2], theirs.rows[index][2], differences)


def mean_gain(gains: Sequence[Gain | None]) -> dict[str, float | None]:
    """The mean over datasets, in points, with a 95 % interval; nothing where a row has no gain."""
    known = [one for one in gains if one is not None]
    if not known or len(known) < len(gains):
        return {"value": None, "low": None, "high": None}
    value, low, high = interval(strata(known))
    return {"value": 100 * value, "low": 100 * low, "high": 100 * high}


def strata(gains: Sequence[Gain]) -> list[tuple[float, np.ndarray]]:
    """Weights, adding up to 1, and differences by image, for `interval`.

    All datasets weigh the same. Where several seeds were tested on the same images, an image counts
    once, with the mean over the seeds; different test images of one dataset share its weight.
    """
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    for one in gains:
        groups.setdefault((one.row.data, one.row.tested), []).append(one.differences)
    parts = [data for data, _ in groups]
    share = {data: 1 / (len(set(parts)) * parts.count(data)) for data in parts}
    return [(share[data], np.mean(found, axis=0)) for (data, _), found in groups.items()]


def interval(strata: Sequence[tuple[float, np.ndarray]], seed: int = 0) -> tuple[float, float, float]:
    """The weighted mean of differences and its 95 % interval: value, low, high.

    A stratified paired bootstrap: images are drawn with replacement within each dataset, both sides'
    answers to an image together; percentiles. What varies between datasets and in training is not in it.

    Source: Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13.
    """
    generator = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for weight, differences in strata:
        for start in range(0, RESAMPLES, CHUNK):
            picked = generator.integers(0, len(differences), (CHUNK, len(differences)))
            drawn[start : start + CHUNK] += weight * differences[picked].mean(axis=1)
    value = sum(weight * float(differences.mean()) for weight, differences in strata)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return value, float(low), float(high)


def naive_ratio(rows: Sequence[Row]) -> float | None:
    """Seconds of the loop to its own final score over ours to it, second best of the datasets.

    The median over a dataset's seeds; None where some row lacks the loop or tlauto, or we never get there.
    """
    by_data: dict[str, list[float]] = {}
    for row in rows:
        if "loop" not in row.results or not _searches(row):
            return None
        if not row.results["loop"].rows:
            continue  # it had nothing to be compared with
        score = row.results["loop"].rows[-1][2]
        there, reached = our_time(row, score), first_time(row.results["loop"], score)
        by_data.setdefault(row.data, []).append(0.0 if there is None or reached is None else reached / there)
    ratios = sorted((statistics.median(found) for found in by_data.values()), reverse=True)
    return (ratios[min(1, len(ratios) - 1)] or None) if ratios else None


def script_ratio(rows: Sequence[Row]) -> float | None:
    """Our seconds to the script's score over those of its whole run, worst of the datasets.

    The median over a dataset's seeds; None where some row lacks the script or tlauto, or we never get there.
    """
    by_data: dict[str, list[float]] = {}
    for row in rows:
        if "script" not in row.results or not _searches(row):
            return None
        theirs = row.results["script"]
        there = our_time(row, theirs.rows[-1][2])
        by_data.setdefault(row.data, []).append(float("inf") if there is None else there / theirs.whole_s)
    worst = max(statistics.median(found) for found in by_data.values())
    return None if worst == float("inf") else worst


def our_time(row: Row, score: float) -> float | None:
    """When a search first had a test score: the shorter one, or else the longer."""
    times = [first_time(search, score) for search in _searches(row)]
    return next((at for at in times if at is not None), None)


def _index(result: Result, seconds: float) -> int | None:
    """The last row by a time."""
    return max((i for i, row in enumerate(result.rows) if row[0] <= seconds), default=None)


def _searches(row: Row) -> list[Result]:
    return [row.results[name] for name in ("tlauto", "tlauto long") if name in row.results]


def _digits(text: str) -> np.ndarray:
    return np.array([int(digit) for digit in text], dtype=float)
