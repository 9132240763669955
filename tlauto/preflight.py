"""Before any trial: which backbones match, are their weights to be had, do they build."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable

from tlauto.contracts import BackboneInfo, WeightsOptions
from tlauto.errors import TlautoError, UnknownNameError, WeightsError
from tlauto.plugins import Registry
from tlauto.pool.protocol import Candidate, Preflight, PreflightDone
from tlauto.scales import is_scalable

Say = Callable[[str], None]


def check_backbones(job: Preflight, registry: Registry, *, note: Say) -> PreflightDone:
    """The candidates of a search, built once each, so that nothing of this fails in a trial.

    With patterns, every match is checked and its problem, if any, is told. Without, candidates come
    from the shortlists and the weights folder, weights at hand first, and those with a problem are
    passed over with a note.
    """
    for id in job.weights.files:
        check_exact(id, registry, job.weights)
    if job.patterns:
        found, unmatched = _match(job.patterns, registry, job.weights)
        checked = [_check(info, registry, job.weights) for info in found]
        return PreflightDone(tuple(checked), unmatched)
    return PreflightDone(tuple(_choose(job, registry, note)))


def order(infos: Iterable[BackboneInfo]) -> list[BackboneInfo]:
    """Best prior first: a provider's default, then known accuracy, then the id."""
    return sorted(infos, key=lambda info: (not info.is_default, -(info.accuracy or 0.0), info.id))


def _match(
    patterns: Iterable[str], registry: Registry, weights: WeightsOptions
) -> tuple[list[BackboneInfo], tuple[str, ...]]:
    found: dict[str, BackboneInfo] = {}
    unmatched = []
    for pattern in patterns:
        matches = list(matching(pattern, registry, weights))
        found.update({info.id: info for info in matches})
        if not matches:
            check_exact(pattern, registry, weights)
            unmatched.append(pattern)
    return list(found.values()), tuple(unmatched)


def check_exact(pattern: str, registry: Registry, weights: WeightsOptions) -> None:
    """Have the provider say what is wrong with an exact id, which it may know the closest name to.

    Raises: UnknownNameError when it knows no such backbone. A glob is no exact id and passes.
    """
    provider, colon, name = pattern.partition(":")
    if colon and not set("*?[") & set(pattern):
        registry.provider(provider).weights_status(f"{provider}:{name}", weights)


def matching(pattern: str, registry: Registry, weights: WeightsOptions) -> Iterable[BackboneInfo]:
    """All backbones of all providers that a glob over `provider:name` matches.

    A pattern without a colon is looked for in every provider. Raises: UnknownNameError when the
    part before the colon matches no provider.
    """
    provider_glob, colon, name_glob = pattern.partition(":")
    if not colon:
        provider_glob, name_glob = "*", pattern
    names = [n for n in registry.names("backbone_providers") if fnmatch.fnmatchcase(n, provider_glob)]
    if not names:
        registry.provider(provider_glob)  # says which providers there are
    for name in names:
        yield from registry.provider(name).find(name_glob, weights)


def _choose(job: Preflight, registry: Registry, note: Say) -> list[Candidate]:
    """Up to `limit` working candidates: the user's own weights (all of them), then what is at hand,
    then what can be downloaded, while that works.
    """
    infos = order(offered(registry, job.weights, note))
    infos = [info for info in infos if not job.providers or info.provider in job.providers]
    own = {info.id for info in local_backbones(infos, registry, job.weights)}
    states = {i.id: registry.provider(i.provider).weights_status(i.id, job.weights).state for i in infos}
    places = {"at_hand": 1, "downloadable": 2}
    usable = [info for info in infos if states[info.id] in places]
    usable.sort(key=lambda info: 0 if info.id in own else places[states[info.id]])
    chosen: list[Candidate] = []
    unreachable: set[str] = set()
    for info in usable:
        if (len(chosen) >= job.limit and info.id not in own) or info.provider in unreachable:
            continue
        candidate = _check(info, registry, job.weights)
        if not candidate.problem:
            chosen.append(candidate)
            continue
        note(f"{info.id} is left out: {candidate.problem}")
        if states[info.id] == "downloadable":
            unreachable.add(info.provider)  # one failed download says enough about the network
    return chosen


def offered(registry: Registry, weights: WeightsOptions, note: Say) -> list[BackboneInfo]:
    """The shortlists of all providers and what the user's weights add to them."""
    found: dict[str, BackboneInfo] = {}
    for name in registry.names("backbone_providers"):
        provider = registry.provider(name)
        found.update({info.id: info for info in provider.shortlist()})
        if not weights.folder and not weights.files:
            continue  # nothing to look for, and looking would import the provider's library
        try:
            local = local_backbones(provider.find("*", weights), registry, weights)
        except TlautoError as error:
            note(f"provider '{name}' is left out: {error}")
            continue
        found.update({info.id: info for info in local})
    return list(found.values())


def local_backbones(
    infos: Iterable[BackboneInfo], registry: Registry, weights: WeightsOptions
) -> list[BackboneInfo]:
    """Those whose weights the user gave, as a file or in the folder."""
    if not weights.folder and not weights.files:
        return []
    local = []
    for info in infos:
        status = registry.provider(info.provider).weights_status(info.id, weights)
        in_folder = bool(weights.folder and status.path and status.path.startswith(weights.folder))
        if info.id in weights.files or in_folder:
            local.append(info)
    return local


def _check(info: BackboneInfo, registry: Registry, weights: WeightsOptions) -> Candidate:
    from tlauto.training.pretrained import checked_backbone

    provider = registry.provider(info.provider)
    status = provider.weights_status(info.id, weights)
    if status.state == "missing" and weights.pretrained:
        return Candidate(info, status, status.detail)
    try:
        backbone = checked_backbone(info.id, weights, registry)
    except (WeightsError, UnknownNameError) as error:
        return Candidate(info, status, str(error))
    return Candidate(info, status, is_scalable=is_scalable(backbone))
