"""Searches as MLflow runs: an experiment a study, a run for the search, a child run for each trial.

Through `mlflow-skinny` alone, without autologging, without artifacts, and with its telemetry off.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from tlauto.errors import ConfigError
from tlauto.events import EpochEnded, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from tlauto_trackers.common import curves_of, facts_of, prefixed, require, results_of

ID, TRIAL, PARENT = "tlauto.search", "tlauto.trial", "mlflow.parentRunId"
"""Tags: the id of a search, on its run; the number of a trial, and the run of its search."""

TAG_LENGTH = 5000
"""Longest value of a tag that every MLflow server takes."""


class MLflow:
    """A database in a folder, `mlflow` in the study's by default, or a tracking server."""

    name = "mlflow"

    def check(self, where: str | None) -> None:
        """Raise ConfigError when MLflow is not installed or `where` is what it no longer writes."""
        require(self.name, {"mlflow": "mlflow-skinny", "sqlalchemy": "sqlalchemy", "alembic": "alembic"})
        if where and where.startswith("file:"):
            folder = urlparse(where).path
            raise ConfigError(
                f"--track mlflow={where}: MLflow no longer writes plain files; --track mlflow={folder} "
                f"makes a database in that folder"
            )

    def begin(self, search: SearchStarted, where: str | None) -> _Runs:
        """The runs of a search; the first call imports MLflow, which takes seconds."""
        # Read when mlflow is imported: it would report its use to its makers.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        from mlflow.tracking import MlflowClient

        for library in ("mlflow", "alembic"):
            logging.getLogger(library).setLevel(logging.WARNING)  # the terminal shows the search
        address, artifacts = _place(search, where)
        return _Runs(MlflowClient(tracking_uri=address), artifacts, search)


class _Runs:
    """The runs of one search."""

    def __init__(self, client: Any, artifacts: str | None, search: SearchStarted) -> None:
        self._client = client
        found = client.get_experiment_by_name(search.study)
        self._experiment: str = (
            found.experiment_id if found else client.create_experiment(search.study, artifacts)
        )
        self._search = self._own_run(search)
        self._trials: dict[int, str] = {}
        finished: set[int] = set()
        for run in self._found({PARENT: self._search}):
            if run.info.status == "RUNNING":
                client.delete_run(run.info.run_id)  # a killed search left it; it is told again
            else:
                finished.add(int(run.data.tags[TRIAL]))
        self.finished: Collection[int] = frozenset(finished)

    def trial_started(self, event: TrialStarted) -> None:
        """A child run with the trial's parameters."""
        from mlflow.entities import Param

        tags = {PARENT: self._search, TRIAL: str(event.number), "tlauto.slot": event.slot}
        run = self._client.create_run(
            self._experiment, start_time=_ms(event.at), run_name=f"trial {event.number}", tags=tags
        )
        self._trials[event.number] = run.info.run_id
        params = [Param(name, str(value)) for name, value in facts_of(event).items()]
        self._client.log_batch(run.info.run_id, params=params)

    def epoch_ended(self, event: EpochEnded) -> None:
        """A point of each curve."""
        self._log(self._trials[event.number], curves_of(event), event.epoch, at=event.at)

    def trial_ended(self, event: TrialEnded) -> None:
        """The results; a run is FINISHED also when pruned, KILLED when the search's end cut it off."""
        run = self._trials.pop(event.number)
        tags = {"state": event.state, "note": event.note, "error_kind": event.kind}
        self._log(run, results_of(event), 0, tags, at=event.at)
        failed = "FAILED" if event.counts else "KILLED"
        status = failed if event.state == "failed" else "FINISHED"
        self._client.set_terminated(run, status, end_time=_ms(event.at))

    def search_ended(self, event: SearchEnded) -> None:
        """Test metrics, the best trial and where the model lies, on the search's run."""
        tags = {"best_trial": event.best, "model": event.model}
        score = {} if event.score is None else {"score": event.score}
        self._log(self._search, {**score, **prefixed("test", event.test)}, 0, tags)
        status = "FINISHED" if event.state == "finished" else "KILLED"
        self._client.set_terminated(self._search, status)

    def _own_run(self, search: SearchStarted) -> str:
        """The id of the search's run, made or taken up again, with the settings of today."""
        run = next(self._found({ID: search.id}), None)
        if run is None:
            tags = {ID: search.id}
            run = self._client.create_run(self._experiment, run_name=f"search {search.study}", tags=tags)
        id: str = run.info.run_id
        self._client.update_run(id, status="RUNNING")
        facts = {"data": search.data, "task": search.task, "metric": search.metric, "folder": search.folder}
        versions = {f"version.{name}": version for name, version in search.versions.items()}
        self._log(id, {}, 0, {**search.config, **facts, **versions})
        return id

    def _found(self, tags: Mapping[str, str]) -> Iterator[Any]:
        """Runs with these tags, page by page."""
        query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
        token = None
        while True:
            page = self._client.search_runs([self._experiment], query, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _log(
        self, run: str, metrics: Mapping[str, float], step: int, tags: Mapping[str, Any] | None = None,
        *, at: float | None = None,
    ) -> None:  # fmt: skip
        """Metrics and tags in one call; tags that say nothing are left out."""
        from mlflow.entities import Metric, RunTag

        when = _ms(at or time.time())
        self._client.log_batch(
            run,
            metrics=[Metric(name, float(value), when, step) for name, value in metrics.items()],
            tags=[
                RunTag(f"tlauto.{name}", (v if isinstance(v, str) else json.dumps(v))[:TAG_LENGTH])
                for name, v in (tags or {}).items()
                if v not in (None, "", (), {})
            ],
        )


def _ms(seconds: float) -> int:
    return int(seconds * 1000)


def _place(search: SearchStarted, where: str | None) -> tuple[str, str | None]:
    """MLflow's address, and where artifacts would go: nowhere but in that folder."""
    if where and "://" in where:
        return where, None
    folder = Path(where).expanduser().resolve() if where else Path(search.folder) / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri()
