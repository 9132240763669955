"""Backbones of Keras Applications, run and trained by PyTorch.

Names are Keras' function names (`MobileNetV2`, `ResNet50`, `EfficientNetB0`); where the library has
weights for several widths or sizes the name goes on with them: `MobileNet-0.50-160`.
"""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from tlauto.builtin import keras_weights
from tlauto.builtin.keras_catalogue import CATALOGUE, REFUSED, SHORTLIST, Application
from tlauto.contracts import Backbone, BackboneInfo, BackboneProvider, WeightsOptions, WeightsStatus
from tlauto.errors import UnknownNameError, did_you_mean
from tlauto.hookspecs import hookimpl

if TYPE_CHECKING:
    import torch


@hookimpl
def backbone_providers() -> list[BackboneProvider]:
    """Keras Applications."""
    return [KerasProvider()]


class KerasProvider:
    """All Keras Applications that run on PyTorch; weights from a file, a folder, Keras' cache or storage."""

    name = "keras"
    modality = "image"

    def shortlist(self) -> tuple[BackboneInfo, ...]:
        """A static choice, tiny to large, with permissive licences."""
        return tuple(CATALOGUE[name].info for name in SHORTLIST)

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[BackboneInfo, ...]:
        """Applications and their variants by glob; no file adds to them."""
        return tuple(CATALOGUE[name].info for name in sorted(CATALOGUE) if fnmatch.fnmatchcase(name, pattern))

    def weights_status(self, id: str, weights: WeightsOptions) -> WeightsStatus:
        """Looks at `--weights`, the folder and Keras' cache; never downloads."""
        return keras_weights.status(_application(id), weights)

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        """The network without its classifier; see `BackboneProvider.load`."""
        from tlauto.backbone import TorchBackbone
        from tlauto.keras_network import KerasNetwork, build_model, is_resizable

        application = _application(id)
        path = keras_weights.fetch(application, weights) if weights.pretrained else None
        model = build_model(application)
        if path is not None:
            keras_weights.load(model, application, path)
        network = KerasNetwork(application, model)
        image_input = application.image_input(resizable=is_resizable(application))
        return TorchBackbone(
            network,
            image_input,
            network.stage_names(),
            pooled=_pooled,
            unpooled=_maps,
            parts=network.parts,
        )


def _application(id: str) -> Application:
    name = id.removeprefix("keras:")
    if name in CATALOGUE:
        return CATALOGUE[name]
    if name in REFUSED:
        raise UnknownNameError(
            f"no backbone '{name}' in provider 'keras': Keras cannot build it on PyTorch yet"
        )
    raise UnknownNameError(
        f"no backbone '{name}' in provider 'keras'{did_you_mean(name, CATALOGUE)} "
        f"('tlauto backbones keras:*' lists them)"
    )


def _pooled(module: Any, images: torch.Tensor) -> torch.Tensor:
    features: torch.Tensor = module(images)
    return features


def _maps(module: Any, images: torch.Tensor) -> torch.Tensor:
    maps: torch.Tensor = module.maps(images)
    return maps
