"""Plugins are kept apart: real distributions in a folder on the path, loaded by a fresh interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tlauto import plugins
from tlauto.errors import ConfigError, UnknownNameError
from tlauto.plugins import CONTRACTS, CORE_HOOKS, load_plugins

STRATEGY = """
import tlauto

class Strategy:
    name = "{name}"
    space = {{}}

    def plan(self, stages, epoch, params):
        return tlauto.TrainPlan()

@tlauto.hookimpl
def freeze_strategies():
    return [Strategy()]
"""


class Site:
    """A folder of installed distributions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(
        self, name: str, code: str, *, version: str = "1.0", module: str = "", entry_points: str = ""
    ) -> None:
        """What pip leaves behind: a module and the distribution's metadata."""
        module = module or name.replace("-", "_")
        (self.folder / f"{module}.py").write_text(code)
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points or f"[tlauto]\n{module} = {module}\n")

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if name != "TLAUTO_PLUGINS"}
        env = {**inherited, "PYTHONPATH": str(self.folder), "COLUMNS": "80", **environment}
        return subprocess.run(
            [sys.executable, "-W", "error", *command], capture_output=True, text=True, timeout=120, env=env
        )

    def listed(self, **environment: str) -> dict[str, dict[str, Any]]:
        """`tlauto plugins --json` by distribution, built-ins left out."""
        run = self.run("-m", "tlauto", "plugins", "--json", **environment)
        assert run.returncode == 0, run.stderr
        return {row["name"]: row for row in json.loads(run.stdout) if row["name"] != "tlauto"}

    def ask(self, expression: str, **environment: str) -> str:
        """What an expression of `registry` gives, or the error it raises."""
        code = (
            "from tlauto.errors import TlautoError\nfrom tlauto.plugins import load_plugins\n"
            f"try:\n    registry = load_plugins()\n    print({expression})\n"
            "except TlautoError as error:\n    print(type(error).__name__ + ': ' + str(error))"
        )
        run = self.run("-c", code, **environment)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_every_built_in_module_loads_and_offers_something() -> None:
    own = [plugin for plugin in load_plugins().plugins if plugin.name == "tlauto"]
    assert [(plugin.module, plugin.error) for plugin in own] == [(name, None) for name in plugins.BUILTIN]
    assert all(plugin.offers for plugin in own)


def test_an_installed_plugin_is_listed_with_version_and_offers(site: Site) -> None:
    site.install("tlauto-good", STRATEGY.format(name="good"), version="2.3")
    assert site.listed()["tlauto-good"] == {
        "name": "tlauto-good",
        "version": "2.3",
        "module": "tlauto_good",
        "offers": {"freeze_strategies": ["good"]},
        "error": None,
    }
    assert site.ask("registry.source('freeze_strategies', 'good')") == "tlauto-good 2.3"


BROKEN = {
    "cannot be imported": (
        "import a_library_that_is_not_there",
        "ModuleNotFoundError: No module named 'a_library_that_is_not_there'",
    ),
    "has a syntax error": ("def broken(:", "SyntaxError"),
    "exits on import": ("raise SystemExit('no licence')", "SystemExit: no licence"),
    "implements nothing": ("x = 1", "it implements no hook; mark its functions with @tlauto.hookimpl"),
    "misspells a hook": (
        "import tlauto\n@tlauto.hookimpl\ndef freeze_strategis():\n    return []",
        "it implements 'freeze_strategis', which is no hook; did you mean 'freeze_strategies'?",
    ),
    "implements an unknown hook": (
        "import tlauto\n@tlauto.hookimpl\ndef xyz():\n    return []",
        "which is no hook (hooks: backbone_providers, freeze_strategies, task_heads, trackers, executors)",
    ),
    "asks for an argument": (
        "import tlauto\n@tlauto.hookimpl\ndef task_heads(config):\n    return []",
        "PluginValidationError",
    ),
    "raises in its hook": (
        "import tlauto\n@tlauto.hookimpl\ndef task_heads():\n    return 1 / 0",
        "ZeroDivisionError: division by zero",
    ),
    "returns no list": (
        "import tlauto\n@tlauto.hookimpl\ndef task_heads():\n    return 'linear'",
        "task_heads() returned str, not a list",
    ),
    "returns nothing": (
        "import tlauto\n@tlauto.hookimpl\ndef task_heads():\n    pass",
        "task_heads() returned None, not a list",
    ),
    "returns the class": (
        STRATEGY.format(name="a").replace("[Strategy()]", "[Strategy]"),
        "freeze_strategies() returned the class Strategy, not an instance of it",
    ),
    "lacks a method": (
        STRATEGY.format(name="a").replace("def plan", "def plans"),
        "freeze_strategies() returned 'a' without plan",
    ),
    "has an impossible name": (STRATEGY.format(name="a.b"), "offers the name 'a.b'; use letters"),
    "offers a name twice": (
        STRATEGY.format(name="a").replace("[Strategy()]", "[Strategy(), Strategy()]"),
        "freeze_strategies() offers 'a' twice",
    ),
    "has a wrong space": (
        STRATEGY.format(name="a").replace("{}", "{'k': (1, 4)}"),
        "the space of 'a' is not a dict of Float, Int and Choice",
    ),
}


