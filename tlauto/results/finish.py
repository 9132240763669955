"""The end of a search: refit what answers together and the default recipe, test once, compare, bundle."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto import metrics
from tlauto.connections import GOES_ON
from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec, spec_from_json
from tlauto.devices import AUTO, device_of
from tlauto.errors import TlautoError, TrialError
from tlauto.events import Emit, Said, Working
from tlauto.memory import require_room
from tlauto.pace import MEMBER_SHARE, PROBE_STRATEGY, refit_seconds
from tlauto.pool.base import Event
from tlauto.pool.protocol import Answer, BundleDone, JobFailed, Message, Note, RunTrial, WriteBundle
from tlauto.prepare import Session
from tlauto.ranking import best_trial
from tlauto.recipe import BESIDE, beside, refit_epochs
from tlauto.results import ensemble
from tlauto.study import TrialRecord

Metrics = Mapping[str, Mapping[str, float]]

WINNER, DEFAULT, MEMBER = -1, -2, -3
"""Numbers of the refits, which are no trials of the study; further members count down from `MEMBER`."""


@dataclass(frozen=True)
class _Refit:
    """A trial that is fitted again on all images outside the test part."""

    trial: TrialRecord
    spec: TrialSpec
    weight: float = 0.0


def finish(session: Session, *, emit: Emit, interrupted: threading.Event) -> None:
    """Refit, test and bundle the winner, unless that was done for it already.

    The test part is used here for the first and only time. An interruption leaves the model that
    was there before. Raises: TrialError when no trial has a score.
    """
    best = best_trial(session.study.trials())
    if best is None:
        raise TrialError(
            f"study '{session.name}' has no completed trial of what it searches; run it with more budget"
        )
    model = session.store.model(session.name)
    if model and model["trial"] == best.number and model["evaluated_on"] == "test":
        return
    members, default = _refits(session, best)
    emit(Working(_what(members)))
    specs = [refit.spec for refit in (*members, default) if refit]
    results = _run(session, {spec.number: RunTrial(spec) for spec in specs}, emit, interrupted)
    if interrupted.is_set():
        return
    done = results.get(WINNER)
    if not isinstance(done, TrialDone):
        emit(Said(f"the refit failed ({_why(done)}); the model is the best trial's, measured on validation"))
        return
    members = _that_worked(members, results, emit)
    alone, answers = done.metrics, _answers(members)
    if len(members) > 1:
        found = metrics.compute_all(
            session.plan.task,
            answers["targets"],
            answers["predictions"],
            intervals=True,
            seed=members[0].spec.seed,
        )
        done = dataclasses.replace(done, metrics=found)
    comparison = _compare(session, answers, default, results)
    _bundle(session, members, results, done, alone, comparison, emit, interrupted)


def bundle_job(session: Session, spec: TrialSpec, done: TrialDone) -> WriteBundle:
    """The order to write a trial as the study's model so far."""
    folder, infos = session.plan.folder / "model", session.infos
    others = tuple(infos[other] for other in beside(spec.params))
    return WriteBundle(spec, done, infos[spec.backbone], str(folder), spec.evaluate_on, beside=others)


def _refits(session: Session, best: TrialRecord) -> tuple[list[_Refit], _Refit | None]:
    """What answers together, the winner first, and the default recipe unless it is the winner."""
    trials = {trial.number: trial for trial in session.study.trials()}
    weights = _weights(session, best, list(trials.values()))
    members = [
        _refit(session, trials[number], WINNER if place == 0 else MEMBER - place + 1, weight)
        for place, (number, weight) in enumerate(weights.items())
    ]
    default = _default_trial(session)
    if default is None:
        return members, None
    for member in members:
        if member.trial.number == default.number:
            return members, member if len(members) > 1 else None
    return members, _refit(session, default, DEFAULT)


def _weights(session: Session, best: TrialRecord, trials: Sequence[TrialRecord]) -> dict[int, float]:
    """Weights of the trials that answer together, by number, the winner first."""
    most = session.config.ensemble
    able = [trial for trial in ensemble.candidates(proven(trials)) if trial.number != best.number]
    limit = session.config.time_s
    if limit is not None:
        # What was held back for the end of the search is for the winner and the default recipe.
        able = [t for t in able if refit_seconds(t, trials, session.plan.sizes) <= MEMBER_SHARE * limit]
    if most < 2 or not able or best.state != "complete":
        return {best.number: 1.0}
    folders = {trial.number: session.plan.trial_folder(trial.number) for trial in [best, *able]}
    library = ensemble.read_library(folders)
    if best.number not in library.answers:
        return {best.number: 1.0}
    return ensemble.select(session.plan.task, library, first=best.number, most=most)


