"""Small real searches as processes of their own, for the scripts that stop and kill them (Linux)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ledger import Ledger
from PIL import Image

MARK = "TLAUTO_BENCH"
"""Variable by which the processes of a search are known; whatever it starts inherits it, and workers on a
cluster are given it for its name."""

BACKBONES = ("timm:test_resnet.r160_in1k", "timm:test_vit.r160_in1k")
"""Networks of half a million parameters."""

LONGEST_S = 600.0
"""A search that takes longer is taken to hang."""


@dataclass
class Search:
    """A study that one command begins and goes on with.

    Attributes:
        folder: where its workspace and its logs lie.
        options: of `tlauto search`, beside those that all have.
        program: what Python runs as `tlauto`.
        starts: how often it was started.
    """

    folder: Path
    images: Path
    options: Sequence[str]
    study: str = "study"
    storage: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    program: Sequence[str] = ("-m", "tlauto")
    starts: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def ledger(self) -> Ledger:
        """What is recorded of it."""
        return Ledger(self.storage or str(self.runs / "tlauto.db"), self.study)

    @property
    def runs(self) -> Path:
        """The workspace."""
        return self.folder / "runs"

    @property
    def log(self) -> Path:
        """What the latest start said."""
        return self.folder / f"search-{self.starts}.log"

    @property
    def mark(self) -> str:
        """By which its processes are known."""
        return f"{self.folder}:"

    def start(self) -> subprocess.Popen[bytes]:
        """Begin, or go on."""
        self.starts += 1
        self.process = self.launch(self.log, self.mark + str(self.starts))
        return self.process

    def launch(self, log: Path, mark: str) -> subprocess.Popen[bytes]:
        """A process of the same command that nothing else is done with."""
        command = [
            sys.executable, *self.program, "search", "--data", str(self.images), "--out", str(self.runs),
            "--study", self.study, "--no-pretrained", "--offline", "--devices", "cpu", "--cold",
            *self.options,
        ]  # fmt: skip
        if self.storage:
            command += ["--storage", self.storage]
        with log.open("ab") as out:
            return subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **self.env, MARK: mark},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                start_new_session=True,  # Ctrl-C of a terminal goes to a process group: this one's
            )  # fmt: skip

    def said(self) -> str:
        """What the latest start has said so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def has_said(self, pattern: str) -> bool:
        """Whether a pattern is in what it has said so far."""
        return re.search(pattern, self.said()) is not None

    def is_running(self) -> bool:
        """Whether its process lives."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to its process group, as a terminal does."""
        assert self.process is not None
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def wait(self) -> int | None:
        """Its exit code; None when it had to be killed because it hung."""
        assert self.process is not None
        try:
            return self.process.wait(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait()
            return None

    def workers(self) -> list[int]:
        """Its workers."""
        return marked(self.mark, "tlauto.worker")


def environment(cache: Path) -> dict[str, str]:
    """What searches are to have in their environment: a cache of their own, and no GPU."""
    return {"TLAUTO_CACHE": str(cache), "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def marked(mark: str, part: str = "") -> list[int]:
    """Living processes whose mark begins so, with `part` in their command."""
    found, wanted = [], f"\0{MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdigit() and wanted in b"\0" + (entry / "environ").read_bytes()
            if is_ours and not _is_over(entry) and part.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def _is_over(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"


def gone_after(mark: str, seconds: float) -> tuple[float, list[int]]:
    """Seconds until no process of that mark was left, and those that are left when the time is up."""
    started = time.monotonic()
    while (left := marked(mark)) and time.monotonic() - started < seconds:
        time.sleep(0.02)
    return time.monotonic() - started, left


def run_by(pid: int) -> str:
    """What a process runs, as far as can be seen."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:120].strip()
    except OSError:
        return "it has just ended"


def send(pid: int, number: int) -> None:
    """Send a signal to a process that may have ended."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def write_images(folder: Path, *, per_class: int = 20, size: int = 48) -> Path:
    """Noisy images of two colours that are hard to tell apart."""
    chance = np.random.default_rng(0)
    for channel in range(2):
        (folder / f"colour{channel}").mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = chance.normal(120, 60, (size, size, 3))
            pixels[..., channel] += 5
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / f"colour{channel}" / f"{i}.png"
            )
    return folder
