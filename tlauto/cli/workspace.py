"""Options that every command which reads a workspace shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def workspace_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--out` and `--storage`."""
    function = click.option("--storage", metavar="URL", help="Database URL instead of the workspace's file.")(
        function
    )
    return click.option(
        "--out", default="./tlauto-runs", show_default=True, metavar="DIR", help="Workspace folder."
    )(function)


def study_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the optional STUDY argument; without it, the newest study."""
    return click.argument("study", required=False)(function)
