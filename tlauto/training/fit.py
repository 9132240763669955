"""Run one trial: read it, train it, keep its checkpoint, its predictions and its metrics.

Read top to bottom: `run_trial` here, then `trial.prepare`, then `frozen.fit_head` for a frozen
backbone or `finetune.fine_tune` for one that learns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tlauto import metrics, recipe
from tlauto.contracts import EpochResult, TrialDone, TrialSpec, trains_backbone
from tlauto.data import Dataset
from tlauto.plugins import Registry, loaded_libraries
from tlauto.recipe import EVAL_BATCH
from tlauto.training.breakdowns import breakdowns
from tlauto.training.checkpoint import START, save_checkpoint
from tlauto.training.finetune import fine_tune
from tlauto.training.frozen import fit_head, fit_heads
from tlauto.training.seeding import seed_everything
from tlauto.training.trial import Fitted, Trial, prepare

PREDICTIONS = "predictions.npz"


def run_trial(
    spec: TrialSpec,
    registry: Registry,
    dataset: Dataset,
    *,
    device: str,
    on_epoch: Callable[[EpochResult], bool],
) -> TrialDone:
    """Train and evaluate one trial; write its checkpoint and predictions to `spec.folder`.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`.
        on_epoch: told of each epoch; its answer False stops the trial as pruned. A trial on cached
            features tells only of its last epoch, a refit only of its evaluation on the test part.

    Returns what is to be known of the best epoch. Raises: TrialError, OutOfMemory, DeviceLost or Diverged
    when this trial cannot end; WeightsError, DataError or UnknownNameError when something is missing.
    """
    started = time.perf_counter()
    seed_everything(spec.seed)
    trial = prepare(spec, registry, dataset, torch.device(device))
    with breakdowns(f"on {device} {_at_once(trial)}"):
        train = fine_tune if trains_backbone(trial.strategy) else fit_head
        fitted = train(trial, on_epoch)
    return _keep(trial, fitted, registry, dataset, started)


def run_together(
    specs: Sequence[TrialSpec], registry: Registry, dataset: Dataset, *, device: str
) -> list[tuple[EpochResult, TrialDone]]:
    """What `run_trial` gives for trials of the solver `lbfgs`, within the minimiser's tolerance: heads on the
    same features are solved side by side. Each one's seconds are its share.

    Returns: what is to be known of each, and its only epoch, in order. Raises: as `run_trial`, of all.
    """
    started, trials = time.perf_counter(), []
    for spec in specs:
        seed_everything(spec.seed)
        trials.append(prepare(spec, registry, dataset, torch.device(device)))
    ends = []
    with breakdowns(f"on {device} {_at_once(trials[0])}"):
        fitted = fit_heads(trials)
    share = (time.perf_counter() - started) / len(specs)
    for trial, (found, epoch) in zip(trials, fitted, strict=True):
        kept = _keep(trial, found, registry, dataset, time.perf_counter() - share)
        ends.append((replace(epoch, seconds=share), kept))
    return ends


def _at_once(trial: Trial) -> str:
    most = trial.spec.micro_batch
    parts = f"{most} images at a time" if most else ""
    if not trains_backbone(trial.strategy):
        return f"with {parts or f'{EVAL_BATCH} images at a time'}"
    return f"with batches of {trial.settings.batch_size} images" + (f", {parts}" if parts else "")


def _keep(trial: Trial, fitted: Fitted, registry: Registry, dataset: Dataset, started: float) -> TrialDone:
    spec, targets = trial.spec, trial.valid_targets
    predictions = fitted.evaluation.predictions
    paths = [item.path for item in dataset.part(spec.evaluate_on)]
    checkpoint = save_checkpoint(Path(spec.folder), fitted.state, spec, fitted.kind)
    if fitted.start is not None:
        save_checkpoint(Path(spec.folder), fitted.start, spec, "pooled", file=START)
    answers = {"targets": targets, "predictions": predictions, "paths": np.array(paths)}
    held_out = fitted.held_out
    if held_out is not None:
        learned = [item.path for part in spec.fit_on for item in dataset.part(part)]
        both = np.concatenate([trial.train_targets, targets]), np.concatenate([held_out, predictions])
        answers |= {"held_out": held_out, "held_out_targets": both[0][: len(learned)]}
        answers["held_out_paths"] = np.array(learned)
    np.savez(Path(spec.folder, PREDICTIONS), allow_pickle=False, **answers)
    return TrialDone(
        number=spec.number,
        score=fitted.evaluation.score,
        metrics=metrics.compute_all(
            spec.task,
            targets,
            predictions,
            intervals=True if spec.evaluate_on == "test" else (spec.metric, "accuracy"),
            seed=spec.seed,
        ),
        val_loss=fitted.evaluation.loss,
        best_epoch=fitted.best_epoch,
        epochs=fitted.epochs,
        seconds=time.perf_counter() - started,
        checkpoint=checkpoint.name,
        is_pruned=fitted.is_pruned,
        trainable=fitted.trainable,
        held_out=None if held_out is None else float(metrics.score(spec.metric, *both)),
        features=fitted.kind,
        penalty=fitted.penalty,
        feature_seconds=trial.source.rate.seconds_each,
        versions=loaded_libraries(),
        provenance=_provenance(spec, registry),
    )


def _provenance(spec: TrialSpec, registry: Registry) -> dict[str, str]:
    backbones = (spec.backbone, *recipe.beside(spec.params))
    first, *others = [registry.source("backbone_providers", id.partition(":")[0]) for id in backbones]
    return {
        "backbone": first,
        **{f"backbone {place}": source for place, source in enumerate(others, start=2)},
        "strategy": registry.source("freeze_strategies", spec.strategy),
        "head": registry.source("task_heads", spec.head),
    }
