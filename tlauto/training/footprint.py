"""How much memory a trial takes: at most so far, and in one step that is tried beforehand."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch

from tlauto.contracts import TrainPlan, TrialSpec
from tlauto.data import Dataset
from tlauto.errors import Diverged, OutOfMemory
from tlauto.memory import CONTEXT, capacity_bytes, held_bytes
from tlauto.plugins import Registry
from tlauto.training.batches import eval_batch
from tlauto.training.breakdowns import breakdowns
from tlauto.training.finetune import Run, answers, plans_of
from tlauto.training.model import Kind, assemble, features_of
from tlauto.training.seeding import seed_everything
from tlauto.training.trial import Trial, prepare


@dataclass(frozen=True)
class Tried:
    """A step that was tried: with so many images at once it took so many bytes.

    When it did not fit, `at_once` is None and `bytes` are those asked for last, None when nobody said.
    """

    at_once: int | None
    bytes: int | None


def begin(device: str) -> None:
    """Forget the peak so far. Raises: DeviceLost or OutOfMemory when there is no using the device."""
    if device.startswith("cuda"):
        with breakdowns(f"on {device}"):  # it may be the first that this process asks of the GPU
            torch.cuda.current_device()  # starts CUDA: there are no statistics before
            torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int | None:
    """Most bytes of a GPU that this process had since `begin`; on a CPU, what it holds now.

    Workers keep what a job freed until it is over (`devices.GLIBC_TUNABLES`), so that is about its peak.
    None where nobody tells.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_reserved(device) + CONTEXT
    return held_bytes() if device == "cpu" else None


def total_bytes(device: str) -> int | None:
    """Bytes of memory of a device, or that the processes of this search may have on a CPU."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return _capacity() if device == "cpu" else None


@cache
def _capacity() -> int | None:
    """Asked once: nobody changes a machine's memory between two trials, and they are short."""
    return capacity_bytes()


def try_step(
    spec: TrialSpec,
    registry: Registry,
    dataset: Dataset,
    *,
    device: str,
    at_once: int,
    most: int | None = None,
) -> Tried:
    """One step of a trial that trains the backbone, and a forward pass as for validation, on random images.

    With `at_once` images at once, or half as many until they fit. Nothing of it remains: the trial itself
    begins anew. Raises what a trial raises, but OutOfMemory.

    Args:
        most: bytes of a GPU that it may take, because others run there; then it is tried once.
    """
    with _limited(device, most):
        while True:
            asked = None
            try:
                begin(device)
                with breakdowns(f"in a trial step with {at_once} images at a time"):
                    _step(replace(spec, micro_batch=at_once), registry, dataset, torch.device(device))
                return Tried(at_once, peak_bytes(device))
            except OutOfMemory as error:
                asked = error.bytes
            if at_once == 1 or most is not None:
                return Tried(None, asked)
            at_once = -(-at_once // 2)
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _limited(device: str, most: int | None) -> Iterator[None]:
    """Let torch take at most so many bytes of a GPU within the block: those beside it are not to suffer."""
    total = total_bytes(device)
    if most is None or total is None or not device.startswith("cuda"):
        yield
        return
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, (most - CONTEXT) / total)))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def _step(spec: TrialSpec, registry: Registry, dataset: Dataset, device: torch.device) -> None:
    seed_everything(spec.seed)
    trial = prepare(spec, registry, dataset, device)
    classifier = assemble(trial.source.backbone, trial.head, trial.settings.head, trial.num_outputs)
    inputs = _RandomImages(trial)
    # An epoch of one step; of all epochs the one in which the most learns.
    short = replace(trial, spec=replace(spec, epoch_images=trial.settings.batch_size, epochs=1))
    run = Run(short, classifier.to(device), inputs, [max(plans_of(trial), key=_learning)])
    with contextlib.suppress(Diverged):
        run.epoch(1)
    answers(classifier, inputs)


def _learning(plan: TrainPlan) -> int:
    return len(plan.trainable)


class _RandomImages:
    """Images of noise, in place of those of the trial."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial

    def prepare(self, epoch: int) -> None:
        """Nothing to do."""

    def batches(self, epoch: int, *, steps: int, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Batches of noise."""
        for _ in range(steps):
            yield list(range(size)), self._images(size)

    def valid(self) -> Iterator[torch.Tensor]:
        """One batch of noise, as large as those of validation."""
        yield self._images(eval_batch(self.trial.spec))

    def features(self, batch: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Those of the whole backbone."""
        return features_of(self.trial.source.backbone, batch, kind)

    def _images(self, count: int) -> torch.Tensor:
        size = self.trial.source.facts.input.size
        return torch.randn(count, 3, size, size, device=self.trial.device)  # (B, 3, S, S)
