"""The cache's size limit: what is deleted for a new array, and what never is."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tlauto.caches import (
    DEFAULT_LIMIT,
    cache_limit,
    clear,
    entries,
    format_size,
    is_in_use,
    parse_size,
)
from tlauto.errors import ConfigError
from tlauto.training.arrays import cached_array

ROWS = 10
HOLD = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    import numpy as np
    from tlauto.training.arrays import cached_array

    def rows(first):
        print("computing", flush=True)
        sys.stdin.readline()
        yield np.zeros((10, 250))

    array = cached_array(Path(sys.argv[1]), (10, 250), np.float32, rows)
    print("mapped", flush=True)
    sys.stdin.readline()
    """
)
Hold = Callable[[str], "subprocess.Popen[str]"]


def path_of(cache: Path, name: str, *, kind: str = "features") -> Path:
    """The path of an array in the cache, its key made of one letter."""
    return cache / kind / f"{name * 32}.npy"


def make(cache: Path, name: str, *, kilobytes: int = 10, kind: str = "features") -> np.ndarray:
    """An array of this size and a little more, in the cache."""
    shape = (ROWS, 25 * kilobytes)
    return cached_array(
        path_of(cache, name, kind=kind), shape, np.float32, lambda first: [np.full(shape, ord(name))[first:]]
    )


def age(cache: Path, name: str, hours: float) -> None:
    """Make the files of an array look unused for so long."""
    then = time.time() - 3600 * hours
    for file in cache.glob(f"*/{name * 32}*"):
        os.utime(file, (then, then))


def names(cache: Path) -> str:
    """The names of the complete arrays, sorted."""
    return "".join(sorted(entry.path.name[0] for entry in entries(cache) if entry.is_complete))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds three arrays of 10 kB, a to c, of which c was used last; the limit is 35 kB."""
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "35kB")
    for hours, name in ((3, "a"), (2, "b"), (1, "c")):
        make(tmp_path, name)
        age(tmp_path, name, hours)
    return tmp_path


@pytest.fixture
def hold(cache: Path) -> Iterator[Hold]:
    """Start a process that computes or uses an array until it is killed."""
    processes: list[subprocess.Popen[str]] = []

    def start(name: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLD, str(path_of(cache, name))]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() in ("computing\n", "mapped\n")
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# --- eviction ---------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_is_deleted_first(cache: Path) -> None:
    make(cache, "d")
    assert names(cache) == "bcd"
    make(cache, "e", kilobytes=20)
    assert names(cache) == "de"
    assert not list(cache.glob("features/[abc]*")), "sidecars and locks go with their arrays"


def test_using_an_array_keeps_it(cache: Path) -> None:
    make(cache, "a")
    make(cache, "d")
    assert names(cache) == "acd"


def test_nothing_is_deleted_while_all_fits(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "45kB")
    make(cache, "d")
    assert names(cache) == "abcd"


def test_pixels_and_features_share_the_limit(cache: Path) -> None:
    make(cache, "d", kind="pixels")
    assert names(cache) == "bcd"


def test_an_array_in_use_in_this_process_is_not_evicted(cache: Path) -> None:
    used = make(cache, "a")[3:5]  # a part of it is enough
    age(cache, "a", 9)
    make(cache, "d")
    assert names(cache) == "acd"
    assert used[0, 0] == ord("a")
    del used
    age(cache, "a", 9)
    make(cache, "e")
    assert names(cache) == "cde"


def test_a_tensor_of_an_array_keeps_it(cache: Path) -> None:
    import torch

    tensor = torch.from_numpy(make(cache, "a"))
    age(cache, "a", 9)
    make(cache, "d")
    assert names(cache) == "acd"
    assert float(tensor[0, 0]) == ord("a")


def test_an_array_in_use_in_another_process_is_evicted_only_once_that_died(cache: Path, hold: Hold) -> None:
    process = hold("a")
    age(cache, "a", 9)
    make(cache, "d")
    assert names(cache) == "acd"
    process.kill()
    process.wait()
    make(cache, "e")
    assert names(cache) == "cde"


def test_an_array_that_another_process_computes_counts_and_stays(cache: Path, hold: Hold) -> None:
    hold("f")
    age(cache, "f", 48)
    make(cache, "d", kilobytes=20)
    (unfinished,) = (entry for entry in entries(cache) if not entry.is_complete)
    assert unfinished.path == path_of(cache, "f")
    assert unfinished.bytes < 1000 < 10_000 < unfinished.reserved
    assert names(cache) == "d", "20 kB and the 10 kB that the other will take"


def test_an_array_larger_than_the_limit_is_used_and_nothing_is_deleted_for_it(cache: Path) -> None:
    large = make(cache, "d", kilobytes=50)
    assert large[-1, -1] == ord("d")
    assert names(cache) == "abcd"
    make(cache, "e", kilobytes=1)
    assert names(cache) == "abcde", "it is in use and cannot be helped"
    del large
    make(cache, "f", kilobytes=1)
    assert names(cache) == "abcef", "it goes before what fits"


def test_what_an_array_is_computed_from_is_not_evicted_for_it(cache: Path) -> None:
    def rows(first: int) -> Iterator[np.ndarray]:
        source = make(cache, "a")
        age(cache, "a", 9)
        yield source

    cached_array(path_of(cache, "d"), (ROWS, 250), np.float32, rows)
    assert names(cache) == "acd"


def unfinished(cache: Path, name: str) -> None:
    """Leave an array as a process does that is killed in the middle."""

    def rows(first: int) -> Iterator[np.ndarray]:
        yield np.zeros((2, 250))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_array(path_of(cache, name), (ROWS, 250), np.float32, rows)


@pytest.fixture
def large_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that all arrays of a test fit in."""
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "1MB")


