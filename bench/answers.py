"""What recorded trials answered, image by image, so that a simulated search can have several answer together.

Beside a table `NAME.jsonl.gz` there may be `NAME.answers.npz`, with the answers of those of its trials that
a search might have answer together: the frozen ones that are cross-validated, and those that train the
backbone. A probability takes one byte: its arcsine's root, which is fine where probabilities are
near 0 and 1, in 255 steps.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from curves import Table

from tlauto import metrics
from tlauto.errors import DataError
from tlauto.results.ensemble import mean

STEPS = 255
PARTS = ("train", "val", "test")
FILE = "predictions.npz"  # in a trial's folder


@dataclass
class Answers:
    """Answers of trials by number.

    Attributes:
        targets: of each part, as the task encodes them.
        given: by trial, its answers (N, …) for each part, as they are kept; `train` is missing of a trial
            that was not cross-validated.
    """

    targets: dict[str, np.ndarray] = field(default_factory=dict)
    given: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)

    def add_trial(self, number: int, folder: Path, test: np.ndarray, test_targets: np.ndarray) -> None:
        """Keep what a trial left in its folder, and what its model answered for the test part."""
        with np.load(folder / FILE, allow_pickle=False) as file:
            answers, targets = {"val": file["predictions"]}, {"val": file["targets"]}
            if "held_out" in file:
                answers["train"], targets["train"] = file["held_out"], file["held_out_targets"]
        self.targets |= targets | {"test": test_targets}
        self.given[number] = {part: _coded(values) for part, values in (answers | {"test": test}).items()}
        self.seen.add(number)

    def of(self, number: int, part: str) -> np.ndarray | None:
        """A trial's answers for a part; None when there are none."""
        kept = self.given.get(number, {}).get(part)
        return None if kept is None else _decoded(kept)

    def write_predictions(self, number: int, folder: Path, *, is_proven: bool) -> None:
        """Leave in a simulated trial's folder what a real one leaves there, if it is known."""
        val, train = self.of(number, "val"), self.of(number, "train")
        if val is None:
            return
        found = {"predictions": val, "targets": self.targets["val"]}
        if is_proven and train is not None:
            found |= {"held_out": train, "held_out_targets": self.targets["train"]}
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / FILE, allow_pickle=False, **found)

    def test_score(self, metric: str, weights: Mapping[int, float]) -> float:
        """The score on the test part of what trials answer together; weights by number add up to 1."""
        answers = [found for number in weights if (found := self.of(number, "test")) is not None]
        return float(metrics.score(metric, self.targets["test"], mean(answers, list(weights.values()))))

    def save(self, path: Path, table: Table) -> None:
        """Write those of the trials that a search might have answer together, whole or not at all."""
        frozen = {row.number for row in table.sound if len(row.epochs) == 1}
        kept = [n for n, parts in sorted(self.given.items()) if "train" in parts or n not in frozen]
        arrays = {f"{part} targets": values for part, values in self.targets.items()}
        arrays["seen"] = np.array(sorted(self.seen), dtype=np.int64)
        for part in PARTS:
            having = [n for n in kept if part in self.given[n]]
            if having:
                arrays[f"{part} trials"] = np.array(having)
                arrays[part] = np.stack([self.given[n][part] for n in having])
        temporary = path.with_name(f".{path.name}.part.npz")
        np.savez_compressed(temporary, allow_pickle=False, **arrays)
        os.replace(temporary, path)


def beside(table: Path) -> Path:
    """Where the answers of a table's trials lie."""
    return table.with_name(table.name.partition(".")[0] + ".answers.npz")


def load(path: Path) -> Answers:
    """Answers that `Answers.save` wrote, none without a file. Raises: DataError when it is another."""
    found = Answers()
    if not path.is_file():
        return found
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            found.targets = {part: file[f"{part} targets"] for part in PARTS if f"{part} targets" in file}
            found.seen = set(file["seen"].tolist())
            for part in PARTS:
                rows = zip(file[f"{part} trials"], file[part], strict=True) if part in file else ()
                for number, answers in rows:
                    found.given.setdefault(int(number), {})[part] = answers
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read the answers {path}: {error}; record_curves.py writes them") from None
    return found


def _coded(values: np.ndarray) -> np.ndarray:
    """Probabilities as bytes; anything else as it is."""
    if values.size and (values.min() < 0 or values.max() > 1):
        return values.astype(np.float32)
    return np.rint(np.arcsin(np.sqrt(values)) * (2 * STEPS / np.pi)).astype(np.uint8)


def _decoded(kept: np.ndarray) -> np.ndarray:
    if kept.dtype != np.uint8:
        return kept
    values: np.ndarray = np.sin(kept * (np.pi / (2 * STEPS))) ** 2
    return values.astype(np.float32)
