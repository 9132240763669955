"""The schema's history: a database of any version opens, whole steps only, and only once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from tests_support import trial_spec

from tlauto import store as tables
from tlauto.connections import open_engine
from tlauto.contracts import EpochResult, TrialDone, to_json
from tlauto.errors import StoreError
from tlauto.migrations import MIGRATIONS, advance, migrate
from tlauto.store import Store, storage_url
from tlauto.study import Study

DONE = TrialDone(0, 0.5, {"accuracy": {"value": 0.5}}, 1.1, 1, 1, 2.0, "checkpoint")

FIRST_ROWS = {
    "tlauto_datasets": {"id": 1, "fingerprint": "f", "root": "/r", "content": "{}", "report": "{}"},
    "tlauto_searches": {
        "study": "s", "config": "{}", "dataset": 1, "plan": '{"metric": "accuracy"}', "created_at": 1.0,
        "seconds": 2.5, "state": "finished",
    },
    "tlauto_trials": {
        "study": "s", "number": 0, "spec": to_json(trial_spec(0)), "slot": "cpu:0", "started_at": 1.0,
        "result": to_json(DONE),
    },
    "tlauto_epochs": {"study": "s", "number": 0, "epoch": 1, "score": 0.5, "seconds": 2.0},
    "tlauto_models": {
        "study": "s", "trial": 0, "folder": "m", "evaluated_on": "test", "metrics": "{}", "created_at": 1.0,
    },
}  # fmt: skip
"""A row a table with what version 1 asked for."""


def old_file(folder: Path, version: int) -> str:
    """A database as the tlauto of some version left it; its URL."""
    url = storage_url(folder, None)
    engine = open_engine(url)
    with engine.begin() as connection:
        advance(connection, {step: MIGRATIONS[step] for step in range(1, version + 1)})
        for name, row in FIRST_ROWS.items():
            connection.execute(sa.table(name, *map(sa.column, row)).insert().values(row))
    engine.dispose()
    return url


def columns(engine: sa.Engine) -> dict[str, dict[str, tuple[str, bool, bool]]]:
    """Kind, whether it may be empty, and whether it is part of the key, by table and column."""
    found = sa.MetaData()
    found.reflect(engine, only=lambda name, _: name.startswith("tlauto_") and name != "tlauto_migrations")
    return described(found)


def described(tables: sa.MetaData) -> dict[str, dict[str, tuple[str, bool, bool]]]:
    return {
        table.name: {
            # PostgreSQL calls a float DOUBLE PRECISION.
            c.name: (c.type._type_affinity.__name__, bool(c.nullable), c.primary_key) for c in table.columns
        }
        for table in tables.sorted_tables
    }  # fmt: skip


@pytest.mark.parametrize("version", MIGRATIONS)
def test_a_database_of_every_version_opens_with_all_that_is_in_it(version: int, tmp_path: Path) -> None:
    with closing(Store(old_file(tmp_path, version), create=False)) as store:
        assert store.studies() == ["s"]
        assert store.search("s")["plan"] == {"metric": "accuracy"}  # type: ignore[index]
        assert store.dataset("s")["fingerprint"] == "f"
        assert store.finished()[0]["study"] == "s"
        assert store.trials("s")[0]["result"] == json.loads(to_json(DONE))
        assert [epoch["score"] for epoch in store.epochs("s", 0)] == [0.5]
        assert store.model("s")["folder"] == "m"  # type: ignore[index]


@pytest.mark.parametrize("version", MIGRATIONS)
def test_a_search_goes_on_in_a_database_of_every_version(version: int, tmp_path: Path) -> None:
    with closing(Store(old_file(tmp_path, version))) as store:
        store.claim("s")
        store.add_seconds("s", 1.5)
        store.start_trial("s", trial_spec(1), "cpu:0")
        store.add_epoch("s", EpochResult(1, 1, 0.25, 1.0, 1.1, 2.0))
        store.fail_trial("s", 1, kind="error", message="no", detail="why")
        store.add_model("s", trial=1, folder="n", evaluated_on="test", metrics={}, comparison=None)
        store.release("s", state="finished")
        assert store.trials("s")[1]["error"] == "no"
        assert store.search("s")["seconds"] == 4.0  # type: ignore[index]
        assert store.model("s")["folder"] == "n"  # type: ignore[index]


def test_the_steps_make_the_tables_that_the_store_uses(tmp_path: Path) -> None:
    engine = open_engine(storage_url(tmp_path, None))
    migrate(engine, str(engine.url), create=True)
    assert columns(engine) == described(tables._meta)
    engine.dispose()


def add_column(then: Callable[[], object]) -> Callable[[sa.Connection], None]:
    def step(connection: sa.Connection) -> None:
        connection.execute(sa.text("ALTER TABLE tlauto_trials ADD COLUMN colour TEXT"))
        then()

    return step


def test_a_step_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the power went")

    url, newest = old_file(tmp_path, max(MIGRATIONS)), max(MIGRATIONS)
    engine = open_engine(url)
    with pytest.raises(OSError, match="power"):
        migrate(engine, url, create=False, steps={**MIGRATIONS, newest + 1: add_column(fail)})
    assert "colour" not in columns(engine)["tlauto_trials"]
    Store(url).close()
    migrate(engine, url, create=False, steps={**MIGRATIONS, newest + 1: add_column(lambda: None)})
    assert "colour" in columns(engine)["tlauto_trials"]
    engine.dispose()
    with pytest.raises(StoreError, match=f"schema {newest + 1}, this one knows {newest}"):
        Store(url)


def test_reading_a_database_without_studies_makes_no_tables(tmp_path: Path) -> None:
    url = storage_url(tmp_path, None)
    open_engine(url).connect().close()
    with pytest.raises(StoreError, match="holds no study yet"):
        Store(url, create=False)
    engine = open_engine(url)
    assert columns(engine) == {}
    engine.dispose()


OPENER = """
import sys
from tlauto.store import Store
from tlauto.study import Study
print("ready", flush=True)
sys.stdin.readline()
store = Store(sys.argv[1])
study = Study(sys.argv[1], sys.argv[2], seed=0, create=True)
store.close()
"""


def open_at_once(url: str, *, processes: int = 4) -> None:
    """Open a new database in several processes at the same moment; each makes a study of its own."""
    opening = [
        subprocess.Popen(
            [sys.executable, "-c", OPENER, url, f"study{n}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for n in range(processes)
    ]  # fmt: skip
    for process in opening:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in opening:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=300) for process in opening]
    assert [p.returncode for p in opening] == [0] * processes, [error for _, error in ended]
    for n in range(processes):
        with closing(Study(url, f"study{n}", seed=0, create=False)) as study:
            assert study.trials() == []


def test_several_searches_may_make_a_database_at_once(tmp_path: Path) -> None:
    open_at_once(storage_url(tmp_path, None))
