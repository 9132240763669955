"""The pretrained backbone of a trial, and small ones that a worker keeps for the next that uses them."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict

import torch

from tlauto.backbone import TorchBackbone
from tlauto.contracts import Backbone, TrialSpec, WeightsOptions
from tlauto.plugins import Registry
from tlauto.recipe import scale_of
from tlauto.scales import at_scale
from tlauto.training.kept import kept
from tlauto.training.seeding import seed_everything

SMALL = 2**25
"""Bytes of a backbone that is kept, an eighth of all that may be: 32 MiB, or eight million weights."""


def load_backbone(spec: TrialSpec, registry: Registry, device: torch.device) -> Backbone:
    """The trial's pretrained backbone on `device`, frozen, for images of the size that the trial asks for.

    Without pretrained weights its random initialisation is the same in every trial, whatever the
    trial's seed: features, checkpoints and heads of one trial then fit those of the next.
    Raises: TrialError when it takes no images of that size.
    """
    return _prepared(_load(spec, registry), spec, device)


def frozen_backbone(spec: TrialSpec, registry: Registry, device: torch.device) -> Backbone:
    """The same for who changes nothing of it: on a CPU perhaps the one that was used before.

    To build it and read its weights takes tenths of a second: a hundred trials that are solved. On a GPU
    it would take the memory that others need.
    """
    if device.type != "cpu":
        return load_backbone(spec, registry, device)
    key = _key(spec.backbone, scale_of(spec.params), spec.weights, registry)
    return _prepared(kept(key, lambda: _load(spec, registry), _bytes), spec, device)


def checked_backbone(id: str, weights: WeightsOptions, registry: Registry) -> Backbone:
    """A backbone as its provider loads it, kept for the trials on a CPU that read its features.

    Not one without pretrained weights: a library that is imported only now has not heard of the seed.
    """
    provider = registry.provider(id.partition(":")[0])
    key = _key(id, 1.0, weights, registry) if weights.pretrained else None
    return kept(key, lambda: provider.load(id, weights), _bytes)


def _key(id: str, scale: float, weights: WeightsOptions, registry: Registry) -> Hashable:
    return "backbone", registry, id, scale, json.dumps(asdict(weights), sort_keys=True)


def _bytes(backbone: Backbone) -> int | None:
    """How many it takes; None when that is too many to keep it."""
    tensors = (*backbone.module.parameters(), *backbone.module.buffers())
    taken = sum(tensor.nbytes for tensor in tensors)
    return taken if taken <= SMALL else None


def _load(spec: TrialSpec, registry: Registry) -> Backbone:
    seed_everything(0)
    provider = registry.provider(spec.backbone.partition(":")[0])
    return at_scale(provider.load(spec.backbone, spec.weights), scale_of(spec.params), id=spec.backbone)


def _prepared(backbone: Backbone, spec: TrialSpec, device: torch.device) -> Backbone:
    seed_everything(spec.seed)
    backbone.set_trainable(())
    backbone.set_training(False)
    backbone.module.to(device)
    if isinstance(backbone, TorchBackbone):
        backbone.module.to(memory_format=torch.channels_last)  # 1.6 times as fast on CPU
    return backbone
