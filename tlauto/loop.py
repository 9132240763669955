"""What the coordinator knows while it runs: which slot does what, and how much time is gone."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from tlauto.contracts import EpochResult, TrialSpec
from tlauto.devices import device_of, is_gpu, is_here
from tlauto.events import Emit
from tlauto.memory import capacity_bytes
from tlauto.pace import held_back
from tlauto.pool.protocol import StepTried, TogetherDone, Used
from tlauto.prepare import Session
from tlauto.ranking import best_trial


@dataclass
class Job:
    """What a busy slot does: a trial, or the bundle of the trial it just ran.

    Attributes:
        resumed: epochs that were done when the trial went on.
        epoch: the only one of a trial on cached features, recorded together with its result.
        stage: of a trial: it waits for room or is refused, a step of it is tried, or it runs.
        needs: bytes of memory that it is taken to need; None when nothing is known.
        may_try: whether a step is to be tried before it runs; tried: what that took.
        waits_alone: whether that did not fit beside others.
        used: what it took in the end.
        is_alone: whether nothing else has run on its device since it began.
        beside: further trials that the slot's worker solves together with it (`batching`).
        is_apart: whether it was begun with others, which failed, and is to run by itself.
    """

    spec: TrialSpec
    started: float
    is_bundle: bool = False
    resumed: int | None = None
    epoch: EpochResult | None = None
    stage: Literal["held", "step", "runs"] = "runs"
    needs: float | None = None
    may_try: bool = False
    tried: StepTried | None = None
    waits_alone: bool = False
    used: Used | None = None
    is_alone: bool = True
    beside: tuple[Job, ...] = ()
    is_apart: bool = False

    @property
    def every(self) -> tuple[Job, ...]:
        """This and those beside it."""
        return (self, *self.beside)


@dataclass
class Loop:
    """The coordinator's state between two rounds.

    Attributes:
        busy: jobs by slot.
        waiting: proposed trials that no slot has taken yet.
        ended: trials that were solved together and are to be recorded: slot, job, and how they ended.
        started: when this run began, by the monotonic clock.
        spent_before, saved_at: active seconds of earlier runs, and those that the database knows of.
        bundled, bundling: numbers of the trials whose bundle was written last, and is being written.
        may_bundle_at: when the next one may be written.
        failures: trials that failed since the last one that did not, those aside that are tried again.
        hopeless: why the search is to end with an error.
        capacity: bytes of memory of each device, once a worker has told.
        has_said_short: whether the user was told that memory is short.
    """

    session: Session
    emit: Emit
    interrupted: threading.Event
    busy: dict[str, Job] = field(default_factory=dict)
    waiting: deque[Job] = field(default_factory=deque)
    ended: list[tuple[str, Job, TogetherDone]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    spent_before: float = 0.0
    saved_at: float = 0.0
    bundled: int | None = None
    bundling: int | None = None
    may_bundle_at: float = 0.0
    failures: int = 0
    hopeless: str = ""
    capacity: dict[str, int] = field(default_factory=dict)
    has_said_short: bool = False

    def beside(self, slot: str) -> list[Job]:
        """Trials on the other slots of a slot's device, of those that run together the first."""
        device = device_of(slot)
        others = (job for name, job in self.busy.items() if name != slot and device_of(name) == device)
        return [job for job in others if not job.is_bundle]

    def running_beside(self, slot: str) -> list[Job]:
        """Those of them that do not wait for room."""
        return [job for job in self.beside(slot) if job.stage != "held"]

    def capacity_of(self, slot: str) -> int | None:
        """Bytes of memory that a trial may have on a slot's device; None when nobody has told."""
        shares_memory = is_here(slot) and not is_gpu(slot)
        return self.capacity.get(device_of(slot)) or (capacity_bytes() if shares_memory else None)

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
        members = session.config.ensemble
        end = held_back(trials, session.plan.sizes, best=number, members=members, limit=limit)
        return limit - self.spent() - end
