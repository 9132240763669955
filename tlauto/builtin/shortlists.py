"""Static shortlists: facts about good backbones, known without importing their library."""

from __future__ import annotations

from tlauto.contracts import BackboneInfo


def _info(
    id: str, params_m: float, gmacs: float, accuracy: float, cost: float, *, licence: str,
    pretraining: str, input_size: int = 224, is_default: bool = False,
) -> BackboneInfo:  # fmt: skip
    return BackboneInfo(id, params_m, gmacs, input_size, pretraining, licence, accuracy, cost, is_default)


TIMM: tuple[BackboneInfo, ...] = (
    BackboneInfo("timm:resnet18.a1_in1k", licence="Apache-2.0", pretraining="a1_in1k"),
)

TORCHVISION: tuple[BackboneInfo, ...] = (
    BackboneInfo("torchvision:resnet18", licence="BSD-3-Clause", pretraining="IMAGENET1K_V1"),
)
