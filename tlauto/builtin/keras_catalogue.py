"""Keras Applications as static data: names, arguments, preprocessing, weight files, facts.

Nothing here imports Keras, so the coordinator can build a search space from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tlauto.contracts import BackboneInfo, ImageInput

Mode = Literal["tf", "caffe", "torch", "inside"]


@dataclass(frozen=True)
class Application:
    """One network of Keras Applications with one set of ImageNet weights.

    Attributes:
        name: the function's name, followed by what makes a variant (`MobileNet-0.50-160`).
        function: the function in `keras.applications`.
        size: side of the images its weights were trained for, pixels.
        mode: Keras' preprocessing: `tf` to [-1, 1]; `caffe` BGR minus the mean; `torch` mean and
            std; `inside` when the network's first layers do it and want [0, 255].
        files: the library's names of its weight files, without and with classifier.
        arguments: what `function` gets beside `weights`, `include_top` and `input_shape`.
        pretraining, licence: of the original weights.
    """

    name: str
    function: str
    size: int
    mode: Mode
    files: tuple[str, str]
    licence: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    pretraining: str = "in1k"

    @property
    def id(self) -> str:
        """`keras:` and the name."""
        return f"keras:{self.name}"

    @property
    def info(self) -> BackboneInfo:
        """What is known of it without building it."""
        params_m, gmacs, accuracy = FACTS[self.name]
        return BackboneInfo(
            self.id,
            params_m=params_m,
            gmacs=gmacs,
            input_size=self.size,
            pretraining=self.pretraining,
            licence=self.licence,
            accuracy=accuracy,
            cost=COSTS.get(self.name),
            is_default=self.name == DEFAULT,
        )

    def image_input(self, *, resizable: bool) -> ImageInput:
        """Keras' own pipeline: `load_img` to a square with bilinear filter, then `preprocess_input`."""
        mean, std = _NORMALISATION[self.mode]
        return ImageInput(
            size=self.size,
            resize=self.size,
            fit="squash",
            interpolation="bilinear",
            mean=mean,
            std=std,
            bgr=self.mode == "caffe",
            resizable=resizable,
        )


_Triple = tuple[float, float, float]
# In units of [0, 1]. Caffe's means are Keras' constants for [0, 255], blue first.
_BYTE: _Triple = (1 / 255, 1 / 255, 1 / 255)
_NORMALISATION: dict[Mode, tuple[_Triple, _Triple]] = {
    "tf": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "caffe": ((103.939 / 255, 116.779 / 255, 123.68 / 255), _BYTE),
    "torch": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inside": ((0.0, 0.0, 0.0), _BYTE),
}

REFUSED = ("NASNetMobile",)
"""Applications that Keras itself refuses to build on its PyTorch backend."""

DEFAULT = "MobileNetV2"


def _all() -> Iterator[Application]:
    yield from _mobilenets()
    tf_kernels = (
        "{}_weights_tf_dim_ordering_tf_kernels_notop.h5",
        "{}_weights_tf_dim_ordering_tf_kernels.h5",
    )
    for name, size, mode, licence in _CLASSICS:
        stem = "inception_v3" if name == "InceptionV3" else name.lower()
        stem = "inception_resnet_v2" if name == "InceptionResNetV2" else stem
        yield Application(
            name, name, size, mode, (tf_kernels[0].format(stem), tf_kernels[1].format(stem)), licence
        )
    yield Application(
        "NASNetLarge", "NASNetLarge", 331, "tf", ("nasnet_large_no_top.h5", "nasnet_large.h5"), "Apache-2.0"
    )
    for name, size in _EFFICIENTNETS.items():
        stem = name.lower() if "V2" not in name else f"efficientnetv2-{name[14:].lower()}"
        yield Application(name, name, size, "inside", (f"{stem}_notop.h5", f"{stem}.h5"), "Apache-2.0")
    for variant in ("Tiny", "Small", "Base", "Large", "XLarge"):
        name, stem = f"ConvNeXt{variant}", f"convnext_{variant.lower()}"
        # Keras publishes the weights that were trained on ImageNet-22k first, from Base upwards.
        pretraining = "in1k" if variant in ("Tiny", "Small") else "in22k_ft_in1k"
        yield Application(
            name, name, 224, "inside", (f"{stem}_notop.h5", f"{stem}.h5"), "MIT", pretraining=pretraining
        )


