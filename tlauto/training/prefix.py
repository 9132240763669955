"""Run the frozen stages once: train the later ones on their cached activations.

A trial whose first stages never learn would compute the same there in every epoch, but for the
augmentation. So there are a few fixed augmented views of each image, the activations of each view at
the first stage that learns are computed once, and the epochs take the views in turn. Views do not
depend on the trial's seed: trials with the same backbone, first learning stage and augmentation level
share them.

Activations to learn from are kept in half precision: each is rounded by at most 2^-11 of itself (3e-8
when it is smaller than 6e-5), the size of the error that mixed-precision training makes in every layer.
Those to validate on are kept in full, so that a score is that of the network that will be used.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tlauto.backbone import agree
from tlauto.caches import cache_limit, format_size
from tlauto.contracts import Backbone, TrainPlan
from tlauto.data import Item
from tlauto.splits import Split, split_of
from tlauto.training.arrays import cached_array
from tlauto.training.augment import LEVELS, Augment
from tlauto.training.batches import Stream, ahead, augmented_batches, eval_batch, normalise, pinned, to_device
from tlauto.training.inputs import autocast
from tlauto.training.model import Kind, features_of
from tlauto.training.pixels import contents, gather, geometry
from tlauto.training.trial import Trial

VERSION = 2  # raise it when views or shards change, so that old caches are not used
VIEWS = 4  # most augmented views of an image; the plain one, for validation, comes besides
SHARE = 4  # a trial's activations may take this part of the cache's limit
PROOF = 3  # real images on which the halves must equal the whole
LARGEST = 65504.0  # of half precision
HALVED = 2e-2  # most that rounding to half precision may change a feature, relative to the largest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rota:
    """Which images and which view of them each epoch learns from.

    Epochs of fewer images than there are go through the shards in turn, and then through them again
    in the next view. So no epoch computes more activations than it draws images, and a trial that is
    pruned has computed no more than it would have without a cache.

    Attributes:
        shards: indices (n,) of images, ascending; each image is in exactly one.
        views: augmented views; 0 is the plain one alone.
    """

    shards: tuple[np.ndarray, ...]
    views: int

    def at(self, epoch: int) -> tuple[int, int]:
        """The shard and the view of an epoch (from 0); view 0 is plain, augmented ones count from 1."""
        passed, shard = divmod(epoch, len(self.shards))
        return shard, 1 + passed % self.views if self.views else 0


def plan_rota(images: int, epoch_images: int | None, epochs: int, *, is_augmented: bool) -> Rota:
    """The rota of a trial: as many shards as epochs cover all images, up to `VIEWS` augmented views.

    Each view serves two epochs or more, so that already the first of the trials that share it gains;
    but there are two if there can be, because one view alone would be no augmentation.
    """
    size = min(epoch_images or images, images)
    count = -(-images // size)
    # Trials share shards, so neither order nor seed may be a trial's own.
    order = np.random.default_rng(VERSION).permutation(images)
    shards = tuple(np.sort(shard) for shard in np.array_split(order, count))
    passes = -(-epochs // count)
    views = min(VIEWS, max(passes // 2, min(2, passes)))
    return Rota(shards, views if is_augmented else 0)


def first_learning_stage(stages: Sequence[Sequence[str]], plans: Sequence[TrainPlan]) -> int:
    """The first stage of which anything learns in any epoch; the number of stages when nothing does."""
    learning = {name for plan in plans for name in plan.trainable}
    return next((i for i, stage in enumerate(stages) if learning.intersection(stage)), len(stages))


def prefixed(trial: Trial, kind: Kind, plans: Sequence[TrainPlan]) -> Prefixed | None:
    """Cached activations as the inputs of a trial; None where it has to run the whole network.

    Args:
        plans: of each epoch.
    """
    stages = trial.source.backbone.stages
    stage = first_learning_stage(stages, plans)
    if not 0 < stage < len(stages):
        return None
    try:
        return _prefixed(trial, kind, plans, stage)
    except _Impossible as reason:
        _log.info("%s runs its frozen stages in every epoch: %s", trial.spec.backbone, reason)
        return None


def _prefixed(trial: Trial, kind: Kind, plans: Sequence[TrainPlan], stage: int) -> Prefixed:
    split = split_of(trial.source.backbone, stage)
    if split is None:
        raise _Impossible(f"it cannot be split before stage {stage}")
    form = _proven(trial, split, stage, kind)
    if form is None:
        raise _Impossible(f"split before stage {stage}, it gives other features")
    if trial.settings.train_mode and not _is_still(trial, split, plans):
        raise _Impossible(f"the stages before {stage} are not the same in training and in inference")
    rota = _affordable(trial, form)
    if rota is None:
        raise _Impossible(f"{format_size(form.bytes)} an image are too much for the cache")
    return Prefixed(trial, split, stage, form, rota)


class _Impossible(Exception):
    """Why a trial has to run the whole network in every epoch."""


def _own(kind: Kind) -> Literal["pooled", "unpooled"]:
    if kind == "pooled" or kind == "unpooled":
        return kind
    raise _Impossible("its head reads several stages")


class Prefixed:
    """Activations before the first stage that learns, computed when an epoch first needs them."""

    def __init__(self, trial: Trial, split: Split, stage: int, form: Form, rota: Rota) -> None:
        self.trial = trial
        self.split = split
        self.stage = stage
        self.form = form
        self.rota = rota
        self.known: dict[tuple[int, int], Activations] = {}
        seed = trial.spec.seed
        self.streams = [Stream(len(shard), seed + i) for i, shard in enumerate(rota.shards)]

    def prepare(self, epoch: int) -> None:
        """Compute the epoch's activations, or find them in the cache."""
        shard, view = self.rota.at(epoch)
        if (shard, view) not in self.known:
            rows = self.rota.shards[shard].tolist()
            self.known[shard, view] = self._activations(self.trial.spec.fit_on, rows, view, np.float16)

    def batches(self, epoch: int, *, steps: int, size: int) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Activations (B, …) of the epoch's view, its shard in an order of the trial's own."""
        shard, view = self.rota.at(epoch)
        known, device = self.known[shard, view], self.trial.device
        self.streams[shard].seek(epoch // len(self.streams) * steps * size)
        batches = [self.streams[shard].take(size) for _ in range(steps)]

        def read(step: int) -> torch.Tensor:
            return pinned(known.read(batches[step]), device)

        with contextlib.closing(ahead(read, steps, device=device)) as prepared:
            for places, taken in zip(batches, prepared, strict=True):
                yield self.rota.shards[shard][places].tolist(), self.form.on(taken, device)

    def valid(self) -> Iterator[torch.Tensor]:
        """Activations of the plain view of `evaluate_on`."""
        count, size = len(self.trial.valid_targets), eval_batch(self.trial.spec)
        for start in range(0, count, size):
            rows = range(start, min(start + size, count))
            yield self.form.on(self._valid.read(rows), self.trial.device)

    def features(self, batch: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Those of the stages that follow."""
        return self.split.suffix(batch, _own(kind))

    @cached_property
    def _valid(self) -> Activations:
        """Only when it is asked for: a refit looks at the test part once, at the end."""
        rows = range(len(self.trial.valid_targets))
        return self._activations((self.trial.spec.evaluate_on,), rows, 0, np.float32)

    def _activations(
        self, splits: Sequence[str], rows: Sequence[int], view: int, dtype: type[np.floating[Any]]
    ) -> Activations:
        """A part of each split is an array of its own: a refit on train and val finds train's."""
        parts, start = [], 0
        for name in splits:
            count = len(self.trial.source.dataset.part(name))
            own = [row - start for row in rows if start <= row < start + count]
            if own:
                parts.append(self._cached(name, own, view, dtype))
            start += count
        return Activations(tuple(parts))

    def _cached(self, name: str, rows: Sequence[int], view: int, dtype: type[np.floating[Any]]) -> np.ndarray:
        source, spec = self.trial.source, self.trial.spec
        items = [source.dataset.part(name)[row] for row in rows]
        level = self.trial.settings.augment if view else "none"
        key = contents(
            items,
            weights=source.facts.weights,
            **geometry(source.facts.input),
            mean=source.facts.input.mean,
            std=source.facts.input.std,
            bgr=source.facts.input.bgr,
            device=source.device.type,  # a GPU rounds differently
            prefix=VERSION,
            stage=[self.stage, source.backbone.stages[self.stage][0]],
            view=view,
            level=asdict(LEVELS[level]),
            bits=np.finfo(dtype).bits,
        )
        path = Path(spec.cache, "prefixes", f"{key}.npy")
        shape = (len(rows), *self.form.shape)

        def blocks(first: int) -> Iterator[np.ndarray]:
            for activations in self._computed(name, rows[first:], items[first:], view):
                # The proof found none near the bound; an outlier beyond it must not become infinite.
                bound = float(np.finfo(dtype).max)
                yield activations.clamp(-bound, bound).cpu().numpy().astype(dtype)

        return cached_array(path, shape, dtype, blocks, about={"backbone": spec.backbone})

    def _computed(
        self, name: str, rows: Sequence[int], items: Sequence[Item], view: int
    ) -> Iterator[torch.Tensor]:
        trial, device = self.trial, self.trial.device
        pixels = trial.source.pixels([name])
        augment = Augment(trial.settings.augment if view else "none", pixels.input)
        size = eval_batch(trial.spec)
        batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        every = view_keys(items, view)

        def keys(batch: int) -> np.ndarray:
            return every[batch * size : (batch + 1) * size]

        trial.source.backbone.set_training(False)
        for _, images in augmented_batches(pixels, batches, augment, keys, device):
            # As without a cache: images to learn from in mixed precision, those to validate on in full.
            with torch.inference_mode(), autocast(device) if view else contextlib.nullcontext():
                activations = self.split.prefix(images).float()
            yield activations


