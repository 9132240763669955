"""`tlauto cache`: what decoded images and features take on the disk, and how to get rid of them."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pathlib import Path

    from tlauto.caches import Entry

AGES = ((86400, "d"), (3600, "h"), (60, "min"))


@click.group(name="cache")
def command() -> None:
    """List or clear decoded images and cached features.

    They lie in ~/.cache/tlauto, or where TLAUTO_CACHE says. Above TLAUTO_CACHE_SIZE (20GB unless it is
    set) what was used longest ago is deleted by itself; everything can be computed again.

    Example: tlauto cache list
    """


@command.command(name="list")
@click.option("--all", "every", is_flag=True, help="A line for each file.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with every file.")
def list_cache(every: bool, as_json: bool) -> None:
    """List what lies in the cache, last used first, and how much of the limit it takes.

    What is of one kind and one backbone stands in one line.

    Example: tlauto cache list --all
    """
    from tlauto.caches import cache_limit, entries
    from tlauto.devices import cache_folder

    folder, limit = cache_folder(), cache_limit()
    found = entries(folder)
    if as_json:
        click.echo(json.dumps(_as_json(folder, found, limit), indent=2))
    else:
        _print(folder, found, limit, every=every)


@command.command(name="clear")
@click.option("--older-than", metavar="TIME", help="Only what was not used for this long, as 7d or 12h.")
def clear_cache(older_than: str | None) -> None:
    """Delete everything in the cache that is not in use.

    Example: tlauto cache clear --older-than 7d
    """
    from tlauto.caches import clear, format_size
    from tlauto.config import parse_seconds
    from tlauto.devices import cache_folder

    age = parse_seconds(older_than) if older_than is not None else 0.0
    cleared = clear(cache_folder(), older_than_s=age)
    in_use = f"; {_files(cleared.kept)} in use and kept" if cleared.kept else ""
    click.echo(f"freed {format_size(cleared.bytes)}: {_files(cleared.removed)} deleted{in_use}")


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _as_json(folder: Path, found: Sequence[Entry], limit: int) -> dict[str, object]:
    from tlauto.caches import is_in_use

    listed = [
        {
            "kind": entry.kind,
            "backbone": entry.backbone,
            "images": entry.images,
            "bytes": entry.bytes,
            "last_used": _moment(entry.last_used),
            "complete": entry.is_complete,
            "in_use": is_in_use(entry),
            "path": str(entry.path),
        }
        for entry in found
    ]
    return {
        "folder": str(folder),
        "bytes": sum(entry.bytes for entry in found),
        "limit": limit,
        "entries": listed,
    }


def _moment(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")


# --- for people -------------------------------------------------------------------------------------


def _print(folder: Path, found: Sequence[Entry], limit: int, *, every: bool) -> None:
    from tlauto.caches import format_size
    from tlauto.cli.sources import print_table

    if not found:
        click.echo(f"the cache is empty: {folder}")
        return
    headings = ("backbone", "what", "files", "images", "size", "last used")
    groups = [[entry] for entry in found] if every else _groups(found)
    print_table(headings, map(_cells, groups), right=("files", "images", "size"))
    total = sum(entry.bytes for entry in found)
    click.echo(f"{_files(len(found))}, {format_size(total)} of {format_size(limit)} (TLAUTO_CACHE_SIZE)")
    click.echo(f"in {folder}")


def _groups(found: Sequence[Entry]) -> list[list[Entry]]:
    """Files of one kind and one backbone together, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Entry]] = {}
    for entry in found:
        groups.setdefault((entry.kind, entry.backbone, entry.is_complete), []).append(entry)
    return list(groups.values())


def _cells(group: Sequence[Entry]) -> tuple[str, ...]:
    from tlauto.caches import format_size, is_in_use

    first = group[0]  # the last used
    what = first.kind if first.is_complete else f"{first.kind}, unfinished"
    images = [entry.images for entry in group if entry.images is not None]
    used = "in use" if any(map(is_in_use, group)) else _ago(time.time() - first.last_used)
    shown = str(sum(images)) if images else "-"
    size = format_size(sum(entry.bytes for entry in group))
    return first.backbone or "-", what, str(len(group)), shown, size, used


def _ago(seconds: float) -> str:
    for length, unit in AGES:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "now"
