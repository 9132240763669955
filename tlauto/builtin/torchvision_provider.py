"""Backbones of torchvision: all its image classifiers, each with its own preprocessing.

Names are torchvision's: `resnet50.IMAGENET1K_V1`; without weights' name, `resnet50`, the library's
default weights. A file `torchvision/resnet50.pth` in the weights folder is `torchvision:resnet50`,
and `torchvision/resnet50.mine.pth` is `torchvision:resnet50.mine`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from tlauto.builtin import hub
from tlauto.builtin import weights as files
from tlauto.builtin.shortlists import TORCHVISION, with_architecture
from tlauto.contracts import (
    Backbone,
    BackboneInfo,
    BackboneProvider,
    ImageInput,
    WeightsOptions,
    WeightsStatus,
)
from tlauto.errors import UnknownNameError, WeightsError, did_you_mean
from tlauto.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

FEATURES_ONLY = "IMAGENET1K_FEATURES"
"""VGG16 weights whose classifier is not a number (they serve detectors)."""


@hookimpl
def backbone_providers() -> list[BackboneProvider]:
    """torchvision."""
    return [TorchvisionProvider()]


class TorchvisionProvider:
    """torchvision's image classifiers; weights from a file, a folder, torch.hub's cache or the web."""

    name = "torchvision"
    modality = "image"

    def shortlist(self) -> tuple[BackboneInfo, ...]:
        """A static choice, tiny to large, with permissive licences."""
        return TORCHVISION

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[BackboneInfo, ...]:
        """Backbones by glob over `name.WEIGHTS`, the folder's files, or one exact name."""
        local = _folder_names(weights)
        given = {id.removeprefix("torchvision:") for id in weights.files if id.startswith("torchvision:")}
        names = {f"{arch}.{entry.name}" for arch in _architectures() for entry in _entries(arch)}
        names |= {*local, *(name for name in given if _arch(name) in _architectures())}
        found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        found |= {pattern} & set(_architectures())
        return tuple(_info(name, local.get(name)) for name in sorted(found))

    def weights_status(self, id: str, weights: WeightsOptions) -> WeightsStatus:
        """Looks at `--weights`, the folder and torch.hub's cache; never downloads."""
        name = _checked_name(id, weights)
        if not weights.pretrained:
            return files.random_status()
        path, origin = _locate(name, weights)
        if path is not None:
            return WeightsStatus("at_hand", f"{origin}: {path}", str(path))
        entry = _entry(name)
        source = hub.source(None, entry.url) if entry else None
        names = [name] if entry is None else [name, PurePosixPath(entry.url).stem]
        return files.absent_status(id, names, weights, source=source, cache=hub.cache_folder(None))

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        """The network without its classifier; see `BackboneProvider.load`."""
        from tlauto.backbone import load_strictly, read_tensors

        name = _checked_name(id, weights)
        path = self._file(id, name, weights) if weights.pretrained else None
        recipe = _recipe(name, path)
        model, head = _build(_arch(name), recipe)
        if path is not None:
            tensors = {_renamed(n): t for n, t in read_tensors(path).items() if not n.startswith(head)}
            load_strictly(model, tensors, id=id, path=path)
        return _backbone(model, recipe.input)

    def _file(self, id: str, name: str, weights: WeightsOptions) -> Path:
        path, _ = _locate(name, weights)
        if path is not None:
            return path
        status = self.weights_status(id, weights)
        if status.state == "missing":
            raise WeightsError(status.detail)
        entry = _entry(name)
        return hub.download(None, None, entry.url if entry else None, id=id)


@dataclass(frozen=True)
class _Recipe:
    """How to build a network: its preprocessing, and whether its dense layers are to be left out."""

    input: ImageInput
    features_only: bool


# --- names ------------------------------------------------------------------------------------------


def _arch(name: str) -> str:
    return name.partition(".")[0]


def _architectures() -> list[str]:
    """torchvision's classifiers, without the quantized ones."""
    from torchvision import models

    return cast("list[str]", models.list_models(module=models))


def _entries(arch: str) -> list[Any]:
    """The published weights of an architecture, oldest first."""
    from torchvision import models

    return list(models.get_model_weights(arch))


