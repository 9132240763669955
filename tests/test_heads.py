"""The built-in heads: what each promises, and the classic recipes that are one setting away."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tlauto.builtin.heads import Cosine, Linear, Mlp, task_heads
from tlauto.contracts import FeatureShape, TaskHead
from tlauto.space import complete
from tlauto.testing import TaskHeadSuite

VGG16 = FeatureShape(pooled=512, unpooled=(512, 7, 7))


class TestEveryBuiltInHead(TaskHeadSuite):
    @pytest.fixture(autouse=True, params=task_heads(), ids=lambda head: head.name)
    def each(self, request: pytest.FixtureRequest) -> None:
        self.head: TaskHead = request.param


def _linears(module: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in module.modules() if isinstance(m, nn.Linear)]


def test_linear_is_one_layer_on_pooled_features() -> None:
    assert _linears(Linear().build(VGG16, 3, {"dropout": 0.0})) == [(512, 3)]


def test_mlp_is_kerass_flatten_dense_1024_relu_recipe_by_one_setting() -> None:
    params = complete(Mlp.space, {"input": "flattened", "hidden": 1024, "dropout": 0})
    with torch.device("meta"):
        module = Mlp().build(VGG16, 10, params)
    assert _linears(module) == [(25088, 1024), (1024, 10)]
    assert Mlp().features(params) == "unpooled"


def test_mlp_is_the_vgg16_4096_relu_dropout_recipe_by_one_setting() -> None:
    params = complete(Mlp.space, {"input": "flattened", "hidden": 4096, "dropout": 0.5})
    with torch.device("meta"):
        module = Mlp().build(VGG16, 2, params)
    kinds = [type(layer).__name__ for layer in module.children()]
    assert kinds == ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
    assert _linears(module) == [(25088, 4096), (4096, 2)]


def test_mlp_stacks_its_hidden_layers() -> None:
    params = complete(Mlp.space, {"hidden": 64, "layers": 2})
    assert _linears(Mlp().build(VGG16, 2, params)) == [(512, 64), (64, 64), (64, 2)]


def test_cosine_logits_stay_within_the_scale_whatever_the_features_length() -> None:
    torch.manual_seed(0)
    module = Cosine().build(VGG16, 5, {"scale": 8.0})
    features = torch.randn(16, 512)
    logits = module(features)
    assert logits.abs().max() <= 8.0
    torch.testing.assert_close(module(1000 * features), logits)


def test_cosine_learns_its_scale() -> None:
    module = Cosine().build(VGG16, 5, {"scale": 8.0})
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "weight": (5, 512),
        "scale": (),
    }
