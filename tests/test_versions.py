"""Versions of a study, on real SQLite files: nothing is lost when what is searched grows or shrinks."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest

from tlauto.builtin.tasks import task
from tlauto.errors import StoreError, UnknownNameError
from tlauto.growing import Change, choices, find_change
from tlauto.plugins import Plugin, Registry, registry
from tlauto.ranking import best_trial
from tlauto.schedule import counts
from tlauto.searchspace import SearchSpace
from tlauto.space import Choice
from tlauto.store import Store
from tlauto.study import INTERRUPTED, Study, TrialRecord, versioned
from tlauto.versions import choices_of, copy_trials, waiting_points

LARGE = ("timm:a", "timm:b", "keras:C")


def make_space(*backbones: str, heads: tuple[str, ...] = ("linear", "mlp"), **fixed: Any) -> SearchSpace:
    plugins = registry()
    strategies = tuple(plugins.strategy(name) for name in ("feature_extraction", "full"))
    made = tuple(plugins.head(name) for name in heads)
    return SearchSpace(backbones, strategies, made, task("multiclass").space, fixed)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A database with a study `s` over two backbones: 14 trials of every kind, two points that wait."""
    url = f"sqlite:///{tmp_path / 'tlauto.db'}"
    Store(url).close()
    space = make_space(*LARGE[:2])
    with closing(Study(url, "s", seed=1, create=True)) as study:
        for i in range(14):
            record = study.ask(space, kept={"backbone": (LARGE[i % 2],)})
            study.report(record.number, 1, 0.1 + i / 20)
            study.note(record.number, seconds=float(i))
            if i == 5:
                study.fail(record.number, kind="diverged", message="nan")
            else:
                study.tell(record.number, 0.2 + i / 20, is_pruned=i % 4 == 3)
        for backbone in LARGE[:2]:
            study.enqueue(space.defaults(backbone=backbone), purpose="probe")
    return url


def read(url: str, version: int) -> list[TrialRecord]:
    with closing(Study(url, "s", seed=1, create=False, version=version)) as study:
        return study.trials()


def copy(url: str, space: SearchSpace, version: int) -> list[TrialRecord]:
    copy_trials(url, "s", before=version - 1, version=version, parameters=space.parameters, metric="accuracy")
    return read(url, version)


def asked(url: str, space: SearchSpace, version: int, count: int = 6) -> list[dict[str, Any]]:
    """What a version proposes, each told a score of its own."""
    found = []
    with closing(Study(url, "s", seed=1, create=False, version=version)) as study:
        for i in range(count):
            record = study.ask(space)
            found.append(dict(record.params))
            study.tell(record.number, 0.3 + i / 50)
    return found


def test_a_grown_version_has_every_trial_as_it_was_and_the_old_one_stays(url: str) -> None:
    before, space = read(url, 1), make_space(*LARGE, heads=("linear", "mlp", "cosine"))
    assert copy(url, space, 2) == before
    assert read(url, 1) == before
    assert waiting_points(url, "s", 2) == waiting_points(url, "s", 1)
    stored = optuna.load_study(study_name="s@2", storage=url).get_trials()
    assert {t.distributions["backbone"].choices for t in stored if t.params} == {LARGE}
    old = optuna.load_study(study_name="s", storage=url).get_trials()
    assert [t.datetime_complete for t in stored] == [t.datetime_complete for t in old]
    assert [t.value for t in stored] == [t.value for t in old]


def test_the_sampler_of_a_grown_version_learns_from_the_old_trials(url: str) -> None:
    space = make_space(*LARGE)
    copy(url, space, 2)
    knowing = asked(url, space, 2, 12)
    with closing(Study(url, "blank", seed=1, create=True)) as study:
        for _ in range(14):
            study.fail(study.ask(space).number, kind="error", message="nothing learned")
        unknowing = [dict(study.ask(space).params) for _ in range(12)]
    assert knowing[2:] != unknowing[2:], "the first two waited"
    assert "keras:C" in {point["backbone"] for point in asked(url, space, 2, 30)}


def test_trials_of_a_backbone_that_is_gone_are_shelved_and_nothing_is_learned_from_them(url: str) -> None:
    before, space = read(url, 1), make_space("timm:a", "keras:C")
    after = copy(url, space, 2)
    for old, new in zip(before, after, strict=True):
        is_gone = old.params.get("backbone") == "timm:b"
        assert (new.number, new.params, new.reports) == (old.number, old.params, old.reports)
        if old.state in ("complete", "pruned"):
            assert new.state == ("shelved" if is_gone else old.state)
            assert new.score == old.score
    assert [trial.state for trial in after[14:]] == ["waiting", "failed"]
    assert after[15].attrs["error"] == "the backbone timm:b is not searched any more"
    assert not after[15].counts
    assert counts(after)["total"] == counts(before)["total"] == 14
    best = best_trial(after)
    assert best is not None and best.params["backbone"] == "timm:a"
    with closing(Study(url, "s", seed=1, create=False, version=2)) as study:
        assert study.requeue_interrupted() == []
    assert {point["backbone"] for point in asked(url, space, 2, 20)} <= {"timm:a", "keras:C"}


def test_what_was_shelved_comes_back_as_it_was(url: str) -> None:
    before = read(url, 1)
    copy(url, make_space("timm:a", heads=("mlp",)), 2)
    space = make_space(*LARGE)
    again = copy(url, space, 3)
    assert again[:14] == before[:14]
    assert len(asked(url, space, 3, 12)) == 12


