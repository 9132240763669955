"""What TPE sees of a study with many trials, and what it proposes then."""

from __future__ import annotations

import random
import statistics

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from tlauto.sampler import GOOD, SEEN, Ended, make_sampler

SPACE: dict[str, BaseDistribution] = {
    "backbone": CategoricalDistribution(("a", "b", "c")),
    "rate": FloatDistribution(0.0, 1.0),
}
HEAD: dict[str, BaseDistribution] = {
    "head.hidden": IntDistribution(16, 4096, log=True),
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
            params |= {
                "head.hidden": chance.randint(16, 4096),
                "head.depth": chance.randint(1, 9),
                "head.width": chance.random(),
            }
        value = -abs(params["rate"] - 0.3) + 0.2 * (params["backbone"] == "b")  # type: ignore[operator]
        value += 0.3 - abs(params["head.width"] - 0.8) if "head.width" in params else 0.0  # type: ignore[operator]
        trial = optuna.create_trial(
            params=params, distributions=known, value=value, state=states[number % len(states)]
        )
        study.add_trial(trial)
    return study


def propose(study: optuna.Study, seed: int, *, kept: tuple[str, ...] = ()) -> dict[str, object]:
    study.sampler = make_sampler(seed, {"backbone": kept}, Ended(), is_alone=False)
    trial = study.ask()
    trial.suggest_categorical("backbone", ("a", "b", "c"))
    trial.suggest_float("rate", 0.0, 1.0)
    trial.suggest_int("head.depth", 1, 9)
    trial.suggest_int("head.hidden", 16, 4096, log=True)
    trial.suggest_float("head.width", 0.0, 1.0)
    study.tell(trial, state=TrialState.FAIL)
    return trial.params


@pytest.mark.parametrize("trials", [200, 750])
def test_proposals_lie_where_trials_were_best_whatever_their_number(trials: int) -> None:
    study = study_of(trials)
    found = [propose(study, seed) for seed in range(12)]
    assert statistics.median(abs(float(params["rate"]) - 0.3) for params in found) < 0.15  # type: ignore[arg-type]
    assert statistics.median(abs(float(params["head.width"]) - 0.8) for params in found) < 0.2  # type: ignore[arg-type]
    assert [params["backbone"] for params in found].count("b") > 8
    assert all(type(params["head.hidden"]) is int for params in found)
    assert len({params["head.hidden"] for params in found}) > 8
    assert {params["backbone"] for params in (propose(study, seed, kept=("a",)) for seed in range(6))} == {
        "a"
    }


def test_the_same_seed_proposes_the_same_of_many_trials() -> None:
    assert propose(study_of(750), 7) == propose(study_of(750), 7)
    assert propose(study_of(750), 7) != propose(study_of(750), 8)


@pytest.mark.parametrize(("trials", "with_head"), [(80, 20), (1200, SEEN)])
def test_a_block_is_learned_from_the_best_and_a_sample_of_the_trials_that_have_it(
    trials: int, with_head: int
) -> None:
    study, ended = (
        study_of(trials, states=(TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED)),
        Ended(),
    )
    ended.read(study)
    known = study.get_trials(deepcopy=False)
    every, head = ended.blocks()
    assert (set(every.space), set(head.space)) == (set(SPACE), set(HEAD))
    for block, most in ((every, min(trials, SEEN)), (head, with_head)):
        seen = ended.seen(block, random.Random(0))
        assert len({trial.number for trial in seen}) == len(seen) == most
        assert all(block.space.keys() <= trial.params.keys() for trial in seen)
        whole = [known[number] for number in block.owners]
        values = sorted(trial.value for trial in whole if trial.state == TrialState.COMPLETE)  # type: ignore[type-var]
        assert set(values[-GOOD:]) <= {trial.value for trial in seen}


def test_trials_that_end_later_are_learned_from_in_any_order() -> None:
    study, ended = study_of(30), Ended()
    ended.read(study)
    running = [study.ask(SPACE) for _ in range(3)]
    for trial in reversed(running):
        study.tell(trial, 1.0)
        ended.read(study)
    afresh = Ended()
    afresh.read(study)
    for mine, other in zip(ended.blocks(), afresh.blocks(), strict=True):
        assert mine.space == other.space
        assert ended.seen(mine, random.Random(0)) == afresh.seen(other, random.Random(0))


def test_where_few_of_many_trials_are_complete_all_are_seen() -> None:
    study = study_of(500, states=(TrialState.COMPLETE, *(TrialState.PRUNED,) * 49))
    assert set(propose(study, 0)) == SPACE.keys() | HEAD.keys()
