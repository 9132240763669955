"""Trackers are told what happens, each trial once, and nothing they do harms the search."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_support import TINY, command, environment, leaderboard, refused, run

from tlauto import tracking
from tlauto.config import SearchConfig, parse_track, resolve
from tlauto.errors import ConfigError, PluginError
from tlauto.events import EpochEnded, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from tlauto.tracking import Feed, check_trackers

PLUGIN = '''
"""Trackers: two that write JSON lines, one for each thing that can go wrong."""
import dataclasses, json, sys, threading, time
from pathlib import Path
import tlauto
from tlauto.errors import ConfigError

CALLS = ("check", "begin", "trial_started", "epoch_ended", "trial_ended", "search_ended")

class Lines:
    def __init__(self, name):
        self.name = name

    def check(self, where):
        if where == "nowhere":
            raise ConfigError("the tracker needs a place that is somewhere; name another")

    def begin(self, search, where):
        return Writer(Path(where or search.folder) / f"{self.name}.jsonl", search)

class Writer:
    def __init__(self, file, search):
        self.file = file
        told = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        self.finished = {event["number"] for event in told if event["is"] == "TrialEnded"}
        self.write(search)

    def write(self, event):
        main = threading.current_thread() is threading.main_thread()
        facts = {"is": type(event).__name__, "torch": "torch" in sys.modules, "main": main}
        with self.file.open("a") as out:
            out.write(json.dumps({**facts, **dataclasses.asdict(event)}) + "\\n")

    trial_started = epoch_ended = trial_ended = search_ended = write

class Broken(Lines):
    def __init__(self, call, error):
        self.name, self.call, self.error = f"broken_{call}", call, error

    def check(self, where):
        self.fail("check")

    def begin(self, search, where):
        self.fail("begin")
        writer = Writer(Path(search.folder) / f"{self.name}.jsonl", search)
        setattr(writer, self.call, lambda event: self.fail(self.call))
        return writer

    def fail(self, call):
        if call == self.call:
            raise self.error

class Hanging(Lines):
    def begin(self, search, where):
        writer = super().begin(search, where)
        writer.trial_started = lambda event: time.sleep(10**6)
        return writer

@tlauto.hookimpl
def trackers():
    broken = [Broken(call, RuntimeError(f"{call} at\\nhttp://me:secret@host")) for call in CALLS[:-1]]
    return [Lines("lines"), Lines("late"), *broken, Broken(CALLS[-1], SystemExit(3)), Hanging("hanging")]
'''
BROKEN = ("check", "begin", "trial_started", "epoch_ended", "trial_ended", "search_ended")


def _install(folder: Path) -> dict[str, str]:
    """Install the plugin below a folder; the environment in which it is found."""
    info = folder / "site" / "tlauto_test_trackers-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "tlauto_test_trackers.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tlauto-test-trackers\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tlauto]\ntrackers = tlauto_test_trackers\n")
    path = os.pathsep.join([str(info.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "TLAUTO_PLUGINS": "tlauto-test-trackers"}


def _events(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _by_trial(events: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """What was told of each trial, without when."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if "number" in event:
            found.setdefault(event["number"], []).append({k: v for k, v in event.items() if k != "at"})
    return found