@pytest.mark.usefixtures("large_limit")
def test_an_unfinished_array_is_deleted_after_a_day(cache: Path) -> None:
    for name, hours in (("d", 23), ("e", 25)):
        unfinished(cache, name)
        age(cache, name, hours)
    old = cache / "features" / f"{'f' * 32}_x7ab2_q.part"  # as versions before the journal named it
    old.touch()
    age(cache, "f", 25)
    make(cache, "0")
    assert sorted({file.name[0] for file in cache.glob("features/*.part")}) == ["d"]
    assert not list(cache.glob("features/[ef]*"))
    assert names(cache) == "0abc"


def test_files_of_other_names_are_left_alone(cache: Path) -> None:
    foreign = [cache / "features" / name for name in ("mine.npy", f"{'a' * 31}.npy", f"{'a' * 32}.txt")]
    for file in foreign:
        file.write_bytes(bytes(40_000))
    make(cache, "d")
    assert names(cache) == "bcd"
    clear(cache)
    assert sorted((cache / "features").iterdir()) == sorted(foreign)


def test_processes_that_evict_each_others_arrays_all_get_what_they_want(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "25kB")
    program = textwrap.dedent(
        """
        import random, sys
        from pathlib import Path
        import numpy as np
        from tlauto.training.arrays import cached_array

        random.seed(sys.argv[2])
        for _ in range(60):
            name = random.choice("abcdef")
            rows = lambda first: (np.full((2, 250), ord(name)) for _ in range(first, 10, 2))
            path = Path(sys.argv[1], "features", name * 32 + ".npy")
            array = cached_array(path, (10, 250), np.float32, rows)
            assert (array == ord(name)).all()
        """
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", program, str(tmp_path), str(seed)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in range(3)
    ]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 3
    make(tmp_path, "0")  # until now each process may have used two at once
    assert sum(entry.bytes for entry in entries(tmp_path)) <= 25_000


# --- listing and clearing ---------------------------------------------------------------------------


@pytest.mark.usefixtures("large_limit")
def test_entries_say_what_they_are_last_used_first(cache: Path) -> None:
    unfinished(cache, "d")
    found = {entry.path.name[0]: entry for entry in entries(cache)}
    assert "".join(found) == "dcba"
    assert (found["d"].is_complete, found["c"].is_complete) == (False, True)
    assert [(entry.kind, entry.images) for entry in found.values()] == [("features", ROWS)] * 4
    assert time.time() - found["a"].last_used == pytest.approx(3 * 3600, abs=60)


def test_an_entry_with_a_damaged_sidecar_is_still_one(cache: Path) -> None:
    for name, text in (("a", "{"), ("b", '{"shape": "x", "backbone": 3, "bytes": null}'), ("c", "[]")):
        path_of(cache, name).with_suffix(".json").write_text(text)
    assert [(e.images, e.backbone) for e in entries(cache)] == [(None, None)] * 3


def test_in_use_is_what_a_process_maps_or_computes(cache: Path, hold: Hold) -> None:
    hold("a")
    hold("d")
    used = {entry.path.name[0]: is_in_use(entry) for entry in entries(cache)}
    assert used == {"a": True, "b": False, "c": False, "d": True}


def test_clearing_keeps_what_is_in_use(cache: Path, hold: Hold) -> None:
    (cache / "checks").mkdir()
    (cache / "checks" / f"{'0' * 16}.jsonl").write_text("{}\n")
    hold("a")
    hold("d")
    cleared = clear(cache)
    assert (cleared.removed, cleared.kept) == (3, 2)
    assert cleared.bytes > 20_000
    assert "".join(sorted(entry.path.name[0] for entry in entries(cache))) == "ad"


@pytest.mark.usefixtures("large_limit")
def test_clearing_leaves_no_file_at_all(cache: Path) -> None:
    unfinished(cache, "d")
    assert clear(cache).removed == 4
    assert [file for file in cache.rglob("*") if file.is_file()] == []


def test_clearing_what_is_old_keeps_the_rest(cache: Path) -> None:
    assert clear(cache, older_than_s=1.5 * 3600).removed == 2
    assert names(cache) == "c"


def test_a_cleared_array_is_computed_again(cache: Path) -> None:
    clear(cache)
    assert make(cache, "a")[0, 0] == ord("a")


# --- the limit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GB", 20 * 10**9), ("20gb", 20 * 10**9), ("20 G", 20 * 10**9), ("1.5TB", 15 * 10**11),
        ("500MiB", 500 * 2**20), ("2KiB", 2048), ("3kB", 3000), ("1000", 1000), (" 7 b ", 7),
    ],
)  # fmt: skip
def test_a_size_is_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "1,5GB", "20 XB", "1e9", "20iB", "0", "0.1B", "nan", "٣GB"]
)
def test_a_wrong_size_is_an_error_that_shows_a_right_one(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="size"):
        parse_size(text)
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", text or " ")
    with pytest.raises(ConfigError, match=r"TLAUTO_CACHE_SIZE.*size"):
        make(tmp_path, "a")


def test_the_limit_is_20_gb_unless_it_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TLAUTO_CACHE_SIZE", raising=False)
    assert cache_limit() == DEFAULT_LIMIT == 20 * 10**9
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "")
    assert cache_limit() == DEFAULT_LIMIT
    monkeypatch.setenv("TLAUTO_CACHE_SIZE", "1GiB")
    assert cache_limit() == 2**30


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (12_345_678, "12 MB"), (20e9, "20 GB"), (3e15, "3000 TB")],
)
def test_a_size_is_written_in_the_unit_that_suits_it(size: float, text: str) -> None:
    assert format_size(size) == text
