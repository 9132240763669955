"""Static shortlists of the built-in PyTorch providers: tiny to large, permissively licensed.

Facts, so that a search space can be built without importing the libraries:

- parameters without the classifier and multiply-adds at the input size: counted on the networks;
- accuracy: ImageNet-1k top-1 as the library publishes it, at its own test resolution (timm's
  `results-imagenet.csv`, torchvision's `Weights.meta`);
- cost: training time an image relative to EfficientNet-Lite0, from timm's published AMP training
  benchmark on one RTX 3090; SqueezeNet and ShuffleNet, which it lacks, were timed on one CPU core;
- licences: of the weights, as timm and torchvision state them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from tlauto.contracts import BackboneInfo

# (name, input size, parameters in millions, GMACs, top-1, cost, licence)
_TIMM = (
    ("mobilenetv3_small_100.lamb_in1k", 224, 1.52, 0.055, 0.6766, 0.27, "Apache-2.0"),
    ("mobilenetv2_100.ra_in1k", 224, 2.22, 0.299, 0.7298, 0.92, "Apache-2.0"),
    ("tf_efficientnet_lite0.in1k", 224, 3.37, 0.384, 0.7483, 1.0, "Apache-2.0"),
    ("mobilenetv3_large_100.ra_in1k", 224, 4.20, 0.215, 0.7577, 0.78, "Apache-2.0"),
    ("efficientnet_b0.ra_in1k", 224, 4.01, 0.385, 0.7769, 1.22, "Apache-2.0"),
    ("resnet18.a1_in1k", 224, 11.18, 1.814, 0.7316, 0.61, "Apache-2.0"),
    ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", 224, 5.52, 1.253, 0.7545, 0.93, "Apache-2.0"),
    ("resnet50.a1_in1k", 224, 23.51, 4.087, 0.8121, 1.75, "Apache-2.0"),
    ("convnext_nano.in12k_ft_in1k", 224, 14.95, 2.445, 0.8286, 1.70, "Apache-2.0"),
    ("vit_small_patch16_224.augreg_in21k_ft_in1k", 224, 21.67, 4.598, 0.8138, 2.02, "Apache-2.0"),
    ("convnext_tiny.in12k_ft_in1k", 224, 27.82, 4.455, 0.8445, 2.61, "Apache-2.0"),
    ("swin_tiny_patch4_window7_224.ms_in22k_ft_in1k", 224, 27.52, 4.490, 0.8097, 3.29, "MIT"),
    ("tf_efficientnetv2_s.in21k_ft_in1k", 300, 20.18, 5.306, 0.8429, 4.37, "Apache-2.0"),
    ("convnext_small.in12k_ft_in1k", 224, 49.45, 8.683, 0.8533, 4.38, "Apache-2.0"),
    ("vit_base_patch16_224.augreg2_in21k_ft_in1k", 224, 85.80, 17.563, 0.8510, 5.43, "Apache-2.0"),
)  # fmt: skip

# (name, published weights, input size, parameters in millions, GMACs, top-1, cost)
_TORCHVISION = (
    ("squeezenet1_1", "IMAGENET1K_V1", 224, 0.72, 0.263, 0.5818, 0.31),
    ("shufflenet_v2_x1_0", "IMAGENET1K_V1", 224, 1.25, 0.144, 0.6936, 0.29),
    ("mobilenet_v3_small", "IMAGENET1K_V1", 224, 1.52, 0.055, 0.6767, 0.27),
    ("mobilenet_v2", "IMAGENET1K_V2", 224, 2.22, 0.299, 0.7215, 0.92),
    ("mobilenet_v3_large", "IMAGENET1K_V2", 224, 4.20, 0.215, 0.7527, 0.78),
    ("efficientnet_b0", "IMAGENET1K_V1", 224, 4.01, 0.385, 0.7769, 1.22),
    ("resnet18", "IMAGENET1K_V1", 224, 11.18, 1.814, 0.6976, 0.61),
    ("densenet121", "IMAGENET1K_V1", 224, 6.95, 2.833, 0.7443, 2.33),
    ("regnet_y_1_6gf", "IMAGENET1K_V2", 224, 10.31, 1.611, 0.8088, 3.28),
    ("resnet50", "IMAGENET1K_V2", 224, 23.51, 4.087, 0.8086, 1.75),
    ("swin_t", "IMAGENET1K_V1", 224, 27.52, 4.490, 0.8147, 3.29),
    ("convnext_tiny", "IMAGENET1K_V1", 224, 27.82, 4.455, 0.8252, 2.61),
    ("efficientnet_v2_s", "IMAGENET1K_V1", 384, 20.18, 8.364, 0.8423, 6.8),
    ("vgg16", "IMAGENET1K_V1", 224, 134.26, 15.466, 0.7159, 3.91),
    ("vit_b_16", "IMAGENET1K_V1", 224, 85.80, 17.563, 0.8107, 5.43),
    ("convnext_base", "IMAGENET1K_V1", 224, 87.57, 15.354, 0.8406, 6.3),
)

TIMM = tuple(
    BackboneInfo(
        f"timm:{name}", params, gmacs, size, name.partition(".")[2], licence, top1, cost,
        is_default=name.startswith("tf_efficientnet_lite0"),
    )
    for name, size, params, gmacs, top1, cost, licence in _TIMM
)  # fmt: skip
"""timm's; each id names its weights."""

TORCHVISION = tuple(
    BackboneInfo(
        f"torchvision:{name}", params, gmacs, size, weights, "BSD-3-Clause", top1, cost,
        is_default=name == "mobilenet_v3_large",
    )
    for name, weights, size, params, gmacs, top1, cost in _TORCHVISION
)  # fmt: skip
"""torchvision's; an id without weights' name means the library's default weights, which these are."""


def with_architecture(info: BackboneInfo, shortlist: Iterable[BackboneInfo]) -> BackboneInfo:
    """`info` with the size and cost of the shortlisted backbone of its architecture, where it has none.

    What depends on the weights, accuracy and licence above all, is not taken over; what depends on
    the input size, only when that is the same.
    """
    arch = info.name.partition(".")[0]
    for known in shortlist:
        if known.name.partition(".")[0] == arch:
            changes: dict[str, float | None] = {"params_m": info.params_m or known.params_m}
            if known.input_size == info.input_size:
                changes |= {"gmacs": info.gmacs or known.gmacs, "cost": info.cost or known.cost}
            return dataclasses.replace(info, **changes)  # type: ignore[arg-type]
    return info
