"""Trials that go on where an earlier one stopped: promoted from a rung, or cut off and proposed again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tlauto.contracts import TrialSpec, spec_from_json, trains_backbone
from tlauto.prepare import Session
from tlauto.ranking import rank
from tlauto.rungs import STATE_FILE, Paused, Reports, goes_on, to_promote
from tlauto.schedule import Plan
from tlauto.study import TrialRecord

PAUSED = "paused"
"""Why a trial was stopped that may be promoted later; it stands in its attribute `stopped`."""

KEPT_CHECKPOINTS = 5
"""Fine-tuned trials whose checkpoints stay on disk; those of frozen trials are small and all stay."""

KEPT_STATES = 5
"""Paused trials, the best ones, whose training states stay on disk."""

TIME_SHARE = 0.5
"""Most of the time left that the rest of a promoted trial may take."""


def continues(trial: TrialRecord) -> int | None:
    """The number of the trial that this one goes on from."""
    number = trial.attrs.get("continues", trial.attrs.get("retry_of"))
    return None if number is None else int(number)


def is_behind(plan: Plan, number: int, trials: Sequence[TrialRecord], epoch: int) -> bool:
    """Whether a running trial is in the worse half of its rung, if the epoch (from 1) is one."""
    mine = next(t for t in trials if t.number == number)
    others = [t.reports for t in _compared(plan, trials) if t.number != number]
    return not goes_on(mine.reports, others, epoch)


def promotion(
    plan: Plan, trials: Sequence[TrialRecord], strategies: Collection[str], *, left: float | None
) -> TrialRecord | None:
    """The paused trial to promote next; None when there is none, or proposed trials wait.

    Args:
        strategies: those that the next trial may have, as costs and scores so far tell.
        left: seconds that trials may still take; None without a limit.
    """
    if any(t.state == "waiting" for t in trials):
        return None
    able = [t for t in _paused(trials) if _state_file(plan, t.number).is_file()]
    numbers = {t.number for t in able}
    others: list[Reports] = [t.reports for t in _compared(plan, trials) if t.number not in numbers]
    found = to_promote([Paused(t.number, t.reports) for t in able], others)
    if found is None:
        return None
    trial = next(t for t in able if t.number == found.number)
    if trial.params["strategy"] not in strategies or not _is_affordable(plan, trial, left):
        return None
    return trial


def next_spec(
    session: Session, record: TrialRecord, trials: Sequence[TrialRecord], *, left: float | None
) -> TrialSpec:
    """What a proposed trial is to do; one that goes on is the same as before, seed and schedule included.

    Args:
        left: seconds that trials may still take; None without a limit.
    """
    spec = _next_spec(session, record, trials, left=left)
    return replace(spec, micro_batch=record.attrs.get("micro_batch", spec.micro_batch))


def _next_spec(
    session: Session, record: TrialRecord, trials: Sequence[TrialRecord], *, left: float | None
) -> TrialSpec:
    plan, before = session.plan, continues(record)
    row = None if before is None else session.store.trials(session.name).get(before)
    if before is None or row is None:
        return plan.spec(record, trials, left=left)
    old = spec_from_json(row["spec"])
    # Its own state, or the one that it went on from and never got beyond.
    states = (_state_file(plan, before), Path(old.resume_from or ""))
    state = next((file for file in states if file.is_file()), None)
    if left is not None and state is None:
        return plan.spec(record, trials, left=left)  # its epochs may not fit the time any more
    return replace(
        old,
        number=record.number,
        dataset=plan.dataset_file,
        cache=str(plan.cache),
        weights=plan.config.weights_options,
        folder=str(plan.trial_folder(record.number)),
        resume_from=None if state is None else str(state),
        purpose=record.attrs.get("purpose", old.purpose),
    )


def earlier_reports(spec: TrialSpec, record: TrialRecord, trials: Sequence[TrialRecord]) -> Reports:
    """What a trial that goes on scored before it was stopped; empty for one that starts."""
    before = continues(record)
    return {} if before is None or spec.resume_from is None else trials[before].reports


def forget_files(plan: Plan, trials: Sequence[TrialRecord]) -> None:
    """Delete checkpoints that can no longer be chosen, and training states that no trial will go on from."""
    names = _training(plan)
    trained = [t for t in trials if t.score is not None and t.params["strategy"] in names]
    for trial in sorted(trained, key=rank, reverse=True)[KEPT_CHECKPOINTS:]:
        (plan.trial_folder(trial.number) / "checkpoint.safetensors").unlink(missing_ok=True)
    needed = {number for t in trials if t.state in ("waiting", "running") for number in _origins(t, trials)}
    needed |= {t.number for t in sorted(_paused(trials), key=rank, reverse=True)[:KEPT_STATES]}
    for trial in trials:
        is_over = trial.state not in ("waiting", "running") and trial.number not in needed
        if is_over and trial.params.get("strategy") in names:
            _state_file(plan, trial.number).unlink(missing_ok=True)


def _origins(trial: TrialRecord, trials: Sequence[TrialRecord]) -> Iterator[int]:
    """Numbers of the trials that this one goes on from, one after the other."""
    while (number := continues(trial)) is not None:
        yield number
        trial = trials[number]


def _state_file(plan: Plan, number: int) -> Path:
    return plan.trial_folder(number) / STATE_FILE


def _paused(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials that were stopped at a rung and have not gone on since."""
    gone_on = {continues(t) for t in trials}
    stopped = [t for t in trials if t.state == "pruned" and t.attrs.get("stopped") == PAUSED]
    return [t for t in stopped if t.number not in gone_on and t.reports]


def _compared(plan: Plan, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials that train the backbone, each once: those that went on stand for what they went on from."""
    names = _training(plan)
    gone_on = {continues(t) for t in trials if t.reports}
    return [
        t for t in trials
        if t.params.get("strategy") in names and t.state != "failed" and t.number not in gone_on
    ]  # fmt: skip


def _training(plan: Plan) -> set[str]:
    """Names of the strategies that train the backbone."""
    return {s.name for s in plan.space.strategies if trains_backbone(s)}


def _is_affordable(plan: Plan, trial: TrialRecord, left: float | None) -> bool:
    if left is None:
        return True
    seconds, epochs = float(trial.attrs.get("seconds", 0.0)), int(trial.attrs.get("epochs", 1))
    rest = max(0, plan.config.recipe.finetune_epochs - max(trial.reports))
    return seconds / max(1, epochs) * rest <= TIME_SHARE * left