@dataclass(frozen=True)
class Form:
    """Form of one image's activations, and whether the network lays them out channels last."""

    shape: tuple[int, ...]
    is_channels_last: bool

    @property
    def bytes(self) -> int:
        """Bytes of one image's activations in half precision; in full it is twice as much."""
        return int(np.prod(self.shape)) * 2

    def on(self, activations: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Activations (B, …) as the network takes them: float32 on `device`, in its layout."""
        layout = torch.channels_last if self.is_channels_last else torch.contiguous_format
        return to_device(activations, device).to(dtype=torch.float32, memory_format=layout)


@dataclass(frozen=True)
class Activations:
    """Cached activations, part after part, by row."""

    parts: tuple[np.ndarray, ...]

    def read(self, rows: Sequence[int]) -> torch.Tensor:
        """A copy (B, …) of some rows, of the parts' precision."""
        return torch.from_numpy(gather(self.parts, rows))


def view_keys(items: Sequence[Item], view: int) -> np.ndarray:
    """Keys (N, 3) uint64 of a view of images: the same in every trial and every split of the data."""
    digests = (hashlib.sha256(item.sha256.encode()).digest() for item in items)
    return np.array([[VERSION, view, int.from_bytes(digest[:8], "big")] for digest in digests], np.uint64)


# --- whether it can be done -------------------------------------------------------------------------

# Forms by weights, size, stage, kind and device, None where the halves are not the whole: proven once a
# process.
_forms: dict[tuple[str, int, int, Kind, str], Form | None] = {}


def _proven(trial: Trial, split: Split, stage: int, kind: Kind) -> Form | None:
    facts = trial.source.facts
    key = (facts.weights, facts.input.size, stage, kind, trial.device.type)
    if key not in _forms:
        _forms[key] = _prove(trial.source.backbone, split, _some_images(trial), kind)
    return _forms[key]


def _prove(backbone: Backbone, split: Split, images: torch.Tensor, kind: Kind) -> Form | None:
    """The form of the activations if prefix and suffix give what the backbone gives of these images."""
    backbone.set_training(False)
    with torch.no_grad():
        whole = features_of(backbone, images, kind)
        activations = split.prefix(images)
        if len(activations) != len(images) or activations.ndim < 2:
            return None
        rounded = activations.half().float()
        is_exact = agree(split.suffix(activations.clone(), _own(kind)), whole)
        # Far from the largest half, because other images may have larger activations.
        fits = bool(rounded.abs().max() < LARGEST / 4)
        if not (is_exact and fits and agree(split.suffix(rounded, _own(kind)), whole, tolerance=HALVED)):
            return None
    is_map = activations.ndim == 4
    is_last = is_map and activations.is_contiguous(memory_format=torch.channels_last)
    return Form(tuple(activations.shape[1:]), is_last and not activations.is_contiguous())


def _is_still(trial: Trial, split: Split, plans: Sequence[TrainPlan]) -> bool:
    """Whether the prefix gives in training what it gives in inference: no dropout, no batch statistics."""
    backbone, images = trial.source.backbone, _some_images(trial)
    backbone.set_training(False)
    with torch.no_grad():
        expected = split.prefix(images).clone()
        backbone.set_trainable({name for plan in plans for name in plan.trainable})
        backbone.set_training(True)
        is_same = agree(split.prefix(images), expected)
    backbone.set_trainable(())
    backbone.set_training(False)
    return is_same


def _some_images(trial: Trial) -> torch.Tensor:
    pixels = trial.source.pixels(trial.spec.fit_on)
    rows = np.linspace(0, len(pixels) - 1, min(PROOF, len(pixels))).round().astype(int).tolist()
    return normalise(pixels.crops(rows), pixels.input, trial.device)


def _affordable(trial: Trial, form: Form) -> Rota | None:
    """The rota whose activations fit their share of the cache, with fewer views if need be."""
    spec, images = trial.spec, len(trial.train_targets)
    is_augmented = trial.settings.augment != "none"
    rota = plan_rota(images, spec.epoch_images, spec.epochs, is_augmented=is_augmented)
    room = cache_limit() // SHARE // form.bytes - 2 * len(trial.valid_targets)  # images
    views = min(rota.views or 1, room // images)
    if views < min(2, rota.views or 1):
        return None
    return Rota(rota.shards, views if is_augmented else 0)
