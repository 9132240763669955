"""Whole trials on small images with timm's own tiny test models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tlauto import metrics
from tlauto.builtin.tasks import task
from tlauto.contracts import EpochResult, TrainPlan, TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import TrialError
from tlauto.plugins import Registry
from tlauto.space import Float
from tlauto.training.model import Standardise, restore
from tlauto.training.predictor import Predictor
from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

FROZEN, TRAINED = "feature_extraction", ("partial", "full")
POOLED = {"probe.solver": "lbfgs", "probe.l2": 1e-2}  # a head that fine-tuning can go on with
Run = Callable[..., TrialDone]
Offering = Callable[..., Registry]


def state_of(spec: TrialSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.folder, "checkpoint.safetensors"))


# --- what every trial gives -------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FROZEN, *TRAINED])
@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:test_vit", "timm:test_efficientnet"])
def test_a_trial_leaves_metrics_predictions_and_a_checkpoint_that_restores(
    strategy: str, backbone: str, spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset
) -> None:
    params = {"probe.solver": "minibatch"} if strategy == FROZEN else {}
    spec = replace(spec, strategy=strategy, backbone=backbone, params=params)
    done = run(spec)
    assert done.number == 7
    assert 1 <= done.best_epoch <= done.epochs == 3
    assert not done.is_pruned
    assert done.score == done.metrics["accuracy"]["value"]
    assert done.metrics["accuracy"]["low"] <= done.score <= done.metrics["accuracy"]["high"]
    assert done.provenance.keys() == {"backbone", "strategy", "head"}
    assert done.versions["torch"] == torch.__version__
    saved = np.load(Path(spec.folder, "predictions.npz"))
    assert saved["paths"].tolist() == [item.path for item in dataset.part("val")]
    assert metrics.score("accuracy", saved["targets"], saved["predictions"]) == done.score
    classifier = restore(spec, registry, dataset, Path(spec.folder, done.checkpoint), "cpu")
    predictor = Predictor(classifier, classifier.source.input, task("multiclass"), dataset.classes)
    again = predictor.predict_files([dataset.file(item) for item in dataset.part("val")])
    assert np.allclose(again, saved["predictions"], atol=1e-5), "training and serving must agree"


def test_a_head_learns_from_cached_features(spec: TrialSpec, run: Run) -> None:
    done = run(replace(spec, epochs=40))
    assert done.score >= 0.8, "three colours are easy even for random features"


@pytest.mark.parametrize("strategy", [FROZEN, "full"])
def test_the_same_trial_gives_the_same_result_twice(strategy: str, spec: TrialSpec, run: Run) -> None:
    params = {"augment.level": "strong", "head.mlp.dropout": 0.5} if strategy == "full" else {}
    spec = replace(spec, strategy=strategy, head="mlp" if params else "linear", params=params, epochs=2)
    first = run(spec)
    state = state_of(spec)
    torch.rand(7)  # the state that a trial finds must not matter
    second = run(replace(spec, cache=spec.cache + "2"))
    assert (first.score, first.val_loss) == (second.score, second.val_loss)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(spec).items())


def test_another_seed_gives_another_head_on_the_same_features(spec: TrialSpec, run: Run) -> None:
    spec = replace(spec, head="mlp", params={"head.mlp.hidden": 32})
    run(spec)
    first = state_of(spec)
    run(replace(spec, seed=1))
    second = state_of(spec)
    assert not torch.equal(first["head.0.weight"], second["head.0.weight"])
    assert torch.equal(first["norm.mean"], second["norm.mean"])
    assert len(list(Path(spec.cache, "features").glob("*.npy"))) == 2, "one file a part, used by both seeds"


def test_large_features_are_scaled_by_the_batch_and_give_the_same_rows() -> None:
    features, device = torch.randn(20, 6, 2, 2), torch.device("cpu")
    norm = Standardise(6)
    norm.measure(features)
    stored = Stored((features[:9], features[9:]))
    whole, mapped = Rows(stored, norm, device), Rows(stored, norm, device, limit=0)
    assert whole.whole is not None and mapped.whole is None
    rows = torch.tensor([3, 19, 3])
    assert torch.equal(whole.take(rows), mapped.take(rows))
    everything = mapped.take(torch.arange(20))
    assert torch.allclose(everything.mean((0, 2, 3)), torch.zeros(6), atol=1e-6)
    assert torch.allclose(everything, norm(features), atol=1e-6)


# --- epochs, pruning, patience ----------------------------------------------------------------------


def test_fine_tuning_tells_of_each_epoch_and_stops_when_told(spec: TrialSpec, run: Run) -> None:
    told: list[EpochResult] = []

    def stop_at_two(result: EpochResult) -> bool:
        told.append(result)
        return result.epoch < 2

    done = run(replace(spec, strategy="partial", epochs=5), stop_at_two)
    assert [result.epoch for result in told] == [1, 2]
    assert done.is_pruned
    assert done.epochs == 2
    assert done.score == max(result.score for result in told)
    assert all(np.isfinite([r.train_loss, r.val_loss]).all() and r.seconds > 0 for r in told)


def test_a_frozen_trial_tells_of_its_last_epoch_only_and_is_not_pruned(spec: TrialSpec, run: Run) -> None:
    told: list[EpochResult] = []
    done = run(replace(spec, head="mlp"), lambda result: bool(told.append(result)))
    assert [result.epoch for result in told] == [3]
    assert not done.is_pruned


@pytest.mark.parametrize("strategy", [FROZEN, "partial"])
def test_patience_stops_a_trial_that_no_longer_improves(strategy: str, spec: TrialSpec, run: Run) -> None:
    # At the lowest rate the features' random head hardly moves; at the highest it soon overfits.
    params = {"optim.adamw.lr": 3e-2}
    if strategy == FROZEN:
        params |= {"probe.solver": "minibatch"}
    done = run(
        replace(spec, strategy=strategy, epochs=60 if strategy == FROZEN else 12, patience=1, params=params)
    )
    assert done.epochs < (60 if strategy == FROZEN else 12)
    assert done.best_epoch <= done.epochs


def test_an_epoch_may_be_a_part_of_the_training_images(spec: TrialSpec, run: Run, offering: Offering) -> None:
    steps: list[int] = []

    class Counting:
        name = "counting"
        space: dict[str, Float] = {}

        def plan(self, stages: Any, epoch: int, params: Any) -> TrainPlan:
            steps.append(epoch)
            return TrainPlan(trainable=stages[-1])

    spec = replace(spec, strategy="counting", epochs=4, epoch_images=16, params={"finetune.batch_size": 16})
    done = run(spec, registry=offering("freeze_strategies", Counting()))
    assert steps == [0, 1, 2, 3]
    assert done.epochs == 4


# --- what learns ------------------------------------------------------------------------------------


def test_a_frozen_trial_keeps_only_what_follows_the_backbone(spec: TrialSpec, run: Run) -> None:
    done = run(spec)
    state = state_of(spec)
    assert {name.partition(".")[0] for name in state} == {"norm", "head", "output"}
    assert done.trainable == sum(t.numel() for n, t in state.items() if n.startswith("head."))


def test_only_what_the_strategy_lets_learn_is_in_the_checkpoint(
    spec: TrialSpec, run: Run, registry: Registry
) -> None:
    spec = replace(spec, strategy="partial", params={"freeze.partial.k": 1, "finetune.train_mode": True})
    run(spec)
    backbone = registry.provider("timm").load(spec.backbone, spec.weights)
    kept = {n.removeprefix("backbone.") for n in state_of(spec) if n.startswith("backbone.")}
    assert kept & set(backbone.stages[-1])
    assert not kept & {name for stage in backbone.stages[:-1] for name in stage}
    units = {name.rpartition(".")[0] for name in backbone.stages[-1]}
    moved = {name for name in kept if "running" in name or "batches" in name}
    assert moved, "BatchNorm that learns moves its statistics"
    assert {name.rpartition(".")[0] for name in moved} <= units, "frozen BatchNorm must not move"


def test_statistics_stay_as_pretrained_unless_the_trial_asks_for_training_mode(
    spec: TrialSpec, run: Run
) -> None:
    def moved(**params: Any) -> set[str]:
        run(replace(spec, strategy="full", params=params))
        return {name for name in state_of(spec) if "running" in name}

    assert not moved()
    assert moved(**{"finetune.train_mode": True})
    assert any(name.startswith("backbone.") for name in state_of(spec))


def test_fine_tuning_from_a_probe_starts_where_the_probe_ended(
    spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    probe = replace(spec, params=POOLED, folder=str(tmp_path / "probe"))
    before = run(probe)
    first: list[EpochResult] = []
    init = str(tmp_path / "probe" / "checkpoint.safetensors")
    run(
        replace(spec, strategy="full", epochs=1, init_head=init, params={"finetune.backbone_lr": 0.01}),
        lambda result: first.append(result) is None,
    )
    assert first[0].val_loss < 2 * before.val_loss + 0.1


def test_no_channel_is_enlarged_beyond_the_average_one() -> None:
    features = torch.randn(200, 4) * torch.tensor([1e-6, 0.5, 1.0, 2.5])
    scale = Standardise(4)
    scale.measure(features)
    out = scale(features).std(dim=0)
    assert out[0] < 1e-5
    assert out[3] == pytest.approx(1.0, abs=0.01)


class Thaw:
    """The head alone for one epoch, then one more stage each epoch."""

    name = "thaw"
    space = {"rate": Float(0.1, 1.0, default=1.0)}

    def plan(self, stages: Any, epoch: int, params: Any) -> TrainPlan:
        learning = stages[len(stages) - epoch :] if epoch else ()
        return TrainPlan([n for stage in learning for n in stage], [params["rate"]] * len(stages))


def test_a_plan_may_change_from_epoch_to_epoch(spec: TrialSpec, run: Run, offering: Offering) -> None:
    spec = replace(spec, strategy="thaw", params={"freeze.thaw.rate": 0.5})
    thawing = offering("freeze_strategies", Thaw())
    trainable = [run(replace(spec, epochs=epochs), registry=thawing).trainable for epochs in (1, 2, 3)]
    assert trainable[0] < trainable[1] < trainable[2]
    assert run(spec, registry=thawing).provenance["strategy"] == "tlauto-test 1.0"


def test_a_fine_tuned_head_starts_from_a_probe(spec: TrialSpec, run: Run, tmp_path: Path) -> None:
    probe = replace(spec, params=POOLED, folder=str(tmp_path / "probe"))
    probed = run(probe)
    started = replace(
        spec, strategy="partial", epochs=1, init_head=str(tmp_path / "probe/checkpoint.safetensors"),
        params={"optim.adamw.lr": 1e-4, "finetune.backbone_lr": 0.01, "augment.level": "none"},
    )  # fmt: skip
    done = run(started)
    assert abs(done.val_loss - probed.val_loss) < 0.2
    assert torch.equal(state_of(started)["norm.std"], state_of(probe)["norm.std"])
    cold = run(replace(started, init_head=None))
    assert cold.val_loss > done.val_loss


def test_a_probe_with_another_head_gives_only_its_feature_scaling(
    spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    probe = replace(spec, params=POOLED, folder=str(tmp_path / "probe"))
    run(probe)
    done = run(replace(spec, head="mlp", init_head=str(tmp_path / "probe/checkpoint.safetensors")))
    assert done.epochs == 3
    assert torch.equal(state_of(spec)["norm.mean"], state_of(probe)["norm.mean"])


def test_a_probe_on_other_features_gives_nothing(spec: TrialSpec, run: Run, tmp_path: Path) -> None:
    run(replace(spec, folder=str(tmp_path / "probe")))
    flattened = replace(spec, head="mlp", params={"head.mlp.input": "flattened", "head.mlp.hidden": 32})
    run(flattened)
    alone = state_of(flattened)
    run(replace(flattened, init_head=str(tmp_path / "probe/checkpoint.safetensors")))
    assert torch.equal(state_of(flattened)["norm.std"], alone["norm.std"])


def test_a_head_of_another_backbone_is_refused(spec: TrialSpec, run: Run, tmp_path: Path) -> None:
    run(replace(spec, folder=str(tmp_path / "probe")))
    other = replace(spec, backbone="timm:test_vit", init_head=str(tmp_path / "probe/checkpoint.safetensors"))
    with pytest.raises(TrialError, match="is of timm:test_resnet, not of timm:test_vit"):
        run(other)


# --- the test part ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", [FROZEN, "partial"])
def test_a_refit_looks_at_the_test_part_once_after_its_last_epoch(
    strategy: str, spec: TrialSpec, run: Run, dataset: Dataset
) -> None:
    told: list[EpochResult] = []
    refit = replace(
        spec,
        number=-1,
        strategy=strategy,
        head="mlp",
        fit_on=("train", "val"),
        evaluate_on="test",
        purpose="refit",
    )
    done = run(refit, lambda result: bool(told.append(result)) or True)
    assert [result.epoch for result in told] == [3]
    assert done.best_epoch == done.epochs == 3
    saved = np.load(Path(spec.folder, "predictions.npz"))
    assert saved["paths"].tolist() == [item.path for item in dataset.part("test")]


@pytest.mark.parametrize("strategy", [FROZEN, "partial"])
def test_a_trial_never_opens_an_image_of_the_test_part(
    strategy: str, spec: TrialSpec, run: Run, dataset: Dataset
) -> None:
    for item in dataset.part("test"):
        dataset.file(item).unlink()
    assert run(replace(spec, strategy=strategy, epochs=1)).epochs == 1


def test_a_part_cannot_serve_for_training_and_evaluation(spec: TrialSpec, run: Run) -> None:
    with pytest.raises(TrialError, match="'val' cannot serve"):
        run(replace(spec, fit_on=("train", "val")))
