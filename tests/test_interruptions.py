"""Searches that are stopped or killed: nothing is lost, nothing is left behind."""

from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests_support import TINY, children, command, environment, leaderboard, run


@pytest.fixture
def searching(tmp_path: Path, make_patches: Callable[..., Path]) -> Iterator[subprocess.Popen[str]]:
    """A search in the middle of its trials."""
    make_patches(tmp_path / "patches")
    args = ("search", "--data", "patches", *TINY, "--trials", "12")
    with subprocess.Popen(
        command(*args), cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()
        process.wait()


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(text):
            return
    raise AssertionError(f"'{text}' never came; it said:\n{''.join(lines)}")


def gone(pids: list[int], *, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.1)
    return False


linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc to find the workers"
)


@pytest.mark.slow
@linux_only
def test_killed_workers_trial_runs_again_and_counts_once(
    searching: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(searching, "best ")
    (worker,) = children(searching.pid)
    os.kill(worker, signal.SIGKILL)
    searching.communicate(timeout=300)
    assert searching.returncode == 0
    rows = leaderboard(tmp_path)
    failed = [row for row in rows if row["state"] == "failed"]
    assert len(rows) - len(failed) == 12
    assert len(failed) <= 1  # none if it was writing the bundle of the best trial
    for row in failed:
        assert row["error"] == "worker died: the worker process ended with signal 9"
        assert row["retried"]
        assert [r["state"] != "failed" for r in rows if r["retry_of"] == row["number"]] == [True]


@linux_only
def test_killed_coordinator_loses_no_trial_and_leaves_no_worker(
    searching: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(searching, "best ")
    workers = children(searching.pid)
    assert workers
    searching.kill()
    searching.wait()
    assert gone(workers, within_s=10)
    before = {r["number"]: r["score"] for r in leaderboard(tmp_path) if r["state"] == "complete"}
    assert before
    done = run("search", "--data", "patches", *TINY, "--trials", "12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["number"]: row for row in leaderboard(tmp_path)}
    assert all(rows[number]["score"] == score for number, score in before.items())
    cut_off = [r for r in rows.values() if (r["error"] or "").startswith("interrupted")]
    assert len(rows) - len(cut_off) == 12


@linux_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_keeps_everything_and_leaves_the_best_model(
    searching: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    wait_for(searching, "    1 ")
    workers = children(searching.pid)
    started = time.monotonic()
    searching.send_signal(number)
    searching.communicate(timeout=60)
    assert time.monotonic() - started < 30  # seconds when idle; the bound only catches a hang
    assert searching.returncode == 130
    assert gone(workers, within_s=5)
    shown = json.loads(run("show", "--json", cwd=tmp_path).stdout)
    assert shown["best"] is not None
    assert shown["test"] is None
    photo = next((tmp_path / "patches" / "red").iterdir())
    assert run("predict", shown["model"], str(photo), cwd=tmp_path).returncode == 0


@pytest.mark.slow
@linux_only
def test_a_coordinator_that_gets_no_more_memory_says_so_and_the_search_goes_on(
    searching: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(searching, "best ")
    workers = children(searching.pid)
    pages = int(Path(f"/proc/{searching.pid}/statm").read_text().split()[0])
    # Enough for another round, but not what is asked for before one.
    most = pages * resource.getpagesize() + 4 * 2**20
    resource.prlimit(searching.pid, resource.RLIMIT_AS, (most, most))
    _, said = searching.communicate(timeout=60)
    assert searching.returncode == 1
    errors = [line for line in said.splitlines() if "error" in line or "Traceback" in line]
    assert errors == ["error: no memory is left; end other programs, or use fewer --workers"]
    assert gone(workers, within_s=10)
    assert run("search", "--data", "patches", *TINY, "--trials", "12", cwd=tmp_path).returncode == 0
    assert sum(row["state"] != "failed" for row in leaderboard(tmp_path)) == 12


@pytest.mark.slow
@linux_only
def test_a_worker_that_is_killed_during_the_refit_costs_nothing(
    searching: subprocess.Popen[str], tmp_path: Path
) -> None:
    wait_for(searching, "…         refit of ")
    for worker in children(searching.pid):
        os.kill(worker, signal.SIGKILL)
    _, said = searching.communicate(timeout=300)
    assert searching.returncode == 0
    assert "the worker process ended with signal 9; what it did runs again" in said
    assert json.loads(run("show", "--json", cwd=tmp_path).stdout)["test"] is not None


@pytest.mark.slow
def test_what_the_study_cannot_be_told_is_not_shown_and_not_lost(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    args = ("search", "--data", "patches", *TINY, "--trials")
    assert run(*args, "1", cwd=tmp_path).returncode == 0
    refuse = """CREATE TRIGGER full BEFORE UPDATE ON trials WHEN NEW.state = 'COMPLETE'
                BEGIN SELECT json('not JSON'); END"""
    with closing(sqlite3.connect(tmp_path / "tlauto-runs" / "tlauto.db", isolation_level=None)) as database:
        database.execute(refuse)
    stopped = run(*args, "4", cwd=tmp_path)
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith("error: "), stopped.stderr
    assert "\n    1 " not in stopped.stderr
    with closing(sqlite3.connect(tmp_path / "tlauto-runs" / "tlauto.db", isolation_level=None)) as database:
        assert database.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'").fetchone() == (1,)
        database.execute("DROP TRIGGER full")
    assert run(*args, "4", cwd=tmp_path).returncode == 0
    states = [row["state"] for row in leaderboard(tmp_path)]
    assert states.count("failed") == 0 and len(states) == 4
