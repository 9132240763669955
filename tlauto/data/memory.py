"""What was found of files before, in a JSON-lines file: looked up one by one, never held as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

Stamp = tuple[str, int, int]
"""Path, size and time of change (ns) of a file."""

# Raise it when what `check_file` finds changes, so that older results are not believed.
_VERSION = 1


def stamp_of(file: str) -> Stamp:
    """The stamp of a file; one that is not there has size -1."""
    try:
        status = os.stat(file)
    except OSError:
        return file, -1, 0
    return file, status.st_size, status.st_mtime_ns


class Memory:
    """Earlier results by stamp; as a context it is written anew at its end where something was added.

    What was not asked for is forgotten then, unless the context ends by an exception: a run that was
    interrupted has not come to it. A memory that cannot be read or written costs time at the next run
    and nothing else.

    Args:
        file: one JSON object a line; lines of another version or that do not parse are passed over.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._old: IO[bytes] | None = None
        self._new: IO[bytes] | None = None
        if file is not None:
            with contextlib.suppress(OSError):
                self._old = file.open("rb")
        # By hash: a line is compared with the whole stamp before it is believed.
        self._places = {hash(_stamp(data)): place for place, data in self._lines()}
        self._asked: set[int] = set()

    def __contains__(self, stamp: Stamp) -> bool:
        return hash(stamp) in self._places

    def find(self, stamp: Stamp) -> Mapping[str, Any] | None:
        """What was found of a file; None when it is new or has changed."""
        place = self._places.get(hash(stamp))
        data = None if place is None else _parsed(self._line(place))
        if place is None or data is None or _stamp(data) != stamp:
            return None
        self._asked.add(place)
        found: Mapping[str, Any] = data["check"]
        return found

    def add(self, stamp: Stamp, found: Mapping[str, Any]) -> None:
        """Remember what was found of a file."""
        if self.file is None:
            return
        path, size, changed_ns = stamp
        data = {"version": _VERSION, "path": path, "size": size, "changed_ns": changed_ns, "check": found}
        with contextlib.suppress(OSError):
            if self._new is None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                descriptor, self._name = tempfile.mkstemp(prefix=self.file.name, dir=self.file.parent)
                self._new = os.fdopen(descriptor, "wb")
            self._new.write(json.dumps(data).encode() + b"\n")

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            if self._old is not None:
                opened.enter_context(self._old)
            if self._new is None or self.file is None:
                return
            with self._new:
                for place in sorted(self._places.values() if error else self._asked):
                    self._new.write(self._line(place))
            os.replace(self._name, self.file)

    def _lines(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """Where each line that can be used begins, and what it says."""
        if self._old is None:
            return
        place = 0
        for line in self._old:
            data = _parsed(line)
            if data is not None:
                yield place, data
            place += len(line)

    def _line(self, place: int) -> bytes:
        if self._old is None:
            return b""
        self._old.seek(place)
        return self._old.readline().rstrip(b"\n") + b"\n"


def _parsed(line: bytes) -> Mapping[str, Any] | None:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        data: dict[str, Any] = json.loads(line)
        if data["version"] == _VERSION and isinstance(data["check"], dict):
            _stamp(data)
            return data
    return None


def _stamp(data: Mapping[str, Any]) -> Stamp:
    return data["path"], data["size"], data["changed_ns"]
