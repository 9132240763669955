"""Signs of work: a count that whatever takes long moves on.

A process that is stuck in native code still answers in its other threads; only such a count tells it
from one that is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class _Pulse:
    done = 0
    waits = 0


def tick() -> None:
    """Note that a piece of work is done: a batch, a block, a step."""
    _Pulse.done += 1


def reading() -> int:
    """The count so far, of which only changes mean anything."""
    if _Pulse.waits:
        tick()
    return _Pulse.done


@contextmanager
def waiting() -> Iterator[None]:
    """Wait within the block for another process, which is watched itself: that counts as work."""
    _Pulse.waits += 1
    try:
        yield
    finally:
        _Pulse.waits -= 1
