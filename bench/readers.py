"""A search of cached trials while programs and the real Optuna dashboard read its database."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from searches import BACKBONES, LONGEST_S, MARK, Search

EVERY_S = 0.2
"""Pause between two reads of a reader."""

READER = """
import sys, threading
{read}
ended, reads = threading.Event(), 0
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
while not ended.wait({every}):
    read()
    reads += 1
print(reads)
"""

OPTUNA = """
import optuna
optuna.logging.set_verbosity(optuna.logging.WARNING)
def read():
    return optuna.load_study(study_name={study!r}, storage={url!r}).trials
"""

LEADERBOARD = """
import tlauto.api
def read():
    return tlauto.api.open_search({out!r}, {study!r}, {storage!r}).leaderboard()
"""

LOCKED = re.compile(r"is locked|deadlock|could not serialize|lock timeout|disk I/O error", re.IGNORECASE)


@dataclass
class Readers:
    """What was seen while a search was read.

    Attributes:
        reads: of all readers and the dashboard together.
        errors: what readers, dashboard and search said of locks, and readers that failed.
    """

    trials: int = 0
    failed: int = 0
    reads: int = 0
    errors: list[str] = field(default_factory=list)


def read_a_search(search: Search) -> Readers:
    """Run a search to its end beside four readers and a dashboard.

    Its first trial is a search by itself: a dashboard needs a study, and all may be over before it is up.
    """
    found, over = Readers(), threading.Event()
    begun = replace(search, options=(*search.options, "--trials", "1"))
    begun.start()
    if begun.wait() != 0:
        found.errors.append(f"the first trial failed: {begun.said()[-500:]}")
    with ExitStack() as ending:
        port = ending.enter_context(_dashboard(search, found))
        search.start()
        polling = threading.Thread(target=_poll, args=(port, over, found))
        polling.start()
        for number, code in enumerate(2 * (OPTUNA, LEADERBOARD)):
            ending.enter_context(_reader(search, f"reader-{number}", code, found))
        if search.wait() != 0:
            found.errors.append(f"the search failed: {search.said()[-500:]}")
        over.set()
        polling.join()
    for log in (*search.folder.glob("*.log"), *search.runs.glob("*/logs/*")):
        lines = log.read_text(errors="replace").splitlines()
        found.errors += [f"{log.name}: {line}" for line in lines if LOCKED.search(line)]
    trials = search.ledger.trials().values()
    found.trials, found.failed = len(trials), sum(trial.state == "FAIL" for trial in trials)
    return found


def cached_trials(number: int) -> tuple[str, ...]:
    """Options of a search of so many trials, of which each reads features from the cache."""
    return (
        "--trials", str(number), "--preset", "fast", "--ensemble", "1", "--backbones", ",".join(BACKBONES),
        "--strategies", "feature_extraction", "--heads", "linear", "--workers", "1",
    )  # fmt: skip


@contextmanager
def _reader(search: Search, name: str, code: str, found: Readers) -> Iterator[None]:
    """A program that reads until the block ends."""
    url = search.storage or f"sqlite:///{search.runs / 'tlauto.db'}"
    facts = {"study": search.study, "url": url, "out": str(search.runs), "storage": search.storage}
    program = READER.format(read=code.format(**facts), every=EVERY_S)
    with (search.folder / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=search.folder,
            env={**os.environ, **search.env, MARK: f"{search.mark}{name}"},
        )  # fmt: skip
        try:
            yield
            process.communicate(timeout=120)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        said = log.read().strip()
        if process.returncode or not said.isdigit():
            found.errors.append(f"{name} ended with {process.returncode}: {said[-300:]}")
        else:
            found.reads += int(said)


@contextmanager
def _dashboard(search: Search, found: Readers) -> Iterator[int]:
    """`tlauto dashboard` beside the search; its port."""
    where = ["--storage", search.storage] if search.storage else ["--out", str(search.runs)]
    log = search.folder / "dashboard.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tlauto", "dashboard", *where, "--port", "0"],
            cwd=search.folder, stdout=out, stderr=out,
            env={**os.environ, **search.env, MARK: f"{search.mark}dashboard"},
        )  # fmt: skip
    try:
        yield _answering(_port(log, process), process)
        if process.poll() is not None:
            found.errors.append(f"the dashboard ended with {process.returncode}: {log.read_text()[-300:]}")
    finally:
        process.kill()
        process.wait()


def _port(log: Path, process: subprocess.Popen[bytes]) -> int:
    while process.poll() is None:
        if named := re.search(r"http://127\.0\.0\.1:(\d+) ", log.read_text()):
            return int(named[1])
        time.sleep(0.05)
    raise RuntimeError(f"the dashboard did not start: {log.read_text()[-500:]}")


def _answering(port: int, process: subprocess.Popen[bytes]) -> int:
    """The port once it answers; the dashboard says that it listens a moment before it does."""
    latest = time.monotonic() + LONGEST_S
    while process.poll() is None and time.monotonic() < latest:
        with contextlib.suppress(OSError):
            _get(port, "")
            return port
        time.sleep(0.05)
    raise RuntimeError("the dashboard never answered")


def _poll(port: int, over: threading.Event, found: Readers) -> None:
    """Ask for the studies and one study's trials, as an open page does."""
    while not over.wait(EVERY_S):
        try:
            for study in _get(port, "")["study_summaries"]:
                _get(port, f"/{study['study_id']}")
            found.reads += 1
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            found.errors.append(f"the dashboard answered: {error!r}")


def _get(port: int, path: str) -> dict[str, list[dict[str, int]]]:
    url = f"http://127.0.0.1:{port}/api/studies{path}"
    with contextlib.closing(urllib.request.urlopen(url, timeout=60)) as answer:
        found: dict[str, list[dict[str, int]]] = json.load(answer)
        return found
