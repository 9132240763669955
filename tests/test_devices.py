from __future__ import annotations

import pytest

from tlauto.devices import available_cores, make_slots
from tlauto.errors import ConfigError


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)


def test_cpu_slots_share_the_cores() -> None:
    slots = make_slots("cpu", 2)
    assert [slot.name for slot in slots] == ["cpu:0", "cpu:1"]
    assert all(slot.threads == max(1, available_cores() // 2) for slot in slots)
    assert slots[0].env["OMP_NUM_THREADS"] == str(slots[0].threads)
    assert slots[0].env["CUDA_VISIBLE_DEVICES"] == ""
    assert slots[0].env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_each_gpu_slot_sees_its_own_device_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    slots = make_slots("auto")
    assert [(s.name, s.device, s.env["CUDA_VISIBLE_DEVICES"]) for s in slots] == [
        ("cuda:0", "cuda", "3"),
        ("cuda:1", "cuda", "GPU-abc"),
    ]
    assert [s.name for s in make_slots("cuda:1")] == ["cuda:1"]


@pytest.mark.parametrize("devices", ["cuda:0", "gpu", "cuda", "cpu,cuda:0", "", "tpu:1"])
def test_devices_that_are_not_there_are_refused(devices: str) -> None:
    with pytest.raises(ConfigError, match="--devices"):
        make_slots(devices)
