"""Real worker processes that die, stand still, or run out of memory, and what the pool tells of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests_support import TINY, environment, install_troubles, spec_of

from tlauto.candidates import _checked
from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec, WeightsOptions
from tlauto.data import load_dataset
from tlauto.devices import Slot, make_slots
from tlauto.errors import ConfigError
from tlauto.memory import capacity_bytes, held_bytes
from tlauto.pool.base import Event
from tlauto.pool.beats import Limits
from tlauto.pool.growth import FIRST
from tlauto.pool.local import LocalPool
from tlauto.pool.protocol import (
    Answer,
    Beat,
    Note,
    Preflight,
    PreflightDone,
    Ready,
    RunTrial,
    StepTried,
    TryStep,
    Used,
    decode,
    encode,
)

SLOT = "cpu:0"


def patient() -> Limits:
    """Limits that no worker of a test reaches."""
    return Limits(silence_s=600, start_s=600, stall_s=600)


@pytest.fixture
def trial(tmp_path: Path, make_patches: Callable[..., Path]) -> Callable[..., TrialSpec]:
    """A trial on a few colour patches: `trial(head="linear")`."""
    dataset, _ = load_dataset(make_patches(tmp_path / "patches", per_class=8), seed=0)
    (tmp_path / "dataset.json").write_text(dataset.to_json())
    files = {"dataset": str(tmp_path / "dataset.json"), "cache": str(tmp_path / "cache")}

    def trial(**changes: Any) -> TrialSpec:
        given = {"strategy": "feature_extraction", **files, "folder": str(tmp_path / "trial"), **changes}
        return spec_of(**given)

    return trial


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Callable[..., LocalPool]]:
    """A pool of one worker that finds the heads of `trouble_plugin`: `pool(Limits())`."""
    made: list[LocalPool] = []
    env = {**environment(tmp_path), **install_troubles(tmp_path / "site")}

    def pool(limits: Limits, **more: str) -> LocalPool:
        made.append(
            LocalPool(make_slots("cpu", 1), logs=tmp_path / "logs", env={**env, **more}, limits=limits)
        )
        return made[-1]

    yield pool
    for each in made:
        each.close(grace_s=0)


def ending(
    pool: LocalPool,
    *,
    on_ready: Callable[[int], None] = lambda pid: None,
    on_note: Callable[[str], None] = lambda text: None,
    on_used: Callable[[Used], None] = lambda used: None,
) -> Event:
    """The event that ends the job; epochs are answered."""
    while True:
        for event in pool.wait(1.0):
            match event.message:
                case Ready(pid):
                    on_ready(pid)
                case Note(text):
                    on_note(text)
                case Used() as used:
                    on_used(used)
                case EpochResult():
                    pool.send(SLOT, Answer(go_on=True))
                case TrialDone() | TrialFailed() | StepTried() | None:
                    return event


def first(pool: LocalPool) -> Event:
    """What is told first."""
    while not (events := pool.wait(1.0)):
        pass
    return events[0]


def test_a_stopped_worker_is_silent_and_is_replaced(
    pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]
) -> None:
    limits = patient()
    workers = pool(limits)

    def stop(pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        limits.silence_s = 3

    workers.send(SLOT, RunTrial(trial()))
    event = ending(workers, on_ready=stop)
    assert event.message is None
    assert event.ending == "the worker process gave no sign of life for 3 s and was killed"
    assert workers.pid(SLOT) is None
    limits.silence_s = 600
    workers.send(SLOT, RunTrial(trial()))
    assert isinstance(ending(workers).message, TrialDone)


def test_workers_that_are_started_ahead_import_what_trials_need_and_take_them(
    pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]
) -> None:
    workers = pool(patient())
    workers.warm_up([SLOT])
    ready = first(workers).message
    assert isinstance(ready, Ready)
    assert ready.pid == workers.pid(SLOT)
    if sys.platform == "linux":
        assert "libtorch" in Path(f"/proc/{ready.pid}/maps").read_text(encoding="utf-8")
    workers.warm_up([SLOT])  # it is up: nothing happens
    workers.send(SLOT, RunTrial(trial()))
    assert isinstance(ending(workers).message, TrialDone)
    assert workers.pid(SLOT) == ready.pid


def test_a_worker_that_died_before_its_first_job_is_replaced_by_that(
    pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]
) -> None:
    workers = pool(patient())
    workers.warm_up([SLOT])
    pid = workers.pid(SLOT)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert first(workers) == Event(SLOT, None, -signal.SIGKILL)
    workers.send(SLOT, RunTrial(trial()))
    assert isinstance(ending(workers).message, TrialDone)


def test_a_worker_of_another_version_is_killed_and_told(tmp_path: Path) -> None:
    said = json.dumps({"type": "Used", "bytes": 1, "total": 2, "unheard_of": 3})

    def launch(slot: Slot, log: Path) -> subprocess.Popen[str]:
        program = f"import time; print({said!r}, flush=True); time.sleep(600)"
        command = [sys.executable, "-c", program]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    workers = LocalPool(make_slots("cpu", 1), logs=tmp_path / "logs", launch=launch)
    workers.warm_up([SLOT])
    pid = workers.pid(SLOT)
    event = first(workers)
    assert (event.message, event.exitcode) == (None, -signal.SIGKILL)
    assert "what this tlauto does not understand" in event.ending
    assert workers.pid(SLOT) is None
    assert not Path(f"/proc/{pid}").exists()


def test_backbones_are_checked_though_another_worker_dies(tmp_path: Path) -> None:
    slots = make_slots("cpu", 2)
    workers = LocalPool(slots, logs=tmp_path / "logs", env=environment(tmp_path), limits=patient())
    said: list[object] = []
    try:
        workers.warm_up([slot.name for slot in slots])
        other = workers.pid("cpu:1")
        assert other is not None
        os.kill(other, signal.SIGKILL)
        job = Preflight((TINY[1],), WeightsOptions(pretrained=False, offline=True), 4)
        found = _checked(workers, job, said.append)
    finally:
        workers.close(grace_s=0)
    assert [candidate.info.id for candidate in found.candidates] == [TINY[1]]
    assert said == []


@pytest.mark.slow
def test_a_worker_that_lives_but_does_no_work_is_killed(
    pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec], tmp_path: Path
) -> None:
    limits = Limits(silence_s=600, start_s=600, stall_s=15, stall_factor=0)
    workers = pool(limits, TLAUTO_SILENCE="2s")  # two signs of life a second, while it sleeps in its head
    workers.send(SLOT, RunTrial(trial(head="sleeps")))
    pids: list[int] = []
    event = ending(workers, on_ready=pids.append)
    assert event.hung == "did nothing for 15 s and was killed"
    assert (tmp_path / "site" / "marks" / "sleeps").read_text() == str(pids[0])
    assert not Path(f"/proc/{pids[0]}").exists()


def test_a_killed_worker_is_told_with_its_signal_and_last_words(
    pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]
) -> None:
    workers = pool(patient())
    workers.send(SLOT, RunTrial(trial(head="aborts")))
    event = ending(workers)
    assert (event.message, event.exitcode, event.hung) == (None, -signal.SIGABRT, "")
    assert event.ending == "the worker process ended with signal 6"
    assert "these are my last words" in event.log_tail


@pytest.mark.parametrize(
    ("head", "kind", "stays"),
    [("loses", "device lost", False), ("hungry", "out of memory", False), ("raises", "error", True)],
)
def test_a_worker_whose_device_or_memory_failed_is_replaced(
    head: str, kind: str, stays: bool, pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]
) -> None:
    workers = pool(patient())
    workers.send(SLOT, RunTrial(trial(head=head)))
    pids: list[int] = []
    event = ending(workers, on_ready=pids.append)
    assert isinstance(event.message, TrialFailed)
    assert event.message.kind == kind
    asked = event.message.bytes or 0
    assert (asked % 2**50, asked > 0) == (0, head == "hungry")
    assert "Traceback" in event.message.detail
    assert (workers.pid(SLOT) == pids[0]) == stays == Path(f"/proc/{pids[0]}").exists()


@pytest.mark.skipif(held_bytes() is None, reason="this system does not tell what a process holds")
def test_a_worker_whose_memory_grows_is_replaced_between_trials(
    pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec], tmp_path: Path
) -> None:
    said: list[str] = []
    workers = pool(patient(), TLAUTO_WORKER_GROWTH="200MB")

    def run(head: str) -> int | None:
        """The worker's process id after a trial; None when it was replaced."""
        workers.send(SLOT, RunTrial(trial(head=head)))
        event = ending(workers, on_note=said.append)
        assert isinstance(event.message, TrialDone), "the trial itself is unharmed"
        return workers.pid(SLOT)

    first = run("linear")
    assert first is not None
    assert [run("linear") for _ in range(FIRST + 2)] == [first] * (FIRST + 2)
    assert said == []
    pids = [run("leaks") for _ in range(4)]
    assert None in pids and pids[: pids.index(None)] == [first] * pids.index(None)
    assert not Path(f"/proc/{first}").exists()
    assert said[0].startswith("the worker on cpu:0 held ")
    assert "after its first; a new one takes its place" in said[0]


