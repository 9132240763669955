"""The ways to a model that `anytime.py` compares, each run as a process of its own, and their results kept.

tlauto's search and AutoGluon are told their budget, so they run once for each; the others run once, for
the longest, and their models on the way count. All that are not tlauto start with the allocator and
thread settings that tlauto gives its workers, with all cores.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from curve import cores
from measured import Run, measured

BENCH = Path(__file__).parent


@dataclass(frozen=True)
class Setting:
    """One dataset with one seed, and how everybody is to be run on it.

    Attributes:
        name: of the dataset, as in the table.
        facts: what `handover.py` wrote.
        handed: the file that it wrote.
        extra: options of `tlauto search`.
        pythons: interpreters of contenders that have an environment of their own.
    """

    name: str
    seed: int
    facts: Mapping[str, Any]
    handed: str
    weights_dir: str | None
    pretrained: bool
    extra: tuple[str, ...]
    pythons: Mapping[str, str]

    @property
    def common(self) -> list[str]:
        """Options of tlauto and of the scripts that use it to read the dataset."""
        options = ["--data", self.facts["data"], "--seed", str(self.seed), "--offline", "--allow-leaks"]
        options += ["--weights-dir", self.weights_dir] if self.weights_dir else []
        return options + ([] if self.pretrained else ["--no-pretrained"])

    @property
    def backbones(self) -> list[str]:
        return [part for id in self.facts["backbones"] for part in ("--backbone", id)]


@dataclass(frozen=True)
class Result:
    """What a contender had to offer over time, and what it took.

    Attributes:
        rows: seconds, validation and test accuracy of each new best.
        right: for each row a digit an image of the test part: 1 is right.
        whole_s: seconds of the whole run, with one test of the model it ends with.
        cpu_s: user and system time of all its processes, without what it tested on the way.
        peak_mib: the largest sum over its processes; None where the system does not tell.
    """

    rows: list[list[float]]
    right: list[str]
    whole_s: float
    cpu_s: float
    peak_mib: float | None


def search(setting: Setting, budget: float, folder: str) -> Result:
    """`tlauto search --time`; what it offered on the way is measured after its end."""
    command = [sys.executable, "-m", "tlauto", "search", *setting.common, *setting.extra, "--json"]
    run = measured([*command, "--time", f"{budget:.0f}s"], folder, {}, echo=False)
    found = json.loads(run.output)
    after = [sys.executable, str(BENCH / "search_curve.py"), found["out"], found["study"]]
    offered = json.loads(_last(measured([*after, "--started", repr(run.started)], folder, {})))
    tested, final = found["test"]["accuracy"]["value"], offered["final"]
    if abs(tested - final.count("1") / len(final)) > 0.01:
        sys.exit(f"error: a search tested {tested}, but its model has {final.count('1')} of {len(final)}")
    rows = [*offered["curve"], [round(run.wall_s, 1), found["best"]["score"], tested]]
    return Result(rows, [*offered["right"], final], run.wall_s, run.cpu_s, run.peak_mib)


def script(setting: Setting, budget: float, folder: str) -> Result:
    """The probe script; it ends when it has been through the backbones."""
    command = [sys.executable, str(BENCH / "probe_script.py"), *setting.common, *setting.backbones]
    return _result(measured(command, folder, torch_settings()))


def loop(setting: Setting, budget: float, folder: str, *, sampler: str = "tpe") -> Result:
    """The plain Optuna loop."""
    command = [sys.executable, str(BENCH / "naive_optuna.py"), *setting.common, *setting.backbones]
    command += ["--time", str(budget), "--sampler", sampler]
    return _result(measured(command, folder, torch_settings()))


def random(setting: Setting, budget: float, folder: str) -> Result:
    """The same loop with trials drawn at random."""
    return loop(setting, budget, folder, sampler="random")


def fastai(setting: Setting, budget: float, folder: str) -> Result:
    """fastai's `lr_find` and `fine_tune`."""
    return _elsewhere(setting, "fastai", budget, folder)


def autogluon(setting: Setting, budget: float, folder: str) -> Result:
    """AutoGluon's `MultiModalPredictor`."""
    return _elsewhere(setting, "autogluon", budget, folder)