def _mobilenets() -> Iterator[Application]:
    for alpha, text in ((0.25, "2_5"), (0.5, "5_0"), (0.75, "7_5"), (1.0, "1_0")):
        for size in (128, 160, 192, 224):
            stem = f"mobilenet_{text}_{size}_tf"
            files = (f"{stem}_no_top.h5", f"{stem}.h5")
            name = _variant("MobileNet", alpha, size)
            yield Application(name, "MobileNet", size, "tf", files, "Apache-2.0", {"alpha": alpha})
    for alpha in (0.35, 0.5, 0.75, 1.0, 1.3, 1.4):
        for size in (96, 128, 160, 192, 224) if alpha <= 1 else (224,):
            stem = f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{alpha}_{size}"
            files = (f"{stem}_no_top.h5", f"{stem}.h5")
            name = _variant("MobileNetV2", alpha, size)
            yield Application(name, "MobileNetV2", size, "tf", files, "Apache-2.0", {"alpha": alpha})
    for kind in ("Small", "Large"):
        for suffix, text, arguments in (
            ("", "224_1.0", {}),
            ("-0.75", "224_0.75", {"alpha": 0.75}),
            ("-minimalistic", "minimalistic_224_1.0", {"minimalistic": True}),
        ):
            function, stem = f"MobileNetV3{kind}", f"weights_mobilenet_v3_{kind.lower()}_{text}_float"
            files = (f"{stem}_no_top_v2.h5", f"{stem}.h5")
            yield Application(f"{function}{suffix}", function, 224, "inside", files, "Apache-2.0", arguments)


def _variant(function: str, alpha: float, size: int) -> str:
    return function if (alpha, size) == (1.0, 224) else f"{function}-{alpha:.2f}-{size}"


# Licences: the "License" sections of Keras' documentation up to 2.3, and the EfficientNet and
# ConvNeXt authors' repositories for the later ones.
_CLASSICS: tuple[tuple[str, int, Mode, str], ...] = (
    ("VGG16", 224, "caffe", "CC-BY-4.0"),
    ("VGG19", 224, "caffe", "CC-BY-4.0"),
    ("ResNet50", 224, "caffe", "MIT"),
    ("ResNet101", 224, "caffe", "MIT"),
    ("ResNet152", 224, "caffe", "MIT"),
    ("ResNet50V2", 224, "tf", "BSD-3-Clause"),
    ("ResNet101V2", 224, "tf", "BSD-3-Clause"),
    ("ResNet152V2", 224, "tf", "BSD-3-Clause"),
    ("DenseNet121", 224, "torch", "BSD-3-Clause"),
    ("DenseNet169", 224, "torch", "BSD-3-Clause"),
    ("DenseNet201", 224, "torch", "BSD-3-Clause"),
    ("InceptionV3", 299, "tf", "Apache-2.0"),
    ("InceptionResNetV2", 299, "tf", "Apache-2.0"),
    ("Xception", 299, "tf", "MIT"),
)
_EFFICIENTNETS = {
    "EfficientNetB0": 224, "EfficientNetB1": 240, "EfficientNetB2": 260, "EfficientNetB3": 300,
    "EfficientNetB4": 380, "EfficientNetB5": 456, "EfficientNetB6": 528, "EfficientNetB7": 600,
    "EfficientNetV2B0": 224, "EfficientNetV2B1": 240, "EfficientNetV2B2": 260, "EfficientNetV2B3": 300,
    "EfficientNetV2S": 384, "EfficientNetV2M": 480, "EfficientNetV2L": 480,
}  # fmt: skip

