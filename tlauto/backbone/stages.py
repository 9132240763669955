"""Stages: a network's parameters in groups, stem first, as freezing strategies unfreeze them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import nn

Features = Callable[[nn.Module, torch.Tensor], torch.Tensor]
"""From a module and normalised images (N, 3, H, W) to features."""


def stages_by_unit(module: nn.Module, units: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Stages of a module, one for each of its submodules named in `units`, stem first.

    A parameter outside all units joins the unit that precedes it in `named_parameters`, or the first.
    """
    groups: list[list[str]] = [[] for _ in units]
    current = 0
    for name, _ in module.named_parameters():
        current = next((i for i, unit in enumerate(units) if name.startswith(f"{unit}.")), current)
        groups[current].append(name)
    return merge_norm_stages(module, groups)


def stages_by_resolution(
    module: nn.Module, units: Sequence[str], *, size: int, run: Features
) -> tuple[tuple[str, ...], ...]:
    """Stages of a convolutional network: runs of units whose outputs have the same height and width.

    This is the usual meaning of a stage (ResNet's `layer1` to `layer4`, VGG's five blocks), measured
    instead of listed by architecture.

    Args:
        units: names of submodules in the order they run.
        size: side of the images to measure with, pixels.
        run: the forward pass that calls the units.
    """
    heights = _output_heights(module, units, size=size, run=run)
    stage_of: dict[str, int] = {}
    last: int | None = None
    for i, unit in enumerate(units):
        starts = i == 0 or heights.get(unit) != last
        stage_of[unit] = max(stage_of.values(), default=-1) + int(starts)
        last = heights.get(unit)
    names: list[list[str]] = [[] for _ in range(max(stage_of.values()) + 1)]
    current = 0
    for name, _ in module.named_parameters():
        unit = max((u for u in units if name.startswith(f"{u}.")), key=len, default="")
        current = stage_of.get(unit, current)
        names[current].append(name)
    return merge_norm_stages(module, names)


def units_of(module: nn.Module) -> list[str]:
    """Names of a module's children in order, those of a list or sequence in its place."""
    units: list[str] = []
    for name, child in module.named_children():
        is_list = isinstance(child, (nn.Sequential, nn.ModuleList)) and len(child) > 0
        units += [f"{name}.{inner}" for inner, _ in child.named_children()] if is_list else [name]
    return units


def merge_norm_stages(module: nn.Module, groups: Iterable[Iterable[str]]) -> tuple[tuple[str, ...], ...]:
    """Stages from groups of parameter names; a group of nothing but vectors joins its neighbour.

    Vectors are the scales and biases of normalisation layers. A stage of its own for a transformer's
    last norm would make "train the last stage" train almost nothing.
    """
    dims = {name: parameter.ndim for name, parameter in module.named_parameters()}
    stages: list[list[str]] = []
    waiting: list[str] = []
    for group in groups:
        names = list(group)
        if all(dims[name] < 2 for name in names):
            (stages[-1] if stages else waiting).extend(names)
        else:
            stages.append(waiting + names)
            waiting = []
    if waiting:
        stages.append(waiting)
    return tuple(tuple(stage) for stage in stages)


def _output_heights(
    module: nn.Module, units: Sequence[str], *, size: int, run: Features
) -> Mapping[str, int]:
    heights: dict[str, int] = {}

    def remember(unit: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, torch.Tensor) and first.ndim > 2:
                # The images are square: axis 2 is as long as the height in NCHW and in Swin's NHWC
                # maps. Of tokens (N, L, C) it is their number.
                heights[unit] = first.shape[2 if first.ndim == 4 else 1]

        return hook

    hooks = [module.get_submodule(unit).register_forward_hook(remember(unit)) for unit in units]
    was_training = module.training
    try:
        module.eval()
        with torch.no_grad():
            run(module, torch.zeros(1, 3, size, size, device=device_of(module)))
    finally:
        module.train(was_training)
        for handle in hooks:
            handle.remove()
    return heights


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters lie; the CPU when it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
