"""Trials whose frozen stages run once: the same results, and nothing is computed twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tlauto.builtin.timm_provider import TimmProvider
from tlauto.contracts import Backbone, EpochResult, TrainPlan, TrialDone, TrialSpec, WeightsOptions
from tlauto.data import Dataset, Item
from tlauto.plugins import Registry
from tlauto.training.prefix import PROOF, VIEWS, first_learning_stage, plan_rota, view_keys

Run = Callable[..., TrialDone]
Offering = Callable[..., Registry]
PLAIN = {"augment.level": "none"}


class Watched:
    """timm's backbones, noting how many images go through the first stages; split or not."""

    name = "watched"
    modality = "image"

    def __init__(self, *, is_split: bool = True) -> None:
        self.is_split = is_split
        self.images: list[int] = []
        self.prefixed: list[int] = []

    def shortlist(self) -> tuple[()]:
        return ()

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[()]:
        return ()

    def weights_status(self, id: str, weights: WeightsOptions) -> Any:
        return TimmProvider().weights_status(id.replace("watched:", "timm:"), weights)

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        backbone: Any = TimmProvider().load(id.replace("watched:", "timm:"), weights)
        # Deep in the first stages: where they are bypassed, it is not called.
        inner = backbone.module.get_submodule("layer1.0.conv1")
        inner.register_forward_pre_hook(lambda _module, args: self.images.append(len(args[0])))
        right = backbone.split
        backbone.split = lambda stage: self.watched(right(stage)) if self.is_split else None
        return backbone

    def watched(self, split: Any) -> Any:
        prefix = split.prefix

        def noting(images: torch.Tensor) -> torch.Tensor:
            self.prefixed.append(len(images))
            return prefix(images)

        split.prefix = noting
        return split

    def count(self, spec: TrialSpec, run: Run, registry: Registry, **more: Any) -> int:
        """Images through the first stages in a trial, besides the few that prove a split."""
        self.images.clear()
        self.prefixed.clear()
        run(spec, registry=registry, **more)
        return sum(n for n in self.images if n > PROOF)

    def computed(self, spec: TrialSpec, run: Run, registry: Registry) -> int:
        """Images whose activations a trial computed."""
        self.count(spec, run, registry)
        return sum(n for n in self.prefixed if n > PROOF)


@pytest.fixture
def partial(spec: TrialSpec) -> TrialSpec:
    return replace(spec, strategy="partial", backbone="watched:test_resnet")


@pytest.fixture
def split(offering: Offering) -> tuple[Watched, Registry]:
    provider = Watched()
    return provider, offering("backbone_providers", provider)


@pytest.fixture
def unsplit(offering: Offering) -> tuple[Watched, Registry]:
    provider = Watched(is_split=False)
    return provider, offering("backbone_providers", provider)


def state_of(spec: TrialSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.folder, "checkpoint.safetensors"))


def arrays(spec: TrialSpec) -> list[Path]:
    return sorted(Path(spec.cache, "prefixes").glob("*.npy"))


# --- the same results -------------------------------------------------------------------------------


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_without_augmentation_a_trial_ends_as_it_does_without_a_cache(
    k: int, train_mode: bool, partial: TrialSpec, run: Run, split: Any, unsplit: Any, tmp_path: Path
) -> None:
    params = {**PLAIN, "freeze.partial.k": k, "finetune.train_mode": train_mode}
    # Adam would turn the smallest rounding of a gradient near zero into a step of full length.
    params |= {"optim.name": "sgd", "finetune.batch_size": 8}
    spec = replace(partial, params=params, epochs=2)
    cached, (told, heard) = spec, ([], [])
    found = run(cached, lambda r: not told.append(r), registry=split[1])
    plain = replace(spec, folder=str(tmp_path / "plain"), cache=str(tmp_path / "other"))
    expected = run(plain, lambda r: not heard.append(r), registry=unsplit[1])
    assert arrays(cached) and not arrays(plain)
    assert found.score == expected.score
    assert found.trainable == expected.trainable
    for ours, theirs in zip(told, heard, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=2e-3)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=2e-3)
    ours, theirs = state_of(cached), state_of(plain)
    assert ours.keys() == theirs.keys(), "the checkpoint has the same names"
    assert any(name.startswith("backbone.layer4") for name in ours)
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name].float(), tensor.float(), rtol=2e-3, atol=2e-3), name


