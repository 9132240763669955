"""A linear head on cached features, solved instead of trained: the same answer every time, in no epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch.nn import functional

from tlauto import recipe
from tlauto.recipe import scale_of
from tlauto.training.axes import principal_axes
from tlauto.training.joined import only_linear
from tlauto.training.kept import kept
from tlauto.training.linear import CrossValidated, Problem, cross_validate
from tlauto.training.model import GRID, LEVELS, Kind, Readout
from tlauto.training.rows import BLOCK, Rows
from tlauto.training.stored import Features, Stored
from tlauto.training.threads import threads_for
from tlauto.training.trial import Fitted, Trial

ALONE = 1e-2
"""The L2 penalty where there is too little to cross-validate."""

FINE = 1e-4

MANY = 4096
"""Images to learn from of which all are cross-validated. The validation part of more tells heads apart by
itself, and some of them tell what the head is to read and how strong its penalty is to be."""

SOME = 2048
PER_CLASS = 10  # of them, at least, on average
LARGEST = 2**25  # numbers of their features, which are held in memory: 128 MiB


def solve_head(trial: Trial) -> tuple[Fitted, float]:
    """The optimal linear head of a trial.

    With the solver `path` cross-validation over the training rows chooses the L2 penalty, and whether
    the head reads the pooled features alone or those of all stages. The quarters of the image are four
    times as many columns, which a head on several backbones does without. Of more than `MANY` rows some
    choose, the head is solved on all, and nothing is held out. The penalty of the mean loss falls with
    the number of rows, as it does for a prior of fixed width. A refit takes what its trial chose.

    Returns: the fitted head, with what cross-validation answered for the training rows, and the mean
    training loss. Raises: TrialError when the head is not one linear layer after all.
    """
    if trial.settings.solver == "lbfgs":
        only = _Solving(trial, trial.kind)
        return only.fitted(trial.settings.l2)
    if trial.spec.penalty is not None:
        return _Solving(trial, cast(Kind, trial.spec.features)).fitted(trial.spec.penalty)
    folds = trial.source.folds(trial.spec.fit_on, trial.spec.seed)
    count, among = len(folds), _some(len(folds), trial.num_outputs)
    folds = (folds if among is None else folds[among]).to(trial.device)
    if len(torch.unique(folds)) < 2:
        return _Solving(trial, trial.kind).fitted(ALONE)
    further: tuple[Kind, ...] = () if not trial.has_levels else (LEVELS,) if trial.beside else (LEVELS, GRID)
    pooled = best = _Solving(trial, trial.kind, among)
    of_pooled = of_best = cross_validate(best.problem, folds)
    for kind in further:  # one after the other: features of all kinds at once would take more memory
        one = _Solving(trial, kind, among)
        if among is not None and len(among) * one.everything.row_numbers > LARGEST:
            continue
        found = cross_validate(one.problem, folds)
        if found.loss < of_best.loss:
            best, of_best = one, found
    is_wanted = best is not pooled and trial.selects and not trial.beside
    share = len(folds) / count
    start = pooled.of_all().state(of_pooled, share) if is_wanted else None
    return best.of_all().fitted(of_best.penalty * share, of_best, start)


def solve_together(trials: Sequence[Trial]) -> list[tuple[Fitted, float]]:
    """What `solve_head` gives for trials of the solver `lbfgs` on one dataset, within its tolerance.

    Heads on the same features under losses of one form are solved side by side: eight times as many columns
    take a product with the features about three times as long. Raises: as `solve_head`.
    """
    alike: dict[object, list[Trial]] = {}
    for trial in trials:
        spec, target = trial.spec, torch.from_numpy(trial.train_targets[:1])
        read = (spec.backbone, *recipe.beside(spec.params), trial.kind, scale_of(spec.params))
        of = trial.settings.mirror, spec.fit_on, spec.evaluate_on, trial.loss.by_image(target).function
        alike.setdefault((*read, *of), []).append(trial)
    found: dict[int, tuple[Fitted, float]] = {}
    for same in alike.values():
        same[0].compute()
        first = _Solving(same[0], same[0].kind)
        others = [_Solving(trial, trial.kind, like=first) for trial in same[1:]]
        with first.few_threads(len(same)):
            losses = first.solve_beside(others)
            for solving, train_loss in zip((first, *others), losses, strict=True):
                found[solving.trial.spec.number] = solving.evaluated(train_loss)
    return [found[trial.spec.number] for trial in trials]


def _some(count: int, num_outputs: int) -> torch.Tensor | None:
    """Which rows choose, ascending, always the same; None is all of them."""
    if count <= MANY:
        return None
    wanted = max(SOME, PER_CLASS * num_outputs)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:wanted].sort().values


@dataclass(frozen=True)
class _Solving:
    """A trial's head on one kind of features, of some rows if not of all."""

    trial: Trial
    kind: Kind
    among: torch.Tensor | None = None
    like: _Solving | None = None  # another trial's on the same features

    def of_all(self) -> _Solving:
        """The same on all rows."""
        return self if self.among is None else replace(self, among=None)

    @cached_property
    def everything(self) -> Features:
        return self.like.everything if self.like else self.trial.features(self.trial.spec.fit_on, self.kind)

    @cached_property
    def train(self) -> Features:
        if self.among is None:
            return self.everything
        key = self.everything.key and ("some", len(self.among), self.everything.key)
        return Stored((self.everything.take(self.among),), key=key)

    @cached_property
    def valid(self) -> Rows:
        """The features that the head is evaluated on."""
        if self.like:
            return self.like.valid
        features = self.trial.features([self.trial.spec.evaluate_on], self.kind)
        return self.trial.rows(self.readout, features, of=self.train)

    @cached_property
    def readout(self) -> Readout:
        readout = self.trial.readout(self.kind)
        self.trial.initialise(readout, self.train)
        return readout.to(self.trial.device)

    @cached_property
    def targets(self) -> torch.Tensor:
        targets = torch.from_numpy(self.trial.train_targets)
        targets = (targets if self.among is None else targets[self.among]).to(self.trial.device)
        outputs = self.trial.num_outputs
        if self.trial.task.name == "multiclass" and len(targets) * outputs <= BLOCK:
            return functional.one_hot(targets, outputs).float()  # once, not at every step
        return targets

    @cached_property
    def problem(self) -> Problem:
        trial = self.trial
        rows = trial.rows(self.readout, self.train, of=self.train)
        is_measured = trial.spec.init_head is None and self.train.key
        key = ("axes", self.train.key) if is_measured else None
        axes = kept(key, lambda: principal_axes(rows), lambda found: found.bytes)
        # Of classes the outputs are the logits themselves.
        output = self.readout.output if trial.task.name == "regression" else None
        return Problem(rows, self.targets, trial.loss, trial.num_outputs, output, axes)

    def state(self, found: CrossValidated, share: float) -> dict[str, torch.Tensor]:
        """The readout's tensors with the optimum for the penalty that this share of the rows found."""
        self.solve(found.penalty * share, found)
        return {name: tensor.detach().clone() for name, tensor in self.readout.state_dict().items()}

    def solve(self, penalty: float, found: CrossValidated | None = None) -> float:
        """Put the optimal head into the readout. Returns: its mean training loss."""
        problem, rows = self.problem, torch.arange(len(self.train), device=self.trial.device)
        start = None if found is None else problem.inwards(found.heads.mean(dim=0, keepdim=True))
        heads, losses = problem.solve([penalty], [rows], tolerance=FINE, start=start)
        (head,) = problem.outwards(heads)
        self._put(head)
        return float(losses)

    def solve_beside(self, others: Sequence[_Solving]) -> list[float]:
        """The same for several on the same features, each with its own penalty and loss."""
        every = self, *others
        problem = replace(self.problem, others=tuple(other.trial.loss for other in others))
        rows = torch.arange(len(self.train), device=self.trial.device)
        penalties = [one.trial.settings.l2 for one in every]
        heads, losses = problem.solve(penalties, [rows] * len(every), tolerance=FINE)
        for one, head in zip(every, problem.outwards(heads), strict=True):
            one._put(head)
        return losses.tolist()

    def _put(self, head: torch.Tensor) -> None:
        """A head (D + 1, K) into the readout."""
        linear = only_linear(self.readout.head)
        with torch.no_grad():
            linear.weight.copy_(head[:-1].T)
            linear.bias.copy_(head[-1])

    @contextmanager
    def few_threads(self, heads: int = 1) -> Iterator[None]:
        """A block without gradients, with as many threads as so many heads keep busy.

        For all of a trial, since to change their number costs as much as a dozen small steps. But for the
        problem: what is kept of it must not depend on who asked first, and sums of more threads are rounded
        otherwise.
        """
        _ = self.problem
        count, width = self.train.shape[:2]
        with torch.no_grad(), threads_for(count * width * self.trial.num_outputs * heads):
            yield

    def fitted(
        self,
        penalty: float,
        found: CrossValidated | None = None,
        start: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[Fitted, float]:
        """The head for a penalty, evaluated, and its mean training loss."""
        with self.few_threads():
            train_loss = self.solve(penalty, found)
            if found is None:
                return self.evaluated(train_loss, start=start)
            is_proven = len(found.outputs) == len(self.train)
            held_out = self.trial.task.predict(found.outputs.float().cpu().numpy()) if is_proven else None
            return self.evaluated(train_loss, held_out=held_out, start=start, penalty=penalty)

    def evaluated(self, train_loss: float, **more: Any) -> tuple[Fitted, float]:
        """The readout as it is now, evaluated, and its mean training loss.

        Args:
            more: what else to say of it.
        """
        trial = self.trial
        batches = self.valid.batches(torch.arange(len(self.valid)), beside=trial.num_outputs)
        logits = torch.cat([self.readout.eval().answer(batch) for batch in batches])
        found = trial.evaluate(logits, 1)
        state = {name: tensor.detach().clone() for name, tensor in self.readout.state_dict().items()}
        numbers = sum(parameter.numel() for parameter in self.readout.head.parameters())
        return Fitted(1, found, state, self.kind, 1, numbers, **more), train_loss
