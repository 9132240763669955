"""`tlauto predict`: answers for images."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tlauto.results.bundle import Bundle
    from tlauto.results.prediction import Prediction

BLOCK = 256
"""Images predicted before their lines are shown."""


@click.command(name="predict")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("paths", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="PATH...")
@click.option("--top-k", type=click.IntRange(min=1), default=1, help="Classes shown per image. [1]")
@click.option("--json", "form", flag_value="json", help="Print a JSON list.")
@click.option("--csv", "form", flag_value="csv", help="Print CSV with a header line.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N. [auto]")
def command(model: Path, paths: tuple[Path, ...], top_k: int, form: str | None, device: str) -> int:
    """Predict images with a model bundle.

    MODEL is a bundle's folder; PATH is an image, or a folder whose images are all taken. Images that
    cannot be read are named on stderr, the others are predicted, and the exit code is 1.

    Example: tlauto predict tlauto-runs/flowers/model photos/ --top-k 3
    """
    from tlauto.results.bundle import load_bundle, require_bundle

    require_bundle(model)  # at once: loading takes seconds
    failures: list[str] = []
    files = list(_files(paths, failures))
    if not files:
        return 1
    bundle = load_bundle(model, device)
    # A CSV table of a multilabel model has a column for every class.
    kept = len(bundle.labels) if form == "csv" and bundle.manifest.task == "multilabel" else top_k
    answers = _answers(bundle, files, kept, failures)
    if form == "json":
        click.echo(json.dumps([answer.to_dict() for answer in answers], indent=2, ensure_ascii=False))
    elif form == "csv":
        _write_csv(bundle, answers, top_k)
    else:
        for answer in answers:
            click.echo(_line(bundle.manifest.task, answer))
    return 1 if failures else 0


def _files(paths: Sequence[Path], failures: list[str]) -> Iterator[Path]:
    """The images named and those in the folders named, in order; an empty folder is a failure."""
    from tlauto.data.images import is_image_name

    for path in paths:
        if not path.exists():
            _tell(f"there is no file or folder {path}; check the path", failures)
            continue
        if not path.is_dir():
            yield path
            continue
        found = [file for file in sorted(path.rglob("*")) if is_image_name(file.name)]
        inside = [f for f in found if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        if not inside:
            _tell(f"the folder {path} holds no images; name a folder of images", failures)
        yield from inside


def _answers(bundle: Bundle, files: Sequence[Path], top_k: int, failures: list[str]) -> Iterator[Prediction]:
    remaining = iter(files)
    while block := list(islice(remaining, BLOCK)):
        yield from bundle.predict(block, top_k, on_unreadable=lambda _path, reason: _tell(reason, failures))


def _tell(reason: str, failures: list[str]) -> None:
    failures.append(reason)
    click.echo(f"error: {reason}", err=True)


def _line(task: str, answer: Prediction) -> str:
    if answer.value is not None:
        return f"{answer.path}  {answer.value:.6g}"
    shown = "  ".join(f"{name} {chance:.3f}" for name, chance in (answer.probabilities or {}).items())
    if task == "multilabel" and not answer.labels:
        return f"{answer.path}  none (nearest: {shown})"
    return f"{answer.path}  {shown}"


def _write_csv(bundle: Bundle, answers: Iterable[Prediction], top_k: int) -> None:
    """A table: `path,value`; `path,labels` and a column a class; or `path,label,probability,…`."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    task, labels = bundle.manifest.task, bundle.labels
    ranks = range(1, min(top_k, len(labels)) + 1)
    if task == "regression":
        table.writerow(["path", "value"])
    elif task == "multilabel":
        table.writerow(["path", "labels", *labels])
    else:
        suffixes = ["" if rank == 1 else f"_{rank}" for rank in ranks]
        table.writerow(["path", *(f"{name}{s}" for s in suffixes for name in ("label", "probability"))])
    for answer in answers:
        chances = answer.probabilities or {}
        if task == "regression":
            table.writerow([answer.path, answer.value])
        elif task == "multilabel":
            table.writerow([answer.path, "|".join(answer.labels), *(f"{chances[n]:.6g}" for n in labels)])
        else:
            table.writerow([answer.path, *(cell for n, c in chances.items() for cell in (n, f"{c:.6g}"))])
