"""What lies in the cache folder, how large it may become, and what is deleted first.

Under `<cache>/pixels`, `features`, `prefixes` and `engines` (converted networks, as bytes), an array of
key K (32 hexadecimal digits) is `K.npy` with its sidecar `K.json`, or `K.part` and `K.journal` while it is
computed; `K.lock` is locked by the process that computes it, `K.npy` itself by all that use it
(`tlauto.training.arrays` writes them). Only files of such names are ever deleted, and none that a living
process has locked.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto.errors import ConfigError
from tlauto.locks import locked, take

ENGINES = "engines"  # converted networks
KINDS = ("pixels", "features", "prefixes", ENGINES)
CHECKS = "checks"  # what `tlauto doctor` remembers: small, so listed and cleared but never evicted
EVICTION = "eviction.lock"
DEFAULT_LIMIT = 20 * 10**9  # bytes
STALE_S = 86400.0  # an unfinished array is deleted after a day in which nobody went on with it

_ARRAY_FILE = re.compile(r"([0-9a-f]{32})\w*(?:\.\d+)?\.(?:npy|json|part|journal|lock)", re.ASCII)
_CHECK_FILE = re.compile(r"[0-9a-f]{16}\.jsonl\w*", re.ASCII)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?))?b?", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Entry:
    """A cached array, or the checks of one dataset.

    Attributes:
        path: the array's file once it is complete.
        kind: `pixels`, `features`, `prefixes`, `engines` or `checks`.
        files: all its files, sidecar and lock included.
        bytes: of these files now.
        reserved: bytes that it will take when it is complete; `bytes` unless it is unfinished.
        last_used: seconds since the epoch.
        is_complete: False while it is computed, or when the process that did so died.
        images: rows of the array; None when nothing says so.
        backbone: whose features or activations they are; None for other kinds.
    """

    path: Path
    kind: str
    files: tuple[Path, ...]
    bytes: int
    reserved: int
    last_used: float
    is_complete: bool = True
    images: int | None = None
    backbone: str | None = None


@dataclass(frozen=True)
class Cleared:
    """How many entries were deleted, their bytes, and how many were in use and are still there."""

    removed: int
    bytes: int
    kept: int


# --- the limit --------------------------------------------------------------------------------------


def cache_limit() -> int:
    """Bytes that the arrays may take, from `TLAUTO_CACHE_SIZE`; raises ConfigError for a bad value."""
    return size_setting("TLAUTO_CACHE_SIZE", DEFAULT_LIMIT)


def size_setting(variable: str, default: int) -> int:
    """Bytes that an environment variable says, such as `500MB`; raises ConfigError for a bad value."""
    text = os.environ.get(variable)
    if not text:
        return default
    try:
        return parse_size(text)
    except ConfigError as error:
        raise ConfigError(f"{variable}: {error}") from None


def parse_size(text: str) -> int:
    """Bytes of a size such as `500MB` (10^6), `2GiB` (2^30), `1.5 TB` or `1000`; raises ConfigError."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"'{text}' is not a size; write for example 20GB, 500MiB or 1.5TB")
    number, prefix, binary = found.groups()
    power = "kmgt".index(prefix.lower()) + 1 if prefix else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise ConfigError(f"the size '{text}' must be more than zero")
    return size


