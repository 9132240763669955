"""Measure a bundle on a labelled dataset, without counting what it was fitted on as new."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tlauto import metrics
from tlauto.data.raw import RawDataset, Record
from tlauto.data.readers import read
from tlauto.errors import ConfigError, DataError, did_you_mean
from tlauto.results.files import sha256

if TYPE_CHECKING:
    from pathlib import Path

    from tlauto.results.bundle import Bundle

SPLITS = ("test", "all")
NAMED = 5


def evaluate(
    bundle: Bundle,
    data: str | Path,
    *,
    split: str = "test",
    label_column: str | None = None,
    path_column: str | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Metrics of a bundle on a dataset, as plain data.

    Args:
        data: folder or manifest, as for a search.
        split: `test` takes the test part if the dataset has one, else the images that the model
            was not fitted on; `all` takes every image.
        seed: of the bootstrap; by default the one that the recorded test result was measured with.

    Returns: `data`, `task`, `split`, `images` (measured), `fitted_images` (of those, how many the
    model was fitted on: above 0 the figures are too good), `unreadable` (path and reason of those
    left out) and `metrics`: name to `value`, `low`, `high`, a 95 % interval.

    Raises: DataError when nothing can be measured or a label is not one of the bundle's classes;
    ConfigError for an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"no split '{split}'{did_you_mean(split, SPLITS)}; choose test or all")
    task = bundle.manifest.task
    seed = bundle.manifest.spec.seed if seed is None else seed
    raw = read(data, label_column=label_column, path_column=path_column, task=task)
    records, is_fitted = _chosen(bundle, raw, split)
    targets = _targets(bundle, raw, records)
    paths = [str(raw.file(record)) for record in records]
    unreadable: list[dict[str, str]] = []
    outputs = dict(bundle.outputs(
        paths, on_unreadable=lambda path, reason: unreadable.append({"path": path, "reason": reason})
    ))  # fmt: skip
    kept = [i for i, path in enumerate(paths) if path in outputs]
    if not kept:
        raise DataError(f"none of the {len(records)} images of {data} can be read: {unreadable[0]['reason']}")
    return {
        "data": str(data),
        "task": task,
        "split": split,
        "images": len(kept),
        "fitted_images": sum(is_fitted[i] for i in kept),
        "unreadable": unreadable,
        "metrics": _measure(bundle, [targets[i] for i in kept], [outputs[paths[i]] for i in kept], seed),
    }


def _chosen(bundle: Bundle, raw: RawDataset, split: str) -> tuple[list[Record], list[bool]]:
    """The records to measure, and whether the model was fitted on each."""
    records = list(raw.records)
    has_test = any(record.split == "test" for record in records)
    if split == "test" and has_test:
        records = [record for record in records if record.split == "test"]
    fitted = bundle.fitted_on()
    with ThreadPoolExecutor() as threads:
        digests = threads.map(_digest, [raw.file(record) for record in records])
        is_fitted = [digest in fitted for digest in digests]
    if split == "test" and not has_test:
        new = [(record, False) for record, known in zip(records, is_fitted, strict=True) if not known]
        if not new:
            raise DataError(
                f"the model was fitted on every image of {raw.root}, so none is left to test it on; "
                f"give it new images, or --split all to measure on them all the same"
            )
        return [record for record, _ in new], [known for _, known in new]
    return records, is_fitted


def _digest(file: Path) -> str:
    try:
        return sha256(file)
    except DataError:
        return ""  # reading the image will fail as well, and name it


def _targets(bundle: Bundle, raw: RawDataset, records: Sequence[Record]) -> list[Any]:
    """Class indices, tuples of them, or values, by the bundle's own order of classes."""
    if bundle.manifest.task == "regression":
        return [record.label for record in records]
    index = {name: i for i, name in enumerate(bundle.labels)}
    names = [record.label if isinstance(record.label, tuple) else (str(record.label),) for record in records]
    unknown = sorted({name for row in names for name in row} - set(index))
    if unknown:
        shown = ", ".join(f"'{name}'" for name in unknown[:NAMED])
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        classes = ", ".join(bundle.labels[:20]) + (", …" if len(bundle.labels) > 20 else "")
        raise DataError(
            f"{raw.root} has labels that are no classes of the model {bundle.folder}: {shown}{more}"
            f"{did_you_mean(unknown[0], index)} (its classes: {classes})"
        )
    rows = [tuple(index[name] for name in row) for row in names]
    return rows if bundle.manifest.task == "multilabel" else [row[0] for row in rows]


def _measure(bundle: Bundle, targets: list[Any], outputs: list[Any], seed: int) -> dict[str, Any]:
    import numpy as np

    from tlauto.builtin.tasks import task

    found = task(bundle.manifest.task)
    expected = found.targets(targets, bundle.labels)
    return metrics.compute_all(found.name, expected, np.stack(outputs), intervals=True, seed=seed)
