"""docs/plugins.md says what the code says, and its examples work."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tlauto import hookspecs, testing
from tlauto.contracts import Backbone, BackboneProvider, FreezeStrategy, TaskHead, WeightsOptions
from tlauto.errors import WeightsError
from tlauto.executors import Executor
from tlauto.levels import Levelled
from tlauto.plugins import CONTRACTS, CORE_HOOKS, load_plugins
from tlauto.pool.base import Pool
from tlauto.scales import Scalable
from tlauto.splits import Split, Splittable
from tlauto.testing import TaskHeadSuite, TrackerSuite
from tlauto.trackers import Recorder, Tracker

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
EXAMPLE = ROOT / "plugins" / "tlauto-example"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS, flags=re.DOTALL)


def _example(class_name: str) -> types.ModuleType:
    """The code block that defines a class, run as a module."""
    source = next(block for block in _blocks("python") if f"class {class_name}:" in block)
    module = types.ModuleType("example_of_the_docs")
    exec(compile(source, f"docs/plugins.md ({class_name})", "exec"), vars(module))
    return module


def _signature(function: Callable[..., object]) -> str:
    """`name(arguments) -> result` as the source writes it, without `self`."""
    signature = inspect.signature(function)
    arguments = [f"{p.name}: {p.annotation}" for p in signature.parameters.values() if p.name != "self"]
    # Annotations are strings that Python has written anew, with single quotes.
    return f"{function.__name__}({', '.join(arguments)}) -> {signature.return_annotation}".replace("'", '"')


@pytest.mark.parametrize("hook", CORE_HOOKS)
def test_every_hook_is_documented_with_its_exact_signature_and_suite(hook: str) -> None:
    assert f"### `{_signature(getattr(hookspecs, hook))}`\n" in DOCS
    suite = f"{CONTRACTS[hook].__name__}Suite"
    assert f"suite: `{suite}`" in DOCS
    assert suite in testing.__all__


def test_no_hook_is_documented_that_does_not_exist() -> None:
    assert set(re.findall(r"### `(\w+)\(", DOCS)) == set(CORE_HOOKS)


@pytest.mark.parametrize(
    "contract",
    [
        *(BackboneProvider, Backbone, Splittable, Split, Levelled, Scalable, FreezeStrategy, TaskHead),
        *(Tracker, Recorder, Executor, Pool),
    ],
)
def test_every_member_of_a_contract_is_documented_with_its_exact_signature(contract: type) -> None:
    lines = {line.strip() for line in DOCS.splitlines()}
    for name, annotation in contract.__annotations__.items():
        assert f"{name}: {annotation}" in lines
    methods = [
        value for name, value in vars(contract).items() if inspect.isfunction(value) and name[0] != "_"
    ]
    assert methods
    for method in methods:
        assert _signature(method) in lines


def test_the_walk_through_shows_the_files_of_the_example_plugin() -> None:
    shown = [*_blocks("python"), *_blocks("toml")]
    for file in ("pyproject.toml", "tlauto_example/__init__.py", "tests/test_bias_only.py"):
        assert (EXAMPLE / file).read_text(encoding="utf-8") in shown, f"docs/plugins.md shows another {file}"


def test_the_example_plugin_is_no_larger_than_the_docs_promise() -> None:
    test = (EXAMPLE / "tests" / "test_bias_only.py").read_text(encoding="utf-8")
    assert len([line for line in test.splitlines() if line]) == 4, "an import each, and two lines of class"
    module = (EXAMPLE / "tlauto_example" / "__init__.py").read_text(encoding="utf-8")
    assert len(module.splitlines()) <= 40


class TestTheHeadOfTheDocs(TaskHeadSuite):
    head = _example("NormLinear").NormLinear()

    def test_importing_it_loads_no_heavy_library(self) -> None:
        """It has no importable module; that the file's top imports only tlauto is visible in the docs."""
        source = next(block for block in _blocks("python") if "class NormLinear:" in block)
        assert set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE)) == {"tlauto"}


def test_the_hook_of_the_docs_head_returns_it() -> None:
    module = _example("NormLinear")
    assert [head.name for head in module.task_heads()] == ["norm_linear"]
    assert "norm_linear" not in load_plugins().names("task_heads")


class TestTheTrackerOfTheDocs(TrackerSuite):
    tracker = _example("JsonLines").JsonLines()

    def test_importing_it_loads_no_heavy_library(self) -> None:
        """It has no importable module; what it imports is visible in the docs."""
        source = next(block for block in _blocks("python") if "class JsonLines:" in block)
        found = set(re.findall(r"^(?:from|import) (\w+)", source, flags=re.MULTILINE))
        assert found == {"json", "pathlib", "tlauto"}


def test_the_provider_of_the_docs_loads_its_weights_and_refuses_to_do_without(tmp_path: Path) -> None:
    (provider,) = _example("Mine").backbone_providers()
    assert isinstance(provider, BackboneProvider)
    random = provider.load("mine:tiny", WeightsOptions(pretrained=False))
    assert isinstance(random, Backbone)
    assert random.feature_shape.pooled == 32
    folder = WeightsOptions(folder=str(tmp_path))
    with pytest.raises(WeightsError, match=r"tiny\.safetensors; name the file with --weights mine:tiny=PATH"):
        provider.load("mine:tiny", folder)
    (tmp_path / "mine").mkdir()
    save_file(random.module.state_dict(), tmp_path / "mine" / "tiny.safetensors")
    assert provider.weights_status("mine:tiny", folder).state == "at_hand"
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(provider.load("mine:tiny", folder).pooled(images), random.pooled(images))
    assert [info.id for info in provider.find("t*", folder)] == ["mine:tiny"]
