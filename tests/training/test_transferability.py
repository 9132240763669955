"""Each score is its published formula, ignores what it should ignore, and refuses what makes no sense."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import BayesianRidge
from tests_support import environment
from transferability import spearman

from tlauto.errors import ConfigError
from tlauto.training.transferability import h_score, leep, log_me, nce

Array = np.ndarray[Any, Any]
SHAPES = [(60, 8), (12, 30), (20, 20)]  # N > D, N < D, N = D


def data(number: int, width: int, *, seed: int = 0, classes: int = 3) -> tuple[Array, Array, Array]:
    """Features (N, D) that depend on classes (N,), and noisy linear values (N,) of them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % classes
    features = rng.normal(size=(number, width)) + rng.normal(size=(classes, width))[labels]
    return features, labels, features @ rng.normal(size=width) + rng.normal(size=number)


def log_evidence(features: Array, y: Array, alpha: float, beta: float) -> float:
    """Equation 2 of the LogME paper, literally."""
    number, width = features.shape
    a = alpha * np.eye(width) + beta * features.T @ features
    m = beta * np.linalg.solve(a, features.T @ y)
    value = number / 2 * np.log(beta) + width / 2 * np.log(alpha) - number / 2 * np.log(2 * np.pi)
    value -= beta / 2 * ((features @ m - y) ** 2).sum() + alpha / 2 * m @ m
    return float(value - np.linalg.slogdet(a)[1] / 2)


def best_evidence(features: Array, y: Array) -> float:
    """Its maximum per image by Nelder-Mead from several starts.

    Precisions stay below e^14: beyond, the literal formula loses its digits to cancellation.
    """
    starts = [(a, b) for a in (-3.0, 0.0, 3.0) for b in (-3.0, 0.0, 3.0)]

    def loss(logs: Array) -> float:
        return -log_evidence(features, y, *np.exp(np.clip(logs, -14, 14)))

    options = {"xatol": 1e-6, "fatol": 1e-10, "maxiter": 4000}
    found = [minimize(loss, start, method="Nelder-Mead", options=options).fun for start in starts]
    return -min(found) / len(y)


# --- LogME ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", SHAPES)
def test_log_me_of_values_is_the_maximum_of_the_evidence(shape: tuple[int, int], seed: int) -> None:
    features, _, values = data(*shape, seed=seed)
    assert log_me(features, values) == pytest.approx(best_evidence(features, values), abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_me_of_classes_is_the_mean_over_their_one_hot_columns(shape: tuple[int, int]) -> None:
    features, labels, _ = data(*shape)
    direct = [best_evidence(features, (labels == k).astype(float)) for k in range(3)]
    assert log_me(features, labels) == pytest.approx(np.mean(direct), abs=1e-5)


def test_log_me_of_noise_is_the_maximum_of_the_evidence() -> None:
    # The best prior precision may be infinite here: the features are of no use.
    for seed in range(5):
        rng = np.random.default_rng(seed)
        features, values = rng.normal(size=(40, 5)), rng.normal(size=40)
        assert log_me(features, values) == pytest.approx(best_evidence(features, values), abs=1e-5)


def test_log_me_finds_the_larger_of_two_maxima() -> None:
    features, _, values = data(20, 20, seed=2)
    squares = np.linalg.svd(features)[1] ** 2
    along = (np.linalg.svd(features)[0].T @ values) ** 2

    def profile(ratio: float) -> float:  # the evidence at alpha / beta = ratio and the best beta
        noise = (along / (1 + squares / ratio)).mean()
        return float(-0.5 * (np.log(2 * np.pi * noise) + 1 + np.log1p(squares / ratio).mean()))

    curve = [profile(ratio) for ratio in squares.mean() * np.logspace(-8, 8, 1601)]
    peaks = [b for a, b, c in zip(curve, curve[1:], curve[2:], strict=False) if a < b > c]
    assert len(peaks) == 2
    assert log_me(features, values) == pytest.approx(max(peaks), abs=1e-4)


def test_log_me_agrees_with_another_evidence_maximiser() -> None:
    features, _, values = data(200, 10)
    flat = {"alpha_1": 0.0, "alpha_2": 0.0, "lambda_1": 0.0, "lambda_2": 0.0}
    model = BayesianRidge(**flat, fit_intercept=False, compute_score=True, tol=1e-10).fit(features, values)
    assert log_me(features, values) == pytest.approx(model.scores_[-1] / 200, abs=1e-6)


def test_log_me_of_several_columns_is_their_mean_without_the_constant_ones() -> None:
    features, labels, values = data(50, 6)
    columns = np.stack([labels == 0, labels > 0, np.ones(50), np.zeros(50)], axis=1)
    one_by_one = [log_me(features, columns[:, k].astype(float)) for k in range(2)]
    assert log_me(features, columns.astype(np.float32)) == pytest.approx(np.mean(one_by_one))
    assert log_me(features, columns.astype(int)) == pytest.approx(np.mean(one_by_one))
    assert log_me(features, values[:, None]) == pytest.approx(log_me(features, values))


@pytest.mark.parametrize("shape", SHAPES)
def test_log_me_ignores_rotation_scale_order_and_zero_columns(shape: tuple[int, int]) -> None:
    features, labels, _ = data(*shape)
    rng = np.random.default_rng(1)
    rotation, _ = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))
    order = rng.permutation(shape[0])
    expected = pytest.approx(log_me(features, labels), abs=1e-5)
    assert log_me(features @ rotation, labels) == expected
    assert log_me(1e-4 * features, labels) == expected
    assert log_me(features[order], labels[order]) == expected
    assert log_me(np.hstack([features, np.zeros((shape[0], 40))]), labels) == expected


