"""Converted networks kept in the cache, under its size limit and with checksums like all of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from tlauto.training.arrays import cached_array

VERSION = 1  # of what the bytes of a conversion mean


def stored_at(folder: Path, **facts: object) -> Path:
    """Where a conversion lies that these facts decide, in the cache `folder`."""
    known = {**facts, "torch": torch.__version__, "version": VERSION}
    text = json.dumps(known, sort_keys=True)
    return folder / "engines" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"


def stored(path: Path, convert: Callable[[], bytes], *, about: Mapping[str, object]) -> np.ndarray:
    """The conversion (bytes,) uint8 at `path`, converted when it is missing or damaged.

    Raises: whatever `convert` does; ConfigError when the cache cannot be written.
    """
    size = _stated_size(path)
    if size is not None:
        # A ValueError: it is damaged, and the new conversion is of another size.
        with contextlib.suppress(ValueError):
            return _kept(path, size, convert, about)
    made = convert()
    return _kept(path, len(made), lambda: made, about)


def discard(path: Path) -> None:
    """Forget a conversion that is not usable."""
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def _kept(path: Path, size: int, convert: Callable[[], bytes], about: Mapping[str, object]) -> np.ndarray:
    def rows(_first: int) -> Iterator[np.ndarray]:
        yield np.frombuffer(convert(), np.uint8)[None]  # (1, bytes)

    array: np.ndarray = cached_array(path, (1, size), np.uint8, rows, about=about)[0]
    return array


def _stated_size(path: Path) -> int | None:
    """Bytes of the conversion, as its sidecar says; None when there is none that can be read."""
    try:
        rows, size = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["shape"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return size if rows == 1 and isinstance(size, int) and size > 0 and path.exists() else None
