"""The loop: ask, hand out, wait, report, decide, tell. Single-threaded; it never imports torch."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from tlauto.config import SearchConfig
from tlauto.contracts import (
    TrialDone,
    spec_from_json,
)
from tlauto.errors import TrialError
from tlauto.events import Emit, TrialEnded, ignore
from tlauto.loop import Job, Loop
from tlauto.memory import require_room
from tlauto.outcomes import handle, record_ended, stop_slow
from tlauto.pool.base import Event
from tlauto.pool.protocol import BundleDone, JobFailed
from tlauto.prepare import Session, open_session
from tlauto.proposing import has_next, look_ahead, next_job
from tlauto.ranking import best_trial
from tlauto.results.finish import bundle_job, finish
from tlauto.starting import begin, go_on, must_wait
from tlauto.study import INTERRUPTED, OUT_OF_TIME
from tlauto.tracking import Tracking

GRACE_S = 1.5
"""How long an interrupted search waits for a bundle that is being written."""


def run(config: SearchConfig, *, emit: Emit = ignore, session: Session | None = None) -> tuple[Session, bool]:
    """Search until the totals are reached or the user stops it.

    Args: session: one of this `config` that is open already, such as that of a replay.
    Returns: the session, its workers ended, and whether it was interrupted. The best model so far
    is in the study's folder in either case.
    Raises: TlautoError of the fitting kind.
    """
    started = time.monotonic()  # to open the session takes of the time, too
    session = session or open_session(config, emit=emit)
    interrupted = threading.Event()
    state, tracking = "interrupted", Tracking(session, emit)
    with _signals(interrupted), session.study.explaining():
        try:
            loop = Loop(session, tracking.emit, interrupted, started=started)
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


def _search(loop: Loop) -> None:
    session = loop.session
    events: list[Event] = []
    while not loop.interrupted.is_set() and not loop.hopeless:
        with _one_round(loop):
            for event in events:
                handle(loop, event)
            _hand_on(loop)
            record_ended(loop)
            stop_slow(loop)
            _stop_late(loop)
            if not loop.interrupted.is_set() and not loop.hopeless:
                _fill(loop)
        if not loop.busy and session.pool.slots:
            break
        _save_time(loop, every_s=5.0)
        events = session.pool.wait(0.25)
        require_room()
    _cut_off(loop)
    if loop.hopeless:
        _leave_best(loop)
        _save_time(loop)
        raise TrialError(loop.hopeless)


@contextmanager
def _one_round(loop: Loop) -> Iterator[None]:
    """Write what happens within the block in one transaction at its end, and only then show it.

    Workers have their next trials by then, and are at work while it is written. Of a search that is killed
    before it is, or cannot write it, a trial that nobody knows of begins anew.
    """
    show, said = loop.emit, list[object]()
    loop.emit = said.append
    try:
        # The store's part first: of what it has of a trial, the study may be told later (`settling`).
        with loop.session.study.together(), loop.session.store.together():
            yield
    finally:
        loop.emit = show
    for event in said:
        show(event)


def _hand_on(loop: Loop) -> None:
    """Let workers go on with what waits for them, before what they did is recorded."""
    if not loop.ended or loop.interrupted.is_set() or loop.hopeless:
        return
    for slot, _, _ in loop.ended:
        is_there = slot in loop.session.pool.slots
        if loop.waiting and is_there and not must_wait(loop, slot) and not _keep_best(loop, slot):
            begin(loop, slot, next_job(loop, proposes=False), loop.session.study.trials())


def _fill(loop: Loop) -> None:
    """Give every idle slot a trial while the totals allow it."""
    for slot in [slot for slot, job in loop.busy.items() if job.stage == "held"]:
        go_on(loop, slot)
    for slot in loop.session.pool.slots:
        if slot in loop.busy or _keep_best(loop, slot):
            continue
        # A trial that is refused leaves its slot idle.
        while slot not in loop.busy and has_next(loop) and not must_wait(loop, slot):
            trials = loop.session.study.trials()
            begin(loop, slot, next_job(loop), trials)
    look_ahead(loop)


def _keep_best(loop: Loop, slot: str) -> bool:
    """Have an idle slot write the best model so far, when there is a new one and it is time again."""
    session, best = loop.session, best_trial(loop.session.study.trials())
    is_written = best is None or best.number in (loop.bundled, loop.bundling)
    if best is None or is_written or (time.monotonic() < loop.may_bundle_at and has_next(loop)):
        return False
    row = session.store.trials(session.name).get(best.number)
    model = session.store.model(session.name)
    if not row or not row["result"] or (model and model["trial"] == best.number):
        return False
    spec = replace(
        spec_from_json(row["spec"]), dataset=session.plan.dataset_file, cache=str(session.plan.cache)
    )
    loop.bundling = best.number
    loop.busy[slot] = Job(spec, time.monotonic(), is_bundle=True)
    session.pool.send(slot, bundle_job(session, spec, TrialDone(**row["result"])))
    return True


# --- stopping and tidying ---------------------------------------------------------------------------


def _cut_off(loop: Loop) -> None:
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
            _cut(loop, slot, job, INTERRUPTED, "the search was stopped during it")
    loop.busy.clear()
    _drop_waiting(loop, INTERRUPTED, "the search was stopped before it")


def _leave_best(loop: Loop) -> None:
    """Write the best model so far, if it is not written, before the search ends with an error."""
    loop.bundling, loop.may_bundle_at = None, 0.0
    for slot in loop.session.pool.slots[:1]:
        _keep_best(loop, slot)
    while loop.busy and not loop.interrupted.is_set():
        for event in loop.session.pool.wait(0.25):
            handle(loop, event)
        record_ended(loop)


def _stop_late(loop: Loop) -> None:
    """Cut off trials that run when the time is up; there is a best one to finish with.

    They do not count towards the total of trials.
    """
    left = loop.seconds_left()
    if left is None or left > 0 or best_trial(loop.session.study.trials()) is None:
        return
    for slot, job in list(loop.busy.items()):
        if not job.is_bundle:
            loop.session.pool.kill(slot)
            _cut(loop, slot, job, OUT_OF_TIME, "the time was up during it")
            del loop.busy[slot]
    _drop_waiting(loop, OUT_OF_TIME, "the time was up before it")


def _cut(loop: Loop, slot: str, job: Job, kind: str, message: str) -> None:
    seconds = time.monotonic() - job.started
    for one in job.every:
        loop.session.store.fail_trial(loop.session.name, one.spec.number, kind=kind, message=message)
        loop.session.study.fail(one.spec.number, kind=kind, message=message)
        facts = {"note": f"{kind}: {message}", "kind": kind, "counts": False}
        loop.emit(TrialEnded.of(one.spec, slot, "failed", None, seconds, **facts))


def _drop_waiting(loop: Loop, kind: str, message: str) -> None:
    """End the proposals that no slot has taken; of those that had begun somewhere, that is shown."""
    while loop.waiting:
        job = loop.waiting.popleft()
        if job.is_apart:
            _cut(loop, "", job, kind, message)
        else:
            loop.session.study.fail(job.spec.number, kind=kind, message=message)


def _save_time(loop: Loop, *, every_s: float = 0.0) -> None:
    spent = loop.spent()
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
