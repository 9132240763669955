"""Strike a real search at random moments, in random ways, and look whether anything is lost.

    python bench/chaos.py --rounds 200
    python bench/chaos.py --quick
    python bench/chaos.py --only-round 17 --seed 0

A round is a new study over the same small images: `tlauto search` runs until something happens to it
(`blows.py`), sometimes a second time when it goes on, and the same command must then reach its total.
The database is read with plain SQL (`ledger.py`), the processes in /proc. Counted: trials that had
ended and are gone or changed, or were left unfinished (`chaos_lost`); trials above the total, or run
again though they had a result (`chaos_double`); processes of the search that outlive it by more than
`LEFT_S` (`chaos_orphans`); rounds whose total was missed, or with a traceback, an unexpected exit code
or no whole model at their end (`chaos_totals_missed`). Every third round has its study on a PostgreSQL
server, where one can be started; where Ray is installed, the trials of some run on a cluster that loses
nodes, and what is left there counts too. A round can be repeated by its number and seed, up to the timing
of the machine; a failing one keeps its folder. Linux only. The last line of standard output is one JSON
object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import postgres_server
import ray_cluster
from blows import AGAIN, BLOWS, Blow, Round, mount, unmount
from ledger import DOUBLE, LOST, MISSED, Fault, changes, faults
from moments import MOMENTS, wait_for_moment
from searches import BACKBONES, LONGEST_S, Search, environment, gone_after, marked, run_by, send, write_images

TRIALS = 8
FIRST = {
    "probe": [(name, "feature_extraction", "linear") for name in BACKBONES],
    "default": [(BACKBONES[0], "partial", "linear")],
}
"""What each search begins with."""

STARTS = 6
"""Starts of the same command that a round may take."""

LEFT_S = 10.0
"""Seconds in which what a killed search leaves behind must have ended."""

ORPHANS = "chaos_orphans"
FIGURES = (LOST, DOUBLE, ORPHANS, MISSED)
QUICK_S = 220.0
TRACEBACK = "Traceback (most recent call last)"
OURS = "in main\n"
"""Stands in a traceback unless Python itself, or the import of the command line, was interrupted."""


@dataclass(frozen=True)
class Outcome:
    """What is to be said of a round."""

    number: int
    line: str
    faults: list[Fault]


@dataclass
class Chaos:
    """What the rounds share. Each lane, of which several may run at once, has a server of its own."""

    folder: Path
    seed: int
    can_mount: bool
    lanes: threading.local = field(default_factory=threading.local)
    servers: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def play(self, number: int) -> Outcome:
        """One round."""
        chance = random.Random(f"{self.seed}/{number}")
        blow = BLOWS[number % len(BLOWS)]
        on_server = blow.storage == "postgres" or (blow.storage is None and number % 3 == 0)
        server = self._server() if on_server else None
        if blow.storage == "postgres" and server is None:
            return Outcome(number, f"{number:>4}  {blow.name:<20} left out: no PostgreSQL here", [])
        if blow.on_cluster and not ray_cluster.is_installed():
            return Outcome(number, f"{number:>4}  {blow.name:<20} left out: no Ray here", [])
        with contextlib.ExitStack() as ending:
            cluster = ending.enter_context(ray_cluster.running_cluster()) if blow.on_cluster else None
            round, started = self._prepare(number, blow, server, cluster, chance), time.monotonic()
            if round.disk:
                ending.callback(unmount, round.disk)
            blows = [blow, *([chance.choice(AGAIN)] if chance.random() < 0.4 else [])]
            if cluster:
                blows.reverse()  # most searches outlive the loss of a node, so nothing would come after it
            when = _play(round, blows, chance)
            took_s = time.monotonic() - started
        if cluster:
            round.faults += end(cluster.left_after(LEFT_S), "of the Ray cluster")
        kept = f"; kept in {round.search.folder}" if round.faults else ""
        if not round.faults:
            shutil.rmtree(round.search.folder)
        where = f"{'postgres' if server else 'sqlite'}{' ray' if cluster else ''}"
        line = (
            f"{number:>4}  seed {self.seed}  {where:<13}{when:<60} {round.search.starts} starts "
            f"{took_s:>5.1f} s  {', '.join(sorted({name for name, _ in round.faults})) or 'ok'}{kept}"
        )
        return Outcome(number, line, round.faults)

    def _prepare(
        self,
        number: int,
        blow: Blow,
        server: postgres_server.Server | None,
        cluster: ray_cluster.Cluster | None,
        chance: random.Random,
    ) -> Round:
        folder = self.folder / f"round-{number}"
        folder.mkdir(parents=True)
        cache = folder / "cache" if chance.random() < 0.3 else self.folder / "cache"
        options = (
            "--trials", str(TRIALS), "--preset", "fast", "--ensemble", str(chance.choice((1, 1, 2))),
            "--backbones", ",".join(BACKBONES), "--strategies", "feature_extraction,partial",
            "--heads", "linear,mlp", "--workers", str(chance.choice((1, 1, 2))),
        )  # fmt: skip
        silence = {"TLAUTO_SILENCE": str(blow.silence_s), "PYTHONFAULTHANDLER": "1"}
        search = Search(folder, self.folder / "images", options, env={**environment(cache), **silence})
        if server:
            search.storage = server.make_database(f"round-{number}-{time.time_ns()}")
        if cluster:
            search.env |= cluster.env
            on_it = ("--executor", "ray", "--ray-address", cluster.address, "--executor-option", "cpus=1")
            search.options = (*options, *on_it)
        round = Round(search, server, cluster)
        if blow.name == "fill_disk" and self.can_mount:
            mount(search.runs)
            round.disk = search.runs
        return round

    def _server(self) -> postgres_server.Server | None:
        if not hasattr(self.lanes, "server"):
            can = postgres_server.is_installed()
            self.lanes.server = self.servers.enter_context(postgres_server.running_server()) if can else None
        server: postgres_server.Server | None = self.lanes.server
        return server


def _play(round: Round, blows: list[Blow], chance: random.Random) -> str:
    """Start the search until it is through, with a blow at each start. Returns: which ones, and when."""
    search, seen, struck = round.search, {}, []  # type: Search, dict[int, object], list[str]
    code: int | None = None
    for _ in range(STARTS):
        blow = blows.pop(0) if blows else None
        search.start()
        if blow:
            moment, is_on = wait_for_moment(search, blow.moments or ("write", *MOMENTS), chance)
            struck.append(f"{blow.name} {moment}" + ("" if is_on else " (over)"))
            if is_on:
                blow.strike(round, chance)
        code = search.wait()
        look_at_end(round, code)
        while round.undo:
            round.undo.pop()()
        now = search.ledger.trials()
        round.faults += changes(seen, now)
        seen |= now
        if code == 0 and not search.has_said("the refit failed"):
            break
    if code == 0:
        round.faults += faults(seen, total=TRIALS, first=FIRST) + at_end(search)
    else:
        round.faults.append(
            (MISSED, f"after {STARTS} starts the exit code is {code}: {search.said()[-300:]}")
        )
    return ", ".join(struck)


def look_at_end(round: Round, code: int | None, *, left_s: float = LEFT_S) -> None:
    """Note what is wrong with what a start has left behind: processes, tracebacks, an exit code."""
    search = round.search
    _, left = gone_after(search.mark, left_s)
    if round.cluster:
        left += round.cluster.left_after(left_s, ray_cluster.ACTOR)
    round.faults += end(left, f"of start {search.starts}")
    said = search.said()
    if 130 in round.codes and _never_began(said, code):
        round.codes.clear()
        return
    if TRACEBACK in said and (OURS in said or "KeyboardInterrupt" not in said):
        round.faults.append((MISSED, f"start {search.starts} ended in a traceback: {said[-600:]}"))
    if code not in {0, 1, *round.codes}:
        what = f"had to be killed after {LONGEST_S:.0f} s" if code is None else f"ended with code {code}"
        round.faults.append((MISSED, f"start {search.starts} {what}: {said[-600:]}"))
    if code == 1 and "error: " not in said:
        round.faults.append(
            (MISSED, f"start {search.starts} ended with code 1 and no sentence: {said[-300:]}")
        )
    round.codes.clear()


def _never_began(said: str, code: int | None) -> bool:
    """Whether Ctrl-C ended Python while it started: nothing of a command's has run then, or could answer."""
    is_pythons = said.startswith((TRACEBACK, "Could not import runpy")) and OURS not in said
    return code in (1, -signal.SIGINT) and is_pythons and said.rstrip().endswith("KeyboardInterrupt")


