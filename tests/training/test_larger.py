"""Trials on larger images: what is computed, kept and shipped is that of a network of that size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tlauto.contracts import EpochResult, TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import TrialError
from tlauto.plugins import Registry
from tlauto.training.batches import centre_batches
from tlauto.training.features import FeatureSource
from tlauto.training.footprint import try_step
from tlauto.training.joined import restore_parts
from tlauto.training.model import Kind, features_of, restore
from tlauto.training.pixels import load_pixels
from tlauto.training.predictor import Predictor
from tlauto.training.pretrained import load_backbone
from tlauto.training.tasks import find_task

Run = Callable[..., TrialDone]
LARGER = {"image.scale": 1.4}
SIZE = 224
"""1.4 times the 160 pixels of timm's test networks."""

PLAIN = {"augment.level": "none", "optim.name": "sgd", "finetune.batch_size": 8}


def source_of(spec: TrialSpec, registry: Registry, dataset: Dataset) -> FeatureSource:
    return FeatureSource(spec, registry, dataset, torch.device("cpu"))


def larger(spec: TrialSpec, **params: Any) -> TrialSpec:
    return replace(spec, params={**spec.params, **params, **LARGER})


@pytest.mark.parametrize("kind", ["pooled", "unpooled", "levels", "grid"])
def test_features_are_those_of_the_network_on_larger_images_and_kept_apart(
    spec: TrialSpec, registry: Registry, dataset: Dataset, kind: Kind
) -> None:
    own = source_of(spec, registry, dataset)
    before = own.features(["val"], kind).tensor()
    source = source_of(larger(spec), registry, dataset)
    found = source.features(["val"], kind).tensor()
    assert (own.facts.input.size, source.facts.input.size) == (160, SIZE)
    pixels = load_pixels(dataset, ["val"], source.facts.input, spec.cache)
    assert pixels.windows([0]).shape == (1, source.facts.input.resize, source.facts.input.resize, 3)
    images = torch.cat(list(centre_batches(pixels, torch.device("cpu"), range(len(pixels)))))
    assert images.shape[2:] == (SIZE, SIZE)
    plain = load_backbone(spec, registry, torch.device("cpu"))  # at its own size: the network is the same
    with torch.inference_mode():
        expected = features_of(plain, images, kind)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if kind != "unpooled":
        assert not torch.allclose(found, before, atol=1e-3)
    again = source_of(spec, registry, dataset).features(["val"], kind).tensor()
    assert torch.equal(again, before), "neither takes the other's arrays"
    assert len(list(Path(spec.cache, "features").glob("*.npy"))) == 2


@pytest.mark.parametrize(
    ("head", "strategy", "params"),
    [
        ("linear", "feature_extraction", {}),
        ("mlp", "feature_extraction", {"head.mlp.input": "flattened", "optim.adamw.lr": 1e-3}),
        ("linear", "partial", {**PLAIN}),
        ("mlp", "full", {"head.mlp.input": "flattened"}),
    ],
)
def test_the_kept_model_answers_as_the_trial_did(
    spec: TrialSpec, run: Run, dataset: Dataset, registry: Registry, head: str, strategy: str,
    params: Mapping[str, Any],
) -> None:  # fmt: skip
    spec = larger(replace(spec, head=head, strategy=strategy, epochs=2), **params)
    done = run(spec)
    classifier = restore(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    assert classifier.source.input.size == SIZE
    predictor = Predictor(classifier, classifier.source.input, find_task("multiclass"), dataset.classes)
    files = [Path(dataset.root, item.path) for item in dataset.part("val")]
    saved = np.load(Path(spec.folder, "predictions.npz"))
    np.testing.assert_allclose(predictor.predict_files(files), saved["predictions"], atol=1e-4)


def test_cached_stages_give_what_the_whole_network_gives_at_that_size(
    spec: TrialSpec, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = larger(replace(spec, strategy="partial", epochs=2), **PLAIN)
    told: list[EpochResult] = []
    heard: list[EpochResult] = []
    run(spec, lambda result: not told.append(result))
    whole = replace(spec, folder=str(tmp_path / "whole"), cache=str(tmp_path / "other"))
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "1KB")  # a quarter of it has no room for activations
    run(whole, lambda result: not heard.append(result))
    kept = list(Path(spec.cache, "prefixes").glob("*.npy"))
    assert kept and not list(Path(whole.cache, "prefixes").glob("*.npy"))
    for ours, theirs in zip(told, heard, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=2e-3)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=2e-3)
    states = [load_file(Path(one.folder, "checkpoint.safetensors")) for one in (spec, whole)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name].float(), tensor.float(), rtol=2e-3, atol=2e-3)
    monkeypatch.delenv("TLAUTO_CACHE_SIZE")
    run(replace(spec, params={**PLAIN}, folder=str(tmp_path / "own")))
    assert len(list(Path(spec.cache, "prefixes").glob("*.npy"))) == 2 * len(kept), "of each size its own"


