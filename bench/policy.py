"""Simulated searches: tlauto's own policy against Optuna's, over recorded trials.

    python bench/policy.py                       # bench/curves, 100 seeds
    python bench/policy.py --quick               # 10 seeds, to a quarter of the budget
    python bench/policy.py --until 0.25 --vary allocation.CURIOSITY=0.0,0.02,0.05

Every policy starts from the same table of real trials (`record_curves.py`) and pays the recorded seconds
of whatever it lets run, a backbone's first pass over the images included. tlauto is its real coordinator
loop (`replay.py`) as a search with `--trials` runs it, without refits and bundles at no cost; the others
are TPE with Hyperband, TPE alone and random search, as Optuna's documentation shows them (`opponents.py`).
The budget is what `--trials` trials of random search cost on average, where strategies are equally
likely whatever their shares in the table, and one pass of every backbone over the images.

At a share of the budget a policy is asked for the trial that it would ship. Its regret is the best test
score in the table minus that trial's, over the best minus the median configuration's; without a trial
yet it is 1. A trial that was stopped early counts with the test score of its whole course. Scores are of
few images, so that the best of a table was lucky on its test part: the last two rows show the regret of
whoever has seen a whole table for nothing and ships the trial with the best validation score, or the frozen
one with the best cross-validated score (of equal ones, their mean). A simulated search that has used up all
recorded trials of the strategy it wants ends there (column `ended`): with many of those the table is too
small for the budget.

`--set NAME=VALUE` changes a constant of tlauto's policy by its dotted name (`rungs.FIRST=4`); `--vary
NAME=VALUE,VALUE` compares values of one. A module that imported the constant by name keeps its own.

Prints tables for bench/RESULTS.md; the last line of standard output is one JSON object:

    policy_regret_ratio    tlauto's mean regret over TPE+Hyperband's at 25 % of the budget
    policy_regret_ratio_low, policy_regret_ratio_high
                           its 95 % interval, by bootstrap over the seeds
    regret all seen by ... mean over the tables of what has seen everything
    ended                  simulated searches that ran out of recorded trials, by policy
    simulations_a_minute   simulated searches, all processes together
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import opponents
import replay
from curves import Recorded, Table, load
from opponents import OPPONENTS

from tlauto.devices import available_cores
from tlauto.errors import ConfigError, TlautoError

SHARES = (0.25, 0.5, 1.0)
"""Parts of the budget at which policies are asked."""

OURS, RIVAL = "tlauto", "tpe+hyperband"
RESAMPLES = 2000

Settings = tuple[tuple[str, Any], ...]
"""Constants of tlauto's policy that are changed: dotted names and values."""


@dataclass(frozen=True)
class Job:
    """One simulated search; `settings` are for tlauto alone."""

    table: str
    policy: str
    seed: int
    trials: float
    until: float
    settings: Settings = ()


@dataclass(frozen=True)
class Outcome:
    """What a simulated search came to: its regret at each of `SHARES`, as far as it went."""

    job: Job
    regrets: tuple[float, ...]
    trials: int
    is_exhausted: bool


Outcomes = Mapping[str, Mapping[str, Sequence[Outcome]]]
"""By policy, then by table, in order of seeds."""


