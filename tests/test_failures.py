"""What is done about failures, as functions and on a real study: who is tried again, when it ends."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest
from simulated import NAME, SimulatedPool, simulate
from tests_support import spec_of

from tlauto.builtin.tasks import task
from tlauto.contracts import TrialSpec
from tlauto.errors import (
    ConfigError,
    DeviceLost,
    Diverged,
    Hung,
    OutOfMemory,
    TrialError,
    TrialTimeout,
    WorkerDied,
)
from tlauto.failures import HALVINGS, Retry, retry, why_to_end
from tlauto.plugins import registry
from tlauto.pool.beats import Limits, Watch, beat_every, limits_here
from tlauto.pool.protocol import JobFailed, Message
from tlauto.searchspace import SearchSpace
from tlauto.store import Store
from tlauto.study import INTERRUPTED, Study, earlier_ends

ACCIDENTS = (WorkerDied.kind, Hung.kind, DeviceLost.kind)


# --- who is tried again -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ACCIDENTS)
def test_an_accident_is_tried_again_once_and_an_interruption_aside(kind: str) -> None:
    spec = spec_of(micro_batch=4)
    assert retry(kind, spec, [], trains=True) == Retry(4)
    assert retry(kind, spec, [INTERRUPTED], trains=True) == Retry(4)
    assert all(retry(kind, spec, [INTERRUPTED, other], trains=True) is None for other in ACCIDENTS)


@pytest.mark.parametrize("kind", [Diverged.kind, "error", TrialTimeout.kind])
def test_what_would_come_to_the_same_is_not_tried_again(kind: str) -> None:
    assert retry(kind, spec_of(), [], trains=True) is None


def test_a_full_memory_halves_the_images_at_once_three_times() -> None:
    spec, earlier, seen = spec_of(params={"finetune.batch_size": 32}), [], []
    while again := retry(OutOfMemory.kind, spec, earlier, trains=True):
        assert again.micro_batch is not None
        seen.append(again.micro_batch)
        spec, earlier = spec_of(micro_batch=again.micro_batch), [OutOfMemory.kind, *earlier]
    assert seen == [16, 8, 4] and len(seen) == HALVINGS
    assert retry(OutOfMemory.kind, spec_of(), [], trains=True) == Retry(8), "the recipe's default is 16"
    assert retry(OutOfMemory.kind, spec_of(), [], trains=False) == Retry(32), "64 to compute features"
    assert retry(OutOfMemory.kind, spec_of(micro_batch=1), [], trains=True) is None
    assert retry(OutOfMemory.kind, spec_of(), [WorkerDied.kind], trains=True) == Retry(8)


@pytest.mark.parametrize(
    ("failures", "has_best", "most", "expected"),
    [
        (4, False, 10, ""),
        (5, False, 10, "the first 5 trials all failed"),
        (3, False, 3, "the first 3 trials all failed"),
        (9, True, 10, ""),
        (10, True, 10, "10 trials in a row failed"),
        (1, True, 1, "a trial failed"),
    ],
)
def test_a_search_ends_after_so_many_failures(
    failures: int, has_best: bool, most: int, expected: str
) -> None:
    assert why_to_end(failures, has_best=has_best, most=most) == expected


# --- in the study -------------------------------------------------------------------------------------


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'tlauto.db'}"
    Store(url).close()
    return url


@pytest.fixture
def space() -> SearchSpace:
    strategies = tuple(registry().strategy(name) for name in ("feature_extraction", "full"))
    return SearchSpace(("timm:a",), strategies, (registry().head("linear"),), task("multiclass").space, {})


def test_a_trial_that_is_tried_again_counts_once(url: str, space: SearchSpace) -> None:
    study = Study(url, "s", seed=0, create=True)
    first = study.ask(space)
    study.requeue(first.number, why=OutOfMemory.kind, micro_batch=8)
    study.note(first.number, retried=True)
    study.fail(first.number, kind=OutOfMemory.kind, message="full")
    second = study.ask(space)
    assert second.params == first.params
    assert (second.attrs["retry_of"], second.attrs["micro_batch"]) == (0, 8)
    study.tell(second.number, 0.5)
    assert [t.counts for t in study.trials()] == [False, True]
    assert earlier_ends(study.trials()[1], study.trials()) == [OutOfMemory.kind]


def test_a_search_killed_between_two_attempts_makes_one_more_attempt(url: str, space: SearchSpace) -> None:
    study = Study(url, "s", seed=0, create=True)
    first = study.ask(space)
    study.requeue(first.number, why=WorkerDied.kind)  # killed here: the trial has not failed yet
    resumed = Study(url, "s", seed=0, create=False)
    assert resumed.requeue_interrupted() == [0]
    assert [t.state for t in resumed.trials()] == ["failed", "waiting"]
    second = resumed.ask(space)
    assert earlier_ends(resumed.trials()[1], resumed.trials()) == [WorkerDied.kind]
    assert retry(WorkerDied.kind, spec_of(), [WorkerDied.kind], trains=True) is None
    # Killed again, during the second attempt: that one goes on, but is no reason for another retry.
    again = Study(url, "s", seed=0, create=False)
    assert again.requeue_interrupted() == [second.number]
    third = again.ask(space)
    ends = earlier_ends(again.trials()[third.number], again.trials())
    assert ends == [INTERRUPTED, WorkerDied.kind]
    assert retry(WorkerDied.kind, spec_of(), ends, trains=True) is None
    last = Study(url, "s", seed=0, create=False)
    assert last.requeue_interrupted() == [third.number]
    fourth = last.ask(space)
    assert Study(url, "s", seed=0, create=False).requeue_interrupted() == [fourth.number]
    states = [t.state for t in Study(url, "s", seed=0, create=False).trials()]
    assert states == ["failed"] * 4, "what was cut off three times in vain is not proposed again"


# --- signs of life --------------------------------------------------------------------------------------


def test_silence_is_a_hang_but_only_of_a_busy_worker() -> None:
    watch = Watch(Limits(silence_s=120))
    assert watch.passed(1000) == ""
    watch.begin()
    assert watch.passed(100) == ""
    watch.heard(0)
    assert watch.passed(100) == ""
    assert watch.passed(100) == "gave no sign of life for 120 s and was killed"
    watch.end()
    assert watch.passed(1000) == ""


def alive(watch: Watch, seconds: int, *, done: int) -> str:
    """Let time pass with a sign of life, but none of work, every 10 seconds."""
    for _ in range(seconds // 10):
        watch.heard(done)
        if reason := watch.passed(10):
            return reason
    return ""


def test_a_worker_that_lives_but_does_nothing_hangs() -> None:
    watch = Watch(Limits())
    watch.begin()
    assert alive(watch, 3600, done=7) == "", "it may be downloading weights"
    assert alive(watch, 20, done=7) == "did nothing for 3600 s and was killed"
    watch.begin()
    assert alive(watch, 60, done=8) == alive(watch, 600, done=9) == ""
    assert alive(watch, 20, done=9) == "did nothing for 600 s and was killed"


def test_a_slow_worker_is_given_time_by_what_it_has_shown() -> None:
    limits = Limits()
    watch = Watch(limits)
    watch.begin()
    for done in range(3):
        assert alive(watch, 100, done=done) == ""
    assert limits.longest_s == 100
    other = Watch(limits)
    other.begin()
    assert alive(other, 10, done=0) == alive(other, 2000, done=1) == ""
    assert alive(other, 20, done=1) == "did nothing for 2000 s and was killed"


def test_the_silence_allowed_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLAUTO_SILENCE", "8s")
    assert (limits_here().silence_s, beat_every()) == (8, 2)
    monkeypatch.setenv("TLAUTO_SILENCE", "soon")
    with pytest.raises(ConfigError, match="TLAUTO_SILENCE: 'soon' is not a duration"):
        limits_here()
    monkeypatch.delenv("TLAUTO_SILENCE")
    assert (limits_here().silence_s, beat_every()) == (300, 5)


# --- what workers say ---------------------------------------------------------------------------------


class Refusing(SimulatedPool):
    """Workers that cannot even begin a trial."""

    def _end(self, spec: TrialSpec, seconds: float) -> Message:
        return JobFailed("MemoryError", "in an import")


def test_a_trial_that_cannot_begin_is_tried_again_by_another_worker(tmp_path: Path) -> None:
    with pytest.raises(
        TrialError, match=r"first 5 trials all failed, .* process could not begin: MemoryError"
    ):
        simulate(tmp_path, Refusing(1, seconds=lambda number: 0.0, lasts=300.0))
    url = f"sqlite:///{tmp_path / 'tlauto.db'}"
    with closing(Store(url)) as store, closing(Study(url, NAME, seed=0, create=False)) as study:
        rows = store.trials(NAME)
        assert [t.state for t in study.trials() if t.state != "waiting"] == ["failed"] * 16
    facts = [(row["error_kind"], row["detail"]) for row in rows.values()]
    # Ten probes and the default recipe, each proposed again behind them, and five of those attempts.
    assert facts == [(WorkerDied.kind, "in an import")] * 16
