"""tlauto: the best model that transfer learning can give for a folder of images.

    import tlauto

    search = tlauto.search("./images", trials=30)
    search.best, search.leaderboard()
    tlauto.load(search.model).predict(["photo.jpg"])

Importing this package imports neither torch, keras, timm nor optuna.
"""

from __future__ import annotations

from typing import Any

from tlauto.contracts import (
    Backbone,
    BackboneInfo,
    BackboneProvider,
    FeatureShape,
    FreezeStrategy,
    ImageInput,
    Task,
    TaskHead,
    TrainPlan,
    TrialSpec,
    WeightsOptions,
    WeightsStatus,
)
from tlauto.errors import TlautoError
from tlauto.hookspecs import hookimpl

__all__ = [
    "Backbone",
    "BackboneInfo",
    "BackboneProvider",
    "FeatureShape",
    "FreezeStrategy",
    "ImageInput",
    "Task",
    "TaskHead",
    "TlautoError",
    "TrainPlan",
    "TrialSpec",
    "WeightsOptions",
    "WeightsStatus",
    "hookimpl",
    "load",
    "search",
]

_LAZY = {"search": "tlauto.api", "load": "tlauto.api"}


def __getattr__(name: str) -> Any:
    # `tlauto.search` and `tlauto.load` pull in Optuna and torch: only when asked for.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tlauto' has no attribute '{name}'")
