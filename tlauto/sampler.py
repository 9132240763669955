"""What the sampler proposes: TPE among the values that are kept, one conditional part at a time."""

from __future__ import annotations

import random
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

Kept = Mapping[str, Collection[str]]
"""Values that may be proposed, by the name of a category; empty means all."""

Distributions = dict[str, BaseDistribution]


class _KeptSampler(optuna.samplers.TPESampler):
    """TPE that proposes only some values of some categories, such as backbones.

    A categorical's choices cannot change within a study, so what is dropped stays in the
    distribution: candidates outside `kept` are passed over. Where one value is left, the others are drawn
    without it.

    Parameters that the same trials have are drawn together, and only those that the trial at hand asks
    for: Optuna would draw all at once, those of every head and optimizer, and all again with each
    proposal that is dropped.
    """

    def __init__(self, kept: Kept, seed: int, *, is_alone: bool) -> None:
        super().__init__(
            n_startup_trials=8, multivariate=True, group=True, constant_liar=not is_alone, seed=seed
        )
        self._kept = {name: sorted(values) for name, values in kept.items() if values}
        self._choice = random.Random(seed)
        self._drawing: Distributions = {}
        self._blocks: list[Distributions] = []
        self._drawn: dict[str, Any] = {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        self._blocks, self._drawn = _blocks(study, search_space), {}
        for block in [block for block in self._blocks if not self._kept.keys().isdisjoint(block)]:
            self._drawn |= self._draw(study, trial, block)
        return dict(self._drawn)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        block = next((block for block in self._blocks if param_name in block), {})
        if block.get(param_name) == param_distribution:
            if param_name not in self._drawn:
                self._drawn |= super().sample_relative(study, trial, block)
            if param_name in self._drawn:
                return self._drawn[param_name]
        if param_name in self._kept:
            return self._choice.choice(self._kept[param_name])
        return super().sample_independent(study, trial, param_name, param_distribution)

    def _draw(self, study: optuna.Study, trial: FrozenTrial, block: Distributions) -> dict[str, Any]:
        """Values of a block that agree with `kept`; none while there are too few trials to learn from."""
        only = {name: values[0] for name, values in self._kept.items() if name in block and len(values) == 1}
        self._drawing = {name: distribution for name, distribution in block.items() if name not in only}
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


def _blocks(study: optuna.Study, space: Distributions) -> list[Distributions]:
    """A space in parts of parameters that the same trials have."""
    owners: dict[str, list[int]] = {name: [] for name in space}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)):
        for name in trial.params.keys() & owners.keys():
            owners[name].append(trial.number)
    blocks: dict[tuple[int, ...], Distributions] = {}
    for name in sorted(space):
        blocks.setdefault(tuple(owners[name]), {})[name] = space[name]
    return list(blocks.values())


def make_sampler(seed: int, kept: Kept, *, is_alone: bool) -> optuna.samplers.BaseSampler:
    """The sampler of one proposal.

    Args:
        is_alone: no other trial is running, so that nothing need be assumed of one.
    """
    with warnings.catch_warnings():
        # group=True is marked experimental; it is what a conditional space needs.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return _KeptSampler(kept, seed, is_alone=is_alone)
