"""What every executor promises, as tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tlauto.contracts import EpochResult, TrialDone, TrialFailed, TrialSpec, WeightsOptions
from tlauto.executors import Executor, Wanted
from tlauto.pool.base import Event, Pool
from tlauto.pool.beats import Limits
from tlauto.pool.protocol import Answer, Ready, RunTrial
from tlauto.testing.spaces import check_name, heavy_imports

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    # The same sums in the same order, however many threads a slot would have.
    **dict.fromkeys(("TLAUTO_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    "PYTHONPROFILEIMPORTTIME": "1",
}
"""What workers of the suite start with; the last has Python write something to their logs."""

LOGGED = "import time:"
SAID = (EpochResult, TrialDone, TrialFailed)
ENOUGH = 3600
"""Rounds of waiting after which a test gives up; it is only reached when something hangs."""


class Driver:
    """A pool, and what a coordinator does with it: on the first slot, one trial after the other."""

    def __init__(self, executor: Executor, folder: Path, given: Mapping[str, Any]) -> None:
        self.limits = Limits(silence_s=600, start_s=600, stall_s=600)
        self.pid = 0
        wanted = Wanted(
            **{"devices": "cpu", "workers": 1, "env": ENVIRONMENT, "limits": self.limits, **given},
            folder=folder / "study", cache=folder / "cache", shared=(folder / "images",),
        )  # fmt: skip
        executor.check(wanted)
        self.pool: Pool = executor.open(wanted)
        self.slot = self.pool.slots[0]
        self.is_closed = False

    def run(self, spec: TrialSpec, *, go_on: bool = True) -> Event:
        """Run a trial to its end; each epoch is answered with `go_on`."""
        self._send(spec)
        while isinstance((event := self.next()).message, EpochResult):
            self.pool.send(self.slot, Answer(go_on))
        return event

    def start(self, spec: TrialSpec) -> None:
        """Run a trial as far as its first epoch, after which it waits for an answer."""
        self._send(spec)
        assert isinstance(self.next().message, EpochResult)

    def next(self) -> Event:
        """The next event of a trial; the worker's process id is noted on the way."""
        for _ in range(ENOUGH):
            for event in self.pool.wait(1.0):
                if isinstance(event.message, Ready):
                    self.pid = event.message.pid
                elif event.message is None or isinstance(event.message, SAID):
                    return event
        raise AssertionError("no event came")

    def _send(self, spec: TrialSpec) -> None:
        while self.slot not in self.pool.slots:  # a slot may be away for a while after its worker ended
            self.pool.wait(0.1)
        self.pool.send(self.slot, RunTrial(spec))

    def close(self) -> None:
        """Close the pool, once."""
        if not self.is_closed:
            self.is_closed = True
            self.pool.close(grace_s=0.0)


