"""Parameters, attributes and reports of trials as rows: one statement for each of Optuna's tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages._rdb import models
from sqlalchemy import orm, select
from sqlalchemy.dialects import postgresql, sqlite

_INSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}
_KEYS: dict[Any, str] = {
    models.TrialParamModel: "param_name",
    models.TrialUserAttributeModel: "key",
    models.TrialSystemAttributeModel: "key",
    models.TrialIntermediateValueModel: "step",
}
"""What tells the rows of a trial apart."""

_ATTRS = {"user": models.TrialUserAttributeModel, "system": models.TrialSystemAttributeModel}


class Rows:
    """Rows that are yet to be written; of two with the same key the later one counts.

    Optuna's storage looks the trial up for each value, and writes each in a statement of its own: at
    thirty values that was two fifths of what a trial costs the coordinator.
    """

    def __init__(self) -> None:
        self._tables: dict[Any, dict[tuple[int, Any], dict[str, Any]]] = {}

    def clear(self) -> None:
        """Forget them."""
        self._tables.clear()

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

    def write(self, session: orm.Session, trial_ids: Sequence[int]) -> None:
        """Write them in the session's transaction.

        Args:
            trial_ids: the ids in the database of the study's trials.

        Raises:
            KeyError: a trial is gone.
            UpdateFinishedTrialError: a trial was ended by somebody else.
        """
        touched = {trial for rows in self._tables.values() for trial, _ in rows}
        if touched:
            _check(session, [trial_ids[trial] for trial in touched])
        insert = _INSERT[session.get_bind().dialect.name]
        for model, rows in self._tables.items():
            values = [{"trial_id": trial_ids[trial], **row} for (trial, _), row in rows.items()]
            statement, keys = insert(model.__table__), ("trial_id", _KEYS[model])
            changed = {name: statement.excluded[name] for name in values[0] if name not in keys}
            session.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed), values)

    def _add(self, model: Any, trial: int, key: Any, **values: Any) -> None:
        self._tables.setdefault(model, {})[trial, key] = {_KEYS[model]: key, **values}


def _check(session: orm.Session, trial_ids: Sequence[int]) -> None:
    """That the trials are there and not over, as Optuna's storage makes sure for each value."""
    trials = models.TrialModel.__table__.c
    found = session.execute(select(trials.trial_id, trials.state).where(trials.trial_id.in_(trial_ids))).all()
    if len(found) < len(trial_ids):
        raise KeyError(models.NOT_FOUND_MSG)
    for trial_id, state in found:
        if state.is_finished():
            raise UpdateFinishedTrialError(f"the trial with id {trial_id} has ended")
