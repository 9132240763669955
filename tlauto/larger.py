"""Which backbones may see larger images than they were pretrained on, and when that is tried."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from tlauto.errors import ConfigError
from tlauto.pace import PROBE_STRATEGY, Sizes, feature_seconds
from tlauto.pool.protocol import Candidate
from tlauto.recipe import SCALE, SCALES, scale_of
from tlauto.scales import scaled_size
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar
from tlauto.study import TrialRecord

PURPOSE = "larger"

ENOUGH = 0.9
"""Part of the larger size that the images' shorter side must have: what is enlarged shows nothing new."""

MOST = 2
"""Backbones that are tried so."""

TRIALS_SHARE = 0.1
"""Part of the trials that this may take."""

TIME_SHARE = 0.1
"""Part of the time left that the features of one backbone's larger images may take."""


def offered(candidates: Mapping[str, Candidate], fixed: Mapping[str, Scalar], *, side: int) -> frozenset[str]:
    """The backbones of which a search tries larger images: where there is more to be seen in the images.

    Args:
        fixed: values by dotted name that are not searched; a scale among them is not asked whether it pays.
        side: median length of the images' shorter sides, in pixels.

    Raises: ConfigError when a larger scale is fixed and a backbone takes no other size than its own.
    """
    able = frozenset(id for id, candidate in candidates.items() if candidate.is_scalable)
    if SCALE in fixed:
        if scale_of(fixed) == 1.0:
            return frozenset()
        _require(able, candidates, scale_of(fixed))
        return able
    large = max(SCALES)
    return frozenset(id for id in able if side >= ENOUGH * scaled_size(candidates[id].info.input_size, large))


def _require(able: Collection[str], candidates: Collection[str], scale: float) -> None:
    """Raise ConfigError when not all candidates are able to see images at a fixed scale."""
    unable = [id for id in candidates if id not in able]
    if unable:
        verb, others = "takes" if len(unable) == 1 else "take", [id for id in candidates if id in able]
        instead = f"use --backbones {','.join(others)}" if others else "leave the parameter out"
        names = " and ".join(unable)
        raise ConfigError(f"'{SCALE}' is {scale:g}, but {names} {verb} images of one size only; {instead}")


def larger_points(
    space: SearchSpace,
    trials: Sequence[TrialRecord],
    ranked: Sequence[TrialRecord],
    *,
    sizes: Sizes,
    left: float | None,
    most_trials: int | None,
    since: int = 0,
) -> list[dict[str, Scalar]]:
    """The probes of the best backbones again, on larger images.

    Once in a version of a study, and once a backbone; nothing while a point waits or a probe runs.

    Args:
        ranked: complete probes, the best first.
        left: seconds that trials may still take; None without a limit.
        most_trials: of the whole search; None without a limit.
        since: the number of the version's first trial.
    """
    is_early = any(t.state == "waiting" or (t.state == "running" and _is(t, "probe")) for t in trials)
    if is_early or SCALE in space.fixed or any(_is(trial, PURPOSE) for trial in trials[since:]):
        return []
    count = MOST if most_trials is None else min(MOST, int(TRIALS_SHARE * most_trials))
    done = {trial.params.get("backbone") for trial in trials if _is(trial, PURPOSE)}
    able = [probe for probe in ranked if probe.params["backbone"] in space.larger]
    chosen = [probe for probe in able[:count] if probe.params["backbone"] not in done]
    has_time = [p for p in chosen if _is_affordable(str(p.params["backbone"]), trials, sizes, left)]
    return [{**probe.params, SCALE: max(SCALES)} for probe in has_time]


def proposable_scales(
    space: SearchSpace,
    trials: Sequence[TrialRecord],
    ranked: Sequence[TrialRecord],
    *,
    kept: Collection[str],
    sizes: Sizes,
    left: float | None,
) -> tuple[float, ...]:
    """The scales that the sampler may propose: larger ones where they have shown to be worth their cost.

    That is where one of the best backbones has a better score with larger images than its probe had, so
    far as there are probes at all, and where there is time for the features of the backbones in `kept`.
    What is fixed is left to the space.

    Args:
        ranked, left: as for `larger_points`.
        kept: backbones that the sampler may propose.
    """
    if SCALE in space.fixed or not space.larger:
        return ()
    probed = {probe.params["backbone"]: probe.score or 0.0 for probe in reversed(ranked)}
    tried = [t for t in trials if _is(t, PURPOSE) and t.state == "complete" and t.score is not None]
    has_gained = any((t.score or 0.0) > probed.get(t.params["backbone"], 0.0) for t in tried)
    if PROBE_STRATEGY in (strategy.name for strategy in space.strategies) and not has_gained:
        return (1.0,)
    known = {t.params.get("backbone") for t in trials if _has_features(t)}
    new = [id for id in kept if id in space.larger and id not in known]
    return SCALES if all(_is_affordable(id, trials, sizes, left) for id in new) else (1.0,)


def _is_affordable(backbone: str, trials: Sequence[TrialRecord], sizes: Sizes, left: float | None) -> bool:
    seconds = feature_seconds(backbone, trials, sizes, scale=max(SCALES)) or 0.0
    return left is None or seconds * (sizes.train + sizes.val) <= TIME_SHARE * left


def _has_features(trial: TrialRecord) -> bool:
    """Whether a trial has computed the features of larger images."""
    is_frozen = trial.params.get("strategy") == PROBE_STRATEGY
    return is_frozen and trial.state == "complete" and scale_of(trial.params) != 1.0


def _is(trial: TrialRecord, purpose: str) -> bool:
    return trial.attrs.get("purpose") == purpose
