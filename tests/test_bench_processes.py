"""`bench/chaos.py` and `bench/processes.py` run, and what they look for they find."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import chaos
import pytest
from blows import BLOWS, Round, kill_node
from ledger import DOUBLE, LOST, MISSED, Fault, Ledger, changes, faults
from ray_cluster import Cluster, is_installed, running_cluster
from searches import MARK, Search, gone_after, marked
from test_bench import script
from tests_support import trial_spec

from tlauto.builtin.tasks import task
from tlauto.contracts import EpochResult, TrialDone
from tlauto.plugins import registry
from tlauto.searchspace import SearchSpace
from tlauto.store import Store
from tlauto.study import Study

needs_ray = pytest.mark.skipif(not is_installed(), reason="Ray or plugins/tlauto-ray is not installed")
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
FIRST = {"probe": [("timm:x", "full", "linear")]}


def space() -> SearchSpace:
    plugins = registry()
    strategies, heads = (plugins.strategy("full"),), (plugins.head("linear"),)
    return SearchSpace(("timm:x",), strategies, heads, task("multiclass").space, {})


class Written:
    """A study `s` in a real database, of three trials: a probe, one that failed, one that was retried."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "tlauto.db"
        self.url = f"sqlite:///{self.file}"
        self.ledger = Ledger(str(self.file), "s")
        self.store = Store(self.url)
        self.store.create_search(
            "s", config="{}", dataset="{}", fingerprint="f", root="/r", report="{}", plan={"metric": "x"}
        )
        self.study = Study(self.url, "s", seed=0, create=True)
        self.study.enqueue(space().defaults(strategy="full", head="linear"), purpose="probe")
        self.finish(self.ask(), 0.75)
        lost = self.ask()
        self.study.requeue(lost, why="worker died")
        self.study.note(lost, retried=True)
        self.fail(lost, "worker died")
        self.finish(self.ask(), 0.5)
        self.fail(self.ask(), "diverged")

    def ask(self) -> int:
        record = self.study.ask(space())
        spec = dataclasses.replace(trial_spec(record.number), strategy="full", head="linear")
        self.store.start_trial("s", spec, "cpu:0")
        self.store.add_epoch("s", EpochResult(record.number, 1, 0.5, 1.0, 1.0, 0.25))
        return record.number

    def finish(self, number: int, score: float) -> None:
        done = TrialDone(
            number=number, score=score, metrics={}, val_loss=0.1, best_epoch=1, epochs=1, seconds=1.0,
            checkpoint="c",
        )  # fmt: skip
        self.store.finish_trial("s", done)
        self.study.tell(number, score)

    def fail(self, number: int, kind: str) -> None:
        self.store.fail_trial("s", number, kind=kind, message="it did")
        self.study.fail(number, kind=kind, message="it did")

    def execute(self, *statements: str) -> None:
        with closing(sqlite3.connect(self.file)) as connection, connection:
            for statement in statements:
                connection.execute(statement)

    def found(self, total: int = 3) -> list[Fault]:
        return faults(self.ledger.trials(), total=total, first=FIRST)


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Written]:
    written = Written(tmp_path)
    yield written
    written.study.close()
    written.store.close()


def test_the_ledger_reads_what_was_recorded(written: Written) -> None:
    assert written.found() == []
    trials = written.ledger.trials()
    assert [(t.state, t.score) for t in trials.values()] == [
        ("COMPLETE", 0.75), ("FAIL", None), ("COMPLETE", 0.5), ("FAIL", None),
    ]  # fmt: skip
    assert trials[0].point == ("timm:x", "full", "linear") and trials[0].params
    assert written.ledger.retries() == {1: 2}
    assert written.ledger.epochs()[2, 1] == (0.5, 0.25)
    number = written.ask()
    assert written.ledger.running() == {number: 1}
    assert written.ledger.trial_seconds() > 0
    assert changes(trials, written.ledger.trials()) == []


