"""What the user asked for: flags > `tlauto.toml` > defaults, validated, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tlauto.contracts import WeightsOptions
from tlauto.errors import ConfigError, did_you_mean
from tlauto.space import Scalar

TASKS = ("auto", "multiclass", "multilabel", "regression")


@dataclass(frozen=True)
class Preset:
    """How much a search spends by default.

    Attributes:
        trials: total trials when neither `--trials` nor `--time` is given.
        candidates: most backbones that are screened, besides those whose weights the user gave.
        finetune_epochs: most epochs of a trial that trains the backbone.
        cpu_epoch_images: images of such an epoch on CPU, so that pruning can act in minutes; None
            is the whole training part, as always on a GPU.
        strategies: freezing strategies searched unless `--strategies` says otherwise; empty is all.
        fixed: parameters that are not searched, where they apply; `--set` wins over them.
    """

    trials: int
    candidates: int
    finetune_epochs: int
    cpu_epoch_images: int | None
    strategies: tuple[str, ...] = ()
    fixed: Mapping[str, Scalar] = field(default_factory=dict)


# A flattened map of 62,720 numbers into 4,096 units is 257 million weights, 4 GB with Adam: only for
# those who ask for it.
# The path of penalties finds what single penalties and mini-batches would have to be searched for.
_MODEST: Mapping[str, Scalar] = {"head.mlp.input": "pooled", "probe.solver": "path"}

# Who is in a hurry at the search is so at the use: one forward pass an image, of the size it has to have.
_ONE_PASS: Mapping[str, Scalar] = {"probe.mirror": False, "probe.joined": 1, "image.scale": 1.0}

# Strategies of plugins are searched by `best`, or when they are named.
_BUILT_IN = ("feature_extraction", "partial", "full")

PRESETS = {
    "fast": Preset(12, 4, 4, 128, _BUILT_IN[:2], {**_MODEST, **_ONE_PASS}),
    "balanced": Preset(30, 10, 8, 256, _BUILT_IN, _MODEST),
    "best": Preset(100, 16, 30, None),
}


@dataclass(frozen=True)
class SearchConfig:
    """A search as the user asked for it; see `tlauto search --help` for each value.

    `trials` and `time_s` (seconds) are totals over all runs of the study; None leaves that side
    open. A trial may take `trial_timeout_s` seconds, None as long as it likes; `max_failures` in a row end
    the search. `params` fixes parameters by their dotted names. At most `ensemble` models answer together.
    `per_device` is a number or `auto`. Trials run where `executor` says, which has options of its own.
    `cold` learns nothing from the workspace's earlier searches. `track` names trackers, each with
    where it records after an `=`, if not in the study's folder.
    """

    data: str
    out: str = "./tlauto-runs"
    study: str | None = None
    task: str = "auto"
    metric: str | None = None
    trials: int | None = None
    time_s: float | None = None
    trial_timeout_s: float | None = None
    max_failures: int = 10
    backbones: tuple[str, ...] = ()
    strategies: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    params: Mapping[str, Scalar] = field(default_factory=dict)
    preset: str = "balanced"
    devices: str = "auto"
    workers: int | None = None
    per_device: str | None = None
    seed: int = 0
    ensemble: int = 4
    weights: Mapping[str, str] = field(default_factory=dict)
    weights_dir: str | None = None
    offline: bool = False
    pretrained: bool = True
    storage: str | None = None
    new: bool = False
    cold: bool = False
    executor: str = "local"
    executor_options: Mapping[str, str] = field(default_factory=dict)
    track: tuple[str, ...] = ()
    allow_leaks: bool = False
    label_column: str | None = None
    path_column: str | None = None
    group_column: str | None = None

    def __post_init__(self) -> None:
        _check(self)

    @property
    def recipe(self) -> Preset:
        """The preset's numbers."""
        return PRESETS[self.preset]

    @property
    def max_trials(self) -> int | None:
        """The total of trials; None when only time limits the search."""
        if self.trials is None and self.time_s is None:
            return self.recipe.trials
        return self.trials

    @property
    def weights_options(self) -> WeightsOptions:
        """Where weights may come from."""
        return WeightsOptions(dict(self.weights), self.weights_dir, self.offline, self.pretrained)

    def to_json(self) -> str:
        """The configuration as JSON, without passwords and where trackers record; `from_json` reads it."""
        # An address may hold a password, and the database is shown to others.
        storage = self.storage and without_password(self.storage)
        track = [parse_track(text)[0] for text in self.track]
        return json.dumps({**dataclasses.asdict(self), "storage": storage, "track": track}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SearchConfig:
        """The configuration written by `to_json`."""
        data = json.loads(text)
        for name in ("backbones", "strategies", "heads", "track"):
            data[name] = tuple(data.get(name, ()))
        return cls(**data)


# A resumed search must agree on these; budgets, devices and folders may change.
IDENTITY = ("task", "metric", "params", "preset", "seed", "pretrained", "cold")
# Others of these open a new version of the study (`growing`); when none are named any more, it may be a slip.
NAMED = ("backbones", "strategies", "heads")
PATHS = ("data", "out", "weights_dir")
DURATIONS = ("time", "trial_timeout")
TEXTS = ("weights", "executor_options")


def resolve(flags: Mapping[str, Any], *, folder: Path | None = None) -> SearchConfig:
    """Flags (None means not given) over the `[search]` table of `tlauto.toml` over defaults.

    Args:
        folder: where `tlauto.toml` is looked for; the current folder by default.

    Raises: ConfigError for an unknown key, a wrong type or an impossible value.
    """
    values = _read_toml((folder or Path.cwd()) / "tlauto.toml")
    values.update({name: value for name, value in flags.items() if value is not None})
    values.setdefault("weights_dir", os.environ.get("TLAUTO_WEIGHTS") or None)
    if "data" not in values:
        raise ConfigError("no dataset; name one with --data PATH")
    for name in PATHS:
        if values.get(name):
            values[name] = str(Path(values[name]).expanduser().resolve())
    if values.get("per_device") is not None:
        values["per_device"] = str(values["per_device"])
    values.setdefault("out", str(Path("./tlauto-runs").resolve()))
    return SearchConfig(**values)


def parse_seconds(text: str) -> float:
    """Seconds of a duration such as `90`, `90s`, `30m`, `1.5h` or `1h30m`; raises ConfigError."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip().lower())
    if not parts or "".join(n + u for n, u in parts) != text.strip().lower().replace(" ", ""):
        raise ConfigError(f"'{text}' is not a duration; write for example 90s, 30m or 1h30m")
    seconds = sum(float(n) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[u] for n, u in parts)
    if seconds <= 0:
        raise ConfigError(f"the time '{text}' must be more than zero")
    return seconds


def parse_params(pairs: tuple[str, ...]) -> dict[str, Scalar]:
    """`NAME=VALUE` pairs as values: JSON scalars where they parse, text otherwise."""
    params: dict[str, Scalar] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set '{pair}' is not NAME=VALUE, for example optim.adamw.lr=0.001")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        params[name] = text if isinstance(value, (list, dict)) else value
    return params


def parse_options(pairs: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` pairs as a mapping; raises ConfigError for what is none, and for a name given twice."""
    options: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise ConfigError(f"--executor-option '{pair}' is not NAME=VALUE, for example address=auto")
        if name in options:
            raise ConfigError(f"the executor's option '{name}' is given twice; give it once")
        options[name] = value
    return options


def without_password(url: str) -> str:
    """A database URL to show and to record: `***` in place of the password, also where it is misspelt."""
    shown = re.sub(r":(?!//).*@", ":***@", url, flags=re.DOTALL)
    return re.sub(r"(password=)[^&]*", r"\1***", shown)


def parse_track(text: str) -> tuple[str, str | None]:
    """The tracker's name, and where it is to record, of `NAME` or `NAME=WHERE`; raises ConfigError."""
    name, equals, where = text.partition("=")
    if not name.strip() or (equals and not where.strip()):
        raise ConfigError(f"--track '{text}' is not NAME or NAME=WHERE, for example tensorboard=./runs")
    return name.strip(), where.strip() or None


def differences(old: SearchConfig, new: SearchConfig) -> list[str]:
    """A clause for each setting in which a resumed search must agree but does not."""
    clauses = []
    for name in (*IDENTITY, *NAMED):
        before, now = getattr(old, name), getattr(new, name)
        if before != now and (name in IDENTITY or not now):
            clauses.append(f"{name} was {_shown(before)} and is now {_shown(now)}")
    return clauses


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check(config: SearchConfig) -> None:
    _refuse(
        not config.data.strip(), "the dataset's path is empty; name a folder or manifest with --data PATH"
    )
    _refuse(config.task not in TASKS, f"unknown task '{config.task}'; choose from {', '.join(TASKS)}")
    _refuse(
        config.preset not in PRESETS, f"unknown preset '{config.preset}'; choose from {', '.join(PRESETS)}"
    )
    _refuse(
        config.trials is not None and config.trials < 1, f"--trials must be at least 1, not {config.trials}"
    )
    for flag, seconds in (("--time", config.time_s), ("--trial-timeout", config.trial_timeout_s)):
        _refuse(seconds is not None and not seconds > 0, f"{flag} must be more than zero")
    _refuse(config.max_failures < 1, f"--max-failures must be at least 1, not {config.max_failures}")
    _refuse(
        not 1 <= config.ensemble <= 16,
        f"--ensemble must be from 1 (a single model) to 16, not {config.ensemble}",
    )
    _refuse(not 0 <= config.seed < 2**31, f"--seed must be from 0 to {2**31 - 1}, not {config.seed}")
    name = config.study
    _refuse(
        name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name),
        f"the study name '{name}' may hold letters, digits, '.', '_' and '-' only (at most 100)",
    )
    _check_workers(config)
    _check_weights(config)
    names = [parse_track(text)[0] for text in config.track]
    twice = [name for name in names if names.count(name) > 1]
    _refuse(bool(twice), f"--track names '{(twice or [''])[0]}' twice; name each tracker once")


