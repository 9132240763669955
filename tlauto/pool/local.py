"""Worker processes on this machine, one a slot, kept alive between trials."""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tlauto.caches import format_size
from tlauto.contracts import TrialFailed
from tlauto.devices import Slot
from tlauto.errors import DeviceLost, OutOfMemory
from tlauto.pool.base import Event
from tlauto.pool.beats import Limits, Watch, limits_here
from tlauto.pool.growth import growth_here
from tlauto.pool.protocol import ENDS, JOBS, Beat, Grown, Message, Note, Stop, decode, encode

LOG_TAIL_BYTES = 4000

SPOILING = (OutOfMemory.kind, DeviceLost.kind)
"""Failures that leave their mark on a process: memory in pieces, a context that is gone."""

LOOK_S = 5.0
"""Most that the workers' clocks move on between two looks at them. When this process stood still for
longer, stopped or asleep, they may have spoken all the while."""

REAP_S = 5.0
"""How long a killed process is waited for. One that hangs in a driver goes when the kernel lets it."""


class Input(Protocol):
    """Where a worker reads its jobs."""

    def write(self, text: str, /) -> object:
        """Write what `flush` will send."""
        ...

    def flush(self) -> object:
        """Send what was written; raises OSError when the worker is gone."""
        ...

    def close(self) -> object:
        """Tell the worker that nothing more will come."""
        ...


class Output(Protocol):
    """What a worker says."""

    def __iter__(self) -> Iterator[str]: ...

    def close(self) -> object:
        """Listen no more."""
        ...


class Process(Protocol):
    """A worker's process: what a pool uses of `subprocess.Popen`, so that it may run elsewhere."""

    @property
    def pid(self) -> int:
        """Its id on its machine."""
        ...

    @property
    def stdin(self) -> Input | None:
        """Jobs and answers, a line of JSON each."""
        ...

    @property
    def stdout(self) -> Output | None:
        """Messages, a line of JSON each, to the end of the process."""
        ...

    def wait(self, timeout: float | None = None) -> int | None:
        """How it ended, None when nobody knows; raises subprocess.TimeoutExpired."""
        ...

    def kill(self) -> None:
        """End it by force."""
        ...


Launch = Callable[[Slot, Path], Process]
"""Starts the worker of a slot, which appends what libraries print to a log file."""


def start_process(slot: Slot, log: Path, *, env: Mapping[str, str]) -> subprocess.Popen[str]:
    """Start the worker of a slot on this machine; `env` goes over the slot's variables."""
    with log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "tlauto.worker", slot.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            encoding="utf-8",
            env={**os.environ, **slot.env, **env},
            start_new_session=True,  # Ctrl-C is for the coordinator, which decides what stops
        )


@dataclass
class _Worker:
    process: Process
    log: Path
    generation: int
    log_start: int
    watch: Watch
    has_grown: bool = False
    reader: threading.Thread | None = None


