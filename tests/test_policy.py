"""Trials are recorded as a worker runs them, and simulated searches have exactly what was recorded."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import opponents
import policy
import pytest
import record_curves
import replay
from curves import Recorded, Table, load
from opponents import OPPONENTS
from PIL import Image
from tests_support import TINY, environment

from tlauto.contracts import TrialSpec, WeightsOptions, trains_backbone
from tlauto.data import Dataset
from tlauto.errors import ConfigError, DataError
from tlauto.events import EpochEnded, TrialEnded
from tlauto.plugins import registry
from tlauto.training.fit import run_trial

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[1] / "bench"
CONFIGS = 20
RECORD = (
    "--no-pretrained", "--offline", "--backbones", f"{TINY[1]},timm:test_efficientnet.r160_in1k",
    "--epochs", "4", "--threads", "1", "--shares", "feature_extraction=0.5,partial=0.5", "--out", "curves",
)  # fmt: skip
PAUSES = (("allocation.TRAINING", {"cpu": 0.05}), ("ranking.DIFFERENT", 50.0))
"""Fine-tuning as cheap as anything and never hopeless, so that trials pause at rungs and are promoted."""
BUDGET = 1e6
"""Seconds that nothing here uses up: the table is used up first."""


def script(name: str, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / name), *args]
    env = environment(cwd)
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=500, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with noisy images, and in `curves` the table of a recording that was stopped and went on."""
    root = tmp_path_factory.mktemp("policy")
    random = np.random.default_rng(0)
    for channel in range(3):
        (root / "noisy" / f"class{channel}").mkdir(parents=True)
        for i in range(24):
            pixels = 128 + random.normal(0, 90, (48, 48, 3))
            pixels[..., channel] += 5
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / "noisy" / f"class{channel}" / f"{i}.png")
    for configs in (5, CONFIGS):
        done = script("record_curves.py", "--data", "noisy", *RECORD, "--configs", str(configs), cwd=root)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert (found["configs"], found["failed"]) == (configs, 0)
        # Only what was missing was run.
        assert len(done.stdout.splitlines()) - 1 == (configs if configs == 5 else CONFIGS - 5)
        if configs == 5:
            (root / "first.gz").write_bytes(Path(found["table"]).read_bytes())
    return root


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return load(folder / "curves" / "noisy.jsonl.gz")


@pytest.fixture(scope="module")
def recordings(table: Table) -> replay.Recordings:
    return replay.Recordings(table)


def timed(table: Table) -> Table:
    """The same scores with even seconds, so that what a budget allows does not depend on the machine."""
    rows = [
        replace(r, epochs=[(score, loss, 1.0) for score, loss, _ in r.epochs], seconds=len(r.epochs) + 0.5)
        for r in table.rows
    ]
    rows = [replace(r, proven_seconds=None if r.held_out is None else 2.5) for r in rows]
    return Table({**table.header, "features_seconds": dict.fromkeys(table.infos(), 2.0)}, rows)


def simulate(recordings: replay.Recordings, name: str, seed: int, budget: float = BUDGET) -> replay.Simulated:
    if name in OPPONENTS:
        return opponents.search(name, recordings, seed=seed, budget=budget)
    with policy.applied(PAUSES if name == "pausing" else ()):
        return replay.search(recordings, seed=seed, budget=budget)


POLICIES = ("tlauto", "pausing", *OPPONENTS)


def test_recording_goes_on_where_it_stopped(folder: Path, table: Table) -> None:
    before = load(folder / "first.gz")
    assert table.rows[:5] == before.rows
    assert [row.number for row in table.rows] == list(range(CONFIGS))
    assert len(table.header["runs"]) == 2
    assert set(table.header["features_seconds"]) == set(table.infos())
    again = script("record_curves.py", "--data", "noisy", *RECORD, "--epoch-images", "64", cwd=folder)
    assert again.returncode == 1
    assert "recorded with other epoch_images" in again.stderr


def test_every_epoch_is_recorded_and_frozen_trials_end_as_in_a_search(table: Table) -> None:
    trained = [r for r in table.rows if r.params["strategy"] == "partial"]
    frozen = [r for r in table.rows if r.params["strategy"] == "feature_extraction"]
    assert len(trained) + len(frozen) == CONFIGS and len(trained) >= 4 and len(frozen) >= 4
    assert {len(r.epochs) for r in trained} == {4}
    assert {len(r.epochs) for r in frozen} == {1}
    for row in table.rows:
        assert 0 < sum(seconds for _, _, seconds in row.epochs) <= row.seconds + 0.01
        assert row.test is not None and 0 <= row.test <= 1
    solved = [r for r in frozen if r.params.get("probe.solver") == "path"]
    assert solved and all(r.held_out is not None for r in solved)


