"""`tlauto predict` and `tlauto evaluate` on a model that really learned to tell colours."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlauto.cli import main
from tlauto.contracts import BackboneInfo, TrialSpec, WeightsOptions
from tlauto.data.dataset import Dataset, Item
from tlauto.errors import DataError
from tlauto.plugins import registry
from tlauto.results.bundle import load_bundle, save_bundle
from tlauto.results.files import sha256

COLOURS = {"blue": (40, 60, 210), "green": (40, 190, 60), "red": (210, 40, 40)}
Run = Callable[..., tuple[int, str, str]]


def write_colours(root: Path, *, count: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = (np.array(colour) + rng.normal(0, 20, (40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{name}{i}.png")
    return root


def dataset_of(root: Path, task: str) -> Dataset:
    """Half of the colour folders for training, the rest for validation."""
    targets: dict[str, list[Any]] = {"multiclass": [0, 1, 2], "multilabel": [(0,), (1,), ()],
                                     "regression": [1.0, 2.0, 3.0]}  # fmt: skip
    classes = {"multiclass": tuple(COLOURS), "multilabel": ("blue", "green"), "regression": ()}
    items = [
        Item(str(file.relative_to(root)), targets[task][k], ("train", "val")[i % 2], sha256(file))
        for k, name in enumerate(COLOURS)
        for i, file in enumerate(sorted((root / name).iterdir()))
    ]
    return Dataset(str(root), task, classes[task], tuple(items), "c" * 64)


def train_bundle(folder: Path, root: Path, *, task: str) -> Path:
    """A probe on a random, frozen backbone: enough to tell colours."""
    from tlauto.training.fit import run_trial
    from tlauto.training.model import restore

    dataset = dataset_of(root, task)
    spec = TrialSpec(
        number=0, dataset="", task=task, metric="rmse" if task == "regression" else "accuracy",
        backbone="timm:test_resnet", strategy="feature_extraction", head="linear",
        params={"probe.solver": "minibatch", "optim.adamw.lr": 0.03},
        weights=WeightsOptions(pretrained=False, offline=True),
        seed=0, epochs=60, folder=str(folder / "trial"), cache=str(folder / "cache"),
    )  # fmt: skip
    done = run_trial(spec, registry(), dataset, device="cpu", on_epoch=lambda _: True)
    classifier = restore(spec, registry(), dataset, folder / "trial" / done.checkpoint, "cpu")
    save_bundle(
        folder / "model", classifier=classifier, spec=spec, dataset=dataset, done=done,
        info=BackboneInfo(spec.backbone), evaluated_on="val",
    )  # fmt: skip
    return folder / "model"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images that the models were made from."""
    return write_colours(tmp_path_factory.mktemp("seen") / "colours", count=8, seed=0)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images that no model has seen."""
    return write_colours(tmp_path_factory.mktemp("fresh") / "colours", count=3, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, seen: Path) -> Path:
    return train_bundle(tmp_path_factory.mktemp("classes"), seen, task="multiclass")


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory, seen: Path) -> Path:
    return train_bundle(tmp_path_factory.mktemp("tags"), seen, task="multilabel")


@pytest.fixture(scope="module")
def number(tmp_path_factory: pytest.TempPathFactory, seen: Path) -> Path:
    return train_bundle(tmp_path_factory.mktemp("number"), seen, task="regression")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line and return exit code, stdout and stderr."""

    def call(*words: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    return call


def test_a_bundle_answers_as_its_trial_did(model: Path, seen: Path) -> None:
    dataset = dataset_of(seen, "multiclass")
    bundle = load_bundle(model)
    files = [str(dataset.file(item)) for item in dataset.part("val")]
    found = np.stack([row for _, row in bundle.outputs(files)])
    with np.load(model.parent / "trial" / "predictions.npz") as kept:
        np.testing.assert_allclose(found, kept["predictions"], rtol=1e-3, atol=1e-4)
    assert bundle.fitted_on() == {item.sha256 for item in dataset.part("train")}


# --- predict ----------------------------------------------------------------------------------------


def test_predict_names_each_image_with_its_class(run: Run, model: Path, fresh: Path) -> None:
    code, out, err = run("predict", model, fresh / "red" / "red0.png", fresh / "blue" / "blue0.png")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith(f"{fresh}/red/red0.png  red ")
    assert lines[1].startswith(f"{fresh}/blue/blue0.png  blue ")


def test_predict_takes_every_image_of_a_folder_and_passes_over_hidden_ones(
    run: Run, model: Path, fresh: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(fresh, tmp_path / "photos"))
    shutil.copytree(fresh, folder / ".thumbnails")
    (folder / "notes.txt").write_text("no image")
    code, out, _ = run("predict", model, folder, "--json")
    answers = json.loads(out)
    assert code == 0
    assert [Path(a["path"]).parent.name for a in answers] == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3
    assert all(a["labels"] == [Path(a["path"]).parent.name] for a in answers)


def test_predict_json_holds_the_best_k_classes(run: Run, model: Path, fresh: Path) -> None:
    _, out, _ = run("predict", model, fresh / "red" / "red0.png", "--json", "--top-k", "2")
    (answer,) = json.loads(out)
    assert set(answer) == {"path", "labels", "probabilities"}
    assert next(iter(answer["probabilities"])) == "red"
    assert len(answer["probabilities"]) == 2


def test_predict_csv_has_a_column_for_each_rank(run: Run, model: Path, fresh: Path) -> None:
    _, out, _ = run("predict", model, fresh, "--csv", "--top-k", "9")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == [
        "path",
        "label",
        "probability",
        "label_2",
        "probability_2",
        "label_3",
        "probability_3",
    ]
    assert [row["label"] for row in rows] == ["blue"] * 3 + ["green"] * 3 + ["red"] * 3
    assert sum(float(rows[0][f"probability{s}"]) for s in ("", "_2", "_3")) == pytest.approx(1, abs=1e-4)


def test_predict_csv_of_a_multilabel_model_has_a_column_for_each_class(
    run: Run, tags: Path, fresh: Path
) -> None:
    _, out, _ = run("predict", tags, fresh, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["path", "labels", "blue", "green"]
    assert [row["labels"] for row in rows] == ["blue"] * 3 + ["green"] * 3 + [""] * 3


def test_predict_says_when_an_image_shows_none_of_the_classes(run: Run, tags: Path, fresh: Path) -> None:
    _, out, _ = run("predict", tags, fresh / "red" / "red1.png")
    assert "  none (nearest: " in out


def test_predict_of_a_regression_model_gives_values_in_the_data_s_unit(
    run: Run, number: Path, fresh: Path
) -> None:
    _, out, _ = run("predict", number, fresh, "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [round(float(row["value"])) for row in rows] == [1] * 3 + [2] * 3 + [3] * 3
    _, out, _ = run("predict", number, fresh / "red" / "red0.png", "--json")
    assert set(json.loads(out)[0]) == {"path", "value"}


def test_predict_names_unreadable_images_and_predicts_the_others(
    run: Run, model: Path, fresh: Path, tmp_path: Path
) -> None:
    bad, empty = tmp_path / "bad.jpg", tmp_path / "empty"
    bad.write_text("not an image")
    empty.mkdir()
    good = fresh / "green" / "green0.png"
    code, out, err = run("predict", model, bad, good, tmp_path / "missing.jpg", empty)
    assert code == 1
    assert out.startswith(f"{good}  green")
    for name in ("bad.jpg", "missing.jpg", str(empty)):
        assert sum(name in line for line in err.splitlines()) == 1, name
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "Missing argument 'MODEL'"), (("MODEL",), "Missing argument 'PATH...'"),
     (("MODEL", "x.jpg", "--top-k", "0"), "--top-k")],
)  # fmt: skip
def test_wrong_usage_of_predict_exits_with_2(run: Run, words: tuple[str, ...], message: str) -> None:
    code, _, err = run("predict", *words)
    assert code == 2
    assert message in err


