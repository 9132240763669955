"""What is proposed from earlier searches: similarity, screening order, first trials."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tlauto.builtin.tasks import task
from tlauto.config import SearchConfig
from tlauto.history import collapsed
from tlauto.pace import Sizes
from tlauto.plugins import registry
from tlauto.schedule import Plan
from tlauto.searchspace import SearchSpace
from tlauto.space import Scalar
from tlauto.study import TrialRecord
from tlauto.warm import Earlier, Past, Profile, adapted, agreement, screening_order, warm_points

BACKBONES = tuple(f"timm:{letter}" for letter in "abcdef")
HERE = Profile("multiclass", images=200, classes=4, imbalance=1.0, side=300.0, grey=0.0)
PROBES = {"timm:a": 0.6, "timm:b": 0.7, "timm:c": 0.8}


def space(*, strategies: tuple[str, ...] = ("feature_extraction", "partial"), **fixed: Scalar) -> SearchSpace:
    plugins = registry()
    return SearchSpace(
        BACKBONES,
        tuple(plugins.strategy(name) for name in strategies),
        tuple(plugins.head(name) for name in ("linear", "mlp")),
        task("multiclass").space,
        fixed,
    )


def point(backbone: str = "timm:b", **changes: Scalar) -> dict[str, Scalar]:
    found = space().defaults(backbone=backbone, strategy="partial", head="mlp")
    return {**found, **{name.replace("__", "."): value for name, value in changes.items()}}


def earlier(study: str, **changes: Any) -> Earlier:
    facts = {"fingerprint": study, "profile": HERE, "probes": PROBES, "params": point(), "gain": 0.5}
    return Earlier(**{"study": study, **facts, **changes})


def past(*found: Earlier) -> Past:
    return Past("these images", HERE, found)


def proposals(given: Past, *, trials: int | None = 100, **changes: Any) -> list[tuple[str, str]]:
    """Study and backbone of each point that is proposed."""
    facts = {"kept": ("timm:c", "timm:b", "timm:a"), "strategies": ("feature_extraction", "partial")}
    points = warm_points(space(), given, PROBES, **{**facts, "tried": [], "trials": trials, **changes})
    return [(study, str(params["backbone"])) for params, study in points]


# --- similarity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "tau"),
    [
        ((1, 2, 3, 4), 1.0),
        ((4, 3, 2, 1), -1.0),
        ((1, 2, 4, 3), 4 / 6),
        ((1, 1, 1, 1), 0.0),
        ((1, 1, 2, 3), 5 / 6),
    ],
)
def test_agreement_is_kendalls_tau_with_ties_as_nothing(other: tuple[float, ...], tau: float) -> None:
    assert agreement((10, 20, 30, 40), other) == pytest.approx(tau)


def test_profiles_differ_by_the_ratios_of_their_figures() -> None:
    assert HERE.distance(HERE) == 0.0
    twice = replace(HERE, side=600.0)
    assert HERE.distance(twice) == twice.distance(HERE) == pytest.approx(1 / 4 / 6)  # log 2 / log 16
    assert HERE.distance(replace(HERE, side=30_000.0)) == pytest.approx(1 / 6), "far is far"
    assert HERE.distance(replace(HERE, grey=1.0)) == pytest.approx(1 / 6)
    # Four times the classes: as many images, and a quarter as many of each.
    assert HERE.distance(replace(HERE, classes=16)) == pytest.approx((0.5 + 0.5) / 6)


def test_the_order_of_the_probes_says_as_much_as_the_profile() -> None:
    reversed_order = {"timm:a": 0.8, "timm:b": 0.7, "timm:c": 0.6}
    alike, unlike = earlier("alike"), earlier("unlike", probes=reversed_order)
    assert past().similarity(alike, PROBES) == 1.0
    assert past().similarity(unlike, PROBES) == 0.5
    assert past().similarity(unlike, {}) == 1.0, "before there are probes only the profile counts"
    few = {"timm:a": 0.8, "timm:b": 0.7}
    assert past().similarity(earlier("few", probes=few), PROBES) == 1.0, (
        "two backbones are too few to compare"
    )


def test_the_same_images_are_the_most_similar() -> None:
    same = earlier("same", fingerprint="these images", probes={"timm:a": 0.9, "timm:b": 0.5, "timm:c": 0.1})
    assert past().similarity(same, PROBES) == 1.0


# --- which backbones first ----------------------------------------------------------------------------


def won(study: str, backbone: str, **changes: Any) -> Earlier:
    probes = {name: 0.5 + 0.01 * i for i, name in enumerate(reversed(BACKBONES))} | {backbone: 0.9}
    return earlier(study, probes=probes, params=point(backbone), **changes)


def test_without_a_past_backbones_are_screened_by_their_prior() -> None:
    assert screening_order(BACKBONES, past()) == BACKBONES


def test_what_won_before_is_screened_right_after_the_default() -> None:
    order = screening_order(
        BACKBONES, past(won("one", "timm:f"), won("two", "timm:f"), won("three", "timm:d"))
    )
    assert order == ("timm:a", "timm:f", "timm:d", "timm:b", "timm:c", "timm:e")


def test_the_default_that_always_won_changes_nothing() -> None:
    assert screening_order(BACKBONES, past(won("one", "timm:a"), won("two", "timm:a"))) == BACKBONES


def test_what_won_on_similar_images_comes_before_what_won_on_others() -> None:
    other = replace(HERE, images=20_000, classes=100, side=32.0, grey=1.0)
    found = past(won("digits", "timm:f", profile=other), won("leaves", "timm:e"))
    assert screening_order(BACKBONES, found)[:3] == ("timm:a", "timm:e", "timm:f")


def test_a_winner_that_is_not_in_this_search_is_passed_over() -> None:
    gone = won("one", "keras:Gone")
    assert sorted(screening_order(BACKBONES, past(gone))) == sorted(BACKBONES)


# --- what to try first --------------------------------------------------------------------------------


def test_the_most_similar_datasets_propose_by_similarity_times_gain() -> None:
    other = replace(HERE, images=20_000, classes=100)
    found = past(
        earlier("small gain", gain=0.1, params=point("timm:a")),
        earlier("large gain", gain=0.8, params=point("timm:b")),
        earlier("middle gain", gain=0.4, params=point("timm:c")),
        earlier("far away", gain=1.0, profile=other, params=point("timm:a", optim__name="sgd")),
    )
    assert [study for study, _ in proposals(found)] == ["large gain", "middle gain", "small gain"]


@pytest.mark.parametrize(("trials", "most"), [(1, 1), (12, 1), (29, 2), (30, 3), (1000, 3), (None, 3)])
def test_a_tenth_of_the_trials_is_taken_over_but_always_one(trials: int | None, most: int) -> None:
    found = past(*(earlier(name, params=point(f"timm:{name}")) for name in "abc"))
    assert len(proposals(found, trials=trials)) == most


def test_what_did_not_beat_its_probe_is_not_proposed() -> None:
    assert proposals(past(earlier("probe won", gain=0.0))) == []


def test_nothing_is_proposed_twice() -> None:
    twice = past(earlier("one"), earlier("two"))
    assert [study for study, _ in proposals(twice)] == ["one"]
    assert proposals(twice, tried=[space().defaults(strategy="feature_extraction")]) != []
    assert proposals(twice, tried=[point()]) == []


def test_a_backbone_that_screening_dropped_gives_way_to_the_best_probe() -> None:
    assert proposals(past(earlier("one")), kept=("timm:a", "timm:c")) == [("one", "timm:c")]
    assert proposals(past(earlier("one", params=point("timm:a")))) == [("one", "timm:a")]
    gone = {**point(), "backbone": "keras:Gone"}
    assert proposals(past(earlier("one", params=gone))) == [("one", "timm:c")]


def test_what_there_is_no_time_for_is_not_proposed() -> None:
    assert proposals(past(earlier("one")), strategies=("feature_extraction",)) == []


# --- into another space -------------------------------------------------------------------------------


def test_values_that_do_not_fit_here_are_replaced_by_defaults() -> None:
    strange = {"head.mlp.dropout": 7.0, "optim.adamw.lr": "fast", "freeze.partial.k": float("nan"), "x.y": 1}
    assert adapted({**point(), **strange}, space()) == point()
    known = point(optim__adamw__lr=0.005)
    assert adapted(known, space()) == known
    del known["augment.level"]
    assert adapted(known, space()) == point(optim__adamw__lr=0.005)


def test_fixed_values_hold_for_what_is_taken_over() -> None:
    found = adapted(point(optim__adamw__lr=0.005), space(**{"optim.name": "sgd"}))
    assert found is not None
    assert found["optim.name"] == "sgd" and "optim.sgd.lr" in found and "optim.adamw.lr" not in found


@pytest.mark.parametrize("changes", [{"strategy": "full"}, {"head": "cosine"}, {"head": None}])
def test_a_strategy_or_head_that_is_not_searched_is_passed_over(changes: Mapping[str, Scalar]) -> None:
    assert adapted({**point(), **changes}, space()) is None


def test_a_past_survives_json() -> None:
    found = past(earlier("one"), earlier("two", fingerprint="other"))
    assert Past.from_json(json.loads(json.dumps(found.to_json()))) == found


# --- when ---------------------------------------------------------------------------------------------


def make_plan(given: Past | None, **config: Any) -> Plan:
    folder = Path("nowhere")
    return Plan(
        SearchConfig(data="images", **config), space(), "multiclass", "accuracy", "dataset.json", folder,
        folder, "cpu", Sizes(140, 30, 30), given,
    )  # fmt: skip


def record(number: int, backbone: str, state: str = "complete", purpose: str = "probe") -> TrialRecord:
    params = space().defaults(backbone=backbone, strategy="feature_extraction", head="linear")
    score = PROBES.get(backbone, 0.5) if state == "complete" else None
    return TrialRecord(number, state, params, score, {"purpose": purpose})


def test_points_are_taken_over_once_when_every_probe_has_ended() -> None:
    plan = make_plan(past(earlier("one")))
    probes = [record(i, name) for i, name in enumerate(PROBES)]
    assert [study for _, study in plan.next_warm(probes, None)] == ["one"]
    default = record(3, "timm:a", "running", "default")
    assert plan.next_warm([*probes, default], None) != [], "the default recipe need not be waited for"
    for unfinished in ("waiting", "running"):
        assert plan.next_warm([*probes, record(3, "timm:d", unfinished)], None) == []
    assert plan.next_warm([*probes, record(3, "timm:b", "failed", "warm")], None) == []


def test_a_plan_without_a_past_is_that_of_an_empty_one() -> None:
    probes = [record(i, name) for i, name in enumerate(PROBES)]
    for config in ({}, {"trials": 6}, {"time_s": 60.0}):
        empty, cold = make_plan(past(), **config), make_plan(None, **config)
        assert empty.first_points(config.get("trials")) == cold.first_points(config.get("trials"))
        assert empty.next_warm(probes, None) == cold.next_warm(probes, None) == []
        assert empty.next_probe(probes, spent=1.0) == cold.next_probe(probes, spent=1.0)


def test_a_small_budget_screens_what_won_before() -> None:
    given = past(won("one", "timm:f"), won("two", "timm:e"))
    points = make_plan(given, trials=6).first_points(6)
    probed = [p["backbone"] for p, purpose in points if purpose == "probe"]
    assert probed == ["timm:a", "timm:f", "timm:e"] or probed == ["timm:a", "timm:e", "timm:f"]
    assert make_plan(given, trials=6).default_recipe() == make_plan(None, trials=6).default_recipe()
    timed = make_plan(given, time_s=1000.0)
    assert [p["backbone"] for p, purpose in timed.first_points(None) if purpose == "probe"] == probed
    following = timed.next_probe([record(i, str(name)) for i, name in enumerate(probed)], spent=1.0)
    assert following is not None and following["backbone"] == "timm:b"


# --- one backbone everywhere --------------------------------------------------------------------------


def ranked(study: str, top: str = "timm:c", by: float = 0.01) -> Earlier:
    return earlier(study, probes=dict.fromkeys(PROBES, 0.8) | {top: 0.8 + by})


CLOSE = dict.fromkeys(PROBES, 0.7) | {"timm:c": 0.71}


def test_one_backbone_that_is_narrowly_first_everywhere_is_named() -> None:
    assert collapsed(past(ranked("one"), ranked("two"), ranked("three")), CLOSE) == "timm:c"


@pytest.mark.parametrize(
    "found",
    [
        (ranked("one"), ranked("two")),
        (ranked("one"), ranked("two"), ranked("three", top="timm:a")),
        (ranked("one"), ranked("two"), earlier("three", fingerprint="these images")),
        (ranked("one"), ranked("two"), earlier("three", probes={"timm:c": 0.9, "timm:a": 0.1})),
        tuple(ranked(name, by=0.19) for name in ("one", "two", "three")),
        tuple(ranked(name, by=0.0) for name in ("one", "two", "three")),
    ],
    ids=["two datasets", "another won", "the same images", "no contest", "far ahead", "ties"],
)  # fmt: skip
def test_nothing_is_said_when_the_ranking_has_reasons(found: tuple[Earlier, ...]) -> None:
    assert collapsed(past(*found), CLOSE) is None


def test_nothing_is_said_when_another_backbone_is_first_here() -> None:
    found = past(ranked("one"), ranked("two"), ranked("three"))
    assert collapsed(found, {**CLOSE, "timm:a": 0.9}) is None
    assert collapsed(found, {}) is None
