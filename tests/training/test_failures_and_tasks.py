"""Other tasks, heads and optimizers, and how trials fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tlauto.builtin.tasks import task
from tlauto.contracts import TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import DataError, Diverged, OutOfMemory, TrialError
from tlauto.plugins import Registry
from tlauto.training.breakdowns import breakdowns
from tlauto.training.model import restore
from tlauto.training.predictor import Predictor

FROZEN = "feature_extraction"
Run = Callable[..., TrialDone]
Relabel = Callable[..., Dataset]


# --- other tasks and heads --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FROZEN, "partial"])
def test_several_labels_an_image(strategy: str, spec: TrialSpec, run: Run, relabel: Relabel) -> None:
    labelled = relabel("multilabel", lambda i: ((), (0,), (0, 1))[i.target], ("warm", "dark"))
    params = {"augment.level": "strong", "loss.pos_weight": "balanced"} if strategy != FROZEN else {}
    spec = replace(spec, task="multilabel", metric="map", strategy=strategy, params=params)
    done = run(spec, dataset=labelled)
    assert np.load(Path(spec.folder, "predictions.npz"))["predictions"].shape == (9, 2)
    assert done.score == done.metrics["map"]["value"]


@pytest.mark.parametrize("strategy", [FROZEN, "partial"])
def test_regression_answers_in_the_targets_own_unit(
    strategy: str, spec: TrialSpec, run: Run, relabel: Relabel
) -> None:
    weights = (950.0, 1000.0, 1010.0)
    weighed = relabel("regression", lambda i: weights[i.target] + len(i.path) % 3)
    params = {"augment.level": "strong"} if strategy != FROZEN else {}
    spec = replace(spec, task="regression", metric="rmse", strategy=strategy, params=params, epochs=12)
    done = run(spec, dataset=weighed)
    assert done.score == -done.metrics["rmse"]["value"]
    assert done.metrics["rmse"]["value"] < 40, "guessing 0 would be off by 1,000"


@pytest.mark.parametrize(
    ("head", "params"),
    [
        ("cosine", {}),
        ("mlp", {"head.mlp.hidden": 32, "head.mlp.layers": 2}),
        ("mlp", {"head.mlp.hidden": 32, "head.mlp.input": "flattened"}),
    ],
)
@pytest.mark.parametrize("strategy", [FROZEN, "partial"])
def test_every_kind_of_head_trains(
    strategy: str, head: str, params: dict[str, Any], spec: TrialSpec, run: Run
) -> None:
    done = run(replace(spec, strategy=strategy, head=head, params=params, epochs=2))
    assert np.isfinite(done.val_loss)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_optimizer_trains(optimizer: str, spec: TrialSpec, run: Run) -> None:
    done = run(replace(spec, strategy="full", params={"optim.name": optimizer}, epochs=2))
    assert np.isfinite(done.val_loss)


def test_training_images_fewer_than_a_batch_are_enough(spec: TrialSpec, run: Run, dataset: Dataset) -> None:
    few = replace(dataset, items=tuple(i for i in dataset.items if i.split != "train" or "000" in i.path))
    done = run(replace(spec, strategy="full", params={"finetune.batch_size": 32}), dataset=few)
    assert done.epochs == 3


# --- failures ---------------------------------------------------------------------------------------


def test_an_unread_parameter_fails_the_trial_before_any_work(spec: TrialSpec, run: Run) -> None:
    with pytest.raises(TrialError, match=r"augment\.level"):
        run(replace(spec, params={"augment.level": "light"}))
    assert not Path(spec.cache).exists()


def test_a_head_that_cannot_do_the_task_fails_the_trial(spec: TrialSpec, run: Run, relabel: Relabel) -> None:
    weighed = relabel("regression", lambda i: float(i.target))
    with pytest.raises(TrialError, match="head 'cosine' cannot do regression"):
        run(replace(spec, task="regression", metric="rmse", head="cosine"), dataset=weighed)


class Exploding:
    """A head whose weight is infinite after the first step."""

    name = "exploding"
    tasks = ("multiclass",)
    space: dict[str, Any] = {}

    def features(self, params: Any) -> str:
        return "pooled"

    def build(self, shape: Any, num_outputs: int, params: Any) -> torch.nn.Module:
        head = torch.nn.Linear(shape.pooled, num_outputs)
        head.weight.register_hook(lambda gradient: gradient * float("nan"))
        return head


@pytest.mark.parametrize("strategy", [FROZEN, "full"])
def test_a_loss_that_is_not_finite_is_a_diverged_trial(
    strategy: str, spec: TrialSpec, run: Run, offering: Callable[..., Registry]
) -> None:
    exploding = offering("task_heads", Exploding())
    with pytest.raises(Diverged, match="loss became nan in epoch 1") as failure:
        run(replace(spec, head="exploding", strategy=strategy), registry=exploding)
    assert failure.value.epoch == 1


def test_an_image_that_vanished_is_named(spec: TrialSpec, run: Run, dataset: Dataset) -> None:
    gone = dataset.part("train")[3]
    dataset.file(gone).unlink()
    with pytest.raises(DataError, match=Path(gone.path).name):
        run(spec)


def test_a_full_memory_is_an_out_of_memory_trial() -> None:
    with (
        pytest.raises(OutOfMemory, match="on cpu with batches of 64") as failure,
        breakdowns("on cpu with batches of 64 images"),
    ):
        torch.empty(2**50)  # the allocator itself refuses: 4 PiB
    assert failure.value.bytes == 4 * 2**50
    with pytest.raises(OutOfMemory), breakdowns("here"):
        np.empty(2**55)
    with pytest.raises(OutOfMemory), breakdowns("here"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="size mismatch"), breakdowns("here"):
        raise RuntimeError("size mismatch")


def test_a_damaged_or_foreign_checkpoint_is_refused(
    spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset, tmp_path: Path
) -> None:
    run(replace(spec, params={"probe.solver": "lbfgs"}))
    checkpoint = Path(spec.folder, "checkpoint.safetensors")
    with safe_open(checkpoint, "pt") as file:
        assert file.metadata() == {"backbone": spec.backbone, "head": "linear", "features": "pooled"}
    with pytest.raises(TrialError, match="of another model"):
        restore(replace(spec, head="mlp"), registry, dataset, checkpoint, "cpu")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(TrialError, match="cannot read the checkpoint"):
        restore(spec, registry, dataset, checkpoint, "cpu")
    with pytest.raises(TrialError, match="cannot read the checkpoint"):
        restore(spec, registry, dataset, tmp_path / "nothing", "cpu")


def test_a_predictor_names_the_files_it_cannot_read(
    spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset, tmp_path: Path
) -> None:
    done = run(spec)
    classifier = restore(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    predictor = Predictor(classifier, classifier.source.input, task("multiclass"), dataset.classes)
    (tmp_path / "broken.jpg").write_bytes(b"broken")
    good = dataset.file(dataset.part("test")[0])
    with pytest.raises(DataError, match=r"broken\.jpg.*missing\.png"):
        predictor.predict_files([good, tmp_path / "broken.jpg", tmp_path / "missing.png"])
    with pytest.raises(DataError, match="no image to predict"):
        predictor.predict_files([])
    assert predictor.predict_files([good]).shape == (1, 3)
