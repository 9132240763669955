"""The Keras provider gives the features of Keras' own pipeline: load_img, preprocess_input, model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tlauto.builtin.keras_catalogue import CATALOGUE, Application
from tlauto.builtin.keras_provider import KerasProvider
from tlauto.contracts import ImageInput, WeightsOptions

os.environ.setdefault("KERAS_BACKEND", "torch")
# Keras' own `save_weights`, which only these tests call.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:keras")
PROVIDER = KerasProvider()
MODULES = {
    "MobileNet": "mobilenet",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3Small": "mobilenet_v3",
    "ResNet50": "resnet50",
    "DenseNet121": "densenet",
    "EfficientNetB1": "efficientnet",
    "EfficientNetV2B0": "efficientnet_v2",
    "ConvNeXtTiny": "convnext",
    "InceptionV3": "inception_v3",
}


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    """Two real photographs that come with scikit-learn, 640 x 427 pixels."""
    folder = Path(importlib.import_module("sklearn.datasets").__path__[0], "images")
    return [folder / "china.jpg", folder / "flower.jpg"]


def prepare(paths: Sequence[Path], wanted: ImageInput) -> torch.Tensor:
    """Normalised images (N, 3, H, W), as the contract of ImageInput says."""
    assert wanted.fit == "squash"
    filters = {"bilinear": Image.Resampling.BILINEAR}
    side = (wanted.resize, wanted.resize)
    arrays = [
        np.asarray(Image.open(p).convert("RGB").resize(side, filters[wanted.interpolation])) for p in paths
    ]
    pixels = np.stack(arrays).astype(np.float64) / 255  # (N, H, W, 3)
    if wanted.bgr:
        pixels = pixels[..., ::-1]
    normalised = (pixels - np.array(wanted.mean)) / np.array(wanted.std)
    return torch.tensor(normalised.astype(np.float32)).permute(0, 3, 1, 2)


def keras_pixels(paths: Sequence[Path], application: Application) -> Any:
    """A batch (N, H, W, 3) by Keras' own functions."""
    import keras

    module = importlib.import_module(f"keras.applications.{MODULES[application.function]}")
    side = (application.size, application.size)
    images = [keras.utils.load_img(p, target_size=side, interpolation="bilinear") for p in paths]
    return module.preprocess_input(np.stack([keras.utils.img_to_array(image) for image in images]))


def keras_model(application: Application, **arguments: Any) -> Any:
    """The application as Keras builds it: NHWC, fixed size, averaged features."""
    import keras

    return getattr(keras.applications, application.function)(
        include_top=False,
        pooling="avg",
        input_shape=(application.size, application.size, 3),
        **application.arguments,
        **arguments,
    )


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def restless(model: Any) -> None:
    """Give random weights and statistics to a model, so that no layer is the identity."""
    rng = np.random.default_rng(0)
    for layer in model.layers:
        values = [v for v in layer.weights if v.name in ("gamma", "beta", "moving_mean", "moving_variance")]
        for variable in values:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape).astype(np.float32))


@pytest.mark.parametrize(
    "name",
    ["MobileNet-0.25-128", "ResNet50", "DenseNet121", "MobileNetV3Small", "EfficientNetV2B0",
     "ConvNeXtTiny", "InceptionV3", "MobileNetV2-0.35-96"],
)  # fmt: skip
def test_features_equal_keras_own_pipeline_with_random_weights(
    name: str, photos: list[Path], tmp_path: Path
) -> None:
    application = CATALOGUE[name]
    reference = keras_model(application, weights=None)
    restless(reference)
    file = tmp_path / "reference.weights.h5"
    reference.save_weights(file)
    backbone = PROVIDER.load(application.id, WeightsOptions(files={application.id: str(file)}))
    with torch.no_grad():
        ours = backbone.pooled(prepare(photos, backbone.input))
        theirs = reference(keras_pixels(photos, application), training=False)
    assert_close(ours, theirs.cpu())


def test_efficientnet_gets_the_input_scaling_keras_adds_to_downloaded_weights(
    photos: list[Path], tmp_path: Path
) -> None:
    import keras

    application = CATALOGUE["EfficientNetB1"]
    plain = keras_model(application, weights=None)
    restless(plain)
    statistics = plain.get_layer(index=2)
    statistics.load_own_variables({"0": [0.485, 0.456, 0.406], "1": [0.052, 0.050, 0.051], "2": 0})
    file = tmp_path / "reference.weights.h5"
    plain.save_weights(file)
    backbone = PROVIDER.load(application.id, WeightsOptions(files={application.id: str(file)}))
    # What Keras builds for weights="imagenet": one more Rescaling behind the normalisation.
    rest = keras.Model(plain.get_layer("stem_conv_pad").input, plain.output)
    scale = keras.layers.Rescaling([1 / s**0.5 for s in (0.229, 0.224, 0.225)])
    pixels = keras_pixels(photos, application)
    with torch.no_grad():
        theirs = rest(scale(statistics(plain.get_layer(index=1)(pixels))), training=False)
        ours = backbone.pooled(prepare(photos, backbone.input))
    assert_close(ours, theirs.cpu())


def test_unpooled_features_average_to_pooled_ones(photos: list[Path]) -> None:
    backbone = PROVIDER.load("keras:MobileNet-0.25-128", WeightsOptions(pretrained=False))
    images = prepare(photos, backbone.input)
    with torch.no_grad():
        torch.testing.assert_close(backbone.unpooled(images).mean((2, 3)), backbone.pooled(images))


@pytest.mark.parametrize("name", ["MobileNetV2", "MobileNet-0.50-160", "MobileNet-0.25-128"])
def test_features_equal_keras_own_pipeline_with_real_weights(
    name: str, photos: list[Path], real_weights: Path
) -> None:
    application = CATALOGUE[name]
    options = WeightsOptions(folder=str(real_weights), offline=True)
    status = PROVIDER.weights_status(application.id, options)
    assert status.state == "at_hand" and status.path
    reference = keras_model(application, weights=status.path)
    backbone = PROVIDER.load(application.id, options)
    with torch.no_grad():
        ours = backbone.pooled(prepare(photos, backbone.input))
        theirs = reference(keras_pixels(photos, application), training=False)
    assert_close(ours, theirs.cpu())
