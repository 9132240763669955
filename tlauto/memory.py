"""Main memory, as the system tells of it: what a process holds, what there is, what is left."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

from tlauto.caches import size_setting

FLOOR = "TLAUTO_MEMORY_FLOOR"
DEFAULT_FLOOR = 1_000_000_000
"""Bytes that must be left for a trial to start beside others: about what a worker needs to come up."""

CONTEXT = 600 * 2**20
"""Bytes of a GPU that a process takes besides its tensors, for kernels and libraries: an estimate."""


ROOM = 16 * 2**20
"""Bytes that the coordinator must be able to get for its next round; one takes far less."""


def require_room() -> None:
    """Raise MemoryError unless `ROOM` bytes could be had now; nothing is kept of them.

    Where memory is limited (`ulimit -v`, no overcommitment), a search ends here between two rounds, rather
    than anywhere within one: not every library's native code survives an allocation that is refused.
    """
    try:
        mmap.mmap(-1, ROOM).close()
    except OSError as error:
        raise MemoryError(f"no {ROOM // 2**20} MiB are left") from error


def memory_floor() -> int:
    """Bytes of memory that must be left, from TLAUTO_MEMORY_FLOOR; raises ConfigError for a bad value."""
    return size_setting(FLOOR, DEFAULT_FLOOR)


def held_bytes() -> int | None:
    """Bytes of memory that this process holds; None where the system does not tell.

    Pages of mapped files, such as cached features, are left out where the system tells them apart (Linux):
    it takes them back when it needs them.
    """
    try:
        return _lines(Path("/proc/self/status"))["RssAnon"]
    except (OSError, KeyError, ValueError):
        return _shown_by_ps()


def _shown_by_ps() -> int | None:
    """Bytes of this process that are in memory, mapped files included; None where there is no `ps`."""
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return int(shown.stdout) * 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def capacity_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process and its workers may have at most; None where nobody tells (macOS).

    Args:
        root: of the file system that `proc` and `sys` are in.
    """
    return min([*_system(root, "MemTotal"), *(limit for limit, _ in _groups(root))], default=None)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes of memory that can be had now: the system's, or less in a control group with a limit.

    None where nobody tells (macOS). `root` as above.
    """
    left = (max(0, limit - used) for limit, used in _groups(root))
    return min([*_system(root, "MemAvailable"), *left], default=None)


def _system(root: Path, name: str) -> list[int]:
    try:
        return [_lines(root / "proc/meminfo")[name]]
    except (OSError, KeyError, ValueError):
        return []


def _groups(root: Path) -> list[tuple[int, int]]:
    """Limit and use, without what files could give back, of the control groups that this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / kinds
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if kinds else ("memory.max", "memory.current")
        )
        folder = top / path.strip("/")
        # In a container the path is often the host's, and its own group is what is mounted at the top.
        folders = [f for f in (folder, *folder.parents) if f.is_relative_to(top)]
        found += [group for f in folders if (group := _group(f, *names))]
    return found


def _group(folder: Path, limit: str, usage: str) -> tuple[int, int] | None:
    try:
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None  # "max" is no limit
    files = sum(
        int(stat.get(f"total_{name}", stat.get(name, 0))) for name in ("active_file", "inactive_file")
    )
    return most, max(0, used - files)


def _lines(file: Path) -> dict[str, int]:
    """Bytes by name of a file with lines such as `MemTotal:  24684096 kB`."""
    pairs = (line.split(":") for line in file.read_text().splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}
