"""Cached arrays whose processes are killed, whose bytes change, and that several processes want at once."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from tlauto.errors import ConfigError, DataError
from tlauto.training.arrays import cached_array

KEY = "0123456789abcdef" * 2
ROWS, BLOCK, WIDTH = 40, 4, 100
PROGRAM = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import numpy as np
    from tlauto.training.arrays import cached_array

    path, log, stop, pause_s = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

    def rows(first):
        for start in range(first, 40, 4):
            if start == stop:
                print("stopped", flush=True)
                time.sleep(60)
            with log.open("a") as file:
                file.write(f"{start}\\n")
            time.sleep(pause_s)
            yield np.repeat(np.arange(start, start + 4)[:, None], 100, axis=1)

    print(cached_array(path, (40, 100), np.float32, rows, about={"backbone": "timm:a"}).sum())
    """
)
EXPECTED = np.repeat(np.arange(ROWS)[:, None], WIDTH, axis=1)


class Build:
    """An array in a cache, and what computed it: the first row of each block, in order."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "features" / f"{KEY}.npy"
        self.log = folder / "log"
        self.log.touch()

    def start(self, *, stop: int = -1, pause_s: float = 0) -> subprocess.Popen[str]:
        """A process that computes the array; it hangs before row `stop`."""
        words = [sys.executable, "-c", PROGRAM, str(self.path), str(self.log), str(stop), str(pause_s)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def kill_at(self, row: int) -> None:
        """Start it and kill it with SIGKILL once all rows before `row` are computed."""
        with self.start(stop=row) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "stopped\n"
            process.kill()
        assert process.returncode == -signal.SIGKILL

    def here(self) -> np.ndarray:
        """The array, in this process."""

        def rows(first: int) -> Iterable[np.ndarray]:
            for start in range(first, ROWS, BLOCK):
                with self.log.open("a") as file:
                    file.write(f"{start}\n")
                yield EXPECTED[start : start + BLOCK]

        return cached_array(self.path, (ROWS, WIDTH), np.float32, rows)

    @property
    def computed(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    return Build(tmp_path)


BLOCKS = list(range(0, ROWS, BLOCK))


def test_a_killed_build_goes_on_where_it_was(build: Build) -> None:
    build.kill_at(20)
    assert not build.path.exists()
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == BLOCKS, "every block was computed once"
    assert sorted(f.suffix for f in build.path.parent.iterdir()) == [".json", ".lock", ".npy"]


def test_a_build_that_is_killed_again_and_again_ends(build: Build) -> None:
    for row in (8, 12, 36):
        build.kill_at(row)
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == BLOCKS


def test_a_build_killed_before_the_last_rename_computes_nothing(build: Build) -> None:
    build.kill_at(36)
    build.here()
    os.replace(build.path, build.path.with_suffix(".part"))
    # The journal of a complete file, as it is until the rename.
    data, header = build.path.with_suffix(".part").read_bytes(), build.path.with_suffix(".json").read_text()
    line = f"{ROWS} {zlib.crc32(data):08x}\n"
    build.path.with_suffix(".journal").write_text(f"{header}\n{line}")
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == BLOCKS


def test_half_a_block_and_half_a_line_are_cut_off(build: Build) -> None:
    build.kill_at(20)
    with build.path.with_suffix(".part").open("ab") as file:
        file.write(b"\x01" * 500)
    with build.path.with_suffix(".journal").open("ab") as file:
        file.write(b"24 0a")
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == BLOCKS


def test_blocks_that_a_power_cut_lost_are_computed_again(build: Build) -> None:
    build.kill_at(20)
    part = build.path.with_suffix(".part")
    data = bytearray(part.read_bytes())
    start = 128 + 8 * WIDTH * 4  # of the third block
    data[start : start + 300] = bytes(300)
    part.write_bytes(data)
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == [0, 4, 8, 12, 16, *range(8, ROWS, BLOCK)]


@pytest.mark.parametrize("damage", ["journal", "header", "shape"])
def test_a_part_that_does_not_fit_is_not_continued(build: Build, damage: str) -> None:
    build.kill_at(20)
    part, journal = build.path.with_suffix(".part"), build.path.with_suffix(".journal")
    if damage == "journal":
        journal.unlink()
    elif damage == "header":
        part.write_bytes(b"x" + part.read_bytes()[1:])
    else:
        journal.write_text(journal.read_text().replace("[40, 100]", "[40, 10]"))
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == [0, 4, 8, 12, 16, *BLOCKS]


def test_an_interrupted_build_in_this_process_goes_on_too(build: Build) -> None:
    def rows(first: int) -> Iterable[np.ndarray]:
        yield EXPECTED[first : first + 8]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_array(build.path, (ROWS, WIDTH), np.float32, rows)
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == list(range(8, ROWS, BLOCK))


@pytest.mark.parametrize("position", [3, 128, 5000, -1])
def test_a_flipped_byte_is_noticed_and_computed_again(build: Build, position: int) -> None:
    with build.start() as process:
        process.communicate(timeout=60)
    data = bytearray(build.path.read_bytes())
    data[position] ^= 1
    build.path.write_bytes(data)
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == BLOCKS * 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checksum": "crc32:00000000"}', "missing"])
def test_an_array_that_no_sidecar_vouches_for_is_computed_again(build: Build, text: str) -> None:
    with build.start() as process:
        process.communicate(timeout=60)
    sidecar = build.path.with_suffix(".json")
    sidecar.write_text(text)
    if text == "missing":
        sidecar.unlink()
    assert np.array_equal(build.here(), EXPECTED)
    assert build.computed == BLOCKS * 2


def test_the_sidecar_says_what_the_array_is(build: Build) -> None:
    with build.start() as process:
        process.communicate(timeout=60)
    facts = json.loads(build.path.with_suffix(".json").read_text())
    assert facts.pop("created").endswith("+00:00")
    assert facts.pop("checksum").startswith("crc32:")
    assert facts == {
        "version": 1, "kind": "features", "backbone": "timm:a", "shape": [ROWS, WIDTH], "dtype": "<f4",
        "bytes": build.path.stat().st_size,
    }  # fmt: skip
    assert np.array_equal(np.load(build.path), EXPECTED), "an ordinary .npy file"


def test_two_processes_compute_an_array_once(build: Build) -> None:
    processes = [build.start(pause_s=0.05) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert answers == [f"{EXPECTED.sum():.1f}\n"] * 2
    assert build.computed == BLOCKS


def test_a_process_that_waits_goes_on_where_a_killed_one_was(build: Build) -> None:
    with build.start(stop=20) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "stopped\n"
        with build.start() as second:
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=2)
            first.kill()
            assert second.communicate(timeout=60)[0] == f"{EXPECTED.sum():.1f}\n"
    assert build.computed == BLOCKS


def test_an_array_without_rows_is_an_array(tmp_path: Path) -> None:
    array = cached_array(tmp_path / "features" / f"{KEY}.npy", (0, 3), np.float32, lambda first: [])
    assert array.shape == (0, 3)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_wrong_number_of_rows_leaves_nothing_behind(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "features" / f"{KEY}.npy"
    with pytest.raises(ValueError, match="rows"):
        cached_array(path, (3, 2), np.float32, lambda first: [np.zeros((rows, 2))])
    assert [file.suffix for file in path.parent.iterdir()] == [".lock"]


def test_an_error_of_the_data_leaves_nothing_behind(tmp_path: Path) -> None:
    def rows(first: int) -> Iterable[np.ndarray]:
        yield np.zeros((1, 2))
        raise DataError("cannot read 'a.png'")

    path = tmp_path / "features" / f"{KEY}.npy"
    with pytest.raises(DataError):
        cached_array(path, (3, 2), np.float32, rows)
    assert [file.suffix for file in path.parent.iterdir()] == [".lock"]


def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "features" / f"{KEY}.npy"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"cannot write the cache .*tlauto cache clear") as caught:
            cached_array(path, (100, 100), np.float32, lambda first: [np.ones((10, 100))] * 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert [file.suffix for file in path.parent.iterdir()] == [".lock"]


def test_memory_does_not_grow_with_the_array(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        import numpy as np
        from tlauto.training.arrays import cached_array

        def rows(first):
            for start in range(first, 300, 1):
                yield np.full((1, 250_000), start)

        def peak():
            return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

        before = peak()
        array = cached_array(Path(sys.argv[1]), (300, 250_000), np.float32, rows)  # 300 MB
        assert array[299, 0] == 299
        print(peak() - before)
        """
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("reads /proc to measure memory")
    path = tmp_path / "features" / f"{KEY}.npy"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # KiB
