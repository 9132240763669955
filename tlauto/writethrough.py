"""A study's trials in memory: read from the database once, and every change of them written to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from sqlalchemy import orm


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


def _of_trial(name: str) -> Any:
    """A change of a trial, likewise; False says that there was nothing to change."""
    change_memory = getattr(InMemoryStorage, name)

    def change(self: WriteThrough, trial_id: int, *args: Any, **named: Any) -> Any:
        result = change_memory(self, trial_id, *args, **named)
        if result is not False:
            self._later(lambda: getattr(self._database, name)(self._trial_ids[trial_id], *args, **named))
        return result

    return change


class WriteThrough(InMemoryStorage):
    """One study, whose only writer this is: nothing that it knows is ever read again.

    Optuna's own cache reads all trials that run from the database at each look, and writes every
    parameter and attribute in a transaction of its own. Changes within `together` are one transaction,
    written at its end.

    Args:
        database: where the study is, or is to be made.
        name: the study's name.
    """

    def __init__(self, database: RDBStorage, name: str) -> None:
        super().__init__()
        self.engine = database.engine
        self._sessions = orm.scoped_session(orm.sessionmaker(bind=database.engine, class_=_Session))
        database.scoped_session = self._sessions  # type: ignore[assignment]  # sessions of ours are sessions
        self._database: BaseStorage = optuna.storages.get_storage(database)
        self._trial_ids: list[int] = []
        self._waiting: list[Callable[[], object]] = []
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
                self._waiting.clear()

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
        self._later(
            lambda: self._trial_ids.append(self._database.create_new_trial(self._study_id, template_trial))
        )
        return trial_id

    set_study_user_attr = _of_study("set_study_user_attr")
    set_study_system_attr = _of_study("set_study_system_attr")
    set_trial_param = _of_trial("set_trial_param")
    set_trial_state_values = _of_trial("set_trial_state_values")
    set_trial_intermediate_value = _of_trial("set_trial_intermediate_value")
    set_trial_user_attr = _of_trial("set_trial_user_attr")

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Note what a sampler wants to know later; proposals under way are shared with nobody."""
        if not key.startswith("tpe:"):
            self._set_system_attr(trial_id, key, value)

    _set_system_attr = _of_trial("set_trial_system_attr")

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
            self._waiting.append(write)

    def _write(self) -> None:
        session = self._sessions()
        session.is_held = True
        try:
            for write in self._waiting:
                write()
        except BaseException:
            session.is_held = False
            session.rollback()
            raise
        else:
            session.is_held = False
            session.commit()
        finally:
            session.close()
