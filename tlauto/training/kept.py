"""What trials on the same features compute alike, kept in the worker from one to the next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

LIMIT = 2**28
"""Bytes of all that is kept: a fraction of what Python and PyTorch take themselves."""

T = TypeVar("T")

_all: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
_lock = threading.Lock()  # an abandoned worker of `--workers 0` may still be at it


def kept(key: Hashable, make: Callable[[], T], size: Callable[[T], int | None]) -> T:
    """What `make` gives, or gave for the same key in an earlier trial of this process.

    It must follow from the key alone, to the bit: else a trial's result would depend on those before it.
    What was used longest ago is dropped where all together take more than `LIMIT`.

    Args:
        key: None is never kept.
        size: bytes of what `make` gave; None when it must not be kept.
    """
    with _lock:
        if key in _all:
            _all.move_to_end(key)
            found: T = _all[key][0]
            return found
    made = make()
    taken = size(made)
    if key is not None and taken is not None and taken <= LIMIT:
        with _lock:
            _all[key] = made, taken
            while sum(each for _, each in _all.values()) > LIMIT:
                _all.popitem(last=False)
    return made


def forget() -> None:
    """Drop all of it."""
    with _lock:
        _all.clear()
