"""`tlauto dashboard`: the real Optuna dashboard on the workspace's database."""

from __future__ import annotations

import socket

import click

from tlauto.cli.workspace import workspace_options


@click.command()
@workspace_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="0 picks one.")
def command(out: str, storage: str | None, host: str, port: int) -> None:
    """Open Optuna dashboard on a workspace, also while a search runs.

    The dashboard can change the study and asks for no password, so it listens on this machine only
    unless --host says otherwise. Example: tlauto dashboard --port 8080
    """
    from tlauto.api import open_search
    from tlauto.errors import ConfigError
    from tlauto.store import storage_url
    from tlauto.tables import open_storage

    search = open_search(out, None, storage)
    with socket.socket() as probe:
        # As the server itself will: a port whose last owner just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another --port"
            ) from None
        port = probe.getsockname()[1]
    from optuna_dashboard import run_server

    click.echo(f"Optuna dashboard on http://{host}:{port} (Ctrl-C ends it)", err=True)
    # Connected as a search is, so that it waits for its turn and for a server that restarts.
    run_server(open_storage(storage_url(search.out, storage)), host=host, port=port)
