"""What a fine-tuning run feeds the network with: images, augmented anew in every epoch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from tlauto.training.augment import Augment
from tlauto.training.batches import Stream, augmented_batches, centre_batches, eval_batch
from tlauto.training.draws import keys_of
from tlauto.training.model import Kind, features_of
from tlauto.training.trial import Trial


class Inputs(Protocol):
    """Batches to learn from and to validate on, and how the network goes on from them."""

    def prepare(self, epoch: int) -> None:
        """Get ready for an epoch (from 0), with the network in inference mode."""
        ...

    def batches(self, epoch: int, *, steps: int, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Images' indices in `fit_on` and what the network gets of them (B, …), for an epoch (from 0)."""
        ...

    def valid(self) -> Iterator[torch.Tensor]:
        """What the network gets of the images of `evaluate_on`, unaugmented, in order."""
        ...

    def features(self, batch: torch.Tensor, kind: Kind) -> torch.Tensor:
        """The backbone's features (B, D) or (B, C, H, W) of a batch."""
        ...


class Images:
    """The images themselves, normalised (B, 3, S, S): every epoch runs the whole network."""

    def __init__(self, trial: Trial) -> None:
        spec = trial.spec
        self.trial = trial
        self.pixels = trial.source.pixels(spec.fit_on)
        self.valid_pixels = trial.source.pixels([spec.evaluate_on])
        self.stream = Stream(len(self.pixels), spec.seed)
        self.augment = Augment(trial.settings.augment, self.pixels.input)

    def prepare(self, epoch: int) -> None:
        """Nothing to do."""

    def batches(self, epoch: int, *, steps: int, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Each image with augmentation of its own."""
        self.stream.seek(epoch * steps * size)  # where another process may have stopped
        batches = [self.stream.take(size) for _ in range(steps)]
        seed = self.trial.spec.seed

        def keys(batch: int) -> np.ndarray:
            return keys_of((seed, epoch + 1, batch), size)

        return augmented_batches(self.pixels, batches, self.augment, keys, self.trial.device)

    def valid(self) -> Iterator[torch.Tensor]:
        """Centre crops."""
        return centre_batches(self.valid_pixels, self.trial.device, size=eval_batch(self.trial.spec))

    def features(self, batch: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Those of the whole backbone."""
        return features_of(self.trial.source.backbone, batch, kind)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Half precision on a GPU; full precision elsewhere, where half is slower."""
    dtype = autocast_dtype(device)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 on GPUs that compute in it, float16 on older ones, None elsewhere."""
    if device.type != "cuda":
        return None
    # Emulated bfloat16 would be slower than float16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
