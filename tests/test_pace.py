"""What a search can afford: computed from recorded trials alone."""

from __future__ import annotations

from typing import Any

import pytest

from tlauto.pace import (
    FEWEST_IMAGES,
    FIRST_PROBES,
    HEAD_SHARE,
    MARGIN,
    PLAIN_COST,
    SCREEN_SHARE,
    STEP_COST,
    TRIAL_SHARE,
    WORKER_START_S,
    Begun,
    Sizes,
    affordable_epochs,
    feature_seconds,
    held_back,
    next_to_screen,
    refit_seconds,
)
from tlauto.study import TrialRecord

SIZES = Sizes(800, 200, 500)


def frozen(
    number: int, backbone: str = "a", seconds: float = 10.0, purpose: str = "probe", **attrs: Any
) -> TrialRecord:
    return record(number, backbone, "feature_extraction", purpose, seconds=seconds, epochs=1, **attrs)


def trained(number: int, backbone: str = "a", purpose: str = "search", **attrs: Any) -> TrialRecord:
    facts = {"seconds": 80.0, "epochs": 8, "best_epoch": 4, **attrs}
    return record(number, backbone, "full", purpose, **facts)


def record(number: int, backbone: str, strategy: str, purpose: str, **attrs: Any) -> TrialRecord:
    params = {"backbone": backbone, "strategy": strategy, "head": "linear"}
    return TrialRecord(number, "complete", params, 0.9, {"purpose": purpose, **attrs})


# --- the end ----------------------------------------------------------------------------------------


def test_a_refit_repeats_the_epochs_up_to_the_best_on_more_images() -> None:
    # 10 s an epoch, 4 of them on 1,000 instead of 800 images; features of 500 more would take 5 s.
    trials = [frozen(0), trained(1)]
    assert refit_seconds(trials[1], trials, SIZES) == pytest.approx(10 * 4 * 1.25 + PLAIN_COST * 5)


def test_a_frozen_refit_needs_the_features_of_the_test_part() -> None:
    trials = [frozen(0, seconds=20.0), frozen(1, seconds=0.5, purpose="search")]
    # 20 s for 1,000 images, so 10 s for 500; the later trial found its features.
    assert refit_seconds(trials[1], trials, SIZES) == pytest.approx(0.5 + 10)


def test_the_refit_of_a_probe_does_not_compute_its_features_again() -> None:
    trials = [frozen(0, seconds=20.0), frozen(1, backbone="b", seconds=5.0), frozen(2, seconds=8.0)]
    assert refit_seconds(trials[0], trials, SIZES) == pytest.approx(HEAD_SHARE * 20.0 + 10)
    assert refit_seconds(trials[1], trials, SIZES) == pytest.approx(HEAD_SHARE * 5.0 + 2.5)
    assert refit_seconds(trials[2], trials, SIZES) == pytest.approx(8.0 + 10)


def test_what_was_measured_of_features_counts_and_not_what_came_before_them() -> None:
    probe = frozen(0, seconds=20.0, feature_seconds=0.004)
    assert feature_seconds("a", [probe], SIZES) == 0.004
    assert feature_seconds("b", [probe], SIZES) == 0.004
    again = frozen(1, seconds=0.5, purpose="search")
    assert refit_seconds(again, [probe, again], SIZES) == pytest.approx(0.5 + 500 * 0.004)


def test_time_is_held_back_for_the_winner_the_default_and_a_new_worker() -> None:
    trials = [frozen(0), trained(1, purpose="default"), trained(2)]
    one = held_back(trials, SIZES, best=1, members=1, limit=300)
    two = held_back(trials, SIZES, best=2, members=1, limit=300)
    assert one == pytest.approx(MARGIN * 60 + WORKER_START_S)
    assert two == pytest.approx(MARGIN * 120 + WORKER_START_S)
    assert held_back([], SIZES, best=None, members=4, limit=300) == 0


def test_time_is_held_back_for_the_backbones_of_what_may_answer_together() -> None:
    trials = [frozen(0), frozen(1, "b", 20.0), frozen(2, "c", 16.0), frozen(3, "d", 200.0)]
    alone = held_back(trials, SIZES, best=0, members=1, limit=300)
    # Test features of b take 10 s, of c 8 s; those of d too long for what is no winner.
    assert held_back(trials, SIZES, best=0, members=2, limit=300) == pytest.approx(alone + MARGIN * 10)
    assert held_back(trials, SIZES, best=0, members=4, limit=300) == pytest.approx(alone + MARGIN * 18)


