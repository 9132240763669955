"""Real photos and real weights: as good as scikit-learn on the same features, and quick."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tlauto.contracts import TrialSpec, WeightsOptions
from tlauto.data import Dataset, Item
from tlauto.plugins import Registry
from tlauto.training.features import FeatureSource
from tlauto.training.fit import run_trial


@pytest.fixture(scope="module")
def ants_and_bees(bench_data: Path) -> Dataset:
    """244 training photos; the 153 test photos serve as validation here."""
    root = bench_data / "hymenoptera"
    classes = tuple(sorted(folder.name for folder in (root / "train").iterdir()))
    items = [
        Item(str(file.relative_to(root)), target, split, hashlib.sha256(file.read_bytes()).hexdigest())
        for folder, split in (("train", "train"), ("test", "val"))
        for target, name in enumerate(classes)
        for file in sorted((root / folder / name).iterdir())
    ]
    return Dataset(str(root), "multiclass", classes, tuple(items), "fingerprint")


def test_the_default_head_is_as_good_as_logistic_regression(
    ants_and_bees: Dataset, real_weights: Path, tmp_path: Path, registry: Registry
) -> None:
    spec = TrialSpec(
        number=0, dataset="", task="multiclass", metric="accuracy", backbone="timm:mobilenetv2_100",
        strategy="feature_extraction", head="linear", params={}, seed=0, epochs=40,
        weights=WeightsOptions(folder=str(real_weights), offline=True),
        folder=str(tmp_path / "trial"), cache=str(tmp_path / "cache"),
    )  # fmt: skip
    source = FeatureSource(spec, registry, ants_and_bees, torch.device("cpu"))
    features = {split: source.features([split], "pooled").tensor().numpy() for split in ("train", "val")}
    targets = {s: np.array([item.target for item in ants_and_bees.part(s)]) for s in features}
    rival = make_pipeline(StandardScaler(), LogisticRegression(C=1, max_iter=2000))
    rival.fit(features["train"], targets["train"])
    # No epoch is chosen by these photos: they are called the test part, which is looked at once.
    photos = tuple(replace(i, split="test" if i.split == "val" else i.split) for i in ants_and_bees.items)
    dataset, refit = replace(ants_and_bees, items=photos), replace(spec, evaluate_on="test")
    done = run_trial(refit, registry, dataset, device="cpu", on_epoch=lambda _: True)
    assert done.score >= rival.score(features["val"], targets["val"]) - 2 / len(targets["val"])
    assert done.val_loss <= 1.1 * log_loss(targets["val"], rival.predict_proba(features["val"]))
    assert done.seconds < 20, "the features were cached before"
