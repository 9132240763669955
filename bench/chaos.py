"""Kill a real search at random moments, in random ways, and look whether anything is lost.

    python bench/chaos.py --rounds 200
    python bench/chaos.py --quick

A round is a new study over the same small images: `tlauto search` runs until something happens to it
(`EVENTS`), is started again with the same command, and must then reach its total. What is in the
database is read with sqlite3 alone, before and after. Counted: trials that were complete before and are
not, or have another score (`chaos_lost`); trials above the total (`chaos_double`); processes of the
search that are left two seconds after its end (`chaos_orphans`); rounds whose total was missed, or that
ended in a traceback (`chaos_totals_missed`). The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

TRIALS = 8
AGAIN = 4
"""Starts of the same command that a round may take."""

UNCOUNTED = ("interrupted", "out of time")
ROOM = 64 * 1024
"""Bytes that a search may still write, or allocate, when disk or memory is full."""


@dataclass
class Round:
    """One study and what was done to it.

    Attributes:
        seen: score of each complete trial, by number, as read at any time.
    """

    study: str
    folder: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    seen: dict[int, float] = field(default_factory=dict)
    lost: int = 0
    orphans: int = 0
    output: str = ""

    @property
    def database(self) -> Path:
        """The workspace's file."""
        return self.folder / "runs" / "tlauto.db"

    def start(self) -> None:
        """Begin or go on."""
        command = [
            sys.executable, "-m", "tlauto", "search", "--data", "images", "--out", "runs",
            "--study", self.study, "--trials", str(TRIALS), "--preset", "fast", "--cold", "--ensemble", "1",
            "--backbones", "timm:test_resnet.r160_in1k", "--no-pretrained", "--offline",
            "--devices", "cpu", "--workers", "2",
        ]  # fmt: skip
        log = (self.folder / f"{self.study}.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def look(self) -> None:
        """Compare what is complete with what was before."""
        now = complete_trials(self.database, self.study)
        for number, score in self.seen.items():
            self.lost += now.get(number) != score
        self.seen |= now

    def wait_for(self, moment: float) -> bool:
        """Wait so many seconds after the first trial began. Returns: whether the search still runs."""
        assert self.process is not None
        until = None
        while self.process.poll() is None:
            if until is None and begun(self.database, self.study):
                until = time.monotonic() + moment
            if until is not None and time.monotonic() >= until:
                return True
            time.sleep(0.05)
        return False


def kill_coordinator(round: Round, chance: random.Random) -> None:
    """The machine forgets the coordinator."""
    assert round.process is not None
    round.process.kill()


def kill_worker(round: Round, chance: random.Random) -> None:
    """A worker is killed, as by the system when memory is short; the search goes on."""
    workers = of_search(round, "tlauto.worker")
    if workers:
        _signal(chance.choice(workers), signal.SIGKILL)


def kill_all(round: Round, chance: random.Random) -> None:
    """The power fails."""
    for pid in of_search(round):
        _signal(pid, signal.SIGKILL)


def interrupt(round: Round, chance: random.Random) -> None:
    """Ctrl-C."""
    assert round.process is not None
    round.process.send_signal(signal.SIGINT)


def terminate(round: Round, chance: random.Random) -> None:
    """A scheduler ends the job."""
    assert round.process is not None
    round.process.terminate()


def fill_disk(round: Round, chance: random.Random) -> None:
    """The coordinator can write no file beyond what it is, as on a full disk."""
    assert round.process is not None
    size = round.database.stat().st_size if round.database.exists() else 0
    _limit(round.process.pid, resource.RLIMIT_FSIZE, max(size // 4, ROOM))


def take_memory(round: Round, chance: random.Random) -> None:
    """A worker gets no more memory."""
    workers = of_search(round, "tlauto.worker")
    if workers:
        pid = chance.choice(workers)
        _limit(pid, resource.RLIMIT_AS, _address_space(pid) + ROOM)


def kill_dashboard(round: Round, chance: random.Random) -> None:
    """The dashboard reads beside the search, and is killed."""
    dashboard = subprocess.Popen(
        [sys.executable, "-m", "tlauto", "dashboard", "--out", "runs", "--port", "0"],
        cwd=round.folder, env=round.env, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    time.sleep(chance.uniform(1, 6))
    dashboard.kill()
    dashboard.wait()


EVENTS: tuple[Callable[[Round, random.Random], None], ...] = (
    kill_coordinator, kill_worker, kill_all, interrupt, terminate, fill_disk, take_memory, kill_dashboard,
)  # fmt: skip


def main() -> None:
    args = parse()
    totals = {"chaos_lost": 0, "chaos_double": 0, "chaos_orphans": 0, "chaos_totals_missed": 0}
    with workspace(args.folder) as folder:
        write_images(folder / "images")
        for number in range(args.rounds):
            chance = random.Random(f"{args.seed}/{number}")
            event = EVENTS[number % len(EVENTS)]
            found = play(f"round-{number}", folder, event, chance)
            for name, count in found.items():
                totals[name] += count
            trouble = ", ".join(f"{name} {count}" for name, count in found.items() if count)
            print(f"{number:>4}  {event.__name__:<17} {trouble or 'ok'}", flush=True)
    print(json.dumps({**totals, "rounds": args.rounds, "cores": os.cpu_count()}))


def play(
    study: str, folder: Path, event: Callable[[Round, random.Random], None], chance: random.Random
) -> dict[str, int]:
    """One round. Returns: what went wrong, by name."""
    env = {
        **os.environ,
        "TLAUTO_CACHE": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "TLAUTO_CHAOS": study,
    }
    round = Round(study, folder, env)
    code = None
    for attempt in range(AGAIN):
        round.start()
        if attempt == 0 and round.wait_for(chance.uniform(0, 4)):
            round.look()
            event(round, chance)
        code = finish(round)
        round.look()
        if code == 0:
            break
    counted = counted_trials(round.database, study)
    log = (folder / f"{study}.log").read_text(errors="replace")
    missed = code != 0 or counted < TRIALS or "Traceback" in log
    if missed:
        print(f"      exit code {code}, {counted} of {TRIALS} trials:\n{log[-1500:]}", file=sys.stderr)
    return {
        "chaos_lost": round.lost, "chaos_double": max(0, counted - TRIALS), "chaos_orphans": round.orphans,
        "chaos_totals_missed": int(missed),
    }  # fmt: skip


def finish(round: Round) -> int | None:
    """Wait for the search's end; what is left of it two seconds later is counted and killed."""
    assert round.process is not None
    try:
        code: int | None = round.process.wait(timeout=300)
    except subprocess.TimeoutExpired:
        round.process.kill()
        code = None
    deadline = time.monotonic() + 2
    while (left := of_search(round)) and time.monotonic() < deadline:
        time.sleep(0.1)
    round.orphans += len(left)
    for pid in left:
        _signal(pid, signal.SIGKILL)
    return code


# --- the database, read without tlauto --------------------------------------------------------------


def rows(database: Path, query: str, study: str) -> list[tuple[object, ...]]:
    """Rows of a query about one study; none before its tables are there."""
    if not database.exists():
        return []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
        try:
            return connection.execute(query, (study,)).fetchall()
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return []
            raise


TRIALS_OF = "FROM trials t JOIN studies s USING (study_id) {} WHERE s.study_name = ?"


def begun(database: Path, study: str) -> bool:
    """Whether a trial is running or has ended."""
    return bool(rows(database, f"SELECT 1 {TRIALS_OF.format('')} AND t.state != 'WAITING'", study))


def complete_trials(database: Path, study: str) -> dict[int, float]:
    """Score of each complete trial."""
    query = f"SELECT t.number, v.value {TRIALS_OF.format('JOIN trial_values v USING (trial_id)')}"
    found = rows(database, f"{query} AND t.state = 'COMPLETE'", study)
    return {int(str(number)): float(str(value)) for number, value in found}


def counted_trials(database: Path, study: str) -> int:
    """Trials that ended by themselves and were not tried again."""
    join = "JOIN trial_user_attributes a USING (trial_id)"
    facts = rows(database, f"SELECT t.number, a.key, a.value_json {TRIALS_OF.format(join)}", study)
    kinds = {number: json.loads(str(value)) for number, key, value in facts if key == "error_kind"}
    again = {json.loads(str(value)) for _, key, value in facts if key == "retry_of"}
    ended = rows(
        database, f"SELECT t.number {TRIALS_OF.format('')} AND t.state NOT IN ('WAITING', 'RUNNING')", study
    )
    return sum(kinds.get(n) not in UNCOUNTED and n not in again for (n,) in ended)


# --- processes --------------------------------------------------------------------------------------


def of_search(round: Round, part: str = "") -> list[int]:
    """Living processes that were started by a round's search, with `part` in their command (Linux)."""
    found, mark = [], f"TLAUTO_CHAOS={round.study}\0".encode()
    for entry in Path("/proc").iterdir():
        try:
            is_ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes() + b"\0"
            is_zombie = is_ours and (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if is_ours and not is_zombie and part.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _limit(pid: int, what: int, amount: int) -> None:
    try:
        resource.prlimit(pid, what, (amount, amount))
    except ProcessLookupError:
        return


def _address_space(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return resource.RLIM_INFINITY - ROOM


# --- the workspace ----------------------------------------------------------------------------------


@contextmanager
def workspace(folder: str | None) -> Iterator[Path]:
    """A folder of the user's, or one that is deleted at the end."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield Path(folder).resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


def write_images(folder: Path) -> None:
    """Forty noisy images of two colours."""
    chance = np.random.default_rng(0)
    for channel in range(2):
        (folder / f"colour{channel}").mkdir(parents=True, exist_ok=True)
        for i in range(20):
            pixels = chance.normal(120, 60, (48, 48, 3))
            pixels[..., channel] += 25
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                folder / f"colour{channel}" / f"{i}.png"
            )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--quick", action="store_const", dest="rounds", const=len(EVENTS), help="one of each")
    parser.add_argument("--folder", help="workspace that is kept")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
