"""This machine: slots that trials run on, found without importing torch, and the cache folder."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tlauto.errors import ConfigError

# Keeps freed blocks in the process: eager training is 2 to 3 times faster on CPU, because half of
# its time is page faults otherwise (EfficientNet-Lite0, batch 32, 2 cores).
GLIBC_TUNABLES = (
    "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.top_pad=268435456"
)


@dataclass(frozen=True)
class Slot:
    """A place for one worker.

    Attributes:
        name: as shown, `cpu:0`, `cuda:1`, `mps`; of several on one GPU `cuda:1/0`, `cuda:1/1`.
        device: what torch calls it inside the worker, which sees no other device.
        threads: of the worker's arithmetic and image decoding.
        env: environment variables the worker starts with.
    """

    name: str
    device: str
    threads: int
    env: dict[str, str] = field(default_factory=dict)


PACKED = 4
"""Most slots on a GPU whose number is found by what fits (`--per-device auto`)."""

AUTO = "auto"


def make_slots(
    devices: str = AUTO, workers: int | None = None, *, per_device: str | None = None
) -> tuple[Slot, ...]:
    """One slot or several per GPU, or CPU slots; they share the cores without oversubscription.

    Slots of all GPUs come before second slots on any.

    Args:
        devices: `auto`, `cpu`, `mps`, or GPUs as `cuda:0,cuda:1`.
        workers: number of slots on CPU; by default one per two cores, at most 8. On GPUs, the most
            slots. 0 means one slot, run inside the coordinator.
        per_device: slots on each GPU, a number or `auto`; None is one.

    Raises: ConfigError for a device that this machine does not have, and for `per_device` without GPUs.
    """
    wanted, cores = _devices(devices), available_cores()
    is_gpu = wanted[0].startswith("cuda:")
    if per_device is not None and not is_gpu:
        raise ConfigError(
            f"--per-device is for NVIDIA GPUs, and trials run on {wanted[0]} here; leave it out"
            + (", and say with --workers how many run side by side" if wanted == ["cpu"] else "")
        )
    if wanted == ["cpu"]:
        count = max(1, min(8, cores // 2)) if workers is None else max(1, workers)
        threads = max(1, cores // count)
        return tuple(Slot(f"cpu:{i}", "cpu", threads, environment("cpu", "", threads)) for i in range(count))
    each = _slots_each(per_device, cores // len(wanted))
    names = [f"{name}/{i}" if each > 1 else name for i in range(each) for name in wanted]
    names = names if workers is None else names[: max(1, workers)]
    threads = max(1, cores // len(names))
    return tuple(_gpu_slot(name, threads) for name in names)


def device_of(slot: str) -> str:
    """The device that a slot of this name is on: `cuda:1` for `cuda:1/0`. CPU slots are all on `cpu`."""
    device = slot.partition("/")[0]
    return "cpu" if device.startswith("cpu:") else device


def is_gpu(slot: str) -> bool:
    """Whether a slot of this name is on a GPU of its own memory."""
    return slot.startswith("cuda:")


def is_here(slot: str) -> bool:
    """Whether a slot of this name is on this machine, not on a node of a cluster."""
    return slot.partition(":")[0] in ("cpu", "cuda", "mps")


def cache_folder() -> Path:
    """The user's cache folder for checks, pixels and features; `TLAUTO_CACHE` overrides it."""
    given = os.environ.get("TLAUTO_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "tlauto"


def available_cores() -> int:
    """Cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The ids that CUDA_VISIBLE_DEVICES lists, else one per GPU that nvidia-smi finds."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        # As CUDA reads it: what follows an id that is none is not seen either.
        return list(itertools.takewhile(lambda id: id not in ("", "-1"), map(str.strip, listed.split(","))))
    if not shutil.which("nvidia-smi"):
        return []
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line for line in found.stdout.splitlines() if line.startswith("GPU ")]
    return [str(i) for i in range(len(lines))] if found.returncode == 0 else []


def environment(device: str, gpu: str, threads: int) -> dict[str, str]:
    """The environment of a worker on a device.

    Args: device: as torch calls it; gpu: the one it sees, as CUDA_VISIBLE_DEVICES names it; empty is none.
    """
    env = {
        "CUDA_VISIBLE_DEVICES": gpu,
        "KERAS_BACKEND": "torch",
        "KERAS_TORCH_DEVICE": device,
        "TLAUTO_THREADS": str(threads),
        "PYTHONHASHSEED": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is deterministic only with it
    }
    env |= waiting()
    env |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        env["GLIBC_TUNABLES"] = GLIBC_TUNABLES
    return env


def waiting() -> dict[str, str]:
    """How a process's threads wait for each other, as variables of its environment; the user's come first.

    They spin for some 20 microseconds before they sleep. One that spins for longer takes the core from
    whoever it waits for as soon as anything else runs; to sleep and wake at once takes longer than the small
    steps between which they wait (`bench/RESULTS.md`, Threads that wait).
    """
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    given = {name: os.environ[name] for name in names if name in os.environ}
    return given or dict(zip(names, ("PASSIVE", "1000"), strict=True))


def _devices(text: str) -> list[str]:
    gpus = visible_gpus()
    if text == AUTO:
        if gpus:
            return [f"cuda:{i}" for i in range(len(gpus))]
        return ["mps"] if _is_apple() else ["cpu"]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--devices '{text}' must name each device once")
    kinds = {name.partition(":")[0] for name in names}
    if len(names) > 1 and kinds <= {"cpu", "mps", "cuda"} and kinds != {"cuda"}:
        raise ConfigError(
            f"--devices '{text}' names several devices that are not all GPUs, and the trials of a search run "
            f"on one kind; name GPUs only (cuda:0,cuda:1), or cpu or mps alone"
        )
    for name in names:
        _require(name, gpus)
    return names


def _require(name: str, gpus: list[str]) -> None:
    kind, _, index = name.partition(":")
    if name == "mps" and not _is_apple():
        raise ConfigError("--devices mps: this machine has no Apple GPU; use --devices auto or cpu")
    if name in ("cpu", "mps"):
        return
    if kind != "cuda" or not index.isdecimal():
        raise ConfigError(f"--devices '{name}' is not auto, cpu, mps or cuda:N")
    if int(index) >= len(gpus):
        have = f"{len(gpus)} GPU(s)" if gpus else "no GPU"
        raise ConfigError(f"--devices {name}: this machine shows {have}; use --devices auto or cpu")


def _is_apple() -> bool:
    return platform.system() == "Darwin" and platform.machine() == "arm64"


def _slots_each(per_device: str | None, cores: int) -> int:
    """Slots on each GPU, of which each has so many cores."""
    if per_device == AUTO:
        return max(1, min(PACKED, cores))
    return int(per_device or 1)


def _gpu_slot(name: str, threads: int) -> Slot:
    if name == "mps":
        return Slot("mps", "mps", threads, environment("mps", "", threads))
    gpu = visible_gpus()[int(device_of(name).partition(":")[2])]
    return Slot(name, "cuda", threads, environment("cuda", gpu, threads))
