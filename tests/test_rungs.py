"""Who goes on at a rung, and who is promoted later."""

from __future__ import annotations

import pytest

from tlauto.rungs import Paused, best_at, goes_on, is_rung, to_promote


def test_rungs_are_powers_of_two_from_the_second_epoch() -> None:
    assert [epoch for epoch in range(1, 20) if is_rung(epoch)] == [2, 4, 8, 16]


def test_a_score_at_a_rung_is_the_best_until_then() -> None:
    assert best_at({1: 0.5, 2: 0.4, 3: 0.9}, 2) == 0.5
    assert best_at({1: 0.5}, 2) is None
    assert best_at({}, 1) is None


@pytest.mark.parametrize(
    ("others", "expected"),
    [([], True), ([0.9], False), ([0.5], True), ([0.9, 0.3], True), ([0.9, 0.8], False),
     ([0.9, 0.8, 0.1], False), ([0.9, 0.1, 0.1], True)],
)  # fmt: skip
def test_the_better_half_goes_on(others: list[float], expected: bool) -> None:
    assert goes_on({1: 0.1, 2: 0.5}, [{1: 0.0, 2: score} for score in others], 2) == expected


def test_between_rungs_everything_goes_on() -> None:
    assert goes_on({1: 0.0, 2: 0.0, 3: 0.0}, [{1: 1.0, 2: 1.0, 3: 1.0}] * 5, 3)


def test_trials_that_did_not_come_so_far_are_not_compared() -> None:
    assert goes_on({1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1}, [{1: 0.9, 2: 0.9}], 4)


def test_a_paused_trial_is_promoted_once_it_is_in_the_better_half() -> None:
    paused = Paused(1, {1: 0.5, 2: 0.6})
    better, worse = {1: 0.5, 2: 0.9}, {1: 0.1, 2: 0.2}
    assert to_promote([paused], [better]) is None
    assert to_promote([paused], [better, worse]) is None
    assert to_promote([paused], [better, worse, worse]) == paused
    assert to_promote([paused, Paused(2, worse), Paused(3, worse)], [better]) == paused


def test_the_furthest_then_the_best_then_the_first_is_promoted() -> None:
    low = [{1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1}] * 9
    early, late = Paused(1, {1: 0.9, 2: 0.9}), Paused(2, {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5})
    assert to_promote([early, late], low) == late
    assert to_promote([early, Paused(3, {1: 0.8, 2: 0.8})], low) == early
    assert to_promote([Paused(4, early.reports), early], low) == early
    assert to_promote([], low) is None
