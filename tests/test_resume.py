"""Searches that are killed at the worst moment, or go on with more or less to search than they had."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
from tests_support import command, environment, leaderboard, refused, run

from tlauto.candidates import find_candidates
from tlauto.config import SearchConfig
from tlauto.devices import make_slots
from tlauto.events import Said, ignore
from tlauto.pool.inprocess import InProcessPool
from tlauto.store import Store
from tlauto.study import Study

SEARCH = (
    "search", "--data", "patches", "--no-pretrained", "--offline", "--preset", "fast", "--ensemble", "1",
    "--workers", "0", "--devices", "cpu", "--strategies", "feature_extraction", "--seed", "5",
)  # fmt: skip
RESNET, VIT = "timm:test_resnet.r160_in1k", "timm:test_vit.r160_in1k"

KILLED = """
import os, sys
import optuna
from tlauto.cli import main
from tlauto.rows import Rows
owner, name, when, left = sys.argv[1:5]
left = int(left)
places = [({"study": optuna.Study, "storage": optuna.storages.RDBStorage}[owner], name)]
if name == "set_trial_state_values":  # which Optuna begins trials by; we end them
    places.append((Rows, "write_ends"))
def dying(call):
    def dies(self, *args, **options):
        global left
        if (options.get("template_trial") is None) == (name == "create_new_trial"):
            return call(self, *args, **options)
        left -= 1
        if not left and when == "before":
            os._exit(9)
        answer = call(self, *args, **options)
        if not left:
            os._exit(9)
        return answer
    return dies
for kind, own in places:
    setattr(kind, own, dying(getattr(kind, own)))
sys.argv = ["tlauto", *sys.argv[5:]]
main()
"""
"""The command line, whose process is gone before or after the n-th call of a method of Optuna's."""


