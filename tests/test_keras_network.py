"""The module that the Keras provider makes of a Keras model: names, stages, freezing, copies, devices."""

from __future__ import annotations

import copy
import os
import random

import pytest
import torch

from tlauto.builtin.keras_provider import KerasProvider
from tlauto.contracts import Backbone, WeightsOptions
from tlauto.errors import ConfigError
from tlauto.testing import BackboneProviderSuite

os.environ.setdefault("KERAS_BACKEND", "torch")
PROVIDER = KerasProvider()
RANDOM = WeightsOptions(pretrained=False)
TINY = "keras:MobileNet-0.25-128"


@pytest.fixture
def tiny() -> Backbone:
    torch.manual_seed(0)
    return PROVIDER.load(TINY, RANDOM)


def names_of(backbone: Backbone) -> list[str]:
    return [name for stage in backbone.stages for name in stage]


def statistics(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in backbone.module.named_buffers() if "running" in n}


def moved(backbone: Backbone, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, b in backbone.module.named_buffers() if n in before and not torch.equal(b, before[n])}


@pytest.mark.parametrize("name", ["MobileNet-0.25-128", "ResNet50", "ConvNeXtTiny", "EfficientNetB0"])
def test_stages_hold_every_parameter_once_stem_first(name: str) -> None:
    backbone = PROVIDER.load(f"keras:{name}", RANDOM)
    names = names_of(backbone)
    assert sorted(names) == sorted(dict(backbone.module.named_parameters()))
    assert len(set(names)) == len(names)
    assert 4 <= len(backbone.stages) <= 6 and all(backbone.stages)
    assert "stem" in names[0] or "conv1" in names[0]


def test_names_do_not_depend_on_what_was_built_before() -> None:
    first, second = (list(PROVIDER.load("keras:InceptionV3", RANDOM).module.state_dict()) for _ in range(2))
    assert first == second
    assert "stage0.conv2d.weight" in first


def test_parameters_and_statistics_are_named_as_in_torch(tiny: Backbone) -> None:
    assert {name.rpartition(".")[2] for name in names_of(tiny)} == {"weight", "bias"}
    assert {name.rpartition(".")[2] for name in statistics(tiny)} == {"running_mean", "running_var"}
    assert statistics(tiny).keys() < tiny.module.state_dict().keys()


def test_the_torch_seed_decides_the_random_weights_and_nothing_else_is_seeded() -> None:
    random.seed(1)
    expected = random.random()
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        random.seed(1)
        states.append(PROVIDER.load(TINY, RANDOM).module.state_dict())
        assert random.random() == expected
    same = [torch.equal(states[0][name], states[1][name]) for name in states[0]]
    assert all(same)
    assert not torch.equal(states[0]["stage0.conv1.weight"], states[2]["stage0.conv1.weight"])


def test_building_leaves_keras_image_layout_alone(tiny: Backbone) -> None:
    import keras

    assert keras.config.image_data_format() == "channels_last"


def test_frozen_batch_norm_keeps_its_statistics_and_a_learning_one_moves_them(tiny: Backbone) -> None:
    images = torch.randn(2, 3, 128, 128)
    tiny.set_trainable(tiny.stages[-1])
    tiny.set_training(True)
    before = statistics(tiny)
    tiny.pooled(images)
    changed = moved(tiny, before)
    assert changed == {name for name in before if name.startswith("stage4.")}
    tiny.set_training(False)
    before = statistics(tiny)
    tiny.pooled(images)
    assert not moved(tiny, before)


def test_biases_alone_can_learn_while_batch_norm_stays_frozen(tiny: Backbone) -> None:
    biases = {name for name in names_of(tiny) if name.endswith(".bias")}
    tiny.set_trainable(biases)
    tiny.set_training(True)
    before = statistics(tiny)
    tiny.pooled(torch.randn(2, 3, 128, 128)).sum().backward()
    with_gradient = {n for n, p in tiny.module.named_parameters() if p.grad is not None}
    assert with_gradient == biases and not moved(tiny, before)


def test_dropout_drops_only_in_stages_that_learn() -> None:
    backbone = PROVIDER.load("keras:EfficientNetB0", RANDOM)
    images = torch.rand(2, 3, 224, 224) * 255
    drops = [name for name, _ in backbone.module.named_modules() if name.endswith("_drop")]
    for trainable, dropping in ((backbone.stages[-1], {"stage4"}), ((), set())):
        backbone.set_trainable(trainable)
        backbone.set_training(True)
        active = {n.partition(".")[0] for n in drops if backbone.module.get_submodule(n).training}
        assert active == dropping
        with torch.no_grad():
            same = torch.equal(backbone.pooled(images), backbone.pooled(images))
        assert same == (not dropping)


