"""What the scripts that `anytime.py` compares have in common: a clock that can stand, and a curve of scores.

Standard library only: some of them run in environments without tlauto.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


class Clock:
    """Seconds since this process was started, without those in which the clock stood still.

    Who starts the process says when that was, in seconds since the epoch, in BENCH_STARTED, so that
    imports count; without it, the clock starts when it is made.

    Attributes:
        stood, stood_cpu: wall and CPU seconds in which it stood.
    """

    def __init__(self) -> None:
        self.started = float(os.environ.get("BENCH_STARTED") or time.time())
        self.stood = 0.0
        self.stood_cpu = 0.0

    def now(self) -> float:
        return time.time() - self.started - self.stood

    def stand(self, work: Callable[[], Result]) -> Result:
        """What some work returns, its seconds not counted."""
        before, cpu = time.time(), cpu_seconds()
        result = work()
        self.stood += time.time() - before
        self.stood_cpu += cpu_seconds() - cpu
        return result


class Curve:
    """Each new best by validation: when it was there, its scores, and which test images it gets right.

    Attributes:
        rows: seconds, validation and test accuracy.
        right: for each row a digit an image of the test part, in the split's order: 1 is right.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rows: list[list[float]] = []
        self.right: list[str] = []

    def offer(self, val: float, test: Callable[[], Sequence[bool]]) -> bool:
        """Take a model that there is now, tested with the clock stopped, if it is the best so far."""
        if self.rows and val <= self.rows[-1][1]:
            return False
        seconds = round(self.clock.now(), 1)
        right = [bool(one) for one in self.clock.stand(test)]
        self.rows.append([seconds, float(val), sum(right) / len(right)])
        self.right.append("".join("01"[one] for one in right))
        return True

    def facts(self) -> dict[str, object]:
        """What a script prints of it; CPU seconds of the tests are those of ended child processes too."""
        stood = {"stood_s": self.clock.stood, "stood_cpu_s": self.clock.stood_cpu}
        return {"curve": self.rows, "right": self.right, **stood}


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
