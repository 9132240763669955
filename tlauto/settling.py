"""What is recorded of a trial that ended with a result: at once, or when a search that was killed goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tlauto.contracts import TrialDone, TrialSpec, spec_from_json
from tlauto.ranking import estimate
from tlauto.schedule import Plan
from tlauto.store import Store
from tlauto.study import INTERRUPTED, Study


def settle(
    study: Study, plan: Plan, spec: TrialSpec, done: TrialDone, *, resumed: int,
    facts: Mapping[str, Any] | None = None,
) -> float:  # fmt: skip
    """Tell the study of a trial's result, which the store has already; its score, by which it is ranked.

    Args:
        resumed: epochs that were done when the trial went on.
        facts: what else to record of it.
    """
    metrics = {name: entry["value"] for name, entry in done.metrics.items()}
    # One attribute for all metrics: the dashboard shows a row for each.
    facts = {**(facts or {}), "metrics": {name: round(value, 5) for name, value in metrics.items()}}
    epochs, trials = done.epochs, study.trials()
    if trials[done.number].reports:  # it trained the backbone; its strategy may be gone by now
        images = spec.epoch_images or plan.sizes.train
        epochs -= resumed
        facts["image_seconds"] = round(done.seconds / epochs / images, 6)
    else:
        facts["features"] = done.features
        if done.feature_seconds is not None:
            facts["feature_seconds"] = round(done.feature_seconds, 6)
    score = estimate(done, spec.backbone, spec.metric, trials, val=plan.sizes.val)
    if done.held_out is not None:
        facts["held_out"] = done.held_out
    with study.together():
        study.note(
            done.number, val_score=done.score, val_loss=done.val_loss, seconds=round(done.seconds, 3),
            best_epoch=done.best_epoch, epochs=epochs, trainable_params=done.trainable, **facts,
        )  # fmt: skip
        study.tell(done.number, score, is_pruned=done.is_pruned)
    return score


def settle_left(store: Store, study: Study, name: str, plan: Plan) -> None:
    """End the trials that a dead search left running: by its result the one that has it; others run again."""
    rows = store.trials(name)
    for number in study.adopt():
        row = rows.get(number)
        if row and row["result"]:
            before = min((epoch["epoch"] for epoch in store.epochs(name, number)), default=1) - 1
            done = TrialDone(**row["result"])
            settle(study, plan, spec_from_json(row["spec"]), done, resumed=before)
    for number in study.requeue_interrupted():
        if number in rows:
            store.fail_trial(name, number, kind=INTERRUPTED, message="the search was stopped during it")