def test_a_recorded_figure_is_what_the_trial_gives_again(folder: Path, table: Table, tmp_path: Path) -> None:
    row = next(r for r in table.rows if r.number >= 3 and "optim.name" in r.params)
    work = folder / "curves" / "noisy.work"
    point = dict(row.params)
    backbone, strategy, head = (str(point.pop(name)) for name in ("backbone", "strategy", "head"))
    is_frozen = not trains_backbone(registry().strategy(strategy))
    probe = next(r for r in table.rows if r.params["backbone"] == backbone)
    start = work / "curves" / "trials" / str(probe.number)
    head_file = next(
        f for f in (start / "start.safetensors", start / "checkpoint.safetensors") if f.is_file()
    )
    from tlauto.recipe import PROBE_EPOCHS
    from tlauto.schedule import PROBE_PATIENCE, trial_seed

    spec = TrialSpec(
        number=row.number, dataset="", task="multiclass", metric=table.header["metric"], backbone=backbone,
        strategy=strategy, head=head, params=point, weights=WeightsOptions({}, None, True, False),
        seed=trial_seed(0, row.number), epochs=PROBE_EPOCHS if is_frozen else 4, folder=str(tmp_path),
        cache=str(tmp_path / "cache"), patience=PROBE_PATIENCE if is_frozen else 0,
        epoch_images=None if is_frozen else 128, init_head=None if is_frozen else str(head_file),
    )  # fmt: skip
    dataset = Dataset.from_json((work / "curves" / "dataset.json").read_text(encoding="utf-8"))
    done = run_trial(spec, registry(), dataset, device="cpu", on_epoch=lambda _: True)
    assert done.score == pytest.approx(row.score, abs=1e-4)


def test_the_nearest_configuration_agrees_in_kind_before_numbers_count(
    recordings: replay.Recordings, table: Table
) -> None:
    for row in table.rows:
        distances = recordings.distances(row.params)
        assert distances[row.number] == 0
        kinds = [
            tuple(row.params[n] == other.params[n] for n in ("strategy", "backbone", "head"))
            for other in table.rows
        ]
        # Sorted by distance, agreement never rises.
        ordered = [kinds[i] for i in np.argsort(distances, kind="stable")]
        assert ordered == sorted(ordered, reverse=True)


def test_a_number_counts_in_its_own_scale(recordings: replay.Recordings, table: Table) -> None:
    row = next(r for r in table.rows if r.params.get("optim.name") == "adamw")
    low = {**row.params, "optim.adamw.lr": 1e-4}
    high = {**row.params, "optim.adamw.lr": 3e-2}
    apart = recordings.distances(low)[row.number] + recordings.distances(high)[row.number]
    assert apart == pytest.approx(1)  # from end to end, in the logarithm too
    middle = {**row.params, "optim.adamw.lr": (1e-4 * 3e-2) ** 0.5}
    assert recordings.distances(middle)[row.number] <= 0.5


def test_a_simulated_search_hears_exactly_what_was_recorded(recordings: replay.Recordings) -> None:
    heard: list[Any] = []
    with policy.applied(PAUSES):
        done = replay.search(recordings, seed=0, budget=BUDGET, emit=heard.append)
    ended = [event for event in heard if isinstance(event, TrialEnded)]
    assert len(ended) == len(done.account.trials) >= 8
    used: set[int] = set()

    def is_like(row: Recorded, event: TrialEnded) -> bool:
        return (row.params["backbone"], row.params["strategy"]) == (event.backbone, event.strategy)

    for event, (number, first, last, seconds) in zip(ended, done.account.trials, strict=True):
        row = recordings.table.rows[number]
        told = [(e.epoch, e.score) for e in heard if isinstance(e, EpochEnded) and e.number == event.number]
        assert told == [(e, row.epochs[e - 1][0]) for e in range(first, last + 1)]
        assert event.strategy == row.params["strategy"]
        same = {r.number for r in recordings.table.rows if is_like(r, event)}
        assert event.backbone == row.params["backbone"] or same <= used, "another only if none was left"
        used.add(number)
        assert event.seconds == pytest.approx(seconds)
        assert event.state == ("complete" if last == len(row.epochs) else "pruned") or last < 4


@pytest.mark.parametrize("name", POLICIES)
def test_the_clock_is_the_sum_of_what_ran_and_nothing_runs_twice(
    recordings: replay.Recordings, name: str
) -> None:
    account = simulate(recordings, name, 0).account
    rows, about = recordings.table.rows, recordings.table.header
    first = sum(about["features_seconds"][backbone] for backbone in account.backbones)
    assert account.seconds == pytest.approx(first + sum(seconds for *_, seconds in account.trials))
    assert account.backbones == {rows[number].params["backbone"] for number, *_ in account.trials}
    epochs = [(number, e) for number, a, b, _ in account.trials for e in range(a, b + 1)]
    assert len(epochs) == len(set(epochs)), "an epoch of a configuration ran twice"
    assert account.is_exhausted
    started = [number for number, first_epoch, *_ in account.trials if first_epoch == 1]
    assert sorted(started) == sorted(account.used)


