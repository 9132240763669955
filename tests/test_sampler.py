"""What TPE sees of a study with many trials, and what it proposes then."""

from __future__ import annotations

import random
import statistics

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from tlauto.sampler import GOOD, MANY, make_sampler

SPACE: dict[str, BaseDistribution] = {
    "backbone": CategoricalDistribution(("a", "b", "c")),
    "rate": FloatDistribution(0.0, 1.0),
}
HEAD: dict[str, BaseDistribution] = {
    "head.depth": IntDistribution(1, 9),
    "head.width": FloatDistribution(0.0, 1.0),
}


def study_of(trials: int, *, states: tuple[TrialState, ...] = (TrialState.COMPLETE,)) -> optuna.Study:
    """Random trials, of which every fourth has a head's parameters; best at rate .3, width .8 and 'b'."""
    study, chance = optuna.create_study(direction="maximize"), random.Random(0)
    for number in range(trials):
        known = SPACE | (HEAD if number % 4 == 0 else {})
        params: dict[str, object] = {"backbone": chance.choice("abc"), "rate": chance.random()}
        if "head.width" in known:
            params |= {"head.depth": chance.randint(1, 9), "head.width": chance.random()}
        value = -abs(params["rate"] - 0.3) + 0.2 * (params["backbone"] == "b")  # type: ignore[operator]
        value += 0.3 - abs(params["head.width"] - 0.8) if "head.width" in params else 0.0  # type: ignore[operator]
        trial = optuna.create_trial(
            params=params, distributions=known, value=value, state=states[number % len(states)]
        )
        study.add_trial(trial)
    return study


def propose(study: optuna.Study, seed: int, *, kept: tuple[str, ...] = ()) -> dict[str, object]:
    study.sampler = make_sampler(seed, {"backbone": kept}, is_alone=False)
    trial = study.ask()
    trial.suggest_categorical("backbone", ("a", "b", "c"))
    trial.suggest_float("rate", 0.0, 1.0)
    trial.suggest_int("head.depth", 1, 9)
    trial.suggest_float("head.width", 0.0, 1.0)
    study.tell(trial, state=TrialState.FAIL)
    return trial.params


@pytest.mark.parametrize("trials", [MANY - 50, 3 * MANY])
def test_proposals_lie_where_trials_were_best_whatever_their_number(trials: int) -> None:
    study = study_of(trials)
    found = [propose(study, seed) for seed in range(12)]
    assert statistics.median(abs(float(params["rate"]) - 0.3) for params in found) < 0.1  # type: ignore[arg-type]
    assert statistics.median(abs(float(params["head.width"]) - 0.8) for params in found) < 0.2  # type: ignore[arg-type]
    assert [params["backbone"] for params in found].count("b") > 8
    assert {params["backbone"] for params in (propose(study, seed, kept=("a",)) for seed in range(6))} == {
        "a"
    }


def test_the_same_seed_proposes_the_same_of_many_trials() -> None:
    assert propose(study_of(3 * MANY), 7) == propose(study_of(3 * MANY), 7)
    assert propose(study_of(3 * MANY), 7) != propose(study_of(3 * MANY), 8)


def test_of_many_trials_tpe_sees_the_best_and_those_that_have_the_parameters() -> None:
    study = study_of(6 * MANY, states=(TrialState.COMPLETE, TrialState.PRUNED))
    seen: list[list[FrozenTrial]] = []
    sampler = make_sampler(0, {}, is_alone=True)
    build = sampler._build_parzen_estimator  # type: ignore[attr-defined]

    def watched(of: object, space: object, trials: list[FrozenTrial], **named: object) -> object:
        seen.append(trials)
        return build(of, space, trials, **named)

    sampler._build_parzen_estimator = watched  # type: ignore[attr-defined]
    study.sampler = sampler
    trial = study.ask()
    trial.suggest_float("rate", 0.0, 1.0)
    trial.suggest_float("head.width", 0.0, 1.0)
    whole = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    best = {trial.number for trial in sorted(whole, key=lambda trial: -trial.value)[:GOOD]}  # type: ignore[operator]
    assert len(seen) == 4  # good ones and others, of two blocks
    for good, others in (seen[:2], seen[2:]):
        assert {trial.number for trial in good} == best
        assert len(good) + len(others) == MANY
    shown = {trial.number for trial in seen[2] + seen[3] if "head.width" in trial.params}
    owners = {trial.number for trial in whole if "head.width" in trial.params}
    assert len(shown - best) == min(len(owners - best), MANY - GOOD)


def test_where_few_of_many_trials_are_complete_all_are_seen() -> None:
    study = study_of(2 * MANY, states=(TrialState.COMPLETE, *(TrialState.PRUNED,) * 49))
    assert set(propose(study, 0)) == {"backbone", "rate", "head.depth", "head.width"}
