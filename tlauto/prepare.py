"""Everything between the user's wish and the first trial: data, devices, backbones, the study."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto import metrics
from tlauto.builtin.tasks import task as find_task
from tlauto.caches import cache_limit
from tlauto.candidates import find_candidates
from tlauto.config import IDENTITY, SearchConfig, differences
from tlauto.connections import sqlite_file
from tlauto.contracts import BackboneInfo, FreezeStrategy, TaskHead
from tlauto.data import Dataset, load_dataset, memory_file
from tlauto.database import make_safe
from tlauto.devices import cache_folder
from tlauto.errors import ConfigError, DataError, StoreError, did_you_mean
from tlauto.events import Checked, DataRead, Emit, Planned, Said, Working
from tlauto.executing import choose_executor, expected
from tlauto.growing import Change, begun, choices_before, decided, find_change, open_version
from tlauto.history import read_past
from tlauto.larger import offered
from tlauto.memory import memory_floor
from tlauto.pace import Sizes
from tlauto.plugins import Registry, registry
from tlauto.pool.base import Pool
from tlauto.pool.protocol import Candidate
from tlauto.schedule import Plan, counts
from tlauto.searchspace import SearchSpace
from tlauto.settling import settle_left
from tlauto.store import Store, storage_url
from tlauto.study import Study, check_name, versioned
from tlauto.tracking import check_trackers
from tlauto.warm import Past


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
        self.study.close()


def open_session(config: SearchConfig, *, emit: Emit) -> Session:
    """Check everything that can be checked before a trial runs, and create or resume the study.

    Raises: TlautoError of the fitting kind; nothing is left running then.
    """
    strategies, heads = _chosen(config, registry())
    check_trackers(config.track)
    out, cache = _folders(config)
    executor, wanted = choose_executor(config, out=out, cache=cache)
    with contextlib.ExitStack() as undo:
        store = _open_store(storage_url(config.out, config.storage), emit)
        undo.callback(store.close)
        name = _study_name(config, store)
        stored = _stored(store, name, config)
        dataset, report, side = _read_data(config, store, name if stored else None, emit)
        metric, why = _metric(config, dataset)
        heads = _heads_for(dataset.task, heads, config)
        _space(config, strategies, heads, {}, dataset.task, side)  # refuses a wrong --set without a worker
        check_name(store.url, versioned(name, stored["version"] if stored else 1), create=not stored)
        pool = executor.open(dataclasses.replace(wanted, folder=out / name))
        undo.callback(pool.close)
        pool.warm_up(expected(config, pool.slots))  # while the first of them checks the backbones
        found = find_candidates(pool, config, stored["plan"] if stored else None, emit)
        infos = {id: candidate.info for id, candidate in found.items()}
        before = choices_before(store.url, name, stored) if stored else {}
        plan = Plan(
            config=config,
            space=_space(config, strategies, heads, found, dataset.task, side).ordered_like(before),
            task=dataset.task,
            metric=metric,
            dataset_file=str(out / name / "dataset.json"),
            folder=out / name,
            cache=cache,
            device=pool.device,
            sizes=Sizes(*(len(dataset.part(part)) for part in ("train", "val", "test"))),
            slots=len(pool.slots),
            past=_past(config, store, stored, dataset, report, emit),
            begun=begun(stored["plan"] if stored else None),
        )
        change = find_change(before, plan.space, registry())
        if not stored:
            _create(store, name, plan, dataset, report, infos)
        study, plan = _open_study(store, name, plan, infos, change, emit)
        session = Session(config, name, store, study, dataset, infos, plan, pool)
        undo.pop_all()
        undo.callback(session.close, state="interrupted")
        _write_dataset(plan, dataset)
        _announce(session, why, emit)
        undo.pop_all()
    return session


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
    found: Mapping[str, Candidate], task: str, side: int,
) -> SearchSpace:  # fmt: skip
    """The space with the user's fixed values, and the preset's where they apply.

    Args:
        found: the backbones; none before they are known.
        side: median shorter side of the images, in pixels.
    """
    parts = tuple(found), tuple(strategies), tuple(heads), find_task(task).space
    known = SearchSpace(*parts, fixed={}).names
    preset = {name: value for name, value in config.recipe.fixed.items() if name in known}
    fixed = {**preset, **config.params}
    return SearchSpace(*parts, fixed=fixed, larger=offered(found, fixed, side=side))


def _metric(config: SearchConfig, dataset: Dataset) -> tuple[str, str]:
    if config.metric is None:
        return metrics.default_metric(dataset.task, _class_counts(dataset))
    known = find_task(dataset.task).metrics
    if config.metric not in known:
        raise ConfigError(
            f"no metric '{config.metric}' for {dataset.task}{did_you_mean(config.metric, known)} "
            f"(choose from {', '.join(known)})"
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


def _folders(config: SearchConfig) -> tuple[Path, Path]:
    """The workspace and the cache, which can be written, after a look at what the environment sets."""
    out = _writable(Path(config.out), "workspace", "--out")
    cache = _writable(cache_folder(), "cache", "TLAUTO_CACHE")
    cache_limit()  # refuses a wrong TLAUTO_CACHE_SIZE before any worker starts
    memory_floor()  # and a wrong TLAUTO_MEMORY_FLOOR
    return out, cache


def _writable(folder: Path, what: str, setting: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"cannot write to the {what} {folder}: {error.strerror}; choose another folder with {setting}"
        ) from None
    return folder


def _open_store(url: str, emit: Emit) -> Store:
    """The database, checked and backed up before anything is written to it."""
    file = sqlite_file(url)
    for note in make_safe(file) if file else ():
        emit(Said(note))
    return Store(url)


def _study_name(config: SearchConfig, store: Store) -> str:
    base = config.study or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.data).stem).strip("-.") or "study"
    if not config.new:
        return base
    taken = set(store.studies())
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, 10_000))) if n not in taken)


def _stored(store: Store, name: str, config: SearchConfig) -> dict[str, Any] | None:
    """What is recorded of a study, when there is one; raises TlautoError when it cannot go on."""
    stored = store.search(name)
    if stored:
        store.require_free(name)
        _check_fits(name, config, SearchConfig.from_json(stored["config"]))
    return stored


def _check_fits(name: str, config: SearchConfig, old: SearchConfig) -> None:
    clauses = differences(old, config)
    if clauses:
        raise ConfigError(
            f"study '{name}' exists with other settings: {'; '.join(clauses)}; use the old ones to go on, or "
            f"--new or --study NAME for another study (settings that must agree: {', '.join(IDENTITY)})"
        )


def _read_data(
    config: SearchConfig, store: Store, stored: str | None, emit: Emit
) -> tuple[Dataset, str, int]:
    """The dataset, the doctor's report as JSON, and the median shorter side of the images in pixels.

    On resume, the dataset has the recorded split.
    """
    emit(Working("reading and checking the images"))
    dataset, report = load_dataset(
        config.data, task=config.task, seed=config.seed, allow_leaks=config.allow_leaks,
        label_column=config.label_column, path_column=config.path_column,
        group_column=config.group_column, memory=memory_file(config.data),
        progress=lambda done, total: emit(Checked(done, total)),
    )  # fmt: skip
    if stored:
        row = store.dataset(stored)
        if row["fingerprint"] != dataset.fingerprint:
            raise DataError(_what_changed(stored, config.data, Dataset.from_json(row["content"]), dataset))
        dataset = dataclasses.replace(Dataset.from_json(row["content"]), root=dataset.root)
    counts = {part: len(dataset.part(part)) for part in ("train", "val", "test")}
    emit(DataRead(dataset.task, len(dataset.classes), counts, report.unreadable, report.warnings))
    return dataset, json.dumps(report.to_json()), report.shorter_side


def _past(
    config: SearchConfig,
    store: Store,
    stored: Mapping[str, Any] | None,
    dataset: Dataset,
    report: str,
    emit: Emit,
) -> Past | None:
    """What there is to learn from other searches; on resume, what there was when the study began."""
    if stored:
        recorded = stored["plan"].get("past")
        return Past.from_json(recorded) if recorded else None
    if config.cold:
        return None
    past, notes = read_past(
        store, config, task=dataset.task, fingerprint=dataset.fingerprint, report=json.loads(report)
    )
    for note in notes:
        emit(Said(note))
    if past.earlier:
        names = ", ".join(earlier.study for earlier in past.earlier)
        emit(Said(f"starts from what earlier searches found here: {names} (--cold leaves them out)"))
    return past


def _what_changed(study: str, path: str, old: Dataset, new: Dataset) -> str:
    before, now = ({(i.path, i.sha256) for i in d.items} for d in (old, new))
    return (
        f"the dataset {path} changed since study '{study}' began ({len(now - before)} images new or changed, "
        f"{len(before - now)} gone or changed); use --new to search the changed data, or restore it"
    )


# --- the study --------------------------------------------------------------------------------------


def _create(
    store: Store, name: str, plan: Plan, dataset: Dataset, report: str, infos: Mapping[str, BackboneInfo]
) -> None:
    with contextlib.closing(Study(store.url, name, seed=plan.config.seed, create=True)) as study:
        study.set_metric(plan.metric)
    recorded = {
        "metric": plan.metric,
        "task": plan.task,
        "past": plan.past.to_json() if plan.past else None,
        **decided(plan, infos),
    }
    store.create_search(
        name, config=plan.config.to_json(), dataset=dataset.to_json(), fingerprint=dataset.fingerprint,
        root=dataset.root, report=report, plan=recorded,
    )  # fmt: skip


def _open_study(
    store: Store, name: str, plan: Plan, infos: Mapping[str, BackboneInfo], change: Change | None, emit: Emit
) -> tuple[Study, Plan]:
    """The study, ours alone from here on, with its first points proposed and cut-off ones again."""
    config = plan.config
    store.claim(name)
    store.update_config(name, dataclasses.replace(config, study=name, new=False).to_json())
    study = _study(store, name, config)
    with study.explaining():
        settle_left(store, study, name, plan)
        if change:
            study.close()
            plan, said = open_version(store, name, plan, infos, change)
            emit(Said(said))
            study = _study(store, name, config)
        propose_first(study, plan)
    return study, plan


def _study(store: Store, name: str, config: SearchConfig) -> Study:
    row = store.search(name) or {}
    return Study(store.url, name, seed=config.seed, create=True, version=row.get("version", 1))


def propose_first(study: Study, plan: Plan) -> None:
    """Propose the points that a new study begins with, or the rest of them after a kill."""
    trials = study.trials()
    if plan.begun.trials or any(trial.state != "waiting" for trial in trials):
        return
    for params, purpose in plan.first_points(plan.config.max_trials)[len(trials) :]:
        study.enqueue(without_fixed(params, plan.space), purpose=purpose)


def _write_dataset(plan: Plan, dataset: Dataset) -> None:
    """The dataset for the workers, which know nothing of the database."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    Path(plan.dataset_file).write_text(dataset.to_json(), encoding="utf-8")


