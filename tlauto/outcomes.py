"""What workers say, and what comes of it: epochs, results, failures, deaths."""

from __future__ import annotations

import time
from typing import Any

from tlauto.continuing import PAUSED, forget_files, is_behind
from tlauto.contracts import (
    EpochResult,
    FreezeStrategy,
    TrialDone,
    TrialFailed,
    TrialSpec,
    trains_backbone,
)
from tlauto.errors import Hung, TrialTimeout, WorkerDied
from tlauto.events import EpochEnded, Progress, Said, TrialEnded
from tlauto.failures import Retry, retry, why_to_end
from tlauto.loop import Job, Loop
from tlauto.pace import seconds_a_trial
from tlauto.pool.base import Event
from tlauto.pool.protocol import Answer, BundleDone, JobFailed, Note
from tlauto.prepare import Session
from tlauto.schedule import best_trial, counts, estimate, is_hopeless
from tlauto.study import earlier_ends

BUNDLE_PAUSE = 9.0
"""Pause between two bundles over the time that one takes: they are to cost a tenth of the search at most."""


def handle(loop: Loop, event: Event) -> None:
    """Take note of what a worker said, or that it ended."""
    job = loop.busy.get(event.slot)
    match event.message:
        case EpochResult() as result if job:
            _epoch(loop, event.slot, job, result)
        case TrialDone() as done if job:
            _done(loop, event.slot, job, done)
        case TrialFailed() as failed if job:
            del loop.busy[event.slot]
            _failed(loop, event.slot, job, failed, event.log_tail)
        case BundleDone() if job:
            loop.bundled = job.spec.number
            now = time.monotonic()
            loop.may_bundle_at = now + BUNDLE_PAUSE * (now - job.started)
            del loop.busy[event.slot]
        case JobFailed(message, detail) if job:
            del loop.busy[event.slot]
            if job.is_bundle:
                loop.emit(Said(f"the best model so far could not be written: {message}"))
            else:  # no memory was left to import PyTorch, say; another process may have it
                why = f"the worker process could not begin: {message}"
                failed = TrialFailed(job.spec.number, WorkerDied.kind, why, detail)
                _failed(loop, event.slot, job, failed, loop.session.pool.kill(event.slot))
        case Note(text):
            loop.emit(Said(text))
        case None if job:
            del loop.busy[event.slot]
            _died(loop, job, event)


def _epoch(loop: Loop, slot: str, job: Job, result: EpochResult) -> None:
    session = loop.session
    job.resumed = result.epoch - 1 if job.resumed is None else job.resumed
    if trains_backbone(_strategy(session, job.spec)):
        session.study.report(result.number, result.epoch, result.score)
        job.stopped = _why_to_stop(loop, job.spec, result)
    session.pool.send(slot, Answer(go_on=not job.stopped))
    session.store.add_epoch(session.name, result)
    loop.emit(EpochEnded.of(result, slot))


def _why_to_stop(loop: Loop, spec: TrialSpec, result: EpochResult) -> str:
    """Why a trial should end after an epoch; empty when it goes on."""
    session, left = loop.session, loop.seconds_left()
    if left is not None and left <= result.seconds:
        return "late"  # another epoch would not end in time
    if spec.purpose == "default":
        return ""  # it is compared with at the end
    trials = session.study.trials()
    if is_hopeless(result, spec.backbone, trials, val=session.plan.sizes.val):
        return "hopeless"
    return PAUSED if is_behind(session.plan, spec.number, trials, result.epoch) else ""


def _done(loop: Loop, slot: str, job: Job, done: TrialDone) -> None:
    session, spec = loop.session, job.spec
    del loop.busy[slot]
    metrics = {name: entry["value"] for name, entry in done.metrics.items()}
    facts: dict[str, Any] = {
        # One attribute for all: each is a transaction of its own.
        "metrics": {name: round(value, 5) for name, value in metrics.items()}
    }
    session.store.finish_trial(session.name, done)
    epochs = done.epochs
    if trains_backbone(_strategy(session, spec)):
        images = spec.epoch_images or session.plan.sizes.train
        epochs -= job.resumed or 0
        facts["image_seconds"] = round(done.seconds / epochs / images, 6)
    else:
        facts["features"] = done.features
    score = estimate(done, spec.backbone, spec.metric, session.study.trials(), val=session.plan.sizes.val)
    if done.held_out is not None:
        facts["held_out"] = done.held_out
    if done.is_pruned:
        facts["stopped"] = job.stopped
    session.study.note(
        done.number, val_score=done.score, val_loss=done.val_loss, seconds=round(done.seconds, 3),
        best_epoch=done.best_epoch, epochs=epochs, trainable_params=done.trainable, **facts,
    )  # fmt: skip
    session.study.tell(done.number, score, is_pruned=done.is_pruned)
    loop.failures = 0
    state = "pruned" if done.is_pruned else "complete"
    more = {"note": f"@{done.epochs}" if done.is_pruned else "", "metrics": metrics}
    loop.emit(TrialEnded.of(spec, slot, state, score, done.seconds, **more))
    loop.emit(_progress(loop))
    forget_files(session.plan, session.study.trials())


