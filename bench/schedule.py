"""How busy the coordinator keeps its slots, and what a proposal and a report cost it.

    python bench/schedule.py
    python bench/schedule.py --quick

The coordinator, the study and the SQLite file are the real ones; workers are simulated: a trial takes
the seconds that are asked for, of the real clock, and no processor. Utilisation is the share of all
slots' seconds in which they had a trial, from the first proposal on. Proposals and reports are then timed
in studies that have so many trials. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import optuna
from simulated import NAME, SimulatedPool, simulate, space

from tlauto.contracts import EpochResult, TrialSpec, WeightsOptions
from tlauto.space import Choice, Float, Int, Parameter, Scalar
from tlauto.store import Store
from tlauto.study import Study

SETTINGS = ((1, 1, 1), (8, 1, 1), (8, 5, 5), (64, 5, 5), (64, 1, 60), (512, 1, 60))
"""Slots, and the least and the most seconds of a trial."""
QUICK = ((8, 5, 5), (64, 5, 5))
SIZES = (100, 1_000, 10_000)
QUICK_SIZES = (100, 1_000)
REPEATS = 15
KEPT = {"backbone": tuple(f"simulated:network{i}" for i in range(5)), "strategy": ("feature_extraction",)}


def main() -> None:
    args = parse()
    figures: dict[str, float] = {}
    print(f"{'slots':>6}{'seconds a trial':>17}{'trials':>8}{'a second':>10}{'utilisation':>13}", flush=True)
    for slots, least, most in QUICK if args.quick else SETTINGS:
        pool = SimulatedPool(slots, seconds=lengths(least, most), lasts=args.seconds, failing=args.failing)
        with tempfile.TemporaryDirectory() as folder:
            simulate(Path(folder), pool, seed=args.seed)
        rate, shown = pool.ended / args.seconds, f"{least}" if least == most else f"{least} to {most}"
        print(f"{slots:>6}{shown:>17}{pool.ended:>8}{rate:>10.1f}{pool.utilisation:>13.3f}", flush=True)
        figures[f"utilisation_{slots}" + ("" if least == most == 5 else f"_{least}_{most}")] = round(
            pool.utilisation, 4
        )
    print(f"\n{'trials':>7}{'ask, ms':>10}{'report, ms':>12}{'tell, ms':>10}", flush=True)
    for size in QUICK_SIZES if args.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            ask, report, tell = costs(Path(folder), size)
        print(f"{size:>7}{ask:>10.1f}{report:>12.1f}{tell:>10.1f}", flush=True)
        figures |= {f"ask_ms_{size}": round(ask, 1), f"report_ms_{size}": round(report, 2)}
    figures["report_ms"] = figures["report_ms_1000"]
    print(json.dumps(figures))


def lengths(least: float, most: float) -> Callable[[int], float]:
    """The seconds of each trial by its number, even between two bounds."""
    return lambda number: random.Random(f"length/{number}").uniform(least, most)


def costs(folder: Path, size: int) -> tuple[float, float, float]:
    """Median milliseconds of a proposal, a report of an epoch and an end, beside so many ended trials."""
    url = f"sqlite:///{folder / 'tlauto.db'}"
    store = Store(url)
    store.create_search(NAME, config="{}", dataset="", fingerprint="", root="", report="", plan={})
    study = Study(url, NAME, seed=0, create=True)
    fill(url, size)
    known, asks, reports, tells = space(), [], [], []
    for _ in range(REPEATS):
        started = time.perf_counter()
        record = study.ask(known, kept=KEPT)
        asked = time.perf_counter()
        spec = TrialSpec(
            number=record.number, dataset="", task="multiclass", metric="accuracy", backbone="",
            strategy="", head="", params={}, seed=0, weights=WeightsOptions(), epochs=1, folder="", cache="",
        )  # fmt: skip
        store.start_trial(NAME, spec, "simulated:0")
        begun = time.perf_counter()
        study.report(record.number, 1, 0.5)
        store.add_epoch(NAME, EpochResult(record.number, 1, 0.5, 1.0, 1.0, 1.0))
        reported = time.perf_counter()
        study.tell(record.number, 0.5)
        ended = time.perf_counter()
        asks.append(asked - started)
        reports.append(reported - begun)
        tells.append(ended - reported)
    store.close()
    ask, report, tell = (1000 * statistics.median(values) for values in (asks, reports, tells))
    return ask, report, tell


def fill(url: str, size: int) -> None:
    """Put ended trials of random points into the study."""
    known, chance = space(), random.Random(0)
    study = optuna.load_study(study_name=NAME, storage=url)
    trials = []
    for _ in range(size):
        found: dict[str, optuna.distributions.BaseDistribution] = {}

        def pick(name: str, parameter: Parameter, found: dict[str, object] = found) -> Scalar:
            found[name] = _distribution(parameter)
            return _drawn(parameter, chance)

        params = known.walk(pick)
        params = {name: value for name, value in params.items() if name in found}
        trials.append(optuna.create_trial(params=params, distributions=found, value=chance.random()))
    study.add_trials(trials)


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    match parameter:
        case Float():
            return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)
        case Int():
            return optuna.distributions.IntDistribution(parameter.low, parameter.high, log=parameter.log)
        case Choice():
            return optuna.distributions.CategoricalDistribution(parameter.values)


def _drawn(parameter: Parameter, chance: random.Random) -> Scalar:
    match parameter:
        case Float():
            return chance.uniform(parameter.low, parameter.high)
        case Int():
            return chance.randint(parameter.low, parameter.high)
        case Choice():
            return chance.choice(parameter.values)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two settings, under five minutes")
    parser.add_argument("--seconds", type=float, default=90.0, help="of the clock for each setting")
    parser.add_argument("--failing", type=float, default=0.02, help="share of the trials that fail")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
