"""Whole searches in which trials fail, in every way: what is recorded, what runs again, when it ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests_support import command, environment, install_troubles, leaderboard, run

from tlauto.store import Store
from tlauto.study import Study

SEARCH = (
    "search", "--data", "patches", "--backbones", "timm:test_resnet.r160_in1k", "--no-pretrained",
    "--offline", "--preset", "fast", "--workers", "1", "--devices", "cpu",
    "--strategies", "feature_extraction,full",
    "--heads", "linear,raises,diverges,aborts,recovers,loses,stands,sleeps,hungry",
    "--set", "finetune.batch_size=16", "--ensemble", "1",
)  # fmt: skip
FROZEN = {"strategy": "feature_extraction"}
ALL: Mapping[str, Mapping[str, Any]] = {
    "raises": FROZEN, "diverges": FROZEN, "aborts": FROZEN, "loses": FROZEN, "recovers": FROZEN,
    "hungry": {"strategy": "full", "optim.name": "sgd"},
}  # fmt: skip


class Place:
    """A folder with patches and the plugin, in which a search has run one good trial."""

    def __init__(self, folder: Path, make_patches: Callable[..., Path]) -> None:
        self.folder = folder
        self.env = install_troubles(folder / "site")
        make_patches(folder / "patches")
        done = self.search("--trials", "1")
        assert done.returncode == 0, done.stderr

    @property
    def url(self) -> str:
        return f"sqlite:///{self.folder}/tlauto-runs/tlauto.db"

    def search(self, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return run(*SEARCH, *args, cwd=self.folder, env={**self.env, **env}, timeout_s=1200)

    def propose(self, heads: Mapping[str, Mapping[str, Any]]) -> None:
        """Have the next trials be of these heads, in this order."""
        study = Study(self.url, "patches", seed=0, create=False)
        backbone = study.trials()[0].params["backbone"]
        for head, params in heads.items():
            study.enqueue({"backbone": backbone, "head": head, **params}, purpose="search")

    @property
    def counted(self) -> int:
        """Trials that count."""
        shown = json.loads(run("show", "--json", cwd=self.folder).stdout)
        return int(shown["trials"])

    def rows(self, head: str) -> list[dict[str, Any]]:
        """Its rows on the leaderboard, by number."""
        found = [row for row in leaderboard(self.folder) if row["head"] == head]
        return sorted(found, key=lambda row: row["number"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Place:
    """A search of one good trial, and whatever the tests add to it."""
    return Place(tmp_path_factory.mktemp("place"), make_patches)


@pytest.mark.slow
@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_while_it_checks_the_backbones_is_replaced_once(
    tmp_path: Path, make_patches: Callable[..., Path], deaths: int
) -> None:
    env = {**install_troubles(tmp_path / "site"), "TROUBLE_DEATHS": str(deaths)}
    make_patches(tmp_path / "patches")
    done = run(*SEARCH, "--trials", "1", cwd=tmp_path, env=env, timeout_s=600)
    said = "while it checked the backbones: no more of this"
    if deaths == 1:
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(f"{said}; they are checked again") == 1
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert done.stderr.splitlines()[-1].endswith(said)


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Place:
    """A search of one good trial and one of each head that goes wrong by itself."""
    place = Place(tmp_path_factory.mktemp("troubled"), make_patches)
    place.propose(ALL)
    done = place.search("--trials", str(1 + len(ALL)))
    assert done.returncode == 0, done.stderr
    (place.folder / "said.txt").write_text(done.stderr)
    return place


SIGNAL = "worker died: the worker process ended with signal 6"
LOST = (
    "device lost: the device was lost on cpu with 64 images at a time: CUDA error: unspecified launch failure"
)
FULL = (
    "out of memory: out of memory on cpu with batches of 16 images{}; a smaller batch or backbone needs less"
)


@pytest.mark.parametrize(
    ("head", "errors"),
    [
        ("raises", ["error: RuntimeError: a mistake of the plugin"]),
        ("diverges", ["diverged: the training loss became nan in epoch 1"]),
        ("aborts", [SIGNAL, SIGNAL]),
        ("recovers", [SIGNAL, None]),
        ("loses", [LOST, LOST]),
        ("hungry", [FULL.format(""), FULL.format(", 8 images at a time"), None]),
    ],
)
def test_each_failure_has_its_kind_and_only_accidents_run_again(
    head: str, errors: list[str | None], troubled: Place
) -> None:
    rows = troubled.rows(head)
    assert [row["error"] for row in rows] == errors
    for earlier, later in itertools.pairwise(rows):
        assert later["retry_of"] == earlier["number"]
        assert (later["params"], later["seed"]) == (earlier["params"], earlier["seed"])
    assert [row["retried"] for row in rows] == [True] * (len(rows) - 1) + [False]


def test_a_trial_counts_once_however_often_it_ran(troubled: Place) -> None:
    assert troubled.counted == 1 + len(ALL)
    assert len(leaderboard(troubled.folder)) == 1 + len(ALL) + 5
    study = Study(troubled.url, "patches", seed=0, create=False)
    assert sum(trial.counts for trial in study.trials()) == 1 + len(ALL)
    said = (troubled.folder / "said.txt").read_text()
    assert said.count("; it runs again") == 5
    assert said.count("; it runs again, 8 images at a time") == 1


def test_a_trial_that_ran_out_of_memory_ends_with_its_batch_in_parts(troubled: Place) -> None:
    first, second, third = troubled.rows("hungry")
    assert [row["micro_batch"] for row in (first, second, third)] == [None, 8, 4]
    assert third["score"] is not None and third["params"]["finetune.batch_size"] == 16
    attrs = [trial.attrs for trial in Study(troubled.url, "patches", seed=0, create=False).trials()]
    asked = [attrs[row["number"]].get("bytes_asked") for row in (first, second, third)]
    assert asked == [3 * 2**50, 2**50, None]
    workers = {path.name for path in (troubled.folder / "site" / "marks").glob("hungry *")}
    assert len(workers) == 3, "each attempt in a worker of its own"


def test_the_last_lines_are_kept_and_shown(troubled: Place) -> None:
    (raised,), (died, _) = troubled.rows("raises"), troubled.rows("aborts")
    assert raised["detail"].startswith("Traceback")
    assert raised["detail"].rstrip().endswith("RuntimeError: a mistake of the plugin")
    assert "these are my last words" in died["detail"]
    shown = run("leaderboard", cwd=troubled.folder).stdout
    number = died["number"]
    after = shown.split(f"trial {number} failed: {died['error']} (it was tried again)\n")[1]
    assert "        these are my last words" in after.splitlines()[:3]
    store = Store(troubled.url)
    kinds = {row["error_kind"] for row in store.trials("patches").values()}
    store.close()
    assert kinds == {None, "error", "diverged", "worker died", "device lost", "out of memory"}


@pytest.mark.slow
def test_a_stopped_worker_is_killed_and_its_trial_runs_again(place: Place) -> None:
    place.propose({"stands": FROZEN})
    mark = place.folder / "site" / "marks" / "stands"
    search = command(*SEARCH, "--trials", str(place.counted + 1))
    env = {**environment(place.folder), **place.env, "TLAUTO_SILENCE": "30s"}
    with subprocess.Popen(search, cwd=place.folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (mark.is_file() and mark.read_text()):
            time.sleep(0.1)
        assert process.poll() is None, process.communicate()[1]
        os.kill(int(mark.read_text()), signal.SIGSTOP)
        said = process.communicate(timeout=1200)[1]
    assert process.returncode == 0, said
    hung, again = place.rows("stands")
    assert hung["error"] == "hung: the worker process gave no sign of life for 30 s and was killed"
    assert (again["retry_of"], again["state"]) == (hung["number"], "complete")


@pytest.mark.slow
def test_a_trial_that_takes_too_long_ends_and_is_not_tried_again(place: Place) -> None:
    place.propose({"sleeps": FROZEN})
    done = place.search("--trials", str(place.counted + 1), "--trial-timeout", "20s")
    assert done.returncode == 0, done.stderr
    (row,) = place.rows("sleeps")
    assert row["error"] == "timeout: it took longer than the 20 s that --trial-timeout allows"
    assert not row["retried"] and row["state"] == "failed"


@pytest.mark.slow
def test_failures_in_a_row_end_the_search_and_the_same_command_goes_on(place: Place) -> None:
    before = place.counted
    for head in ("raises", "raises", "diverges", "linear"):
        place.propose({head: FROZEN})
    limited = ("--trials", str(before + 4), "--max-failures", "3")
    done = place.search(*limited)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    model = place.folder / "tlauto-runs" / "patches" / "model"
    assert done.stderr.splitlines()[-1] == (
        "error: 3 trials in a row failed, the last with: the training loss became nan in epoch 1 ('tlauto "
        f"leaderboard patches' lists them; the best model so far is in {model}, the same command goes on)"
    )
    assert place.counted == before + 3
    photo = next((place.folder / "patches" / "red").iterdir())
    assert run("predict", str(model), str(photo), cwd=place.folder, env=place.env).returncode == 0
    again = place.search(*limited)
    assert again.returncode == 0, again.stderr
    assert place.counted == before + 4
