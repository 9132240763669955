"""What the processes of a search cost: two workers against one, Ctrl-C, a kill, and others that read along.

    python bench/processes.py
    python bench/processes.py --quick --only ctrl_c,kill

Real searches with small random networks on the CPU. `speedup_2`: seconds from the first trial's start to
the last one's end with one worker, over those with two; the same trials (seed, parameters, scores are
compared), one thread a worker. `speedup_2_apart`: the same where two searches of one worker each, with
nothing in common, share the trials at the same time: what the machine gives. Both are medians of runs by
turns. `ctrl_c_s`: the longest time from SIGINT to the end of the command with no process of it left, struck
at several moments; `bundle held up` stops the worker that writes the bundle, so it is the longest that a
search waits for one. `kill_to_count_s`: from `kill -9` of the coordinator until the same command, started
at once, has the trials that ran at the epoch again at which they were; `kill_bound_s` beside it is start-up
(from the command to a first trial's first epoch) and one epoch. `readers_failed_trials` and
`readers_lock_errors`: of a search of cached trials that four readers and the Optuna dashboard poll, on
SQLite and, where it is installed, on PostgreSQL. Linux only. The last line of standard output is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import postgres_server
from moments import MOMENTS, wait_for
from readers import cached_trials, read_a_search
from searches import BACKBONES, Search, environment, gone_after, marked, send, write_images

STRUCK = ("start", "check", "trials", "epoch", "bundle", "bundle held up", "refit")
"""Moments of Ctrl-C."""

PARTS = ("speedup", "ctrl_c", "kill", "readers")

EQUAL = (
    "--preset", "fast", "--ensemble", "1", "--backbones", BACKBONES[0], "--strategies", "full",
    "--heads", "linear", "--set", "freeze.full.layer_decay=0.8", "--set", "optim.name=adamw",
    "--set", "optim.warmup=0.1", "--set", "optim.adamw.lr=0.0001", "--set", "optim.adamw.weight_decay=0.01",
    "--set", "finetune.backbone_lr=0.01", "--set", "finetune.batch_size=16",
    "--set", "finetune.train_mode=false", "--set", "augment.level=light",
)  # fmt: skip
"""A search in which nothing is left to choose, so that its trials differ by their seeds alone."""

SHARED = """
import sys, tlauto.devices
tlauto.devices.available_cores = lambda: {cores}
from tlauto.cli import main
main(sys.argv[1:])
"""
"""`tlauto` that shares so many cores among its workers, whatever the machine has."""


def main() -> None:
    args = parse()
    folder = Path(tempfile.mkdtemp(prefix="tlauto-processes-"))
    figures: dict[str, object] = {}
    try:
        for part in args.only:
            figures |= {"speedup": speedup, "ctrl_c": ctrl_c, "kill": kill, "readers": readers}[part](
                folder / part, args
            )
    finally:
        for pid in marked(str(folder)):
            send(pid, signal.SIGKILL)
        shutil.rmtree(folder)
    print(json.dumps({**figures, "cores": os.cpu_count()}))


# --- two workers against one ----------------------------------------------------------------------------


def speedup(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """The same trials with one worker, with two, and as two searches at once that share nothing, by turns."""
    images = write_images(folder / "images", per_class=args.images // 2)
    two, apart = [], []
    for again in range(args.repeats):
        one, scores = _trained(folder / f"one-{again}", images, args.trials, workers=1)
        seconds, same = _trained(folder / f"two-{again}", images, args.trials, workers=2)
        if scores != same:
            sys.exit(f"the trials were not the same with two workers as with one: {scores}, {same}")
        shared, _ = _trained(folder / f"apart-{again}", images, args.trials // 2, workers=1, searches=2)
        two.append(one / seconds)
        apart.append(one / shared)
        print(f"{args.trials} trials  one {one:.1f} s, two {seconds:.1f} s, apart {shared:.1f} s", flush=True)
    return {
        "speedup_2": round(statistics.median(two), 3), "speedup_trials": args.trials,
        "speedup_2_each": [round(ratio, 2) for ratio in two],
        "speedup_2_apart": round(statistics.median(apart), 3),
        "speedup_2_apart_each": [round(ratio, 2) for ratio in apart],
    }  # fmt: skip


def _trained(
    folder: Path, images: Path, trials: int, *, workers: int, searches: int = 1
) -> tuple[float, list[tuple[str, float | None]]]:
    """Seconds that equal trials take in searches at once, and the states and scores of the first one's."""
    running = []
    for i in range(searches):
        search = make(folder / str(i), images, folder.parent / "cache", *EQUAL)
        search.program = ("-c", SHARED.format(cores=workers))
        search.options = (*search.options, "--trials", str(trials), "--workers", str(workers))
        search.start()
        running.append(search)
    for search in running:
        require(search.wait() == 0, search)
    ended = running[0].ledger.trials().values()
    return max(search.ledger.trial_seconds() for search in running), [(t.state, t.score) for t in ended]


