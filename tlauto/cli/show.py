"""`tlauto show`: one study at a glance, or all of a workspace."""

from __future__ import annotations

import json

import click

from tlauto.cli.workspace import study_argument, workspace_options


@click.command()
@study_argument
@workspace_options
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(study: str | None, out: str, storage: str | None, as_json: bool) -> None:
    """Show a study: settings, data, progress and model.

    Example: tlauto show
    """
    from tlauto.api import open_search
    from tlauto.cli.summary import print_study, result_json

    search = open_search(out, study, storage)
    if as_json:
        click.echo(json.dumps({**result_json(search), "settings": search.info()["config"]}, indent=2))
    else:
        print_study(search)
