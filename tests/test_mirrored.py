"""When the best backbones are tried on mirror images as well."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps

import tlauto
from tlauto.again import MIRRORED, Screening
from tlauto.builtin.tasks import task
from tlauto.pace import Sizes
from tlauto.plugins import registry
from tlauto.searchspace import SearchSpace
from tlauto.study import TrialRecord

BACKBONES = ("timm:a", "timm:b", "timm:c", "timm:d")
SIZES = Sizes(800, 200, 200)


def space_of(**fixed: Any) -> SearchSpace:
    plugins = registry()
    strategies = tuple(plugins.strategy(name) for name in ("feature_extraction", "full"))
    return SearchSpace(BACKBONES, strategies, (plugins.head("linear"),), task("multiclass").space, fixed)


def probes(seconds: float = 10.0, **changes: Any) -> list[TrialRecord]:
    found = []
    for number, backbone in enumerate(BACKBONES):
        params = space_of().defaults(backbone=backbone, strategy="feature_extraction", head="linear")
        attrs = {"purpose": "probe", "seconds": seconds, **changes}
        found.append(TrialRecord(number, "complete", params, 0.9 - number / 10, attrs))
    return found


def points(trials: list[TrialRecord], **changes: Any) -> list[dict[str, Any]]:
    given = {"sizes": SIZES, "left": None, "most_trials": 30, **changes}
    space = given.pop("space", space_of())
    ranked = [t for t in trials if t.state == "complete"]
    return Screening(space, trials, ranked, **given).points(MIRRORED)


def test_the_three_best_probes_are_tried_again_and_differ_in_that_alone() -> None:
    trials = probes()
    found = points(trials)
    assert [point["backbone"] for point in found] == list(BACKBONES[:3])
    for point, probe in zip(found, trials, strict=False):
        assert probe.params["probe.mirror"] is False
        assert point == {**probe.params, "probe.mirror": True}
        assert space_of().walk(lambda name, _, point=point: point[name]) == point


@pytest.mark.parametrize(("trials", "count"), [(9, 0), (10, 1), (29, 2), (30, 3), (500, 3), (None, 3)])
def test_they_take_a_tenth_of_the_trials_at_most(trials: int | None, count: int) -> None:
    assert len(points(probes(), most_trials=trials)) == count


@pytest.mark.parametrize(("left", "count"), [(None, 3), (101.0, 3), (99.0, 0)])
def test_none_takes_more_than_a_tenth_of_the_time_left(left: float | None, count: int) -> None:
    assert len(points(probes(seconds=10.0), left=left)) == count


def test_it_happens_once_and_after_the_screening() -> None:
    trials = probes()
    running = TrialRecord(4, "running", trials[0].params, None, {"purpose": "probe"})
    waiting = TrialRecord(4, "waiting", {}, None, {"purpose": "default"})
    tried = TrialRecord(4, "failed", points(trials)[0], None, {"purpose": "mirror"})
    for more in (running, waiting, tried):
        assert points([*trials, more]) == []


@pytest.mark.parametrize("value", [True, False])
def test_what_is_fixed_is_not_tried(value: bool) -> None:
    assert points(probes(), space=space_of(**{"probe.mirror": value})) == []


def test_a_shipped_model_answers_alike_for_an_image_and_its_mirror_image(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    data = make_patches(tmp_path / "patches")
    found = tlauto.search(
        data, out=tmp_path / "runs", trials=1, backbones="timm:test_resnet", heads="linear",
        strategies="feature_extraction", params={"probe.mirror": True}, pretrained=False, offline=True,
        devices="cpu", workers=0, ensemble=1,
    )  # fmt: skip
    assert json.loads((found.model / "tlauto.json").read_text())["format_version"] == 4
    assert ", with mirror images" in (found.model / "README.md").read_text()
    file, turned = next(data.rglob("*.png")), tmp_path / "turned.png"
    with Image.open(file) as image:
        ImageOps.mirror(image).save(turned)
    model = tlauto.load(found.model)
    both = [model.predict([str(one)])[0].probabilities for one in (file, turned)]
    assert both[0] == pytest.approx(both[1], abs=2e-3)
