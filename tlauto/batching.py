"""Trials whose heads a worker solves side by side: which of them can be, and how many at once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tlauto.recipe import SCALE
from tlauto.searchspace import STARTUP
from tlauto.space import Scalar
from tlauto.study import TrialRecord

MOST = 16
"""Heads at once: with half as many, each takes a seventh longer (`bench/RESULTS.md`)."""

AHEAD = 2
"""So many times as many may be proposed and not over, so that a worker need not wait for proposals."""

LEARNED = 2
"""A sampler that proposes one has learned from so many times as many as are proposed and not over."""

TIME_SHARE = 0.5
"""Most of the time left that trials at once may take."""


class Kin(NamedTuple):
    """What trials have in common whose heads read the same features at one penalty each."""

    backbone: Scalar
    strategy: Scalar
    head: Scalar
    features: Scalar
    mirror: Scalar
    scale: Scalar

    @property
    def pass_(self) -> tuple[Scalar, ...]:
        """What those have in common whose features one forward pass gives."""
        return self.backbone, self.strategy, self.head, self.mirror, self.scale


def kin_of(trial: TrialRecord, fixed: Mapping[str, Scalar]) -> Kin | None:
    """Which trials a trial can be solved beside; None for one that runs by itself.

    That is every one but those of the solver `lbfgs` that the sampler proposed: what is proposed for a
    purpose tells what to propose next, and what failed before would take others with it.

    Args:
        fixed: parameters that are the same in all trials and not recorded of each.
    """
    params = {**fixed, **trial.params}
    is_solved = params.get("probe.solver") == "lbfgs" and params.get("probe.joined", 1) == 1
    if not is_solved or trial.attrs.get("purpose") != "search" or "retry_of" in trial.attrs:
        return None
    model = params["backbone"], params["strategy"], params["head"]
    features, mirror = params.get("probe.features", "pooled"), params.get("probe.mirror", False)
    return Kin(*model, features, mirror, params.get(SCALE, 1.0))


def under_way(known: int, ever: int) -> int:
    """How many trials that are solved side by side may be proposed and not over, at least one.

    Only what is recorded decides, not the clock: a search that is run again must propose the same.

    Args:
        known: complete trials like them.
        ever: complete ones of their solver; the first are drawn at random, whatever others have shown.
    """
    return max(1, STARTUP - ever, min(AHEAD * MOST, known // LEARNED))


def at_once(
    alike: Sequence[TrialRecord], *, open: int, slots: int, most: int | None, left: float | None
) -> int:
    """How many trials one worker may solve side by side, at least one.

    Args:
        alike: complete trials like them.
        open: as many as may be proposed and not over.
        slots: that want to work too.
        most: trials that the search may still have; None without a limit.
        left: seconds that trials may still take; None without a limit.
    """
    count = min(MOST, open)
    if most is not None:
        count = min(count, -(-most // slots))
    if left is not None and alike:
        each = statistics.median(float(trial.attrs.get("seconds", 0.0)) for trial in alike[-MOST:])
        count = min(count, int(TIME_SHARE * left / max(each, 1e-3)))
    return max(1, count)
