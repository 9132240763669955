"""Heads that read several backbones at once: which others beside a trial's own, and when they are tried."""

from __future__ import annotations

from collections.abc import Sequence

from tlauto.contracts import TrialSpec
from tlauto.recipe import MOST_JOINED, beside
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar, number
from tlauto.study import TrialRecord

NAME = "probe.joined"
PURPOSE = "joined"

ATTRIBUTE = "beside"
"""Under which a trial keeps which others it reads, so that another attempt at it reads the same."""

TRIALS_SHARE = 0.1
"""Part of the trials that this may take."""


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


def joined_points(
    space: SearchSpace,
    trials: Sequence[TrialRecord],
    ranked: Sequence[TrialRecord],
    *,
    most_trials: int | None,
    since: int = 0,
) -> list[dict[str, Scalar]]:
    """The best probe again, on the features of two backbones at once and of three.

    They are all in the cache, so this takes no longer than other trials. Once in a version of a study;
    nothing while a point waits or a probe runs.

    Args:
        ranked: complete probes, the best first.
        most_trials: of the whole search; None without a limit.
        since: the number of the version's first trial.
    """
    is_early = any(t.state == "waiting" or (t.state == "running" and _is(t, "probe")) for t in trials)
    if is_early or NAME in space.fixed or any(_is(trial, PURPOSE) for trial in trials[since:]):
        return []
    probed = len({str(probe.params["backbone"]) for probe in ranked})
    # A probe whose head is not solved has no such parameter.
    counts = [n for n in range(2, MOST_JOINED + 1) if n <= probed and NAME in ranked[0].params]
    points = [{**ranked[0].params, NAME: count} for count in counts]
    return points if most_trials is None else points[: int(TRIALS_SHARE * most_trials)]


def _is(trial: TrialRecord, purpose: str) -> bool:
    return trial.attrs.get("purpose") == purpose
