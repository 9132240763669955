"""Trials whose head reads more than the last stage: chosen by cross-validation, kept, started from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from tlauto.contracts import TrialDone, TrialSpec
from tlauto.data import Dataset, Item
from tlauto.errors import TrialError
from tlauto.plugins import Registry
from tlauto.training.features import FeatureSource
from tlauto.training.model import restore
from tlauto.training.predictor import Predictor
from tlauto.training.solved import solve_head
from tlauto.training.tasks import find_task
from tlauto.training.trial import prepare

Run = Callable[..., TrialDone]


@pytest.fixture
def places(tmp_path: Path) -> Dataset:
    """Which of four quarters is bright: a mean over the whole map hardly tells."""
    items = []
    for i in range(96):
        target, random = i % 4, np.random.default_rng(i)
        pixels = random.normal(110, 30, (48, 48, 3))
        row, column = 24 * (target // 2), 24 * (target % 2)
        pixels[row : row + 24, column : column + 24] += random.uniform(20, 60)
        file = tmp_path / "places" / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        split = "train" if i < 48 else "val" if i < 72 else "test"
        items.append(Item(file.name, target, split, hashlib.sha256(file.read_bytes()).hexdigest()))
    classes = ("top left", "top right", "bottom left", "bottom right")
    return Dataset(str(tmp_path / "places"), "multiclass", classes, tuple(items), "places")


def params(**values: object) -> dict[str, object]:
    return {f"probe.{name}": value for name, value in values.items()}


def test_cross_validation_finds_the_features_that_tell_the_classes(
    spec: TrialSpec, run: Run, places: Dataset
) -> None:
    held_out = {}
    for features in ("pooled", "levels", "grid"):
        given = params(solver="lbfgs", l2=1e-2, features=features)
        done = run(replace(spec, params=given, folder=f"{spec.folder}-{features}"), dataset=places)
        held_out[features] = done.score
        assert done.features == features
    done = run(spec, dataset=places)
    assert done.features == "grid"
    assert done.held_out is not None and done.held_out > 0.9
    assert held_out["grid"] > max(held_out["pooled"], held_out["levels"]) + 0.1


def test_the_features_with_the_lowest_held_out_loss_are_taken(
    spec: TrialSpec, places: Dataset, dataset: Dataset, registry: Registry
) -> None:
    from tlauto.training.linear import Problem, cross_validate
    from tlauto.training.rows import Rows

    for data in (places, dataset):
        trial = prepare(spec, registry, data, torch.device("cpu"))
        losses = {}
        for kind in ("pooled", "levels", "grid"):
            readout = trial.readout(kind)
            features = trial.source.features(["train"], kind)
            trial.initialise(readout, features)
            rows, targets = Rows(features, readout.norm, trial.device), torch.from_numpy(trial.train_targets)
            problem = Problem(rows, targets, trial.loss, trial.num_outputs)
            losses[kind] = cross_validate(problem, trial.source.folds(["train"], spec.seed)).loss
        fitted, _ = solve_head(trial)
        assert fitted.kind == min(losses, key=lambda kind: losses[kind])


def test_the_kept_model_answers_as_the_trial_did(
    spec: TrialSpec, run: Run, places: Dataset, registry: Registry
) -> None:
    done = run(spec, dataset=places)
    checkpoint = Path(spec.folder, done.checkpoint)
    classifier = restore(spec, registry, places, checkpoint, "cpu")
    assert classifier.kind == "grid"
    files = [Path(places.root, item.path) for item in places.part("val")]
    predictor = Predictor(classifier, classifier.source.input, find_task("multiclass"), places.classes)
    saved = np.load(Path(spec.folder, "predictions.npz"))
    np.testing.assert_allclose(predictor.predict_files(files), saved["predictions"], atol=1e-4)


def test_fine_tuning_starts_from_the_pooled_head_beside_it(
    spec: TrialSpec, run: Run, places: Dataset
) -> None:
    run(spec, dataset=places)
    start = Path(spec.folder, "start.safetensors")
    with safe_open(start, "pt") as file:
        assert file.metadata()["features"] == "pooled"
    pooled = run(
        replace(spec, params=params(solver="lbfgs", l2=1e-2), folder=f"{spec.folder}-pooled"), dataset=places
    )
    shapes = {n: t.shape for n, t in load_file(Path(f"{spec.folder}-pooled", pooled.checkpoint)).items()}
    assert {n: t.shape for n, t in load_file(start).items()} == shapes
    tuned = replace(
        spec, strategy="full", params={"optim.adamw.lr": 1e-4, "finetune.backbone_lr": 0.01},
        init_head=str(start), epochs=1, folder=f"{spec.folder}-tuned",
    )  # fmt: skip
    done = run(tuned, dataset=places)
    assert done.features == "pooled"
    scaling = load_file(Path(tuned.folder, done.checkpoint))["norm.mean"]
    assert torch.equal(scaling, load_file(start)["norm.mean"])


def test_a_head_on_pooled_features_leaves_one_checkpoint(spec: TrialSpec, run: Run) -> None:
    given = params(solver="lbfgs", l2=1e-2)
    run(replace(spec, params=given))
    assert not Path(spec.folder, "start.safetensors").exists()


@pytest.mark.parametrize("head", ["mlp", "cosine"])
def test_other_heads_read_the_features_they_are_told_to(
    head: str, spec: TrialSpec, run: Run, places: Dataset
) -> None:
    told = replace(spec, head=head, epochs=40, params=params(features="grid"))
    done = run(told, dataset=places)
    assert done.features == "grid"
    pooled = run(replace(told, params={}, folder=f"{spec.folder}-pooled"), dataset=places)
    assert pooled.features == "pooled"
    assert done.score > pooled.score


def test_a_head_on_flattened_maps_has_no_such_choice(spec: TrialSpec, run: Run) -> None:
    given = {"head.mlp.input": "flattened", "head.mlp.hidden": 32, "probe.features": "grid"}
    with pytest.raises(TrialError, match=r"nothing in this trial reads the parameter 'probe\.features'"):
        run(replace(spec, head="mlp", params=given))


def test_one_cached_array_serves_all_kinds(spec: TrialSpec, dataset: Dataset, registry: Registry) -> None:
    source = FeatureSource(spec, registry, dataset, torch.device("cpu"))
    widths = [source.features(["train"], kind).shape[1] for kind in ("pooled", "levels", "grid")]
    assert widths == sorted(set(widths))
    assert len(list(Path(spec.cache, "features").glob("*.npy"))) == 1
