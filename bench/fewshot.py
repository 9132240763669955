"""Linear heads on features of a few images, asked about all the others: what choices are compared by."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tlauto.builtin.tasks import task
from tlauto.contracts import TrialSpec, WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.errors import DataError
from tlauto.plugins import registry
from tlauto.recipe import SCALE
from tlauto.training.features import FeatureSource
from tlauto.training.linear import FOLDS, Problem, cross_validate
from tlauto.training.model import BOUND, GRID, GRID_BOUND, Kind, Standardise
from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

DATASETS = ("hymenoptera", "signdigits", "trashnet")
KINDS: tuple[Kind, ...] = ("pooled", "levels", "grid")
PARTS = ("train", "val")

Features = dict[Kind, torch.Tensor]


@dataclass(frozen=True)
class Images:
    """What is not the test part of a dataset of classes.

    Attributes:
        labels: class index (N,) of each image.
    """

    name: str
    dataset: Dataset
    labels: np.ndarray


@dataclass(frozen=True)
class Draw:
    """Indices of the images to learn from, and of the others."""

    learned: np.ndarray
    rest: np.ndarray


@dataclass(frozen=True)
class Head:
    """A head that was tried, and what it says of images that it has not seen.

    Attributes:
        held_out: probabilities (n, K) of the images to learn from, by cross-validation; `accuracy` and
            log `loss` are theirs.
        unseen: (m, K) of the others, by the head that was fitted on all images to learn from.
        unseen_accuracy: of those.
    """

    backbone: str
    held_out: np.ndarray
    unseen: np.ndarray
    accuracy: float
    loss: float
    unseen_accuracy: float


def open_images(data: str, *, seed: int) -> Images:
    """The images of a folder or manifest. Raises: DataError when it is not for classes."""
    dataset, _ = load_dataset(data, seed=seed, allow_leaks=True)
    if dataset.task != "multiclass":
        raise DataError(f"{data} is for {dataset.task}; this script does classes only")
    values = [item.target for part in PARTS for item in dataset.part(part)]
    return Images(Path(data).name, dataset, task(dataset.task).targets(values, dataset.classes))


def possible(images: Images, counts: Sequence[int]) -> list[int]:
    """The numbers of images to learn from that leave some to ask about; a note of the others."""
    for count in counts:
        if count >= len(images.labels):
            print(f"{images.name}: {count} of {len(images.labels)} images leave none", file=sys.stderr)
    return [count for count in counts if count < len(images.labels)]


def draws(images: Images, count: int, draws: int) -> Iterator[Draw]:
    """Random draws of so many images to learn from, as many of each class as can be."""
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(images.labels))
        seen: dict[int, int] = {}
        place = np.empty(len(order), dtype=int)
        for i in order:
            place[i] = seen[images.labels[i]] = seen.get(images.labels[i], 0) + 1
        ranked = order[np.argsort(place[order], kind="stable")]
        yield Draw(np.sort(ranked[:count]), np.sort(ranked[count:]))


def extract(
    images: Images, backbone: str, *, weights_dir: str | None, pretrained: bool = True, mirror: bool = False,
    scale: float = 1.0,
) -> Features:  # fmt: skip
    """Each kind of features (N, D) that a backbone offers.

    Args:
        scale: of the images, over those that it was pretrained on.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec = TrialSpec(
            number=0, dataset="", task="multiclass", metric="accuracy", backbone=backbone,
            strategy="feature_extraction", head="linear", params={SCALE: scale}, seed=0, epochs=1,
            folder=folder, weights=WeightsOptions({}, weights_dir, True, pretrained),
            cache=os.environ.get("TLAUTO_CACHE", folder),
        )  # fmt: skip
        source = FeatureSource(spec, registry(), images.dataset, torch.device("cpu"), mirror=mirror)
        kinds: tuple[Kind, ...] = KINDS if source.facts.widths.levels else ("pooled",)
        return {kind: source.features(PARTS, kind).tensor().float() for kind in kinds}


def solve(images: Images, draw: Draw, backbone: str, features: torch.Tensor, *, bound: float) -> Head:
    """A head as a search solves it, its L2 penalty by cross-validation.

    Args:
        features: (N, D) of all images.
        bound: of the feature scaling, see `Standardise`.
    """
    known, targets, part = task("multiclass"), images.labels[draw.learned], features[draw.learned]
    outputs = known.num_outputs(images.dataset.classes)
    loss = known.loss(targets, outputs, {"label_smoothing": 0.0, "class_weights": "none"})
    scale = Standardise(features.shape[1], bound)
    scale.measure(part)
    rows = Rows(Stored((part,)), scale, torch.device("cpu"))
    problem = Problem(rows, torch.from_numpy(targets), loss, outputs)
    folds = torch.zeros(len(targets), dtype=torch.long)
    for label in np.unique(targets):
        of_class = np.flatnonzero(targets == label)
        folds[of_class] = torch.arange(len(of_class)) % FOLDS
    found = cross_validate(problem, folds)
    start = problem.inwards(found.heads.mean(dim=0, keepdim=True))
    (head,) = problem.outwards(
        problem.solve([found.penalty], [torch.arange(len(targets))], start=start).heads
    )
    unseen = (scale(features[draw.rest]) @ head[:-1] + head[-1]).softmax(dim=1).numpy()
    held_out = found.outputs.softmax(dim=1).numpy()
    return Head(
        backbone, held_out, unseen, accuracy(held_out, targets), found.loss,
        accuracy(unseen, images.labels[draw.rest]),
    )  # fmt: skip


def bound_of(kind: Kind) -> float:
    """The bound of feature scaling that a search takes for a kind."""
    return GRID_BOUND if kind == GRID else BOUND


def accuracy(answers: np.ndarray, targets: np.ndarray) -> float:
    """Share of rows (N, K) whose largest number is that of the target (N,)."""
    return float((answers.argmax(axis=1) == targets).mean())
