"""What the system tells of memory, read from real files, and when a worker holds too much of it."""

from __future__ import annotations

import mmap
import shutil
from pathlib import Path

import pytest

from tlauto.errors import ConfigError
from tlauto.memory import _shown_by_ps, available_bytes, capacity_bytes, held_bytes, memory_floor
from tlauto.pool.growth import FIRST, Growth

GB = 10**9


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {
    "proc/meminfo": "MemTotal:       16000000 kB\nMemAvailable:   8000000 kB\nHugePages_Total:       0\n"
}
UNIFIED = {
    "proc/self/cgroup": "0::/user/job\n",
    "sys/fs/cgroup/memory.stat": "anon 1\n",
    "sys/fs/cgroup/user/memory.max": f"{4 * GB}\n",
    "sys/fs/cgroup/user/memory.current": f"{3 * GB}\n",
    "sys/fs/cgroup/user/memory.stat": f"anon {GB}\nactive_file {GB}\ninactive_file {GB}\n",
    "sys/fs/cgroup/user/job/memory.max": "max\n",
    "sys/fs/cgroup/user/job/memory.current": f"{GB}\n",
    "sys/fs/cgroup/user/job/memory.stat": "anon 1\n",
}
OLDER = {
    "proc/self/cgroup": "4:memory:/host/path\n3:cpuset:/\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
    "sys/fs/cgroup/memory/memory.stat": f"total_active_file {GB // 4}\ntotal_inactive_file {GB // 4}\n",
}


@pytest.mark.parametrize(
    ("files", "capacity", "available"),
    [
        ({}, None, None),
        (MEMINFO, 16000000 * 1024, 8000000 * 1024),
        ({**MEMINFO, **UNIFIED}, 4 * GB, 3 * GB),
        ({**MEMINFO, **OLDER}, 2 * GB, 3 * GB // 2),
    ],
    ids=["another system", "no limit", "a limit above us", "in a container, the older way"],
)
def test_a_control_group_limits_what_there_is(
    files: dict[str, str], capacity: int | None, available: int | None, tmp_path: Path
) -> None:
    root = write(tmp_path, files)
    assert (capacity_bytes(root), available_bytes(root)) == (capacity, available)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_this_process_holds_what_it_fills() -> None:
    size = 200_000_000
    before = held_bytes()
    # A map of its own: an allocator could hand out what this process held already and had freed.
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for _ in range(200):
            block.write(b"x" * (size // 200))
        after = held_bytes()
    assert before is not None and after is not None
    assert size * 0.9 < after - before < size * 1.5
    total, left = capacity_bytes(), available_bytes()
    assert total is not None and left is not None
    assert after < total and 0 <= left <= total


@pytest.mark.skipif(not shutil.which("ps"), reason="there is no ps")
def test_where_there_is_no_proc_ps_tells() -> None:
    held, shown = held_bytes(), _shown_by_ps()
    assert held is not None and shown is not None
    assert held * 0.9 < shown


def test_the_floor_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLAUTO_MEMORY_FLOOR", raising=False)
    assert memory_floor() == GB
    monkeypatch.setenv("TLAUTO_MEMORY_FLOOR", "500MB")
    assert memory_floor() == GB // 2
    monkeypatch.setenv("TLAUTO_MEMORY_FLOOR", "low")
    with pytest.raises(ConfigError, match="TLAUTO_MEMORY_FLOOR: 'low' is not a size"):
        memory_floor()


def test_the_first_trials_set_a_workers_level() -> None:
    growth = Growth(most=100)
    for held in (500, 900, 700)[:FIRST]:
        assert growth.is_early and not growth.is_too_much(10**6)
        growth.note(held)
    assert growth.level == 900
    assert not growth.is_too_much(1000)
    growth.note(1000)
    assert growth.level == 900, "slow growth is growth"
    assert growth.is_too_much(1001)
