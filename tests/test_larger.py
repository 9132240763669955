"""When backbones are tried on larger images than they were pretrained on, and what comes of it."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_schedule import MakePlan, make_plan, trial, write_checkpoint
from tests_support import run, spec_of

import tlauto
from tlauto.again import LARGER, Screening
from tlauto.builtin.tasks import task
from tlauto.config import PRESETS
from tlauto.contracts import BackboneInfo, WeightsStatus
from tlauto.errors import ConfigError
from tlauto.larger import offered, proposable_scales
from tlauto.levels import read_from
from tlauto.pace import Sizes, affordable_epochs, feature_seconds, refit_seconds
from tlauto.plugins import registry
from tlauto.pool.protocol import Candidate, PreflightDone, decode, encode
from tlauto.room import frozen_bytes, kind_of
from tlauto.searchspace import SearchSpace
from tlauto.study import Study, TrialRecord
from tlauto.tables import MEMORY
from tlauto.warm import adapted

__all__ = ["make_plan"]  # a fixture

BACKBONES = ("timm:a", "timm:b", "timm:c", "timm:d")
SIZES = Sizes(800, 200, 200)
SCALE = "image.scale"


def space_of(*larger: str, strategies: tuple[str, ...] = ("feature_extraction", "full"), **fixed: Any) -> Any:
    plugins = registry()
    found = tuple(plugins.strategy(name) for name in strategies)
    heads = (plugins.head("linear"),)
    known = frozenset(larger or BACKBONES)
    return SearchSpace(BACKBONES, found, heads, task("multiclass").space, fixed, larger=known)


def probes(seconds: float = 10.0, space: Any = None) -> list[TrialRecord]:
    found = []
    for number, backbone in enumerate(BACKBONES):
        params = (space or space_of()).defaults(
            backbone=backbone, strategy="feature_extraction", head="linear"
        )
        attrs = {"purpose": "probe", "seconds": seconds}
        found.append(TrialRecord(number, "complete", params, 0.9 - number / 10, attrs))
    return found


def again(number: int, of: TrialRecord, score: float | None, state: str = "complete") -> TrialRecord:
    """A probe's repetition on larger images."""
    attrs = {"purpose": "larger", "seconds": 20.0}
    return TrialRecord(number, state, {**of.params, SCALE: 1.4}, score, attrs)


def points(trials: list[TrialRecord], **changes: Any) -> list[dict[str, Any]]:
    given = {"sizes": SIZES, "left": None, "most_trials": 30, **changes}
    space = given.pop("space", space_of())
    ranked = [t for t in trials if t.state == "complete" and t.attrs["purpose"] == "probe"]
    return Screening(space, trials, ranked, **given).points(LARGER, among=space.larger)


def scales(trials: list[TrialRecord], **changes: Any) -> tuple[float, ...]:
    space, kept = changes.get("space", space_of()), changes.get("kept", BACKBONES[:2])
    ranked = [t for t in trials if t.state == "complete" and t.attrs["purpose"] == "probe"]
    return proposable_scales(Screening(space, trials, ranked, SIZES, changes.get("left"), 30), kept=kept)


def candidates(*sizes: int, unable: tuple[int, ...] = ()) -> dict[str, Candidate]:
    at_hand = WeightsStatus("at_hand", "here")
    return {
        id: Candidate(BackboneInfo(id, input_size=size), at_hand, is_scalable=place not in unable)
        for place, (id, size) in enumerate(zip(BACKBONES, sizes, strict=False))
    }


# --- where ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "expected"),
    [(100, ()), (287, ()), (288, (0, 1)), (489, (0, 1)), (490, (0, 1, 2)), (2000, (0, 1, 2))],
)
def test_larger_images_are_tried_where_there_is_more_to_be_seen_in_them(
    side: int, expected: tuple[int, ...]
) -> None:
    """224 become 320 and 384 become 544 pixels, of which nine tenths must be there."""
    found = offered(candidates(224, 224, 384, 224, unable=(3,)), {}, side=side)
    assert found == frozenset(BACKBONES[place] for place in expected)


