"""What the coordinator sees of its workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tlauto.pool.protocol import Message


@dataclass(frozen=True)
class Event:
    """Something a worker said, or that it ended.

    Attributes:
        slot: the slot's name.
        message: what it said; None when the worker ended.
        exitcode: how it ended, negative for a signal.
        log_tail: the last lines of its log when it ended.
    """

    slot: str
    message: Message | None
    exitcode: int | None = None
    log_tail: str = ""


class Pool(Protocol):
    """Workers, one a slot. Every method returns at once except `wait`."""

    @property
    def slots(self) -> Sequence[str]:
        """Names of the slots."""
        ...

    def send(self, slot: str, message: Message) -> None:
        """Give a worker a job or an answer; starts or replaces the worker when there is none."""
        ...

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits for the first event at most so long."""
        ...

    def kill(self, slot: str) -> None:
        """End a worker at once; no event tells of it."""
        ...

    def close(self, *, grace_s: float = 1.0) -> None:
        """End all workers: those that are idle by themselves, the rest by force after `grace_s`."""
        ...
