"""Where a search is recorded besides its workspace: the contract of trackers.

Standard library and events only.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol, runtime_checkable

from tlauto.events import EpochEnded, SearchEnded, SearchStarted, TrialEnded, TrialStarted


@runtime_checkable
class Recorder(Protocol):
    """One search as a tracker records it; called by one thread, in order.

    Attributes:
        finished: numbers of the trials that are recorded to their end, from earlier runs of the search.
    """

    finished: Collection[int]

    def trial_started(self, event: TrialStarted) -> None:
        """A trial starts; what an earlier run recorded of one with this number, unfinished, is void."""
        ...

    def epoch_ended(self, event: EpochEnded) -> None:
        """An epoch of a trial that started has ended."""
        ...

    def trial_ended(self, event: TrialEnded) -> None:
        """A trial that started has ended; from here on it is among the finished."""
        ...

    def search_ended(self, event: SearchEnded) -> None:
        """The last call: the search is over, or interrupted and may go on in another process."""
        ...


@runtime_checkable
class Tracker(Protocol):
    """A place to record searches in, used where `--track` names it. Must not import torch, ever."""

    name: str

    def check(self, where: str | None) -> None:
        """Raise ConfigError, with what to do, when a library is missing or `where` cannot be right.

        Called before any trial, so it must be quick: it imports no library and connects to nothing.
        """
        ...

    def begin(self, search: SearchStarted, where: str | None) -> Recorder:
        """Start to record a search, or go on with the one of the same `search.id`.

        Args: where: as the user gave it, `--track NAME=WHERE`; None is the tracker's own choice, in
        `search.folder`. Nothing leaves the machine unless `where` says so.
        """
        ...
