"""Hand a search's events to the trackers that the user named, without ever waiting for them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import platform
import queue
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tlauto.config import parse_track
from tlauto.contracts import spec_from_json
from tlauto.errors import TlautoError, UnknownNameError
from tlauto.events import (
    Emit,
    EpochEnded,
    Said,
    SearchEnded,
    SearchStarted,
    TrialEnded,
    TrialStarted,
    Working,
)
from tlauto.plugins import registry
from tlauto.ranking import best_trial
from tlauto.schedule import counts
from tlauto.store import Store
from tlauto.study import ENDED, SHELVED, TrialRecord
from tlauto.trackers import Recorder, Tracker

if TYPE_CHECKING:
    from tlauto.prepare import Session

QUEUE = 2000
"""Events that may wait for a slow tracker; what comes then is left out, whole trials at a time."""

END_S = 10.0
"""Longest that the end of a search waits for its trackers."""

HURRY_S = 0.5
"""The same when the user stopped it."""

MISSING = "the same command adds what is missing"

PRIVATE = ("storage", "track")
"""Settings that may hold a password: trackers are not told."""

TrialEvent = TrialStarted | EpochEnded | TrialEnded
Earlier = Callable[[Collection[int]], Iterator[TrialEvent]]


def check_trackers(track: Sequence[str]) -> None:
    """Raise TlautoError when a tracker is unknown or says that it cannot be used."""
    for name, where in map(parse_track, track):
        tracker = _find(name)
        try:
            tracker.check(where)
        except TlautoError:
            raise
        except Exception:  # noqa: BLE001 - a mistake of its own, which its thread meets again and reports
            continue


class Tracking:
    """The trackers of one run of a search, each on a thread of its own."""

    def __init__(self, session: Session, emit: Emit) -> None:
        self._session = session
        self._show = emit
        self._feeds: list[Feed] = []
        if session.config.track:
            search, earlier = _search_started(session), _earlier(session)
            for name, where in map(parse_track, session.config.track):
                self._feeds.append(Feed(_find(name), where, search, earlier))

    def emit(self, event: object) -> None:
        """Show an event, and hand it to the trackers if it is about a trial."""
        self._show(event)
        if isinstance(event, TrialEvent):
            for feed in self._feeds:
                feed.offer(event)
        self._report()

    def end(self, state: str, *, hurry: bool) -> None:
        """Tell the trackers that the search ended, and wait for them a bounded time.

        Args: state: finished or interrupted; hurry: whether the user waits for the prompt.
        """
        if not self._feeds:
            return
        event = _search_ended(self._session, state)
        deadline = time.monotonic() + (HURRY_S if hurry else END_S)
        for feed in self._feeds:
            feed.finish(event, 0.0)  # all are told before one is waited for
        for feed in self._feeds:
            if not feed.finish(event, min(deadline, time.monotonic() + 1.0)) and not hurry:
                self._show(Working(f"waiting for the tracker {feed.name}"))
            if not feed.finish(event, deadline):
                feed.notes.put(f"tracker '{feed.name}' is too slow and was not waited for; {MISSING}")
        self._report()

    def _report(self) -> None:
        # Here, not on the trackers' threads: whoever shows events is called by one thread only.
        for feed in self._feeds:
            while not feed.notes.empty():
                self._show(Said(feed.notes.get()))


class Feed:
    """One tracker: its queue, its thread, and what it has to say about either."""

    def __init__(self, tracker: Tracker, where: str | None, search: SearchStarted, earlier: Earlier) -> None:
        self.name = tracker.name
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._queue: queue.Queue[TrialEvent | SearchEnded] = queue.Queue(QUEUE)
        self._left_out: set[int] = set()
        self._has_end = False
        self._thread = threading.Thread(
            target=self._run, args=(tracker, where, search, earlier), name=f"tracker {self.name}", daemon=True
        )
        self._thread.start()

    def offer(self, event: TrialEvent) -> None:
        """Queue an event; when there is no room, leave its trial out from here on."""
        if not self._thread.is_alive() or event.number in self._left_out:
            return
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            # A trial without its end is told again, whole, when the search goes on.
            if not self._left_out:
                self.notes.put(f"tracker '{self.name}' is too slow and misses trials; {MISSING}")
            self._left_out.add(event.number)

    def finish(self, event: SearchEnded, deadline: float) -> bool:
        """Queue the last event, once, and wait for the thread; whether it has ended by then."""
        while self._thread.is_alive():
            if not self._has_end:
                with contextlib.suppress(queue.Full):
                    self._queue.put_nowait(event)
                    self._has_end = True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._thread.join(left if self._has_end else min(left, 0.05))
        return True

    def _run(self, tracker: Tracker, where: str | None, search: SearchStarted, earlier: Earlier) -> None:
        try:
            tracker.check(where)
            recorder = tracker.begin(search, where)
            for event in earlier(frozenset(recorder.finished)):
                _tell(recorder, event)
            while not isinstance(last := self._queue.get(), SearchEnded):
                _tell(recorder, last)
            recorder.search_ended(last)
        # A plugin may raise anything, even exit; the search goes on without it.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            self.notes.put(f"tracker '{self.name}' failed and is left out: {_reason(error)}; {MISSING}")


def _tell(recorder: Recorder, event: TrialEvent) -> None:
    match event:
        case TrialStarted():
            recorder.trial_started(event)
        case EpochEnded():
            recorder.epoch_ended(event)
        case TrialEnded():
            recorder.trial_ended(event)


def _reason(error: BaseException) -> str:
    """One short line, without the password of an address."""
    text = re.sub(r"://[^/@\s]+@", "://…@", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _find(name: str) -> Tracker:
    plugins = registry()
    if not plugins.names("trackers") and not any(plugin.error for plugin in plugins.plugins):
        raise UnknownNameError(
            f"no tracker '{name}': none is installed (the plugin tlauto-trackers has tensorboard and mlflow)"
        )
    return plugins.tracker(name)


# --- what trackers are told -------------------------------------------------------------------------


def _search_started(session: Session) -> SearchStarted:
    row, data = session.store.search(session.name) or {}, session.store.dataset(session.name)
    key = f"{session.name}/{row.get('created_at')}/{data['fingerprint']}"
    config = {k: v for k, v in dataclasses.asdict(session.config).items() if k not in PRIVATE}
    versions = {plugin.name: plugin.version for plugin in registry().plugins}
    return SearchStarted(
        id=hashlib.sha256(key.encode()).hexdigest()[:8],
        study=session.name,
        folder=str(session.plan.folder),
        data=session.config.data,
        task=session.plan.task,
        metric=session.plan.metric,
        config=config,
        versions={"python": platform.python_version(), **versions},
        done=counts(session.study.trials())["total"],
    )


def _search_ended(session: Session, state: str) -> SearchEnded:
    try:
        best, model = best_trial(session.study.trials()), session.store.model(session.name)
    except Exception:  # noqa: BLE001 - the database may be what ended the search, and that is reported
        return SearchEnded(state)
    folder = session.plan.folder / "model"
    is_tested = model is not None and model["evaluated_on"] == "test"
    return SearchEnded(
        state,
        best=best.number if best else None,
        score=best.score if best else None,
        model=str(folder) if folder.is_dir() else None,
        test=_values(model["metrics"]) if model and is_tested else {},
    )


def _earlier(session: Session) -> Earlier:
    """A function from the trials that a tracker has to the events of the others that earlier runs ended."""
    ended = [t for t in session.study.trials() if t.state in ENDED]
    url, name = session.store.url, session.name

    def events(known: Collection[int]) -> Iterator[TrialEvent]:
        missing = [trial for trial in ended if trial.number not in known]
        if not missing:
            return
        # Of its own, since this runs on the tracker's thread and may outlive the session.
        with contextlib.closing(Store(url)) as store:
            rows = store.trials(name)
            for trial in missing:
                if trial.number in rows:
                    yield from _story(trial, rows[trial.number], store.epochs(name, trial.number))

    return events


def _story(
    trial: TrialRecord, row: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]
) -> Iterator[TrialEvent]:
    """The events of a trial that ended, as they were when it ran."""
    spec, slot, at = spec_from_json(row["spec"]), row["slot"], row["started_at"]
    yield TrialStarted.of(spec, slot, at=at)
    passed = 0.0
    for epoch in epochs:
        values = {name: epoch[name] for name in ("epoch", "score", "train_loss", "val_loss", "seconds")}
        passed += epoch["seconds"]
        yield EpochEnded(spec.number, slot, **values, at=at + passed)
    kind = trial.attrs.get("error_kind", "")
    note = f"{kind}: {trial.attrs.get('error', '')}" if kind else ""
    result = row["result"] or {"metrics": {}, "seconds": trial.attrs.get("seconds", passed)}
    state = trial.attrs.get(SHELVED, trial.state)
    if state == "pruned":
        note = f"@{result.get('epochs', len(epochs))}"
    facts = {"note": note, "kind": kind, "counts": trial.counts, "metrics": _values(result["metrics"])}
    seconds = float(result["seconds"])
    yield TrialEnded.of(spec, slot, state, trial.score, seconds, at=at + seconds, **facts)


def _values(metrics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {name: entry["value"] for name, entry in metrics.items()}
