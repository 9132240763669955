"""Features of all stages: what they are, and that one forward pass gives what each stage hands on."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bundle import answers_of, write_bundle, write_images
from test_split import SMALL, images_for, load
from torch import nn

from tlauto.backbone import TorchBackbone, narrowed
from tlauto.backbone.levels import WIDEST, cells_of
from tlauto.contracts import ImageInput
from tlauto.levels import Level, Levelled, level_shape_of, width_of
from tlauto.results.bundle import load_bundle


@pytest.mark.parametrize("id", SMALL)
def test_every_backbone_offers_its_stages_and_the_last_are_the_pooled_features(id: str) -> None:
    backbone = load(id)
    assert isinstance(backbone, Levelled)
    shape = level_shape_of(backbone)
    assert len(shape) >= 3 and shape[-1] == Level(backbone.feature_shape.pooled, 1)
    with torch.no_grad():
        images = images_for(backbone)
        levels = backbone.levels(images)
        assert levels.shape == (len(images), width_of(shape, kind="grid"))
        assert torch.equal(narrowed(levels, shape, to="pooled"), backbone.pooled(images))
        # Of each image by itself, and not the same for all.
        assert torch.allclose(backbone.levels(images[1:2]), levels[1:2], atol=1e-4)
        assert not torch.allclose(levels[0], levels[1], atol=1e-3)


def test_a_level_is_the_mean_of_what_a_stage_returns() -> None:
    backbone = load("torchvision:resnet18")
    returned: dict[str, torch.Tensor] = {}
    for name in ("layer1", "layer2", "layer3"):
        stage = backbone.module.get_submodule(name)
        stage.register_forward_hook(lambda m, i, output, name=name: returned.setdefault(name, output))
    images = images_for(backbone)
    with torch.no_grad():
        means = narrowed(backbone.levels(images), backbone.level_shape, to="levels")
    parts = torch.split(means, [level.channels for level in backbone.level_shape], dim=1)
    for name, part in zip(returned, parts[-4:-1], strict=True):
        assert torch.allclose(part, returned[name].mean(dim=(2, 3)), atol=1e-5), name


def test_cells_are_the_quarters_of_a_map_in_either_layout() -> None:
    maps = torch.arange(2 * 3 * 16, dtype=torch.float32).reshape(2, 3, 4, 4)
    cells = cells_of(maps)
    assert cells.shape == (2, 3, 4)
    expected = nn.functional.adaptive_avg_pool2d(maps, 2).flatten(2)
    assert torch.equal(cells, expected)
    assert torch.equal(cells_of(maps.permute(0, 2, 3, 1)), expected)
    odd = torch.randn(2, 5, 7, 7)
    assert torch.allclose(cells_of(odd), nn.functional.adaptive_avg_pool2d(odd, 2).flatten(2), atol=1e-6)
    tokens = torch.randn(2, 9, 5)
    assert torch.equal(cells_of(tokens), tokens.mean(dim=1)[:, :, None])
    assert cells_of(torch.randn(2, 5, 1, 1)).shape == (2, 5, 1)


def test_the_mean_of_a_level_is_that_of_its_cells() -> None:
    shape = (Level(2, 4), Level(3, 1))
    levels = torch.tensor([[1.0, 2, 3, 4, 10, 20, 30, 40, 7, 8, 9]])
    assert narrowed(levels, shape, to="levels").tolist() == [[2.5, 25, 7, 8, 9]]
    assert narrowed(levels, shape, to="pooled").tolist() == [[7, 8, 9]]
    assert narrowed(levels, shape, to="grid").tolist() == levels.tolist()
    assert (width_of(shape, kind="levels"), width_of(shape, kind="grid")) == (5, 11)


class Wide(nn.Module):
    """Four stages of many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3 if not i else channels, channels, 3, 2, 1) for i in range(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            images = block(images).relu_()
        return images


def wide(channels: int) -> TorchBackbone:
    net = Wide(channels)
    stages = [[f"blocks.{i}.weight", f"blocks.{i}.bias"] for i in range(4)]
    return TorchBackbone(net, ImageInput(size=32, resize=32), stages, unpooled=lambda m, x: m(x))


def test_of_very_many_features_the_last_levels_stay() -> None:
    assert wide(16).level_shape == (Level(16, 4),) * 3 + (Level(16, 1),)
    shape = wide(900).level_shape
    assert shape == (Level(900, 4),) * 2 + (Level(900, 1),)
    assert width_of(shape, kind="grid") <= WIDEST


def test_what_a_later_layer_overwrites_was_taken_before() -> None:
    torch.manual_seed(0)
    backbone = wide(8).module
    images = torch.randn(2, 3, 32, 32)
    first = backbone.blocks[0](images).relu()
    with torch.no_grad():
        levels = wide_of(backbone).levels(images)
    assert torch.allclose(levels[:, :32], cells_of(first).flatten(1), atol=1e-6)


def wide_of(net: nn.Module) -> TorchBackbone:
    stages = [[f"blocks.{i}.weight", f"blocks.{i}.bias"] for i in range(4)]
    return TorchBackbone(net, ImageInput(size=32, resize=32), stages, unpooled=lambda m, x: m(x))


def test_a_copy_with_other_weights_has_levels_of_its_own() -> None:
    backbone = wide(8)
    images = torch.randn(2, 3, 32, 32)
    other = copy.copy(backbone)
    other.module = copy.deepcopy(backbone.module)
    with torch.no_grad():
        before = backbone.levels(images)
        assert torch.equal(other.levels(images), before)
        nn.init.zeros_(other.module.blocks[0].weight)
        nn.init.zeros_(other.module.blocks[0].bias)
        assert not other.levels(images)[:, :32].any()
        assert torch.equal(backbone.levels(images), before)


def test_what_is_known_of_a_network_goes_with_it() -> None:
    gone = []
    for _ in range(3):
        backbone = load("torchvision:squeezenet1_1")
        with torch.no_grad():
            backbone.levels(images_for(backbone, 1))
        gone.append(weakref.ref(backbone.module))
        del backbone
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


def test_a_backbone_without_the_method_offers_none() -> None:
    class Plain:
        pass

    assert level_shape_of(Plain()) == ()


# --- in a bundle ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["levels", "grid"])
@pytest.mark.parametrize("backbone", ["timm:test_resnet", "keras:MobileNet-0.25-128"])
def test_a_head_on_several_stages_is_loaded_with_them(kind: str, backbone: str, tmp_path: Path) -> None:
    files = write_images(tmp_path)
    classifier = write_bundle(tmp_path / "model", files, backbone=backbone, kind=kind)
    expected = answers_of(classifier, files, "multiclass")
    loaded = load_bundle(tmp_path / "model")
    assert (loaded.manifest.features, classifier.kind) == (kind, kind)
    found = np.stack([row for _, row in loaded.outputs(map(str, files))])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    # An older version, which would build another network, must refuse it.
    assert json.loads((tmp_path / "model" / "tlauto.json").read_text())["format_version"] == 3