@pytest.mark.parametrize("strategy", ["feature_extraction", "partial"])
def test_it_ends_the_same_whatever_ran_before_it(
    strategy: str, spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    spec = larger(replace(spec, strategy=strategy, epochs=2))
    first = run(spec)
    elsewhere = replace(spec, cache=str(tmp_path / "other"), folder=str(tmp_path / "again"))
    run(replace(elsewhere, params={}))
    again = run(elsewhere)
    assert (first.score, first.val_loss, first.held_out) == (again.score, again.val_loss, again.held_out)


def test_a_head_on_several_backbones_sees_larger_images_through_all(
    spec: TrialSpec, run: Run, dataset: Dataset, registry: Registry
) -> None:
    joined = {"probe.joined": 2, "probe.beside": "timm:test_efficientnet"}
    spec = larger(spec, **joined)
    done = run(spec)
    parts = restore_parts(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    assert [part.source.input.size for part in parts] == [SIZE, SIZE]


def test_a_head_of_its_own_size_is_a_start_for_larger_images(
    spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    run(spec)
    start = str(Path(spec.folder, "checkpoint.safetensors"))
    told: list[EpochResult] = []
    tuned = larger(replace(spec, strategy="full", init_head=start, folder=str(tmp_path / "tuned"), epochs=1))
    run(tuned, lambda result: not told.append(result))
    scratch: list[EpochResult] = []
    run(replace(tuned, init_head=None), lambda result: not scratch.append(result))
    assert told[0].train_loss < scratch[0].train_loss


@pytest.mark.parametrize("strategy", ["feature_extraction", "full"])
def test_a_backbone_of_one_size_fails_the_trial_in_one_sentence(
    strategy: str, spec: TrialSpec, run: Run
) -> None:
    vit = larger(replace(spec, backbone="timm:test_vit", strategy=strategy))
    with pytest.raises(
        TrialError, match=r"'image\.scale' is 1\.4, but timm:test_vit takes images of 160 x 160"
    ):
        run(vit)
    beside = larger(spec, **{"probe.joined": 2, "probe.beside": "timm:test_vit"})
    with pytest.raises(TrialError, match=r"timm:test_vit takes images of 160 x 160 pixels only"):
        run(beside)


def test_other_scales_than_those_of_the_space_are_refused(spec: TrialSpec, run: Run) -> None:
    with pytest.raises(TrialError, match=r"image\.scale: 3 is not one of 1\.0, 1\.4"):
        run(replace(spec, params={"image.scale": 3}))


def test_a_step_is_tried_with_images_of_that_size(
    spec: TrialSpec, registry: Registry, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Size] = []
    noise = torch.randn

    def noting(*size: int, **given: Any) -> torch.Tensor:
        made = noise(*size, **given)
        seen.append(made.shape)
        return made

    monkeypatch.setattr(torch, "randn", noting)
    try_step(larger(replace(spec, strategy="full")), registry, dataset, device="cpu", at_once=4)
    assert {tuple(shape[2:]) for shape in seen if len(shape) == 4} == {(SIZE, SIZE)}
