"""Parameters are all read, each group learns at its own rate, and the schedule warms up and ends low."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tlauto.builtin.freezing import FeatureExtraction, Partial
from tlauto.builtin.heads import Linear, Mlp
from tlauto.builtin.tasks import Multiclass
from tlauto.contracts import TrainPlan, TrialSpec, WeightsOptions
from tlauto.errors import TrialError
from tlauto.recipe import OPTIMIZERS
from tlauto.space import Scalar
from tlauto.training.optim import backbone_groups, head_groups, make_optimizer, rate_factor, set_rates
from tlauto.training.params import Settings, read

SPEC = TrialSpec(
    number=0, dataset="", task="multiclass", metric="accuracy", backbone="timm:test_resnet",
    strategy="partial", head="linear", params={}, weights=WeightsOptions(), seed=0, epochs=1,
    folder="", cache="",
)  # fmt: skip


def settings(**params: Scalar) -> Settings:
    given = {name.replace("__", "."): value for name, value in params.items()}
    return read(replace(SPEC, params=given), Partial(), Linear(), Multiclass())


def test_missing_parameters_take_the_defaults_of_their_spaces() -> None:
    read_default = settings()
    assert read_default.optimizer == "adamw"
    assert read_default.optim == {"lr": 1e-3, "weight_decay": 1e-2}
    assert (read_default.batch_size, read_default.backbone_lr, read_default.augment) == (16, 0.1, "light")
    assert read_default.loss == {"label_smoothing": 0.0, "class_weights": "none"}


def test_every_parameter_of_a_trial_reaches_its_settings() -> None:
    given = settings(
        freeze__partial__k=3, freeze__partial__layer_decay=0.5, head__linear__dropout=0.25, optim__name="sgd",
        optim__warmup=0.2, optim__sgd__lr=0.05, optim__sgd__weight_decay=0.001, optim__sgd__momentum=0.85,
        loss__label_smoothing=0.1, loss__class_weights="balanced", finetune__backbone_lr=0.3,
        finetune__batch_size=32, finetune__train_mode=True, augment__level="strong",
    )  # fmt: skip
    assert given == Settings(
        freeze={"k": 3, "layer_decay": 0.5}, head={"dropout": 0.25},
        loss={"label_smoothing": 0.1, "class_weights": "balanced"}, optimizer="sgd",
        optim={"lr": 0.05, "weight_decay": 0.001, "momentum": 0.85}, warmup=0.2, batch_size=32,
        backbone_lr=0.3, train_mode=True, augment="strong",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.sgd.lr", 0.01),  # of an optimizer that was not chosen
        ("head.mlp.hidden", 64),  # of another head
        ("freeze.full.layer_decay", 0.9),  # of another strategy
        ("probe.batch_size", 64),  # of trials on cached features
        ("optim.adamw.learning_rate", 0.1),  # of nobody
        ("lr", 0.1),
    ],
)
def test_a_parameter_that_nothing_reads_fails_the_trial_by_name(name: str, value: float) -> None:
    with pytest.raises(TrialError, match=f"nothing in this trial reads the parameter '{name}'"):
        read(replace(SPEC, params={name: value}), Partial(), Linear(), Multiclass())


def test_a_frozen_trial_reads_no_augmentation() -> None:
    frozen = read(
        replace(SPEC, params={"probe.solver": "minibatch", "probe.batch_size": 128}),
        FeatureExtraction(),
        Linear(),
        Multiclass(),
    )
    assert (frozen.batch_size, frozen.backbone_lr, frozen.augment) == (128, 0.0, "none")
    with pytest.raises(TrialError, match=r"augment\.level"):
        read(replace(SPEC, params={"augment.level": "light"}), FeatureExtraction(), Linear(), Multiclass())


def test_a_value_out_of_range_fails_the_trial_by_name() -> None:
    with pytest.raises(TrialError, match=r"head\.mlp\.hidden: 5 is outside"):
        read(replace(SPEC, params={"head.mlp.hidden": 5}), Partial(), Mlp(), Multiclass())


def test_each_stage_learns_at_its_own_rate_and_vectors_do_not_decay() -> None:
    backbone = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    stages = [[f"{unit}.weight", f"{unit}.bias"] for unit in "abc"]
    plan = TrainPlan(trainable=stages[1] + stages[2], lr_scales=[0.25, 0.5, 1.0])
    given = settings(optim__adamw__lr=0.01, finetune__backbone_lr=0.2, optim__adamw__weight_decay=0.3)
    groups = backbone_groups(dict(backbone.named_parameters()), stages, plan, given)
    found = [(g["peak_lr"], g["weight_decay"], g["params"][0].ndim) for g in groups]
    assert found == [(0.001, 0.3, 2), (0.001, 0.0, 1), (0.002, 0.3, 2), (0.002, 0.0, 1)]
    assert [g["peak_lr"] for g in head_groups(nn.Linear(2, 2), given)] == [0.01, 0.01]


def test_a_plan_that_scales_another_number_of_stages_fails_the_trial() -> None:
    with pytest.raises(TrialError, match="scales 2 stages, but the backbone has 1"):
        backbone_groups({}, [["a"]], TrainPlan(lr_scales=[1.0, 1.0]), settings())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_at_the_rates_it_is_given(name: str) -> None:
    layer = nn.Linear(2, 1)
    given = settings(optim__name=name)
    optimizer = make_optimizer(head_groups(layer, given), given)
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(layer.weight, before), "before set_rates nothing may move"
    set_rates(optimizer, step=0, steps=10, warmup=0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {given.optim["lr"]}
    optimizer.step()
    assert not torch.equal(layer.weight, before)


def test_parameters_that_stay_in_the_plan_keep_their_optimizer_state() -> None:
    stem, top = nn.Linear(2, 2), nn.Linear(2, 1)
    given = settings()
    first = make_optimizer(head_groups(top, given), given)
    top(stem(torch.ones(1, 2))).sum().backward()
    first.step()
    second = make_optimizer(head_groups(top, given) + head_groups(stem, given), given, first)
    assert second.state[top.weight]["step"] == 1
    assert stem.weight not in second.state
    third = make_optimizer(head_groups(stem, given), given, second)
    assert top.weight not in third.state


def test_the_rate_warms_up_to_its_peak_and_falls_towards_nothing() -> None:
    rates = [rate_factor(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert 0 < rates[0] < 0.1
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    assert rate_factor(0, 1, 0.3) == 1.0
