"""What `tlauto backbones` and `tlauto weights` share: weights options, backbones with their status."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tlauto.contracts import BackboneInfo, WeightsOptions, WeightsStatus
    from tlauto.plugins import Registry

WIDTH = 80


@dataclass(frozen=True)
class Row:
    """A backbone and whether its weights can be had."""

    info: BackboneInfo
    status: WeightsStatus


def weights_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--weights`, `--weights-dir` and `--offline`; the function gets them as one `options`."""

    @functools.wraps(function)
    def wrapped(weights: tuple[str, ...], weights_dir: str | None, offline: bool, **others: Any) -> Any:
        return function(options=_options(weights, weights_dir, offline), **others)

    for option in (
        click.option("--offline", is_flag=True, help="Never use the network."),
        click.option("--weights-dir", envvar="TLAUTO_WEIGHTS", metavar="DIR",
                     help="Folder of PROVIDER/FILE.  [env: TLAUTO_WEIGHTS]"),
        click.option("--weights", multiple=True, metavar="ID=PATH", help="Weights file of a backbone."),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def with_status(infos: Iterable[BackboneInfo], registry: Registry, options: WeightsOptions) -> list[Row]:
    """Each backbone with the state of its weights."""
    return [Row(i, registry.provider(i.provider).weights_status(i.id, options)) for i in infos]


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> None:
    """Print a table of at most 80 columns, if all columns but the first leave room.

    A name in the first column that is too long for it stands in a line of its own, unbroken: it is there to
    be copied.
    """
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    rest = sum(widths[1:]) + 2 * (len(widths) - 1)
    widths[0] = max(len(headings[0]), min(widths[0], WIDTH - rest))
    sides = [str.rjust if heading in right else str.ljust for heading in headings]
    for row in [headings, *cells]:
        first, *others = row
        if len(first) > widths[0]:
            click.echo(first)
            first = ""
        padded = [side(c, width) for side, c, width in zip(sides, [first, *others], widths, strict=True)]
        click.echo("  ".join(padded).rstrip())


def _options(files: tuple[str, ...], folder: str | None, offline: bool) -> WeightsOptions:
    from tlauto.contracts import WeightsOptions

    pairs = {}
    for text in files:
        id, equals, path = text.partition("=")
        if not equals or ":" not in id:
            raise click.BadParameter(
                f"'{text}' is not ID=PATH, for example timm:resnet18=resnet18.safetensors",
                param_hint="--weights",
            )
        pairs[id] = path
    return WeightsOptions(files=pairs, folder=folder or None, offline=offline)
