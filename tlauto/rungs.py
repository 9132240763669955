"""Epochs as rungs: who goes on, who pauses, and who is promoted after all.

Source: ASHA (Li et al. 2020, arXiv:1810.05934), with a halving factor of 2. A trial that is paused keeps
the state of its training and goes on from there once trials that came later have shown that it was
among the better half.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FIRST = 2
"""Epochs before trials are compared."""

STATE_FILE = "state.safetensors"
"""In a trial's folder: what a fine-tuning that was stopped left behind."""

Reports = Mapping[int, float]
"""Scores, higher is better, by epoch from 1."""


@dataclass(frozen=True)
class Paused:
    """A trial that was stopped at a rung, and what it scored until then."""

    number: int
    reports: Reports


def is_rung(epoch: int) -> bool:
    """Whether trials are compared after an epoch (from 1): after 2, 4, 8 and so on."""
    return epoch >= FIRST and epoch & (epoch - 1) == 0


def best_at(reports: Reports, epoch: int) -> float | None:
    """The best score up to an epoch; None for a trial that did not come so far."""
    if not reports or max(reports) < epoch:
        return None
    return max(score for at, score in reports.items() if at <= epoch)


def goes_on(own: Reports, others: Iterable[Reports], epoch: int) -> bool:
    """Whether a trial goes on after an epoch: always between rungs, at one if it is in the better half."""
    score = best_at(own, epoch)
    if score is None or not is_rung(epoch):
        return True
    known = [found for found in (best_at(reports, epoch) for reports in others) if found is not None]
    better = sum(found > score for found in known)
    return better < (len(known) + 2) // 2  # itself counted, the half rounded up


def to_promote(paused: Sequence[Paused], others: Iterable[Reports]) -> Paused | None:
    """The paused trial that goes on next: in the better half of its rung by now, the furthest first.

    Args:
        others: of all trials that train the backbone and are not paused.
    """
    rest = list(others)
    able = []
    for one in paused:
        epoch = max(one.reports)
        known = [best_at(r, epoch) for r in [*rest, *(p.reports for p in paused if p is not one)]]
        scores = [score for score in known if score is not None]
        score = best_at(one.reports, epoch)
        assert score is not None
        # The half is rounded down here: of two, the worse one stays where it is.
        if sum(found > score for found in scores) < (len(scores) + 1) // 2:
            able.append((epoch, score, -one.number, one))
    return max(able, key=lambda entry: entry[:3])[3] if able else None
