"""The bundle of a head that reads several backbones: its parts add up, and nothing damaged is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_bundle import edit, write_bundle, write_images
from test_predict import Run, dataset_of, run, write_colours

from tlauto.contracts import BackboneInfo, TrialSpec, WeightsOptions
from tlauto.errors import DataError, UnknownNameError
from tlauto.plugins import registry
from tlauto.results.bundle import load_bundle, save_bundle

__all__ = ["run"]  # a fixture

OTHERS = ("timm:test_vit", "torchvision:squeezenet1_1")


def ship(folder: Path, root: Path, *, task: str = "multiclass", **given: Any) -> Path:
    """The bundle of a solved head on three random backbones; `given` goes to `save_bundle`."""
    from tlauto.training.fit import run_trial
    from tlauto.training.joined import restore_parts

    dataset = dataset_of(root, task)
    others = given.pop("others", OTHERS)
    spec = TrialSpec(
        number=0, dataset="", task=task, metric="rmse" if task == "regression" else "accuracy",
        backbone="timm:test_resnet", strategy="feature_extraction", head="linear",
        params={"probe.joined": 3, "probe.beside": " ".join(others)},
        weights=WeightsOptions(pretrained=False, offline=True),
        seed=0, epochs=1, folder=str(folder / "trial"), cache=str(root.parent / "cache"),
    )  # fmt: skip
    done = run_trial(spec, registry(), dataset, device="cpu", on_epoch=lambda _: True)
    first, *parts = restore_parts(spec, registry(), dataset, folder / "trial" / done.checkpoint, "cpu")
    infos = [
        BackboneInfo(id, licence=f"licence-{place}") for place, id in enumerate((spec.backbone, *others))
    ]
    save_bundle(
        folder / "model", classifier=first, spec=spec, dataset=dataset, done=done, info=infos[0],
        evaluated_on="val", parts=list(zip(parts, infos[1:], strict=True)), **given,
    )  # fmt: skip
    return folder / "model"


def answers(model: Path, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """What a loaded bundle answers for the validation part, and what its trial did."""
    saved = np.load(model.parent / "trial" / "predictions.npz")
    files = [str(root / str(path)) for path in saved["paths"]]
    return np.stack([row for _, row in load_bundle(model).outputs(files)]), saved["predictions"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colours(tmp_path_factory.mktemp("seen") / "colours", count=8, seed=0)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    return ship(tmp_path_factory.mktemp("shipped"), root)


@pytest.fixture
def model(shipped: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, to damage."""
    return Path(shutil.copytree(shipped, tmp_path / "model"))


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
def test_a_loaded_bundle_answers_as_the_trial_did(task: str, tmp_path: Path, root: Path) -> None:
    found, expected = answers(ship(tmp_path, root, task=task), root)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert expected.std() > 0.1


def test_what_it_says_of_itself(shipped: Path) -> None:
    data = json.loads((shipped / "tlauto.json").read_text())
    assert data["format_version"] == 5 and data["is_part"] is False
    assert list(data["joined"]) == ["joined/1", "joined/2"]
    for (name, digest), backbone in zip(data["joined"].items(), OTHERS, strict=True):
        part = json.loads((shipped / name / "tlauto.json").read_text())
        assert (part["format_version"], part["is_part"], part["sha256"]) == (5, True, digest)
        assert part["backbone"]["id"] == part["spec"]["backbone"] == backbone
        assert part["joined"] == {} and part["metrics"] == {}
        assert "answers nothing by itself" in (shipped / name / "README.md").read_text()
        assert len((shipped / name / "fitted.txt").read_text().split()) == 12
    card = (shipped / "README.md").read_text()
    assert "reads 3 backbones at once" in card
    assert ", with timm:test_vit and torchvision:squeezenet1_1 |" in card
    assert "| backbone 3 | tlauto " in card


def test_the_licences_of_all_weights_are_told(shipped: Path) -> None:
    from tlauto.results.card import write_card
    from tlauto.results.manifest import read_manifest

    manifest = read_manifest(shipped / "tlauto.json")
    weights = replace(manifest.spec.weights, pretrained=True)
    manifest = replace(manifest, spec=replace(manifest.spec, weights=weights))
    card = write_card(manifest, name="model", others=[BackboneInfo(OTHERS[0], licence="CC-BY-NC-4.0")])
    assert "weights: licence-0; of those of timm:test_vit: CC-BY-NC-4.0." in card


def test_it_serves_on_the_command_line(shipped: Path, root: Path, tmp_path: Path, run: Run) -> None:
    good, bad = root / "red" / "red0.png", tmp_path / "bad.jpg"
    bad.write_text("no image")
    code, out, err = run("predict", shipped, good, bad, "--json", "--top-k", "2", "--device", "cpu")
    assert code == 1 and err.count("bad.jpg") == 1, err
    (answer,) = json.loads(out)
    assert answer["labels"] == ["red"] and len(answer["probabilities"]) == 2
    code, out, _ = run("evaluate", shipped, "--data", root, "--split", "all", "--json")
    assert code == 0 and json.loads(out)["metrics"]["accuracy"]["value"] > 0.9


