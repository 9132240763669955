"""What every freezing strategy promises, as tests."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import pytest

from tlauto.contracts import FreezeStrategy, Stages, TrainPlan, trains_backbone
from tlauto.testing.spaces import Tracked, check_name, check_space, heavy_imports, points

if TYPE_CHECKING:
    from tlauto.backbone import TorchBackbone

EPOCHS = (0, 1, 2, 5, 29, 1000)
NETWORKS: dict[str, Stages] = {
    "one stage": (("conv.weight", "conv.bias", "bn.weight", "bn.bias"),),
    "stem and four stages": (
        ("stem.weight", "stem.bn.weight", "stem.bn.bias"),
        *(
            tuple(f"blocks.{i}.{part}" for part in ("conv.weight", "conv.bias", "bn.weight", "bn.bias"))
            for i in range(4)
        ),
    ),
    "twenty stages": tuple((f"layers.{i}.kernel.weight", f"layers.{i}.kernel.bias") for i in range(20)),
}


class FreezeStrategySuite:
    """Subclass it, set `strategy`, and pytest runs these tests on it.

    class TestBiasOnly(FreezeStrategySuite):
        strategy = BiasOnly()
    """

    strategy: FreezeStrategy

    def test_it_has_the_members_of_a_strategy(self) -> None:
        assert isinstance(self.strategy, FreezeStrategy), "it needs name, space and plan()"
        check_name(self.strategy.name)
        check_space(self.strategy.space)

    def test_importing_it_loads_no_heavy_library(self) -> None:
        module = type(self.strategy).__module__
        assert heavy_imports(module) == [], f"import these inside functions of {module}"

    @pytest.mark.parametrize("network", NETWORKS)
    def test_it_plans_only_parameters_that_exist_and_each_once(self, network: str) -> None:
        stages = NETWORKS[network]
        known = {name for stage in stages for name in stage}
        for plan in _plans(self.strategy, stages):
            assert isinstance(plan, TrainPlan), f"plan() returned {type(plan).__name__}, not TrainPlan"
            assert set(plan.trainable) <= known, f"unknown: {sorted(set(plan.trainable) - known)}"
            assert len(set(plan.trainable)) == len(plan.trainable), "a parameter is named twice"

    @pytest.mark.parametrize("network", NETWORKS)
    def test_it_gives_no_learning_rates_or_one_for_each_stage(self, network: str) -> None:
        stages = NETWORKS[network]
        for plan in _plans(self.strategy, stages):
            assert len(plan.lr_scales) in (0, len(stages)), f"{len(plan.lr_scales)} for {len(stages)} stages"
            assert all(math.isfinite(scale) and scale > 0 for scale in plan.lr_scales), plan.lr_scales

    def test_the_same_question_has_the_same_answer(self) -> None:
        # A worker that is killed plans the epoch again; gradual strategies may not count their calls.
        stages = NETWORKS["stem and four stages"]
        forwards = _plans(self.strategy, stages)
        backwards = _plans(self.strategy, stages, epochs=EPOCHS[::-1])
        first = {(i, e): p for (i, e), p in zip(_keys(self.strategy, EPOCHS), forwards, strict=True)}
        second = zip(_keys(self.strategy, EPOCHS[::-1]), backwards, strict=True)
        for key, plan in second:
            assert plan == first[key], f"point {key[0]}, epoch {key[1]}: the plan depends on earlier calls"

    def test_it_reads_every_parameter_of_its_space(self) -> None:
        read: set[str] = set()
        for stages in NETWORKS.values():
            for values in points(self.strategy.space):
                for epoch in EPOCHS:
                    params = Tracked(values)
                    self.strategy.plan(stages, epoch, params)
                    read |= params.read
        assert read == set(self.strategy.space), "a parameter that is never read wastes the search"

    def test_it_keeps_its_promise_on_training_the_backbone(self) -> None:
        stages = NETWORKS["stem and four stages"]
        learning = [plan for plan in _plans(self.strategy, stages) if plan.trainable]
        if trains_backbone(self.strategy):
            assert learning, "it never trains anything; set trains_backbone = False so features are cached"
        else:
            assert not learning, "trains_backbone is False, yet a plan trains something"

    def test_exactly_the_planned_parameters_of_a_real_network_learn(self) -> None:
        backbone = _network()
        for plan in _plans(self.strategy, backbone.stages):
            moved = _moved_by_a_step(backbone, plan)
            assert moved == set(plan.trainable), f"moved {sorted(moved)}, planned {sorted(plan.trainable)}"


def _keys(strategy: FreezeStrategy, epochs: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(i, epoch) for i in range(len(points(strategy.space))) for epoch in epochs]


def _plans(strategy: FreezeStrategy, stages: Stages, *, epochs: tuple[int, ...] = EPOCHS) -> list[TrainPlan]:
    return [strategy.plan(stages, epoch, values) for values in points(strategy.space) for epoch in epochs]


def _network() -> TorchBackbone:
    """Three small convolutions, each with bias and BatchNorm: one stage each."""
    import torch
    from torch import nn

    from tlauto.backbone import TorchBackbone
    from tlauto.contracts import ImageInput

    torch.manual_seed(0)
    widths = (3, 4, 6, 8)
    stages = [
        # Not the usual order: a bias right before a BatchNorm in training would have no gradient.
        nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.SiLU(), nn.BatchNorm2d(b))
        for a, b in itertools.pairwise(widths)
    ]
    module = nn.Sequential(*stages)
    names = [[f"{i}.{name}" for name, _ in stage.named_parameters()] for i, stage in enumerate(stages)]
    return TorchBackbone(
        module, ImageInput(size=8, resize=8), names, unpooled=lambda module, images: module(images)
    )


def _moved_by_a_step(backbone: TorchBackbone, plan: TrainPlan) -> set[str]:
    import torch

    torch.manual_seed(0)
    backbone.set_trainable(plan.trainable)
    backbone.set_training(True)
    before = {name: p.detach().clone() for name, p in backbone.module.named_parameters()}
    learning = [p for p in backbone.module.parameters() if p.requires_grad]
    if learning:
        # Adam moves whatever has a gradient by about its rate, however small the gradient is.
        step = torch.optim.Adam(learning, lr=1e-2)
        features = backbone.unpooled(torch.randn(4, 3, 8, 8))  # (N, C, H, W)
        (features * torch.randn_like(features)).sum().backward()  # type: ignore[no-untyped-call]
        step.step()
    return {n for n, p in backbone.module.named_parameters() if not torch.equal(p.detach(), before[n])}
