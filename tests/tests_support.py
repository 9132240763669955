"""What tests of the command line share: how to start it, and in which environment."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tlauto.contracts import TrialSpec, WeightsOptions

TINY = ("--backbones", "timm:test_resnet.r160_in1k", "--no-pretrained", "--offline", "--preset", "fast")
"""Arguments of a search over one random backbone of 0.5 M parameters."""


def trial_spec(number: int) -> TrialSpec:
    """A specification to record, not to run."""
    return TrialSpec(
        number=number, dataset="d.json", task="multiclass", metric="accuracy", backbone="timm:x",
        strategy="full", head="linear", params={"optim.name": "sgd"}, weights=WeightsOptions(), seed=1,
        epochs=3, folder="f", cache="c",
    )  # fmt: skip


def command(*args: str) -> list[str]:
    """The command line of `tlauto ARGS`."""
    return [sys.executable, "-m", "tlauto", *args]


def environment(folder: Path) -> dict[str, str]:
    """An environment whose caches lie in `folder`, with no setting of the user's."""
    # With PYTHONUNBUFFERED set, what is printed does not wait for the end, where a full disk shows again.
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TLAUTO_") and k != "PYTHONUNBUFFERED"}
    homes = {"TLAUTO_CACHE": "cache", "KERAS_HOME": "keras", "TORCH_HOME": "torch", "HF_HOME": "hf"}
    return {
        **kept,
        "COLUMNS": "80",
        "CUDA_VISIBLE_DEVICES": "",
        **{k: str(folder / v) for k, v in homes.items()},
    }


def run(
    *args: str, cwd: Path, timeout_s: float = 300, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `tlauto ARGS` in `cwd` to its end; `env` is added to its environment."""
    return subprocess.run(
        command(*args),
        cwd=cwd,
        env={**environment(cwd), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def refused(*args: str, cwd: Path, code: int = 1, env: Mapping[str, str] | None = None) -> str:
    """The one sentence with which `tlauto ARGS` ends; with code 1 it is all that is printed."""
    done = run(*args, cwd=cwd, env=env, timeout_s=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    if code == 2:
        assert lines[0].startswith("Usage:"), done.stderr
        assert lines[-1].startswith("Error: "), done.stderr
    else:
        assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[-1]


def install_troubles(folder: Path) -> dict[str, str]:
    """Install `trouble_plugin` into `folder`, and the environment in which its heads are found."""
    marks = folder / "marks"
    marks.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "trouble_plugin.py", folder)
    info = folder / "trouble-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trouble\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tlauto]\ntrouble = trouble_plugin\n")
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TROUBLE_MARKS": str(marks)}


def run_with_mounts(script: str, *, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script, `$TLAUTO` for the command, whose mounts nobody else sees, or skip the test."""
    user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    shell = ["unshare", "--mount", *user, "sh", "-ec"]
    try:
        subprocess.run([*shell, "mount -t tmpfs tmpfs ."], cwd=cwd, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this system lets no test mount anything ({error})")
    env = {**environment(cwd), "TLAUTO": f"{sys.executable} -m tlauto"}
    return subprocess.run(
        [*shell, script], cwd=cwd, env=env, capture_output=True, text=True, timeout=500, check=False
    )


def wait_for(log: Path, pattern: str, process: subprocess.Popen[Any]) -> re.Match[str]:
    """The first match of a pattern in what a process writes to its log."""
    deadline = time.monotonic() + 300  # only catches a hang
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(f"'{pattern}' never came; it said:\n{log.read_text()}")


HERE = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens pages of this machine, whatever proxy another test has set for good."""


def wait_until_served(port: int) -> None:
    """Return once the dashboard answers; it says that it listens a moment before it does."""
    # An answer, not a connection: to a port that nobody listens on one may connect with oneself.
    deadline = time.monotonic() + 60
    while True:
        try:
            HERE.open(f"http://127.0.0.1:{port}/", timeout=30).close()
            return
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process (Linux)."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def spec_of(**changes: Any) -> TrialSpec:
    """A specification of a trial on the smallest backbone, with random weights."""
    given = {
        "number": 0, "dataset": "", "task": "multiclass", "metric": "accuracy", "backbone": TINY[1],
        "strategy": "full", "head": "linear", "params": {}, "seed": 0, "epochs": 2, "folder": "", "cache": "",
        "weights": WeightsOptions(pretrained=False, offline=True), **changes,
    }  # fmt: skip
    return TrialSpec(**given)


def _truncate(file: Path) -> None:
    with Image.open(file) as image:
        image.resize((200, 200)).save(file.with_suffix(".jpg"))
    file.unlink()
    jpeg = file.with_suffix(".jpg")
    jpeg.write_bytes(jpeg.read_bytes()[:-900])


SPOILED: dict[str, Callable[[Path], object]] = {
    "zero": lambda file: file.write_bytes(b""),
    "text": lambda file: file.rename(file.with_suffix(".jpg")).write_text("a caption"),
    "truncated": _truncate,
    "noise": lambda file: file.write_bytes(os.urandom(500)),
}
"""Ways to make an image file unreadable; the suffix may change."""


def leaderboard(folder: Path, *study: str) -> list[dict[str, Any]]:
    """The trials of a study in the workspace below `folder`, as `leaderboard --json` prints them."""
    rows: list[dict[str, Any]] = json.loads(run("leaderboard", *study, "--json", cwd=folder).stdout)
    return rows
