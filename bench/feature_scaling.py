"""How far feature scaling may enlarge a channel, by the held-out loss of linear probes.

    python bench/feature_scaling.py --data DIR --weights-dir DIR --backbone efficientnet-lite:lite0

For each dataset, backbone and bound: features of all images outside the test part, scaled as
`tlauto.training.model.Standardise` does with that bound, and the log loss of a linear head whose L2
penalty is chosen by 5-fold cross-validation. The test part is never opened. --data, --backbone and
--features (what of the backbone the head reads) may be given several times; without --data, hymenoptera,
signdigits and trashnet in the folder TLAUTO_BENCH_DATA. The last line of standard output is one JSON
object: the mean loss by features and bound.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from tlauto.builtin.tasks import task
from tlauto.contracts import TrialSpec, WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.plugins import registry
from tlauto.training.features import FeatureSource
from tlauto.training.linear import Problem, cross_validate
from tlauto.training.model import Kind, Standardise
from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

BOUNDS = (1e-3, 0.1, 0.3, 0.5, 1.0, 3.0)
BACKBONES = ("efficientnet-lite:lite0", "torchvision:squeezenet1_1", "keras:MobileNetV2")
DATASETS = ("hymenoptera", "signdigits", "trashnet")
PARTS = ("train", "val")


def main() -> None:
    args = parse()
    losses: dict[str, list[list[float]]] = {features: [] for features in args.features}
    print(f"{'data':<14}{'backbone':<26}{'features':<9}" + "".join(f"{b:>8g}" for b in BOUNDS), flush=True)
    for data in args.data:
        dataset, _ = load_dataset(data, seed=args.seed, allow_leaks=True)
        if dataset.task != "multiclass":
            sys.exit(f"error: {data} is for {dataset.task}; this script does classes only")
        for backbone in args.backbone:
            for features, found in measure(dataset, backbone, args).items():
                losses[features].append(found)
                shown = "".join(f"{loss:8.4f}" for loss in found)
                print(f"{Path(data).name:<14}{backbone:<26}{features:<9}{shown}", flush=True)
    figures = {}
    for features, rows in losses.items():
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        print(f"{'mean':<40}{features:<9}" + "".join(f"{mean:8.4f}" for mean in means))
        figures |= {f"loss_{features}_{bound:g}": m for bound, m in zip(BOUNDS, means, strict=True)}
    print(json.dumps(figures))


def measure(dataset: Dataset, backbone: str, args: argparse.Namespace) -> dict[Kind, list[float]]:
    """The held-out log loss by features and bound."""
    with tempfile.TemporaryDirectory() as folder:
        spec = TrialSpec(
            number=0, dataset="", task=dataset.task, metric="accuracy", backbone=backbone,
            strategy="feature_extraction", head="linear", params={}, seed=args.seed, epochs=1, folder=folder,
            weights=WeightsOptions({}, args.weights_dir, True, args.pretrained), cache=folder,
        )  # fmt: skip
        source = FeatureSource(spec, registry(), dataset, torch.device("cpu"))
        read = {kind: source.features(PARTS, kind).tensor() for kind in args.features}
        folds = source.folds(PARTS, args.seed)
    known = task(dataset.task)
    values = [item.target for part in PARTS for item in dataset.part(part)]
    targets = known.targets(values, dataset.classes)
    outputs = known.num_outputs(dataset.classes)
    loss = known.loss(targets, outputs, {"label_smoothing": 0.0, "class_weights": "none"})

    def held_out(features: torch.Tensor, bound: float) -> float:
        scale = Standardise(features.shape[1], bound)
        scale.measure(features)
        rows = Rows(Stored((features,)), scale, torch.device("cpu"))
        problem = Problem(rows, torch.from_numpy(targets), loss, outputs)
        return cross_validate(problem, folds).loss

    return {kind: [held_out(features, bound) for bound in BOUNDS] for kind, features in read.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", action="append", help="dataset folder or manifest")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"))
    parser.add_argument("--backbone", action="append", help="ids; three small networks by default")
    parser.add_argument("--features", action="append", choices=("pooled", "levels", "grid"))
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = os.environ.get("TLAUTO_BENCH_DATA")
    if not args.data and not folder:
        parser.error("name a dataset with --data, or a folder of datasets with TLAUTO_BENCH_DATA")
    args.data = args.data or [str(Path(folder or "", name)) for name in DATASETS]
    args.features = args.features or ["pooled", "levels", "grid"]
    args.backbone = args.backbone or list(BACKBONES)
    return args


if __name__ == "__main__":
    main()
