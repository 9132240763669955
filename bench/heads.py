"""A hundred head trials against one forward pass over the data.

    python bench/heads.py --data DIR --weights-dir DIR --backbone efficientnet-lite:lite0

One side decodes the images and computes their features once, in a process set up like a worker, by
the engine that a search would use. The other is a real search of 100 feature-extraction trials with
linear heads whose L2 penalty, loss and stages are searched, from an empty cache: from the start of its
first trial to the end of its last, features included. Mirror images are left out, unless --mirror: they
take a second forward pass, which is no head's cost. Both in turn, --rounds times, since the speed of
a shared machine changes from one minute to the next. Prints medians; the last line of standard output is one
JSON object:

    heads_per_forward   the search's seconds over the forward pass's
    cached_trial_ms     time from the first trial's end to the last's, less what the heads themselves took,
                        over the trials: proposals, messages, the database, bundles of the best model so far

--quick is one round of 30 trials. Without --data, hymenoptera in the folder TLAUTO_BENCH_DATA is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARAMS = {"probe.solver": "lbfgs"}
ONE_PASS = {"probe.mirror": False}


def main() -> None:
    args = parse()
    if args.serve:
        print(json.dumps({"seconds": forward(args)}))
        return
    forwards, searches, rests = [], [], []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            forwards.append(float(json.loads(in_worker_environment(folder).splitlines()[-1])["seconds"]))
        with tempfile.TemporaryDirectory() as folder:
            many, rest = search(args, Path(folder))
        searches.append(many)
        rests.append(1000 * rest)
    one, many, rest = (statistics.median(found) for found in (forwards, searches, rests))
    print(f"decode and forward, once     {one:8.2f} s   of {_listed(forwards)}")
    print(f"{args.trials} head trials, all in all {many:8.2f} s   of {_listed(searches)}")
    print(f"fixed cost of a trial        {rest:8.1f} ms  of {_listed(rests)}")
    figures = {"heads_per_forward": many / one, "cached_trial_ms": rest, "forward_s": one}
    print(json.dumps({**figures, "trials": args.trials, "rounds": args.rounds, "cores": os.cpu_count()}))


def _listed(found: list[float]) -> str:
    return ", ".join(f"{each:.1f}" for each in found)


def in_worker_environment(folder: str) -> str:
    """The output of this script's other half, run with the settings that workers get."""
    from tlauto.devices import make_slots

    slot = make_slots("cpu", None)[0]
    environment = {**os.environ, **slot.env, "TLAUTO_CACHE": str(Path(folder, "cache"))}
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"error: {' '.join(command)} failed")
    return done.stdout


def forward(args: argparse.Namespace) -> float:
    """Seconds to decode all images outside the test part and compute their features, once."""
    import torch

    from tlauto.contracts import TrialSpec, WeightsOptions
    from tlauto.data import load_dataset
    from tlauto.plugins import registry
    from tlauto.training.features import FeatureSource

    torch.set_num_threads(int(os.environ.get("TLAUTO_THREADS") or torch.get_num_threads()))
    dataset, _ = load_dataset(args.data, seed=args.seed, allow_leaks=True)
    spec = TrialSpec(
        number=0, dataset="", task=dataset.task, metric="accuracy", backbone=args.backbone,
        strategy="feature_extraction", head="linear", params={}, seed=0, epochs=1, folder=args.serve,
        weights=WeightsOptions({}, args.weights_dir, True, args.pretrained),
        cache=str(Path(args.serve, "cache")),
    )  # fmt: skip
    source = FeatureSource(spec, registry(), dataset, torch.device("cpu"))
    _ = source.facts  # the backbone is built: a search has built it in its preflight
    started = time.perf_counter()
    source.features(["train"], "pooled")
    source.features(["val"], "pooled")
    return time.perf_counter() - started


def search(args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds of all trials together, and of what is not the head's own work for one of them, on average."""
    import optuna

    import tlauto

    os.environ["TLAUTO_CACHE"] = str(folder / "cache")
    found = tlauto.search(
        args.data, trials=args.trials, backbones=[args.backbone], strategies=["feature_extraction"],
        heads=["linear"], params=PARAMS if args.mirror else PARAMS | ONE_PASS, out=str(folder),
        seed=args.seed, offline=True, study="heads",
        weights_dir=args.weights_dir, pretrained=args.pretrained, allow_leaks=True, devices="cpu",
    )  # fmt: skip
    own = sum(row.seconds or 0.0 for row in found.leaderboard() if row.number)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials: list[Any] = optuna.load_study(
        study_name="heads", storage=f"sqlite:///{folder / 'tlauto.db'}"
    ).get_trials(deepcopy=False)
    ends = sorted(trial.datetime_complete.timestamp() for trial in trials)
    rest = ends[-1] - ends[0] - own
    return ends[-1] - trials[0].datetime_start.timestamp(), rest / (len(trials) - 1)


def shared_dataset(parser: argparse.ArgumentParser, name: str) -> str:
    """A dataset of the folder TLAUTO_BENCH_DATA; ends the process with a sentence where that is not set."""
    folder = os.environ.get("TLAUTO_BENCH_DATA")
    if not folder:
        parser.error("name a dataset with --data, or a folder of datasets with TLAUTO_BENCH_DATA")
    return str(Path(folder, name))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="dataset folder or manifest")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"))
    parser.add_argument("--backbone", default="efficientnet-lite:lite0")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 30 trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mirror", action="store_true", help="search mirror images too")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data = args.data or shared_dataset(parser, "hymenoptera")
    args.trials, args.rounds = (30, 1) if args.quick else (args.trials, args.rounds)
    return args


if __name__ == "__main__":
    main()
