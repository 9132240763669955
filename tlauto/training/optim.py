"""Parameter groups with a rate each, the optimizer, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from tlauto.contracts import Stages, TrainPlan
from tlauto.errors import TrialError
from tlauto.training.params import Settings

Group = dict[str, Any]

MAX_GRADIENT = 1.0  # norm to which gradients are clipped

FUSED = ("cpu", "cuda")
"""Devices whose optimizers do a step in one pass over the parameters."""


def head_groups(head: nn.Module, settings: Settings) -> list[Group]:
    """Groups of the head's parameters at the full learning rate."""
    return _groups(head.parameters(), settings.optim["lr"], settings)


def backbone_groups(
    parameters: Mapping[str, nn.Parameter], stages: Stages, plan: TrainPlan, settings: Settings
) -> list[Group]:
    """Groups of the plan's parameters, each stage at its own rate.

    A stage's rate is `lr` x `backbone_lr` x the plan's scale of that stage: discriminative
    fine-tuning (Howard & Ruder 2018, arXiv:1801.06146, section 3.2). Raises: TrialError when the
    plan does not scale every stage.
    """
    scales = list(plan.lr_scales) or [1.0] * len(stages)
    if len(scales) != len(stages):
        raise TrialError(
            f"the freezing strategy scales {len(scales)} stages, but the backbone has {len(stages)}"
        )
    trainable = set(plan.trainable)
    groups: list[Group] = []
    for names, scale in zip(stages, scales, strict=True):
        learning = [parameters[name] for name in names if name in trainable]
        groups += _groups(learning, settings.optim["lr"] * settings.backbone_lr * scale, settings)
    return groups


def make_optimizer(
    groups: list[Group], settings: Settings, previous: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    """The optimizer over these groups; what `previous` remembers of their parameters is kept.

    Where it can, it reads and writes each number once a step: heads of some hundred units learn a fifth
    faster.
    """
    is_fused = all(p.device.type in FUSED for group in groups for p in group["params"])
    if settings.optimizer == "sgd":
        momentum = settings.optim["momentum"]
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=momentum, fused=is_fused)
    elif settings.optimizer == "adam":
        optimizer = torch.optim.Adam(groups, lr=0.0, fused=is_fused)
    else:
        optimizer = torch.optim.AdamW(groups, lr=0.0, fused=is_fused)
    if previous is not None:
        kept = {parameter for group in groups for parameter in group["params"]}
        optimizer.state.update({p: state for p, state in previous.state.items() if p in kept})
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, step: int, steps: int, warmup: float) -> None:
    """Set every group's rate for a step (from 0) of `steps`."""
    factor = rate_factor(step, steps, warmup)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def rate_factor(step: int, steps: int, warmup: float) -> float:
    """The factor of the peak rate at a step: linear warm-up, then a half cosine towards 0.

    Args:
        warmup: fraction of all steps, in [0, 1).

    Source: Loshchilov & Hutter 2017 (arXiv:1608.03983), without restarts.
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _groups(parameters: Iterable[nn.Parameter], peak_lr: float, settings: Settings) -> list[Group]:
    """Matrices and kernels decay; biases and the scales of normalisation layers do not."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for parameter in parameters:
        (decayed if parameter.ndim > 1 else free).append(parameter)
    decay = settings.optim["weight_decay"]
    pairs = ((decayed, decay), (free, 0.0))
    return [{"params": ps, "peak_lr": peak_lr, "weight_decay": wd} for ps, wd in pairs if ps]
