"""Which trials answer together, and a bundle of several models."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests_support import TINY, run

import tlauto
from tlauto.errors import DataError
from tlauto.results import ensemble
from tlauto.results.finish import proven
from tlauto.study import TrialRecord


def record(number: int, backbone: str, score: float, state: str = "complete") -> TrialRecord:
    params = {"backbone": backbone, "strategy": "full", "head": "linear"}
    return TrialRecord(number, state, params, score, {"val_loss": 1.0})


def noisy(targets: np.ndarray, seed: int, noise: float) -> np.ndarray:
    random = np.random.default_rng(seed)
    logits = 2.0 * np.eye(3)[targets] + noise * random.normal(size=(len(targets), 3))
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


TARGETS = np.random.default_rng(0).integers(0, 3, 300)


def log_loss(answers: np.ndarray) -> float:
    return float(-np.log(answers[np.arange(len(TARGETS)), TARGETS]).mean())


# --- choosing ---------------------------------------------------------------------------------------


def test_equally_good_models_of_independent_errors_answer_together() -> None:
    answers = {number: noisy(TARGETS, number, 1.5) for number in range(3)}
    weights = ensemble.choose("multiclass", TARGETS, answers, first=0, most=4)
    assert set(weights) == {0, 1, 2}
    assert sum(weights.values()) == pytest.approx(1.0)
    together = ensemble.mean([answers[n] for n in weights], list(weights.values()))
    assert log_loss(together) < 0.98 * min(log_loss(rows) for rows in answers.values())


def test_a_much_worse_model_stays_out() -> None:
    answers = {0: noisy(TARGETS, 0, 0.1), 1: np.full((300, 3), 1 / 3)}
    assert ensemble.choose("multiclass", TARGETS, answers, first=0, most=4) == {0: 1.0}


def test_what_hardly_helps_is_not_worth_a_second_model() -> None:
    rows = noisy(TARGETS, 0, 1.0)
    assert ensemble.choose("multiclass", TARGETS, {0: rows, 1: rows}, first=0, most=4) == {0: 1.0}


def test_no_more_models_answer_than_allowed() -> None:
    answers = {number: noisy(TARGETS, number, 2.0) for number in range(6)}
    assert len(ensemble.choose("multiclass", TARGETS, answers, first=2, most=2)) == 2
    assert ensemble.choose("multiclass", TARGETS, answers, first=2, most=1) == {2: 1.0}


@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_values_and_sets_of_labels_are_averaged_too(task: str) -> None:
    random = np.random.default_rng(1)
    shape = (200,) if task == "regression" else (200, 2)
    targets = random.normal(size=shape) if task == "regression" else random.integers(0, 2, shape)
    answers: dict[int, Any] = {}
    for number in range(3):
        error = 0.3 * random.normal(size=shape)
        answers[number] = targets + error if task == "regression" else np.clip(targets + error, 0.02, 0.98)
    assert len(ensemble.choose(task, targets, answers, first=0, most=4)) == 3


def test_candidates_are_complete_trials_few_of_each_backbone() -> None:
    trials = [record(n, "timm:a", 0.9 - n / 100) for n in range(4)]
    trials += [record(4, "timm:b", 0.5), record(5, "timm:c", 0.99, state="pruned")]
    assert [trial.number for trial in ensemble.candidates(trials)] == [0, 1, 4]


def test_answers_are_read_from_the_trials_folders(tmp_path: Path) -> None:
    def save(name: str, **arrays: Any) -> Path:
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "predictions.npz", **arrays)
        return tmp_path / name

    val = {"targets": np.array([1, 0]), "predictions": np.full((2, 2), 0.5)}
    more = {"held_out_targets": np.array([0]), "held_out": np.full((1, 2), 0.25)}
    library = ensemble.read_library({0: save("a", **val, **more), 2: save("c", **val), 3: tmp_path / "gone"})
    assert set(library.answers) == {0, 2}
    assert library.val_targets.tolist() == [1, 0]
    assert library.train_targets.tolist() == [0]
    train = library.answers[0].train
    assert train is not None
    assert train.shape == (1, 2)
    assert library.answers[2].train is None


def test_cross_validated_trials_are_weighed_on_all_rows_and_then_against_the_others() -> None:
    def answers(number: int, noise: float, *, proven: bool) -> ensemble.Answers:
        rows = noisy(TARGETS, number, noise)
        return ensemble.Answers(rows[200:], rows[:200] if proven else None)

    found = {n: answers(n, 1.5, proven=True) for n in range(3)}
    found |= {n: answers(n, 1.5, proven=False) for n in (7, 8)}
    library = ensemble.Library(found, TARGETS[200:], TARGETS[:200])
    for first in (0, 7):
        weights = ensemble.select("multiclass", library, first=first, most=4)
        assert first in weights
        assert len(weights) <= 4
        assert sum(weights.values()) == pytest.approx(1.0)
    assert set(ensemble.select("multiclass", library, first=0, most=5)) > {0, 1, 2}
    assert ensemble.select("multiclass", library, first=7, most=1) == {7: 1.0}


BACKBONES = tuple(f"timm:test_{name}.r160_in1k" for name in ("resnet", "vit", "efficientnet"))

# --- a search and its bundle ------------------------------------------------------------------------


def write_hard_images(root: Path, per_class: int = 40) -> None:
    """Images of noise in three classes that differ a little in tint, so that no head is sure."""
    random = np.random.default_rng(0)
    for index, name in enumerate(("blue", "green", "red")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = random.normal(128, 60, (48, 48, 3)) + random.normal(0, 14, 3)
            pixels[..., index] += 20
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search whose model is an ensemble: random networks that err independently."""
    home = tmp_path_factory.mktemp("ensemble")
    write_hard_images(home / "patches")
    done = run(
        "search", "--data", "patches", "--backbones", ",".join(BACKBONES),
        "--no-pretrained", "--offline", "--strategies", "feature_extraction", "--heads", "linear",
        "--trials", "6", "--seed", "1", "--json", cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (home / "result.json").write_text(done.stdout)
    return home


def test_a_search_ships_models_that_answer_together(searched: Path) -> None:
    result = json.loads((searched / "result.json").read_text())
    members = result["members"]
    assert len(members) > 1, "this search is made so that several models help each other"
    assert sum(members.values()) == pytest.approx(1.0)
    bundle = tlauto.load(result["model"])
    photos = sorted(str(file) for file in (searched / "patches" / "red").iterdir())[:5]
    together = np.stack([row for _, row in bundle.outputs(photos)])
    alone = []
    for name, weight in members.items():
        if name != ".":
            member = tlauto.load(Path(result["model"]) / name)
            alone.append((weight, np.stack([row for _, row in member.outputs(photos)])))
    others = sum(weight * rows for weight, rows in alone)
    own = (together - others) / members["."]
    assert np.allclose(own.sum(axis=1), 1.0, atol=1e-4), "what is left is the first model's own answer"
    text = (Path(result["model"]) / "README.md").read_text(encoding="utf-8")
    assert f"{len(members)} models answer together" in text


def test_the_recorded_test_result_is_that_of_all_together(searched: Path) -> None:
    result = json.loads((searched / "result.json").read_text())
    out = run("evaluate", result["model"], "--data", "patches", "--json", cwd=searched)
    assert out.returncode == 0, out.stderr
    measured = json.loads(out.stdout)["metrics"]
    for name, entry in result["test"].items():
        assert measured[name]["value"] == pytest.approx(entry["value"], abs=1e-4), name


def test_a_bundle_without_a_member_or_with_a_foreign_one_is_refused(searched: Path, tmp_path: Path) -> None:
    result = json.loads((searched / "result.json").read_text())
    copy = tmp_path / "model"
    shutil.copytree(result["model"], copy)
    manifest = json.loads((copy / "tlauto.json").read_text())
    for name in ("../model", "members/../../elsewhere", "/tmp"):
        wrong = {**manifest, "ensemble": {**manifest["ensemble"], "members": {name: 0.5}, "weight": 0.5}}
        (copy / "tlauto.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="names the folder"):
            tlauto.load(copy)
    (copy / "tlauto.json").write_text(json.dumps(manifest))
    other = copy / "members" / "1" / "tlauto.json"
    kept = other.read_text()
    other.write_text(json.dumps({**json.loads(kept), "labels": ["x", "y", "z"]}))
    with pytest.raises(DataError, match="does not belong to the model bundle"):
        tlauto.load(copy)
    shutil.rmtree(copy / "members" / "1")
    with pytest.raises(DataError, match=r"not a model bundle|incomplete"):
        tlauto.load(copy)


def test_one_model_ships_when_one_is_asked_for(searched: Path) -> None:
    done = run(
        "search", "--data", "patches", *TINY, "--trials", "3", "--ensemble", "1", "--study", "single",
        "--json", cwd=searched,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["members"] == {".": 1.0}
    wrong = run("search", "--data", "patches", *TINY, "--ensemble", "0", cwd=searched)
    assert wrong.returncode == 1
    assert "--ensemble must be from 1" in wrong.stderr


def test_frozen_trials_that_were_not_proven_may_answer_where_none_was() -> None:
    """Of many images none is cross-validated, and those of the validation part are enough."""
    params = {"backbone": "timm:a", "strategy": "feature_extraction", "head": "linear"}
    frozen = [TrialRecord(n, "complete", params, 0.9, {"val_loss": 0.1}) for n in range(2)]
    tuned = record(2, "timm:a", 0.8)
    assert proven([*frozen, tuned]) == [*frozen, tuned]
    held_out = replace(frozen[0], attrs={"val_loss": 0.1, "held_out": 0.9})
    assert proven([held_out, frozen[1], tuned]) == [held_out, tuned]
