"""`tlauto evaluate`: measure a model bundle on a dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click


@click.command(name="evaluate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), required=True, help="Folder or manifest, as for a search."
)
@click.option("--split", type=click.Choice(["test", "all"]), default="test",
              help="test: the test part, or else the images it was not fitted on. [test]")  # fmt: skip
@click.option("--label-column", help="Column of the labels, in a manifest.")
@click.option("--path-column", help="Column of the images' paths, in a manifest.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N. [auto]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: Path, data: Path, split: str, label_column: str | None, path_column: str | None, device: str,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure a model bundle on a labelled dataset.

    Labels are matched to the model's classes by name. Images that cannot be read are named on stderr
    and left out.

    Example: tlauto evaluate tlauto-runs/flowers/model --data new-photos/
    """
    from tlauto.results.bundle import load_bundle

    bundle = load_bundle(model, device)
    result = bundle.evaluate(data, split=split, label_column=label_column, path_column=path_column)
    for item in result["unreadable"]:
        click.echo(f"left out: {item['reason']}", err=True)
    if result["fitted_images"]:
        click.echo(
            f"warning: the model was fitted on {result['fitted_images']} of these {result['images']} images; "
            f"the figures are too good",
            err=True,
        )
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        _show(result)


def _show(result: Mapping[str, Any]) -> None:
    click.echo(f"{result['images']} images of {result['data']} ({result['split']})")
    for name, value in result["metrics"].items():
        click.echo(f"{name:<18} {value['value']:>10.4f}   95 % {value['low']:.4f} to {value['high']:.4f}")
