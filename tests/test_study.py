from __future__ import annotations

import math
import statistics
from functools import partial
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from tlauto.builtin.heads import Mlp
from tlauto.builtin.tasks import task
from tlauto.errors import ConfigError, StoreError
from tlauto.plugins import registry
from tlauto.searchspace import Pick, SearchSpace
from tlauto.space import Int, Parameter, Scalar
from tlauto.store import Store
from tlauto.study import VAIN, Study
from tlauto.tables import MEMORY

BACKBONES = ("timm:a", "timm:b", "keras:C", "torchvision:d")


def make_space(**fixed: object) -> SearchSpace:
    plugins = registry()
    strategies = tuple(plugins.strategy(name) for name in ("feature_extraction", "partial", "full"))
    heads = tuple(plugins.head(name) for name in ("linear", "mlp", "cosine"))
    return SearchSpace(BACKBONES, strategies, heads, task("multiclass").space, fixed)  # type: ignore[arg-type]


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'tlauto.db'}"
    Store(url).close()
    return url


def test_only_kept_backbones_are_proposed(url: str) -> None:
    study, space = Study(url, "s", seed=1, create=True), make_space()
    for _ in range(15):
        record = study.ask(space, kept={"backbone": ("timm:b", "keras:C")})
        assert record.params["backbone"] in ("timm:b", "keras:C")
        study.tell(record.number, 0.5 if record.params["backbone"] == "timm:b" else 0.9)


def test_one_kept_strategy_is_proposed_whatever_won_before() -> None:
    study, space = Study(MEMORY, "s", seed=1, create=True), make_space()
    for i in range(40):
        strategy = "full" if i % 10 == 9 else "feature_extraction"
        kept = {"strategy": (strategy,), "backbone": BACKBONES[:2]}
        record = study.ask(space, kept=kept)
        assert record.params["strategy"] == strategy
        assert record.params["backbone"] in BACKBONES[:2]
        assert space.walk(lambda name, _, params=record.params: params[name]) == dict(record.params)
        study.tell(record.number, 0.9 if strategy == "feature_extraction" else 0.1)


@pytest.mark.parametrize("kept", [None, {"strategy": ("feature_extraction",)}])
def test_the_sampler_learns_parameters_that_only_some_trials_have(kept: dict[str, tuple[str]] | None) -> None:
    study = Study(MEMORY, "s", seed=1, create=True)
    plugins = registry()
    heads = tuple(plugins.head(name) for name in ("mlp", "cosine"))
    space = SearchSpace(
        BACKBONES[:1], (plugins.strategy("feature_extraction"),), heads,
        task("multiclass").space, {"optim.name": "adamw", "probe.mirror": False},
    )  # fmt: skip
    far = []
    for _ in range(80):
        record = study.ask(space, kept=kept)
        rate = float(record.params["optim.adamw.lr"])
        hidden = record.params.get("head.mlp.dropout", 0.5)
        away = abs(math.log10(rate / 1e-2)) + 2 * abs(float(hidden) - 0.1)
        study.tell(record.number, -away)
        if "head.mlp.dropout" in record.params:
            far.append(away)
    assert len(far) > 30
    assert statistics.median(far[-15:]) < 0.6 * statistics.median(far[:10])


def test_a_folder_may_have_braces_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "{runs}").mkdir()
    Study(f"sqlite:///{tmp_path}/{{runs}}/tlauto.db", "s", seed=0, create=True).close()
    assert [file.name for file in (tmp_path / "{runs}").glob("*.db")] == ["tlauto.db"]


def test_a_proposal_depends_on_the_record_not_on_the_process(url: str, tmp_path: Path) -> None:
    def propose(name: str, *, reopen: bool) -> list[dict[str, object]]:
        study, space, seen = Study(url, name, seed=7, create=True), make_space(), []
        for i in range(12):
            if reopen:
                study = Study(url, name, seed=7, create=False)
            record = study.ask(space)
            seen.append(dict(record.params))
            study.tell(record.number, 0.1 * (i % 5))
        return seen

    assert propose("whole", reopen=False) == propose("stopped", reopen=True)


def test_a_study_in_memory_proposes_and_records_the_same_as_one_in_a_file(url: str) -> None:
    def trace(place: str) -> list[tuple[object, ...]]:
        study, space = Study(place, "s", seed=3, create=True), make_space()
        study.enqueue(space.defaults(), purpose="probe")
        for i in range(12):
            record = study.ask(space, kept={"strategy": ("full", "partial")} if i % 2 else None)
            study.report(record.number, 1, 0.1 * i)
            study.note(record.number, stopped="paused")
            study.tell(record.number, 0.1 * (i % 5), is_pruned=i % 3 == 0)
        return [(t.number, t.state, dict(t.params), t.score, t.attrs, t.reports) for t in study.trials()]

    assert trace(MEMORY) == trace(url)