def _check_workers(config: SearchConfig) -> None:
    _refuse(
        config.workers is not None and not 0 <= config.workers <= 512,
        f"--workers must be from 0 to 512, not {config.workers}",
    )
    _refuse(
        config.per_device is not None and not re.fullmatch(r"auto|[1-9]|1[0-6]", config.per_device),
        f"--per-device must be auto or from 1 to 16, not {config.per_device}",
    )
    _refuse(
        config.workers == 0 and config.executor not in ("local", "in-process"),
        f"--workers 0 runs the trials in this process; leave it or --executor {config.executor} out",
    )


def _check_weights(config: SearchConfig) -> None:
    _refuse(
        bool(config.weights_dir) and not Path(str(config.weights_dir)).is_dir(),
        f"the weights folder '{config.weights_dir}' does not exist; give --weights-dir (or "
        f"TLAUTO_WEIGHTS) an existing folder",
    )
    _refuse(
        bool(config.weights) and not config.pretrained,
        "--weights and --no-pretrained exclude each other; leave one out",
    )
    for id, path in config.weights.items():
        _refuse(":" not in id, f"--weights '{id}' is not PROVIDER:NAME=PATH, for example timm:resnet18=FILE")
        _refuse(not Path(path).is_file(), f"the weights file '{path}' of {id} does not exist; check the path")


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    search = table.pop("search", {})
    known = {f.name for f in dataclasses.fields(SearchConfig)} | set(DURATIONS)
    if not isinstance(search, dict):
        raise ConfigError(f"{path}: 'search' is {search!r}; write a table, [search], with a setting a line")
    if table:
        raise ConfigError(f"{path}: unknown table '{next(iter(table))}'; settings stand under [search]")
    return {
        name: value for key, given in search.items() for name, value in [_toml_value(path, key, given, known)]
    }


