"""Batched augmentation against one image at a time in a thread pool, and its share of a training step.

    python bench/augment.py                    # on the CPU, with a worker's memory settings
    python bench/augment.py --device cuda
    python bench/augment.py --quick            # under a minute on two cores

For each level, in turn: batches of a training epoch as tlauto prepares them, from a memory-mapped file of
windows to normalised images on the device; and the same windows through a pipeline of
torchvision.transforms.v2 as a tutorial would write it, in as many threads as PyTorch has, each with one
for its arithmetic, all images of a round submitted at once. Then training steps of all of a network
(random weights) with SGD: the time until the next batch is there over the time of the whole step, both
waited for, so on a GPU it is an upper bound. The windows are noise: what is in them does not change the
work. Prints medians over rounds; the last line of standard output is one JSON object:

    augment_speedup   by level: images a second of tlauto's batches over those of the thread pool
    augment_share     the largest over the levels of the share of a training step
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from tlauto.contracts import Backbone, ImageInput, WeightsOptions
from tlauto.devices import make_slots
from tlauto.errors import TlautoError
from tlauto.plugins import registry
from tlauto.training.augment import LEVELS, Augment
from tlauto.training.batches import augmented_batches
from tlauto.training.draws import keys_of
from tlauto.training.inputs import autocast
from tlauto.training.pixels import Pixels, window_edge

CLASSES = 10
HEADER = (
    "| level | batched images/s | per image images/s | speed-up | share of a step |\n|---|---|---|---|---|"
)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    backbone = registry().provider(args.backbone.partition(":")[0]).load(
        args.backbone, WeightsOptions(offline=True, pretrained=False)
    )  # fmt: skip
    rows = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        windows = write_windows(Path(folder, "windows.npy"), backbone.input, args.images)
        for level in LEVELS:
            rows.append(measure(level, windows, backbone, device, args))
            print(row(rows[-1]), flush=True)
    print(json.dumps({
        "augment_speedup": {found["level"]: found["speedup"] for found in rows},
        "augment_share": max(found["share"] for found in rows),
        "device": args.device, "threads": args.threads, "backbone": args.backbone, "batch": args.batch,
        "rows": rows,
    }))  # fmt: skip


def write_windows(path: Path, image_input: ImageInput, count: int) -> np.ndarray:
    """Windows (N, R, R, 3) of noise, mapped from a file as those of a trial are."""
    edge = window_edge(image_input)
    written = np.lib.format.open_memmap(path, "w+", np.uint8, (count, edge, edge, 3))
    random = np.random.default_rng(0)
    for i in range(count):
        written[i] = random.integers(0, 256, (edge, edge, 3), np.uint8)
    written.flush()
    mapped: np.ndarray = np.load(path, mmap_mode="c")
    return mapped


def measure(
    level: str, windows: np.ndarray, backbone: Backbone, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """One level: images a second both ways, round by round, and the share of a training step."""
    order = np.random.default_rng(1).permutation(len(windows)).tolist()
    batches = [order[i : i + args.batch] for i in range(0, len(order), args.batch)]
    transform = tutorial(level, backbone.input)
    ways: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
        "batched": lambda: batched(level, windows, batches, backbone.input, device),
        "per_image": lambda: per_image(transform, windows, batches, device),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(args.rounds + 1):
        for way, prepare in ways.items():
            taken = drained(prepare(), device)
            if turn:  # the first round warms up
                seconds[way].append(taken)
    rates = {way: len(order) / statistics.median(found) for way, found in seconds.items()}
    steps = [batches[step % len(batches)] for step in range(args.steps + 1)]
    return {
        "level": level, **rates, "speedup": rates["batched"] / rates["per_image"],
        "share": share(batched(level, windows, steps, backbone.input, device), backbone, device),
    }  # fmt: skip


def batched(
    level: str, windows: np.ndarray, batches: list[list[int]], image_input: ImageInput, device: torch.device
) -> Iterator[torch.Tensor]:
    """Normalised images as a trial gets them."""
    pixels, augment = Pixels([windows], image_input), Augment(level, image_input)

    def keys(batch: int) -> np.ndarray:
        return keys_of((0, 1, batch), len(batches[batch]))

    for _, images in augmented_batches(pixels, batches, augment, keys, device):
        yield images


def tutorial(level: str, image_input: ImageInput) -> Callable[[torch.Tensor], torch.Tensor]:
    """The level as a pipeline for one image (3, R, R) uint8."""
    found, size = LEVELS[level], image_input.size
    steps: list[nn.Module] = [v2.CenterCrop(size)]
    if level != "none":
        ratio = (1 / found.ratio, found.ratio)
        steps = [v2.RandomResizedCrop(size, (found.area, 1.0), ratio), v2.RandomHorizontalFlip()]
    if found.shear:
        most, bilinear = found.shear, v2.InterpolationMode.BILINEAR
        steps.append(v2.RandomAffine(most, shear=(-most, most, -most, most), interpolation=bilinear))
    if found.colour:
        steps.append(v2.ColorJitter(found.colour, found.colour, found.colour))
    if found.trivial:
        steps.append(v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR))
    normalised = v2.Normalize(list(image_input.mean), list(image_input.std))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalised])


def per_image(
    transform: Callable[[torch.Tensor], torch.Tensor],
    windows: np.ndarray,
    batches: list[list[int]],
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Normalised images, transformed one by one in a thread pool."""
    threads = torch.get_num_threads()

    def load(index: int) -> torch.Tensor:
        return transform(torch.from_numpy(windows[index]).permute(2, 0, 1))

    torch.set_num_threads(1)  # or each of the threads would wait for those of the others
    try:
        with ThreadPoolExecutor(threads) as pool:
            images = pool.map(load, [index for batch in batches for index in batch])
            for batch in batches:
                yield torch.stack([next(images) for _ in batch]).to(device)
    finally:
        torch.set_num_threads(threads)


