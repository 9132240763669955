"""Backbones of timm: about 1,800 pretrained ones, each with its own preprocessing.

Names are timm's: `resnet18.a1_in1k`; without a tag, `resnet18`, the architecture's default weights.
A file `timm/resnet18.mine.safetensors` in the weights folder is a backbone `timm:resnet18.mine`. A tag
that ends in `_pad_same` marks weights ported from TensorFlow: same-padding, mean = std = 0.5.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, cast

from tlauto.builtin import hub
from tlauto.builtin import weights as files
from tlauto.builtin.shortlists import TIMM, with_architecture
from tlauto.contracts import (
    Backbone,
    BackboneInfo,
    BackboneProvider,
    ImageInput,
    WeightsOptions,
    WeightsStatus,
)
from tlauto.errors import ConfigError, UnknownNameError, WeightsError, did_you_mean
from tlauto.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch
    from torch import nn

SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc-by-4.0": "CC-BY-4.0",
        "cc-by-nc-4.0": "CC-BY-NC-4.0"}  # fmt: skip
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@hookimpl
def backbone_providers() -> list[BackboneProvider]:
    """timm."""
    return [TimmProvider()]


class TimmProvider:
    """All of timm's image backbones; weights from a file, a folder, the hub's cache or the hub."""

    name = "timm"
    modality = "image"

    def shortlist(self) -> tuple[BackboneInfo, ...]:
        """A static choice, tiny to large, with permissive licences."""
        return TIMM

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[BackboneInfo, ...]:
        """Pretrained backbones by glob over `arch.tag`, the folder's files, or one exact name."""
        import timm

        local = _folder_names(weights)
        names = {*timm.list_models(pretrained=True), *local, *_chosen_names(weights)}
        if not weights.pretrained:
            names |= set(timm.list_models())
        found = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        if timm.is_model(pattern) and _tag_is_known(pattern):
            found.add(pattern)
        infos = [_info(name, local.get(name)) for name in found if _is_square(name)]
        return tuple(sorted(infos, key=lambda info: info.id))

    def weights_status(self, id: str, weights: WeightsOptions) -> WeightsStatus:
        """Looks at `--weights`, the folder, the caches of the hub and of torch; never downloads."""
        name = _checked_name(id, weights)
        if not weights.pretrained:
            return files.random_status()
        place = _locate(name, weights)
        if place is not None:
            return WeightsStatus("at_hand", f"{place.origin}: {place.path}", str(place.path))
        cfg = _config(name)
        source = hub.source(cfg.hf_hub_id, cfg.url) if _tag_is_known(name) else None
        names = [name] if "." in name or not cfg.tag else [name, f"{name}.{cfg.tag}"]
        return files.absent_status(id, names, weights, source=source, cache=hub.cache_folder(cfg.hf_hub_id))

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        """The network without its classifier; see `BackboneProvider.load`."""
        from tlauto.backbone import TorchBackbone

        name = _checked_name(id, weights)
        if not _is_square(name):
            size = _config(name).input_size[1:]
            raise ConfigError(
                f"{id} wants images of {size[0]} x {size[1]} pixels; only square ones are supported"
            )
        place = self._place(id, name, weights)
        recipe = _recipe(name, place.path if place else None)
        model = _build(id, recipe, place.path if place else None)
        if hasattr(model, "reset_classifier"):  # the language models' vision encoders have none to remove
            model.reset_classifier(0)
        input = image_input(recipe.timm_name, recipe.data)
        return TorchBackbone(model, input, _stages(model, input.size), pooled=_pooled, unpooled=_feature_map)

    def _place(self, id: str, name: str, weights: WeightsOptions) -> _Place | None:
        if not weights.pretrained:
            return None
        place = _locate(name, weights)
        if place is not None:
            return place
        status = self.weights_status(id, weights)
        if status.state == "missing":
            raise WeightsError(status.detail)
        cfg = _config(name)
        return _Place(hub.download(cfg.hf_hub_id, cfg.hf_hub_filename, cfg.url, id=id), "download")


@dataclass(frozen=True)
class _Place:
    path: Path
    origin: Literal["--weights", "weights folder", "cache", "download"]


@dataclass(frozen=True)
class _Recipe:
    """How to build a name: what timm calls it, extra arguments, and what a sidecar changes."""

    timm_name: str
    kwargs: dict[str, Any]
    data: dict[str, Any]


# --- names ------------------------------------------------------------------------------------------


def _config(name: str) -> Any:
    """timm's PretrainedCfg of a name; of its architecture when timm does not know the tag."""
    from timm.models import get_pretrained_cfg

    return get_pretrained_cfg(name if _tag_is_known(name) else name.partition(".")[0])


def _tag_is_known(name: str) -> bool:
    from timm.models import get_pretrained_cfg

    try:
        return "." not in name or get_pretrained_cfg(name) is not None
    except RuntimeError:  # "Invalid pretrained tag"
        return False


def _is_square(name: str) -> bool:
    size = _config(name).input_size
    return bool(size[1] == size[2])