def test_predict_without_a_model_is_one_sentence(run: Run, tmp_path: Path) -> None:
    code, out, err = run("predict", tmp_path / "model", "x.jpg")
    assert (code, out) == (1, "")
    assert err.startswith("error: the model bundle")
    assert len(err.splitlines()) == 1


# --- evaluate ---------------------------------------------------------------------------------------


def test_evaluate_gives_metrics_with_intervals(run: Run, model: Path, fresh: Path) -> None:
    code, out, err = run("evaluate", model, "--data", fresh, "--json")
    result = json.loads(out)
    assert (code, err) == (0, "")
    assert (result["images"], result["fitted_images"], result["split"]) == (9, 0, "test")
    accuracy = result["metrics"]["accuracy"]
    assert accuracy["value"] == 1.0
    assert 0.6 < accuracy["low"] < 1.0 == accuracy["high"]
    _, shown, _ = run("evaluate", model, "--data", fresh)
    assert "9 images of" in shown
    assert "accuracy" in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80


def test_evaluate_leaves_out_the_images_that_the_model_was_fitted_on(
    run: Run, model: Path, seen: Path
) -> None:
    _, out, err = run("evaluate", model, "--data", seen, "--json")
    assert json.loads(out)["images"] == 12
    assert err == ""
    _, out, err = run("evaluate", model, "--data", seen, "--split", "all", "--json")
    assert (json.loads(out)["images"], json.loads(out)["fitted_images"]) == (24, 12)
    assert "fitted on 12 of these 24 images; the figures are too good" in err


