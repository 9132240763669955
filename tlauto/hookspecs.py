"""The hooks that a plugin may implement, and the marker it implements them with."""

from __future__ import annotations

import pluggy

from tlauto.contracts import BackboneProvider, FreezeStrategy, TaskHead
from tlauto.executors import Executor
from tlauto.trackers import Tracker

hookspec = pluggy.HookspecMarker("tlauto")
hookimpl = pluggy.HookimplMarker("tlauto")


@hookspec
def backbone_providers() -> list[BackboneProvider]:  # type: ignore[empty-body]
    """Sources of pretrained backbones this plugin offers.

    Called once per process, in the coordinator and again in each worker, so it must not depend on
    state and must not import the provider's library or torch. All answers are kept; two providers
    with one name raise DuplicateNameError. An exception marks the plugin as broken and the rest
    are still asked.
    """


@hookspec
def freeze_strategies() -> list[FreezeStrategy]:  # type: ignore[empty-body]
    """Freezing strategies this plugin offers.

    Called once per process, in the coordinator and again in each worker, so it must not depend on
    state and must not import torch. All answers are kept; two strategies with one name raise
    DuplicateNameError. An exception marks the plugin as broken and the rest are still asked.
    """


@hookspec
def task_heads() -> list[TaskHead]:  # type: ignore[empty-body]
    """Heads this plugin offers.

    Called once per process, in the coordinator and again in each worker, so it must not depend on
    state and must not import torch. All answers are kept; two heads with one name raise
    DuplicateNameError. An exception marks the plugin as broken and the rest are still asked.
    """


@hookspec
def trackers() -> list[Tracker]:  # type: ignore[empty-body]
    """Trackers this plugin offers.

    Called once per process, in the coordinator and again in each worker, so it must not depend on
    state and must not import the tracker's library or torch. A tracker records only where the user
    names it. All answers are kept; two trackers with one name raise DuplicateNameError. An exception
    marks the plugin as broken and the rest are still asked.
    """


@hookspec
def executors() -> list[Executor]:  # type: ignore[empty-body]
    """Executors this plugin offers.

    Called once per process, in the coordinator and again in each worker, so it must not depend on
    state and must not import the executor's library or torch. One is used where the user names it.
    All answers are kept; two executors with one name raise DuplicateNameError. An exception marks the
    plugin as broken and the rest are still asked.
    """
