"""Random numbers that depend on an image's key and on nothing else.

Whatever batch an image is in, on whichever thread or device, its key gives the same numbers; and those
of a whole batch are drawn at once.
"""

from __future__ import annotations

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """Numbers (N, count) float64 in [0, 1): a row for each key of `keys` (N, W) uint64.

    The words of a key are hashed to the start of a SplitMix64 sequence, whose numbers can be had in any
    order. Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17.
    """
    start = np.zeros(len(keys), np.uint64)
    for word in keys.T:
        start = _mixed((start ^ word) + GAMMA)
    steps = np.arange(1, count + 1, dtype=np.uint64) * GAMMA
    sequence = _mixed(start[:, None] + steps)
    return (sequence >> np.uint64(11)) * 2.0**-53  # the 53 bits that a float64 holds


def keys_of(first: tuple[int, ...], count: int) -> np.ndarray:
    """Keys (count, W) of the images of a batch: the words `first`, then the place in the batch."""
    keys = np.empty((count, len(first) + 1), np.uint64)
    keys[:, :-1] = np.array(first, np.uint64)
    keys[:, -1] = np.arange(count)
    return keys


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each number (…) uint64 hashed, one to one; products and sums are modulo 2^64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = numbers ^ (numbers >> np.uint64(31))
    return mixed