@pytest.mark.parametrize(("head", "at_once"), [("linear", 16), ("hungry", 4), ("starved", None)])
def test_a_step_is_tried_with_fewer_images_until_it_fits(
    head: str, at_once: int | None, pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]
) -> None:
    workers = pool(patient())
    workers.send(SLOT, TryStep(trial(head=head, strategy="full"), 16))
    tried = ending(workers).message
    assert isinstance(tried, StepTried)
    assert tried.at_once == at_once
    assert tried.total == capacity_bytes()
    assert tried.bytes == 2**50 if at_once is None else tried.bytes is None or 10**7 < tried.bytes < 2**40


def test_a_trial_tells_what_it_used(pool: Callable[..., LocalPool], trial: Callable[..., TrialSpec]) -> None:
    workers, used = pool(patient()), []
    workers.send(SLOT, RunTrial(trial()))
    assert isinstance(ending(workers, on_used=used.append).message, TrialDone)
    assert len(used) == 1 and used[0].total == capacity_bytes()
    assert held_bytes() is None or 10**7 < (used[0].bytes or 0) < 10**11


def test_a_wrong_bound_of_growth_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLAUTO_WORKER_GROWTH", "much")
    with pytest.raises(ConfigError, match="TLAUTO_WORKER_GROWTH: 'much' is not a size"):
        LocalPool(make_slots("cpu", 1), logs=tmp_path)


def test_signs_of_life_do_not_mix_with_messages(tmp_path: Path) -> None:
    env = {**environment(tmp_path), "TLAUTO_SILENCE": "0.004s"}  # a thousand a second
    command = [sys.executable, "-m", "tlauto.worker", "cpu"]
    weights = WeightsOptions(pretrained=False, offline=True)
    job = Preflight(("timm:test_*",), weights, 100)
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(encode(job) + "\n")
        process.stdin.flush()
        said = []
        for line in process.stdout:
            said.append(decode(line))  # ValueError for a line that is two
            if isinstance(said[-1], PreflightDone):
                break
        process.kill()
    assert sum(isinstance(message, Beat) for message in said) > 50
    assert len(json.dumps([c.info.id for c in said[-1].candidates])) > 100
    assert TINY[1] in {candidate.info.id for candidate in said[-1].candidates}
