"""Gradients added up over parts of a batch are those of the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tlauto.contracts import TrialDone, TrialSpec
from tlauto.errors import DeviceLost, OutOfMemory
from tlauto.rungs import STATE_FILE
from tlauto.training.breakdowns import asked_bytes, breakdowns
from tlauto.training.finetune import parts_of

Run = Callable[..., TrialDone]

STEP = {
    "finetune.batch_size": 8, "optim.name": "sgd", "optim.sgd.lr": 0.3, "optim.sgd.momentum": 0.9,
    "finetune.backbone_lr": 1.0, "finetune.train_mode": True, "loss.class_weights": "balanced",
    "loss.label_smoothing": 0.1,
}  # fmt: skip


def weights(spec: TrialSpec, folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.folder).parent / folder / "checkpoint.safetensors")


@pytest.fixture
def one_step(spec: TrialSpec, run: Run) -> Callable[..., TrialDone]:
    """One step of eight images through a network without BatchNorm: `one_step("name", micro_batch=3)`."""

    def one_step(name: str, *, micro_batch: int | None, level: str = "light") -> TrialDone:
        params = {**STEP, "augment.level": level}
        told = replace(
            spec, backbone="timm:test_vit", strategy="full", params=params, epochs=1, epoch_images=8,
            folder=str(Path(spec.folder).parent / name), micro_batch=micro_batch,
        )  # fmt: skip
        return run(told)

    return one_step


@pytest.mark.parametrize("level", ["light", "strong"])  # strong mixes images, which needs the whole batch
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_a_step_in_parts_is_the_step_of_the_batch(
    level: str, micro_batch: int, one_step: Callable[..., TrialDone], spec: TrialSpec
) -> None:
    whole = one_step("whole", micro_batch=None, level=level)
    parts = one_step("parts", micro_batch=micro_batch, level=level)
    expected, found = weights(spec, "whole"), weights(spec, "parts")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    assert parts.val_loss == pytest.approx(whole.val_loss, abs=1e-5)


def test_a_step_moves_the_weights_by_much_more_than_the_parts_differ(
    one_step: Callable[..., TrialDone], spec: TrialSpec
) -> None:
    one_step("whole", micro_batch=None)
    one_step("fewer", micro_batch=None, level="none")
    one, other = weights(spec, "whole"), weights(spec, "fewer")
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-3


def test_a_step_in_parts_is_the_same_every_time(one_step: Callable[..., TrialDone], spec: TrialSpec) -> None:
    one_step("once", micro_batch=3)
    one_step("again", micro_batch=3)
    once, again = weights(spec, "once"), weights(spec, "again")
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_a_trial_goes_on_in_parts_from_the_state_that_it_left_as_a_whole(
    spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    recipe = replace(spec, strategy="full", epochs=3)
    run(recipe, lambda result: result.epoch < 2)
    heard = []
    told = replace(
        recipe, folder=str(tmp_path / "second"), micro_batch=4, resume_from=str(Path(spec.folder, STATE_FILE))
    )
    done = run(told, lambda result: heard.append(result.epoch) or True)
    assert (heard, done.epochs) == ([3], 3)


@pytest.mark.parametrize("strategy", ["feature_extraction", "partial"])
def test_cached_features_and_activations_are_those_of_larger_batches(
    strategy: str, spec: TrialSpec, run: Run, tmp_path: Path
) -> None:
    params = {} if strategy == "feature_extraction" else {"optim.name": "sgd"}
    recipe = replace(spec, strategy=strategy, params=params)
    whole = run(recipe)
    parts = run(replace(recipe, micro_batch=5, cache=str(tmp_path / "other"), folder=str(tmp_path / "parts")))
    assert parts.val_loss == pytest.approx(whole.val_loss, abs=1e-4)


@pytest.mark.parametrize(
    ("count", "most", "sizes"),
    [(16, None, [16]), (16, 8, [8, 8]), (10, 4, [3, 3, 4]), (3, 8, [3]), (3, 1, [1, 1, 1])],
)
def test_parts_cover_the_batch_and_are_alike(count: int, most: int | None, sizes: list[int]) -> None:
    parts = parts_of(count, most)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))


# --- what torch's errors mean -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1024 bytes.", 1024),
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of", 2.5 * 2**30),
        ("Unable to allocate 20.0 MiB for an array with shape (5,)", 20 * 2**20),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
        ("CUDA error: out of memory", None),
    ],
)
def test_a_full_memory_says_what_was_asked_for(text: str, size: float | None) -> None:
    with pytest.raises(OutOfMemory) as failure, breakdowns("here"):
        raise (MemoryError if text.startswith("Unable") else RuntimeError)(text)  # NumPy's, torch's
    assert failure.value.bytes == asked_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: unspecified launch failure\nCUDA kernel errors might be reported asynchronously",
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
        "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    ],
)
def test_a_lost_device_is_recognised(text: str) -> None:
    with pytest.raises(DeviceLost) as failure, breakdowns("on cuda"):
        raise RuntimeError(text)
    assert str(failure.value) == f"the device was lost on cuda: {text.splitlines()[0]}"


@pytest.mark.parametrize("text", ["size mismatch", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"])
def test_other_errors_stay_what_they_are(text: str) -> None:
    with pytest.raises(RuntimeError, match=text), breakdowns("here"):
        raise RuntimeError(text)
