"""What a running search tells whoever shows or records it. Frozen values of builtins only."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tlauto.contracts import EpochResult, TrialSpec
from tlauto.space import Scalar


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
    """A trial runs on a slot; `purpose` says why, `params` are its values by dotted name.

    Attributes: at: when, in seconds since 1970, here and in the events below.
    """

    number: int
    slot: str
    backbone: str
    strategy: str
    head: str
    epochs: int
    params: Mapping[str, Scalar] = field(default_factory=dict)
    purpose: str = "search"
    seed: int = 0
    at: float = field(default_factory=time.time, compare=False)

    @classmethod
    def of(cls, spec: TrialSpec, slot: str, **facts: Any) -> TrialStarted:
        """The event of a trial that is about to run."""
        what = (spec.number, slot, spec.backbone, spec.strategy, spec.head, spec.epochs)
        return cls(*what, params=dict(spec.params), purpose=spec.purpose, seed=spec.seed, **facts)


@dataclass(frozen=True)
class EpochEnded:
    """An epoch (from 1) of a running trial ended with this score; losses may be NaN."""

    number: int
    slot: str
    epoch: int
    score: float
    train_loss: float | None = None
    val_loss: float | None = None
    seconds: float | None = None
    at: float = field(default_factory=time.time, compare=False)

    @classmethod
    def of(cls, result: EpochResult, slot: str) -> EpochEnded:
        """The event of an epoch's result."""
        losses = (result.train_loss, result.val_loss)
        return cls(result.number, slot, result.epoch, result.score, *losses, result.seconds)


@dataclass(frozen=True)
class TrialEnded:
    """A trial ended: `state` is complete, pruned (`note` is `@EPOCH`) or failed (`note` says why).

    Attributes:
        kind: of the error of a failed trial.
        metrics: all metrics on the images it was validated on, name to value.
        counts: False for one that was cut off by the end of the search, which is no failure of its own.
    """

    number: int
    slot: str
    backbone: str
    strategy: str
    head: str
    state: str
    score: float | None
    seconds: float
    note: str = ""
    kind: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: bool = True
    at: float = field(default_factory=time.time, compare=False)

    @classmethod
    def of(
        cls, spec: TrialSpec, slot: str, state: str, score: float | None, seconds: float, **facts: Any
    ) -> TrialEnded:
        """The event of the end of a trial; `facts` are the fields with defaults."""
        return cls(spec.number, slot, spec.backbone, spec.strategy, spec.head, state, score, seconds, **facts)


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


@dataclass(frozen=True)
class SearchStarted:
    """A search starts or goes on; what a tracker is told first.

    Attributes:
        id: the same whenever this study goes on, another for every other study whatever its name.
        folder: of the study, in the workspace; data: path of the dataset.
        config: settings by their names in `tlauto.toml`, without those that may hold a password.
        versions: of Python, tlauto and the plugins.
        done: trials that earlier runs of the study ended.
    """

    id: str
    study: str
    folder: str
    data: str
    task: str
    metric: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    done: int = 0


@dataclass(frozen=True)
class SearchEnded:
    """A search ended for now: `state` is finished or interrupted.

    Attributes:
        best, score: number and score of the best trial, None when none has a score.
        model: folder of the model bundle, None while there is none.
        test: the model's metrics on the test part, name to value; empty before the final test.
    """

    state: str
    best: int | None = None
    score: float | None = None
    model: str | None = None
    test: Mapping[str, float] = field(default_factory=dict)


Emit = Callable[[object], None]


def ignore(_event: object) -> None:
    """Show nothing."""
