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

import argparse
from typing import Any

import tlauto

BACKBONE = "keras:ResNet50"
RECIPE: dict[str, Any] = {
    "strategies": ["feature_extraction"],
    "heads": ["linear"],
    "params": {"optim.name": "adam", "optim.adam.lr": 1e-3},
}


def main() -> None:
    """Run the recipe once on a folder of images and print its test metrics."""
    parser = argparse.ArgumentParser(description="Frozen Keras ResNet50 that tells two classes apart.")
    parser.add_argument("data", help="folder of class folders, with or without train/ and test/")
    parser.add_argument("--backbone", default=BACKBONE, help=f"default: {BACKBONE}")
    parser.add_argument("--out", default="./tlauto-runs", help="workspace folder")
    arguments = parser.parse_args()
    search = tlauto.search(
        arguments.data,
        study="keras-resnet50-binary",
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
