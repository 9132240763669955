"""`tlauto doctor`: check a dataset before anything is trained on it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from tlauto.errors import DataError

if TYPE_CHECKING:
    from tlauto.data import Dataset, DoctorReport

_LISTED = 20


@click.command()
@click.argument("path", type=click.Path())
@click.option("--task", default="auto", metavar="NAME", help="multiclass, multilabel or regression.")
@click.option("--label-column", metavar="NAME", help="Column of a manifest that holds the labels.")
@click.option("--path-column", metavar="NAME", help="Column of a manifest that holds the paths.")
@click.option("--group-column", metavar="NAME", help="Column whose equal values stay in one split.")
@click.option("--allow-leaks", is_flag=True, help="Accept identical images in several given splits.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(
    path: str,
    task: str,
    label_column: str | None,
    path_column: str | None,
    group_column: str | None,
    allow_leaks: bool,
    as_json: bool,
) -> None:
    """Check a dataset: unreadable, duplicate, leaking and mislabelled images.

    Nothing is changed. Exits with 1 when no search could use the dataset.

    Example: tlauto doctor ./images
    """
    from tlauto.data import examine, make_dataset, memory_file, read

    raw = read(path, label_column=label_column, path_column=path_column, group_column=group_column, task=task)
    with _progress() as progress:
        report = examine(raw, memory=memory_file(path), progress=progress)
    dataset, problem = None, None
    try:
        dataset = make_dataset(raw, report, allow_leaks=allow_leaks)
    except DataError as error:
        problem = error
    if as_json:
        click.echo(json.dumps(_as_json(report, dataset, problem), indent=2))
        click.get_current_context().exit(1 if problem else 0)
    _print(path, report, dataset)
    if problem:
        raise problem


def _as_json(report: DoctorReport, dataset: Dataset | None, problem: DataError | None) -> dict[str, object]:
    return {
        **report.to_json(),
        "usable": problem is None,
        "problem": None if problem is None else str(problem),
        "fingerprint": dataset.fingerprint if dataset else None,
        "split": _parts(dataset) if dataset else None,
    }


def _parts(dataset: Dataset) -> dict[str, int]:
    return {part: len(dataset.part(part)) for part in ("train", "val", "test")}


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("checking images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# --- for people ------------------------------------------------------------------------------------


def _print(path: str, report: DoctorReport, dataset: Dataset | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"warning": "yellow", "unreadable": "yellow", "usable": "green"}
    grid = Table.grid(padding=(0, 2))
    grid.add_column(min_width=10)
    grid.add_column(overflow="fold")
    for name, text in _lines(path, report, dataset):
        # Text, not markup: file names may hold brackets.
        grid.add_row(Text(name, styles.get(name, "bold")), Text(_printable(text)))
    Console(highlight=False).print(grid)


def _lines(path: str, report: DoctorReport, dataset: Dataset | None) -> Iterator[tuple[str, str]]:
    yield "data", f"{report.root} ({report.kind}, {report.task})"
    yield "images", f"{report.images} usable of {report.images + len(report.unreadable)}{_splits(dataset)}"
    if report.class_counts:
        yield "classes", _classes(report.class_counts)
    if report.images:
        yield "files", _files(report)
    for note in report.notes:
        yield "note", note
    for warning in report.warnings:
        yield "warning", warning
    for name, reason in report.unreadable[:_LISTED]:
        yield "unreadable", f"{name}: {reason}"
    if len(report.unreadable) > _LISTED:
        yield "", f"and {len(report.unreadable) - _LISTED} more ('tlauto doctor --json' lists them all)"
    if dataset:
        healthy = "yes, with warnings" if report.warnings else "yes"
        yield "usable", f"{healthy}; next: tlauto search --data {shlex.quote(path)}"


def _splits(dataset: Dataset | None) -> str:
    if dataset is None:
        return ""
    return " (" + ", ".join(f"{part} {count}" for part, count in _parts(dataset).items()) + " held out)"


def _classes(counts: Mapping[str, int]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in list(counts.items())[:_LISTED])
    more = f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
    return f"{len(counts)}: {shown}{more}"


def _files(report: DoctorReport) -> str:
    shortest, median, longest = report.sides
    parts = [
        ", ".join(f"{count} {name}" for name, count in report.formats.items()),
        "modes " + ", ".join(f"{name} {count}" for name, count in report.modes.items()),
        f"sides {shortest} to {longest} pixels, median {median}",
    ]
    if report.rotated:
        parts.append(f"{report.rotated} turned upright by EXIF")
    if report.animated:
        parts.append(f"{report.animated} animated, first frame used")
    return "; ".join(parts)


def _printable(text: str) -> str:
    """File names that are not UTF-8 with a replacement character instead of an error."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
