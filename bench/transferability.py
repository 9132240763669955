"""Transferability scores against the cross-validated linear probe they are meant to foretell.

    python bench/transferability.py --data DIR --weights-dir DIR --seed 0

For each backbone that `tlauto search` would screen: features of all images outside the test part, the
scores of `tlauto.training.transferability` on them, and the cross-validated accuracy of the probe of
`probe_script.py` (StandardScaler, LogisticRegression, best C). No test image is read. Then Spearman's
correlation of each score with the probe's accuracy over the backbones; with few of them it is coarse.
NCE and LEEP are left out: a search loads backbones without their classifiers, whose answers they need.
--data may be given several times; without it, the datasets that `search_vs_probe.py` takes from the
folder TLAUTO_BENCH_DATA. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from probe_script import GRID, cores, features, transform
from search_vs_probe import default_data

from tlauto.config import PRESETS
from tlauto.contracts import WeightsOptions
from tlauto.data import Dataset, load_dataset
from tlauto.errors import TlautoError
from tlauto.plugins import registry
from tlauto.pool.protocol import Preflight
from tlauto.preflight import check_backbones
from tlauto.training.transferability import h_score, log_me

SCORES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "log_me": log_me,
    "h_score": h_score,
    "h_score_unshrunk": partial(h_score, shrinkage=0.0),
}
COLUMNS = (*SCORES, "probe_cv")


def main() -> None:
    args = parse()
    options = WeightsOptions({}, args.weights_dir, args.offline, args.pretrained)
    ids = backbones(args, options)
    # Imports and starting scikit-learn's processes count for no backbone.
    probe(np.eye(20), np.arange(20) % 2, seed=0)
    runs = [measure(data, ids, options, args) for data in args.data or default_data()]
    print(json.dumps({"seed": args.seed, "cores": cores(), "runs": runs}))


def backbones(args: argparse.Namespace, options: WeightsOptions) -> list[str]:
    """The backbones that a search with these options screens."""
    job = Preflight(tuple(args.backbones or ()), options, args.candidates)
    found = check_backbones(job, registry(), note=lambda text: print(text, file=sys.stderr))
    for candidate in found.candidates:
        if candidate.problem:
            sys.exit(f"error: {candidate.problem}")
    if found.unmatched or not found.candidates:
        sys.exit(f"error: no backbone matches {', '.join(found.unmatched) or 'and has its weights at hand'}")
    return [candidate.info.id for candidate in found.candidates]


def measure(
    data: str, ids: Sequence[str], options: WeightsOptions, args: argparse.Namespace
) -> dict[str, Any]:
    """All scores of all backbones on one dataset; prints its table."""
    dataset, _ = load_dataset(data, seed=args.seed, allow_leaks=args.allow_leaks)
    if dataset.task != "multiclass":
        sys.exit(f"error: {data} is for {dataset.task}; this script does classes only")
    images = len(dataset.part("train", "val"))
    print(f"data      {data}: {len(dataset.classes)} classes, {images} images")
    print("  ".join([f"{name:>26}" for name in COLUMNS] + ["  features  backbone"]), flush=True)
    rows = [score(id, dataset, options, args.seed) for id in ids]
    found = {
        name: spearman([row[name] for row in rows], [row["probe_cv"] for row in rows]) for name in SCORES
    }
    total = {name: sum(row["seconds"][name] for row in rows) for name in ("features", *COLUMNS)}
    print(
        "  ".join(
            [cell(found[name], total[name]) for name in SCORES] + ["Spearman with probe_cv, all seconds"]
        )
    )
    return {
        "data": Path(data).name, "images": images, "spearman": found,
        "seconds": {name: round(seconds, 3) for name, seconds in total.items()}, "backbones": rows,
    }  # fmt: skip


def score(id: str, dataset: Dataset, options: WeightsOptions, seed: int) -> dict[str, Any]:
    """The scores of one backbone, the probe's accuracy and the seconds of each; prints a line."""
    items = dataset.part("train", "val")
    files = [str(dataset.file(item)) for item in items]
    started = time.perf_counter()
    backbone = registry().provider(id.partition(":")[0]).load(id, options)
    x = features(backbone.module, files, transform(id, backbone))  # (N, D)
    row: dict[str, Any] = {"backbone": id, "width": x.shape[1]}
    row["seconds"] = {"features": time.perf_counter() - started}
    y = np.array([item.target for item in items])
    for name, function in {**SCORES, "probe_cv": partial(probe, seed=seed)}.items():
        started = time.perf_counter()
        row[name] = function(x, y)
        row["seconds"][name] = time.perf_counter() - started
    print(line(row), flush=True)
    return row


def probe(x: np.ndarray, y: np.ndarray, *, seed: int) -> float:
    """Accuracy of the linear probe, cross-validated, at its best C."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = StratifiedKFold(max(2, min(5, np.bincount(y).min())), shuffle=True, random_state=seed)
    search = GridSearchCV(model, {"logisticregression__C": GRID}, cv=folds, n_jobs=cores())
    return float(search.fit(x, y).best_score_)


def spearman(scores: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where it is not defined."""
    from scipy.stats import spearmanr

    # Without this, scores of saturated backbones differ by rounding and are ranked by it.
    scores, accuracies = np.round(scores, 9), np.round(accuracies, 9)
    if len(np.unique(scores)) < 2 or len(np.unique(accuracies)) < 2:
        return None
    return float(spearmanr(scores, accuracies).statistic)


def line(row: Mapping[str, Any]) -> str:
    cells = [cell(row[name], row["seconds"][name]) for name in COLUMNS]
    return "  ".join([*cells, f"{row['seconds']['features']:>8.1f} s", f"{row['backbone']} ({row['width']})"])


def cell(value: float | None, seconds: float) -> str:
    shown = "undefined" if value is None else f"{value:.4f}"
    return f"{shown:>14} {f'({seconds:.3f} s)':>11}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", action="append", metavar="DIR", help="a dataset; may be repeated")
    parser.add_argument("--weights-dir", default=os.environ.get("TLAUTO_WEIGHTS"), metavar="DIR")
    parser.add_argument("--backbone", dest="backbones", action="append", metavar="GLOB", help="only these")
    most = PRESETS["balanced"].candidates
    parser.add_argument("--candidates", type=int, default=most, help=f"most besides your own; {most}")
    parser.add_argument("--online", dest="offline", action="store_false", help="allow downloads")
    parser.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the folds")
    parser.add_argument("--allow-leaks", action="store_true", help="accept duplicates across given splits")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
