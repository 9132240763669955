"""`tlauto demo-data`: a small dataset of real images to try things on."""

from __future__ import annotations

import shlex

import click


@click.command()
@click.argument("folder", type=click.Path())
@click.option(
    "--per-class", type=click.IntRange(1, 174), default=60, show_default=True, help="Images of each digit."
)
@click.option("--size", type=click.IntRange(8, 512), default=64, show_default=True, help="Side in pixels.")
def command(folder: str, per_class: int, size: int) -> None:
    """Write scikit-learn's handwritten digits as PNGs in class folders.

    Example: tlauto demo-data ./digits
    """
    from tlauto.data.demo import write_digits

    count = write_digits(folder, per_class=per_class, size=size)
    click.echo(f"{count} images of 10 classes in {folder}; next: tlauto search --data {shlex.quote(folder)}")
