"""What a provider needs to offer PyTorch networks: features, stages, safe reading of weights.

This package imports torch: import it inside functions.
"""

from __future__ import annotations

from tlauto.backbone.files import (
    first_mismatches,
    load_strictly,
    read_tensors,
    tensor_shapes,
)
from tlauto.backbone.levels import narrowed
from tlauto.backbone.network import TorchBackbone, count_parameters, hash_weights, mean_of_map
from tlauto.backbone.split import Parts, agree, cut
from tlauto.backbone.stages import merge_norm_stages, stages_by_resolution, stages_by_unit, units_of

__all__ = [
    "Parts",
    "TorchBackbone",
    "agree",
    "count_parameters",
    "cut",
    "first_mismatches",
    "hash_weights",
    "load_strictly",
    "mean_of_map",
    "merge_norm_stages",
    "narrowed",
    "read_tensors",
    "stages_by_resolution",
    "stages_by_unit",
    "tensor_shapes",
    "units_of",
]
