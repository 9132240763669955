"""`tlauto search`: run a search and show it."""

from __future__ import annotations

import json
from typing import Any

import click

from tlauto.config import PRESETS, TASKS, parse_options, parse_params, parse_seconds

EPILOG = """\b
Examples:
  tlauto search --data ./images --trials 30
  tlauto search --data train.csv --label-column weight --time 30m
  tlauto search --data ./images --backbones 'timm:*resnet*,keras:MobileNetV2'
"""


def _names(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = tuple(name.strip() for name in value.split(",") if name.strip())
    if not names:
        raise click.BadParameter("give at least one name")
    return names


def _weights(_ctx: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> dict[str, str] | None:
    pairs = {}
    for text in value:
        id, equals, path = text.partition("=")
        if not equals:
            raise click.BadParameter(
                f"'{text}' is not ID=PATH, for example timm:resnet18=resnet18.safetensors"
            )
        pairs[id] = path
    return pairs or None


@click.command(epilog=EPILOG)
@click.option("--data", metavar="PATH", help="Folder of class folders, split folders, or CSV/JSONL manifest.")
@click.option("--out", metavar="DIR", help="Workspace folder.  [default: ./tlauto-runs]")
@click.option("--study", metavar="NAME", help="Name of the study.  [default: the dataset's]")
@click.option("--task", type=click.Choice(TASKS), help="What to predict.  [default: guessed]")
@click.option("--metric", metavar="NAME", help="The score.  [default: by task and class balance]")
@click.option("--trials", type=int, metavar="N", help="Total trials, earlier runs included.")
@click.option("--time", "time_s", metavar="30m", help="Total time, earlier runs included.")
@click.option("--trial-timeout", "trial_timeout_s", metavar="30m", help="Most time for one trial.")
@click.option("--max-failures", type=int, metavar="N", help="Failures in a row that end it.  [default: 10]")
@click.option("--backbones", callback=_names, metavar="GLOB[,GLOB]", help="Backbones to search.")
@click.option("--strategies", callback=_names, metavar="NAME[,NAME]", help="Freezing strategies to search.")
@click.option("--heads", callback=_names, metavar="NAME[,NAME]", help="Heads to search.")
@click.option("--set", "params", multiple=True, metavar="NAME=VALUE", help="Fix a parameter.")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="How much to spend.  [default: balanced]")
@click.option("--devices", metavar="auto|cpu|cuda:0,…", help="Where trials run.  [default: auto]")
@click.option("--workers", type=int, metavar="N", help="Worker processes; 0 runs in this process.")
@click.option(
    "--per-device", metavar="N|auto", help="Trials at once on each GPU; auto: as fit.  [default: 1]"
)
@click.option("--executor", metavar="NAME", help="What runs the workers.  [default: local, this machine]")
@click.option(
    "--executor-option", multiple=True, metavar="NAME=VALUE", help="A setting of the executor's own."
)
@click.option("--ray-address", metavar="auto|HOST:PORT", help="--executor-option address=…, for ray.")
@click.option("--ensemble", type=int, metavar="N", help="Most models that answer together.  [default: 4]")
@click.option("--seed", type=int, metavar="N", help="Seed of everything.  [default: 0]")
@click.option(
    "--weights", multiple=True, callback=_weights, metavar="ID=PATH", help="Weights file of a backbone."
)
@click.option("--weights-dir", metavar="DIR", help="Folder of PROVIDER/FILE.  [env: TLAUTO_WEIGHTS]")
@click.option("--offline", is_flag=True, default=None, help="Never use the network.")
@click.option(
    "--no-pretrained", "pretrained", flag_value=False, default=None, help="Start from random weights."
)
@click.option("--track", multiple=True, metavar="NAME[=WHERE]", help="Record the search in a tracker too.")
@click.option("--storage", metavar="URL", help="Database URL instead of the workspace's SQLite file.")
@click.option("--resume", is_flag=True, help="Go on with the study if it exists and fits (the default).")
@click.option("--new", is_flag=True, default=None, help="Start another study even if one exists.")
@click.option("--cold", is_flag=True, default=None, help="Learn nothing from the workspace's other studies.")
@click.option("--allow-leaks", is_flag=True, default=None, help="Accept duplicates across given splits.")
@click.option("--label-column", metavar="NAME", help="Column of a manifest that holds the label.")
@click.option("--path-column", metavar="NAME", help="Column of a manifest that holds the image path.")
@click.option("--group-column", metavar="NAME", help="Column whose groups must stay in one split.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    resume: bool, as_json: bool, quiet: bool, params: tuple[str, ...], executor_option: tuple[str, ...],
    ray_address: str | None, **flags: Any,
) -> int:  # fmt: skip
    """Find the best model for a folder of images.

    Screens the backbones, searches over backbone, freezing, head, optimizer and augmentation,
    refits the winner, tests it once and leaves it as a model bundle. Ctrl-C stops and keeps
    everything; the same command goes on.
    """
    from tlauto.api import Search
    from tlauto.cli.progress import show_progress
    from tlauto.cli.summary import print_result, result_json
    from tlauto.config import resolve

    if resume and flags["new"]:
        raise click.UsageError("--resume and --new exclude each other")
    flags["params"] = parse_params(params) or None
    if ray_address is not None:
        executor_option = (*executor_option, f"address={ray_address}")
    flags["executor_options"] = parse_options(executor_option) or None
    for name in ("time_s", "trial_timeout_s"):
        flags[name] = None if flags[name] is None else parse_seconds(flags[name])
    flags["track"] = flags["track"] or None
    config = resolve(flags)
    from tlauto.coordinator import run  # after the checks: Optuna and SQLAlchemy take a second

    with show_progress(quiet=quiet) as emit:
        session, interrupted = run(config, emit=emit)
    search = Search(session.name, session.plan.folder.parent, config.storage, interrupted)
    if as_json:
        click.echo(json.dumps(result_json(search), indent=2))
    else:
        print_result(search)
    return 130 if interrupted else 0
