"""What the contenders of `anytime.py` get: a dataset with its split, and the backbones of a search.

    python bench/handover.py --data DIR --out FOLDER --export --weights-dir DIR

`--data DIR:N` makes a dataset with few images: N of each class to learn from (of several labels an image: N
in all), always the same ones, and the test part of the whole. Writes FOLDER/handed.json; with --export
also the networks of timm and torchvision, EfficientNet-Lite as timm's, with their weights, for scripts
that run where tlauto is not installed (`handed.py`). Keras' networks cannot be handed to those.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import handed
import torch

from tlauto.config import PRESETS
from tlauto.contracts import Backbone, WeightsOptions
from tlauto.data import Dataset, Item, load_dataset
from tlauto.errors import TlautoError
from tlauto.plugins import registry
from tlauto.pool.protocol import Preflight
from tlauto.preflight import check_backbones, order

TOLERANCE = 1e-3
"""Of the largest feature: how far a handed network may be from the one that tlauto loads."""


def main() -> None:
    args = parse()
    out = Path(args.out)
    data = place(args.data, out)
    dataset, _ = load_dataset(data, seed=args.seed, allow_leaks=True)
    if dataset.task != "multiclass":
        sys.exit(f"error: {args.data} is for {dataset.task}; this bench compares classifiers only")
    options = WeightsOptions({}, args.weights_dir, args.offline, args.pretrained)
    backbones = screened(args, options)
    parts = {
        part: [(str(dataset.file(item)), item.target) for item in dataset.part(part)]
        for part in ("train", "val", "test")
    }
    tested = hashlib.sha256("".join(item.sha256 for item in dataset.part("test")).encode()).hexdigest()
    facts: dict[str, Any] = {"data": str(data), "fingerprint": dataset.fingerprint, "tested": tested}
    facts |= {"classes": dataset.classes, "parts": parts, "backbones": backbones}
    networks, left_out = exported(backbones, options, out) if args.export else ([], [])
    facts |= {"networks": [asdict(one) for one in networks], "left_out": left_out}
    (out / "handed.json").write_text(json.dumps(facts), encoding="utf-8")


def place(data: str, out: Path, *, test_rest: bool = False) -> Path:
    """The dataset's folder, or a manifest in `out` of a few of its images for `DIR:N`.

    Args:
        test_rest: test on every image that is not learned from, instead of on the test part.
    """
    folder, colon, count = data.rpartition(":")
    if not colon or not count.isdigit():
        return Path(data).resolve()
    dataset, _ = load_dataset(folder, seed=0, allow_leaks=True)
    learned = few(dataset, int(count))
    taken = {item.path for item in learned}
    rest = [item for item in dataset.items if item.path not in taken]
    tested = rest if test_rest else dataset.part("test")
    manifest = out / f"{Path(folder).stem}-{count}.csv"
    with manifest.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for items, split in ((learned, "train"), (tested, "test")):
            for item in items:
                writer.writerow([dataset.file(item).resolve(), label(dataset, item), split])
    return manifest


def label(dataset: Dataset, item: Item) -> str:
    """What a manifest says of an image of classes."""
    targets = item.target if isinstance(item.target, tuple) else (int(item.target),)
    return "|".join(dataset.classes[target] for target in targets)


def few(dataset: Dataset, count: int) -> list[Item]:
    """`count` images of each class from outside the test part, the same ones every time.

    Where an image has several labels, `count` in all.
    """
    if dataset.task == "regression":
        sys.exit(f"error: {dataset.root} is for regression; images of each class are drawn for classes only")
    by_class: dict[object, list[Item]] = defaultdict(list)
    for item in dataset.part("train", "val"):
        by_class[item.target if dataset.task == "multiclass" else ()].append(item)
    least = min(len(items) for items in by_class.values())
    if not 4 <= count <= least:
        sys.exit(f"error: {count} images a class of {dataset.root}: give 4 to {least}, its smallest class")
    draw = random.Random(0)
    return [item for target in sorted(by_class, key=str) for item in draw.sample(by_class[target], count)]


def screened(args: argparse.Namespace, options: WeightsOptions) -> list[str]:
    """The backbones that `tlauto search` takes with these options, best prior first."""
    job = Preflight(tuple(args.backbones or ()), options, PRESETS[args.preset].candidates)
    found = check_backbones(job, registry(), note=lambda text: print(text, file=sys.stderr))
    if not found.candidates:
        sys.exit("error: no backbone has weights at hand; give --weights-dir DIR or --no-pretrained")
    ids = [info.id for info in order(candidate.info for candidate in found.candidates)]
    return ids[: args.most or None]


def exported(
    backbones: list[str], options: WeightsOptions, out: Path
) -> tuple[list[handed.Network], list[str]]:
    """The networks that timm or torchvision can build, with their weights in `out`, and the other ids."""
    networks, left_out = [], []
    for index, id in enumerate(backbones):
        backbone = registry().provider(id.partition(":")[0]).load(id, options)
        network = described(id, backbone, str(out / f"network{index}.safetensors"))
        if network is None or not same(network, backbone):
            left_out.append(id)
        else:
            networks.append(network)
    return networks, left_out


def described(id: str, backbone: Backbone, file: str) -> handed.Network | None:
    """What to build a backbone from, its weights written to `file`; None for one of another library."""
    import timm

    provider, _, name = id.partition(":")
    arch, kwargs = name.partition(".")[0], {}
    if provider == "efficientnet-lite":
        provider, arch = "timm", f"tf_efficientnet_{name}"
    elif provider == "timm" and name.endswith("_pad_same"):
        kwargs = {"pad_type": "same"}
    elif provider == "timm" and name in timm.list_pretrained():
        arch = name
    if provider not in ("timm", "torchvision") or backbone.input.bgr:
        return None
    from safetensors.torch import save_file

    save_file({n: t.contiguous().clone() for n, t in backbone.module.state_dict().items()}, file)
    expects = backbone.input
    return handed.Network(id, provider, arch, kwargs, file, expects.size, expects.mean, expects.std)


def same(network: handed.Network, backbone: Backbone) -> bool:
    """Whether what the other side will build is this backbone."""
    try:
        built = handed.build(network).eval()
    except (ValueError, TypeError, RuntimeError) as error:
        print(f"{network.id} is not handed over: {error}", file=sys.stderr)
        return False
    if network.library == "torchvision":
        return True  # strictly loaded; what follows the maps differs from network to network
    images = torch.randn(2, 3, network.size, network.size, generator=torch.Generator().manual_seed(0))
    backbone.set_training(False)
    with torch.inference_mode():
        theirs, ours = built(images), backbone.pooled(images)
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= TOLERANCE * ours.abs().max())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, metavar="DIR[:N]")
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.add_argument("--export", action="store_true", help="write networks too")
    parser.add_argument("--backbones", type=lambda text: text.split(","), metavar="GLOB[,GLOB]")
    parser.add_argument("--most", type=int, default=0, metavar="N", help="only the first backbones")
    parser.add_argument("--preset", choices=list(PRESETS), default="balanced")
    parser.add_argument("--weights-dir", metavar="DIR")
    parser.add_argument("--offline", action="store_true", help="download nothing")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
