"""What a search and its leaderboard look like: lines, the live table, the tables at the end."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from tlauto.cli.progress import (
    HEADER,
    Lines,
    Table,
    data_lines,
    duration,
    plan_lines,
    progress_line,
    trial_line,
)
from tlauto.cli.summary import _comparison_lines, _print_table
from tlauto.events import DataRead, EpochEnded, Planned, Progress, Said, TrialEnded, TrialStarted
from tlauto.results.leaderboard import Row

LITE = "efficientnet-lite:lite0"
LONG = "timm:mobilenetv2_100.inat_insect_pad_same"


def console(*, width: int = 80, terminal: bool = False) -> Console:
    return Console(
        file=io.StringIO(), width=width, highlight=False, emoji=False, force_terminal=terminal,
        soft_wrap=not terminal, color_system=None, legacy_windows=False,
    )  # fmt: skip


def printed(made: Console) -> list[str]:
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue().splitlines()


def ended(backbone: str = LITE, **changes: Any) -> TrialEnded:
    facts = {
        "number": 12, "slot": "cpu:0", "backbone": backbone, "strategy": "feature_extraction",
        "head": "linear", "state": "complete", "score": 0.9384, "seconds": 75.0,
    }  # fmt: skip
    return TrialEnded(**{**facts, **changes})


def progress(**changes: Any) -> Progress:
    facts: dict[str, Any] = {
        "done": 17, "pruned": 2, "failed": 1, "max_trials": 30, "seconds_a_trial": 28.0, "seconds_left": None,
        "best_number": 12, "best_score": 0.938,
    }  # fmt: skip
    return Progress(**{**facts, **changes})


# --- times ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0.0 s"), (0.44, "0.4 s"), (1.0, "1 s"), (12.3, "12 s"), (89.4, "89 s"), (90.0, "2 min"),
     (180.0, "3 min"), (5339.0, "89 min"), (5400.0, "1 h 30 min"), (7200.0, "2 h 0 min"),
     (93_600.0, "26 h 0 min")],
)  # fmt: skip
def test_durations_are_written_as_people_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_goes_by_the_pace_so_far() -> None:
    assert progress_line(progress()).endswith(", about 6 min left")  # 13 more at 28 s each


def test_the_time_left_is_what_ends_the_search_first() -> None:
    assert progress_line(progress(seconds_left=60.0)).endswith("about 60 s left")
    assert progress_line(progress(max_trials=None, seconds_left=600.0)).endswith("about 10 min left")


@pytest.mark.parametrize(
    "changes", [{"done": 30}, {"seconds_left": -3.0}, {"seconds_a_trial": None}, {"max_trials": None}]
)
def test_no_time_is_told_when_nothing_is_left_or_known(changes: dict[str, Any]) -> None:
    assert "left" not in progress_line(progress(**changes))


# --- lines ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"state": "pruned", "note": "@2", "score": 0.41}, {"strategy": "partial", "head": "cosine"},
     {"number": 1234, "seconds": 5340.0}],
)  # fmt: skip
def test_a_trial_fits_80_columns(changes: dict[str, Any]) -> None:
    assert len(trial_line(ended(**changes))) <= 80


def test_the_columns_stand_under_their_headings() -> None:
    line = trial_line(ended())
    for heading, value in (("score", "0.938"), ("backbone", LITE)):
        assert HEADER.index(heading) == line.index(value)
    assert HEADER.index("time") + len("time") == line.index("75 s") + len("75 s")


@pytest.mark.parametrize(
    "line",
    [
        progress_line(progress()),
        progress_line(progress(best_number=None, best_score=None, done=0, pruned=0, failed=0)),
        *data_lines(
            DataRead("multiclass", 10, {"train": 1251, "val": 313, "test": 498}, (("a.jpg", "cut"),) * 12)
        ),
        *plan_lines(
            Planned("s", ("cuda:0", "cuda:1"), (LITE, "keras:MobileNetV2"), ("full",), ("linear",), 29,
                    "balanced_accuracy", "the largest class is 4 times the smallest", 30, None, 7)
        ),
    ],
)  # fmt: skip
def test_other_lines_fit_80_columns(line: str) -> None:
    assert len(line) <= 80 or line.startswith("score")


def test_a_file_gets_whole_names_on_one_line_a_trial() -> None:
    made = console()
    show = Lines(made)
    show(ended(LONG, strategy="feature_extraction", head="linear"))
    show(ended(LITE, state="failed", score=None, note="oom: out of memory at batch 16"))
    whole, failed, why = printed(made)
    assert whole.endswith(f"{LONG}  feature_extraction  linear")
    assert failed.split()[:2] == ["12", "failed"]
    assert why.strip() == "oom: out of memory at batch 16"


def test_a_terminal_cuts_a_long_name_instead_of_wrapping_it() -> None:
    made = console(terminal=True)
    Lines(made)(ended(LONG))
    (line,) = printed(made)
    assert len(line) == 80
    assert line.endswith("…")


def test_only_a_new_best_is_worth_a_line() -> None:
    made = console()
    show = Lines(made)
    for now in (progress(best_number=None, best_score=None), progress(), progress(done=18)):
        show(now)
    assert len(printed(made)) == 1


def test_text_is_printed_as_it_is() -> None:
    made = console()
    Lines(made)(Said("timm:x: [bold]no[/bold] such file"))
    assert printed(made) == ["note      timm:x: [bold]no[/bold] such file"]


# --- the live table ---------------------------------------------------------------------------------


def test_the_live_table_shows_each_slot_and_the_best() -> None:
    made = console(terminal=True)
    table = Table(made)
    table(Planned("s", ("cuda:0", "cuda:1"), (LITE,), ("full",), ("linear",), 9, "accuracy", "", 30, None, 0))
    table(TrialStarted(7, "cuda:0", "torchvision:mobilenet_v3_small", "feature_extraction", "linear", 150))
    table(EpochEnded(7, "cuda:0", 12, 0.9127))
    table(progress())
    mark = len(printed(made))
    made.print(table.render())
    first, second, best = (line.rstrip() for line in printed(made)[mark:])
    assert first.startswith("cuda:0  trial 7  torchvision:mobilenet_v3_small")
    assert first.endswith("epoch 12/150 0.913  0.0 s")
    assert second.split() == ["cuda:1", "idle"]
    assert best == progress_line(progress())
    assert all(len(line) <= 80 for line in printed(made)[mark:])


def test_a_slot_is_idle_after_its_trial() -> None:
    made = console(terminal=True)
    table = Table(made)
    table.slots = {"cpu:0": None}
    table(TrialStarted(12, "cpu:0", LITE, "full", "linear", 8))
    table(ended())
    assert table.slots == {"cpu:0": None}


# --- the tables at the end --------------------------------------------------------------------------


def row(number: int, **changes: Any) -> Row:
    facts: dict[str, Any] = {
        "number": number, "backbone": LITE, "strategy": "feature_extraction", "head": "linear",
        "state": "complete", "score": 0.9384, "seconds": 75.2, "params": {}, "purpose": "search",
        "from_study": None, "epochs": 8, "seed": 1, "slot": "cpu:0", "trainable_params": 2562,
        "features": "pooled", "metrics": {}, "error": None,
    }  # fmt: skip
    return Row(**{**facts, **changes})


def test_a_leaderboard_fits_80_columns() -> None:
    made = console(terminal=True)
    _print_table(
        made,
        [row(12, is_best=True), row(3, score=0.41, state="pruned"), row(4, backbone=LONG),
         row(5, score=None, state="failed", error="oom: out of memory"), row(6, score=None, seconds=None,
         state="running")],
    )  # fmt: skip
    lines = [line.rstrip() for line in printed(made)]
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].split() == ["trial", "score", "time", "backbone", "strategy", "head"]
    assert lines[1].split() == ["12", "0.938", "75", "s", LITE, "feature_extraction", "linear"]
    assert "0.410 pruned" in lines[2]
    column = slice(lines[0].index("backbone"), lines[0].index("strategy"))
    assert "".join(line[column].strip() for line in lines[3:5]) == LONG, "folded, not cut"
    assert lines[-1] == "trial 5 failed: oom: out of memory"


def test_a_leaderboard_prints_brackets_in_a_name() -> None:
    made = console()
    _print_table(made, [row(1, backbone="mine:[bold]x:x:")])
    assert "mine:[bold]x:x:" in printed(made)[1]


def test_the_comparison_fits_80_columns() -> None:
    values = {"value": 0.935, "low": 0.884, "high": 0.964}
    lines = _comparison_lines(
        {"metric": "balanced_accuracy", "gain": 0.031, "low": -0.004, "high": 0.07, "significant": False,
         "default": {"backbone": LITE, "strategy": "feature_extraction", "head": "linear",
                     "metrics": {"balanced_accuracy": values}}}
    )  # fmt: skip
    assert all(len(line) <= 80 for line in lines)
    assert lines[-1] == "gain      +0.031 [-0.004, +0.070] over the default recipe, not significant"


def test_an_interrupted_trial_does_not_count() -> None:
    cut_off = row(1, state="failed", error="interrupted: the search was stopped during it")
    assert cut_off.is_interrupted and not cut_off.counts
    assert row(2, state="failed", error="oom: out of memory").counts
    assert not row(3, state="running", score=None).counts
