"""The unfinished file of a cached array, which a later process continues.

Beside `<key>.part`, `<key>.journal` states what the array will be, and after each block the rows so
far and the CRC-32 of the file up to there. The block is written first, so a process that is killed
leaves at most one block that no line vouches for; after a power cut the lines also show which
blocks never reached the disk.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np

CHUNK = 2**20  # bytes read at once to check a file
VERSION = 1  # of sidecar and journal; another version is computed again


@dataclass(frozen=True)
class Wanted:
    """An array that is wanted: the `.npy` file it lies in and what it must be.

    `about` goes into its sidecar for `tlauto cache list`: the backbone's id and the like.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    about: Mapping[str, object]

    @cached_property
    def header(self) -> bytes:
        """The first bytes of the file."""
        buffer = io.BytesIO()
        facts = {"descr": self.dtype.str, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(buffer, facts)
        return buffer.getvalue()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the complete file."""
        return len(self.header) + self.shape[0] * self.row_bytes

    def facts(self) -> dict[str, object]:
        """What journal and sidecar say of it."""
        return {
            "version": VERSION,
            "kind": self.path.parent.name,
            "shape": list(self.shape),
            "dtype": self.dtype.str,
            "bytes": self.bytes,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **self.about,
        }

    def is_described(self, facts: Mapping[str, object]) -> bool:
        """Whether a journal or sidecar is of this array."""
        expected = (VERSION, list(self.shape), self.dtype.str)
        return tuple(facts.get(name) for name in ("version", "shape", "dtype")) == expected


class Part:
    """The unfinished file of an array, open at its last complete block; `rows` are there already."""

    def __init__(self, wanted: Wanted, *, name: str = "") -> None:
        """Open or create the file; `name` tells apart processes that cannot lock each other out."""
        self.wanted = wanted
        self.path = wanted.path.with_suffix(f"{name}.part")
        self.journal_path = wanted.path.with_suffix(f"{name}.journal")
        with contextlib.ExitStack() as opened:
            self.file: IO[bytes] = opened.enter_context(self.path.open("a+b"))
            self.journal: IO[bytes] = opened.enter_context(self.journal_path.open("a+b"))
            self.rows, self.checksum = self._resume()
            opened.pop_all()

    def append(self, block: np.ndarray) -> None:
        """Write the next rows (n, *shape[1:])."""
        array = np.ascontiguousarray(block, dtype=self.wanted.dtype)
        rows = self.rows + len(array)
        if array.shape[1:] != self.wanted.shape[1:] or rows > self.wanted.shape[0]:
            raise ValueError(f"{array.shape} after {self.rows} rows of an array {self.wanted.shape}")
        if not array.size:
            return
        self.checksum = zlib.crc32(array.data, self.checksum)
        # Written as a stream, not through a memory map: a full disk is then an error, not a crash.
        self.file.write(array.data)
        self.file.flush()
        self.rows = rows
        self.journal.write(b"%d %08x\n" % (rows, self.checksum))
        self.journal.flush()

    def finish(self) -> None:
        """Put the array and its sidecar in their places."""
        if self.rows != self.wanted.shape[0]:
            raise ValueError(f"{self.rows} rows were computed for an array of {self.wanted.shape[0]}")
        self.close()
        # First: an array without sidecar would be computed again, a sidecar alone harms nobody.
        facts = {**self.wanted.facts(), "checksum": checksum_text(self.checksum)}
        self.wanted.path.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")
        os.replace(self.path, self.wanted.path)
        self.journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete it: what was computed is wrong or takes space that is needed."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files and leave them for the next process."""
        # What a full disk left in a buffer is tried again on closing.
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.journal.close()

    def _resume(self) -> tuple[int, int]:
        """Cut off what no line vouches for; rows and checksum of the rest."""
        self.journal.seek(0)
        self.file.seek(0)
        header = self.wanted.header
        if not self._fits(self.journal.readline()) or self.file.read(len(header)) != header:
            return self._start()
        rows, checksum, vouched = 0, zlib.crc32(header), self.journal.tell()
        while line := _parsed(self.journal.readline()):
            size = (line[0] - rows) * self.wanted.row_bytes
            if size <= 0 or line[0] > self.wanted.shape[0] or crc(self.file, size, checksum) != line[1]:
                break
            (rows, checksum), vouched = line, self.journal.tell()
        self.journal.truncate(vouched)
        self.file.truncate(len(header) + rows * self.wanted.row_bytes)
        self.file.seek(0, os.SEEK_END)
        self.journal.seek(0, os.SEEK_END)
        return rows, checksum

    def _fits(self, line: bytes) -> bool:
        try:
            facts = json.loads(line)
        except ValueError:
            return False
        return isinstance(facts, dict) and self.wanted.is_described(facts)

    def _start(self) -> tuple[int, int]:
        self.file.truncate(0)
        self.journal.truncate(0)
        self.file.write(self.wanted.header)
        self.file.flush()
        self.journal.write(json.dumps(self.wanted.facts()).encode() + b"\n")
        self.journal.flush()
        return 0, zlib.crc32(self.wanted.header)


def crc(file: IO[bytes], size: int, start: int = 0) -> int | None:
    """CRC-32 of the next `size` bytes, going on from `start`; None when there are fewer."""
    while size:
        chunk = file.read(min(CHUNK, size))
        if not chunk:
            return None
        start, size = zlib.crc32(chunk, start), size - len(chunk)
    return start


def checksum_text(checksum: int) -> str:
    """A checksum as a sidecar states it."""
    return f"crc32:{checksum:08x}"


def _parsed(line: bytes) -> tuple[int, int] | None:
    """Rows and checksum of a journal's line; None at its end or where it was cut off."""
    rows, space, checksum = line.partition(b" ")
    if not space or not line.endswith(b"\n"):
        return None
    try:
        return int(rows), int(checksum, 16)
    except ValueError:
        return None