@dataclasses.dataclass(frozen=True)
class _Tracked:
    """A search with every tracker of the plugin: where it ran, in which environment, what it said."""

    folder: Path
    env: dict[str, str]
    said: str

    def events(self, name: str = "lines") -> list[dict[str, Any]]:
        return _events(self.folder / "tlauto-runs" / "patches" / f"{name}.jsonl")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> _Tracked:
    folder = tmp_path_factory.mktemp("tracked")
    make_patches(folder / "patches")
    env = _install(folder)
    names = ["lines", "hanging", *(f"broken_{call}" for call in BROKEN)]
    flags = [flag for name in names for flag in ("--track", name)]
    done = run("search", "--data", "patches", *TINY, "--trials", "3", *flags, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return _Tracked(folder, env, done.stderr)


def test_a_tracker_is_told_of_the_search_and_of_each_trial_in_order(tracked: _Tracked) -> None:
    first, *trials, last = tracked.events()
    assert first["is"] == "SearchStarted"
    assert (first["study"], first["task"], first["metric"], first["done"]) == (
        "patches", "multiclass", "accuracy", 0,
    )  # fmt: skip
    assert first["config"]["trials"] == 3
    assert first["versions"]["tlauto-test-trackers"] == "1.0"
    for number, events in _by_trial(trials).items():
        kinds = [event["is"] for event in events]
        assert kinds == ["TrialStarted", *["EpochEnded"] * (len(events) - 2), "TrialEnded"], number
        epochs = [event["epoch"] for event in events[1:-1]]
        assert epochs and epochs == sorted(set(epochs))
    shown = json.loads(run("show", "--json", cwd=tracked.folder, env=tracked.env).stdout)
    assert last["is"] == "SearchEnded"
    assert (last["state"], last["best"], last["score"]) == (
        "finished", shown["best"]["number"], shown["best"]["score"],
    )  # fmt: skip
    assert last["model"] == shown["model"]
    assert last["test"] == {name: entry["value"] for name, entry in shown["test"].items()}


def test_a_tracker_is_told_what_the_leaderboard_shows(tracked: _Tracked) -> None:
    told = _by_trial(tracked.events())
    rows = leaderboard(tracked.folder)
    assert sorted(told) == [0, 1, 2] == sorted(row["number"] for row in rows)
    for row in rows:
        start, *_, end = told[row["number"]]
        names = ("backbone", "strategy", "head", "purpose", "seed", "params", "slot")
        assert {name: start[name] for name in names} == {name: row[name] for name in names}
        assert (end["state"], end["score"]) == (row["state"], row["score"])
        assert end["metrics"] == {name: entry["value"] for name, entry in row["metrics"].items()}


def test_a_tracker_runs_beside_the_search_which_never_loads_torch(tracked: _Tracked) -> None:
    events = tracked.events()
    assert events
    assert not any(event["main"] or event["torch"] for event in events)


@pytest.mark.parametrize("call", BROKEN)
def test_a_tracker_that_fails_is_reported_once_and_the_search_goes_on(tracked: _Tracked, call: str) -> None:
    said = [line for line in tracked.said.splitlines() if f"broken_{call}" in line]
    cause = "SystemExit: 3" if call == "search_ended" else f"RuntimeError: {call} at http://…@host"
    assert said == [
        f"note      tracker 'broken_{call}' failed and is left out: {cause}; "
        "the same command adds what is missing"
    ]


def test_a_tracker_that_hangs_does_not_keep_the_search_from_ending(tracked: _Tracked) -> None:
    said = [line for line in tracked.said.splitlines() if "'hanging'" in line]
    assert said == [
        "note      tracker 'hanging' is too slow and was not waited for; "
        "the same command adds what is missing"
    ]
    assert [event["is"] for event in tracked.events("hanging")] == ["SearchStarted"]


def test_a_search_that_goes_on_tells_only_what_a_tracker_lacks(tracked: _Tracked) -> None:
    before = tracked.events()
    late = tracked.folder / "elsewhere"
    late.mkdir()
    args = ("search", "--data", "patches", *TINY, "--trials", "4", "--track", "lines")
    done = run(*args, "--track", f"late={late}", cwd=tracked.folder, env=tracked.env)
    assert done.returncode == 0, done.stderr
    now = tracked.events()
    assert now[: len(before)] == before
    assert sorted(_by_trial(now[len(before) :])) == [3]
    assert {event["id"] for event in now if event["is"] == "SearchStarted"} == {before[0]["id"]}
    assert now[len(before)]["done"] == 3
    # Who comes late is told from the database what the others were told when it happened.
    assert _by_trial(_events(late / "late.jsonl")) == _by_trial(now)
    ends = [e["at"] for e in _events(late / "late.jsonl") if e["is"] in ("TrialStarted", "TrialEnded")]
    assert ends == sorted(ends)


def test_a_trial_that_a_stop_cuts_off_is_told_as_such(tmp_path: Path, patches: Callable[..., Path]) -> None:
    patches()
    env = environment(tmp_path) | _install(tmp_path)
    args = command("search", "--data", "patches", *TINY, "--trials", "40", "--track", "lines")
    with subprocess.Popen(args, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("    1 "):
                break
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    events = _events(tmp_path / "tlauto-runs" / "patches" / "lines.jsonl")
    assert events[-1]["is"] == "SearchEnded"
    assert (events[-1]["state"], events[-1]["test"]) == ("interrupted", {})
    rows = {row["number"]: row for row in leaderboard(tmp_path)}
    ends = {event["number"]: event for event in events if event["is"] == "TrialEnded"}
    assert sorted(ends) == [n for n, row in sorted(rows.items()) if row["state"] != "waiting"]
    for number, end in ends.items():
        is_cut = (rows[number]["error"] or "").startswith("interrupted")
        assert (end["kind"], end["counts"]) == (("interrupted", False) if is_cut else ("", True))


# --- names and places -------------------------------------------------------------------------------


def test_wrong_trackers_are_refused_before_any_trial(tmp_path: Path, patches: Callable[..., Path]) -> None:
    patches()
    env = _install(tmp_path)
    search = ("search", "--data", "patches", "--offline", "--track")
    said = refused(*search, "lins", cwd=tmp_path, env=env)
    assert said == "error: no tracker 'lins'; did you mean 'lines'? ('tlauto plugins' lists them)"
    said = refused(*search, "lines=nowhere", cwd=tmp_path, env=env)
    assert said == "error: the tracker needs a place that is somewhere; name another"
    said = refused(*search, "lines", "--track", "lines=here", cwd=tmp_path, env=env)
    assert said == "error: --track names 'lines' twice; name each tracker once"
    said = refused(*search, "tensorboard", cwd=tmp_path, env={"TLAUTO_PLUGINS": ""})
    assert said == (
        "error: no tracker 'tensorboard': none is installed (the plugin tlauto-trackers has tensorboard and "
        "mlflow)"
    )
    assert not (tmp_path / "tlauto-runs" / "patches").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlflow", ("mlflow", None)),
        ("mlflow=http://host:5000/?a=b", ("mlflow", "http://host:5000/?a=b")),
        ("tensorboard= ./runs ", ("tensorboard", "./runs")),
    ],
)
def test_a_place_may_follow_the_name(text: str, expected: tuple[str, str | None]) -> None:
    assert parse_track(text) == expected


