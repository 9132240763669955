"""Features of a frozen backbone, computed once for all trials.

A part of the split is computed only when it is asked for: the test part stays untouched until the
winner is evaluated.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tlauto.backbone import hash_weights, narrowed
from tlauto.contracts import Backbone, ImageInput, TrialSpec, trains_backbone
from tlauto.data import Dataset
from tlauto.plugins import Registry
from tlauto.recipe import scale_of
from tlauto.training.arrays import cached_array
from tlauto.training.batches import centre_batches, eval_batch
from tlauto.training.engines import Extractor
from tlauto.training.halving import Unfit, require_fit
from tlauto.training.linear import stratified_folds
from tlauto.training.model import GRID, Kind, Widths, mirrored
from tlauto.training.pixels import Pixels, contents, geometry, load_pixels
from tlauto.training.pretrained import frozen_backbone, load_backbone
from tlauto.training.stored import Stored

SAMPLE = 512  # images that feature scaling is measured on
LEARNED = "train"  # the part that no score is recorded of

Form = Literal["half", "full", "sample"]
"""Of an array of features: in half or full precision, or some images to measure scaling on, in full."""


@dataclass(frozen=True)
class Facts:
    """What a trial on cached features needs to know of its backbone."""

    input: ImageInput
    widths: Widths
    weights: str

    @cached_property
    def text(self) -> str:
        """All of it, to find things by: a plugin's may hold lists, which have no hash."""
        return str(self)


@dataclass
class Rate:
    """How fast features are computed: images, and the seconds that they took, once an engine is at it."""

    images: int = 0
    seconds: float = 0.0

    def add(self, images: int, seconds: float) -> None:
        """Take note of a block."""
        self.images, self.seconds = self.images + images, self.seconds + seconds

    @property
    def seconds_each(self) -> float | None:
        """Seconds an image; None when too few were computed to tell."""
        return self.seconds / self.images if self.images else None


_log = logging.getLogger(__name__)

# A worker builds each backbone for its first trial only: later trials need just these facts.
_known: dict[tuple[Registry, str, float, str], Facts] = {}


