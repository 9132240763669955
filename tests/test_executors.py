"""The executors that come with tlauto pass the suite, and what a search says of those that it cannot use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from scripted_pool import ScriptedPool, done, open_scripted
from tests_support import refused, trial_spec

from tlauto.builtin.executors import InProcess, Local
from tlauto.config import SearchConfig, parse_options
from tlauto.errors import ConfigError
from tlauto.executing import expected
from tlauto.pool.base import Event
from tlauto.pool.protocol import Message, RunTrial
from tlauto.results.finish import _run
from tlauto.testing import ExecutorSuite


class TestLocal(ExecutorSuite):
    executor = Local()


class TestInProcess(ExecutorSuite):
    executor = InProcess()
    has_processes = False

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def one_thread(cls) -> Iterator[None]:
        """As the workers of the suite, of which this process is one."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


def test_workers_start_ahead_on_slots_that_are_sure_to_get_a_trial() -> None:
    packed = ("cuda:0/0", "cuda:1/0", "cuda:0/1", "cuda:1/1")
    assert expected(SearchConfig(data="x", time_s=60), packed) == packed
    assert expected(SearchConfig(data="x", trials=3), packed) == packed[:3]
    # Whether trials fit beside others is not known yet.
    assert expected(SearchConfig(data="x", per_device="auto"), packed) == packed[:2]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--executor", "rya"), "no executor 'rya'"),
        (("--executor-option", "cpus=1"), "the executor 'local' has no option 'cpus' (it takes none)"),
        (("--ray-address", "auto"), "the executor 'local' has no option 'address'"),
        (("--executor-option", "address"), "--executor-option 'address' is not NAME=VALUE"),
        (("--workers", "0", "--executor", "ray"), "--workers 0 runs the trials in this process"),
        (("--devices", "cuda:7"), "--devices cuda:7: this machine shows no GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused_before_any_image_is_read(
    args: tuple[str, ...], said: str, tmp_path: Path, patches: Callable[..., Path]
) -> None:
    patches(per_class=1)
    assert said in refused("search", "--data", "patches", *args, cwd=tmp_path)
    assert not (tmp_path / "tlauto-runs" / "tlauto.db").exists()


def test_an_executor_that_is_not_installed_is_named_with_its_plugin(tmp_path: Path) -> None:
    line = refused("search", "--data", ".", "--executor", "ray", cwd=tmp_path, env={"TLAUTO_PLUGINS": ""})
    assert line.endswith("('tlauto plugins' lists them); 'pip install tlauto-ray' installs it")
    assert "no executor 'ray'" in line


def test_options_travel_with_the_settings_and_may_change_when_a_search_goes_on(tmp_path: Path) -> None:
    options = parse_options(("address=head:6379", "cpus=4"))
    config = SearchConfig(data=str(tmp_path), executor="ray", executor_options=options)
    assert SearchConfig.from_json(config.to_json()) == config
    assert options == {"address": "head:6379", "cpus": "4"}
    with pytest.raises(ConfigError, match="the executor's option 'cpus' is given twice"):
        parse_options(("cpus=1", "cpus=2"))


class LosesItsMachine(ScriptedPool):
    """One slot, whose machine is lost in its first job; after a while without any, another one comes."""

    def send(self, slot: str, message: Message) -> None:
        assert slot in self.slots, "it is lost"
        assert isinstance(message, RunTrial)
        if slot == "there:0":
            self.slots = ()
            self._said = [Event(slot, None)]
        else:
            self._said = [Event(slot, done(message.spec))]

    def wait(self, timeout_s: float) -> list[Event]:
        if not self._said:
            self.slots = ("there:1",)
        said, self._said = self._said, []
        return said


def test_a_refit_whose_machine_is_lost_runs_on_one_that_comes_later(tmp_path: Path) -> None:
    pool = LosesItsMachine(("there:0",))
    session = open_scripted(tmp_path, pool, strategies=("full",), trials=1, device="cpu", propose=False)
    job = RunTrial(trial_spec(-1))
    try:
        assert _run(session, {-1: job}, lambda event: None, threading.Event()) == {-1: done(job.spec)}
    finally:
        session.study.close()
        session.store.close()