class ExecutorSuite:
    """Subclass it, set `executor`, and pytest runs these tests on it, on this machine.

    class TestMyCluster(ExecutorSuite):
        executor = MyCluster()
    """

    executor: Executor
    has_processes = True
    """Whether its workers are processes, which can be killed and have logs."""

    @classmethod
    def given(cls) -> Mapping[str, Any]:
        """Attributes of `Wanted` that it needs here, such as `options`; one slot on CPU is wanted."""
        return {}

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """A folder with a dataset of a few images."""
        folder = tmp_path_factory.mktemp("executor")
        _write_dataset(folder)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def driver(cls, folder: Path) -> Iterator[Driver]:
        """An open pool that the tests share, in which a worker may be left alive."""
        driver = Driver(cls.executor, folder, cls.given())
        yield driver
        driver.close()

    def test_it_has_the_members_of_an_executor(self) -> None:
        assert isinstance(self.executor, Executor), "it needs name, options, check() and open()"
        check_name(self.executor.name)
        assert all(isinstance(option, str) for option in self.executor.options)

    def test_importing_it_loads_no_heavy_library(self) -> None:
        module = type(self.executor).__module__
        assert heavy_imports(module) == [], f"import these inside functions of {module}"

    def test_its_pool_has_slots_and_says_what_device_they_are(self, driver: Driver) -> None:
        assert len(driver.pool.slots) == 1, "one worker was wanted"
        assert driver.pool.device == "cpu"

    def test_a_trial_ends_as_it_does_in_a_process_of_this_machine(self, driver: Driver, folder: Path) -> None:
        from tlauto.builtin.executors import Local

        here, there = driver.run(_spec(folder, 0)), Driver(Local(), folder, {})
        try:
            known = there.run(_spec(folder, 1))
        finally:
            there.close()
        assert isinstance(here.message, TrialDone) and isinstance(known.message, TrialDone), here.message
        assert _figures(here.message) == _figures(known.message)
        assert here.message.epochs == 2
        assert (folder / "trial-0" / here.message.checkpoint).is_file()

    def test_a_trial_stops_when_it_is_told_to(self, driver: Driver, folder: Path) -> None:
        done = driver.run(_spec(folder, 2), go_on=False).message
        assert isinstance(done, TrialDone), done
        assert (done.epochs, done.is_pruned) == (1, True)

    def test_a_failure_is_an_answer_and_the_worker_goes_on(self, driver: Driver, folder: Path) -> None:
        failed = driver.run(_spec(folder, 3, params={"optim.nonsense": 1})).message
        assert isinstance(failed, TrialFailed), failed
        assert failed.kind == "error"
        assert "optim.nonsense" in failed.message
        assert isinstance(driver.run(_spec(folder, 4), go_on=False).message, TrialDone)

    def test_workers_may_be_started_before_their_first_job(self, driver: Driver, folder: Path) -> None:
        driver.pool.warm_up(driver.pool.slots)
        driver.pool.warm_up(driver.pool.slots)
        assert isinstance(driver.run(_spec(folder, 11), go_on=False).message, TrialDone)

    def test_waiting_ends_when_nothing_happens(self, driver: Driver) -> None:
        assert driver.pool.wait(0.0) == []

    def test_a_worker_sees_no_other_device_than_its_own(self, driver: Driver, folder: Path) -> None:
        driver.run(_spec(folder, 5), go_on=False)
        if self.has_processes:
            if sys.platform != "linux":
                pytest.skip("only Linux shows the environment of another process")
            text = Path(f"/proc/{driver.pid}/environ").read_text(encoding="utf-8")
            seen = dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
        else:
            seen = dict(os.environ)
        assert seen["CUDA_VISIBLE_DEVICES"] == ""

    def test_a_killed_worker_is_told_and_the_slot_works_again(self, driver: Driver, folder: Path) -> None:
        self._needs_processes()
        driver.start(_spec(folder, 6))
        os.kill(driver.pid, signal.SIGKILL)
        event = driver.next()
        assert (event.slot, event.message, event.exitcode) == (driver.slot, None, -signal.SIGKILL)
        assert LOGGED in event.log_tail
        assert isinstance(driver.run(_spec(folder, 7), go_on=False).message, TrialDone)

    def test_who_kills_a_worker_gets_its_last_lines_and_no_event(self, driver: Driver, folder: Path) -> None:
        self._needs_processes()
        driver.start(_spec(folder, 8))
        assert LOGGED in driver.pool.kill(driver.slot)
        _assert_gone(driver.pid)
        assert driver.pool.wait(1.0) == []

    def test_a_worker_that_stands_still_is_killed_and_told(self, driver: Driver, folder: Path) -> None:
        self._needs_processes()
        driver.start(_spec(folder, 9))
        os.kill(driver.pid, signal.SIGSTOP)
        driver.limits.silence_s = 3
        event = driver.next()
        driver.limits.silence_s = 600
        assert event.message is None
        assert event.hung == "gave no sign of life for 3 s and was killed"
        _assert_gone(driver.pid)

    def test_no_worker_outlives_its_pool(self, driver: Driver, folder: Path) -> None:
        driver.start(_spec(folder, 10))
        driver.close()
        if self.has_processes:
            _assert_gone(driver.pid)

    def _needs_processes(self) -> None:
        if not self.has_processes:
            pytest.skip("its worker is no process, so it cannot be killed")


def _assert_gone(pid: int) -> None:
    assert pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def _figures(done: TrialDone) -> dict[str, Any]:
    """All of a result that depends on neither the clock, its number nor what else a process has loaded."""
    left_out = ("number", "seconds", "versions")
    return {name: value for name, value in asdict(done).items() if name not in left_out}


def _spec(folder: Path, number: int, **changes: Any) -> TrialSpec:
    """A fine-tuning of two epochs, of the smallest backbone with random weights."""
    given: dict[str, Any] = {
        "dataset": str(folder / "dataset.json"), "task": "multiclass", "metric": "accuracy",
        "backbone": "timm:test_resnet.r160_in1k", "strategy": "full", "head": "linear", "params": {},
        "weights": WeightsOptions(pretrained=False, offline=True), "seed": 0, "epochs": 2,
        "folder": str(folder / f"trial-{number}"), "cache": str(folder / "cache"),
    }  # fmt: skip
    return TrialSpec(number=number, **{**given, **changes})


def _write_dataset(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    from tlauto.data import load_dataset

    rng = np.random.default_rng(0)
    for label, value in {"dark": 60, "light": 180}.items():
        (folder / "images" / label).mkdir(parents=True)
        for i in range(8):
            pixels = rng.normal(value, 25, (48, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    dataset, _ = load_dataset(folder / "images", seed=0)
    (folder / "dataset.json").write_text(dataset.to_json(), encoding="utf-8")
