"""The search that people write themselves: Optuna around an ordinary PyTorch training loop.

    python bench/naive_optuna.py --data DIR --weights-dir DIR --time 900 \
        --backbone timm:resnet18=resnet18.safetensors --backbone torchvision:mobilenet_v2

Each trial takes a backbone, trains its new last layer or all of it for five epochs with AdamW, decoding
and augmenting every image in every epoch, and is pruned below the median. Whenever a trial is the best
by validation, its model is tested, with the clock stopped: that is the score the loop had to offer at
that time. `--sampler random` draws trials at random instead of by TPE. Only two things are tlauto's: the
split, so that both are measured on the same images, and loading the networks. The last line of standard
output is one JSON object: the backbones, the number of trials, and `curve`, a list of seconds (imports
included, tests not), validation and test accuracy of each new best.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterable
from typing import Any

import optuna
import torch
from curve import Clock, Curve, cores
from probe_script import open_image, transform
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from tlauto.contracts import Backbone, WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.errors import TlautoError
from tlauto.plugins import registry

EPOCHS = 5
BATCH = 32
SAMPLERS = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}


class Photos(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Files and classes of parts of a dataset, decoded when asked for."""

    def __init__(self, dataset: Dataset, part: str, read: Callable[[str], torch.Tensor]) -> None:
        self.rows = [(str(dataset.file(item)), int(str(item.target))) for item in dataset.part(part)]
        self.read = read

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, target = self.rows[index]
        return self.read(file), target


def main() -> None:
    args = parse()
    clock = Clock()
    curve = Curve(clock)
    dataset, _ = load_dataset(args.data, seed=args.seed, allow_leaks=args.allow_leaks)
    if dataset.task != "multiclass":
        sys.exit(f"error: {args.data} is for {dataset.task}; this script does classes only")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = SAMPLERS[args.sampler](seed=args.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())

    def objective(trial: optuna.Trial) -> float:
        return run(trial, args, dataset, curve)

    while clock.now() < args.time:
        study.optimize(objective, n_trials=1)
    facts = {"backbones": [spec.partition("=")[0] for spec in args.backbones], "trials": len(study.trials)}
    print(json.dumps({**facts, "time": args.time, "cores": cores(), **curve.facts()}))


class OutOfTime(optuna.TrialPruned):
    """The time was up during a trial."""


def run(trial: optuna.Trial, args: argparse.Namespace, dataset: Dataset, curve: Curve) -> float:
    """One trial: its best validation accuracy."""
    spec = trial.suggest_categorical("backbone", args.backbones)
    tunes = trial.suggest_categorical("train", ["last layer", "all"]) == "all"
    rate = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
    decay = trial.suggest_float("weight_decay", 1e-6, 1e-1, log=True)
    torch.manual_seed(args.seed + trial.number)
    id, _, file = spec.partition("=")
    options = WeightsOptions({id: file} if file else {}, args.weights_dir, args.offline, args.pretrained)
    backbone = registry().provider(id.partition(":")[0]).load(id, options)
    backbone.set_trainable([n for names in backbone.stages for n in names] if tunes else [])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = nn.Linear(backbone.feature_shape.pooled, len(dataset.classes)).to(device)
    backbone.module.to(device)
    learning = [p for p in [*backbone.module.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=decay)
    loaders = batches(id, backbone, dataset)
    best, kept = 0.0, None
    for epoch in range(EPOCHS):
        for images, targets in loaders["train"]:
            backbone.set_training(True)
            loss = nn.functional.cross_entropy(head(backbone.pooled(images.to(device))), targets.to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if curve.clock.now() > args.time:
                raise OutOfTime
        answers = right(backbone, head, loaders["val"], device)
        score = sum(answers) / len(answers)
        if score > best or kept is None:
            best, kept = score, copy.deepcopy((backbone.module.state_dict(), head.state_dict()))
        trial.report(score, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    assert kept is not None  # there is at least one epoch
    backbone.module.load_state_dict(kept[0])
    head.load_state_dict(kept[1])
    in_time = curve.clock.now() <= args.time
    if in_time and curve.offer(best, lambda: right(backbone, head, loaders["test"], device)):
        seconds, val, test = curve.rows[-1]
        print(f"{seconds:7.0f} s  val {val:.3f}  test {test:.3f}  {id}, {trial.params['train']}", flush=True)
    return best


def batches(id: str, backbone: Backbone, dataset: Dataset) -> dict[str, Iterable[Any]]:
    """Loaders of the three parts, as tutorials write them."""
    read = transform(id, backbone)
    expects = backbone.input
    random = v2.Compose([
        v2.RandomResizedCrop(expects.size, scale=(0.6, 1.0)), v2.RandomHorizontalFlip(), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Lambda(lambda image: image.flip(0)) if expects.bgr else v2.Identity(),
        v2.Normalize(list(expects.mean), list(expects.std)),
    ])  # fmt: skip
    parts = {
        "train": Photos(dataset, "train", lambda file: random(open_image(file))),
        "val": Photos(dataset, "val", read),
        "test": Photos(dataset, "test", read),
    }
    return {
        part: DataLoader(photos, BATCH, shuffle=part == "train", num_workers=cores())
        for part, photos in parts.items()
    }


@torch.inference_mode()
def right(backbone: Backbone, head: nn.Module, loader: Iterable[Any], device: str) -> list[bool]:
    """Which images of a loader are answered right, in order."""
    backbone.set_training(False)
    found: list[bool] = []
    for images, targets in loader:
        answers = head(backbone.pooled(images.to(device))).argmax(dim=1).cpu()
        found += (answers == targets).tolist()
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR")
    parser.add_argument("--backbone", dest="backbones", action="append", required=True, metavar="ID[=FILE]")
    parser.add_argument("--time", type=float, default=900.0, help="seconds")
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="tpe")
    parser.add_argument("--weights-dir", metavar="DIR")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow-leaks", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