# --- screening --------------------------------------------------------------------------------------


NAMES = tuple("0123456789")


def screened_next(trials: list[TrialRecord], names: tuple[str, ...] = NAMES, **given: Any) -> str | None:
    settings: dict[str, Any] = {"spent": 0.0, "limit": None, "most": None, **given}
    return next_to_screen(names, trials, settings.pop("begun", Begun()), **settings)


def test_a_few_backbones_are_screened_however_little_time_there_is() -> None:
    trials = [frozen(n, str(n)) for n in range(FIRST_PROBES - 1)]
    assert screened_next(trials, spent=1000, limit=10) == NAMES[FIRST_PROBES - 1]


def test_further_ones_are_screened_while_their_share_of_the_time_lasts() -> None:
    trials = [frozen(n, str(n), seconds=10.0) for n in range(4)]
    limit = 200.0
    assert screened_next(trials, spent=SCREEN_SHARE * limit - 10, limit=limit) == "4"
    assert screened_next(trials, spent=SCREEN_SHARE * limit - 9, limit=limit) is None
    assert screened_next(trials, NAMES[:4], spent=0, limit=limit) is None
    assert screened_next(trials, limit=limit, most=8) is None, "half of the trials are the most"
    assert screened_next(trials) is None, "without a limit of time a study begins with its probes"


def test_a_later_version_screens_what_is_new_first_with_half_of_what_is_left() -> None:
    trials = [frozen(n, str(n), seconds=10.0) for n in range(4)]
    begun = Begun(len(trials), 100.0, ("7", "6"))
    assert screened_next(trials, begun=begun, most=9) == "6"
    more = [*trials, frozen(4, "6")]
    assert screened_next(more, begun=begun, most=9) == "7"
    assert screened_next([*more, frozen(5, "7")], begun=begun, most=9) is None
    assert screened_next([*more, frozen(5, "7")], begun=begun, most=10) == "4"
    assert screened_next(trials, begun=begun, most=5) == "6", "one at least"
    assert screened_next(more, begun=begun, most=5) is None


def test_a_later_version_has_a_share_of_the_time_that_is_left_for_screening() -> None:
    trials = [frozen(n, str(n), seconds=10.0) for n in range(8)]
    begun, limit = Begun(4, 100.0, ("8",)), 300.0
    assert screened_next(trials, begun=begun, spent=100 + SCREEN_SHARE * 200 - 10, limit=limit) == "8"
    assert screened_next(trials, begun=begun, spent=100 + SCREEN_SHARE * 200 - 9, limit=limit) is None


# --- fine-tuning ------------------------------------------------------------------------------------


def afford(left: float, trials: list[TrialRecord] | None = None) -> tuple[int, int] | None:
    # 10 s for 1,000 images are 10 ms for features, so 60 ms to learn from one.
    return affordable_epochs("a", trials or [frozen(0)], SIZES, left=left, epochs=8, images=512)


def test_with_time_enough_nothing_is_cut() -> None:
    assert afford(8 * 512 * 0.01 * STEP_COST / TRIAL_SHARE + 1) == (8, 512)


def test_with_less_time_epochs_have_fewer_images_then_there_are_fewer_epochs() -> None:
    whole = 8 * 512 * 0.01 * STEP_COST / TRIAL_SHARE
    assert afford(0.99 * whole) == (8, 256)
    assert afford(0.4 * whole) == (8, 128)
    assert afford(0.07 * whole) == (4, FEWEST_IMAGES)
    assert afford(0.01 * whole) is None


def test_the_cost_of_learning_is_measured_once_a_trial_has_shown_it() -> None:
    quick = [frozen(0), trained(1, image_seconds=0.02)]
    slow = [frozen(0), trained(1, image_seconds=0.2)]
    left = 8 * 512 * 0.01 * STEP_COST / TRIAL_SHARE
    assert afford(0.5 * left, quick) == (8, 512)
    assert afford(0.5 * left, slow) == (8, 64)


def test_a_backbone_that_was_not_measured_is_taken_for_an_average_one() -> None:
    trials = [frozen(0, "b", 10.0), frozen(1, "c", 10.0)]
    assert afford(100.0, trials) == afford(100.0)


def test_nothing_is_cut_before_anything_is_measured() -> None:
    assert affordable_epochs("a", [], SIZES, left=1.0, epochs=8, images=512) == (8, 512)
