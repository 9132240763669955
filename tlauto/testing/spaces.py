"""Checks that all suites share: names, search spaces, what an import loads."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from tlauto import space as spaces
from tlauto.space import Choice, Float, Int, Scalar, Space

HEAVY = ("torch", "torchvision", "timm", "keras", "numpy", "PIL", "sklearn", "optuna", "sqlalchemy")
"""What no plugin may load on import: every `tlauto` command imports every plugin."""


class Tracked(Mapping[str, Scalar]):
    """Parameters that remember which of them were read."""

    def __init__(self, values: Mapping[str, Scalar]) -> None:
        self._values = dict(values)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Scalar:
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def points(space: Space) -> list[dict[str, Scalar]]:
    """The defaults, and each parameter at each end or choice with the others at their defaults."""
    found = [spaces.defaults(space)]
    for name, parameter in space.items():
        ends = parameter.values if isinstance(parameter, Choice) else (parameter.low, parameter.high)
        found += [{**found[0], name: end} for end in ends if end != found[0][name]]
    return found


def check_name(name: Any) -> None:
    """Assert that a name can stand on the command line and in `freeze.<name>.<parameter>`."""
    assert isinstance(name, str), f"the name is {name!r}, not a string"
    pattern = r"[a-z][a-z0-9_-]*"
    assert re.fullmatch(pattern, name), f"the name '{name}' must be lower case like 'bias_only' ({pattern})"


def check_space(space: Any) -> None:
    """Assert that a space is a mapping from plain names to Float, Int and Choice."""
    assert isinstance(space, Mapping), f"the space is {type(space).__name__}, not a mapping"
    for name, parameter in space.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), f"the parameter '{name}' must be lower case, no dots"
        kind = type(parameter).__name__
        assert isinstance(parameter, (Float, Int, Choice)), f"'{name}' is {kind}, not Float, Int or Choice"


def heavy_imports(module: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after importing a module."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    # The path travels along, so that a module found by pytest's rootdir is found there as well.
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not run.returncode, f"importing {module} by itself fails:\n{run.stderr}"
    return run.stdout.split()
