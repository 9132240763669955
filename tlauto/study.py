"""The only module that knows Optuna: propose trials and record their course."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tlauto.connections import is_conflict
from tlauto.errors import StoreError
from tlauto.sampler import Ended, Kept, make_sampler
from tlauto.searchspace import SearchSpace
from tlauto.space import Choice, Float, Int, Parameter, Scalar
from tlauto.tables import MEMORY, close_storage, explained, open_storage, opened
from tlauto.writethrough import WriteThrough

FORMAT = 1
INTERRUPTED = "interrupted"
"""Error kind of a trial that was cut off; it does not count and is proposed again on resume."""

OUT_OF_TIME = "out of time"
"""Error kind of a trial that still ran when the time was up; it does not count either."""

ORIGIN = ("purpose", "from_study", "micro_batch", "beside")
"""Attributes that say why and how a trial is run; one that is proposed again keeps them."""

PROPOSED = "fixed_params"
"""Attribute of Optuna's in which the parameters of an enqueued trial wait to be drawn."""

ENDED = ("complete", "pruned", "failed", "shelved")
"""States of trials that are over."""

SHELVED, POINT = "shelved", "point"
"""Attributes of trials that come from another version: the state they ended in; all parameters, where
the new version's categories do not take them."""

VAIN = 3
"""Interruptions in a row, none after a further epoch, with which a trial is given up: it may be what takes
the machine down."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial as the study knows it.

    Attributes:
        state: waiting, running, complete, pruned, failed, or shelved: complete or pruned, but with a
            backbone, strategy or head that this version of the study does not search (`versions`).
        reports: score by epoch (from 1) of a trial that trains the backbone.
    """

    number: int
    state: str
    params: Mapping[str, Scalar]
    score: float | None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    reports: Mapping[int, float] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        """Whether it counts towards the total of trials; of several attempts at one, the last does."""
        is_over = self.state in ENDED and not self.attrs.get("retried")
        return is_over and self.attrs.get("error_kind") not in (INTERRUPTED, OUT_OF_TIME)


def earlier_ends(trial: TrialRecord, trials: Sequence[TrialRecord]) -> list[str]:
    """Error kinds of the attempts that were made at a trial before this one, the last one first."""
    ends: list[str] = []
    while (number := trial.attrs.get("retry_of")) is not None:
        ends.append(str(trial.attrs.get("retry_why", INTERRUPTED)))
        trial = trials[int(number)]
    return ends


def vain_attempts(trial: TrialRecord, trials: Sequence[TrialRecord]) -> int:
    """How often in a row an interrupted trial was cut off, this time included, without a further epoch."""
    count = 0
    while True:
        number = trial.attrs.get("retry_of")
        before = None if number is None else trials[int(number)]
        if len(trial.reports) > (len(before.reports) if before else 0):
            return count
        count += 1
        if before is None or trial.attrs.get("retry_why") != INTERRUPTED:
            return count
        trial = before


def versioned(name: str, version: int) -> str:
    """What Optuna calls a version of a study; no study of a user's can be called so."""
    return name if version == 1 else f"{name}@{version}"


def check_name(url: str, name: str, *, create: bool) -> None:
    """Raise StoreError when the study of that name is not ours, or is gone while `create` is False."""
    with opened(url) as storage:
        _exists(storage, name, create=create)


@contextmanager
def trial_reader(url: str) -> Iterator[Callable[[str], list[TrialRecord]]]:
    """A function from a study's name to its trials, for studies that are only read.

    It raises StoreError when the trials of a study are gone or damaged.
    """

    def read(name: str) -> list[TrialRecord]:
        try:
            with explained(url):
                return [_record(t) for t in storage.get_all_trials(storage.get_study_id_from_name(name))]
        except KeyError:
            raise StoreError("its trials are gone from the database") from None
        except (ValueError, TypeError) as error:
            raise StoreError(f"its trials cannot be read ({error!r})") from None

    with opened(url) as storage:
        yield read