def proven(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Without frozen trials that were not even worth cross-validating, where any was."""
    if not any("held_out" in t.attrs for t in trials):
        return list(trials)
    return [t for t in trials if "held_out" in t.attrs or t.params.get("strategy") != PROBE_STRATEGY]


def _refit(session: Session, trial: TrialRecord, number: int, weight: float = 0.0) -> _Refit:
    row = session.store.trials(session.name)[trial.number]
    spec, done = spec_from_json(row["spec"]), TrialDone(**row["result"])
    train, both = len(session.dataset.part("train")), len(session.dataset.part("train", "val"))
    spec = dataclasses.replace(spec, dataset=session.plan.dataset_file, cache=str(session.plan.cache))
    name = {WINNER: "winner", DEFAULT: "default"}.get(number, f"member-{trial.number}")
    folder = session.plan.folder / "refit" / name
    return _Refit(trial, refit_spec(spec, done, number=number, folder=folder, growth=both / train), weight)


def refit_spec(spec: TrialSpec, done: TrialDone, *, number: int, folder: Path, growth: float) -> TrialSpec:
    """A trial again on train and validation, for as long as it took to its best epoch, tested once.

    The schedule is squeezed into that time (`recipe.refit_epochs`). A head that was solved reads what it
    read in the trial, and its penalty of the mean loss falls with the number of images, as it does for a
    prior of fixed width.

    Args:
        growth: images of both parts over images of the training part. An epoch of a fixed number of
            images sees a smaller share of the grown part, so there are more of them.
    """
    best = done.best_epoch if spec.epoch_images is None else round(done.best_epoch * growth)
    values: dict[str, Any] = {
        "number": number, "epochs": refit_epochs(spec.epochs, best), "patience": 0,
        "fit_on": ("train", "val"),
        "evaluate_on": "test", "folder": str(folder), "purpose": "refit", "resume_from": None,
    }  # fmt: skip
    if done.penalty is not None:
        values |= {"features": done.features, "penalty": done.penalty / growth}
    return TrialSpec(**{**vars(spec), **values})


def _what(members: Sequence[_Refit]) -> str:
    if len(members) == 1:
        return "refitting the winner on train and validation, then testing it once"
    return f"refitting {len(members)} trials that answer together, then testing them once"


def _that_worked(members: Sequence[_Refit], results: Mapping[int, Message], emit: Emit) -> list[_Refit]:
    """The members whose refit ended, their weights adding up to 1 again."""
    worked = [m for m in members if isinstance(results.get(m.spec.number), TrialDone)]
    for member in members:
        if member not in worked:
            why = _why(results.get(member.spec.number))
            emit(Said(f"trial {member.trial.number} could not be refitted and is left out: {why}"))
    total = sum(member.weight for member in worked)
    return [dataclasses.replace(member, weight=member.weight / total) for member in worked]


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
        known = {name: value for name, value in spec.params.items() if name != BESIDE}
        if {**known, **chosen} == wanted:
            return trial
    return None


def _answers(members: Sequence[_Refit]) -> dict[str, Any]:
    """Targets of the test part, and what the members answer together."""
    saved = [_predictions(member.spec) for member in members]
    together = ensemble.mean([file["predictions"] for file in saved], [m.weight for m in members])
    return {"targets": saved[0]["targets"], "predictions": together}


def _compare(
    session: Session, answers: Mapping[str, Any], default: _Refit | None, results: Mapping[int, Message]
) -> dict[str, Any] | None:
    """The model against the default recipe on the test part: gain, interval, significant or not."""
    if default is None:
        return {"default_is_winner": True} if _default_trial(session) else None
    done = results.get(default.spec.number)
    if not isinstance(done, TrialDone):
        return None
    other = _predictions(default.spec)
    gain = metrics.compare(
        session.plan.metric, answers["targets"], answers["predictions"], other["predictions"]
    )
    spec = default.spec
    recipe = {"backbone": spec.backbone, "strategy": spec.strategy, "head": spec.head}
    return {"metric": session.plan.metric, **gain, "default": {**recipe, "metrics": dict(done.metrics)}}


def _predictions(spec: TrialSpec) -> dict[str, Any]:
    import numpy as np

    with np.load(Path(spec.folder) / "predictions.npz", allow_pickle=False) as file:
        return {name: file[name] for name in ("targets", "predictions")}


def _bundle(
    session: Session, members: Sequence[_Refit], results: Mapping[int, Message], done: TrialDone,
    alone: Metrics, comparison: Mapping[str, Any] | None, emit: Emit, interrupted: threading.Event,
) -> None:  # fmt: skip
    """Write each further member as a bundle of its own, then the winner's with all of them inside."""
    winner, others = members[0], members[1:]
    jobs: dict[int, Message] = {}
    for member in others:
        fitted = results[member.spec.number]
        assert isinstance(fitted, TrialDone)
        job = bundle_job(session, member.spec, fitted)
        jobs[member.spec.number] = dataclasses.replace(job, folder=str(Path(member.spec.folder) / "model"))
    written = _run(session, jobs, emit, interrupted)
    if interrupted.is_set():
        return
    for number, message in written.items():
        if not isinstance(message, BundleDone):
            raise TlautoError(f"the model could not be written to {jobs[number]}: {_why(message)}")
    job = dataclasses.replace(
        bundle_job(session, winner.spec, done),
        comparison=comparison,
        members=tuple((str(Path(m.spec.folder) / "model"), m.weight) for m in others),
        weight=winner.weight,
        alone=alone if others else None,
    )
    result = _run(session, {WINNER: job}, emit, interrupted).get(WINNER)
    if interrupted.is_set():
        return
    if not isinstance(result, BundleDone):
        raise TlautoError(f"the model could not be written to {job.folder}: {_why(result)}")
    session.store.add_model(
        session.name, trial=winner.trial.number, folder=job.folder, evaluated_on="test",
        metrics=done.metrics, comparison=comparison,
    )  # fmt: skip


def _run(
    session: Session, jobs: Mapping[int, Message], emit: Emit, interrupted: threading.Event
) -> dict[int, Message]:
    """Run jobs on the slots and return what each ended with, by its key.

    One whose worker died, which may be nothing of its own, is run once more, as trials are.
    """
    waiting, again = dict(jobs), set[int]()
    busy: dict[str, int] = {}
    results: dict[int, Message] = {}
    pool = session.pool
    while waiting or busy:
        for slot in _slots(session):
            if waiting and slot not in busy:
                key = next(iter(waiting))
                busy[slot] = key
                job = waiting.pop(key)
                if isinstance(job, RunTrial):
                    spec = job.spec
                    left = f"{len(waiting)} more to come" if waiting else "the last one"
                    what = "the default recipe, " if spec.number == DEFAULT else ""
                    emit(Working(f"refit of {what}{spec.backbone}, {spec.strategy}, {spec.head}; {left}"))
                pool.send(slot, job)
        if interrupted.is_set():
            for slot in busy:
                pool.kill(slot)
            return results
        require_room()
        for event in pool.wait(0.25):
            if event.slot not in busy:
                continue
            if isinstance(event.message, EpochResult):
                pool.send(event.slot, Answer(go_on=True))
            ended = _ended(event, emit)
            if ended is None:
                continue
            key = busy.pop(event.slot)
            if event.message is None and key not in again:
                emit(Said(f"{event.ending}; what it did runs again"))
                again.add(key)
                waiting[key] = jobs[key]
            else:
                results[key] = ended
    return results


def _slots(session: Session) -> Iterable[str]:
    """The slots that may have a job; on a cluster they come and go."""
    if session.config.per_device == AUTO:  # nobody has measured what refits side by side need of a GPU
        return {device_of(slot): slot for slot in session.pool.slots}.values()
    return session.pool.slots


def _ended(event: Event, emit: Emit) -> Message | None:
    """The message that ends a job, or None while it goes on."""
    match event.message:
        case TrialDone() | TrialFailed() | BundleDone() | JobFailed():
            return event.message
        case None:
            return JobFailed(event.ending, event.log_tail)
        case Note(text):
            emit(Said(text))
    return None


def _why(message: Message | None) -> str:
    why = message.message if isinstance(message, (TrialFailed, JobFailed)) else "no answer"
    return f"{why}; make room on its disk; {GOES_ON}" if "No space left" in why else why
