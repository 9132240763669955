"""Every error tlauto raises on purpose.

    TlautoError
      ConfigError            a flag or value is impossible, or differs from the stored search
      DataError              unreadable or unusable dataset; names the path
      PluginError            .plugin is the distribution's name
        PluginLoadError
        DuplicateNameError
        UnknownNameError     offers the closest match
      WeightsError           weights missing or wrong; says where they were looked for
      StoreError             not ours, newer schema, locked by another coordinator
      TrialError             this trial failed, the search goes on
        WorkerDied           .exitcode
        Hung                 the worker gave no sign of life, or of work
        DeviceLost           the GPU's context is gone, and with it the worker
        OutOfMemory          .bytes
        Diverged             .epoch
        TrialTimeout

Every message says what is wrong, where, and what to do next, in one sentence or two. The command
line prints it without a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TlautoError(Exception):
    """Base of all errors that tlauto raises on purpose; its text is meant for the user."""


class ConfigError(TlautoError):
    """A flag or value is impossible, or differs from what the stored search says."""


class DataError(TlautoError):
    """The dataset cannot be read or used; the message names the path."""


class PluginError(TlautoError):
    """A plugin is at fault; `plugin` is its distribution's name."""

    def __init__(self, message: str, *, plugin: str = "") -> None:
        super().__init__(message)
        self.plugin = plugin


class PluginLoadError(PluginError):
    """A plugin could not be imported, registered or asked."""


class DuplicateNameError(PluginError):
    """Two plugins offer the same name."""


class UnknownNameError(PluginError):
    """Nothing of that name exists; the message offers the closest match."""


class WeightsError(TlautoError):
    """Pretrained weights are missing, unreadable or of another architecture."""


class StoreError(TlautoError):
    """The workspace database is not ours, too new, damaged or in use by another coordinator."""


class TrialError(TlautoError):
    """One trial failed; the search goes on. `kind` is the short name stored with the trial."""

    kind = "error"


class WorkerDied(TrialError):
    """The worker process ended while it ran the trial."""

    kind = "worker died"

    def __init__(self, message: str, *, exitcode: int | None = None) -> None:
        super().__init__(message)
        self.exitcode = exitcode


class Hung(TrialError):
    """The worker process stood still and was killed."""

    kind = "hung"


class DeviceLost(TrialError):
    """The device failed the process, which can use it no more; another process may."""

    kind = "device lost"


class OutOfMemory(TrialError):
    """The trial needed more memory than the device has; `bytes` is what it asked for last, if known."""

    kind = "out of memory"

    def __init__(self, message: str, *, bytes: int | None = None) -> None:
        super().__init__(message)
        self.bytes = bytes


class Diverged(TrialError):
    """The loss became infinite or not a number."""

    kind = "diverged"

    def __init__(self, message: str, *, epoch: int) -> None:
        super().__init__(message)
        self.epoch = epoch


class TrialTimeout(TrialError):
    """The trial took longer than allowed."""

    kind = "timeout"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause "; did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
