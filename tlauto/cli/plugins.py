"""`tlauto plugins`: what is installed, what it offers, what is broken and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text

    from tlauto.plugins import Plugin, Registry

WIDTH = 80


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.option("--trace", is_flag=True, help="Print each hook call on stderr while plugins are loaded.")
def command(as_json: bool, trace: bool) -> None:
    """List plugins, what they offer, and which are broken.

    The JSON is a list of objects: name, version, module, offers (hook to names), error or null.
    TLAUTO_PLUGINS=a,b loads only these distributions besides the built-ins.

    Example: tlauto plugins
    """
    from tlauto.plugins import load_plugins

    def write(line: str) -> None:
        click.echo(line.rstrip("\n"), err=True)

    registry = load_plugins(trace=write if trace else None)
    if as_json:
        click.echo(json.dumps([_to_dict(plugin) for plugin in registry.plugins], indent=2))
    else:
        _print(registry)


def _to_dict(plugin: Plugin) -> dict[str, object]:
    return {
        "name": plugin.name,
        "version": plugin.version,
        "module": plugin.module,
        "offers": {hook: list(names) for hook, names in plugin.offers.items()},
        "error": plugin.error,
    }


def _print(registry: Registry) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("plugin", "version", "offers"):
        table.add_column(heading, overflow="fold")
    for (name, version), members in _by_distribution(registry.plugins).items():
        table.add_row(name, version, _offers(members))
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    console.print(table)
    for hook, name, plugins in registry.clashes():
        owners = " and ".join(f"'{plugin}'" for plugin in plugins)
        text = f"'{name}' of {_words(hook)} is offered by {owners}; using it is an error"
        console.print(text, style="yellow", markup=False)


def _by_distribution(plugins: Iterable[Plugin]) -> dict[tuple[str, str], list[Plugin]]:
    """The modules of each distribution, in order: the built-ins are five of `tlauto`."""
    groups: dict[tuple[str, str], list[Plugin]] = {}
    for plugin in plugins:
        groups.setdefault((plugin.name, plugin.version), []).append(plugin)
    return groups


def _offers(members: Sequence[Plugin]) -> Text:
    """A line for each hook, and one for each broken module."""
    from rich.text import Text

    names: dict[str, list[str]] = {}
    for member in members:
        for hook, offered in member.offers.items():
            names.setdefault(hook, []).extend(offered)
    lines = [Text(f"{_words(hook)}: {', '.join(offered)}") for hook, offered in names.items()]
    # As Text, not as str: a reason may hold brackets that rich would read as markup.
    lines += [Text(f"broken: {m.module}: {m.error}", style="red") for m in members if m.error]
    return Text("\n").join(lines)


def _words(hook: str) -> str:
    return hook.replace("_", " ")
