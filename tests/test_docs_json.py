"""`docs/json.md` tells the truth: every command's JSON has the documented fields and no other."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests_support import TINY, run

DOCUMENT = Path(__file__).parents[1] / "docs" / "json.md"
TYPES: Mapping[str, type | tuple[type, ...]] = {
    "text": str, "boolean": bool, "integer": int, "number": (int, float), "object": dict, "metrics": dict,
    "values": dict,
    "trial": dict, "list": list, "null": type(None),
}  # fmt: skip
BACKBONE = TINY[1]
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "show": ("show",),
    "leaderboard": ("leaderboard",),
    "evaluate": ("evaluate", "tlauto-runs/patches/model", "--data", "patches"),
    "predict": ("predict", "tlauto-runs/patches/model", "patches/red", "--top-k", "2"),
    "doctor": ("doctor", "patches"),
    "plugins": ("plugins",),
    "backbones": ("backbones", "efficientnet-lite:*"),
    "rerun": ("rerun", "patches", "0"),
    "weights list": ("weights", "list", "--offline"),
    "cache list": ("cache", "list"),
    "weights verify": ("weights", "verify", "efficientnet-lite:lite0"),
}


def sections() -> dict[str, str]:
    """Text of each section by command, such as `weights list`."""
    parts = re.split(r"^## `(.+) --json`$", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def fields(command: str) -> dict[str, str]:
    """Documented types of a command's top-level fields; `show` has those of `search` too."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", sections()[command], flags=re.MULTILINE)
    return {**(fields("search") if command == "show" else {}), **dict(rows)}


def strictly(text: str) -> Any:
    """The value of JSON text; NaN and Infinity, which are no JSON, are refused."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> dict[str, Any]:
    """What each command prints after a tiny search."""
    folder = tmp_path_factory.mktemp("json")
    make_patches(folder / "patches")
    searched = ("search", "--data", "patches", *TINY, "--trials", "3", "--seed", "0")
    found = {}
    for name, arguments in {"search": searched, **COMMANDS}.items():
        done = run(*arguments, "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        found[name] = strictly(done.stdout)
    return found


def test_every_command_with_json_is_documented_and_tried() -> None:
    import importlib

    import click

    from tlauto import cli

    speaking = set()
    for name, (module, _) in cli.COMMANDS.items():
        command = importlib.import_module(f"tlauto.cli.{module}").command
        members = command.commands if isinstance(command, click.Group) else {"": command}
        for member, inner in members.items():
            if any("--json" in option.opts for option in inner.params):
                speaking.add(f"{name} {member}".strip())
    assert set(sections()) == speaking == {"search", *COMMANDS}


@pytest.mark.parametrize("command", ["search", *COMMANDS])
def test_the_fields_are_those_documented_and_of_the_type_said(command: str, answers: dict[str, Any]) -> None:
    documented, answer = fields(command), answers[command]
    objects = answer if isinstance(answer, list) else [answer]
    assert objects
    for found in objects:
        assert list(found) == list(documented), "same fields in the same order"
        for name, type_ in documented.items():
            assert is_of(found[name], type_), f"{name} is {found[name]!r}, not {type_}"


def is_of(value: Any, type_: str) -> bool:
    """Whether a JSON value is of a type as the document writes it: `number or null`, `list of text`."""
    kinds = [kind.split()[0] for kind in type_.strip().split(" or ")]
    if isinstance(value, bool):
        return "boolean" in kinds
    if "metrics" in kinds and value is not None and not are_metrics(value):
        return False
    if "values" in kinds and not are_metrics(
        {name: entry for name, entry in value.items() if len(entry) > 1}
    ):
        return False
    if "list" in kinds and type_.strip().endswith(("of text", "of paths")) and isinstance(value, Sequence):
        inner = [item for entry in value for item in (entry if isinstance(entry, list) else [entry])]
        return all(isinstance(item, str) for item in inner)
    return any(isinstance(value, TYPES[kind]) for kind in kinds)


def are_metrics(value: Mapping[str, Any]) -> bool:
    return all(
        set(entry) == {"value", "low", "high"} and all(math.isfinite(number) for number in entry.values())
        for entry in value.values()
    )


def test_the_best_of_search_is_the_first_trial_of_the_leaderboard(answers: dict[str, Any]) -> None:
    assert answers["search"]["best"] == answers["leaderboard"][0]
    assert answers["search"]["trials"] == len(answers["leaderboard"]) == 3
    assert answers["search"]["backbones"] == [BACKBONE]
    assert {**answers["search"], "settings": answers["show"]["settings"]} == answers["show"]


def test_inner_fields_are_named_in_the_text(answers: dict[str, Any]) -> None:
    comparison = answers["search"]["comparison"]
    assert set(comparison) == {"metric", "gain", "low", "high", "significant", "default"} or comparison == {
        "default_is_winner": True
    }
    inner = {
        "search": [comparison, *answers["search"]["screening"]],
        "doctor": [answers["doctor"]["sides"], answers["doctor"]["split"]],
        "backbones": [row["weights"] for row in answers["backbones"]],
        "weights list": answers["weights list"]["weights"],
        "cache list": answers["cache list"]["entries"],
    }
    for command, values in inner.items():
        for name in {name for value in values for name in value}:
            assert f"`{name}`" in sections()[command] or f'"{name}"' in sections()[command], name


def test_every_example_is_json_of_documented_fields() -> None:
    for command, text in sections().items():
        for example in re.findall(r"^```json\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
            value = strictly(example)
            for found in value if isinstance(value, list) else [value]:
                assert set(found) <= set(fields(command)), command


def test_unreadable_files_are_named_in_json(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    (tmp_path / "patches" / "red" / "broken.png").write_bytes(b"not an image")
    (entry,) = strictly(run("doctor", "patches", "--json", cwd=tmp_path).stdout)["unreadable"]
    assert set(entry) == {"path", "reason"}
    assert entry["path"] == "red/broken.png"


def test_an_unusable_dataset_says_so_in_json(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches", classes=1)
    done = run("doctor", "patches", "--json", cwd=tmp_path)
    found = strictly(done.stdout)
    assert done.returncode == 1
    assert list(found) == list(fields("doctor"))
    assert (found["usable"], found["fingerprint"], found["split"]) == (False, None, None)
    assert "class" in found["problem"]
