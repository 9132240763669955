"""From cached windows to normalised batches on the device."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from tlauto import pulse
from tlauto.contracts import ImageInput, TrialSpec
from tlauto.recipe import EVAL_BATCH
from tlauto.training.augment import Augment, Plan
from tlauto.training.pixels import Pixels

LOOK_AHEAD = 2  # batches prepared while a GPU is busy with an earlier one

Made = TypeVar("Made")


def normalise(crops: torch.Tensor, image_input: ImageInput, device: torch.device) -> torch.Tensor:
    """Normalised images (N, 3, H, W) float32 on `device` from RGB crops (N, 3, H, W) from 0 to 255.

    Crops of uint8 are left alone; crops of float32 may be overwritten.
    """
    images = to_device(crops, device)
    if image_input.bgr:
        images = images.flip(1)
    images = images.contiguous(memory_format=torch.channels_last).float().div_(255)
    # Whole lines at once: for three numbers at a time PyTorch takes twice as long on a CPU.
    count, channels, height, width = images.shape
    lines = images.permute(0, 2, 3, 1).view(count, height, width * channels)
    mean, std = (to_device(torch.tensor(each), device) for each in (image_input.mean, image_input.std))
    lines.sub_(mean.repeat(width)).div_(std.repeat(width))
    return images


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; through pinned memory, without waiting, when that is a GPU."""
    return pinned(tensor, device).to(device, non_blocking=device.type == "cuda")


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in memory from which a GPU copies without waiting; itself for other devices."""
    return tensor.pin_memory() if device.type == "cuda" and tensor.device.type == "cpu" else tensor


def eval_batch(spec: TrialSpec) -> int:
    """Images that a trial's network takes at once where it does not learn."""
    return min(EVAL_BATCH, spec.micro_batch or EVAL_BATCH)


def centre_batches(
    pixels: Pixels, device: torch.device, indices: Sequence[int] | None = None, *, size: int = EVAL_BATCH
) -> Iterator[torch.Tensor]:
    """Images in order, all unless `indices` says which, unaugmented: normalised (N, 3, H, W), N <= `size`."""
    chosen = range(len(pixels)) if indices is None else indices
    starts = range(0, len(chosen), size)

    def read(batch: int) -> torch.Tensor:
        return pinned(pixels.crops(chosen[starts[batch] : starts[batch] + size]), device)

    with contextlib.closing(ahead(read, len(starts), device=device)) as prepared:
        for crops in prepared:
            yield normalise(crops, pixels.input, device)
            pulse.tick()


class Stream:
    """An endless shuffled stream of indices below `count`, every batch full; repeatable by seed.

    A batch may span the end of one shuffle and the start of the next, so no batch is smaller than
    the others: BatchNorm and mixup need that.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.random = np.random.default_rng(seed)
        self.shuffle: list[int] = []
        self.used = 0
        self.taken = 0

    def seek(self, position: int) -> None:
        """Go on from the index at a position (from 0) that has not been passed."""
        self.take(position - self.taken)

    def take(self, size: int) -> list[int]:
        """The next `size` indices."""
        while len(self.shuffle) - self.used < size:
            self.shuffle = self.shuffle[self.used :] + self.random.permutation(self.count).tolist()
            self.used = 0
        self.used += size
        self.taken += size
        return self.shuffle[self.used - size : self.used]


def augmented_batches(
    pixels: Pixels,
    batches: Sequence[list[int]],
    augment: Augment,
    keys: Callable[[int], np.ndarray],
    device: torch.device,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pairs of indices and normalised augmented images (B, 3, size, size), made on `device`.

    Windows are read and draws made ahead; the device is left to the thread that trains on it.

    Args:
        keys: of the images (B, W) uint64 of a batch, by its number: they decide the draws (`draws`).
    """

    def prepare(batch: int) -> tuple[torch.Tensor, Plan | None]:
        plan = augment.plan(keys(batch))
        images = pixels.windows(batches[batch]) if plan else pixels.crops(batches[batch])
        return pinned(images, device), plan.map(lambda part: pinned(part, device)) if plan else None

    with contextlib.closing(ahead(prepare, len(batches), device=device)) as prepared:
        for indices, (images, plan) in zip(batches, prepared, strict=True):
            if plan:
                images = augment(to_device(images, device), plan.map(lambda part: to_device(part, device)))
            yield indices, normalise(images, pixels.input, device)
            pulse.tick()


def ahead(make: Callable[[int], Made], count: int, *, device: torch.device) -> Generator[Made]:
    """`make(0)` to `make(count - 1)`, in one thread, up to `LOOK_AHEAD` of them before they are asked for.

    What `make` raises is raised where its result would have come; the thread ends with the iterator.
    For a CPU there is no thread: its cores are taken by who trains there, so it would gain nothing.
    """
    if device.type == "cpu":
        yield from map(make, range(count))
        return
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Made]] = deque()
        try:
            for number in range(count + LOOK_AHEAD):
                if number < count:
                    waiting.append(thread.submit(make, number))
                if number >= LOOK_AHEAD:
                    yield waiting.popleft().result()
        finally:
            thread.shutdown(wait=False, cancel_futures=True)
