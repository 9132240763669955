"""A linear head on several backbones at once, and the classifiers whose outputs add up to its."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tlauto.builtin.timm_provider import TimmProvider
from tlauto.contracts import Backbone, TrialDone, TrialSpec, WeightsOptions, WeightsStatus
from tlauto.data import Dataset, Item
from tlauto.errors import TrialError
from tlauto.plugins import Registry
from tlauto.training import rows
from tlauto.training.checkpoint import start_from
from tlauto.training.features import FeatureSource
from tlauto.training.joined import restore_parts
from tlauto.training.model import Kind, Readout, Standardise, restore
from tlauto.training.predictor import Predictor
from tlauto.training.stored import SideBySide, Stored
from tlauto.training.tasks import find_task
from tlauto.training.trial import prepare

Run = Callable[..., TrialDone]
CPU = torch.device("cpu")
OTHERS = "timm:test_vit timm:test_efficientnet"
LBFGS: Mapping[str, Any] = {"probe.solver": "lbfgs", "probe.l2": 0.01}


def joined(spec: TrialSpec, beside: str = OTHERS, **params: Any) -> TrialSpec:
    given = {"probe.joined": 1 + len(beside.split()), "probe.beside": beside, **params}
    return replace(spec, params={**spec.params, **given})


def random_columns(*widths: int, lengths: tuple[int, ...] = (40, 23)) -> tuple[Stored, ...]:
    random = torch.Generator().manual_seed(0)
    return tuple(
        Stored(tuple(torch.randn(n, width, generator=random).half() for n in lengths), key=("some", width))
        for width in widths
    )


# --- columns side by side ---------------------------------------------------------------------------


def test_columns_side_by_side_are_read_as_if_they_were_one_array() -> None:
    columns = random_columns(5, 3, 8)
    both = SideBySide(columns)
    whole = torch.cat([each.tensor() for each in columns], dim=1)
    assert (len(both), both.shape, both.row_numbers) == (63, (63, 16), 16)
    torch.testing.assert_close(both.tensor(), whole, rtol=0, atol=0)
    some = torch.tensor([62, 0, 40, 39, 7])
    torch.testing.assert_close(both.take(some), whole[some], rtol=0, atol=0)
    seen = torch.zeros(63, dtype=torch.long)
    for part, block in both.blocks(7):
        assert len(block) <= 7
        torch.testing.assert_close(block, whole[part], rtol=0, atol=0)
        seen[part] += 1
    assert seen.tolist() == [1] * 63


def test_what_is_kept_of_columns_is_told_apart_by_all_of_them() -> None:
    a, b, c = random_columns(5, 3, 8)
    keys = {SideBySide(columns).key for columns in ((a, b), (b, a), (a, c), (a, b, c))}
    assert len(keys) == 4
    assert SideBySide((a, replace(b, key=None))).key is None


def test_each_backbone_is_scaled_as_it_would_be_alone() -> None:
    columns = [part.tensor() * scale for part, scale in zip(random_columns(5, 3), (1, 1000), strict=True)]
    columns[0][:, 0] *= 1e-3  # a channel that hardly moves
    both = Standardise(8, widths=(5, 3))
    both.measure(torch.cat(columns, dim=1))
    alone = [Standardise(part.shape[1]) for part in columns]
    for norm, part in zip(alone, columns, strict=True):
        norm.measure(part)
    torch.testing.assert_close(both.std, torch.cat([norm.std for norm in alone]), rtol=0, atol=0)
    torch.testing.assert_close(both.mean, torch.cat([norm.mean for norm in alone]), rtol=0, atol=0)


# --- trials -----------------------------------------------------------------------------------------


def target_of(item: Item) -> float:
    return float(len(item.path) + 7 * (item.sha256 < "8"))


TASKS: list[tuple[str, str, Callable[[Item], Any]]] = [
    ("multiclass", "accuracy", lambda item: item.target),
    ("multilabel", "f1", lambda item: (item.target,) if item.sha256 < "8" else (0, 1)),
    ("regression", "rmse", target_of),
]


@pytest.mark.parametrize("params", [{}, LBFGS, {"probe.mirror": True}], ids=["path", "lbfgs", "mirror"])
@pytest.mark.parametrize(("task", "metric", "target"), TASKS, ids=[task for task, *_ in TASKS])
def test_the_parts_add_up_to_what_the_trial_answered(
    task: str, metric: str, target: Callable[[Item], Any], params: Mapping[str, Any], spec: TrialSpec,
    run: Run, registry: Registry, dataset: Dataset, relabel: Callable[..., Dataset],
) -> None:  # fmt: skip
    data = relabel(task, target, () if task == "regression" else dataset.classes)
    spec = joined(replace(spec, task=task, metric=metric), **params)
    done = run(spec, dataset=data)
    parts = restore_parts(spec, registry, data, Path(spec.folder, done.checkpoint), "cpu")
    assert len(parts) == 3
    first, *others = [(part, part.source.input) for part in parts]
    files = [data.file(item) for item in data.part("val")]
    together = Predictor(*first, find_task(task), data.classes, beside=others).predict_files(files)
    saved = np.load(Path(spec.folder, "predictions.npz"))["predictions"]
    np.testing.assert_allclose(together, saved, atol=1e-4 * max(1.0, np.abs(saved).max()))
    for lone in parts:  # each contributes, and none is the whole
        alone = Predictor(lone, lone.source.input, find_task(task), data.classes).predict_files(files)
        assert np.abs(alone - saved).max() > 1e-3


def test_the_raw_outputs_of_the_parts_add_up_to_those_of_the_joined_readout(
    spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset
) -> None:
    spec = joined(spec, **LBFGS)
    checkpoint = Path(spec.folder, run(spec).checkpoint)
    trial = prepare(spec, registry, dataset, CPU)
    whole: Readout = trial.readout("pooled")
    whole.load_state_dict(load_file(checkpoint))
    with torch.inference_mode():
        expected = whole.eval().read(trial.features(["val"], "pooled").tensor())
        found = torch.zeros_like(expected)
        sources = (trial.source, *trial.beside)
        parts = restore_parts(spec, registry, dataset, checkpoint, "cpu")
        for part, source in zip(parts, sources, strict=True):
            found += part.read(source.features(["val"], "pooled").tensor())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_joined_head_is_the_one_that_is_solved_on_the_joined_array(
    spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tlauto.training.kept import forget

    spec = joined(spec, **LBFGS)
    run(spec)
    whole = np.load(Path(spec.folder, "predictions.npz"))["predictions"]
    forget()
    monkeypatch.setattr(rows, "IN_MEMORY", 0)  # as if they were too many to be kept in memory
    monkeypatch.setattr(rows, "BLOCK", 4096)
    again = replace(spec, folder=f"{spec.folder}-again")
    run(again)
    forget()
    mapped = np.load(Path(again.folder, "predictions.npz"))["predictions"]
    np.testing.assert_allclose(mapped, whole, atol=2e-3)


def test_backbones_are_run_once_whatever_reads_them(spec: TrialSpec, run: Run) -> None:
    for place, beside in enumerate(("timm:test_vit", OTHERS)):
        run(joined(replace(spec, folder=f"{spec.folder}{place}"), beside))
    cache = Path(spec.cache, "features")
    first = {file.name: file.stat().st_mtime_ns for file in cache.glob("*.npy")}
    for place, backbone in enumerate((spec.backbone, *OTHERS.split()), start=2):
        run(replace(spec, folder=f"{spec.folder}{place}", backbone=backbone))
    assert {file.name: file.stat().st_mtime_ns for file in cache.glob("*.npy")} == first


class LastStageOnly:
    """Backbones of timm that offer no features of their earlier stages."""

    name = "plain"
    modality = "image"

    def shortlist(self) -> tuple[()]:
        return ()

    def find(self, pattern: str, weights: WeightsOptions) -> tuple[()]:
        return ()

    def weights_status(self, id: str, weights: WeightsOptions) -> WeightsStatus:
        return TimmProvider().weights_status(id.replace("plain:", "timm:"), weights)

    def load(self, id: str, weights: WeightsOptions) -> Backbone:
        backbone: Any = TimmProvider().load(id.replace("plain:", "timm:"), weights)
        backbone.level_shape = ()
        return backbone


def test_all_stages_are_read_only_where_all_backbones_offer_them(
    spec: TrialSpec, run: Run, dataset: Dataset, offering: Callable[..., Registry]
) -> None:
    registry = offering("backbone_providers", LastStageOnly())
    params = {**LBFGS, "probe.features": "levels"}
    for beside, kind in (("timm:test_vit", "levels"), ("timm:test_vit plain:test_vit", "pooled")):
        wanted = joined(replace(spec, folder=f"{spec.folder}-{kind}"), beside, **params)
        done = run(wanted, registry=registry)
        assert done.features == kind
        parts = restore_parts(wanted, registry, dataset, Path(wanted.folder, done.checkpoint), "cpu")
        assert {part.kind for part in parts} == {kind}
    assert run(joined(spec, "plain:test_vit"), registry=registry).features == "pooled"


def test_the_path_tries_all_stages_but_no_quarters_and_leaves_no_start(
    spec: TrialSpec, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    of_kind = FeatureSource.features

    def noting(source: FeatureSource, splits: Sequence[str], kind: Kind) -> Stored:
        seen.append(kind)
        return of_kind(source, splits, kind)

    monkeypatch.setattr(FeatureSource, "features", noting)
    run(joined(spec))
    assert set(seen) == {"pooled", "levels"}
    assert not Path(spec.folder, "start.safetensors").exists()


def test_a_joined_trial_names_where_all_its_backbones_come_from(spec: TrialSpec, run: Run) -> None:
    assert set(run(joined(spec)).provenance) == {"backbone", "backbone 2", "backbone 3", "strategy", "head"}


def test_the_same_trial_gives_the_same_score_and_answers(spec: TrialSpec, run: Run) -> None:
    spec = joined(spec)
    twice = [run(replace(spec, folder=f"{spec.folder}{i}")) for i in range(2)]
    assert twice[0].score == twice[1].score and twice[0].held_out == twice[1].held_out
    saved = [np.load(Path(f"{spec.folder}{i}", "predictions.npz"))["predictions"] for i in range(2)]
    np.testing.assert_array_equal(*saved)


def test_a_joined_head_is_of_no_use_to_a_trial_on_one_backbone(
    spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset
) -> None:
    whole = joined(spec, **LBFGS)
    checkpoint = Path(whole.folder, run(whole).checkpoint)
    readout = prepare(spec, registry, dataset, CPU).readout("pooled")
    of_all = r"is of timm:test_resnet timm:test_vit timm:test_efficientnet, not of timm:test_resnet$"
    with pytest.raises(TrialError, match=of_all):
        start_from(readout, checkpoint, spec)
    with pytest.raises(TrialError, match=of_all):
        restore(spec, registry, dataset, checkpoint, "cpu")
    with pytest.raises(TrialError, match="is of another model"):
        restore(whole, registry, dataset, checkpoint, "cpu")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"probe.beside": "timm:test_vit"}, "names timm:test_vit besides, though 'probe.joined' is 1"),
        ({"probe.joined": 4}, "4 is not one of 1, 2, 3"),
        ({"probe.joined": 2, "probe.solver": "minibatch"}, r"nothing in this trial reads .*probe\.joined"),
    ],
)
def test_what_cannot_be_joined_is_refused(
    params: Mapping[str, Any], message: str, spec: TrialSpec, run: Run
) -> None:
    with pytest.raises(TrialError, match=message):
        run(replace(spec, params=params))


def test_a_trial_without_others_is_an_ordinary_one(
    spec: TrialSpec, run: Run, registry: Registry, dataset: Dataset
) -> None:
    alone = replace(spec, params={"probe.joined": 2}, folder=f"{spec.folder}-alone")
    assert run(alone).score == run(spec).score
    one, other = (load_file(Path(each.folder, "checkpoint.safetensors")) for each in (alone, spec))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    (part,) = restore_parts(alone, registry, dataset, Path(alone.folder, "checkpoint.safetensors"), "cpu")
    assert isinstance(FeatureSource(alone, registry, dataset, CPU).features(["val"], part.kind), Stored)
