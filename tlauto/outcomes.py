"""What workers say, and what comes of it: epochs, results, failures, deaths."""

from __future__ import annotations

import time
from typing import Any

from tlauto.continuing import PAUSED, forget_files, is_behind
from tlauto.contracts import (
    EpochResult,
    TrialDone,
    TrialFailed,
    TrialSpec,
    trains_backbone,
)
from tlauto.devices import device_of
from tlauto.errors import Hung, OutOfMemory, TrialTimeout, WorkerDied
from tlauto.events import EpochEnded, Progress, Said, TrialEnded
from tlauto.failures import Retry, retry, why_to_end
from tlauto.loop import Job, Loop
from tlauto.pace import seconds_a_trial
from tlauto.pool.base import Event
from tlauto.pool.protocol import Answer, BundleDone, JobFailed, Note, StepTried, TogetherDone, Used
from tlauto.prepare import Session
from tlauto.ranking import best_trial, is_hopeless
from tlauto.room import ATTRIBUTE, Took, images_at_once, kind_of
from tlauto.schedule import counts
from tlauto.settling import settle
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
            del loop.busy[event.slot]
            _done(loop, event.slot, job, done)
        case TogetherDone() as together if job:
            del loop.busy[event.slot]
            loop.ended.append((event.slot, job, together))
        case TrialFailed() as failed if job:
            del loop.busy[event.slot]
            fail(loop, event.slot, job, failed, event.log_tail)
        case Used() as used if job:
            job.used = used
            _learn_capacity(loop, event.slot, used.total)
        case StepTried() as tried if job:
            job.tried, job.stage = tried, "held"
            _learn_capacity(loop, event.slot, tried.total)
        case JobFailed() if job and job.stage == "step":
            job.may_try, job.stage = False, "held"  # the trial itself will tell what is wrong
        case BundleDone() if job:
            loop.bundled = job.spec.number
            now = time.monotonic()
            loop.may_bundle_at = now + BUNDLE_PAUSE * (now - job.started)
            del loop.busy[event.slot]
        case JobFailed() if job and job.beside:
            del loop.busy[event.slot]
            loop.waiting.extend(Job(one.spec, one.started, is_apart=True) for one in job.every)
        case JobFailed(message, detail) if job:
            del loop.busy[event.slot]
            if job.is_bundle:
                loop.emit(Said(f"the best model so far could not be written: {message}"))
            else:  # no memory was left to import PyTorch, say; another process may have it
                why = f"the worker process could not begin: {message}"
                failed = TrialFailed(job.spec.number, WorkerDied.kind, why, detail)
                fail(loop, event.slot, job, failed, loop.session.pool.kill(event.slot))
        case Note(text):
            loop.emit(Said(text))
        case None if job:
            del loop.busy[event.slot]
            _died(loop, job, event)


def record_ended(loop: Loop) -> None:
    """Take note of what trials that were solved together gave, while the worker is at the next ones."""
    for slot, job, together in loop.ended:
        for one, epoch, done in zip(job.every, together.epochs, together.ends, strict=True):
            one.epoch = epoch
            loop.emit(EpochEnded.of(epoch, slot))
            _done(loop, slot, one, done)
    loop.ended.clear()


def _learn_capacity(loop: Loop, slot: str, total: int | None) -> None:
    if total is not None:
        loop.capacity[device_of(slot)] = total


