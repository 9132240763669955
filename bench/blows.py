"""What `chaos.py` does to a search, and when.

A blow is told of the round and may leave something to be put right again before the search is started
anew (`Round.undo`), and faults that it saw itself (`Round.faults`).
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ledger import MISSED, Fault
from postgres_server import Server
from ray_cluster import Cluster, below
from searches import MARK, Search, gone_after, marked, send

ROOM = 64 * 1024
"""Bytes that may still be written, or allocated, when disk or memory is full."""

DISK = 64 << 20
"""Bytes of the disk that is filled."""

SILENCE_S = 15
"""After which a worker that stands still is taken to hang, in rounds that stop one."""


@dataclass
class Round:
    """One study and what is done to it.

    Attributes:
        server: of PostgreSQL, if the study is kept there.
        cluster: of Ray, if trials run there.
        disk: a file system of its own that the workspace lies on.
        undo: what puts right again what a blow did.
        codes: exit codes that a blow may lead to, beside 0 and 1.
        faults: what is wrong, as far as it is known.
    """

    search: Search
    server: Server | None = None
    cluster: Cluster | None = None
    disk: Path | None = None
    undo: list[Callable[[], object]] = field(default_factory=list)
    codes: set[int | None] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Blow:
    """Something that is done to a search.

    Attributes:
        strike: does it.
        moments: when; all of `MOMENTS` if empty.
        storage: `sqlite` or `postgres` if it makes sense there only.
        silence_s: how soon a worker that stands still is taken to hang.
        on_cluster: whether trials must run on a cluster.
    """

    strike: Callable[[Round, random.Random], None]
    moments: tuple[str, ...] = ()
    storage: str | None = None
    silence_s: int = 120
    on_cluster: bool = False

    @property
    def name(self) -> str:
        return self.strike.__name__


# --- the coordinator ----------------------------------------------------------------------------------


def kill_coordinator(round: Round, chance: random.Random) -> None:
    """The system takes the coordinator."""
    round.codes.add(-signal.SIGKILL)
    assert round.search.process is not None
    round.search.process.kill()


def kill_all(round: Round, chance: random.Random) -> None:
    """The power fails."""
    round.codes.add(-signal.SIGKILL)
    for pid in marked(round.search.mark):
        send(pid, signal.SIGKILL)


def interrupt(round: Round, chance: random.Random) -> None:
    """Ctrl-C."""
    round.codes.add(130)
    round.search.signal(signal.SIGINT)


def interrupt_twice(round: Round, chance: random.Random) -> None:
    """Ctrl-C by somebody in a hurry."""
    interrupt(round, chance)
    time.sleep(chance.uniform(0, 0.5))
    round.search.signal(signal.SIGINT)


def terminate(round: Round, chance: random.Random) -> None:
    """A scheduler ends the job; before the search has begun nothing needs an ordinary end."""
    round.codes |= {130, -signal.SIGTERM}
    round.search.signal(signal.SIGTERM)


def pause_coordinator(round: Round, chance: random.Random) -> None:
    """The coordinator is stopped and goes on (a laptop sleeps); meanwhile the study is not free."""
    round.search.signal(signal.SIGSTOP)
    is_claimed = round.search.ledger.search()[1] is not None
    if is_claimed and chance.random() < 0.5:
        _refused(round)
    else:
        time.sleep(chance.uniform(0.5, 4))
    round.search.signal(signal.SIGCONT)


def second_coordinator(round: Round, chance: random.Random) -> None:
    """The same command once more, while the first one runs."""
    _refused(round)


def two_at_once(round: Round, chance: random.Random) -> None:
    """The same command twice at the same moment: one gets the study, the other is told so."""
    second, log = _second(round)
    code = second.wait(timeout=300)
    said = log.read_text(errors="replace")
    if code == 1:
        round.codes.add(1)
    elif code != 0 or not round.search.has_said("error: "):
        round.faults.append((MISSED, f"of two at once the second ended with {code}: {said[-300:]}"))
    gone_after(f"{round.search.mark}second", 5)


def starve_coordinator(round: Round, chance: random.Random) -> None:
    """The coordinator gets no more memory."""
    assert round.search.process is not None
    _limit_memory(round.search.process.pid, chance)


# --- workers ------------------------------------------------------------------------------------------


def kill_worker(round: Round, chance: random.Random) -> None:
    """A worker is killed, as by the system when memory is short."""
    workers = round.search.workers()
    if workers:
        send(chance.choice(workers), signal.SIGKILL)


def kill_workers(round: Round, chance: random.Random) -> None:
    """One worker after the other is killed."""
    for _ in range(chance.randint(2, 4)):
        kill_worker(round, chance)
        time.sleep(chance.uniform(0, 3))


def stop_worker(round: Round, chance: random.Random) -> None:
    """A worker stands still and never goes on."""
    workers = round.search.workers()
    if workers:
        send(chance.choice(workers), signal.SIGSTOP)


def starve_worker(round: Round, chance: random.Random) -> None:
    """A worker gets no more memory."""
    workers = round.search.workers()
    if workers:
        _limit_memory(chance.choice(workers), chance)


# --- what a search uses -------------------------------------------------------------------------------


def fill_disk(round: Round, chance: random.Random) -> None:
    """The disk is full; where no file system can be mounted, the coordinator's files may not grow."""
    left = chance.randint(0, 4) * ROOM
    if round.disk:
        disk = round.disk
        leave(disk, left)
        round.undo.append(lambda: resize(disk, DISK))
    else:
        files = [file.stat().st_size for file in round.search.runs.glob("*.db*")]
        assert round.search.process is not None
        _limit(round.search.process.pid, resource.RLIMIT_FSIZE, max([ROOM, *files]) + left)


