"""ResNet-18 fully fine-tuned with SGD and momentum, as in PyTorch's own tutorial.

Every layer learns at the same rate under a new linear layer; small batches, flips and crops.

    python examples/resnet18_sgd.py ./images

`--backbone` runs the same recipe on another network. Weights are downloaded unless TLAUTO_WEIGHTS names a
folder that holds them.

Measured on hymenoptera (ants and bees, 244 images to learn from, 153 to test on), with
`--backbone torchvision:mobilenet_v2`: accuracy 0.908 (95 %: 0.852 to 0.945). The learning rate was chosen
on that network by validation score among 0.001, 0.003, 0.01 and 0.03: the first three tied at 0.959 of 49
images, and 0.003 had the lowest validation loss.
"""

from __future__ import annotations

from typing import Any

from recipe import run

BACKBONE = "torchvision:resnet18"
RECIPE: dict[str, Any] = {
    "strategies": ["full"],
    "heads": ["linear"],
    "params": {
        "freeze.full.layer_decay": 1.0,
        "finetune.backbone_lr": 1.0,
        "finetune.batch_size": 16,
        "finetune.train_mode": True,
        "augment.level": "light",
        "optim.name": "sgd",
        "optim.sgd.lr": 3e-3,
        "optim.sgd.momentum": 0.9,
    },
}

if __name__ == "__main__":
    run(__doc__, RECIPE, BACKBONE, study="resnet18-sgd")
