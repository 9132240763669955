"""Small backbones that a worker keeps: loaded once, and nobody's work is seen in another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tlauto.builtin.timm_provider import TimmProvider
from tlauto.contracts import Backbone, TrialDone, TrialSpec, WeightsOptions
from tlauto.data import Dataset
from tlauto.plugins import Registry
from tlauto.pool.protocol import Preflight
from tlauto.preflight import check_backbones
from tlauto.training import features, pretrained
from tlauto.training.features import FeatureSource
from tlauto.training.kept import forget
from tlauto.training.model import restore

Run = Callable[..., TrialDone]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(features, "_known", {})
    forget()
    yield
    forget()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backbones that timm's provider was asked for, in order."""
    ids: list[str] = []
    load = TimmProvider.load

    def noted(self: TimmProvider, id: str, weights: WeightsOptions) -> Backbone:
        ids.append(id)
        return load(self, id, weights)

    monkeypatch.setattr(TimmProvider, "load", noted)
    return ids


def test_a_small_backbone_is_loaded_once_for_its_features_and_its_bundle(
    run: Run, spec: TrialSpec, registry: Registry, dataset: Dataset, loaded: list[str]
) -> None:
    done = run(spec)
    restore(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    assert loaded == [spec.backbone]


def test_a_large_one_is_loaded_whenever_it_is_needed(
    run: Run, spec: TrialSpec, registry: Registry, dataset: Dataset, loaded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(pretrained, "SMALL", 1000)
    done = run(spec)
    restore(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    assert loaded == [spec.backbone] * 2


@pytest.mark.parametrize("is_pretrained", [True, False])
def test_what_was_checked_is_not_loaded_again_for_a_trial(
    is_pretrained: bool,
    spec: TrialSpec,
    registry: Registry,
    dataset: Dataset,
    loaded: list[str],
    tmp_path: Path,
) -> None:
    first = registry.provider("timm").load(spec.backbone, spec.weights)
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save(first.module.state_dict(), folder / "test_resnet.pt")
    options = WeightsOptions({spec.backbone: str(folder / "test_resnet.pt")}, None, True, is_pretrained)
    loaded.clear()
    found = check_backbones(Preflight((spec.backbone,), options, 1), registry, note=pytest.fail)
    assert not found.candidates[0].problem
    assert len(FeatureSource(replace(spec, weights=options), registry, dataset, CPU).backbone.stages) > 1
    # A random one is made after its library was imported and seeded, never before.
    assert len(loaded) == (1 if is_pretrained else 2)


def test_a_backbone_that_was_trained_is_not_the_one_that_is_kept(
    run: Run, spec: TrialSpec, tmp_path: Path, loaded: list[str]
) -> None:
    def answers(name: str, **changes: object) -> bytes:
        folder = tmp_path / name
        run(replace(spec, folder=str(folder), **changes))
        return (folder / "predictions.npz").read_bytes()

    before = answers("before")
    trained = answers("trained", strategy="full", epochs=2)
    after = answers("after", cache=str(tmp_path / "another cache"))
    assert trained != before == after
    assert loaded == [spec.backbone] * 2, "the trained one was loaded for itself"
