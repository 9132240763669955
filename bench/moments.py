"""When something happens to a search: moments that can be seen from outside."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence

from searches import Search

WRITES = 140
"""Commits of a search of eight trials, about."""


def _says(pattern: str) -> Callable[[Search], bool]:
    return lambda search: search.has_said(pattern)


MOMENTS: dict[str, tuple[Callable[[Search], bool], float]] = {
    "start": (lambda search: True, 3.0),
    "check": (_says("checking backbones"), 5.0),
    "trials": (_says("trial score"), 5.0),
    "epoch": (lambda search: any(search.runs.glob("*/trials/2")), 1.5),  # the first that has epochs
    "bundle": (lambda search: any(search.runs.glob("*/.model-*.new")), 0.2),
    "refit": (_says("refit of"), 2.0),
}
"""What is waited for, and up to how many seconds later it happens. `write` is another moment: right after
one of the first `WRITES` commits to an SQLite file."""


def wait_for(search: Search, what: Callable[[Search], bool]) -> bool:
    """Wait for something. Returns: whether it came before the search ended."""
    while not what(search):
        if not search.is_running():
            return False
        time.sleep(0.003)
    return True


def wait_for_moment(search: Search, moments: Sequence[str], chance: random.Random) -> tuple[str, bool]:
    """Wait for one of some moments. Returns: which one, and whether the search still runs then."""
    name = chance.choice(moments)
    if name == "write" and search.storage is None:
        commit = chance.randint(1, WRITES)
        return f"write {commit}", _wait_for_commit(search, commit)
    what, most = MOMENTS.get(name, MOMENTS["trials"])
    delay = chance.uniform(0, most)
    if wait_for(search, what):
        time.sleep(delay)
    return f"{name if name in MOMENTS else 'trials'}+{delay:.2f}", search.is_running()


def _wait_for_commit(search: Search, commit: int) -> bool:
    file, last, seen = search.runs / "tlauto.db-wal", None, 0
    while search.is_running():
        with contextlib.suppress(OSError):
            status = file.stat()
            now = status.st_size, status.st_mtime_ns
            seen, last = seen + (now != last), now
        if seen >= commit:
            return True
        time.sleep(0.0003)
    return False
