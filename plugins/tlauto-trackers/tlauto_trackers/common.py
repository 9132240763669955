"""What both trackers do alike: whether a library is there, and what values are called."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from tlauto.errors import ConfigError
from tlauto.events import EpochEnded, TrialEnded, TrialStarted
from tlauto.space import Scalar


def require(tracker: str, packages: Mapping[str, str]) -> None:
    """Raise ConfigError when a module (the keys) is not installed; the values are what to install."""
    missing = [package for module, package in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        names = " ".join(missing)
        raise ConfigError(f"--track {tracker} needs {names}; run 'pip install {names}', or leave it out")


def facts_of(event: TrialStarted) -> dict[str, Scalar]:
    """What tells a trial from the others: its parts, why it is run, its parameters."""
    parts = {name: getattr(event, name) for name in ("backbone", "strategy", "head", "purpose", "seed")}
    return {**parts, **event.params}


def curves_of(event: EpochEnded) -> dict[str, float]:
    """What an epoch measured, by name."""
    values = {name: getattr(event, name) for name in ("score", "train_loss", "val_loss", "seconds")}
    return {f"epoch/{name}": value for name, value in values.items() if value is not None}


def results_of(event: TrialEnded) -> dict[str, float]:
    """What a trial as a whole measured, by name; `score` is what it is ranked by, if it has one."""
    score = {} if event.score is None else {"score": event.score}
    return {**score, "seconds": event.seconds, **prefixed("val", event.metrics)}


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics under the part of the images that they were measured on."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
