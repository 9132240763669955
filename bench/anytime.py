"""How good a model each way has after so much time: a search, a scikit-learn script, a plain Optuna loop.

    python bench/anytime.py --data DIR --weights-dir DIR
    python bench/anytime.py --quick        # data and weights from TLAUTO_BENCH_DATA and TLAUTO_WEIGHTS

On the same images, split, weights and machine, one after the other: `tlauto search --time 5m`,
`probe_script.py` on every backbone that the search knew of, and `naive_optuna.py` for 15 minutes. All
scores are test accuracies, measured after the fact: none of the three sees them. A search's model at a
time is the best trial that had ended; at its end, what it bundles. The script's is the best by
cross-validation of the backbones it had come to, the loop's its best trial by validation.

--quick gives the search 60 seconds and the loop 120. Options that this script does not know
(`--preset best`) go to `tlauto search`. --data may be given several times; without it,
the datasets of images with classes in the folder TLAUTO_BENCH_DATA. The last line of standard output is
one JSON object:

    score_gain_5min             mean over datasets of ours less the best alternative's, at the end of
                                the search's time, in points
    time_to_naive_score_ratio   seconds of the loop to its final score over ours to that score, second
                                best of the datasets; null where we never reach it
    time_to_script_ratio        our seconds to the script's score over those of its whole run, worst of
                                the datasets; null where we never reach it
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from probe_script import cores
from search_vs_probe import checked, tlauto

DATASETS = ("hymenoptera", "signdigits", "trashnet")
Curve = list[tuple[float, float]]
"""Seconds and the test accuracy of what there was from then on."""


def main() -> None:
    args = parse()
    rows = [measure(data, args) for data in args.data]
    print(f"{'data':<14}{'':<8}" + "".join(f"{f'{at:.0f} s':>9}" for at in marks(args)) + f"{'end':>16}")
    for row in rows:
        for name in ("tlauto", "script", "loop"):
            curve = row[name]
            shown = "".join(f"{cell(at_time(curve, mark)):>9}" for mark in marks(args))
            print(f"{row['data']:<14}{name:<8}{shown}{cell(curve[-1][1]):>8} {curve[-1][0]:5.0f} s")
    print(json.dumps({**figures(rows, args), "cores": cores(), "datasets": rows}))


def marks(args: argparse.Namespace) -> list[float]:
    """Times that the table shows."""
    return sorted({30.0, 60.0, 120.0, args.time, args.loop_time})


def cell(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def measure(data: str, args: argparse.Namespace) -> dict[str, Any]:
    """The three curves on one dataset."""
    common = ["--data", str(Path(data).resolve()), "--seed", str(args.seed), "--offline"]
    common += ["--weights-dir", str(Path(args.weights_dir).resolve())] if args.weights_dir else []
    common += ["--allow-leaks"] + ([] if args.pretrained else ["--no-pretrained"])
    with tempfile.TemporaryDirectory() as folder:
        ours, backbones = search(common, args, folder)
    chosen = [part for backbone in backbones for part in ("--backbone", backbone)]
    with tempfile.TemporaryDirectory() as folder:
        script = probe([*common, *chosen], folder)
        loop = naive([*common, *chosen, "--time", str(args.loop_time)], folder)
    return {"data": Path(data).name, "tlauto": ours, "script": script, "loop": loop}


def search(common: Sequence[str], args: argparse.Namespace, folder: str) -> tuple[Curve, list[str]]:
    """The curve of a search and the backbones it screened, with the files of their weights."""
    before = time.time()
    command = [sys.executable, "-m", "tlauto", "search", *common, "--time", f"{args.time:.0f}s", "--json"]
    command += args.extra
    found = json.loads(checked(command, folder))
    seconds = time.time() - before
    files = json.loads(tlauto(["show", "--json"], folder))["settings"]["weights"]
    backbones = [f"{id}={files[id]}" if id in files else id for id in found["backbones"]]
    curve = [(at - before, score) for at, score in best_so_far(Path(folder, "tlauto-runs"), found["study"])]
    return [*curve, (seconds, float(found["test"]["accuracy"]["value"]))], backbones


def best_so_far(runs: Path, name: str) -> Curve:
    """When (seconds since the epoch) each new best trial ended, and its test accuracy."""
    import numpy as np
    import optuna

    from tlauto.contracts import spec_from_json
    from tlauto.data import Dataset
    from tlauto.plugins import registry
    from tlauto.store import Store
    from tlauto.training.model import restore
    from tlauto.training.predictor import Predictor
    from tlauto.training.tasks import find_task

    storage = optuna.storages.RDBStorage(f"sqlite:///{runs / 'tlauto.db'}")
    ended = [t for t in optuna.load_study(study_name=name, storage=storage).trials if t.value is not None]
    rows = Store(f"sqlite:///{runs / 'tlauto.db'}").trials(name)
    dataset = Dataset.from_json((runs / name / "dataset.json").read_text(encoding="utf-8"))
    test = dataset.part("test")
    targets = np.array([item.target for item in test])
    curve, best = [], -float("inf")
    for trial in sorted(ended, key=lambda t: t.datetime_complete or datetime.max):
        checkpoint = runs / name / "trials" / str(trial.number) / "checkpoint.safetensors"
        if (trial.value or 0.0) <= best or not checkpoint.is_file():
            continue
        best = trial.value or 0.0
        spec = spec_from_json(rows[trial.number]["spec"])
        classifier = restore(spec, registry(), dataset, checkpoint, "cpu")
        answers = Predictor(classifier, classifier.source.input, find_task(spec.task), dataset.classes)
        found = answers.predict_files([dataset.file(item) for item in test]).argmax(axis=1)
        assert trial.datetime_complete is not None
        curve.append((trial.datetime_complete.timestamp(), float((found == targets).mean())))
    return curve


def probe(options: Sequence[str], folder: str) -> Curve:
    """The curve of the script: after each backbone, the best by cross-validation so far."""
    before = time.perf_counter()
    command = [sys.executable, str(Path(__file__).with_name("probe_script.py")), *options]
    found = json.loads(checked(command, folder).splitlines()[-1])
    seconds = time.perf_counter() - before
    spent = seconds - sum(entry["seconds"] for entry in found["backbones"])  # what came before the first
    curve: Curve = []
    best: dict[str, Any] = {"cv": -1.0}
    for entry in found["backbones"]:
        spent += entry["seconds"]
        best = max(best, entry, key=lambda one: float(one["cv"]))
        curve.append((spent, best["test"]["accuracy"]["value"]))
    return curve


def naive(options: Sequence[str], folder: str) -> Curve:
    """The curve of the Optuna loop."""
    command = [sys.executable, str(Path(__file__).with_name("naive_optuna.py")), *options]
    curve = json.loads(checked(command, folder).splitlines()[-1])["curve"]
    return [(seconds, test) for seconds, _, test in curve] or [(0.0, 0.0)]


def at_time(curve: Curve, seconds: float) -> float | None:
    """The score there was at a time; None before the first."""
    return next((score for at, score in reversed(curve) if at <= seconds), None)


def first_time(curve: Curve, score: float) -> float | None:
    """When a score was first reached."""
    return next((at for at, found in curve if found >= score), None)


def figures(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> dict[str, float | None]:
    gains, speedups, shares = [], [], []
    for row in rows:
        others = [at_time(row[name], args.time) or 0.0 for name in ("script", "loop")]
        gains.append(100 * (row["tlauto"][-1][1] - max(others)))
        loop, script = row["loop"][-1], row["script"][-1]
        there = first_time(row["tlauto"], loop[1])
        reached = first_time(row["loop"], loop[1]) or loop[0]
        speedups.append(0.0 if there is None else reached / there)
        there = first_time(row["tlauto"], script[1])
        shares.append(None if there is None else there / script[0])
    second = sorted(speedups, reverse=True)[min(1, len(speedups) - 1)]
    known = [share for share in shares if share is not None]
    return {
        "score_gain_5min": statistics.mean(gains),
        "time_to_naive_score_ratio": second or None,
        "time_to_script_ratio": max(known) if len(known) == len(shares) else None,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", action="append", metavar="DIR", help="a dataset; may be repeated")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--time", type=float, default=300.0, help="seconds of the search")
    parser.add_argument("--loop-time", type=float, default=900.0, help="seconds of the Optuna loop")
    parser.add_argument("--quick", action="store_true", help="60 and 120 seconds")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, default=0)
    args, args.extra = parser.parse_known_args()
    if args.quick:
        args.time, args.loop_time = 60.0, 120.0
    folder = os.environ.get("TLAUTO_BENCH_DATA")
    if not args.data and not folder:
        parser.error("name a dataset with --data, or a folder of datasets with TLAUTO_BENCH_DATA")
    args.data = args.data or [str(Path(folder or "", name)) for name in DATASETS]
    return args


if __name__ == "__main__":
    main()
