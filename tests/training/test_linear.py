"""Linear heads by L-BFGS against scikit-learn, closed forms and an independent optimiser."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn
from torch.nn import functional

from tlauto import metrics
from tlauto.builtin.losses import CrossEntropy, Residual
from tlauto.contracts import EpochResult, TaskHead, TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import TrialError
from tlauto.training.axes import WIDE, principal_axes
from tlauto.training.lbfgs import minimise
from tlauto.training.linear import FOLDS, GRID, Problem, cross_validate, stratified_folds
from tlauto.training.model import Rescale
from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

Run = Callable[..., TrialDone]


def make_problem(
    rows: int = 120, width: int = 20, classes: int = 3, *, limit: int = 2**30, apart: float = 1.5
) -> Problem:
    random = np.random.default_rng(0)
    targets = random.integers(0, classes, rows)
    features = random.normal(size=(rows, width)) + apart * random.normal(size=(classes, width))[targets]
    x = torch.from_numpy(features).float()
    mean = x.mean(dim=0)
    scaled = Rows(Stored((x,)), lambda part: part - mean, torch.device("cpu"), limit=limit)
    return Problem(scaled, torch.from_numpy(targets), CrossEntropy(np.ones(classes)), classes)


def everything(problem: Problem) -> torch.Tensor:
    return torch.arange(len(problem.features))


def solve(problem: Problem, penalty: float, rows: torch.Tensor, *, tolerance: float) -> torch.Tensor:
    """One head (D + 1, K)."""
    (head,) = problem.outwards(problem.solve([penalty], [rows], tolerance=tolerance).heads)
    return head


# --- the minimiser ----------------------------------------------------------------------------------


def test_each_problem_reaches_its_own_minimum() -> None:
    scales = torch.tensor([1.0, 100.0, 1e4])
    centres = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-4.0, 0.0]])

    def objective(x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        off = x - centres[which]
        curved = off * torch.stack([torch.ones(len(which)), scales[which]], dim=1)
        return 0.5 * (off * curved).sum(dim=1), curved

    assert torch.allclose(minimise(objective, torch.zeros(3, 2), tolerance=1e-6)[0], centres, atol=1e-3)


def test_a_curved_valley_is_followed() -> None:
    def rosenbrock(x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        point = x.detach().requires_grad_()
        with torch.enable_grad():
            value = (1 - point[:, 0]) ** 2 + 100 * (point[:, 1] - point[:, 0] ** 2) ** 2
            (gradient,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), gradient

    start = torch.tensor([[-1.2, 1.0]], dtype=torch.float64)
    found, value = minimise(rosenbrock, start, steps=500, tolerance=1e-8)
    assert torch.allclose(found, torch.ones(1, 2, dtype=torch.float64), atol=1e-4)
    assert torch.equal(value, rosenbrock(found, torch.arange(1))[0])


def test_a_problem_that_starts_at_its_minimum_stays() -> None:
    def bowl(x: torch.Tensor, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.square().sum(dim=1), 2 * x

    assert torch.equal(minimise(bowl, torch.zeros(2, 3))[0], torch.zeros(2, 3))


# --- linear heads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(120, 20), (30, 200)], ids=["more rows", "more features"])
@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(shape: tuple[int, int], penalty: float) -> None:
    problem = make_problem(*shape)
    head = solve(problem, penalty, everything(problem), tolerance=1e-6)
    x = problem.features.take(everything(problem)).double().numpy()
    # Ours is the mean loss over its value at nothing, log 3, plus penalty / 2 |W|².
    strength = 1 / (penalty * np.log(3) * len(x))
    theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(x, problem.targets.numpy())
    ours = torch.softmax(problem.answers(problem.inwards(head[None])), dim=1).numpy()
    assert np.abs(ours - theirs.predict_proba(x)).max() < 5e-3


def test_least_squares_is_ridge_regression() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 8)).astype(np.float32)
    y = (x @ random.normal(size=8) + 0.1 * random.normal(size=60)).astype(np.float32)
    rows = Rows(Stored((torch.from_numpy(x),)), lambda part: part, torch.device("cpu"))

    problem = Problem(rows, torch.from_numpy(y), Residual(1.0, is_huber=False), 1)
    head = solve(problem, 1e-2, torch.arange(60), tolerance=1e-6)
    theirs = Ridge(alpha=1e-2 / 2 * 60 * float((y**2).mean()), tol=1e-8).fit(x, y)
    assert np.allclose(head[:-1, 0].numpy(), theirs.coef_, atol=1e-3)
    assert head[-1, 0].item() == pytest.approx(float(theirs.intercept_), abs=1e-3)


def test_problems_solved_together_are_those_solved_alone() -> None:
    problem = make_problem()
    rows = [torch.arange(0, 80), torch.arange(40, 120), everything(problem)]
    penalties = [1e-3, 1e-2, 1e-1]
    together = problem.outwards(problem.solve(penalties, rows, tolerance=1e-5).heads)
    for i in range(3):
        assert torch.allclose(together[i], solve(problem, penalties[i], rows[i], tolerance=1e-5), atol=2e-3)


@pytest.mark.parametrize("limit", [2**30, 0], ids=["in memory", "read in blocks"])
def test_values_in_a_unit_of_their_own_are_learned_and_the_loss_is_that_of_the_answers(limit: int) -> None:
    known = make_problem(limit=limit)
    values = torch.from_numpy(np.random.default_rng(1).normal(size=20).astype(np.float32))
    kilograms = 1000 + 50 * (make_problem().features.whole @ values)
    output = Rescale(1)
    output.measure(kilograms)
    loss = Residual(float(kilograms.std(correction=0)), is_huber=False)
    problem = Problem(known.features, kilograms, loss, 1, output)
    heads, losses = problem.solve([1e-4], [everything(problem)], tolerance=1e-5)
    answers = problem.answers(heads)
    assert float(losses) == pytest.approx(problem.mean_loss(answers), abs=1e-4)
    assert float(losses) < 0.01, "guessing the mean is 1"
    assert torch.allclose(answers[:, 0], kilograms, atol=0.1 * float(kilograms.std()))


@pytest.mark.parametrize("rows", [20, 80], ids=["fewer rows", "more rows"])
def test_features_that_say_nothing_leave_the_bias(rows: int) -> None:
    targets = torch.arange(rows) % 4 // 3  # three of class 0 to one of class 1
    features = Rows(Stored((torch.zeros(rows, 40),)), lambda part: part, torch.device("cpu"))
    problem = Problem(features, targets, CrossEntropy(np.ones(2)), 2)
    head = solve(problem, 1e-2, torch.arange(rows), tolerance=1e-6)
    assert not head[:-1].any()
    assert torch.softmax(head[-1], dim=0)[0].item() == pytest.approx(0.75, abs=1e-3)


def test_the_axes_hold_all_that_the_features_say() -> None:
    for shape in ((120, 20), (30, 200)):
        x = make_problem(*shape).features
        axes = principal_axes(x)
        whole = torch.eye(len(axes.squares))
        basis = axes.basis.out_of(whole)  # transposed
        assert basis.shape == (len(axes.squares), shape[1])
        assert torch.allclose(axes.basis.into(basis), whole, atol=1e-3)
        assert torch.allclose(axes.rows.whole @ basis, x.whole, atol=1e-3)
        assert torch.allclose(axes.rows.whole.square().mean(dim=0), axes.squares, rtol=1e-3, atol=1e-5)


def test_features_that_stay_on_disk_give_the_same_head() -> None:
    small, mapped = make_problem(), make_problem(limit=0)
    assert mapped.features.whole is None
    heads = [solve(p, 1e-2, everything(p), tolerance=1e-5) for p in (small, mapped)]
    assert torch.allclose(*heads, atol=1e-3)


@pytest.mark.parametrize("width", [40, 2100], ids=["few features", "more than axes are found of"])
def test_heads_on_features_read_in_blocks_are_those_on_features_in_memory(width: int) -> None:
    small, mapped = (make_problem(2200, width, 30, limit=limit, apart=0.2) for limit in (2**30, 0))
    some = [torch.arange(0, 2000), torch.arange(100, 2200, 3)]
    assert len(list(mapped.features.blocks(beside=2 * 30 * 20))) > 1
    if width > WIDE:
        assert len(mapped._axes.squares) < width
    for rows in some:
        found = [p.solve([1e-1], [rows], tolerance=1e-4).heads for p in (small, mapped)]
        answers = [p.answers(head)[rows] for p, head in zip((small, mapped), found, strict=True)]
        assert torch.allclose(*answers, atol=2e-3 * float(answers[0].abs().max()))


def test_a_head_whose_logits_are_held_in_blocks_is_the_optimum() -> None:
    problem, classes = make_problem(2200, 10, 1000), 1000
    assert len(list(problem.features.blocks(beside=classes))) == 2
    head = solve(problem, 1e-2, everything(problem), tolerance=1e-4)

    def slopes(at: torch.Tensor) -> torch.Tensor:
        at = at.clone().requires_grad_()
        outputs = problem.features.whole @ at[:-1] + at[-1]
        loss = functional.cross_entropy(outputs, problem.targets) / np.log(classes)
        (found,) = torch.autograd.grad(loss + 1e-2 / 2 * at[:-1].square().sum(), at)
        return found.abs().max()

    assert slopes(head) < 1e-2 * slopes(torch.zeros_like(head))


def test_cross_validation_takes_the_best_penalty_of_the_whole_grid() -> None:
    problem = make_problem(rows=90, width=60, apart=0.3)
    folds = stratified_folds(problem.targets.tolist(), [-1] * 90, seed=0)
    found = cross_validate(problem, folds)
    losses = []
    for penalty in GRID:
        held_out = torch.empty(90, 3)
        for fold in range(FOLDS):
            heads = problem.solve([penalty], [torch.nonzero(folds != fold)[:, 0]]).heads
            held_out[folds == fold] = problem.answers(heads)[folds == fold]
        losses.append(float(functional.cross_entropy(held_out, problem.targets)))
    assert found.loss == pytest.approx(min(losses), rel=0.02)
    assert found.loss < losses[0]
    assert found.loss < losses[-1]


def test_folds_hold_every_class_and_keep_groups_together() -> None:
    targets = [0] * 50 + [1] * 10
    groups = [i // 2 for i in range(50)] + [-1] * 10
    folds = stratified_folds(targets, groups, seed=1)
    for fold in range(FOLDS):
        held_out = [i for i in range(60) if folds[i] == fold]
        assert sum(targets[i] for i in held_out) == 2
        assert sum(targets[i] == 0 for i in held_out) == 10
    assert all(folds[2 * i] == folds[2 * i + 1] for i in range(25))
    assert torch.equal(folds, stratified_folds(targets, groups, seed=1))
    assert not torch.equal(folds, stratified_folds(targets, groups, seed=2))


# --- trials -----------------------------------------------------------------------------------------


def test_a_solved_trial_needs_no_epochs_and_answers_for_held_out_rows(
    spec: TrialSpec, run: Run, dataset: Dataset
) -> None:
    told: list[EpochResult] = []
    done = run(spec, lambda result: bool(told.append(result)) or True)
    assert [result.epoch for result in told] == [1]
    assert (done.epochs, done.best_epoch) == (1, 1)
    assert done.held_out is not None
    saved = np.load(Path(spec.folder, "predictions.npz"))
    learned = [item.path for item in dataset.part("train")]
    assert saved["held_out_paths"].tolist() == learned
    both = (
        np.concatenate([saved["held_out_targets"], saved["targets"]]),
        np.concatenate([saved["held_out"], saved["predictions"]]),
    )
    assert metrics.score("accuracy", *both) == pytest.approx(done.held_out)
    again = run(replace(spec, folder=spec.folder + "-again"))
    assert again.metrics == done.metrics
    assert again.val_loss == done.val_loss


def test_a_given_penalty_shrinks_the_weights(spec: TrialSpec, run: Run) -> None:
    from safetensors.torch import load_file

    sizes = []
    for penalty in (1e-4, 1.0):
        params = {"probe.solver": "lbfgs", "probe.l2": penalty}
        done = run(replace(spec, params=params))
        assert done.held_out is None
        state = load_file(Path(spec.folder, done.checkpoint))
        sizes.append(max(float(t.norm()) for name, t in state.items() if name.startswith("head.")))
    assert sizes[0] > 2 * sizes[1]


def test_a_head_that_only_claims_to_be_linear_is_refused(
    spec: TrialSpec, run: Run, offering: Callable[..., object], registry: object
) -> None:
    class Two:
        name = "two"
        tasks = ("multiclass",)
        space: dict[str, object] = {}
        is_linear = True

        def features(self, params: object) -> str:
            return "pooled"

        def build(self, shape: object, num_outputs: int, params: object) -> nn.Module:
            return nn.Sequential(nn.Linear(shape.pooled, 4), nn.Linear(4, num_outputs))  # type: ignore[attr-defined]

    head: TaskHead = Two()  # type: ignore[assignment]
    with pytest.raises(TrialError, match="leave out `is_linear`"):
        run(replace(spec, head="two"), registry=offering("task_heads", head))