def _epoch(loop: Loop, slot: str, job: Job, result: EpochResult) -> None:
    session = loop.session
    job.resumed = result.epoch - 1 if job.resumed is None else job.resumed
    stopped = ""
    if trains(session, job.spec):
        session.study.report(result.number, result.epoch, result.score)
        stopped = _why_to_stop(loop, job.spec, result)
        if stopped and result.epoch < job.spec.epochs:
            session.study.note(result.number, stopped=stopped)
    else:
        job.epoch = result  # its result comes in a moment: one transaction for both
    session.pool.send(slot, Answer(go_on=not stopped))
    if job.epoch is None:
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
    session.store.finish_trial(session.name, done, epoch=job.epoch)
    took = {ATTRIBUTE: _took(loop, slot, job, job.used.bytes, fits=True)} if job.used else {}
    # A search that is killed from here on to the end does this when it is resumed.
    score = settle(session.study, session.plan, spec, done, resumed=job.resumed or 0, facts=took)
    loop.failures = 0
    state = "pruned" if done.is_pruned else "complete"
    values = {name: entry["value"] for name, entry in done.metrics.items()}
    more = {"note": f"@{done.epochs}" if done.is_pruned else "", "metrics": values}
    loop.emit(TrialEnded.of(spec, slot, state, score, done.seconds, **more))
    loop.emit(_progress(loop))
    forget_files(session.plan, session.study.trials())


def _took(loop: Loop, slot: str, job: Job, bytes: int | None, *, fits: bool) -> dict[str, object]:
    at_once = images_at_once(job.spec, trains=trains(loop.session, job.spec))
    return Took(kind_of(job.spec), at_once, fits, bytes, loop.capacity_of(slot)).to_json()


def fail(
    loop: Loop, slot: str, job: Job, failed: TrialFailed, log_tail: str = "", *, may_retry: bool = True
) -> None:
    """Record a failure, and propose the trial again where that may help."""
    session, spec = loop.session, job.spec
    seconds = time.monotonic() - job.started
    facts: dict[str, Any] = {"seconds": round(seconds, 3)}
    if failed.bytes is not None:
        facts["bytes_asked"] = failed.bytes
    if failed.kind == OutOfMemory.kind and job.is_alone and job.stage == "runs":
        facts[ATTRIBUTE] = _took(loop, slot, job, failed.bytes, fits=False)
    again = _retry(loop, spec, failed.kind) if may_retry else None
    detail = "\n".join(part.strip("\n") for part in (failed.detail, log_tail) if part)
    session.store.fail_trial(
        session.name, spec.number, kind=failed.kind, message=failed.message, detail=detail
    )
    with session.study.together():  # it fails and is proposed again, or neither
        if again:
            more = {} if again.micro_batch is None else {"micro_batch": again.micro_batch}
            session.study.requeue(spec.number, why=failed.kind, **more)
            facts["retried"] = True
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
    return retry(kind, spec, earlier, trains=trains(loop.session, spec))


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
    for one in job.every:
        fail(loop, event.slot, one, TrialFailed(one.spec.number, kind, event.ending), event.log_tail)


def stop_slow(loop: Loop) -> None:
    """End the trials that have taken longer than `--trial-timeout` allows."""
    limit = loop.session.config.trial_timeout_s
    for slot, job in list(loop.busy.items()):
        is_timed = not job.is_bundle and job.stage != "held"
        if limit is None or not is_timed or time.monotonic() - job.started <= limit * len(job.every):
            continue
        log_tail = loop.session.pool.kill(slot)
        del loop.busy[slot]
        message = f"it took longer than the {limit:g} s that --trial-timeout allows"
        for one in job.every:
            fail(loop, slot, one, TrialFailed(one.spec.number, TrialTimeout.kind, message), log_tail)


def _progress(loop: Loop) -> Progress:
    session = loop.session
    trials = session.study.trials()
    now, best = counts(trials), best_trial(trials)
    return Progress(
        done=now["total"],
        pruned=now["pruned"],
        failed=now["failed"],
        max_trials=session.config.max_trials,
        seconds_a_trial=seconds_a_trial(trials, max(1, len(session.pool.slots))),
        seconds_left=loop.seconds_left(),
        best_number=best.number if best else None,
        best_score=best.score if best else None,
    )


def trains(session: Session, spec: TrialSpec) -> bool:
    """Whether a trial trains the backbone."""
    return trains_backbone(next(s for s in session.plan.space.strategies if s.name == spec.strategy))
