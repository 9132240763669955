"""A plugin of heads that go wrong, each in its own way; tests install it into a folder on the path."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import tlauto
from tlauto.space import Space

MARKS = Path(os.environ.get("TROUBLE_MARKS", "."))
"""Folder where heads that go wrong once remember that they have."""

KEPT: list[bytes] = []


class Trouble:
    """A linear head that does something else first."""

    tasks = ("multiclass",)
    space: ClassVar[Space] = {}

    def __init__(self, act: Callable[[Any, bool], Any]) -> None:
        self.name = act.__name__
        self.act = act

    def features(self, params: Mapping[str, Any]) -> str:
        return "pooled"

    def build(self, shape: Any, num_outputs: int, params: Mapping[str, Any]) -> Any:
        import torch

        act = self.act

        class Head(torch.nn.Linear):
            def forward(self, features: torch.Tensor) -> torch.Tensor:
                factor = act(features, self.training)
                answers = super().forward(features)
                return answers if factor is None else answers * factor

        return Head(shape.pooled, num_outputs)


def raises(features: Any, training: bool) -> None:
    raise RuntimeError("a mistake of the plugin")


def diverges(features: Any, training: bool) -> float:
    return float("nan")


def aborts(features: Any, training: bool) -> None:
    os.write(2, b"these are my last words\n")
    os.abort()


def recovers(features: Any, training: bool) -> None:
    if is_first("recovers"):
        os.abort()


def loses(features: Any, training: bool) -> None:
    raise RuntimeError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA")


def stands(features: Any, training: bool) -> None:
    if is_first("stands"):
        time.sleep(3600)


def sleeps(features: Any, training: bool) -> None:
    is_first("sleeps")
    time.sleep(3600)


def hungry(features: Any, training: bool) -> None:
    import torch

    is_first(f"hungry {os.getpid()}")
    if training:
        torch.empty(len(features) // 5 * 2**50, dtype=torch.uint8)  # 1 PiB from 5 images on


def starved(features: Any, training: bool) -> None:
    import torch

    torch.empty(2**50, dtype=torch.uint8)


def leaks(features: Any, training: bool) -> None:
    KEPT.append(b"x" * 30_000_000)


def looks(features: Any, training: bool) -> None:
    """Write down what the process sees of the machine."""
    import json

    import torch

    seen = {
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
        "environment": dict(os.environ),
    }
    (MARKS / f"looks {os.getpid()}").write_text(json.dumps(seen))


def is_first(name: str) -> bool:
    """Whether this is the first time; remembered with the process id."""
    try:
        with (MARKS / name).open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


@tlauto.hookimpl
def backbone_providers() -> list[Any]:
    """No backbones; as many workers as the environment says die of being asked."""
    deaths = range(int(os.environ.get("TROUBLE_DEATHS", "0")))
    if Path(sys.argv[0]).name == "worker.py" and any(is_first(f"asked {i}") for i in deaths):
        os.write(2, b"no more of this\n")
        os.abort()
    return []


@tlauto.hookimpl
def task_heads() -> list[Trouble]:
    acts = (raises, diverges, aborts, recovers, loses, stands, sleeps, hungry, starved, leaks, looks)
    return [Trouble(act) for act in acts]
