"""The workspace's database before a search: checked, restored from its backup, never made worse."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests_support import TINY, leaderboard, run, run_with_mounts, trial_spec

from tlauto.database import MOUNTS, backup_of, make_safe, network
from tlauto.errors import StoreError
from tlauto.store import Store, storage_url

FROZEN = (*TINY, "--strategies", "feature_extraction", "--heads", "linear", "--workers", "0")


def add_trials(file: Path, *numbers: int) -> None:
    with closing(Store(f"sqlite:///{file}")) as store:
        for number in numbers:
            store.start_trial("s", trial_spec(number), "cpu:0")


def trials_in(file: Path) -> list[int]:
    with closing(Store(f"sqlite:///{file}", create=False)) as store:
        return list(store.trials("s"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database of three trials that was backed up, and has got three more since."""
    file = tmp_path / "tlauto.db"
    add_trials(file, 0, 1, 2)
    assert make_safe(file) == []
    add_trials(file, 3, 4, 5)
    return file


def overwrite(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def damage_a_page(file: Path) -> None:
    """Overwrite the middle of a file, as a bad sector does; its head stays."""
    pages = bytearray(file.read_bytes())
    pages[len(pages) // 4 : len(pages) // 4 * 3] = os.urandom(len(pages) // 4 * 2)
    file.write_bytes(pages)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGES = (overwrite, damage_a_page, cut_short, empty)


def test_a_new_database_is_fine_and_has_nothing_to_back_up(tmp_path: Path) -> None:
    file = tmp_path / "tlauto.db"
    assert make_safe(file) == []
    file.touch()  # as a search leaves it that is killed at once
    assert make_safe(file) == []
    assert [f.name for f in tmp_path.iterdir()] == ["tlauto.db"]
    Store(f"sqlite:///{file}").close()


def test_the_backup_is_one_file_with_all_that_was_recorded(file: Path) -> None:
    assert trials_in(backup_of(file)) == [0, 1, 2]
    assert make_safe(file) == []
    assert trials_in(backup_of(file)) == trials_in(file) == [0, 1, 2, 3, 4, 5]
    assert not list(file.parent.glob("*.part*")) and not list(file.parent.glob("*.lock"))


WRITER = """
import sys, itertools
from tests_support import trial_spec
from tlauto.store import Store
store = Store(sys.argv[1])
for number in itertools.count(6):
    store.start_trial("s", trial_spec(number), "cpu:0")
    print(number, flush=True)
"""


def started(code: str, file: Path) -> subprocess.Popen[str]:
    """A Python program that is given a database's URL, once it has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, f"sqlite:///{file}"], cwd=Path(__file__).parent, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_a_backup_is_whole_while_another_search_writes(file: Path) -> None:
    with started(WRITER, file) as writer:
        try:
            for _ in range(5):
                assert make_safe(file) == []
        finally:
            writer.kill()
    backup = trials_in(backup_of(file))
    assert backup == list(range(len(backup))) and len(backup) > 6
    with closing(sqlite3.connect(backup_of(file))) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_database_is_restored_and_kept_aside(file: Path, spoil: Callable[[Path], None]) -> None:
    spoil(file)
    spoilt = file.read_bytes()
    (note,) = make_safe(file)
    assert f"{file} was damaged (" in note and "restored from its backup of 20" in note
    assert "kept as tlauto.db.damaged-1" in note
    assert trials_in(file) == [0, 1, 2]
    assert file.with_name("tlauto.db.damaged-1").read_bytes() == spoilt
    add_trials(file, 3)
    assert make_safe(file) == []
    overwrite(file)
    make_safe(file)
    assert trials_in(file) == [0, 1, 2, 3] and file.with_name("tlauto.db.damaged-2").exists()


KILLED = """
import os, sys
from tlauto.store import Store
Store(sys.argv[1]).fail_trial("s", 0, kind="", message="")
print("written", flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_journal_of_a_damaged_database_is_not_applied_to_its_backup(file: Path) -> None:
    with started(KILLED, file) as killed:
        killed.wait()
    journal = file.with_name("tlauto.db-wal")
    assert journal.stat().st_size
    overwrite(file)
    make_safe(file)
    assert not journal.exists()
    assert trials_in(file) == [0, 1, 2]


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_backup_is_not_used_and_a_good_one_not_replaced(
    file: Path, spoil: Callable[[Path], None]
) -> None:
    good = backup_of(file).read_bytes()
    overwrite(file)
    spoil(backup_of(file))
    before = {f.name: f.read_bytes() for f in (file, backup_of(file))}
    with pytest.raises(StoreError, match=r"is damaged \(.*\) and so is its backup tlauto.db.backup \("):
        make_safe(file)
    assert {f.name: f.read_bytes() for f in (file, backup_of(file))} == before
    backup_of(file).write_bytes(good)
    make_safe(file)
    assert trials_in(file) == [0, 1, 2] and backup_of(file).read_bytes() == good


def test_a_damaged_database_without_backup_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "tlauto.db"
    add_trials(file, 0)
    overwrite(file)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"\(file is not a database\) and has no backup; move it away"):
        make_safe(file)
    assert file.read_bytes() == before


def test_a_database_that_is_gone_is_neither_restored_nor_begun_anew_unasked(file: Path) -> None:
    file.unlink()
    with pytest.raises(StoreError, match=r"is gone but its backup tlauto\.db\.backup is there; rename"):
        make_safe(file)
    assert [f.name for f in file.parent.iterdir() if f.name != "tlauto.db.lock"] == ["tlauto.db.backup"]


OPENER = """
import sys
from tlauto.store import Store
store = Store(sys.argv[1])
print("open", flush=True)
sys.stdin.read()
"""


def test_a_database_that_another_process_has_open_is_not_changed_under_it(file: Path) -> None:
    with started(OPENER, file) as other:
        try:
            overwrite(file)
            with pytest.raises(StoreError, match="another process has it open; end the searches"):
                make_safe(file)
            assert not file.with_name("tlauto.db.damaged-1").exists()
        finally:
            other.kill()
    assert len(make_safe(file)) == 1
    assert trials_in(file) == [0, 1, 2]


MOUNTED = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:30 / /home rw,relatime shared:9 - nfs4 server:/export/home rw,vers=4.2
31 30 0:31 / /home/ann/my\\040disk rw - fuse.sshfs ann@host: rw,user_id=0
32 30 0:32 / /home/ann/scratch rw - ext4 /dev/sdb1 rw
33 22 0:33 / /lab rw - ext4 /dev/sdc1 rw
34 22 0:34 / /lab rw - lustre 10.0.0.1@tcp:/lab rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/ann/runs", "nfs4"),
        ("/home/ann/my disk/runs", "fuse.sshfs"),
        ("/home/ann/scratch/runs", None),
        ("/homes/runs", None),
        ("/lab/runs", "lustre"),
    ],
)
def test_a_network_file_system_is_told_by_its_mount(folder: str, kind: str | None, tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTED)
    assert network(Path(folder), mounts) == kind