def format_size(size: float) -> str:
    """A size for people, in decimal units: `1.3 GB`."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 10 else f"{size:.1f} {units[0]}"


def make_room(path: Path, size: int, limit: int) -> None:
    """Delete what was used longest ago until the array at `path`, of `size` bytes, fits the limit.

    What is in use stays, even if the limit cannot be kept then. An array that is larger than the
    limit can never fit: for its sake nothing is deleted, and it goes first once it is not in use.
    Unfinished arrays count as what they will be, and are deleted when nobody went on with them for
    a day. Raises: OSError when the cache cannot be read.
    """
    folder = path.parents[1]
    with locked(folder / EVICTION):  # or two processes would each make room, for both
        others = [entry for entry in _arrays(folder) if entry.path != path]
        others = [entry for entry in others if not (_is_stale(entry) and _tried(entry))]
        if size > limit:
            return
        small = [entry for entry in others if entry.reserved <= limit]
        for entry in others:
            if entry not in small:
                _tried(entry)
        excess = sum(entry.reserved for entry in small) + size - limit
        for entry in sorted(small, key=lambda entry: entry.last_used):
            if excess <= 0:
                break
            if _tried(entry):
                excess -= entry.reserved


# --- what there is ----------------------------------------------------------------------------------


def entries(folder: Path) -> list[Entry]:
    """What lies in the cache folder, last used first; raises ConfigError when it cannot be read."""
    with _explained("read", folder):
        found = [*_arrays(folder), *_checks(folder)]
    # Locks alone are no entry for anybody but `clear`.
    return sorted((entry for entry in found if entry.reserved), key=lambda e: e.last_used, reverse=True)


def is_in_use(entry: Entry) -> bool:
    """Whether a living process computes it or has it mapped; False where files cannot be locked."""
    with contextlib.ExitStack() as stack:
        for file in (entry.path, entry.path.with_suffix(".lock")):
            with contextlib.suppress(OSError):
                if not take(stack.enter_context(file.open("r+b")), wait=False):
                    return True
    return False


def clear(folder: Path, *, older_than_s: float = 0.0) -> Cleared:
    """Delete what is not in use and was last used more than `older_than_s` seconds ago.

    Raises: ConfigError when the cache cannot be read or a file not be deleted.
    """
    before = time.time() - older_than_s
    removed = size = kept = 0
    with _explained("clear", folder):
        for entry in [*_arrays(folder), *_checks(folder)]:
            if older_than_s and entry.last_used > before:
                continue
            is_removed = _remove(entry)
            if entry.reserved:  # else a lock alone
                removed, kept = removed + is_removed, kept + (not is_removed)
                size += entry.bytes * is_removed
        _forget_lock(folder / EVICTION)
    return Cleared(removed, size, kept)


@contextlib.contextmanager
def _explained(verb: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror or error}: '{error.filename}'" if error.filename else str(error)
        raise ConfigError(
            f"cannot {verb} the cache {folder} ({reason}); check TLAUTO_CACHE and its permissions"
        ) from error


def _arrays(folder: Path) -> list[Entry]:
    """Arrays, unfinished ones and locks alone."""
    found = []
    for kind in KINDS:
        groups: dict[str, dict[Path, os.stat_result]] = {}
        for file, status in _files(folder / kind):
            if match := _ARRAY_FILE.fullmatch(file.name):
                groups.setdefault(match[1], {})[file] = status
        found += [_array(folder / kind / f"{key}.npy", files) for key, files in groups.items()]
    return found


def _array(path: Path, files: Mapping[Path, os.stat_result]) -> Entry:
    is_complete = path in files
    facts = _facts(path.with_suffix(".json") if is_complete else _first(files, ".journal"))
    shape, backbone, stated = facts.get("shape"), facts.get("backbone"), facts.get("bytes")
    size = sum(status.st_size for status in files.values())
    dated = [status.st_mtime for file, status in files.items() if file.suffix not in (".lock", ".journal")]
    planned = stated if isinstance(stated, int) and not is_complete else 0
    return Entry(
        path=path,
        kind=path.parent.name,
        files=tuple(files),
        bytes=size,
        reserved=max(size, planned),
        last_used=max(dated, default=0.0),
        is_complete=is_complete,
        images=_images(path, shape),
        backbone=backbone if isinstance(backbone, str) else None,
    )


def _images(path: Path, shape: object) -> int | None:
    """How many images an array has rows of; a converted network is an array of bytes."""
    if path.parent.name == ENGINES or not isinstance(shape, list) or not shape:
        return None
    return shape[0] if isinstance(shape[0], int) else None


def _checks(folder: Path) -> list[Entry]:
    return [
        Entry(file, CHECKS, (file,), status.st_size, status.st_size, status.st_mtime)
        for file, status in _files(folder / CHECKS)
        if _CHECK_FILE.fullmatch(file.name)
    ]


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files of a folder, none when it is missing; those that vanish meanwhile are passed over."""
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            yield folder / name, (folder / name).stat(follow_symlinks=False)


def _first(files: Iterable[Path], suffix: str) -> Path | None:
    return next((file for file in files if file.suffix == suffix), None)


def _facts(file: Path | None) -> Mapping[str, Any]:
    """What a sidecar or the first line of a journal says; empty when it is missing or damaged."""
    if file is None:
        return {}
    try:
        with file.open(encoding="utf-8") as text:
            facts = json.loads(text.readline())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


# --- deleting ---------------------------------------------------------------------------------------


def _is_stale(entry: Entry) -> bool:
    return not entry.is_complete and entry.last_used < time.time() - STALE_S


def _tried(entry: Entry) -> bool:
    """Whether an entry could be deleted; the files of another user stay."""
    try:
        return _remove(entry)
    except OSError:
        return False


def _remove(entry: Entry) -> bool:
    """Delete an entry; False when it is in use."""
    if entry.kind == CHECKS:
        _unlink(entry.files)
        return True
    with contextlib.ExitStack() as stack:
        lock = entry.path.with_suffix(".lock")
        if not stack.enter_context(locked(lock, wait=False)):
            return False
        with contextlib.suppress(FileNotFoundError):
            if not take(stack.enter_context(entry.path.open("r+b")), wait=False):
                return False
        # The lock goes last, and while it is held: whoever waits for it sees that it is gone.
        _unlink([*(file for file in entry.files if file != lock), lock])
    return True


def _forget_lock(lock: Path) -> None:
    if lock.exists():
        with locked(lock, wait=False) as is_held:
            if is_held:
                lock.unlink(missing_ok=True)


def _unlink(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
