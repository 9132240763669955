"""What a search found, as text for people and as the documented JSON."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlauto.cli.progress import duration
from tlauto.errors import StoreError
from tlauto.levels import read_from
from tlauto.recipe import beside, scale_of

if TYPE_CHECKING:
    from rich.console import Console

    from tlauto.api import Search
    from tlauto.results.leaderboard import Row

WIDE = 200
"""Columns of a table that goes to a file or another program, where no name should be cut."""

LAST_WORDS = 3
"""Lines of a failed trial's traceback or log that are shown; its JSON has them all."""

SAME_WINNER = (
    "{} ranks first here as on all earlier datasets of this workspace, though others came near: the ranking "
    "may follow the backbones more than the images; try others by themselves with --backbones"
)


def print_result(search: Search) -> None:
    """The end of `tlauto search`."""
    console = _console()
    rows = search.leaderboard()
    _print_table(console, [row for row in rows if row.score is not None][:5])
    _print_end(console, search, rows)


def print_leaderboard(search: Search, rows: Sequence[Row]) -> None:
    """`tlauto leaderboard`."""
    console = _console()
    console.print(f"study     {search.name}, {len(rows)} trials", markup=False)
    _print_table(console, rows)


def print_study(search: Search) -> None:
    """`tlauto show`."""
    console = _console()
    info = search.info()
    config, plan, report = info["config"], info["plan"], info["dataset"]["report"]
    rows = search.leaderboard()
    states = Counter(
        "interrupted" if row.is_interrupted else "tried again" if row.retried else row.state for row in rows
    )
    given = {k: v for k, v in config.items() if v not in (None, [], {}, False) and k not in ("data", "study")}
    version = f", version {info['version']}" if info["version"] > 1 else ""
    lines = [
        ("study", f"{search.name} ({info['state']}, {duration(info['seconds'])} active{version})"),
        ("data", f"{config['data']} ({plan['task']}, fingerprint {info['dataset']['fingerprint'][:12]})"),
        ("score", f"{plan['metric']} on held-out images"),
        ("trials", ", ".join(f"{n} {state}" for state, n in states.items()) or "none"),
        ("backbones", ", ".join(plan["backbones"])),
        ("settings", ", ".join(f"{k} {_plain(v)}" for k, v in given.items())),
    ]
    for name, text in lines:
        console.print(f"{name:<9} {text}", markup=False)
    for warning in report.get("warnings", []):
        console.print(f"note      {warning}", markup=False)
    _print_screening(console, search, rows)
    _print_end(console, search, rows)


def result_json(search: Search) -> dict[str, Any]:
    """The documented result of a search; see `docs/json.md`."""
    rows, screening = search.leaderboard(), dataclasses.asdict(search.screening)
    best = next((row for row in rows if row.is_best), None)
    info = search.info()
    return {
        "study": search.name,
        "out": str(search.out),
        "state": info["state"],
        "interrupted": search.interrupted,
        "task": info["plan"]["task"],
        "metric": info["plan"]["metric"],
        "backbones": info["plan"]["backbones"],
        "screening": list(screening["backbones"]),
        "learned_from": list(screening["learned_from"]),
        "same_winner": screening["same_winner"],
        "seconds": round(info["seconds"], 3),
        "trials": sum(row.counts for row in rows),
        "best": dataclasses.asdict(best) if best else None,
        "model": str(search.model) if search.model.is_dir() else None,
        "test": search.test,
        "comparison": search.comparison,
        "members": search.members,
    }


