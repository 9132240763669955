"""What every tracker promises, as tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tlauto.events import EpochEnded, SearchEnded, SearchStarted, TrialEnded, TrialStarted
from tlauto.space import Scalar
from tlauto.testing.spaces import check_name, heavy_imports
from tlauto.trackers import Recorder, Tracker

PARAMS: dict[str, Scalar] = {
    "optim.lr": 1e-3,
    "freeze.partial.k": 2,
    "augment.flip": True,
    "head.kind": "größer | <b>",
}
ENDS: dict[str, dict[str, Any]] = {
    "complete": {"score": 0.9, "metrics": {"accuracy": 0.9, "log_loss": 0.3}},
    "pruned": {"score": 0.4, "note": "@2", "metrics": {"accuracy": 0.4}},
    "failed": {"score": None, "note": "out of memory: " + "so many bytes " * 500, "kind": "out of memory"},
    "cut off": {"score": None, "note": "interrupted: stopped", "kind": "interrupted", "counts": False},
    "not a number": {"score": math.nan, "metrics": {"accuracy": math.nan, "rmse": math.inf}},
}
"""Ways in which a trial may end."""


class TrackerSuite:
    """Subclass it, set `tracker`, and pytest runs these tests on it.

    class TestJsonLines(TrackerSuite):
        tracker = JsonLines()
    """

    tracker: Tracker

    def where(self, folder: Path) -> str | None:
        """What the user gives after `--track NAME=`; None is the tracker's own choice."""
        return None

    def test_it_has_the_members_of_a_tracker(self, tmp_path: Path) -> None:
        assert isinstance(self.tracker, Tracker), "it needs name, check() and begin()"
        check_name(self.tracker.name)
        assert isinstance(self._begin(tmp_path), Recorder), "begin() must return a Recorder"

    def test_importing_it_loads_no_heavy_library(self) -> None:
        module = type(self.tracker).__module__
        assert heavy_imports(module) == [], f"import these inside functions of {module}"

    def test_a_new_search_has_no_finished_trials(self, tmp_path: Path) -> None:
        assert list(self._begin(tmp_path).finished) == []

    def test_trials_are_finished_however_they_ended_when_the_search_goes_on(self, tmp_path: Path) -> None:
        recorder = self._begin(tmp_path)
        for number, end in enumerate(ENDS):
            _tell(recorder, number, end)
        recorder.search_ended(SearchEnded("interrupted", best=0, score=0.9))
        assert sorted(self._begin(tmp_path).finished) == list(range(len(ENDS)))

    def test_trials_may_run_at_the_same_time(self, tmp_path: Path) -> None:
        recorder = self._begin(tmp_path)
        for number in (0, 1, 2):
            recorder.trial_started(_started(number))
        for epoch in (1, 2):
            for number in (2, 0, 1):
                recorder.epoch_ended(EpochEnded(number, "cpu:0", epoch, 0.5, 0.1, 0.2, 1.0))
        for number in (1, 2):
            recorder.trial_ended(_ended(number, "complete"))
        assert sorted(self._begin(tmp_path).finished) == [1, 2], "trial 0 was not told to its end"

    def test_an_unfinished_trial_is_told_again_from_its_start(self, tmp_path: Path) -> None:
        killed = self._begin(tmp_path)
        _tell(killed, 0, "complete")
        killed.trial_started(_started(1))
        killed.epoch_ended(EpochEnded(1, "cpu:0", 1, 0.5))
        recorder = self._begin(tmp_path)  # without search_ended: the process is gone
        assert list(recorder.finished) == [0]
        _tell(recorder, 1, "complete")
        recorder.search_ended(SearchEnded("finished", best=0, score=0.9))
        assert sorted(self._begin(tmp_path).finished) == [0, 1]

    def test_a_search_that_is_over_may_go_on(self, tmp_path: Path) -> None:
        for number in (0, 1):
            recorder = self._begin(tmp_path)
            assert sorted(recorder.finished) == list(range(number))
            _tell(recorder, number, "complete")
            end = SearchEnded("finished", 0, 0.9, str(tmp_path / "model"), {"accuracy": 0.8})
            recorder.search_ended(end)

    def test_another_study_of_the_same_name_in_the_same_place_is_kept_apart(self, tmp_path: Path) -> None:
        first, second = self._begin(tmp_path), self._begin(tmp_path, id="fedcba98")
        _tell(first, 0, "complete")
        _tell(second, 1, "complete")
        assert list(self._begin(tmp_path).finished) == [0]
        assert list(self._begin(tmp_path, id="fedcba98").finished) == [1]

    def _begin(self, folder: Path, *, id: str = "01234567") -> Recorder:
        study = folder / "images"
        study.mkdir(exist_ok=True)
        search = SearchStarted(
            id=id,
            study="images",
            folder=str(study),
            data=str(folder / "data"),
            task="multiclass",
            metric="accuracy",
            config={"trials": 30, "backbones": ("timm:a",), "params": {"optim.name": "sgd"}, "metric": None},
            versions={"python": "3.11.7", "tlauto": "0.1.0"},
        )
        where = self.where(folder)
        self.tracker.check(where)
        return self.tracker.begin(search, where)


def _started(number: int) -> TrialStarted:
    return TrialStarted(number, "cpu:0", "timm:a", "partial", "linear", 4, params=PARAMS, seed=7)


def _ended(number: int, end: str) -> TrialEnded:
    facts = dict(ENDS[end])
    state = end if end in ("complete", "pruned") else "failed" if "kind" in facts else "complete"
    return TrialEnded(number, "cpu:0", "timm:a", "partial", "linear", state, seconds=3.0, **facts)


def _tell(recorder: Recorder, number: int, end: str) -> None:
    recorder.trial_started(_started(number))
    for epoch in (1, 2):
        loss = math.nan if end == "not a number" else 1 / epoch
        recorder.epoch_ended(EpochEnded(number, "cpu:0", epoch, 0.4 * epoch, loss, loss, 1.5))
    recorder.trial_ended(_ended(number, end))