@pytest.mark.skipif(not MOUNTS.exists(), reason="this system has no /proc/self/mountinfo")
def test_a_folder_in_memory_is_local_and_a_system_without_mount_table_is_not_known() -> None:
    assert network(Path("/proc")) is None
    assert network(Path("/"), Path("/nowhere")) is None


# --- whole searches -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_goes_on_from_the_backup_of_a_damaged_database(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=6, classes=2)
    for trials in ("2", "4"):
        done = run("search", "--data", "patches", *FROZEN, "--trials", trials, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    overwrite(tmp_path / "tlauto-runs/tlauto.db")
    done = run("search", "--data", "patches", *FROZEN, "--trials", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tlauto.db was damaged (file is not a database) and is restored" in done.stderr
    assert "with 2 trials done" in done.stderr
    assert [row["number"] for row in sorted(leaderboard(tmp_path), key=lambda r: r["number"])] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_full_disk_ends_a_search_in_one_sentence_and_loses_no_trial(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=6, classes=2)
    (tmp_path / "runs").mkdir()
    search = f"$TLAUTO search --data patches --out runs {' '.join(FROZEN)} --trials 6"
    # Room for the tables and about two trials.
    done = run_with_mounts(
        f"""mount -t tmpfs -o size=600k tmpfs runs
        {search} || echo "ended with $?" >&2
        $TLAUTO leaderboard --out runs --json > before.json
        mount -o remount,size=64m runs
        {search}
        $TLAUTO leaderboard --out runs --json > after.json""",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ended = done.stderr.splitlines()
    (error,) = [line for line in ended if line.startswith("error: ")]
    assert "disk is full; make room on its disk; the same command goes on" in error
    assert ended[ended.index(error) + 1] == "ended with 1"
    before, after = (scores(tmp_path / name) for name in ("before.json", "after.json"))
    assert before and before.items() <= after.items()
    assert len(after) == 6


def scores(file: Path) -> dict[int, float]:
    """Scores of complete trials in what `leaderboard --json` printed."""
    return {r["number"]: r["score"] for r in json.loads(file.read_text()) if r["state"] == "complete"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    Store(storage_url(tmp_path / "runs", None)).close()
    done = run_with_mounts(
        """mount --bind runs runs
        mount -o remount,ro,bind runs
        for words in show leaderboard "search --data patches"; do
            $TLAUTO $words --out runs || echo "ended with $?" >&2
        done""",
        cwd=tmp_path,
    )
    said = done.stderr.splitlines()
    assert said[1::2] == ["ended with 1"] * 3, done.stderr
    for line in said[0:4:2]:
        assert f"{tmp_path}/runs/tlauto.db: unable to open" in line and "its folder can be written" in line
    assert "cannot write to the workspace" in said[4] and "--out" in said[4]
