"""Refits of solved heads: they take what their trial chose, and find the same head on the same images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from test_predict import dataset_of, write_colours

from tlauto.contracts import TrialDone, TrialSpec, WeightsOptions, spec_from_json, to_json
from tlauto.plugins import registry
from tlauto.results.finish import refit_spec


def run(spec: TrialSpec, root: Path) -> TrialDone:
    from tlauto.training.fit import run_trial

    dataset = dataset_of(root, "multiclass")
    return run_trial(spec, registry(), dataset, device="cpu", on_epoch=lambda _: True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("refits") / "colours", count=8, seed=0)


@pytest.fixture(scope="module")
def spec(root: Path) -> TrialSpec:
    return TrialSpec(
        number=0, dataset="", task="multiclass", metric="accuracy", backbone="timm:test_resnet",
        strategy="feature_extraction", head="linear", params={"probe.solver": "path"},
        weights=WeightsOptions(pretrained=False, offline=True), seed=0, epochs=1,
        folder=str(root.parent / "trial"), cache=str(root.parent / "cache"),
    )  # fmt: skip


def test_the_head_of_a_choice_made_before_is_the_same_and_nothing_is_held_out(
    spec: TrialSpec, root: Path
) -> None:
    chose = run(spec, root)
    assert chose.penalty is not None and chose.held_out is not None
    given = replace(spec, folder=f"{spec.folder}-again", features=chose.features, penalty=chose.penalty)
    again = run(spec_from_json(to_json(given)), root)
    assert (again.features, again.held_out) == (chose.features, None)
    heads = [load_file(Path(s.folder, d.checkpoint)) for s, d in ((spec, chose), (given, again))]
    assert heads[0].keys() == heads[1].keys()
    weights = [head["head.1.weight"].numpy() for head in heads]
    apart = np.linalg.norm(weights[1] - weights[0]) / np.linalg.norm(weights[0])
    assert apart < 0.03, "twice the penalty is .049 apart"
    answers = [np.load(Path(s.folder, "predictions.npz"))["predictions"] for s in (spec, given)]
    np.testing.assert_allclose(*answers, atol=5e-3)


@pytest.mark.parametrize(("penalty", "features", "fewer"), [(0.01, "grid", 0.008), (None, None, None)])
def test_a_refit_is_given_what_its_trial_chose(
    penalty: float | None, features: str | None, fewer: float | None, spec: TrialSpec, tmp_path: Path
) -> None:
    chose = TrialDone(3, 0.9, {}, 0.1, 1, 1, 12.0, "c.safetensors", features="grid", penalty=penalty)
    again = refit_spec(spec, chose, number=-1, folder=tmp_path, growth=1.25)
    assert (again.features, again.penalty) == (features, fewer and pytest.approx(fewer))


def test_what_was_chosen_is_what_is_solved(spec: TrialSpec, root: Path) -> None:
    """A penalty that nothing would choose leaves nothing but the shares of the classes."""
    done = run(replace(spec, folder=f"{spec.folder}-strong", features="pooled", penalty=1e6), root)
    answers = np.load(Path(f"{spec.folder}-strong", "predictions.npz"))["predictions"]
    assert done.features == "pooled"
    np.testing.assert_allclose(answers, answers[:1].repeat(len(answers), axis=0), atol=1e-3)
