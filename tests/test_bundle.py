"""The model bundle: what is saved answers the same when loaded, and nothing damaged is loaded."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tlauto.contracts import BackboneInfo, TrialDone, TrialSpec, WeightsOptions
from tlauto.data.dataset import Dataset, Item
from tlauto.errors import ConfigError, DataError, UnknownNameError
from tlauto.plugins import registry
from tlauto.results.bundle import load_bundle, save_bundle
from tlauto.results.files import sha256

RANDOM = WeightsOptions(pretrained=False, offline=True)
METRICS = {"accuracy": {"value": 0.9, "low": 0.8, "high": 0.95}, "roc_auc": {"value": math.nan}}


def write_images(folder: Path, count: int = 6) -> list[Path]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{i}.png" for i in range(count)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(file)
    return files


def make_spec(
    task: str, head: str, backbone: str, weights: WeightsOptions = RANDOM, **params: Any
) -> TrialSpec:
    return TrialSpec(
        number=7, dataset="/home/someone/data.json", task=task, metric="accuracy", backbone=backbone,
        strategy="feature_extraction", head=head, params={f"head.{head}.{k}": v for k, v in params.items()},
        weights=weights, seed=3, epochs=1, folder="/home/someone/trial", cache="/home/someone/cache",
    )  # fmt: skip


def make_dataset(files: list[Path], task: str) -> Dataset:
    targets: list[Any] = {"multiclass": [0, 1, 2], "multilabel": [(0, 1), (), (2,)]}.get(
        task, [0.5, 1.5, 2.5]
    )
    splits = ("train", "train", "val", "test")
    items = tuple(
        Item(file.name, targets[i % 3], splits[i % 4], sha256(file)) for i, file in enumerate(files)
    )
    classes = () if task == "regression" else ("ant", "bee", "Wespe ü|x")
    return Dataset(str(files[0].parent), task, classes, items, fingerprint="f" * 64)


def write_bundle(
    folder: Path, files: list[Path], *, task: str = "multiclass", head: str = "linear",
    backbone: str = "timm:test_efficientnet", weights: WeightsOptions = RANDOM,
    comparison: dict[str, Any] | None = None, kind: Any = None, **params: Any,
) -> Any:  # fmt: skip
    """Save an untrained classifier as a bundle and return the classifier."""
    import torch

    from tlauto.builtin.tasks import task as find_task
    from tlauto.space import complete
    from tlauto.training.model import assemble

    torch.manual_seed(0)
    spec, dataset = make_spec(task, head, backbone, weights, **params), make_dataset(files, task)
    found, chosen = registry().head(head), registry().provider(backbone.partition(":")[0])
    width = find_task(task).num_outputs(dataset.classes)
    built = chosen.load(backbone, weights)
    classifier = assemble(built, found, complete(found.space, params), width, kind)
    # Every tensor away from its initial value, so that one left out would change the answers.
    for tensor in classifier.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.1)
    done = TrialDone(7, 0.9, METRICS, 0.1, 1, 1, 1.0, "checkpoint.safetensors", versions={"torch": "2"},
                     provenance={"backbone": "tlauto 0.1.0", "head": "tlauto 0.1.0"})  # fmt: skip
    save_bundle(
        folder, classifier=classifier, spec=spec, dataset=dataset, done=done, evaluated_on="test",
        info=BackboneInfo(backbone, licence="Apache-2.0"), comparison=comparison,
    )  # fmt: skip
    return classifier


def answers_of(classifier: Any, files: list[Path], task: str) -> np.ndarray:
    from tlauto.builtin.tasks import task as find_task
    from tlauto.training.predictor import Predictor

    return Predictor(classifier, classifier.source.input, find_task(task), ()).predict_files(files)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    write_bundle(folder, files)
    return folder


@pytest.fixture
def bundle_folder(saved: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


CASES = [
    ("multiclass", "linear", "timm:test_efficientnet", {}),
    ("multiclass", "mlp", "timm:test_vit", {"input": "flattened", "hidden": 64, "layers": 2}),
    ("multilabel", "cosine", "timm:test_resnet", {}),
    ("regression", "mlp", "torchvision:squeezenet1_1", {}),
    ("multiclass", "linear", "keras:MobileNet-0.25-128", {}),
]


@pytest.mark.parametrize(("task", "head", "backbone", "params"), CASES, ids=lambda v: str(v) if v else "")
def test_a_loaded_bundle_answers_as_the_saved_model_did(
    task: str, head: str, backbone: str, params: dict[str, Any], tmp_path: Path, files: list[Path]
) -> None:
    classifier = write_bundle(tmp_path / "model", files, task=task, head=head, backbone=backbone, **params)
    expected = answers_of(classifier, files, task)
    loaded = load_bundle(tmp_path / "model")
    found = np.stack([row for _, row in loaded.outputs(map(str, files))])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0


REAL = ["timm:mobilenetv2_100.inat_insect_pad_same", "torchvision:squeezenet1_1", "keras:MobileNet-0.50-160"]


@pytest.mark.parametrize("backbone", REAL)
def test_a_bundle_of_a_local_weights_file_loads_without_that_file(
    backbone: str, real_weights: Path, tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = WeightsOptions(folder=str(real_weights), offline=True)
    classifier = write_bundle(tmp_path / "model", files, backbone=backbone, weights=options)
    expected = answers_of(classifier, files, "multiclass")
    monkeypatch.delenv("TLAUTO_WEIGHTS")
    found = np.stack([row for _, row in load_bundle(tmp_path / "model").outputs(map(str, files))])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert str(real_weights) not in (tmp_path / "model" / "tlauto.json").read_text(encoding="utf-8")


def test_a_bundle_keeps_what_is_needed_to_trust_it(saved: Path) -> None:
    data = json.loads((saved / "tlauto.json").read_text(encoding="utf-8"))
    assert data["format_version"] == 1
    assert data["labels"] == ["ant", "bee", "Wespe ü|x"]
    assert data["backbone"]["licence"] == "Apache-2.0"
    assert data["metrics"]["accuracy"] == {"value": 0.9, "low": 0.8, "high": 0.95}
    assert data["metrics"]["roc_auc"] == {"value": None}
    assert data["input"]["size"] == 160
    assert data["dataset"] == {"fingerprint": "f" * 64, "images": {"train": 4, "val": 1, "test": 1},
                               "fit_on": ["train"]}  # fmt: skip
    assert data["provenance"]["backbone"] == "tlauto 0.1.0"
    loaded = load_bundle(saved)
    assert loaded.labels == ("ant", "bee", "Wespe ü|x")
    assert math.isnan(loaded.manifest.metrics["roc_auc"]["value"])


def test_a_bundle_names_no_path_of_the_machine_that_made_it(saved: Path, files: list[Path]) -> None:
    for name in ("tlauto.json", "README.md"):
        text = (saved / name).read_text(encoding="utf-8")
        assert "/home/someone" not in text
        assert str(files[0].parent) not in text


def test_the_model_card_says_what_how_good_from_what_and_whose(tmp_path: Path, files: list[Path]) -> None:
    comparison = {"metric": "accuracy", "gain": 0.02, "low": -0.01, "high": 0.05, "significant": False}
    write_bundle(tmp_path / "model", files, comparison=comparison)
    card = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    expected = [
        "Its 3 classes: ant, bee",
        "pip install tlauto\n",
        "tlauto predict model photo.jpg",
        "| accuracy | 0.9000 | 0.8000 to 0.9500 |",
        "| ROC-AUC | undefined |",
        "test part of 1 images",
        "not significant",
        "Fingerprint of the dataset",
        "| head | tlauto 0.1.0 |",
        "No pretrained weights were used",
    ]
    assert [text for text in expected if text not in card] == []


def test_a_bundle_is_as_readable_as_other_files(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    assert saved.stat().st_mode == (tmp_path / "folder").stat().st_mode
    modes = {file.stat().st_mode for file in saved.iterdir()}
    assert modes == {(tmp_path / "file").stat().st_mode}


def test_a_bundle_loads_where_the_trial_and_its_data_are_gone(bundle_folder: Path, tmp_path: Path) -> None:
    moved = bundle_folder.rename(tmp_path / "elsewhere")
    assert load_bundle(moved).labels[0] == "ant"


def test_predictions_are_ordered_by_probability_and_cut_at_top_k(saved: Path, files: list[Path]) -> None:
    first = load_bundle(saved).predict(files, top_k=2)[0]
    chances = list((first.probabilities or {}).values())
    assert len(chances) == 2
    assert chances == sorted(chances, reverse=True)
    assert first.labels == (first.label,) == tuple(first.probabilities or {})[:1]
    assert first.path == str(files[0])
    with pytest.raises(ConfigError, match="at least 1"):
        load_bundle(saved).predict(files, top_k=0)


def test_a_multilabel_answer_is_every_class_of_even_chance_or_more(tmp_path: Path, files: list[Path]) -> None:
    write_bundle(tmp_path / "model", files, task="multilabel")
    for answer in load_bundle(tmp_path / "model").predict(files, top_k=3):
        chances = answer.probabilities or {}
        assert set(answer.labels) == {name for name, chance in chances.items() if chance >= 0.5}


def test_an_unreadable_image_is_an_error_or_told_to_the_caller(
    saved: Path, files: list[Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    loaded = load_bundle(saved)
    with pytest.raises(DataError, match=r"bad\.jpg"):
        loaded.predict([files[0], bad])
    told: list[tuple[str, str]] = []
    answers = loaded.predict([files[0], bad, files[1]], on_unreadable=lambda *say: told.append(say))
    assert [answer.path for answer in answers] == [str(files[0]), str(files[1])]
    assert [path for path, _ in told] == [str(bad)]


# --- writing ----------------------------------------------------------------------------------------


def test_saving_again_replaces_the_older_bundle_and_leaves_nothing_beside_it(
    bundle_folder: Path, files: list[Path]
) -> None:
    (bundle_folder / "old-note.txt").write_text("of the older bundle")
    write_bundle(bundle_folder, files, task="regression")
    assert load_bundle(bundle_folder).manifest.task == "regression"
    assert not (bundle_folder / "old-note.txt").exists()
    assert os.listdir(bundle_folder.parent) == ["model"]


def test_a_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, files: list[Path]) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not a model bundle"):
        write_bundle(folder, files)
    assert (folder / "chapter1.txt").read_text() == "years of work"
    assert os.listdir(tmp_path) == ["thesis"]


def test_a_failed_save_keeps_the_older_bundle(bundle_folder: Path, files: list[Path]) -> None:
    before = (bundle_folder / "tlauto.json").read_text(encoding="utf-8")
    with pytest.raises(TypeError):
        write_bundle(bundle_folder, files, comparison={"gain": object()})
    assert (bundle_folder / "tlauto.json").read_text(encoding="utf-8") == before
    assert os.listdir(bundle_folder.parent) == ["model"]


def test_what_a_killed_save_left_is_removed_by_the_next_one(bundle_folder: Path, files: list[Path]) -> None:
    killed, running = (bundle_folder.parent / f".model-{name}.new" for name in ("killed", "running"))
    for left in (killed, running):
        left.mkdir()
    os.utime(killed, (0, 0))
    write_bundle(bundle_folder, files)
    assert sorted(os.listdir(bundle_folder.parent)) == [".model-running.new", "model"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write a model bundle to"):
        write_bundle(tmp_path / "file" / "model", files)


# --- reading what is damaged or foreign -------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "tlauto.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


DAMAGE: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("foreign", lambda d: d.update(format="other"), "does not describe a tlauto model bundle"),
    ("newer", lambda d: d.update(format_version=6), "format version 6, this tlauto reads up to 5; update it"),
    ("odd version", lambda d: d.update(format_version="x"), "'format_version' is 'x'"),
    ("no labels", lambda d: d.pop("labels"), "it has no 'labels'"),
    ("labels of one", lambda d: d.update(labels=["ant"]), "'labels' holds 1 classes"),
    ("labels twice", lambda d: d.update(labels=["ant", "ant", "bee"]), "holds a class twice"),
    ("labels no texts", lambda d: d.update(labels=[1, 2, 3]), "'labels' is not a list of texts"),
    ("more labels", lambda d: d["labels"].append("fly"), "do not fit the network"),
    ("features", lambda d: d.update(features="all"), "'features' is 'all'"),
    ("task", lambda d: d.update(task="detection"), "'task' is 'detection'"),
    ("size", lambda d: d["input"].update(size=10**9), "'input.size' is 1000000000"),
    ("mean", lambda d: d["input"].update(mean=[0.5]), "is damaged"),
    ("std", lambda d: d["input"].update(std=[0, 1, 1]), "'input.std'"),
    ("extra input", lambda d: d["input"].update(eval="1"), "is damaged"),
    ("interpolation", lambda d: d["input"].update(interpolation="__class__"), "'input.interpolation'"),
    ("spec", lambda d: d["spec"].pop("head"), "is damaged"),
    ("backbone", lambda d: d["backbone"].update(id="timm:test_vit"), "'backbone' and 'spec.backbone' differ"),
    ("probe", lambda d: d.update(probe=[9.0, 9.0, 9.0]), "answers differently than when it was saved"),
    ("hash", lambda d: d.update(sha256="0" * 64), "damaged or was changed"),
    ("metrics", lambda d: d.update(metrics={"accuracy": 1}), "'metrics.accuracy' has no value"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_a_damaged_manifest_is_one_sentence(
    change: Callable[[dict[str, Any]], object], message: str, bundle_folder: Path
) -> None:
    edit(bundle_folder, change)
    with pytest.raises(DataError) as raised:
        load_bundle(bundle_folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00\x01", "[" * 100_000])
def test_a_manifest_that_is_no_json_object_is_one_sentence(text: str, bundle_folder: Path) -> None:
    (bundle_folder / "tlauto.json").write_text(text)
    with pytest.raises(DataError, match=r"tlauto\.json is damaged"):
        load_bundle(bundle_folder)


def test_missing_things_are_named(bundle_folder: Path, tmp_path: Path, files: list[Path]) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_bundle(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file, not a folder"):
        load_bundle(files[0])
    (bundle_folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"incomplete: model\.safetensors is missing"):
        load_bundle(bundle_folder)
    (bundle_folder / "tlauto.json").unlink()
    with pytest.raises(DataError, match="is not a model bundle"):
        load_bundle(bundle_folder)


def test_tensors_that_are_cut_short_or_no_safetensors_are_refused(bundle_folder: Path) -> None:
    file = bundle_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or was changed"):
        load_bundle(bundle_folder)
    # With a hash that was forged to fit, the format itself must refuse it; nothing is unpickled.
    edit(bundle_folder, lambda data: data.update(sha256=sha256(file)))
    with pytest.raises(DataError, match=r"model\.safetensors is damaged"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tlauto.json"])
def test_a_link_out_of_the_folder_is_not_followed(name: str, bundle_folder: Path, tmp_path: Path) -> None:
    outside = (bundle_folder / name).rename(tmp_path / f"outside-{name}")
    (bundle_folder / name).symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the bundle's folder"):
        load_bundle(bundle_folder)


@pytest.mark.parametrize(
    "backbone", ["timm:../../etc/passwd", "timm:local-dir:/etc", "timm:hf-hub:a/b", "timm:"]
)
def test_a_backbone_name_that_is_a_path_or_an_address_is_refused(backbone: str, bundle_folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["backbone"]["id"] = data["spec"]["backbone"] = backbone

    edit(bundle_folder, change)
    with pytest.raises(DataError, match="cannot be built here: no backbone"):
        load_bundle(bundle_folder)


def test_a_missing_plugin_is_named_with_how_to_install_it(bundle_folder: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["backbone"]["id"] = data["spec"]["backbone"] = "acme:tiny"
        data["provenance"]["backbone"] = "tlauto-acme 1.2"

    edit(bundle_folder, change)
    with pytest.raises(UnknownNameError) as raised:
        load_bundle(bundle_folder)
    assert "needs the backbone 'acme'" in str(raised.value)
    assert "it came from tlauto-acme 1.2: pip install tlauto-acme" in str(raised.value)


def test_a_device_that_is_not_there_is_one_sentence(saved: Path) -> None:
    with pytest.raises(ConfigError, match="this machine has no device 'cuda:99'"):
        load_bundle(saved, "cuda:99")
