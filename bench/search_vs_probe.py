"""A search against logistic regression on frozen features, on the same test images.

    python bench/search_vs_probe.py --data DIR --weights-dir DIR --trials 30 --seed 0
    make bench ARGS='--trials 30'        # data and weights from TLAUTO_BENCH_DATA and TLAUTO_WEIGHTS

Runs `tlauto search` in an empty temporary folder, with an empty cache, and then `probe_script.py` on
every backbone that the search screened. Seconds are wall time of the whole process, imports included.
The script's backbone is chosen by its cross-validation, as its user would. Options that this script
does not know (`--preset best`, `--time 20m`) go to `tlauto search`. --data may be given several times;
without it, hymenoptera and signdigits in the folder TLAUTO_BENCH_DATA are measured.
Prints a row of bench/RESULTS.md for each dataset; the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probe_script import cores

DATASETS = ("hymenoptera", "signdigits")
HEADER = (
    "| data | test images | tlauto | probe script | difference | tlauto s | probe s | cores |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    args, extra = parse()
    runs = [measure(data, args, extra) for data in args.data or default_data()]
    print(HEADER)
    for run in runs:
        print(row(run))
    print(json.dumps({"runs": runs}))


def measure(data: str, args: argparse.Namespace, extra: Sequence[str]) -> dict[str, Any]:
    """Both sides on one dataset."""
    common = ["--data", str(Path(data).resolve()), "--seed", str(args.seed)]
    if args.weights_dir:
        common += ["--weights-dir", str(Path(args.weights_dir).resolve())]
    common += [f"--{name.replace('_', '-')}" for name in ("offline", "allow_leaks") if getattr(args, name)]
    common += [] if args.pretrained else ["--no-pretrained"]
    trials = [] if args.trials is None else ["--trials", str(args.trials)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tlauto", "search", *common, *trials, *extra, "--json"]
        found, seconds = timed(command, folder)
        files = json.loads(tlauto(["show", "--json"], folder))["settings"]["weights"]
        probe = [sys.executable, str(Path(__file__).with_name("probe_script.py")), *common]
        for id in found["backbones"]:
            probe += ["--backbone", f"{id}={files[id]}" if id in files else id]
        probe += ["--balanced"] if found["metric"] == "balanced_accuracy" else []
        probe += ["--best-only"] if args.best_only else []
        script, probe_seconds = timed(probe, folder)
    ours, theirs = found["test"]["accuracy"], script["best"]["test"]["accuracy"]
    return {
        "data": Path(data).name, "seed": args.seed, "cores": cores(), "options": [*trials, *extra],
        "test_images": script["test_images"], "trials": found["trials"], "winner": winner(found),
        "search": {"accuracy": ours, "metrics": found["test"], "seconds": round(seconds, 1)},
        "probe": {**script["best"], "seconds": round(probe_seconds, 1), "all": script["backbones"]},
        "difference": difference(ours, theirs),
    }  # fmt: skip


def timed(command: Sequence[str], folder: str) -> tuple[dict[str, Any], float]:
    """The JSON in which a program's output ends and its wall seconds; its progress is passed on."""
    print(f"$ {' '.join(command[1:])}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    text = checked(command, folder)
    seconds = time.perf_counter() - started
    # `tlauto --json` prints nothing else, the script a last line.
    found = json.loads(text if text.startswith("{") else text.splitlines()[-1])
    if not text.startswith("{"):
        print(text.rpartition("\n{")[0], file=sys.stderr, flush=True)
    return found, seconds


def tlauto(arguments: Sequence[str], folder: str) -> str:
    return checked([sys.executable, "-m", "tlauto", *arguments], folder)


def checked(command: Sequence[str], folder: str) -> str:
    """Standard output of a program run in a folder, with all caches of tlauto in it."""
    environment = {**os.environ, "TLAUTO_CACHE": str(Path(folder, "cache"))}
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: '{' '.join(command[1:4])} …' ended with {done.returncode}")
    return done.stdout


def difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Ours minus theirs with a 95 % interval from both Wilson intervals.

    Treats the two as independent, which on the same images makes it too wide rather than too narrow.
    Source: Newcombe 1998, "Interval estimation for the difference between independent proportions",
    Statistics in Medicine 17, method 10.
    """
    value = ours["value"] - theirs["value"]
    low = math.hypot(ours["value"] - ours["low"], theirs["high"] - theirs["value"])
    high = math.hypot(ours["high"] - ours["value"], theirs["value"] - theirs["low"])
    return {"value": value, "low": value - low, "high": value + high}


def winner(found: Mapping[str, Any]) -> str:
    best = found["best"]
    return f"{best['backbone']}, {best['strategy']}, {best['head']}"


def row(run: Mapping[str, Any]) -> str:
    """A row of the table in RESULTS.md."""
    search, probe, gap = run["search"], run["probe"], run["difference"]
    ours = f"{interval(search['accuracy'])} {run['winner']} ({run['trials']} trials)"
    theirs = f"{interval(probe['test']['accuracy'])} {probe['backbone']}"
    shown = f"{gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]"
    times = f"{search['seconds']:.0f} | {probe['seconds']:.0f} | {run['cores']}"
    return f"| {run['data']} | {run['test_images']} | {ours} | {theirs} | {shown} | {times} |"


def interval(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def default_data() -> list[str]:
    folder = os.environ.get("TLAUTO_BENCH_DATA")
    if not folder:
        sys.exit("error: no dataset; give --data DIR or set TLAUTO_BENCH_DATA to a folder of datasets")
    found = [str(Path(folder, name)) for name in DATASETS if Path(folder, name).is_dir()]
    if not found:
        sys.exit(f"error: TLAUTO_BENCH_DATA={folder} has no {' or '.join(DATASETS)}; give --data DIR")
    return found


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="Any other option goes to 'tlauto search'.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", action="append", metavar="DIR", help="a dataset; may be repeated")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--trials", type=int, metavar="N", help="of the search; its preset's by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--best-only", action="store_true", help="the script tests only its best backbone")
    parser.add_argument("--online", dest="offline", action="store_false", help="allow downloads")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--allow-leaks", action="store_true", help="accept duplicates across given splits")
    return parser.parse_known_args()


if __name__ == "__main__":
    main()
