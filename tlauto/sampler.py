"""What the sampler proposes: TPE among the values that are kept, one conditional part at a time."""

from __future__ import annotations

import random
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

Kept = Mapping[str, Collection[str]]
"""Values that may be proposed, by the name of a category; empty means all."""

Distributions = dict[str, BaseDistribution]

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that there is something to learn from."""

MANY, GOOD = 250, 25
"""Ended trials that TPE is shown at most, and how many of so many or more it takes for good; its densities
grow no finer than with a hundred."""


class _KeptSampler(optuna.samplers.TPESampler):
    """TPE that proposes only some values of some categories, such as backbones.

    A categorical's choices cannot change within a study, so what is dropped stays in the
    distribution: candidates outside `kept` are passed over. Where one value is left, the others are drawn
    without it.

    Parameters that the same trials have are drawn together, and only those that the trial at hand asks
    for: Optuna's `group` would draw all at once, those of every head and optimizer, and all again with each
    proposal that is dropped.
    """

    def __init__(self, kept: Kept, seed: int, *, is_alone: bool) -> None:
        super().__init__(n_startup_trials=8, multivariate=True, constant_liar=not is_alone, seed=seed)
        self._kept = {name: sorted(values) for name, values in kept.items() if values}
        self._choice = random.Random(seed)
        self._ended: list[FrozenTrial] = []
        self._best: list[int] = []
        self._drawing: Distributions = {}
        self._blocks: list[_Block] = []
        self._drawn: dict[str, Any] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Distributions:
        self._ended = study.get_trials(deepcopy=False, states=ENDED)
        self._blocks, self._drawn = _blocks(self._ended), {}
        values = [trial.value if trial.state == TrialState.COMPLETE else None for trial in self._ended]
        whole = [i for i, value in enumerate(values) if value is not None]
        self._best = sorted(whole, key=lambda i: -cast(float, values[i]))[:GOOD]
        return {name: known for block in self._blocks for name, known in block.space.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        for block in self._blocks:
            if not self._kept.keys().isdisjoint(block.space):
                self._drawn |= self._draw(self._seen(study, block), trial, block.space)
        return dict(self._drawn)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        block = next((block for block in self._blocks if param_name in block.space), None)
        if block and block.space[param_name] == param_distribution:
            if param_name not in self._drawn:
                self._drawn |= super().sample_relative(self._seen(study, block), trial, block.space)
            if param_name in self._drawn:
                return self._drawn[param_name]
        if param_name in self._kept:
            return self._choice.choice(self._kept[param_name])
        return super().sample_independent(study, trial, param_name, param_distribution)

    def _seen(self, study: optuna.Study, block: _Block) -> optuna.Study:
        """The study, with as many of its ended trials as it takes to draw a block."""
        if len(self._ended) <= MANY or len(self._best) < GOOD:
            return study
        chosen = set(self._best)
        owners = [i for i in block.owners if i not in chosen]
        chosen.update(self._choice.sample(owners, min(len(owners), MANY - GOOD)))
        others = (i for i in range(len(self._ended)) if i not in chosen)
        fill = list(islice(others, MANY - len(chosen)))  # of no use but to make them so many
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return cast(optuna.Study, _Part(study, [self._ended[i] for i in [*chosen, *fill]] + running))

    def _draw(self, study: optuna.Study, trial: FrozenTrial, space: Distributions) -> dict[str, Any]:
        """Values of a block that agree with `kept`; none while there are too few trials to learn from."""
        only = {name: values[0] for name, values in self._kept.items() if name in space and len(values) == 1}
        self._drawing = {name: distribution for name, distribution in space.items() if name not in only}
        for _ in range(20):
            params = {**super().sample_relative(study, trial, self._drawing), **only}
            wrong = [name for name, values in self._kept.items() if params.get(name, values[0]) not in values]
            if not wrong:
                return params
        return {**params, **{name: self._choice.choice(self._kept[name]) for name in wrong}}

    def _compute_acquisition_func(self, samples: dict[str, Any], *estimators: Any) -> Any:
        """Optuna's expected improvement of candidates (`(candidates,)` each), lowest of those not kept.

        No public method is that close to the choice among candidates. Without this one proposals outside
        `kept` are drawn again, which costs as much each time.
        """
        values = super()._compute_acquisition_func(samples, *estimators)
        for name in self._kept.keys() & samples.keys():
            kept = [self._drawing[name].to_internal_repr(value) for value in self._kept[name]]
            values[~np.isin(samples[name], kept)] = -np.inf
        return values


class _Part:
    """A study as if it had but some of its trials.

    TPE asks a study for its trials by a private method. If that is called otherwise one day, TPE sees all
    of them again, which takes longer.
    """

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._study = study
        self._trials = trials

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in self._trials if states is None or trial.state in states]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)


@dataclass(frozen=True)
class _Block:
    """Parameters that the same trials have.

    Attributes:
        owners: places of these among the trials that have ended.
    """

    space: Distributions
    owners: list[int]


def _blocks(ended: Sequence[FrozenTrial]) -> list[_Block]:
    """The parameters of all trials in parts; those that can take but one value are left out."""
    alike: dict[frozenset[str], list[int]] = {}
    for i, trial in enumerate(ended):
        alike.setdefault(frozenset(trial.distributions), []).append(i)
    known = {name: d for places in alike.values() for name, d in ended[places[-1]].distributions.items()}
    parts: dict[tuple[int, ...], Distributions] = {}
    for name in sorted(name for name, distribution in known.items() if not distribution.single()):
        parts.setdefault(tuple(i for i, names in enumerate(alike) if name in names), {})[name] = known[name]
    places = list(alike.values())
    return [
        _Block(space, sorted(i for pattern in which for i in places[pattern]))
        for which, space in parts.items()
    ]


def make_sampler(seed: int, kept: Kept, *, is_alone: bool) -> optuna.samplers.BaseSampler:
    """The sampler of one proposal.

    Args:
        is_alone: no other trial is running, so that nothing need be assumed of one.
    """
    return _KeptSampler(kept, seed, is_alone=is_alone)
