"""Versions of a study. A category of Optuna's cannot change, so a changed space is another study of Optuna's.

`NAME` is followed by `NAME@2`, with the same trials under the same numbers; what the earlier one recorded
stays as it is. To the user there is one study, `NAME`: the newest version.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import datetime
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from tlauto.errors import ConfigError
from tlauto.space import Choice, Float, Int, Parameter, Scalar
from tlauto.study import INTERRUPTED, POINT, PROPOSED, SHELVED, Study, check_name, versioned
from tlauto.tables import opened

OFFERED = ("backbone", "strategy", "head")
"""The categories that decide whether a trial belongs to a version."""


def choices_of(url: str, name: str, version: int) -> dict[str, tuple[Scalar, ...]]:
    """The values of every category that a trial of a version was drawn from."""
    with opened(url) as storage:
        trials = storage.get_all_trials(storage.get_study_id_from_name(versioned(name, version)))
    return {
        key: tuple(distribution.choices)
        for trial in trials
        for key, distribution in trial.distributions.items()
        if isinstance(distribution, CategoricalDistribution)
    }


def copy_trials(
    url: str, name: str, *, before: int, version: int, parameters: Mapping[str, Parameter], metric: str
) -> None:
    """Make a version of a study with the trials of another one, which stays as it is and has none running.

    What a killed search left of that version is made again. A trial keeps its number, times, scores and
    facts. Its parameters are told in the new categories; those that do not fit are kept in an attribute.
    One with a backbone, strategy or head that is not searched any more is shelved, which Optuna takes for
    failed, so that nothing is learned from it, and a point that waited with one is given up.

    Args:
        parameters: of the new version, by name.
    """
    check_name(url, versioned(name, version), create=True)
    with opened(url) as storage:
        trials = storage.get_all_trials(storage.get_study_id_from_name(versioned(name, before)))
        with suppress(KeyError):
            storage.delete_study(storage.get_study_id_from_name(versioned(name, version)))
    with closing(Study(url, name, seed=0, create=True, version=version)) as study:
        study.set_metric(metric)
    with opened(url) as storage:
        made = storage.get_study_id_from_name(versioned(name, version))
        for trial in trials:
            storage.create_new_trial(made, template_trial=_moved(trial, parameters))


def waiting_points(url: str, name: str, version: int) -> list[dict[str, Scalar]]:
    """Parameters of the points of a version that wait."""
    with opened(url) as storage:
        study = storage.get_study_id_from_name(versioned(name, version))
        waiting = storage.get_all_trials(study, states=(TrialState.WAITING,))
    return [dict(trial.system_attrs.get(PROPOSED, {})) for trial in waiting]


def _moved(trial: FrozenTrial, parameters: Mapping[str, Parameter]) -> FrozenTrial:
    """A trial as it stands in a version with these parameters."""
    if trial.state == TrialState.WAITING:
        return _waiting(trial, parameters)
    attrs = {key: value for key, value in trial.user_attrs.items() if key not in (SHELVED, POINT)}
    point: dict[str, Scalar] = trial.user_attrs.get(POINT, trial.params)
    state = TrialState[trial.user_attrs.get(SHELVED, trial.state.name.lower()).upper()]
    score = attrs.get("score", trial.value)
    fitting = {key: value for key, value in point.items() if _fits(value, parameters.get(key))}
    is_offered = fitting.keys() >= set(OFFERED) and not _gone(trial, parameters)
    if state in (TrialState.COMPLETE, TrialState.PRUNED) and not is_offered:
        attrs |= {SHELVED: state.name.lower(), "score": score}
        fitting, state = {}, TrialState.FAIL
    elif state == TrialState.COMPLETE:
        attrs.pop("score", None)
    if fitting != point:
        attrs[POINT] = point
    return _made(trial, state, score, params=fitting, parameters=parameters, attrs=attrs)


def _waiting(trial: FrozenTrial, parameters: Mapping[str, Parameter]) -> FrozenTrial:
    point: Mapping[str, Scalar] = trial.system_attrs.get(PROPOSED, {})
    wrong = [(key, point[key]) for key in OFFERED if key in point and not _fits(point[key], parameters[key])]
    wrong += [("backbone", id) for id in _gone(trial, parameters)]
    if wrong:
        gone = f"the {' '.join(map(str, wrong[0]))} is not searched any more"
        attrs = {**trial.user_attrs, "error_kind": INTERRUPTED, "error": gone}
        return _made(trial, TrialState.FAIL, None, params={}, parameters=parameters, attrs=attrs)
    known = {key: value for key, value in point.items() if key in parameters}
    fixed = {k: v if _fits(v, parameters[k]) else parameters[k].default for k, v in known.items()}
    return _made(
        trial, TrialState.WAITING, None, params={}, parameters=parameters, attrs=trial.user_attrs, fixed=fixed
    )


def _made(
    trial: FrozenTrial, state: TrialState, score: float | None, *, params: Mapping[str, Scalar],
    parameters: Mapping[str, Parameter], attrs: Mapping[str, Any], fixed: Mapping[str, Scalar] | None = None,
) -> FrozenTrial:  # fmt: skip
    is_over, now = state.is_finished(), datetime.now()
    has_value = state in (TrialState.COMPLETE, TrialState.PRUNED)
    return FrozenTrial(
        number=trial.number, trial_id=-1, state=state,
        value=(score if trial.value is None else trial.value) if has_value else None,
        datetime_start=trial.datetime_start or (now if is_over else None),
        datetime_complete=trial.datetime_complete or (now if is_over else None),
        params=dict(params), distributions={key: _distribution(parameters[key]) for key in params},
        user_attrs=dict(attrs), intermediate_values=dict(trial.intermediate_values),
        system_attrs={**trial.system_attrs, **({} if fixed is None else {PROPOSED: dict(fixed)})},
    )  # fmt: skip


def _gone(trial: FrozenTrial, parameters: Mapping[str, Parameter]) -> list[str]:
    """Further backbones that a trial reads and that are not searched any more."""
    beside = str(trial.user_attrs.get("beside", "")).split()
    return [backbone for backbone in beside if not _fits(backbone, parameters["backbone"])]


def _fits(value: Scalar, parameter: Parameter | None) -> bool:
    try:
        return parameter is not None and parameter.check(value) == value
    except ConfigError:
        return False


def _distribution(parameter: Parameter) -> BaseDistribution:
    """What Optuna calls a parameter, the same as when `Study.ask` draws it."""
    match parameter:
        case Float():
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)
        case Int():
            return IntDistribution(parameter.low, parameter.high, log=parameter.log)
        case Choice():
            return CategoricalDistribution(parameter.values)