def _entry(name: str) -> Any | None:
    """The published weights a name stands for; without weights' name, the default; None if unknown."""
    from torchvision import models

    arch, _, tag = name.partition(".")
    weights = models.get_model_weights(arch)
    return weights.__members__.get(tag) if tag else weights.DEFAULT


def _checked_name(id: str, weights: WeightsOptions) -> str:
    name = id.removeprefix("torchvision:")
    arch = _arch(name)
    if arch not in _architectures():
        raise UnknownNameError(
            f"no backbone '{name}' in provider 'torchvision'{did_you_mean(name, _architectures())} "
            f"('tlauto backbones torchvision:*' lists them)"
        )
    if _entry(name) is None and name not in _folder_names(weights) and id not in weights.files:
        tags = [f"{arch}.{entry.name}" for entry in _entries(arch)]
        raise UnknownNameError(
            f"no weights '{name}' in provider 'torchvision'{did_you_mean(name, tags)} "
            f"('tlauto backbones torchvision:{arch}.*' lists those of {arch})"
        )
    return name


def _folder_names(weights: WeightsOptions) -> dict[str, Path]:
    """Backbone names that files of the weights folder stand for; unknown architectures left out."""
    found = files.folder_files(weights.folder, "torchvision")
    known = set(_architectures())
    names = {stem: path for stem, path in found.items() if _arch(stem) in known}
    published = _published_files()
    for stem in found.keys() & published.keys():
        names.setdefault(published[stem], found[stem])
    return names


@functools.cache
def _published_files() -> dict[str, str]:
    """The library's own file names: `mobilenet_v2-b0353104` is `mobilenet_v2.IMAGENET1K_V1`."""
    entries = ((arch, entry) for arch in _architectures() for entry in _entries(arch))
    return {PurePosixPath(entry.url).stem: f"{arch}.{entry.name}" for arch, entry in entries}


def _info(name: str, path: Path | None) -> BackboneInfo:
    known = next((info for info in TORCHVISION if info.name == name), None)
    entry = _entry(name)
    if path is not None and (entry is None or "." not in name):
        # Whose weights a file holds is not known; only a sidecar can say.
        size = _recipe(name, path).input.size
        tag = name.partition(".")[2] or "local file"
        made = BackboneInfo(f"torchvision:{name}", input_size=size, pretraining=tag)
    elif known is not None or entry is None:
        made = known or BackboneInfo(f"torchvision:{name}")
    else:
        accuracy = next(iter(entry.meta["_metrics"].values()))["acc@1"]
        made = BackboneInfo(
            f"torchvision:{name}",
            gmacs=entry.meta["_ops"],
            input_size=entry.transforms().crop_size[0],
            pretraining=entry.name,
            licence="CC-BY-NC-4.0" if "SWAG" in entry.name else "BSD-3-Clause",
            accuracy=round(accuracy / 100, 4) if accuracy == accuracy else None,
        )
    made = with_architecture(made, TORCHVISION)
    if path is None:
        return made
    side = files.read_sidecar(path)
    changes = {k: v for k in ("licence", "pretraining", "input_size") if (v := getattr(side, k)) is not None}
    return dataclasses.replace(made, **changes)


# --- weights ----------------------------------------------------------------------------------------


def _locate(name: str, weights: WeightsOptions) -> tuple[Path | None, str]:
    entry, arch = _entry(name), _arch(name)
    spellings = [f"torchvision:{name}"]
    default = _entry(arch)
    if entry is not None and default is not None and entry is default:
        # Without weights' name an id means the default weights: either spelling may be given a file.
        spellings += [f"torchvision:{arch}", f"torchvision:{arch}.{default.name}"]
    chosen = files.chosen_file(spellings, weights)
    if chosen is not None:
        return chosen, "--weights"
    local = _folder_names(weights)
    for candidate in [name] if "." in name or entry is None else [name, f"{name}.{entry.name}"]:
        if candidate in local:
            return local[candidate], "weights folder"
    return (hub.cached(None, None, entry.url) if entry else None), "cache"