class LocalPool:
    """Starts a worker process on a slot's first job, or before it, and replaces it after it died.

    One thread a worker reads its pipe into a queue, so that waiting needs no polling and works on
    every platform.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        *,
        logs: Path,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        launch: Launch | None = None,
    ) -> None:
        """Watch over workers that `send` will start.

        Raises: ConfigError for a wrong TLAUTO_SILENCE or TLAUTO_WORKER_GROWTH.

        Args:
            logs: folder for the workers' logs.
            env: further variables for every worker.
            limits: how long a worker may stand still.
            launch: starts a worker's process; by default on this machine.
        """
        growth_here()  # a worker that cannot read it would end with a traceback
        self._limits = limits or limits_here()
        self._looked = time.monotonic()
        self._slots = {slot.name: slot for slot in slots}
        self._logs = logs
        self._launch = launch or functools.partial(start_process, env=env or {})
        self._workers: dict[str, _Worker] = {}
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._generation = 0

    @property
    def slots(self) -> Sequence[str]:
        """Names of the slots."""
        return tuple(self._slots)

    @property
    def device(self) -> str:
        """What torch calls the device of the slots, which are of one kind."""
        return next(iter(self._slots.values())).device

    def warm_up(self, slots: Sequence[str]) -> None:
        """Start the workers of these slots that have none; importing PyTorch takes them seconds."""
        for slot in slots:
            if slot not in self._workers:
                self._start(slot)

    def send(self, slot: str, message: Message) -> None:
        """Write a line to the slot's worker, starting one when there is none."""
        worker = self._workers.get(slot) or self._start(slot)
        if isinstance(message, JOBS):
            worker.watch.begin()
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(encode(message) + "\n")
            worker.process.stdin.flush()
        except (BrokenPipeError, OSError):
            # It died a moment ago: its reader thread tells, with the exit code.
            return

    def wait(self, timeout_s: float) -> list[Event]:
        """Events since the last call, at least one unless the time runs out first."""
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            events = [*self._said(max(0.0, left)), *self._standing()]
            if events or left <= 0:
                return events

    def kill(self, slot: str) -> str:
        """End the slot's worker now."""
        worker = self._workers.pop(slot, None)
        if worker is None:
            return ""
        worker.process.kill()
        _reap(worker)
        return _tail(worker)

    def pid(self, slot: str) -> int | None:
        """The process id of a slot's worker, if it has one."""
        return self._workers[slot].process.pid if slot in self._workers else None

    def close(self, *, grace_s: float = 1.0) -> None:
        """Ask all workers to stop, then make them."""
        for slot in self._workers:
            self.send(slot, Stop())
        deadline = time.monotonic() + grace_s
        for slot, worker in list(self._workers.items()):
            try:
                worker.process.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
            _reap(worker)
            del self._workers[slot]

    def _start(self, name: str) -> _Worker:
        slot = self._slots[name]
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"worker-{name.replace(':', '-').replace('/', '-')}.log"
        self._generation += 1
        said = log.stat().st_size if log.exists() else 0
        worker = _Worker(self._launch(slot, log), log, self._generation, said, Watch(self._limits))
        self._workers[name] = worker
        worker.reader = threading.Thread(target=self._read, args=(name, worker), daemon=True)
        worker.reader.start()
        return worker

    def _read(self, slot: str, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        hung = ""
        for line in worker.process.stdout:
            try:
                self._events.put((worker.generation, Event(slot, decode(line))))
            except (ValueError, TypeError):
                if line.endswith("\n"):  # else the last words of a process that was killed
                    hung = (
                        "says what this tlauto does not understand (was it updated meanwhile?) and was killed"
                    )
                    worker.process.kill()
                    break
        code = worker.process.wait()
        self._events.put((worker.generation, Event(slot, None, code, _tail(worker), hung)))

    def _said(self, timeout_s: float) -> list[Event]:
        """What workers said, signs of life apart; waits for the first word at most so long."""
        events = []
        with contextlib.suppress(queue.Empty):
            pair = self._events.get(timeout=timeout_s)
            while True:
                event = self._settle(pair[1]) if self._is_current(pair) else None
                if event:
                    events.append(event)
                pair = self._events.get_nowait()
        return events

    def _standing(self) -> list[Event]:
        """Kill the workers that stand still, and say so."""
        now = time.monotonic()
        passed, self._looked = min(now - self._looked, LOOK_S), now
        events = []
        for slot, worker in list(self._workers.items()):
            reason = worker.watch.passed(passed)
            if reason:
                events.append(Event(slot, None, log_tail=self.kill(slot), hung=reason))
        return events

    def _is_current(self, pair: tuple[int, Event]) -> bool:
        worker = self._workers.get(pair[1].slot)
        return worker is not None and worker.generation == pair[0]

    def _settle(self, event: Event) -> Event | None:
        """The event as others are to see it, None for a sign of life."""
        worker, message = self._workers[event.slot], event.message
        if message is None:
            _reap(self._workers.pop(event.slot))
            return event
        if isinstance(message, Beat):
            worker.watch.heard(message.work)
            return None
        worker.watch.heard()
        if isinstance(message, Grown):
            worker.has_grown = True
            return replace(event, message=Note(_said_of(message, event.slot)))
        is_over = isinstance(message, ENDS)
        if is_over:
            worker.watch.end()
        if isinstance(message, TrialFailed) and message.kind in SPOILING:
            return replace(event, log_tail=self.kill(event.slot))
        if is_over and worker.has_grown:
            self.kill(event.slot)
        return event


def _said_of(grown: Grown, slot: str) -> str:
    return (
        f"the worker on {slot} held {format_size(grown.held)} of memory after a trial, and "
        f"{format_size(grown.level)} after its first; a new one takes its place"
    )


def _reap(worker: _Worker) -> None:
    """Wait for a process that is ending, and close its pipes."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.process.wait(timeout=REAP_S)
    if worker.reader:
        worker.reader.join(timeout=2.0)
        if worker.reader.is_alive():
            return  # a grandchild holds the pipe open, and closing it would wait for the reader
    assert worker.process.stdin is not None
    assert worker.process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # a last line that it never read
        worker.process.stdin.close()
    worker.process.stdout.close()


def _tail(worker: _Worker) -> str:
    """The last lines that this worker wrote."""
    try:
        with worker.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(worker.log_start, size - LOG_TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