def test_a_plain_torch_loop_learns(tiny: Backbone) -> None:
    torch.manual_seed(0)
    images, targets = torch.randn(8, 3, 64, 64), torch.arange(8) % 2
    images[targets == 1] += 1
    head = torch.nn.Linear(tiny.feature_shape.pooled, 2)
    tiny.set_trainable(names_of(tiny))
    tiny.set_training(True)
    optimizer = torch.optim.AdamW([*tiny.module.parameters(), *head.parameters()], lr=1e-3)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(head(tiny.pooled(images)), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_state_dict_carries_everything_the_features_need(tiny: Backbone) -> None:
    images = torch.randn(2, 3, 128, 128)
    tiny.set_trainable(names_of(tiny))
    tiny.set_training(True)
    tiny.pooled(images)
    tiny.set_training(False)
    other = PROVIDER.load(TINY, RANDOM)
    assert not torch.equal(other.pooled(images), tiny.pooled(images))
    other.module.load_state_dict(tiny.module.state_dict())
    assert torch.equal(other.pooled(images), tiny.pooled(images))


def test_a_loaded_state_dict_reaches_the_input_normalisation() -> None:
    images = torch.rand(1, 3, 224, 224) * 255
    backbone = PROVIDER.load("keras:EfficientNetB0", RANDOM)
    before = backbone.pooled(images)
    state = backbone.module.state_dict()
    state["stage0.normalization.mean"] = torch.full((3,), 0.5)
    backbone.module.load_state_dict(state)
    assert not torch.equal(backbone.pooled(images), before)


def test_a_deep_copy_is_equal_and_lives_by_itself(tiny: Backbone) -> None:
    images = torch.randn(2, 3, 128, 128)
    tiny.set_trainable(tiny.stages[-1])
    tiny.set_training(True)
    state = torch.get_rng_state()
    twin = copy.deepcopy(tiny)
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in twin.module.parameters()] == [
        p.requires_grad for p in tiny.module.parameters()
    ]
    assert [m.training for m in twin.module.modules()] == [m.training for m in tiny.module.modules()]
    tiny.set_training(False)
    twin.set_training(False)
    expected = tiny.pooled(images)
    assert torch.equal(twin.pooled(images), expected)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(twin.pooled(images), expected)
    assert torch.equal(tiny.pooled(images), expected)


def test_the_network_computes_where_its_images_are(tiny: Backbone) -> None:
    # The meta device stands in for a GPU: a tensor left behind on the CPU would raise or move.
    tiny.module.to("meta")
    assert {tensor.device.type for tensor in tiny.module.state_dict().values()} == {"meta"}
    assert tiny.pooled(torch.zeros(2, 3, 128, 128, device="meta")).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_network_moves_to_a_gpu_and_trains_there(tiny: Backbone) -> None:
    images = torch.randn(2, 3, 128, 128)
    expected = tiny.pooled(images)
    tiny.module.to("cuda")
    torch.testing.assert_close(tiny.pooled(images.cuda()).cpu(), expected, atol=1e-3, rtol=1e-3)
    tiny.set_trainable(names_of(tiny))
    tiny.set_training(True)
    before = statistics(tiny)
    tiny.pooled(images.cuda()).sum().backward()
    assert moved(tiny, before) == before.keys()


def test_other_sizes_work_where_the_input_says_so(tiny: Backbone) -> None:
    assert tiny.input.resizable and tiny.pooled(torch.zeros(1, 3, 96, 96)).shape == (1, 256)
    fixed = PROVIDER.load("keras:EfficientNetB1", RANDOM)
    assert not fixed.input.resizable and fixed.input.size == 240


def test_an_unknown_parameter_is_refused(tiny: Backbone) -> None:
    with pytest.raises(ConfigError, match=r"stage0\.conv1\.weigth"):
        tiny.set_trainable(["stage0.conv1.weigth"])


# --- what every provider promises -------------------------------------------------------------------


class TestMobileNet(BackboneProviderSuite):
    provider = PROVIDER
    example = TINY
    weights_suffix = ".h5"


class TestConvNeXt(TestMobileNet):
    # Channels last, nested models, layer scales, and a normalisation behind the pooling.
    example = "keras:ConvNeXtTiny"


class TestEfficientNet(TestMobileNet):
    # Input normalisation with statistics, squeeze-and-excitation, dropout inside.
    example = "keras:EfficientNetB0"
