"""How much a backbone computes for one image, and what an engine would save of it.

Figures of the network, not of the clock: the same search must choose the same engine on its second
run, when the machine is busier.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tlauto.contracts import Backbone
from tlauto.training.model import Kind, features_of

# Operations that an engine computes as PyTorch does; all others it merges into them.
PRODUCTS = ("conv", "mm", "linear", "attention")

# What one merged element costs eager PyTorch, on one thread: 0.28 ns with two (EfficientNet-Lite0:
# 15.5 million elements, 8.3 ms an image by eager PyTorch, 4.0 ms by OpenVINO).
SAVED_S = 0.56e-9


@dataclass(frozen=True)
class Work:
    """One forward pass of one image.

    Attributes:
        operations: tensor operations.
        elements: numbers that operations other than products write.
    """

    operations: int
    elements: int

    def saving_s(self, images: int, threads: int) -> float:
        """Seconds that a converted network saves over so many images."""
        return images * self.elements * SAVED_S / threads


def measure_work(backbone: Backbone, kind: Kind, images: torch.Tensor) -> Work:
    """The work of a forward pass, an image's share of (N, 3, H, W)."""
    counter = _Counter()
    with counter:
        features_of(backbone, images, kind)
    return Work(counter.operations, counter.elements // len(images))


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched while it is entered, functions without a module included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = 0
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = _call(func, args, kwargs)
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        self.operations += 1
        if isinstance(first, torch.Tensor) and not func.is_view and not _is_product(func):
            self.elements += first.numel()
        return output


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    return func(*args, **(kwargs or {}))


def _is_product(func: Any) -> bool:
    return any(word in func.overloadpacket.__name__ for word in PRODUCTS)
