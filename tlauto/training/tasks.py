"""The task of a trial, by name."""

from __future__ import annotations

from tlauto.contracts import Task


def find_task(name: str) -> Task:
    """The built-in task of that name; raises UnknownNameError."""
    from tlauto.builtin.tasks import task

    return task(name)
