"""The installed package: found by tlauto, and right on a real network."""

from __future__ import annotations

import timm

from tlauto.plugins import load_plugins


def test_tlauto_finds_the_strategy_and_knows_where_it_comes_from() -> None:
    registry = load_plugins()
    assert registry.source("freeze_strategies", "bias_only") == "tlauto-example 0.1.0"
    plugin = next(p for p in registry.plugins if p.name == "tlauto-example")
    assert plugin.error is None
    assert plugin.offers == {"freeze_strategies": ("bias_only",)}


def test_a_tenth_of_a_vision_transformer_or_less_learns() -> None:
    # BitFit's point: biases are few (under 1 % of a base model, more of this tiny one) and suffice.
    model = timm.create_model("test_vit", pretrained=False, num_classes=0)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    plan = load_plugins().strategy("bias_only").plan([list(sizes)], 0, {})
    learning = sum(sizes[name] for name in plan.trainable)
    assert 0 < learning < 0.1 * sum(sizes.values())
    assert "blocks.0.attn.qkv.bias" in plan.trainable
