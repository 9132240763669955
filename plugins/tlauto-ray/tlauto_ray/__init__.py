"""Trials on a Ray cluster: `tlauto search --executor ray --ray-address auto`."""

from __future__ import annotations

import tlauto
from tlauto.executors import Executor
from tlauto_ray.executor import RayExecutor


@tlauto.hookimpl
def executors() -> list[Executor]:
    """Ray."""
    return [RayExecutor()]
