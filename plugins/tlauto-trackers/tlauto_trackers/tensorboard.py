"""Searches as TensorBoard event files: a run a trial, its curves, and a row in the HPARAMS table.

Written with TensorBoard's own record writer and protocol buffers, which need neither TensorFlow nor
torch; its `EventFileWriter` would load TensorFlow where that is installed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tlauto.errors import ConfigError
from tlauto.events import EpochEnded, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from tlauto.space import Scalar
from tlauto_trackers.common import curves_of, facts_of, prefixed, require, results_of

START, END = "_hparams_/session_start_info", "_hparams_/session_end_info"
"""Tags by which the HPARAMS plugin knows that a run begins and ends."""


class TensorBoard:
    """Event files in a folder, `tensorboard` in the study's by default."""

    name = "tensorboard"

    def check(self, where: str | None) -> None:
        """Raise ConfigError when TensorBoard is not installed or `where` is no folder."""
        require(self.name, {"tensorboard": "tensorboard"})
        if where and "://" in where:
            raise ConfigError(f"--track tensorboard writes to a folder of this machine, not to {where}")
        if where and (Path(where).expanduser().exists() and not Path(where).expanduser().is_dir()):
            raise ConfigError(f"--track tensorboard={where} is a file; name a folder")

    def begin(self, search: SearchStarted, where: str | None) -> _Runs:
        """The runs of a search in a folder of its own, whatever else lies beside it."""
        root = Path(where).expanduser() if where else Path(search.folder) / "tensorboard"
        return _Runs(root / f"{search.study}-{search.id}", search)


class _Runs:
    """The event files of one search: `trial-<number>` for each trial, `search`, and `model` at its end."""

    def __init__(self, folder: Path, search: SearchStarted) -> None:
        self._folder = folder
        self._trials: dict[int, _EventFile] = {}
        self.finished: Collection[int] = _finished(folder)
        self._search = _EventFile(folder / "search")
        self._search.text("search", _described(search), search.done)

    def trial_started(self, event: TrialStarted) -> None:
        """A new run; what there was of this trial is deleted."""
        name = _run_name(event.number)
        file = self._trials[event.number] = _replaced(self._folder / name)
        file.session_start(facts_of(event), name=name, at=event.at)

    def epoch_ended(self, event: EpochEnded) -> None:
        """A point of each curve."""
        self._trials[event.number].scalars(curves_of(event), event.epoch, event.at)

    def trial_ended(self, event: TrialEnded) -> None:
        """The results, and the score among those of all trials."""
        file = self._trials.pop(event.number)
        file.scalars(results_of(event), 0, event.at)
        file.text("state", f"{event.state} {event.note}".strip(), 0)
        status = "UNKNOWN" if not event.counts else "FAILURE" if event.kind else "SUCCESS"
        file.session_end(status, event.at)
        if event.score is not None:
            self._search.scalars({"score": event.score}, event.number, event.at)

    def search_ended(self, event: SearchEnded) -> None:
        """The model's test metrics in a run of their own, in place of those of an earlier end."""
        if event.best is not None:
            file = _replaced(self._folder / "model")
            file.text("model", f"trial {event.best}, score {event.score}, {event.model}", event.best)
            file.scalars(prefixed("test", event.test), event.best)


class _EventFile:
    """A file of one run. Each call leaves it complete and closed: a killed search loses nothing."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a run in the order of their names.
        self._path = folder / f"events.out.tfevents.{time.time():.6f}"
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def scalars(self, values: Mapping[str, float], step: int, at: float | None = None) -> None:
        """A point for each value, at a time in seconds since 1970, now by default."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()], at)

    def text(self, tag: str, text: str, step: int) -> None:
        """A text, which TensorBoard shows as Markdown."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        metadata = create_summary_metadata(tag, "")
        self._add(step, [Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(text))])

    def session_start(self, facts: Mapping[str, Scalar], *, name: str, at: float) -> None:
        """The row of this run in the HPARAMS table."""
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

        info = SessionStartInfo(group_name=name, start_time_secs=at)
        for key, value in facts.items():
            if isinstance(value, bool):
                info.hparams[key].bool_value = value
            elif isinstance(value, (int, float)):
                info.hparams[key].number_value = value
            else:
                info.hparams[key].string_value = str(value)
        self._hparams(START, HParamsPluginData(session_start_info=info))

    def session_end(self, status: str, at: float) -> None:
        """The end of the row: SUCCESS, FAILURE or UNKNOWN."""
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        info = SessionEndInfo(status=Status.Value(f"STATUS_{status}"), end_time_secs=at)
        self._hparams(END, HParamsPluginData(session_end_info=info))

    def _hparams(self, tag: str, data: Any) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import metadata as hparams

        metadata = hparams.create_summary_metadata(data)
        self._add(0, [Summary.Value(tag=tag, metadata=metadata, tensor=hparams.NULL_TENSOR)])

    def _add(self, step: int, values: list[Any], at: float | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._write(Event(wall_time=at or time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with self._path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())


def _run_name(number: int) -> str:
    return f"trial-{number:04d}"


def _replaced(folder: Path) -> _EventFile:
    """A new file in place of all that the run had."""
    for old in folder.glob("*tfevents*"):
        old.unlink()
    return _EventFile(folder)


def _finished(folder: Path) -> frozenset[int]:
    """Numbers of the trials whose runs are complete."""
    complete = [file for file in folder.glob("trial-*/*tfevents*") if END.encode() in file.read_bytes()]
    return frozenset(int(file.parent.name.removeprefix("trial-")) for file in complete)


def _described(search: SearchStarted) -> str:
    """What is searched and how, as a table in Markdown."""
    given = {name: value for name, value in search.config.items() if value not in (None, (), {}, False)}
    facts = {**given, "data": search.data, "task": search.task, "metric": search.metric, **search.versions}
    rows = [f"| {name} | {v if isinstance(v, str) else json.dumps(v)} |" for name, v in facts.items()]
    return "\n".join([f"Study {search.study}", "", "| | |", "|---|---|", *rows])
