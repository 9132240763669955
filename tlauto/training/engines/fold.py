"""BatchNorm folded into the convolutions before it.

Without torch.fx, which cannot trace padding that depends on the size of the image: which BatchNorm
follows which convolution is seen in one forward pass.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tlauto.backbone import TorchBackbone
from tlauto.contracts import Backbone


def folded(backbone: Backbone, images: torch.Tensor) -> Backbone | None:
    """A copy of a backbone in inference mode with its BatchNorms folded; None when there are none.

    Args:
        images: (N, 3, H, W) for the forward pass; one is enough.

    A BatchNorm is folded when its input is the output of a convolution, and both ran once. Whether the
    convolution's output also goes elsewhere is not seen: compare the features.
    """
    if not isinstance(backbone, TorchBackbone):  # how another class reaches its module is not known
        return None
    copied = copy.copy(backbone)
    copied.module = copy.deepcopy(backbone.module)
    pairs = _pairs(copied, images)
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(convolution, norm)
        convolution.weight, convolution.bias = fused.weight, fused.bias
    _replace(copied.module, {norm: _what_is_left(norm) for _, norm in pairs})
    copied.module.to(memory_format=torch.channels_last)
    return copied if pairs else None


def _pairs(backbone: Backbone, images: torch.Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Convolutions and the BatchNorms that follow them, in the order they run."""
    outputs: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # holds them: an id is used again otherwise
    runs: dict[nn.Module, int] = {}
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_convolution(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        outputs[id(output)] = module, output
        runs[module] = runs.get(module, 0) + 1

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        runs[module] = runs.get(module, 0) + 1
        if inputs and id(inputs[0]) in outputs and isinstance(module, nn.BatchNorm2d):
            pairs.append((outputs[id(inputs[0])][0], module))

    modules = list(backbone.module.modules())
    hooks = [m.register_forward_hook(after_convolution) for m in modules if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(before_norm) for m in modules if _is_foldable(m)]
    try:
        backbone.unpooled(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [(first, second) for first, second in pairs if runs[first] == runs[second] == 1]


def _is_foldable(module: nn.Module) -> bool:
    is_norm = isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
    # A subclass may do anything after the normalisation; timm's says what, in `drop` and `act`.
    is_known = type(module) is nn.BatchNorm2d or (hasattr(module, "drop") and hasattr(module, "act"))
    return is_norm and is_known and not module.training


def _what_is_left(norm: nn.Module) -> nn.Module:
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    parts = (norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.Sequential(*(part for part in parts if not isinstance(part, nn.Identity))).eval()


def _replace(module: nn.Module, by: dict[nn.Module, nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if child in by:
                setattr(parent, name, by[child])