def test_whole_trials_cost_what_they_did(recordings: replay.Recordings) -> None:
    account = simulate(recordings, "random", 0).account
    for number, first, last, seconds in account.trials:
        row = recordings.table.rows[number]
        assert (first, last) == (1, len(row.epochs))
        assert seconds == pytest.approx(max(row.seconds, sum(s for _, _, s in row.epochs)))


def test_a_paused_trial_is_promoted_and_pays_for_the_rest_only(table: Table) -> None:
    # Scores of their own, in several orders, and losses that fall, so that rungs alone decide who stops.
    runs = []
    for factor in range(1, 11):
        rows = [
            replace(r, epochs=[(0.4 + factor * r.number % 11 / 50, 1 / (e + 1), 1.0) for e in range(4)])
            if len(r.epochs) == 4 else r
            for r in timed(table).rows
        ]  # fmt: skip
        known = replay.Recordings(Table(timed(table).header, rows))
        runs += [simulate(known, "pausing", seed).account.trials for seed in range(4)]
    lasts = {last for run in runs for number, _, last, _ in run if len(table.rows[number].epochs) == 4}
    assert lasts == {2, 4}
    promoted = [(run, trial) for run in runs for trial in run if trial[1] > 1]
    assert promoted
    for run, (number, first, last, seconds) in promoted:
        assert (first, last) == (3, 4)
        assert [trial[:3] for trial in run if trial[0] == number and trial[1] == 1] == [(number, 1, 2)]
        assert seconds == pytest.approx(2.0 + 0.5)


def test_hyperband_stops_what_is_behind(recordings: replay.Recordings) -> None:
    lengths = {
        name: [last for n, _, last, _ in simulate(recordings, name, 0).account.trials
               if len(recordings.table.rows[n].epochs) == 4]
        for name in ("tpe+hyperband", "tpe")
    }  # fmt: skip
    assert min(lengths["tpe+hyperband"]) < 4
    assert set(lengths["tpe"]) == {4}


@pytest.mark.parametrize("name", POLICIES)
def test_a_simulated_search_is_the_same_again_and_another_with_another_seed(
    recordings: replay.Recordings, name: str
) -> None:
    def trace(seed: int) -> tuple[Any, ...]:
        done = simulate(recordings, name, seed)
        return done.account.trials, done.curve

    assert trace(1) == trace(1)
    assert any(trace(1) != trace(seed) for seed in (2, 3, 4))


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_shipped_improves_by_the_policys_own_measure_and_no_trial_starts_late(
    table: Table, name: str
) -> None:
    done = simulate(replay.Recordings(timed(table)), name, 0, budget=20.0)
    seconds = [at for at, _ in done.curve]
    assert seconds == sorted(seconds) and seconds[0] >= 2.0 + 1.5
    assert done.account.seconds >= 20.0 and not done.account.is_exhausted
    start = done.account.seconds - done.account.trials[-1][3]
    assert start < 20.0 + 2.0, "but for a backbone's first pass"
    if name in OPPONENTS:
        scores = [max(s for s, _, _ in row.epochs) for _, row in done.curve if len(row.epochs) == 1]
        assert scores == sorted(scores)


def test_regret_is_nought_for_the_best_and_one_for_the_median(recordings: replay.Recordings) -> None:
    table = recordings.table
    ordered = sorted(table.rows, key=lambda row: row.test or 0.0)
    account = replay.Account(recordings, 10.0)
    best = replay.Simulated([(1.0, ordered[0]), (2.0, ordered[-1])], account)
    assert policy.regret(table, best, 0.5) == 1.0, "nothing to ship yet"
    assert policy.regret(table, best, 2.0) == 0.0
    top, median = policy.scale(table)
    assert policy.regret(table, best, 1.5) == pytest.approx((top - (ordered[0].test or 0)) / (top - median))


def test_who_has_seen_all_ships_what_looks_best_and_equals_share_the_regret(table: Table) -> None:
    top, median = policy.scale(table)
    for count in (1, 2):
        equals = table.sound[:count]
        tests = [row.test for row in equals if row.test is not None]
        found = policy.all_seen(table, lambda row, equals=equals: 1.0 if row in equals else 0.0)
        assert found == pytest.approx((top - np.mean(tests)) / (top - median))
        unscored = policy.all_seen(table, lambda row, equals=equals: 1.0 if row in equals else None)
        assert unscored == pytest.approx(found)
    assert policy.all_seen(table, lambda row: row.test) == 0.0


