"""A Ray cluster of several nodes on 127.0.0.1: started by a process of its own, enlarged, ended (Linux).

That process is this file as a program. It has the cluster's environment, which Ray's processes inherit, and
its folder as working directory; that is how they are known, since Ray's workers overwrite what /proc shows of
their environment. It ends, and the cluster with it, when its input does.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

NODES = 2
"""Nodes of one CPU that a cluster begins with, beside a head without any."""

STORE_BYTES = 80 << 20
"""Of each node's object store; about the least that Ray accepts."""

ACTOR = "ray::Host"
"""In the title of a process that a search has Ray start; `ray::IDLE` and others are Ray's own."""


def is_installed() -> bool:
    """Whether a cluster can be made here and searches can run on it."""
    return find_spec("ray") is not None and find_spec("tlauto_ray") is not None


@dataclass
class Cluster:
    """A cluster that runs.

    Attributes:
        folder: its files, and the working directory of its processes.
        env: what who connects to it must have in its environment.
        raylets: the process of each node that was not lost, the head's aside.
    """

    folder: Path
    env: Mapping[str, str]
    process: subprocess.Popen[str]
    address: str = ""
    raylets: list[int] = field(default_factory=list)

    def add_node(self) -> None:
        """Start a node and wait until it has joined."""
        assert self.process.stdin is not None
        print("add", file=self.process.stdin, flush=True)
        self.raylets.append(json.loads(self.answer()))

    def answer(self) -> str:
        """The next line that the process says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"no Ray cluster: {(self.folder / 'log').read_text()[-600:]}"
        return line

    def processes(self, part: str = "") -> list[int]:
        """Its living processes with `part` in their command, workers of searches among them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                where = os.readlink(entry / "cwd")  # cannot be read of one that is over
                if where.startswith(str(self.folder)) and part.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def left_after(self, seconds: float, part: str = "") -> list[int]:
        """Its processes with `part` in their command that have not ended by then."""
        until = time.monotonic() + seconds
        while (left := self.processes(part)) and time.monotonic() < until:
            time.sleep(0.02)
        return left


def below(pid: int) -> list[int]:
    """A process, those that it started, those that they started, and so on."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    found = [pid]
    for parent in found:  # grows
        found += [child for child, its_parent in parents.items() if its_parent == parent]
    return found


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster that runs within the block; nobody else gets in."""
    from tlauto_ray.cluster import OURS

    # Not the usual temporary folder: the paths of sockets below it may have about 100 letters.
    folder = Path(tempfile.mkdtemp(prefix="tlauto-ray-", dir="/tmp"))
    env = {**OURS, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(folder)], cwd=folder,
            env={**os.environ, **env, "RAY_TMPDIR": str(folder)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )  # fmt: skip
    with process:  # closes its input and waits for it
        cluster = Cluster(folder, env, process)
        cluster.address = json.loads(cluster.answer())
        for _ in range(NODES):
            cluster.add_node()
        yield cluster


def main() -> None:
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes()
    try:
        head = nodes.add_node(
            num_cpus=0, include_dashboard=False, include_log_monitor=False, object_store_memory=STORE_BYTES
        )
        print(json.dumps(head.gcs_address), flush=True)
        for _ in sys.stdin:
            node = nodes.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
            raylet = node.all_processes["raylet"][0].process
            # Its actors take a process that nobody waits for to live on.
            threading.Thread(target=raylet.wait, daemon=True).start()
            print(raylet.pid, flush=True)
    finally:
        nodes.shutdown()
    shutil.rmtree(sys.argv[1], ignore_errors=True)  # kept, with the log, if something was wrong


if __name__ == "__main__":
    main()