def test_a_point_takes_only_the_parameters_that_apply(url: str) -> None:
    values = make_space().defaults(strategy="feature_extraction", head="mlp")
    assert not [name for name in values if name.startswith(("finetune.", "augment.", "head.linear"))]
    assert "optim.adamw.lr" in values
    assert "optim.sgd.lr" not in values


def test_fixed_values_are_checked_and_used(url: str) -> None:
    space = make_space(**{"optim.name": "sgd", "head.mlp.dropout": 0.5})
    record = Study(url, "s", seed=0, create=True).ask(space)
    assert record.params["optim.name"] == "sgd"
    with pytest.raises(ConfigError, match=r"did you mean 'optim\.name'"):
        make_space(**{"optim.nam": "sgd"})
    with pytest.raises(ConfigError, match=r"optim\.name"):
        make_space(**{"optim.name": "rmsprop"})


def test_a_value_may_be_set_that_no_search_proposes(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = make_space(**{"head.mlp.hidden": 4096, "head.mlp.input": "pooled"})
    assert wide.defaults(strategy="feature_extraction", head="mlp")["head.mlp.hidden"] == 4096
    with pytest.raises(ConfigError, match=r"head\.mlp\.hidden: 4097 is outside 32 to 4096$"):
        make_space(**{"head.mlp.hidden": 4097})
    with pytest.raises(ConfigError, match="4 is searched, so 3 cannot be the largest to be set"):
        Int(1, 4, default=1, settable=3)
    study = Study(url, "s", seed=0, create=True)
    kept = {"head": ("mlp",)}
    with monkeypatch.context() as before:  # trials of a time when more was searched
        before.setattr(Mlp, "space", {**Mlp.space, "hidden": Int(32, 4096, default=512, log=True)})
        for i in range(30):
            record = study.ask(make_space(), kept=kept)
            study.tell(record.number, i / 30)
    hidden = [record.params["head.mlp.hidden"] for record in study.trials()]
    assert max(hidden) > 1024
    later = [study.ask(make_space(), kept=kept).params["head.mlp.hidden"] for _ in range(30)]
    assert max(later) <= 1024


def test_interrupted_trials_are_proposed_again_until_it_is_in_vain_and_do_not_count(url: str) -> None:
    space = make_space()
    record = Study(url, "s", seed=0, create=True).ask(space)
    for number in range(VAIN - 1):
        resumed = Study(url, "s", seed=0, create=False)
        assert resumed.requeue_interrupted() == [number]
        assert resumed.requeue_interrupted() == [], "once for each interruption"
        assert not any(t.counts for t in resumed.trials())
        assert resumed.ask(space).params == record.params
    last = Study(url, "s", seed=0, create=False)
    assert last.requeue_interrupted() == [VAIN - 1]
    assert [t.state for t in last.trials()] == ["failed"] * VAIN


def test_a_trial_that_gets_further_each_time_is_never_given_up(url: str) -> None:
    space, study = make_space(), Study(url, "s", seed=0, create=True)
    for attempt in range(2 * VAIN):
        record = study.ask(space)
        for epoch in range(1, attempt + 2):  # those of the state that it goes on from, and one more
            study.report(record.number, epoch, 0.5)
        study = Study(url, "s", seed=0, create=False)
        assert study.requeue_interrupted() == [attempt]
    assert study.trials()[-1].state == "waiting"
    for _ in range(VAIN):
        record = study.ask(space)
        for epoch in range(1, 2 * VAIN + 1):
            study.report(record.number, epoch, 0.5)
        study = Study(url, "s", seed=0, create=False)
        study.requeue_interrupted()
    assert study.trials()[-1].state == "failed", "no epoch was new"


@pytest.mark.parametrize("drawn", [0, 2])
def test_a_point_that_was_cut_off_while_it_was_drawn_is_proposed_whole(url: str, drawn: int) -> None:
    class Killed(BaseException):
        pass

    class Cut(SearchSpace):
        def walk(self, pick: Pick) -> dict[str, Scalar]:
            names: list[str] = []

            def some(name: str, parameter: Parameter) -> Scalar:
                if len(names) == drawn:
                    raise Killed
                names.append(name)
                return pick(name, parameter)

            return super().walk(some)

    space = make_space()
    point = {**space.defaults(strategy="partial", head="mlp"), "backbone": BACKBONES[2]}
    study = Study(url, "s", seed=0, create=True)
    study.enqueue(point, purpose="default")
    with pytest.raises(Killed):
        study.ask(Cut(space.backbones, space.strategies, space.heads, space.loss, space.fixed))
    resumed = Study(url, "s", seed=0, create=False)
    assert [trial.state for trial in resumed.trials()] == ["waiting"]
    assert resumed.requeue_interrupted() == []
    again = resumed.ask(space)
    assert (again.number, again.params, again.attrs["purpose"]) == (0, point, "default")


def test_pruned_trials_keep_the_score_of_their_best_epoch(url: str) -> None:
    study, space = Study(url, "s", seed=0, create=True), make_space()
    number = study.ask(space).number
    study.report(number, 1, 0.8)
    study.report(number, 2, 0.3)
    study.tell(number, 0.8, is_pruned=True)
    (trial,) = study.trials()
    assert (trial.state, trial.score) == ("pruned", 0.8)


def test_reports_are_recorded_by_epoch(url: str) -> None:
    study, space = Study(url, "s", seed=0, create=True), make_space()
    number = study.ask(space).number
    study.report(number, 1, 0.5)
    assert study.trials()[number].reports == {1: 0.5}
    study.report(number, 2, 0.7)
    study.report(number, 1, 0.9)  # again, from a state that is older than the report
    assert Study(url, "s", seed=0, create=False).trials()[number].reports == {1: 0.5, 2: 0.7}


def test_what_is_enqueued_brings_its_attributes(url: str) -> None:
    study, space = Study(url, "s", seed=0, create=True), make_space()
    first = study.ask(space)
    study.enqueue(first.params, purpose="promoted", continues=first.number)
    second = study.ask(space)
    assert second.params == first.params
    assert (second.attrs["purpose"], second.attrs["continues"]) == ("promoted", first.number)


def test_a_study_whose_maker_was_killed_at_once_is_taken_over(url: str) -> None:
    optuna.create_study(storage=url, study_name="s", direction="maximize")
    Study(url, "s", seed=0, create=True).close()
    assert Study(url, "s", seed=0, create=False).trials() == []


def test_a_study_that_is_not_ours_is_refused(url: str) -> None:
    optuna.create_study(storage=url, study_name="foreign", direction="minimize")
    with pytest.raises(StoreError, match="was not made by this version"):
        Study(url, "foreign", seed=0, create=True)
    with pytest.raises(StoreError, match="the trials of study 'absent' are gone"):
        Study(url, "absent", seed=0, create=False)


def shown(study: optuna.Study) -> list[tuple[object, ...]]:
    """What other programs see of a study's trials."""
    names = ("number", "state", "values", "params", "distributions", "user_attrs", "intermediate_values")
    return [tuple(getattr(trial, name) for name in names) for trial in study.trials]


def in_database(url: str) -> list[tuple[object, ...]]:
    return shown(optuna.load_study(study_name="s", storage=url))


def test_what_is_in_memory_is_in_the_database_after_every_change(url: str) -> None:
    study, space = Study(url, "s", seed=3, create=True), make_space()
    read_again = partial(Study, url, "s", seed=3, create=False)

    def check() -> None:
        again = read_again()
        assert again.trials() == study.trials()
        assert in_database(url) == shown(study._study)
        again.close()

    study.enqueue({"backbone": "timm:a"}, purpose="probe")
    check()
    for i in range(4):
        number = study.ask(space).number
        check()
        study.note(number, seconds=1.5, metrics={"accuracy": 0.5})
        check()
        study.report(number, 1, 0.25)
        check()
        if i == 1:
            study.requeue(number, why="error")
            study.fail(number, kind="error", message="it failed")
        else:
            study.tell(number, 0.5 + i / 10, is_pruned=i == 2)
        check()
    assert [trial.state for trial in study.trials()] == ["complete", "failed", "pruned", "complete"]


def test_changes_together_are_one_transaction_and_none_is_left_of_a_block_that_fails(url: str) -> None:
    study, space = Study(url, "s", seed=3, create=True), make_space()
    commits = 0

    @sqlalchemy.event.listens_for(study._storage.engine, "commit")
    def count(_connection: object) -> None:
        nonlocal commits
        commits += 1

    number = study.ask(space).number
    assert commits == 1
    with study.together():
        study.note(number, seconds=1.5, epochs=3)
        study.tell(number, 0.5)
    assert commits == 2
    with pytest.raises(ZeroDivisionError), study.together():
        study.note(study.ask(space).number, seconds=1 / 0)
    assert len(in_database(url)) == 1
    assert commits == 2
    study.enqueue({"backbone": "timm:b"}, purpose="probe")
    assert commits == 3
