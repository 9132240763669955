"""Run a program and say what it took: seconds, CPU seconds, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

EVERY_S = 1.0


@dataclass(frozen=True)
class Run:
    """What a program printed and took.

    Attributes:
        started: seconds since the epoch.
        wall_s: from its start to its end.
        cpu_s: user and system time of it and of all its processes that it waited for.
        peak_mib: the largest sum over all its processes of their memory, looked at every second; what
            several share counts once (PSS). None where the system does not tell (only Linux does).
    """

    output: str
    started: float
    wall_s: float
    cpu_s: float
    peak_mib: float | None


def measured(command: Sequence[str], folder: str, env: Mapping[str, str], *, echo: bool = True) -> Run:
    """Run a program to its end in a folder; `env` is added to ours, with BENCH_STARTED.

    With `echo`, what it prints is passed on as it comes, but for the last line. Ends this process with
    a sentence when the program fails.
    """
    print(f"$ {' '.join(command[1:])}", file=sys.stderr, flush=True)
    started = time.time()
    environment = {**os.environ, "TLAUTO_CACHE": str(Path(folder, "cache")), **env}
    environment["BENCH_STARTED"] = repr(started)
    program = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    watch = _Memory(program.pid)
    watch.start()
    assert program.stdout is not None
    lines: list[str] = []
    for line in program.stdout:
        if echo and lines:
            print(lines[-1], end="", file=sys.stderr, flush=True)
        lines.append(line)
    _, status, used = os.wait4(program.pid, 0)
    wall = time.time() - started
    program.returncode = os.waitstatus_to_exitcode(status)
    program.stdout.close()
    watch.stop()
    if program.returncode:
        sys.exit(f"error: '{' '.join(command[1:4])} …' ended with {program.returncode}")
    return Run("".join(lines), started, wall, used.ru_utime + used.ru_stime, watch.peak_mib)


class _Memory(threading.Thread):
    """Looks at a process and those below it until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_mib: float | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(EVERY_S):
            held = sum(memory_mib(pid) for pid in family(self.pid))
            if held:
                self.peak_mib = max(self.peak_mib or 0.0, held)

    def stop(self) -> None:
        self.ended.set()
        self.join()


def family(pid: int) -> list[int]:
    """A process and all below it; only itself where the system does not tell."""
    found = [pid]
    for parent in found:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in _read(file).split()]
    return found


def memory_mib(pid: int) -> float:
    """A process's share of the memory it has; 0 when it has ended or the system does not tell."""
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:  # it has just ended
        return ""
