"""The numbered steps from one schema of our tables to the next, as they stood when they were released."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import sqlalchemy as sa

from tlauto.connections import explained, shown_url
from tlauto.errors import StoreError

LOCK = 0x746C6175
"""PostgreSQL's advisory lock while a schema is changed: any number that others are unlikely to use."""

# "IF NOT EXISTS": the first versions could be killed between the tables and the record of the step.
TABLES_1 = (
    """CREATE TABLE IF NOT EXISTS tlauto_migrations (
        version INTEGER NOT NULL PRIMARY KEY, applied_at FLOAT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS tlauto_datasets (
        id {id} NOT NULL PRIMARY KEY, fingerprint VARCHAR(64) NOT NULL, root TEXT NOT NULL,
        content TEXT NOT NULL, report TEXT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS tlauto_searches (
        study VARCHAR(200) NOT NULL PRIMARY KEY, config TEXT NOT NULL,
        dataset INTEGER NOT NULL REFERENCES tlauto_datasets (id), plan TEXT NOT NULL,
        created_at FLOAT NOT NULL, seconds FLOAT NOT NULL, state VARCHAR(20) NOT NULL, pid INTEGER,
        host VARCHAR(200), beat_at FLOAT)""",
    """CREATE TABLE IF NOT EXISTS tlauto_trials (
        study VARCHAR(200) NOT NULL, number INTEGER NOT NULL, spec TEXT NOT NULL, slot VARCHAR(40) NOT NULL,
        started_at FLOAT NOT NULL, result TEXT, error_kind VARCHAR(40), error TEXT, detail TEXT,
        PRIMARY KEY (study, number))""",
    """CREATE TABLE IF NOT EXISTS tlauto_epochs (
        study VARCHAR(200) NOT NULL, number INTEGER NOT NULL, epoch INTEGER NOT NULL, score FLOAT,
        train_loss FLOAT, val_loss FLOAT, seconds FLOAT, PRIMARY KEY (study, number, epoch))""",
    """CREATE TABLE IF NOT EXISTS tlauto_models (
        id {id} NOT NULL PRIMARY KEY, study VARCHAR(200) NOT NULL, trial INTEGER NOT NULL,
        folder TEXT NOT NULL, evaluated_on VARCHAR(10) NOT NULL, metrics TEXT NOT NULL, comparison TEXT,
        created_at FLOAT NOT NULL)""",
)


def _first(connection: sa.Connection) -> None:
    numbered = "SERIAL" if connection.dialect.name == "postgresql" else "INTEGER"
    for table in TABLES_1:
        connection.execute(sa.text(table.format(id=numbered)))


def _second(connection: sa.Connection) -> None:
    # A tlauto that knows no versions of a study must not go on with an old one.
    connection.execute(sa.text("ALTER TABLE tlauto_searches ADD COLUMN version INTEGER NOT NULL DEFAULT 1"))


Steps = Mapping[int, Callable[[sa.Connection], None]]

MIGRATIONS: Steps = {1: _first, 2: _second}
"""Every step by the version it leads to, never edited once released; all make the tables of `store`."""


def migrate(engine: sa.Engine, url: str, *, create: bool, steps: Steps = MIGRATIONS) -> None:
    """Bring a database to the newest schema, all steps or none, one process at a time.

    Raises: StoreError when its schema is newer, or when it has no tables of ours and `create` is False.
    """
    newest = max(steps)
    with explained(url), engine.connect() as connection:
        version = _version(connection)
    if version > newest:
        raise StoreError(
            f"{shown_url(url)} was written by a newer tlauto (schema {version}, this one knows {newest}); "
            f"upgrade tlauto or use another --out"
        )
    if not version and not create:
        raise StoreError(f"the database {shown_url(url)} holds no study yet; run 'tlauto search --data PATH'")
    if version < newest:
        with explained(url), engine.begin() as connection:
            _take_turns(connection)
            advance(connection, steps)


def advance(connection: sa.Connection, steps: Steps) -> None:
    """Take the steps that a database has not seen yet."""
    record = sa.text("INSERT INTO tlauto_migrations (version, applied_at) VALUES (:version, :now)")
    for step in range(_version(connection) + 1, max(steps) + 1):
        steps[step](connection)
        connection.execute(record, {"version": step, "now": time.time()})


def _version(connection: sa.Connection) -> int:
    if not sa.inspect(connection).has_table("tlauto_migrations"):
        return 0
    return connection.execute(sa.text("SELECT MAX(version) FROM tlauto_migrations")).scalar() or 0


def _take_turns(connection: sa.Connection) -> None:
    """Begin what nobody else can do meanwhile; Python's driver begins no transaction for tables."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    elif connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
