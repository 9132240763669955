"""What a slot does next: trials that wait, else the next proposal, and what is solved together with it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tlauto.batching import Kin, at_once, kin_of, under_way
from tlauto.continuing import earlier_reports, next_spec, promotion
from tlauto.events import Said
from tlauto.joined import beside_of
from tlauto.loop import Job, Loop
from tlauto.memory import require_room
from tlauto.prepare import without_fixed
from tlauto.ranking import best_trial
from tlauto.schedule import counts
from tlauto.study import TrialRecord


def has_next(loop: Loop) -> bool:
    """Whether an idle slot has anything to run."""
    return bool(loop.waiting) or _may_propose(loop)


def _may_propose(loop: Loop) -> bool:
    """Whether the totals allow another trial beside those that are proposed."""
    trials_left, left = _trials_left(loop), loop.seconds_left()
    # However short the time: without a first score there is nothing to finish with.
    is_first = not loop.session.study.running and best_trial(loop.session.study.trials()) is None
    has_time = left is None or left > 0 or is_first
    return (trials_left is None or trials_left > 0) and has_time and not loop.hopeless


def _trials_left(loop: Loop) -> int | None:
    """Trials that may be proposed beside those that are; None without a limit."""
    session, limit = loop.session, loop.session.config.max_trials
    if limit is None:
        return None
    return limit - counts(session.study.trials())["total"] - len(session.study.running)


def next_job(loop: Loop, *, proposes: bool = True) -> Job:
    """A trial that waits, or a new one, with others to solve together with it.

    Args:
        proposes: new ones; else something must wait.
    """
    job = _take_waiting(loop) if loop.waiting else _propose(loop)
    if not job.is_apart:
        job.beside = _beside(loop, job, proposes=proposes)
    return job


def _take_waiting(loop: Loop) -> Job:
    """One that failed beside others first, then of those that most can be solved together with."""
    kins = [None if job.is_apart else _kin(loop, job) for job in loop.waiting]
    apart = next((i for i, job in enumerate(loop.waiting) if job.is_apart), None)
    most = max(range(len(kins)), key=lambda i: (kins.count(kins[i]) if kins[i] else 1, -i))
    job = loop.waiting[most if apart is None else apart]
    loop.waiting.remove(job)
    return job


def look_ahead(loop: Loop) -> None:
    """Propose what workers can solve together when they have solved what they have now.

    Not while the time is limited, or it would end with proposals that nobody has begun.
    """
    if loop.session.config.time_s is not None:
        return
    kins = (_kin(loop, job) for job in loop.busy.values() if not job.is_bundle)
    if kin := next(filter(None, kins), None):
        most = _known(loop, kin)[1]
        while _may_look_ahead(loop, kin, most):
            loop.waiting.append(_propose(loop))


def _beside(loop: Loop, job: Job, *, proposes: bool) -> tuple[Job, ...]:
    """Further trials to solve together with one: of those that wait, and new ones; others of these wait."""
    kin, left, further = _kin(loop, job), loop.seconds_left(), _trials_left(loop)
    if kin is None:
        return ()
    (like, open), slots = _known(loop, kin), len(loop.session.pool.slots)
    all_left = None if further is None else further + 1 + len(loop.waiting)
    count = at_once(like, open=open, slots=slots, most=all_left, left=left)
    found = [other for other in loop.waiting if not other.is_apart and _kin(loop, other) == kin][: count - 1]
    for other in found:
        loop.waiting.remove(other)
    while proposes and len(found) + 1 < count and _may_look_ahead(loop, kin, open):
        other = _propose(loop)
        (found if _kin(loop, other) == kin else loop.waiting).append(other)
    return tuple(found)


def _may_look_ahead(loop: Loop, kin: Kin, most: int) -> bool:
    """Whether another may be proposed before it is its turn: of so many, and after none of another kind.

    While the time is limited, only as long as nothing waits.
    """
    if loop.waiting and loop.session.config.time_s is not None:
        return False
    last = _kin(loop, loop.waiting[-1]) if loop.waiting else kin
    is_like = last is not None and last.pass_ == kin.pass_
    return is_like and len(loop.session.study.running) < most and _may_propose(loop)


def _kin(loop: Loop, job: Job) -> Kin | None:
    return kin_of(loop.session.study.trials()[job.spec.number], loop.session.plan.space.fixed)


def _known(loop: Loop, kin: Kin) -> tuple[list[TrialRecord], int]:
    """The complete trials on features of the same forward pass; how many may be proposed and not over."""
    trials, fixed = loop.session.study.trials(), loop.session.plan.space.fixed
    solved = [(trial, kin_of(trial, fixed)) for trial in trials if trial.state == "complete"]
    like = [trial for trial, other in solved if other and other.pass_ == kin.pass_]
    return like, under_way(len(like), ever=sum(other is not None for _, other in solved))


def _propose(loop: Loop) -> Job:
    require_room()
    session, trials, left = loop.session, loop.session.study.trials(), loop.seconds_left()
    kept = session.plan.proposable(trials, left)
    _enqueue(loop, trials, [str(name) for name in kept["strategy"]], left)
    with session.study.together():
        record = session.study.ask(session.plan.space, kept=kept)
        spec = next_spec(session, record, trials, left=left)
        for epoch, score in earlier_reports(spec, record, trials).items():
            session.study.report(record.number, epoch, score)
        session.study.note(record.number, seed=spec.seed, **beside_of(record, spec))
    return Job(spec, time.monotonic())


def _enqueue(
    loop: Loop, trials: Sequence[TrialRecord], strategies: Sequence[str], left: float | None
) -> None:
    """Propose what comes before the sampler: probes, what won on similar datasets, a paused trial."""
    study, plan = loop.session.study, loop.session.plan
    probe = plan.next_probe(trials, spent=loop.spent())
    warm = [] if probe else plan.next_warm(trials, left)
    if probe is not None:
        study.enqueue(without_fixed(probe, plan.space), purpose="probe")
    for point, earlier in warm:
        study.enqueue(without_fixed(point, plan.space), purpose="warm", from_study=earlier)
        loop.emit(Said(f"tries next what was best in study '{earlier}'"))
    again, purpose = ([], "") if probe or warm else plan.next_again(trials, left)
    for point in again:
        study.enqueue(without_fixed(point, plan.space), purpose=purpose)
    if not (probe or warm or again) and (paused := promotion(plan, trials, strategies, left=left)):
        study.enqueue(paused.params, purpose="promoted", continues=paused.number)
