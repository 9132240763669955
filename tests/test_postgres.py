"""A study on a PostgreSQL server: whole searches, other readers, restarts, and what may be wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from postgres_support import PASSWORD, Server, postgres
from test_migrations import columns, described, open_at_once
from tests_support import (
    HERE,
    TINY,
    command,
    environment,
    refused,
    run,
    trial_spec,
    wait_for,
    wait_until_served,
)

from tlauto import store as tables
from tlauto.connections import open_engine
from tlauto.contracts import EpochResult
from tlauto.errors import StoreError
from tlauto.store import STALE_S, Store
from tlauto.study import Study

FROZEN = (*TINY, "--strategies", "feature_extraction", "--heads", "linear")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with postgres() as server:
        yield server


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest) -> str:
    """The URL of a new empty database."""
    return server.make_database(request.node.name[:60])


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """A store with an unclaimed search `s`."""
    with closing(Store(url)) as store:
        store.create_search(
            "s", config="{}", dataset="{}", fingerprint="f", root="/r", report="{}", plan={"metric": "x"}
        )
        yield store


# --- tables -------------------------------------------------------------------------------------------


def test_the_steps_make_the_tables_that_the_store_uses(url: str) -> None:
    Store(url).close()
    engine = open_engine(url)
    assert columns(engine) == described(tables._meta)
    engine.dispose()


def test_several_searches_may_make_a_database_at_once(url: str) -> None:
    open_at_once(url)


def test_what_text_and_numbers_the_server_refuses_is_recorded_all_the_same(store: Store) -> None:
    store.start_trial("s", trial_spec(0), "cpu:0")
    store.add_epoch("s", EpochResult(0, 1, 0.5, float("nan"), float("inf"), 2.0))
    store.fail_trial("s", 0, kind="error", message="zero \0 and half \udc80", detail="\0")
    (epoch,) = store.epochs("s", 0)
    assert (epoch["train_loss"], epoch["val_loss"]) == (None, float("inf"))
    assert store.trials("s")[0]["error"] == r"zero \0 and half \udc80"


# --- two coordinators -----------------------------------------------------------------------------------


def claim_elsewhere(url: str, *, seconds_ago: float) -> None:
    """Have a process on another machine claim the search `s`."""
    engine = open_engine(url)
    values = {"state": "running", "pid": 4711, "host": "elsewhere", "beat_at": time.time() - seconds_ago}
    with engine.begin() as connection:
        connection.execute(tables._searches.update().values(values))
    engine.dispose()


def test_a_study_that_another_machine_searches_is_refused_until_that_is_silent(store: Store) -> None:
    claim_elsewhere(store.url, seconds_ago=1)
    with pytest.raises(StoreError, match="process 4711 on elsewhere"):
        store.claim("s")
    claim_elsewhere(store.url, seconds_ago=STALE_S + 1)
    store.claim("s")
    store.add_seconds("s", 1.0)


def test_a_coordinator_that_was_held_up_notices_that_another_took_over(store: Store) -> None:
    store.claim("s")
    claim_elsewhere(store.url, seconds_ago=0)
    with pytest.raises(StoreError, match="taken over by process 4711 on elsewhere"):
        store.add_seconds("s", 1.0)
    store.release("s", state="interrupted")
    assert store.search("s")["host"] == "elsewhere"  # type: ignore[index]


CLAIMANT = """
import sys
from tlauto.errors import StoreError
from tlauto.store import Store
store = Store(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    store.claim("s")
except StoreError as error:
    print(error, flush=True)
else:
    print("claimed", flush=True)
sys.stdin.readline()
"""


def test_of_several_that_claim_a_study_at_once_one_gets_it(store: Store) -> None:
    claiming = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIMANT, store.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    said = []
    for turn in range(2):
        for process in claiming:
            if turn:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
        for process in claiming:
            assert process.stdout is not None
            said.append(process.stdout.readline().strip())
    for process in claiming:
        process.communicate("\n", timeout=60)
    assert sorted(line == "claimed" for line in said[4:]) == [False, False, False, True], said
    assert all(line == "claimed" or "s'" in line for line in said[4:])


# --- what may be wrong ----------------------------------------------------------------------------------


def test_what_is_wrong_with_a_storage_is_one_sentence_without_the_password(
    server: Server, tmp_path: Path
) -> None:
    other = server.url("postgres")
    wrong = {
        server.url("nope"): 'database "nope" does not exist; create the database',
        server.url("postgres", password="wr0ng-word"): "password authentication failed for user",
        other.replace(f":{PASSWORD}@", "@"): "no password supplied; check user and password",
        other.replace(str(server.port), "1"): "Connection refused; start the server",
        other.replace("127.0.0.1", "nosuch.invalid"): "check the host in --storage",
        server.url("postgres", password=f"p@{PASSWORD}"): "in a password '@' is written %40",
        other.replace(str(server.port), "port"): "it is no database URL",
        other.replace("psycopg", "pg8000"): "No module named 'pg8000'",
        f"{other}?nope=1": 'invalid connection option "nope"',
    }
    for storage, words in wrong.items():
        with pytest.raises(StoreError) as refusal:
            Store(storage)
        said = str(refusal.value)
        assert words in said and "\n" not in said, said
        assert PASSWORD not in said and "wr0ng-word" not in said, said
    sentence = refused("show", "--storage", server.url("nope"), cwd=tmp_path)
    assert 'database "nope" does not exist' in sentence and PASSWORD not in sentence


def test_a_user_who_may_make_no_tables_is_told_so(server: Server) -> None:
    import psycopg

    owned = server.make_database("owned")
    with psycopg.connect(owned.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE USER guest PASSWORD 'guest'")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    with pytest.raises(StoreError, match="permission denied for schema public; let this user create tables"):
        Store(server.url("owned", user="guest", password="guest"))


def test_reading_an_empty_database_makes_no_tables(url: str, tmp_path: Path) -> None:
    assert "holds no study yet" in refused("leaderboard", "--storage", url, cwd=tmp_path)
    engine = open_engine(url)
    assert columns(engine) == {}
    engine.dispose()


# --- restarts -------------------------------------------------------------------------------------------


def test_a_restart_of_the_server_between_two_writes_is_not_noticed(server: Server, store: Store) -> None:
    with closing(Study(store.url, "s", seed=0, create=True)) as study:
        server.stop()
        server.start()
        store.add_seconds("s", 1.0)
        study.enqueue({}, purpose="probe")
        assert [trial.state for trial in study.trials()] == ["waiting"]


def test_a_server_that_is_away_for_a_while_is_waited_for(server: Server, store: Store) -> None:
    with closing(Study(store.url, "s", seed=0, create=True)) as study:
        server.stop("immediate")
        back = threading.Timer(3.0, server.start)
        back.start()
        study.enqueue({}, purpose="probe")
        store.add_seconds("s", 1.0)
        back.join()
        assert len(study.trials()) == 1
    assert store.search("s")["seconds"] == 1.0  # type: ignore[index]


@contextmanager
def searching(folder: Path, *args: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "search.log").open("wb") as log:
        process = subprocess.Popen(
            command("search", "--data", "patches", *args), cwd=folder, env=environment(folder), stdout=log,
            stderr=log,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def complete(folder: Path, url: str) -> dict[int, float]:
    """Scores of the complete trials of the newest study."""
    rows = json.loads(run("leaderboard", "--storage", url, "--json", cwd=folder).stdout)
    return {row["number"]: row["score"] for row in rows if row["state"] == "complete"}


@pytest.mark.slow
def test_a_killed_server_costs_a_search_nothing_or_one_sentence(
    server: Server, url: str, tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=6, classes=2)
    args, log = (*FROZEN, "--trials", "8", "--storage", url), tmp_path / "search.log"
    with searching(tmp_path, *args) as search:
        wait_for(log, "best ", search)
        before = complete(tmp_path, url)
        server.stop("immediate")  # all connections end, maybe in the middle of a transaction
        server.start()
        code = search.wait(timeout=400)
    said = log.read_text()
    assert "Traceback" not in said and PASSWORD not in said
    if code:
        assert said.splitlines()[-1].startswith("error: ") and "the same command goes on" in said
        done = run("search", "--data", "patches", *args, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    after = complete(tmp_path, url)
    assert before and before.items() <= after.items()
    assert len(after) == 8


@pytest.mark.slow
def test_a_server_that_stays_away_ends_a_search_in_one_sentence_and_it_goes_on_later(
    server: Server, url: str, tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=6, classes=2)
    args, log = (*FROZEN, "--trials", "6", "--storage", url), tmp_path / "search.log"
    with searching(tmp_path, *args) as search:
        wait_for(log, "best ", search)
        server.stop()
        try:
            assert search.wait(timeout=300) == 1
        finally:
            server.start()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: cannot use the database postgresql+psycopg://tlauto:***@127.0.0.1")
    assert "the same command goes on" in last and "Traceback" not in log.read_text()
    assert run("search", "--data", "patches", *args, cwd=tmp_path).returncode == 0
    assert len(complete(tmp_path, url)) == 6


# --- a whole search -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(
    server: Server, tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]
) -> tuple[Path, str]:
    """A folder, and a database in which one search of three trials ended and a second learned from it."""
    folder, url = tmp_path_factory.mktemp("searched"), server.make_database("searched")
    for name in ("patches", "others"):
        make_patches(folder / name, per_class=6, classes=2, size=48 if name == "patches" else 40)
        done = run("search", "--data", name, *FROZEN, "--trials", "3", "--storage", url, cwd=folder)
        assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stderr)
    return folder, url


def test_a_search_leaves_no_file_of_a_database_and_its_model_predicts(searched: tuple[Path, str]) -> None:
    folder, url = searched
    assert not list((folder / "tlauto-runs").glob("*.db*"))
    shown = json.loads(run("show", "patches", "--storage", url, "--json", cwd=folder).stdout)
    assert shown["test"] is not None
    photo = next((folder / "patches" / "red").iterdir())
    assert run("predict", shown["model"], str(photo), cwd=folder).returncode == 0


def test_a_search_learns_from_what_the_server_remembers(searched: tuple[Path, str]) -> None:
    assert "starts from what earlier searches found here: patches" in (searched[0] / "said.txt").read_text()


def test_the_password_is_recorded_nowhere(searched: tuple[Path, str]) -> None:
    folder, url = searched
    with closing(Store(url)) as store:
        assert ":***@127.0.0.1" in store.search("patches")["config"]  # type: ignore[index]
    said = run("show", "patches", "--storage", url, "--json", cwd=folder)
    assert PASSWORD not in said.stdout + said.stderr
    for file in (folder / "tlauto-runs").rglob("*"):
        assert not file.is_file() or PASSWORD.encode() not in file.read_bytes(), file


def test_a_finished_search_goes_on_to_a_larger_total(searched: tuple[Path, str]) -> None:
    folder, url = searched
    before = rows(folder, url)
    args = (*FROZEN, "--trials", "5", "--storage", url)
    done = run("search", "--data", "patches", *args, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "with 3 trials done" in done.stderr
    after = rows(folder, url)
    assert len(after) == 5 and [after[number] for number in before] == list(before.values())


def rows(folder: Path, url: str) -> dict[int, dict[str, Any]]:
    found = json.loads(run("leaderboard", "patches", "--storage", url, "--json", cwd=folder).stdout)
    return {row["number"]: {**row, "is_best": None} for row in sorted(found, key=lambda row: row["number"])}


def test_a_trial_is_rerun_from_the_server(searched: tuple[Path, str]) -> None:
    folder, url = searched
    again = json.loads(run("rerun", "patches", "0", "--storage", url, "--json", cwd=folder).stdout)
    assert again["score"] == pytest.approx(again["recorded"], abs=1e-9)


def test_the_dashboard_shows_it_also_after_the_server_was_restarted(
    server: Server, searched: tuple[Path, str]
) -> None:
    folder, url = searched
    log = folder / "dashboard.log"
    with log.open("wb") as out:
        words = command("dashboard", "--port", "0", "--storage", url)
        serving = subprocess.Popen(words, cwd=folder, env=environment(folder), stdout=out, stderr=out)
    try:
        port = int(wait_for(log, r"http://127\.0\.0\.1:(\d+) ", serving)[1])
        wait_until_served(port)
        for _ in range(2):
            with HERE.open(f"http://127.0.0.1:{port}/api/studies", timeout=60) as answer:
                names = {study["study_name"] for study in json.load(answer)["study_summaries"]}
            assert names == {"patches", "others"}
            server.stop()
            server.start()
    finally:
        serving.kill()
        serving.wait()


def test_a_study_deleted_by_another_program_ends_its_search_in_one_sentence(
    url: str, tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    import optuna

    make_patches(tmp_path / "patches", per_class=6, classes=2)
    with searching(tmp_path, *FROZEN, "--trials", "2000", "--storage", url) as search:
        wait_for(tmp_path / "search.log", "best ", search)
        storage = optuna.storages.RDBStorage(url)
        # Optuna rolls a deletion back in silence when a trial was added meanwhile.
        while storage.get_all_studies():
            optuna.delete_study(study_name="patches", storage=storage)
        storage.remove_session()
        storage.engine.dispose()
        assert search.wait(timeout=200) == 1
    last = (tmp_path / "search.log").read_text().splitlines()[-1]
    assert last.startswith("error: the trials of study 'patches' are gone") and "--new" in last
