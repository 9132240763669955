"""A classifier: backbone, feature scaling, head, output scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from tlauto.backbone import narrowed
from tlauto.contracts import Backbone, FeatureShape, TaskHead, TrialSpec, trains_backbone
from tlauto.data import Dataset
from tlauto.errors import TrialError
from tlauto.levels import Level, Levelled, level_shape_of, width_of
from tlauto.plugins import Registry
from tlauto.space import Scalar
from tlauto.training.pretrained import frozen_backbone, load_backbone
from tlauto.training.tasks import find_task

Kind = Literal["pooled", "unpooled", "levels", "grid"]
"""What of a backbone a head reads: the pooled features, the last maps, or the means of what all stages
hand on, over the whole map (`levels`) or its quarters (`grid`), pooled features included."""

LEVELS: Kind = "levels"
GRID: Kind = "grid"

BOUND = 1.0
"""Least deviation that a channel is divided by, over the average channel's; chosen by the held-out loss
of `bench/feature_scaling.py`, never on a test part."""

GRID_BOUND = 0.1
"""The same for the kind `grid`, of which no backbone that learns is ever read."""


class Standardise(nn.Module):
    """Features (N, C) or (N, C, H, W) with zero mean and unit deviation per channel.

    The figures are those of the pretrained backbone on the training images and never change, so one
    range of learning rates serves all backbones.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, channels: int, bound: float = BOUND, *, widths: Sequence[int] = ()) -> None:
        """Args: widths: channels of each backbone, where there are several side by side."""
        super().__init__()
        self.bound = bound
        self.widths = list(widths) or [channels]
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def measure(self, features: torch.Tensor) -> None:
        """Take mean and deviation from features (N, C) or (N, C, H, W).

        No channel is enlarged beyond the average one of its backbone. A channel that hardly moves here
        explodes once the backbone learns: fine-tuning from a probe of ten digits fell from 0.93 to 0.70
        with plain standardisation, while frozen probes gain a little by the bound
        (`bench/feature_scaling.py`).
        """
        axes = [0, *range(2, features.ndim)]
        std, mean = torch.std_mean(features.double(), dim=axes, correction=0)
        self.mean.copy_(mean)
        least = torch.cat([self.bound * own.mean().expand_as(own) for own in torch.split(std, self.widths)])
        self.std.copy_(torch.where(least > 0, torch.maximum(std, least), 1.0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Scaled features of the same shape."""
        shape = (1, -1) + (1,) * (features.ndim - 2)
        return (features - self.mean.view(shape)) / self.std.view(shape)


class Rescale(nn.Module):
    """Outputs (N, K) from standard units to those of the targets; the identity for classes."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_outputs))
        self.register_buffer("std", torch.ones(num_outputs))

    def measure(self, targets: torch.Tensor) -> None:
        """Take mean and deviation from regression targets (N,)."""
        std, mean = torch.std_mean(targets.double(), dim=0, correction=0)
        self.mean.fill_(float(mean))
        self.std.fill_(float(std) if std > 0 else 1.0)

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Outputs (N, K) in the targets' units."""
        return outputs * self.std + self.mean


class Readout(nn.Module):
    """What follows the backbone: `norm`, `head`, `output`. Trials on cached features need no more.

    Args:
        head: from (N, C), or (N, C, H, W) when `kind` is unpooled, to (N, num_outputs).
        widths: channels of each backbone, where it reads several side by side.
    """

    def __init__(
        self, head: nn.Module, kind: Kind, channels: int, num_outputs: int, *, widths: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        self.norm = Standardise(channels, GRID_BOUND if kind == GRID else BOUND, widths=widths)
        self.head = head
        self.output = Rescale(num_outputs)

    def read(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, or regression values, (N, num_outputs) from the backbone's features."""
        return self.answer(self.norm(features))

    def answer(self, scaled: torch.Tensor) -> torch.Tensor:
        """The same from features that `norm` has scaled."""
        outputs: torch.Tensor = self.output(self.head(scaled))
        return outputs


class Classifier(Readout):
    """The whole network. Its state's names begin with `backbone.`, `norm.`, `head.`, `output.`."""

    source: Backbone

    def __init__(self, backbone: Backbone, readout: Readout, *, mirror: bool = False) -> None:
        """Args: mirror: read the mean of the features of an image and of its mirror image."""
        super().__init__(readout.head, readout.kind, len(readout.norm.mean), len(readout.output.mean))
        self.norm.load_state_dict(readout.norm.state_dict())
        self.output.load_state_dict(readout.output.state_dict())
        self.backbone = backbone.module
        self.mirror = mirror
        # Past nn.Module's own setter: a Backbone that is a module must not be registered twice.
        object.__setattr__(self, "source", backbone)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits, or regression values, (N, num_outputs) of normalised images (N, 3, H, W)."""
        features = features_of(self.source, images, self.kind)
        if self.mirror:
            features = mirrored(features, features_of(self.source, images.flip(-1), self.kind))
        return self.read(features)

    def train(self, mode: bool = True) -> Classifier:
        """Training or inference mode; what is frozen in the backbone stays in inference mode."""
        super().train(mode)
        self.source.set_training(mode)
        return self


def features_of(backbone: Backbone, images: torch.Tensor, kind: Kind) -> torch.Tensor:
    """Features (N, D), or (N, C, H, W) when unpooled, of normalised images (N, 3, H, W).

    Raises: TrialError for levels of a backbone that does not offer them.
    """
    if kind == "pooled":
        return backbone.pooled(images)
    if kind == "unpooled":
        return backbone.unpooled(images)
    if not isinstance(backbone, Levelled):
        raise TrialError("the backbone does not offer the features of its earlier stages (`levels`)")
    return narrowed(backbone.levels(images), backbone.level_shape, to=kind)


def mirrored(features: torch.Tensor, of_mirrors: torch.Tensor) -> torch.Tensor:
    """The mean of images' features (N, …) and those of their mirror images; maps (N, C, H, W) turned back."""
    return (features + (of_mirrors.flip(-1) if of_mirrors.ndim == 4 else of_mirrors)) / 2


@dataclass(frozen=True)
class Widths:
    """What a head can read of one backbone."""

    shape: FeatureShape
    levels: tuple[Level, ...]

    @classmethod
    def of(cls, backbone: Backbone) -> Widths:
        """Those of a backbone."""
        return cls(backbone.feature_shape, level_shape_of(backbone))

    def shape_of(self, kind: Kind) -> FeatureShape:
        """The shape as a head is to see it: the width of what it reads is the pooled one."""
        if kind in ("pooled", "unpooled"):
            return self.shape
        return FeatureShape(width_of(self.levels, kind=kind), self.shape.unpooled)


def build_readout(
    widths: Widths, head: TaskHead, params: Mapping[str, Scalar], num_outputs: int,
    kind: Kind | None = None, *, beside: Sequence[Widths] = (),
) -> Readout:  # fmt: skip
    """A new readout with the head that these parameters describe.

    Args:
        kind: what a head that reads pooled features gets instead; by default just these.
        beside: of further backbones, whose columns follow; for a head that does not read maps.
    """
    kind = kind or head.features(params)
    shape = widths.shape_of(kind)
    channels = shape.unpooled[0] if kind == "unpooled" else shape.pooled
    if not beside:
        return Readout(head.build(shape, num_outputs, params), kind, channels, num_outputs)
    each = [channels, *(other.shape_of(kind).pooled for other in beside)]
    shape = FeatureShape(sum(each), shape.unpooled)
    return Readout(head.build(shape, num_outputs, params), kind, shape.pooled, num_outputs, widths=each)


def assemble(
    backbone: Backbone, head: TaskHead, params: Mapping[str, Scalar], num_outputs: int,
    kind: Kind | None = None, *, mirror: bool = False,
) -> Classifier:  # fmt: skip
    """A classifier of this backbone with a new head; `kind` as for `build_readout`."""
    readout = build_readout(Widths.of(backbone), head, params, num_outputs, kind)
    return Classifier(backbone, readout, mirror=mirror)


def restore(
    spec: TrialSpec, registry: Registry, dataset: Dataset, checkpoint: Path, device: str
) -> Classifier:
    """The classifier of a finished trial, from pretrained weights and its checkpoint.

    Raises: TrialError when the checkpoint is missing, damaged or of another model.
    """
    from tlauto.training.checkpoint import kind_of, load_checkpoint
    from tlauto.training.params import read

    task, head = find_task(spec.task), registry.head(spec.head)
    strategy = registry.strategy(spec.strategy)
    settings = read(spec, strategy, head, task)
    load = load_backbone if trains_backbone(strategy) else frozen_backbone
    backbone = load(spec, registry, torch.device(device))
    outputs = task.num_outputs(dataset.classes)
    kind = kind_of(checkpoint)
    classifier = assemble(backbone, head, settings.head, outputs, kind, mirror=settings.mirror)
    load_checkpoint(classifier, checkpoint, spec)
    return classifier.to(device).eval()
