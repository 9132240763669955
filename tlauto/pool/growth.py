"""When a worker that holds more and more memory is to be replaced."""

from __future__ import annotations

from dataclasses import dataclass

from tlauto.caches import size_setting

VARIABLE = "TLAUTO_WORKER_GROWTH"
DEFAULT = 1_000_000_000
"""Bytes that a worker may hold beyond its first trials: what libraries that come in later take, and more."""

FIRST = 3
"""Trials after which a worker's level is known: the libraries are there, its backbones' facts too."""


@dataclass
class Growth:
    """What a worker held after its trials, between which it should hold about the same.

    Attributes:
        most: bytes that it may hold beyond its level.
        level: the most that it held after its first trials.
    """

    most: int
    level: int = 0
    trials: int = 0

    @property
    def is_early(self) -> bool:
        """Whether the trial at hand is one of the first, which set the level."""
        return self.trials < FIRST

    def note(self, held: int) -> None:
        """Take note of the bytes held after a trial."""
        if self.is_early:
            self.level = max(self.level, held)
        self.trials += 1

    def is_too_much(self, held: int) -> bool:
        """Whether so many bytes are more than a worker should hold."""
        return not self.is_early and held > self.level + self.most


def growth_here() -> Growth:
    """For this process; raises ConfigError when TLAUTO_WORKER_GROWTH is no size."""
    return Growth(size_setting(VARIABLE, DEFAULT))
