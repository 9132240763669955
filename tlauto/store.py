"""tlauto's own tables beside Optuna's in the workspace database. The only module that knows SQLAlchemy."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tlauto.contracts import EpochResult, TrialDone, TrialSpec, to_json
from tlauto.errors import StoreError

_meta = sa.MetaData()

_migrations = sa.Table(
    "tlauto_migrations",
    _meta,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("applied_at", sa.Float, nullable=False),
)
_datasets = sa.Table(
    "tlauto_datasets",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("root", sa.Text, nullable=False),
    sa.Column("content", sa.Text, nullable=False),  # Dataset as JSON: items, targets, split
    sa.Column("report", sa.Text, nullable=False),  # DoctorReport as JSON
)
_searches = sa.Table(
    "tlauto_searches",
    _meta,
    sa.Column("study", sa.String(200), primary_key=True),
    sa.Column("config", sa.Text, nullable=False),
    sa.Column("dataset", sa.Integer, sa.ForeignKey("tlauto_datasets.id"), nullable=False),
    sa.Column("plan", sa.Text, nullable=False),  # metric, candidates and what was decided before trial 0
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),  # active time over all runs
    sa.Column("state", sa.String(20), nullable=False),  # running, interrupted, finished
    sa.Column("pid", sa.Integer),
    sa.Column("host", sa.String(200)),
    sa.Column("beat_at", sa.Float),  # last sign of life of the coordinator
)
_trials = sa.Table(
    "tlauto_trials",
    _meta,
    sa.Column("study", sa.String(200), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("slot", sa.String(40), nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("result", sa.Text),  # TrialDone as JSON
    sa.Column("error_kind", sa.String(40)),
    sa.Column("error", sa.Text),
    sa.Column("detail", sa.Text),
)
_epochs = sa.Table(
    "tlauto_epochs",
    _meta,
    sa.Column("study", sa.String(200), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("score", sa.Float),
    sa.Column("train_loss", sa.Float),
    sa.Column("val_loss", sa.Float),
    sa.Column("seconds", sa.Float),
)
_models = sa.Table(
    "tlauto_models",
    _meta,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.String(200), nullable=False),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("evaluated_on", sa.String(10), nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("comparison", sa.Text),  # winner against default recipe on the test part
    sa.Column("created_at", sa.Float, nullable=False),
)


def _create_all(connection: sa.Connection) -> None:
    _meta.create_all(connection)


MIGRATIONS: dict[int, Callable[[sa.Connection], None]] = {1: _create_all}
"""Every step from one schema to the next, by the version it leads to; never edited once released."""


STALE_S = 120
"""A coordinator on another host that gave no sign of life for so many seconds is gone."""


def storage_url(out: str | Path, storage: str | None) -> str:
    """The database URL of a workspace: `storage` when given, else SQLite in `out`."""
    return storage or f"sqlite:///{Path(out).resolve() / 'tlauto.db'}"


def workspace_exists(out: str | Path, storage: str | None) -> bool:
    """Whether there is a database to read, without creating one."""
    file = _sqlite_file(storage_url(out, storage))
    return file is None or file.is_file()


def shown_url(url: str) -> str:
    """The URL without password; the path alone for SQLite."""
    file = _sqlite_file(url)
    if file:
        return str(file)
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return url


class Store:
    """The workspace database. One coordinator writes; anyone may read.

    Raises: StoreError when the file is not a database, is not ours, or has a newer schema.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._engine = _engine(url)
        self._migrate()

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()

    # --- searches ---------------------------------------------------------------------------------

    def studies(self) -> list[str]:
        """Study names, newest first."""
        query = sa.select(_searches.c.study).order_by(_searches.c.created_at.desc())
        return [row.study for row in self._rows(query)]

    def finished(self) -> list[dict[str, Any]]:
        """`study`, `config`, `plan`, `fingerprint`, `report` of finished searches as text, newest first."""
        what = (_searches.c.study, _searches.c.config, _searches.c.plan)
        query = sa.select(*what, _datasets.c.fingerprint, _datasets.c.report)
        query = query.join(_datasets, _searches.c.dataset == _datasets.c.id)
        query = query.where(_searches.c.state == "finished").order_by(_searches.c.created_at.desc())
        return [dict(row._mapping) for row in self._rows(query)]

    def search(self, study: str) -> dict[str, Any] | None:
        """The row of a search with `plan` decoded, or None."""
        rows = self._rows(sa.select(_searches).where(_searches.c.study == study))
        return {**rows[0]._mapping, "plan": json.loads(rows[0].plan)} if rows else None

    def create_search(
        self, study: str, *, config: str, dataset: str, fingerprint: str, root: str, report: str,
        plan: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Record a new search with its dataset and split; raises StoreError when the name is taken."""
        if self.search(study):
            raise StoreError(f"another search has just made the study '{study}'; run the command again")
        with self._writing() as connection:
            row = _datasets.insert().values(
                fingerprint=fingerprint, root=root, content=dataset, report=report
            )
            key = connection.execute(row).inserted_primary_key
            connection.execute(
                _searches.insert().values(
                    study=study, config=config, dataset=key[0] if key else None, plan=json.dumps(plan),
                    created_at=time.time(), seconds=0.0, state="interrupted",
                )
            )  # fmt: skip

    def dataset(self, study: str) -> dict[str, Any]:
        """`fingerprint`, `root`, `content` and `report` of a search's dataset."""
        query = sa.select(_datasets).join(_searches, _searches.c.dataset == _datasets.c.id)
        return dict(self._rows(query.where(_searches.c.study == study))[0]._mapping)

    def claim(self, study: str) -> None:
        """Make this process the study's coordinator; raises StoreError while another one lives."""
        self.require_free(study)
        self._update(study, state="running", pid=os.getpid(), host=socket.gethostname(), beat_at=time.time())

    def require_free(self, study: str) -> None:
        """Raise StoreError while another coordinator of this study lives."""
        row = self.search(study)
        if row and row["state"] == "running" and _is_alive(row):
            raise StoreError(
                f"study '{study}' is being searched by process {row['pid']} on {row['host']}; wait for it, "
                f"stop it, or start another study with --study NAME"
            )

    def release(self, study: str, *, state: str) -> None:
        """Give the study up as `interrupted` or `finished`."""
        self._update(study, state=state, pid=None, host=None)

    def update_config(self, study: str, config: str) -> None:
        """Remember the latest configuration (its budget may have grown)."""
        self._update(study, config=config)

    def add_seconds(self, study: str, seconds: float) -> None:
        """Add active time, which is also the coordinator's sign of life."""
        self._update(study, seconds=_searches.c.seconds + seconds, beat_at=time.time())

    # --- trials -----------------------------------------------------------------------------------

    def start_trial(self, study: str, spec: TrialSpec, slot: str) -> None:
        """Record what is about to run and where."""
        row = {"spec": to_json(spec), "slot": slot, "started_at": time.time()}
        with self._writing() as connection:
            # A trial that was re-queued keeps its number only when it had none: numbers are unique.
            connection.execute(_trials.insert().values(study=study, number=spec.number, **row))

    def add_epoch(self, study: str, result: EpochResult) -> None:
        """Record one epoch."""
        values = {k: getattr(result, k) for k in ("epoch", "score", "train_loss", "val_loss", "seconds")}
        with self._writing() as connection:
            connection.execute(_epochs.insert().values(study=study, number=result.number, **values))

    def finish_trial(self, study: str, done: TrialDone) -> None:
        """Record a trial's result."""
        self._update_trial(study, done.number, result=to_json(done))

    def fail_trial(self, study: str, number: int, *, kind: str, message: str, detail: str = "") -> None:
        """Record why a trial failed."""
        self._update_trial(study, number, error_kind=kind, error=message, detail=detail)

    def trials(self, study: str) -> dict[int, dict[str, Any]]:
        """Rows of all trials by number, `spec` as text and `result` decoded (None while running)."""
        rows = self._rows(sa.select(_trials).where(_trials.c.study == study).order_by(_trials.c.number))
        return {
            row.number: {**row._mapping, "result": json.loads(row.result) if row.result else None}
            for row in rows
        }

    def epochs(self, study: str, number: int) -> list[dict[str, Any]]:
        """The epochs of a trial in order."""
        here = (_epochs.c.study == study) & (_epochs.c.number == number)
        return [
            dict(row._mapping) for row in self._rows(sa.select(_epochs).where(here).order_by(_epochs.c.epoch))
        ]

    # --- models -----------------------------------------------------------------------------------

    def add_model(
        self, study: str, *, trial: int, folder: str, evaluated_on: str, metrics: Mapping[str, Any],
        comparison: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        """Record a bundle that was written."""
        with self._writing() as connection:
            connection.execute(
                _models.insert().values(
                    study=study, trial=trial, folder=folder, evaluated_on=evaluated_on,
                    metrics=json.dumps(metrics), created_at=time.time(),
                    comparison=json.dumps(comparison) if comparison else None,
                )
            )  # fmt: skip

    def model(self, study: str) -> dict[str, Any] | None:
        """The newest model of a study with `metrics` and `comparison` decoded, or None."""
        rows = self._rows(sa.select(_models).where(_models.c.study == study).order_by(_models.c.id.desc()))
        if not rows:
            return None
        row = dict(rows[0]._mapping)
        comparison = json.loads(row["comparison"]) if row["comparison"] else None
        return {**row, "metrics": json.loads(row["metrics"]), "comparison": comparison}

    # --- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        with _explained(self.url), self._engine.begin() as connection:
            yield connection

    def _rows(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        with _explained(self.url), self._engine.connect() as connection:
            return list(connection.execute(query))

    def _update(self, study: str, **values: Any) -> None:
        with self._writing() as connection:
            connection.execute(_searches.update().where(_searches.c.study == study).values(**values))

    def _update_trial(self, study: str, number: int, **values: Any) -> None:
        here = (_trials.c.study == study) & (_trials.c.number == number)
        with self._writing() as connection:
            connection.execute(_trials.update().where(here).values(**values))

    def _migrate(self) -> None:
        newest = max(MIGRATIONS)
        with self._writing() as connection:
            known = sa.inspect(connection).has_table("tlauto_migrations")
            version = (
                connection.execute(sa.select(sa.func.max(_migrations.c.version))).scalar() if known else 0
            )
            if (version or 0) > newest:
                raise StoreError(
                    f"{shown_url(self.url)} was written by a newer tlauto (schema {version}, this one knows "
                    f"{newest}); upgrade tlauto or use another --out"
                )
            for step in range((version or 0) + 1, newest + 1):
                MIGRATIONS[step](connection)
                connection.execute(_migrations.insert().values(version=step, applied_at=time.time()))


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        # The dashboard and other readers may hold the file for a moment: wait, never fail a trial.
        engine = sa.create_engine(parsed, connect_args={"timeout": 60} if is_sqlite else {})
    except (sa.exc.ArgumentError, ImportError) as error:
        raise StoreError(
            f"cannot use the storage '{shown_url(url)}': {error}; a URL looks like sqlite:////folder/tlauto.db"
        ) from None
    if is_sqlite:
        sa.event.listen(engine, "connect", _tune_sqlite)
    return engine


def _tune_sqlite(connection: Any, _record: Any) -> None:
    # WAL: 4 ms a report instead of 24 (80 trials, one writer, 2 cores), and readers never block.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")


@contextmanager
def _explained(url: str) -> Iterator[None]:
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        cause = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise StoreError(
            f"cannot use the database {shown_url(url)}: {cause}; check the path and its permissions, or use "
            f"another --out"
        ) from error


def _sqlite_file(url: str) -> Path | None:
    """The file of an SQLite URL; None for any other database and for what is no URL."""
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        return None
    is_file = parsed.get_backend_name() == "sqlite" and parsed.database
    return Path(str(parsed.database)) if is_file else None


def _is_alive(row: Mapping[str, Any]) -> bool:
    pid, host = row["pid"], row["host"]
    if pid is None or pid == os.getpid():
        return False
    if host != socket.gethostname():
        # Its process cannot be seen from here, so its last sign of life decides.
        return time.time() - float(row["beat_at"] or 0) < STALE_S
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _is_tlauto(pid)


def _is_tlauto(pid: int) -> bool:
    """Whether the process is a Python program; its id may have been taken by another after a crash."""
    command = Path(f"/proc/{pid}/cmdline")
    try:
        return b"python" in command.read_bytes() or b"tlauto" in command.read_bytes()
    except OSError:
        return True
