"""Which of the heads that a search tried is the best one: rules compared on few images.

    python bench/choosing.py --data DIR --weights-dir DIR --images 120 --draws 10

For each draw, so many images to learn from are taken from the dataset at random, a head is solved and
cross-validated on them for every backbone, kind of features and feature scale, and each rule chooses
one of these heads, or some that answer together, by what cross-validation answered; `joined` are heads
over the features of the best two and three backbones at once. The chosen is then asked about the images
that were not drawn. The test part is never opened. Printed: the mean accuracy
of what each rule chose, less that of the rule `accuracy`, in points with a standard error over draws.

--data and --images may be given several times; without --data, hymenoptera, signdigits and trashnet in
the folder TLAUTO_BENCH_DATA. The last line of standard output is one JSON object of the differences.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fewshot import (
    DATASETS,
    Draw,
    Features,
    Head,
    Images,
    accuracy,
    draws,
    extract,
    open_images,
    possible,
    solve,
)

from tlauto.errors import TlautoError
from tlauto.results.ensemble import PER_BACKBONE, choose, mean

BACKBONES = (
    "efficientnet-lite:lite0", "efficientnet-lite:lite1", "keras:MobileNetV2", "timm:mobilenetv2_100",
    "torchvision:mobilenet_v2", "torchvision:squeezenet1_1",
)  # fmt: skip
BOUNDS = (0.1, 1.0)
MEMBERS = 4


@dataclass(frozen=True)
class Tried:
    """All heads of one draw, those on several backbones, and the class (n,) of each image to learn from."""

    heads: Sequence[Head]
    joined: Sequence[Head]
    targets: np.ndarray


Rule = Callable[[Tried], np.ndarray]


def rank(head: Head) -> tuple[float, float]:
    """The highest accuracy comes first; of equals the lowest loss."""
    return -head.accuracy, head.loss


def by_accuracy(tried: Tried) -> np.ndarray:
    """The first by `rank`."""
    return min(tried.heads, key=rank).unseen


def joined(tried: Tried) -> np.ndarray:
    """The same among heads on several backbones."""
    return min(tried.joined, key=rank).unseen


def by_loss(tried: Tried) -> np.ndarray:
    """The lowest log loss."""
    return min(tried.heads, key=lambda h: h.loss).unseen


def within_one_error(tried: Tried) -> np.ndarray:
    """The lowest log loss of those whose accuracy is within a standard error of the highest."""
    best = max(h.accuracy for h in tried.heads)
    error = math.sqrt(max(best * (1 - best), 0.25 / len(tried.targets)) / len(tried.targets))
    return min((h for h in tried.heads if h.accuracy >= best - error), key=lambda h: h.loss).unseen


def by_both(tried: Tried) -> np.ndarray:
    """The lowest sum of the ranks by accuracy and by loss."""
    by_first = sorted(range(len(tried.heads)), key=lambda i: -tried.heads[i].accuracy)
    by_second = sorted(range(len(tried.heads)), key=lambda i: tried.heads[i].loss)
    places = {i: by_first.index(i) + by_second.index(i) for i in by_first}
    return tried.heads[min(places, key=lambda i: places[i])].unseen


def together(order: Callable[[Head], tuple[float, float]], most: int, *, with_joined: bool = False) -> Rule:
    """What `results.ensemble` chooses to answer together, beginning with the first of an order."""

    def rule(tried: Tried) -> np.ndarray:
        taken: list[Head] = []
        for head in sorted([*tried.heads, *(tried.joined if with_joined else ())], key=order):
            if sum(h.backbone == head.backbone for h in taken) < PER_BACKBONE and len(taken) < 10:
                taken.append(head)
        answers = {i: head.held_out for i, head in enumerate(taken)}
        weights = choose("multiclass", tried.targets, answers, first=0, most=most)
        return mean([taken[i].unseen for i in weights], list(weights.values()))

    return rule


RULES: dict[str, Rule] = {
    "accuracy": by_accuracy,
    "loss": by_loss,
    "one_error": within_one_error,
    "both": by_both,
    "together_by_accuracy": together(rank, MEMBERS),
    "together_by_loss": together(lambda h: (h.loss, -h.accuracy), MEMBERS),
    "joined": joined,
    "together_and_joined": together(rank, MEMBERS, with_joined=True),
    "best_possible": lambda tried: max(tried.heads, key=lambda h: h.unseen_accuracy).unseen,
}


def main() -> None:
    args = parse()
    names = [name for name in RULES if name != "accuracy"]
    figures: dict[str, float] = {}
    print(f"{'data':<13}{'images':>6}{'accuracy':>9}" + "".join(f"{name:>21}" for name in names))
    try:
        for images in (open_images(data, seed=args.seed) for data in args.data):
            given = {"weights_dir": args.weights_dir, "pretrained": args.pretrained}
            features = {name: extract(images, name, **given) for name in args.backbone}
            for count in possible(images, args.images):
                scores = [compare(images, features, draw) for draw in draws(images, count, args.draws)]
                usual = [score["accuracy"] for score in scores]
                row = f"{images.name:<13}{count:>6}{statistics.mean(usual):>9.3f}"
                for name in names:
                    gains = [100 * (score[name] - score["accuracy"]) for score in scores]
                    figures[f"{images.name}_{count}_{name}"] = round(statistics.mean(gains), 2)
                    row += f"{with_error(gains):>21}"
                print(row, flush=True)
    except TlautoError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(figures))


def compare(images: Images, features: Mapping[str, Features], draw: Draw) -> dict[str, float]:
    """The accuracy of each rule's choice after one draw."""
    heads = [
        solve(images, draw, name, part, bound=bound)
        for name, kinds in features.items() for part in kinds.values() for bound in BOUNDS
    ]  # fmt: skip
    tried = Tried(heads, join(images, features, draw, heads), images.labels[draw.learned])
    return {name: accuracy(rule(tried), images.labels[draw.rest]) for name, rule in RULES.items()}


