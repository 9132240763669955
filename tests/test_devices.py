"""Slots of this machine's devices, and what a worker on one sees of them."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests_support import environment, install_troubles, spec_of

from tlauto.contracts import EpochResult, TrialDone
from tlauto.data import load_dataset
from tlauto.devices import PACKED, Slot, available_cores, device_of, make_slots, visible_gpus
from tlauto.errors import ConfigError
from tlauto.pool.local import LocalPool
from tlauto.pool.protocol import Answer, RunTrial

WAITING = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in WAITING:
        monkeypatch.delenv(name, raising=False)


def test_cpu_slots_share_the_cores() -> None:
    slots = make_slots("cpu", 2)
    assert [slot.name for slot in slots] == ["cpu:0", "cpu:1"]
    assert all(slot.threads == max(1, available_cores() // 2) for slot in slots)
    assert slots[0].env["OMP_NUM_THREADS"] == str(slots[0].threads)
    assert slots[0].env["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("PASSIVE", "1000")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
        ({"GOMP_SPINCOUNT": "7"}, (None, "7")),
    ],
    ids=["nothing", "a policy", "a count"],
)
def test_threads_of_a_worker_spin_a_little_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    env = make_slots("cpu", 2)[0].env
    assert tuple(env.get(name) for name in WAITING) == expected


@pytest.mark.parametrize(
    ("listed", "seen"), [("0,-1,1", ["0"]), ("-1", []), ("2, 1", ["2", "1"]), ("0,,1", ["0"])]
)
def test_gpus_are_listed_as_cuda_reads_the_list(
    monkeypatch: pytest.MonkeyPatch, listed: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == seen


def test_each_gpu_slot_sees_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    slots = make_slots("auto")
    assert [(s.name, s.device, s.env["CUDA_VISIBLE_DEVICES"]) for s in slots] == [
        ("cuda:0", "cuda", "3"),
        ("cuda:1", "cuda", "GPU-abc"),
    ]
    assert [s.name for s in make_slots("cuda:1")] == ["cuda:1"]


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi lists two GPUs, one of them divided."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    listed = ("GPU 0: A (UUID: GPU-1)", "  MIG 1g.5gb Device 0: (UUID: MIG-1)", "GPU 1: A (UUID: GPU-2)")
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in listed))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.usefixtures("two_gpus")
def test_several_slots_share_a_gpu_and_the_cores() -> None:
    slots = make_slots("cuda:0,cuda:1", per_device="2")
    assert [(slot.name, slot.env["CUDA_VISIBLE_DEVICES"]) for slot in slots] == [
        ("cuda:0/0", "0"),
        ("cuda:1/0", "1"),
        ("cuda:0/1", "0"),
        ("cuda:1/1", "1"),
    ], "one on each GPU before a second on any"
    assert {slot.threads for slot in slots} == {max(1, available_cores() // 4)}
    assert {slot.env["OMP_NUM_THREADS"] for slot in slots} == {str(slots[0].threads)}
    assert {slot.env["KERAS_TORCH_DEVICE"] for slot in slots} == {"cuda"}
    assert [device_of(slot.name) for slot in slots] == ["cuda:0", "cuda:1"] * 2
    assert [slot.name for slot in make_slots("auto", 3, per_device="2")] == [
        "cuda:0/0",
        "cuda:1/0",
        "cuda:0/1",
    ]


@pytest.mark.usefixtures("two_gpus")
def test_how_many_slots_a_gpu_has() -> None:
    assert [slot.name for slot in make_slots("auto")] == ["cuda:0", "cuda:1"]
    assert [slot.name for slot in make_slots("auto", per_device="1")] == ["cuda:0", "cuda:1"]
    assert [slot.name for slot in make_slots("auto", 0, per_device="2")] == ["cuda:0/0"]
    each = max(1, min(PACKED, available_cores() // 2))
    assert len(make_slots("auto", per_device="auto")) == 2 * each


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ("cuda:0", "this machine shows no GPU"),
        ("gpu", "is not auto, cpu, mps or cuda:N"),
        ("cuda", "is not auto, cpu, mps or cuda:N"),
        ("cuda:\u00b2", "is not auto, cpu, mps or cuda:N"),
        ("cpu,tpu:1", "is not auto, cpu, mps or cuda:N"),
        ("cpu,cuda:0", "name GPUs only"),
        ("mps,cuda:0", "name GPUs only"),
        ("cpu,cpu", "must name each device once"),
        ("", "must name each device once"),
    ],
)
def test_devices_that_are_not_there_are_refused(devices: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--devices.*{said}"):
        make_slots(devices)


@pytest.mark.skipif(platform.system() == "Darwin", reason="it may have an Apple GPU")
def test_an_apple_gpu_is_not_taken_for_granted() -> None:
    with pytest.raises(ConfigError, match="no Apple GPU"):
        make_slots("mps")


def test_slots_per_device_are_for_gpus() -> None:
    for each in ("2", "auto"):
        with pytest.raises(ConfigError, match=r"--per-device is for NVIDIA GPUs.*--workers"):
            make_slots("cpu", per_device=each)


# --- what a worker sees -------------------------------------------------------------------------------


def seen_from(slot: Slot, tmp_path: Path, make_patches: Callable[..., Path]) -> dict[str, object]:
    """What a real worker on a slot sees while it runs a trial."""
    dataset, _ = load_dataset(make_patches(tmp_path / "patches", per_class=8), seed=0)
    (tmp_path / "dataset.json").write_text(dataset.to_json())
    env = {name: value for name, value in environment(tmp_path).items() if name not in slot.env}
    pool = LocalPool([slot], logs=tmp_path / "logs", env={**env, **install_troubles(tmp_path / "site")})
    spec = spec_of(
        strategy="feature_extraction", head="looks", dataset=str(tmp_path / "dataset.json"),
        cache=str(tmp_path / "cache"), folder=str(tmp_path / "trial"),
    )  # fmt: skip
    pool.send(slot.name, RunTrial(spec))
    try:
        while True:
            for event in pool.wait(1.0):
                if isinstance(event.message, EpochResult):
                    pool.send(slot.name, Answer(go_on=True))
                elif isinstance(event.message, TrialDone):
                    (mark,) = (tmp_path / "site" / "marks").iterdir()
                    seen: dict[str, object] = json.loads(mark.read_text())
                    return seen
                else:
                    assert event.message is not None, event.log_tail
    finally:
        pool.close(grace_s=0)


def test_a_worker_sees_its_threads_and_no_gpu(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    slot = make_slots("cpu", available_cores())[-1]
    seen = seen_from(slot, tmp_path, make_patches)
    assert (seen["threads"], seen["gpus"]) == (1, 0)
    environment = seen["environment"]
    assert isinstance(environment, dict)
    assert {name: environment[name] for name in slot.env} == slot.env
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["KERAS_TORCH_DEVICE"]) == ("", "cpu")
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "1"


@pytest.mark.usefixtures("two_gpus")
def test_a_worker_on_a_gpu_sees_that_one_only(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    slot = make_slots("cuda:1", per_device="2")[1]
    # There may be no such GPU here: the trial computes on the CPU, in the environment of the slot.
    seen = seen_from(replace(slot, device="cpu"), tmp_path, make_patches)
    environment = seen["environment"]
    assert isinstance(environment, dict)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["KERAS_TORCH_DEVICE"]) == ("1", "cuda")
    assert seen["gpus"] in (0, 1)
    assert seen["threads"] == slot.threads