def end(left: list[int], whose: str) -> list[Fault]:
    """End processes that should have ended. Returns: a fault for each."""
    found = [(ORPHANS, f"process {pid} {whose} is left: {run_by(pid)}") for pid in left]
    for pid in left:
        send(pid, signal.SIGKILL)
    return found


def at_end(search: Search) -> list[Fault]:
    """What is wrong with a search that says that it has finished, its trials aside."""
    found: list[Fault] = []
    if search.ledger.search() != ("finished", None):
        found.append((MISSED, f"the search ended and is recorded as {search.ledger.search()}"))
    if search.storage is None and (said := search.ledger.rows("PRAGMA integrity_check")) != [("ok",)]:
        found.append((LOST, f"the database is damaged: {said}"))
    models = search.ledger.models()
    if not models or models[0][1] != "test":
        return [*found, (MISSED, "no model was tested")]
    folder = Path(models[0][0])
    try:
        about = json.loads((folder / "tlauto.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != about["sha256"] or about["evaluated_on"] != "test":
            found.append((MISSED, f"{folder} is not the model that was tested"))
    except (OSError, ValueError, KeyError) as error:
        found.append((MISSED, f"the model in {folder} is not whole: {error}"))
    return found


def main() -> None:
    args = parse()
    can_mount = _mounts_of_our_own()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="tlauto-chaos-")).resolve()
    write_images(folder / "images")
    chaos, totals, until = (
        Chaos(folder, args.seed, can_mount),
        Counter[str](),
        time.monotonic() + args.seconds,
    )
    numbers = range(args.rounds) if args.only_round is None else [args.only_round]

    def play(number: int) -> Outcome | None:
        return chaos.play(number + args.first) if time.monotonic() < until else None

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with chaos.servers, ThreadPoolExecutor(args.parallel) as pool:
        try:
            for outcome in pool.map(play, numbers):
                if outcome is None:
                    continue
                print(outcome.line, flush=True)
                for name, what in outcome.faults:
                    print(f"      {name}: {what}", file=sys.stderr, flush=True)
                totals.update(["rounds", *_counted(outcome.faults)])
        except KeyboardInterrupt:
            _leave_nothing(chaos)
    if not sum(totals[name] for name in FIGURES) and not args.folder:
        shutil.rmtree(folder)
    print(json.dumps({**{name: totals[name] for name in FIGURES}, "rounds": totals["rounds"]}))


