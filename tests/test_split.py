"""Networks cut before a stage: both halves together are the whole, or there is no split."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tlauto.backbone import TorchBackbone, agree, stages_by_unit
from tlauto.contracts import Backbone, ImageInput, WeightsOptions
from tlauto.plugins import registry
from tlauto.splits import Split, Splittable, split_of

KINDS = ("pooled", "unpooled")
SMALL = [
    "timm:test_resnet", "timm:test_efficientnet", "timm:test_vit", "timm:mobilenetv3_small_050",
    "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1", "torchvision:resnet18",
    "keras:MobileNet-0.25-128",
]  # fmt: skip


def load(id: str) -> TorchBackbone:
    torch.manual_seed(0)
    weights = WeightsOptions(pretrained=False, offline=True)
    backbone = registry().provider(id.partition(":")[0]).load(id, weights)
    backbone.set_training(False)
    return backbone


def images_for(backbone: Backbone, count: int = 3) -> torch.Tensor:
    size = backbone.input.size
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("id", SMALL)
def test_every_boundary_can_be_cut_and_the_halves_are_the_whole(id: str) -> None:
    backbone = load(id)
    images = images_for(backbone)
    assert isinstance(backbone, Splittable)
    for stage in range(1, len(backbone.stages)):
        split = split_of(backbone, stage)
        assert isinstance(split, Split), f"stage {stage}"
        with torch.no_grad():
            activations = split.prefix(images)
            assert activations.shape[0] == len(images) and activations.ndim in (3, 4)
            for kind in KINDS:
                found = split.suffix(activations.clone(), kind)
                assert agree(found, getattr(backbone, kind)(images)), (stage, kind)


@pytest.mark.parametrize("id", SMALL)
def test_what_learns_in_the_suffix_gets_the_gradients_of_the_whole(id: str) -> None:
    backbone = load(id)
    images, last = images_for(backbone), len(backbone.stages) - 1
    split = split_of(backbone, last)
    assert split is not None
    backbone.set_trainable(backbone.stages[last])
    with torch.no_grad():
        activations = split.prefix(images)

    def gradients(features: torch.Tensor) -> dict[str, torch.Tensor]:
        backbone.module.zero_grad(set_to_none=True)
        features.square().sum().backward()
        parameters = backbone.module.named_parameters()
        return {name: p.grad.clone() for name, p in parameters if p.grad is not None}

    expected = gradients(backbone.pooled(images))
    found = gradients(split.suffix(activations, "pooled"))
    assert found.keys() == expected.keys() == set(backbone.stages[last])
    assert all(agree(found[name], expected[name]) for name in expected)


# Without Keras', whose random weights let activations vanish (1e-12): a trial uses no half of those.
@pytest.mark.parametrize("id", [id for id in SMALL if not id.startswith("keras:")])
def test_half_precision_at_the_boundary_hardly_changes_the_features(id: str) -> None:
    backbone = load(id)
    images = images_for(backbone)
    for stage in range(1, len(backbone.stages)):
        split = split_of(backbone, stage)
        assert split is not None
        with torch.no_grad():
            activations = split.prefix(images)
            rounded = activations.half().float()
            assert torch.all((rounded - activations).abs() <= activations.abs() * 2**-11 + 2**-25)
            # Measured with pretrained weights on photos: 1e-4 to 2e-3, the most before the first stages.
            assert agree(split.suffix(rounded, "pooled"), split.suffix(activations, "pooled"), tolerance=5e-3)


def test_splitting_leaves_the_network_the_random_numbers_and_the_modes_as_they_were() -> None:
    backbone = load("timm:test_resnet")
    backbone.set_trainable(backbone.stages[-1])
    backbone.set_training(True)
    learning = {name for name, p in backbone.module.named_parameters() if p.requires_grad}
    modes = [module.training for module in backbone.module.modules()]
    buffers = {name: buffer.clone() for name, buffer in backbone.module.named_buffers()}
    state = torch.get_rng_state()
    split = split_of(backbone, 4)
    assert split is not None
    split.suffix(split.prefix(images_for(backbone)), "pooled")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name for name, p in backbone.module.named_parameters() if p.requires_grad} == learning
    assert [module.training for module in backbone.module.modules()] == modes
    assert not any("forward" in vars(m) for m in backbone.module.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.module.modules())
    frozen = {name: buffer for name, buffer in buffers.items() if not name.startswith("layer4")}
    now = dict(backbone.module.named_buffers())
    assert all(torch.equal(now[name], buffer) for name, buffer in frozen.items())


def test_there_is_nothing_to_cut_before_the_first_stage_or_behind_the_last() -> None:
    backbone = load("timm:test_resnet")
    assert split_of(backbone, 0) is None
    assert split_of(backbone, len(backbone.stages)) is None
    assert split_of(object(), 1) is None


# --- networks made for this -------------------------------------------------------------------------


class Net(nn.Module):
    """Stem, body and top; how the forward pass joins them is given."""

    def __init__(self, join: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.relu = nn.ReLU()
        self.body = nn.Conv2d(8, 8, 3, 1, 1)
        self.top = nn.Conv2d(8, 8, 3, 1, 1)
        self.join = join

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.join(self, images)


def whole(join: Callable[..., torch.Tensor]) -> TorchBackbone:
    torch.manual_seed(0)
    net = Net(join)
    stages = stages_by_unit(net, ["stem", "body", "top"])
    return TorchBackbone(net, ImageInput(size=32, resize=36), stages, unpooled=lambda m, x: m(x))


def test_a_module_that_is_called_on_both_sides_is_bypassed_only_before_the_boundary() -> None:
    backbone = whole(lambda m, x: m.relu(m.top(m.relu(m.body(m.relu(m.stem(x)))))))
    split = backbone.split(2)
    assert split is not None
    images = images_for(backbone)
    with torch.no_grad():
        assert torch.equal(split.suffix(split.prefix(images), "unpooled"), backbone.unpooled(images))


def test_a_residual_branch_around_the_boundary_reads_the_activation() -> None:
    def residual(m: Net, x: torch.Tensor) -> torch.Tensor:
        x = m.relu(m.body(m.stem(x)))
        return x + m.top(x)

    backbone = whole(residual)
    split = backbone.split(2)
    assert split is not None
    images = images_for(backbone)
    with torch.no_grad():
        assert torch.equal(split.suffix(split.prefix(images), "unpooled"), backbone.unpooled(images))


def skips(m: Net, x: torch.Tensor) -> torch.Tensor:
    early = m.stem(x)
    return early + m.top(m.relu(m.body(early)))


def mixes(m: Net, x: torch.Tensor) -> torch.Tensor:
    # A weight of the last stage has a part in what the stage is called with.
    return m.top(m.body(m.stem(x)) * m.top.weight.mean())


def reads_the_image(m: Net, x: torch.Tensor) -> torch.Tensor:
    return m.top(m.body(m.stem(x))) * x.mean()


def never_calls(m: Net, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.conv2d(m.body(m.stem(x)), m.top.weight, m.top.bias, padding=1)


@pytest.mark.parametrize("join", [skips, mixes, reads_the_image, never_calls])
def test_a_network_whose_halves_would_not_be_the_whole_is_not_cut(join: Callable[..., torch.Tensor]) -> None:
    assert whole(join).split(2) is None