class FeatureSource:
    """Features of one backbone with its pretrained weights, from the cache when they are there.

    Args:
        mirror: they are the mean of those of an image and of its mirror image.
    """

    def __init__(
        self,
        spec: TrialSpec,
        registry: Registry,
        dataset: Dataset,
        device: torch.device,
        *,
        mirror: bool = False,
    ) -> None:
        self.mirror = mirror
        self.rate = Rate()
        self.spec = spec
        self.registry = registry
        self.dataset = dataset
        self.device = device
        self._extractors: dict[Kind, Extractor] = {}

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone itself, found on first use; the trial may change it only if it trains it."""
        learns = trains_backbone(self.registry.strategy(self.spec.strategy))
        load = load_backbone if learns else frozen_backbone
        return load(self.spec, self.registry, self.device)

    @cached_property
    def facts(self) -> Facts:
        """Its input, widths and weights' hash."""
        weights = json.dumps(asdict(self.spec.weights), sort_keys=True)
        key = (self.registry, self.spec.backbone, scale_of(self.spec.params), weights)
        if key not in _known:
            backbone = self.backbone
            _known[key] = Facts(backbone.input, Widths.of(backbone), hash_weights(backbone))
        return _known[key]

    def pixels(self, splits: Sequence[str]) -> Pixels:
        """The images of these splits as this backbone wants them."""
        return load_pixels(self.dataset, splits, self.facts.input, self.spec.cache)

    def folds(self, splits: Sequence[str], seed: int) -> torch.Tensor:
        """The fold (N,) that each image of these splits, split after split, is held out in."""
        items = [item for split in splits for item in self.dataset.part(split)]
        return stratified_folds([item.target for item in items], [item.group for item in items], seed)

    def features(self, splits: Sequence[str], kind: Kind) -> Stored:
        """Features (N, D) or (N, C, H, W) of these splits, split after split, in the cache."""
        kept = self._kept(kind)
        parts = [self._part(split, kept, mirror=self.mirror) for split in splits]
        names = [
            (self._path([split], kept, range(len(part)), "full", self.mirror).stem, str(part.dtype))
            for split, part in zip(splits, parts, strict=True)
        ]
        return self._stored(kind, parts, key=(kind, str(self.device), *names))

    def compute(self, splits: Sequence[str], kind: Kind) -> None:
        """Compute what is not in the cache yet of these splits, and let go of all that computed it.

        A head is learned next. What an engine holds for a backbone, and what a head takes that learns
        from many images, need not be in memory together.
        """
        for split in splits:
            self._part(split, self._kept(kind), mirror=self.mirror)
        self._extractors.clear()
        self.__dict__.pop("backbone", None)

    def sample(self, splits: Sequence[str], kind: Kind) -> torch.Tensor:
        """Features of up to 512 images, evenly spaced over these splits."""
        count = sum(len(self.dataset.part(split)) for split in splits)
        sample = self._cached(splits, self._kept(kind), sample_indices(count), "sample")
        self._extractors.clear()  # what asks for a sample trains the backbone next, and needs the memory
        return self._stored(kind, [sample]).tensor()

    def _extractor(self, kind: Kind) -> Extractor:
        """What runs the backbone; one for all parts of the dataset, so that they are of one engine."""
        if kind not in self._extractors:
            self._extractors[kind] = Extractor(
                self.backbone, kind, self.device, images=len(self.dataset.items),
                weights=self.facts.weights, folder=Path(self.spec.cache), note=_log.warning,
                about={"backbone": self.spec.backbone},
            )  # fmt: skip
        return self._extractors[kind]

    def _kept(self, kind: Kind) -> Kind:
        """One forward pass gives all levels, so whatever is pooled is a part of the same cached array."""
        return kind if kind == "unpooled" or not self.facts.widths.levels else GRID

    def _stored(self, kind: Kind, parts: Sequence[np.ndarray], *, key: Hashable = None) -> Stored:
        """Arrays of the kind that is kept, read as this kind."""
        tensors, levels = tuple(map(torch.from_numpy, parts)), self.facts.widths.levels
        if kind == self._kept(kind):
            return Stored(tensors, key=key)
        if kind == "pooled":
            return Stored(tuple(narrowed(tensor, levels, to=kind) for tensor in tensors), key=key)
        return Stored(tensors, means_of=levels, key=key)

    def _part(self, split: str, kind: Kind, *, mirror: bool) -> np.ndarray:
        """The features of a split, in half precision where that is as good.

        That is for the part that is only learned from: scores on the others are recorded, and must be
        those of the network that is used later. What is unfit stays unfit, so that it is not tried again.
        """
        indices = range(len(self.dataset.part(split)))
        if split == LEARNED and not self._path([split], kind, indices, "full", mirror).exists():
            with contextlib.suppress(Unfit):
                return self._cached([split], kind, indices, "half", mirror=mirror)
        return self._cached([split], kind, indices, "full", mirror=mirror)

    def _cached(
        self, splits: Sequence[str], kind: Kind, indices: Sequence[int], form: Form, *, mirror: bool = False
    ) -> np.ndarray:
        """The array of some images; raises Unfit when they cannot be kept in half precision."""

        def blocks(first: int) -> Iterator[np.ndarray]:
            # Of the images themselves they are in the cache, mostly: only the mirror images are run.
            plain = self._part(splits[0], kind, mirror=False) if mirror else None
            pixels, run, size = self.pixels(splits), self._extractor(kind), eval_batch(self.spec)
            begun: float | None = None  # not the first block, for which an engine is chosen and prepared
            with torch.inference_mode():
                for images in centre_batches(pixels, self.device, indices[first:], size=size):
                    found = run(images.flip(-1) if mirror else images).float().cpu()
                    if plain is not None:
                        found = mirrored(torch.from_numpy(plain[first : first + len(found)]).float(), found)
                    rows = found.numpy()
                    shown["engine"] = run.name  # for people: what is proven equal needs no key of its own
                    if form == "half":
                        require_fit(rows, is_first=first == 0)
                    first += len(rows)
                    yield rows
                    now = time.perf_counter()
                    if begun is not None:
                        self.rate.add(len(rows), now - begun)
                    begun = now

        seen = self.facts.widths.shape_of(kind)
        width = seen.unpooled if kind == "unpooled" else (seen.pooled,)
        shown: dict[str, object] = {"backbone": self.spec.backbone}
        path = self._path(splits, kind, indices, form, mirror)
        dtype = np.float16 if form == "half" else np.float32
        return cached_array(path, (len(indices), *width), dtype, blocks, about=shown)

    def _path(
        self, splits: Sequence[str], kind: Kind, indices: Sequence[int], form: Form, mirror: bool
    ) -> Path:
        """Where the array lies: its name is a hash of all that decides its contents."""
        # Which images it is of follows from splits and form.
        key = ("features", self.facts.text, self.device.type, *splits, kind, form, mirror)
        name = self.dataset.once(key, lambda: self._name(splits, kind, indices, form, mirror))
        return Path(self.spec.cache, "features", name)

    def _name(
        self, splits: Sequence[str], kind: Kind, indices: Sequence[int], form: Form, mirror: bool
    ) -> str:
        facts = self.facts
        items = [item for split in splits for item in self.dataset.part(split)]
        key = contents(
            [items[i] for i in indices], weights=facts.weights, **geometry(facts.input),
            mean=facts.input.mean, std=facts.input.std, bgr=facts.input.bgr, kind=kind,
            device=self.device.type,  # a GPU rounds differently
            levels=facts.widths.levels if kind == GRID else (), form=form,
            **({"mirror": True} if mirror else {}),
        )  # fmt: skip
        return f"{key}.npy"


def sample_indices(count: int) -> list[int]:
    """Up to 512 indices below `count`, evenly spaced."""
    return [round(i) for i in np.linspace(0, count - 1, min(count, SAMPLE))]
