"""Heads that are solved side by side are those that are solved alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlauto.builtin.losses import CrossEntropy
from tlauto.contracts import TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import TrialError
from tlauto.plugins import Registry
from tlauto.training.fit import run_together
from tlauto.training.linear import Problem, side_by_side
from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

SOLVED = {"probe.solver": "lbfgs"}


def test_losses_side_by_side_are_each_ones_own() -> None:
    targets = torch.tensor([0, 2, 1, 2, 0])
    losses = [CrossEntropy(np.array([1.0, 2.0, 0.5]), 0.1 * i) for i in range(3)]
    logits = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    together = side_by_side([loss.by_image(targets) for loss in losses])
    values, slopes = together(logits)
    some, some_slopes = together.of(torch.tensor([0, 2]))(logits[[0, 2]])
    assert torch.equal(some, values[[0, 2]])
    assert torch.equal(some_slopes, slopes[[0, 2]])
    for i, loss in enumerate(losses):
        own, own_slopes = loss.by_image(targets)(logits[i : i + 1])
        torch.testing.assert_close(values[i], own[0])
        torch.testing.assert_close(slopes[i], own_slopes[0])


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "read in blocks"])
def test_heads_under_other_losses_are_solved_as_if_alone(limit: int) -> None:
    random = np.random.default_rng(0)
    targets = random.integers(0, 3, 90)
    features = random.normal(size=(90, 12)) + random.normal(size=(3, 12))[targets]
    x = torch.from_numpy(features - features.mean(axis=0)).float()
    rows = Rows(Stored((x,)), lambda part: part, torch.device("cpu"), limit=limit)
    losses = [CrossEntropy(np.array([1.0, w, 1.0]), smoothing) for w, smoothing in ((1, 0), (3, 0), (1, 0.2))]
    penalties, everything = [1e-3, 1e-1, 1e-2], torch.arange(90)
    first = Problem(rows, torch.from_numpy(targets), losses[0], 3)
    heads, means = replace(first, others=tuple(losses[1:])).solve(penalties, [everything] * 3, tolerance=1e-5)
    for i, loss in enumerate(losses):
        alone = replace(first, loss=loss)
        head, mean = alone.solve([penalties[i]], [everything], tolerance=1e-5)
        torch.testing.assert_close(heads[i], head[0], atol=2e-3, rtol=1e-3)
        assert float(means[i]) == pytest.approx(float(mean), abs=1e-4)
        assert float(mean) == pytest.approx(alone.mean_loss(alone.answers(head)), abs=1e-4)


def specs_of(spec: TrialSpec, *params: dict[str, Any]) -> list[TrialSpec]:
    root = Path(spec.folder)
    found = [
        replace(spec, number=i, seed=i, folder=str(root / str(i)), params={**SOLVED, **own})
        for i, own in enumerate(params)
    ]
    for one in found:
        Path(one.folder).mkdir(parents=True)
    return found


MIXED = (
    {"probe.l2": 1e-3},
    {"probe.l2": 1.0, "loss.label_smoothing": 0.15},
    {"probe.l2": 1e-2, "probe.features": "grid"},
    {"probe.l2": 1e-1, "loss.class_weights": "balanced"},
    {"probe.l2": 1e-2, "probe.features": "levels", "loss.label_smoothing": 0.05},
    {"probe.l2": 1e-1, "probe.features": "grid", "loss.class_weights": "balanced"},
)


def as_alone(done: TrialDone, alone: TrialDone) -> None:
    assert done.number == alone.number
    assert done.score == pytest.approx(alone.score)
    assert done.val_loss == pytest.approx(alone.val_loss, rel=1e-2, abs=1e-3)
    assert (done.features, done.trainable, done.penalty) == (alone.features, alone.trainable, alone.penalty)
    assert done.metrics.keys() == alone.metrics.keys()
    assert (done.provenance, done.versions) == (alone.provenance, alone.versions)


def test_trials_run_together_end_as_they_do_alone(
    spec: TrialSpec, registry: Registry, dataset: Dataset, run: Callable[..., TrialDone]
) -> None:
    specs = specs_of(spec, *MIXED)
    ends = run_together(specs, registry, dataset, device="cpu")
    for one, (epoch, done) in zip(specs, ends, strict=True):
        folder = Path(one.folder)
        assert {"checkpoint.safetensors", "predictions.npz"} == {file.name for file in folder.iterdir()}
        as_alone(done, run(replace(one, folder=str(folder / "alone"))))
        assert (epoch.number, epoch.epoch, epoch.score) == (one.number, 1, done.score)
        assert epoch.val_loss == done.val_loss
        assert done.seconds > 0
    kinds = [done.features for _, done in ends]
    assert kinds == ["pooled", "pooled", "grid", "pooled", "levels", "grid"]


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_can_too(
    task: str, spec: TrialSpec, registry: Registry, relabel: Callable[..., Dataset],
    run: Callable[..., TrialDone],
) -> None:  # fmt: skip
    if task == "multilabel":
        data, metric = (
            relabel(task, lambda item: (item.target, (item.target + 1) % 3), ("a", "b", "c")),
            "map",
        )
        own = [{"loss.pos_weight": "none"}, {"loss.pos_weight": "balanced"}]
    else:
        data, metric = relabel(task, lambda item: 1.5 + float(item.target)), "r2"
        own = [{"loss.kind": "mse"}, {"loss.kind": "huber"}, {"loss.kind": "mse"}]
    spec = replace(spec, task=task, metric=metric)
    specs = specs_of(spec, *({"probe.l2": 10.0**-i, **params} for i, params in enumerate(own)))
    for one, (_, done) in zip(specs, run_together(specs, registry, data, device="cpu"), strict=True):
        as_alone(done, run(replace(one, folder=f"{one.folder}/alone"), dataset=data))


def test_one_that_cannot_be_run_fails_all(spec: TrialSpec, registry: Registry, dataset: Dataset) -> None:
    first, second = specs_of(spec, {"probe.l2": 1e-2}, {"probe.l2": 1e-2})
    with pytest.raises(TrialError, match="cannot serve for training"):
        run_together([first, replace(second, evaluate_on="train")], registry, dataset, device="cpu")
