"""Fine-tuning the last stages with the frozen ones run once, against running them in every epoch.

    python bench/partial.py --data DIR --weights-dir DIR
    python bench/partial.py --quick        # under five minutes on two cores

For each dataset and backbone: a linear probe, then `partial` trials that start from it, in turn
without the cache of activations, with an empty one, and with the one that the trial before filled, as
the next trials of a search find it. Each round has another seed. Seconds an epoch are the trainer's
own, with validation, medians over all epochs, with the memory settings that a search gives its workers
and one thread: two on a machine with other work wait for each other, and times say nothing. The
score and the loss are of the validation part, means over the rounds. --data may be given several
times; without it, hymenoptera and signdigits in the folder TLAUTO_BENCH_DATA. The last line of
standard output is one JSON object; its `partial_cache_speedup` is the least of all rows, of epochs
whose activations are at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from search_vs_probe import default_data

from tlauto.contracts import EpochResult, TrialSpec, WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.devices import make_slots
from tlauto.errors import TlautoError
from tlauto.plugins import registry
from tlauto.training import finetune
from tlauto.training.fit import run_trial

WAYS = ("without", "first", "next")
BACKBONES = ("efficientnet-lite:lite0", "torchvision:squeezenet1_1")
HEADER = (
    "| data | backbone | k | epoch s without | first trial | next trials | speedup | score without | with |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Timed:
    """One trial: seconds of each epoch and of all, in all its threads; score and loss of its best epoch."""

    epochs: tuple[float, ...]
    seconds: float
    cpu_s: float
    score: float
    loss: float


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = []
    print(HEADER)
    for data in args.data or default_data()[: 1 if args.quick else None]:
        for backbone in args.backbones or BACKBONES[: 1 if args.quick else None]:
            rows.append(measure(data, backbone, args))
            print(row(rows[-1]), flush=True)
    least = min(found["speedup"] for found in rows)
    print(json.dumps({"partial_cache_speedup": least, "threads": args.threads, "rows": rows}))


def measure(data: str, backbone: str, args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one backbone on one dataset."""
    dataset, _ = load_dataset(data, seed=args.seed, allow_leaks=args.allow_leaks)
    with tempfile.TemporaryDirectory() as folder:
        spec = first_spec(dataset, backbone, Path(folder), args)
        probe = replace(spec, strategy="feature_extraction", params={}, epochs=1, folder=f"{folder}/probe")
        timed(probe, dataset)
        spec = replace(spec, init_head=f"{folder}/probe/checkpoint.safetensors")
        found: dict[str, list[Timed]] = {way: [] for way in WAYS}
        timed(replace(spec, epochs=1), dataset, way="without")  # imports and threads count for no way
        for turn in range(args.rounds):
            shutil.rmtree(Path(spec.cache, "prefixes"), ignore_errors=True)
            for way in WAYS:
                # The next trial of a search is another one: its seed differs from the first one's.
                seed = args.seed + 2 * turn + (way == "next")
                found[way].append(timed(replace(spec, seed=seed), dataset, way=way))
            print(f"round {turn + 1}: {line(found)}", file=sys.stderr, flush=True)
        stored = sum(file.stat().st_size for file in Path(spec.cache, "prefixes").glob("*.npy"))
    return {
        "data": Path(data).name, "backbone": backbone, "k": args.k, "level": args.level,
        "images": len(dataset.part("train")), "epochs": args.epochs, "rounds": args.rounds,
        "cache_bytes": stored, **summary(found),
    }  # fmt: skip


def first_spec(dataset: Dataset, backbone: str, folder: Path, args: argparse.Namespace) -> TrialSpec:
    """The `partial` trial that is timed."""
    return TrialSpec(
        number=0, dataset="", task=dataset.task, metric="accuracy", backbone=backbone, strategy="partial",
        head="linear", params={"freeze.partial.k": args.k, "augment.level": args.level}, seed=args.seed,
        weights=WeightsOptions({}, args.weights_dir, args.offline, args.pretrained),
        epochs=args.epochs, epoch_images=args.epoch_images, folder=str(folder / "trial"),
        cache=str(folder / "cache"),
    )  # fmt: skip


def timed(spec: TrialSpec, dataset: Dataset, *, way: str = "next") -> Timed:
    """Run one trial; `without` runs the whole network in every epoch."""
    told: list[EpochResult] = []
    usual = finetune.prefixed
    if way == "without":
        finetune.prefixed = lambda *_: None
    try:
        started, used = time.perf_counter(), time.process_time()
        done = run_trial(spec, registry(), dataset, device="cpu", on_epoch=lambda r: not told.append(r))
        seconds, used = time.perf_counter() - started, time.process_time() - used
    finally:
        finetune.prefixed = usual
    return Timed(tuple(result.seconds for result in told), seconds, used, done.score, done.val_loss)


def summary(found: Mapping[str, Sequence[Timed]]) -> dict[str, Any]:
    """Medians and means by way, and how many times as fast an epoch and a trial are."""
    made: dict[str, Any] = {}
    for way, trials in found.items():
        made[way] = {
            "epoch_s": statistics.median(s for trial in trials for s in trial.epochs),
            "trial_s": statistics.median(trial.seconds for trial in trials),
            "trial_cpu_s": statistics.median(trial.cpu_s for trial in trials),
            "score": statistics.mean(trial.score for trial in trials),
            "loss": statistics.mean(trial.loss for trial in trials),
        }
    without = made["without"]
    made["speedup"] = without["epoch_s"] / made["next"]["epoch_s"]
    for name in ("trial_s", "trial_cpu_s"):  # the second hardly depends on what else the machine does
        made[f"{name}_speedup"] = {way: without[name] / made[way][name] for way in ("first", "next")}
    return made


def line(found: Mapping[str, Sequence[Timed]]) -> str:
    """The last round's seconds and scores."""
    cells = (f"{way} {t[-1].seconds:.1f} s, score {t[-1].score:.3f}" for way, t in found.items())
    return "; ".join(cells)


def row(found: Mapping[str, Any]) -> str:
    """A line of the table."""
    seconds = " | ".join(f"{found[way]['epoch_s']:.2f}" for way in WAYS)
    scores = f"{found['without']['score']:.3f} | {found['next']['score']:.3f}"
    names = f"{found['data']} | {found['backbone']} | {found['k']}"
    return f"| {names} | {seconds} | {found['speedup']:.1f} | {scores} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", action="append", metavar="DIR", help="a dataset; may be repeated")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--backbone", dest="backbones", action="append", metavar="ID", help="only these")
    parser.add_argument("--k", type=int, default=1, help="stages that learn; 1")
    parser.add_argument("--level", default="light", help="augmentation; light")
    parser.add_argument("--epochs", type=int, help="8; with --quick 4")
    parser.add_argument("--epoch-images", type=int, help="images an epoch; all")
    parser.add_argument("--rounds", type=int, help="5; with --quick 3")
    parser.add_argument("--threads", type=int, default=1, help="arithmetic threads; 1")
    parser.add_argument("--quick", action="store_true", help="the first dataset and backbone, fewer epochs")
    parser.add_argument("--online", dest="offline", action="store_false", help="allow downloads")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the first trial")
    parser.add_argument("--allow-leaks", action="store_true", help="accept duplicates across given splits")
    args = parser.parse_args()
    args.epochs = args.epochs or (4 if args.quick else 8)
    args.rounds = args.rounds or (3 if args.quick else 5)
    return args


if __name__ == "__main__":
    if "GLIBC_TUNABLES" not in os.environ:  # it is read when a process starts
        environment = {**make_slots("cpu", 1)[0].env, **os.environ}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