def _print_table(console: Console, rows: Sequence[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("trial", justify="right", no_wrap=True)
    table.add_column("score", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("backbone", overflow="fold")  # the only one that gives way: no name is cut
    for name in ("strategy", "head"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        score = "" if row.score is None else f"{row.score:.3f}"
        if row.state != "complete":
            score = f"{score} {row.state}".strip()
        took = "" if row.seconds is None else duration(row.seconds)
        backbones = " + ".join((row.backbone, *beside(row.params)))
        cells = (str(row.number), score, took, backbones, row.strategy, row.head)
        # As Text, not as str: a name may hold brackets that rich would read as markup.
        table.add_row(*map(Text, cells), style="bold green" if row.is_best else None)
    console.print(table)
    for row in rows:
        if row.state == "failed":
            again = " (it was tried again)" if row.retried else ""
            console.print(f"trial {row.number} failed: {row.error}{again}", markup=False)
            lines = [line for line in (row.detail or "").splitlines() if line.strip()]
            for line in lines[-LAST_WORDS:]:
                console.print(f"        {line}", markup=False)


def _print_screening(console: Console, search: Search, rows: Sequence[Row]) -> None:
    found = search.screening
    for place, one in enumerate(found.backbones):
        start = "" if place else "screened"
        stays = "" if one.goes_on else ", dropped"
        text = f"{start:<9} {one.backbone} {one.score:.3f} in {duration(one.seconds)}{stays}"
        console.print(text, markup=False)
    if found.learned_from:
        console.print(f"learned   from {', '.join(found.learned_from)}", markup=False)
    for row in rows:
        if row.from_study:
            console.print(f"          trial {row.number}: what was best in {row.from_study}", markup=False)


def _print_end(console: Console, search: Search, rows: Sequence[Row]) -> None:
    same = search.screening.same_winner
    if same:
        console.print(f"note      {SAME_WINNER.format(same)}", markup=False)
    best = next((row for row in rows if row.is_best), None)
    if best is None:
        console.print("best      no trial has a score yet", markup=False)
        return
    console.print()
    others = beside(best.params)
    scale, mirror = scale_of(best.params), best.params.get("probe.mirror")
    read = read_from(best.features, mirror=mirror, beside=others, scale=scale)
    what = f"{best.backbone}, {best.strategy}, {best.head}{read}"
    console.print(f"best      trial {best.number}: {what}", markup=False)
    console.print(f"score     {best.score:.3f} on held-out images", markup=False)
    test = search.test
    if test:
        shown = [name for name in _order(test, search) if name in test][:4]
        for place, name in enumerate(shown):
            start = "test" if place == 0 else ""
            console.print(f"{start:<9} {name} {_interval(test[name])}", markup=False)
    if len(search.members) > 1:
        weights = ", ".join(f"{weight:.2f}" for weight in search.members.values())
        console.print(
            f"ensemble  {len(search.members)} models answer together, weights {weights}", markup=False
        )
    for line in _comparison_lines(search.comparison) if test else []:
        console.print(line, markup=False)
    if search.model.is_dir():
        state = "" if test else " (best so far, not yet tested)"
        console.print(f"model     {search.model}{state}", markup=False, soft_wrap=True)
        console.print(f"next      tlauto predict {_short(search)} IMAGE…", markup=False, soft_wrap=True)
    if search.interrupted:
        console.print("stopped   the same command goes on where this stopped", markup=False)


def _comparison_lines(comparison: Mapping[str, Any] | None) -> list[str]:
    if not comparison:
        return ["default   not compared: the default recipe has no result"]
    if comparison.get("default_is_winner"):
        return ["default   the default recipe is the winner"]
    other = comparison["default"]
    value = other["metrics"][comparison["metric"]]
    verdict = "significant" if comparison["significant"] else "not significant"
    gain = f"{comparison['gain']:+.3f} [{comparison['low']:+.3f}, {comparison['high']:+.3f}]"
    return [
        f"default   {other['backbone']}, {other['strategy']}, {other['head']}",
        f"          {comparison['metric']} {_interval(value)}",
        f"gain      {gain} over the default recipe, {verdict}",
    ]


def _order(test: Mapping[str, Any], search: Search) -> list[str]:
    try:
        first = search.info()["plan"]["metric"]
    except StoreError:
        return list(test)
    return [first, *(name for name in test if name != first)]


def _interval(entry: Mapping[str, float]) -> str:
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _short(search: Search) -> str:
    from pathlib import Path

    try:
        return str(search.model.relative_to(Path.cwd()))
    except ValueError:
        return str(search.model)


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _console() -> Console:
    from rich.console import Console

    is_file = not sys.stdout.isatty()
    width = WIDE if is_file and "COLUMNS" not in os.environ else None
    return Console(highlight=False, emoji=False, soft_wrap=is_file, width=width)
