"""Which backbones are tried on mirror images as well: the best of the screening, once it has ended."""

from __future__ import annotations

from collections.abc import Sequence

from tlauto.pace import Sizes, feature_seconds
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar
from tlauto.study import TrialRecord

NAME = "probe.mirror"
PURPOSE = "mirror"

MOST = 3
"""Backbones that are tried so."""

TRIALS_SHARE = 0.1
"""Part of the trials that this may take."""

TIME_SHARE = 0.1
"""Part of the time left that the features of one backbone's mirror images may take."""


def mirror_points(
    space: SearchSpace,
    trials: Sequence[TrialRecord],
    ranked: Sequence[TrialRecord],
    *,
    sizes: Sizes,
    left: float | None,
    most_trials: int | None,
    since: int = 0,
) -> list[dict[str, Scalar]]:
    """The probes of the best backbones again, on the mean of an image and its mirror image.

    Left to the sampler, a second forward pass over the data would as often be spent on a backbone or a
    head that is not worth it. Once in a version of a study, and once a backbone; nothing while a point waits
    or a probe runs.

    Args:
        ranked: complete probes, the best first.
        left: seconds that trials may still take; None without a limit.
        most_trials: of the whole search; None without a limit.
        since: the number of the version's first trial.
    """
    is_early = any(t.state == "waiting" or (t.state == "running" and _is(t, "probe")) for t in trials)
    if is_early or NAME in space.fixed or any(_is(trial, PURPOSE) for trial in trials[since:]):
        return []
    count = MOST if most_trials is None else min(MOST, int(TRIALS_SHARE * most_trials))
    done = {trial.params.get("backbone") for trial in trials if _is(trial, PURPOSE)}
    points = []
    for probe in [probe for probe in ranked[:count] if probe.params["backbone"] not in done]:
        seconds = feature_seconds(str(probe.params["backbone"]), trials, sizes) or 0.0
        if left is None or seconds * (sizes.train + sizes.val) <= TIME_SHARE * left:
            points.append({**probe.params, NAME: True})
    return points


def _is(trial: TrialRecord, purpose: str) -> bool:
    return trial.attrs.get("purpose") == purpose
