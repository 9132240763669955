"""Train biases only (BitFit, Ben Zaken et al. 2021, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping

import tlauto
from tlauto.contracts import Stages
from tlauto.space import Scalar, Space


class BiasOnly:
    """Every bias of the backbone learns, no other parameter does."""

    name = "bias_only"
    space: Space = {}

    def plan(self, stages: Stages, epoch: int, params: Mapping[str, Scalar]) -> tlauto.TrainPlan:
        """The biases of all stages, in every epoch."""
        return tlauto.TrainPlan(
            trainable=[name for stage in stages for name in stage if name.endswith("bias")]
        )


@tlauto.hookimpl
def freeze_strategies() -> list[tlauto.FreezeStrategy]:
    """The one strategy of this plugin."""
    return [BiasOnly()]
