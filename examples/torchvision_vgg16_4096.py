"""VGG16's features with a 4,096 head, as torchvision's own classifier begins.

`25088 -> 4096 -> ReLU -> Dropout(0.5) -> n` on the flattened maps of frozen convolutions, trained
with SGD and momentum.

    python examples/torchvision_vgg16_4096.py ./images

`--backbone` runs the same recipe on another network. Weights are downloaded unless TLAUTO_WEIGHTS names a
folder that holds them.

Measured on hymenoptera (ants and bees, 244 images to learn from, 153 to test on), with
`--backbone keras:MobileNet-0.50-160`: accuracy 0.876 (95 %: 0.814 to 0.919).
"""

from __future__ import annotations

from typing import Any

from recipe import run

BACKBONE = "torchvision:vgg16"
RECIPE: dict[str, Any] = {
    "strategies": ["feature_extraction"],
    "heads": ["mlp"],
    "params": {
        "head.mlp.input": "flattened",
        "head.mlp.hidden": 4096,
        "head.mlp.layers": 1,
        "head.mlp.dropout": 0.5,
        "optim.name": "sgd",
        "optim.sgd.lr": 1e-3,
        "optim.sgd.momentum": 0.9,
    },
}

if __name__ == "__main__":
    run(__doc__, RECIPE, BACKBONE, study="torchvision-vgg16-4096")
