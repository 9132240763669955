"""From cached windows to normalised batches on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from tlauto.contracts import ImageInput
from tlauto.training.augment import Augment
from tlauto.training.pixels import Pixels

EVAL_BATCH = 64
LOOK_AHEAD = 2  # batches prepared while the device is busy with an earlier one


def normalise(crops: torch.Tensor, image_input: ImageInput, device: torch.device) -> torch.Tensor:
    """Normalised images (N, 3, H, W) float32 on `device` from RGB crops (N, 3, H, W) uint8."""
    images = to_device(crops, device).contiguous(memory_format=torch.channels_last).float().div_(255)
    if image_input.bgr:
        images = images.flip(1)
    mean = torch.tensor(image_input.mean, device=device).view(1, 3, 1, 1)
    std = torch.tensor(image_input.std, device=device).view(1, 3, 1, 1)
    return images.sub_(mean).div_(std)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; through pinned memory, without waiting, when that is a GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def centre_batches(
    pixels: Pixels, device: torch.device, indices: Sequence[int] | None = None
) -> Iterator[torch.Tensor]:
    """Images in order, all unless `indices` says which, unaugmented: normalised (N, 3, H, W)."""
    chosen = range(len(pixels)) if indices is None else indices
    for start in range(0, len(chosen), EVAL_BATCH):
        yield normalise(pixels.crops(chosen[start : start + EVAL_BATCH]), pixels.input, device)


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
    pixels: Pixels, batches: Sequence[list[int]], augment: Augment, *, seed: Sequence[int]
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Pairs of indices and augmented crops (N, 3, size, size) uint8, prepared ahead in threads.

    Each image draws from a generator of its own, seeded by `seed`, the batch and its place in it, so
    the result does not depend on how the threads are scheduled.
    """
    return seeded_batches(pixels, batches, augment, lambda batch, place: [*seed, batch, place])


def seeded_batches(
    pixels: Pixels,
    batches: Sequence[list[int]],
    augment: Augment,
    seed_of: Callable[[int, int], Sequence[int]],
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """The same with a seed for each batch and place in it."""

    def prepare(batch: int, place: int) -> torch.Tensor:
        random = np.random.default_rng(seed_of(batch, place))
        return augment(pixels.window(batches[batch][place]), random)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        waiting: deque[list[Future[torch.Tensor]]] = deque()
        for batch in range(len(batches) + LOOK_AHEAD):
            if batch < len(batches):
                waiting.append([threads.submit(prepare, batch, i) for i in range(len(batches[batch]))])
            if batch >= LOOK_AHEAD:
                images = [future.result() for future in waiting.popleft()]
                yield batches[batch - LOOK_AHEAD], torch.stack(images)
