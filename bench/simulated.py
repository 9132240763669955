"""A search whose workers only wait: the real coordinator, study and database, trials of known seconds."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tlauto.builtin.tasks import task
from tlauto.config import SearchConfig
from tlauto.contracts import BackboneInfo, TrialDone, TrialFailed, TrialSpec
from tlauto.coordinator import run
from tlauto.data import Dataset
from tlauto.pace import Sizes
from tlauto.plugins import registry
from tlauto.pool.base import Event
from tlauto.pool.protocol import BundleDone, Message, RunTrial, WriteBundle
from tlauto.prepare import Session, propose_first
from tlauto.schedule import Plan
from tlauto.searchspace import SearchSpace
from tlauto.store import Store
from tlauto.study import Study

NAME = "simulated"
BACKBONES = tuple(f"simulated:network{i}" for i in range(10))
ENDLESS = 10**6


class Ended(Exception):
    """The time of the simulation is up."""


@dataclass(order=True)
class _Due:
    at: float
    slot: str
    message: Message = field(compare=False)
    sent: float = field(compare=False)


class SimulatedPool:
    """Slots whose trials take the seconds they are told to, of the real clock.

    Args:
        seconds: of a trial, by its number.
        failing: share of the trials that fail.
        lasts: seconds after which `wait` raises Ended.

    Attributes:
        ended: trials that did.
    """

    def __init__(
        self, slots: int, *, seconds: Callable[[int], float], lasts: float, failing: float = 0.0
    ) -> None:
        self.slots = tuple(f"simulated:{i}" for i in range(slots))
        self.ended = 0
        self._busy = 0.0
        self._seconds = seconds
        self._failing = failing
        self._lasts = lasts
        self._started = time.monotonic()
        self._due: list[_Due] = []

    def start(self) -> None:
        """Begin to count the time."""
        self._started = time.monotonic()

    @property
    def utilisation(self) -> float:
        """Share of the slots' time in which they had something to do."""
        end = self._started + self._lasts
        running = sum(max(0.0, min(due.at, end) - due.sent) for due in self._due)
        return (self._busy + running) / (len(self.slots) * self._lasts)

    def send(self, slot: str, message: Message) -> None:
        """Begin a trial; a bundle is written at once."""
        now = time.monotonic()
        match message:
            case RunTrial(spec):
                seconds = self._seconds(spec.number)
                self._push(_Due(now + seconds, slot, self._end(spec, seconds), now))
            case WriteBundle():
                self._push(_Due(now, slot, BundleDone(message.folder, message.spec.number), now))

    def wait(self, timeout_s: float) -> list[Event]:
        """What has ended since the last call. Raises: Ended."""
        until = time.monotonic() + timeout_s
        end = self._started + self._lasts
        first = self._due[0].at if self._due else until
        time.sleep(max(0.0, min(until, first, end) - time.monotonic()))
        now, events = time.monotonic(), []
        if now >= end:
            raise Ended
        while self._due and self._due[0].at <= now:
            due = heapq.heappop(self._due)
            self.ended += not isinstance(due.message, BundleDone)
            self._busy += due.at - due.sent
            events.append(Event(due.slot, due.message))
        return events

    def warm_up(self, slots: Sequence[str]) -> None:
        """Nothing to start."""

    def kill(self, slot: str) -> None:
        """Forget what a slot does."""
        self._due = [due for due in self._due if due.slot != slot]
        heapq.heapify(self._due)

    def close(self, *, grace_s: float = 1.0) -> None:
        """Nothing to end."""

    def _push(self, due: _Due) -> None:
        heapq.heappush(self._due, due)

    def _end(self, spec: TrialSpec, seconds: float) -> Message:
        chance = random.Random(f"simulated/{spec.number}")
        if chance.random() < self._failing:
            return TrialFailed(spec.number, "error", "it was to fail")
        score = chance.uniform(0.5, 0.9)
        accuracy = {"accuracy": {"value": score, "low": score - 0.1, "high": score + 0.1}}
        return TrialDone(
            number=spec.number, score=score, metrics=accuracy, val_loss=1 - score, best_epoch=1, epochs=1,
            seconds=seconds, checkpoint="checkpoint.safetensors", held_out=score,
        )  # fmt: skip


def space() -> SearchSpace:
    """What a search of ten backbones samples from by default."""
    plugins = registry()
    config = SearchConfig(data="none")
    strategies = tuple(plugins.strategy(name) for name in config.recipe.strategies)
    heads = tuple(plugins.head(name) for name in ("linear", "mlp", "cosine"))
    return SearchSpace(BACKBONES, strategies, heads, task("multiclass").space, dict(config.recipe.fixed))


def open_simulated(folder: Path, pool: SimulatedPool, *, seed: int) -> Session:
    """A session like `prepare.open_session` makes, with an SQLite file in a folder and no images."""
    config = SearchConfig(data="none", out=str(folder), study=NAME, trials=ENDLESS, seed=seed, devices="cpu")
    url = f"sqlite:///{folder / 'tlauto.db'}"
    store = Store(url)
    store.create_search(
        NAME, config=config.to_json(), dataset="", fingerprint="", root="", report="", plan={}
    )
    study = Study(url, NAME, seed=seed, create=True)
    plan = Plan(
        config=config, space=space(), task="multiclass", metric="accuracy", dataset_file="", folder=folder,
        cache=folder, device="cpu", sizes=Sizes(800, 200, 200),
    )  # fmt: skip
    propose_first(study, plan)
    infos = {id: BackboneInfo(id) for id in BACKBONES}
    return Session(config, NAME, store, study, Dataset("", "multiclass", (), (), ""), infos, plan, pool)


def simulate(folder: Path, pool: SimulatedPool, *, seed: int = 0) -> None:
    """Search until the pool's time is up."""
    session = open_simulated(folder, pool, seed=seed)
    pool.start()
    try:
        run(session.config, session=session)
    except Ended:
        return
    raise RuntimeError(f"a search of {ENDLESS} trials ended before its time was up")