def test_log_me_is_the_same_by_both_decompositions() -> None:
    # Zero columns turn N > D, by eigenvectors, into N < D, by the SVD; a copied column makes rank < D.
    features, labels, _ = data(40, 10)
    features = np.hstack([features, features[:, :1]])
    wide = np.hstack([features, np.zeros((40, 60))])
    assert log_me(features, labels) == pytest.approx(log_me(wide, labels), abs=1e-9)
    assert log_me(features, labels) == pytest.approx(
        np.mean([best_evidence(features, (labels == k).astype(float)) for k in range(3)]), abs=1e-5
    )


def test_log_me_of_targets_explained_entirely_is_finite_and_high() -> None:
    features, _, values = data(30, 5)
    for x, y in (
        (features, features @ np.ones(5)),
        (np.eye(30), values),
        (np.hstack([features] * 9), values),
    ):
        assert np.isfinite(log_me(x, y))
    assert log_me(features, features @ np.ones(5)) > log_me(features, values) + 5


def test_log_me_of_features_that_are_zero_is_the_evidence_of_pure_noise() -> None:
    values = data(30, 5)[2]
    expected = -0.5 * (np.log(2 * np.pi * (values**2).mean()) + 1)
    assert log_me(np.zeros((30, 5)), values) == pytest.approx(expected)


# --- H-score ----------------------------------------------------------------------------------------


