"""Starting the command line must stay instant: no heavy library until a command needs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tlauto.cli import COMMANDS

HEAVY = (
    "torch",
    "torchvision",
    "keras",
    "timm",
    "optuna",
    "sqlalchemy",
    "PIL",
    "numpy",
    "sklearn",
    "safetensors",
)
REPORT = f"import json, sys; print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"


def _heavy_after(code: str) -> list[str]:
    """The heavy libraries that a fresh interpreter has loaded after `code` (its last line of output)."""
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    found: list[str] = json.loads(run.stdout.splitlines()[-1])
    return found


def _run_command(*words: str) -> str:
    call = f"tlauto.cli.main({list(words)!r})"
    return (
        f"import tlauto.cli\ntry:\n    {call}\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )


def test_importing_tlauto_loads_no_heavy_library() -> None:
    assert _heavy_after("import tlauto") == []


def test_a_command_that_is_interrupted_while_it_imports_ends_without_a_traceback() -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'tlauto.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from tlauto.__main__ import main\n"
        "print([name for name in sys.modules if name.startswith('tlauto')])\n"
        "main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (130, "")
    assert run.stdout.strip() == "['tlauto', 'tlauto.__main__']", "all else is imported where Ctrl-C is heard"


@pytest.mark.parametrize(
    "words", [("--help",), ("--version",), ("plugins",), ("plugins", "--json")], ids=" ".join
)
def test_a_light_command_loads_no_heavy_library(words: tuple[str, ...]) -> None:
    assert _heavy_after(_run_command(*words)) == []


def test_threads_of_a_command_spin_a_little_unless_the_user_says_otherwise() -> None:
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    code = f"{_run_command('--version')}\nimport os; print(*map(os.environ.get, {names}))"
    for given, expected in (({}, "PASSIVE 1000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None")):
        env = {name: value for name, value in os.environ.items() if name not in names} | given
        run = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert run.stdout.splitlines()[-1] == expected, run.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_loads_no_heavy_library(command: str) -> None:
    assert _heavy_after(_run_command(command, "--help")) == []


def test_the_report_would_show_a_heavy_library() -> None:
    assert _heavy_after("import numpy") == ["numpy"]