def test_who_asks_for_larger_images_gets_them_of_small_ones_too() -> None:
    assert offered(candidates(224, 384), {SCALE: 1.4}, side=32) == frozenset(BACKBONES[:2])
    assert offered(candidates(224, 384), {SCALE: 1.0}, side=2000) == frozenset()


@pytest.mark.parametrize(
    ("unable", "said"),
    [
        ((1,), "but timm:b takes images of one size only; use --backbones timm:a,timm:c"),
        ((0, 2), "but timm:a and timm:c take images of one size only; use --backbones timm:b"),
        ((0, 1, 2), "take images of one size only; leave the parameter out"),
    ],
)
def test_a_fixed_scale_that_a_backbone_cannot_have_is_one_sentence(
    unable: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        offered(candidates(224, 224, 224, unable=unable), {SCALE: 1.4}, side=2000)


def test_only_backbones_that_may_see_them_have_the_parameter() -> None:
    space = space_of("timm:b")
    for strategy in ("feature_extraction", "full"):
        known = [space.defaults(backbone=id, strategy=strategy, head="linear") for id in BACKBONES]
        assert [point.get(SCALE) for point in known] == [None, 1.0, None, None]
    with pytest.raises(ConfigError, match=r"image\.scale: 2 is not one of 1\.0, 1\.4"):
        space_of(**{SCALE: 2})


def test_of_an_earlier_study_the_scale_is_taken_over_where_it_can_be() -> None:
    before = {**space_of().defaults(strategy="feature_extraction", head="linear"), SCALE: 1.4}
    here, there = adapted(before, space_of()), adapted(before, space_of("timm:d"))
    assert here is not None and here[SCALE] == 1.4
    assert there is not None and SCALE not in there


def test_who_is_in_a_hurry_keeps_to_the_size_of_the_pretraining() -> None:
    assert PRESETS["fast"].fixed[SCALE] == 1.0
    assert SCALE not in PRESETS["balanced"].fixed


def test_what_is_said_of_a_head_names_the_size_where_it_is_another() -> None:
    assert read_from("levels", mirror=True) == " on all stages, with mirror images"
    assert read_from("pooled", scale=1.4) == ", images 1.4 times as large"


def test_a_worker_says_who_can_be_resized() -> None:
    done = PreflightDone(tuple(candidates(224, 384, unable=(1,)).values()))
    assert decode(encode(done)) == done


# --- when -------------------------------------------------------------------------------------------


def test_the_two_best_probes_are_tried_again_and_differ_in_that_alone() -> None:
    trials = probes()
    found = points(trials)
    assert [point["backbone"] for point in found] == list(BACKBONES[:2])
    for point, probe in zip(found, trials, strict=False):
        assert point == {**probe.params, SCALE: 1.4}
        assert space_of().walk(lambda name, _, point=point: point[name]) == point
    assert [p["backbone"] for p in points(trials, space=space_of("timm:c"))] == ["timm:c"]


@pytest.mark.parametrize(("trials", "count"), [(9, 0), (10, 1), (19, 1), (20, 2), (500, 2), (None, 2)])
def test_they_take_a_tenth_of_the_trials_at_most(trials: int | None, count: int) -> None:
    assert len(points(probes(), most_trials=trials)) == count


@pytest.mark.parametrize(("left", "count"), [(None, 2), (197.0, 2), (195.0, 0)])
def test_none_takes_more_than_a_tenth_of_the_time_left(left: float | None, count: int) -> None:
    """10 s for the features of a backbone are 19.6 s of images that are 1.4 times as large."""
    assert len(points(probes(seconds=10.0), left=left)) == count


def test_it_happens_once_and_after_the_screening() -> None:
    trials = probes()
    running = TrialRecord(4, "running", trials[0].params, None, {"purpose": "probe"})
    waiting = TrialRecord(4, "waiting", {}, None, {"purpose": "joined"})
    for more in (running, waiting, again(4, trials[0], None, "failed")):
        assert points([*trials, more]) == []
    other = points([*trials, again(4, trials[0], 0.9)], since=5)
    assert [point["backbone"] for point in other] == ["timm:b"], "another version, another backbone"


@pytest.mark.parametrize("value", [1.0, 1.4])
def test_what_is_fixed_is_neither_tried_nor_chosen(value: float) -> None:
    space = space_of(**{SCALE: value})
    assert points(probes(), space=space) == []
    assert scales(probes(), space=space) == ()


def test_the_sampler_may_choose_them_once_they_have_gained() -> None:
    before = probes()
    assert scales(before) == (1.0,), "they have not been tried"
    assert scales([*before, again(4, before[0], 0.9), again(5, before[1], 0.8)]) == (1.0,), "not better"
    assert scales([*before, again(4, before[0], None, "failed")]) == (1.0,)
    won = [*before, again(4, before[0], 0.85), again(5, before[1], 0.81)]
    assert scales(won) == (1.0, 1.4)
    assert scales(won, space=dataclasses.replace(space_of(), larger=frozenset())) == ()
    assert scales([], space=space_of(strategies=("full",))) == (1.0, 1.4), "nothing will tell beforehand"


def test_the_sampler_may_choose_them_while_there_is_time_for_their_features() -> None:
    before = probes(seconds=10.0)
    won = [*before, again(4, before[0], 0.95)]
    assert scales(won, left=197.0) == (1.0, 1.4)
    assert scales(won, left=195.0) == (1.0,)
    assert scales(won, left=195.0, kept=BACKBONES[:1]) == (1.0, 1.4), "those are in the cache"


@pytest.mark.parametrize("larger", [BACKBONES, BACKBONES[:2]])
def test_the_sampler_keeps_to_the_scales_that_it_may_choose(larger: tuple[str, ...]) -> None:
    space = space_of(*larger)
    seen: list[Any] = []
    with closing(Study(MEMORY, "s", seed=0, create=True)) as study:
        for number in range(36):
            kept = (1.0,) if number < 24 else (1.0, 1.4)
            record = study.ask(space, kept={"backbone": BACKBONES[1:3], SCALE: kept})
            assert (SCALE in record.params) is (record.params["backbone"] in larger)
            seen.append(record.params.get(SCALE))
            study.tell(record.number, 0.5 + 0.01 * (number % 7))
    assert set(seen[:24]) - {None} == {1.0}
    assert set(seen[24:]) - {None} == {1.0, 1.4}


def test_a_plan_tries_mirror_images_then_several_backbones_then_larger_images(make_plan: MakePlan) -> None:
    plan = make_plan(trials=40)
    plan = dataclasses.replace(plan, space=dataclasses.replace(plan.space, larger=frozenset(BACKBONES)))
    trials = [
        TrialRecord(n, "complete", plan._probe(id), 0.9 - n / 10, {"purpose": "probe", "seconds": 1.0})
        for n, id in enumerate(BACKBONES)
    ]
    seen = []
    while (found := plan.next_again(trials, None))[0]:
        seen.append((found[1], len(found[0])))
        trials += [
            TrialRecord(len(trials) + n, "complete", params, 0.5, {"purpose": found[1], "seconds": 1.0})
            for n, params in enumerate(found[0])
        ]
    assert seen == [("mirror", 3), ("joined", 2), ("larger", 2)]
    assert plan.proposable(trials, None)[SCALE] == (1.0,)


# --- what it costs ----------------------------------------------------------------------------------


def test_seconds_grow_with_the_pixels_until_they_are_measured() -> None:
    before = probes(seconds=10.0)
    assert feature_seconds("timm:a", before, SIZES, scale=1.4) == pytest.approx(0.01 * 1.96)
    assert feature_seconds("timm:new", before, SIZES, scale=1.4) == pytest.approx(0.01 * 1.96)
    after = [*before, again(4, before[0], 0.9)]
    assert feature_seconds("timm:a", after, SIZES, scale=1.4) == pytest.approx(0.02)
    assert feature_seconds("timm:a", after, SIZES) == 0.01
    only = [again(0, before[0], 0.9)]
    assert feature_seconds("timm:a", only, SIZES) == pytest.approx(0.02 / 1.96)


def test_a_refit_and_a_fine_tuning_on_larger_images_are_reckoned_so() -> None:
    before = probes(seconds=10.0)
    trials = [*before, again(4, before[0], 0.9), again(5, before[0], 0.9)]
    # The later one found its features; those of 200 test images take 20 ms each.
    assert refit_seconds(trials[5], trials, SIZES) == pytest.approx(10.0 + 200 * 0.02)
    assert refit_seconds(trials[4], trials, SIZES) == pytest.approx(0.2 * 20 + 200 * 0.02)
    given: Any = {"left": 150.0, "epochs": 8, "images": 512}
    small = affordable_epochs("timm:a", before, SIZES, **given)
    large = affordable_epochs("timm:a", before, SIZES, **given, scale=1.4)
    assert small and large and large[0] * large[1] < small[0] * small[1]


def test_memory_of_larger_images_is_learned_from_trials_of_their_kind() -> None:
    plain, larger = spec_of(params={"finetune.batch_size": 8}), spec_of(params={SCALE: 1.4})
    assert kind_of(plain) != kind_of(larger)
    assert kind_of(plain) == kind_of(spec_of(params={SCALE: 1.0})), "as trials before there was a scale"
    assert frozen_bytes(larger) == pytest.approx(1.96 * frozen_bytes(plain))


def test_others_that_are_read_beside_see_larger_images_too(make_plan: MakePlan) -> None:
    plan = make_plan(trials=40)
    space = dataclasses.replace(plan.space, larger=frozenset({"timm:a", "timm:c"}))
    plan = dataclasses.replace(plan, space=space)
    trials = [
        TrialRecord(n, "complete", plan._probe(id), 0.9 - n / 10, {"purpose": "probe", "seconds": 1.0})
        for n, id in enumerate(BACKBONES)
    ]
    params = {**trials[0].params, "probe.joined": 3}
    for scale, beside in ((1.0, "timm:b timm:c"), (1.4, "timm:c")):
        record = TrialRecord(9, "running", {**params, SCALE: scale}, None, {})
        assert plan.spec(record, trials).params["probe.beside"] == beside


def test_fine_tuning_starts_from_a_head_that_saw_images_as_large(make_plan: MakePlan) -> None:
    plan = make_plan(trials=40)
    plan = dataclasses.replace(plan, space=dataclasses.replace(plan.space, larger=frozenset(BACKBONES)))
    own, larger = trial(0, "timm:a", 0.9), trial(1, "timm:a", 0.8)
    larger = dataclasses.replace(larger, params={**larger.params, SCALE: 1.4})
    files = [write_checkpoint(plan, one.number) for one in (own, larger)]
    for scale, expected in ((1.0, files[0]), (1.4, files[1])):
        params = plan.space.defaults(backbone="timm:a", strategy="full", head="linear")
        record = TrialRecord(9, "running", {**params, SCALE: scale}, None, {})
        assert plan.spec(record, [own, larger]).init_head == str(expected)
        assert plan.spec(record, [own]).init_head == str(files[0]), "rather than from none"


# --- whole searches ---------------------------------------------------------------------------------


def search(data: Path, out: Path, **changes: Any) -> Any:
    given = {
        "backbones": "timm:test_resnet", "heads": "linear", "strategies": "feature_extraction",
        "pretrained": False, "offline": True, "devices": "cpu", "workers": 0, "ensemble": 1, "trials": 10,
        "params": {"probe.mirror": False},
    }  # fmt: skip
    return tlauto.search(data, out=out, **{**given, **changes})


def tried(search: Any) -> list[tuple[Any, ...]]:
    """Purpose, scale, score and parameters of the trials of a search, in order of number."""
    rows = sorted(search.leaderboard(), key=lambda row: row.number)
    return [(row.purpose, row.params.get(SCALE), row.score, row.params) for row in rows]


@pytest.mark.slow
def test_a_search_tries_larger_images_once_and_is_the_same_again(
    tmp_path: Path, make_patches: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_patches(tmp_path / "patches", size=240)
    rows = []
    for name in ("one", "two"):
        monkeypatch.setenv("TLAUTO_CACHE", str(tmp_path / f"cache-{name}"))
        rows.append(tried(search(data, tmp_path / name)))
    assert rows[0] == rows[1]
    assert [scale for purpose, scale, *_ in rows[0] if purpose == "larger"] == [1.4]
    assert {scale for purpose, scale, *_ in rows[0] if purpose in ("probe", "default", "joined")} == {1.0}


@pytest.mark.slow
def test_a_study_from_before_there_was_a_scale_goes_on_with_it(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    data, out = make_patches(tmp_path / "patches", size=240), tmp_path / "runs"
    before = tried(search(data, out, trials=9))
    assert "larger" not in {purpose for purpose, *_ in before}, "a tenth of nine trials is none"
    with closing(sqlite3.connect(out / "tlauto.db")) as database, database:
        database.execute("DELETE FROM trial_params WHERE param_name = ?", (SCALE,))
        ((plan,),) = database.execute("SELECT plan FROM tlauto_searches")
        plan = json.loads(plan)
        assert plan["choices"].pop(SCALE) == [1.0, 1.4]
        database.execute("UPDATE tlauto_searches SET plan = ?", (json.dumps(plan),))
    after = tried(search(data, out, trials=12))
    assert [row[2] for row in after[:9]] == [row[2] for row in before], "the same study, not a new version"
    assert [scale for purpose, scale, *_ in after if purpose == "larger"] == [1.4]


@pytest.mark.slow
def test_small_images_are_not_enlarged(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    found = tried(search(make_patches(tmp_path / "patches", size=150), tmp_path / "runs"))
    assert {(purpose == "larger", scale) for purpose, scale, *_ in found} == {(False, None)}


def test_a_shipped_model_sees_images_of_the_size_that_it_learned_from(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    data = make_patches(tmp_path / "patches")
    found = search(data, tmp_path / "runs", trials=1, params={SCALE: 1.4})
    manifest = json.loads((found.model / "tlauto.json").read_text())
    assert manifest["input"]["size"] == 224 and manifest["spec"]["params"][SCALE] == 1.4
    assert manifest["format_version"] <= 3, "who reads older bundles reads this one"
    assert "224 x 224 pixels" in (found.model / "README.md").read_text()
    file = next(data.rglob("*.png"))
    model = tlauto.load(found.model)
    (answer,) = model.predict([str(file)])
    assert sum(answer.probabilities.values()) == pytest.approx(1.0, abs=1e-3)
    manifest["input"]["size"], manifest["input"]["resize"] = 160, 160
    (found.model / "tlauto.json").write_text(json.dumps(manifest))
    with pytest.raises(tlauto.errors.DataError, match="answers differently than when it was saved"):
        tlauto.load(found.model).predict([str(file)])


def test_a_backbone_of_one_size_is_refused_before_any_trial(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    data = make_patches(tmp_path / "patches")
    done = run(
        "search", "--data", str(data), "--backbones", "timm:test_resnet,timm:test_vit", "--no-pretrained",
        "--offline", "--devices", "cpu", "--workers", "0", "--set", "image.scale=1.4", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "'image.scale' is 1.4, but timm:test_vit takes images of one size only" in " ".join(
        done.stderr.split()
    )