def covariances(features: Array, labels: Array) -> tuple[Array, Array]:
    means = np.stack([features[labels == label].mean(axis=0) for label in labels])
    return np.cov(features.T, ddof=0), np.cov(means.T, ddof=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_h_score_without_shrinkage_is_the_literal_trace(shape: tuple[int, int]) -> None:
    features, labels, _ = data(*shape)
    labels = labels[: shape[0]].copy()
    labels[: shape[0] // 4] = 0  # classes of different sizes
    whole, between = covariances(features, labels)
    expected = np.trace(np.linalg.pinv(whole, rcond=1e-10) @ between)
    assert h_score(features, labels, shrinkage=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_h_score_shrinks_as_ledoit_and_wolf(shape: tuple[int, int]) -> None:
    features, labels, _ = data(*shape)
    _, between = covariances(features, labels)
    whole, amount = ledoit_wolf(features)
    expected = np.trace(np.linalg.solve(whole, (1 - amount) * between))
    assert h_score(features, labels) == pytest.approx(expected)
    assert h_score(features, labels, shrinkage=amount) == pytest.approx(expected)


def test_h_score_without_shrinkage_ignores_invertible_linear_maps() -> None:
    features, labels, _ = data(60, 8)
    mapped = features @ np.random.default_rng(1).normal(size=(8, 8)) + 7
    expected = h_score(features, labels, shrinkage=0.0)
    assert h_score(mapped, labels, shrinkage=0.0) == pytest.approx(expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_h_score_ignores_rotation_scale_and_shift(shape: tuple[int, int]) -> None:
    features, labels, _ = data(*shape)
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(shape[1], shape[1])))
    assert h_score(1e3 * features @ rotation + 5, labels) == pytest.approx(h_score(features, labels))


def test_h_score_lies_between_0_and_the_number_of_classes_less_1() -> None:
    features, labels, _ = data(12, 30)
    assert h_score(features, labels, shrinkage=0.0) == pytest.approx(2)  # D >= N - 1: saturated
    assert 0 < h_score(features, labels) < 2
    assert h_score(features, labels, shrinkage=1.0) == 0
    assert h_score(np.full((12, 30), 0.1), labels) == 0


def test_a_constant_column_adds_nothing_to_the_h_score() -> None:
    features, labels, _ = data(5000, 8)
    # 0.1 is no binary fraction: its naive mean over many rows is not exactly 0.1.
    padded = np.hstack([features, np.full((5000, 1), 0.1)])
    for amount in (0.0, None):
        expected = pytest.approx(
            h_score(features, labels, shrinkage=amount), rel=1e-3 if amount is None else 1e-9
        )
        assert h_score(padded, labels, shrinkage=amount) == expected


# --- NCE and LEEP -----------------------------------------------------------------------------------


def probabilities(number: int, sources: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).dirichlet(np.full(sources, 0.3), size=number)


def test_nce_is_the_literal_sum() -> None:
    rng = np.random.default_rng(0)
    source, classes = rng.integers(0, 4, 50), rng.integers(0, 3, 50)
    expected = 0.0
    for z, y in zip(source, classes, strict=True):
        expected += np.log(((source == z) & (classes == y)).sum() / (source == z).sum()) / 50
    assert nce(source, classes) == pytest.approx(expected)


def test_nce_of_probabilities_takes_the_likeliest_source_class() -> None:
    p, classes = probabilities(50, 6), np.arange(50) % 3
    assert nce(p, classes) == nce(p.argmax(axis=1), classes)


def test_leep_is_the_literal_sum() -> None:
    p, classes = probabilities(40, 5), np.arange(40) % 3
    joint = np.zeros((3, 5))
    for i in range(40):
        joint[classes[i]] += p[i] / 40
    expected = 0.0
    for i in range(40):
        expected += np.log(sum(joint[classes[i], z] / joint[:, z].sum() * p[i, z] for z in range(5))) / 40
    assert leep(p, classes) == pytest.approx(expected)


def test_nce_and_leep_are_equal_for_certain_answers() -> None:
    source, classes = np.random.default_rng(0).integers(0, 4, 50), np.arange(50) % 3
    certain = np.eye(6)[source]  # two source classes are never named
    assert leep(certain, classes) == pytest.approx(nce(source, classes))


@pytest.mark.parametrize("score", [nce, leep])
def test_nce_and_leep_run_from_the_classes_entropy_to_0(score: Callable[[Array, Array], float]) -> None:
    classes = np.array([0, 0, 0, 1, 2, 2])
    shares = np.array([3, 1, 2]) / 6
    assert score(np.full((6, 1), 1.0), classes) == pytest.approx((shares * np.log(shares)).sum())
    assert score(np.eye(3)[classes], classes) == 0
    assert str(score(np.eye(3)[classes], classes)) == "0.0"
    mixed = score(probabilities(6, 3), classes)
    assert -np.log(3) <= mixed <= 0


# --- all of them ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(90, 10), (30, 60)])
@pytest.mark.parametrize("score", [log_me, h_score])
def test_features_that_inform_score_above_noise(
    score: Callable[[Array, Array], float], shape: tuple[int, int]
) -> None:
    features, labels, _ = data(*shape)
    noise = np.random.default_rng(9).normal(size=shape)
    assert score(features, labels) > score(0.2 * features + noise, labels) > score(noise, labels)


@pytest.mark.parametrize("score", [nce, leep])
def test_answers_that_inform_score_above_noise(score: Callable[[Array, Array], float]) -> None:
    classes = np.arange(90) % 3
    informed = 0.7 * np.eye(5)[classes] + 0.3 * probabilities(90, 5)
    assert score(informed, classes) > score(probabilities(90, 5), classes)


@pytest.mark.parametrize("score", [log_me, h_score])
def test_half_precision_is_computed_in_64_bits(score: Callable[[Array, Array], float]) -> None:
    features, labels, _ = data(5000, 8)  # sums of squares of 300 leave the range of float16
    half = (300 * features).astype(np.float16)
    before = half.copy()
    assert score(half, labels) == pytest.approx(score(half.astype(np.float64), labels), rel=1e-12)
    np.testing.assert_array_equal(half, before)


def test_half_precision_probabilities_are_accepted() -> None:
    p, classes = probabilities(60, 1000), np.arange(60) % 3
    assert leep(p.astype(np.float16), classes) == pytest.approx(leep(p, classes), abs=1e-2)


@pytest.mark.parametrize("score", [log_me, h_score, nce, leep])
def test_labels_may_be_of_any_type_and_need_not_count_up(score: Callable[[Array, Array], float]) -> None:
    given = probabilities(30, 4)
    labels = np.arange(30) % 2
    expected = pytest.approx(score(given, labels))
    for other in (labels == 1, np.array(["ant", "bee"])[labels], 5 + 70 * labels, labels.astype(np.uint8)):
        assert score(given, other) == expected


@pytest.mark.parametrize("score", [log_me, h_score, nce, leep])
def test_one_image_a_class_gives_a_finite_score(score: Callable[[Array, Array], float]) -> None:
    for sources in (3, 40):
        assert np.isfinite(score(probabilities(12, sources), np.arange(12)))


GOOD, LABELS = probabilities(6, 2), np.array([0, 1, 0, 1, 0, 1])
BAD: list[tuple[Any, Any, str]] = [
    (np.zeros((0, 2)), LABELS[:0], "shape is (0, 2)"),
    (np.zeros((6, 0)), LABELS, "shape is (6, 0)"),
    (GOOD, LABELS[:5], "there are 5 "),
    (GOOD, 3, "there are 0 "),
    (GOOD, LABELS[:, None, None], "shape is (6, 1, 1)"),
    (GOOD, np.zeros(6, dtype=int), "all 6 images are of one class"),
    (GOOD * np.nan, LABELS, ""),
]


@pytest.mark.parametrize("score", [log_me, h_score, nce, leep])
@pytest.mark.parametrize(("given", "targets", "says"), BAD)
def test_unusable_input_is_refused_in_one_sentence(
    score: Callable[[Any, Any], float], given: Any, targets: Any, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        score(given, targets)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 130


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: log_me(GOOD[:, 0], LABELS), "their shape is (6,)"),
        (lambda: log_me(GOOD + 1j, LABELS), "their type is complex128"),
        (lambda: log_me(GOOD, np.full(6, np.inf)), "not finite"),
        (lambda: log_me(GOOD, np.full(6, 2.5)), "all 6 targets are equal"),
        (lambda: log_me(GOOD, np.full((6, 2), "ant")), "columns of targets must be numbers"),
        (lambda: h_score(GOOD, LABELS, shrinkage=1.5), "shrinkage is 1.5; give one from 0 to 1"),
        (lambda: h_score(GOOD, LABELS, shrinkage=float("nan")), "shrinkage is nan"),
        (lambda: h_score(GOOD, np.eye(6)), "classes must be one row an image"),
        (lambda: nce(LABELS[:5], LABELS), "there are 6 classes for 5 images"),
        (lambda: nce(np.zeros(0), np.zeros(0)), "there are 0 classes for 0 images"),
        (lambda: nce(np.zeros((6, 1, 1)), LABELS), "source labels must be one row an image"),
        (lambda: leep(2 * GOOD, LABELS), "each row must add up to 1"),
        (lambda: leep(GOOD * [3, -1], LABELS), "must not be negative"),
        (lambda: leep(LABELS, LABELS), "their shape is (6,)"),
    ],
)
def test_what_only_one_score_refuses_is_named(call: Callable[[], float], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    assert says in str(caught.value)


def test_the_bench_scripts_correlation_is_spearmans() -> None:
    assert spearman([1.0, 2.0, 3.0], [0.1, 0.5, 0.9]) == pytest.approx(1)
    assert spearman([3.0, 2.0, 1.0, 0.0], [0.1, 0.5, 0.5, 0.9]) == pytest.approx(-3 / np.sqrt(10))
    assert spearman([1.0, 1.0 + 1e-12, 1.0], [0.1, 0.5, 0.9]) is None, "rounding is no ranking"
    assert spearman([1.0], [0.5]) is None


@pytest.mark.slow
def test_the_bench_script_scores_backbones_and_ends_in_json(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    script = Path(__file__).parents[2] / "bench" / "transferability.py"
    ids = ["timm:test_resnet.r160_in1k", "timm:test_vit.r160_in1k"]
    command = [sys.executable, str(script), "--data", "patches", "--no-pretrained"]
    command += [f"--backbone={id}" for id in ids]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert [row["backbone"] for row in run["backbones"]] == ids
    assert set(run["spearman"]) == {"log_me", "h_score", "h_score_unshrunk"}
    assert set(run["seconds"]) == {"features", "probe_cv", *run["spearman"]}
    assert all(0 <= row["probe_cv"] <= 1 for row in run["backbones"])


def test_the_module_imports_no_machine_learning_library() -> None:
    code = (
        "import sys, tlauto.training.transferability; "
        "sys.exit(str([m for m in ('torch', 'sklearn', 'scipy') if m in sys.modules] or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
