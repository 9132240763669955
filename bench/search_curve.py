"""What a finished search had to offer over time, measured afterwards, when no clock runs.

    python bench/search_curve.py FOLDER STUDY --started SECONDS

FOLDER is the workspace, SECONDS the search's start since the epoch. At a time the search had the best
trial that had ended by then, whose checkpoint is tested here; `final` is the bundle that it left, with
the accuracy that it tested itself. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
import optuna

import tlauto
from tlauto.contracts import spec_from_json
from tlauto.data import Dataset
from tlauto.errors import TlautoError
from tlauto.plugins import registry
from tlauto.store import Store
from tlauto.training.joined import restore_parts
from tlauto.training.predictor import Predictor
from tlauto.training.tasks import find_task


def main() -> None:
    args = parse()
    folder = Path(args.folder, args.study)
    dataset = Dataset.from_json((folder / "dataset.json").read_text(encoding="utf-8"))
    rows, right = best_so_far(Path(args.folder), args.study, dataset, args.started)
    files = [dataset.file(item) for item in dataset.part("test")]
    labels = [dataset.classes[int(str(item.target))] for item in dataset.part("test")]
    answers = tlauto.load(folder / "model").predict(files)
    final = [answer.label == label for answer, label in zip(answers, labels, strict=True)]
    print(json.dumps({"curve": rows, "right": right, "final": digits(final)}))


def best_so_far(
    runs: Path, name: str, dataset: Dataset, started: float
) -> tuple[list[list[float]], list[str]]:
    """When each new best trial ended, its score and its test accuracy; and which images it gets right."""
    database = f"sqlite:///{runs / 'tlauto.db'}"
    study = optuna.load_study(study_name=name, storage=optuna.storages.RDBStorage(database))
    specs = Store(database).trials(name)
    test = dataset.part("test")
    files, targets = [dataset.file(item) for item in test], np.array([item.target for item in test])
    rows: list[list[float]] = []
    right: list[str] = []
    for trial in sorted(study.trials, key=lambda t: t.datetime_complete or datetime.max):
        checkpoint = runs / name / "trials" / str(trial.number) / "checkpoint.safetensors"
        if trial.value is None or trial.datetime_complete is None or not checkpoint.is_file():
            continue
        if rows and trial.value <= rows[-1][1]:
            continue
        spec = spec_from_json(specs[trial.number]["spec"])
        parts = restore_parts(spec, registry(), dataset, checkpoint, "cpu")
        first, *others = [(part, part.source.input) for part in parts]
        answering = Predictor(*first, find_task(spec.task), dataset.classes, beside=others)
        found = answering.predict_files(files).argmax(axis=1) == targets
        seconds = round(trial.datetime_complete.timestamp() - started, 1)
        rows.append([seconds, trial.value, float(found.mean())])
        right.append(digits(found.tolist()))
    return rows, right


def digits(right: Sequence[bool]) -> str:
    return "".join("01"[one] for one in right)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument("--started", type=float, required=True, metavar="SECONDS")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except TlautoError as error:
        sys.exit(f"error: {error}")