# Learnable parameters without classifier (millions) and multiply-adds of one image (1e9), both counted
# on the built networks; ImageNet-1k top-1 as published: keras.io/api/applications, and the tables of
# TensorFlow's slim models for the MobileNets.
FACTS: dict[str, tuple[float, float, float]] = {
    "MobileNet-0.25-128": (0.213, 0.0133, 0.415), "MobileNet-0.25-160": (0.213, 0.0208, 0.455),
    "MobileNet-0.25-192": (0.213, 0.03, 0.477), "MobileNet-0.25-224": (0.213, 0.0408, 0.498),
    "MobileNet-0.50-128": (0.819, 0.0486, 0.563), "MobileNet-0.50-160": (0.819, 0.076, 0.591),
    "MobileNet-0.50-192": (0.819, 0.11, 0.617), "MobileNet-0.50-224": (0.819, 0.149, 0.633),
    "MobileNet-0.75-128": (1.82, 0.106, 0.621), "MobileNet-0.75-160": (1.82, 0.166, 0.653),
    "MobileNet-0.75-192": (1.82, 0.238, 0.672), "MobileNet-0.75-224": (1.82, 0.325, 0.684),
    "MobileNet-1.00-128": (3.21, 0.185, 0.652), "MobileNet-1.00-160": (3.21, 0.29, 0.680),
    "MobileNet-1.00-192": (3.21, 0.417, 0.700), "MobileNet": (3.21, 0.568, 0.709),
    "MobileNetV2-0.35-96": (0.396, 0.0107, 0.455), "MobileNetV2-0.35-128": (0.396, 0.0189, 0.508),
    "MobileNetV2-0.35-160": (0.396, 0.0296, 0.557), "MobileNetV2-0.35-192": (0.396, 0.0426, 0.582),
    "MobileNetV2-0.35-224": (0.396, 0.058, 0.603), "MobileNetV2-0.50-96": (0.688, 0.0176, 0.512),
    "MobileNetV2-0.50-128": (0.688, 0.0313, 0.577), "MobileNetV2-0.50-160": (0.688, 0.0489, 0.610),
    "MobileNetV2-0.50-192": (0.688, 0.0704, 0.639), "MobileNetV2-0.50-224": (0.688, 0.0959, 0.654),
    "MobileNetV2-0.75-96": (1.35, 0.0382, 0.588), "MobileNetV2-0.75-128": (1.35, 0.0678, 0.632),
    "MobileNetV2-0.75-160": (1.35, 0.106, 0.664), "MobileNetV2-0.75-192": (1.35, 0.153, 0.687),
    "MobileNetV2-0.75-224": (1.35, 0.208, 0.698), "MobileNetV2-1.00-96": (2.22, 0.055, 0.603),
    "MobileNetV2-1.00-128": (2.22, 0.0978, 0.653), "MobileNetV2-1.00-160": (2.22, 0.153, 0.688),
    "MobileNetV2-1.00-192": (2.22, 0.22, 0.707), "MobileNetV2": (2.22, 0.299, 0.718),
    "MobileNetV2-1.30-224": (3.72, 0.508, 0.744), "MobileNetV2-1.40-224": (4.32, 0.58, 0.750),
    "MobileNetV3Small": (0.927, 0.0549, 0.681), "MobileNetV3Small-0.75": (0.573, 0.0419, 0.654),
    "MobileNetV3Small-minimalistic": (0.429, 0.0507, 0.619), "MobileNetV3Large": (2.97, 0.214, 0.756),
    "MobileNetV3Large-0.75": (1.79, 0.152, 0.733), "MobileNetV3Large-minimalistic": (1.41, 0.207, 0.723),
    "VGG16": (14.7, 15.3, 0.713), "VGG19": (20, 19.5, 0.713), "ResNet50": (23.5, 3.86, 0.749),
    "ResNet101": (42.6, 7.57, 0.764), "ResNet152": (58.2, 11.3, 0.766), "ResNet50V2": (23.5, 3.48, 0.760),
    "ResNet101V2": (42.5, 7.19, 0.772), "ResNet152V2": (58.2, 10.9, 0.780),
    "DenseNet121": (6.95, 2.83, 0.750), "DenseNet169": (12.5, 3.36, 0.762),
    "DenseNet201": (18.1, 4.29, 0.773), "InceptionV3": (21.8, 5.71, 0.779),
    "InceptionResNetV2": (54.3, 13.2, 0.803), "Xception": (20.8, 8.36, 0.790),
    "NASNetLarge": (84.7, 23.8, 0.825),
    "EfficientNetB0": (4.01, 0.385, 0.771), "EfficientNetB1": (6.51, 0.685, 0.791),
    "EfficientNetB2": (7.7, 0.992, 0.801), "EfficientNetB3": (10.7, 1.83, 0.816),
    "EfficientNetB4": (17.5, 4.39, 0.829), "EfficientNetB5": (28.3, 10.3, 0.836),
    "EfficientNetB6": (40.7, 19.1, 0.840), "EfficientNetB7": (63.8, 37.7, 0.843),
    "EfficientNetV2B0": (5.86, 0.717, 0.787), "EfficientNetV2B1": (6.86, 1.2, 0.798),
    "EfficientNetV2B2": (8.69, 1.7, 0.805), "EfficientNetV2B3": (12.8, 3.01, 0.820),
    "EfficientNetV2S": (20.2, 8.36, 0.839), "EfficientNetV2M": (52.9, 24.6, 0.853),
    "EfficientNetV2L": (117, 56.1, 0.857), "ConvNeXtTiny": (27.8, 4.45, 0.813),
    "ConvNeXtSmall": (49.5, 8.68, 0.823), "ConvNeXtBase": (87.6, 15.4, 0.853),
    "ConvNeXtLarge": (196, 34.4, 0.863), "ConvNeXtXLarge": (348, 60.9, 0.867),
}  # fmt: skip

# Seconds of forward and backward pass, EfficientNet-Lite0 (timm) = 1; measured on one CPU core, batch 8.
COSTS: dict[str, float] = {
    "MobileNet-0.25-128": 0.10,
    "MobileNet-0.50-160": 0.23,
    "MobileNetV3Small": 0.32,
    "MobileNetV3Large": 0.87,
    "EfficientNetV2B0": 0.99,
    "MobileNetV2": 1.18,
    "EfficientNetB0": 1.6,
    "ConvNeXtTiny": 2.2,
    "ResNet50": 3.4,
    "DenseNet121": 3.5,
    "EfficientNetV2B3": 3.8,
    "ConvNeXtBase": 6.5,
    "Xception": 7.5,
    "EfficientNetV2S": 9.7,
}

SHORTLIST = tuple(COSTS)
"""Names of the applications a search starts from, cheapest first."""

CATALOGUE: dict[str, Application] = {application.name: application for application in _all()}
