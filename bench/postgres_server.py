"""A PostgreSQL server on 127.0.0.1: made in a folder of its own, started, stopped, removed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

USER, PASSWORD = "tlauto", "s3cret-word"


def program(name: str) -> str | None:
    """Where a program of PostgreSQL is: on PATH, or where Debian keeps it."""
    found = [shutil.which(name), *sorted(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")))]
    return next((path for path in reversed(found) if path), None)


def is_installed() -> bool:
    """Whether a server can be made here and connected to."""
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return False
    return program("initdb") is not None and program("pg_ctl") is not None


@dataclass(frozen=True)
class Server:
    """A server on 127.0.0.1 whose user has a password."""

    folder: Path
    port: int

    def url(self, database: str, *, user: str = USER, password: str = PASSWORD) -> str:
        """How SQLAlchemy connects to a database of it."""
        return f"postgresql+psycopg://{user}:{password}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str) -> str:
        """A new empty database; its URL."""
        import psycopg

        where = f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(where, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        return self.url(name)

    def start(self) -> None:
        """Start it and wait until it answers."""
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c fsync=off"
        options += f" -c unix_socket_directories='{self.folder}'"
        self._pg_ctl("start", "-l", str(self.folder / "log"), "-o", options)

    def stop(self, mode: str = "fast") -> None:
        """Stop it; `immediate` is as if it was killed."""
        self._pg_ctl("stop", "-m", mode)

    def _pg_ctl(self, *words: str) -> None:
        _run(program("pg_ctl"), "-D", str(self.folder / "data"), "-w", "-t", "120", *words)


def _run(*words: str | None) -> None:
    # The server refuses to run as root.
    other = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups") if os.geteuid() == 0 else ()
    done = subprocess.run(
        [*other, *map(str, words)], cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@contextmanager
def running_server() -> Iterator[Server]:
    """A server that runs within the block."""
    folder = Path(tempfile.mkdtemp(prefix="tlauto-postgres-"))
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody", "nogroup")
        secret = folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        words = ("-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "-E", "UTF8", "--no-sync")
        _run(program("initdb"), "-D", str(folder / "data"), *words)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = Server(folder, port)
        server.start()
        try:
            yield server
        finally:
            if (folder / "data" / "postmaster.pid").exists():
                server.stop("immediate")
    finally:
        shutil.rmtree(folder)