def without_fixed(params: Mapping[str, Any], space: SearchSpace) -> dict[str, Any]:
    """Fixed values are not in the study's space, and Optuna would warn about them."""
    return {name: value for name, value in params.items() if name not in space.fixed}


def _announce(session: Session, why: str, emit: Emit) -> None:
    config, plan = session.config, session.plan
    row = session.store.search(session.name)
    spent = float(row["seconds"]) if row else 0.0
    done = counts(session.study.trials())["total"]
    parameters: set[str] = set()
    for strategy in plan.space.strategies:
        for head in plan.space.heads:
            parameters |= set(plan.space.defaults(strategy=strategy.name, head=head.name))
    emit(
        Planned(
            study=session.name,
            slots=tuple(session.pool.slots),
            backbones=plan.space.backbones,
            strategies=tuple(strategy.name for strategy in plan.space.strategies),
            heads=tuple(head.name for head in plan.space.heads),
            parameters=len(parameters),
            metric=plan.metric,
            why_metric=why,
            max_trials=config.max_trials,
            seconds_left=None if config.time_s is None else max(0.0, config.time_s - spent),
            done=done,
        )
    )
    probed = sum(purpose == "probe" for _, purpose in plan.first_points(config.max_trials))
    left_out = plan.screened[probed:]
    if probed and left_out and not done and config.time_s is None:
        emit(Said(f"half of the trials screen backbones; there is none for {', '.join(left_out)}"))
