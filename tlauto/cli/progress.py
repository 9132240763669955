"""Show a running search on standard error: a live table on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tlauto.events import (
    Checked,
    DataRead,
    Emit,
    EpochEnded,
    Planned,
    Progress,
    Said,
    TrialEnded,
    TrialStarted,
    Working,
    ignore,
)

if TYPE_CHECKING:
    from rich.console import Console, Group, OverflowMethod
    from rich.live import Live


LISTED = 10
"""Unreadable files that are named."""


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Emit]:
    """A function that shows the events it is called with."""
    if quiet:
        yield ignore
        return
    from rich.console import Console
    from rich.live import Live

    # emoji: without markup rich still reads `timm:x:` as one.
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=not _is_terminal())
    if not console.is_terminal:
        yield Lines(console)
        return
    table = Table(console)
    # Redrawn by events and twice a second for the clock; finished trials scroll above the table.
    with Live(get_renderable=table.render, console=console, refresh_per_second=2, transient=True) as live:
        table.live = live
        yield table


def _is_terminal() -> bool:
    import sys

    return sys.stderr.isatty()


class Lines:
    """One plain line for each thing that ended."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: Progress | None = None

    def __call__(self, event: object) -> None:
        """Print the event if it is worth a line."""
        match event:
            case DataRead():
                for line in data_lines(event):
                    self.say(line)
            case Planned():
                for line in plan_lines(event):
                    self.say(line)
            case TrialEnded(counts=True):
                line, *why = trial_line(event).splitlines()
                self.row(line)
                for text in why:
                    self.say(text)
            case Progress():
                self._progress(event)
            case Said(text):
                self.say(f"note      {text}")
            case Working(text):
                self.working(text)

    def say(self, line: str) -> None:
        """Print a line as it is, without markup."""
        self.console.print(line, markup=False)

    def row(self, line: str) -> None:
        """Print a line of a table: cut at the edge of a terminal, whole elsewhere, never wrapped."""
        overflow: OverflowMethod = "ellipsis" if self.console.is_terminal else "ignore"
        self.console.print(line, markup=False, no_wrap=True, overflow=overflow, crop=self.console.is_terminal)

    def working(self, text: str) -> None:
        """Tell of something that takes a while."""
        self.say(f"…         {text}")

    def _progress(self, now: Progress) -> None:
        """A line whenever the best changes."""
        before = self.last.best_number if self.last else None
        self.last = now
        if now.best_number != before and now.best_score is not None:
            self.say(progress_line(now))


@dataclass
class _Running:
    event: TrialStarted
    since: float = field(default_factory=time.monotonic)
    epoch: int = 0
    score: float | None = None


class Table(Lines):
    """Slots as a live table under the lines of finished trials."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.live: Live | None = None
        self.slots: dict[str, _Running | None] = {}
        self.text = "starting"

    def __call__(self, event: object) -> None:
        """Print what ended above the table and keep the rest in it."""
        super().__call__(event)
        match event:
            case Checked(done=done, total=total):
                self.text = f"…         checking the images: {done}/{total}"
            case Planned(slots=slots):
                self.slots = dict.fromkeys(slots)
                self.text = "starting the first trials"
            case TrialStarted(slot=slot):
                self.slots[slot] = _Running(event)
            case EpochEnded(slot=slot, epoch=epoch, score=score):
                running = self.slots.get(slot)
                if running:
                    running.epoch, running.score = epoch, score
            case TrialEnded(slot=slot):
                self.slots[slot] = None
            case Progress():
                self.text = progress_line(event)

    def working(self, text: str) -> None:
        """Show in the table's last line."""
        self.text = f"…         {text}"
        self.slots = {}

    def _progress(self, now: Progress) -> None:
        self.last = now

    def render(self) -> Group:
        """The table as it stands."""
        from rich.console import Group
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
        for column in ({}, {}, {"ratio": 1, "overflow": "ellipsis"}, {"justify": "right"}):
            table.add_column(no_wrap=True, **column)
        for slot, running in self.slots.items():
            table.add_row(*_slot_row(slot, running))
        return Group(table, Text(self.text, no_wrap=True, overflow="ellipsis"))


