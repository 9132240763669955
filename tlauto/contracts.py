"""Protocols that plugins implement, frozen values that travel as JSON; imports the standard library only."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from tlauto.errors import ConfigError
from tlauto.losses import Loss
from tlauto.space import Scalar, Space

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Stages = Sequence[Sequence[str]]
"""Parameter names by stage, stem first; every parameter of the backbone stands in exactly one."""


# --- what a backbone is ---------------------------------------------------------------------------


@dataclass(frozen=True)
class BackboneInfo:
    """What is known of a backbone without building it.

    Attributes:
        id: `provider:name`, split at the first colon; the name may hold `/` and `.`.
        params_m: parameters without the classifier, in millions; None when unknown.
        gmacs: multiply-adds of one forward pass at `input_size`, in 1e9; None when unknown.
        input_size: side of the square input, in pixels.
        pretraining: the data and recipe of its weights, e.g. `in1k`.
        licence: SPDX name of the weights' licence, or "unknown".
        accuracy: prior, ImageNet-1k top-1 in [0, 1]; None when unknown.
        cost: prior, seconds of a training step by EfficientNet-Lite0's; is_default: its provider's choice.
    """

    id: str
    params_m: float | None = None
    gmacs: float | None = None
    input_size: int = 224
    pretraining: str = "in1k"
    licence: str = "unknown"
    accuracy: float | None = None
    cost: float | None = None
    is_default: bool = False

    @property
    def provider(self) -> str:
        """The part of the id before the first colon."""
        return self.id.partition(":")[0]

    @property
    def name(self) -> str:
        """The part of the id after the first colon."""
        return self.id.partition(":")[2]


@dataclass(frozen=True)
class WeightsOptions:
    """Where pretrained weights may come from, as the user said.

    Attributes:
        files: backbone id to a local file, from `--weights ID=PATH`; wins over all else.
        folder: folder of `<provider>/<file>`, from `--weights-dir` or `TLAUTO_WEIGHTS`.
        offline: never touch the network; pretrained: False is random initialisation (`--no-pretrained`).
    """

    files: Mapping[str, str] = field(default_factory=dict)
    folder: str | None = None
    offline: bool = False
    pretrained: bool = True


@dataclass(frozen=True)
class WeightsStatus:
    """Whether a backbone's weights can be had.

    Attributes:
        state: `at_hand` (a local file), `downloadable` (network needed) or `missing`.
        detail: one sentence: where they lie, or where they were looked for and how to get them.
        path: the local file when at hand and a file.
    """

    state: Literal["at_hand", "downloadable", "missing"]
    detail: str
    path: str | None = None


@dataclass(frozen=True)
class ImageInput:
    """How a backbone wants its images, exactly as it was pretrained.

    The pipeline is: RGB image; resize; centre crop to `size` x `size`; scale to [0, 1]; reverse the
    channels when `bgr`; subtract `mean`, divide by `std` (in the channel order that results).

    Attributes:
        size: side of the square crop, pixels.
        resize, fit: `fit="crop"`: length of the shorter edge before the crop (>= size);
            `fit="squash"`: both edges, aspect ignored; `fit="border"`: the longer edge, then padded.
        interpolation: PIL's filter.
        mean, std: per channel, in units of [0, 1].
        bgr: channels reversed (Keras' caffe mode).
        resizable: whether other sizes give a working model.
    """

    size: int = 224
    resize: int = 256
    fit: Literal["crop", "squash", "border"] = "crop"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    bgr: bool = False
    resizable: bool = True


@dataclass(frozen=True)
class FeatureShape:
    """Measured output of a backbone for one image: pooled width and unpooled map (C, H, W)."""

    pooled: int
    unpooled: tuple[int, int, int]


@runtime_checkable
class Backbone(Protocol):
    """A pretrained network without its classifier; `TorchBackbone` is one for an ordinary `nn.Module`."""

    module: nn.Module
    input: ImageInput
    stages: tuple[tuple[str, ...], ...]
    feature_shape: FeatureShape

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, D) of normalised images (N, 3, H, W)."""
        ...

    def unpooled(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, C, H, W) of normalised images (N, 3, H, W), before global pooling."""
        ...

    def set_trainable(self, names: Collection[str]) -> None:
        """Let exactly these parameters learn; raises ConfigError for a name it does not have."""
        ...

    def set_training(self, training: bool) -> None:
        """Training or inference mode; what is frozen stays in inference mode either way.

        A BatchNorm is frozen unless all its parameters learn; its running statistics never move
        while it is frozen.
        """
        ...


@runtime_checkable
class BackboneProvider(Protocol):
    """A source of backbones. Must not import its library at module import or in `shortlist`."""

    name: str
    modality: str

    def shortlist(self) -> tuple[BackboneInfo, ...]:
        """A static choice of good backbones, tiny to large, known without importing the library."""
        ...

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[BackboneInfo, ...]:
        """All backbones whose name (without `provider:`) matches a shell glob, sorted by name.

        Includes backbones that exist only as files of `weights`. May import the library.
        """
        ...

    def weights_status(self, id: str, weights: WeightsOptions) -> WeightsStatus:
        """Whether this backbone's weights are at hand, downloadable or missing; never downloads."""
        ...

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        """Build the backbone with its pretrained weights, downloading them when allowed.

        Two builds with the same weights have the same parameter names, whatever was built before.
        Random initialisation only when `weights.pretrained` is False. Raises: UnknownNameError;
        WeightsError when the weights are missing or do not fit.
        """
        ...


# --- what is done with it ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainPlan:
    """What learns in one epoch.

    Attributes:
        trainable: names of backbone parameters that learn; empty freezes the backbone.
        lr_scales: multiplier of the backbone's learning rate per stage, stem first; empty means 1.
    """

    trainable: Sequence[str] = ()
    lr_scales: Sequence[float] = ()


@runtime_checkable
class FreezeStrategy(Protocol):
    """How much of a backbone learns. Plain data in and out; no torch.

    Optional attribute `trains_backbone` (default True): False promises that every plan is empty, so
    that features can be computed once and cached.
    """

    name: str
    space: Space

    def plan(self, stages: Stages, epoch: int, params: Mapping[str, Scalar]) -> TrainPlan:
        """The plan for an epoch (from 0); called once for each, in order, before the first begins."""
        ...


@runtime_checkable
class TaskHead(Protocol):
    """What turns features into outputs. Must not import torch at module import.

    Optional attribute `is_linear` (default False): True promises that the head is one `nn.Linear` on
    pooled features once it is trained, and that its `space` matters to training in mini-batches only,
    so that on cached features the optimum can be computed.
    """

    name: str
    tasks: tuple[str, ...]
    space: Space

    def features(self, params: Mapping[str, Scalar]) -> Literal["pooled", "unpooled"]:
        """Which features the head reads with these parameters."""
        ...

    def build(self, shape: FeatureShape, num_outputs: int, params: Mapping[str, Scalar]) -> nn.Module:
        """A module from (N, D), or (N, C, H, W) when unpooled, to logits (N, num_outputs)."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is predicted: how targets become tensors, the loss, the metrics, the answers."""

    name: str
    space: Space
    metrics: tuple[str, ...]

    def num_outputs(self, classes: Sequence[str]) -> int:
        """Width of the head's output."""
        ...

    def targets(self, values: Sequence[Any], classes: Sequence[str]) -> np.ndarray:
        """Targets as an array: (N,) int64 classes, (N, K) float32 multi-hot or (N,) float32."""
        ...

    def loss(self, train_targets: np.ndarray, num_outputs: int, params: Mapping[str, Scalar]) -> Loss:
        """The loss of (logits (N, K), targets), its constants taken from the training targets."""
        ...

    def predict(self, logits: np.ndarray) -> np.ndarray:
        """Probabilities (N, K), or values (N,) for regression, from logits (N, K)."""
        ...


def trains_backbone(strategy: FreezeStrategy) -> bool:
    """Whether a strategy may let parameters learn (its optional attribute)."""
    return bool(getattr(strategy, "trains_backbone", True))


def is_linear(head: TaskHead) -> bool:
    """Whether a head's optimum on cached features can be computed (its optional attribute)."""
    return bool(getattr(head, "is_linear", False))


# --- what travels between coordinator and worker, as JSON -------------------------------------------


@dataclass(frozen=True)
class TrialSpec:
    """All that a worker needs to run one trial; `tlauto rerun` runs it again from its JSON.

    Attributes:
        number: the trial's in its study, -1 for a refit; fit_on, evaluate_on: parts of the split.
        dataset: path of the dataset file (`tlauto.data.Dataset` as JSON).
        params: sampled values, dotted by owner (`freeze.partial.k`, `head.mlp.dropout`, `optim.name`).
        metric: that is the score; seed: of everything random in this trial; purpose: why it was run.
        epochs, patience: most epochs, and how many without improvement end it; patience 0 never does.
        epoch_images: images per epoch of what is trained in steps; None is the whole training part.
        micro_batch: most images that the network takes at once; None is as many as are in a batch.
        init_head: a checkpoint whose head and feature scaling to start from (LP-FT), or None.
        resume_from: the state that an earlier run of this very trial left behind, or None.
        folder, cache: where its checkpoint and predictions go, and where pixels and features are.
        prove_above: validation score from which a frozen trial is cross-validated too; None is never.
        features, penalty: what a solved head reads, its L2 penalty, as a trial chose; None is to choose.
    """

    number: int
    dataset: str
    task: str
    metric: str
    backbone: str
    strategy: str
    head: str
    params: Mapping[str, Scalar]
    weights: WeightsOptions
    seed: int
    epochs: int
    folder: str
    cache: str
    patience: int = 0
    epoch_images: int | None = None
    fit_on: tuple[str, ...] = ("train",)
    evaluate_on: str = "val"
    init_head: str | None = None
    resume_from: str | None = None
    purpose: Literal["probe", "default", "warm", "search", "promoted", "refit", "rerun"] = "search"
    prove_above: float | None = None
    micro_batch: int | None = None
    features: str | None = None
    penalty: float | None = None


@dataclass(frozen=True)
class EpochResult:
    """One epoch (from 1) of one trial; the worker waits for the answer, go on or prune.

    `score` is higher-is-better, losses are means per image, `seconds` is wall time with validation.
    """

    number: int
    epoch: int
    score: float
    train_loss: float
    val_loss: float
    seconds: float


@dataclass(frozen=True)
class TrialDone:
    """A trial that ended by itself or was pruned.

    Attributes:
        score: of the best epoch, higher is better; metrics: all of it, on `evaluate_on`: name to
            {"value", "low", "high"} (95 %).
        is_pruned: stopped by the coordinator; trainable: parameters that learned, head included.
        checkpoint: file name in the trial's folder; features: what its head reads (`training.model.Kind`);
            penalty: of a solved head's mean loss, L2, where cross-validation chose it.
        held_out: cross-validated score over `fit_on` and `evaluate_on` together; None without one.
        feature_seconds: to decode an image and compute its features; None if it computed none, or few.
        versions: distribution name to version; provenance: what came from which plugin.
    """

    number: int
    score: float
    metrics: Mapping[str, Mapping[str, float]]
    val_loss: float
    best_epoch: int
    epochs: int
    seconds: float
    checkpoint: str
    is_pruned: bool = False
    trainable: int = 0
    held_out: float | None = None
    features: str = "pooled"
    feature_seconds: float | None = None
    penalty: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialFailed:
    """A trial that could not end: `TrialError.kind`, a sentence, the traceback, bytes it could not have."""

    number: int
    kind: str
    message: str
    detail: str = ""
    bytes: int | None = None


def to_json(value: Any) -> str:
    """One line of JSON for a dataclass of this module."""
    return json.dumps(dataclasses.asdict(value), allow_nan=True)


def spec_from_json(text: str) -> TrialSpec:
    """The `TrialSpec` written by `to_json`; raises ConfigError when a field is unknown or missing."""
    try:
        data = json.loads(text)
        data |= {"weights": WeightsOptions(**data["weights"]), "fit_on": tuple(data["fit_on"])}
        return TrialSpec(**data)
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"this is not a trial specification of this version: {error}") from None
