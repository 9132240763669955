"""Whether there is memory for a trial, by what trials like it took."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests_support import spec_of

from tlauto.memory import CONTEXT
from tlauto.recipe import EVAL_BATCH
from tlauto.room import (
    ATTRIBUTE,
    SHARE,
    Bounds,
    Took,
    Verdict,
    images_at_once,
    judge,
    kind_of,
    need,
    refusal,
    room_beside,
    taken,
)
from tlauto.study import TrialRecord

GB = 10**9
SMALL, LARGE = 16 * GB, 80 * GB


def took(at_once: int, gigabytes: float | None, *, fits: bool = True, total: int | None = SMALL) -> Took:
    return Took("k", at_once, fits, None if gigabytes is None else int(gigabytes * GB), total)


def test_trials_are_alike_when_what_shapes_the_network_is() -> None:
    params = {"freeze.partial.k": 2, "head.mlp.units": 64, "optim.name": "adamw"}
    first = spec_of(
        params={**params, "optim.adamw.lr": 0.1, "head.mlp.dropout": 0.2, "augment.level": "none"}
    )
    second = spec_of(
        params={**params, "optim.adamw.lr": 0.2, "head.mlp.dropout": 0.1, "augment.level": "strong"}
    )
    assert kind_of(first) == kind_of(replace(second, seed=5, number=9))
    for name in params:
        assert kind_of(spec_of(params={**params, name: 3})) != kind_of(spec_of(params=params))
    assert kind_of(replace(first, backbone="timm:b")) != kind_of(first)
    assert kind_of(replace(first, strategy="partial")) != kind_of(first)


def test_images_at_once_are_those_of_the_batch_or_of_its_parts() -> None:
    spec = spec_of(params={"finetune.batch_size": 32})
    assert images_at_once(spec, trains=True) == 32
    assert images_at_once(spec_of(), trains=True) == 16, "the recipe's default"
    assert images_at_once(spec, trains=False) == EVAL_BATCH
    assert images_at_once(replace(spec, micro_batch=3), trains=True) == 3


def test_only_recorded_trials_of_a_kind_are_looked_at() -> None:
    own, other = took(8, 2), Took("other", 8, True, 5, None)
    records = [
        TrialRecord(i, "complete", {}, 0.5, {} if memory is None else {ATTRIBUTE: memory.to_json()})
        for i, memory in enumerate([own, other, None])
    ]
    assert taken(records, "k") == [own]


@pytest.mark.parametrize(
    ("known", "at_once", "expected"),
    [
        ([], 8, None),
        ([took(8, None)], 8, None),
        ([took(8, 2), took(8, 3)], 8, Bounds(3 * GB, 3 * GB)),
        ([took(16, 3)], 8, Bounds(3 * GB, 3 * GB)),
        ([took(8, 2)], 32, Bounds(2 * GB, 8 * GB)),
        ([took(8, 2), took(16, 3)], 32, Bounds(5 * GB, 5 * GB)),
        ([took(8, 3), took(16, 2)], 32, Bounds(2 * GB, 2 * GB)),
        ([took(8, 2, fits=False)], 8, None),
    ],
    ids=["none", "nobody said", "the same", "more", "one below", "a line", "it does not fall", "it failed"],
)
def test_the_need_of_a_trial(known: list[Took], at_once: int, expected: Bounds | None) -> None:
    assert need(known, at_once) == expected


@pytest.mark.parametrize(
    ("known", "capacity", "at_once"),
    [
        ([], SMALL, 32),
        ([took(8, 7)], SMALL, 32),  # may be 28 GB, may be 7: nothing was measured
        ([took(8, 6), took(16, 11)], SMALL, 16),  # 21 GB by the line
        ([took(8, 6), took(16, 11)], None, 32),
        ([took(8, 6), took(16, 11)], LARGE, 32),
        ([took(32, 20, fits=False)], SMALL, 16),
        ([took(32, None, fits=False)], SMALL, 16),
        ([took(32, 20, fits=False)], LARGE, 32),  # it failed where there was less
        ([took(32, 20, fits=False)], None, 32),
        ([took(32, 20, fits=False, total=None)], SMALL, 32),
        ([took(8, 20, fits=False), took(16, 9)], SMALL, 32),  # what worked since counts
        ([took(1, 20, fits=False)], SMALL, None),
        ([took(1, 20, total=LARGE)], SMALL, None),  # it worked on a larger device, which is gone
        ([took(1, 20, total=LARGE)], LARGE, 32),
    ],
)
def test_a_trial_starts_with_as_many_images_as_may_fit(
    known: list[Took], capacity: int | None, at_once: int | None
) -> None:
    assert judge(known, 32, capacity).at_once == at_once


def test_what_is_left_of_a_gpu_beside_others() -> None:
    assert room_beside([], SMALL) == SHARE * SMALL
    assert room_beside([9 * GB, GB], SMALL) == SHARE * SMALL - 10 * GB
    assert room_beside([9 * GB], SMALL, idle=2) == SHARE * SMALL - 9 * GB - 2 * CONTEXT
    assert room_beside([SMALL], SMALL) == 0
    assert room_beside([9 * GB, None], SMALL) is None
    assert room_beside([9 * GB], None) is None


def test_a_refusal_says_what_was_measured() -> None:
    sentence = refusal(Verdict(None, Bounds(20 * GB, 20 * GB)), SMALL, "cuda:0")
    assert sentence == (
        "it was not started: even with 1 image at a time it needs more memory than cuda:0 has (20 GB of "
        "16 GB), as was measured; a smaller backbone needs less"
    )
    assert "(" not in refusal(Verdict(None), None, "cuda:0")
