"""The executors that come with tlauto: worker processes on this machine, and none at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tlauto.devices import make_slots
from tlauto.executors import Executor, Wanted
from tlauto.hookspecs import hookimpl

if TYPE_CHECKING:
    from tlauto.pool.base import Pool


class Local:
    """Worker processes on this machine, one a slot."""

    name = "local"
    options: tuple[str, ...] = ()

    def check(self, wanted: Wanted) -> None:
        """Raise ConfigError for a device that this machine does not have."""
        make_slots(wanted.devices, wanted.workers, per_device=wanted.per_device)

    def open(self, wanted: Wanted) -> Pool:
        """Workers that start with their first jobs."""
        from tlauto.pool.local import LocalPool

        slots = make_slots(wanted.devices, wanted.workers, per_device=wanted.per_device)
        return LocalPool(slots, logs=wanted.folder / "logs", env=wanted.env, limits=wanted.limits)


class InProcess(Local):
    """One worker in the coordinator's process, for a debugger (`--workers 0`)."""

    name = "in-process"

    def open(self, wanted: Wanted) -> Pool:
        """A worker on a thread that starts with its first job."""
        from tlauto.pool.inprocess import InProcessPool

        return InProcessPool(make_slots(wanted.devices, 1)[0], env=wanted.env)


@hookimpl
def executors() -> list[Executor]:
    """Processes on this machine, and this process."""
    return [Local(), InProcess()]
