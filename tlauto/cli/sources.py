"""What `tlauto backbones` and `tlauto weights` share: weights options, backbones with their status."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
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


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]], *, right: Iterable[str] = ()) -> None:
    """Print a table of at most 80 columns; long cells go on in the next line, nothing is cut off."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in right else "left")
    for row in rows:
        # As Text, not as str: a path may hold brackets that rich would read as markup.
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH)
    console.print(table)


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
