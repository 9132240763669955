"""The SQLite file of a workspace before a search writes to it: checked, restored if need be, backed up."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

from tlauto.errors import StoreError
from tlauto.locks import locked

NETWORKS = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"}
    | {"ocfs2", "orangefs", "pvfs2", "smb3", "smbfs", "wekafs", "fuse.ceph", "fuse.gcsfuse"}
    | {"fuse.glusterfs", "fuse.juicefs", "fuse.rclone", "fuse.s3fs", "fuse.sshfs"}
)
"""File systems, as Linux names them, on which several machines may use one file."""

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

MOUNTS = Path("/proc/self/mountinfo")

IN_USE = (0x40000002, 510)
"""First byte and number of bytes of a file that SQLite locks while it is open in WAL mode (its os.h)."""


def backup_of(file: Path) -> Path:
    """Where the backup of a database lies."""
    return file.with_name(f"{file.name}.backup")


def make_safe(file: Path) -> list[str]:
    """Check a database that a search is about to use, and back it up; restore it when it is damaged.

    The damaged file stays beside it under another name, and a backup is only ever replaced by a file
    that passed the check. A file that is not there yet is fine.

    Returns: a sentence on each thing that the user should know.
    Raises: StoreError when the file is damaged or gone and cannot be restored.
    """
    notes = [_warning(file)] if network(file.parent) else []
    has_rows = file.exists() and file.stat().st_size > 0
    if not has_rows and not backup_of(file).exists():
        return notes
    lock = file.with_name(f"{file.name}.lock")
    try:
        with locked(lock):  # of two searches that start at once, one restores and the other finds it whole
            notes += _checked(file, backup_of(file))
            lock.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"cannot check the database {file}: {error.strerror or error}; check its folder and the "
            f"free space"
        ) from None
    return notes


def network(folder: Path, mounts: Path = MOUNTS) -> str | None:
    """The kind of network file system that a folder lies on; None for a local one or an unknown one.

    Args:
        mounts: a file like Linux's /proc/self/mountinfo (see proc(5)).
    """
    if not mounts.is_file():
        return None
    place, found = folder.resolve(), (-1, "")
    for line in mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        where, _, what = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), where.split()[4]))
        # The mounts are in order: of two at one place the later one is seen.
        if place.is_relative_to(point) and len(point.parts) >= found[0]:
            found = len(point.parts), what.split()[0]
    return found[1] if found[1] in NETWORKS else None


def _warning(file: Path) -> str:
    return (
        f"{file} lies on a network file system ({network(file.parent)}), where SQLite is safe only while one "
        f"machine uses it; choose a local --out, or --storage postgresql+psycopg://user@host/database"
    )


def _checked(file: Path, backup: Path) -> list[str]:
    if not file.exists():
        raise StoreError(
            f"the database {file} is gone but its backup {backup.name} is there; rename the backup to "
            f"{file.name} to go on from it, or move it away to start anew"
        )
    damage = _damage(file)
    if damage:
        return [_restored(file, backup, damage)]
    try:
        _copy(file, backup)
    except (sqlite3.Error, OSError) as error:
        return [f"the database could not be backed up to {backup}: {error}"]
    return []


def _damage(file: Path) -> str | None:
    """What is wrong with a database; None when nothing is."""
    if not file.stat().st_size:
        return "the file is empty"  # for SQLite, a new database
    try:
        with closing(_open(file)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in DAMAGED:
            raise StoreError(
                f"cannot check the database {file}: {error}; check the permissions of the file and its folder"
            ) from None
        return str(error)
    return None if found == "ok" else str(found).splitlines()[-1]


def _open(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{file.resolve().as_uri()}?mode=rw", uri=True, timeout=60)


def _copy(file: Path, backup: Path) -> None:
    """Make the backup, whole or not at all, also while another search writes to the file."""
    part = backup.with_name(f"{backup.name}.part")
    part.unlink(missing_ok=True)
    try:
        with closing(_open(file)) as source, closing(sqlite3.connect(part)) as target:
            source.backup(target)
            target.execute("PRAGMA journal_mode=DELETE")  # one file that can be copied as it is
        os.replace(part, backup)
    finally:
        part.unlink(missing_ok=True)


def _restored(file: Path, backup: Path, damage: str) -> str:
    """Put the backup in the place of a damaged file; a sentence on it."""
    _require_restorable(file, backup, damage)
    names = (file.with_name(f"{file.name}.damaged-{n}") for n in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    part = file.with_name(f"{file.name}.part")
    shutil.copyfile(backup, part)
    for ending in ("-wal", "-shm", ""):  # what a journal holds belongs to the damaged file
        if (old := file.with_name(file.name + ending)).exists():
            os.replace(old, aside.with_name(aside.name + ending))
    os.replace(part, file)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(backup.stat().st_mtime))
    return (
        f"the database {file} was damaged ({damage}) and is restored from its backup of {when}; what was "
        f"recorded since then is lost, and the damaged file is kept as {aside.name}"
    )


def _require_restorable(file: Path, backup: Path, damage: str) -> None:
    is_damaged = f"the database {file} is damaged ({damage})"
    if not backup.exists():
        raise StoreError(f"{is_damaged} and has no backup; move it away to start anew, or use another --out")
    if worse := _damage(backup):
        raise StoreError(
            f"{is_damaged} and so is its backup {backup.name} ({worse}); move both away to start anew, or "
            f"use another --out"
        )
    if _is_in_use(file):
        raise StoreError(
            f"{is_damaged} and another process has it open; end the searches and dashboards of this "
            f"workspace, then the same command restores it from its backup"
        )


def _is_in_use(file: Path) -> bool:
    """Whether another process has a database open in WAL mode: its journal must not change under it."""
    start, length = IN_USE
    with file.open("r+b") as opened:
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except BlockingIOError:
            return True
        except OSError:  # a file system without locks
            return False
    return False
