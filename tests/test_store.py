from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests_support import trial_spec

from tlauto.contracts import EpochResult, TrialDone, spec_from_json
from tlauto.errors import StoreError
from tlauto.migrations import MIGRATIONS
from tlauto.store import Store, storage_url


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(storage_url(tmp_path, None))
    store.create_search(
        "s",
        config="{}",
        dataset='{"items": []}',
        fingerprint="f" * 64,
        root="/r",
        report="{}",
        plan={"metric": "x"},
    )
    return store


def test_what_is_written_is_read_back(store: Store) -> None:
    store.start_trial("s", trial_spec(0), "cpu:0")
    store.add_epoch("s", EpochResult(0, 1, 0.5, 1.0, 1.1, 2.0))
    store.finish_trial("s", TrialDone(0, 0.5, {"accuracy": {"value": 0.5}}, 1.1, 1, 1, 2.0, "checkpoint"))
    assert store.trials("s")[0]["result"]["score"] == 0.5
    assert [e["epoch"] for e in store.epochs("s", 0)] == [1]
    assert store.studies() == ["s"]
    assert store.search("s")["plan"] == {"metric": "x"}  # type: ignore[index]
    store.add_model("s", trial=0, folder="m", evaluated_on="test", metrics={"a": 1}, comparison=None)
    assert store.model("s")["metrics"] == {"a": 1}  # type: ignore[index]


def test_a_trial_that_nobody_knows_of_begins_anew(store: Store) -> None:
    store.start_trial("s", trial_spec(0), "cpu:0")
    store.start_trial("s", trial_spec(1), "cpu:0")
    store.start_trial("s", replace(trial_spec(1), seed=7), "cpu:1")
    rows = store.trials("s")
    assert [(n, row["slot"], spec_from_json(row["spec"]).seed) for n, row in rows.items()] == [
        (0, "cpu:0", trial_spec(0).seed), (1, "cpu:1", 7)
    ]  # fmt: skip


def test_changes_of_a_block_are_written_at_its_end_or_when_something_is_read(store: Store) -> None:
    other = Store(store.url)
    with store.together():
        store.start_trial("s", trial_spec(0), "cpu:0")
        store.finish_trial("s", TrialDone(0, 0.5, {}, 1.1, 1, 1, 2.0, "checkpoint"))
        assert other.trials("s") == {}
        assert store.trials("s")[0]["result"]["score"] == 0.5
        store.start_trial("s", trial_spec(1), "cpu:0")
        assert list(other.trials("s")) == [0]
    assert list(other.trials("s")) == [0, 1]
    with pytest.raises(ZeroDivisionError), store.together():
        store.start_trial("s", trial_spec(2), "cpu:0")
        raise ZeroDivisionError
    assert list(other.trials("s")) == [0, 1, 2]
    store.start_trial("s", trial_spec(3), "cpu:0")  # a transaction of its own
    assert list(other.trials("s")) == [0, 1, 2, 3]
    other.close()


def test_an_epoch_and_the_result_are_recorded_together_or_not_at_all(store: Store) -> None:
    done, epoch = TrialDone(0, 0.5, {}, 1.1, 1, 1, 2.0, "checkpoint"), EpochResult(0, 1, 0.5, 1.0, 1.1, 2.0)
    store.start_trial("s", trial_spec(0), "cpu:0")
    store.finish_trial("s", done, epoch=epoch)
    assert [row["epoch"] for row in store.epochs("s", 0)] == [1]
    assert store.trials("s")[0]["result"]["score"] == 0.5
    with pytest.raises(StoreError):
        store.finish_trial("s", replace(done, score=0.7), epoch=epoch)  # it has that epoch
    assert store.trials("s")[0]["result"]["score"] == 0.5


def test_the_file_is_in_wal_mode_so_that_readers_do_not_block(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "tlauto.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_a_second_coordinator_is_refused_while_the_first_lives(store: Store, tmp_path: Path) -> None:
    code = (
        "import sys; from tlauto.store import Store; Store(sys.argv[1]).claim('s');"
        "print('claimed', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, store.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(StoreError, match=f"process {other.pid}"):
            store.claim("s")
        other.kill()
        other.wait()
    store.claim("s")
    assert store.search("s")["pid"] == os.getpid()  # type: ignore[index]


def test_a_newer_schema_is_refused(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "tlauto.db") as connection:
        connection.execute("INSERT INTO tlauto_migrations VALUES (?, 0)", (max(MIGRATIONS) + 1,))
    connection.close()
    with pytest.raises(StoreError, match="newer tlauto"):
        Store(store.url)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tlauto.db").write_text("this is not a database, but long enough to look like a header....")
    with pytest.raises(StoreError, match="not a database"):
        Store(storage_url(tmp_path, None))


@pytest.mark.parametrize("url", ["journal.log", "nosuch://x/y"])
def test_an_impossible_storage_is_refused(url: str) -> None:
    with pytest.raises(StoreError, match="cannot use the storage"):
        Store(url)
