"""Promises of the project's own files: sizes, names, pins, and what the documents say."""

from __future__ import annotations

import ast
import importlib
import os
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("tlauto", "plugins", "tests", "bench", "examples")
PYTHON = sorted(f for folder in FOLDERS for f in (ROOT / folder).rglob("*.py") if ".venv" not in f.parts)
PUBLIC = ("tlauto", "tlauto.testing")


@pytest.mark.parametrize("file", PYTHON, ids=lambda f: str(f.relative_to(ROOT)))
def test_a_file_is_short_and_so_are_its_functions(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or node.lineno) - node.lineno < 50, f"{node.name} is over 50 lines"


@pytest.mark.parametrize("name", PUBLIC)
def test_all_is_sorted_and_complete(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(module.__all__)
    for public in module.__all__:
        assert getattr(module, public) is not None
    imported = {n for n, v in vars(module).items() if not n.startswith("_") and hasattr(v, "__module__")}
    from_tlauto = {
        n for n in imported if str(getattr(vars(module)[n], "__module__", "")).startswith("tlauto")
    }
    assert from_tlauto <= set(module.__all__)


def test_every_command_appears_in_the_readme() -> None:
    from tlauto.cli import COMMANDS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f"tlauto {name}" not in readme] == []


def test_every_command_has_a_module_with_help_that_begins_with_a_verb_and_shows_an_example() -> None:
    import click

    from tlauto.cli import COMMANDS

    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(f"tlauto.cli.{module}").command
        assert isinstance(command, click.Command), name
        text = f"{command.help or ''}\n{command.epilog or ''}"
        assert text[:1].isupper(), f"tlauto {name} --help says nothing"
        assert f"tlauto {name}" in text, f"tlauto {name} --help shows no example"


def _pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def test_every_pin_is_an_exact_version_from_the_registry() -> None:
    lines = _pins()
    wrong = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!-]+", line)]
    assert wrong == []
    names = [line.partition("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))
    # torchvision is compiled against one torch: the two are pinned together.
    assert "torch==2.15.0" in lines
    assert "torchvision==0.29.2" in lines


def test_every_dependency_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in _pins()}
    for file in [ROOT / "pyproject.toml", *(ROOT / "plugins").glob("*/pyproject.toml")]:
        project = tomllib.loads(file.read_text())["project"]
        wanted = list(project.get("dependencies", []))
        for extra in project.get("optional-dependencies", {}).values():
            wanted += extra
        names = {re.split(r"[\s<>=!~;\[]", want, maxsplit=1)[0].lower().replace("_", "-") for want in wanted}
        assert {name for name in names if not name.startswith("tlauto")} <= pinned, file


def test_no_file_of_the_project_is_a_lock_file_with_addresses() -> None:
    locks = [f.name for f in ROOT.iterdir() if f.name.endswith(".lock") or f.name == "requirements.txt"]
    assert locks == []


def test_every_link_of_a_document_leads_to_a_file() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "plugins").glob("*/README.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


def test_every_test_that_a_document_names_exists() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"`(tests/[\w/]+\.py)", document.read_text(encoding="utf-8")):
            places = [ROOT, *(ROOT / "plugins").iterdir()]
            assert any((place / name).exists() for place in places), f"{document.name} names {name}"


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().rstrip().endswith("make test\nmake test-slow")
