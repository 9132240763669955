"""One seed for everything random."""

from __future__ import annotations

import functools
import random
import sys

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and, when it is loaded, Keras, whose initialisers ignore torch's seed."""
    keras = sys.modules.get("keras")
    if keras is not None:
        keras.utils.set_random_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if _has_accelerator():
        torch.manual_seed(seed)
    else:
        # Of its CPU alone: else torch keeps each seed for a GPU, with the stack, for as long as it lives.
        torch.default_generator.manual_seed(seed)
    # Convolutions on a GPU may otherwise choose another algorithm on every run.
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@functools.cache
def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available()
