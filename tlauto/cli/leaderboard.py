"""`tlauto leaderboard`: the trials of a study, best first."""

from __future__ import annotations

import dataclasses
import json

import click

from tlauto.cli.workspace import study_argument, workspace_options


@click.command()
@study_argument
@workspace_options
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the best N.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(study: str | None, out: str, storage: str | None, top: int | None, as_json: bool) -> None:
    """List the trials of a study, best first.

    Example: tlauto leaderboard --top 10
    """
    from tlauto.api import open_search
    from tlauto.cli.summary import print_leaderboard

    search = open_search(out, study, storage)
    rows = search.leaderboard()[:top]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    else:
        print_leaderboard(search, rows)
