"""What a trained head answers for images that it has not seen is what its refit would answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tlauto.contracts import TrialDone, TrialSpec
from tlauto.recipe import PROBE_EPOCHS, REFIT_PROBE_EPOCHS
from tlauto.results.finish import refit_spec
from tlauto.training import frozen
from tlauto.training.linear import FOLDS

Run = Callable[..., TrialDone]


def test_a_trained_head_is_cross_validated_as_it_will_be_refitted(
    run: Run, spec: TrialSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is best early, a refit's squeezed schedule comes to rates that the trial never saw."""
    taken: list[tuple[int, int]] = []
    real = frozen.set_rates

    def noted(optimizer: Any, step: int, total: int, warmup: float) -> None:
        taken.append((step, total))
        real(optimizer, step, total, warmup)

    monkeypatch.setattr(frozen, "set_rates", noted)
    params = {"probe.batch_size": 256, "optim.warmup": 0.3, "optim.name": "sgd", "optim.sgd.lr": 0.3}
    spec = replace(spec, head="mlp", params=params, epochs=PROBE_EPOCHS, patience=4, prove_above=0.0)
    done = run(spec)
    assert done.best_epoch < REFIT_PROBE_EPOCHS
    in_trial, in_folds = taken[: done.epochs], taken[done.epochs :]
    assert in_trial == [(step, PROBE_EPOCHS) for step in range(done.epochs)]

    taken.clear()
    again = refit_spec(spec, done, number=-1, folder=tmp_path / "refit", growth=1.0)
    run(again)
    assert taken and in_folds == taken * FOLDS
