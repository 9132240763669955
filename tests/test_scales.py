"""Images of another size than a backbone's own: which ones, and who takes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tlauto.backbone import TorchBackbone
from tlauto.contracts import ImageInput, WeightsOptions
from tlauto.errors import TrialError
from tlauto.levels import Level
from tlauto.plugins import registry
from tlauto.scales import at_scale, is_scalable, scaled, scaled_size

WEIGHTS = WeightsOptions(offline=True, pretrained=False)


class Ignorant:
    """A backbone of a plugin that cannot be resized, though its network could be."""

    def __init__(self, backbone: TorchBackbone) -> None:
        self.module, self.input, self.stages = backbone.module, backbone.input, backbone.stages
        self.feature_shape = backbone.feature_shape
        self.pooled, self.unpooled = backbone.pooled, backbone.unpooled
        self.set_trainable, self.set_training = backbone.set_trainable, backbone.set_training


def small(size: int = 64) -> TorchBackbone:
    module = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Conv2d(4, 6, 4, stride=4))
    names = [name for name, _ in module.named_parameters()]
    return TorchBackbone(
        module, ImageInput(size=size, resize=size + 8), [names[:2], names[2:]],
        unpooled=lambda module, images: module(images),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("size", "resize", "scale", "expected"),
    [
        (224, 256, 1.0, (224, 256)),
        (299, 342, 1.0, (299, 342)),
        (224, 256, 1.4, (320, 366)),
        (224, 224, 1.4, (320, 320)),
        (384, 384, 1.4, (544, 544)),
        (299, 342, 1.4, (416, 476)),
        (32, 36, 1.4, (64, 72)),  # never the size that it had
        (75, 80, 1.4, (96, 102)),
        (224, 256, 0.5, (128, 146)),
        (32, 32, 0.1, (32, 32)),
    ],
)
def test_a_size_is_a_multiple_of_the_stride_and_what_lies_around_it_is_in_proportion(
    size: int, resize: int, scale: float, expected: tuple[int, int]
) -> None:
    wanted = ImageInput(size=size, resize=resize, interpolation="bicubic", bgr=True)
    found = scaled(wanted, scale)
    assert (found.size, found.resize) == expected
    assert found.size == scaled_size(size, scale)
    assert found.resize >= found.size
    assert (found.interpolation, found.bgr, found.mean) == ("bicubic", True, wanted.mean)


def test_a_resized_backbone_states_the_maps_and_levels_that_it_gives() -> None:
    backbone = small()
    assert backbone.feature_shape.unpooled == (6, 2, 2)
    own, stages = backbone.input, backbone.stages
    found = at_scale(backbone, 1.4, id="own:small")
    assert found.input == scaled(own, 1.4) and found.input.size == 96
    assert found.feature_shape.unpooled == (6, 3, 3) and found.feature_shape.pooled == 6
    assert backbone.level_shape == (Level(4, 4), Level(6, 1))
    assert found.stages == stages
    images = torch.rand(2, 3, 96, 96)
    assert found.unpooled(images).shape == (2, 6, 3, 3)
    assert backbone.levels(images).shape == (2, 22)


def test_a_split_of_a_resized_backbone_gives_its_features() -> None:
    backbone = small()
    at_scale(backbone, 1.4, id="own:small")
    images = torch.rand(2, 3, 96, 96)
    split = backbone.split(1)
    assert split is not None
    assert split.prefix(images).shape == (2, 4, 12, 12)
    torch.testing.assert_close(split.suffix(split.prefix(images), "pooled"), backbone.pooled(images))


def test_its_own_size_changes_nothing() -> None:
    backbone = small()
    before = backbone.input, backbone.feature_shape
    assert at_scale(backbone, 1.0, id="own:small") is backbone
    assert (backbone.input, backbone.feature_shape) == before


@pytest.mark.parametrize("id", ["torchvision:vit_b_16", "keras:EfficientNetB1"])
@pytest.mark.slow
def test_networks_of_one_size_are_not_taken_for_others(id: str) -> None:
    backbone = registry().provider(id.partition(":")[0]).load(id, WEIGHTS)
    assert not is_scalable(backbone)
    with pytest.raises(TrialError, match=f"but {id} takes images of .* pixels only; leave the parameter out"):
        at_scale(backbone, 1.4, id=id)


def test_who_does_not_offer_to_be_resized_is_not() -> None:
    backbone = Ignorant(small())
    assert backbone.input.resizable and not is_scalable(backbone)
    with pytest.raises(TrialError, match=r"own:small takes images of 64 x 64 pixels only"):
        at_scale(backbone, 1.4, id="own:small")
    assert at_scale(backbone, 1.0, id="own:small") is backbone


@pytest.mark.parametrize("id", ["timm:test_resnet", "timm:test_vit"])
def test_what_is_known_of_a_backbone_beforehand_is_the_size_that_it_takes(id: str) -> None:
    provider = registry().provider("timm")
    (info,) = provider.find(id.partition(":")[2], WEIGHTS)
    assert provider.load(id, WEIGHTS).input.size == info.input_size
