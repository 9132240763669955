"""What the sampler proposes: TPE among the values that are kept, one conditional part at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from tlauto.searchspace import STARTUP
from tlauto.space import Scalar

Kept = Mapping[str, Collection[Scalar]]
"""Values that may be proposed, by the name of a category; empty means all."""

Distributions = dict[str, BaseDistribution]

ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
"""States of trials that there is something to learn from."""

WIDE = 16
"""A range of whole numbers that is taken for one of fractions."""

SEEN, GOOD = 250, 25
"""Ended trials from which TPE learns a block at most, and how many of so many or more it takes for good;
with fewer of them it finds less (`bench/sampling.py`)."""


class Ended:
    """What the ended trials of a study say, each read once."""

    def __init__(self) -> None:
        self._trials: dict[int, FrozenTrial] = {}
        self._ranks: dict[int, tuple[float, int]] = {}
        self._alike: dict[frozenset[str], list[int]] = {}

    def read(self, study: optuna.Study) -> None:
        """Read the trials that have ended since the last time."""
        for trial in study.get_trials(deepcopy=False, states=ENDED):
            if trial.number not in self._trials:
                self._trials[trial.number] = trial
                value = trial.value if trial.state == TrialState.COMPLETE else None
                self._ranks[trial.number] = math.inf if value is None else -value, trial.number
                self._alike.setdefault(frozenset(trial.params), []).append(trial.number)

    def blocks(self) -> list[Block]:
        """The parameters of all trials in parts; those that can take but one value are left out."""
        known: Distributions = {}
        for numbers in self._alike.values():
            known |= self._trials[numbers[-1]].distributions
        parts: dict[tuple[int, ...], Distributions] = {}
        for name in sorted(name for name, distribution in known.items() if not distribution.single()):
            owners = tuple(i for i, names in enumerate(self._alike) if name in names)
            parts.setdefault(owners, {})[name] = known[name]
        numbers_of = list(self._alike.values())
        return [
            Block(space, [number for i in owners for number in numbers_of[i]])
            for owners, space in parts.items()
        ]

    def seen(self, block: Block, chance: random.Random) -> list[FrozenTrial]:
        """The trials from which to learn a block: of many the best and a sample of the others."""
        chosen = block.owners
        if len(chosen) > SEEN:
            ranked = sorted(chosen, key=self._ranks.__getitem__)
            chosen = ranked[:GOOD] + chance.sample(ranked[GOOD:], SEEN - GOOD)
        return [self._trials[number] for number in sorted(chosen)]


@dataclass(frozen=True)
class Block:
    """Parameters that the same trials have.

    Attributes:
        owners: numbers of these trials, in no particular order.
    """

    space: Distributions
    owners: list[int]


class _KeptSampler(optuna.samplers.TPESampler):
    """TPE that proposes only some values of some categories, such as backbones.

    A categorical's choices cannot change within a study, so what is dropped stays in the
    distribution: candidates outside `kept` are passed over. Where one value is left, the others are drawn
    without it.

    Parameters that the same trials have are drawn together, by what these trials say, and only those that
    the trial at hand asks for: Optuna's `group` would draw all at once, those of every head and optimizer,
    and all again with each proposal that is dropped.
    """

    def __init__(self, kept: Kept, seed: int, ended: Ended, *, is_alone: bool) -> None:
        super().__init__(n_startup_trials=STARTUP, multivariate=True, constant_liar=not is_alone, seed=seed)
        self._kept = {name: sorted(values, key=str) for name, values in kept.items() if values}
        self._choice = random.Random(seed)
        self._ended = ended
        self._running: list[FrozenTrial] = []
        self._drawing: Distributions = {}
        self._blocks: list[Block] = []
        self._drawn: dict[str, Any] = {}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Distributions:
        self._ended.read(study)
        self._running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._blocks, self._drawn = self._ended.blocks(), {}
        return {name: known for block in self._blocks for name, known in block.space.items()}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Distributions
    ) -> dict[str, Any]:
        for block in self._blocks:
            if not self._kept.keys().isdisjoint(block.space):
                self._drawn |= self._draw(self._part(study, block), trial, block.space)
        return dict(self._drawn)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        block = next((block for block in self._blocks if param_name in block.space), None)
        if block and block.space[param_name] == param_distribution:
            if param_name not in self._drawn:
                self._drawn |= self._learned(self._part(study, block), trial, block.space)
            if param_name in self._drawn:
                return self._drawn[param_name]
        if param_name in self._kept:
            return self._choice.choice(self._kept[param_name])
        return super().sample_independent(study, trial, param_name, param_distribution)

    def _part(self, study: optuna.Study, block: Block) -> optuna.Study:
        return cast(optuna.Study, _Part(study, self._ended.seen(block, self._choice) + self._running))

    def _draw(self, study: optuna.Study, trial: FrozenTrial, space: Distributions) -> dict[str, Any]:
        """Values of a block that agree with `kept`; none while there are too few trials to learn from."""
        only = {name: values[0] for name, values in self._kept.items() if name in space and len(values) == 1}
        self._drawing = {name: distribution for name, distribution in space.items() if name not in only}
        for _ in range(20):
            params = {**self._learned(study, trial, self._drawing), **only}
            wrong = [name for name, values in self._kept.items() if params.get(name, values[0]) not in values]
            if not wrong:
                return params
        return {**params, **{name: self._choice.choice(self._kept[name]) for name in wrong}}

    def _learned(self, study: optuna.Study, trial: FrozenTrial, space: Distributions) -> dict[str, Any]:
        """TPE's proposal; many whole numbers are drawn as fractions, since their masses take long to sum."""
        relaxed = {name: _relaxed(known) for name, known in space.items()}
        drawn = super().sample_relative(study, trial, relaxed)
        return {
            name: value if relaxed[name] is space[name] else round(value) for name, value in drawn.items()
        }

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


def _relaxed(known: BaseDistribution) -> BaseDistribution:
    if isinstance(known, IntDistribution) and known.step == 1 and known.high - known.low >= WIDE:
        return FloatDistribution(known.low, known.high, log=known.log)
    return known


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


def make_sampler(seed: int, kept: Kept, ended: Ended, *, is_alone: bool) -> optuna.samplers.BaseSampler:
    """The sampler of one proposal.

    Args:
        ended: what is known of the study's trials; it is kept from proposal to proposal.
        is_alone: no other trial is running, so that nothing need be assumed of one.
    """
    return _KeptSampler(kept, seed, ended, is_alone=is_alone)
