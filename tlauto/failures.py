"""What comes of a trial that failed: whether it is tried again, and whether the search goes on.

Pure functions of what is recorded, so a search that is stopped and resumed decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlauto.contracts import TrialSpec
from tlauto.errors import DeviceLost, Hung, OutOfMemory, WorkerDied
from tlauto.room import images_at_once

ACCIDENTS = (WorkerDied.kind, Hung.kind, DeviceLost.kind)
"""Failures that may be nothing of the trial's own: it is tried once more. A plugin that raises, a loss
that is not finite and a limit of time would come to the same again."""

HALVINGS = 3
"""How often a trial that runs out of memory is tried again with half as many images at once."""

HOPELESS = 5
"""So many failures before the first success end the search."""


@dataclass(frozen=True)
class Retry:
    """How a trial is tried again: with at most `micro_batch` images at once, None as it was."""

    micro_batch: int | None = None


def retry(kind: str, spec: TrialSpec, earlier: Sequence[str], *, trains: bool) -> Retry | None:
    """Whether and how to try a failed trial again.

    Args:
        kind: of its failure.
        earlier: kinds of the failures of its earlier attempts (`study.earlier_ends`).
        trains: whether it trains the backbone.
    """
    if kind in ACCIDENTS:
        return None if set(ACCIDENTS) & set(earlier) else Retry(spec.micro_batch)
    if kind == OutOfMemory.kind and earlier.count(kind) < HALVINGS:
        at_once = images_at_once(spec, trains=trains)
        return Retry(-(-at_once // 2)) if at_once > 1 else None
    return None


def why_to_end(failures: int, *, has_best: bool, most: int) -> str:
    """How the trials failed, when the search is to end because of it; else empty.

    Args:
        failures: trials that failed since the last that did not, each once however often it was tried.
        has_best: whether any trial has a score.
        most: `--max-failures`.
    """
    if not has_best and failures >= min(HOPELESS, most):
        return f"the first {failures} trials all failed" if failures > 1 else "the first trial failed"
    if failures >= most:
        return f"{failures} trials in a row failed" if failures > 1 else "a trial failed"
    return ""