def main() -> None:
    args = parse()
    try:
        print(json.dumps(compare(args)))
    except TlautoError as error:
        sys.exit(f"error: {error}")


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run all simulations, print the tables and return the figures."""
    tables = find_tables(args)
    policies = variants(args)
    for settings in policies.values():
        with applied(settings):  # refuses a wrong name before anything runs
            pass
    jobs = [
        Job(str(table), name, seed, args.trials, args.until, settings)
        for name, settings in policies.items() for table in tables for seed in range(args.seeds)
    ]  # fmt: skip
    started = time.perf_counter()
    found: dict[str, dict[str, list[Outcome]]] = {}
    # Fresh processes: a fork of one that has loaded torch may hang.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as processes:
        for outcome in processes.map(simulate, jobs, chunksize=max(1, len(jobs) // args.workers // 8)):
            name = Path(outcome.job.table).name.partition(".")[0]
            found.setdefault(outcome.job.policy, {}).setdefault(name, []).append(outcome)
    minutes = (time.perf_counter() - started) / 60
    shares = [share for share in SHARES if share <= args.until]
    show(found, shares, args)
    return {
        **figures(found, shares),
        **show_all_seen(tables),
        "seeds": args.seeds,
        "tables": {name: len(load(path).rows) for name, path in zip(found[OURS], tables, strict=True)},
        "budget_trials": args.trials,
        "ended": {policy: sum(o.is_exhausted for o in every(tables)) for policy, tables in found.items()},
        "simulations_a_minute": round(len(jobs) / minutes, 1),
    }


def find_tables(args: argparse.Namespace) -> list[Path]:
    """The tables of a folder. Raises: ConfigError when there are none."""
    tables = sorted(Path(args.curves).glob("*.jsonl.gz"))
    if not tables:
        raise ConfigError(
            f"no tables in {args.curves}; 'python bench/record_curves.py --help' shows how to record"
        )
    return tables


def variants(args: argparse.Namespace) -> dict[str, Settings]:
    """Policies by name with the constants they change: tlauto, variants of it, the others."""
    base = tuple(constant(text) for text in args.set)
    found: dict[str, Settings] = {OURS: base}
    for text in args.vary:
        name, _, listed = text.partition("=")
        name, values = constant(f"{name}=[{listed}]" if listed else text)
        found |= {f"{OURS} {name}={value}": (*base, (name, value)) for value in values}
    return found | dict.fromkeys(OPPONENTS, ())


def constant(text: str) -> tuple[str, Any]:
    """`MODULE.NAME=VALUE` with its value as JSON. Raises: ConfigError when it is not that."""
    name, _, value = text.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ConfigError(f"'{text}' is not MODULE.NAME=VALUE, for example rungs.FIRST=4") from None


@contextlib.contextmanager
def applied(settings: Settings) -> Iterator[None]:
    """Change constants of tlauto's modules within the block. Raises: ConfigError for an unknown one."""
    before = []
    for name, value in settings:
        module_name, _, own = name.rpartition(".")
        try:
            module = importlib.import_module(f"tlauto.{module_name}")
            before.append((module, own, getattr(module, own)))
        except (ImportError, AttributeError, TypeError):
            raise ConfigError(
                f"tlauto has no constant '{name}'; write MODULE.NAME, for example rungs.FIRST"
            ) from None
        setattr(module, own, value)
    try:
        yield
    finally:
        for module, own, value in reversed(before):
            setattr(module, own, value)


@lru_cache(maxsize=8)
def recordings(path: str) -> replay.Recordings:
    """A table, read once in each process. Raises: ConfigError when it cannot tell policies apart."""
    found = replay.Recordings(load(Path(path)))
    best, median = scale(found.table)
    if best <= median:
        raise ConfigError(f"the configurations of {path} are all alike: nothing to compare policies by")
    return found


def scale(table: Table) -> tuple[float, float]:
    """The best and the median test score of a table."""
    scores = [row.test for row in table.sound if row.test is not None]
    return max(scores), statistics.median(scores)


def budget_of(table: Table, trials: float) -> float:
    """Seconds that so many trials of random search cost, which takes every strategy equally often."""
    costs: dict[str, list[float]] = {}
    for row in table.rows:
        costs.setdefault(str(row.params["strategy"]), []).append(row.seconds)
    first = sum(table.header["features_seconds"].values())
    return first + trials * statistics.mean(statistics.mean(seconds) for seconds in costs.values())


def simulate(job: Job) -> Outcome:
    """Run one simulated search."""
    known = recordings(job.table)
    budget = budget_of(known.table, job.trials)
    until = job.until * budget
    with applied(job.settings):
        if job.policy in OPPONENTS:
            done = opponents.search(job.policy, known, seed=job.seed, budget=until)
        else:
            done = replay.search(known, seed=job.seed, budget=until)
    regrets = tuple(regret(known.table, done, share * budget) for share in SHARES if share <= job.until)
    return Outcome(job, regrets, len(done.account.trials), done.account.is_exhausted)


def regret(table: Table, done: replay.Simulated, seconds: float) -> float:
    """Normalised regret of what a search would ship after some seconds: 0 is the best of the table."""
    shipped = [row for at, row in done.curve if at <= seconds]
    if not shipped or shipped[-1].test is None:
        return 1.0
    return _normalised(table, shipped[-1].test)


def _normalised(table: Table, test: float) -> float:
    best, median = scale(table)
    return (best - test) / (best - median)


