"""Features on real photographs equal those of the library's own pipeline: decode, transform, network."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from tlauto.builtin.timm_provider import TimmProvider, image_input
from tlauto.builtin.torchvision_provider import TorchvisionProvider
from tlauto.contracts import Backbone, ImageInput, WeightsOptions
from tlauto.training.batches import normalise
from tlauto.training.pixels import centre_crop, decode

TIMM = TimmProvider()
TORCHVISION = TorchvisionProvider()
CPU = torch.device("cpu")
# googlenet: transforms its input inside; densenet: published under old names; vit: has a fixed size.
TORCHVISION_NAMES = (
    "squeezenet1_1.IMAGENET1K_V1", "mobilenet_v2.IMAGENET1K_V1", "mobilenet_v2.IMAGENET1K_V2",
    "mobilenet_v3_small.IMAGENET1K_V1", "googlenet.IMAGENET1K_V1", "densenet121.IMAGENET1K_V1",
    "regnet_y_400mf.IMAGENET1K_V2", "mnasnet0_5.IMAGENET1K_V1", "swin_t.IMAGENET1K_V1",
    "vit_b_32.IMAGENET1K_V1",
)  # fmt: skip
TIMM_NAMES = (
    "resnet18.a1_in1k", "mobilenetv3_small_050.lamb_in1k", "tf_efficientnet_lite0.in1k",
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k", "test_vit.r160_in1k", "convnext_atto.d2_in1k",
    "deit_tiny_distilled_patch16_224.fb_in1k",
)  # fmt: skip


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    """Two real photographs that come with scikit-learn, 640 x 427 pixels."""
    folder = Path(importlib.import_module("sklearn.datasets").__path__[0], "images")
    return [folder / "china.jpg", folder / "flower.jpg"]


def our_images(photos: list[Path], wanted: ImageInput) -> torch.Tensor:
    crops = [torch.from_numpy(centre_crop(decode(p, wanted), wanted)).permute(2, 0, 1) for p in photos]
    return normalise(torch.stack(crops), wanted, CPU)


def their_images(photos: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    return torch.stack([transform(Image.open(photo).convert("RGB")) for photo in photos])


def from_file(provider: Any, id: str, model: torch.nn.Module, folder: Path) -> Backbone:
    """The provider's backbone with the weights of a library's model, through a weights file."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    options = WeightsOptions(files={id: str(folder / "weights.safetensors")}, offline=True)
    backbone: Backbone = provider.load(id, options)
    backbone.set_training(False)
    return backbone


def randomise_statistics(model: torch.nn.Module) -> None:
    """Running statistics as trained networks have them, so that a wrong one would show."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)


@pytest.mark.parametrize("name", TIMM_NAMES)
def test_timm_features_and_logits_are_those_of_timms_own_pipeline(
    name: str, photos: list[Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    randomise_statistics(model)
    backbone = from_file(TIMM, f"timm:{name}", model, tmp_path)
    config = timm.data.resolve_model_data_config(model)
    theirs = their_images(photos, timm.data.create_transform(**config, is_training=False))
    with torch.no_grad():
        features = backbone.pooled(our_images(photos, backbone.input))
        their_maps = model.forward_features(theirs)
        torch.testing.assert_close(
            features, model.forward_head(their_maps, pre_logits=True), rtol=1e-4, atol=1e-4
        )
        if not isinstance(model.get_classifier(), tuple):  # a distilled network averages two classifiers
            torch.testing.assert_close(model.get_classifier()(features), model(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TORCHVISION_NAMES)
def test_torchvision_features_are_those_of_its_own_pipeline(
    name: str, photos: list[Path], tmp_path: Path
) -> None:
    arch, _, entry = name.partition(".")
    torch.manual_seed(0)
    arguments = {"transform_input": True, "init_weights": False} if arch == "googlenet" else {}
    model = models.get_model(arch, weights=None, **arguments).eval()
    randomise_statistics(model)
    backbone = from_file(TORCHVISION, f"torchvision:{name}", model, tmp_path)
    theirs = their_images(photos, models.get_model_weights(arch)[entry].transforms())
    last = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    seen: list[torch.Tensor] = []
    model.get_submodule(last).register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(theirs)
        ours = our_images(photos, backbone.input)
        expected = seen[0].mean(dim=(2, 3)) if seen[0].ndim == 4 else seen[0]
        torch.testing.assert_close(backbone.pooled(ours), expected, rtol=1e-4, atol=1e-4)
        maps = backbone.unpooled(ours)
    assert maps.shape[1:] == backbone.feature_shape.unpooled


@pytest.mark.parametrize(
    "arch", ["squeezenet1_1", "mnasnet0_5", "googlenet", "densenet121", "regnet_y_400mf"]
)
def test_torchvision_maps_are_what_the_network_pools(arch: str) -> None:
    torch.manual_seed(0)
    options = WeightsOptions(pretrained=False)
    backbone = TORCHVISION.load(f"torchvision:{arch}", options)
    backbone.set_training(False)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(
            backbone.pooled(images), backbone.unpooled(images).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5
        )


def test_a_vision_transformers_map_holds_its_patch_tokens_in_their_places() -> None:
    torch.manual_seed(0)
    backbone = TIMM.load("timm:test_vit.r160_in1k", WeightsOptions(pretrained=False))
    backbone.set_training(False)
    model: Any = backbone.module
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        maps = backbone.unpooled(images)
        expected = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)[-1]
    torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize(
    "name",
    ["resnet18.a1_in1k", "vit_base_patch16_siglip_224.webli", "vit_base_patch32_384.augreg_in1k",
     "tf_efficientnet_b1.in1k", "vit_so150m2_patch16_reg1_gap_448.sbb_e200_in12k_ft_in1k",
     "volo_d5_512.sail_in1k"],
)  # fmt: skip
def test_timm_preprocessing_gives_the_pixels_of_timms_transform(name: str, photos: list[Path]) -> None:
    config = timm.models.get_pretrained_cfg(name).to_dict()
    data = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**data, is_training=False)
    torch.testing.assert_close(
        our_images(photos, image_input(name)), their_images(photos, transform), rtol=0, atol=1e-5
    )


def test_every_pretrained_backbone_of_timm_has_preprocessing_that_can_be_said() -> None:
    for info in TIMM.find("*", WeightsOptions(offline=True)):
        assert image_input(info.name).size == info.input_size


def test_both_providers_agree_on_one_set_of_real_tensors(real_weights: Path, photos: list[Path]) -> None:
    options = WeightsOptions(folder=str(real_weights), offline=True)
    first = TIMM.load("timm:mobilenetv2_100", options)
    second = TORCHVISION.load("torchvision:mobilenet_v2", options)
    for backbone in (first, second):
        backbone.set_training(False)
    images = our_images(photos, second.input)
    with torch.no_grad():
        torch.testing.assert_close(first.pooled(images), second.pooled(images), rtol=1e-3, atol=1e-3)


def test_a_tag_that_ends_in_pad_same_loads_weights_ported_from_tensorflow(real_weights: Path) -> None:
    options = WeightsOptions(folder=str(real_weights), offline=True)
    backbone = TIMM.load("timm:mobilenetv2_100.inat_insect_pad_same", options)
    assert backbone.input.mean == backbone.input.std == (0.5, 0.5, 0.5)
    assert type(backbone.module.conv_stem).__name__ == "Conv2dSame"
