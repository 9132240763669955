"""The built-in tasks: targets, losses and answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from tlauto import metrics
from tlauto.builtin.tasks import TASKS, task
from tlauto.contracts import Task
from tlauto.errors import ConfigError, DataError
from tlauto.losses import Loss
from tlauto.space import complete, defaults

CLASSES = ("ant", "bee", "wasp")
MULTICLASS = np.array([0, 0, 0, 0, 1, 1, 2, 0])
RNG = np.random.default_rng(0)


def _logits(n: int, k: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=(n, k)).astype(np.float32)).requires_grad_()


def _loss(name: str, targets: np.ndarray, outputs: int, **params: object) -> float:
    loss = TASKS[name].loss(targets, outputs, complete(TASKS[name].space, params))
    logits = torch.from_numpy(np.linspace(-2, 2, len(targets) * outputs, dtype=np.float32))
    return loss(logits.reshape(-1, outputs), torch.from_numpy(targets)).item()


@pytest.mark.parametrize("each", TASKS.values(), ids=list(TASKS))
def test_every_task_fulfils_the_contract(each: Task) -> None:
    assert isinstance(each, Task)
    assert TASKS[each.name] is each
    assert set(each.metrics) == {metric.name for metric in metrics.of_task(each.name)}
    assert metrics.default_metric(each.name, [5, 5])[0] in each.metrics


def test_an_unknown_task_is_named_with_the_closest_match() -> None:
    with pytest.raises(ConfigError, match="no task 'multilable'; did you mean 'multilabel'"):
        task("multilable")


def test_targets_have_the_contracts_shapes_and_types() -> None:
    one = task("multiclass").targets([0, 2], CLASSES)
    many = task("multilabel").targets([(0, 2), (), (1,)], CLASSES)
    value = task("regression").targets([1, 2.5], ())
    assert (one.dtype, one.tolist()) == (np.int64, [0, 2])
    assert (many.dtype, many.tolist()) == (np.float32, [[1, 0, 1], [0, 0, 0], [0, 1, 0]])
    assert (value.dtype, value.tolist()) == (np.float32, [1, 2.5])


@pytest.mark.parametrize("wrong", [[3], [-1]])
def test_a_target_outside_the_classes_is_refused(wrong: list[int]) -> None:
    with pytest.raises(DataError, match="3 classes"):
        task("multiclass").targets(wrong, CLASSES)
    with pytest.raises(DataError, match="3 classes"):
        task("multilabel").targets([tuple(wrong)], CLASSES)


def test_an_infinite_regression_target_is_refused() -> None:
    with pytest.raises(DataError, match="finite"):
        task("regression").targets([1.0, float("inf")], ())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_plain_multiclass_loss_is_pytorchs_cross_entropy(smoothing: float) -> None:
    logits, targets = _logits(8, 3), torch.from_numpy(MULTICLASS)
    params = {"label_smoothing": smoothing, "class_weights": "none"}
    loss = task("multiclass").loss(MULTICLASS, 3, params)
    expected = functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, targets), expected)


def test_a_soft_target_of_one_class_is_that_class() -> None:
    logits, targets = _logits(8, 3), torch.from_numpy(MULTICLASS)
    params = {"label_smoothing": 0.1, "class_weights": "balanced"}
    loss = task("multiclass").loss(MULTICLASS, 3, params)
    soft = functional.one_hot(targets, 3).float()
    torch.testing.assert_close(loss(logits, soft), loss(logits, targets))


def test_mixed_targets_cost_what_their_parts_cost() -> None:
    logits = _logits(1, 3)
    loss = task("multiclass").loss(MULTICLASS, 3, {"label_smoothing": 0.0, "class_weights": "none"})
    parts = [loss(logits, torch.tensor([k])) for k in (0, 2)]
    mixed = loss(logits, torch.tensor([[0.3, 0.0, 0.7]]))
    torch.testing.assert_close(mixed, 0.3 * parts[0] + 0.7 * parts[1])


def test_balanced_classes_pull_equally_and_weigh_one_on_average() -> None:
    loss = task("multiclass").loss(MULTICLASS, 3, {"label_smoothing": 0.0, "class_weights": "balanced"})
    flat = torch.zeros(8, 3)
    assert loss(flat, torch.from_numpy(MULTICLASS)).item() == pytest.approx(np.log(3))
    pulls = [loss(torch.zeros(1, 3), torch.tensor([k])).item() * (k == MULTICLASS).sum() for k in range(3)]
    assert pulls == pytest.approx([pulls[0]] * 3)


def test_balanced_weights_bear_a_class_without_training_images() -> None:
    loss = task("multiclass").loss(
        np.array([0, 0, 1]), 3, {"label_smoothing": 0.1, "class_weights": "balanced"}
    )
    assert torch.isfinite(loss(_logits(3, 3), torch.tensor([0, 1, 2])))


def test_the_plain_multilabel_loss_is_pytorchs_and_balance_weighs_rare_positives() -> None:
    targets = np.zeros((10, 3), dtype=np.float32)
    targets[0, 0] = targets[:5, 1] = 1
    logits = _logits(10, 3)
    plain = task("multilabel").loss(targets, 3, {"pos_weight": "none"})
    balanced = task("multilabel").loss(targets, 3, {"pos_weight": "balanced"})
    expected = functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(targets))
    weighted = functional.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(targets), pos_weight=torch.tensor([9.0, 1.0, 1.0])
    )
    torch.testing.assert_close(plain(logits, torch.from_numpy(targets)), expected)
    torch.testing.assert_close(balanced(logits, torch.from_numpy(targets)), weighted)


@pytest.mark.parametrize("kind", ["mse", "huber"])
def test_the_regression_loss_is_the_same_in_any_unit(kind: str) -> None:
    metres = RNG.normal(3.0, 0.2, 50).astype(np.float32)
    params = {"kind": kind}
    losses = []
    for unit in (1.0, 1e6, 1e-6):
        targets = metres * np.float32(unit)
        guess = torch.full((50, 1), float(targets.mean()))
        loss = task("regression").loss(targets, 1, params)
        losses.append(loss(guess, torch.from_numpy(targets)).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    if kind == "mse":
        assert losses[0] == pytest.approx(1.0, rel=1e-3)


def test_hubers_loss_is_linear_beyond_one_deviation() -> None:
    targets = np.array([-1.0, 1.0], dtype=np.float32)  # mean 0, deviation 1
    loss = task("regression").loss(targets, 1, {"kind": "huber"})
    far, farther = (loss(torch.tensor([[x]]), torch.tensor([0.0])).item() for x in (10.0, 11.0))
    assert farther - far == pytest.approx(1.0)


def test_equal_regression_targets_are_refused() -> None:
    with pytest.raises(DataError, match="all training targets are 4; there is nothing to learn"):
        task("regression").loss(np.full(5, 4, dtype=np.float32), 1, {"kind": "mse"})


@pytest.mark.parametrize("name", TASKS)
def test_losses_of_half_precision_logits_are_computed_in_32_bits(name: str) -> None:
    raw = {"multiclass": [0, 1, 1], "multilabel": [(0,), (), (0, 1)], "regression": [0.0, 1.0, 2.0]}
    targets = task(name).targets(raw[name], ("a", "b"))
    outputs = task(name).num_outputs(("a", "b"))
    loss = task(name).loss(targets, outputs, defaults(task(name).space))
    value = loss(torch.zeros(3, outputs, dtype=torch.bfloat16), torch.from_numpy(targets))
    assert value.dtype == torch.float32
    assert torch.isfinite(value)


BY_IMAGE = [
    ("multiclass", {"label_smoothing": 0.0, "class_weights": "none"}),
    ("multiclass", {"label_smoothing": 0.15, "class_weights": "balanced"}),
    ("multilabel", {"pos_weight": "none"}),
    ("multilabel", {"pos_weight": "balanced"}),
    ("regression", {"kind": "mse"}),
    ("regression", {"kind": "huber"}),
]


@pytest.mark.parametrize(("name", "params"), BY_IMAGE, ids=lambda value: "-".join(map(str, value.values()))
                         if isinstance(value, dict) else value)  # fmt: skip
def test_a_loss_by_image_is_the_mean_and_has_its_slopes(name: str, params: dict[str, object]) -> None:
    hot = (RNG.random((8, 3)) < 0.4).astype(np.float32)
    targets = {"multiclass": MULTICLASS, "multilabel": hot, "regression": RNG.normal(5, 2, 8)}[name]
    targets = np.asarray(targets, dtype=np.int64 if name == "multiclass" else np.float32)
    outputs = 1 if name == "regression" else 3
    loss = task(name).loss(targets, outputs, params)  # type: ignore[arg-type]
    assert isinstance(loss, Loss)
    heads = [4 * _logits(8, outputs).detach() for _ in range(2)]
    forms = [torch.from_numpy(targets)]
    forms += [functional.one_hot(forms[0], 3).float()] if name == "multiclass" else []
    for form in forms:
        losses, slopes = loss.by_image(form)(torch.stack([head.T for head in heads]))
        for logits, own, slope in zip(heads, losses, slopes, strict=True):
            logits = logits.clone().requires_grad_()
            mean = loss(logits, form)
            (expected,) = torch.autograd.grad(mean, logits)
            torch.testing.assert_close(own.mean(), mean.detach())
            torch.testing.assert_close(slope.T / 8, expected)


def test_answers_are_probabilities_or_values_even_for_extreme_logits() -> None:
    logits = np.array([[1000.0, -1000.0], [0.0, 0.0]], dtype=np.float32)
    assert task("multiclass").predict(logits).tolist() == [[1, 0], [0.5, 0.5]]
    assert task("multilabel").predict(logits).tolist() == [[1, 0], [0.5, 0.5]]
    assert task("regression").predict(logits[:, :1]).tolist() == [1000, 0]


def test_answers_agree_with_pytorch() -> None:
    logits = RNG.normal(0, 4, (20, 5)).astype(np.float32)
    tensor = torch.from_numpy(logits)
    np.testing.assert_allclose(task("multiclass").predict(logits), tensor.softmax(1).numpy(), rtol=1e-4)
    np.testing.assert_allclose(
        task("multilabel").predict(logits), tensor.sigmoid().numpy(), rtol=1e-3, atol=1e-7
    )
