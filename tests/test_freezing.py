"""The built-in freezing strategies: what each promises, and which parameters each lets learn."""

from __future__ import annotations

import pytest

from tlauto.builtin.freezing import FeatureExtraction, Full, Partial, freeze_strategies, layer_scales
from tlauto.contracts import FreezeStrategy, TrainPlan
from tlauto.errors import ConfigError
from tlauto.space import defaults
from tlauto.testing import FreezeStrategySuite

STAGES = (("stem",), ("a.weight", "a.bias"), ("b.weight",), ("c.weight",))


class TestEveryBuiltInStrategy(FreezeStrategySuite):
    @pytest.fixture(autouse=True, params=freeze_strategies(), ids=lambda strategy: strategy.name)
    def each(self, request: pytest.FixtureRequest) -> None:
        self.strategy: FreezeStrategy = request.param


def test_feature_extraction_trains_nothing() -> None:
    assert FeatureExtraction().plan(STAGES, 0, {}) == TrainPlan()


def test_partial_trains_the_last_k_stages() -> None:
    plan = Partial().plan(STAGES, 0, {"k": 2, "layer_decay": 0.5})
    assert tuple(plan.trainable) == ("b.weight", "c.weight")


@pytest.mark.parametrize("k", [4, 7])
def test_partial_trains_all_stages_when_there_are_no_more_than_k(k: int) -> None:
    plan = Partial().plan(STAGES, 0, {"k": k, "layer_decay": 0.5})
    assert plan == Full().plan(STAGES, 0, {"layer_decay": 0.5})


def test_full_trains_everything() -> None:
    plan = Full().plan(STAGES, 3, defaults(Full.space))
    assert tuple(plan.trainable) == ("stem", "a.weight", "a.bias", "b.weight", "c.weight")


def test_each_stage_towards_the_stem_has_the_next_ones_rate_times_layer_decay() -> None:
    plan = Full().plan(STAGES, 0, {"layer_decay": 0.5})
    assert tuple(plan.lr_scales) == (0.125, 0.25, 0.5, 1.0)


def test_a_partial_stage_has_the_rate_it_has_in_full() -> None:
    params = {"layer_decay": 0.7}
    assert Partial().plan(STAGES, 0, {"k": 1, **params}).lr_scales == Full().plan(STAGES, 0, params).lr_scales


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_layer_decay_is_refused(layer_decay: float) -> None:
    with pytest.raises(ConfigError, match="layer_decay"):
        layer_scales(layer_decay, 4)
