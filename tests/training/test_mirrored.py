"""Heads that read the mean of the features of an image and of its mirror image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from tlauto.contracts import TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.plugins import Registry
from tlauto.training.engines import Extractor
from tlauto.training.features import FeatureSource
from tlauto.training.model import Kind, features_of, restore
from tlauto.training.predictor import Predictor
from tlauto.training.tasks import find_task

Run = Callable[..., TrialDone]
MAP_HEAD: Mapping[str, Any] = {"head.mlp.input": "flattened", "optim.adamw.lr": 1e-3}


def source_of(spec: TrialSpec, registry: Registry, dataset: Dataset, *, mirror: bool) -> FeatureSource:
    return FeatureSource(spec, registry, dataset, torch.device("cpu"), mirror=mirror)


def images_of(source: FeatureSource, split: str) -> torch.Tensor:
    from tlauto.training.batches import centre_batches

    pixels = source.pixels([split])
    indices = range(len(source.dataset.part(split)))
    return torch.cat(list(centre_batches(pixels, torch.device("cpu"), indices)))


@pytest.mark.parametrize("kind", ["pooled", "unpooled", "levels", "grid"])
def test_features_are_the_mean_of_both_images(
    spec: TrialSpec, registry: Registry, dataset: Dataset, kind: Kind
) -> None:
    source = source_of(spec, registry, dataset, mirror=True)
    found = source.features(["val"], kind).tensor()
    images = images_of(source, "val")
    with torch.inference_mode():
        plain, other = (features_of(source.backbone, some, kind) for some in (images, images.flip(-1)))
    expected = (plain + (other.flip(-1) if kind == "unpooled" else other)) / 2
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    without = source_of(spec, registry, dataset, mirror=False).features(["val"], kind).tensor()
    torch.testing.assert_close(without, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, without, atol=1e-3)


def test_images_that_have_features_already_are_not_run_again(
    spec: TrialSpec, registry: Registry, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    run = Extractor.__call__

    def counting(extractor: Extractor, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return run(extractor, images)

    monkeypatch.setattr(Extractor, "__call__", counting)
    for mirror in (False, True, True):
        source_of(spec, registry, dataset, mirror=mirror).features(["train"], "pooled")
    assert sum(seen) == 2 * len(dataset.part("train"))


@pytest.mark.parametrize(
    ("head", "given"),
    [
        ("linear", {}),
        ("linear", {"probe.solver": "minibatch"}),
        ("cosine", {}),
        ("mlp", {}),
        ("mlp", MAP_HEAD),
    ],
)
def test_the_kept_model_answers_as_the_trial_did_and_alike_for_mirror_images(
    spec: TrialSpec, run: Run, dataset: Dataset, registry: Registry, tmp_path: Path, head: str,
    given: Mapping[str, Any],
) -> None:  # fmt: skip
    spec = replace(spec, head=head, params={**given, "probe.mirror": True})
    done = run(spec)
    classifier = restore(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    predictor = Predictor(classifier, classifier.source.input, find_task("multiclass"), dataset.classes)
    files = [Path(dataset.root, item.path) for item in dataset.part("val")]
    answers = predictor.predict_files(files)
    saved = np.load(Path(spec.folder, "predictions.npz"))
    np.testing.assert_allclose(answers, saved["predictions"], atol=1e-4)

    turned = [tmp_path / f"{i}.png" for i in range(len(files))]
    for file, target in zip(files, turned, strict=True):
        with Image.open(file) as image:
            ImageOps.mirror(image).save(target)
    if given is not MAP_HEAD:  # maps are turned back: what reads them still tells left from right
        np.testing.assert_allclose(predictor.predict_files(turned), answers, atol=2e-3)
    classifier.mirror = False
    assert not np.array_equal(predictor.predict_files(files), answers)


def test_a_trial_that_trains_the_backbone_has_no_such_parameter(spec: TrialSpec, run: Run) -> None:
    from tlauto.errors import TrialError

    with pytest.raises(TrialError, match=r"nothing in this trial reads the parameter 'probe\.mirror'"):
        run(replace(spec, strategy="full", params={"probe.mirror": True}))