def drained(batches: Iterator[torch.Tensor], device: torch.device) -> float:
    """Seconds until all batches are on the device."""
    started = time.perf_counter()
    for _ in batches:
        pass
    wait_for(device)
    return time.perf_counter() - started


def share(batches: Iterator[torch.Tensor], backbone: Backbone, device: torch.device) -> float:
    """The median share of training steps that goes by until their batch is there."""
    step, shares = training_step(backbone, device), []
    while True:
        started = time.perf_counter()
        images = next(batches, None)
        wait_for(device)
        if images is None:
            return statistics.median(shares[1:])  # the first step warms up
        ready = time.perf_counter()
        step(images)
        wait_for(device)
        shares.append((ready - started) / (time.perf_counter() - started))


def training_step(backbone: Backbone, device: torch.device) -> Callable[[torch.Tensor], None]:
    """A step that trains all of the backbone and a linear head on a normalised batch."""
    backbone.module.to(device=device, memory_format=torch.channels_last)
    backbone.set_trainable({name for stage in backbone.stages for name in stage})
    backbone.set_training(True)
    head = nn.Linear(backbone.feature_shape.pooled, CLASSES).to(device)
    optimizer = torch.optim.SGD([*backbone.module.parameters(), *head.parameters()], lr=1e-3, momentum=0.9)

    def step(images: torch.Tensor) -> None:
        targets = torch.arange(len(images), device=device) % CLASSES
        with autocast(device):
            logits = head(backbone.pooled(images))
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return step


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    rates = f"{found['batched']:.0f} | {found['per_image']:.0f}"
    return f"| {found['level']} | {rates} | {found['speedup']:.2f} | {100 * found['share']:.1f} % |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda; cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="all that PyTorch has")
    parser.add_argument("--backbone", default="timm:tf_efficientnet_lite0.in1k", metavar="ID")
    parser.add_argument("--batch", type=int, default=16, help="images; 16, the default recipe's")
    parser.add_argument("--images", type=int, help="512; with --quick 64")
    parser.add_argument("--rounds", type=int, help="7; with --quick 3")
    parser.add_argument("--steps", type=int, help="training steps; 20; with --quick 3")
    parser.add_argument("--quick", action="store_true", help="fewer images, rounds and steps")
    args = parser.parse_args()
    args.images = args.images or (64 if args.quick else 512)
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.steps = args.steps or (3 if args.quick else 20)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"error: no GPU for --device {args.device}; leave it out to measure on the CPU")
    return args


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:  # it is read when a process starts
        environment = {**make_slots("cpu", 1)[0].env, **os.environ}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