def test_the_budget_is_what_so_many_random_trials_cost(table: Table) -> None:
    first = sum(table.header["features_seconds"].values())
    by_kind = [
        np.mean([r.seconds for r in table.rows if r.params["strategy"] == name])
        for name in ("partial", "feature_extraction")
    ]
    assert policy.budget_of(table, 10) == pytest.approx(first + 10 * np.mean(by_kind))


def test_policies_are_compared_and_the_last_line_is_json(folder: Path, table: Table, tmp_path: Path) -> None:
    timed(table).save(tmp_path / "noisy.jsonl.gz")
    options = ("--curves", str(tmp_path), "--seeds", "8", "--trials", "8", "--workers", "1")
    done = script("policy.py", *options, "--vary", "rungs.FIRST=2,4", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    names = ["tlauto", "tlauto rungs.FIRST=2", "tlauto rungs.FIRST=4", *OPPONENTS]
    for name in names:
        assert done.stdout.count(f"| {name} |") == 2
        assert {f"regret {name} {share}" for share in ("0.25", "0.5", "1")} <= set(found)
    # 2 is what the constant is.
    assert found["regret tlauto 1"] == found["regret tlauto rungs.FIRST=2 1"]
    theirs = found["regret tpe+hyperband 0.25"]
    assert found["policy_regret_ratio"] == pytest.approx(found["regret tlauto 0.25"] / theirs, rel=1e-2)
    assert (
        found["policy_regret_ratio_low"] <= found["policy_regret_ratio"] <= found["policy_regret_ratio_high"]
    )
    assert found["tables"] == {"noisy": CONFIGS}
    for rule in ("validation", "cross-validation"):
        assert f"| all seen, by {rule} | {found[f'regret all seen by {rule}']:.3f} |" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--curves", "nowhere"), "no tables in nowhere"),
     (("--set", "rungs.FIRTS=4"), "no constant 'rungs.FIRTS'"),
     (("--set", "rungs.FIRST=two"), "is not MODULE.NAME=VALUE"),
     (("--vary", "rungs.FIRST"), "is not MODULE.NAME=VALUE")],
)  # fmt: skip
def test_what_cannot_be_compared_is_said_in_a_sentence(
    folder: Path, options: tuple[str, ...], said: str
) -> None:
    done = script("policy.py", "--curves", "curves", *options, cwd=folder)
    assert done.returncode == 1
    assert said in done.stderr and "Traceback" not in done.stderr


def test_a_damaged_table_is_refused(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "curves" / "noisy.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(DataError, match="cannot read the table"):
        load(tmp_path / "cut.jsonl.gz")


def test_a_table_is_the_same_after_saving_and_loading(table: Table, tmp_path: Path) -> None:
    failed = Recorded(CONFIGS, table.rows[0].params, (), 1.5, failed=("diverged", "the loss became nan"))
    whole = Table(table.header, [*table.rows, failed])
    whole.save(tmp_path / "a.jsonl.gz")
    whole.save(tmp_path / "b.jsonl.gz")
    read = load(tmp_path / "a.jsonl.gz")
    assert read.header == table.header
    assert [row.number for row in read.sound] == list(range(CONFIGS))
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


@pytest.mark.parametrize("name", POLICIES)
def test_a_failed_trial_costs_its_seconds_and_is_never_shipped(table: Table, name: str) -> None:
    rows = [
        Recorded(r.number, r.params, (), 0.5, failed=("diverged", "the loss became nan"))
        if r.number % 3 == 2
        else r
        for r in table.rows
    ]
    done = simulate(replay.Recordings(Table(table.header, rows)), name, 0)
    failed = [trial for trial in done.account.trials if rows[trial[0]].failed]
    assert failed and {seconds for *_, seconds in failed} == {0.5}
    assert all(row.failed is None for _, row in done.curve)


def test_points_are_drawn_within_the_space_and_by_their_shares(recordings: replay.Recordings) -> None:
    shares = {"feature_extraction": 0.75, "partial": 0.25}
    drawn = [record_curves.draw(recordings.space, shares, f"0/{i}") for i in range(400)]
    assert drawn[7] == record_curves.draw(recordings.space, shares, "0/7")
    assert 0.68 < np.mean([point["strategy"] == "feature_extraction" for point in drawn]) < 0.82
    for point in drawn:
        # `check` of each parameter raises when a value is outside its range.
        assert recordings.space.walk(lambda name, p, point=point: p.check(point[name])) == point
    with pytest.raises(ConfigError):
        recordings.space.walk(lambda name, p: p.check("no such value"))
