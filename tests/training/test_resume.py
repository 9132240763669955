"""A fine-tuning that is stopped goes on from its state as if it had never been."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tlauto.contracts import EpochResult, Stages, TrainPlan, TrialDone, TrialSpec
from tlauto.plugins import Registry
from tlauto.rungs import STATE_FILE

Run = Callable[..., TrialDone]

RECIPES = {
    "full, AdamW, dropout, strong augmentation": {
        "strategy": "full",
        "head": "mlp",
        "params": {
            "optim.name": "adamw", "head.mlp.dropout": 0.5, "augment.level": "strong",
            "finetune.train_mode": True,
        },
    },
    "partial, SGD": {"strategy": "partial", "params": {"optim.name": "sgd", "augment.level": "light"}},
    "gradual": {"strategy": "gradual", "params": {"optim.name": "adam"}},
}  # fmt: skip


def stop_after(epoch: int) -> Callable[[EpochResult], bool]:
    return lambda result: result.epoch < epoch


class Gradual:
    """One stage more in every epoch, from the top: what learns grows while it is stopped."""

    name = "gradual"
    space: ClassVar[dict[str, Any]] = {}

    def plan(self, stages: Stages, epoch: int, params: Mapping[str, Any]) -> TrainPlan:
        return TrainPlan([name for stage in stages[len(stages) - 1 - epoch :] for name in stage])


@pytest.mark.parametrize("name", RECIPES)
def test_what_goes_on_ends_bit_for_bit_like_what_was_not_stopped(
    name: str, spec: TrialSpec, run: Run, offering: Callable[..., Registry], tmp_path: Path
) -> None:
    registry = offering("freeze_strategies", Gradual())
    recipe = replace(spec, epochs=5, epoch_images=16, **RECIPES[name])
    whole = run(replace(recipe, folder=str(tmp_path / "whole")), registry=registry)
    assert not (tmp_path / "whole" / STATE_FILE).exists()
    first = run(replace(recipe, folder=str(tmp_path / "first")), stop_after(2), registry=registry)
    assert (first.is_pruned, first.epochs) == (True, 2)
    second = replace(
        recipe, number=8, folder=str(tmp_path / "second"), resume_from=str(tmp_path / "first" / STATE_FILE)
    )
    heard: list[EpochResult] = []
    found = run(second, lambda result: heard.append(result) or result.epoch < 3, registry=registry)
    assert [result.epoch for result in heard] == [3]
    third = replace(
        recipe, number=9, folder=str(tmp_path / "third"), resume_from=str(tmp_path / "second" / STATE_FILE)
    )
    found = run(third, registry=registry)
    assert (found.score, found.val_loss, found.epochs, found.best_epoch, found.trainable) == (
        whole.score, whole.val_loss, whole.epochs, whole.best_epoch, whole.trainable,
    )  # fmt: skip
    mine, other = (load_file(tmp_path / f / "checkpoint.safetensors") for f in ("third", "whole"))
    assert set(mine) == set(other)
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    answers = [np.load(tmp_path / f / "predictions.npz")["predictions"] for f in ("third", "whole")]
    assert np.array_equal(*answers)


@pytest.mark.parametrize("damage", ["another trial", "cut off", "gone"])
def test_a_state_that_does_not_fit_is_not_used(
    damage: str, spec: TrialSpec, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = replace(spec, strategy="full")
    run(replace(recipe, seed=1 if damage == "another trial" else recipe.seed), stop_after(1))
    state = Path(recipe.folder, STATE_FILE)
    if damage == "cut off":
        state.write_bytes(state.read_bytes()[:-100])
    if damage == "gone":
        state.unlink()
    whole = run(replace(recipe, folder=str(tmp_path / "whole")))
    found = run(replace(recipe, folder=str(tmp_path / "second"), resume_from=str(state)))
    assert (found.score, found.val_loss) == (whole.score, whole.val_loss)
    assert ("starts from the beginning" in caplog.text) == (damage != "gone")


def test_a_state_that_cannot_be_written_costs_only_the_place_to_go_on(
    spec: TrialSpec, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    Path(spec.folder, STATE_FILE).mkdir(parents=True)  # it cannot be replaced by a file
    done = run(replace(spec, strategy="full"), stop_after(1))
    assert (done.is_pruned, done.epochs) == (True, 1)
    assert "the state of trial 7 could not be written" in caplog.text
    assert [file.name for file in Path(spec.folder).iterdir() if "part" in file.name] == []


def test_only_what_changed_is_in_the_state(spec: TrialSpec, run: Run) -> None:
    run(replace(spec, strategy="partial", params={"freeze.partial.k": 1}), stop_after(1))
    state = load_file(Path(spec.folder, STATE_FILE))
    assert any(name.startswith("model/backbone.layer4") for name in state)
    assert not any(name.startswith("model/backbone.layer1") for name in state)
    assert any(name.startswith("optimizer/head") and name.endswith("/exp_avg") for name in state)


def test_a_state_cannot_be_of_another_shape(spec: TrialSpec, run: Run, tmp_path: Path) -> None:
    """Whoever edits a state by hand gets a failed trial, not a wrong one."""
    run(replace(spec, strategy="full"), stop_after(1))
    state = Path(spec.folder, STATE_FILE)
    with safe_open(state, "pt") as file:
        about = file.metadata()
    tensors = load_file(state)
    save_file({**tensors, "model/norm.mean": torch.zeros(3)}, state, about)
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(replace(spec, strategy="full", folder=str(tmp_path / "other"), resume_from=str(state)))
