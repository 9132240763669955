"""Counts in sentences."""

from __future__ import annotations


def counted(count: int, one: str, many: str | None = None) -> str:
    """A count with its noun: "1 file", "2 files"."""
    return f"{count} {one if count == 1 else many or one + 's'}"
