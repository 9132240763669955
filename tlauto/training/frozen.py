"""Train a head on cached features: the backbone is frozen, so no image is looked at twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from tlauto import pulse
from tlauto.contracts import EpochResult
from tlauto.errors import Diverged
from tlauto.recipe import refit_epochs
from tlauto.training.batches import Stream
from tlauto.training.linear import FOLDS
from tlauto.training.model import Readout
from tlauto.training.optim import MAX_GRADIENT, head_groups, make_optimizer, set_rates
from tlauto.training.rows import Rows
from tlauto.training.seeding import seed_everything
from tlauto.training.solved import solve_head, solve_together
from tlauto.training.trial import Best, Fitted, Trial

HIDDEN = 2048  # numbers of a row that a head is taken to hold inside

AFFORDABLE = 5e10
"""Multiply-adds of forward passes that cross-validating a head may take in all: seconds on a CPU."""


def fit_head(trial: Trial, on_epoch: Callable[[EpochResult], bool]) -> Fitted:
    """Train the trial's head and return its best epoch; `on_epoch` hears of the last one only.

    Such a trial takes about a second, so there is nothing to gain by pruning it. One that does better
    on validation than `prove_above` is cross-validated as well: of many heads that are tried, the one
    that looks best on a small part is mostly the luckiest.
    """
    started = time.perf_counter()
    trial.compute()
    solves = trial.settings.solver != "minibatch"
    fitted, train_loss = solve_head(trial) if solves else _train_head(trial)
    on_epoch(_epoch(trial, fitted, train_loss, time.perf_counter() - started))
    return fitted


def fit_heads(trials: Sequence[Trial]) -> list[tuple[Fitted, EpochResult]]:
    """The same for trials whose heads are solved at one penalty, side by side where that can be."""
    solved = solve_together(trials)
    return [
        (fitted, _epoch(trial, fitted, loss, 0.0))
        for trial, (fitted, loss) in zip(trials, solved, strict=True)
    ]


def _epoch(trial: Trial, fitted: Fitted, train_loss: float, seconds: float) -> EpochResult:
    found = fitted.evaluation
    return EpochResult(trial.spec.number, fitted.epochs, found.score, train_loss, found.loss, seconds)


def _train_head(trial: Trial) -> tuple[Fitted, float]:
    """Train the head in mini-batches. Returns: its best epoch, and the last one's training loss."""
    spec, readout = trial.spec, trial.readout(trial.kind)
    train = trial.source.features(spec.fit_on, readout.kind)
    valid = trial.source.features([spec.evaluate_on], readout.kind)
    trial.initialise(readout, train)
    readout.to(trial.device)
    rows = [trial.rows(readout, features, of=train) for features in (train, valid)]
    best, train_loss = _epochs(readout, trial, *rows)
    winner, claimed = best.winner, spec.prove_above
    is_claim = trial.selects and claimed is not None and winner.score >= claimed
    numbers = sum(parameter.numel() for parameter in readout.head.parameters())
    epochs = refit_epochs(spec.epochs, best.epoch)
    is_cheap = numbers * len(train) * epochs * FOLDS <= AFFORDABLE
    held_out = _cross_validated(trial, rows[0], epochs) if is_claim and is_cheap else None
    fitted = Fitted(best.epoch, winner, best.state, readout.kind, best.seen, numbers, held_out=held_out)
    return fitted, train_loss


def _epochs(readout: Readout, trial: Trial, train: Rows, valid: Rows) -> tuple[Best, float]:
    """Train epoch by epoch. Returns the best epoch and the last one's training loss."""
    spec, best, train_loss = trial.spec, Best(trial.spec.patience), 0.0
    everything = torch.arange(len(train))
    for epoch, loss in _losses(readout, trial, train, everything):
        train_loss = loss
        if trial.selects or epoch == spec.epochs:
            best.add(epoch, trial.evaluate(_logits(readout, valid), epoch), readout)
        if best.is_stale:
            break
    return best, train_loss


def _losses(readout: Readout, trial: Trial, train: Rows, among: torch.Tensor) -> Iterator[tuple[int, float]]:
    """Train on some rows; after each epoch its number (from 1) and mean loss. Raises: Diverged."""
    spec, settings = trial.spec, trial.settings
    targets = torch.from_numpy(trial.train_targets).to(trial.device)
    optimizer = make_optimizer(head_groups(readout.head, settings), settings)
    batch = min(settings.batch_size, len(among))
    steps = max(1, round(min(len(among), spec.epoch_images or len(among)) / batch))
    stream = Stream(len(among), spec.seed)
    for epoch in range(1, spec.epochs + 1):
        readout.train()
        total = torch.zeros((), device=trial.device)
        for step in range(steps):
            set_rates(optimizer, (epoch - 1) * steps + step, spec.epochs * steps, settings.warmup)
            rows = among[torch.tensor(stream.take(batch))]
            logits = readout.answer(train.take(rows))  # (B, K)
            loss = trial.loss(logits, targets[rows.to(trial.device)])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(readout.head.parameters(), MAX_GRADIENT)
            optimizer.step()
            total += loss.detach()
            pulse.tick()
        if not torch.isfinite(total):
            raise Diverged(f"the training loss became {total.item()} in epoch {epoch}", epoch=epoch)
        yield epoch, total.item() / steps


def _cross_validated(trial: Trial, train: Rows, epochs: int) -> np.ndarray | None:
    """Predictions (N, …) for the training rows, each by a head trained on the other folds.

    Trained as a refit is, which is what will be used: where a trial is best before its warm-up is over, one
    whose schedule is squeezed learns at rates that the trial never saw, and may do worse by far.
    """
    trial = replace(trial, spec=replace(trial.spec, epochs=epochs))
    folds = trial.source.folds(trial.spec.fit_on, trial.spec.seed)
    if len(torch.unique(folds)) < 2:
        return None
    outputs = torch.empty(len(folds), trial.num_outputs)
    for fold in torch.unique(folds):
        seed_everything(trial.spec.seed)
        readout = trial.readout(trial.kind)
        if trial.task.name == "regression":
            readout.output.measure(torch.from_numpy(trial.train_targets))
        readout.to(trial.device)
        learned, held_out = torch.nonzero(folds != fold)[:, 0], torch.nonzero(folds == fold)[:, 0]
        for _ in _losses(readout, trial, train, learned):
            pass
        outputs[held_out] = _logits(readout, train, held_out).float().cpu()
    return trial.task.predict(outputs.numpy())


@torch.inference_mode()
def _logits(readout: Readout, rows: Rows, among: torch.Tensor | None = None) -> torch.Tensor:
    """Outputs (n, K) for some rows, all by default."""
    readout.eval()
    among = torch.arange(len(rows)) if among is None else among
    return torch.cat([readout.answer(batch) for batch in rows.batches(among, beside=HIDDEN)])
