"""Signs of life: when a worker gives them, and when it is taken to stand still."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tlauto.config import parse_seconds
from tlauto.errors import ConfigError

BEAT_S = 5.0
VARIABLE = "TLAUTO_SILENCE"


@dataclass
class Limits:
    """How long a worker may stand still.

    Attributes:
        silence_s: without a word. Another thread than the one that works speaks, so this is a process
            that was stopped, or native code that lets no other thread run. Loading a large library does
            that too: seconds, tens of them from a cold network drive or beside a full machine.
        start_s: with signs of life, but none of work, since the job began: weights may have to be
            downloaded, a large array checked, a network converted.
        stall_s, stall_factor: the same once there was work: so long, or so many times the longest pause
            that any worker of the pool came back from. Between two signs of work lies a batch or a
            step, which takes seconds.
        longest_s: that pause.
    """

    silence_s: float = 300.0
    start_s: float = 3600.0
    stall_s: float = 600.0
    stall_factor: float = 20.0
    longest_s: float = 0.0


def limits_here() -> Limits:
    """The limits for this machine; raises ConfigError when TLAUTO_SILENCE is no duration."""
    given = os.environ.get(VARIABLE)
    if not given:
        return Limits()
    try:
        return Limits(silence_s=parse_seconds(given))
    except ConfigError as error:
        raise ConfigError(f"{VARIABLE}: {error}") from None


def beat_every() -> float:
    """Seconds between two signs of life of a worker: several within the limit."""
    return min(BEAT_S, limits_here().silence_s / 4)


@dataclass
class Watch:
    """What is known of a worker's life; time passes by `passed` alone.

    Attributes:
        done: its count at the last sign of life; None before a job's first, which may count earlier work.
        silent_s, idle_s: since it last said anything, and since it last did anything.
    """

    limits: Limits
    done: int | None = None
    is_busy: bool = False
    has_worked: bool = False
    silent_s: float = 0.0
    idle_s: float = 0.0

    def begin(self) -> None:
        """A job was sent."""
        self.is_busy, self.has_worked, self.done = True, False, None
        self.silent_s = self.idle_s = 0.0

    def end(self) -> None:
        """The job is over."""
        self.is_busy = False

    def heard(self, done: int | None = None) -> None:
        """It said something; a sign of life says how much is `done`."""
        self.silent_s = 0.0
        has_counted = done is not None and self.done not in (None, done)
        self.done = self.done if done is None else done
        if has_counted and self.has_worked:
            self.limits.longest_s = max(self.limits.longest_s, self.idle_s)
        if has_counted or done is None:
            self.idle_s = 0.0
        self.has_worked = self.has_worked or has_counted

    def passed(self, seconds: float) -> str:
        """Let time pass; why the worker is taken to stand still, empty when it is not."""
        if not self.is_busy:
            return ""
        self.silent_s += seconds
        self.idle_s += seconds
        if self.silent_s > self.limits.silence_s:
            return f"gave no sign of life for {self.limits.silence_s:.0f} s and was killed"
        most = max(self.limits.stall_s, self.limits.stall_factor * self.limits.longest_s)
        if not self.has_worked:
            most = max(self.limits.start_s, most)
        if self.idle_s > most:
            return f"did nothing for {most:.0f} s and was killed"
        return ""
