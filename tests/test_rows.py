"""What is written in one statement for each of Optuna's tables reads as if Optuna had written it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from postgres_support import postgres
from test_study import make_space

from tlauto.errors import StoreError
from tlauto.study import Study
from tlauto.tables import opened
from tlauto.writethrough import WriteThrough

KNOWN: dict[str, BaseDistribution] = {
    "backbone": CategoricalDistribution(("timm:a", "keras:B")),
    "rate": FloatDistribution(1e-5, 1.0, log=True),
    "depth": IntDistribution(1, 9, step=2),
}
WAITING = optuna.create_trial(
    state=TrialState.WAITING, user_attrs={"purpose": "probe"}, system_attrs={"fixed_params": {"depth": 3}}
)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "sqlite":
            yield f"sqlite:///{tmp_path / 'tlauto.db'}"
        else:
            yield stack.enter_context(postgres()).make_database("rows")


def fill(storage: BaseStorage, name: str) -> None:
    """All that a search does to trials, to a new study."""
    study = storage.create_new_study([StudyDirection.MAXIMIZE], name)
    for number, template in enumerate((None, WAITING, None, None)):
        trial = storage.create_new_trial(study, template)
        if template:
            storage.set_trial_state_values(trial, TrialState.RUNNING)
        for name, value in (
            ("backbone", "keras:B"),
            ("rate", 0.1 / 3 * (number + 1)),
            ("depth", 2 * number + 1),
        ):
            storage.set_trial_param(trial, name, KNOWN[name].to_internal_repr(value), KNOWN[name])
        for text in ("first", {"metrics": [0.5, None, "ä"]}):
            storage.set_trial_user_attr(trial, "note", text)
        storage.set_trial_system_attr(trial, "seen", [number])
        for step, score in ((1, 0.25), (2, 0.5), (3, math.inf), (4, -math.inf), (2, 0.1 + 0.2)):
            storage.set_trial_intermediate_value(trial, step, score)
    ids = [trial._trial_id for trial in storage.get_all_trials(study)]
    storage.set_trial_state_values(ids[0], TrialState.COMPLETE, [0.1 + 0.2])
    storage.set_trial_state_values(ids[1], TrialState.PRUNED, [0.75])
    storage.set_trial_state_values(ids[2], TrialState.FAIL)


def shown(trials: list[FrozenTrial]) -> list[dict[str, object]]:
    """Trials without what differs from study to study: ids and times."""
    return [
        {
            "number": trial.number, "state": trial.state, "values": trial.values, "params": trial.params,
            "distributions": trial.distributions, "user": trial.user_attrs, "system": trial.system_attrs,
            "reports": trial.intermediate_values, "began": trial.datetime_start is not None,
            "ended": trial.datetime_complete is not None,
        }
        for trial in trials
    ]  # fmt: skip


@pytest.mark.parametrize("together", [True, False])
def test_trials_read_as_if_optuna_had_written_them(url: str, together: bool) -> None:
    with opened(url) as theirs:
        fill(theirs, "theirs")
        expected = shown(theirs.get_all_trials(theirs.get_study_id_from_name("theirs")))
    with opened(url) as database:
        assert isinstance(database, RDBStorage)
        ours = WriteThrough(database, "ours")
        with ours.together() if together else ExitStack():
            fill(ours, "ours")
        assert shown(ours.get_all_trials(ours.get_study_id_from_name("ours"))) == expected
        ours.remove_session()
    with opened(url) as written:
        assert shown(written.get_all_trials(written.get_study_id_from_name("ours"))) == expected
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING]
    assert [trial["state"] for trial in expected] == states


def test_a_proposal_and_an_end_are_a_statement_for_each_table(url: str) -> None:
    with closing(Study(url, "s", seed=1, create=True)) as study:
        written: list[str] = []

        @sqlalchemy.event.listens_for(study._storage.engine, "before_cursor_execute")
        def note(_c: object, _cursor: object, statement: str, *_: object) -> None:
            words = statement.split()
            written.extend({"INSERT": words[2:3], "UPDATE": words[1:2]}.get(words[0], []))

        first = study.ask(make_space())
        assert len(first.params) > 8
        assert sorted(written) == ["trial_params", "trial_user_attributes", "trials"]
        written.clear()
        with study.together():
            study.note(first.number, val_loss=0.5)
            study.tell(first.number, 0.75)
            study.ask(make_space())
        assert sorted(written) == sorted([
            "trials", "trial_params", "trial_user_attributes", "trial_values", "trials",
        ])  # fmt: skip


@pytest.mark.parametrize("ask", [True, False])
def test_a_trial_that_another_program_ended_is_refused_in_a_sentence(url: str, ask: bool) -> None:
    with closing(Study(url, "s", seed=1, create=True)) as study:
        number = study.ask(make_space()).number
        with opened(url) as theirs:
            optuna.load_study(study_name="s", storage=theirs).tell(number, 0.5)
        with pytest.raises(StoreError, match="was ended by another program"), study.explaining():
            study.note(number, seconds=1.0) if ask else study.tell(number, 0.7)
        with opened(url) as theirs:
            assert [trial.value for trial in theirs.get_all_trials(1)] == [0.5]


def test_what_the_server_undid_because_two_waited_for_each_other_is_written_again() -> None:
    psycopg = pytest.importorskip("psycopg")
    with ExitStack() as stack:
        url = stack.enter_context(postgres()).make_database("rows")
        study = stack.enter_context(closing(Study(url, "s", seed=1, create=True)))
        numbers = [study.ask(make_space()).number for _ in range(2)]
        theirs = stack.enter_context(closing(psycopg.connect(url.replace("+psycopg", ""))))
        theirs.execute("SELECT * FROM trials WHERE number = 1 FOR UPDATE")

        def wait_for_ours() -> None:
            """Ask for the trial that the study has when it waits for ours."""
            while not theirs.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchall():
                time.sleep(0.01)
            theirs.execute("SELECT * FROM trials WHERE number = 0 FOR UPDATE")
            theirs.commit()

        undone: list[BaseException] = []
        engine = study._storage.engine
        sqlalchemy.event.listen(engine, "handle_error", lambda met: undone.append(met.original_exception))
        with ThreadPoolExecutor() as threads:
            waits = threads.submit(wait_for_ours)
            with study.together():
                for number in numbers:
                    study.note(number, seconds=1.0)
                study.tell(0, 0.5)
                third = study.ask(make_space()).number
            waits.result()
        assert [error.sqlstate for error in undone if isinstance(error, psycopg.Error)] == ["40P01"]
        with opened(url) as storage:
            found = storage.get_all_trials(storage.get_study_id_from_name("s"))
        assert [trial.user_attrs.get("seconds") for trial in found] == [1.0, 1.0, None]
        assert [trial.number for trial in found] == [*numbers, third] == [0, 1, 2]
        assert found[0].value == 0.5
