"""Frozen Keras ResNet50 that tells two classes apart.

`ResNet50(include_top=False, pooling="avg")` and one dense layer, trained with Adam: cats or dogs, ants
or bees, defective or not. Works as well with more classes.

    python examples/keras_resnet50_binary.py ./images

`--backbone` runs the same recipe on another network. Weights are downloaded unless TLAUTO_WEIGHTS names a
folder that holds them.

Measured on hymenoptera (ants and bees, 244 images to learn from, 153 to test on), with
`--backbone keras:MobileNetV2`: accuracy 0.954 (95 %: 0.909 to 0.978).
"""

from __future__ import annotations

from typing import Any

from recipe import run

BACKBONE = "keras:ResNet50"
RECIPE: dict[str, Any] = {
    "strategies": ["feature_extraction"],
    "heads": ["linear"],
    "params": {"probe.solver": "minibatch", "optim.name": "adam", "optim.adam.lr": 1e-3},
}

if __name__ == "__main__":
    run(__doc__, RECIPE, BACKBONE, study="keras-resnet50-binary")
