"""How threads of a worker wait for each other: asleep at once, after a short spin, or after a longer one.

    python bench/waiting.py --kind heads --data DIR --weights-dir DIR

For each way a search of linear heads on features that are in the cache, whose steps are small, or
(--kind finetune) of a probe and a fine-tuned backbone, whose steps are larger; all ways in turn, --rounds
times, by themselves and beside one process that does nothing but keep a core busy. Prints medians of the
trials' seconds; the last line of standard output is one JSON object, each way's seconds over those of threads
that sleep at once. Without --data, signdigits in the folder TLAUTO_BENCH_DATA is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heads import ONE_PASS, PARAMS, shared_dataset

WAYS = {"sleep": "0", "1000": "1000", "5000": "5000"}
KINDS: dict[str, dict[str, Any]] = {
    "heads": {"trials": 40, "strategies": ["feature_extraction"], "params": PARAMS | ONE_PASS},
    "finetune": {"trials": 2, "strategies": ["full"], "params": {}},
}
BUSY = "while True: pass"


def main() -> None:
    args = parse()
    if args.serve:
        print(seconds(args))
        return
    with tempfile.TemporaryDirectory() as folder:
        measured(args, folder, "0")  # fills the cache
        rows: dict[tuple[str, int], list[float]] = {(way, others): [] for others in (0, 1) for way in WAYS}
        for _ in range(args.rounds):
            for (way, others), found in rows.items():
                with busy(others):
                    found.append(measured(args, folder, WAYS[way]))
    ratios = {}
    for (way, others), found in rows.items():
        middle, base = statistics.median(found), statistics.median(rows["sleep", others])
        name = f"{way}_{'beside' if others else 'alone'}"
        ratios[name] = middle / base
        print(f"{name:15} {middle:8.2f} s {ratios[name]:6.2f}  of {', '.join(f'{one:.2f}' for one in found)}")
    print(json.dumps({**ratios, "kind": args.kind, "rounds": args.rounds, "cores": os.cpu_count()}))


@contextlib.contextmanager
def busy(others: int) -> Iterator[None]:
    """A block beside so many processes that keep a core busy each."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(others)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def measured(args: argparse.Namespace, folder: str, spins: str) -> float:
    """Seconds of the trials of a search whose workers' threads spin so often before they sleep."""
    words = [sys.executable, __file__, *sys.argv[1:], "--serve", folder]
    given = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": spins,
        "TLAUTO_CACHE": str(Path(folder, "cache")),
    }
    done = subprocess.run(words, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"error: {' '.join(words)} failed")
    return float(done.stdout.splitlines()[-1])


def seconds(args: argparse.Namespace) -> float:
    """Of the trials of one search, from the first one's start to the last one's end."""
    import optuna

    import tlauto

    with tempfile.TemporaryDirectory(dir=args.serve) as out:
        tlauto.search(
            args.data, **KINDS[args.kind], backbones=[args.backbone], heads=["linear"], out=out, offline=True,
            study="waiting", weights_dir=args.weights_dir, pretrained=args.pretrained, preset="fast",
            allow_leaks=True, devices="cpu",
        )  # fmt: skip
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = f"sqlite:///{Path(out, 'tlauto.db')}"
        trials: list[Any] = optuna.load_study(study_name="waiting", storage=storage).trials
    ends = max(trial.datetime_complete.timestamp() for trial in trials)
    return float(ends - trials[0].datetime_start.timestamp())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="dataset folder or manifest")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"))
    parser.add_argument("--backbone", default="efficientnet-lite:lite0")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false")
    parser.add_argument("--kind", choices=list(KINDS), default="heads")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.data = args.data or shared_dataset(parser, "signdigits")
    args.rounds = 1 if args.quick else args.rounds
    return args


if __name__ == "__main__":
    main()