def test_evaluate_refuses_to_test_on_nothing_but_fitted_images(
    model: Path, seen: Path, tmp_path: Path
) -> None:
    dataset = dataset_of(seen, "multiclass")
    for item in dataset.part("train"):
        (tmp_path / Path(item.path).parent).mkdir(exist_ok=True)
        shutil.copy(dataset.file(item), tmp_path / item.path)
    with pytest.raises(DataError, match="fitted on every image"):
        load_bundle(model).evaluate(tmp_path)


def test_evaluate_takes_the_test_part_when_the_data_has_one(
    run: Run, model: Path, fresh: Path, tmp_path: Path
) -> None:
    shutil.copytree(fresh, tmp_path / "data" / "test")
    shutil.copytree(fresh, tmp_path / "data" / "train")
    assert json.loads(run("evaluate", model, "--data", tmp_path / "data", "--json")[1])["images"] == 9
    both = run("evaluate", model, "--data", tmp_path / "data", "--split", "all", "--json")[1]
    assert json.loads(both)["images"] == 18


def test_evaluate_maps_labels_by_name_whatever_the_data_s_order(
    run: Run, model: Path, fresh: Path, tmp_path: Path
) -> None:
    rows = [f"{fresh}/{name}/{name}{i}.png,{name}" for i, name in enumerate(("red", "blue", "red"))]
    (tmp_path / "some.csv").write_text("\n".join(["photo,colour", *rows]) + "\n")
    words = ("--label-column", "colour", "--path-column", "photo", "--json")
    result = json.loads(run("evaluate", model, "--data", tmp_path / "some.csv", *words)[1])
    assert result["images"] == 3
    assert result["metrics"]["accuracy"]["value"] == 1.0


def test_evaluate_of_an_unknown_class_is_one_sentence(
    run: Run, model: Path, fresh: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(fresh, tmp_path / "data"))
    (data / "red").rename(data / "reds")
    code, out, err = run("evaluate", model, "--data", data)
    assert (code, out) == (1, "")
    assert "labels that are no classes of the model" in err
    assert "'reds'; did you mean 'red'? (its classes: blue, green, red)" in err
    assert len(err.splitlines()) == 1


def test_evaluate_names_unreadable_images_and_leaves_them_out(
    run: Run, model: Path, fresh: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(fresh, tmp_path / "data"))
    (data / "red" / "red0.png").write_bytes(b"")
    code, out, err = run("evaluate", model, "--data", data, "--json")
    result = json.loads(out)
    assert (code, result["images"], len(result["unreadable"])) == (0, 8, 1)
    assert "red0.png" in err
    for file in data.rglob("*.png"):
        file.write_bytes(b"")
    code, _, err = run("evaluate", model, "--data", data)
    assert code == 1
    assert "none of the 9 images" in err


@pytest.mark.parametrize(
    ("task", "metric", "best"), [("multilabel", "map", 1.0), ("regression", "rmse", 0.0)]
)
def test_evaluate_works_for_every_task(
    task: str, metric: str, best: float, request: pytest.FixtureRequest, fresh: Path, tmp_path: Path
) -> None:
    model = request.getfixturevalue({"multilabel": "tags", "regression": "number"}[task])
    labels = {"multilabel": ["blue", "green", ""], "regression": ["1", "2", "3"]}[task]
    rows = [f"{fresh}/{name}/{name}{i}.png,{labels[k]}" for k, name in enumerate(COLOURS) for i in range(3)]
    (tmp_path / "data.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    result = load_bundle(model).evaluate(tmp_path / "data.csv")
    assert result["task"] == task
    assert result["metrics"][metric]["value"] == pytest.approx(best, abs=0.3)