def test_a_parameter_with_other_choices_is_no_obstacle(url: str) -> None:
    space = make_space(*LARGE[:2])
    name = "optim.name"
    old = space.parameters[name]
    assert isinstance(old, Choice)
    parameters = {**space.parameters, name: Choice((*old.values[1:], "another"), old.values[1])}
    before = read(url, 1)
    copy_trials(url, "s", before=1, version=2, parameters=parameters, metric="accuracy")
    assert [(t.state, t.params, t.score) for t in read(url, 2)] == [
        (t.state, t.params, t.score) for t in before
    ]
    stored = optuna.load_study(study_name="s@2", storage=url).get_trials()
    lost = [t.number for t in before if t.params.get(name) == old.values[0]]
    assert lost and all(name not in stored[number].params for number in lost)


def test_cut_off_trials_are_not_run_twice_in_the_next_version(url: str) -> None:
    space = make_space(*LARGE[:2])
    with closing(Study(url, "s", seed=1, create=False)) as study:
        study.ask(space)
        record = study.ask(space)
        study.fail(record.number, kind=INTERRUPTED, message="stopped")
        study.requeue_interrupted()
    after = copy(url, make_space(*LARGE), 2)
    with closing(Study(url, "s", seed=1, create=False, version=2)) as study:
        study.requeue_interrupted()
        assert len(study.trials()) == len(after)
    copy(url, make_space("keras:C"), 3)
    with closing(Study(url, "s", seed=1, create=False, version=3)) as study:
        study.requeue_interrupted()
        assert not [t for t in study.trials() if t.state == "waiting"]


KILLED = """
import os, sys
import optuna
from tests.test_versions import LARGE, copy, make_space
write, count = optuna.storages.RDBStorage.create_new_trial, 0
def dies(self, study_id, template_trial=None):
    global count
    count += 1
    if count == 7:
        os._exit(9)
    return write(self, study_id, template_trial)
optuna.storages.RDBStorage.create_new_trial = dies
copy(sys.argv[1], make_space(*LARGE), 2)
"""


def test_a_copy_that_was_killed_is_made_again(url: str) -> None:
    before, root = read(url, 1), Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, url], cwd=root, capture_output=True, check=False)
    assert killed.returncode == 9, killed.stderr
    assert len(read(url, 2)) == 6
    assert read(url, 1) == before
    assert copy(url, make_space(*LARGE), 2) == before


def test_somebody_elses_study_is_not_overwritten(url: str) -> None:
    optuna.create_study(storage=url, study_name=versioned("s", 2), direction="minimize")
    with pytest.raises(StoreError, match="'s@2' in this database was not made by this version of tlauto"):
        copy(url, make_space(*LARGE), 2)


def test_a_study_whose_making_was_killed_is_taken_up(url: str) -> None:
    optuna.create_study(storage=url, study_name="begun", direction="maximize")
    with pytest.raises(StoreError, match="was not made by this version"):
        Study(url, "begun", seed=0, create=False)
    Study(url, "begun", seed=0, create=True).close()
    Study(url, "begun", seed=0, create=False).close()


# --- what changed -----------------------------------------------------------------------------------


def change(before: SearchSpace, now: SearchSpace) -> Change | None:
    return find_change(choices(before), now, registry())


def test_the_same_space_in_another_order_is_the_same() -> None:
    before, now = make_space(*LARGE), make_space(*LARGE[::-1], heads=("mlp", "linear"))
    assert change(before, now) is not None
    ordered = now.ordered_like(choices(before))
    assert change(before, ordered) is None
    assert (ordered.backbones, [head.name for head in ordered.heads]) == (LARGE, ["linear", "mlp"])
    larger = make_space("timm:z", *LARGE)
    assert larger.ordered_like(choices(before)) == larger


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        (
            make_space("t:y", "t:a"), make_space("t:a", "t:b", "t:c", heads=("linear", "mlp", "cosine")),
            "2 backbones and the head 'cosine' are new, the backbone 't:y' is gone: going on as version 2 "
            "with the 34 trials so far",
        ),
        (
            make_space("t:a", "t:b", "t:c"), make_space("t:c"),
            "2 backbones are gone: going on as version 2 with the 34 trials so far",
        ),
        (
            make_space("t:a", heads=("linear",)), make_space("t:a"),
            "the head 'mlp' is new: going on as version 2 with the 34 trials so far",
        ),
    ],
)  # fmt: skip
def test_what_changed_is_one_sentence(before: SearchSpace, now: SearchSpace, sentence: str) -> None:
    found = change(before, now)
    assert found is not None and found.sentence(2, 34) == sentence


def test_a_study_without_a_record_of_its_choices_tells_them_by_its_trials(url: str) -> None:
    found = choices_of(url, "s", 1)
    assert (found["backbone"], found["head"]) == (LARGE[:2], ("linear", "mlp"))
    assert find_change(found, make_space(*LARGE[:2]), registry()) is None


def test_what_is_gone_with_a_broken_plugin_is_an_error_not_a_loss() -> None:
    core = registry()
    broken = Plugin("theirs", "1.0", "theirs", {}, "ImportError: no module named 'x'")
    plugins = Registry((*core.plugins, broken), core.offers)
    before, now = make_space("theirs:a", *LARGE), make_space(*LARGE)
    with pytest.raises(UnknownNameError, match=r"no .* 'theirs'.*broken plugins: theirs"):
        find_change(choices(before), now, plugins)
    found = find_change(choices(before), now, core)
    assert found is not None and found.gone == (("backbone", "theirs:a"),)
