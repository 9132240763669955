"""Heads: linear, one or two hidden layers, and cosine similarity."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Literal

from tlauto.contracts import FeatureShape, TaskHead
from tlauto.hookspecs import hookimpl
from tlauto.space import Choice, Float, Int, Scalar, Space, number

if TYPE_CHECKING:
    from torch import nn

ALL_TASKS: tuple[str, ...] = ("multiclass", "multilabel", "regression")


class Linear:
    """One linear layer on pooled features, after dropout."""

    name = "linear"
    tasks = ALL_TASKS
    is_linear = True
    space: Space = {"dropout": Float(0.0, 0.5, default=0.0)}

    def features(self, params: Mapping[str, Scalar]) -> Literal["pooled", "unpooled"]:
        """Always pooled."""
        return "pooled"

    def build(self, shape: FeatureShape, num_outputs: int, params: Mapping[str, Scalar]) -> nn.Module:
        """(N, D) → dropout → (N, num_outputs); starts at zero.

        With more features than images, what a random start puts where no image looks is never
        unlearned: R² of 0.44 instead of 0.61 on 326 photos and 1,280 features.
        """
        from torch import nn

        linear = nn.Linear(shape.pooled, num_outputs)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.Dropout(number(params["dropout"])), linear)


class Mlp:
    """Hidden layers of ReLU and dropout, on pooled features or on the flattened feature map.

    `input=flattened, hidden=1024, dropout=0` is Keras' classic `Flatten → Dense(1024, relu) → Dense(n)`;
    `input=flattened, hidden=4096, dropout=0.5` on VGG16 is `25088 → 4096 → ReLU → Dropout(0.5) → n`.
    """

    name = "mlp"
    tasks = ALL_TASKS
    space: Space = {
        "input": Choice(("pooled", "flattened"), "pooled"),
        # A search leaves out wider ones: they took ten times as long in trials, and were no better.
        "hidden": Int(32, 1024, default=512, log=True, settable=4096),
        "layers": Int(1, 2, default=1),
        "dropout": Float(0.0, 0.7, default=0.2),
    }

    def features(self, params: Mapping[str, Scalar]) -> Literal["pooled", "unpooled"]:
        """Unpooled when the map is flattened."""
        return "unpooled" if params["input"] == "flattened" else "pooled"

    def build(self, shape: FeatureShape, num_outputs: int, params: Mapping[str, Scalar]) -> nn.Module:
        """(N, D) or flattened (N, C, H, W) → `layers` times (hidden → ReLU → dropout) → (N, num_outputs)."""
        from torch import nn

        hidden, dropout = int(number(params["hidden"])), number(params["dropout"])
        is_flattened = self.features(params) == "unpooled"
        width = prod(shape.unpooled) if is_flattened else shape.pooled
        layers: list[nn.Module] = [nn.Flatten()] if is_flattened else []
        for _ in range(int(number(params["layers"]))):
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        return nn.Sequential(*layers, nn.Linear(width, num_outputs))


class Cosine:
    """Cosine similarity to one learned direction per class, times a learned scale.

    Source: Gidaris & Komodakis 2018 (arXiv:1804.09501), section 3.2; good with few images a class.
    """

    name = "cosine"
    # A cosine has no bias: it ranks classes against each other and cannot state a level by itself.
    tasks: tuple[str, ...] = ("multiclass",)
    space: Space = {"scale": Float(4.0, 64.0, default=16.0, log=True)}

    def features(self, params: Mapping[str, Scalar]) -> Literal["pooled", "unpooled"]:
        """Always pooled."""
        return "pooled"

    def build(self, shape: FeatureShape, num_outputs: int, params: Mapping[str, Scalar]) -> nn.Module:
        """(N, D) → scale x cosine with each class' direction, (N, num_outputs)."""
        return _cosine(shape.pooled, num_outputs, number(params["scale"]))


def _cosine(width: int, num_outputs: int, scale: float) -> nn.Module:
    # The class stands in a function because this module must not import torch.
    import torch
    from torch import nn
    from torch.nn import functional

    class CosineLayer(nn.Module):
        """Holds `weight` (num_outputs, D) and `scale` ()."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(num_outputs, width))
            self.scale = nn.Parameter(torch.tensor(scale))
            # Only the direction counts, and a long weight turns slowly: with unit entries, ants and
            # bees stayed at 0.35 after 300 steps at 3e-4.
            nn.init.normal_(self.weight, std=0.01)

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            """Logits (N, num_outputs) of features (N, D), each in [-scale, scale]."""
            directions = functional.normalize(self.weight, dim=1)
            return self.scale * functional.linear(functional.normalize(features, dim=1), directions)

    return CosineLayer()


@hookimpl
def task_heads() -> list[TaskHead]:
    """The built-in heads, simplest first."""
    return [Linear(), Mlp(), Cosine()]