class Study:
    """One Optuna study of ours in a database.

    Raises: StoreError when a study of that name exists that tlauto did not make, or when it does not
    exist and `create` is False.
    """

    def __init__(self, url: str, name: str, *, seed: int, create: bool, version: int = 1) -> None:
        self.name = name
        self._stored_as = versioned(name, version)
        self.seed = seed
        self._url = url
        self._running: dict[int, optuna.Trial] = {}
        self._records: list[TrialRecord] = []
        self._changed: set[int] = set()
        self._ended = Ended()
        self._storage = open_storage(url)
        with explained(url), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            exists = _exists(self._storage, self._stored_as, create=create)
            if isinstance(self._storage, optuna.storages.RDBStorage):
                self._storage = WriteThrough(self._storage, self._stored_as)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name=self._stored_as,
                direction="maximize",
                # Optuna's pruners end trials; ours pause and go on (`rungs`).
                pruner=optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
            if not exists:
                self._study.set_user_attr("tlauto_format", FORMAT)

    def close(self) -> None:
        """Release the connections."""
        close_storage(self._storage)

    def set_metric(self, metric: str) -> None:
        """Name the score, for the dashboard."""
        with explained(self._url), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([metric])

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Turn what Optuna's storage raises within the block into a StoreError."""
        try:
            with explained(self._url):
                yield
        except (KeyError, StoreError) as error:
            # A record that is not there any more is a KeyError, or refused; so is a mistake of ours.
            if self._url != MEMORY and (isinstance(error, KeyError) or is_conflict(error.__cause__)):
                check_name(self._url, self._stored_as, create=False)
            raise

    # --- proposing --------------------------------------------------------------------------------

    def enqueue(self, params: Mapping[str, Scalar], *, purpose: str, **attrs: Any) -> None:
        """Propose this point before anything the sampler would; the caller has validated it.

        Args:
            attrs: further facts to record of the trial, such as `from_study`.
        """
        self._study.enqueue_trial(dict(params), user_attrs={"purpose": purpose, **attrs})

    def ask(self, space: SearchSpace, *, kept: Kept | None = None) -> TrialRecord:
        """The next point: what is enqueued, else TPE's proposal among the values in `kept`.

        The sampler is seeded by the study's seed and the trial's number, so that what is proposed
        depends on the recorded trials alone, not on how often the search was stopped.
        """
        records = self.trials()
        waiting = [record.number for record in records if record.state == "waiting"]
        seed = random.Random(f"{self.seed}/{min(waiting, default=len(records))}").randrange(2**31)
        self._study.sampler = make_sampler(seed, kept or {}, self._ended, is_alone=not self._running)
        with self.together():
            trial = self._study.ask()
            params = space.walk(lambda name, parameter: _suggest(trial, name, parameter))
            trial.set_user_attr("purpose", trial.user_attrs.get("purpose", "search"))
        self._running[trial.number] = trial
        self._changed.add(trial.number)
        return TrialRecord(trial.number, "running", params, None, trial.user_attrs)

    # --- recording --------------------------------------------------------------------------------

    def together(self) -> AbstractContextManager[None]:
        """A block whose changes are one transaction, written at its end."""
        return self._storage.together() if isinstance(self._storage, WriteThrough) else nullcontext()

    def note(self, number: int, **values: Any) -> None:
        """Attach readable facts to a running trial; the dashboard shows them."""
        self._changed.add(number)
        with self.together():
            for key, value in values.items():
                self._running[number].set_user_attr(key, value)

    def report(self, number: int, epoch: int, score: float) -> None:
        """Record an epoch's score; one that goes on from a state may come to an epoch again."""
        if epoch not in self.trials()[number].reports:
            self._changed.add(number)
            self._running[number].report(score, epoch)

    def tell(self, number: int, score: float, *, is_pruned: bool = False) -> None:
        """End a trial with its score."""
        with self.together():
            trial = self._running.pop(number)
            self._changed.add(number)
            if is_pruned:
                # Optuna takes the last reported value for a pruned trial: ours is the best epoch's.
                trial.set_user_attr("score", score)
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, score)

    def fail(self, number: int, *, kind: str, message: str) -> None:
        """End a trial as failed; `kind` INTERRUPTED is not counted."""
        with self.together():
            trial = self._running.pop(number)
            self._changed.add(number)
            trial.set_user_attr("error_kind", kind)
            trial.set_user_attr("error", message)
            self._study.tell(trial, state=TrialState.FAIL)

    def adopt(self) -> list[int]:
        """Take the trials over that a dead coordinator left running; their numbers."""
        left = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._running = {frozen.number: optuna.Trial(self._study, frozen._trial_id) for frozen in left}
        return list(self._running)

    def requeue_interrupted(self) -> list[int]:
        """Fail the trials that a dead coordinator left running and propose them again, each as one trial.

        Returns: their numbers.
        """
        left = self.adopt()
        for number in left:
            self.fail(number, kind=INTERRUPTED, message="the search was stopped during this trial")
        trials = self.trials()
        again = {trial.attrs.get("retry_of") for trial in trials}
        for trial in trials:
            is_cut_off = trial.attrs.get("error_kind") == INTERRUPTED and trial.number not in again
            if is_cut_off and trial.params and vain_attempts(trial, trials) < VAIN:
                self.requeue(trial.number, why=INTERRUPTED)
        return left

    def requeue(self, number: int, *, why: str, **attrs: Any) -> None:
        """Propose a trial again, as another one that goes on from it.

        Args:
            why: the kind of its failure.
            attrs: what the new one is to have beside the old one's `ORIGIN`.
        """
        trial = self.trials()[number]
        kept = {name: trial.attrs[name] for name in ORIGIN if name in trial.attrs}
        self.enqueue(
            trial.params, **{"purpose": "search", **kept, "retry_of": number, "retry_why": why, **attrs}
        )

    # --- reading ----------------------------------------------------------------------------------

    def trials(self) -> list[TrialRecord]:
        """All trials in order of number. Nobody else changes them: a study has one coordinator."""
        trials = self._study.get_trials(deepcopy=False)
        self._records += [_record(trial) for trial in trials[len(self._records) :]]
        for number in self._changed:
            self._records[number] = _record(trials[number])
        self._changed.clear()
        return list(self._records)

    @property
    def running(self) -> tuple[int, ...]:
        """Numbers of the trials this coordinator has running."""
        return tuple(self._running)


