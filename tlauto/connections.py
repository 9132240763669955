"""How tlauto and Optuna connect to a database alike: options, waiting for a server, errors in a sentence."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tlauto.config import without_password
from tlauto.errors import StoreError

BUSY_S = 60
"""How long an SQLite connection waits for another writer, such as the dashboard."""

PATIENCE_S = 30.0
"""How long a search waits for a server that answered before: long enough for a restart."""

LIBPQ = {"connect_timeout": 10, "tcp_user_timeout": 30_000, "keepalives_idle": 30}
"""PostgreSQL's limits in s, ms and s, so that a machine that vanished is noticed; the URL may say others."""

DEADLOCK = "40P01"
"""PostgreSQL's code for it; psycopg calls it `sqlstate`, psycopg2 `pgcode`."""

GOES_ON = "the same command goes on"
RESTORED = "the next 'tlauto search' restores it from its backup, if it has one; or use another --out"

ADVICE = (
    # What a driver says, in lower case, and what to do about it; the first that fits.
    ("disk is full", f"make room on its disk; {GOES_ON}"),
    ("no space left", f"make room on the server's disk; {GOES_ON}"),
    ("malformed", RESTORED),
    ("not a database", RESTORED),
    ("readonly", f"make its folder writable, or copy the workspace to one that is; {GOES_ON}"),
    ("unable to open", "check the path, and that its folder can be written, or use another --out"),
    ("disk i/o error", f"check its disk and the free space; {GOES_ON}"),
    ("is locked", f"another program has been writing to it for {BUSY_S} s; end that one, then {GOES_ON}"),
    ("password", "check user and password in --storage, PGPASSWORD or ~/.pgpass"),
    ("role", "check the user in --storage"),
    ("permission denied", "let this user create tables there, or use another database in --storage"),
    ("does not exist", "create the database ('createdb NAME') or name another in --storage"),
    ("resolve host", "check the host in --storage"),
    ("refused", f"start the server, or check host and port in --storage; {GOES_ON}"),
)


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for any other database and for what is no URL."""
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        return None
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return Path(str(parsed.database)) if is_file else None


def shown_url(url: str) -> str:
    """The URL without password; the path alone for SQLite."""
    return str(sqlite_file(url) or without_password(url))


def engine_options(url: str) -> dict[str, Any]:
    """What `create_engine` is to be told, besides the URL."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_S}}
    is_libpq = parsed.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")
    limits = {name: value for name, value in LIBPQ.items() if name not in parsed.query}
    # A server that was restarted has forgotten its connections: each is tried before it is used.
    return {"pool_pre_ping": True, "connect_args": limits if is_libpq else {}}


def open_engine(url: str) -> sa.Engine:
    """An engine that has not connected yet; raises StoreError when the URL cannot be used."""
    why = "in a password '@' is written %40"
    try:
        if "@" not in (sa.make_url(url).host or ""):
            return sa.create_engine(url, **engine_options(url))
    except sa.exc.NoSuchModuleError as error:
        why = str(error)
    except ImportError as error:
        why = f"{error} (PostgreSQL needs \"pip install 'tlauto[postgres]'\")"
    except (sa.exc.ArgumentError, ValueError):
        why = "it is no database URL"
    raise StoreError(
        f"cannot use the storage '{shown_url(url)}': {why}; a URL looks like sqlite:////folder/tlauto.db or "
        f"postgresql+psycopg://user@host/database"
    )


_given_up: set[str] = set()


def wait_for_restarts(engine: sa.Engine) -> None:
    """Let an engine whose server has answered wait for it when it is gone, once, for PATIENCE_S at most."""
    url = str(engine.url)
    if engine.dialect.name == "sqlite":
        return

    @sa.event.listens_for(engine, "do_connect")
    def connect(dialect: Any, _record: Any, args: list[Any], options: dict[str, Any]) -> Any:
        deadline = time.monotonic() + (0 if url in _given_up else PATIENCE_S)
        while True:
            try:
                connection = dialect.connect(*args, **options)
            except dialect.loaded_dbapi.OperationalError:
                if time.monotonic() >= deadline:
                    _given_up.add(url)
                    raise
                time.sleep(0.5)
            else:
                _given_up.discard(url)
                return connection


def tune_sqlite(connection: Any, _record: Any) -> None:
    """Set a new connection to an SQLite file up for one writer and many readers."""
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            # WAL: 4 ms a report instead of 24 (80 trials, one writer, 2 cores), and readers never block.
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # The one thing that SQLite does not wait for: a new file that another process opens as well.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


def plain(text: str) -> str:
    """Text as every database takes it: PostgreSQL stores no zero byte, none stores half a surrogate pair."""
    return text.replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def explanation(url: str, error: BaseException) -> str:
    """One sentence on what a database said, without its password, and what to do."""
    driver = getattr(error, "orig", None) or error
    cause = (str(driver).strip() or type(driver).__name__).splitlines()[0]
    cause = re.sub(r"^connection failed: connection to server at .* failed: (FATAL: +)?", "", cause)
    where = "the path and its permissions" if sqlite_file(url) else "that the server runs and can be reached"
    advice = next((advice for words, advice in ADVICE if words in cause.lower()), f"check {where}; {GOES_ON}")
    return f"cannot use the database {shown_url(url)}: {cause}; {advice}"


def is_conflict(error: BaseException | None) -> bool:
    """Whether somebody else made, changed or deleted the record or table that was to be written."""
    return isinstance(error, sa.exc.IntegrityError) or "already exists" in str(error)


def is_deadlock(error: BaseException) -> bool:
    """Whether PostgreSQL undid a transaction because it and another waited for each other."""
    for one in (error, error.__cause__):
        driver = getattr(one, "orig", None)
        if DEADLOCK in (getattr(driver, "sqlstate", None), getattr(driver, "pgcode", None)):
            return True
    return False


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what SQLAlchemy raises within the block into a StoreError."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        raise StoreError(explanation(url, error)) from error
