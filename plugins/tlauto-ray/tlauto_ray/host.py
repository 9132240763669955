"""What runs on a node: it keeps one worker process, and hands lines of text to and fro."""

from __future__ import annotations

import platform
import queue
import secrets
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tlauto.devices import Slot
from tlauto.pool.local import start_process

POLL_S = 10.0
"""Longest that a question for lines stays without an answer."""

SEEN_S = 5.0
"""How long a file that was just written may take to be seen on another machine."""


@dataclass(frozen=True)
class Site:
    """What a node must see of the search: a file with a token, further paths, a folder it can write to."""

    token_file: str
    token: str
    shared: tuple[str, ...]
    cache: str
    device: str
    version: str


class Host:
    """An actor: one for each slot, on the node where Ray found room for it.

    Its worker is a process of its own, so that it can be killed, and its memory given back, while the slot
    keeps its place on the node. When the actor ends, its worker sees the end of its input and ends too.
    """

    def __init__(self) -> None:
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._lines: dict[int, queue.SimpleQueue[str | None]] = {}

    def look(self, site: Site) -> tuple[str, str]:
        """The node's name, and what it lacks for the search as a sentence, empty when it lacks nothing."""
        return platform.node(), _lack(site)

    def start(self, number: int, slot: Slot, log: str, env: Mapping[str, str]) -> None:
        """Start worker `number` of this slot; its messages are read with `read`."""
        own = dict(env)
        if slot.device == "cuda":
            own["CUDA_VISIBLE_DEVICES"] = _gpus()
        lines = self._queue(number)
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        process = self._processes[number] = start_process(slot, Path(log), env=own)
        threading.Thread(target=_listen, args=(process, lines), daemon=True).start()

    def write(self, number: int, text: str) -> None:
        """Hand lines to a worker; one that is gone has told so."""
        stdin = self._processes[number].stdin
        assert stdin is not None
        try:
            stdin.write(text)
            stdin.flush()
        except OSError:
            return

    def read(self, number: int) -> tuple[list[str], int | None]:
        """What the worker said since the last call, and its exit code once it ended and all is read."""
        lines: list[str] = []
        try:
            line = self._queue(number).get(timeout=POLL_S)
            while line is not None:
                lines.append(line)
                line = self._queue(number).get_nowait()
        except queue.Empty:
            return lines, None
        code = self._processes.pop(number).wait()
        del self._lines[number]
        return lines, code

    def kill(self, number: int) -> None:
        """End a worker by force."""
        process = self._processes.get(number)
        if process is not None:
            process.kill()

    def _queue(self, number: int) -> queue.SimpleQueue[str | None]:
        # Whoever comes first makes it: a worker may be read before it is started.
        return self._lines.setdefault(number, queue.SimpleQueue())

    def stay(self) -> None:
        """Return never: who waits for it learns of this actor's end."""
        threading.Event().wait()


def _listen(process: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def _gpus() -> str:
    """The GPUs that Ray gave this actor, as CUDA_VISIBLE_DEVICES lists them."""
    import ray

    return ",".join(map(str, ray.get_gpu_ids()))


def _lack(site: Site) -> str:
    here = version("tlauto")
    if here != site.version:
        return f"has tlauto {here} and this machine {site.version}; install the same version on both"
    folder = str(Path(site.token_file).parent)
    if not _sees(Path(site.token_file), site.token):
        return f"does not see the workspace {folder}; {_advice('--out')}"
    for path in site.shared:
        if not Path(path).exists():
            return f"does not see {path}; {_advice('--data, --weights-dir or --weights')}"
    for path, setting in ((folder, "--out"), (site.cache, "TLAUTO_CACHE")):
        if why := _not_writable(Path(path)):
            return f"cannot write to {path} ({why}); give it the right to, or choose another with {setting}"
    # A GPU that Ray was only told of would give trials on the CPU that nobody asked for.
    if site.device == "cuda" and not (shutil.which("nvidia-smi") or list(Path("/dev").glob("nvidia[0-9]*"))):
        return "was started with GPUs but has none; start its Ray with --num-gpus 0, or use --devices cpu"
    return ""


def _advice(setting: str) -> str:
    return f"mount it there under the same path, or name a folder that all nodes share with {setting}"


def _sees(file: Path, token: str) -> bool:
    deadline = time.monotonic() + SEEN_S
    while True:
        try:
            return file.read_text(encoding="utf-8") == token
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)


def _not_writable(folder: Path) -> str:
    probe = folder / f".write-test-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""
