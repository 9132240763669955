"""Frozen VGG16 with a dense head, as in Keras' first tutorials.

`Flatten -> Dense(1024, relu) -> Dense(n)` on `VGG16(include_top=False)`, trained with Adam. The
convolutions are frozen, so they run over each image once.

    python examples/keras_vgg16_dense.py ./images

`--backbone` runs the same recipe on another network. Weights are downloaded unless TLAUTO_WEIGHTS names a
folder that holds them.

Measured on hymenoptera (ants and bees, 244 images to learn from, 153 to test on), with
`--backbone keras:MobileNetV2`: accuracy 0.935 (95 %: 0.884 to 0.964). The learning rate was chosen on that
network by validation score (49 images) among 0.0001, 0.0003, 0.001 and 0.003: 0.918, 0.918, 0.939 and 0.980.
"""

from __future__ import annotations

from typing import Any

from recipe import run

BACKBONE = "keras:VGG16"
RECIPE: dict[str, Any] = {
    "strategies": ["feature_extraction"],
    "heads": ["mlp"],
    "params": {
        "head.mlp.input": "flattened",
        "head.mlp.hidden": 1024,
        "head.mlp.layers": 1,
        "head.mlp.dropout": 0.0,
        "optim.name": "adam",
        "optim.adam.lr": 3e-3,
    },
}

if __name__ == "__main__":
    run(__doc__, RECIPE, BACKBONE, study="keras-vgg16-dense")
