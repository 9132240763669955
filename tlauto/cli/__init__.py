"""The command line: one module per command, imported only when that command runs."""

from __future__ import annotations

import atexit
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Sequence

import click

from tlauto.devices import waiting
from tlauto.errors import TlautoError

# name -> (module, one line for --help); spelled out so that --help imports no command.
COMMANDS = {
    "search": ("search", "Find the best model for a folder of images."),
    "doctor": ("doctor", "Check a dataset: unreadable, duplicate, leaking and mislabelled images."),
    "show": ("show", "Show a search: settings, progress, winner."),
    "leaderboard": ("leaderboard", "List the trials of a search, best first."),
    "rerun": ("rerun", "Run one trial again from its stored specification."),
    "predict": ("predict", "Predict images with a model bundle."),
    "evaluate": ("evaluate", "Measure a model bundle on a dataset."),
    "dashboard": ("dashboard", "Open Optuna dashboard on the workspace."),
    "plugins": ("plugins", "List plugins, what they offer, and which are broken."),
    "backbones": ("backbones", "List backbones and whether their weights are at hand."),
    "weights": ("weights", "List, fetch or verify pretrained weights."),
    "cache": ("cache", "List or clear decoded images and cached features."),
    "demo-data": ("demo_data", "Write a small dataset of real images to try things on."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None when there is none."""
        if cmd_name not in COMMANDS:
            return None
        if not _can_have(STARTING):
            raise MemoryError(f"no {STARTING // 2**20} MiB are left")
        command: click.Command = importlib.import_module(f"tlauto.cli.{COMMANDS[cmd_name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


NO_ROOM = re.compile("failed to map segment|cannot (allocate memory|create shared object)", re.IGNORECASE)
"""What the system's loader says when there is no memory for a library that is imported late."""

UNSAID = re.compile("without (exception set|setting an exception)")
"""What Python says when something in C failed and did not tell what: without memory, or by mistake."""

NO_MEMORY = "error: no memory is left; end other programs, or use fewer --workers"

PROBE = 2**26
"""Bytes that can be had where memory is not what is missing."""

STARTING = 2**28
"""Bytes that a command must be able to get for its libraries. Where they are refused in the middle of one,
NumPy ends the process with words of its own, and Python's import has been seen to run on for ever."""

RESERVE = 2**22
"""Bytes kept back for saying that no more are left, which takes some. Nothing is written to them."""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tlauto", prog_name="tlauto")
def app() -> None:
    """Find the best model that transfer learning can give for your images.

    Example: tlauto search --data ./images
    """


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit 1 on an error of ours, 2 on wrong usage, 130 when interrupted."""
    os.environ.update(waiting())
    # Python has none where the caller closed it (`>&-`).
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    # What is done is done: Ctrl-C while Python clears up would end it as if the search had been cut off.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    reserve: list[bytearray] = []
    try:
        reserve.append(bytearray(RESERVE))
        code = app.main(args=list(args) if args is not None else None, standalone_mode=False)
    except TlautoError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except click.exceptions.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) went away: not an error of ours.
        sys.stderr.close()
        sys.exit(0)
    except (MemoryError, ImportError, SystemError) as error:
        reserve.clear()
        if not _lacks_memory(error):
            raise
        click.echo(NO_MEMORY, err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            reserve.clear()
            click.echo(NO_MEMORY, err=True)
            sys.exit(1)
        # A full disk or a lost permission can strike anywhere.
        what = f"cannot use {error.filename}" if error.filename else "cannot read or write"
        reason = error.strerror or str(error)
        click.echo(f"error: {what}: {reason}; check the path, its permissions and the free space", err=True)
        _forget_unwritten()
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)


def _lacks_memory(error: MemoryError | ImportError | SystemError) -> bool:
    if isinstance(error, SystemError):
        return bool(UNSAID.search(str(error))) and not _can_have(PROBE)
    return isinstance(error, MemoryError) or bool(NO_ROOM.search(str(error)))


def _can_have(size: int) -> bool:
    try:
        bytearray(size)
    except MemoryError:
        return False
    return True


def _forget_unwritten() -> None:
    """Let Python end without what standard output cannot take; at its end that would be a second error."""
    try:
        sys.stdout.flush()
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
