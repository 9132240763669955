"""Train a head on cached features: the backbone is frozen, so no image is looked at twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from tlauto.contracts import EpochResult
from tlauto.errors import Diverged
from tlauto.training.batches import Stream
from tlauto.training.checkpoint import start_from
from tlauto.training.features import sample_indices
from tlauto.training.model import Readout, build_readout
from tlauto.training.optim import head_groups, make_optimizer, set_rates
from tlauto.training.rows import Rows
from tlauto.training.solved import solve_head
from tlauto.training.trial import Best, Fitted, Trial

EVAL_ROWS = 1024


def fit_head(trial: Trial, on_epoch: Callable[[EpochResult], bool]) -> Fitted:
    """Train the trial's head and return its best epoch; `on_epoch` hears of the last one only.

    Such a trial takes about a second, so there is nothing to gain by pruning it.
    """
    started = time.perf_counter()
    spec = trial.spec
    readout = build_readout(trial.source.facts.shape, trial.head, trial.settings.head, trial.num_outputs)
    train = trial.source.features(spec.fit_on, readout.kind)
    valid = trial.source.features([spec.evaluate_on], readout.kind)
    _initialise(readout, trial, train)
    readout.to(trial.device)
    rows = [Rows(features, readout.norm, trial.device) for features in (train, valid)]
    if trial.settings.solver != "minibatch":
        fitted, train_loss = solve_head(readout, trial, *rows)
        seconds = time.perf_counter() - started
        found = fitted.evaluation
        on_epoch(EpochResult(spec.number, 1, found.score, train_loss, found.loss, seconds))
        return fitted
    best, train_loss = _epochs(readout, trial, *rows)
    winner, seconds = best.winner, time.perf_counter() - started
    on_epoch(EpochResult(spec.number, best.seen, winner.score, train_loss, winner.loss, seconds))
    trainable = sum(parameter.numel() for parameter in readout.head.parameters())
    return Fitted(best.epoch, winner, best.state, readout.kind, best.seen, trainable)


def _initialise(readout: Readout, trial: Trial, train: torch.Tensor) -> None:
    """Measure the scaling of features and targets, or take it over from another trial."""
    if trial.task.name == "regression":
        readout.output.measure(torch.from_numpy(trial.train_targets))
    init = trial.spec.init_head
    if init is None or not start_from(readout, Path(init), trial.spec):
        readout.norm.measure(train[sample_indices(len(train))])


def _epochs(readout: Readout, trial: Trial, train: Rows, valid: Rows) -> tuple[Best, float]:
    """Train epoch by epoch. Returns the best epoch and the last one's training loss."""
    spec, settings = trial.spec, trial.settings
    targets = torch.from_numpy(trial.train_targets).to(trial.device)
    optimizer = make_optimizer(head_groups(readout.head, settings), settings)
    batch = min(settings.batch_size, len(train))
    steps = max(1, round(len(train) / batch))
    stream, best, train_loss = Stream(len(train), spec.seed), Best(spec.patience), 0.0
    for epoch in range(spec.epochs):
        readout.train()
        total = torch.zeros((), device=trial.device)
        for step in range(steps):
            set_rates(optimizer, epoch * steps + step, spec.epochs * steps, settings.warmup)
            rows = torch.tensor(stream.take(batch))
            logits = readout.answer(train.take(rows))  # (B, K)
            loss = trial.loss(logits, targets[rows.to(trial.device)])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += loss.detach()
        train_loss = total.item() / steps
        if not torch.isfinite(total):
            raise Diverged(f"the training loss became {train_loss} in epoch {epoch + 1}", epoch=epoch + 1)
        if trial.selects or epoch + 1 == spec.epochs:
            best.add(epoch + 1, trial.evaluate(_logits(readout, valid), epoch + 1), readout)
        if best.is_stale:
            break
    return best, train_loss


@torch.inference_mode()
def _logits(readout: Readout, rows: Rows) -> torch.Tensor:
    readout.eval()
    blocks = torch.split(torch.arange(len(rows)), EVAL_ROWS)
    return torch.cat([readout.answer(rows.take(block)) for block in blocks])
