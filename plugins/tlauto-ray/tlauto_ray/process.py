"""A worker on another machine, as the pool sees it: like a process of this one."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tlauto.devices import Slot
from tlauto_ray.place import Place


class RemoteProcess:
    """The worker of a place. Text goes to its actor and comes from there; no call waits but `wait`.

    It is also the worker's input and output, of which the pool uses `write`, `flush`, `close` and iteration.
    """

    pid = 0
    """Of no meaning here."""

    def __init__(self, place: Place, number: int, slot: Slot, *, log: Path, env: Mapping[str, str]) -> None:
        self.place = place
        self._actor, self._number = place.actor, number
        self._code: int | None = None
        self._has_ended = threading.Event()
        self._tell("start", slot, str(log), dict(env))

    @property
    def stdin(self) -> RemoteProcess:
        """Itself."""
        return self

    @property
    def stdout(self) -> RemoteProcess:
        """Itself."""
        return self

    @property
    def has_ended(self) -> bool:
        """Whether it is known to have ended."""
        return self._has_ended.is_set()

    def write(self, text: str, /) -> None:
        """Send text to the worker; if it is gone, iteration ends."""
        self._tell("write", text)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open here."""

    def __iter__(self) -> Iterator[str]:
        import ray

        read = self._actor.read.options(concurrency_group="out")
        while self._code is None:
            try:
                lines, self._code = ray.get(read.remote(self._number))
            except Exception:  # noqa: BLE001 the actor or its node is gone, or the cluster
                self.place.end()
                break
            yield from lines
        self._has_ended.set()

    def wait(self, timeout: float | None = None) -> int | None:
        """Its exit code; None when it was lost with its node."""
        if not self._has_ended.wait(timeout):
            raise subprocess.TimeoutExpired("tlauto.worker", timeout or 0.0)
        return self._code

    def kill(self) -> None:
        """End it by force."""
        self._actor.kill.remote(self._number)

    def _tell(self, method: str, *args: Any) -> None:
        # One thread of the actor's does these, so they are done in order.
        getattr(self._actor, method).options(concurrency_group="in").remote(self._number, *args)
