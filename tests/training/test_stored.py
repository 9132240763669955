"""Features that stay on disk: read by row, in half precision where that changes nothing to speak of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tlauto.backbone import narrowed
from tlauto.builtin.losses import CrossEntropy
from tlauto.contracts import Backbone, BackboneInfo, TrialDone, TrialSpec, WeightsOptions
from tlauto.data import Dataset
from tlauto.levels import Level
from tlauto.plugins import Registry
from tlauto.training.features import FeatureSource
from tlauto.training.halving import HALVED, Unfit, require_fit
from tlauto.training.linear import Problem
from tlauto.training.model import Standardise
from tlauto.training.rows import Rows
from tlauto.training.stored import Stored

CPU = torch.device("cpu")
LEVELS = (Level(3, 4), Level(5, 1))


def source_of(spec: TrialSpec, registry: Registry, dataset: Dataset) -> FeatureSource:
    return FeatureSource(spec, registry, dataset, CPU)


# --- by row -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(), LEVELS], ids=["as they are", "means of levels"])
def test_parts_are_read_as_if_they_were_one(levels: tuple[Level, ...]) -> None:
    parts = torch.randn(7, 17).half(), torch.randn(4, 17), torch.randn(9, 17)
    stored = Stored(parts, means_of=levels)
    whole = torch.cat([part.float() for part in parts])
    expected = narrowed(whole, levels, to="levels") if levels else whole
    assert stored.shape == expected.shape == (len(stored), stored.row_numbers)
    assert torch.equal(stored.tensor(), expected)
    rows = torch.tensor([19, 0, 7, 6, 11, 10, 0])
    assert torch.equal(stored.take(rows), expected[rows])
    blocks = list(stored.blocks(3))
    assert [block.start for block, _ in blocks] == [0, 3, 6, 7, 10, 11, 14, 17]
    assert torch.equal(torch.cat([block for _, block in blocks]), expected)
    for place, block in blocks:
        assert torch.equal(block, expected[place])


def test_a_search_reads_its_parts_without_joining_them(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    source = source_of(spec, registry, dataset)
    parts = source.features(["train"], "grid").parts + source.features(["val"], "grid").parts
    assert [part.dtype for part in parts] == [torch.float16, torch.float32]
    whole = torch.cat([part.float() for part in parts])
    for kind in ("pooled", "levels", "grid"):
        both = source.features(["train", "val"], kind)
        assert torch.equal(both.tensor(), narrowed(whole, source.facts.widths.levels, to=kind))
        if kind != "levels":
            assert [part.dtype for part in both.parts] == [torch.float16, torch.float32]


def test_the_rate_of_features_leaves_out_the_first_block_and_what_was_in_the_cache(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    few = replace(spec, micro_batch=4)
    source = source_of(few, registry, dataset)
    source.features(["train"], "pooled")
    assert source.rate.images == len(dataset.part("train")) - 4 > 0
    assert source.rate.seconds_each == source.rate.seconds / source.rate.images > 0
    again = source_of(few, registry, dataset)
    again.features(["train"], "pooled")
    assert again.rate.seconds_each is None


# --- in half precision ------------------------------------------------------------------------------


def test_what_is_learned_from_is_rounded_by_the_stated_bound_and_no_score_is(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    source = source_of(spec, registry, dataset)
    exact = source.sample(["train"], "grid")  # fewer than a sample: all of them, in full
    kept = source.features(["train"], "grid").tensor()
    assert not torch.equal(kept, exact)
    assert bool(((kept - exact).abs() <= exact.abs() * 2**-11 + 3e-8).all())
    held_out = source.features(["val"], "grid")
    assert torch.equal(held_out.tensor(), source.sample(["val"], "grid"))


def test_a_head_learned_in_half_precision_has_the_same_held_out_loss(
    spec: TrialSpec, registry: Registry, dataset: Dataset
) -> None:
    source = source_of(spec, registry, dataset)
    targets = {s: torch.tensor([i.target for i in dataset.part(s)]) for s in ("train", "val")}
    valid, losses = source.features(["val"], "grid").tensor(), []
    for features in (source.sample(["train"], "grid"), source.features(["train"], "grid").tensor()):
        scale = Standardise(features.shape[1], 0.1)
        scale.measure(features)
        rows = Rows(Stored((features,)), scale, CPU)
        problem = Problem(rows, targets["train"], CrossEntropy(np.ones(3)), 3)
        (head,) = problem.outwards(problem.solve([10.0], [torch.arange(len(features))], tolerance=1e-5).heads)
        outputs = scale(valid) @ head[:-1] + head[-1]
        losses.append(float(functional.cross_entropy(outputs, targets["val"])))
    assert losses[0] > 0.05
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_only_features_that_rounding_leaves_alone_may_be_halved() -> None:
    random = np.random.default_rng(0)
    fine = random.normal(3, 1, (64, 8)).astype(np.float32)
    require_fit(fine, is_first=True)
    far = fine + np.float32(1000)  # numbers near 1000 are half a unit apart
    with pytest.raises(Unfit, match="too far from zero"):
        require_fit(far, is_first=True)
    large = fine * np.float32(4000)
    with pytest.raises(Unfit, match="too large"):
        require_fit(large, is_first=True)
    require_fit(large, is_first=False)
    for wrong in (fine * np.float32(1e5), fine * np.float32(np.nan)):
        with pytest.raises(Unfit, match="too large"):
            require_fit(wrong, is_first=False)
    maps = random.normal(0, 1, (16, 4, 3, 3)).astype(np.float32)
    require_fit(maps, is_first=True)
    maps[:, 1] += 1000
    with pytest.raises(Unfit):
        require_fit(maps, is_first=True)
    scale = Standardise(8)
    scale.measure(torch.from_numpy(fine))
    exact, rounded = (scale(torch.from_numpy(a)) for a in (fine, fine.astype(np.float16).astype(np.float32)))
    assert float((exact - rounded).abs().max()) <= HALVED


class Huge:
    """timm's tiny ResNet with pooled features a hundred thousand times as large."""

    name = "huge"
    modality = "image"

    def __init__(self, registry: Registry) -> None:
        self.registry, self.loads = registry, 0

    def shortlist(self) -> tuple[BackboneInfo, ...]:
        return ()

    def find(self, pattern: str) -> tuple[BackboneInfo, ...]:
        return ()

    def weights_status(self, id: str, options: WeightsOptions) -> None:
        return None

    def load(self, id: str, options: WeightsOptions) -> Backbone:
        self.loads += 1
        return Enlarged(self.registry.provider("timm").load("timm:test_resnet", options))


