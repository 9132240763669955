"""Metrics against scikit-learn, their intervals, and the classes that do not occur."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from sklearn import metrics as sk

from tlauto import metrics
from tlauto.errors import ConfigError, DataError
from tlauto.intervals import resamples, wilson

RNG = np.random.default_rng(0)
N, K = 300, 4
TARGETS = RNG.integers(0, K, N)
RAW = RNG.random((N, K)) + 0.7 * np.eye(K)[TARGETS]
CHANCES = RAW / RAW.sum(1, keepdims=True)
# Coarse, so that many scores tie.
HOT = (RNG.random((N, K)) < [0.1, 0.3, 0.5, 0.7]).astype(np.float32)
LABEL_CHANCES = np.round(np.clip(0.35 * HOT + 0.65 * RNG.random((N, K)), 0, 1), 2)
VALUES = RNG.normal(5, 2, N)
GUESSES = VALUES + RNG.normal(0, 1, N)


def _f(function: Callable[..., float], **options: object) -> Callable[..., float]:
    return lambda targets, predictions: function(targets, predictions, **options)


def _top(function: Callable[..., float], **options: object) -> Callable[..., float]:
    return lambda targets, chances: function(targets, chances.argmax(1), **options)


def _cut(function: Callable[..., float], **options: object) -> Callable[..., float]:
    return lambda targets, chances: function(targets, (chances >= 0.5).astype(int), **options)


MULTICLASS = {
    "accuracy": _top(sk.accuracy_score),
    "balanced_accuracy": _top(sk.balanced_accuracy_score),
    "precision": _top(sk.precision_score, average="macro"),
    "recall": _top(sk.recall_score, average="macro"),
    "f1": _top(sk.f1_score, average="macro"),
    "roc_auc": _f(sk.roc_auc_score, multi_class="ovr", average="macro"),
    "map": lambda targets, chances: sk.average_precision_score(np.eye(K)[targets], chances, average="macro"),
    "log_loss": _f(sk.log_loss),
}
MULTILABEL = {
    "accuracy": _cut(sk.accuracy_score),
    "precision": _cut(sk.precision_score, average="macro"),
    "recall": _cut(sk.recall_score, average="macro"),
    "f1": _cut(sk.f1_score, average="macro"),
    "roc_auc": _f(sk.roc_auc_score, average="macro"),
    "map": _f(sk.average_precision_score, average="macro"),
    "log_loss": lambda hot, chances: np.mean(
        [sk.log_loss(hot[:, k], chances[:, k].clip(1e-7, 1 - 1e-7)) for k in range(K)]
    ),
}
REGRESSION = {
    "mae": _f(sk.mean_absolute_error),
    "rmse": _f(sk.root_mean_squared_error),
    "r2": _f(sk.r2_score),
}


@pytest.mark.parametrize("name", MULTICLASS)
def test_a_multiclass_metric_is_scikit_learns(name: str) -> None:
    assert metrics.METRICS[name].compute(TARGETS, CHANCES) == pytest.approx(
        MULTICLASS[name](TARGETS, CHANCES)
    )


@pytest.mark.parametrize("name", MULTILABEL)
def test_a_multilabel_metric_is_scikit_learns(name: str) -> None:
    expected = MULTILABEL[name](HOT, LABEL_CHANCES)
    assert metrics.METRICS[name].compute(HOT, LABEL_CHANCES) == pytest.approx(expected)


@pytest.mark.parametrize("name", REGRESSION)
def test_a_regression_metric_is_scikit_learns(name: str) -> None:
    assert metrics.METRICS[name].compute(VALUES, GUESSES) == pytest.approx(REGRESSION[name](VALUES, GUESSES))


def test_every_metric_is_compared_with_scikit_learn() -> None:
    assert {m.name for m in metrics.of_task("multiclass")} == set(MULTICLASS)
    assert {m.name for m in metrics.of_task("multilabel")} == set(MULTILABEL)
    assert {m.name for m in metrics.of_task("regression")} == set(REGRESSION)
    assert set(metrics.METRICS) == {*MULTICLASS, *MULTILABEL, *REGRESSION}


@pytest.mark.parametrize("name", sorted(set(MULTICLASS) - {"log_loss"}))
def test_a_class_without_images_does_not_lower_a_multiclass_metric(name: str) -> None:
    # torchmetrics counts such a class as 0: an AUC of 0.956 becomes 0.817.
    wider = np.hstack([CHANCES, np.zeros((N, 1))])
    value = metrics.METRICS[name].compute(TARGETS, wider)
    assert value == pytest.approx(metrics.METRICS[name].compute(TARGETS, CHANCES))


def test_a_label_without_positives_does_not_lower_a_multilabel_metric() -> None:
    wider = np.hstack([HOT, np.zeros((N, 1))]), np.hstack([LABEL_CHANCES, np.full((N, 1), 0.2)])
    for name in ("f1", "recall", "roc_auc", "map"):
        value = metrics.METRICS[name].compute(*wider)
        assert value == pytest.approx(metrics.METRICS[name].compute(HOT, LABEL_CHANCES))


def test_a_metric_that_is_not_defined_is_left_out_and_is_no_score() -> None:
    targets, chances = np.zeros(5, dtype=int), np.full((5, 2), 0.5)
    assert "roc_auc" not in metrics.compute_all("multiclass", targets, chances, intervals=True)
    with pytest.raises(DataError, match="'roc_auc' is not defined for these 5 images"):
        metrics.score("roc_auc", targets, chances)


@pytest.mark.parametrize(
    ("task", "targets", "predictions"),
    [
        ("multiclass", TARGETS, CHANCES),
        ("multilabel", HOT, LABEL_CHANCES),
        ("regression", VALUES, GUESSES),
    ],
)
def test_every_interval_holds_its_value_and_repeats(
    task: str, targets: np.ndarray, predictions: np.ndarray
) -> None:
    first = metrics.compute_all(task, targets, predictions, intervals=True, seed=1)
    assert first == metrics.compute_all(task, targets, predictions, intervals=True, seed=1)
    for name, entry in first.items():
        assert entry["low"] < entry["value"] < entry["high"], name
    plain = metrics.compute_all(task, targets, predictions)
    assert plain == {name: {"value": entry["value"]} for name, entry in first.items()}


def test_the_interval_of_accuracy_is_wilsons() -> None:
    # Newcombe 1998, table I: 81 of 263 has the Wilson interval 0.2553 to 0.3662.
    low, high = wilson(81 / 263, 263)
    assert (low, high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))
    assert wilson(1.0, 20) == (pytest.approx(0.8389, abs=5e-5), 1.0)
    assert wilson(0.0, 20)[0] == 0.0


@pytest.mark.parametrize("several", [False, True])
def test_images_with_the_same_labels_may_be_drawn_together(several: bool) -> None:
    rng = np.random.default_rng(3)
    chances = rng.random((400, 3))
    targets = (chances + 0.4 * rng.normal(size=chances.shape) > 0.5) if several else chances.argmax(axis=1)
    if not several:
        targets[::5] = (targets[::5] + 1) % 3
    one_by_one = np.concatenate(
        [metrics.get("f1").weighted(targets, chances, weights) for weights in resamples(400, 20_000, 0)]
    )
    entries = [
        metrics.compute_all(
            "multilabel" if several else "multiclass", targets, chances, intervals=("f1",), seed=seed
        )
        for seed in range(20)
    ]
    for name, share in (("low", 2.5), ("high", 97.5)):
        together = np.mean([entry["f1"][name] for entry in entries])
        assert together == pytest.approx(np.percentile(one_by_one, share), abs=0.05 * one_by_one.std())


def test_a_perfect_result_has_the_interval_that_its_number_of_images_can_prove() -> None:
    targets = np.arange(20) % 2
    entries = metrics.compute_all("multiclass", targets, np.eye(2)[targets], intervals=True)
    for name in ("accuracy", "balanced_accuracy", "f1", "roc_auc", "map"):
        assert entries[name] == {"value": 1.0, "low": pytest.approx(0.8389, abs=5e-5), "high": 1.0}


def test_a_bootstrap_interval_of_an_error_rate_is_near_the_normal_one() -> None:
    entry = metrics.compute_all("regression", VALUES, GUESSES, intervals=True)["mae"]
    half = 1.96 * np.abs(VALUES - GUESSES).std() / np.sqrt(N)
    assert entry["low"] == pytest.approx(entry["value"] - half, abs=0.15 * half)
    assert entry["high"] == pytest.approx(entry["value"] + half, abs=0.15 * half)


def test_a_score_is_higher_for_better_predictions_whatever_the_metric() -> None:
    for name in REGRESSION:
        assert metrics.score(name, VALUES, VALUES + 0.1) > metrics.score(name, VALUES, GUESSES)
    assert metrics.score("rmse", VALUES, GUESSES) == -metrics.METRICS["rmse"].compute(VALUES, GUESSES)


@pytest.mark.parametrize("name", ["accuracy", "log_loss", "roc_auc"])
def test_a_clear_gain_is_significant_and_a_model_against_itself_is_not(name: str) -> None:
    worse = CHANCES[RNG.permutation(N)]
    gain = metrics.compare(name, TARGETS, CHANCES, worse)
    assert gain["low"] > 0
    assert gain["significant"] is True
    loss = metrics.compare(name, TARGETS, worse, CHANCES)
    assert loss["gain"] == pytest.approx(-gain["gain"])
    assert loss["high"] < 0
    same = metrics.compare(name, TARGETS, CHANCES, CHANCES)
    assert same == {"gain": 0, "low": 0, "high": 0, "significant": False}


def test_a_gain_of_one_image_is_not_significant() -> None:
    other = CHANCES.copy()
    wrong = np.flatnonzero(CHANCES.argmax(1) != TARGETS)[0]
    other[wrong] = np.eye(K)[TARGETS[wrong]]
    gain = metrics.compare("accuracy", TARGETS, other, CHANCES)
    assert gain["gain"] == pytest.approx(1 / N)
    assert gain["significant"] is False


def test_the_default_metric_depends_on_balance_and_says_so() -> None:
    assert metrics.default_metric("multiclass", [30, 10, 0])[0] == "accuracy"
    name, reason = metrics.default_metric("multiclass", [1031, 10])
    assert name == "balanced_accuracy"
    assert reason == "the classes are unbalanced beyond 3:1 (10 to 1,031 images a class)"
    assert metrics.default_metric("multilabel", [])[0] == "map"
    assert metrics.default_metric("regression", [])[0] == "r2"
    with pytest.raises(ConfigError, match="no task 'detection'"):
        metrics.default_metric("detection", [])


def test_an_unknown_metric_is_named_with_the_closest_match() -> None:
    with pytest.raises(ConfigError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        metrics.score("acuracy", TARGETS, CHANCES)


def test_unusable_arrays_are_refused() -> None:
    accuracy = metrics.METRICS["accuracy"]
    with pytest.raises(DataError, match="no images"):
        accuracy.compute(TARGETS[:0], CHANCES[:0])
    with pytest.raises(DataError, match="300 targets and 10 predictions"):
        accuracy.compute(TARGETS, CHANCES[:10])
    with pytest.raises(DataError, match="not finite"):
        accuracy.compute(TARGETS, np.full_like(CHANCES, np.nan))


def test_all_intervals_of_five_thousand_images_of_twenty_classes_take_seconds() -> None:
    targets = RNG.integers(0, 20, 5000)
    chances = RNG.random((5000, 20)) + 2 * np.eye(20)[targets]
    started = time.monotonic()
    metrics.compute_all("multiclass", targets, chances / chances.sum(1, keepdims=True), intervals=True)
    assert time.monotonic() - started < 60