def _recipe(name: str, path: Path | None) -> _Recipe:
    """The preprocessing of the published weights that a file is, or of the architecture's oldest.

    A bare local file says nothing of its recipe; the oldest weights have the classic one (256 to 224
    pixels, bilinear) that other sources of such files use too. A sidecar overrules it.
    """
    entries = _entries(_arch(name))
    entry = _entry(name)
    if path is not None and "." not in name:
        same = [e for e in entries if PurePosixPath(e.url).name == path.name]
        entry = same[0] if same else None
    entry = entry or entries[0]
    return _Recipe(_image_input(_arch(name), entry, path), entry.name == FEATURES_ONLY)


def _image_input(arch: str, entry: Any, path: Path | None) -> ImageInput:
    preset = entry.transforms()
    mean, std = tuple(preset.mean), tuple(preset.std)
    if arch in ("googlenet", "inception_v3"):
        # Their `transform_input` turns ImageNet's normalisation into this one inside the network.
        mean = std = (0.5, 0.5, 0.5)
    made = ImageInput(
        size=preset.crop_size[0],
        resize=preset.resize_size[0],
        interpolation=preset.interpolation.value,
        mean=mean,
        std=std,
        resizable=not arch.startswith(("vit_", "maxvit")),
    )
    side = files.read_sidecar(path) if path else files.Sidecar()
    changes: dict[str, Any] = {k: v for k in ("mean", "std", "interpolation") if (v := getattr(side, k))}
    if side.input_size or side.crop_pct:
        size = side.input_size or made.size
        ratio = side.crop_pct or made.size / made.resize
        changes |= {"size": size, "resize": int(size / ratio)}
    return dataclasses.replace(made, **changes)


def _renamed(name: str) -> str:
    """DenseNet's published files are older than the ban on dots in module names (`norm.1`)."""
    return re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", name)


# --- the backbone -----------------------------------------------------------------------------------


def _build(arch: str, recipe: _Recipe) -> tuple[Any, tuple[str, ...]]:
    """The network without classifier, and the prefixes of tensors in its files that are left out."""
    from torch import nn
    from torchvision import models

    arguments: dict[str, Any] = {}
    if arch.startswith("vit_"):
        arguments = {"image_size": recipe.input.size}
    if arch in ("googlenet", "inception_v3"):
        arguments = {"transform_input": False, "aux_logits": False, "init_weights": False}
    model = models.get_model(arch, weights=None, **arguments)
    if recipe.features_only or arch.startswith("squeezenet"):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Identity() if recipe.features_only else nn.AdaptiveAvgPool2d(1)
        return model, ("classifier.",)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, child = last.rpartition(".")
    setattr(model.get_submodule(parent), child, nn.Identity())
    return model, (f"{last}.", "aux1.", "aux2.", "AuxLogits.")


def _backbone(model: Any, input: ImageInput) -> Backbone:
    from tlauto.backbone import TorchBackbone, stages_by_resolution, stages_by_unit, units_of

    if hasattr(model, "encoder"):  # the vision transformers
        layers = [f"encoder.layers.{name}" for name, _ in model.encoder.layers.named_children()]
        stages = stages_by_unit(model, ["conv_proj", *layers])
        return TorchBackbone(model, input, stages, pooled=_forward, unpooled=_patch_tokens)
    stages = stages_by_resolution(model, units_of(model), size=input.size, run=_forward)
    return TorchBackbone(model, input, stages, pooled=_forward, unpooled=_feature_map)


def _forward(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(N, D): what the removed classifier would read."""
    return cast("torch.Tensor", module(images))


def _feature_map(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W): the children run in order up to global pooling, as every forward here does."""
    from torch import nn

    features = images
    for name, child in module.named_children():
        if name in ("avgpool", "classifier", "fc", "flatten", "head", "dropout"):
            break
        for layer in child if isinstance(child, nn.ModuleList) else [child]:
            features = layer(features)
    # DenseNet's last activation is a function between its features and the pooling.
    return features.relu() if type(module).__name__ == "DenseNet" else features


def _patch_tokens(module: Any, images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W): a vision transformer's last patch tokens in their places."""
    import torch

    patches = module.conv_proj(images)  # (N, C, H, W)
    count, channels, height, width = patches.shape
    classes = module.class_token.expand(count, -1, -1)
    tokens = module.encoder(torch.cat([classes, patches.flatten(2).transpose(1, 2)], dim=1))  # (N, 1 + L, C)
    return cast("torch.Tensor", tokens[:, 1:].transpose(1, 2).reshape(count, channels, height, width))
