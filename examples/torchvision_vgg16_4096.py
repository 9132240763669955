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

import argparse
from typing import Any

import tlauto

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


def main() -> None:
    """Run the recipe once on a folder of images and print its test metrics."""
    parser = argparse.ArgumentParser(
        description="VGG16's features with a 4,096 head, as torchvision's own classifier begins."
    )
    parser.add_argument("data", help="folder of class folders, with or without train/ and test/")
    parser.add_argument("--backbone", default=BACKBONE, help=f"default: {BACKBONE}")
    parser.add_argument("--out", default="./tlauto-runs", help="workspace folder")
    arguments = parser.parse_args()
    search = tlauto.search(
        arguments.data,
        study="torchvision-vgg16-4096",
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
