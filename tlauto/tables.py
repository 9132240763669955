"""Optuna's own tables in a database: opened and closed, its errors in a sentence."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna

from tlauto import connections
from tlauto.errors import StoreError
from tlauto.writethrough import WriteThrough

MEMORY = "memory"
"""In place of a database's URL: the study is gone with its object, as a simulation wants it."""

MOST_TRIES = 20
"""How often to open a database whose tables another process is making."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


class _TunedConnection(sqlite3.Connection):
    """A connection that syncs at checkpoints only: safe in WAL mode, and half of a report's time."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.execute("PRAGMA synchronous=NORMAL")


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Optuna's own tables in a database, made if need be; raises StoreError when it cannot be used."""
    if url == MEMORY:
        return optuna.storages.InMemoryStorage()
    options = connections.engine_options(url)
    if url.startswith("sqlite"):
        options["connect_args"]["factory"] = _TunedConnection
    for tries_left in reversed(range(MOST_TRIES)):
        try:
            with explained(url):
                # Optuna formats the URL, in which a folder's name may have braces.
                escaped = url.replace("{", "{{").replace("}", "}}")
                storage = optuna.storages.RDBStorage(escaped, engine_kwargs=options)
            break
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
            raise StoreError(f"cannot open Optuna's tables in the database: {cause}") from error
        except StoreError as error:
            # Two that open a new database at once make the same tables.
            if not tries_left or not connections.is_conflict(error.__cause__):
                raise
            time.sleep(0.1)
    connections.wait_for_restarts(storage.engine)
    return storage


def close_storage(storage: optuna.storages.BaseStorage) -> None:
    """Release its connections."""
    if isinstance(storage, (optuna.storages.RDBStorage, WriteThrough)):
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def opened(url: str) -> Iterator[optuna.storages.BaseStorage]:
    """Optuna's tables for the length of a block; StoreError where they cannot be used."""
    storage = open_storage(url)
    try:
        with explained(url):
            yield storage
    finally:
        close_storage(storage)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what Optuna's storage raises within the block into a StoreError."""
    try:
        with connections.explained(url):
            yield
    except optuna.exceptions.StorageInternalError as error:
        raise StoreError(connections.explanation(url, error.__cause__ or error)) from error.__cause__
    except optuna.exceptions.UpdateFinishedTrialError as error:
        raise StoreError(
            "a running trial was ended by another program (in the dashboard?); the same command goes on "
            "without it"
        ) from error
