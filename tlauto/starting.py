"""How a proposed trial starts: at once, when there is room beside what runs, in parts, or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from tlauto.caches import format_size
from tlauto.contracts import TrialFailed
from tlauto.devices import AUTO, device_of, is_gpu, is_here
from tlauto.errors import OutOfMemory
from tlauto.events import Said, TrialStarted
from tlauto.loop import Job, Loop
from tlauto.memory import FLOOR, available_bytes, memory_floor
from tlauto.outcomes import fail, trains
from tlauto.pool.protocol import RunTogether, RunTrial, StepTried, TryStep
from tlauto.room import Verdict, frozen_bytes, images_at_once, judge, kind_of, refusal, room_beside, taken
from tlauto.study import TrialRecord


def must_wait(loop: Loop, slot: str) -> bool:
    """Whether an idle slot gets no trial now: another of its device waits for room, or memory is short.

    Never when nothing runs.
    """
    if any(job.stage == "held" for job in loop.beside(slot)):
        return True
    return is_here(slot) and any(not job.is_bundle for job in loop.busy.values()) and _is_short(loop)


def begin(loop: Loop, slot: str, job: Job, trials: Sequence[TrialRecord]) -> None:
    """Start a proposed trial on an idle slot, have it wait there for room, or refuse it.

    Args:
        trials: those before it.
    """
    session, spec, capacity = loop.session, job.spec, loop.capacity_of(slot)
    learns = trains(session, spec)
    loop.busy[slot], job.stage, job.started = job, "held", time.monotonic()
    for one in job.every if not job.is_apart else ():
        session.study.note(one.spec.number, slot=slot)
        session.store.start_trial(session.name, one.spec, slot)
        loop.emit(TrialStarted.of(one.spec, slot))
    took, wanted = taken(trials, kind_of(spec)), images_at_once(spec, trains=learns)
    verdict = judge(took, wanted, capacity)
    if verdict.at_once is None:
        _refuse(loop, slot, refusal(verdict, capacity, _place(slot)))
        return
    if verdict.at_once < wanted:
        _divide(loop, job, verdict.at_once)
    if verdict.bounds is not None and (verdict.bounds.is_exact or not is_gpu(slot)):
        job.needs = verdict.bounds.high
    elif is_gpu(slot):
        job.may_try, job.needs = learns, None if learns else frozen_bytes(job.spec)
    go_on(loop, slot)


def go_on(loop: Loop, slot: str) -> None:
    """Let a trial go on to its next stage, if there is room: a step of it that is tried, the trial."""
    job, others = loop.busy[slot], loop.running_beside(slot)
    if job.tried is not None and not _fits(loop, slot, job.tried):
        return
    job.tried = None
    left = _left_on_gpu(loop, slot)
    if others and not _has_room(loop, slot, left):
        return
    for other in others:
        other.is_alone = False
    job.is_alone, job.started = not others, time.monotonic()
    if job.may_try and (not others or left is not None):
        job.stage = "step"
        most = int(left) if others and left is not None else None
        loop.session.pool.send(slot, TryStep(job.spec, images_at_once(job.spec, trains=True), most))
    else:
        job.stage = "runs"
        specs = tuple(one.spec for one in job.every)
        loop.session.pool.send(slot, RunTogether(specs) if job.beside else RunTrial(job.spec))


def _fits(loop: Loop, slot: str, tried: StepTried) -> bool:
    """Take note of a step that was tried; refuse the trial, and say so, when it cannot fit."""
    job = loop.busy[slot]
    if tried.at_once is not None:
        job.may_try, job.needs = False, tried.bytes
        if tried.at_once < images_at_once(job.spec, trains=True):
            _divide(loop, job, tried.at_once)
    elif job.is_alone:
        _divide(loop, job, 1)
        job.stage = "runs"  # for what is recorded: this was measured
        _refuse(loop, slot, refusal(Verdict(None), None, _place(slot)), tried.bytes)
        return False
    else:
        job.waits_alone = True
    return True


def _has_room(loop: Loop, slot: str, left: float | None) -> bool:
    """Whether a trial, or a step of it that is tried, may start beside those that run on its device."""
    job = loop.busy[slot]
    if not is_here(slot):
        return True
    if not is_gpu(slot):
        system = available_bytes()
        return job.needs is None or system is None or system - job.needs >= memory_floor()
    if job.waits_alone:
        return False
    if loop.session.config.per_device != AUTO:
        return True  # as many as the user says
    return left is not None and (job.may_try if job.needs is None else job.needs <= left)


def _left_on_gpu(loop: Loop, slot: str) -> float | None:
    """Bytes that the trials on a slot's GPU leave; None on other devices, and when nobody can say."""
    if not is_gpu(slot):
        return None
    others = loop.running_beside(slot)
    slots = [each for each in loop.session.pool.slots if device_of(each) == device_of(slot)]
    needs = [job.needs for job in others]
    return room_beside(needs, loop.capacity_of(slot), idle=len(slots) - 1 - len(others))


def _divide(loop: Loop, job: Job, at_once: int) -> None:
    """Have a trial's network take fewer images at once."""
    session = loop.session
    job.spec = replace(job.spec, micro_batch=at_once)
    session.store.restate_trial(session.name, job.spec)
    session.study.note(job.spec.number, micro_batch=at_once)


def _place(slot: str) -> str:
    return "this machine" if is_here(slot) and not is_gpu(slot) else device_of(slot)


def _refuse(loop: Loop, slot: str, message: str, asked: int | None = None) -> None:
    for job in loop.busy.pop(slot).every:
        failed = TrialFailed(job.spec.number, OutOfMemory.kind, message, bytes=asked)
        fail(loop, slot, job, failed, may_retry=False)


def _is_short(loop: Loop) -> bool:
    """Whether too little memory is left for another trial beside those that run."""
    left, floor = available_bytes(), memory_floor()
    is_short = left is not None and left < floor
    if is_short and not loop.has_said_short:
        loop.has_said_short = True
        loop.emit(
            Said(
                f"less than {format_size(floor)} of memory is left: no trial starts beside those that run "
                f"until there is more ({FLOOR} sets how much)"
            )
        )
    return is_short