def _slot_row(slot: str, running: _Running | None) -> tuple[str, str, str, str]:
    if running is None:
        return slot, "", "idle", ""
    event = running.event
    what = f"{event.backbone}  {event.strategy}  {event.head}"
    score = "" if running.score is None else f"{running.score:.3f}  "
    epoch = f"epoch {running.epoch}/{event.epochs} " if running.epoch else ""
    return slot, f"trial {event.number}", what, f"{epoch}{score}{duration(time.monotonic() - running.since)}"


# --- lines ------------------------------------------------------------------------------------------


def data_lines(event: DataRead) -> list[str]:
    """What was read, and what the doctor found, unreadable files among it."""
    parts = ", ".join(
        f"{name} {count}{' held out' if name == 'test' else ''}" for name, count in event.counts.items()
    )
    what = f"{event.classes} classes, " if event.classes else ""
    lines = [f"images    {event.task}: {what}{parts}"]
    lines += [f"          {note}" for note in event.notes]
    # The first one stands in the doctor's note.
    others, more = event.unreadable[1:LISTED], len(event.unreadable) - LISTED
    lines += [f"          left out: {path}: {reason}" for path, reason in others]
    return lines + ([f"          and {more} more ('tlauto doctor PATH' lists them)"] if more > 0 else [])


def plan_lines(event: Planned) -> list[str]:
    """Slots, space and score."""
    space = (
        f"{_count(event.backbones, 'backbone', 'backbones')} x "
        f"{_count(event.strategies, 'strategy', 'strategies')} x {_count(event.heads, 'head', 'heads')}, "
        f"{event.parameters} parameters"
    )
    lines = [
        f"slots     {' '.join(event.slots)}",
        f"space     {space}",
        f"backbones {', '.join(event.backbones)}",
        f"score     {event.metric} on held-out images ({event.why_metric})",
    ]
    if event.done:
        trials = "trial" if event.done == 1 else "trials"
        lines.append(f"resuming  study '{event.study}' with {event.done} {trials} done")
    return [*lines, HEADER]


def _count(names: Sequence[str], one: str, many: str) -> str:
    return f"{len(names)} {one if len(names) == 1 else many}"


HEADER = "trial score             time backbone  strategy  head"


def trial_line(event: TrialEnded) -> str:
    """A finished trial, under `HEADER`; numbers first, so that names of any length line up."""
    score = "" if event.score is None else f"{event.score:.3f}"
    state = {"complete": "", "pruned": f"pruned {event.note}"}.get(event.state, event.state)
    names = f"{event.backbone}  {event.strategy}  {event.head}"
    why = f"\n       {event.note}" if event.state == "failed" else ""
    return f"{event.number:>5} {score:<5} {state:<9} {duration(event.seconds):>6} {names}{why}"


def progress_line(now: Progress) -> str:
    """Best so far, how far, how long still."""
    best = "none yet" if now.best_score is None else f"trial {now.best_number}, {now.best_score:.3f}"
    total = f"/{now.max_trials}" if now.max_trials else ""
    aside = "".join(f", {n} {what}" for n, what in ((now.pruned, "pruned"), (now.failed, "failed")) if n)
    return f"best      {best}   {now.done}{total} done{aside}{_left(now)}"


def _left(now: Progress) -> str:
    guesses = []
    if now.max_trials and now.seconds_a_trial is not None:
        guesses.append(now.seconds_a_trial * (now.max_trials - now.done))
    if now.seconds_left is not None:
        guesses.append(now.seconds_left)
    left = min(guesses, default=0.0)
    return f", about {duration(left)} left" if left > 0 else ""


def duration(seconds: float) -> str:
    """Seconds as people write them: `0.4 s`, `12 s`, `3 min`, `1 h 20 min`."""
    if seconds < 1:
        return f"{seconds:.1f} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
