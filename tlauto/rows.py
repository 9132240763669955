"""Trials, with all that is recorded of them, as rows: one statement for each of Optuna's tables."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, cast

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy import CursorResult, bindparam, func, orm, select, update
from sqlalchemy.dialects import postgresql, sqlite

_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_KEYS: dict[Any, str] = {
    models.TrialParamModel: "param_name",
    models.TrialUserAttributeModel: "key",
    models.TrialSystemAttributeModel: "key",
    models.TrialIntermediateValueModel: "step",
    models.TrialValueModel: "objective",
}
"""What tells the rows of a trial apart."""

_STUDIES: Any = models.StudyModel.__table__
_TRIALS: Any = models.TrialModel.__table__
# Locked, as Optuna does it: of two that add trials at once each gets a number of its own.
_LOCK_STUDY = select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == bindparam("study")).with_for_update()
_OTHERS = select(func.count()).select_from(_TRIALS).where(_TRIALS.c.study_id == bindparam("study"))
_BEGIN = _TRIALS.insert().values(
    study_id=bindparam("study"), number=_OTHERS.scalar_subquery(), state=bindparam("how"),
    datetime_start=bindparam("at"),
)  # fmt: skip
_END = (
    update(_TRIALS)
    .where(_TRIALS.c.trial_id == bindparam("trial"))
    .values(state=bindparam("how"), datetime_complete=bindparam("at"))
)
_ATTRS = {"user": models.TrialUserAttributeModel, "system": models.TrialSystemAttributeModel}


class Rows:
    """Rows that are yet to be written; of two with the same key the later one counts.

    Optuna's storage looks the trial up for each value, and writes each in a statement of its own: at
    thirty values that was two fifths of what a trial costs the coordinator.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, dict[tuple[int, Any], dict[str, Any]]] = {}
        self._ends: dict[int, TrialState] = {}

    def clear(self) -> None:
        """Forget them."""
        self._tables.clear()
        self._ends.clear()

    def add_param(self, trial: int, name: str, value: float, distribution: BaseDistribution) -> None:
        """A parameter's value, as Optuna stores it, of the trial at that place among the study's."""
        as_json = distribution_to_json(distribution)
        self._add(models.TrialParamModel, trial, name, param_value=value, distribution_json=as_json)

    def add_attr(self, trial: int, kind: Literal["user", "system"], key: str, value: Any) -> None:
        """An attribute, which JSON can hold."""
        self._add(_ATTRS[kind], trial, key, value_json=json.dumps(value))

    def add_report(self, trial: int, step: int, value: float) -> None:
        """A score by epoch."""
        model = models.TrialIntermediateValueModel
        stored, kind = model.intermediate_value_to_stored_repr(value)
        self._add(model, trial, step, intermediate_value=stored, intermediate_value_type=kind)

    def add_end(self, trial: int, state: TrialState, values: Sequence[float]) -> None:
        """That a trial is over, and its values by objective."""
        self._ends[trial] = state
        for objective, value in enumerate(values):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            self._add(models.TrialValueModel, trial, objective, value=stored, value_type=kind)

    def write(self, session: orm.Session, trial_ids: Sequence[int]) -> None:
        """Write them in the session's transaction.

        Args:
            trial_ids: the ids in the database of the study's trials.

        Raises:
            KeyError: a trial is gone.
            UpdateFinishedTrialError: a trial was ended by somebody else.
        """
        touched = {trial for rows in self._tables.values() for trial, _ in rows} | self._ends.keys()
        if touched:
            _check(session, [trial_ids[trial] for trial in touched])
        dialect = session.get_bind().dialect.name
        for model, rows in self._tables.items():
            values = [{"trial_id": trial_ids[trial], **row} for (trial, _), row in rows.items()]
            session.execute(_upsert(model, dialect, tuple(values[0])), values)
        if self._ends:
            self.write_ends(session, trial_ids)

    def write_ends(self, session: orm.Session, trial_ids: Sequence[int]) -> None:
        """Write which trials are over, the last of what is written."""
        ends = self._ends.items()
        session.execute(_END, [{"trial": trial_ids[n], "how": how, "at": _now()} for n, how in ends])

    def _add(self, model: Any, trial: int, key: Any, **values: Any) -> None:
        self._tables.setdefault(model, {})[trial, key] = {_KEYS[model]: key, **values}


def new_trial(session: orm.Session, study_id: int) -> int:
    """Add a trial that runs, with the next number of its study. Returns: its id in the database.

    Raises: KeyError when the study is gone.
    """
    if session.execute(_LOCK_STUDY, {"study": study_id}).first() is None:
        raise KeyError(models.NOT_FOUND_MSG)
    row = {"study": study_id, "how": TrialState.RUNNING, "at": _now()}
    added = cast(CursorResult[Any], session.execute(_BEGIN, row))
    assert added.inserted_primary_key is not None
    return int(added.inserted_primary_key[0])


@functools.cache
def _upsert(model: Any, dialect: str, columns: Sequence[str]) -> Any:
    """The statement that writes rows of a table with these columns; making it takes as long as to run it."""
    statement, keys = _INSERT[dialect](model.__table__), ("trial_id", _KEYS[model])
    changed = {name: statement.excluded[name] for name in columns if name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=changed)


def _now() -> datetime:
    """As Optuna's tables hold times: of UTC, without saying so."""
    return datetime.now(UTC).replace(tzinfo=None)


def _check(session: orm.Session, trial_ids: Sequence[int]) -> None:
    """That the trials are there and not over, as Optuna's storage makes sure for each value."""
    wanted = select(_TRIALS.c.trial_id, _TRIALS.c.state).where(_TRIALS.c.trial_id.in_(trial_ids))
    found = session.execute(wanted.with_for_update()).all()
    if len(found) < len(trial_ids):
        raise KeyError(models.NOT_FOUND_MSG)
    for trial_id, state in found:
        if state.is_finished():
            raise UpdateFinishedTrialError(f"the trial with id {trial_id} has ended")
