"""What the recipes of this folder share: their command line, and how they run and report.

A recipe is a search of one trial whose every choice is fixed; each script beside this file states one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import tlauto


def run(title: str | None, recipe: Mapping[str, Any], backbone: str, *, study: str) -> None:
    """Run a recipe once on the folder of images that the command line names; print its test metrics.

    Exits with `error: …` and status 1 where the search raises a TlautoError.

    Args:
        title: what `--help` says; only its first line, so a script can pass its docstring.
        recipe: `strategies`, `heads` and `params` of `tlauto.search`.
        backbone: id of the network to use unless `--backbone` names another.
        study: name of the study in the workspace.
    """
    arguments = _arguments(title, backbone)
    try:
        search = tlauto.search(
            arguments.data,
            study=study,
            new=True,
            out=arguments.out,
            backbones=[arguments.backbone],
            trials=1,
            **recipe,
        )
        for name, found in (search.test or {}).items():
            print(f"{name:>18}  {found['value']:.3f}  (95 %: {found['low']:.3f} to {found['high']:.3f})")
        print(f"{'model':>18}  {search.model}")
    except tlauto.TlautoError as error:
        raise SystemExit(f"error: {error}") from None


def _arguments(title: str | None, backbone: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=title and title.partition("\n")[0])
    parser.add_argument("data", help="folder of class folders, with or without train/ and test/")
    parser.add_argument("--backbone", default=backbone, help=f"default: {backbone}")
    parser.add_argument("--out", default="./tlauto-runs", help="workspace folder")
    return parser.parse_args()
