"""`tlauto cache`: list and clear, also where there is nothing, or nothing that can be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests_support import refused, run

from tlauto.training.arrays import cached_array

USE = """
import sys
from pathlib import Path
import numpy as np
from tlauto.training.arrays import cached_array
array = cached_array(Path(sys.argv[1]), (100, 250), np.float32, None)
print("mapped", flush=True)
sys.stdin.readline()
"""
# Root may read everything, so the command runs as nobody, who in turn may not even import.
AS_NOBODY = """
import os, sys
import tlauto.cli, tlauto.cli.cache, tlauto.caches, tlauto.config, tlauto.devices
if os.geteuid() == 0:
    os.setuid(65534)
tlauto.cli.main(sys.argv[1:])
"""
LONG = "timm:vit_small_patch14_reg4_dinov2.lvd142m_and_a_very_long_name_of_a_provider"


def path_of(folder: Path, name: str) -> Path:
    return folder / "cache" / ("pixels" if name == "a" else "features") / f"{name * 32}.npy"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a cache of pixels a and features b and c, 100 kB each, c used just now."""
    for days, name, about in ((9, "a", {}), (2, "b", {"backbone": LONG}), (0, "c", {"backbone": "keras:B"})):
        path = path_of(tmp_path, name)
        cached_array(path, (100, 250), np.float32, lambda first: [np.zeros((100, 250))], about=about)
        then = time.time() - 86400 * days - 5
        for file in path.parent.glob(f"{name * 32}*"):
            os.utime(file, (then, then))
    return tmp_path


def test_the_list_fits_the_terminal_and_says_what_takes_the_space(folder: Path) -> None:
    done = run("cache", "list", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[0].split() == ["backbone", "what", "files", "images", "size", "last", "used"]
    assert lines[1].split() == ["keras:B", "features", "1", "100", "100", "kB", "now"]
    assert lines[2] == LONG
    assert lines[3].split() == ["features", "1", "100", "100", "kB", "2", "d", "ago"]
    assert lines[-3].split() == ["-", "pixels", "1", "100", "100", "kB", "9", "d", "ago"]
    assert lines[-2] == "3 files, 301 kB of 20 GB (TLAUTO_CACHE_SIZE)"
    assert lines[-1] == f"in {folder / 'cache'}"


def test_files_of_one_kind_and_backbone_stand_in_one_line(folder: Path) -> None:
    path = path_of(folder, "d")
    cached_array(
        path, (50, 250), np.float32, lambda first: [np.zeros((50, 250))], about={"backbone": "keras:B"}
    )
    lines = run("cache", "list", cwd=folder).stdout.splitlines()
    assert [line.split() for line in lines if "keras:B" in line] == [
        ["keras:B", "features", "2", "150", "151", "kB", "now"]
    ]
    every = run("cache", "list", "--all", cwd=folder).stdout.splitlines()
    assert len([line for line in every if "keras:B" in line]) == 2


def test_the_json_of_the_list_is_exact(folder: Path) -> None:
    done = run("cache", "list", "--json", cwd=folder, env={"TLAUTO_CACHE_SIZE": "1GiB"})
    found = json.loads(done.stdout)
    assert found["folder"] == str(folder / "cache")
    assert found["limit"] == 2**30
    assert found["bytes"] == sum(entry["bytes"] for entry in found["entries"])
    assert [entry["path"] for entry in found["entries"]] == [str(path_of(folder, name)) for name in "cba"]
    assert [entry["backbone"] for entry in found["entries"]] == ["keras:B", LONG, None]
    assert {(e["images"], e["complete"], e["in_use"]) for e in found["entries"]} == {(100, True, False)}
    assert found["entries"][0]["last_used"].endswith("+00:00")


def test_clear_says_what_it_freed_and_what_it_kept(folder: Path) -> None:
    words = [sys.executable, "-c", USE, str(path_of(folder, "b"))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        assert "in use" in run("cache", "list", cwd=folder).stdout
        done = run("cache", "clear", cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "freed 201 kB: 2 files deleted; 1 file in use and kept\n"
        assert path_of(folder, "b").exists()
        process.communicate("\n", timeout=60)
    assert run("cache", "clear", cwd=folder).stdout == "freed 100 kB: 1 file deleted\n"
    assert not list((folder / "cache").rglob("*.*"))


def test_clear_may_be_told_an_age(folder: Path) -> None:
    assert run("cache", "clear", "--older-than", "7d", cwd=folder).stdout.endswith(": 1 file deleted\n")
    assert not path_of(folder, "a").exists()
    assert path_of(folder, "b").exists()
    assert "'soon' is not a duration" in refused("cache", "clear", "--older-than", "soon", cwd=folder)


@pytest.mark.parametrize("exists", [False, True], ids=["missing", "empty"])
def test_a_cache_with_nothing_in_it_is_no_error(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "cache" / "features").mkdir(parents=True)
    assert run("cache", "list", cwd=tmp_path).stdout == f"the cache is empty: {tmp_path / 'cache'}\n"
    assert json.loads(run("cache", "list", "--json", cwd=tmp_path).stdout)["entries"] == []
    assert run("cache", "clear", cwd=tmp_path).stdout == "freed 0 B: 0 files deleted\n"
    assert (tmp_path / "cache").exists() == exists


@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("clear",)], ids=" ".join)
def test_a_cache_that_is_no_folder_is_one_sentence(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "Not a directory" in refused("cache", *words, cwd=tmp_path)


@pytest.mark.parametrize("word", ["list", "clear"])
def test_a_cache_that_may_not_be_read_is_one_sentence(folder: Path, word: str) -> None:
    (folder / "cache" / "features").chmod(0)
    words = [sys.executable, "-c", AS_NOBODY, "cache", word]
    env = {**os.environ, "TLAUTO_CACHE": str(folder / "cache")}
    try:
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)
    finally:
        (folder / "cache" / "features").chmod(0o755)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: cannot {'read' if word == 'list' else 'clear'} the cache {folder}")
    assert "Permission denied" in done.stderr


def test_a_wrong_limit_is_one_sentence(tmp_path: Path) -> None:
    message = refused("cache", "list", cwd=tmp_path, env={"TLAUTO_CACHE_SIZE": "much"})
    assert (
        message == "error: TLAUTO_CACHE_SIZE: 'much' is not a size; write for example 20GB, 500MiB or 1.5TB"
    )
