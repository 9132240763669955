"""Trials that are stopped early, and those that go on: whole searches on real files."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import simulated
from PIL import Image
from tests_support import command, environment, leaderboard, run

from tlauto.config import SearchConfig
from tlauto.pace import Sizes
from tlauto.prepare import propose_first, without_fixed
from tlauto.rungs import STATE_FILE
from tlauto.schedule import Plan
from tlauto.store import Store
from tlauto.study import Study

SEARCH = (
    "search", "--data", "patches", "--backbones", "timm:test_resnet.r160_in1k", "--no-pretrained",
    "--offline", "--preset", "fast", "--workers", "0", "--devices", "cpu",
)  # fmt: skip


def records(folder: Path, study: str = "patches") -> list[Any]:
    """The trials as the study's file has them."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'tlauto-runs' / 'tlauto.db'}")
    return optuna.load_study(study_name=study, storage=storage).trials


def specs(folder: Path, study: str = "patches") -> dict[int, dict[str, Any]]:
    """What each trial was told to do."""
    store = Store(f"sqlite:///{folder / 'tlauto-runs' / 'tlauto.db'}")
    try:
        return {number: json.loads(row["spec"]) for number, row in store.trials(study).items()}
    finally:
        store.close()


def noisy(root: Path) -> None:
    """Three classes of noise with a little more of one colour: hard enough for scores to differ."""
    random = np.random.default_rng(0)
    for channel in range(3):
        folder = root / f"class{channel}"
        folder.mkdir(parents=True)
        for i in range(14):
            pixels = 128 + random.normal(0, 90, (48, 48, 3))
            pixels[..., channel] += 40
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


def promoting(root: Path) -> Path:
    """A folder with a search that took a paused trial up again; which seed meets one is luck."""
    for seed in range(1, 6):
        folder = root / str(seed)
        noisy(folder / "patches")
        told = ("--strategies", "full,partial", "--trials", "14", "--seed", str(seed))
        done = run(*SEARCH, *told, cwd=folder)
        assert done.returncode == 0, done.stderr
        if any(trial.user_attrs["purpose"] == "promoted" for trial in records(folder)):
            return folder
    raise AssertionError("no search of five promoted a trial")


@pytest.mark.slow
def test_a_paused_trial_is_promoted_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    folder = promoting(tmp_path)
    trials, told = records(folder), specs(folder)
    promoted = [t for t in trials if t.user_attrs["purpose"] == "promoted"]
    for trial in promoted:
        before = trials[trial.user_attrs["continues"]]
        assert before.state.name == "PRUNED"
        assert before.user_attrs["stopped"] == "paused"
        assert trial.params == before.params
        assert told[trial.number]["seed"] == told[before.number]["seed"]
        at = max(before.intermediate_values)
        assert {e: s for e, s in trial.intermediate_values.items() if e <= at} == before.intermediate_values
        # It ran the epochs that were left, and no others.
        assert trial.user_attrs["epochs"] + at == max(trial.intermediate_values)
        assert not (folder / "tlauto-runs/patches/trials" / str(before.number) / STATE_FILE).exists()
    again = run("rerun", "patches", str(promoted[0].number), "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert found["score"] == found["recorded"]


@pytest.mark.slow
def test_the_worse_half_is_paused_but_never_the_default_recipe(tmp_path: Path) -> None:
    noisy(tmp_path / "patches")
    done = run(*SEARCH, "--strategies", "full", "--trials", "10", "--seed", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trials = records(tmp_path)
    assert any(t.user_attrs.get("stopped") == "paused" for t in trials)
    (default,) = [t for t in trials if t.user_attrs["purpose"] == "default"]
    assert default.state.name == "COMPLETE"
    states = list((tmp_path / "tlauto-runs").rglob(STATE_FILE))
    assert len(states) <= 5


@pytest.mark.slow
def test_a_hopeless_trial_ends_after_two_epochs_but_the_default_recipe_does_not(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=20)
    search = (*SEARCH, "--strategies", "feature_extraction,full", "--heads", "linear,mlp", "--seed", "0")
    done = run(*search, "--trials", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    probe, default = records(tmp_path)
    assert (probe.user_attrs["purpose"], default.user_attrs["purpose"]) == ("probe", "default")
    # Colours are read off frozen features without a mistake; a head that begins at nothing and takes such
    # steps has learned nothing in four epochs.
    slow = {"head": "mlp", "optim.name": "sgd", "optim.sgd.lr": 1e-3, "finetune.backbone_lr": 0.01}
    study = Study(f"sqlite:///{tmp_path}/tlauto-runs/tlauto.db", "patches", seed=0, create=False)
    study.enqueue({**default.params, **slow}, purpose="search")
    study.enqueue({**default.params, **slow}, purpose="default")
    done = run(*search, "--trials", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pruned, kept = records(tmp_path)[2:]
    assert max(kept.intermediate_values.values()) < 0.7 < probe.value
    assert (pruned.state.name, pruned.user_attrs["stopped"]) == ("PRUNED", "hopeless")
    assert sorted(pruned.intermediate_values) == [1, 2]
    assert not (tmp_path / "tlauto-runs/patches/trials/2" / STATE_FILE).exists()
    assert (kept.state.name, sorted(kept.intermediate_values)) == ("COMPLETE", [1, 2, 3, 4])


@pytest.mark.slow
def test_a_killed_search_goes_on_inside_the_trial_that_ran(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=30)
    search = command(
        *SEARCH, "--preset", "best", "--strategies", "full", "--trials", "1", "--set", "augment.level=light"
    )
    folder = tmp_path / "tlauto-runs/patches/trials/0"
    with subprocess.Popen(
        search, cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and not (folder / STATE_FILE).is_file():
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the trial was over before its state was written"
    done = subprocess.run(search, cwd=tmp_path, env=environment(tmp_path), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    cut, again = records(tmp_path)
    assert (cut.state.name, again.state.name) == ("FAIL", "COMPLETE")
    told = specs(tmp_path)
    assert told[1]["seed"] == told[0]["seed"]
    assert told[1]["resume_from"] == str(folder / STATE_FILE)
    assert again.user_attrs["epochs"] < max(again.intermediate_values)
    assert set(cut.intermediate_values) <= set(again.intermediate_values)
    assert not (folder / STATE_FILE).exists()
    (row,) = [row for row in leaderboard(tmp_path) if row["state"] == "complete"]
    assert row["number"] == 1


def test_what_a_study_begins_with_is_proposed_also_when_that_is_cut_off(tmp_path: Path) -> None:
    space = simulated.space()
    config = SearchConfig(data="none", out=str(tmp_path), trials=8, devices="cpu")
    plan = Plan(
        config=config, space=space, task="multiclass", metric="accuracy", dataset_file="", folder=tmp_path,
        cache=tmp_path, device="cpu", sizes=Sizes(80, 20, 20),
    )  # fmt: skip
    whole, cut = (Study(f"sqlite:///{tmp_path}/tlauto.db", name, seed=0, create=True) for name in "ab")
    propose_first(whole, plan)
    assert len(whole.trials()) == 5
    params, purpose = plan.first_points(8)[0]
    cut.enqueue(without_fixed(params, space), purpose=purpose)
    for _ in range(2):
        propose_first(cut, plan)
    for _ in range(5):
        one, other = (study.ask(space) for study in (whole, cut))
        assert (one.params, one.attrs) == (other.params, other.attrs)
    propose_first(cut, plan)
    assert len(cut.trials()) == 5
