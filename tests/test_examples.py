"""The recipes of examples/: each is valid, says what it does and was measured, and one of them runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tlauto.builtin.tasks import task
from tlauto.contracts import WeightsOptions
from tlauto.plugins import registry
from tlauto.searchspace import SearchSpace

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(file for file in FOLDER.glob("*.py") if file.stem != "recipe")
TINY = "MobileNet-0.25-128"


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(FOLDER))  # As when Python runs the script.
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_there_is_a_script_for_each_classic_recipe() -> None:
    assert [file.stem for file in EXAMPLES] == [
        "keras_resnet50_binary", "keras_vgg16_dense", "resnet18_sgd", "resnet50_last_layers",
        "torchvision_vgg16_4096",
    ]  # fmt: skip


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_a_recipe_fixes_only_parameters_that_its_search_has(file: Path) -> None:
    module, plugins = load(file), registry()
    space = SearchSpace(
        backbones=(module.BACKBONE,),
        strategies=tuple(plugins.strategy(name) for name in module.RECIPE["strategies"]),
        heads=tuple(plugins.head(name) for name in module.RECIPE["heads"]),
        loss=task("multiclass").space,
        fixed=module.RECIPE["params"],
    )
    # Not only known, but read on the way to the one trial.
    assert module.RECIPE["params"].items() <= space.defaults().items()
    provider, _, name = module.BACKBONE.partition(":")
    assert plugins.provider(provider).find(name, WeightsOptions(offline=True))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_a_recipe_states_its_command_and_its_measured_result(file: Path) -> None:
    text = " ".join((load(file).__doc__ or "").split())
    assert f"python examples/{file.name} ./images" in text
    assert re.search(r"--backbone \w+:\S+`: accuracy 0\.\d+ \(95 %: 0\.\d+ to 0\.\d+\)", text)


def test_a_recipe_runs_on_a_folder_of_images(patches: Callable[..., Path], tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "keras" / f"{TINY}.weights.h5"
    weights.parent.mkdir(parents=True)
    environment = {
        **os.environ,
        "KERAS_BACKEND": "torch",
        "TLAUTO_WEIGHTS": str(tmp_path / "weights"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    make = (
        f"import keras; keras.applications.MobileNet(alpha=0.25, weights=None).save_weights({str(weights)!r})"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", make], env=environment, check=True)
    script = next(file for file in EXAMPLES if file.stem == "keras_resnet50_binary")
    command = [sys.executable, str(script), str(patches(classes=2)), "--backbone", f"keras:{TINY}"]
    printed = subprocess.check_output(
        [*command, "--out", str(tmp_path / "runs")], text=True, env=environment, cwd=tmp_path, timeout=300
    )
    assert re.search(r"^ +accuracy  \d\.\d{3}  \(95 %: ", printed, re.MULTILINE)
    assert (tmp_path / "runs" / "keras-resnet50-binary" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.stem)
def test_a_recipe_says_its_first_line_and_its_own_backbone_when_asked_for_help(file: Path) -> None:
    environment, module = {**os.environ, "COLUMNS": "200"}, load(file)
    printed = subprocess.check_output(
        [sys.executable, str(file), "--help"], text=True, env=environment, timeout=60
    )
    assert (module.__doc__ or "").partition("\n")[0] in printed.splitlines()
    assert f"default: {module.BACKBONE}" in printed


def test_a_recipe_says_in_one_line_what_is_wrong_with_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES[0]), "missing", "--out", "runs"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: no dataset at '.*missing'.*\n", ended.stderr)
