"""What `handover.py` writes, read where tlauto is not installed: the split, and networks with their weights.

Needs timm, torchvision and safetensors only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

Part = list[tuple[str, int]]
"""Files of images and their classes' indices."""

CLASSIFIERS = ("avgpool", "classifier", "fc", "head", "heads")
"""What torchvision calls its networks' children from global pooling on."""


@dataclass(frozen=True)
class Network:
    """A pretrained network of a library, and how it wants its images.

    Attributes:
        id: what tlauto calls it.
        library: `timm` or `torchvision`.
        arch, kwargs: what the library builds it from.
        file: safetensors of its tensors without the classifier, under the library's names.
        size: side of the square image, pixels.
        mean, std: per channel, in units of [0, 1].
    """

    id: str
    library: str
    arch: str
    kwargs: dict[str, Any]
    file: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Handed:
    """A dataset with its split, and the networks, best prior first."""

    classes: tuple[str, ...]
    parts: dict[str, Part]
    networks: tuple[Network, ...]


def read(file: str | Path) -> Handed:
    """What `handover.py --export` wrote."""
    data = json.loads(Path(file).read_text(encoding="utf-8"))
    parts = {name: [(path, int(target)) for path, target in rows] for name, rows in data["parts"].items()}
    return Handed(tuple(data["classes"]), parts, tuple(Network(**one) for one in data["networks"]))


def build(network: Network) -> nn.Module:
    """The network with its weights: of timm without classifier, of torchvision without what follows its maps.

    Raises: ValueError when the weights do not fit, or torchvision's network is no plain row of layers.
    """
    from safetensors.torch import load_file

    tensors = load_file(network.file)
    if network.library == "timm":
        import timm

        model: nn.Module = timm.create_model(network.arch, pretrained=False, num_classes=0, **network.kwargs)
        missing, unknown = model.load_state_dict(tensors, strict=False)
    else:
        from torchvision import models

        whole: nn.Module = models.get_model(network.arch, weights=None, **network.kwargs)
        missing, unknown = whole.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name.partition(".")[0] not in CLASSIFIERS]
        model = body(whole)
    if missing or unknown:
        raise ValueError(f"{network.id}: the weights do not fit {network.arch} ({[*missing, *unknown][:3]})")
    if network.library == "torchvision" and _maps(model, network.size) != 4:
        raise ValueError(f"{network.id}: the layers of {network.arch} are no plain row that ends in maps")
    return model


def body(whole: nn.Module) -> nn.Sequential:
    """The children of a torchvision network up to global pooling."""
    names = [name for name, _ in whole.named_children()]
    cut = next((i for i, name in enumerate(names) if name in CLASSIFIERS), len(names))
    return nn.Sequential(*list(whole.children())[:cut])


def _maps(model: nn.Module, size: int) -> int:
    """Dimensions of what a network gives for an image; 0 when it does not run."""
    try:
        with torch.inference_mode():
            return int(model.eval()(torch.zeros(1, 3, size, size)).ndim)
    except (RuntimeError, TypeError, NotImplementedError, AttributeError):
        return 0