@pytest.mark.parametrize("text", ["", "=here", "mlflow=", "mlflow= "])
def test_half_a_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not NAME or NAME=WHERE, for example"):
        SearchConfig("images", track=(text,))


@pytest.mark.parametrize(
    ("line", "expected"), [('"lines"', ("lines",)), ('["a", "b=/c"]', ("a", "b=/c")), ("[]", ())]
)
def test_trackers_may_stand_in_the_settings_file(
    tmp_path: Path, line: str, expected: tuple[str, ...]
) -> None:
    (tmp_path / "tlauto.toml").write_text(f"[search]\ntrack = {line}\n")
    assert resolve({"data": "images"}, folder=tmp_path).track == expected
    assert resolve({"data": "images", "track": ("x",)}, folder=tmp_path).track == ("x",)


def test_a_password_in_a_place_is_not_recorded() -> None:
    config = SearchConfig("images", track=("mlflow=https://me:secret@host", "lines"))
    assert "secret" not in config.to_json()
    assert SearchConfig.from_json(config.to_json()).track == ("mlflow", "lines")


def test_a_study_of_an_earlier_version_has_no_trackers() -> None:
    old = json.loads(SearchConfig("images").to_json())
    del old["track"]
    assert SearchConfig.from_json(json.dumps(old)).track == ()


def test_no_trackers_need_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(())
    with pytest.raises(PluginError):
        check_trackers(("no-such-tracker",))


# --- slow trackers ----------------------------------------------------------------------------------

SEARCH = SearchStarted("0" * 8, "s", "/nowhere", "d", "multiclass", "accuracy", {}, {})


class _Slow:
    """A tracker that waits for `gate` in each call, and remembers what it was told."""

    name = "slow"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.finished: frozenset[int] = frozenset()
        self.told: list[object] = []

    def check(self, where: str | None) -> None:
        pass

    def begin(self, search: SearchStarted, where: str | None) -> _Slow:
        return self

    def trial_started(self, event: object) -> None:
        self.gate.wait()
        self.told.append(event)

    epoch_ended = trial_ended = search_ended = trial_started


def _trial(number: int) -> Iterator[TrialStarted | EpochEnded | TrialEnded]:
    yield TrialStarted(number, "cpu:0", "b", "s", "h", 1)
    yield EpochEnded(number, "cpu:0", 1, 0.5)
    yield TrialEnded(number, "cpu:0", "b", "s", "h", "complete", 0.5, 1.0)


def test_of_a_slow_tracker_whole_trials_are_left_out_and_that_is_said_once() -> None:
    slow = _Slow()
    feed = Feed(slow, None, SEARCH, lambda known: iter(()))
    trials = tracking.QUEUE // 3 + 100
    for number in range(trials):
        for event in _trial(number):
            feed.offer(event)
    assert feed.notes.get_nowait() == (
        "tracker 'slow' is too slow and misses trials; the same command adds what is missing"
    )
    assert feed.notes.empty()
    slow.gate.set()
    assert feed.finish(SearchEnded("finished"), time.monotonic() + 60)
    ended = {event.number for event in slow.told if isinstance(event, TrialEnded)}
    for number in ended:
        told = [event for event in slow.told if getattr(event, "number", None) == number]
        assert told == list(_trial(number)), "a trial that is told to its end is told whole"
    assert tracking.QUEUE // 3 - 1 <= len(ended) < trials
    assert slow.told[-1] == SearchEnded("finished")


def test_the_end_of_a_search_waits_for_a_slow_tracker_a_bounded_time_only() -> None:
    slow = _Slow()
    feed = Feed(slow, None, SEARCH, lambda known: iter(()))
    for event in _trial(0):
        feed.offer(event)
    assert not feed.finish(SearchEnded("interrupted"), time.monotonic() + 0.2)
    slow.gate.set()
    assert feed.finish(SearchEnded("interrupted"), time.monotonic() + 60)
    assert slow.told == [*_trial(0), SearchEnded("interrupted")], "the end is told once"


def test_what_earlier_runs_ended_is_told_before_what_happens_now() -> None:
    slow = _Slow()
    slow.finished = frozenset({0})
    slow.gate.set()

    def earlier(known: object) -> Iterator[TrialStarted | EpochEnded | TrialEnded]:
        assert known == {0}
        yield from _trial(1)

    feed = Feed(slow, None, SEARCH, earlier)
    for event in _trial(2):
        feed.offer(event)
    assert feed.finish(SearchEnded("finished"), time.monotonic() + 60)
    assert slow.told == [*_trial(1), *_trial(2), SearchEnded("finished")]
