"""Replay recorded trials: tlauto's own loop, with a pool of workers that answers from a table.

Time is the sum of the recorded seconds of what a policy let run. A proposed point is answered by the
nearest recorded configuration that this simulated search has not had yet.
"""

from __future__ import annotations

import json
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from curves import PRESET, Recorded, Table, use_preset
from torch import nn

from tlauto.config import SearchConfig
from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec
from tlauto.coordinator import run
from tlauto.data import Dataset
from tlauto.events import Emit, Progress, ignore
from tlauto.pace import PROBE_STRATEGY, Sizes
from tlauto.pool.base import Event
from tlauto.pool.protocol import Answer, BundleDone, Message, RunTrial, WriteBundle
from tlauto.prepare import Session, propose_first
from tlauto.rungs import STATE_FILE
from tlauto.schedule import Plan
from tlauto.space import Choice, Parameter, Scalar
from tlauto.store import Store
from tlauto.study import Study
from tlauto.tables import MEMORY
from tlauto.training.trial import Best, Evaluation

SLOT = "cpu:0"
NAME = "replay"
ENDLESS = 10**6
"""Trials of a search that its budget of seconds ends."""

WEIGHTS = {"strategy": 1e6, "backbone": 1e4, "head": 1e2}
"""What another value counts, before all numbers together; a strategy first, since it decides the cost."""

NOTHING = nn.Module()  # in place of a model whose best epoch is to be kept
NO_ANSWERS = np.zeros(0)


class Ended(Exception):
    """The simulated time is up, or no recorded trial of the proposed kind is left."""


class Recordings:
    """A table, ready for looking up the nearest configurations."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.space = table.space()
        self.parameters: dict[str, Parameter] = {}
        for row in table.rows:
            self._note(row)
        self.names = sorted(self.parameters)
        self.weights = np.array([WEIGHTS.get(name, 1.0) for name in self.names])
        self.places = np.stack([self._place(row.params) for row in table.rows])  # (N, P)

    def distances(self, point: Mapping[str, Scalar]) -> np.ndarray:
        """How far each recorded configuration (N,) is from a point.

        A number counts by its distance in the parameter's own scale, which is 1 from end to end; another
        choice, and a parameter that only one of the two has, count 1, or as `WEIGHTS` says.
        """
        place = self._place(point)
        apart = np.abs(self.places - place)
        neither = np.isnan(self.places) & np.isnan(place)
        apart = np.where(neither, 0.0, np.where(np.isnan(apart), 1.0, np.minimum(apart, 1.0)))
        return np.asarray(apart @ self.weights)

    def _note(self, row: Recorded) -> None:
        """Remember the parameters that a recorded point has."""

        def pick(name: str, parameter: Parameter) -> Scalar:
            self.parameters[name] = parameter
            return row.params[name]

        self.space.walk(pick)

    def _place(self, point: Mapping[str, Scalar]) -> np.ndarray:
        """A point as numbers (P,), NaN where it has no such parameter; of choices, the index."""
        return np.array([_scaled(self.parameters[n], point[n]) if n in point else np.nan for n in self.names])


def _scaled(parameter: Parameter, value: Scalar) -> float:
    if isinstance(parameter, Choice):
        return float(parameter.values.index(value))
    assert isinstance(value, (int, float))
    low, high, at = (
        np.log([parameter.low, parameter.high, value])
        if parameter.log
        else np.array([parameter.low, parameter.high, value], dtype=float)
    )
    return float((at - low) / (high - low)) if high > low else 0.0


@dataclass
class Account:
    """What one simulated search has had and what it cost.

    Attributes:
        budget: seconds after which no trial begins.
        trials: of each trial that ran: its row's number, its first and last epoch, its seconds.
    """

    recordings: Recordings
    budget: float
    seconds: float = 0.0
    used: set[int] = field(default_factory=set)
    backbones: set[str] = field(default_factory=set)
    trials: list[tuple[int, int, int, float]] = field(default_factory=list)
    is_exhausted: bool = False

    def check(self) -> None:
        """Raise Ended when the time is up."""
        if self.seconds >= self.budget:
            raise Ended

    def take(self, point: Mapping[str, Scalar]) -> Recorded:
        """The nearest configuration that was not taken before, and pay for a backbone's first pass.

        Raises: Ended when the time is up, or none of the point's strategy is left.
        """
        self.check()
        distances = self.recordings.distances(point)
        distances[list(self.used)] = np.inf
        nearest = int(distances.argmin())
        if distances[nearest] >= WEIGHTS["strategy"]:
            self.is_exhausted = True
            raise Ended
        self.used.add(nearest)
        row = self.recordings.table.rows[nearest]
        backbone = str(row.params["backbone"])
        if backbone not in self.backbones:
            self.backbones.add(backbone)
            self.seconds += float(self.recordings.table.header["features_seconds"][backbone])
        return row


@dataclass(frozen=True)
class Simulated:
    """A simulated search.

    Attributes:
        curve: seconds and the row of the trial that the policy would ship from then on.
        account: what ran.
    """

    curve: list[tuple[float, Recorded]]
    account: Account


def search(recordings: Recordings, *, seed: int, budget: float, emit: Emit = ignore) -> Simulated:
    """tlauto's own search over a table, until its budget of seconds is used up."""
    account = Account(recordings, budget)
    pool = ReplayPool(account)
    curve: list[tuple[float, Recorded]] = []

    def hear(event: object) -> None:
        emit(event)
        if isinstance(event, Progress) and event.best_number is not None:
            best = pool.rows[event.best_number]
            if not curve or curve[-1][1] is not best:
                curve.append((account.seconds, best))

    with tempfile.TemporaryDirectory() as folder:
        session = open_replay(recordings, pool, Path(folder), seed)
        try:
            run(session.config, emit=hear, session=session)
        except Ended:
            return Simulated(curve, account)
    raise RuntimeError(f"a search of {ENDLESS} trials ended before its time was up")


