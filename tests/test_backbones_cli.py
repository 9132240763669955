"""`tlauto backbones` and `tlauto weights`, run as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from tlauto.cli import app
from tlauto.errors import TlautoError, UnknownNameError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A weights folder with one good file, one of another architecture and one nobody knows."""
    monkeypatch.setenv("TLAUTO_PLUGINS", "")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    (tmp_path / "weights" / "timm").mkdir(parents=True)
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    for name in ("test_resnet.mine", "test_vit.wrong", "no_such_network"):
        save_file(state, tmp_path / "weights" / "timm" / f"{name}.safetensors")
    return tmp_path / "weights"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_backbones_lists_by_glob_in_eighty_columns(folder: Path) -> None:
    result = run("backbones", "timm:test_*", "--weights-dir", str(folder), "--offline")
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.output.splitlines()[:-1])
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert lines["timm:test_resnet.mine"].rstrip().endswith("at hand")
    assert lines["timm:test_vit.r160_in1k"].rstrip().endswith("missing")


def test_backbones_json_is_complete(folder: Path) -> None:
    result = run("backbones", "timm:test_resnet.mine", "--weights-dir", str(folder), "--json")
    (found,) = json.loads(result.stdout)
    assert set(found) == {
        "id", "params_m", "gmacs", "input_size", "pretraining", "licence", "accuracy", "cost", "is_default",
        "weights",
    }  # fmt: skip
    assert found["weights"] == {
        "state": "at_hand",
        "detail": f"weights folder: {folder}/timm/test_resnet.mine.safetensors",
        "path": f"{folder}/timm/test_resnet.mine.safetensors",
    }


def test_a_glob_without_colon_looks_in_every_provider() -> None:
    result = run("backbones", "resnet18", "--json", "--offline")
    assert [found["id"] for found in json.loads(result.stdout)] == ["timm:resnet18", "torchvision:resnet18"]


def test_few_backbones_come_with_where_their_weights_are(folder: Path) -> None:
    result = run("backbones", "timm:test_vit.r160_in1k", "--weights-dir", str(folder), "--offline")
    assert "--offline forbids the download" in result.output


def test_a_glob_that_matches_nothing_is_an_error() -> None:
    result = run("backbones", "timm:no_such_*")
    assert isinstance(result.exception, UnknownNameError)
    assert "no backbone matches 'timm:no_such_*'" in str(result.exception)


def test_without_a_glob_shortlists_and_the_folder_are_listed(folder: Path) -> None:
    result = run("backbones", "--weights-dir", str(folder), "--offline", "--json")
    ids = [found["id"] for found in json.loads(result.stdout)]
    assert "timm:test_resnet.mine" in ids and "timm:resnet18.a1_in1k" in ids and "torchvision:vgg16" in ids
    assert ids == sorted(ids) and len(ids) < 100


def test_weights_list_names_files_at_hand_and_those_nobody_uses(folder: Path) -> None:
    result = run("weights", "list", "--weights-dir", str(folder), "--json")
    listed = json.loads(result.stdout)
    at_hand = {found["id"]: found for found in listed["weights"]}
    assert {"timm:test_resnet.mine", "timm:test_vit.wrong"} <= set(at_hand)
    file = folder / "timm" / "test_resnet.mine.safetensors"
    assert at_hand["timm:test_resnet.mine"] == {
        "id": "timm:test_resnet.mine", "path": str(file), "bytes": file.stat().st_size,
    }  # fmt: skip
    assert listed["unused"] == [f"{folder}/timm/no_such_network.safetensors"]
    assert "not used: " in run("weights", "list", "--weights-dir", str(folder)).output


def test_weights_verify_builds_each_and_fails_on_the_wrong_one(folder: Path) -> None:
    result = run(
        "weights", "verify", "timm:test_resnet.mine", "timm:test_vit.wrong", "--weights-dir", str(folder)
    )
    assert result.exit_code == 1
    good, bad, count = result.output.splitlines()
    assert good == "timm:test_resnet.mine: fits"
    assert "does not hold weights of timm:test_vit.wrong" in bad
    assert count == "2 checked, 1 bad"


def test_weights_verify_checks_the_hash_in_a_published_name(folder: Path, tmp_path: Path) -> None:
    (folder / "timm" / "test_resnet.mine.safetensors").rename(tmp_path / "test_resnet-0123abcd.safetensors")
    given = f"timm:test_resnet={tmp_path / 'test_resnet-0123abcd.safetensors'}"
    result = run("weights", "verify", "timm:test_resnet", "--weights", given)
    assert result.exit_code == 1
    assert "its sha256 does not begin with 0123abcd" in result.output


def test_weights_fetch_says_in_a_sentence_that_there_is_no_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    result = run("weights", "fetch", "timm:test_resnet")
    assert isinstance(result.exception, TlautoError)
    assert "cannot be reached" in str(result.exception)


def test_weights_fetch_of_weights_at_hand_says_where_they_are(folder: Path) -> None:
    result = run("weights", "fetch", "timm:test_resnet.mine", "--weights-dir", str(folder))
    assert (
        result.output
        == f"timm:test_resnet.mine: weights folder: {folder}/timm/test_resnet.mine.safetensors\n"
    )


@pytest.mark.parametrize("text", ["resnet18.pth", "resnet18=x.pth"])
def test_a_weights_option_of_another_form_is_wrong_usage(text: str) -> None:
    result = run("backbones", "timm:resnet18", "--weights", text)
    assert result.exit_code == 2
    assert "is not ID=PATH, for example timm:resnet18=resnet18.safetensors" in " ".join(result.output.split())


def test_an_id_without_provider_is_said_so() -> None:
    result = run("weights", "fetch", "resnet18")
    assert "'resnet18' is not provider:name" in str(result.exception)