def show(found: Outcomes, shares: Sequence[float], args: argparse.Namespace) -> None:
    """Print the table of all policies, and that of each dataset."""
    heads = [f"{share:.0%} of the budget" for share in shares]
    print(f"| policy | {' | '.join(heads)} | trials | ended |")
    print("|---" * (len(heads) + 3) + "|")
    for policy, tables in found.items():
        cells = [interval(tables, place) for place in range(len(shares))]
        trials = statistics.mean(outcome.trials for outcome in every(tables))
        ended = sum(outcome.is_exhausted for outcome in every(tables))
        print(f"| {policy} | {' | '.join(cells)} | {trials:.0f} | {ended} |")
    print(f"\n| {heads[0]} | {' | '.join(found[OURS])} |")
    print("|---" * (len(found[OURS]) + 1) + "|")
    for policy, tables in found.items():
        means = [f"{regrets(outcomes, 0).mean():.3f}" for outcomes in tables.values()]
        print(f"| {policy} | {' | '.join(means)} |")


def show_all_seen(tables: Sequence[Path]) -> dict[str, float]:
    """Print and return the regret of rules that know the whole table, by rule."""
    rules: dict[str, Callable[[Recorded], float | None]] = {
        "validation": lambda row: row.score,
        "cross-validation": lambda row: row.held_out,
    }
    named = {}
    for rule, score in rules.items():
        found = [all_seen(load(path), score) for path in tables]
        print(f"| all seen, by {rule} | {' | '.join(f'{regret:.3f}' for regret in found)} |")
        named[f"regret all seen by {rule}"] = round(statistics.mean(found), 4)
    return named


def all_seen(table: Table, score: Callable[[Recorded], float | None]) -> float:
    """Normalised regret of the trial with the best score of a whole table; of equal ones, their mean."""
    known = [(score(row), row.test) for row in table.sound]
    scored = [(found, test) for found, test in known if found is not None and test is not None]
    most = max((found for found, _ in scored), default=None)
    return statistics.mean([_normalised(table, test) for found, test in scored if found == most] or [1.0])


def every(tables: Mapping[str, Sequence[Outcome]]) -> list[Outcome]:
    """A policy's simulated searches over all tables."""
    return [outcome for outcomes in tables.values() for outcome in outcomes]


def interval(tables: Mapping[str, Sequence[Outcome]], place: int) -> str:
    """Mean regret over tables and seeds with its 95 % interval."""
    means = matrix(tables, place).mean(axis=0)  # (seeds,)
    low, high = np.percentile(means[resampled(len(means))].mean(axis=1), [2.5, 97.5])
    return f"{means.mean():.3f} [{low:.3f}, {high:.3f}]"


def figures(found: Outcomes, shares: Sequence[float]) -> dict[str, float | None]:
    """Named figures: mean regrets at every share, and the ratio at the first."""
    named: dict[str, float | None] = {}
    for policy, tables in found.items():
        for place, share in enumerate(shares):
            named[f"regret {policy} {share:g}"] = round(float(matrix(tables, place).mean()), 4)
    ours, theirs = (matrix(found[name], 0).mean(axis=0) for name in (OURS, RIVAL))
    chosen = resampled(len(ours))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = ours[chosen].mean(axis=1) / theirs[chosen].mean(axis=1)
        values = [ours.mean() / theirs.mean(), *np.percentile(ratios, [2.5, 97.5])]
    names = ("policy_regret_ratio", "policy_regret_ratio_low", "policy_regret_ratio_high")
    named |= {n: round(float(v), 4) if np.isfinite(v) else None for n, v in zip(names, values, strict=True)}
    return named


def matrix(tables: Mapping[str, Sequence[Outcome]], place: int) -> np.ndarray:
    """Regrets (tables, seeds) at one share."""
    return np.stack([regrets(outcomes, place) for outcomes in tables.values()])


def regrets(outcomes: Sequence[Outcome], place: int) -> np.ndarray:
    """Regrets (seeds,) at one share."""
    return np.array([outcome.regrets[place] for outcome in outcomes])


def resampled(seeds: int) -> np.ndarray:
    """Resamples (R, seeds) of the seeds, the same every time: policies are compared on the same ones."""
    return np.random.default_rng(0).integers(0, seeds, (RESAMPLES, seeds))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--curves", default=str(Path(__file__).with_name("curves")), help="folder of tables")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--trials", type=float, default=40, help="the budget, in trials of random search")
    parser.add_argument("--until", type=float, default=1.0, help="share of the budget to simulate, from .25")
    parser.add_argument("--quick", action="store_true", help="10 seeds, to a quarter of the budget")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--vary", action="append", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.until = min(args.seeds, 10), SHARES[0]
    if args.seeds < 1 or not SHARES[0] <= args.until <= 1:
        parser.error("--seeds must be at least 1 and --until from 0.25 to 1")
    return args


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of every process: they share the cores
    main()