def _toml_value(path: Path, key: str, value: Any, known: set[str]) -> tuple[str, Any]:
    name = key.replace("-", "_")
    if name not in known:
        raise ConfigError(f"{path}: unknown setting '{key}'{did_you_mean(name, known)}")
    if name in DURATIONS:
        return f"{name}_s", parse_seconds(str(value))
    if name in ("backbones", "strategies", "heads"):
        value = value.split(",") if isinstance(value, str) else value
    if name == "track":
        value = [value] if isinstance(value, str) else value
    expected: dict[str, type | tuple[type, ...]] = {
        "trials": int, "workers": int, "seed": int, "ensemble": int, "max_failures": int,
        "per_device": (int, str), "time_s": (int, float), "trial_timeout_s": (int, float),
        "offline": bool, "pretrained": bool, "new": bool, "cold": bool, "allow_leaks": bool,
        "params": dict, "weights": dict, "executor_options": dict,
        "backbones": list, "strategies": list, "heads": list, "track": list,
    }  # fmt: skip
    kind = expected.get(name, str)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    parts = value if isinstance(value, list) else value.values() if name in TEXTS and fits else ()
    if not fits or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{path}: '{key}' is {value!r}, which is not the kind of value it takes")
    return name, tuple(value) if isinstance(value, list) else value


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value)) or "not set"
    return "not set" if value is None or value == {} else str(value)
