"""A step that is tried: what it takes is measured, and nothing of it remains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tlauto.contracts import TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.memory import capacity_bytes, held_bytes
from tlauto.plugins import Registry
from tlauto.training.footprint import Tried, peak_bytes, total_bytes, try_step


@pytest.mark.parametrize(
    ("strategy", "params"),
    [
        ("full", {}),
        ("full", {"finetune.batch_size": 32, "finetune.train_mode": True, "augment.level": "strong"}),
        ("partial", {"optim.name": "sgd"}),
    ],
)
def test_a_step_leaves_nothing_behind(
    strategy: str, params: dict[str, Any], spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    spec = replace(spec, strategy=strategy, params=params)
    tried = try_step(spec, registry, dataset, device="cpu", at_once=5)
    assert tried.at_once == 5
    assert tried.bytes == held_bytes() is None or (tried.bytes or 0) > 10**7
    assert not Path(spec.cache).exists() and not Path(spec.folder).exists()


def test_a_trial_is_the_same_after_a_step_of_it_was_tried(
    spec: TrialSpec, registry: Registry, dataset: Dataset, run: Callable[..., TrialDone], tmp_path: Path
) -> None:
    spec = replace(spec, strategy="full", epochs=2)
    first = run(spec)
    assert try_step(spec, registry, dataset, device="cpu", at_once=16).at_once == 16
    second = run(replace(spec, folder=str(tmp_path / "again")))
    assert (second.val_loss, second.metrics) == (first.val_loss, first.metrics)


def test_without_a_gpu_memory_is_that_of_this_machine() -> None:
    assert total_bytes("cpu") == capacity_bytes()
    assert peak_bytes("mps") is None and total_bytes("mps") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_step_on_a_gpu_keeps_to_what_it_may_take(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    spec = replace(spec, strategy="full")
    tried = try_step(spec, registry, dataset, device="cuda", at_once=16)
    assert tried.at_once == 16 and tried.bytes and tried.bytes < (total_bytes("cuda") or 0)
    refused = try_step(spec, registry, dataset, device="cuda", at_once=16, most=10**6)
    assert refused.at_once is None
    assert try_step(spec, registry, dataset, device="cuda", at_once=16) == Tried(16, tried.bytes)
