"""The loop: ask, hand out, wait, report, decide, tell. Single-threaded; it never imports torch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tlauto.config import SearchConfig
from tlauto.continuing import PAUSED, earlier_reports, forget_files, is_behind, next_spec, promotion
from tlauto.contracts import (
    EpochResult,
    FreezeStrategy,
    TrialDone,
    TrialFailed,
    TrialSpec,
    spec_from_json,
    trains_backbone,
)
from tlauto.errors import TrialError, WorkerDied
from tlauto.events import Emit, EpochEnded, Progress, Said, TrialEnded, TrialStarted, ignore
from tlauto.pace import held_back, seconds_a_trial
from tlauto.pool.base import Event
from tlauto.pool.protocol import Answer, BundleDone, JobFailed, Note, RunTrial
from tlauto.prepare import Session, open_session, without_fixed
from tlauto.results.finish import bundle_job, finish
from tlauto.schedule import best_trial, counts, estimate, is_hopeless
from tlauto.study import INTERRUPTED, OUT_OF_TIME, TrialRecord
from tlauto.tracking import Tracking

HOPELESS = 5
"""So many failures before the first success end the search."""

BUNDLE_PAUSE = 9.0
"""Pause between two bundles over the time that one takes: they are to cost a tenth of the search at most."""

GRACE_S = 2.5
"""How long an interrupted search waits for a bundle that is being written."""


@dataclass
class _Job:
    """What a busy slot does: a trial, or the bundle of the trial it just ran.

    Attributes:
        resumed: epochs that were done when the trial went on.
        stopped: why the trial was told to end early.
    """

    spec: TrialSpec
    started: float
    is_bundle: bool = False
    resumed: int | None = None
    stopped: str = ""


@dataclass
class _Loop:
    session: Session
    emit: Emit
    interrupted: threading.Event
    busy: dict[str, _Job] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    spent_before: float = 0.0
    saved_at: float = 0.0
    bundled: int | None = None
    bundling: int | None = None
    may_bundle_at: float = 0.0
    failures: int = 0


def run(config: SearchConfig, *, emit: Emit = ignore, session: Session | None = None) -> tuple[Session, bool]:
    """Search until the totals are reached or the user stops it.

    Args: session: one of this `config` that is open already, such as that of a replay.
    Returns: the session, its workers ended, and whether it was interrupted. The best model so far
    is in the study's folder in either case.
    Raises: TlautoError of the fitting kind.
    """
    session = session or open_session(config, emit=emit)
    interrupted = threading.Event()
    state, tracking = "interrupted", Tracking(session, emit)
    with _signals(interrupted), session.study.explaining():
        try:
            loop = _Loop(session, tracking.emit, interrupted)
            row = session.store.search(session.name)
            loop.spent_before = loop.saved_at = float(row["seconds"]) if row else 0.0
            _search(loop)
            if not interrupted.is_set():
                finish(session, emit=tracking.emit, interrupted=interrupted)
            state = "interrupted" if interrupted.is_set() else "finished"
            _save_time(loop)
        finally:
            tracking.end(state, hurry=interrupted.is_set())
            session.close(state=state, grace_s=0.2 if interrupted.is_set() else 2.0)
    return session, interrupted.is_set()


def _search(loop: _Loop) -> None:
    while not loop.interrupted.is_set():
        _fill(loop)
        if not loop.busy:
            return
        for event in loop.session.pool.wait(0.25):
            _handle(loop, event)
        _stop_late(loop)
        _save_time(loop, every_s=5.0)
    _cut_off(loop)


def _fill(loop: _Loop) -> None:
    """Give every idle slot a trial while the totals allow it."""
    session = loop.session
    for slot in session.pool.slots:
        if slot in loop.busy or _keep_best(loop, slot) or not _may_start(loop):
            continue
        trials, left = session.study.trials(), seconds_left(loop)
        kept = session.plan.proposable(trials, left)
        _enqueue(loop, trials, kept["strategy"], left)
        record = session.study.ask(session.plan.space, kept=kept)
        spec = next_spec(session, record, trials, left=left)
        for epoch, score in earlier_reports(spec, record, trials).items():
            session.study.report(record.number, epoch, score)
        session.store.start_trial(session.name, spec, slot)
        session.study.note(record.number, slot=slot, seed=spec.seed)
        loop.busy[slot] = _Job(spec, time.monotonic())
        session.pool.send(slot, RunTrial(spec))
        loop.emit(TrialStarted.of(spec, slot))


def _enqueue(
    loop: _Loop, trials: Sequence[TrialRecord], strategies: Sequence[str], left: float | None
) -> None:
    """Propose what comes before the sampler: a probe, what won on similar datasets, a paused trial."""
    study, plan = loop.session.study, loop.session.plan
    probe = plan.next_probe(trials, spent=_spent(loop))
    warm = [] if probe else plan.next_warm(trials, left)
    if probe is not None:
        study.enqueue(without_fixed(probe, plan.space), purpose="probe")
    for point, earlier in warm:
        study.enqueue(without_fixed(point, plan.space), purpose="warm", from_study=earlier)
        loop.emit(Said(f"tries next what was best in study '{earlier}'"))
    if probe is None and not warm and (paused := promotion(plan, trials, strategies, left=left)):
        study.enqueue(paused.params, purpose="promoted", continues=paused.number)


def _keep_best(loop: _Loop, slot: str) -> bool:
    """Have an idle slot write the best model so far, when there is a new one and it is time again."""
    session, best = loop.session, best_trial(loop.session.study.trials())
    is_written = best is None or best.number in (loop.bundled, loop.bundling)
    if best is None or is_written or (time.monotonic() < loop.may_bundle_at and _may_start(loop)):
        return False
    row = session.store.trials(session.name).get(best.number)
    model = session.store.model(session.name)
    if not row or not row["result"] or (model and model["trial"] == best.number):
        return False
    spec = replace(
        spec_from_json(row["spec"]), dataset=session.plan.dataset_file, cache=str(session.plan.cache)
    )
    loop.bundling = best.number
    loop.busy[slot] = _Job(spec, time.monotonic(), is_bundle=True)
    session.pool.send(slot, bundle_job(session, spec, TrialDone(**row["result"])))
    return True


def _may_start(loop: _Loop) -> bool:
    limit = loop.session.config.max_trials
    running = sum(not job.is_bundle for job in loop.busy.values())
    done = counts(loop.session.study.trials())["total"]
    left = seconds_left(loop)
    # However short the time: without a first score there is nothing to finish with.
    is_first = not running and best_trial(loop.session.study.trials()) is None
    return (limit is None or done + running < limit) and (left is None or left > 0 or is_first)


def seconds_left(loop: _Loop) -> float | None:
    """Seconds that trials may still take; what the final refit will need is held back."""
    limit = loop.session.config.time_s
    if limit is None:
        return None
    session, trials = loop.session, loop.session.study.trials()
    best = best_trial(trials)
    number = best.number if best else None
    end = held_back(trials, session.plan.sizes, best=number, members=session.config.ensemble)
    return limit - _spent(loop) - end


def _spent(loop: _Loop) -> float:
    return loop.spent_before + time.monotonic() - loop.started


# --- what workers say -------------------------------------------------------------------------------


def _handle(loop: _Loop, event: Event) -> None:
    job = loop.busy.get(event.slot)
    match event.message:
        case EpochResult() as result if job:
            _epoch(loop, event.slot, job, result)
        case TrialDone() as done if job:
            _done(loop, event.slot, job, done)
        case TrialFailed() as failed if job:
            del loop.busy[event.slot]
            _failed(loop, event.slot, job, failed)
        case BundleDone() if job:
            loop.bundled = job.spec.number
            now = time.monotonic()
            loop.may_bundle_at = now + BUNDLE_PAUSE * (now - job.started)
            del loop.busy[event.slot]
        case JobFailed(message) if job:
            loop.emit(Said(f"the best model so far could not be written: {message}"))
            del loop.busy[event.slot]
        case Note(text):
            loop.emit(Said(text))
        case None if job:
            del loop.busy[event.slot]
            _died(loop, job, event)


def _epoch(loop: _Loop, slot: str, job: _Job, result: EpochResult) -> None:
    session = loop.session
    job.resumed = result.epoch - 1 if job.resumed is None else job.resumed
    if trains_backbone(_strategy(session, job.spec)):
        session.study.report(result.number, result.epoch, result.score)
        job.stopped = _why_to_stop(loop, job.spec, result)
    session.pool.send(slot, Answer(go_on=not job.stopped))
    session.store.add_epoch(session.name, result)
    loop.emit(EpochEnded.of(result, slot))


def _why_to_stop(loop: _Loop, spec: TrialSpec, result: EpochResult) -> str:
    """Why a trial should end after an epoch; empty when it goes on."""
    session, left = loop.session, seconds_left(loop)
    if left is not None and left <= result.seconds:
        return "late"  # another epoch would not end in time
    if spec.purpose == "default":
        return ""  # it is compared with at the end
    trials = session.study.trials()
    if is_hopeless(result, spec.backbone, trials, val=session.plan.sizes.val):
        return "hopeless"
    return PAUSED if is_behind(session.plan, spec.number, trials, result.epoch) else ""


def _done(loop: _Loop, slot: str, job: _Job, done: TrialDone) -> None:
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


def _failed(loop: _Loop, slot: str, job: _Job, failed: TrialFailed) -> None:
    session, spec = loop.session, job.spec
    seconds = time.monotonic() - job.started
    session.store.fail_trial(
        session.name, spec.number, kind=failed.kind, message=failed.message, detail=failed.detail
    )
    session.study.note(spec.number, seconds=round(seconds, 3))
    session.study.fail(spec.number, kind=failed.kind, message=failed.message)
    note = f"{failed.kind}: {failed.message}"
    loop.emit(TrialEnded.of(spec, slot, "failed", None, seconds, note=note, kind=failed.kind))
    loop.emit(_progress(loop))
    loop.failures += 1
    if loop.failures >= HOPELESS and best_trial(session.study.trials()) is None:
        raise TrialError(
            f"the first {loop.failures} trials all failed, the last with: {failed.message} "
            f"('tlauto leaderboard {session.name}' lists them; --new starts afresh)"
        )


def _died(loop: _Loop, job: _Job, event: Event) -> None:
    """A worker ended while it was busy: its trial failed, the slot gets a new worker."""
    code = event.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    died = WorkerDied(f"the worker process ended with {how}", exitcode=code)
    if job.is_bundle:
        loop.emit(Said(f"the best model so far could not be written: {died}"))
        return
    _failed(loop, event.slot, job, TrialFailed(job.spec.number, died.kind, str(died), event.log_tail))


def _progress(loop: _Loop) -> Progress:
    session = loop.session
    trials = session.study.trials()
    now, best = counts(trials), best_trial(trials)
    return Progress(
        done=now["total"],
        pruned=now["pruned"],
        failed=now["failed"],
        max_trials=session.config.max_trials,
        seconds_a_trial=seconds_a_trial(trials, len(session.pool.slots)),
        seconds_left=seconds_left(loop),
        best_number=best.number if best else None,
        best_score=best.score if best else None,
    )


# --- stopping and tidying ---------------------------------------------------------------------------


def _cut_off(loop: _Loop) -> None:
    """End what runs, keeping it for the next run; wait a moment for a bundle being written."""
    session = loop.session
    deadline = time.monotonic() + GRACE_S
    while any(job.is_bundle for job in loop.busy.values()) and time.monotonic() < deadline:
        for event in session.pool.wait(0.1):
            if isinstance(event.message, (BundleDone, JobFailed)):
                del loop.busy[event.slot]
    for slot, job in list(loop.busy.items()):
        session.pool.kill(slot)
        if not job.is_bundle:
            _cut(loop, slot, INTERRUPTED, "the search was stopped during it")
    loop.busy.clear()


def _stop_late(loop: _Loop) -> None:
    """Cut off trials that run when the time is up; there is a best one to finish with.

    They do not count towards the total of trials.
    """
    left = seconds_left(loop)
    if left is None or left > 0 or best_trial(loop.session.study.trials()) is None:
        return
    for slot, job in list(loop.busy.items()):
        if not job.is_bundle:
            loop.session.pool.kill(slot)
            _cut(loop, slot, OUT_OF_TIME, "the time was up during it")
            del loop.busy[slot]


def _cut(loop: _Loop, slot: str, kind: str, message: str) -> None:
    spec, seconds = loop.busy[slot].spec, time.monotonic() - loop.busy[slot].started
    loop.session.store.fail_trial(loop.session.name, spec.number, kind=kind, message=message)
    loop.session.study.fail(spec.number, kind=kind, message=message)
    facts = {"note": f"{kind}: {message}", "kind": kind, "counts": False}
    loop.emit(TrialEnded.of(spec, slot, "failed", None, seconds, **facts))


def _strategy(session: Session, spec: TrialSpec) -> FreezeStrategy:
    return next(s for s in session.plan.space.strategies if s.name == spec.strategy)


def _save_time(loop: _Loop, *, every_s: float = 0.0) -> None:
    spent = _spent(loop)
    if spent - loop.saved_at >= every_s:
        loop.session.store.add_seconds(loop.session.name, spent - loop.saved_at)
        loop.saved_at = spent


@contextmanager
def _signals(interrupted: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the flag; a second SIGINT ends the process in the ordinary way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, _frame: object) -> None:
        interrupted.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
