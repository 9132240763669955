"""Where the trials of a search run: the contract of executors.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from tlauto.pool.base import Pool
    from tlauto.pool.beats import Limits


@dataclass(frozen=True)
class Wanted:
    """What a search wants of an executor.

    Attributes:
        folder: of the study. Workers read and write in it; their logs go to `logs/` there.
        cache: folder of decoded images and features, which are made anew where there are none.
        devices, workers, per_device: as the user gave them (`--devices`, `--workers`, `--per-device`).
        options: the executor's own (`--executor-option NAME=VALUE`).
        shared: images and weights, which workers find at the same paths as the coordinator.
        env: further variables for every worker.
        limits: how long a worker may stand still; None is what this machine's environment says.
    """

    folder: Path
    cache: Path
    devices: str = "auto"
    workers: int | None = None
    per_device: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    shared: tuple[Path, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None


@runtime_checkable
class Executor(Protocol):
    """A place where trials run, used where `--executor` names it. Must not import torch, ever."""

    name: str
    options: tuple[str, ...]

    def check(self, wanted: Wanted) -> None:
        """Raise ConfigError, with what to do, when a library is missing or a wish cannot be met.

        Called before the images are read, so it must be quick: it imports no library and connects to
        nothing. `wanted.folder` is still the workspace, and `wanted.options` has names of `options` only.
        """
        ...

    def open(self, wanted: Wanted) -> Pool:
        """Start what runs workers, or connect to it, and return the workers, at least one slot of them.

        Raises: TlautoError of the fitting kind; nothing is left running then.
        """
        ...
