"""Locks that a process gives up when it dies, however it dies: flock on small files.

Where the file system has no locks nothing is ever held: work may then be done twice, and nothing
is deleted that somebody might be using.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Whether this process alone holds the lock file `path`, which is created when it is missing.

    Args:
        wait: until the lock is free. If not, False also means that somebody else holds it.

    Raises: OSError when the file cannot be created.
    """
    while True:
        with path.open("ab") as file:
            is_held = take(file, wait=wait)
            if is_held and not is_at(file, path):
                continue  # its holder deleted it while we waited: the lock is a new file by now
            yield is_held
            return


def take(file: IO[bytes], *, wait: bool) -> bool:
    """Lock an open file for this process alone; False if others use it or it cannot be locked."""
    return _flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def share(file: IO[bytes]) -> bool:
    """Lock an open file together with all who share it, until its last descriptor is closed."""
    return _flock(file, fcntl.LOCK_SH)


def is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one that lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _flock(file: IO[bytes], operation: int) -> bool:
    try:
        fcntl.flock(file, operation)
    except OSError:
        return False
    return True