def open_replay(recordings: Recordings, pool: ReplayPool, folder: Path, seed: int) -> Session:
    """A session like `prepare.open_session` makes, but for images and workers, of which there are none."""
    about = recordings.table.header
    use_preset(about["epochs"], about["epoch_images"])
    infos = recordings.table.infos()
    config = SearchConfig(
        data=about["data"], out=str(folder), study=NAME, trials=ENDLESS, preset=PRESET, seed=seed,
        backbones=tuple(infos), devices="cpu", workers=0,
    )  # fmt: skip
    dataset = Dataset("", about["task"], (), (), about["fingerprint"])
    plan = Plan(
        config=config, space=recordings.space, task=about["task"], metric=about["metric"],
        dataset_file="", folder=folder, cache=folder, device="cpu", sizes=Sizes(*about["sizes"]),
    )  # fmt: skip
    store, study = Store("sqlite://"), Study(MEMORY, NAME, seed=seed, create=True)
    store.create_search(
        NAME, config=config.to_json(), dataset="", fingerprint="", root="", report="", plan={}
    )
    propose_first(study, plan)
    return Session(config, NAME, store, study, dataset, infos, plan, pool)


@dataclass
class _Running:
    """A trial that is being replayed; `before` are the epochs that an earlier one had done."""

    spec: TrialSpec
    row: Recorded
    before: int
    best: Best
    seconds: float = 0.0


