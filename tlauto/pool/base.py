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
        exitcode: how it ended, negative for a signal; None when its machine is gone and nobody knows.
        log_tail: the last lines of its log when it ended, or had to be replaced after what it said.
        hung: why it was taken to stand still and killed; empty when it ended by itself.
    """

    slot: str
    message: Message | None
    exitcode: int | None = None
    log_tail: str = ""
    hung: str = ""

    @property
    def ending(self) -> str:
        """How the worker ended, as a sentence."""
        if self.hung:
            return f"the worker process {self.hung}"
        code = self.exitcode
        if code is None:
            return "the worker process was lost with its machine"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"the worker process ended with {how}"


class Pool(Protocol):
    """Workers, one a slot. Every method returns at once except `wait`.

    A worker whose trial ran out of memory or lost its device is replaced, and so is one that stands still
    or says that its memory has grown.
    """

    @property
    def slots(self) -> Sequence[str]:
        """Names of the slots that can take a job.

        They may change where machines come and go, and for a while there may be none: then `wait` goes on
        until there are some again, and raises TlautoError when it has waited long enough.
        """
        ...

    @property
    def device(self) -> str:
        """What torch calls the device of every slot: `cpu`, `cuda` or `mps`."""
        ...

    def warm_up(self, slots: Sequence[str]) -> None:
        """Start the workers of these slots that have none, so that they are up when their first job comes.

        A pool may leave it to `send`. One that ends before it had a job is told of like any other.
        """
        ...

    def send(self, slot: str, message: Message) -> None:
        """Give a worker a job or an answer; starts or replaces the worker when there is none."""
        ...

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits for the first event at most so long."""
        ...

    def kill(self, slot: str) -> str:
        """End a worker at once and return the last lines of its log; no event tells of it."""
        ...

    def close(self, *, grace_s: float = 1.0) -> None:
        """End all workers: those that are idle by themselves, the rest by force after `grace_s`."""
        ...