def test_broken_plugins_are_listed_with_the_reason_and_hide_no_other(site: Site) -> None:
    # All at once, between two good ones: each is kept apart from all the others.
    site.install("tlauto-aaa", STRATEGY.format(name="first"))
    site.install("tlauto-zzz", STRATEGY.format(name="last"))
    for case, (code, _) in BROKEN.items():
        site.install(f"tlauto-{case.replace(' ', '-')}", code)
    listed = site.listed()
    for case, (_, reason) in BROKEN.items():
        row = listed[f"tlauto-{case.replace(' ', '-')}"]
        assert reason in str(row["error"]), case
        assert row["offers"] == {}, case
    assert listed["tlauto-aaa"]["offers"] == {"freeze_strategies": ["first"]}
    assert listed["tlauto-zzz"]["offers"] == {"freeze_strategies": ["last"]}
    names = site.ask("registry.names('freeze_strategies')")
    assert "'full'" in names
    assert "'first'" in names
    assert "'last'" in names


def test_unreadable_metadata_of_a_plugin_is_reported_and_of_another_project_ignored(site: Site) -> None:
    site.install("tlauto-good", STRATEGY.format(name="good"))
    site.install("tlauto-damaged", "", entry_points="[tlauto]\nthis line has no equals sign\n")
    site.install("other-project", "", entry_points="[console_scripts]\nthis neither\n")
    listed = site.listed()
    assert "entry_points.txt cannot be read" in listed["tlauto-damaged"]["error"]
    assert listed["tlauto-good"]["error"] is None
    assert "other-project" not in listed


def test_a_name_that_two_plugins_offer_is_an_error_only_when_it_is_asked_for(site: Site) -> None:
    site.install("tlauto-one", STRATEGY.format(name="same"))
    site.install("tlauto-two", STRATEGY.format(name="same"))
    assert site.ask("registry.strategy('full').name") == "full"
    assert site.ask("registry.names('freeze_strategies').count('same')") == "1"
    answer = site.ask("registry.strategy('same')")
    assert answer.startswith(
        "DuplicateNameError: 'tlauto-one' and 'tlauto-two' both offer the strategy 'same'"
    )
    assert site.ask("registry.strategy('same').name", TLAUTO_PLUGINS="tlauto-two") == "same"
    table = site.run("-m", "tlauto", "plugins").stdout
    assert "'same' of freeze strategies is offered by 'tlauto-one' and 'tlauto-two'" in table


def test_a_plugin_cannot_replace_a_built_in_silently(site: Site) -> None:
    site.install("tlauto-mine", STRATEGY.format(name="full"))
    assert "'tlauto' and 'tlauto-mine' both offer the strategy 'full'" in site.ask(
        "registry.strategy('full')"
    )


