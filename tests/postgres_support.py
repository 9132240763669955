"""A real PostgreSQL server for tests, which are skipped where none is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from postgres_server import PASSWORD, USER, Server, is_installed, running_server

__all__ = ["PASSWORD", "USER", "Server", "postgres"]


@contextmanager
def postgres() -> Iterator[Server]:
    """A running server; the test is skipped where PostgreSQL is not installed."""
    if not is_installed():
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed, or psycopg is not")
    with running_server() as server:
        yield server
