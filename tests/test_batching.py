"""Trials that one worker solves side by side: which, how many, and what becomes of them."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from scripted_pool import ScriptedPool, open_scripted, search, together_done
from tests_support import TINY, command, environment, leaderboard, run

from tlauto.batching import AHEAD, LEARNED, MOST, at_once, kin_of, under_way
from tlauto.coordinator import run as run_search
from tlauto.pool.base import Event
from tlauto.pool.protocol import JobFailed, RunTogether, TogetherDone, decode, encode
from tlauto.searchspace import STARTUP
from tlauto.study import TrialRecord

FIXED = {"probe.solver": "lbfgs"}
SOLVED = {"backbone": "a", "strategy": "feature_extraction", "head": "linear", "probe.features": "grid"}


def record(number: int = 0, attrs: dict[str, Any] | None = None, **params: Any) -> TrialRecord:
    attrs = {"purpose": "search", "seconds": 1.0, **(attrs or {})}
    return TrialRecord(number, "complete", {**SOLVED, **params}, 0.5, attrs)


# --- which, and how many ----------------------------------------------------------------------------


def test_trials_are_kin_when_their_heads_read_the_same() -> None:
    kin = kin_of(record(), FIXED)
    assert kin is not None
    same = {"probe.l2": 0.1, "loss.label_smoothing": 0.2, "probe.solver": "lbfgs"}
    assert kin_of(record(**same), {}) == kin
    for name, value in {"backbone": "b", "probe.mirror": True, "image.scale": 1.4}.items():
        other = kin_of(record(**{name: value}), FIXED)
        assert other is not None
        assert other != kin
        assert other.pass_ != kin.pass_
    pooled = kin_of(record(**{"probe.features": "pooled"}), FIXED)
    assert pooled is not None
    assert pooled != kin
    assert pooled.pass_ == kin.pass_


@pytest.mark.parametrize(
    ("attrs", "params"),
    [
        ({"purpose": "probe"}, {}),
        ({"retry_of": 3}, {}),
        ({}, {"probe.solver": "path"}),
        ({}, {"probe.solver": "minibatch"}),
        ({}, {"probe.joined": 2}),
    ],
)
def test_other_trials_run_by_themselves(attrs: dict[str, Any], params: dict[str, Any]) -> None:
    assert kin_of(record(attrs=attrs, **params), FIXED if not params else {}) is None


def test_the_sampler_has_learned_from_more_trials_than_are_under_way() -> None:
    assert [under_way(known, 100) for known in (0, 1, LEARNED)] == [1, 1, 1]
    assert under_way(6, 100) == 6 // LEARNED
    assert under_way(10_000, 10_000) == AHEAD * MOST


def test_those_that_are_drawn_at_random_need_not_wait_for_others() -> None:
    assert [under_way(0, ever) for ever in (0, 3, STARTUP - 1, STARTUP)] == [STARTUP, STARTUP - 3, 1, 1]


def test_at_once_are_as_many_as_the_budget_and_the_other_slots_leave() -> None:
    many = [record(i) for i in range(100)]
    assert at_once(many, open=16, slots=1, most=None, left=None) == MOST
    assert at_once(many, open=3, slots=1, most=None, left=None) == 3
    assert at_once(many, open=16, slots=1, most=5, left=None) == 5
    assert at_once(many, open=16, slots=4, most=10, left=None) == 3
    assert at_once(many, open=16, slots=1, most=None, left=6.0) == 3, "they take a second each"
    assert at_once(many, open=16, slots=1, most=None, left=0.1) == 1


def test_messages_about_several_trials_come_through_the_pipe(tmp_path: Path) -> None:
    pool = ScriptedPool(("cpu:0",))
    search(opened(tmp_path, pool, trials=20))
    specs = next(sent.together for sent in pool.trials if sent.together)
    assert decode(encode(RunTogether(specs))) == RunTogether(specs)
    ended = together_done(specs)
    assert decode(encode(ended)) == ended
    assert isinstance(ended, TogetherDone)


# --- the loop ---------------------------------------------------------------------------------------


def opened(folder: Path, pool: ScriptedPool, *, trials: int, features: str | None = "grid") -> Any:
    """A search of heads on one forward pass; the sampler draws their features where none are given."""
    one_kind = {} if features is None else {"probe.features": features}
    return open_scripted(
        folder, pool, strategies=["feature_extraction"], trials=trials, device="cpu", backbones=1,
        fixed={**FIXED, "probe.mirror": False, **one_kind},
    )  # fmt: skip


def groups(pool: ScriptedPool) -> list[list[int]]:
    """Numbers of the trials that were sent together, or alone."""
    return [[spec.number for spec in sent.together or (sent.spec,)] for sent in pool.trials]


def test_more_and_more_are_solved_together_and_each_runs_once(tmp_path: Path) -> None:
    pool = ScriptedPool(("cpu:0",))
    session = opened(tmp_path, pool, trials=80)
    search(session)
    sent = groups(pool)
    assert sorted(number for group in sent for number in group) == list(range(80))
    sizes = [len(group) for group in sent]
    assert sizes[:3] == [1, STARTUP, STARTUP // LEARNED], "of the second no result was needed"
    assert MOST in sizes
    assert max(sizes) == MOST
    records = session.study.trials()
    assert {trial.state for trial in records} == {"complete"}
    assert {trial.attrs["slot"] for trial in records} == {"cpu:0"}


def test_those_that_read_other_features_wait_for_their_own(tmp_path: Path) -> None:
    pool = ScriptedPool(("cpu:0",))
    search(opened(tmp_path, pool, trials=80, features=None))
    sent = groups(pool)
    assert sorted(number for group in sent for number in group) == list(range(80))
    assert max(map(len, sent)) > 2
    together = [job.together for job in pool.trials if job.together]
    assert all(len({spec.params["probe.features"] for spec in specs}) == 1 for specs in together)
    assert any(min(later) < max(earlier) for earlier, later in itertools.pairwise(sent)), "some went before"


def test_the_same_is_proposed_every_time(tmp_path: Path) -> None:
    points = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        pool = ScriptedPool(("cpu:0",))
        session = opened(tmp_path / name, pool, trials=40)
        search(session)
        points.append(([trial.params for trial in session.study.trials()], groups(pool)))
    assert points[0] == points[1]


def test_several_slots_share_what_is_left(tmp_path: Path) -> None:
    slots = tuple(f"cpu:{i}" for i in range(4))
    pool = ScriptedPool(slots, seconds=lambda spec: 1.0 + spec.number % 3)
    search(opened(tmp_path, pool, trials=60))
    sent = groups(pool)
    assert sorted(number for group in sent for number in group) == list(range(60))
    assert max(map(len, sent)) > 1
    # One idles while the first model is written, which takes no time here.
    idle = [idle for idle, begun in pool.idle if len(slots) < begun < len(pool.trials)]
    assert not any(idle), "while there is work"


def test_what_cannot_be_solved_together_runs_one_by_one(tmp_path: Path) -> None:
    failed: list[int] = []

    def fails(specs: Any) -> JobFailed | None:
        if failed:
            return None
        failed.extend(spec.number for spec in specs)
        return JobFailed("ValueError: no")

    pool = ScriptedPool(("cpu:0",), fails=fails)
    session = opened(tmp_path, pool, trials=30)
    search(session)
    assert len(failed) > 1
    assert all([number] in groups(pool) for number in failed)
    assert {trial.state for trial in session.study.trials()} == {"complete"}


@dataclass
class Counting(ScriptedPool):
    """One that counts the proposals that no slot has taken, at each wait."""

    session: Any = None
    waiting: list[int] = field(default_factory=list)

    def wait(self, timeout_s: float) -> list[Event]:
        taken = sum(len(job.together or (job.spec,)) for job in self._running.values())
        self.waiting.append(len(self.session.study.running) - taken)
        return super().wait(timeout_s)


@pytest.mark.parametrize("time_s", [None, 3600.0])
def test_nothing_is_proposed_ahead_while_the_time_is_limited(tmp_path: Path, time_s: float | None) -> None:
    pool = Counting(("cpu:0",))
    session = opened(tmp_path, pool, trials=60, features=None)
    config = replace(session.config, time_s=time_s)
    pool.session = session = replace(session, config=config, plan=replace(session.plan, config=config))
    search(session)
    assert sorted(number for group in groups(pool) for number in group) == list(range(60))
    assert max(map(len, groups(pool))) > 1
    most = max(pool.waiting)
    assert most > 4 if time_s is None else most <= 1


@dataclass
class Stopped(ScriptedPool):
    """One whose user presses Ctrl-C while trials are solved together."""

    def wait(self, timeout_s: float) -> list[Event]:
        if any(job.together for job in self._running.values()) and len(self.trials) > 8:
            os.kill(os.getpid(), signal.SIGINT)
            return []
        return super().wait(timeout_s)


def test_a_stopped_search_leaves_nothing_running(tmp_path: Path) -> None:
    pool = Stopped(("cpu:0",))
    session = opened(tmp_path, pool, trials=80)
    _, was_interrupted = run_search(session.config, session=session)
    assert was_interrupted
    records = session.study.trials()
    cut = [trial for trial in records if trial.state != "complete"]
    assert len(cut) > MOST, "those on the slot and those that waited"
    assert {(trial.state, trial.attrs["error_kind"]) for trial in cut} == {("failed", "interrupted")}
    assert not any(trial.counts for trial in cut)


def test_trials_of_a_worker_that_died_run_again_by_themselves(tmp_path: Path) -> None:
    died: list[int] = []

    @dataclass
    class Dying(ScriptedPool):
        def wait(self, timeout_s: float) -> list[Event]:
            for slot, job in self._running.items():
                if job.together and not died:
                    died.extend(spec.number for spec in job.together)
                    self.kill(slot)
                    return [Event(slot, None, exitcode=-9)]
            return super().wait(timeout_s)

    pool = Dying(("cpu:0",))
    session = opened(tmp_path, pool, trials=30)
    search(session)
    records = session.study.trials()
    assert len(died) > 1
    assert [records[number].state for number in died] == ["failed"] * len(died)
    again = {trial.attrs["retry_of"]: trial.number for trial in records if "retry_of" in trial.attrs}
    assert sorted(again) == died
    assert all([number] in groups(pool) for number in again.values())
    assert sum(trial.state == "complete" for trial in records) == 30


# --- real searches ----------------------------------------------------------------------------------

ENDED = "feature_extraction  linear"  # in the line of each trial that ended
SEARCH = ("search", "--data", "patches", *TINY, "--strategies", "feature_extraction", "--heads", "linear")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("together")
    make_patches(root / "patches")
    done = run(*SEARCH, "--trials", "40", "--set", "probe.solver=lbfgs", cwd=root)
    assert done.returncode == 0, done.stderr
    return root


def test_a_search_solves_heads_together(searched: Path) -> None:
    rows = leaderboard(searched)
    assert len(rows) == 40
    assert {row["state"] for row in rows} == {"complete"}
    with closing(sqlite3.connect(next(searched.rglob("tlauto.db")))) as connection:
        spans = connection.execute(
            "select datetime_start, datetime_complete from trials order by number"
        ).fetchall()
    begun_early = sum(start < before for (start, _), (_, before) in zip(spans[1:], spans, strict=False))
    assert begun_early > 10, "one slot, so these were solved together or proposed ahead"
    for row in rows:
        folder = next(searched.rglob(f"trials/{row['number']}"))
        assert {"checkpoint.safetensors", "predictions.npz"} <= {file.name for file in folder.iterdir()}


def test_it_can_be_run_again_and_gives_the_same(
    searched: Path, tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    done = run(*SEARCH, "--trials", "40", "--set", "probe.solver=lbfgs", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = ([(r["number"], r["score"]) for r in leaderboard(root)] for root in (searched, tmp_path))
    assert first == second


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_what_was_proposed(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    args = (*SEARCH, "--trials", "200", "--set", "probe.solver=lbfgs")
    with subprocess.Popen(
        command(*args), cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        ended = sum(1 for _ in itertools.islice((line for line in process.stderr if ENDED in line), 60))
        process.kill()
        process.communicate()
    assert ended == 60
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = leaderboard(tmp_path)
    assert sum(row["state"] == "complete" for row in rows) == 200
    again = [row["retry_of"] for row in rows if row["retry_of"] is not None]
    assert len(again) > 1, "those that were solved together or waited"
    assert len(set(again)) == len(again)