def test_two_entry_points_of_a_distribution_are_two_modules_of_one_plugin(site: Site) -> None:
    site.install("tlauto-two", STRATEGY.format(name="b"), module="two_b")
    (site.folder / "two_a.py").write_text(STRATEGY.format(name="a"))
    info = next(site.folder.glob("*.dist-info"))
    (info / "entry_points.txt").write_text("[tlauto]\na = two_a\nb = two_b\n")
    assert site.ask("registry.names('freeze_strategies')[-2:]", TLAUTO_PLUGINS="tlauto-two") == "('a', 'b')"
    table = site.run("-m", "tlauto", "plugins", TLAUTO_PLUGINS="tlauto-two").stdout
    assert "freeze strategies: a, b" in table


def test_the_restriction_loads_only_what_it_names(site: Site) -> None:
    site.install("tlauto-one", STRATEGY.format(name="one"))
    site.install("Tlauto_Two", STRATEGY.format(name="two"))
    assert {"tlauto-one", "Tlauto_Two"} <= set(site.listed())
    assert set(site.listed(TLAUTO_PLUGINS="tlauto-two")) == {"Tlauto_Two"}
    assert site.listed(TLAUTO_PLUGINS="") == {}
    answer = site.ask("registry", TLAUTO_PLUGINS="tlauto-on")
    assert answer.startswith(
        "ConfigError: TLAUTO_PLUGINS names 'tlauto-on', which is not an installed plugin;"
    )
    assert "did you mean 'tlauto-one'?" in answer


def test_a_restricted_out_plugin_is_not_even_imported(site: Site) -> None:
    site.install("tlauto-loud", "raise SystemExit('imported')")
    assert site.listed(TLAUTO_PLUGINS="") == {}


def test_an_unknown_name_is_answered_with_the_closest_and_the_broken_plugins(site: Site) -> None:
    site.install("tlauto-broken", "import a_library_that_is_not_there")
    answer = site.ask("registry.strategy('fll')")
    assert answer.startswith("UnknownNameError: no strategy 'fll'; did you mean 'full'?")
    assert "'tlauto plugins' lists them" in answer
    assert "broken plugins: tlauto-broken" in answer


def test_the_table_fits_80_columns_and_shows_reasons_as_they_are(site: Site) -> None:
    site.install("tlauto-long", f"raise ValueError('[bold]odd[/] ' + {'word ' * 60!r})")
    run = site.run("-m", "tlauto", "plugins", COLUMNS="200")
    assert run.returncode == 0, run.stderr
    assert max(map(len, run.stdout.splitlines())) <= 80
    assert "[bold]odd[/]" in run.stdout


def test_the_trace_shows_each_hook_call_apart_from_the_output(site: Site) -> None:
    site.install("tlauto-good", STRATEGY.format(name="good"))
    run = site.run("-m", "tlauto", "plugins", "--json", "--trace", TLAUTO_PLUGINS="tlauto-good")
    assert json.loads(run.stdout)
    assert run.stderr.count("finish freeze_strategies") == 2


def test_every_hook_has_a_word_and_a_contract() -> None:
    from tlauto import hookspecs

    hooks = {name for name, value in vars(hookspecs).items() if hasattr(value, "tlauto_spec")}
    assert hooks == set(CORE_HOOKS) == set(CONTRACTS)


def test_what_the_registry_gives_fulfils_the_contracts() -> None:
    registry = load_plugins()
    for offer in registry.offers:
        assert isinstance(offer.value, CONTRACTS[offer.hook]), f"{offer.name} of {offer.plugin}"


@pytest.mark.parametrize("ask", ["provider", "strategy", "head"])
def test_an_unknown_name_is_an_error(ask: str) -> None:
    with pytest.raises(UnknownNameError, match=f"no {ask} 'nothing-like-it'"):
        getattr(load_plugins(), ask)("nothing-like-it")


def test_the_restriction_of_this_process_is_read_on_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLAUTO_PLUGINS", "")
    assert {plugin.name for plugin in load_plugins().plugins} == {"tlauto"}
    monkeypatch.setenv("TLAUTO_PLUGINS", "tlauto-nothing")
    with pytest.raises(ConfigError, match="TLAUTO_PLUGINS names 'tlauto-nothing'"):
        load_plugins()