@pytest.mark.parametrize("level", ["light", "strong"])
def test_a_trial_is_the_same_with_an_empty_and_with_a_filled_cache(
    level: str, partial: TrialSpec, run: Run, split: Any, tmp_path: Path
) -> None:
    spec = replace(partial, params={"augment.level": level, "finetune.train_mode": True}, epochs=2)
    first = run(spec, registry=split[1])
    state = state_of(spec)
    torch.rand(5)
    again = run(spec, registry=split[1])
    elsewhere = run(replace(spec, cache=str(tmp_path / "other")), registry=split[1])
    assert first.score == again.score == elsewhere.score
    assert first.val_loss == again.val_loss == elsewhere.val_loss
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(spec).items())


@pytest.mark.parametrize("level", ["none", "light", "medium", "strong"])
@pytest.mark.parametrize("backbone", ["timm:test_vit", "timm:test_efficientnet"])
def test_every_level_learns_from_activations(level: str, backbone: str, partial: TrialSpec, run: Run) -> None:
    told: list[EpochResult] = []
    params = {"augment.level": level, "optim.adamw.lr": 3e-3}
    spec = replace(partial, backbone=backbone, params=params, epochs=8)
    run(spec, lambda result: not told.append(result))
    assert len(arrays(spec)) == (1 if level == "none" else VIEWS) + 1
    assert told[-1].train_loss < told[0].train_loss


def test_an_images_view_is_the_same_in_any_shard_and_batch(partial: TrialSpec, run: Run) -> None:
    spec = replace(partial, backbone="timm:test_resnet", params={"augment.level": "strong"})
    found = []
    for epoch_images, epochs in ((None, 2), (7, 8)):  # two views of all images each
        run(replace(spec, epoch_images=epoch_images, epochs=epochs, cache=f"{spec.cache}/{epochs}"))
        cached = [np.load(file) for file in Path(f"{spec.cache}/{epochs}", "prefixes").glob("*.npy")]
        views = np.concatenate([array for array in cached if array.dtype == np.float16])
        found.append(torch.from_numpy(views.reshape(len(views), -1)).float())
    assert found[0].shape == found[1].shape
    distances = torch.cdist(*found)
    # Half precision rounds differently where convolutions of other batch sizes do.
    assert distances.min(1).values.max() < 0.01 * distances.median()
    assert sorted(distances.argmin(1).tolist()) == list(range(len(distances)))


def test_views_are_drawn_by_image_and_view_alone() -> None:
    items = [Item(f"{i}.png", 0, "train", f"sha{i}") for i in range(3)]
    keys = view_keys(items, 1)
    assert np.array_equal(view_keys(items[1:], 1), keys[1:])
    assert np.array_equal(view_keys([replace(items[2], path="x.png", split="val")], 1), keys[2:])
    assert len(np.unique(np.concatenate([keys, view_keys(items, 2)]), axis=0)) == 6


# --- nothing is computed twice ----------------------------------------------------------------------


def test_the_next_trials_compute_nothing_of_the_first_stages(
    partial: TrialSpec, run: Run, split: Any, dataset: Dataset
) -> None:
    provider, registry = split
    train, val = len(dataset.part("train")), len(dataset.part("val"))
    assert provider.computed(partial, run, registry) == 2 * train + val
    other = replace(partial, seed=5, number=8, head="mlp", params={"optim.adamw.lr": 3e-4})
    assert provider.count(other, run, registry) == 0
    assert provider.count(replace(other, params={"freeze.partial.k": 2}), run, registry) > 0
    more = replace(partial, epochs=2 * VIEWS)
    assert provider.computed(more, run, registry) == (VIEWS - 2) * train