def _checked_name(id: str, weights: WeightsOptions) -> str:
    import timm

    name = id.removeprefix("timm:")
    arch = name.partition(".")[0]
    if not timm.is_model(arch):
        near = did_you_mean(name, timm.list_models()) or did_you_mean(name, timm.list_pretrained())
        raise UnknownNameError(
            f"no backbone '{name}' in provider 'timm'{near} ('tlauto backbones timm:*' lists them)"
        )
    if not _tag_is_known(name) and name not in _folder_names(weights) and id not in weights.files:
        tags = timm.list_models(f"{arch}.*", pretrained=True)
        raise UnknownNameError(
            f"no weights '{name}' in provider 'timm'{did_you_mean(name, tags)} "
            f"('tlauto backbones timm:{arch}.*' lists those of {arch})"
        )
    return name


def _folder_names(weights: WeightsOptions) -> dict[str, Path]:
    """Backbone names that files of the weights folder stand for; unknown architectures left out."""
    import timm

    found = files.folder_files(weights.folder, "timm")
    names = {stem: path for stem, path in found.items() if timm.is_model(stem.partition(".")[0])}
    if found.keys() - names.keys():
        published = _published_files()
        for stem in found.keys() & published.keys():
            names.setdefault(published[stem], found[stem])
    return names


@functools.cache
def _published_files() -> dict[str, str]:
    """The library's own file names: `mobilenetv2_100_ra-b33bc2c4` is `mobilenetv2_100.ra_in1k`."""
    import timm

    stems = ((PurePosixPath(_config(name).url or "").stem, name) for name in timm.list_pretrained())
    return {stem: name for stem, name in stems if stem}


def _chosen_names(weights: WeightsOptions) -> Iterable[str]:
    import timm

    names = (id.removeprefix("timm:") for id in weights.files if id.startswith("timm:"))
    return [name for name in names if timm.is_model(name.partition(".")[0])]


def _info(name: str, path: Path | None) -> BackboneInfo:
    """Facts: the shortlist's where it has the name, else the library's config, else the sidecar's."""
    known = next((info for info in TIMM if info.name == name), None)
    cfg, is_known = _config(name), _tag_is_known(name)
    if path is None or (is_known and "." in name):
        licence = (cfg.license or "unknown") if is_known else "unknown"
        made = known or BackboneInfo(
            f"timm:{name}",
            input_size=cfg.input_size[1],
            pretraining=(cfg.tag or "unknown") if is_known else name.partition(".")[2],
            licence=SPDX.get(licence, licence),
        )
    else:
        # Whose weights a file holds is not known; only a sidecar can say.
        tag = name.partition(".")[2] or "local file"
        made = BackboneInfo(f"timm:{name}", input_size=cfg.input_size[1], pretraining=tag)
    made = with_architecture(made, TIMM)
    if path is None:
        return made
    side = files.read_sidecar(path)
    changes = {k: v for k in ("licence", "pretraining", "input_size") if (v := getattr(side, k)) is not None}
    return dataclasses.replace(made, **changes)


# --- weights ----------------------------------------------------------------------------------------


def _locate(name: str, weights: WeightsOptions) -> _Place | None:
    cfg = _config(name)
    spellings = [f"timm:{name}"]
    if _tag_is_known(name) and cfg.tag:
        arch = name.partition(".")[0]
        default = f"{arch}.{_config(arch).tag}"
        # Without a tag a name means the default weights, so either spelling may be given a file.
        spellings += [f"timm:{arch}", f"timm:{default}"] if name in (arch, default) else []
    chosen = files.chosen_file(spellings, weights)
    if chosen is not None:
        return _Place(chosen, "--weights")
    local = _folder_names(weights)
    for candidate in [name] if "." in name else [name, f"{name}.{cfg.tag}"]:
        if candidate in local:
            return _Place(local[candidate], "weights folder")
    if not _tag_is_known(name):
        return None
    cached = hub.cached(cfg.hf_hub_id, cfg.hf_hub_filename, cfg.url)
    return _Place(cached, "cache") if cached else None


def _recipe(name: str, path: Path | None) -> _Recipe:
    side = files.read_sidecar(path) if path else files.Sidecar()
    kwargs = dict(side.kwargs)
    data: dict[str, Any] = {}
    if name.endswith("_pad_same"):
        kwargs.setdefault("pad_type", "same")
        data = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for key in ("mean", "std", "interpolation", "crop_pct"):
        if getattr(side, key) is not None:
            data[key] = getattr(side, key)
    if side.input_size is not None:
        data["input_size"] = (3, side.input_size, side.input_size)
    return _Recipe(name if _tag_is_known(name) else name.partition(".")[0], kwargs, data)


