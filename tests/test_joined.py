"""When heads on several backbones are tried, which ones they read, and what is not learned from them."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_resume import RESNET, VIT, facts, finished, killed, trials
from test_schedule import MakePlan, make_plan, trial, write_checkpoint
from tests_support import leaderboard, run

import tlauto
from tlauto.again import Screening, joined_points
from tlauto.builtin.tasks import task
from tlauto.config import PRESETS
from tlauto.contracts import EpochResult, TrialDone
from tlauto.errors import ConfigError
from tlauto.joined import backbones_of, partners
from tlauto.pace import Sizes, refit_seconds
from tlauto.plugins import registry
from tlauto.ranking import estimate, is_hopeless
from tlauto.results.ensemble import candidates
from tlauto.room import kind_of
from tlauto.schedule import Plan
from tlauto.searchspace import SearchSpace
from tlauto.space import Choice
from tlauto.store import Store
from tlauto.study import Study, TrialRecord
from tlauto.versions import copy_trials
from tlauto.warm import adapted

__all__ = ["make_plan"]  # a fixture

BACKBONES = ("timm:a", "timm:b", "timm:c", "timm:d")
SIZES = Sizes(800, 200, 200)


def space_of(*backbones: str, **fixed: Any) -> SearchSpace:
    plugins = registry()
    strategies = tuple(plugins.strategy(name) for name in ("feature_extraction", "full"))
    heads = tuple(plugins.head(name) for name in ("linear", "mlp"))
    return SearchSpace(backbones or BACKBONES, strategies, heads, task("multiclass").space, fixed)


def probes(*scores: float, space: SearchSpace | None = None) -> list[TrialRecord]:
    """A complete probe on each backbone, with these scores."""
    found = []
    for number, (backbone, score) in enumerate(zip(BACKBONES, scores or (0.7, 0.9, 0.6, 0.8), strict=False)):
        params = (space or space_of()).defaults(
            backbone=backbone, strategy="feature_extraction", head="linear"
        )
        found.append(TrialRecord(number, "complete", params, score, {"purpose": "probe", "seconds": 10.0}))
    return found


def ranked(trials: list[TrialRecord]) -> list[TrialRecord]:
    return sorted(trials, key=lambda t: -(t.score or 0.0))


def points(
    trials: list[TrialRecord],
    space: SearchSpace | None = None,
    *,
    most_trials: int | None = 30,
    since: int = 0,
) -> list[dict[str, Any]]:
    best, sizes = ranked([t for t in trials if t.state == "complete"]), Sizes(80, 20, 20)
    return joined_points(Screening(space or space_of(), trials, best, sizes, None, most_trials, since))


def proposed(backbone: str = "timm:a", joined: int = 3, **attrs: Any) -> TrialRecord:
    params = space_of().defaults(backbone=backbone, strategy="feature_extraction", head="linear")
    return TrialRecord(9, "running", {**params, "probe.joined": joined}, None, attrs)


# --- the parameter ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "choices"), [(1, None), (2, (1, 2)), (3, (1, 2, 3)), (4, (1, 2, 3))])
def test_a_head_may_read_as_many_backbones_as_there_are_at_most_three(
    count: int, choices: tuple[int, ...] | None
) -> None:
    space = space_of(*BACKBONES[:count])
    expected = None if choices is None else Choice(choices, 1)
    assert space.parameters.get("probe.joined") == expected
    point = space.defaults(strategy="feature_extraction", head="linear")
    assert point.get("probe.joined") == (None if choices is None else 1)


@pytest.mark.parametrize(
    ("chosen", "asked"),
    [
        ({"probe.solver": "path"}, True),
        ({"probe.solver": "lbfgs"}, True),
        ({"probe.solver": "minibatch"}, False),
        ({"head": "mlp"}, False),
        ({"strategy": "full"}, False),
    ],
)
def test_only_heads_that_are_solved_read_several(chosen: dict[str, str], asked: bool) -> None:
    names = {"strategy": "feature_extraction", "head": "linear", **chosen}
    point = space_of().walk(lambda name, parameter: names.get(name, parameter.default))
    assert ("probe.joined" in point) is asked


def test_where_there_is_one_backbone_asking_for_more_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"no parameter 'probe\.joined' in this search"):
        space_of("timm:a", **{"probe.joined": 2})
    with pytest.raises(ConfigError, match=r"probe\.joined: 3 is not one of 1, 2"):
        space_of("timm:a", "timm:b", **{"probe.joined": 3})
    with pytest.raises(ConfigError, match=r"no parameter 'probe\.beside' in this search"):
        space_of(**{"probe.beside": "timm:b"})


def test_who_is_in_a_hurry_reads_one() -> None:
    assert PRESETS["fast"].fixed["probe.joined"] == 1
    assert "probe.joined" not in PRESETS["balanced"].fixed


def test_of_an_earlier_study_only_the_number_is_taken_over() -> None:
    before = {**space_of().defaults(strategy="feature_extraction", head="linear"), "probe.joined": 3}
    before["probe.beside"] = "timm:x timm:y"
    found, smaller = (adapted(before, space_of(*names)) for names in (BACKBONES, BACKBONES[:2]))
    assert found is not None and found["probe.joined"] == 3 and "probe.beside" not in found
    assert smaller is not None and smaller["probe.joined"] == 1, "three are more than there are"


# --- when -------------------------------------------------------------------------------------------


def test_the_best_probe_is_tried_again_on_two_backbones_and_on_three() -> None:
    found = points(probes())
    best = probes()[1]
    assert found == [{**best.params, "probe.joined": 2}, {**best.params, "probe.joined": 3}]
    for point in found:
        assert space_of().walk(lambda name, _, point=point: point[name]) == point


@pytest.mark.parametrize(("trials", "count"), [(9, 0), (10, 1), (19, 1), (20, 2), (500, 2), (None, 2)])
def test_they_take_a_tenth_of_the_trials_at_most(trials: int | None, count: int) -> None:
    assert len(points(probes(), most_trials=trials)) == count


def test_it_happens_once_and_after_the_screening() -> None:
    before = probes()
    running = TrialRecord(4, "running", before[0].params, None, {"purpose": "probe"})
    waiting = TrialRecord(4, "waiting", {}, None, {"purpose": "mirror"})
    tried = TrialRecord(4, "failed", points(before)[0], None, {"purpose": "joined"})
    for more in (running, waiting, tried):
        assert points([*before, more]) == []
    assert len(points([*before, tried], since=5)) == 2, "another version"
    assert points([]) == []


def test_no_more_are_asked_for_than_are_probed() -> None:
    assert [point["probe.joined"] for point in points(probes(0.7, 0.9))] == [2]
    assert points(probes(0.7)) == []


@pytest.mark.parametrize("value", [1, 2])
def test_what_is_fixed_is_not_tried(value: int) -> None:
    assert points(probes(), space=space_of(**{"probe.joined": value})) == []


def test_probes_whose_heads_are_not_solved_have_nothing_to_join() -> None:
    space = space_of(**{"probe.solver": "minibatch"})
    assert points(probes(space=space), space=space) == []


# --- which others -----------------------------------------------------------------------------------


def test_the_others_are_the_best_by_their_probes_so_far() -> None:
    best = ranked(probes())  # b, d, a, c
    assert partners(proposed("timm:a"), best) == ("timm:b", "timm:d")
    assert partners(proposed("timm:b"), best) == ("timm:d", "timm:a")
    assert partners(proposed("timm:b", joined=2), best) == ("timm:d",)
    assert partners(proposed("timm:b", joined=1), best) == ()
    assert partners(proposed("timm:b"), [t for t in best if t.params["backbone"] == "timm:b"]) == ()


def test_an_id_that_cannot_be_told_apart_is_passed_over() -> None:
    odd = dataclasses.replace(trial(0, "timm:my own weights"), score=0.99)
    assert partners(proposed("timm:a"), [odd, *ranked(probes())]) == ("timm:b", "timm:d")


def test_another_attempt_reads_what_the_first_one_read() -> None:
    best = ranked(probes())
    assert partners(proposed(beside="timm:c"), best) == ("timm:c",)
    assert partners(proposed(beside=""), best) == ()


def test_a_backbone_whose_probe_failed_is_not_joined(make_plan: MakePlan) -> None:
    before = [trial(0, score=0.5), trial(1, "timm:b", None, state="failed"), trial(2, "timm:c", 0.4)]
    spec = make_plan().spec(proposed("timm:a"), before)
    assert (spec.backbone, spec.params["probe.beside"]) == ("timm:a", "timm:c")


def test_a_trial_that_finds_nobody_to_join_is_an_ordinary_one(make_plan: MakePlan) -> None:
    assert "probe.beside" not in make_plan().spec(proposed("timm:a"), [trial(0)]).params
    assert "probe.beside" not in make_plan().spec(proposed("timm:a", joined=1), [trial(1, "timm:b")]).params


# --- not taken for its first backbone's ---------------------------------------------------------------


def done(**changes: Any) -> TrialDone:
    given = {"number": 9, "score": 0.8, "metrics": {}, "val_loss": 0.5, "best_epoch": 3, "epochs": 3,
             "seconds": 1.0, "checkpoint": "checkpoint.safetensors", **changes}  # fmt: skip
    return TrialDone(**given)


def test_no_gain_is_measured_against_a_joined_trial(make_plan: MakePlan) -> None:
    alone = trial(0, score=0.7, held_out=0.7, val_score=0.7)
    joined = trial(1, score=0.9, held_out=0.9, val_score=0.95, purpose="joined", beside="timm:b")
    given = ("timm:a", "accuracy")
    assert estimate(done(), *given, [alone, joined], val=200) == estimate(done(), *given, [alone], val=200)
    assert estimate(done(), *given, [joined], val=200) == 0.8
    result = EpochResult(9, 2, 0.72, 0.1, 0.1, 1.0)
    assert is_hopeless(result, "timm:a", [alone, joined], val=2000) is False
    spec = make_plan().spec(proposed("timm:a", joined=1), [alone, joined])
    assert spec.prove_above == 0.7


def test_fine_tuning_starts_from_a_head_on_its_own_backbone_alone(make_plan: MakePlan) -> None:
    plan: Plan = make_plan()
    before = [trial(0, score=0.7), trial(1, score=0.9, purpose="joined", beside="timm:b")]
    files = {t.number: write_checkpoint(plan, t.number) for t in before}
    params = plan.space.defaults(backbone="timm:a", strategy="full", head="linear")
    record = TrialRecord(9, "running", params, None, {})
    assert plan.spec(record, before).init_head == files[0]
    assert plan.spec(record, before[1:]).init_head is None


def test_of_an_ensemble_a_joined_trial_is_not_one_more_on_its_backbone() -> None:
    both = {"purpose": "joined", "beside": "timm:b"}
    trials = [trial(0, score=0.9, **both), trial(1, "timm:b", 0.8, purpose="joined", beside="timm:a")]
    trials += [trial(2, score=0.7), trial(3, score=0.6), trial(4, score=0.5), trial(5, score=0.4, **both)]
    assert [t.number for t in candidates(trials)] == [0, 1, 2, 3]


def test_the_time_of_a_refit_counts_the_test_features_of_all_backbones() -> None:
    before = probes()
    alone = dataclasses.replace(before[0], number=9, attrs={"seconds": 1.0})
    joined = dataclasses.replace(alone, attrs={"seconds": 1.0, "beside": "timm:b timm:c"})
    trials = [*before, joined]
    # Ten seconds for a thousand images: two for the test part of each backbone.
    assert refit_seconds(alone, [*before, alone], SIZES) == pytest.approx(1.0 + 2.0)
    assert refit_seconds(joined, trials, SIZES) == pytest.approx(1.0 + 3 * 2.0)
    with_mirrors = dataclasses.replace(joined, params={**joined.params, "probe.mirror": True})
    assert refit_seconds(with_mirrors, [*before, with_mirrors], SIZES) == pytest.approx(0.2 + 3 * 4.0)


def test_what_a_trial_takes_is_told_apart_by_all_its_backbones(make_plan: MakePlan) -> None:
    plan, before = make_plan(), [trial(0), trial(1, "timm:b"), trial(2, "timm:c")]
    kinds = {kind_of(plan.spec(proposed("timm:a", joined=n), before)) for n in (1, 2, 3)}
    assert len(kinds) == 3


def test_a_trial_whose_other_backbone_is_not_searched_any_more_is_shelved(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tlauto.db'}"
    Store(url).close()
    with closing(Study(url, "s", seed=1, create=True)) as study:
        for beside in ("timm:b", "timm:c"):
            point = {**probes()[0].params, "probe.joined": 2}
            study.enqueue(point, purpose="joined")
            record = study.ask(space_of())
            study.note(record.number, beside=beside)
            study.tell(record.number, 0.9)
            study.enqueue(point, purpose="joined", beside=beside, retry_of=record.number)
            study.fail(study.ask(space_of()).number, kind="interrupted", message="")
            study.requeue(record.number + 1, why="interrupted")
            if beside == "timm:b":
                study.fail(study.ask(space_of()).number, kind="interrupted", message="")
    smaller = space_of("timm:a", "timm:b")
    copy_trials(url, "s", before=1, version=2, parameters=smaller.parameters, metric="accuracy")
    with closing(Study(url, "s", seed=1, create=False, version=2)) as study:
        found = study.trials()
    assert [t.state for t in found] == ["complete", "failed", "failed", "shelved", "failed", "failed"]
    assert backbones_of(found[0]) == ("timm:a", "timm:b")
    assert found[5].attrs["error"] == "the backbone timm:c is not searched any more"


# --- whole searches -----------------------------------------------------------------------------------

EFFICIENTNET = "timm:test_efficientnet.r160_in1k"
SEARCH = (
    "search", "--data", "patches", "--no-pretrained", "--offline", "--workers", "0", "--devices", "cpu",
    "--strategies", "feature_extraction", "--heads", "linear", "--seed", "5",
)  # fmt: skip


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Path:
    """A workspace with a search whose trials all read two backbones, as soon as there are two; one wins."""
    folder = tmp_path_factory.mktemp("joined")
    make_patches(folder / "patches")
    backbones = ",".join((RESNET, VIT, EFFICIENTNET))
    given = ("--backbones", backbones, "--ensemble", "1", "--set", "probe.joined=2")
    finished(*SEARCH, *given, "--trials", "5", cwd=folder)
    with closing(sqlite3.connect(folder / "tlauto-runs" / "tlauto.db")) as database, database:
        # All tell the patches apart, so that rounding alone would say which is the best.
        database.execute(
            "UPDATE trial_values SET value = 0.5 WHERE trial_id = (SELECT MIN(trial_id) FROM trials)"
        )
    finished(*SEARCH, *given, "--trials", "6", cwd=folder)
    return folder


@pytest.mark.slow
def test_probes_join_whoever_is_probed_and_the_winner_reads_both(searched: Path) -> None:
    rows = {row["number"]: row for row in leaderboard(searched)}
    beside = [rows[number]["params"].get("probe.beside") for number in range(6)]
    assert beside[0] is None and all(beside[1:])
    best = next(row for row in rows.values() if row["is_best"])
    other = best["params"]["probe.beside"]
    assert f", with {other}" in run("show", cwd=searched).stdout
    wide = {"COLUMNS": "200"}
    assert f"{best['backbone']} + {other}" in run("leaderboard", cwd=searched, env=wide).stdout


@pytest.mark.slow
def test_the_model_answers_as_its_refit_did_and_is_evaluated(searched: Path) -> None:
    study = searched / "tlauto-runs" / "patches"
    saved = np.load(study / "refit" / "winner" / "predictions.npz")
    files = [searched / "patches" / str(path) for path in saved["paths"]]
    model = tlauto.load(study / "model")
    found = np.stack([row for _, row in model.outputs(map(str, files))])
    np.testing.assert_allclose(found, saved["predictions"], atol=1e-4)
    assert model.manifest.metrics["accuracy"]["value"] == 1.0
    told = run("evaluate", str(study / "model"), "--data", "patches", "--json", cwd=searched)
    assert told.returncode == 0 and '"accuracy"' in told.stdout, told.stderr


@pytest.mark.slow
def test_a_rerun_gives_the_same_score(searched: Path) -> None:
    rows = [row for row in leaderboard(searched) if row["params"].get("probe.beside")]
    told = run("rerun", "patches", str(rows[0]["number"]), "--json", "--devices", "cpu", cwd=searched)
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["score"] == found["recorded"]


def test_a_search_tries_it_by_itself(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    found = tlauto.search(
        make_patches(tmp_path / "patches"), out=tmp_path / "runs", trials=10, backbones=f"{RESNET},{VIT}",
        heads="linear", strategies="feature_extraction", pretrained=False, offline=True, devices="cpu",
        workers=0,
    )  # fmt: skip
    rows = found.leaderboard()
    (joined,) = [row for row in rows if row.purpose == "joined"]
    probes = [row for row in rows if row.purpose == "probe"]
    assert joined.params["probe.joined"] == 2
    assert {joined.backbone, joined.params["probe.beside"]} == {RESNET, VIT} == {p.backbone for p in probes}
    assert joined.state == "complete" and joined.number > max(row.number for row in probes)
    assert next(row for row in rows if row.purpose == "mirror").number < joined.number


@pytest.mark.slow
def test_a_killed_search_joins_the_same_when_it_goes_on(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    search = (*SEARCH, "--backbones", f"{RESNET},{VIT}", "--trials", "10", "--ensemble", "1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        make_patches(folder / "patches")
    finished(*search, cwd=whole)
    place = next(t.number for t in trials(whole) if t.attrs["purpose"] == "joined")
    # All of them were enqueued, so each begins and ends; its result is in our tables by then.
    killed("storage", "set_trial_state_values", "before", 2 * (place + 1), *search, cwd=stopped)
    assert trials(stopped)[place].state == "running"
    finished(*search, cwd=stopped)
    assert facts(stopped) == facts(whole)