def killed(owner: str, name: str, when: str, at: int, *args: str, cwd: Path) -> None:
    """Run a search that ends with its process at such a call."""
    script = (sys.executable, "-c", KILLED, owner, name, when, str(at), *args)
    done = subprocess.run(script, cwd=cwd, env=environment(cwd), capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr


def finished(*args: str, cwd: Path) -> str:
    """What a search said that ran to its end, in one line."""
    done = run(*args, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return unwrapped(done.stderr)


def unwrapped(said: str) -> str:
    return " ".join(said.split())


def trials(folder: Path, version: int = 1) -> list[Any]:
    url = f"sqlite:///{folder / 'tlauto-runs' / 'tlauto.db'}"
    with closing(Study(url, "patches", seed=0, create=False, version=version)) as study:
        return study.trials()


def facts(folder: Path) -> list[tuple[Any, ...]]:
    """All that is recorded of each trial but how long it took, and how much memory."""
    timed = ("seconds", "image_seconds", "slot", "memory")
    return [
        (t.number, t.state, t.params, t.score, {k: v for k, v in t.attrs.items() if k not in timed})
        for t in trials(folder)
    ]


@pytest.mark.slow
def test_a_killed_search_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    make_patches(whole / "patches")
    shutil.copytree(whole / "patches", stopped / "patches")
    search = (*SEARCH, "--backbones", RESNET, "--heads", "linear,mlp", "--trials", "12")
    finished(*search, cwd=whole)
    killed("study", "enqueue_trial", "after", 1, *search, cwd=stopped)
    # Results are in our tables by then, but not in Optuna's.
    killed("storage", "set_trial_state_values", "before", 4, *search, cwd=stopped)
    killed("storage", "set_trial_state_values", "before", 7, *search, cwd=stopped)
    (running,) = [trial for trial in trials(stopped) if trial.state == "running"]
    finished(*search, cwd=stopped)
    assert trials(stopped)[running.number].state == "complete"
    assert facts(stopped) == facts(whole)
    assert len(trials(whole)) == 12


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Iterator[Path]:
    """A search of one backbone that goes on with two and another head, killed while it began to."""
    folder = tmp_path_factory.mktemp("grown")
    make_patches(folder / "patches")
    finished(*SEARCH, "--backbones", RESNET, "--heads", "linear", "--trials", "4", cwd=folder)
    shutil.copy(folder / "tlauto-runs" / "tlauto.db", folder / "before.db")
    larger = (*SEARCH, "--backbones", f"{RESNET},{VIT}", "--heads", "linear,mlp", "--trials", "10")
    killed("storage", "create_new_trial", "after", 3, *larger, cwd=folder)
    killed("storage", "create_new_trial", "after", 4, *larger, cwd=folder)
    said = finished(*larger, "--workers", "1", cwd=folder)  # on another device, so to say
    (folder / "said.txt").write_text(said)
    yield folder


def test_a_search_with_more_to_search_goes_on_in_a_new_version(grown: Path) -> None:
    said = (grown / "said.txt").read_text()
    new = f"the backbone '{VIT}' and the head 'mlp' are new: going on as version 2 with the 4 trials so far"
    assert said.count(new) == 1
    assert "with 4 trials done" in said
    rows = sorted(leaderboard(grown), key=lambda row: row["number"])
    assert [row["number"] for row in rows] == list(range(10)), "a total over both"
    before = optuna.load_study(study_name="patches", storage=f"sqlite:///{grown / 'before.db'}").get_trials()
    assert [row["score"] for row in rows[:4]] == [trial.value for trial in before]
    assert [row["backbone"] for row in rows if row["purpose"] == "probe"] == [RESNET, VIT]
    probe = next(row for row in rows[4:] if row["purpose"] == "probe")
    assert probe["number"] in (4, 5), "first, or after the default recipe's own"
    assert {row["head"] for row in rows} == {"linear", "mlp"}
    old = optuna.load_study(study_name="patches", storage=f"sqlite:///{grown}/tlauto-runs/tlauto.db")
    assert old.get_trials() == before


def test_every_command_takes_the_versions_as_one_study(grown: Path) -> None:
    shown = json.loads(run("show", "patches", "--json", cwd=grown).stdout)
    assert shown["trials"] == 10 and shown["backbones"] == sorted([RESNET, VIT])
    assert {one["backbone"] for one in shown["screening"]} == {RESNET, VIT}
    assert shown["best"]["number"] == leaderboard(grown)[0]["number"]
    again = run("rerun", "patches", "0", "--json", "--devices", "cpu", cwd=grown)
    assert json.loads(again.stdout)["score"] == json.loads(again.stdout)["recorded"]
    tested = run("evaluate", shown["model"], "--data", "patches", "--json", cwd=grown)
    value = json.loads(tested.stdout)["metrics"]["accuracy"]["value"]
    assert value == pytest.approx(shown["test"]["accuracy"]["value"])


def test_the_same_command_again_makes_no_further_version(grown: Path) -> None:
    before = trials(grown, 2)
    same = ("--backbones", f"{VIT},{RESNET}", "--heads", "mlp,linear", "--trials", "10", "--workers", "1")
    said = finished(*SEARCH, *same, cwd=grown)
    assert "version" not in said and "with 10 trials done" in said
    assert trials(grown, 2) == before


@pytest.mark.slow
def test_what_is_not_searched_any_more_is_listed_and_counted_but_not_chosen(grown: Path) -> None:
    folder = grown.parent / "shrunk"
    shutil.copytree(grown, folder, dirs_exist_ok=True)
    said = finished(
        *SEARCH, "--backbones", VIT, "--heads", "linear,mlp", "--trials", "12", cwd=folder
    )  # fmt: skip
    assert f"the backbone '{RESNET}' is gone: going on as version 3 with the 10 trials so far" in said
    rows = leaderboard(folder)
    shelved = [row for row in rows if row["backbone"] == RESNET]
    assert len(rows) == 12 and len(shelved) >= 4
    assert all(row["state"] == "shelved" and row["score"] is not None for row in shelved)
    shown = json.loads(run("show", "--json", cwd=folder).stdout)
    assert shown["trials"] == 12 and shown["best"]["backbone"] == VIT
    assert json.loads((Path(shown["model"]) / "tlauto.json").read_text())["backbone"]["id"] == VIT


def test_what_makes_another_study_is_refused_still(grown: Path) -> None:
    same = ("--backbones", f"{RESNET},{VIT}", "--heads", "linear,mlp", "--trials", "10")
    assert "seed was 5 and is now 6" in refused(*SEARCH, *same, "--seed", "6", cwd=grown)
    forgot = refused(*SEARCH, "--heads", "linear,mlp", "--trials", "10", cwd=grown)
    assert re.search(r"backbones was timm:\S+ and is now not set; use the old ones to go on", forgot)


def test_a_study_that_is_being_searched_is_refused_with_process_and_host(grown: Path) -> None:
    claims = (
        "import sys; from tlauto.store import Store; Store(sys.argv[1]).claim('patches'); "
        "print('claimed', flush=True); sys.stdin.read()"
    )
    url = f"sqlite:///{grown}/tlauto-runs/tlauto.db"
    with subprocess.Popen(
        [sys.executable, "-c", claims, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        said = refused(*SEARCH, "--backbones", VIT, "--heads", "linear", "--trials", "20", cwd=grown)
        other.kill()
    assert f"'patches' is being searched by process {other.pid} on {socket.gethostname()}" in said


HEAD = """
import tlauto
class Plain:
    name, tasks, space = "plain", ("multiclass",), {}
    def features(self, params):
        return "pooled"
    def build(self, shape, num_outputs, params):
        import torch
        return torch.nn.Linear(shape.pooled, num_outputs)
@tlauto.hookimpl
def task_heads():
    return [Plain()]
"""


def install(folder: Path) -> dict[str, str]:
    """Install a plugin with the head `plain` into a folder, and the environment in which it is found."""
    (folder / "plain-1.0.dist-info").mkdir(parents=True)
    (folder / "plain_plugin.py").write_text(HEAD)
    (folder / "plain-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: plain\nVersion: 1.0\n"
    )
    (folder / "plain-1.0.dist-info" / "entry_points.txt").write_text("[tlauto]\nplain = plain_plugin\n")
    return {"PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}", "TLAUTO_PLUGINS": "plain"}


@pytest.mark.slow
def test_a_plugin_may_come_and_go(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    search = (*SEARCH, "--backbones", RESNET, "--trials")
    without = {"TLAUTO_PLUGINS": ""}
    assert run(*search, "2", cwd=tmp_path, env=without).returncode == 0
    installed = run(*search, "7", cwd=tmp_path, env=install(tmp_path / "site"))
    assert installed.returncode == 0, installed.stderr
    assert "the head 'plain' is new: going on as version 2 with the 2 trials so far" in unwrapped(
        installed.stderr
    )
    rows = leaderboard(tmp_path)
    assert "plain" in {row["head"] for row in rows}
    removed = run(*search, "8", cwd=tmp_path, env=without)
    assert removed.returncode == 0, removed.stderr
    assert "the head 'plain' is gone: going on as version 3 with the 7 trials so far" in unwrapped(
        removed.stderr
    )
    rows = leaderboard(tmp_path)
    assert len(rows) == 8
    assert {row["state"] for row in rows if row["head"] == "plain"} == {"shelved"}
    named = refused(*search, "9", "--heads", "linear,plain", cwd=tmp_path, env=without)
    assert re.search("no .*head 'plain'", named)


def test_backbones_of_providers_that_were_installed_since_are_found() -> None:
    config = SearchConfig(data="d", pretrained=False, offline=True, preset="fast")
    stored = {"backbones": [RESNET, "gone:network"], "providers": ["timm", "keras", "efficientnet-lite"]}
    pool = InProcessPool(make_slots("cpu", 1)[0], env={})
    said: list[Any] = []
    try:
        found = find_candidates(pool, config, stored, said.append)
        known = find_candidates(pool, config, {"backbones": [RESNET]}, ignore)
    finally:
        pool.close()
    others = {id.partition(":")[0] for id in found if id != RESNET}
    assert RESNET in found and others == {"torchvision"}
    assert len(found) <= 1 + config.recipe.candidates
    assert list(known) == [RESNET], "a record without providers says nothing of new ones"
    assert not [event for event in said if isinstance(event, Said)]


@pytest.mark.slow
def test_two_searches_share_a_workspace(tmp_path: Path, make_patches: Callable[..., Path]) -> None:
    make_patches(tmp_path / "patches")
    searches = [
        subprocess.Popen(
            command(*SEARCH, "--backbones", RESNET, "--trials", "5", "--study", name),
            cwd=tmp_path, env=environment(tmp_path), stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    said = [process.communicate(timeout=900)[1] for process in searches]
    assert [process.returncode for process in searches] == [0, 0], said
    scores = [
        [(row["number"], row["score"]) for row in leaderboard(tmp_path, name)] for name in ("one", "two")
    ]
    assert scores[0] == scores[1] and len(scores[0]) == 5
    with closing(Store(f"sqlite:///{tmp_path}/tlauto-runs/tlauto.db")) as store:
        assert {store.search(name)["state"] for name in ("one", "two")} == {"finished"}  # type: ignore[index]
