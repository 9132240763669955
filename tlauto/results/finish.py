"""The end of a search: refit the winner and the default recipe, test each once, compare, bundle."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlauto import metrics
from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec, spec_from_json
from tlauto.errors import TlautoError, TrialError
from tlauto.events import Emit, Said, Working
from tlauto.pool.base import Event
from tlauto.pool.protocol import Answer, BundleDone, JobFailed, Message, Note, RunTrial, WriteBundle
from tlauto.prepare import Session
from tlauto.schedule import best_trial, refit_spec
from tlauto.study import TrialRecord

WINNER, DEFAULT = -1, -2
"""Numbers of the two refits, which are no trials of the study."""


def finish(session: Session, *, emit: Emit, interrupted: threading.Event) -> None:
    """Refit, test and bundle the winner, unless that was done for it already.

    The test part is used here for the first and only time. An interruption leaves the model that
    was there before. Raises: TrialError when no trial has a score.
    """
    best = best_trial(session.study.trials())
    if best is None:
        raise TrialError(f"no trial of study '{session.name}' was completed; run it again with more budget")
    model = session.store.model(session.name)
    if model and model["trial"] == best.number and model["evaluated_on"] == "test":
        return
    emit(Working("refitting the winner on train and validation, then testing it once"))
    specs = _refits(session, best)
    results = _run(session, {spec.number: RunTrial(spec) for spec in specs.values()}, emit, interrupted)
    if interrupted.is_set():
        return
    done = results.get(WINNER)
    if not isinstance(done, TrialDone):
        emit(Said(f"the refit failed ({_why(done)}); the model is the best trial's, measured on validation"))
        return
    comparison = _compare(session, specs, results, best)
    _bundle(session, specs["winner"], done, best, comparison, emit, interrupted)


def bundle_job(session: Session, spec: TrialSpec, done: TrialDone) -> WriteBundle:
    """The order to write a trial as the study's model so far."""
    folder = session.plan.folder / "model"
    return WriteBundle(spec, done, session.infos[spec.backbone], str(folder), spec.evaluate_on)


def _refits(session: Session, best: TrialRecord) -> dict[str, TrialSpec]:
    folder = session.plan.folder / "refit"
    specs = {"winner": _refit(session, best, WINNER, folder / "winner")}
    default = _default_trial(session)
    if default and default.number != best.number:
        specs["default"] = _refit(session, default, DEFAULT, folder / "default")
    return specs


def _refit(session: Session, trial: TrialRecord, number: int, folder: Path) -> TrialSpec:
    row = session.store.trials(session.name)[trial.number]
    spec, done = spec_from_json(row["spec"]), TrialDone(**row["result"])
    train, both = len(session.dataset.part("train")), len(session.dataset.part("train", "val"))
    spec = dataclasses.replace(spec, dataset=session.plan.dataset_file, cache=str(session.plan.cache))
    return refit_spec(spec, done, number=number, folder=folder, growth=both / train)


def _default_trial(session: Session) -> TrialRecord | None:
    """The trial of the default recipe, if it has a result."""
    wanted = session.plan.default_recipe()
    rows = session.store.trials(session.name)
    for trial in session.study.trials():
        row = rows.get(trial.number)
        if trial.score is None or not row or not row["result"]:
            continue
        spec = spec_from_json(row["spec"])
        chosen = {"backbone": spec.backbone, "strategy": spec.strategy, "head": spec.head}
        if {**spec.params, **chosen} == wanted:
            return trial
    return None


def _compare(
    session: Session, specs: Mapping[str, TrialSpec], results: Mapping[int, Message], best: TrialRecord
) -> dict[str, Any] | None:
    """Winner against default recipe on the test part: gain, interval, significant or not."""
    if "default" not in specs:
        return {"default_is_winner": True} if _default_trial(session) else None
    default = results.get(DEFAULT)
    if not isinstance(default, TrialDone):
        return None
    winner, other = (_predictions(specs[name]) for name in ("winner", "default"))
    gain = metrics.compare(
        session.plan.metric, winner["targets"], winner["predictions"], other["predictions"]
    )
    spec = specs["default"]
    recipe = {"backbone": spec.backbone, "strategy": spec.strategy, "head": spec.head}
    return {"metric": session.plan.metric, **gain, "default": {**recipe, "metrics": dict(default.metrics)}}


def _predictions(spec: TrialSpec) -> dict[str, Any]:
    import numpy as np

    with np.load(Path(spec.folder) / "predictions.npz", allow_pickle=False) as file:
        return {name: file[name] for name in ("targets", "predictions")}


def _bundle(
    session: Session, spec: TrialSpec, done: TrialDone, best: TrialRecord,
    comparison: Mapping[str, Any] | None, emit: Emit, interrupted: threading.Event,
) -> None:  # fmt: skip
    job = dataclasses.replace(bundle_job(session, spec, done), comparison=comparison)
    result = _run(session, {WINNER: job}, emit, interrupted).get(WINNER)
    if interrupted.is_set():
        return
    if not isinstance(result, BundleDone):
        raise TlautoError(f"the model could not be written to {job.folder}: {_why(result)}")
    session.store.add_model(
        session.name, trial=best.number, folder=job.folder, evaluated_on="test", metrics=done.metrics,
        comparison=comparison,
    )  # fmt: skip


def _run(
    session: Session, jobs: Mapping[int, Message], emit: Emit, interrupted: threading.Event
) -> dict[int, Message]:
    """Run jobs on the slots and return what each ended with, by its key."""
    waiting = dict(jobs)
    busy: dict[str, int] = {}
    results: dict[int, Message] = {}
    pool = session.pool
    while waiting or busy:
        for slot in pool.slots:
            if waiting and slot not in busy:
                key = next(iter(waiting))
                busy[slot] = key
                pool.send(slot, waiting.pop(key))
        if interrupted.is_set():
            for slot in busy:
                pool.kill(slot)
            return results
        for event in pool.wait(0.25):
            if event.slot not in busy:
                continue
            if isinstance(event.message, EpochResult):
                pool.send(event.slot, Answer(go_on=True))
            ended = _ended(event, emit)
            if ended is not None:
                results[busy.pop(event.slot)] = ended
    return results


def _ended(event: Event, emit: Emit) -> Message | None:
    """The message that ends a job, or None while it goes on."""
    match event.message:
        case TrialDone() | TrialFailed() | BundleDone() | JobFailed():
            return event.message
        case None:
            return JobFailed(f"the worker process ended with code {event.exitcode}", event.log_tail)
        case Note(text):
            emit(Said(text))
    return None


def _why(message: Message | None) -> str:
    return message.message if isinstance(message, (TrialFailed, JobFailed)) else "no answer"
