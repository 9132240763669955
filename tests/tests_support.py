"""What tests of the command line share: how to start it, and in which environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TINY = ("--backbones", "timm:test_resnet.r160_in1k", "--no-pretrained", "--offline", "--preset", "fast")
"""Arguments of a search over one random backbone of 0.5 M parameters."""


def command(*args: str) -> list[str]:
    """The command line of `tlauto ARGS`."""
    return [sys.executable, "-m", "tlauto", *args]


def environment(folder: Path) -> dict[str, str]:
    """An environment whose caches lie in `folder`, with no setting of the user's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TLAUTO_")}
    homes = {"TLAUTO_CACHE": "cache", "KERAS_HOME": "keras", "TORCH_HOME": "torch", "HF_HOME": "hf"}
    return {
        **kept,
        "COLUMNS": "80",
        "CUDA_VISIBLE_DEVICES": "",
        **{k: str(folder / v) for k, v in homes.items()},
    }


def run(
    *args: str, cwd: Path, timeout_s: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `tlauto ARGS` in `cwd` to its end; `env` is added to its environment."""
    return subprocess.run(
        command(*args),
        cwd=cwd,
        env={**environment(cwd), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def children(pid: int) -> list[int]:
    """Process ids of the children of a process (Linux)."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
