"""ResNet-50 with its last layers fine-tuned.

The last stage (`layer4`) learns with the new linear layer, at a tenth of its rate; the layers before
it, BatchNorm's statistics included, stay as they were pretrained.

    python examples/resnet50_last_layers.py ./images

`--backbone` runs the same recipe on another network. Weights are downloaded unless TLAUTO_WEIGHTS names a
folder that holds them.

Measured on hymenoptera (ants and bees, 244 images to learn from, 153 to test on), with
`--backbone timm:mobilenetv2_100`: accuracy 0.928 (95 %: 0.876 to 0.959).
"""

from __future__ import annotations

from typing import Any

from recipe import run

BACKBONE = "torchvision:resnet50"
RECIPE: dict[str, Any] = {
    "strategies": ["partial"],
    "heads": ["linear"],
    "params": {
        "freeze.partial.k": 1,
        "freeze.partial.layer_decay": 1.0,
        "finetune.backbone_lr": 0.1,
        "augment.level": "light",
        "optim.name": "adamw",
        "optim.adamw.lr": 1e-3,
    },
}

if __name__ == "__main__":
    run(__doc__, RECIPE, BACKBONE, study="resnet50-last-layers")