def _build(id: str, recipe: _Recipe, path: Path | None) -> Any:
    """The model with its classifier; strict: a file that does not fit exactly is refused."""
    if path is None:
        return _create(id, recipe, pretrained=False)
    from tlauto.backbone import first_mismatches, tensor_shapes

    shapes = {} if path.suffix == ".npz" else tensor_shapes(path)
    reason = ""
    for classes in _class_counts(recipe, shapes):
        # As many classes as the file has: with any other number timm drops to a loose load, which
        # accepts weights of another architecture and leaves the network random.
        overlay = {"file": str(path), "num_classes": classes, "label_offset": 0,
                   "custom_load": path.suffix == ".npz"}  # fmt: skip
        try:
            return _create(id, recipe, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
        except (
            RuntimeError,
            KeyError,
            ValueError,
            AttributeError,
            AssertionError,
            IndexError,
            OSError,
        ) as error:
            reason = reason or " ".join(str(error).split())[:200]
    model = _create(id, recipe, pretrained=False)
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    raise files.wrong_weights(id, path, (shapes and first_mismatches(expected, shapes)) or reason)


def _create(id: str, recipe: _Recipe, **arguments: Any) -> Any:
    import timm

    try:
        return timm.create_model(recipe.timm_name, **arguments, **recipe.kwargs)
    except TypeError as error:
        if not recipe.kwargs:
            raise
        given = ", ".join(f"{k}={v!r}" for k, v in recipe.kwargs.items())
        raise WeightsError(
            f"{id} cannot be built with {given} (from its tag or its .json): {error}"
        ) from None


def _class_counts(recipe: _Recipe, shapes: dict[str, tuple[int, ...]]) -> list[int]:
    """Widths of the classifier to try: the file's own; else without one, then the library's."""
    cfg = _config(recipe.timm_name)
    names = [cfg.classifier] if isinstance(cfg.classifier, str) else list(cfg.classifier or ())
    rows = [shapes[f"{n}.weight"][0] for n in names if f"{n}.weight" in shapes]
    if rows:
        return [rows[0]]
    return [cfg.num_classes, 0] if not shapes else [0, cfg.num_classes]


# --- the backbone -----------------------------------------------------------------------------------


def image_input(name: str, changes: Mapping[str, Any] | None = None) -> ImageInput:
    """timm's own evaluation preprocessing of a name (`resolve_data_config`, `transforms_imagenet_eval`).

    Args:
        changes: entries of timm's data config that differ, such as a sidecar's `mean`.

    Raises: ConfigError for an interpolation or crop mode that `ImageInput` cannot say.
    """
    import timm.data

    known = _config(name)
    cfg = {**timm.data.resolve_data_config(pretrained_cfg=known.to_dict()), **(changes or {})}
    size = cfg["input_size"][1]
    fit = {"center": "crop", "squash": "squash", "border": "border"}.get(cfg["crop_mode"])
    if fit is None or cfg["interpolation"] not in INTERPOLATIONS:
        raise ConfigError(
            f"timm:{name} wants images with crop '{cfg['crop_mode']}' and interpolation "
            f"'{cfg['interpolation']}', which are not supported; choose another backbone"
        )
    return ImageInput(
        size=size,
        resize=math.floor(size / cfg["crop_pct"]),
        fit=cast(Any, fit),
        interpolation=cfg["interpolation"],
        mean=cfg["mean"],
        std=cfg["std"],
        resizable=not known.fixed_input_size,
    )


def _stages(model: Any, size: int) -> tuple[tuple[str, ...], ...]:
    """timm's own coarse layer groups, stem first; by resolution where timm has none."""
    from timm.models import group_parameters

    from tlauto.backbone import merge_norm_stages, stages_by_resolution, units_of

    try:
        groups = group_parameters(model, model.group_matcher(coarse=True))
    except (
        AttributeError,
        AssertionError,
    ):  # MetaFormer, PiT and CSATv2 have no matcher, RDNet no coarse one
        return stages_by_resolution(model, units_of(model), size=size, run=_pooled)
    return merge_norm_stages(model, [groups[i] for i in sorted(groups)])


def _pooled(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """(N, D): what the classifier would read; averaged where the network itself does not pool."""
    features: torch.Tensor = module(images)
    if features.ndim == 3:  # (N, L, C)
        return features.mean(dim=1)
    return features.mean(dim=(2, 3)) if features.ndim == 4 else features


def _feature_map(module: Any, images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W): the last feature map; a transformer's patch tokens in their places.

    Tokens that do not fill a square become (N, C, L, 1). A network with several outputs and no
    single map gives its pooled features as (N, D, 1, 1).
    """
    features = module.forward_features(images)
    if not hasattr(features, "ndim") or features.ndim == 2:
        return _pooled(module, images)[:, :, None, None]
    if features.ndim == 3:  # (N, L, C)
        patches = features[:, getattr(module, "num_prefix_tokens", 0) :].transpose(1, 2)
        if patches.shape[2] > 1 and math.isqrt(patches.shape[2] - 1) ** 2 == patches.shape[2] - 1:
            patches = patches[:, :, 1:]  # CoaT and VOLO do not declare their class token
        side = math.isqrt(patches.shape[2])
        shape = (side, side) if side * side == patches.shape[2] else (-1, 1)
        return cast("torch.Tensor", patches.unflatten(2, shape))
    is_nhwc = str(getattr(module, "output_fmt", "NCHW")).endswith("NHWC")
    return cast("torch.Tensor", features.permute(0, 3, 1, 2) if is_nhwc else features)