@pytest.mark.parametrize("epochs", [1, 2, 5])
@pytest.mark.parametrize("epoch_images", [None, 16, 7])
@pytest.mark.parametrize("level", ["none", "light"])
def test_a_trial_never_computes_more_than_without_a_cache(
    level: str, epoch_images: int | None, epochs: int, partial: TrialSpec, run: Run, split: Any, unsplit: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    params = {"augment.level": level, "finetune.batch_size": 8}
    spec = replace(partial, params=params, epoch_images=epoch_images, epochs=8)

    def until(result: EpochResult) -> bool:
        return result.epoch < epochs

    without = replace(spec, cache=str(tmp_path / "other"))
    most = unsplit[0].count(without, run, unsplit[1], on_epoch=until)
    assert split[0].count(spec, run, split[1], on_epoch=until) <= most


def test_a_refit_on_train_and_val_finds_the_activations_of_train(
    partial: TrialSpec, run: Run, split: Any, dataset: Dataset
) -> None:
    provider, registry = split
    run(partial, registry=registry)
    before = arrays(partial)
    refit = replace(partial, fit_on=("train", "val"), evaluate_on="test", purpose="refit", number=-1)
    val, test = len(dataset.part("val")), len(dataset.part("test"))
    assert provider.computed(refit, run, registry) == 2 * val + test
    assert set(before) < set(arrays(refit))


def test_a_search_lists_them_in_the_cache(partial: TrialSpec, run: Run, split: Any) -> None:
    from tlauto.caches import entries

    run(partial, registry=split[1])
    found = [entry for entry in entries(Path(partial.cache)) if entry.kind == "prefixes"]
    assert len(found) == 2 + 1
    assert {entry.backbone for entry in found} == {partial.backbone}


# --- where the whole network runs -------------------------------------------------------------------


def test_what_does_not_fit_the_cache_runs_in_every_epoch(
    partial: TrialSpec, run: Run, split: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "1MB")
    with caplog.at_level("INFO", logger="tlauto"):
        assert run(partial, registry=split[1]).epochs == 3
    assert not arrays(partial)
    assert "watched:test_resnet runs its frozen stages in every epoch: 38 kB an image" in caplog.text


def test_a_backbone_without_a_split_trains_as_ever(partial: TrialSpec, run: Run, unsplit: Any) -> None:
    assert run(partial, registry=unsplit[1]).epochs == 3
    assert not arrays(partial)


class WrongSplit(Watched):
    """A third party's split that forgets something."""

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        backbone: Any = super().load(id, weights)
        right = backbone.split

        def wrong(stage: int) -> Any:
            made = right(stage)
            suffix = made.suffix
            made.suffix = lambda activations, kind: suffix(activations, kind) * 1.01
            return made

        backbone.split = wrong
        # The proof is made once a process for the same weights.
        with torch.no_grad():
            next(backbone.module.parameters()).mul_(1.5)
        return backbone


def test_a_split_that_gives_other_features_is_not_used(
    partial: TrialSpec, run: Run, offering: Offering, caplog: Any
) -> None:
    with caplog.at_level("INFO", logger="tlauto"):
        run(partial, registry=offering("backbone_providers", WrongSplit()))
    assert not arrays(partial)
    assert "it gives other features" in caplog.text


class Thaw:
    """One more stage each epoch, down to a given one."""

    name = "thaw"
    space: dict[str, Any] = {}

    def __init__(self, last: int) -> None:
        self.last = last

    def plan(self, stages: Any, epoch: int, params: Any) -> TrainPlan:
        learning = stages[max(self.last, len(stages) - epoch) :] if epoch else ()
        return TrainPlan([name for stage in learning for name in stage])


@pytest.mark.parametrize(("last", "is_cached"), [(3, True), (0, False)])
def test_a_plan_may_change_as_long_as_the_first_stages_never_learn(
    last: int, is_cached: bool, partial: TrialSpec, run: Run, offering: Offering
) -> None:
    spec = replace(partial, backbone="timm:test_resnet", strategy="thaw", epochs=6)
    assert run(spec, registry=offering("freeze_strategies", Thaw(last))).epochs == 6
    assert bool(arrays(spec)) is is_cached


# --- plans ------------------------------------------------------------------------------------------


def test_the_first_learning_stage_is_that_of_all_epochs() -> None:
    stages = (("a", "b"), ("c",), ("d",))
    assert first_learning_stage(stages, [TrainPlan(("d",)), TrainPlan(("c", "d"))]) == 1
    assert first_learning_stage(stages, [TrainPlan(("b",))]) == 0
    assert first_learning_stage(stages, [TrainPlan()]) == 3


@pytest.mark.parametrize(("images", "epoch_images"), [(24, None), (24, 100), (100, 24), (25, 24), (9, 1)])
def test_each_shard_has_its_turn_before_a_view_comes_again(images: int, epoch_images: int | None) -> None:
    rota = plan_rota(images, epoch_images, 40, is_augmented=True)
    size = min(epoch_images or images, images)
    assert sorted(np.concatenate(rota.shards).tolist()) == list(range(images))
    assert all(len(shard) <= size for shard in rota.shards)
    assert len(rota.shards) == math.ceil(images / size)
    once = len(rota.shards) * rota.views
    assert len({rota.at(epoch) for epoch in range(once)}) == once
    assert rota.at(once) == rota.at(0)
    assert min(view for _, view in map(rota.at, range(once))) >= 1


@pytest.mark.parametrize(("epochs", "views"), [(1, 1), (2, 2), (3, 2), (5, 2), (6, 3), (8, 4), (30, VIEWS)])
def test_each_view_serves_two_epochs_but_two_views_are_the_least(epochs: int, views: int) -> None:
    assert plan_rota(24, None, epochs, is_augmented=True).views == views


def test_a_rota_without_augmentation_has_the_plain_view_alone() -> None:
    rota = plan_rota(10, 4, 8, is_augmented=False)
    assert {rota.at(epoch)[1] for epoch in range(8)} == {0}
