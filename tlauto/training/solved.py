"""A linear head on cached features, solved instead of trained: the same answer every time, in no epochs."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tlauto.errors import TrialError
from tlauto.training.linear import Problem, cross_validate
from tlauto.training.model import Readout
from tlauto.training.rows import Rows
from tlauto.training.trial import Fitted, Trial

ALONE = 1e-2
"""The L2 penalty where there is too little to cross-validate."""

FINE = 1e-4


def solve_head(readout: Readout, trial: Trial, train: Rows, valid: Rows) -> tuple[Fitted, float]:
    """Put the optimal weights into the readout's head.

    With the solver `path` the L2 penalty is chosen by cross-validation over the training rows.

    Returns: the fitted head, with what cross-validation answered for the training rows, and the mean
    training loss. Raises: TrialError when the head is not one linear layer after all.
    """
    linear = _only_linear(readout.head)
    targets = torch.from_numpy(trial.train_targets).to(trial.device)
    problem = Problem(train, targets, trial.loss, readout.output, trial.num_outputs)
    penalty, held_out = _penalty(problem, trial)
    everything = torch.arange(len(train), device=trial.device)
    (head,) = problem.solve([penalty], [everything], tolerance=FINE)
    with torch.no_grad():
        linear.weight.copy_(head[:-1].T)
        linear.bias.copy_(head[-1])
        logits = readout.eval().answer(valid.take(torch.arange(len(valid))))
        train_loss = float(trial.loss(problem.answers(head, everything), targets))
    state = {name: tensor.detach().clone() for name, tensor in readout.state_dict().items()}
    found = trial.evaluate(logits, 1)
    return Fitted(1, found, state, readout.kind, 1, head.numel(), held_out=held_out), train_loss


def _penalty(problem: Problem, trial: Trial) -> tuple[float, np.ndarray | None]:
    """The L2 penalty, and the held-out predictions of the rows when cross-validation chose it."""
    if trial.settings.solver == "lbfgs":
        return trial.settings.l2, None
    folds = trial.source.folds(trial.spec.fit_on, trial.spec.seed).to(trial.device)
    if len(torch.unique(folds)) < 2:
        return ALONE, None
    found = cross_validate(problem, folds)
    return found.penalty, trial.task.predict(found.outputs.float().cpu().numpy())


def _only_linear(head: nn.Module) -> nn.Linear:
    layers = [module for module in head.modules() if next(module.parameters(recurse=False), None) is not None]
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is None:
        raise TrialError(
            "the head says that it is linear, but it is not one nn.Linear with a bias; its plugin must "
            "leave out `is_linear`"
        )
    return layers[0]