class ReplayPool:
    """A pool of one worker that looks up what it would measure. Writing a bundle costs nothing."""

    slots = (SLOT,)

    def __init__(self, account: Account) -> None:
        self.account = account
        self.rows: dict[int, Recorded] = {}
        self._events: deque[Event] = deque()
        self._running: _Running | None = None
        self._is_over = False

    def send(self, slot: str, message: Message) -> None:
        """Start a trial, or go on with it as it is answered; one that may not begin is not answered."""
        match message:
            case RunTrial(spec):
                try:
                    self._start(spec)
                except Ended:
                    self._is_over = True
            case Answer(go_on) if self._running:
                self._go_on(self._running, go_on)
            case WriteBundle():
                self._say(BundleDone(message.folder, message.spec.number))

    def wait(self, timeout_s: float) -> list[Event]:
        """What was said since the last call.

        Raises: Ended when the time is up: here, where what was said before it is written and shown.
        """
        if self._is_over:
            raise Ended
        events = list(self._events)
        self._events.clear()
        return events

    def warm_up(self, slots: Sequence[str]) -> None:
        """Nothing to start."""

    def kill(self, slot: str) -> str:
        """Forget the running trial."""
        self._running = None
        return ""

    def close(self, *, grace_s: float = 1.0) -> None:
        """Nothing to end."""

    def _start(self, spec: TrialSpec) -> None:
        row, before = self._find(spec)
        self.rows[spec.number] = row
        if row.failed is not None:
            self.account.seconds += row.seconds
            self.account.trials.append((row.number, 0, 0, row.seconds))
            self._say(TrialFailed(spec.number, *row.failed))
            return
        trial = self._running = _Running(spec, row, before, Best(spec.patience))
        for epoch in range(before):
            self._evaluate(trial, epoch)
        if before:
            # It prepares again: what the first epoch took beyond the second.
            self._spend(trial, max(0.0, row.epochs[0][2] - row.epochs[1][2]))
        self._epoch(trial)

    def _find(self, spec: TrialSpec) -> tuple[Recorded, int]:
        """The row that answers a trial, and the epochs that are done if it goes on."""
        if spec.resume_from:
            self.account.check()
            state = json.loads(Path(spec.resume_from).read_text())
            return self.rows[state["trial"]], int(state["epochs"])
        point = {"backbone": spec.backbone, "strategy": spec.strategy, "head": spec.head, **spec.params}
        return self.account.take(point), 0

    def _epoch(self, trial: _Running) -> None:
        score, loss, seconds = trial.row.epochs[trial.best.seen]
        self._spend(trial, seconds)
        self._evaluate(trial, trial.best.seen)
        self._say(EpochResult(trial.spec.number, trial.best.seen, score, 0.0, loss, seconds))

    def _evaluate(self, trial: _Running, epoch: int) -> None:
        score, loss, _ = trial.row.epochs[epoch]
        trial.best.add(epoch + 1, Evaluation(score, loss, NO_ANSWERS), NOTHING)

    def _go_on(self, trial: _Running, go_on: bool) -> None:
        """What `finetune.fine_tune` does after an epoch."""
        epoch, last = trial.best.seen, len(trial.row.epochs)
        is_pruned = not go_on and epoch < last
        if not is_pruned and not trial.best.is_stale and epoch < last:
            self._epoch(trial)
            return
        if is_pruned and not trial.best.is_stale:
            state = Path(trial.spec.folder, STATE_FILE)
            state.parent.mkdir(parents=True, exist_ok=True)
            state.write_text(json.dumps({"trial": trial.spec.number, "epochs": epoch}))
        self._end(trial, is_pruned)

    def _end(self, trial: _Running, is_pruned: bool) -> None:
        spec, row, best = trial.spec, trial.row, trial.best
        is_proven = _is_proven(spec, row)
        whole = row.proven_seconds if is_proven and row.proven_seconds is not None else row.seconds
        self._spend(trial, max(0.0, whole - sum(seconds for _, _, seconds in row.epochs)))
        self.account.trials.append((row.number, trial.before + 1, best.seen, trial.seconds))
        self._running = None
        score = best.winner.score
        self._say(
            TrialDone(
                spec.number, score, {spec.metric: {"value": score, "low": score, "high": score}},
                best.winner.loss, best.epoch, best.seen, trial.seconds, "", is_pruned,
                held_out=row.held_out if is_proven else None,
            )
        )  # fmt: skip

    def _spend(self, trial: _Running, seconds: float) -> None:
        trial.seconds += seconds
        self.account.seconds += seconds

    def _say(self, message: Message) -> None:
        self._events.append(Event(SLOT, message))


def _is_proven(spec: TrialSpec, row: Recorded) -> bool:
    """Whether a search would have cross-validated a frozen trial, as `frozen.fit_head` decides."""
    if row.held_out is None or spec.strategy != PROBE_STRATEGY:
        return False
    is_solved = row.params.get("probe.solver", "minibatch") != "minibatch"
    return is_solved or (spec.prove_above is not None and row.score >= spec.prove_above)
