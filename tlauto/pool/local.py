"""Worker processes on this machine, one a slot, kept alive between trials."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tlauto.devices import Slot
from tlauto.pool.base import Event
from tlauto.pool.protocol import Message, Stop, decode, encode

LOG_TAIL_BYTES = 4000


@dataclass
class _Worker:
    process: subprocess.Popen[str]
    log: Path
    generation: int
    log_start: int
    reader: threading.Thread | None = None


class LocalPool:
    """Starts a worker process on a slot's first job and replaces it after it died.

    One thread a worker reads its pipe into a queue, so that waiting needs no polling and works on
    every platform.
    """

    def __init__(self, slots: Sequence[Slot], *, logs: Path, env: dict[str, str] | None = None) -> None:
        """Args: logs: folder for the workers' logs; env: further variables for every worker."""
        self._slots = {slot.name: slot for slot in slots}
        self._logs = logs
        self._env = env or {}
        self._workers: dict[str, _Worker] = {}
        self._events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        self._generation = 0

    @property
    def slots(self) -> Sequence[str]:
        """Names of the slots."""
        return tuple(self._slots)

    def send(self, slot: str, message: Message) -> None:
        """Write a line to the slot's worker, starting one when there is none."""
        worker = self._workers.get(slot) or self._start(slot)
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(encode(message) + "\n")
            worker.process.stdin.flush()
        except (BrokenPipeError, OSError):
            # It died a moment ago: its reader thread tells, with the exit code.
            return

    def wait(self, timeout_s: float) -> list[Event]:
        """Events since the last call, at least one unless the time runs out first."""
        events = []
        try:
            pair = self._events.get(timeout=max(0.0, timeout_s))
            while True:
                if self._is_current(pair):
                    events.append(self._settle(pair[1]))
                pair = self._events.get_nowait()
        except queue.Empty:
            return events

    def kill(self, slot: str) -> None:
        """End the slot's worker now."""
        worker = self._workers.pop(slot, None)
        if worker:
            worker.process.kill()
            _reap(worker)

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
        log = self._logs / f"worker-{name.replace(':', '-')}.log"
        self._generation += 1
        with log.open("ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "tlauto.worker", slot.device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **slot.env, **self._env},
                start_new_session=True,  # Ctrl-C is for the coordinator, which decides what stops
            )
            worker = _Worker(process, log, self._generation, errors.tell())
        self._workers[name] = worker
        worker.reader = threading.Thread(target=self._read, args=(name, worker), daemon=True)
        worker.reader.start()
        return worker

    def _read(self, slot: str, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self._events.put((worker.generation, Event(slot, decode(line))))
        code = worker.process.wait()
        self._events.put((worker.generation, Event(slot, None, code, _tail(worker))))

    def _is_current(self, pair: tuple[int, Event]) -> bool:
        worker = self._workers.get(pair[1].slot)
        return worker is not None and worker.generation == pair[0]

    def _settle(self, event: Event) -> Event:
        if event.message is None:
            _reap(self._workers.pop(event.slot))
        return event


def _reap(worker: _Worker) -> None:
    """Wait for a process that is ending, and close its pipes."""
    worker.process.wait()
    if worker.reader:
        worker.reader.join(timeout=2.0)  # a grandchild may hold the pipe open
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
