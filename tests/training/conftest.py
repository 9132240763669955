"""Fixtures of the trial tests: a small dataset, a specification, and a way to run it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tlauto.contracts import EpochResult, TrialDone, TrialSpec, WeightsOptions
from tlauto.data import Dataset, Item
from tlauto.plugins import Offer, Registry, load_plugins
from tlauto.training.fit import run_trial


@pytest.fixture(scope="session")
def registry() -> Registry:
    return load_plugins()


@pytest.fixture
def dataset(patches: Callable[..., Path]) -> Dataset:
    """Three colours: 24 images to train, 9 to validate, 9 to test."""
    root = patches(per_class=14, classes=3)
    items = []
    classes = tuple(sorted(folder.name for folder in root.iterdir()))
    for target, name in enumerate(classes):
        for i, file in enumerate(sorted((root / name).iterdir())):
            split = "train" if i < 8 else "val" if i < 11 else "test"
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            items.append(Item(f"{name}/{file.name}", target, split, digest))
    return Dataset(str(root), "multiclass", classes, tuple(items), "fingerprint")


@pytest.fixture
def spec(tmp_path: Path) -> TrialSpec:
    return TrialSpec(
        number=7, dataset="", task="multiclass", metric="accuracy", backbone="timm:test_resnet",
        strategy="feature_extraction", head="linear", params={}, seed=0,
        weights=WeightsOptions(pretrained=False, offline=True),
        epochs=3, folder=str(tmp_path / "trial"), cache=str(tmp_path / "cache"),
    )  # fmt: skip


def go_on(_: EpochResult) -> bool:
    return True


@pytest.fixture
def run(registry: Registry, dataset: Dataset) -> Callable[..., TrialDone]:
    def run(spec: TrialSpec, on_epoch: Callable[[EpochResult], bool] = go_on, **more: Any) -> TrialDone:
        found = more.get("registry", registry), more.get("dataset", dataset)
        return run_trial(spec, *found, device="cpu", on_epoch=on_epoch)

    return run


@pytest.fixture
def offering(registry: Registry) -> Callable[..., Registry]:
    """The registry with one more thing that a plugin offers: `offering("task_heads", head)`."""

    def add(hook: str, value: Any) -> Registry:
        return Registry(
            registry.plugins, (*registry.offers, Offer(hook, value.name, value, "tlauto-test", "1.0"))
        )

    return add


@pytest.fixture
def relabel(dataset: Dataset) -> Callable[..., Dataset]:
    """The dataset as another task's: `relabel("regression", target, classes)`."""

    def relabel(task: str, target: Callable[[Item], Any], classes: tuple[str, ...] = ()) -> Dataset:
        items = tuple(replace(item, target=target(item)) for item in dataset.items)
        return replace(dataset, task=task, items=items, classes=classes)

    return relabel
