"""How a plugin states its search space: a dict of short parameter names to these three kinds.

    space = {"k": Int(1, 4, default=1), "layer_decay": Float(0.5, 1.0, default=0.8)}

The search prefixes each name with its owner (`freeze.partial.k`), so plugins never collide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tlauto.errors import ConfigError

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Float:
    """A real number in [low, high]; `log=True` samples its logarithm uniformly (low > 0)."""

    low: float
    high: float
    default: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.default)
        if self.log and self.low <= 0:
            raise ConfigError(f"a log range must start above 0, not at {self.low}")

    def check(self, value: Any) -> float:
        """`value` as a float; raises ConfigError outside the range."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"{value!r} is not a number")
        if not self.low <= value <= self.high:
            raise ConfigError(f"{value} is outside {self.low} to {self.high}")
        return float(value)

    accept = check


@dataclass(frozen=True)
class Int:
    """A whole number in [low, high].

    Attributes:
        settable: the largest value that somebody may set; a search proposes none above `high`.
    """

    low: int
    high: int
    default: int
    log: bool = False
    settable: int | None = None

    def __post_init__(self) -> None:
        _check_range(self.low, self.high, self.default)
        if self.log and self.low <= 0:
            raise ConfigError(f"a log range must start above 0, not at {self.low}")
        if self.settable is not None and self.settable < self.high:
            raise ConfigError(f"{self.high} is searched, so {self.settable} cannot be the largest to be set")

    def check(self, value: Any) -> int:
        """`value` as an int; raises ConfigError when it is not whole or outside the range."""
        return self._within(value, self.high)

    def accept(self, value: Any) -> int:
        """`value`, which somebody set, as an int; raises ConfigError like `check`."""
        return self._within(value, self.high if self.settable is None else self.settable)

    def _within(self, value: Any, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or int(value) != value:
            raise ConfigError(f"{value!r} is not a whole number")
        if not self.low <= value <= high:
            raise ConfigError(f"{value} is outside {self.low} to {high}")
        return int(value)


@dataclass(frozen=True)
class Choice:
    """One of some scalars (None, bool, int, float or str), in a fixed order."""

    values: tuple[Scalar, ...]
    default: Scalar

    def __post_init__(self) -> None:
        if not self.values:
            raise ConfigError("a Choice needs at least one value")
        object.__setattr__(self, "values", tuple(self.values))
        self.check(self.default)

    def check(self, value: Any) -> Scalar:
        """`value` itself; raises ConfigError when it is not one of the choices."""
        for known in self.values:
            if known == value and isinstance(known, bool) == isinstance(value, bool):
                return known
        raise ConfigError(f"{value!r} is not one of {', '.join(map(repr, self.values))}")

    accept = check


Parameter = Float | Int | Choice
Space = Mapping[str, Parameter]


def defaults(space: Space) -> dict[str, Scalar]:
    """The default value of every parameter of a space."""
    return {name: parameter.default for name, parameter in space.items()}


def complete(space: Space, params: Mapping[str, Any], *, owner: str = "") -> dict[str, Scalar]:
    """Checked values for every parameter of `space`: those in `params`, defaults for the rest.

    Raises: ConfigError for a value outside its range and for a name that `space` does not have.
    """
    prefix = f"{owner}." if owner else ""
    values = defaults(space)
    for name, value in params.items():
        if name not in space:
            known = ", ".join(f"{prefix}{n}" for n in space) or "none"
            raise ConfigError(f"no parameter '{prefix}{name}'; known here: {known}")
        try:
            values[name] = space[name].accept(value)
        except ConfigError as error:
            raise ConfigError(f"{prefix}{name}: {error}") from None
    return values


def number(value: Scalar) -> float:
    """A parameter's value as a number, for type checkers; raises ConfigError when it is none."""
    if value is None or isinstance(value, (bool, str)):
        raise ConfigError(f"{value!r} is not a number")
    return float(value)


def to_json(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain data, each parameter with its `kind`."""
    return {name: {"kind": type(p).__name__, **asdict(p)} for name, p in space.items()}


def _check_range(low: float, high: float, default: float) -> None:
    if not low <= default <= high:
        raise ConfigError(f"the default {default} is outside {low} to {high}")
