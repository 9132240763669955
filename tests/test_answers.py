"""What recorded trials answered is kept, and simulated searches have several of them answer together."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import policy
import pytest
import replay
from answers import STEPS, Answers, beside, load
from curves import Recorded, Table
from curves import load as load_table
from PIL import Image
from tests_support import TINY, environment

from tlauto import metrics
from tlauto.errors import DataError

BENCH = Path(__file__).parents[1] / "bench"
CONFIGS = 12
RECORD = (
    "--data", "noisy", "--no-pretrained", "--offline",
    "--backbones", f"{TINY[1]},timm:test_efficientnet.r160_in1k",
    "--epochs", "2", "--threads", "1", "--shares", "feature_extraction=0.7,partial=0.3", "--out", "curves",
)  # fmt: skip


def record(folder: Path, *more: str) -> list[int]:
    """Numbers of the trials that were recorded now."""
    command = [sys.executable, str(BENCH / "record_curves.py"), *RECORD, *more]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    return [int(line.split()[0]) for line in done.stdout.splitlines()[:-1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with noisy images, and in `curves` their table with answers."""
    root, random = tmp_path_factory.mktemp("answers"), np.random.default_rng(0)
    for channel in range(3):
        (root / "noisy" / f"class{channel}").mkdir(parents=True)
        for i in range(24):
            pixels = 128 + random.normal(0, 90, (48, 48, 3))
            pixels[..., channel] += 9
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                root / "noisy" / f"class{channel}" / f"{i}.png"
            )
    assert record(root, "--configs", str(CONFIGS)) == list(range(CONFIGS))
    return root


@pytest.fixture(scope="module")
def table(folder: Path) -> Table:
    return load_table(folder / "curves" / "noisy.jsonl.gz")


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    return load(beside(folder / "curves" / "noisy.jsonl.gz"))


def test_a_probability_in_a_byte_is_nearly_what_it_was(tmp_path: Path) -> None:
    chances = np.random.default_rng(0).dirichlet([0.3, 0.3, 0.3], 500).astype(np.float32)
    targets = np.zeros(500, dtype=np.int64)
    np.savez(tmp_path / "predictions.npz", predictions=chances, targets=targets)
    kept = Answers()
    kept.add_trial(0, tmp_path, chances, targets)
    read = kept.of(0, "val")
    assert read is not None and kept.given[0]["val"].dtype == np.uint8
    # Half a step of the angle, whose sine's square moves by at most as much.
    assert np.abs(read - chances).max() <= np.pi / (4 * STEPS)
    small = chances < 0.01
    assert small.any() and np.abs(read[small] - chances[small]).max() < 1e-3


@pytest.mark.slow
def test_a_trials_answers_give_its_recorded_score(table: Table, answers: Answers) -> None:
    metric, frozen = table.header["metric"], [row for row in table.sound if len(row.epochs) == 1]
    kept = [row for row in table.sound if row not in frozen or row.held_out is not None]
    assert answers.seen == set(range(CONFIGS))
    assert set(answers.given) == {row.number for row in kept}
    assert len(frozen) >= 5 and len(table.sound) > len(frozen)
    for row in kept:
        image = 1 / len(answers.targets["test"])
        assert answers.test_score(metric, {row.number: 1.0}) == pytest.approx(row.test, abs=1.1 * image)
        if row.held_out is not None:
            both = [np.concatenate([answers.of(row.number, "train"), answers.of(row.number, "val")]),
                    np.concatenate([answers.targets["train"], answers.targets["val"]])]  # fmt: skip
            assert metrics.score(metric, both[1], both[0]) == pytest.approx(row.held_out, abs=0.03)


@pytest.mark.slow
def test_trials_without_answers_are_recorded_again_with_the_same_points(
    folder: Path, table: Table, answers: Answers, tmp_path: Path
) -> None:
    (tmp_path / "noisy").symlink_to(folder / "noisy")
    table.save(tmp_path / "curves.jsonl.gz")
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves.jsonl.gz").rename(tmp_path / "curves" / "noisy.jsonl.gz")
    options = ("--configs", str(CONFIGS), "--again", "feature_extraction")
    frozen = [row.number for row in table.rows if row.params["strategy"] == "feature_extraction"]
    assert record(tmp_path, *options) == frozen
    again = load_table(tmp_path / "curves" / "noisy.jsonl.gz")
    assert [row.number for row in again.rows] == list(range(CONFIGS))
    for one, other in zip(again.rows, table.rows, strict=True):
        assert one.params == other.params
        assert one.test == pytest.approx(other.test)
        assert (one == other) == (one.number not in frozen), "only the seconds of the frozen ones differ"
    assert record(tmp_path, *options) == []
    found = load(beside(tmp_path / "curves" / "noisy.jsonl.gz"))
    assert found.seen == set(frozen)
    for number in set(found.given):
        for part in found.given[number]:
            assert np.array_equal(found.given[number][part], answers.given[number][part])


