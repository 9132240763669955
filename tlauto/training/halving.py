"""Which features may be kept in half precision: all that rounding changes by nothing to speak of.

Half precision rounds a number by at most 2^-11 of itself (3e-8 when it is smaller than 6e-5). How much
that is to a head depends on what its features are scaled by, so that is what it is compared with.
"""

from __future__ import annotations

import numpy as np
import torch

from tlauto.training.model import GRID_BOUND, Standardise

LARGEST = 65504.0  # of half precision
HALVED = 2e-2
"""Most that rounding may change a feature of the first images, in units of what the feature is divided
by before a head reads it."""


class Unfit(ValueError):
    """Features that half precision would change, or cannot hold."""


def require_fit(features: np.ndarray, *, is_first: bool) -> None:
    """Raise `Unfit` unless features (N, C) or (N, C, H, W) survive rounding to half precision.

    Args:
        is_first: whether they are the first of their array. Those are looked at closely, and must stay
            far from the largest number; the others must be below it.
    """
    exact = torch.from_numpy(features)
    if not bool(exact.abs().amax() < (LARGEST / 4 if is_first else LARGEST)):
        raise Unfit("features too large for half precision")
    if is_first:
        scale = Standardise(exact.shape[1], GRID_BOUND)
        scale.measure(exact)
        if not bool(((scale(exact.half().float()) - scale(exact)).abs() <= HALVED).all()):
            raise Unfit("features too far from zero for half precision")
