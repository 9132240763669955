"""What changes where there are many images: some choose for all, and an epoch is a part of them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tlauto.contracts import Backbone, TrialDone, TrialSpec
from tlauto.data import Dataset
from tlauto.training import features, frozen, pretrained, solved
from tlauto.training.engines import Extractor
from tlauto.training.kept import forget
from tlauto.training.linear import CrossValidated, Problem
from tlauto.training.model import Readout
from tlauto.training.trial import Trial

Run = Callable[..., TrialDone]
Chosen = list[tuple[int, CrossValidated]]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """From 17 images on, 12 of the dataset's 24 choose; what each kind of features found, with its rows."""
    found: Chosen = []
    real = solved.cross_validate

    def noted(problem: Problem, folds: torch.Tensor) -> CrossValidated:
        one = real(problem, folds)
        found.append((len(problem.features), one))
        return one

    monkeypatch.setattr(solved, "cross_validate", noted)
    monkeypatch.setattr(solved, "MANY", 16)
    monkeypatch.setattr(solved, "SOME", 12)
    monkeypatch.setattr(solved, "PER_CLASS", 4)
    return found


def test_of_many_images_some_choose_and_all_are_learned_from(
    chosen: Chosen, spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    spec = replace(spec, params={"loss.label_smoothing": 0.1})  # else the loss is nearly 0 with any penalty
    done = run(spec)
    assert [rows for rows, _ in chosen] == [12, 12, 12], "pooled, all stages, by quarters"
    assert all(len(found.outputs) == 12 for _, found in chosen)
    assert done.held_out is None
    assert "held_out" not in np.load(Path(spec.folder, "predictions.npz"))
    at, best = min(enumerate(found for _, found in chosen), key=lambda pair: pair[1].loss)
    # The same optimum as that of a trial that is given what they chose: on all 24 images.
    params = {
        "probe.solver": "lbfgs", "probe.l2": best.penalty * 12 / 24,
        "probe.features": ("pooled", "levels", "grid")[at], **spec.params,
    }  # fmt: skip
    given = run(replace(spec, params=params, folder=str(tmp_path / "given")))
    assert done.val_loss == pytest.approx(given.val_loss, rel=0.02)
    again = run(replace(spec, folder=str(tmp_path / "again")))
    assert again.val_loss == done.val_loss


def test_as_many_choose_as_there_are_classes_to_see(
    chosen: Chosen, spec: TrialSpec, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solved, "PER_CLASS", 6)
    run(spec)
    assert {rows for rows, _ in chosen} == {18}


def test_features_too_large_to_be_held_of_those_are_left_out(
    chosen: Chosen, spec: TrialSpec, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(spec)
    widths = [one.heads.shape[1] - 1 for _, one in chosen]
    assert widths == sorted(set(widths))
    chosen.clear()
    monkeypatch.setattr(solved, "LARGEST", 12 * widths[1])
    run(spec)
    assert [one.heads.shape[1] - 1 for _, one in chosen] == widths[:2]


def test_few_images_all_choose(
    chosen: Chosen, spec: TrialSpec, run: Run, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solved, "MANY", len(dataset.part("train")))
    assert run(spec).held_out is not None
    assert {rows for rows, _ in chosen} == {24}


@pytest.mark.parametrize(("images", "steps"), [(None, 2), (16, 1), (64, 2)])
def test_an_epoch_of_a_frozen_trial_may_be_a_part_of_the_images(
    images: int | None, steps: int, spec: TrialSpec, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    real = frozen.set_rates

    def noted(*given: Any) -> None:
        taken.append(given[1])
        real(*given)

    monkeypatch.setattr(frozen, "set_rates", noted)
    done = run(replace(spec, head="mlp", epochs=4, epoch_images=images, params={"probe.batch_size": 16}))
    assert done.epochs == 4
    assert taken == list(range(4 * steps))
    assert math.isfinite(done.val_loss)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_what_computes_features_is_gone_before_a_head_is_learned(
    head: str, spec: TrialSpec, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many images the two would take more memory together than either, but for a small backbone."""
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    held: list[int] = []
    started, load, readout = Extractor.__init__, features.frozen_backbone, Trial.readout

    def starting(self: Extractor, *given: Any, **named: Any) -> None:
        started(self, *given, **named)
        alive.update((self, self.backbone))
        held.append(len(alive))

    def loading(*given: Any) -> Backbone:
        found = load(*given)
        alive.add(found)
        return found

    def learning(*given: Any) -> Readout:
        held.append(len(alive))
        return readout(*given)

    monkeypatch.setattr(Extractor, "__init__", starting)
    monkeypatch.setattr(features, "frozen_backbone", loading)
    monkeypatch.setattr(pretrained, "SMALL", 0)
    forget()
    monkeypatch.setattr(Trial, "readout", learning)
    run(replace(spec, head=head))
    assert held[0] == 2, "one engine for all parts, with its backbone"
    assert held[1:] and not any(held[1:])
