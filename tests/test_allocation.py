"""Which freezing strategy comes next: what it promised so far, over what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from test_schedule import BACKBONES, STRATEGIES, MakePlan, make_plan, trial

from tlauto.allocation import CURIOSITY, SPREAD, cost_of, expected_improvement, pick_next, pick_strategy
from tlauto.plugins import registry
from tlauto.schedule import Plan
from tlauto.study import TrialRecord

__all__ = ["make_plan"]  # a fixture

FROZEN, FULL = "feature_extraction", "full"


def trials(scores: Mapping[str, Sequence[float]], backbone: str = "timm:a") -> list[TrialRecord]:
    pairs = [(strategy, score) for strategy, own in scores.items() for score in own]
    return [
        TrialRecord(i, "complete", {"backbone": backbone, "strategy": strategy}, score)
        for i, (strategy, score) in enumerate(pairs)
    ]


def shares(found: list[TrialRecord], costs: Mapping[str, float], draws: int = 400) -> dict[str, float]:
    picks = Counter(pick_strategy(found, costs, ["timm:a"], seed=str(i)) for i in range(draws))
    return {name: picks[name] / draws for name in costs}


def test_the_expected_improvement_is_that_of_the_normal_distribution() -> None:
    scores, best = [0.80, 0.90, 0.85], 0.90
    mean = (best + sum(scores)) / 4
    deviation = np.sqrt((SPREAD**2 + sum((s - mean) ** 2 for s in scores)) / 4)
    draws = np.random.default_rng(0).normal(mean, deviation, 400_000)
    assert expected_improvement(scores, best) == pytest.approx(np.maximum(draws - best, 0).mean(), rel=0.02)


def test_more_bad_scores_promise_less() -> None:
    promised = [expected_improvement([0.8] * count, 0.95) for count in (0, 1, 3, 10, 100)]
    assert promised == sorted(promised, reverse=True)
    assert promised[-1] >= 0


def test_of_equal_promise_the_cheaper_is_taken_more_often() -> None:
    found = trials({FROZEN: [0.9, 0.91], FULL: [0.9, 0.91]})
    share = shares(found, {FROZEN: 1.0, FULL: 100.0})
    assert share[FROZEN] > 0.9
    share = shares(found, {FROZEN: 1.0, FULL: 1.0})
    assert 0.4 < share[FULL] < 0.6


def test_what_is_worth_its_seconds_is_taken_though_it_is_slow() -> None:
    found = trials({FROZEN: [0.80, 0.801, 0.80, 0.80, 0.801, 0.80], FULL: [0.90, 0.92]})
    assert shares(found, {FROZEN: 1.0, FULL: 100.0})[FULL] > 0.8


def test_of_the_last_trials_the_dearest_come_first_and_there_are_no_more_of_them() -> None:
    found, costs = trials({FROZEN: [0.9, 0.91] * 2, FULL: [0.9, 0.91] * 2}), {FROZEN: 1.0, FULL: 2.0}

    def picks(seed: str, slots: int) -> list[str]:
        """Of trials 8 to 13, of which there are 14 in all."""
        more = [TrialRecord(i, "running", {}, None) for i in range(8, 14)]
        return [
            pick_next([*found, *more[:done]], costs, ["timm:a"], seed=seed, most=14, slots=slots)
            for done in range(6)
        ]

    drawn: Counter[str] = Counter()
    for seed in map(str, range(60)):
        last = picks(seed, slots=2)[2:]
        assert last == sorted(last, key=lambda name: -costs[name])
        assert picks(seed, slots=2)[:2] == picks(seed, slots=1)[:2], "before them nothing changes"
        drawn.update(last)
    assert drawn[FULL] / 240 == pytest.approx(shares(found, costs)[FULL], abs=0.08)


def test_for_one_slot_or_without_a_number_of_trials_the_order_is_as_it_was() -> None:
    found, costs = trials({FROZEN: [0.9, 0.91], FULL: [0.9, 0.91]}), {FROZEN: 1.0, FULL: 2.0}
    for seed in map(str, range(20)):
        expected = pick_strategy(found, costs, ["timm:a"], seed=f"{seed}/4")
        for most, slots in ((5, 1), (None, 4), (100, 4)):
            assert pick_next(found, costs, ["timm:a"], seed=seed, most=most, slots=slots) == expected


def test_nothing_is_given_up_for_good() -> None:
    found = trials({FROZEN: [0.95, 0.96, 0.94], FULL: [0.5] * 50})
    share = shares(found, {FROZEN: 1.0, FULL: 1000.0}, draws=1000)
    assert share[FULL] == pytest.approx(CURIOSITY, abs=0.015)


def test_trials_on_backbones_that_were_dropped_say_nothing() -> None:
    found = trials({FROZEN: [0.9, 0.91], FULL: [0.9, 0.91]})
    other = trials({FULL: [0.1] * 30}, backbone="timm:dropped")
    costs = {FROZEN: 1.0, FULL: 1.0}
    assert shares([*found, *other], costs) == shares(found, costs)


def test_scores_may_be_of_any_size() -> None:
    rmse = trials({FROZEN: [-120.0, -118.0], FULL: [-119.0, -121.0]})
    share = shares(rmse, {FROZEN: 1.0, FULL: 1.0})
    assert min(share.values()) > 0.3


def test_the_same_seed_picks_the_same_and_without_scores_each_is_possible() -> None:
    costs = {FROZEN: 1.0, FULL: 1.0}
    assert set(shares([], costs).values()) != {0.0, 1.0}
    picks = {pick_strategy([], costs, [], seed="7") for _ in range(5)}
    assert len(picks) == 1


# --- in a plan -------------------------------------------------------------------------------------


def picks(plan: Plan, found: list[TrialRecord], left: float | None = None) -> set[str]:
    """The strategies that 60 searches of other seeds would propose next."""
    picked = set()
    for seed in range(60):
        config = replace(plan.config, seed=seed)
        picked |= set(replace(plan, config=config).proposable(found, left)["strategy"])
    return picked


def test_one_strategy_is_proposed_and_the_kept_backbones(make_plan: MakePlan) -> None:
    plan, found = make_plan(), [trial(i, name, 0.9 - i / 100) for i, name in enumerate(BACKBONES)]
    proposed = plan.proposable(found, None)
    assert proposed["backbone"] == plan.kept(found)
    assert len(proposed["strategy"]) == 1
    assert picks(plan, found) == set(STRATEGIES)


def test_on_a_cpu_training_the_backbone_must_promise_more(make_plan: MakePlan) -> None:
    full, partial, frozen = (registry().strategy(n) for n in ("full", "partial", "feature_extraction"))
    assert cost_of(frozen, "cpu") == cost_of(frozen, "cuda") == 1.0
    assert cost_of(full, "cpu") > cost_of(full, "cuda") > 1.0
    assert cost_of(partial, "cpu") < cost_of(full, "cpu")
    found = [trial(i, "timm:a", 0.9 + i / 100, strategy=name) for i, name in enumerate(STRATEGIES * 3)]
    proposed = {}
    for device in ("cpu", "cuda"):
        plan = make_plan(device=device)
        plans = [replace(plan, config=replace(plan.config, seed=seed)) for seed in range(200)]
        proposed[device] = sum(p.proposable(found, None)["strategy"] == ("full",) for p in plans)
    assert 0 < proposed["cpu"] < proposed["cuda"]


def test_what_is_proposed_does_not_depend_on_the_clock(make_plan: MakePlan) -> None:
    plan = make_plan()
    quick = [trial(i, "timm:a", 0.9, strategy=name, seconds=0.1) for i, name in enumerate(STRATEGIES)]
    slow = [trial(i, "timm:a", 0.9, strategy=name, seconds=99.0) for i, name in enumerate(STRATEGIES)]
    for seed in range(50):
        seeded = replace(plan, config=replace(plan.config, seed=seed))
        assert seeded.proposable(quick, None) == seeded.proposable(slow, None)


def test_with_no_time_for_an_epoch_only_frozen_trials_are_proposed(make_plan: MakePlan) -> None:
    found = [trial(0, "timm:a", 0.9, seconds=400.0)]
    assert picks(make_plan(time_s=600.0), found, left=5.0) == {"feature_extraction"}
