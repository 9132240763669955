"""What a head gains that sees an image's mirror image as well, or larger images than the pretraining had.

    python bench/views.py mirrored --data DIR --weights-dir DIR --images 120 --draws 5
    python bench/views.py larger --data DIR --weights-dir DIR --images 120 --draws 5

For each draw, so many images to learn from are taken from the dataset at random, a linear head is solved
on them, its L2 penalty by cross-validation, and asked about the images that were not drawn: once on the
features of the images at the backbone's own size, once on the means of them and their mirror images', or
on those of images 1.4 times as large. The test part is never opened. Printed, by backbone and kind of
features: accuracy and cross-validated log loss of the plain head, and what the change brings, with a
standard error over draws. The last line of standard output is one JSON object of the changes of accuracy
in points.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from itertools import product
from typing import Any

from choosing import add_arguments, with_defaults, with_error
from fewshot import Head, bound_of, draws, extract, open_images, possible, solve

from tlauto.errors import TlautoError
from tlauto.recipe import SCALES

VIEWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mirrored": ({"mirror": False}, {"mirror": True}),
    "larger": ({"scale": min(SCALES)}, {"scale": max(SCALES)}),
}
"""How features are extracted without and with each change."""

BACKBONES = ("efficientnet-lite:lite0", "torchvision:squeezenet1_1", "keras:MobileNetV2")


def main() -> None:
    args = parse()
    figures: dict[str, float] = {}
    print(f"{'data':<13}{'images':>6}  {'backbone':<27}{'features':<9}{'accuracy':>8}{'loss':>7}", end="")
    print(f"{'points':>17}{'of loss':>9}")
    try:
        for images in (open_images(data, seed=args.seed) for data in args.data):
            for backbone in args.backbone:
                given = {"weights_dir": args.weights_dir, "pretrained": args.pretrained}
                plain, changed = (extract(images, backbone, **view, **given) for view in VIEWS[args.view])
                for count, kind in product(possible(images, args.images), plain):
                    pairs = [
                        [
                            solve(images, draw, backbone, one[kind], bound=bound_of(kind))
                            for one in (plain, changed)
                        ]
                        for draw in draws(images, count, args.draws)
                    ]
                    figures[f"{images.name}_{count}_{backbone}_{kind}"] = gain(pairs)
                    print(f"{images.name:<13}{count:>6}  {backbone:<27}{kind:<9}{row(pairs)}", flush=True)
    except TlautoError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(figures))


def gain(pairs: Sequence[Sequence[Head]]) -> float:
    """Points of accuracy on images that were not drawn, on average."""
    return round(100 * statistics.mean(b.unseen_accuracy - a.unseen_accuracy for a, b in pairs), 2)


def row(pairs: Sequence[Sequence[Head]]) -> str:
    """The figures of one line."""
    accuracy = statistics.mean(a.unseen_accuracy for a, _ in pairs)
    loss, change = (
        statistics.mean(a.loss for a, _ in pairs),
        statistics.mean(b.loss - a.loss for a, b in pairs),
    )
    points = with_error([100 * (b.unseen_accuracy - a.unseen_accuracy) for a, b in pairs])
    return f"{accuracy:>8.3f}{loss:>7.3f}{points:>17}{change:>+9.3f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("view", choices=VIEWS, help="the change")
    add_arguments(parser, backbones=BACKBONES, images=(120, 600), draws=5)
    return with_defaults(parser)


if __name__ == "__main__":
    main()