def join(images: Images, features: Mapping[str, Features], draw: Draw, heads: Sequence[Head]) -> list[Head]:
    """Heads on the concatenated features of the best two and the best three backbones, each kind in turn.

    Channels of each backbone deviate by 1 on average, so that none outweighs the others.
    """
    ranked = list(dict.fromkeys(head.backbone for head in sorted(heads, key=rank)))
    found = []
    for names in (ranked[:2], ranked[:3]):
        for kind in features[names[0]]:
            if any(kind not in features[name] for name in names):
                continue
            parts = [features[name][kind] for name in names]
            whole = torch.cat([part / part[draw.learned].std(dim=0).mean() for part in parts], dim=1)
            found += [solve(images, draw, "+".join(names), whole, bound=bound) for bound in BOUNDS]
    return found


def with_error(values: Sequence[float]) -> str:
    """The mean and its standard error."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):+.2f} ± {error:.2f}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, backbones=BACKBONES, images=(60, 120, 240), draws=10)
    return with_defaults(parser)


def add_arguments(
    parser: argparse.ArgumentParser, *, backbones: Sequence[str], images: Sequence[int], draws: int
) -> None:
    """The flags of scripts that draw few images."""
    parser.add_argument("--data", action="append", help="dataset folder or manifest")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"))
    parser.add_argument("--backbone", action="append", help=f"ids; by default {', '.join(backbones)}")
    parser.add_argument("--images", action="append", type=int, help=f"to learn from; by default {images}")
    parser.add_argument("--draws", type=int, default=draws)
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(known_backbones=backbones, known_images=images)


def with_defaults(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was given, and the datasets of TLAUTO_BENCH_DATA where no other was named."""
    args = parser.parse_args()
    folder = os.environ.get("TLAUTO_BENCH_DATA")
    if not args.data and not folder:
        parser.error("name a dataset with --data, or a folder of datasets with TLAUTO_BENCH_DATA")
    args.data = args.data or [str(Path(folder or "", name)) for name in DATASETS]
    args.images = args.images or list(args.known_images)
    args.backbone = args.backbone or list(args.known_backbones)
    return args


if __name__ == "__main__":
    main()
