"""What stands in a study's database, read with plain SQL and without tlauto, and what is wrong with it."""

from __future__ import annotations

import datetime
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNCOUNTED = ("interrupted", "out of time")
"""Kinds of failures that are no result of a trial."""

LOST, DOUBLE, MISSED = "chaos_lost", "chaos_double", "chaos_totals_missed"

Fault = tuple[str, str]
"""The figure that a fault counts in, and a sentence on it."""


@dataclass(frozen=True)
class Trial:
    """A trial as Optuna's tables and tlauto's have it.

    Attributes:
        result: what the worker answered, as JSON; None without an answer.
        point: backbone, strategy and head that it was handed out with; None if it never was.
    """

    number: int
    state: str
    score: float | None
    params: Mapping[str, float]
    attrs: Mapping[str, Any]
    result: str | None
    point: tuple[str, str, str] | None = None

    @property
    def has_ended(self) -> bool:
        return self.state not in ("WAITING", "RUNNING")

    @property
    def has_score(self) -> bool:
        return self.state in ("COMPLETE", "PRUNED")

    @property
    def course(self) -> tuple[object, ...]:
        """What may never change again once the trial has ended."""
        result = self.result if self.has_score else None
        return self.state, self.score, dict(self.params), dict(self.attrs), result


@dataclass(frozen=True)
class Ledger:
    """One study in a database.

    Args:
        storage: the SQLite file, or a URL of PostgreSQL as tlauto takes it.
    """

    storage: str
    study: str

    def rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of a query whose parameters are written `?`; none before its tables are there."""
        if self.storage.startswith("postgresql"):
            return _postgres_rows(self.storage, query, values)
        if not Path(self.storage).exists():
            return []
        with closing(sqlite3.connect(f"file:{self.storage}?mode=ro", uri=True, timeout=60)) as connection:
            try:
                return connection.execute(query, values).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return []
                raise

    def trials(self) -> dict[int, Trial]:
        """All trials by number."""
        of_study = "FROM trials t JOIN studies s USING (study_id) {} WHERE s.study_name = ?"
        values = of_study.format("LEFT JOIN trial_values v USING (trial_id)")
        found = self.rows(f"SELECT t.trial_id, t.number, t.state, v.value {values}", self.study)
        params, attrs = {key: {} for key, *_ in found}, {key: {} for key, *_ in found}  # type: Any, Any
        named = "SELECT t.trial_id, x.param_name, x.param_value "
        for key, name, value in self._of(named, of_study, "trial_params"):
            params.setdefault(key, {})[name] = value
        noted = "SELECT t.trial_id, x.key, x.value_json "
        for key, name, value in self._of(noted, of_study, "trial_user_attributes"):
            attrs.setdefault(key, {})[name] = json.loads(value)
        rows = self.rows("SELECT number, result, spec FROM tlauto_trials WHERE study = ?", self.study)
        handed = {number: (result, _point(json.loads(spec))) for number, result, spec in rows}
        return {
            number: Trial(number, state, score, params[key], attrs[key], *handed.get(number, (None, None)))
            for key, number, state, score in found
        }

    def _of(self, what: str, of_study: str, table: str) -> list[tuple[Any, ...]]:
        return self.rows(what + of_study.format(f"JOIN {table} x USING (trial_id)"), self.study)

    def epochs(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Score and seconds of each epoch by the trial's number and its own."""
        found = self.rows(
            "SELECT number, epoch, score, seconds FROM tlauto_epochs WHERE study = ? ORDER BY number, epoch",
            self.study,
        )
        return {(number, epoch): (score, seconds) for number, epoch, score, seconds in found}

    def running(self) -> dict[int, int]:
        """The last epoch of each trial that is said to run; 0 before its first."""
        at = dict(list(self.epochs()))  # of each trial the last one stays
        return {n: at.get(n, 0) for n, trial in self.trials().items() if trial.state == "RUNNING"}

    def retries(self) -> dict[int, int]:
        """The trial that goes on from another, by the other's number."""
        trials = self.trials().values()
        return {t.attrs["retry_of"]: t.number for t in trials if "retry_of" in t.attrs}

    def trial_seconds(self) -> float:
        """From the start of the first trial to the end of the last one."""
        ((first, last),) = self.rows(
            "SELECT MIN(t.datetime_start), MAX(t.datetime_complete) "
            "FROM trials t JOIN studies s USING (study_id) WHERE s.study_name = ?",
            self.study,
        )
        start, end = (datetime.datetime.fromisoformat(str(when)) for when in (first, last))
        return (end - start).total_seconds()

    def search(self) -> tuple[str | None, int | None]:
        """The search's state and the process that has it."""
        found = self.rows("SELECT state, pid FROM tlauto_searches WHERE study = ?", self.study)
        return found[0] if found else (None, None)

    def models(self) -> list[tuple[str, str]]:
        """Folder of each model that was recorded, and the part it was measured on; the newest first."""
        return self.rows(
            "SELECT folder, evaluated_on FROM tlauto_models WHERE study = ? ORDER BY id DESC", self.study
        )


