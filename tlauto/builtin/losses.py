"""The losses of the built-in tasks, computed in 32 bits whatever the logits are."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tlauto.losses import ByImage

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, Any]


class CrossEntropy:
    """Cross-entropy of classes, given as indices (N,) or softly (N, K).

    Args:
        weights: (K,) of an image by its class.
        smoothing: share of each target that is spread over all classes.
    """

    def __init__(self, weights: Array, smoothing: float = 0.0) -> None:
        self._weights = _Constant(weights)
        self._smoothing = smoothing

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over images."""
        from torch.nn import functional

        soft = self._soft(targets)
        each = -self._smoothed(soft) * functional.log_softmax(logits.float(), 1)
        return (each.sum(1) * (soft @ self._weights.on(logits.device))).mean()

    def by_image(self, targets: torch.Tensor) -> ByImage:
        """See `Loss`."""
        soft = self._soft(targets)
        weights = soft @ self._weights.on(targets.device)  # (N,)
        wanted = (self._smoothed(soft) * weights[:, None]).T.contiguous()  # (K, N)
        return ByImage(_of_classes, (weights[None, None], wanted[None]))

    def _soft(self, targets: torch.Tensor) -> torch.Tensor:
        from torch.nn import functional

        hot = targets if targets.ndim == 2 else functional.one_hot(targets, self._weights.count)
        return hot.float()

    def _smoothed(self, soft: torch.Tensor) -> torch.Tensor:
        return (1 - self._smoothing) * soft + self._smoothing / self._weights.count


class BinaryCrossEntropy:
    """Cross-entropy of labels (N, K), each by itself; the mean over labels.

    Args:
        pos_weight: (K,) how much an image that has a label counts there.
    """

    def __init__(self, pos_weight: Array) -> None:
        self._weights = _Constant(pos_weight)

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over images."""
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(
            logits.float(), targets.float(), pos_weight=self._weights.on(logits.device)
        )

    def by_image(self, targets: torch.Tensor) -> ByImage:
        """See `Loss`."""
        hot = targets.float().T  # (K, N)
        positive = hot * self._weights.on(targets.device)[:, None]
        return ByImage(_of_labels, (positive[None], (positive + 1 - hot)[None]))


class Residual:
    """Squared error, or Huber's with a threshold of one deviation, of values (N,) or (N, 1).

    Args:
        deviation: of the training targets, which errors are divided by.
        is_huber: quadratic within one deviation, linear beyond.
    """

    def __init__(self, deviation: float, *, is_huber: bool) -> None:
        self._deviation = deviation
        self._is_huber = is_huber

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean over images."""
        import torch
        from torch.nn import functional

        measure = functional.huber_loss if self._is_huber else functional.mse_loss
        residuals = (logits.float().reshape(-1) - targets.float().reshape(-1)) / self._deviation
        return measure(residuals, torch.zeros_like(residuals))

    def by_image(self, targets: torch.Tensor) -> ByImage:
        """See `Loss`."""
        values = targets.float().reshape(1, 1, -1)
        deviation = values.new_full((1, 1, 1), self._deviation)
        return ByImage(_of_large_errors if self._is_huber else _of_errors, (values, deviation))


def _of_classes(
    logits: torch.Tensor, weights: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn import functional

    chances = functional.log_softmax(logits, 1)
    losses = -(chances * wanted).sum(1)
    return losses, chances.exp_().mul_(weights).sub_(wanted)


def _of_labels(
    logits: torch.Tensor, positive: torch.Tensor, both: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn import functional

    losses = (functional.softplus(logits) * both - positive * logits).mean(1)
    return losses, logits.sigmoid().mul_(both).sub_(positive).div_(logits.shape[1])


def _of_errors(
    logits: torch.Tensor, values: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    residuals = (logits - values) / deviation
    return residuals.square()[:, 0], residuals * (2 / deviation)


def _of_large_errors(
    logits: torch.Tensor, values: torch.Tensor, deviation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    residuals = (logits - values) / deviation
    near = residuals.clamp(-1, 1)
    return (near * (residuals - near / 2))[:, 0], near / deviation


class _Constant:
    """Values (K,) as a tensor on a device, copied there once: a copy each step would stall a GPU."""

    def __init__(self, values: Array) -> None:
        self._values = values
        self.count = len(values)
        self.on = functools.cache(self._on)

    def _on(self, device: torch.device) -> torch.Tensor:
        import torch

        return torch.as_tensor(self._values, dtype=torch.float32, device=device)
