"""Whole searches through the command line: real processes, real models, a real SQLite file."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests_support import TINY, leaderboard, run

import tlauto
from tlauto.devices import make_slots
from tlauto.events import TrialEnded
from tlauto.pool.inprocess import InProcessPool

MIXED = ("timm:test_resnet.r160_in1k", "torchvision:squeezenet1_1", "keras:MobileNet-0.25-128")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Path:
    """A workspace with one finished search over three providers."""
    folder = tmp_path_factory.mktemp("finished")
    make_patches(folder / "patches")
    done = run(
        "search", "--data", "patches", "--backbones", ",".join(MIXED), "--no-pretrained", "--offline",
        "--trials", "8", "--preset", "fast", "--seed", "3", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_all_providers_stand_in_one_leaderboard(finished: Path) -> None:
    rows = leaderboard(finished)
    assert len(rows) == 8
    assert {row["backbone"] for row in rows if row["purpose"] == "probe"} == set(MIXED)
    assert all(row["state"] in ("complete", "pruned") for row in rows), [row["error"] for row in rows]
    scores = [row["score"] for row in rows if row["state"] == "complete"]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        assert {"backbone", "strategy", "head", "state", "score", "seconds", "params"} <= set(row)
        solved = row["params"].get("probe.solver") == "path"
        assert solved or row["params"]["optim.name"] in ("adamw", "adam", "sgd")


def test_the_winner_is_tested_once_and_ships_as_a_bundle(finished: Path) -> None:
    shown = json.loads(run("show", "--json", cwd=finished).stdout)
    accuracy = shown["test"]["accuracy"]
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert shown["best"]["number"] == leaderboard(finished)[0]["number"]
    assert shown["comparison"] is not None
    bundle = tlauto.load(shown["model"])
    photos = sorted((finished / "patches" / "red").iterdir())[:3]
    assert [p.label for p in bundle.predict(photos)] == ["red"] * 3


def test_evaluate_repeats_the_recorded_test_result(finished: Path) -> None:
    shown = json.loads(run("show", "--json", cwd=finished).stdout)
    out = run("evaluate", shown["model"], "--data", "patches", "--json", cwd=finished)
    assert out.returncode == 0, out.stderr
    measured = json.loads(out.stdout)["metrics"]["accuracy"]["value"]
    assert measured == pytest.approx(shown["test"]["accuracy"]["value"])


def test_the_same_command_again_has_nothing_left_to_do(finished: Path) -> None:
    before = leaderboard(finished)
    done = run(
        "search", "--data", "patches", "--backbones", ",".join(MIXED), "--no-pretrained", "--offline",
        "--trials", "8", "--preset", "fast", "--seed", "3", cwd=finished,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "with 8 trials done" in done.stderr
    assert leaderboard(finished) == before


def test_trials_are_reproducible_from_their_specification(finished: Path) -> None:
    rows = leaderboard(finished)
    tuned = next((row for row in rows if row["strategy"] != "feature_extraction"), rows[0])
    for row in (rows[0], tuned):
        out = run("rerun", "patches", str(row["number"]), "--json", cwd=finished)
        assert out.returncode == 0, out.stderr
        again = json.loads(out.stdout)
        assert again["score"] == pytest.approx(again["recorded"], abs=1e-9)


def test_every_trial_records_seed_versions_and_provenance(finished: Path) -> None:
    import sqlite3

    with sqlite3.connect(finished / "tlauto-runs" / "tlauto.db") as database:
        rows = database.execute("SELECT spec, result FROM tlauto_trials").fetchall()
    database.close()
    assert len(rows) == 8
    for spec, result in rows:
        assert json.loads(spec)["seed"] > 0
        assert "torch" in json.loads(result)["versions"]
        assert any(source.startswith("tlauto ") for source in json.loads(result)["provenance"].values())


@pytest.mark.slow
def test_a_changed_dataset_is_noticed_on_resume(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    args = ("search", "--data", "patches", *TINY, "--trials")
    assert run(*args, "1", cwd=tmp_path).returncode == 0
    next((tmp_path / "patches" / "red").iterdir()).unlink()
    done = run(*args, "2", cwd=tmp_path)
    assert done.returncode == 1
    assert "changed since study 'patches' began" in done.stderr
    assert run(*args, "2", "--new", cwd=tmp_path).returncode == 0


def test_a_search_runs_in_this_process_for_a_debugger(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    done = run(
        "search", "--data", "patches", *TINY, "--trials", "2", "--workers", "0", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["trials"] == 2
    assert not (tmp_path / "tlauto-runs" / "patches" / "logs").exists()


def test_a_search_in_this_process_leaves_its_environment_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = dict(os.environ)
    pool = InProcessPool(make_slots("cpu", 1)[0], env={"HF_HUB_OFFLINE": "1"})
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    pool.close()
    assert dict(os.environ) == before


def test_the_python_interface_returns_what_the_command_line_shows(
    tmp_path: Path, make_patches: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLAUTO_CACHE", str(tmp_path / "cache"))
    found = tlauto.search(
        make_patches(tmp_path / "patches"), trials=3, backbones="timm:test_resnet.r160_in1k",
        strategies="feature_extraction, partial",
        params={"optim.name": "sgd", "probe.solver": "minibatch"}, out=str(tmp_path / "runs"),
        pretrained=False, offline=True,
    )  # fmt: skip
    assert len(found.leaderboard()) == 3
    assert found.info()["config"]["strategies"] == ["feature_extraction", "partial"]
    assert {row.params["optim.name"] for row in found.leaderboard()} == {"sgd"}
    assert found.best.score == max(row.score or 0 for row in found.leaderboard())
    assert found.test is not None
    with pytest.raises(TypeError, match="did you mean 'workers'"):
        tlauto.search(tmp_path / "patches", worker=1)


def test_backbones_that_a_small_budget_leaves_out_are_named(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches")
    options = ("--no-pretrained", "--offline", "--strategies", "feature_extraction", "--heads", "linear")
    names = "timm:test_resnet.r160_in1k,timm:test_vit.r160_in1k"
    done = run("search", "--data", "patches", *options, "--backbones", names, "--trials", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 backbones x 1 strategy x 1 head" in done.stderr
    assert "half of the trials screen backbones; there is none for timm:test_vit.r160_in1k" in done.stderr


def test_a_time_limit_is_a_total(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    args = ("search", "--data", "patches", *TINY, "--time", "8s")
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count = len(leaderboard(tmp_path))
    assert count >= 1
    assert run(*args, cwd=tmp_path).returncode == 0
    assert len(leaderboard(tmp_path)) == count


def test_the_checks_before_the_first_trial_take_of_the_time_too(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    heard: list[tuple[object, float]] = []
    tlauto.search(
        make_patches(tmp_path / "patches"), trials=1, backbones="timm:test_resnet.r160_in1k",
        strategies="feature_extraction", pretrained=False, offline=True, workers=0,
        out=str(tmp_path / "runs"), emit=lambda event: heard.append((event, time.monotonic())),
    )  # fmt: skip
    with closing(sqlite3.connect(tmp_path / "runs" / "tlauto.db")) as database:
        ((seconds,),) = database.execute("select seconds from tlauto_searches")
    (ended,) = (when for event, when in heard if isinstance(event, TrialEnded))
    assert seconds >= ended - heard[0][1], "the first is heard while the images are read"
