"""Find the executor that the user named, and say what the search wants of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tlauto.config import SearchConfig
from tlauto.devices import AUTO, device_of
from tlauto.errors import ConfigError, UnknownNameError, did_you_mean
from tlauto.executors import Executor, Wanted
from tlauto.plugins import registry

PLUGINS = {"ray": "tlauto-ray"}
"""Executors that are not installed with tlauto, and the distributions that have them."""


def choose_executor(config: SearchConfig, *, out: Path, cache: Path) -> tuple[Executor, Wanted]:
    """The executor of a search and what it is wanted for, checked as far as that goes without starting it.

    Args: out: the workspace; put the study's folder in its place before the executor is opened.
    Raises: TlautoError when it is unknown, takes no such option or says that it cannot be used.
    """
    executor = _find(config)
    for name in config.executor_options:
        if name not in executor.options:
            takes = f"takes {', '.join(executor.options)}" if executor.options else "takes none"
            raise ConfigError(
                f"the executor '{executor.name}' has no option '{name}'"
                f"{did_you_mean(name, executor.options)} (it {takes})"
            )
    wanted = Wanted(
        folder=out,
        cache=cache,
        devices=config.devices,
        workers=config.workers,
        per_device=config.per_device,
        options=config.executor_options,
        shared=tuple(
            Path(path) for path in (config.data, config.weights_dir, *config.weights.values()) if path
        ),
        # Read when huggingface_hub is imported, so it must stand in the environment from the start.
        env={"HF_HUB_OFFLINE": "1"} if config.offline else {},
    )
    executor.check(wanted)
    return executor, wanted


def expected(config: SearchConfig, slots: Sequence[str]) -> Sequence[str]:
    """The slots that a search will need for certain, as far as is known before it begins.

    Not those beside others on a GPU before anything is known of what fits, and no more than trials.
    """
    if config.per_device == AUTO:
        firsts: dict[str, str] = {}
        for slot in slots:
            firsts.setdefault(device_of(slot), slot)
        slots = tuple(firsts.values())
    return slots[: config.max_trials]


def _find(config: SearchConfig) -> Executor:
    name = "in-process" if config.workers == 0 else config.executor
    try:
        return registry().executor(name)
    except UnknownNameError as error:
        if name in PLUGINS:
            raise UnknownNameError(f"{error}; 'pip install {PLUGINS[name]}' installs it") from None
        raise