class Enlarged:
    """A backbone of its own class, without levels."""

    def __init__(self, source: Backbone) -> None:
        self.source = source

    def __getattr__(self, name: str) -> Any:
        if name in ("levels", "level_shape"):
            raise AttributeError(name)
        return getattr(self.source, name)

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        return self.source.pooled(images) * 1e5


def test_features_too_large_for_half_precision_are_kept_in_full(
    spec: TrialSpec, registry: Registry, dataset: Dataset, offering: Callable[..., Registry],
    run: Callable[..., TrialDone],
) -> None:  # fmt: skip
    huge = Huge(registry)
    offered, named = offering("backbone_providers", huge), replace(spec, backbone="huge:test_resnet")
    plain = source_of(spec, registry, dataset).features(["val"], "pooled").tensor()
    source = source_of(named, offered, dataset)
    found = source.features(["train"], "pooled")
    assert [part.dtype for part in found.parts] == [torch.float32]
    assert torch.allclose(source.features(["val"], "pooled").tensor(), plain * 1e5, rtol=1e-3)
    (left,) = [p for p in Path(named.cache, "features").glob("*.npy") if np.load(p).shape == found.shape]
    assert not list(Path(named.cache, "features").glob("*.part"))
    loads = huge.loads
    again = source_of(named, offered, dataset).features(["train"], "pooled")
    assert huge.loads == loads, "it is not tried again"
    assert torch.equal(again.tensor(), found.tensor()) and left.exists()
    assert run(named, registry=offered).score >= 0


# --- keys -------------------------------------------------------------------------------------------


def test_other_levels_are_other_arrays(spec: TrialSpec, registry: Registry, dataset: Dataset) -> None:
    source = source_of(spec, registry, dataset)
    source.features(["train"], "pooled")
    facts = source.facts
    widths = replace(facts.widths, levels=facts.widths.levels[1:])
    other = source_of(spec, registry, dataset)
    other.__dict__["facts"] = replace(facts, widths=widths)
    paths = {s._path(["train"], "grid", range(24), "half", mirror=False) for s in (source, other)}
    assert len(paths) == 2
    assert sum(path.exists() for path in paths) == 1
