"""What a worker keeps between trials changes nothing but the time they take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tlauto.caches import entries, is_in_use
from tlauto.contracts import TrialDone, TrialSpec
from tlauto.training import kept as keeper
from tlauto.training.kept import LIMIT, forget, kept
from tlauto.training.seeding import seed_everything
from tlauto.training.threads import SMALL, threads_for

Run = Callable[..., TrialDone]

POINTS: Mapping[str, dict[str, Any]] = {
    "weak": {"probe.solver": "lbfgs", "probe.l2": 1e-4},
    "strong": {"probe.solver": "lbfgs", "probe.l2": 1.0, "loss.label_smoothing": 0.1},
    "levels": {"probe.solver": "lbfgs", "probe.features": "levels"},
    "grid": {"probe.solver": "lbfgs", "probe.features": "grid"},
    "mirrored": {"probe.solver": "lbfgs", "probe.mirror": True},
    "path": {"probe.solver": "path"},
    "minibatch": {"probe.solver": "minibatch"},
}


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.parametrize("order", [1, -1], ids=["in order", "in reverse"])
def test_a_trial_is_to_the_bit_what_it_is_alone(
    run: Run, spec: TrialSpec, tmp_path: Path, order: int
) -> None:
    def result(name: str, folder: str) -> tuple[object, ...]:
        where = tmp_path / folder / name
        done = run(replace(spec, params=POINTS[name], folder=str(where)))
        tensors = load_file(where / "checkpoint.safetensors")  # the order of its header is random
        numbers = {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}
        return replace(done, seconds=0.0), numbers, (where / "predictions.npz").read_bytes()

    names = list(POINTS)[::order]
    together = {name: result(name, "together") for name in names}
    for name in names:
        forget()
        assert result(name, "alone") == together[name]


def test_refits_and_trials_keep_their_own(run: Run, spec: TrialSpec, tmp_path: Path) -> None:
    def score(*, refits: bool, folder: str) -> float:
        more: dict[str, Any] = {"fit_on": ("train", "val"), "evaluate_on": "test"} if refits else {}
        params = POINTS["weak"]
        return run(replace(spec, params=params, folder=str(tmp_path / folder), **more)).val_loss

    alone = []
    for refits in (False, True):
        forget()
        alone.append(score(refits=refits, folder=f"alone{refits}"))
    forget()
    assert [score(refits=refits, folder=f"after{refits}") for refits in (False, True)] == alone
    assert alone[0] != alone[1]


def test_a_second_trial_measures_nothing_again(run: Run, spec: TrialSpec) -> None:
    run(replace(spec, params=POINTS["weak"]))
    before = {key: id(made) for key, (made, _) in keeper._all.items()}
    run(replace(spec, params=POINTS["strong"]))
    assert before and before == {key: id(made) for key, (made, _) in keeper._all.items()}


def test_what_is_kept_holds_on_to_no_file_of_the_cache(run: Run, spec: TrialSpec) -> None:
    run(replace(spec, params=POINTS["levels"]))
    gc.collect()
    assert keeper._all
    assert not any(is_in_use(entry) for entry in entries(Path(spec.cache)))


def test_what_was_used_longest_ago_is_dropped() -> None:
    made: list[str] = []

    def get(key: str | None, size: int | None = LIMIT // 2) -> None:
        def make() -> str:
            made.append(str(key))
            return str(key)

        kept(key, make, lambda _: size)

    for key in ("a", "b", "a", "c", "a", "b"):
        get(key)
    assert made == ["a", "b", "c", "b"]
    for key, size in ((None, 1), ("too large", LIMIT + 1), ("must not be", None)):
        made.clear()
        get(key, size)
        get(key, size)
        assert len(made) == 2


def test_one_thread_does_what_is_small() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="inside"), threads_for(SMALL):
            assert torch.get_num_threads() == 1
            raise ValueError("inside")
        assert torch.get_num_threads() == 2
        with threads_for(SMALL + 1):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_seeds_are_torchs_own_and_are_not_collected() -> None:
    torch.manual_seed(3)
    wanted, waiting = torch.rand(4), len(torch.cuda._queued_calls)
    seed_everything(3)
    assert torch.equal(torch.rand(4), wanted)
    if not torch.cuda.is_available():
        assert len(torch.cuda._queued_calls) == waiting
