"""Freezing strategies: none of the backbone learns, its last stages, or all of it."""

from __future__ import annotations

from collections.abc import Mapping

from tlauto.contracts import FreezeStrategy, Stages, TrainPlan
from tlauto.errors import ConfigError
from tlauto.hookspecs import hookimpl
from tlauto.space import Float, Int, Scalar, Space, number

LAYER_DECAY = Float(0.5, 1.0, default=0.8)


class FeatureExtraction:
    """The backbone stays as it was pretrained; only the head learns, on features computed once."""

    name = "feature_extraction"
    space: Space = {}
    trains_backbone = False

    def plan(self, stages: Stages, epoch: int, params: Mapping[str, Scalar]) -> TrainPlan:
        """An empty plan, in every epoch."""
        return TrainPlan()


class Partial:
    """The last `k` stages learn; a backbone of fewer stages learns as a whole."""

    name = "partial"
    space: Space = {"k": Int(1, 4, default=1), "layer_decay": LAYER_DECAY}

    def plan(self, stages: Stages, epoch: int, params: Mapping[str, Scalar]) -> TrainPlan:
        """The parameters of the last `k` stages, in every epoch."""
        last = stages[max(0, len(stages) - int(number(params["k"]))) :]
        return _plan(last, stages, number(params["layer_decay"]))


class Full:
    """Every stage learns."""

    name = "full"
    space: Space = {"layer_decay": LAYER_DECAY}

    def plan(self, stages: Stages, epoch: int, params: Mapping[str, Scalar]) -> TrainPlan:
        """All parameters, in every epoch."""
        return _plan(stages, stages, number(params["layer_decay"]))


def layer_scales(layer_decay: float, num_stages: int) -> tuple[float, ...]:
    """Multipliers of the backbone's learning rate per stage, stem first; the last stage has 1.

    Each stage towards the stem has the next one's times `layer_decay`, so the general features near
    the stem move least.

    Args:
        layer_decay: in (0, 1]; 1 gives every stage the same rate.
        num_stages: >= 1; the head is not among them, its rate is another.

    Raises: ConfigError if `layer_decay` is outside (0, 1].
    Source: discriminative fine-tuning, Howard & Ruder 2018 (arXiv:1801.06146), section 3.2.
    """
    if not 0 < layer_decay <= 1:
        raise ConfigError(f"layer_decay {layer_decay} is outside (0, 1]")
    return tuple(layer_decay**distance for distance in range(num_stages - 1, -1, -1))


def _plan(learning: Stages, stages: Stages, layer_decay: float) -> TrainPlan:
    names = tuple(name for stage in learning for name in stage)
    return TrainPlan(trainable=names, lr_scales=layer_scales(layer_decay, len(stages)))


@hookimpl
def freeze_strategies() -> list[FreezeStrategy]:
    """The built-in strategies, from least to most that learns."""
    return [FeatureExtraction(), Partial(), Full()]
