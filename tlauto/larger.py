"""Which backbones may see larger images than they were pretrained on."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from tlauto.again import LARGER, Screening
from tlauto.errors import ConfigError
from tlauto.pace import PROBE_STRATEGY
from tlauto.pool.protocol import Candidate
from tlauto.recipe import SCALE, SCALES, scale_of
from tlauto.scales import scaled_size
from tlauto.space import Scalar
from tlauto.study import TrialRecord

ENOUGH = 0.9
"""Part of the larger size that the images' shorter side must have: what is enlarged shows nothing new."""


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


def proposable_scales(screening: Screening, *, kept: Collection[str]) -> tuple[float, ...]:
    """The scales that the sampler may propose: larger ones where they have shown to be worth their cost.

    That is where one of the best backbones has a better score with larger images than its probe had, so
    far as there are probes at all, and where there is time for the features of the backbones in `kept`.
    What is fixed is left to the space.

    Args:
        kept: backbones that the sampler may propose.
    """
    space, trials = screening.space, screening.trials
    if SCALE in space.fixed or not space.larger:
        return ()
    probed = {probe.params["backbone"]: probe.score or 0.0 for probe in reversed(screening.ranked)}
    tried = [t for t in trials if _is_larger(t) and t.state == "complete" and t.score is not None]
    has_gained = any((t.score or 0.0) > probed.get(t.params["backbone"], 0.0) for t in tried)
    if PROBE_STRATEGY in (strategy.name for strategy in space.strategies) and not has_gained:
        return (1.0,)
    known = {t.params.get("backbone") for t in trials if _has_features(t)}
    new = [id for id in kept if id in space.larger and id not in known]
    return SCALES if all(screening.has_time(id, scale=max(SCALES)) for id in new) else (1.0,)


def _has_features(trial: TrialRecord) -> bool:
    """Whether a trial has computed the features of larger images."""
    is_frozen = trial.params.get("strategy") == PROBE_STRATEGY
    return is_frozen and trial.state == "complete" and scale_of(trial.params) != 1.0


def _is_larger(trial: TrialRecord) -> bool:
    return trial.attrs.get("purpose") == LARGER.purpose