def kill_dashboard(round: Round, chance: random.Random) -> None:
    """The dashboard reads beside the search, and is killed."""
    search = round.search
    where = ["--storage", search.storage] if search.storage else ["--out", str(search.runs)]
    dashboard = subprocess.Popen(
        [sys.executable, "-m", "tlauto", "dashboard", *where, "--port", "0"],
        cwd=search.folder, env={**os.environ, **search.env, MARK: f"{search.mark}dashboard"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(chance.uniform(1, 5))
    dashboard.kill()
    dashboard.wait()


def restart_server(round: Round, chance: random.Random) -> None:
    """PostgreSQL is restarted as one should."""
    assert round.server is not None
    round.server.stop("fast")
    round.server.start()


def kill_server(round: Round, chance: random.Random) -> None:
    """PostgreSQL is killed, and is back after a while."""
    assert round.server is not None
    round.server.stop("immediate")
    back = threading.Timer(chance.uniform(0, 3), round.server.start)
    back.start()
    back.join()


def kill_node(round: Round, chance: random.Random) -> None:
    """A machine of the cluster is lost, or only its Ray; sooner or later another one joins."""
    cluster = round.cluster
    assert cluster is not None
    workers, nodes = set(round.search.workers()), {raylet: below(raylet) for raylet in cluster.raylets}
    busy = [raylet for raylet, there in nodes.items() if workers & set(there)]
    raylet = chance.choice(busy or cluster.raylets)
    cluster.raylets.remove(raylet)
    for pid in nodes[raylet] if chance.random() < 0.5 else [raylet]:
        send(pid, signal.SIGKILL)
    if chance.random() < 0.5:
        cluster.add_node()
    else:
        round.undo.append(cluster.add_node)


BLOWS = (
    Blow(kill_coordinator),
    Blow(kill_worker, ("check", "write", "trials", "epoch", "bundle", "refit")),
    Blow(interrupt),
    Blow(fill_disk, ("check", "write", "trials", "epoch", "bundle", "refit"), "sqlite"),
    Blow(kill_all),
    Blow(restart_server, ("check", "write", "trials", "epoch", "refit"), "postgres"),
    Blow(terminate),
    Blow(starve_worker, ("trials", "epoch", "bundle", "refit")),
    Blow(kill_coordinator, ("write",), "sqlite"),
    Blow(second_coordinator, ("trials", "epoch", "refit")),
    Blow(kill_server, ("check", "write", "trials", "epoch", "refit"), "postgres"),
    Blow(pause_coordinator),
    Blow(kill_dashboard, ("trials", "epoch", "refit")),
    Blow(two_at_once, ("start",)),
    Blow(kill_workers, ("trials", "epoch", "bundle", "refit")),
    Blow(starve_coordinator, ("check", "trials", "epoch", "refit")),
    Blow(stop_worker, ("trials", "epoch", "refit"), silence_s=SILENCE_S),
    Blow(interrupt_twice),
    Blow(kill_node, on_cluster=True),
)
"""A round gets one of them by turns."""

AGAIN = (Blow(kill_coordinator), Blow(interrupt), Blow(kill_all), Blow(kill_worker, ("trials", "refit")))
"""What may happen once more when the search goes on."""


def mount(folder: Path) -> None:
    """Give a folder a file system of its own, seen by this process and its children only."""
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=755", "tmpfs", str(folder)]
    subprocess.run(words, check=True, capture_output=True)


def resize(folder: Path, size: int) -> None:
    """Change the size in bytes of a file system made by `mount`."""
    words = ["mount", "-o", f"remount,size={max(size, 4096)}", str(folder)]
    subprocess.run(words, check=True, capture_output=True)


def leave(folder: Path, size: int, *, tries: int = 20) -> None:
    """Leave so many bytes of a file system made by `mount`.

    It refuses to be smaller than what is in it, which a search that goes on may have added to meanwhile.
    """
    for left in reversed(range(tries)):
        try:
            resize(folder, shutil.disk_usage(folder).used + size)
        except subprocess.CalledProcessError:
            if not left:
                raise
        else:
            return


def unmount(folder: Path) -> None:
    """Undo `mount`; what lay there is kept in the folder itself."""
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    subprocess.run(["umount", str(folder)], check=True, capture_output=True)
    folder.rmdir()
    kept.rename(folder)


def _second(round: Round) -> tuple[subprocess.Popen[bytes], Path]:
    log = round.search.folder / f"second-{round.search.starts}.log"
    return round.search.launch(log, f"{round.search.mark}second"), log


def _refused(round: Round) -> None:
    """A second coordinator must be refused with the first one's process id and host."""
    assert round.search.process is not None
    first = round.search.process.pid
    second, log = _second(round)
    code = second.wait(timeout=300)
    said = log.read_text(errors="replace")
    is_over = round.search.process.poll() is not None
    words = f"is being searched by process {first} on {socket.gethostname()}"
    if not is_over and (code != 1 or words not in said):
        round.faults.append((MISSED, f"a second coordinator ended with {code}: {said[-300:]}"))


def _limit_memory(pid: int, chance: random.Random) -> None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    except OSError:
        return  # it has just ended
    most = pages * resource.getpagesize() + chance.randint(0, 8) * ROOM
    _limit(pid, resource.RLIMIT_AS, most)


def _limit(pid: int, what: int, amount: int) -> None:
    try:
        resource.prlimit(pid, what, (amount, resource.prlimit(pid, what)[1]))
    except ProcessLookupError:
        return
