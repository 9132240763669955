"""How proposed trials start: side by side where there is room, in parts, or not at all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_pool import ScriptedPool, open_scripted, search
from simulated import NAME

from tlauto.contracts import TrialSpec, spec_from_json
from tlauto.devices import device_of
from tlauto.errors import OutOfMemory
from tlauto.events import Said
from tlauto.pool.protocol import StepTried, Used
from tlauto.prepare import Session
from tlauto.room import ATTRIBUTE, FROZEN, SHARE
from tlauto.store import Store
from tlauto.study import Study, TrialRecord

GB = 10**9
TOTAL = 24 * GB
FOUR = tuple(f"cuda:0/{i}" for i in range(4))
FULL = ("full",)


def gpu(at_once: int | None, gigabytes: float | None) -> Callable[[TrialSpec, int], StepTried]:
    bytes = None if gigabytes is None else int(gigabytes * GB)
    return lambda spec, wanted: StepTried(at_once or None if at_once != -1 else wanted, bytes, TOTAL)


def trials_of(session: Session) -> list[TrialRecord]:
    return session.study.trials()


def specs_of(session: Session) -> dict[int, TrialSpec]:
    store = Store(session.store.url)
    rows = store.trials(NAME)
    store.close()
    return {number: spec_from_json(row["spec"]) for number, row in rows.items()}


def lengths(spec: TrialSpec) -> float:
    return 1.0 + spec.seed % 7


def test_trials_share_a_gpu_as_far_as_they_fit(tmp_path: Path) -> None:
    pool = ScriptedPool(FOUR, seconds=lengths, takes=gpu(-1, 9), used=lambda spec: Used(9 * GB, TOTAL))
    session = open_scripted(tmp_path, pool, strategies=FULL, trials=12, device="cuda", per_device="auto")
    search(session)
    assert [t.state for t in trials_of(session)] == ["complete"] * 12
    assert max(len(sent.beside) for sent in pool.trials) == 1, "two of 9 GB in nine tenths of 24 GB"
    assert sum(len(sent.beside) == 1 for sent in pool.trials) > 5
    steps = [sent for sent in pool.sent if sent.is_step]
    assert any(sent.beside for sent in steps), "a step is tried in what others leave"


def test_frozen_trials_are_taken_to_be_small_until_one_was_measured(tmp_path: Path) -> None:
    used = {True: Used(GB, TOTAL), False: Used(12 * GB, TOTAL)}
    pool = ScriptedPool(
        FOUR, seconds=lengths, takes=gpu(-1, 12), used=lambda spec: used[spec.strategy != "full"]
    )
    both = ("feature_extraction", "full")
    session = open_scripted(tmp_path, pool, strategies=both, trials=20, device="cuda", per_device="auto")
    search(session)
    frozen = {t.number for t in trials_of(session) if t.params["strategy"] != "full"}
    assert 10 < len(frozen) < 20
    for sent in pool.trials:
        running = [*sent.beside, sent.spec.number]
        assert sum(number not in frozen for number in running) <= 1
        assert sum(GB if number in frozen else 12 * GB for number in running) <= SHARE * TOTAL
    assert max(len(sent.beside) for sent in pool.trials) == 3
    first = pool.trials[0].spec.number
    assert first in frozen and pool.trials[1].beside == (), "before a worker told how large the GPU is"
    assert 4 * FROZEN < SHARE * TOTAL


def test_as_many_run_side_by_side_as_the_user_says(tmp_path: Path) -> None:
    slots = ("cuda:0/0", "cuda:1/0", "cuda:0/1", "cuda:1/1")
    pool = ScriptedPool(slots, seconds=lengths, takes=gpu(-1, 9), used=lambda spec: Used(9 * GB, TOTAL))
    session = open_scripted(tmp_path, pool, strategies=FULL, trials=12, device="cuda", per_device="2")
    search(session)
    assert [idle for idle, started in pool.idle if started < 12][1:].count(0) >= 8
    assert max(len(sent.beside) for sent in pool.trials) == 1
    assert {device_of(sent.slot) for sent in pool.trials} == {"cuda:0", "cuda:1"}


def test_what_does_not_fit_beside_others_waits_even_then(tmp_path: Path) -> None:
    pool = ScriptedPool(FOUR[:2], seconds=lengths, takes=gpu(-1, 20), used=lambda spec: Used(20 * GB, TOTAL))
    session = open_scripted(tmp_path, pool, strategies=FULL, trials=6, device="cuda", per_device="2")
    search(session)
    assert {t.state for t in trials_of(session)} == {"complete"}
    not_fitting = {sent.spec.number for sent in pool.sent if sent.is_step and sent.beside}
    assert not_fitting
    assert all(sent.beside == () for sent in pool.trials if sent.spec.number in not_fitting)


def test_a_trial_starts_with_the_images_at_once_that_fit_and_the_next_knows(tmp_path: Path) -> None:
    pool = ScriptedPool(("cuda:0",), takes=gpu(4, 20), used=lambda spec: Used(20 * GB, TOTAL))
    session = open_scripted(
        tmp_path, pool, strategies=FULL, trials=6, device="cuda", backbones=1, in_file=True
    )
    search(session)
    assert {sent.spec.micro_batch for sent in pool.trials} == {4}
    assert {spec.micro_batch for spec in specs_of(session).values()} == {4}
    records = Study(session.store.url, NAME, seed=0, create=False).trials()
    assert {t.attrs["micro_batch"] for t in records} == {4}
    kinds = {t.attrs[ATTRIBUTE]["kind"] for t in records}
    steps = [sent for sent in pool.sent if sent.is_step]
    assert len(steps) == 6, "nothing is known of whole batches"
    assert len(kinds) >= 1
    assert all(t.attrs[ATTRIBUTE]["bytes"] == 20 * GB and t.attrs[ATTRIBUTE]["fits"] for t in records)


def test_a_hopeless_trial_is_recorded_and_never_runs(tmp_path: Path) -> None:
    hopeless = "simulated:network0"

    def takes(spec: TrialSpec, at_once: int) -> StepTried:
        return StepTried(None, 30 * GB, TOTAL) if spec.backbone == hopeless else StepTried(at_once, GB, TOTAL)

    pool = ScriptedPool(("cuda:0",), takes=takes, used=lambda spec: Used(GB, TOTAL))
    session = open_scripted(tmp_path, pool, strategies=FULL, trials=12, device="cuda")
    search(session)
    records = trials_of(session)
    refused = [t for t in records if t.params["backbone"] == hopeless]
    assert len(refused) > 1
    assert {t.attrs["error_kind"] for t in refused} == {OutOfMemory.kind}
    assert not {t.number for t in refused} & {sent.spec.number for sent in pool.trials}
    first = refused[0].attrs
    assert first["bytes_asked"] == 30 * GB
    assert first["error"].startswith(
        "it was not started: even with 1 image at a time it needs more memory than"
    )
    assert "retried" not in first and len(records) == 12, "it counts, and is not tried again"
    tried = [sent.spec.number for sent in pool.sent if sent.is_step and sent.spec.backbone == hopeless]
    kinds = {t.attrs[ATTRIBUTE]["kind"] for t in refused if ATTRIBUTE in t.attrs}
    assert len(tried) == len(kinds), "no step is tried of what is known not to fit"


def test_a_step_that_cannot_be_tried_leaves_it_to_the_trial(tmp_path: Path) -> None:
    pool = ScriptedPool(FOUR, used=lambda spec: Used(GB, TOTAL))
    session = open_scripted(tmp_path, pool, strategies=FULL, trials=6, device="cuda", per_device="auto")
    search(session)
    assert len(pool.trials) == 6 and {t.state for t in trials_of(session)} == {"complete"}


def test_what_took_more_than_this_machine_has_is_refused_on_a_cpu_too(tmp_path: Path) -> None:
    pool = ScriptedPool(("cpu:0",), used=lambda spec: Used(10**17, None))
    session = open_scripted(
        tmp_path, pool, strategies=FULL, trials=2, device="cpu", backbones=1, propose=False
    )
    point = {"finetune.train_mode": False, "finetune.batch_size": 8, "optim.name": "sgd"}
    session.study.enqueue(point, purpose="search", micro_batch=1)
    session.study.enqueue(point, purpose="search")
    search(session)
    first, second = trials_of(session)
    assert first.attrs[ATTRIBUTE]["bytes"] == 10**17, "it ran, where there was more"
    assert [sent.spec.number for sent in pool.sent] == [0], "and no step is tried on a CPU"
    assert second.attrs["error_kind"] == OutOfMemory.kind
    assert "it needs more memory than this machine has (100000 TB of " in second.attrs["error"]
    assert ATTRIBUTE not in second.attrs, "nothing was measured of it"


def test_short_memory_leaves_one_trial_at_a_time_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLAUTO_MEMORY_FLOOR", "900TB")
    pool = ScriptedPool(("cpu:0", "cpu:1", "cpu:2"), seconds=lengths)
    said: list[object] = []
    session = open_scripted(tmp_path, pool, strategies=("feature_extraction",), trials=8, device="cpu")
    search(session, said)
    assert [sent.beside for sent in pool.trials] == [()] * 8
    notes = [event.text for event in said if isinstance(event, Said) and "memory" in event.text]
    assert len(notes) == 1
    assert notes[0].startswith("less than 900 TB of memory is left")


@pytest.mark.parametrize("slots", [1, 5])
def test_no_slot_idles_while_trials_are_left(slots: int, tmp_path: Path) -> None:
    pool = ScriptedPool(tuple(f"cpu:{i}" for i in range(slots)), seconds=lengths)
    both = ("feature_extraction", "full")
    session = open_scripted(tmp_path, pool, strategies=both, trials=16, device="cpu", backbones=6)
    search(session)
    assert len(pool.trials) == 16
    # A slot that writes the best model so far is not idle, though no trial runs there.
    for idle, started in itertools.takewhile(lambda seen: seen[1] < 16, pool.idle):
        assert idle <= 1, f"{idle} slots idle after {started} trials were started"
