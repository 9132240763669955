"""Arrays computed once and kept on disk, safe when several workers want the same one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tlauto.errors import ConfigError


def cached_array(
    path: Path, shape: tuple[int, ...], dtype: type[np.generic], rows: Callable[[], Iterable[np.ndarray]]
) -> np.ndarray:
    """The `.npy` array at `path` as a copy-on-write memory map, computed on first use.

    Args:
        rows: yields blocks (n, *shape[1:]) that together make up the array, in order.

    A file that is incomplete or of another shape is computed again. Of two workers that want the
    same array, one computes and the other waits. Raises: ConfigError when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(path.with_suffix(".lock")):
            if _open(path, shape, dtype) is None:
                _write(path, shape, dtype, rows())
    except OSError as error:
        raise ConfigError(f"cannot write the cache {path.parent}: {error.strerror or error}") from error
    array = _open(path, shape, dtype)
    if array is None:
        raise ConfigError(f"the cache file {path} was changed by another program; start again")
    os.utime(path)  # the cache evicts what was used longest ago
    return array


def _open(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> np.ndarray | None:
    try:
        # "c": writable in memory only, so torch.from_numpy takes it without copying or warning.
        array: np.ndarray = np.load(path, mmap_mode="c", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):  # missing, foreign or truncated
        return None
    is_complete = path.stat().st_size >= array.nbytes
    return array if is_complete and array.shape == shape and array.dtype == dtype else None


def _write(path: Path, shape: tuple[int, ...], dtype: type[np.generic], rows: Iterable[np.ndarray]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        # Written as a stream, not through a memory map: a full disk is then an error, not a crash.
        with os.fdopen(descriptor, "wb") as file:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            count = 0
            for block in rows:
                file.write(np.ascontiguousarray(block, dtype=dtype).data)
                count += len(block)
        if count != shape[0]:
            raise ValueError(f"{count} rows were computed for an array of {shape[0]}")
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Hold a lock file; where the file system has no locks, both workers compute, harmlessly."""
    with lock.open("ab") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
