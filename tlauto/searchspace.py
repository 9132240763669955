"""The conditional space of one search, as data: walked to sample it, to default it, to check it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tlauto import recipe
from tlauto.contracts import FreezeStrategy, TaskHead, is_linear, trains_backbone
from tlauto.errors import ConfigError, did_you_mean
from tlauto.space import Choice, Parameter, Scalar, Space

Pick = Callable[[str, Parameter], Scalar]

STARTUP = 8
"""Trials that must have ended with some parameters before those of the next one are learned from them."""


@dataclass(frozen=True)
class SearchSpace:
    """Backbones x strategies x heads and the parameters that each brings.

    Attributes:
        backbones: ids, in order of their priors, best first.
        fixed: values by dotted name that are not searched.
        larger: backbones that may see larger images than they were pretrained on.
    """

    backbones: tuple[str, ...]
    strategies: tuple[FreezeStrategy, ...]
    heads: tuple[TaskHead, ...]
    loss: Space
    fixed: Mapping[str, Scalar]
    larger: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        known = dict(self._every())
        for name, value in self.fixed.items():
            if name in ("backbone", "strategy", "head"):
                flag = {"strategy": "strategies"}.get(name, f"{name}s")
                raise ConfigError(f"'{name}' is not set as a parameter; use --{flag} {value}")
            if name not in known:
                raise ConfigError(
                    f"no parameter '{name}' in this search{did_you_mean(name, known)} "
                    f"(known: {', '.join(sorted(known))})"
                )
            try:
                known[name].accept(value)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None

    @property
    def names(self) -> frozenset[str]:
        """Every parameter that some point has, besides backbone, strategy and head."""
        return frozenset(name for name, _ in self._every())

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Every parameter that some point has, with backbone, strategy and head."""
        what = {
            "backbone": Choice(self.backbones, self.backbones[0]),
            "strategy": _choice(self.strategies),
            "head": _choice(self.heads),
        }
        return {**what, **dict(self._every())}

    def ordered_like(self, choices: Mapping[str, Sequence[Scalar]]) -> SearchSpace:
        """This space with backbones, strategies and heads in an earlier order, if they are the same."""

        def placed(offers: Sequence[Any], names: Sequence[str], before: Sequence[Scalar]) -> tuple[Any, ...]:
            if sorted(names) != sorted(map(str, before)):
                return tuple(offers)
            return tuple(offers[names.index(str(name))] for name in before)

        return replace(
            self,
            backbones=placed(self.backbones, self.backbones, choices.get("backbone", ())),
            strategies=placed(
                self.strategies, [s.name for s in self.strategies], choices.get("strategy", ())
            ),
            heads=placed(self.heads, [h.name for h in self.heads], choices.get("head", ())),
        )

    def walk(self, pick: Pick) -> dict[str, Scalar]:
        """One point: `pick(name, parameter)` is asked for each name that applies, in order."""
        values: dict[str, Scalar] = {}

        def take(owner: str, space: Space) -> None:
            for name, parameter in space.items():
                key = f"{owner}.{name}" if owner else name
                values[key] = parameter.accept(self.fixed[key]) if key in self.fixed else pick(key, parameter)

        take("", {"backbone": Choice(self.backbones, self.backbones[0])})
        take("", {"strategy": _choice(self.strategies)})
        strategy = next(s for s in self.strategies if s.name == values["strategy"])
        take(f"freeze.{strategy.name}", strategy.space)
        take("", {"head": _choice(self.heads)})
        head = next(h for h in self.heads if h.name == values["head"])
        if values["backbone"] in self.larger:
            take("image", recipe.IMAGE_SPACE)
        take("loss", self.loss)
        if not trains_backbone(strategy):
            take("probe", recipe.MIRROR_SPACE)
        if is_linear(head) and not trains_backbone(strategy):
            take("probe", recipe.LINEAR_SPACE)
            if values["probe.solver"] == "lbfgs":
                take("probe", {**recipe.L2_SPACE, **recipe.FEATURES_SPACE})
            if values["probe.solver"] != "minibatch":
                take("probe", recipe.joined_space(len(self.backbones)))
                return values  # the optimum is computed: there is nothing to choose about training
        take(f"head.{head.name}", head.space)
        if not trains_backbone(strategy) and head.features(_own(values, f"head.{head.name}")) == "pooled":
            take("probe", recipe.FEATURES_SPACE)
        take("optim", recipe.OPTIM_SPACE)
        take(f"optim.{values['optim.name']}", recipe.OPTIMIZER_SPACES[str(values["optim.name"])])
        for owner, space in _training_spaces(trains_backbone(strategy)):
            take(owner, space)
        return values

    def defaults(self, **chosen: str) -> dict[str, Scalar]:
        """The point of all defaults, with backbone, strategy or head as given."""
        return self.walk(lambda name, parameter: chosen.get(name, parameter.default))

    def _every(self) -> Iterator[tuple[str, Parameter]]:
        """Each parameter that any point has, by dotted name."""
        spaces: list[tuple[str, Space]] = [(f"freeze.{s.name}", s.space) for s in self.strategies]
        spaces += [(f"head.{h.name}", h.space) for h in self.heads]
        spaces += [("image", recipe.IMAGE_SPACE), ("loss", self.loss), ("optim", recipe.OPTIM_SPACE)]
        spaces += [(f"optim.{name}", space) for name, space in recipe.OPTIMIZER_SPACES.items()]
        for strategy in self.strategies:
            spaces += _training_spaces(trains_backbone(strategy))
        if any(map(is_linear, self.heads)) and not all(map(trains_backbone, self.strategies)):
            spaces += [("probe", recipe.LINEAR_SPACE), ("probe", recipe.L2_SPACE)]
            spaces += [("probe", recipe.joined_space(len(self.backbones)))]
        if not all(map(trains_backbone, self.strategies)):
            spaces += [("probe", recipe.FEATURES_SPACE), ("probe", recipe.MIRROR_SPACE)]
        for owner, space in spaces:
            for name, parameter in space.items():
                yield f"{owner}.{name}", parameter


def _own(values: Mapping[str, Scalar], owner: str) -> dict[str, Scalar]:
    prefix = f"{owner}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _training_spaces(is_trained: bool) -> list[tuple[str, Space]]:
    if is_trained:
        return [("finetune", recipe.FINETUNE_SPACE), ("augment", recipe.AUGMENT_SPACE)]
    return [("probe", recipe.PROBE_SPACE)]


def _choice(offers: Sequence[FreezeStrategy] | Sequence[TaskHead]) -> Choice:
    names = tuple(offer.name for offer in offers)
    return Choice(names, names[0])
