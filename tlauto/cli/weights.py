"""`tlauto weights`: which pretrained weights are here, fetch some, check them."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tlauto.cli.sources import Row, weights_options, with_status

if TYPE_CHECKING:
    from tlauto.contracts import WeightsOptions
    from tlauto.plugins import Registry


@click.group(name="weights")
def command() -> None:
    """List, fetch or verify pretrained weights.

    Weights come from --weights ID=PATH, from a folder of PROVIDER/FILE (--weights-dir or
    TLAUTO_WEIGHTS), from the library's own cache, or are downloaded by the library.

    Example: tlauto weights list --weights-dir ./weights
    """


@command.command(name="list")
@weights_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def list_weights(options: WeightsOptions, as_json: bool) -> None:
    """List weights at hand: given, in the weights folder, in the libraries' caches.

    The JSON holds "weights", a list of id, path (null when there is no file) and bytes, and "unused",
    the files of the weights folder whose name no provider knows.

    Example: tlauto weights list --weights-dir ./weights
    """
    from tlauto.plugins import load_plugins

    registry = load_plugins()
    rows = _at_hand(registry, options)
    unused = _unused(rows, registry, options)
    if as_json:
        weights = [
            {"id": row.info.id, "path": row.status.path, "bytes": _size(row.status.path)} for row in rows
        ]
        click.echo(json.dumps({"weights": weights, "unused": unused}, indent=2))
        return
    if rows:
        for row in rows:
            size = _size(row.status.path)
            click.echo(f"{row.info.id}  {f'{size / 1e6:.1f} MB' if size else '-'}")
            click.echo(f"    {row.status.path or row.status.detail}")  # whole: to be copied
    else:
        click.echo("no weights are at hand; 'tlauto weights fetch ID' downloads some")
    for path in unused:
        click.echo(f"not used: {path} (no backbone of this name)")


@command.command()
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@weights_options
def fetch(ids: tuple[str, ...], options: WeightsOptions) -> None:
    """Download weights into the library's cache and build the backbone with them once.

    Example: tlauto weights fetch timm:resnet18.a1_in1k torchvision:resnet50
    """
    from tlauto.plugins import load_plugins

    registry = load_plugins()
    for id in ids:
        provider = registry.provider(_checked_id(id).partition(":")[0])
        provider.load(id, options)
        click.echo(f"{id}: {provider.weights_status(id, options).detail}")


@command.command()
@click.argument("ids", metavar="[ID...]", nargs=-1)
@weights_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of id, ok, detail.")
def verify(ids: tuple[str, ...], options: WeightsOptions, as_json: bool) -> None:
    """Build each backbone with its weights at hand and check the hash in the file's name.

    Without IDs, all weights at hand are checked. Nothing is downloaded. Exits 1 when any is bad.

    Example: tlauto weights verify --weights-dir ./weights
    """
    import dataclasses

    from tlauto.plugins import load_plugins

    registry = load_plugins()
    offline = dataclasses.replace(options, offline=True)
    wanted = [_checked_id(id) for id in ids] or [row.info.id for row in _at_hand(registry, offline)]
    problems = {id: _problem(id, registry, offline) for id in wanted}
    if as_json:
        results = [{"id": id, "ok": not text, "detail": text or "fits"} for id, text in problems.items()]
        click.echo(json.dumps(results, indent=2))
    else:
        for id, text in problems.items():
            click.echo(f"{id}: {text or 'fits'}")
        bad = sum(1 for text in problems.values() if text)
        click.echo(f"{len(problems)} checked, {bad} bad")
    if any(problems.values()):
        sys.exit(1)


def _checked_id(id: str) -> str:
    from tlauto.errors import UnknownNameError

    if ":" not in id:
        raise UnknownNameError(f"'{id}' is not provider:name, for example timm:resnet18")
    return id


def _at_hand(registry: Registry, options: WeightsOptions) -> list[Row]:
    """Every backbone of every provider whose weights are at hand, sorted; whole catalogues are looked at."""
    from tlauto.preflight import matching

    infos = {info.id: info for info in matching("*", registry, options)}
    rows = with_status((infos[id] for id in sorted(infos)), registry, options)
    return [row for row in rows if row.status.state == "at_hand"]


def _unused(rows: Iterable[Row], registry: Registry, options: WeightsOptions) -> list[str]:
    from tlauto.builtin.weights import folder_files

    used = {row.status.path for row in rows}
    found: list[str] = []
    for name in registry.names("backbone_providers"):
        found += [os.fspath(path) for path in folder_files(options.folder, name).values()]
    return sorted(path for path in found if path not in used)


def _problem(id: str, registry: Registry, options: WeightsOptions) -> str | None:
    """Why a backbone's weights cannot be used, or None."""
    from tlauto.builtin.hub import HASH_IN_NAME
    from tlauto.builtin.weights import sha256_file
    from tlauto.errors import TlautoError

    provider = registry.provider(id.partition(":")[0])
    try:
        provider.load(id, options)
        path = provider.weights_status(id, options).path
    except TlautoError as error:
        return str(error)
    stated = HASH_IN_NAME.search(Path(path).name) if path else None
    if path and stated and not sha256_file(path).startswith(stated[1]):
        return f"'{path}' is not the file its name says: its sha256 does not begin with {stated[1]}"
    return None


def _size(path: str | None) -> int | None:
    return os.path.getsize(path) if path else None
