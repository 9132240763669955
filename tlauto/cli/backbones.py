"""`tlauto backbones`: what can be fine-tuned, and whether its weights are at hand."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from tlauto.cli.sources import Row, print_table, weights_options, with_status

if TYPE_CHECKING:
    from tlauto.contracts import WeightsOptions

WORDS = {"at_hand": "at hand", "downloadable": "download", "missing": "missing"}
FEW = 3


@click.command()
@click.argument("pattern", metavar="[GLOB]", required=False)
@weights_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(pattern: str | None, options: WeightsOptions, as_json: bool) -> None:
    """List backbones and whether their weights are at hand.

    GLOB is over provider:name, or over the names of all providers when it has no colon. Without it,
    the shortlists and the files of the weights folder are listed.

    The JSON is a list of objects: id, params_m, gmacs, input_size, pretraining, licence, accuracy,
    cost, is_default, and weights (state: at_hand, downloadable or missing; detail; path or null).

    Example: tlauto backbones "timm:convnext*"
    """
    from tlauto.errors import UnknownNameError
    from tlauto.plugins import load_plugins
    from tlauto.preflight import check_exact, matching, offered

    registry = load_plugins()
    if pattern is None:
        infos = offered(registry, options, lambda text: click.echo(text, err=True))
    else:
        infos = list(matching(pattern, registry, options))
        if not infos:
            check_exact(pattern, registry, options)
            raise UnknownNameError(
                f"no backbone matches '{pattern}'; the form is provider:name, for example 'timm:resnet*'"
            )
    rows = with_status(sorted(infos, key=lambda info: info.id), registry, options)
    if as_json:
        click.echo(json.dumps([_to_dict(row) for row in rows], indent=2))
    else:
        _print(rows)


def _to_dict(row: Row) -> dict[str, object]:
    return {**dataclasses.asdict(row.info), "weights": dataclasses.asdict(row.status)}


def _print(rows: list[Row]) -> None:
    print_table(
        ("backbone", "params", "px", "pretraining", "licence", "weights"),
        (
            (
                row.info.id,
                f"{row.info.params_m:.1f} M" if row.info.params_m else "-",
                str(row.info.input_size),
                "as named" if row.info.id.endswith(f".{row.info.pretraining}") else row.info.pretraining,
                row.info.licence,
                WORDS[row.status.state],
            )
            for row in rows
        ),
        right=("params", "px"),
    )
    if len(rows) <= FEW:
        for row in rows:
            click.echo(f"{row.info.id}: {row.status.detail}")
    elif any(row.status.state == "missing" for row in rows):
        click.echo("missing: 'tlauto backbones ID' says where weights were looked for and how to get them")