def test_bundles_of_several_backbones_answer_together(shipped: Path, root: Path, tmp_path: Path) -> None:
    other = ship(tmp_path / "other", root, others=OTHERS[::-1])
    both = ship(tmp_path / "both", root, members=[(other, 0.25)], weight=0.75)
    one, two, together = (answers(each, root)[0] for each in (shipped, other, both))
    np.testing.assert_allclose(together, 0.75 * one + 0.25 * two, atol=1e-5)
    inner = both / "members" / "1" / "joined" / "2" / "model.safetensors"
    inner.write_bytes(inner.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged or was changed"):
        load_bundle(both)


@pytest.mark.parametrize("name", ["joined/1", "joined/2"])
def test_a_part_by_itself_is_refused_with_the_bundle_to_use(name: str, shipped: Path, run: Run) -> None:
    code, out, err = run("predict", shipped / name, shipped / "README.md")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1 and f"use the bundle that it lies in, {shipped}" in err.replace("\n", " ")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("tensors", lambda m: spoil(m / "joined/1/model.safetensors"), "is damaged or was changed"),
    ("no tensors", lambda m: (m / "joined/2/model.safetensors").unlink(), "model.safetensors is missing"),
    ("no manifest", lambda m: (m / "joined/2/tlauto.json").unlink(), "joined/2/tlauto.json is missing"),
    ("no folder", lambda m: shutil.rmtree(m / "joined"), "joined/1/tlauto.json is missing"),
    ("swapped", lambda m: swap(m / "joined/1", m / "joined/2"), "does not belong to the model bundle"),
    ("another's", lambda m: edit(m / "joined/1", lambda d: d.update(sha256="0" * 64)), "does not belong to"),
    ("no part", lambda m: edit(m / "joined/1", lambda d: d.update(is_part=False)), "does not belong to"),
    ("labels", lambda m: edit(m / "joined/1", lambda d: d.update(labels=["x", "y", "z"])), "not belong to"),
    ("probe", lambda m: edit(m / "joined/2", lambda d: d.update(probe=[9.0] * 3)), "answers differently"),
    ("path", lambda m: edit(m, lambda d: d.update(joined={"../model": "", "/etc": ""})), "names the folder"),
    ("deeper", lambda m: edit(m, lambda d: d.update(joined={"joined/1/..": ""})), "names the folder"),
    ("fewer", lambda m: edit(m, lambda d: d["joined"].pop("joined/2")), "as many further backbones"),
    ("none", lambda m: edit(m, lambda d: d.pop("joined")), "as many further backbones"),
    ("no texts", lambda m: edit(m, lambda d: d.update(joined={"joined/1": 1})), "is not a text"),
    ("link", lambda m: link(m / "joined/1"), "leads out of the bundle's folder"),
    ("is a part", lambda m: edit(m, lambda d: d.update(is_part=True)), "a part of a model has 'joined'"),
]  # fmt: skip


def spoil(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def swap(one: Path, other: Path) -> None:
    spare = one.rename(one.with_name("spare"))
    other.rename(one)
    spare.rename(other)


def link(folder: Path) -> None:
    folder.symlink_to(folder.rename(folder.parents[2] / "outside"))


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE])
def test_a_damaged_bundle_is_one_sentence(
    damage: Callable[[Path], object], message: str, model: Path
) -> None:
    damage(model)
    with pytest.raises(DataError) as raised:
        load_bundle(model)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_plugin_of_a_part_is_named_with_how_to_install_it(model: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["backbone"]["id"] = data["spec"]["backbone"] = "acme:tiny"
        data["provenance"]["backbone"] = "tlauto-acme 1.2"

    def read(data: dict[str, Any]) -> None:
        data["spec"]["params"]["probe.beside"] = f"{OTHERS[0]} acme:tiny"

    edit(model / "joined/2", change)
    edit(model, read)
    with pytest.raises(UnknownNameError, match=r"needs the backbone 'acme'.*pip install tlauto-acme\)"):
        load_bundle(model)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_a_bundle_of_an_older_format_loads(version: int, tmp_path: Path) -> None:
    files, model = write_images(tmp_path / "images"), tmp_path / "model"
    write_bundle(model, files)
    before = load_bundle(model).predict(files)

    def change(data: dict[str, Any]) -> None:
        assert data["format_version"] == 1, "no newer than it needs to be"
        data["format_version"] = version
        for name in ("joined", "is_part", *(("features", "ensemble") if version == 1 else ())):
            del data[name]

    edit(model, change)
    assert load_bundle(model).predict(files) == before
