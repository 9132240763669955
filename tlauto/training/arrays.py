"""Arrays computed once and kept on disk, safe when several workers want the same one.

An array is `<key>.npy` with a sidecar `<key>.json` that holds its checksum. `<key>.lock` is locked by
the process that computes it; the `.npy` itself is locked, shared, by all that use it, so that
`tlauto.caches` deletes neither.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from tlauto import pulse
from tlauto.caches import cache_limit, make_room
from tlauto.errors import ConfigError, TlautoError
from tlauto.locks import is_at, locked, share
from tlauto.training.parts import Part, Wanted, checksum_text, crc

Rows = Callable[[int], Iterable[np.ndarray]]

# Files whose checksum this process has compared: device, inode, size and time of change.
_verified: set[tuple[int, int, int, int]] = set()


def cached_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: type[np.generic],
    rows: Rows,
    *,
    about: Mapping[str, object] | None = None,
) -> np.ndarray:
    """The `.npy` array at `path` as a copy-on-write memory map, computed on first use.

    Args:
        path: `<cache>/<kind>/<key>.npy`, where the key of 32 hexadecimal digits says what is in it.
        rows: called with the first row to compute, yields blocks (n, *shape[1:]) that together make
            up the rest of the array, in order. The first row is not 0 when a process that computed
            the array died: its complete blocks are kept.
        about: what `tlauto cache list` shows of it, such as `backbone`.

    A file of another shape or with another checksum (compared once in each process) is computed
    again. Of two workers that want the same array, one computes and the other waits. Arrays that
    were used longest ago are deleted when the cache would outgrow `TLAUTO_CACHE_SIZE`, but none
    while it is mapped. Raises: ConfigError when it cannot be written.
    """
    wanted = Wanted(path, shape, np.dtype(dtype), about or {})
    with _writing(path.parent):
        array = _mapped(wanted)
        if array is not None:
            return array
        path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _writing(path.parent), pulse.waiting():
            is_locked = stack.enter_context(locked(path.with_suffix(".lock")))
            array = _mapped(wanted)  # somebody else computed it while we waited
        if array is None:
            _compute(wanted, rows, name="" if is_locked else f".{os.getpid()}")
            with _writing(path.parent):
                array = _mapped(wanted)
    if array is None:
        raise ConfigError(f"the cache file {path} was changed by another program; start again")
    return array


def _compute(wanted: Wanted, rows: Rows, *, name: str) -> None:
    folder, limit, has_room = wanted.path.parent, cache_limit(), False
    with _writing(folder):
        wanted.path.unlink(missing_ok=True)  # damaged
        part = Part(wanted, name=name)
    try:
        if part.rows < wanted.shape[0]:
            for block in rows(part.rows):
                with _writing(folder):
                    # Only now: what the first block was computed from is in use, and so stays.
                    if not has_room:
                        make_room(wanted.path, wanted.bytes, limit)
                        has_room = True
                    part.append(block)
                pulse.tick()
        with _writing(folder):
            part.finish()
    except (TlautoError, ValueError):
        # An unreadable image or a full disk: nothing that the next process could go on with.
        part.discard()
        raise
    finally:
        part.close()


def _mapped(wanted: Wanted) -> np.ndarray | None:
    """The array if its file is there, complete and undamaged."""
    try:
        with wanted.path.open("rb") as file:
            share(file)
            if not is_at(file, wanted.path) or not _is_sound(file, wanted):
                return None
            # A copy in memory on writing, so torch.from_numpy takes it without copying or warning.
            # The map keeps a duplicate of the descriptor, and so the shared lock, as long as it lives.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with contextlib.suppress(OSError):  # a cache that may only be read
        os.utime(wanted.path.with_suffix(".json"))  # what was used longest ago is evicted first
    return np.ndarray(wanted.shape, wanted.dtype, buffer=mapping, offset=len(wanted.header))


def _is_sound(file: IO[bytes], wanted: Wanted) -> bool:
    status = os.fstat(file.fileno())
    header = file.read(len(wanted.header))
    if status.st_size != wanted.bytes or header != wanted.header:
        return False
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if identity in _verified:
        return True
    file.seek(0)
    checksum = crc(file, wanted.bytes)
    if checksum is None or _facts(wanted).get("checksum") != checksum_text(checksum):
        return False
    _verified.add(identity)
    return True


def _facts(wanted: Wanted) -> Mapping[str, Any]:
    """What the sidecar says; empty when it is missing or not of this array."""
    try:
        facts = json.loads(wanted.path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) and wanted.is_described(facts) else {}


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache {folder}: {error.strerror or error}; make room ('tlauto cache clear') "
            "or set TLAUTO_CACHE to another folder"
        ) from error
