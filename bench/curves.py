"""Tables of recorded trials, one a dataset: gzipped JSON lines, the first of which says what was recorded.

`record_curves.py` writes them, `policy.py` replays them. Scores are rounded to four digits, seconds to
three; the seconds are processor time of the recording process, which other work on the machine hardly
changes.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlauto.builtin.tasks import task as find_task
from tlauto.config import PRESETS, Preset
from tlauto.contracts import BackboneInfo
from tlauto.errors import DataError
from tlauto.plugins import registry
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar

FORMAT = 1
PRESET = "recorded"
"""The preset of recorded trials: `balanced` with the table's epochs and images an epoch, and `ALONE`."""

ALONE: Mapping[str, Scalar] = {"probe.joined": 1, "image.scale": 1.0}
"""What no recorded trial does: which other backbones a head reads depends on the trials before it, and so
does where larger images are tried."""


@dataclass(frozen=True)
class Recorded:
    """What one configuration did.

    Attributes:
        number: its place in the list of drawn points.
        params: the point, with `backbone`, `strategy` and `head`.
        epochs: validation score, validation loss and seconds of each; the first holds the preparations.
            A frozen trial has one entry: its end.
        seconds: of the whole trial, without the backbone's first pass over the images.
        best_epoch: the epoch that the final model is of.
        held_out, proven_seconds: of a frozen trial: its cross-validated score, and the seconds it takes
            with cross-validation, where a search would pay for that.
        test: score of the final model on the test part, which no policy sees.
        failed: kind and message of the failure, of a trial that failed.
    """

    number: int
    params: Mapping[str, Scalar]
    epochs: Sequence[tuple[float, float, float]]
    seconds: float
    best_epoch: int = 0
    held_out: float | None = None
    proven_seconds: float | None = None
    test: float | None = None
    failed: tuple[str, str] | None = None

    @property
    def score(self) -> float:
        """Validation score of the final model; raises ValueError for a failed trial."""
        return self.epochs[self.best_epoch - 1][0] if self.failed is None else _none(self.number)


@dataclass
class Table:
    """A table in memory.

    Attributes:
        header: see `record_curves.header_of`.
    """

    header: dict[str, Any]
    rows: list[Recorded] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The dataset's name."""
        return str(self.header["data"])

    @property
    def sound(self) -> list[Recorded]:
        """The trials that did not fail."""
        return [row for row in self.rows if row.failed is None]

    def space(self) -> SearchSpace:
        """The search space that the points were drawn from."""
        about = self.header
        parts = (
            tuple(info["id"] for info in about["backbones"]),
            tuple(registry().strategy(name) for name in about["strategies"]),
            tuple(registry().head(name) for name in about["heads"]),
            find_task(about["task"]).space,
        )
        known = SearchSpace(*parts, fixed={}).names
        alone = {name: value for name, value in ALONE.items() if name in known}
        return SearchSpace(*parts, fixed={**alone, **about["fixed"]})

    def infos(self) -> dict[str, BackboneInfo]:
        """The backbones, best prior first."""
        return {info["id"]: BackboneInfo(**info) for info in self.header["backbones"]}

    def save(self, path: Path) -> None:
        """Write the table, whole or not at all."""
        lines = [self.header, *(_short(row) for row in self.rows)]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))  # the same table, the same bytes
        os.replace(temporary, path)


def load(path: Path) -> Table:
    """A table that `Table.save` wrote. Raises: DataError when it is none, or of another version."""
    try:
        header, *rows = map(json.loads, gzip.decompress(path.read_bytes()).decode().splitlines())
        if header["format"] != FORMAT:
            raise DataError(f"{path} has format {header['format']}, not {FORMAT}; record it again")
        return Table(header, [Recorded(**row) for row in rows])
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"cannot read the table {path}: {error}; record_curves.py writes such tables"
        ) from None


def use_preset(epochs: int, epoch_images: int) -> Preset:
    """Make `PRESET` known to this process."""
    usual = PRESETS["balanced"]
    PRESETS[PRESET] = dataclasses.replace(
        usual, finetune_epochs=epochs, cpu_epoch_images=epoch_images, fixed={**usual.fixed, **ALONE}
    )
    return PRESETS[PRESET]


def _short(row: Recorded) -> dict[str, Any]:
    """A row without what is not known."""
    return {name: value for name, value in vars(row).items() if value is not None}


def _none(number: int) -> float:
    raise ValueError(f"trial {number} failed and has no score")
