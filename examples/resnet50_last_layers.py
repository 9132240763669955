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

import argparse
from typing import Any

import tlauto

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


def main() -> None:
    """Run the recipe once on a folder of images and print its test metrics."""
    parser = argparse.ArgumentParser(description="ResNet-50 with its last layers fine-tuned.")
    parser.add_argument("data", help="folder of class folders, with or without train/ and test/")
    parser.add_argument("--backbone", default=BACKBONE, help=f"default: {BACKBONE}")
    parser.add_argument("--out", default="./tlauto-runs", help="workspace folder")
    arguments = parser.parse_args()
    search = tlauto.search(
        arguments.data,
        study="resnet50-last-layers",
        new=True,
        out=arguments.out,
        backbones=[arguments.backbone],
        trials=1,
        **RECIPE,
    )
    for name, found in (search.test or {}).items():
        print(f"{name:>18}  {found['value']:.3f}  (95 %: {found['low']:.3f} to {found['high']:.3f})")
    print(f"{'model':>18}  {search.model}")


if __name__ == "__main__":
    try:
        main()
    except tlauto.TlautoError as error:
        raise SystemExit(f"error: {error}") from None
