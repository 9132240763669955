"""Heads that read several backbones at once: which others beside a trial's own, and when they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from tlauto.contracts import TrialSpec
from tlauto.recipe import beside
from tlauto.space import number
from tlauto.study import TrialRecord

NAME = "probe.joined"
PURPOSE = "joined"

ATTRIBUTE = "beside"
"""Under which a trial keeps which others it reads, so that another attempt at it reads the same."""


def backbones_of(trial: TrialRecord) -> tuple[str, ...]:
    """All backbones that a trial reads, its own first."""
    return (str(trial.params.get("backbone")), *str(trial.attrs.get(ATTRIBUTE, "")).split())


def is_joined(trial: TrialRecord) -> bool:
    """Whether a trial reads several backbones: then its score says little of its own one alone."""
    return len(backbones_of(trial)) > 1


def partners(trial: TrialRecord, ranked: Sequence[TrialRecord]) -> tuple[str, ...]:
    """Which others a proposed trial is to read beside its own backbone: the best by their probes so far.

    As many as it asks for, fewer where fewer are probed; those of an earlier attempt at it.

    Args:
        ranked: complete probes, the best first.
    """
    if ATTRIBUTE in trial.attrs:
        return backbones_of(trial)[1:]
    names = dict.fromkeys(str(probe.params["backbone"]) for probe in ranked)
    # They are told apart by spaces: an id that has one, from the name of a weights file, is passed over.
    others = [name for name in names if name != trial.params["backbone"] and len(name.split()) == 1]
    return tuple(others[: int(number(trial.params.get(NAME, 1))) - 1])


def beside_of(trial: TrialRecord, spec: TrialSpec) -> dict[str, str]:
    """What is to be recorded of a trial that asks for several backbones: the others, if any were there."""
    asks = ATTRIBUTE in trial.attrs or trial.params.get(NAME, 1) != 1
    return {ATTRIBUTE: " ".join(beside(spec.params))} if asks else {}