def _exists(storage: optuna.storages.BaseStorage, name: str, *, create: bool) -> bool:
    """Whether our study of that name exists; raises StoreError when it is another's or must exist."""
    found = [s for s in optuna.get_all_study_summaries(storage) if s.study_name == name]
    if create and found and _is_blank(found[0]):
        return False  # whoever made it was killed before it could be marked as ours
    if found and found[0].user_attrs.get("tlauto_format") != FORMAT:
        raise StoreError(
            f"the study '{name}' in this database was not made by this version of tlauto; choose another "
            f"name with --study NAME"
        )
    if not found and not create:
        raise StoreError(
            f"the trials of study '{name}' are gone from the database (deleted or renamed in the "
            f"dashboard?); start another study with --new"
        )
    return bool(found)


def _is_blank(study: optuna.study.StudySummary) -> bool:
    """Whether a study is as `Study` makes one in its first transaction: nothing in it, nothing noted."""
    return not (study.n_trials or study.user_attrs) and study.directions == [StudyDirection.MAXIMIZE]


def _suggest(trial: optuna.Trial, name: str, parameter: Parameter) -> Scalar:
    match parameter:
        case Float():
            return trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)
        case Int():
            return trial.suggest_int(name, parameter.low, parameter.high, log=parameter.log)
        case Choice():
            value: Scalar = trial.suggest_categorical(name, parameter.values)
            return value


def _record(trial: FrozenTrial) -> TrialRecord:
    attrs, state = trial.user_attrs, {TrialState.FAIL: "failed"}.get(trial.state, trial.state.name.lower())
    if SHELVED in attrs:
        state = "shelved"
    score = attrs.get("score") if state in ("pruned", "shelved") else trial.value
    params = attrs.get(POINT, trial.params)
    return TrialRecord(trial.number, state, params, score, attrs, trial.intermediate_values)
