"""What a running search tells whoever shows it. Values only; the command line draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class DataRead:
    """The dataset is read, checked and split. `unreadable`: path and reason of what is left out."""

    task: str
    classes: int
    counts: Mapping[str, int]
    unreadable: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """The space is known and trials are about to start; `done` counts earlier runs' trials."""

    study: str
    slots: tuple[str, ...]
    backbones: tuple[str, ...]
    strategies: tuple[str, ...]
    heads: tuple[str, ...]
    parameters: int
    metric: str
    why_metric: str
    max_trials: int | None
    seconds_left: float | None
    done: int


@dataclass(frozen=True)
class Working:
    """Something takes a while: `text` says what."""

    text: str


@dataclass(frozen=True)
class Checked:
    """So many of the images are checked."""

    done: int
    total: int


@dataclass(frozen=True)
class Said:
    """A sentence for the user that stays on screen."""

    text: str


@dataclass(frozen=True)
class TrialStarted:
    """A trial runs on a slot."""

    number: int
    slot: str
    backbone: str
    strategy: str
    head: str
    epochs: int


@dataclass(frozen=True)
class EpochEnded:
    """An epoch of a running trial ended with this score."""

    number: int
    slot: str
    epoch: int
    score: float


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended: `state` is complete, pruned (`note` is `@EPOCH`) or failed (`note` says why)."""

    number: int
    slot: str
    backbone: str
    strategy: str
    head: str
    state: str
    score: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """How far the search is.

    `seconds_a_trial` is the time between two ends of the trials that are still to come, None while
    only probes have ended: those are much shorter.
    """

    done: int
    pruned: int
    failed: int
    max_trials: int | None
    seconds_a_trial: float | None
    seconds_left: float | None
    best_number: int | None
    best_score: float | None


Emit = Callable[[object], None]


def ignore(_event: object) -> None:
    """Show nothing."""
