"""tlauto: the best model that transfer learning can give for a folder of images.

    import tlauto

    search = tlauto.search("./images", trials=30)
    search.best, search.leaderboard()
    tlauto.load(search.model).predict(["photo.jpg"])

Importing this package imports neither torch, keras, timm nor optuna.
"""

TYPE_CHECKING = False  # as type checkers take it; importing `typing` would take longer than all else here
if TYPE_CHECKING:
    from tlauto.api import load, search
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

_ELSEWHERE = {"search": "api", "load": "api", "TlautoError": "errors", "hookimpl": "hookspecs"}


def __getattr__(name: str) -> object:
    # Only when asked for: `search` and `load` pull in Optuna and torch, and a command that is stopped
    # while it starts should have little left to import that nobody watches.
    if name not in __all__:
        raise AttributeError(f"module 'tlauto' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"tlauto.{_ELSEWHERE.get(name, 'contracts')}"), name)
