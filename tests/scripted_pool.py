"""A pool whose trials take the memory and the time that a test says, of a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from simulated import BACKBONES, NAME

from tlauto.builtin.tasks import task
from tlauto.config import SearchConfig
from tlauto.contracts import BackboneInfo, EpochResult, TrialDone, TrialSpec
from tlauto.coordinator import run
from tlauto.data import Dataset, Item
from tlauto.devices import device_of
from tlauto.pace import Sizes
from tlauto.plugins import registry
from tlauto.pool.base import Event
from tlauto.pool.protocol import (
    BundleDone,
    JobFailed,
    Message,
    RunTogether,
    RunTrial,
    StepTried,
    TogetherDone,
    TryStep,
    Used,
    WriteBundle,
)
from tlauto.prepare import Session, propose_first
from tlauto.schedule import Plan
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar
from tlauto.store import Store
from tlauto.study import Study
from tlauto.tables import MEMORY

ITEMS = tuple(
    Item(f"{i}.png", i % 2, part, str(i)) for i, part in enumerate(("train",) * 4 + ("val", "test"))
)


class Over(Exception):
    """All trials have run."""


@dataclass
class Sent:
    """A job as it was sent: where, when, and what ran on the same device then."""

    slot: str
    spec: TrialSpec
    is_step: bool
    ends: float
    beside: tuple[int, ...]
    together: tuple[TrialSpec, ...] = ()


@dataclass
class ScriptedPool:
    """Slots whose trials end in the order of their seconds, however long the test itself takes.

    Attributes:
        seconds: that a trial takes, and those that are solved together with it.
        fails: what is said instead of the end of trials that are solved together.
        takes: what a step takes, with at most so many images at once; None when it cannot be tried.
        used: what a trial took.
        sent: all jobs but bundles, in order.
        idle: slots without a job, and trials sent so far, at each `wait`.
    """

    slots: Sequence[str]
    seconds: Callable[[TrialSpec], float] = lambda spec: 1.0
    takes: Callable[[TrialSpec, int], StepTried | None] = lambda spec, at_once: None
    used: Callable[[TrialSpec], Used] = lambda spec: Used(None, None)
    fails: Callable[[tuple[TrialSpec, ...]], Message | None] = lambda specs: None
    sent: list[Sent] = field(default_factory=list)
    idle: list[tuple[int, int]] = field(default_factory=list)
    now: float = 0.0
    _running: dict[str, Sent] = field(default_factory=dict)
    _most: dict[str, int | None] = field(default_factory=dict)
    _said: list[Event] = field(default_factory=list)

    @property
    def trials(self) -> list[Sent]:
        """Trials that were sent, in order; not the steps that were tried."""
        return [sent for sent in self.sent if not sent.is_step]

    def send(self, slot: str, message: Message) -> None:
        """Begin a job. Raises: Over when it is a refit."""
        match message:
            case RunTrial(spec):
                if spec.purpose == "refit":
                    raise Over
                self._begin(slot, spec, self.seconds(spec), is_step=False)
            case RunTogether(specs):
                self._begin(slot, specs[0], self.seconds(specs[0]), is_step=False, together=specs)
            case TryStep(spec, at_once, most):
                self._most[slot] = most
                self._begin(slot, replace(spec, micro_batch=at_once), 0.1, is_step=True)
            case WriteBundle():
                self._said.append(Event(slot, BundleDone(message.folder, message.spec.number)))

    def warm_up(self, slots: Sequence[str]) -> None:
        """Nothing to start."""

    def wait(self, timeout_s: float) -> list[Event]:
        """Let the first job end."""
        started = len(self.trials)
        self.idle.append((len(self.slots) - len(self._running), started))
        if self._said:
            said, self._said = self._said, []
            return said
        assert self._running, "every slot waits for another"
        slot, job = min(self._running.items(), key=lambda pair: pair[1].ends)
        del self._running[slot]
        self.now = job.ends
        if job.is_step:
            assert job.spec.micro_batch is not None
            tried, most = self.takes(job.spec, job.spec.micro_batch), self._most[slot]
            if tried and most is not None and (tried.bytes or 0) > most:
                tried = replace(tried, at_once=None)
            return [Event(slot, tried or JobFailed("it cannot be tried"))]
        if job.together and (message := self.fails(job.together)):
            return [Event(slot, message)]
        end = together_done(job.together) if job.together else done(job.spec)
        return [Event(slot, self.used(job.spec)), Event(slot, end)]

    def kill(self, slot: str) -> str:
        """Forget what a slot does."""
        self._running.pop(slot, None)
        return ""

    def close(self, *, grace_s: float = 1.0) -> None:
        """Nothing to end."""

    def _begin(
        self, slot: str, spec: TrialSpec, seconds: float, *, is_step: bool,
        together: tuple[TrialSpec, ...] = (),
    ) -> None:  # fmt: skip
        assert slot not in self._running
        others = [s for s in self._running.values() if device_of(s.slot) == device_of(slot)]
        beside = tuple(other.spec.number for other in others)
        self._running[slot] = Sent(slot, spec, is_step, self.now + seconds, beside, together)
        self.sent.append(self._running[slot])


def together_done(specs: tuple[TrialSpec, ...]) -> TogetherDone:
    """The ends of trials that were solved together."""
    epochs = tuple(EpochResult(spec.number, 1, 0.8, 0.1, 0.2, 1.0) for spec in specs)
    return TogetherDone(tuple(map(done, specs)), epochs)


def done(spec: TrialSpec) -> TrialDone:
    """A trial whose score depends on nothing."""
    accuracy = {"accuracy": {"value": 0.8, "low": 0.7, "high": 0.9}}
    return TrialDone(
        number=spec.number, score=0.8, metrics=accuracy, val_loss=0.2, best_epoch=1, epochs=1, seconds=1.0,
        checkpoint="checkpoint.safetensors",
    )  # fmt: skip


def open_scripted(
    folder: Path, pool: ScriptedPool, *, strategies: Sequence[str], trials: int, device: str,
    per_device: str | None = None, backbones: int = 2, propose: bool = True, in_file: bool = False,
    fixed: Mapping[str, Scalar] | None = None,
) -> Session:  # fmt: skip
    """A session without images; tlauto's tables in an SQLite file, Optuna's too or, which is faster, not."""
    config = SearchConfig(
        data="none", out=str(folder), study=NAME, trials=trials, devices="auto", per_device=per_device
    )
    url = f"sqlite:///{folder / 'tlauto.db'}"
    store = Store(url)
    store.create_search(
        NAME, config=config.to_json(), dataset="", fingerprint="", root="", report="", plan={}
    )
    study = Study(url if in_file else MEMORY, NAME, seed=0, create=True)
    plugins = registry()
    chosen = BACKBONES[:backbones]
    offers = tuple(plugins.strategy(name) for name in strategies)
    parts = chosen, offers, (plugins.head("linear"),), task("multiclass").space
    space = SearchSpace(*parts, fixed=fixed or {})
    plan = Plan(
        config=config, space=space, task="multiclass", metric="accuracy", dataset_file="", folder=folder,
        cache=folder, device=device, sizes=Sizes(800, 200, 200),
        slots=len(pool.slots),
    )  # fmt: skip
    if propose:
        propose_first(study, plan)
    infos = {id: BackboneInfo(id) for id in chosen}
    return Session(
        config, NAME, store, study, Dataset("", "multiclass", ("a", "b"), ITEMS, ""), infos, plan, pool
    )


def search(session: Session, said: list[object] | None = None) -> None:
    """Search to the end, up to the refits."""
    try:
        run(session.config, emit=(said if said is not None else []).append, session=session)
    except Over:
        return
    raise AssertionError("the search never came to its refits")
