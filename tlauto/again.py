"""The best probes once more with one thing changed: when that is due, and what it may take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tlauto.joined import NAME as JOINED
from tlauto.joined import PURPOSE
from tlauto.pace import Sizes, feature_seconds
from tlauto.recipe import MOST_JOINED, SCALE, SCALES, scale_of
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar
from tlauto.study import TrialRecord

TRIALS_SHARE = 0.1
"""Part of the trials that one kind of change may take."""

TIME_SHARE = 0.1
"""Part of the time left that the features of one backbone may take."""


@dataclass(frozen=True)
class Change:
    """What is changed of a probe.

    Attributes:
        name, value: the parameter and its new value.
        purpose: under which the trials are recorded.
        most: backbones that are tried so.
    """

    name: str
    value: Scalar
    purpose: str
    most: int


MIRRORED = Change("probe.mirror", True, "mirror", most=3)
"""The mean of the features of an image and its mirror image.

Left to the sampler, a second forward pass over the data would as often be spent on a backbone or a head that
is not worth it.
"""

LARGER = Change(SCALE, max(SCALES), "larger", most=2)
"""Larger images than the pretraining had; where it is offered at all, `larger.py` says."""


@dataclass(frozen=True)
class Screening:
    """What is known once backbones have been probed.

    Attributes:
        ranked: complete probes, the best first.
        left: seconds that trials may still take; None without a limit.
        most_trials: of the whole search; None without a limit.
        since: the number of the first trial of the study's version.
    """

    space: SearchSpace
    trials: Sequence[TrialRecord]
    ranked: Sequence[TrialRecord]
    sizes: Sizes
    left: float | None
    most_trials: int | None
    since: int = 0

    def is_due(self, name: str, purpose: str) -> bool:
        """Whether such trials are to begin: once in a version, when no point waits and no probe runs."""
        is_early = any(
            t.state == "waiting" or (t.state == "running" and t.attrs.get("purpose") == "probe")
            for t in self.trials
        )
        is_done = any(trial.attrs.get("purpose") == purpose for trial in self.trials[self.since :])
        return not (is_early or is_done or name in self.space.fixed)

    def at_most(self, count: int) -> int:
        """So many trials, or as many as one kind of change may take."""
        return count if self.most_trials is None else min(count, int(TRIALS_SHARE * self.most_trials))

    def points(self, change: Change, *, among: Collection[str] | None = None) -> list[dict[str, Scalar]]:
        """The probes of the best backbones with a change that needs other features, each backbone once.

        Args: among: backbones that can take it; None when all can.
        """
        if not self.is_due(change.name, change.purpose):
            return []
        done = {t.params.get("backbone") for t in self.trials if t.attrs.get("purpose") == change.purpose}
        able = [p for p in self.ranked if among is None or p.params["backbone"] in among]
        chosen = [p for p in able[: self.at_most(change.most)] if p.params["backbone"] not in done]
        points = [{**probe.params, change.name: change.value} for probe in chosen]
        return [p for p in points if self.has_time(str(p["backbone"]), scale=scale_of(p))]

    def has_time(self, backbone: str, *, scale: float) -> bool:
        """Whether there is time for a backbone's features of images at a scale."""
        seconds = feature_seconds(backbone, self.trials, self.sizes, scale=scale) or 0.0
        return self.left is None or seconds * (self.sizes.train + self.sizes.val) <= TIME_SHARE * self.left


def joined_points(screening: Screening) -> list[dict[str, Scalar]]:
    """The best probe again, on the features of two backbones at once and of three.

    They are all in the cache, so this takes no longer than other trials.
    """
    ranked = screening.ranked
    if not screening.is_due(JOINED, PURPOSE):
        return []
    probed = len({str(probe.params["backbone"]) for probe in ranked})
    # A probe whose head is not solved has no such parameter.
    counts = [n for n in range(2, MOST_JOINED + 1) if n <= probed and JOINED in ranked[0].params]
    points = [{**ranked[0].params, JOINED: count} for count in counts]
    return points[: screening.at_most(len(points))]