# --- Ctrl-C ---------------------------------------------------------------------------------------------


def ctrl_c(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Seconds from Ctrl-C to the end, at several moments of searches."""
    images, chance = write_images(folder / "images"), random.Random(0)
    taken: dict[str, list[float]] = {}
    for moment in args.moments.split(","):
        for again in range(args.repeats):
            search = make(folder / f"{moment}-{again}", images, folder / "cache", *MIXED)
            seconds = _interrupted(search, moment, chance)
            if seconds is not None:
                taken.setdefault(moment, []).append(seconds)
        shown = ", ".join(f"{seconds:.2f}" for seconds in taken.get(moment, [])) or "over before it came"
        print(f"Ctrl-C  {moment:<15} {shown}", flush=True)
    every = [seconds for each in taken.values() for seconds in each]
    return {
        "ctrl_c_s": round(max(every), 2), "ctrl_c_median_s": round(statistics.median(every), 2),
        "ctrl_c_by_moment_s": {moment: round(max(each), 2) for moment, each in taken.items()},
    }  # fmt: skip


MIXED = (
    "--preset", "fast", "--ensemble", "1", "--backbones", ",".join(BACKBONES), "--trials", "8",
    "--strategies", "feature_extraction,partial", "--heads", "linear", "--workers", "2",
)  # fmt: skip


def _interrupted(search: Search, moment: str, chance: random.Random) -> float | None:
    process = search.start()
    what, delay = MOMENTS[moment.partition(" ")[0]]
    if not wait_for(search, what):
        return None
    if moment == "bundle held up":
        for pid in search.workers():
            send(pid, signal.SIGSTOP)
    else:
        time.sleep(chance.uniform(0, delay))
    if not search.is_running():
        return None
    started = time.monotonic()
    search.signal(signal.SIGINT)
    process.wait()
    ended = time.monotonic() - started
    return ended + gone_after(search.mark, 60)[0]


# --- kill -9 --------------------------------------------------------------------------------------------


def kill(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Seconds from a kill of the coordinator until the trials that ran are where they were."""
    images, chance = write_images(folder / "images", per_class=args.images // 2), random.Random(0)
    taken, starts, epochs = [], [], []
    for again in range(args.repeats):
        search = make(folder / f"kill-{again}", images, folder / "cache", *EQUAL)
        search.options = (*search.options, "--trials", "6", "--workers", str(args.kill_workers))
        begun = time.monotonic()
        process = search.start()
        wait_for(search, lambda search: bool(search.ledger.epochs()))
        first = next(iter(search.ledger.epochs().values()))
        starts.append(time.monotonic() - begun - first[1])
        wait_for(search, lambda search: max(search.ledger.running().values(), default=0) >= 2)
        time.sleep(chance.uniform(0, first[1]))
        process.kill()
        killed, process_ended = time.monotonic(), process.wait()
        before = search.ledger.running()
        if process_ended != -signal.SIGKILL or not before:
            continue  # nothing ran any more
        search.start()
        taken.append(_again(search, before, killed))
        epochs += [seconds for _, seconds in search.ledger.epochs().values()]
        shown = ", ".join(f"trial {number} at epoch {epoch}" for number, epoch in before.items())
        print(f"kill -9  {shown}: {taken[-1]:.2f} s (start-up {starts[-1]:.2f} s)", flush=True)
        search.signal(signal.SIGINT)
        search.wait()
    start, epoch = statistics.median(starts), statistics.median(epochs)
    return {
        "kill_to_count_s": round(max(taken), 2), "kill_to_count_median_s": round(statistics.median(taken), 2),
        "startup_s": round(start, 2), "epoch_s": round(epoch, 2), "kill_bound_s": round(start + epoch, 2),
    }  # fmt: skip


def _again(search: Search, before: dict[int, int], killed: float) -> float:
    """Seconds from the kill until each trial that ran is at the epoch again at which it was."""
    at: dict[int, float] = {}
    while len(at) < len(before):
        require(search.is_running(), search)
        epochs, now = search.ledger.epochs(), time.monotonic()
        for number, again in search.ledger.retries().items():
            reached = {epoch: seconds for (n, epoch), (_, seconds) in epochs.items() if n == again}
            if number not in before or number in at or not reached:
                continue
            first = min(reached)
            if first > before[number]:
                at[number] = now - reached[first]  # it went on right behind that epoch
            elif max(reached) >= before[number]:
                at[number] = now
        time.sleep(0.02)
    return max(at.values()) - killed


# --- readers --------------------------------------------------------------------------------------------


def readers(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Failed trials and errors of locks while others read."""
    images = write_images(folder / "images")
    figures: dict[str, object] = {}
    search = make(folder / "sqlite", images, folder / "cache", *cached_trials(args.cached))
    figures |= _read(search, "")
    if not postgres_server.is_installed():
        return {**figures, "readers_failed_trials_postgres": None, "readers_lock_errors_postgres": None}
    with postgres_server.running_server() as server:
        search = make(folder / "postgres", images, folder / "cache", *cached_trials(args.cached))
        search.storage = server.make_database("readers")
        return figures | _read(search, "_postgres")


def _read(search: Search, suffix: str) -> dict[str, object]:
    found = read_a_search(search)
    print(f"readers{suffix}  {found.trials} trials, {found.reads} reads", flush=True)
    for error in found.errors:
        print(f"      {error}", file=sys.stderr, flush=True)
    return {
        f"readers_failed_trials{suffix}": found.failed, f"readers_lock_errors{suffix}": len(found.errors),
        f"readers_trials{suffix}": found.trials, f"readers_reads{suffix}": found.reads,
    }  # fmt: skip


def make(folder: Path, images: Path, cache: Path, *options: str) -> Search:
    """A search in a new folder."""
    folder.mkdir(parents=True)
    return Search(folder, images, options, env=environment(cache))


def require(is_fine: object, search: Search) -> None:
    """End this program with what a search said, unless all is fine."""
    if not is_fine:
        sys.exit(f"the search ended too early: {search.said()[-1500:]}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure: " + ", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="fewer trials and moments, under five minutes")
    parser.add_argument("--trials", type=int, help="equal trials of the speed-up")
    parser.add_argument("--images", type=int, help="of the speed-up and of the kill")
    parser.add_argument("--repeats", type=int, help="of the speed-up, each moment of Ctrl-C, and the kill")
    parser.add_argument("--moments", default=",".join(STRUCK), help="of Ctrl-C")
    parser.add_argument("--cached", type=int, help="trials that are read")
    parser.add_argument("--kill-workers", type=int, default=1, help="of the search that is killed")
    args = parser.parse_args()
    defaults = {"trials": (12, 6), "images": (200, 100), "repeats": (3, 1), "cached": (200, 30)}
    for name, (full, quick) in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, quick if args.quick else full)
    args.only = [part for part in args.only.split(",") if part]
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"no part '{unknown.pop()}'; there are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    main()
