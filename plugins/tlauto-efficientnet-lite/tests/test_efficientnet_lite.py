"""EfficientNet-Lite passes the provider suite with its real weights."""

from __future__ import annotations

import pytest
import timm
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from tlauto_efficientnet_lite import RESIZE, SHORTLIST, EfficientNetLiteProvider

from tlauto import WeightsOptions
from tlauto.plugins import load_plugins
from tlauto.testing import BackboneProviderSuite

PROVIDER = EfficientNetLiteProvider()
# ImageNet's numbers of what scikit-learn's photograph of a Chinese palace may show.
CHINA = {"palace": 698, "stupa": 832, "monastery": 663}


class TestLite0(BackboneProviderSuite):
    provider = PROVIDER
    example = "efficientnet-lite:lite0"
    weights = WeightsOptions(offline=True)
    weights_suffix = ".pth"


def test_tlauto_finds_the_provider_and_knows_where_it_comes_from() -> None:
    registry = load_plugins()
    assert registry.source("backbone_providers", "efficientnet-lite") == "tlauto-efficientnet-lite 0.1.0"


@pytest.mark.parametrize("info", SHORTLIST, ids=lambda info: info.name)
def test_facts_and_preprocessing_are_those_of_timms_network(info) -> None:
    model = timm.create_model(f"tf_efficientnet_{info.name}", pretrained=False)
    backbone = PROVIDER.load(info.id, WeightsOptions(offline=True))
    cfg = timm.data.resolve_model_data_config(model)
    wanted = backbone.input
    assert (3, wanted.size, wanted.size) == cfg["input_size"]
    assert wanted.resize == RESIZE[info.name] == int(wanted.size / cfg["crop_pct"])
    assert (wanted.interpolation, wanted.mean, wanted.std) == (cfg["interpolation"], cfg["mean"], cfg["std"])
    parameters = sum(p.numel() for p in backbone.module.parameters())
    assert info.params_m == pytest.approx(parameters / 1e6, abs=0.01)
    assert info.input_size == wanted.size


@pytest.mark.parametrize("info", SHORTLIST, ids=lambda info: info.name)
def test_with_the_classifier_of_the_same_file_it_recognises_a_real_photo(info) -> None:
    options = WeightsOptions(offline=True)
    backbone = PROVIDER.load(info.id, options)
    backbone.set_training(False)
    file = PROVIDER.weights_status(info.id, options).path
    tensors = torch.load(file, weights_only=True)
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(timm.create_model(f"tf_efficientnet_{info.name}"))
    )
    image = transform(Image.fromarray(load_sample_image("china.jpg")))[None]
    with torch.no_grad():
        logits = backbone.pooled(image) @ tensors["_fc.weight"].T + tensors["_fc.bias"]
    assert int(logits.argmax()) in CHINA.values()
