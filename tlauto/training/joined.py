"""A linear head on the features of several backbones side by side, cut into one ordinary classifier for each.

A linear head on columns side by side is a sum: W z + b = W₁ z₁ + W₂ z₂ + … + b. So a model that reads
several backbones is several classifiers whose raw outputs are added before the task makes answers of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tlauto import recipe
from tlauto.contracts import TrialSpec
from tlauto.data import Dataset
from tlauto.errors import TrialError
from tlauto.plugins import Registry
from tlauto.training.checkpoint import kind_of, load_checkpoint
from tlauto.training.model import Classifier, Readout, Widths, build_readout, restore
from tlauto.training.params import read
from tlauto.training.pretrained import frozen_backbone
from tlauto.training.tasks import find_task


def only_linear(head: nn.Module) -> nn.Linear:
    """The one layer of a linear head that has parameters; raises TrialError when it has others."""
    layers = [module for module in head.modules() if next(module.parameters(recurse=False), None) is not None]
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear) or layers[0].bias is None:
        raise TrialError(
            "the head says that it is linear, but it is not one nn.Linear with a bias; its plugin must "
            "leave out `is_linear`"
        )
    return layers[0]


def restore_parts(
    spec: TrialSpec, registry: Registry, dataset: Dataset, checkpoint: Path, device: str
) -> list[Classifier]:
    """The classifiers of a finished trial, one for each backbone; their outputs add up to its.

    Raises: TrialError when the checkpoint is missing, damaged or of another model.
    """
    others = recipe.beside(spec.params)
    if not others:
        return [restore(spec, registry, dataset, checkpoint, device)]
    task, head, kind = find_task(spec.task), registry.head(spec.head), kind_of(checkpoint)
    settings = read(spec, registry.strategy(spec.strategy), head, task)
    specs = [spec, *(replace(spec, backbone=other) for other in others)]
    backbones = [frozen_backbone(each, registry, torch.device(device)) for each in specs]
    widths = [Widths.of(backbone) for backbone in backbones]
    given = head, settings.head, task.num_outputs(dataset.classes), kind
    whole = build_readout(widths[0], *given, beside=widths[1:])
    load_checkpoint(whole, checkpoint, spec)
    parts = [build_readout(each, *given) for each in widths]
    cut(whole, parts)
    found = [Classifier(*both, mirror=settings.mirror) for both in zip(backbones, parts, strict=True)]
    return [classifier.to(device).eval() for classifier in found]


def cut(whole: Readout, parts: Sequence[Readout]) -> None:
    """Put the columns of a readout into new ones, one for each backbone, so that their outputs add up to its.

    What is added once, the bias and the mean of a regression's targets, is in the first.
    """
    linear = only_linear(whole.head)
    widths = [len(part.norm.mean) for part in parts]
    joined = whole.norm.mean, whole.norm.std, linear.weight
    columns = (torch.split(tensor, widths, dim=-1) for tensor in joined)
    with torch.no_grad():
        for place, (part, mean, std, weight) in enumerate(zip(parts, *columns, strict=True)):
            own, share = only_linear(part.head), 0.0 if place else 1.0
            part.norm.mean.copy_(mean)
            part.norm.std.copy_(std)
            own.weight.copy_(weight)
            own.bias.copy_(share * linear.bias)
            part.output.mean.copy_(share * whole.output.mean)
            part.output.std.copy_(whole.output.std)
