"""What the coordinator knows while it runs: which slot does what, and how much time is gone."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from tlauto.contracts import EpochResult, TrialSpec
from tlauto.events import Emit
from tlauto.pace import held_back
from tlauto.prepare import Session
from tlauto.schedule import best_trial


@dataclass
class Job:
    """What a busy slot does: a trial, or the bundle of the trial it just ran.

    Attributes:
        resumed: epochs that were done when the trial went on.
        stopped: why the trial was told to end early.
        epoch: the only one of a trial on cached features, recorded together with its result.
    """

    spec: TrialSpec
    started: float
    is_bundle: bool = False
    resumed: int | None = None
    stopped: str = ""
    epoch: EpochResult | None = None


@dataclass
class Loop:
    """The coordinator's state between two rounds.

    Attributes:
        busy: jobs by slot.
        started: when this run began, by the monotonic clock.
        spent_before, saved_at: active seconds of earlier runs, and those that the database knows of.
        bundled, bundling: numbers of the trials whose bundle was written last, and is being written.
        may_bundle_at: when the next one may be written.
        failures: trials that failed since the last one that did not, those aside that are tried again.
        hopeless: why the search is to end with an error.
    """

    session: Session
    emit: Emit
    interrupted: threading.Event
    busy: dict[str, Job] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    spent_before: float = 0.0
    saved_at: float = 0.0
    bundled: int | None = None
    bundling: int | None = None
    may_bundle_at: float = 0.0
    failures: int = 0
    hopeless: str = ""

    def spent(self) -> float:
        """Active seconds, earlier runs included."""
        return self.spent_before + time.monotonic() - self.started

    def seconds_left(self) -> float | None:
        """Seconds that trials may still take; what the final refit will need is held back."""
        limit = self.session.config.time_s
        if limit is None:
            return None
        session, trials = self.session, self.session.study.trials()
        best = best_trial(trials)
        number = best.number if best else None
        end = held_back(trials, session.plan.sizes, best=number, members=session.config.ensemble)
        return limit - self.spent() - end
