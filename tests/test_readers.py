"""Programs that read the database while a search writes it: no trial fails, and nobody is locked out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests_support import TINY, command, environment, leaderboard, run, wait_for, wait_until_served

pytestmark = pytest.mark.slow

FIRST, TRIALS = 2, 16
SEARCH = ("search", "--data", "patches", *TINY, "--strategies", "full", "--heads", "linear")
READERS = ("optuna", "optuna-too", "one-connection", "tlauto", "page")

LOOP = """
import sys, threading
done = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
states, ended = set(), set()
while not done.wait(0.2):
    seen = read()
    states |= set(seen)
    ended.add(seen.count("COMPLETE"))
    print("reading", flush=True)
print(len(ended), *sorted(states))
"""

OPTUNA = """
import optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)

def read():
    study = optuna.load_study(study_name="patches", storage="sqlite:///tlauto-runs/tlauto.db")
    return [trial.state.name for trial in study.trials]
"""

ONE_CONNECTION = """
import sqlite3, time
connection = sqlite3.connect("tlauto-runs/tlauto.db", timeout=5)

def read():
    connection.execute("BEGIN")
    states = [state for (state,) in connection.execute("SELECT state FROM trials")]
    time.sleep(0.5)  # a reader in no hurry
    assert states == [state for (state,) in connection.execute("SELECT state FROM trials")]
    connection.execute("COMMIT")
    return states
"""

TLAUTO = """
import tlauto.api

def read():
    return [row.state.upper() for row in tlauto.api.open_search().leaderboard()]
"""

DASHBOARD = """
import json, urllib.request

def ask(path):
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/api/studies{path}", timeout=60) as answer:
        return json.load(answer)

def read():
    (study,) = ask("")["study_summaries"]
    return [trial["state"].upper() for trial in ask(f"/{study['study_id']}")["trials"]]
"""


@contextmanager
def started(words: list[str], folder: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """A program that reads from a pipe and writes what it says to `name`.log; ended with the block."""
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Path:
    """A workspace that was searched while the dashboard and five programs read it; their logs lie in it."""
    folder = tmp_path_factory.mktemp("read")
    make_patches(folder / "patches", per_class=6, classes=2)
    first = run(*SEARCH, "--trials", str(FIRST), cwd=folder)
    assert first.returncode == 0, first.stderr
    with ExitStack() as ending:
        served = ending.enter_context(started(command("dashboard", "--port", "0"), folder, "dashboard"))
        port = wait_for(folder / "dashboard.log", r"http://127\.0\.0\.1:(\d+) ", served)[1]
        wait_until_served(int(port))
        programs = dict(
            zip(READERS, (OPTUNA, OPTUNA, ONE_CONNECTION, TLAUTO, f"PORT = {port}\n{DASHBOARD}"), strict=True)
        )
        readers = {
            name: ending.enter_context(started([sys.executable, "-c", code + LOOP], folder, name))
            for name, code in programs.items()
        }
        for name, reader in readers.items():
            wait_for(folder / f"{name}.log", "reading", reader)
        search = ending.enter_context(started(command(*SEARCH, "--trials", str(TRIALS)), folder, "search"))
        assert search.wait(timeout=500) == 0, (folder / "search.log").read_text()
        for reader in readers.values():
            reader.communicate(timeout=120)
        ended = {name: reader.returncode for name, reader in readers.items()}
        assert set(ended.values()) == {0}, {name: (folder / f"{name}.log").read_text() for name in ended}
        assert served.poll() is None
    return folder


def test_no_trial_fails_while_others_read(read: Path) -> None:
    rows = leaderboard(read)
    assert len(rows) == TRIALS
    assert {row["state"] for row in rows} == {"complete"}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_sees_the_trials_come(read: Path, name: str) -> None:
    counts, *states = (read / f"{name}.log").read_text().splitlines()[-1].split()
    assert int(counts) > 2, "none was seen between the first search's trials and the last"
    assert "COMPLETE" in states and "FAIL" not in states and "FAILED" not in states


def test_nobody_is_locked_out(read: Path) -> None:
    for log in [*read.glob("*.log"), *read.glob("tlauto-runs/patches/logs/*")]:
        text = log.read_text().lower()
        assert "locked" not in text and "traceback" not in text and "error" not in text, text
