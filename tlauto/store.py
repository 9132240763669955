"""tlauto's own tables beside Optuna's in the workspace database."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tlauto.connections import (
    explained,
    is_conflict,
    open_engine,
    plain,
    sqlite_file,
    tune_sqlite,
    wait_for_restarts,
)
from tlauto.contracts import EpochResult, TrialDone, TrialSpec, to_json
from tlauto.errors import StoreError
from tlauto.migrations import migrate

# The tables of the newest schema; `migrations` makes them, and a test compares the two.
_meta = sa.MetaData()

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
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),  # of the study; see `versions`
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


STALE_S = 120
"""A coordinator on another host that gave no sign of life for so many seconds is gone."""


def storage_url(out: str | Path, storage: str | None) -> str:
    """The database URL of a workspace: `storage` when given, else SQLite in `out`."""
    return storage or f"sqlite:///{Path(out).resolve() / 'tlauto.db'}"


def workspace_exists(out: str | Path, storage: str | None) -> bool:
    """Whether there is a database to read, without creating one."""
    file = sqlite_file(storage_url(out, storage))
    return file is None or file.is_file()


class Store:
    """The workspace database. One coordinator writes; anyone may read.

    Raises: StoreError when it cannot be used, has a newer schema, or lacks our tables and `create` is False.
    """

    def __init__(self, url: str, *, create: bool = True) -> None:
        self.url = url
        self._held: list[sa.Insert | sa.Update | sa.Delete] | None = None
        self._engine = open_engine(url)
        if self._engine.dialect.name == "sqlite":
            sa.event.listen(self._engine, "connect", tune_sqlite)
        try:
            migrate(self._engine, url, create=create)
        except StoreError:
            self.close()
            raise
        wait_for_restarts(self._engine)

    def close(self) -> None:
        """Release the connections."""
        self._engine.dispose()

    # --- searches ---------------------------------------------------------------------------------

    def studies(self) -> list[str]:
        """Study names, newest first."""
        query = sa.select(_searches.c.study).order_by(_searches.c.created_at.desc())
        return [row.study for row in self._rows(query)]

    def finished(self) -> list[dict[str, Any]]:
        """Finished searches, newest first: study, version, fingerprint; as text config, plan and report."""
        what = (_searches.c.study, _searches.c.version, _searches.c.config, _searches.c.plan)
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
        data = {"fingerprint": fingerprint, "root": root, "content": dataset, "report": report}
        search = {"study": study, "config": config, "plan": json.dumps(plan), "created_at": time.time()}
        try:
            with self._writing() as connection:
                key = connection.execute(_datasets.insert().values(data)).inserted_primary_key
                search |= {"dataset": key[0] if key else None, "seconds": 0.0, "state": "interrupted"}
                connection.execute(_searches.insert().values(search))
        except StoreError as error:
            if not is_conflict(error.__cause__):
                raise
            raise StoreError(
                f"another search has just made the study '{study}'; run the command again"
            ) from None

    def dataset(self, study: str) -> dict[str, Any]:
        """`fingerprint`, `root`, `content` and `report` of a search's dataset."""
        query = sa.select(_datasets).join(_searches, _searches.c.dataset == _datasets.c.id)
        return dict(self._rows(query.where(_searches.c.study == study))[0]._mapping)

    def claim(self, study: str) -> None:
        """Make this process the study's coordinator; raises StoreError while another one lives."""
        row = self.require_free(study) or {}
        # Of two that found it free at once, one finds it changed here.
        unchanged = [
            _searches.c[n].is_not_distinct_from(row.get(n)) for n in ("state", "pid", "host", "beat_at")
        ]
        values = {"state": "running", **_this_process(), "beat_at": time.time()}
        if not self._update(study, *unchanged, **values):
            self.require_free(study)
            raise StoreError(f"another search has just taken the study '{study}'; run the command again")

    def require_free(self, study: str) -> dict[str, Any] | None:
        """The row of a search, if there is one; raises StoreError while another coordinator of it lives."""
        row = self.search(study)
        if row and row["state"] == "running" and _is_alive(row):
            raise StoreError(
                f"study '{study}' is being searched by process {row['pid']} on {row['host']}; wait for it, "
                f"stop it, or start another study with --study NAME"
            )
        return row

    def release(self, study: str, *, state: str) -> None:
        """Give the study up as `interrupted` or `finished`, unless another coordinator has it."""
        self._update(study, _not_others(), state=state, pid=None, host=None)

    def update_config(self, study: str, config: str) -> None:
        """Remember the latest configuration (its budget may have grown)."""
        self._update(study, config=config)

    def open_version(self, study: str, version: int, plan: Mapping[str, Any]) -> None:
        """Go on with another version of a study, which is complete, by another plan."""
        self._update(study, version=version, plan=json.dumps(plan))

    def add_seconds(self, study: str, seconds: float) -> None:
        """Add active time, which is also the coordinator's sign of life.

        Raises: StoreError when another coordinator took the study over, as this one gave none for long.
        """
        values = {"seconds": _searches.c.seconds + seconds, "beat_at": time.time()}
        if not self._update(study, _not_others(), **values) and (row := self.search(study)):
            raise StoreError(
                f"study '{study}' was taken over by process {row['pid']} on {row['host']} while this one was "
                f"held up; it goes on there"
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Write the changes of trials that are made within the block in one transaction, at its end.

        Also of a block that raises. What is read within it has the changes before.
        """
        self._held = []
        try:
            yield
        finally:
            self._flush()
            self._held = None

    # --- trials -----------------------------------------------------------------------------------

    def start_trial(self, study: str, spec: TrialSpec, slot: str) -> None:
        """Record what is about to run and where.

        In place of a trial of that number that the study does not know: a search that was killed while it
        began one proposes it anew.
        """
        row = {"spec": to_json(spec), "slot": slot, "started_at": time.time()}
        self._write(
            _trials.delete().where(_here(study, spec.number)),
            _trials.insert().values(study=study, number=spec.number, **row),
        )

    def restate_trial(self, study: str, spec: TrialSpec) -> None:
        """Record that a trial that was started runs otherwise."""
        self._write(_changed(study, spec.number).values(spec=to_json(spec)))

    def add_epoch(self, study: str, result: EpochResult) -> None:
        """Record one epoch."""
        self._write(_epochs.insert().values(_epoch_row(study, result)))

    def finish_trial(self, study: str, done: TrialDone, *, epoch: EpochResult | None = None) -> None:
        """Record a trial's result, with an epoch that is not recorded yet, in one transaction."""
        result = _changed(study, done.number).values(result=to_json(done))
        epochs = () if epoch is None else (_epochs.insert().values(_epoch_row(study, epoch)),)
        self._write(result, *epochs)

    def fail_trial(self, study: str, number: int, *, kind: str, message: str, detail: str = "") -> None:
        """Record why a trial failed."""
        values = {"error_kind": kind, "error": plain(message), "detail": plain(detail)}
        self._write(_changed(study, number).values(values))

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
        with explained(self.url), self._engine.begin() as connection:
            yield connection

    def _write(self, *changes: sa.Insert | sa.Update | sa.Delete) -> None:
        """Make changes in one transaction: now, or with others at the end of a block."""
        if self._held is not None:
            self._held += changes
            return
        with self._writing() as connection:
            for change in changes:
                connection.execute(change)

    def _flush(self) -> None:
        """Make the changes of a block so far."""
        if self._held:
            changes, self._held = self._held, None
            try:
                self._write(*changes)
            finally:
                self._held = []

    def _rows(self, query: sa.Select[Any]) -> list[sa.Row[Any]]:
        self._flush()
        with explained(self.url), self._engine.connect() as connection:
            return list(connection.execute(query))

    def _update(self, study: str, *conditions: sa.ColumnElement[bool], **values: Any) -> bool:
        """Whether a search of that name which meets the conditions was there to change."""
        change = _searches.update().where(_searches.c.study == study, *conditions).values(**values)
        with self._writing() as connection:
            return connection.execute(change).rowcount > 0


def _changed(study: str, number: int) -> sa.Update:
    """The start of a change of a trial."""
    return _trials.update().where(_here(study, number))


def _here(study: str, number: int) -> sa.ColumnElement[bool]:
    return (_trials.c.study == study) & (_trials.c.number == number)


def _epoch_row(study: str, result: EpochResult) -> dict[str, Any]:
    # SQLite has no NaN and stores NULL; other databases would give it back.
    values = {k: _number(getattr(result, k)) for k in ("score", "train_loss", "val_loss", "seconds")}
    return {"study": study, "number": result.number, "epoch": result.epoch, **values}


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _not_others() -> sa.ColumnElement[bool]:
    """Whether no other process holds a search."""
    mine = [_searches.c[name] == value for name, value in _this_process().items()]
    return sa.or_(_searches.c.state != "running", sa.and_(*mine))


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