def _failed(loop: Loop, slot: str, job: Job, failed: TrialFailed, log_tail: str = "") -> None:
    """Record a failure, and propose the trial again where that may help."""
    session, spec = loop.session, job.spec
    seconds = time.monotonic() - job.started
    facts: dict[str, Any] = {"seconds": round(seconds, 3)}
    if failed.bytes is not None:
        facts["bytes_asked"] = failed.bytes
    again = _retry(loop, spec, failed.kind)
    if again:
        # Before it fails: a search that is killed in between tries it again once all the same.
        more = {} if again.micro_batch is None else {"micro_batch": again.micro_batch}
        session.study.requeue(spec.number, why=failed.kind, **more)
        facts["retried"] = True
    detail = "\n".join(part.strip("\n") for part in (failed.detail, log_tail) if part)
    session.store.fail_trial(
        session.name, spec.number, kind=failed.kind, message=failed.message, detail=detail
    )
    session.study.note(spec.number, **facts)
    session.study.fail(spec.number, kind=failed.kind, message=failed.message)
    note = f"{failed.kind}: {failed.message}{_shown(again)}"
    loop.emit(TrialEnded.of(spec, slot, "failed", None, seconds, note=note, kind=failed.kind))
    loop.emit(_progress(loop))
    if not again:
        _count_failure(loop, failed)


def _retry(loop: Loop, spec: TrialSpec, kind: str) -> Retry | None:
    trials = loop.session.study.trials()
    earlier = earlier_ends(trials[spec.number], trials)
    return retry(kind, spec, earlier, trains=trains_backbone(_strategy(loop.session, spec)))


def _shown(again: Retry | None) -> str:
    if again is None:
        return ""
    return "; it runs again" + (f", {again.micro_batch} images at a time" if again.micro_batch else "")


def _count_failure(loop: Loop, failed: TrialFailed) -> None:
    """End the search when too many trials failed one after the other."""
    session = loop.session
    loop.failures += 1
    has_best = best_trial(session.study.trials()) is not None
    why = why_to_end(loop.failures, has_best=has_best, most=session.config.max_failures)
    if why:
        kept = f"the best model so far is in {session.plan.folder / 'model'}, the same command goes on"
        loop.hopeless = (
            f"{why}, the last with: {failed.message} ('tlauto leaderboard {session.name}' lists them; "
            f"{kept if has_best else '--new starts afresh'})"
        )


def _died(loop: Loop, job: Job, event: Event) -> None:
    """A worker ended while it was busy: its trial failed, the slot gets a new worker."""
    if job.is_bundle:
        loop.emit(Said(f"the best model so far could not be written: {event.ending}"))
        return
    kind = Hung.kind if event.hung else WorkerDied.kind
    _failed(loop, event.slot, job, TrialFailed(job.spec.number, kind, event.ending), event.log_tail)


def stop_slow(loop: Loop) -> None:
    """End the trials that have taken longer than `--trial-timeout` allows."""
    limit = loop.session.config.trial_timeout_s
    for slot, job in list(loop.busy.items()):
        if limit is None or job.is_bundle or time.monotonic() - job.started <= limit:
            continue
        log_tail = loop.session.pool.kill(slot)
        del loop.busy[slot]
        message = f"it took longer than the {limit:g} s that --trial-timeout allows"
        _failed(loop, slot, job, TrialFailed(job.spec.number, TrialTimeout.kind, message), log_tail)


def _progress(loop: Loop) -> Progress:
    session = loop.session
    trials = session.study.trials()
    now, best = counts(trials), best_trial(trials)
    return Progress(
        done=now["total"],
        pruned=now["pruned"],
        failed=now["failed"],
        max_trials=session.config.max_trials,
        seconds_a_trial=seconds_a_trial(trials, len(session.pool.slots)),
        seconds_left=loop.seconds_left(),
        best_number=best.number if best else None,
        best_score=best.score if best else None,
    )


def _strategy(session: Session, spec: TrialSpec) -> FreezeStrategy:
    return next(s for s in session.plan.space.strategies if s.name == spec.strategy)