def _point(spec: Mapping[str, Any]) -> tuple[str, str, str]:
    return spec["backbone"], spec["strategy"], spec["head"]


def _postgres_rows(url: str, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
    import psycopg

    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        try:
            return connection.execute(query.replace("?", "%s"), values).fetchall()
        except psycopg.errors.UndefinedTable:
            return []


def counted(trials: Mapping[int, Trial]) -> list[Trial]:
    """Trials that ended by themselves and were not tried again."""
    again = {trial.attrs.get("retry_of") for trial in trials.values()}
    return [
        t for t in trials.values()
        if t.has_ended and t.attrs.get("error_kind") not in UNCOUNTED and t.number not in again
    ]  # fmt: skip


def changes(before: Mapping[int, Trial], now: Mapping[int, Trial]) -> list[Fault]:
    """Trials that had ended before and are not there now, or are not as they were."""
    found = []
    for number, trial in before.items():
        if not trial.has_ended:
            continue
        if number not in now:
            found.append((LOST, f"trial {number} had ended and is gone"))
        elif now[number].course != trial.course:
            found.append((LOST, f"trial {number} was {trial.course} and is {now[number].course}"))
    return found


def faults(
    trials: Mapping[int, Trial], *, total: int, first: Mapping[str, Sequence[tuple[str, str, str]]]
) -> list[Fault]:
    """What is wrong with the trials of a search that has ended by itself.

    Args:
        total: trials that were asked for.
        first: points that every such search begins with, by their purpose.
    """
    there = len(counted(trials))
    found: list[Fault] = []
    if there != total:
        found.append((DOUBLE if there > total else MISSED, f"{there} trials count, {total} were asked for"))
    for number, trial in trials.items():
        if trial.has_score and not trial.result:
            found.append((LOST, f"trial {number} has a score and no result"))
        if trial.state == "RUNNING":
            found.append((LOST, f"trial {number} is said to run still"))
    return found + _repeated(trials) + _first(trials, first)


def _repeated(trials: Mapping[int, Trial]) -> list[Fault]:
    """Trials that were run again though they had a result, or more than once for one end."""
    of = [t.attrs["retry_of"] for t in trials.values() if "retry_of" in t.attrs]
    twice = [(DOUBLE, f"trial {n} was tried again {k} times") for n, k in Counter(of).items() if k > 1]
    had = [n for n in set(of) if n in trials and (trials[n].result or trials[n].has_score)]
    return twice + [(DOUBLE, f"trial {n} had a result and was run again") for n in had]


def _first(trials: Mapping[int, Trial], first: Mapping[str, Sequence[tuple[str, str, str]]]) -> list[Fault]:
    """Probes and default recipe: each counts once, whatever happened while they were proposed.

    One that was interrupted again and again is given up: it may be what takes the machine down.
    """
    again = {trial.attrs.get("retry_of") for trial in trials.values()}
    given_up = [
        trials[t.attrs["retry_of"]] for t in trials.values()
        if "retry_of" in t.attrs and t.attrs.get("error_kind") in UNCOUNTED and t.number not in again
    ]  # fmt: skip
    found = []
    for purpose, points in first.items():
        there = [t.point for t in (*counted(trials), *given_up) if t.attrs.get("purpose") == purpose]
        if Counter(there) != Counter(points):
            name = DOUBLE if len(there) > len(points) else MISSED
            found.append((name, f"the trials of purpose '{purpose}' are {there}, not {list(points)}"))
    return found
