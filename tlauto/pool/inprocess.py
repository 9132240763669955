"""One worker inside the coordinator's process (`--workers 0`), so that a debugger can step in."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Mapping, Sequence

from tlauto.devices import Slot
from tlauto.pool.base import Event
from tlauto.pool.protocol import Message, Stop


class InProcessPool:
    """Runs the worker in a thread. It cannot be killed: closing waits for the trial's next epoch.

    Args:
        env: variables of this process until the pool is closed; then they are what they were before.
    """

    def __init__(self, slot: Slot, *, env: Mapping[str, str] | None = None) -> None:
        self._slot = slot
        self._before = {name: os.environ.get(name) for name in {**slot.env, **(env or {})}}
        os.environ.update(env or {})
        for name, value in slot.env.items():
            os.environ.setdefault(name, value)
        self._jobs: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def slots(self) -> Sequence[str]:
        """The one slot's name."""
        return (self._slot.name,)

    @property
    def device(self) -> str:
        """What torch calls its device."""
        return self._slot.device

    def warm_up(self, slots: Sequence[str]) -> None:
        """Leave it to the first job: this process is up."""

    def send(self, slot: str, message: Message) -> None:
        """Queue a job or an answer."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, daemon=True)
            self._thread.start()
        self._jobs.put(message)

    def wait(self, timeout_s: float) -> list[Event]:
        """Events since the last call, at least one unless the time runs out first."""
        events = []
        try:
            events.append(self._events.get(timeout=max(0.0, timeout_s)))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def kill(self, slot: str) -> str:
        """Abandon the thread: Python cannot end it. The next job gets a new one. There is no log."""
        self._jobs.put(Stop())
        self._jobs, self._events, self._thread = queue.SimpleQueue(), queue.SimpleQueue(), None
        return ""

    def close(self, *, grace_s: float = 1.0) -> None:
        """Ask the worker to stop and wait for it a moment."""
        if self._thread is not None:
            self._jobs.put(Stop())
            self._thread.join(grace_s)
            self._thread = None
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _serve(self) -> None:
        from tlauto.worker import serve

        jobs, events = self._jobs, self._events
        serve(jobs.get, lambda message: events.put(Event(self._slot.name, message)), self._slot.device)
