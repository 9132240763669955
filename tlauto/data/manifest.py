"""Read a CSV, TSV or JSON-lines file that lists images and their labels."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto.data.images import is_image_name
from tlauto.data.labels import Cell, read_labels
from tlauto.data.raw import Label, RawDataset, Record
from tlauto.data.words import counted
from tlauto.errors import DataError, did_you_mean

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
PATH_NAMES = ("path", "image", "file", "filename", "filepath", "file_name", "image_path", "img")
LABEL_NAMES = ("label", "labels", "target", "class", "class_name", "category", "tags")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What folders, files and cells call a split, in lower case, and which split it is."""

Value = str | tuple[str, ...]


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None where the manifest has no such column."""

    path: str
    label: str
    split: str | None
    group: str | None


@dataclass(frozen=True)
class _Row:
    where: str
    values: Mapping[str, Value]

    def text(self, column: str) -> str:
        value = self.values.get(column, "")
        return value.strip() if isinstance(value, str) else "|".join(value)


def read_manifests(
    files: Sequence[tuple[Path, str | None]],
    *,
    root: Path,
    label_column: str | None,
    path_column: str | None,
    group_column: str | None,
    task: str,
) -> RawDataset:
    """The dataset that manifest files list; each file comes with the split its name says, or None.

    Paths in a manifest are relative to its own folder.
    Raises: DataError naming file and row.
    """
    rows: list[_Row] = []
    splits: list[str | None] = []
    columns: Columns | None = None
    for file, split in files:
        found = _read_rows(file)
        names = list(dict.fromkeys(name for row in found for name in row.values))
        if columns is None:
            columns = _choose(file, names, found, label_column, path_column, group_column)
        _require(file, names, columns)
        rows += found
        splits += [split or _split(row, columns.split) for row in found]
    if columns is None:
        raise DataError(f"no manifest in {root}; pass a CSV or JSONL file of path,label rows")
    task, labels, notes = read_labels([_cell(row, columns.label) for row in rows], task=task)
    paths = _paths(rows, columns.path, root)
    groups = [row.text(columns.group) if columns.group else None for row in rows]
    records = [Record(*record) for record in zip(paths, labels, splits, groups, strict=True)]
    kept, repeated = _without_repeats(records, rows, columns)
    notes.insert(0, f"images from column '{columns.path}', labels from column '{columns.label}'")
    if repeated:
        notes.append(f"{counted(repeated, 'repeated row')} counted once")
    return RawDataset(str(root), "manifest", task, tuple(kept), notes=tuple(notes))


# --- rows -------------------------------------------------------------------------------------------


def _read_rows(file: Path) -> list[_Row]:
    text = _text(file)
    if not text.strip():
        raise DataError(f"manifest '{file}' is empty; it needs a header line such as path,label and rows")
    rows = _csv_rows(file, text) if file.suffix.lower() in (".csv", ".tsv") else _json_rows(file, text)
    if not rows:
        raise DataError(f"manifest '{file}' has a header and no rows; add one row per image")
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"manifest '{file}' is not UTF-8 text (byte {error.start}); save it again as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"cannot open manifest '{file}': {error.strerror}") from None


def _csv_rows(file: Path, text: str) -> list[_Row]:
    header_line = text.lstrip().splitlines()[0]
    # Not `|`, which joins labels.
    delimiter = max(",;\t", key=header_line.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[_Row] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _header(file, cells)
                continue
            where = f"{file.name} line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(
                    f"{where} of {file.parent}: {counted(len(cells), 'cell')} where the header has "
                    f"{len(header)}; quote cells that hold the delimiter '{delimiter}'"
                )
            rows.append(_Row(where, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise DataError(f"manifest '{file}' line {reader.line_num} is not CSV: {error}") from None
    return rows


def _header(file: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if any(is_image_name(cell) for cell in header):
        raise DataError(
            f"manifest '{file}' has no header: its first line is '{','.join(header)[:80]}'; "
            f"put a line such as path,label above it"
        )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise DataError(f"manifest '{file}' has two columns named '{repeated[0]}'; rename one")
    return header


def _json_rows(file: Path, text: str) -> list[_Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} of {file.parent} is not JSON: {error}") from None
        if not isinstance(data, dict):
            raise DataError(f"{where} of {file.parent} is not an object such as {_EXAMPLE}")
        rows.append(_Row(where, {str(key): _plain(value, where) for key, value in data.items()}))
    return rows


_EXAMPLE = '{"path": "a.jpg", "label": "cat"}'


def _plain(value: Any, where: str) -> Value:
    """A JSON value as text, or a list of texts."""
    if value is None:
        return ""
    if isinstance(value, list):
        return tuple(str(_plain(part, where)) for part in value)
    if isinstance(value, (bool, dict)):
        return json.dumps(value)
    return str(value)


# --- columns ----------------------------------------------------------------------------------------


def _choose(
    file: Path,
    names: list[str],
    rows: list[_Row],
    label: str | None,
    path: str | None,
    group: str | None,
) -> Columns:
    for asked, flag in ((label, "--label-column"), (path, "--path-column"), (group, "--group-column")):
        if asked is not None and asked not in names:
            raise DataError(
                f"manifest '{file}' has no column '{asked}' for {flag}, only {_listed(names)}"
                f"{did_you_mean(asked, names)}"
            )
    path = path or _path_column(file, names, rows)
    split = next((name for name in names if name.lower() == "split" and name != label), None)
    others = [name for name in names if name not in (path, split, group)]
    label = label or _label_column(file, names, others)
    if len({path, label, group} - {None}) < 2 + (group is not None):
        raise DataError(f"manifest '{file}': path, label and group must be different columns")
    return Columns(path, label, split, group)


def _path_column(file: Path, names: list[str], rows: list[_Row]) -> str:
    named = [name for name in names if name.lower() in PATH_NAMES]
    if len(named) != 1:
        # Let the content decide: image names in every row.
        named = [n for n in named or names if all(is_image_name(row.text(n)) for row in rows)] or named
    if len(named) != 1:
        problem = "several columns that may hold paths" if named else "no column of image paths"
        raise DataError(
            f"manifest '{file}' has {problem}; name it with --path-column: {_listed(named or names)}"
        )
    return named[0]


def _label_column(file: Path, names: list[str], others: list[str]) -> str:
    named = [name for name in others if name.lower() in LABEL_NAMES] or others
    if not named:
        raise DataError(f"manifest '{file}' has no label column, only {_listed(names)}; add one named label")
    if len(named) > 1:
        raise DataError(
            f"manifest '{file}' has several columns that may hold the label; name it with "
            f"--label-column, and one of groups that stay together with --group-column: {_listed(named)}"
        )
    return named[0]


def _require(file: Path, names: list[str], columns: Columns) -> None:
    for name in (columns.path, columns.label, columns.group):
        if name is not None and name not in names:
            raise DataError(
                f"manifest '{file}' has no column '{name}', only {_listed(names)}; "
                f"all manifests of a dataset need the same columns"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


# --- cells ------------------------------------------------------------------------------------------


def _cell(row: _Row, column: str) -> Cell:
    value = row.values.get(column, "")
    return Cell(row.where, value.strip() if isinstance(value, str) else value)


def _split(row: _Row, column: str | None) -> str | None:
    if column is None:
        return None
    split = SPLIT_NAMES.get(row.text(column).lower())
    if split is None:
        raise DataError(f"{row.where}: the split is '{row.text(column)}'; write train, val or test")
    return split


def _paths(rows: Sequence[_Row], column: str, root: Path) -> list[str]:
    """Paths relative to the root, absolute when outside; raises DataError for files not there."""
    paths: list[str] = []
    missing: list[tuple[_Row, str]] = []
    for row in rows:
        text = row.text(column)
        if not text:
            raise DataError(f"{row.where}: column '{column}' is empty; fill in the path or remove the row")
        file = Path(os.path.normpath(root / text))
        if not os.path.exists(file) and "\\" in text:
            # Written on Windows.
            file = Path(os.path.normpath(root / text.replace("\\", "/")))
        # os.path, unlike Path, takes a name that is too long or odd for a file that is not there.
        if not os.path.isfile(file):
            missing.append((row, text))
        paths.append(file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file))
    if missing:
        raise DataError(_missing(missing, len(rows), root))
    return paths


def _missing(missing: list[tuple[_Row, str]], total: int, root: Path) -> str:
    row, text = missing[0]
    hint = "correct the paths (they are relative to the manifest's folder) or remove the rows"
    for folder in sorted(child for child in root.iterdir() if child.is_dir()):
        same = sorted(f.name for f in folder.glob(f"{glob.escape(Path(text).name)}*") if f.is_file())
        if same:
            hint = f"write it as {folder.name}/{same[0]}, relative to the manifest's folder"
            break
    first = f"first '{text}' ({row.where})"
    return f"{len(missing)} of {counted(total, 'listed image')} not found in '{root}', {first}; {hint}"


def _without_repeats(records: list[Record], rows: list[_Row], columns: Columns) -> tuple[list[Record], int]:
    """Records sorted by path, identical rows once; raises DataError when two rows contradict."""
    first: dict[str, tuple[Record, _Row]] = {}
    for record, row in zip(records, rows, strict=True):
        known = first.setdefault(record.path, (record, row))
        if known[0] != record:
            what = _difference(known[0].label, record.label)
            raise DataError(
                f"'{record.path}' is listed twice with different {what} ({known[1].where} and {row.where}); "
                f"keep one row per image and join several labels with '|'"
            )
    kept = [first[path][0] for path in sorted(first)]
    return kept, len(records) - len(kept)


def _difference(one: Label, other: Label) -> str:
    return "labels" if one != other else "splits or groups"