def each_unsure_of_others(answers: Answers) -> Answers:
    """Answers of the same trials for the same images, each wrong about a third of its own choice."""
    given = {}
    for number, parts in answers.given.items():
        random, given[number] = np.random.default_rng(number), {}
        for part in parts:
            targets = answers.targets[part]
            said = np.where(random.random(len(targets)) < 1 / 3, (targets + 1) % 3, targets)
            given[number][part] = np.where(np.eye(3)[said] > 0, 140, 80).astype(np.uint8)
    return Answers(answers.targets, given, answers.seen)


@pytest.mark.slow
def test_a_simulated_search_ships_what_answers_best_together(table: Table, answers: Answers) -> None:
    # Even seconds: what a budget allows must not depend on the machine.
    rows = [replace(r, epochs=[(s, loss, 1.0) for s, loss, _ in r.epochs], seconds=len(r.epochs) + 0.5)
            for r in table.rows]  # fmt: skip
    even = Table({**table.header, "features_seconds": dict.fromkeys(table.infos(), 2.0)}, rows)
    known = replay.Recordings(even, each_unsure_of_others(answers))
    marks = [1.0, 9.0, 15.0]
    done = replay.search(known, seed=0, budget=15.0, marks=marks)
    assert done.together[1.0] == {}, "nothing has ended yet"
    for mark in marks[1:]:
        weights = done.together[mark]
        best = [row for at, row in done.curve if at <= mark][-1]
        assert next(iter(weights)) == best.number
        assert sum(weights.values()) == pytest.approx(1)
    assert any(len(weights) > 1 for weights in done.together.values())
    alone = replay.search(replay.Recordings(even), seed=0, budget=15.0, marks=marks)
    assert all(len(weights) <= 1 for weights in alone.together.values())
    assert alone.curve == done.curve, "the search itself is the same"


def test_together_better_than_any_alone_is_no_regret(tmp_path: Path) -> None:
    def row(number: int, test: float) -> Recorded:
        return Recorded(number, {}, [(0.5, 1.0, 1.0)], 1.0, 1, test=test)

    targets, kept = np.array([0, 0, 1, 1]), Answers()
    for number, wrong in enumerate((0, 2)):  # each sure of three, and unsure of the fourth
        sure = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]], dtype=np.float32)
        sure[wrong] = [0.4, 0.6] if targets[wrong] == 0 else [0.6, 0.4]
        np.savez(tmp_path / "predictions.npz", predictions=sure, targets=targets)
        kept.add_trial(number, tmp_path, sure, targets)
    table = Table({"metric": "accuracy"}, [row(0, 0.75), row(1, 0.75), row(2, 0.5), row(3, 0.5)])
    known = replay.Recordings.__new__(replay.Recordings)
    known.table, known.answers = table, kept
    assert kept.test_score("accuracy", {0: 0.5, 1: 0.5}) == 1.0
    assert policy.regret_together(known, {0: 0.5, 1: 0.5}) == 0.0
    assert policy.regret_together(known, {0: 1.0}) == 0.0
    kept.targets["test"] = 1 - targets
    assert policy.regret_together(known, {0: 0.5, 1: 0.5}) == pytest.approx(0.75 / (0.75 - 0.625))


def test_damaged_answers_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.answers.npz").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="cannot read the answers"):
        load(tmp_path / "x.answers.npz")
    assert load(tmp_path / "none.answers.npz").given == {}


def test_the_last_line_names_both_figures(tmp_path: Path) -> None:
    outcome = policy.Outcome(policy.Job("t", "p", 0, 1, 1), (0.2,), (0.6,), 3, False)
    theirs = replace(outcome, regrets=(0.4,))
    found = policy.figures(
        {policy.OURS: {"t": [outcome]}, policy.ALONE: {"t": [replace(outcome, regrets=outcome.alone)]},
         policy.RIVAL: {"t": [theirs]}}, [0.25],
    )  # fmt: skip
    assert found["policy_regret_ratio"] == pytest.approx(0.5)
    assert found["policy_regret_ratio_one_model"] == pytest.approx(1.5)
    json.dumps(found)
