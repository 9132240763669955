"""What earlier searches suggest for the next one: which backbones to screen first, what to try first.

Pure functions of a `Past`, which is fixed when a study is created and recorded with it, so that a
resumed search proposes what it would have proposed, whatever else the workspace holds by then.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from tlauto.errors import ConfigError
from tlauto.searchspace import SearchSpace
from tlauto.space import Parameter, Scalar

NEIGHBOURS = 3
"""Earlier datasets that trials are taken from: the most similar ones."""

ONE_IN = 10
"""Of so many trials one may be taken over, though always one."""

SHARED_PROBES = 3
"""Backbones that both searches must have probed before their order is compared."""

FAR = 16.0
"""Ratio of two sizes beyond which datasets do not get any less similar."""

SETTLED = 1e-9


@dataclass(frozen=True)
class Profile:
    """What a dataset is like, from what the doctor counted.

    Attributes:
        images, classes: usable images; classes, 1 for a regression.
        imbalance: images of the largest class per image of the smallest.
        side: median longer side in pixels.
        grey: share of greyscale images.
    """

    task: str
    images: int
    classes: int
    imbalance: float
    side: float
    grey: float

    def distance(self, other: Profile) -> float:
        """How different two datasets look, from 0 to 1: the mean over their figures."""
        pairs = [
            (self.images, other.images),
            (self.classes, other.classes),
            (self.images / self.classes, other.images / other.classes),
            (self.imbalance, other.imbalance),
            (self.side, other.side),
        ]
        parts = [min(1.0, abs(math.log(one / two)) / math.log(FAR)) for one, two in pairs]
        return math.fsum([*parts, abs(self.grey - other.grey)]) / (len(parts) + 1)


@dataclass(frozen=True)
class Earlier:
    """What a finished search found, by images held out from training; its test is not looked at.

    Attributes:
        probes: score of each screened backbone's linear probe.
        params: of the best trial, with `backbone`, `strategy` and `head`.
        gain: its score above the best probe's, over what perfect answers would have gained.
    """

    study: str
    fingerprint: str
    profile: Profile
    probes: Mapping[str, float]
    params: Mapping[str, Scalar]
    gain: float


@dataclass(frozen=True)
class Past:
    """What a search knows of earlier ones, and how its own dataset looks."""

    fingerprint: str
    profile: Profile
    earlier: tuple[Earlier, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain data; `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Past:
        """The past that `to_json` made plain."""
        earlier = (Earlier(**{**e, "profile": Profile(**e["profile"])}) for e in data["earlier"])
        return cls(data["fingerprint"], Profile(**data["profile"]), tuple(earlier))

    def similarity(self, other: Earlier, probes: Mapping[str, float]) -> float:
        """How much an earlier dataset is like this one, from 0 to 1; the same images are 1.

        The mean of two: how alike the profiles are, and, where enough backbones were probed on both,
        how far the probes agree on their order (Kendall's rank correlation). That is landmarking:
        what simple learners score describes a dataset (Pfahringer et al. 2000, "Meta-learning by
        landmarking various learning algorithms").

        Args:
            probes: scores on this dataset, by backbone; empty before there are any.
        """
        if other.fingerprint == self.fingerprint:
            return 1.0
        parts = [1 - self.profile.distance(other.profile)]
        shared = sorted(set(probes) & set(other.probes))
        if len(shared) >= SHARED_PROBES:
            here, there = ([scores[name] for name in shared] for scores in (probes, other.probes))
            parts.append((1 + agreement(here, there)) / 2)
        return math.fsum(parts) / len(parts)


def agreement(one: Sequence[float], two: Sequence[float]) -> float:
    """Kendall's tau-a of two lists of scores, from -1 to 1; pairs that are tied in either count 0."""
    pairs = list(combinations(range(len(one)), 2))
    return sum(_sign(one[i] - one[j]) * _sign(two[i] - two[j]) for i, j in pairs) / len(pairs)


def screening_order(backbones: Sequence[str], past: Past) -> tuple[str, ...]:
    """Backbones in the order in which to screen them: the default, then what won before, then by prior.

    The default stays first since the default recipe starts from its probe. What won before is a greedy
    portfolio: each next one lessens most what is lost, on average over the earlier datasets and by
    their similarity, when only those before it are there. Without a past the order is as given.

    Source: portfolio building of Feurer et al. 2022 (arXiv:2007.04074), section 3.1.
    """
    order, rest = list(backbones[:1]), list(backbones[1:])
    weights = [past.similarity(earlier, {}) for earlier in past.earlier]

    def lost(portfolio: Iterable[str]) -> float:
        each = [min(_regret(name, earlier) for name in portfolio) for earlier in past.earlier]
        return math.fsum(w * r for w, r in zip(weights, each, strict=True))

    while rest and past.earlier:
        least = min(rest, key=lambda name: lost([*order, name]))
        if lost(order) - lost([*order, least]) <= SETTLED:
            break
        order.append(least)
        rest.remove(least)
    return (*order, *rest)


def warm_points(
    space: SearchSpace, past: Past, probes: Mapping[str, float], *, kept: Sequence[str],
    strategies: Collection[str], tried: Sequence[Mapping[str, Scalar]], trials: int | None,
) -> list[tuple[dict[str, Scalar], str]]:  # fmt: skip
    """Points to try before the sampler's, each with the study that it won in, most promising first.

    Of the most similar datasets those where something beat the best probe, by similarity times gain.

    Args:
        probes: scores on this dataset, by backbone.
        kept: backbones that screening kept; a point on another moves to the best probe's.
        strategies: freezing strategies that there is time for.
        tried: parameters of trials so far, without fixed ones; they are not proposed again.
        trials: the total of trials, None when only time limits them.
    """
    weights = {e.study: past.similarity(e, probes) for e in past.earlier}
    nearest = sorted(past.earlier, key=lambda e: -weights[e.study])[:NEIGHBOURS]
    nearest = [e for e in nearest if e.gain > 0 and e.params.get("strategy") in strategies]
    nearest.sort(key=lambda e: -weights[e.study] * e.gain)
    best = max(kept, key=lambda name: probes.get(name, -math.inf))
    found: list[tuple[dict[str, Scalar], str]] = []
    seen = [dict(params) for params in tried]
    for earlier in nearest:
        backbone = str(earlier.params.get("backbone"))
        point = adapted({**earlier.params, "backbone": backbone if backbone in kept else best}, space)
        free = {name: value for name, value in (point or {}).items() if name not in space.fixed}
        if point is not None and free not in seen:
            seen.append(free)
            found.append((point, earlier.study))
    return found[: NEIGHBOURS if trials is None else max(1, trials // ONE_IN)]


def adapted(params: Mapping[str, Scalar], space: SearchSpace) -> dict[str, Scalar] | None:
    """A point of this space like one of another; None where its strategy or head is not searched.

    What this space does not know is left out; what the other did not have, or what lies outside the
    range here, is at its default.
    """
    names = {"strategy": [s.name for s in space.strategies], "head": [h.name for h in space.heads]}
    if any(params.get(what) not in known for what, known in names.items()):
        return None

    def pick(name: str, parameter: Parameter) -> Scalar:
        try:
            return parameter.check(params[name])
        except (KeyError, ValueError, OverflowError, ConfigError):
            return parameter.default

    return space.walk(pick)


def _regret(backbone: str, earlier: Earlier) -> float:
    """What is lost on an earlier dataset with a backbone, from 0 (it won) to 1 (the worst, or not probed)."""
    if backbone == earlier.params["backbone"]:
        return 0.0
    if backbone not in earlier.probes:
        return 1.0
    top, low = max(earlier.probes.values()), min(earlier.probes.values())
    return (top - earlier.probes[backbone]) / (top - low) if top > low else 0.0


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
