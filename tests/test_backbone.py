"""TorchBackbone, stages and the hash of weights, on small networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tlauto.backbone import (
    TorchBackbone,
    hash_weights,
    merge_norm_stages,
    stages_by_resolution,
    stages_by_unit,
    units_of,
)
from tlauto.contracts import Backbone, ImageInput
from tlauto.errors import ConfigError, PluginError

INPUT = ImageInput(size=32, resize=36)


class Net(nn.Module):
    """Three resolutions, and a dense layer behind the map."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList([self._block(width, 1), self._block(width, 2), self._block(width, 1)])
        self.dense = nn.Linear(width, 16)
        self.dropout = nn.Dropout(0.5)

    @staticmethod
    def _block(width: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width), nn.Dropout(0.5), nn.ReLU()
        )

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense(self.maps(images).mean(dim=(2, 3))))


def make(seed: int = 0, **arguments: int) -> TorchBackbone:
    torch.manual_seed(seed)
    net = Net(**arguments)
    stages = stages_by_unit(net, ["stem", "blocks.0", "blocks.1", "blocks.2", "dense"])
    return TorchBackbone(net, INPUT, stages, pooled=lambda m, x: m(x), unpooled=lambda m, x: m.maps(x))


def test_it_is_a_backbone_with_measured_shapes() -> None:
    backbone = make()
    assert isinstance(backbone, Backbone)
    assert backbone.feature_shape.pooled == 16
    assert backbone.feature_shape.unpooled == (8, 8, 8)


def test_measuring_leaves_modes_and_statistics_as_they_were() -> None:
    net = Net()
    net.blocks[1].eval()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    TorchBackbone(net, INPUT, stages_by_unit(net, ["stem"]), unpooled=lambda m, x: m.maps(x))
    assert net.training and not net.blocks[1].training
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("pools", [False, True])
def test_no_more_passes_are_taken_to_measure_than_there_are_kinds_of_features(pools: bool) -> None:
    net, passes = Net(), []
    net.stem.register_forward_hook(lambda *_: passes.append(1))
    pooled = (lambda m, x: m(x)) if pools else None
    backbone = TorchBackbone(
        net, INPUT, stages_by_unit(net, ["stem"]), pooled=pooled, unpooled=lambda m, x: m.maps(x)
    )
    assert len(passes) == 1 + pools
    assert backbone.feature_shape.pooled == (16 if pools else 8)
    backbone.levels(torch.zeros(1, 3, 32, 32))
    assert len(passes) == 2 + pools, "what was seen then is known"


def test_without_a_pooling_of_its_own_the_map_is_averaged() -> None:
    net = Net()
    backbone = TorchBackbone(net, INPUT, stages_by_unit(net, ["stem"]), unpooled=lambda m, x: m.maps(x))
    backbone.set_training(False)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone.pooled(images), net.maps(images).mean(dim=(2, 3)))


def test_layers_behind_the_map_join_the_last_stage_the_map_uses() -> None:
    assert [stage[0] for stage in make().stages] == [
        "stem.0.weight", "blocks.0.0.weight", "blocks.1.0.weight", "blocks.2.0.weight",
    ]  # fmt: skip
    assert make().stages[-1][-1] == "dense.bias"


@pytest.mark.parametrize(
    ("stages", "culprit"),
    [
        ([["stem.0.weight"]], "blocks.0.0.bias"),
        ([["stem.0.weight", "nonsense"]], "blocks.0.0.bias"),
        ([[name for name, _ in Net().named_parameters()], ["stem.0.weight"]], "stem.0.weight"),
    ],
    ids=["missing", "unknown", "twice"],
)
def test_stages_that_do_not_hold_every_parameter_once_are_refused(
    stages: list[list[str]], culprit: str
) -> None:
    with pytest.raises(PluginError, match=f"exactly once; look at '{culprit}'"):
        TorchBackbone(Net(), INPUT, stages, unpooled=lambda m, x: m.maps(x))


def test_features_of_the_wrong_form_are_refused() -> None:
    net = Net()
    stages = stages_by_unit(net, ["stem"])
    with pytest.raises(PluginError, match=r"must be \(N, D\) and \(N, C, H, W\)"):
        TorchBackbone(net, INPUT, stages, unpooled=lambda m, x: m(x), pooled=lambda m, x: m(x))


def test_an_unknown_parameter_is_named_and_nothing_changes() -> None:
    backbone = make()
    backbone.set_trainable(["dense.bias"])
    with pytest.raises(ConfigError, match=r"'dense.bais'; did you mean 'dense.bias'"):
        backbone.set_trainable(["dense.bais"])
    assert backbone.module.dense.bias.requires_grad


def test_a_subtree_without_learning_parameters_is_in_inference_mode() -> None:
    backbone = make()
    backbone.set_trainable(backbone.stages[-1])
    backbone.set_training(True)
    net = backbone.module
    modes = {name: module.training for name, module in net.named_modules()}
    assert not modes["stem"] and not modes["blocks.1.2"], "dropout of a frozen block is on"
    assert modes["blocks.2.2"] and modes["blocks.2.1"] and modes["dense"]
    # Without parameters of its own it follows the network, in which something learns.
    assert modes["dropout"] and modes[""]
    backbone.set_training(False)
    assert not any(module.training for module in net.modules())


def test_a_batch_norm_of_which_only_the_bias_learns_is_frozen() -> None:
    backbone = make()
    backbone.set_trainable([n for n, _ in backbone.module.named_parameters() if n.endswith("bias")])
    backbone.set_training(True)
    assert backbone.module.blocks[0].training and not backbone.module.blocks[0][1].training
    before = backbone.module.blocks[0][1].running_mean.clone()
    backbone.pooled(torch.randn(4, 3, 32, 32))
    assert torch.equal(backbone.module.blocks[0][1].running_mean, before)


def test_stages_by_resolution_are_runs_of_equal_height() -> None:
    net = Net()
    stages = stages_by_resolution(net, units_of(net), size=32, run=lambda m, x: m(x))
    assert [stage[0] for stage in stages] == ["stem.0.weight", "blocks.1.0.weight", "dense.weight"]


def test_units_are_children_with_lists_opened() -> None:
    assert units_of(Net()) == [
        "stem.0", "stem.1", "stem.2", "blocks.0", "blocks.1", "blocks.2", "dense", "dropout",
    ]  # fmt: skip


def test_a_group_of_nothing_but_vectors_joins_its_neighbour() -> None:
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    groups = [["0.weight", "0.bias"], ["1.weight", "1.bias"], ["2.weight", "2.bias"], ["3.weight", "3.bias"]]
    assert merge_norm_stages(net, groups) == (
        ("0.weight", "0.bias", "1.weight", "1.bias"),
        ("2.weight", "2.bias", "3.weight", "3.bias"),
    )


def test_the_hash_is_that_of_tensors_and_structure() -> None:
    assert hash_weights(make()) == hash_weights(make())
    assert hash_weights(make()) != hash_weights(make(seed=1))
    moved = make()
    moved.module.stem[1].running_mean.add_(1)
    assert hash_weights(make()) != hash_weights(moved), "buffers count"
    padded = make()
    padded.module.stem[0].padding_mode = "reflect"
    assert hash_weights(make()) != hash_weights(padded), "the same tensors, another network"


def test_the_hash_does_not_change_with_what_learns_or_the_memory_format() -> None:
    backbone = make()
    expected = hash_weights(backbone)
    backbone.set_trainable([])
    backbone.set_training(False)
    backbone.module.to(memory_format=torch.channels_last)
    assert hash_weights(backbone) == expected
