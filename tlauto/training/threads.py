"""How many threads small sums are worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**23
"""Multiply-adds of a step, about a millisecond's, up to which one thread does it. To wake and await
others takes as long, and many times that when something else runs on their cores."""


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """One arithmetic thread while steps of so many multiply-adds are small, else those of the worker."""
    before = torch.get_num_threads()
    if work > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
