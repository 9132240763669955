"""A study's trials in memory: read from the database once, and every change of them written to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import orm

from tlauto.connections import is_deadlock
from tlauto.rows import Rows, new_trial

TRIES = 5
"""How often changes are written that the database undid since another program, such as one that deletes the
study, waited for them and they for it."""


class _Session(orm.Session):
    """A session that can be held open, so that several of Optuna's writes become one transaction."""

    is_held = False

    def commit(self) -> None:
        if self.is_held:
            self.flush()
        else:
            super().commit()

    def close(self) -> None:
        if not self.is_held:
            super().close()


def _of_study(name: str) -> Any:
    """A change of a study, by its name in Optuna's interface: made in memory and then written."""
    change_memory = getattr(InMemoryStorage, name)

    def change(self: WriteThrough, study_id: int, *args: Any, **named: Any) -> None:
        change_memory(self, study_id, *args, **named)
        self._later(lambda: getattr(self._database, name)(self._study_id, *args, **named))

    return change


class WriteThrough(InMemoryStorage):
    """One study, whose only writer this is: nothing that it knows is ever read again.

    Optuna's own cache reads all trials that run from the database at each look, and writes every
    parameter and attribute in a transaction of its own. Changes within `together` are one transaction,
    written at its end: which trials are new or begin, then what is known of trials, then which are over.

    Args:
        database: where the study is, or is to be made.
        name: the study's name.
    """

    def __init__(self, database: RDBStorage, name: str) -> None:
        super().__init__()
        self.engine = database.engine
        self._sessions = orm.scoped_session(orm.sessionmaker(bind=database.engine, class_=_Session))
        database.scoped_session = self._sessions  # type: ignore[assignment]  # sessions of ours are sessions
        self._database = database
        self._trial_ids: list[int] = []
        self._new: list[Callable[[], object]] = []
        self._rows = Rows()
        self._depth = 0
        known = {study.study_name: study._study_id for study in database.get_all_studies()}
        if name in known:
            self._load(known[name], name)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write all changes that are made within the block in one transaction, at its end.

        Of a block that raises nothing is written, though it is in memory: end the search then.
        """
        self._depth += 1
        try:
            yield
            if self._depth == 1:
                self._write()
        finally:
            self._depth -= 1
            if not self._depth:
                self._new.clear()
                self._rows.clear()

    def remove_session(self) -> None:
        """Close this thread's connection."""
        self._database.remove_session()

    # --- changes, in memory and in the database -------------------------------------------------------

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """Make the study in both; refuses a second one in memory."""
        study_id = super().create_new_study(directions, study_name)
        self._study_id = self._database.create_new_study(directions, study_name)
        return study_id

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial to both."""
        trial_id = super().create_new_trial(study_id, template_trial)

        def write() -> int:
            if template_trial is None:
                return new_trial(self._sessions(), self._study_id)
            return self._database.create_new_trial(self._study_id, template_trial)

        self._later(lambda: self._trial_ids.append(write()))
        return trial_id

    set_study_user_attr = _of_study("set_study_user_attr")
    set_study_system_attr = _of_study("set_study_system_attr")

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter in both."""
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        with self.together():
            self._rows.add_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Report an epoch's score to both."""
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        with self.together():
            self._rows.add_report(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Note a fact in both."""
        super().set_trial_user_attr(trial_id, key, value)
        with self.together():
            self._rows.add_attr(trial_id, "user", key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Note what a sampler wants to know later; proposals under way are shared with nobody."""
        if not key.startswith("tpe:"):
            super().set_trial_system_attr(trial_id, key, value)
            with self.together():
                self._rows.add_attr(trial_id, "system", key, value)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Begin or end a trial in both; False when there was nothing to begin."""
        if not super().set_trial_state_values(trial_id, state, values):
            return False
        if state.is_finished():
            with self.together():
                self._rows.add_end(trial_id, state, values or ())
        else:
            self._later(
                lambda: self._database.set_trial_state_values(self._trial_ids[trial_id], state, values)
            )
        return True

    # --------------------------------------------------------------------------------------------------

    def _load(self, study_id: int, name: str) -> None:
        """Take over what the database has; the ids in memory are the trials' numbers."""
        self._study_id = study_id
        known = super().create_new_study(self._database.get_study_directions(study_id), name)
        for key, value in self._database.get_study_user_attrs(study_id).items():
            super().set_study_user_attr(known, key, value)
        for key, value in self._database.get_study_system_attrs(study_id).items():
            super().set_study_system_attr(known, key, value)
        for trial in self._database.get_all_trials(study_id, deepcopy=False):
            self._trial_ids.append(trial._trial_id)
            super().create_new_trial(known, trial)

    def _later(self, write: Callable[[], object]) -> None:
        with self.together():
            self._new.append(write)

    def _write(self) -> None:
        for tries_left in reversed(range(TRIES)):
            known = len(self._trial_ids)
            try:
                return self._write_once()
            except Exception as error:
                del self._trial_ids[known:]
                if not tries_left or not is_deadlock(error):
                    raise

    def _write_once(self) -> None:
        session = self._sessions()
        session.is_held = True
        try:
            for write in self._new:
                write()
            self._rows.write(session, self._trial_ids)
        except BaseException:
            session.is_held = False
            session.rollback()
            raise
        else:
            session.is_held = False
            session.commit()
        finally:
            session.close()