def _leave_nothing(chaos: Chaos) -> NoReturn:
    """End in the middle of the rounds, with all that they started."""
    chaos.servers.close()  # takes a while, in which rounds go on
    for pid in marked(str(chaos.folder)):
        send(pid, signal.SIGKILL)
    os._exit(130)


def _counted(found: list[Fault]) -> list[str]:
    """Each fault's figure; a round misses its total once, whatever else is wrong with it."""
    names = [name for name, _ in found]
    return [name for name in names if name != MISSED] + [MISSED] * (MISSED in names)


def _mounts_of_our_own() -> bool:
    """Whether file systems can be mounted here; nobody else sees them, and they go with this process."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    if "CHAOS_UNSHARED" not in os.environ:
        words = ["unshare", "--mount", "sh", "-c"]
        done = subprocess.run([*words, "mount -t tmpfs tmpfs /mnt"], capture_output=True, check=False)
        if done.returncode:
            return False
        os.environ["CHAOS_UNSHARED"] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--only-round", type=int, metavar="N", help="repeat this one")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="rounds at a time")
    parser.add_argument("--folder", help="an empty folder that is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="no round begins after so many")
    parser.add_argument(
        "--quick", action="store_true", help=f"one round of each kind, begun within {QUICK_S:.0f} s"
    )
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds = len(BLOWS), QUICK_S
    if args.only_round is not None:
        args.first = 0
    return args


if __name__ == "__main__":
    main()