CONTENDERS: dict[str, Callable[[Setting, float, str], Result]] = {
    "tlauto": search, "script": script, "loop": loop, "random": random, "fastai": fastai,
    "autogluon": autogluon,
}  # fmt: skip
BUDGETED = ("tlauto", "autogluon")
"""Contenders that have nothing to show before their budget is spent, or use it differently."""

ELSEWHERE = {"fastai": ("fastai_finetune.py", "fastai.vision.all"),
             "autogluon": ("autogluon_images.py", "autogluon.multimodal")}  # fmt: skip
"""Contenders with an environment of their own: the script, and what that environment must import."""


def missing(name: str, pythons: Mapping[str, str]) -> str | None:
    """Why a contender cannot run; None when it can."""
    if name not in ELSEWHERE:
        return None
    python, (file, module) = pythons.get(name, sys.executable), ELSEWHERE[name]
    try:
        command = [python, "-c", f"import {module}"]
        # Not where the user is: a folder named fastai there would be imported.
        done = subprocess.run(command, cwd=BENCH, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python} does not start ({error.strerror}); bench/{file} says how to make an environment"
    if not done.returncode:
        return None
    reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    return (
        f"{python} cannot import {module} ({reason}); "
        f"bench/{file} says how to make an environment for --python {name}=PATH"
    )


def kept_or_run(
    name: str, setting: Setting, budget: float, keep: Path | None, *, runs: bool
) -> Result | None:
    """A contender's result: kept in a folder where the same was measured before, else measured if it runs."""
    file = keep / f"{_key(name, setting, budget)}.json" if keep else None
    if file is not None and file.is_file():
        data = json.loads(file.read_text(encoding="utf-8"))
        print(f"{file.name}: kept from {data['date']}, commit {data['commit']}", file=sys.stderr)
        return Result(**data["result"])
    if not runs:
        return None
    with TemporaryDirectory() as folder:
        result = CONTENDERS[name](setting, budget, folder)
    if file is not None:
        _keep(file, _options(name, setting, budget), result)
    return result


def _keep(file: Path, options: Mapping[str, Any], result: Result) -> None:
    facts = {"options": options, "commit": commit(), "cores": cores(), "result": asdict(result)}
    facts["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(facts), encoding="utf-8")
    part.replace(file)  # never half a result


def commit() -> str:
    """The commit that is measured; `+` when tlauto or the bench differ from it."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + ("+" if _git("status", "--porcelain", "../tlauto", ".") else "") if head else "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(BENCH), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def torch_settings() -> dict[str, str]:
    """The settings of tlauto's workers that serve any process with torch, for one with all cores."""
    from tlauto.devices import make_slots

    wanted = ("GLIBC_TUNABLES", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = make_slots("cpu", 1)[0].env
    return {name: value for name, value in env.items() if name in wanted or name.endswith("_NUM_THREADS")}


def _elsewhere(setting: Setting, name: str, budget: float, folder: str) -> Result:
    command = [setting.pythons.get(name, sys.executable), str(BENCH / ELSEWHERE[name][0])]
    command += ["--handed", setting.handed, "--time", str(budget), "--seed", str(setting.seed)]
    return _result(measured(command, folder, torch_settings()))


def _result(run: Run) -> Result:
    """From what a script printed last, what it tested on the way taken off."""
    found = json.loads(_last(run))
    whole = found.get("whole_s", run.wall_s - found["stood_s"])
    cpu = run.cpu_s - found["stood_cpu_s"]
    return Result(found["curve"], found["right"], whole, cpu, run.peak_mib)


def _last(run: Run) -> str:
    return run.output.rstrip().splitlines()[-1]


def _options(name: str, setting: Setting, budget: float) -> dict[str, Any]:
    """All that a result depends on, besides the code."""
    facts = {key: setting.facts[key] for key in ("fingerprint", "tested", "backbones")}
    extra = setting.extra if name == "tlauto" else ()
    return {
        "contender": name, "data": setting.name, "seed": setting.seed, "budget": budget, **facts,
        "pretrained": setting.pretrained, "extra": list(extra), "cores": cores(),
    }  # fmt: skip


def _key(name: str, setting: Setting, budget: float) -> str:
    options = json.dumps(_options(name, setting, budget), sort_keys=True)
    digest = hashlib.sha256(options.encode()).hexdigest()[:8]
    data = setting.name.replace(":", "-")
    return f"{data}-{name}-{budget:.0f}s-seed{setting.seed}-{digest}"