DAMAGES: dict[str, tuple[str, ...]] = {
    "deleted": (
        "DELETE FROM trial_values WHERE trial_id = 3",
        "DELETE FROM trial_user_attributes WHERE trial_id = 3",
        "DELETE FROM trials WHERE trial_id = 3",
    ),
    "another score": ("UPDATE trial_values SET value = 0.25 WHERE trial_id = 1",),
    "another parameter": ("UPDATE trial_params SET param_value = 9 WHERE trial_id = 1",),
    "another state": ("UPDATE trials SET state = 'FAIL' WHERE trial_id = 1",),
    "another result": ("UPDATE tlauto_trials SET result = NULL WHERE number = 0",),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_trial_that_is_gone_or_changed_is_counted_as_lost(written: Written, damage: str) -> None:
    before = written.ledger.trials()
    written.execute(*DAMAGES[damage])
    assert [name for name, _ in changes(before, written.ledger.trials())] == [LOST]


WRONG: dict[str, tuple[Callable[[Written], object], list[str]]] = {
    "a trial too many": (lambda w: w.finish(w.ask(), 0.6), [DOUBLE]),
    "a trial too few": (
        lambda w: w.execute("UPDATE trial_user_attributes SET value_json = '\"interrupted\"' "
                            "WHERE key = 'error_kind' AND trial_id = 4"),
        [MISSED],
    ),
    "a trial that was tried again twice": (
        lambda w: (w.study.requeue(1, why="worker died"), w.fail(w.ask(), "interrupted")), [DOUBLE],
    ),
    "a trial that had a result and was run again": (
        lambda w: w.execute("UPDATE tlauto_trials SET result = '{}' WHERE number = 1"), [DOUBLE],
    ),
    "a trial that runs for ever": (lambda w: w.ask(), [LOST]),
    "a score without a result": (
        lambda w: w.execute("UPDATE tlauto_trials SET result = NULL WHERE number = 2"), [LOST],
    ),
    "a probe that was never made": (
        lambda w: w.execute("UPDATE trial_user_attributes SET value_json = '\"search\"' "
                            "WHERE key = 'purpose' AND trial_id = 1"),
        [MISSED],
    ),
    "a probe with another head": (
        lambda w: w.execute("UPDATE tlauto_trials SET spec = REPLACE(spec, '\"linear\"', '\"mlp\"')"),
        [MISSED],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_at_the_end_of_a_round_is_counted(written: Written, what: str) -> None:
    do, names = WRONG[what]
    do(written)
    assert [name for name, _ in written.found()] == names, written.found()


def test_a_trial_that_is_interrupted_again_and_again_is_given_up(written: Written) -> None:
    written.execute(
        "UPDATE trials SET state = 'RUNNING' WHERE trial_id = 1",
        "DELETE FROM trial_values WHERE trial_id = 1",
    )
    written.study.close()
    written.study = Study(written.url, "s", seed=0, create=False)
    assert written.study.requeue_interrupted() == [0]
    written.execute("UPDATE tlauto_trials SET result = NULL WHERE number = 0")
    assert MISSED in [name for name, _ in written.found(total=2)], "the probe is yet to come"
    written.fail(written.ask(), "interrupted")
    assert written.found(total=2) == []


@pytest.fixture
def round(tmp_path: Path) -> Round:
    """A round whose search has said nothing yet."""
    return Round(Search(tmp_path, tmp_path / "images", ()))


@linux_only
def test_a_process_that_is_left_is_counted_and_ended(round: Round) -> None:
    env = {**os.environ, MARK: round.search.mark + "1"}
    left = subprocess.Popen(["sleep", "600"], env=env)
    while not marked(round.search.mark):  # the kernel shows its environment a moment after it has begun
        time.sleep(0.02)
    chaos.look_at_end(round, 0, left_s=0.2)
    assert [name for name, _ in round.faults] == [chaos.ORPHANS]
    assert left.wait(timeout=60) == -signal.SIGKILL
    assert gone_after(round.search.mark, 60)[1] == []


@linux_only
def test_an_actor_that_is_left_on_a_cluster_is_counted_and_ended(round: Round) -> None:
    actor, own = (
        subprocess.Popen([title, "600"], executable="/bin/sleep", cwd=round.search.folder)
        for title in ("ray::Host.stay", "ray::IDLE")
    )
    round.cluster = Cluster(round.search.folder, {}, own)
    chaos.look_at_end(round, 0, left_s=0.2)
    assert round.faults == [(chaos.ORPHANS, f"process {actor.pid} of start 0 is left: ray::Host.stay 600")]
    assert actor.wait(timeout=60) == -signal.SIGKILL
    assert round.cluster.left_after(0.2) == [own.pid], "the cluster stands, and none of it may outlive it"
    assert chaos.end([own.pid], "of the Ray cluster") != []
    assert own.wait(timeout=60) == -signal.SIGKILL
    assert round.cluster.left_after(60) == []


@pytest.mark.slow
@linux_only
@needs_ray
def test_a_node_is_lost_and_another_one_joins_and_nothing_is_left(round: Round) -> None:
    with running_cluster() as cluster:
        round.cluster, before = cluster, set(cluster.raylets)
        assert before <= set(cluster.processes("raylet")), "the head has one too"
        kill_node(round, random.Random(0))
        while round.undo:
            round.undo.pop()()
        (lost,) = before - set(cluster.raylets)
        assert len(cluster.raylets) == len(before) and lost not in cluster.processes()
    assert cluster.left_after(chaos.LEFT_S) == []
    assert not cluster.folder.exists()


TRACEBACK = f"{chaos.TRACEBACK}:\n  File x, line 1, in main\nMemoryError\n"


@pytest.mark.parametrize(
    ("said", "code", "faults"),
    [
        ("best\n", 0, 0), ("error: no\n", 1, 0), ("", 1, 1), ("", -11, 1), ("", None, 1), (TRACEBACK, 0, 1),
        (f"{chaos.TRACEBACK}:\nKeyboardInterrupt\n", 0, 0),
    ],
)  # fmt: skip
def test_how_a_search_ended_is_judged(round: Round, said: str, code: int | None, faults: int) -> None:
    round.search.log.write_text(said)
    chaos.look_at_end(round, code)
    assert [name for name, _ in round.faults] == [MISSED] * faults


@pytest.mark.parametrize(
    ("frame", "before", "codes", "faults"),
    [
        ("<module>", "", {130}, 0),
        ("<module>", "", set(), 1),
        ("<module>", "best\n", {130}, 1),
        ("main", "", {130}, 2),
    ],
)
def test_ctrl_c_is_forgiven_before_the_command_has_begun_and_not_later(
    round: Round, frame: str, before: str, codes: set[int | None], faults: int
) -> None:
    said = f"{before}{chaos.TRACEBACK}:\n  File x, line 1, in {frame}\nKeyboardInterrupt\n"
    round.search.log.write_text(said)
    round.codes |= codes
    chaos.look_at_end(round, -signal.SIGINT)
    assert [name for name, _ in round.faults] == [MISSED] * faults


def test_a_model_that_is_not_whole_is_counted(round: Round) -> None:
    round.search.runs.mkdir()
    folder = round.search.runs / "model"
    folder.mkdir()
    with closing(Store(f"sqlite:///{round.search.runs}/tlauto.db")) as store:
        store.create_search(
            "study", config="{}", dataset="{}", fingerprint="f", root="/r", report="{}", plan={"metric": "x"}
        )
        store.claim("study")
        store.release("study", state="finished")
        assert [what for _, what in chaos.at_end(round.search)] == ["no model was tested"]
        store.add_model(
            "study", trial=0, folder=str(folder), evaluated_on="test", metrics={}, comparison=None
        )
    assert [name for name, _ in chaos.at_end(round.search)] == [MISSED]
    (folder / "model.safetensors").write_bytes(b"tensors")
    about = {"sha256": hashlib.sha256(b"tensors").hexdigest(), "evaluated_on": "test"}
    (folder / "tlauto.json").write_text(json.dumps(about))
    assert chaos.at_end(round.search) == []
    (folder / "model.safetensors").write_bytes(b"other tensors")
    assert [name for name, _ in chaos.at_end(round.search)] == [MISSED]


@pytest.mark.slow
@linux_only
def test_a_round_of_chaos_says_what_it_did_and_finds_nothing(tmp_path: Path) -> None:
    done = script("chaos.py", "--only-round", "4", "--seed", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line, last = done.stdout.splitlines()
    assert re.match(r" +4  seed 0  sqlite +kill_all \w+[+ ][\d.]+.* \d starts .* ok$", line), line
    assert json.loads(last) == {**dict.fromkeys(chaos.FIGURES, 0), "rounds": 1}


@pytest.mark.slow
@linux_only
@needs_ray
def test_a_round_of_chaos_on_a_cluster_loses_a_node_and_nothing_else(tmp_path: Path) -> None:
    number = next(number for number, blow in enumerate(BLOWS) if blow.on_cluster)
    done = script("chaos.py", "--only-round", str(number), "--seed", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    line, last = done.stdout.splitlines()
    assert re.search(r"seed 0  \w+ ray .*kill_node \w+[+ ][\d.]+.* \d starts .* ok$", line), line
    assert json.loads(last) == {**dict.fromkeys(chaos.FIGURES, 0), "rounds": 1}


@pytest.mark.slow
@linux_only
def test_a_search_is_killed_at_its_writes_and_goes_on(tmp_path: Path) -> None:
    done = script("writes.py", "--first", "12", "--every", "1000", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("writes") > 40
    assert found == {LOST: 0, DOUBLE: 0, MISSED: 0, "killed": 1}


PARTS: dict[str, tuple[str, ...]] = {
    "speedup": ("--trials", "2", "--images", "24", "--repeats", "1"),
    "ctrl_c": ("--moments", "trials,bundle held up", "--repeats", "1"),
    "kill": ("--images", "60", "--repeats", "1"),
    "readers": ("--cached", "60"),
}


@pytest.mark.slow
@linux_only
@pytest.mark.parametrize("part", PARTS)
def test_the_processes_of_a_search_are_measured(part: str, tmp_path: Path) -> None:
    done = script("processes.py", "--only", part, *PARTS[part], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    if part == "speedup":
        assert min(found["speedup_2"], found["speedup_2_apart"]) > 0 and found["speedup_trials"] == 2
    elif part == "ctrl_c":
        assert found["ctrl_c_s"] == max(found["ctrl_c_by_moment_s"].values()) > 0
    elif part == "kill":
        assert found["kill_to_count_s"] > 0
        assert found["kill_bound_s"] == pytest.approx(found["startup_s"] + found["epoch_s"], abs=0.02)
    else:
        assert (found["readers_failed_trials"], found["readers_lock_errors"]) == (0, 0), done.stderr
        assert found["readers_trials"] == 60 and found["readers_reads"] > 0
