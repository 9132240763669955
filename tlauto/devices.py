"""This machine: slots that trials run on, found without importing torch, and the cache folder."""

from __future__ import annotations

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
        name: as shown, `cpu:0`, `cuda:1`, `mps`.
        device: what torch calls it inside the worker, which sees no other device.
        threads: of the worker's arithmetic and image decoding.
        env: environment variables the worker starts with.
    """

    name: str
    device: str
    threads: int
    env: dict[str, str] = field(default_factory=dict)


def make_slots(devices: str = "auto", workers: int | None = None) -> tuple[Slot, ...]:
    """One slot per GPU, or CPU slots that share the cores without oversubscription.

    Args:
        devices: `auto`, `cpu`, `mps`, or GPUs as `cuda:0,cuda:1`.
        workers: number of slots on CPU; by default one per two cores, at most 8. On GPUs, at most
            this many of them are used. 0 means one slot, run inside the coordinator.

    Raises: ConfigError for a device that this machine does not have.
    """
    wanted = _devices(devices)
    if wanted == ["cpu"]:
        cores = available_cores()
        count = max(1, min(8, cores // 2)) if workers is None else max(1, workers)
        threads = max(1, cores // count)
        return tuple(Slot(f"cpu:{i}", "cpu", threads, environment("cpu", "", threads)) for i in range(count))
    gpus = wanted if not workers else wanted[:workers]
    threads = max(1, available_cores() // len(gpus))
    return tuple(_gpu_slot(name, threads) for name in gpus)


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
        return [part.strip() for part in listed.split(",") if part.strip() not in ("", "-1")]
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
    # Threads that wait do not spin: a spinning one takes the core from whoever it waits for as soon as
    # anything else runs. A linear head took 0.9 s instead of 0.07 s beside one busy process.
    env["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    env |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS")}
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        env["GLIBC_TUNABLES"] = GLIBC_TUNABLES
    return env


def _devices(text: str) -> list[str]:
    gpus = visible_gpus()
    if text == "auto":
        if gpus:
            return [f"cuda:{i}" for i in range(len(gpus))]
        return ["mps"] if platform.system() == "Darwin" and platform.machine() == "arm64" else ["cpu"]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if names in (["cpu"], ["mps"]):
        return names
    for name in names:
        kind, _, index = name.partition(":")
        if kind != "cuda" or not index.isdigit():
            raise ConfigError(f"--devices '{name}' is not auto, cpu, mps or cuda:N")
        if int(index) >= len(gpus):
            have = f"{len(gpus)} GPU(s)" if gpus else "no GPU"
            raise ConfigError(f"--devices {name}: this machine shows {have}; use --devices auto or cpu")
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"--devices '{text}' must name each device once")
    return names


def _gpu_slot(name: str, threads: int) -> Slot:
    if name == "mps":
        return Slot("mps", "mps", threads, environment("mps", "", threads))
    gpu = visible_gpus()[int(name.partition(":")[2])]
    return Slot(name, "cuda", threads, environment("cuda", gpu, threads))
