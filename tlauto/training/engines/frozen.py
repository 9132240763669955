"""The function that every engine computes, and when two of them compute the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tlauto.contracts import Backbone
from tlauto.training.model import Kind, features_of

Engine = Callable[[torch.Tensor], torch.Tensor]
"""From normalised images (N, 3, H, W) float32 to features (N, D) or (N, C, H, W)."""

# Largest difference from eager PyTorch, as a part of the largest feature. Engines that work in float32
# stay below 3e-6; TF32, bfloat16 or a wrongly converted operation would not stay below this.
BOUND = 1e-3


class FrozenFeatures(nn.Module):
    """One kind of a backbone's features as a module, which exporters want."""

    def __init__(self, backbone: Backbone, kind: Kind) -> None:
        super().__init__()
        self.module = backbone.module
        self.kind: Kind = kind
        # Past nn.Module's own setter: a Backbone that is a module must not be registered twice.
        object.__setattr__(self, "source", backbone)
        self.training = False  # alone: the backbone's modules are in the modes that it chose

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features of normalised images (N, 3, H, W)."""
        source: Backbone = self.source  # type: ignore[assignment]
        return features_of(source, images, self.kind)


def same_features(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether features differ by at most `BOUND` of the largest expected one, and are finite."""
    if found.shape != expected.shape or not bool(torch.isfinite(expected).all()):
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= BOUND * expected.abs().max())  # not so when found has a NaN
