"""Searches that learn from earlier ones in their workspace: real images, models, processes and databases."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import sqlalchemy as sa
from PIL import Image
from tests_support import run

import tlauto
from tlauto.api import Search
from tlauto.config import SearchConfig
from tlauto.data import load_dataset
from tlauto.errors import ConfigError, DataError
from tlauto.events import Said, TrialEnded
from tlauto.history import profile_of, read_past
from tlauto.results.leaderboard import Row
from tlauto.searchspace import SearchSpace
from tlauto.store import Store, storage_url
from tlauto.study import Study
from tlauto.warm import Past

BACKBONES = tuple(f"timm:test_{name}.r160_in1k" for name in ("efficientnet", "resnet", "vit"))
# No penalty or kind of features is found by cross-validation, so the sampler has something to find.
SETTINGS: Mapping[str, Any] = {
    "backbones": BACKBONES, "strategies": "feature_extraction", "heads": "linear",
    "params": {"probe.solver": "lbfgs", "probe.mirror": False, "probe.joined": 1}, "pretrained": False,
    "offline": True, "workers": 0, "ensemble": 1,
}  # fmt: skip


def write_corners(folder: Path, *, seed: int) -> Path:
    """Noise with a bright square in one of four corners, the class: mean features hardly tell."""
    rng = np.random.default_rng(seed)
    for corner in range(4):
        for i in range(16):
            pixels = rng.normal(110, 30, (64, 64, 3))
            row, column = rng.integers(2, 12, 2) + np.array(divmod(corner, 2)) * 32
            pixels[row : row + 16, column : column + 16] += 60
            file = folder / f"corner{corner}" / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
    return folder


def search(folder: Path, name: str, said: list[str] | None = None, **settings: Any) -> Search:
    """A small search over the dataset `name` of a workspace folder, in this process."""

    def hear(event: object) -> None:
        if isinstance(event, Said) and said is not None:
            said.append(event.text)

    given = {**SETTINGS, "trials": 8, "out": str(folder / "runs"), "emit": hear, **settings}
    return tlauto.search(folder / name, **given)


def in_order(found: Search) -> list[Row]:
    return sorted(found.leaderboard(), key=lambda row: row.number)


def points(found: Search) -> list[tuple[str, str, Mapping[str, Any]]]:
    """What was proposed, and what for."""
    return [(row.purpose, row.backbone, row.params) for row in in_order(found)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets, and a workspace in which the first one was searched."""
    folder = tmp_path_factory.mktemp("built")
    for seed, name in enumerate(("one", "two", "three")):
        write_corners(folder / name, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TLAUTO_CACHE", str(folder / "cache"))
        first = search(folder, "one", trials=10)
    assert first.best.params["probe.features"] == "grid", "where something lies is what there is to find"
    assert first.screening.learned_from == ()
    return folder


@pytest.fixture
def workspace(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to go on with; features stay in the cache of the original."""
    monkeypatch.setenv("TLAUTO_CACHE", str(built / "cache"))
    return Path(shutil.copytree(built, tmp_path / "copy", ignore=shutil.ignore_patterns("cache")))


def change(folder: Path, statement: str, *values: Any) -> None:
    """Change the workspace's database behind everybody's back."""
    with closing(sqlite3.connect(folder / "runs" / "tlauto.db")) as database, database:
        assert database.execute(statement, values).rowcount > 0


def past_of(folder: Path, name: str, **settings: Any) -> tuple[Past, list[str]]:
    """What a new search over the dataset `name` would know."""
    dataset, report = load_dataset(folder / name)
    config = SearchConfig(data=str(folder / name), **{"pretrained": False, **settings})
    with closing(Store(storage_url(folder / "runs", None))) as store:
        return read_past(
            store, config, task=dataset.task, fingerprint=dataset.fingerprint, report=report.to_json()
        )


# --- taking over --------------------------------------------------------------------------------------


def test_a_search_tries_first_what_was_best_on_similar_images(workspace: Path) -> None:
    said: list[str] = []
    found = search(workspace, "two", said)
    rows, best = in_order(found), Search("one", workspace / "runs").best
    assert [row.purpose for row in rows[:4]] == ["probe", "probe", "probe", "warm"]
    assert (rows[3].params, rows[3].backbone, rows[3].from_study) == (best.params, best.backbone, "one")
    assert [row.number for row in rows if row.purpose == "warm"] == [3], "a tenth of 8 trials, but one"
    assert rows[3].score is not None and rows[3].score > 0.2 + max(row.score or 0 for row in rows[:3])
    assert found.screening.learned_from == ("one",)
    assert said[:2] == [
        "starts from what earlier searches found here: one (--cold leaves them out)",
        "tries next what was best in study 'one'",
    ]
    shown = run("show", "two", "--out", "runs", cwd=workspace).stdout
    assert "learned   from one\n" in shown and "trial 3: what was best in one\n" in shown
    assert f"screened  {found.screening.backbones[0].backbone} " in shown
    third = in_order(search(workspace, "three"))
    assert (third[3].purpose, third[3].from_study) == ("warm", "two"), "the larger gain of the two"


def test_the_same_images_are_learned_from_under_the_same_seed_alone(workspace: Path) -> None:
    again = search(workspace, "one", new=True)
    assert (again.name, again.screening.learned_from) == ("one-2", ("one",))
    assert [row.from_study for row in in_order(again)[3:5]] == ["one", None]
    assert past_of(workspace, "one")[0].earlier[0].study == "one-2", "the newest of a dataset"
    # Under another seed the images that were validated on may be the test part.
    assert past_of(workspace, "one", seed=1)[0].earlier == ()
    assert [e.study for e in past_of(workspace, "two", seed=1)[0].earlier] == ["one-2"]


def test_with_cold_and_in_an_empty_workspace_a_search_is_the_same(workspace: Path) -> None:
    cold = search(workspace, "two", cold=True)
    alone = search(workspace, "two", out=str(workspace / "alone"))
    assert points(cold) == points(alone)
    assert {purpose for purpose, _, _ in points(cold)} == {"probe", "search"}
    assert cold.screening.learned_from == ()
    with pytest.raises(ConfigError, match="cold was True and is now False"):
        search(workspace, "two", trials=9)


@pytest.mark.slow
def test_cold_is_a_flag(workspace: Path) -> None:
    arguments = (
        "search", "--data", "two", "--out", "runs", "--trials", "4", "--strategies", "feature_extraction",
        "--heads", "linear", "--no-pretrained", "--offline", "--workers", "0", "--json",
        "--backbones", ",".join(BACKBONES), "--set", "probe.solver=lbfgs",
    )  # fmt: skip
    cold = run(*arguments, "--study", "cold", "--cold", cwd=workspace)
    warm = run(*arguments, "--study", "warm", cwd=workspace)
    assert (cold.returncode, warm.returncode) == (0, 0), cold.stderr + warm.stderr
    # The first one was cold itself, but may be learned from.
    assert [json.loads(done.stdout)["learned_from"] for done in (cold, warm)] == [[], ["cold", "one"]]
    assert "starts from what earlier searches found here: cold, one (--cold leaves them out)" in warm.stderr
    assert "starts from" not in cold.stderr


def test_the_same_history_gives_the_same_search(workspace: Path) -> None:
    shutil.copytree(workspace / "runs", workspace / "again")
    first, second = (
        search(workspace, "two", trials=6, out=str(workspace / out)) for out in ("runs", "again")
    )
    assert points(first) == points(second)
    assert [row.score for row in in_order(first)] == [row.score for row in in_order(second)]


# --- stopping -----------------------------------------------------------------------------------------


class Stopped(Exception):
    """Ends a search from within, as a crash would."""


def stop_after(number: int, **settings: Any) -> dict[str, Any]:
    def hear(event: object) -> None:
        if isinstance(event, TrialEnded) and event.number == number:
            raise Stopped

    return {**settings, "emit": hear}


def test_a_stopped_search_goes_on_with_the_history_it_began_with(workspace: Path) -> None:
    with pytest.raises(Stopped):
        search(workspace, "two", **stop_after(0))
    change(workspace, "DELETE FROM tlauto_searches WHERE study = 'one'")
    optuna.delete_study(study_name="one", storage=storage_url(workspace / "runs", None))
    rows = in_order(search(workspace, "two"))
    assert [row.from_study for row in rows if row.purpose == "warm"] == ["one"]


@pytest.mark.slow
def test_what_was_taken_over_is_taken_over_once(workspace: Path) -> None:
    with pytest.raises(Stopped):
        search(workspace, "two", **stop_after(3))
    search(workspace, "three", cold=True)  # a history that would propose something else
    rows = in_order(search(workspace, "two"))
    assert [row.from_study for row in rows if row.purpose == "warm"] == ["one"]


def test_a_trial_that_was_cut_off_still_says_where_it_came_from(tmp_path: Path) -> None:
    url, space = f"sqlite:///{tmp_path}/tlauto.db", SearchSpace(BACKBONES, *_plugins(), {}, {})
    study = Study(url, "s", seed=0, create=True)
    study.enqueue({"backbone": BACKBONES[1]}, purpose="warm", from_study="one")
    study.ask(space)
    resumed = Study(url, "s", seed=0, create=False)
    assert resumed.requeue_interrupted() == [0]
    again = resumed.trials()[1]
    assert (again.attrs["purpose"], again.attrs["from_study"], again.attrs["retry_of"]) == ("warm", "one", 0)


# --- what does not fit --------------------------------------------------------------------------------


def test_a_backbone_that_is_not_there_gives_way_to_the_best_probe(workspace: Path) -> None:
    best = Search("one", workspace / "runs").best
    others = tuple(name for name in BACKBONES if name != best.backbone)
    found = search(workspace, "two", backbones=others, trials=5)
    (taken,) = [row for row in found.leaderboard() if row.purpose == "warm"]
    assert taken.backbone == found.screening.backbones[0].backbone
    assert taken.params == best.params


def test_what_was_fixed_there_and_is_searched_here_comes_over_too(workspace: Path) -> None:
    found = search(workspace, "two", params={}, preset="best", trials=7)
    (taken,) = [row for row in found.leaderboard() if row.purpose == "warm"]
    assert taken.params == Search("one", workspace / "runs").best.params
    assert taken.params["probe.solver"] == "lbfgs"


def test_other_tasks_and_other_weights_teach_nothing(workspace: Path) -> None:
    lines = [
        f"{f.relative_to(workspace)},{i}.5" for i, f in enumerate(sorted((workspace / "two").rglob("*.png")))
    ]
    (workspace / "values.csv").write_text("\n".join(["path,label", *lines]))
    past, notes = past_of(workspace, "values.csv")
    assert (past.profile.task, past.profile.classes, past.earlier, notes) == ("regression", 1, (), [])
    past, notes = past_of(workspace, "two", pretrained=True)
    assert (past.earlier, notes) == ((), [])
    assert past_of(workspace, "two")[0].earlier != ()
    change(workspace, "UPDATE tlauto_searches SET state = 'interrupted'")
    assert past_of(workspace, "two")[0].earlier == ()


DAMAGES = {
    "an unreadable report": ("UPDATE tlauto_datasets SET report = '{\"ima'", "damaged"),
    "an older report": ("UPDATE tlauto_datasets SET report = '{\"version\": 0}'", "report on the images"),
    "impossible figures": (
        "UPDATE tlauto_datasets SET report = json_set(report, '$.images', 0)", "impossible"
    ),
    "another kind of report": ("UPDATE tlauto_datasets SET report = '[1]'", "report on the images"),
    "an older plan": ("UPDATE tlauto_searches SET plan = '{}'", "damaged"),
    "a plan without a known metric": (
        "UPDATE tlauto_searches SET plan = json_set(plan, '$.metric', 'luck')", "luck"
    ),
    "a configuration that is none": ("UPDATE tlauto_searches SET config = 'null'", "damaged"),
    "trials that are gone": ("UPDATE studies SET study_name = 'renamed'", "gone"),
    "damaged trials": ("UPDATE trial_params SET distribution_json = '{'", "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_study_that_cannot_be_read_is_named_and_left_out(workspace: Path, case: str) -> None:
    statement, why = DAMAGES[case]
    change(workspace, statement)
    past, notes = past_of(workspace, "two")
    assert past.earlier == ()
    (note,) = notes
    assert note.startswith("nothing is learned from study 'one': ") and why in note
    assert "\n" not in note


def test_a_search_goes_on_beside_a_damaged_study(workspace: Path) -> None:
    change(workspace, "UPDATE tlauto_datasets SET report = '{}'")
    said: list[str] = []
    found = search(workspace, "two", said, trials=4)
    assert found.screening.learned_from == ()
    assert "nothing is learned from study 'one'" in said[0]


@pytest.mark.parametrize("report", [{}, {"images": 3}, {"modes": [], "images": "x"}])
def test_a_report_that_is_none_has_no_profile(report: Mapping[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        profile_of("multiclass", report)


# --- honesty ------------------------------------------------------------------------------------------


def test_results_on_test_parts_are_never_read(workspace: Path) -> None:
    before = past_of(workspace, "two")
    statements: list[str] = []

    def hear(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", hear)
    try:
        assert past_of(workspace, "two") == before
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", hear)
    read = [statement for statement in statements if statement.lstrip().upper().startswith("SELECT")]
    assert any("tlauto_searches" in statement for statement in read)
    assert not any("tlauto_models" in statement for statement in read), "that is where they are"
    change(workspace, 'UPDATE tlauto_models SET metrics = \'{"accuracy": {"value": 0}}\', comparison = NULL')
    assert past_of(workspace, "two") == before
    change(workspace, "DELETE FROM tlauto_models")
    assert past_of(workspace, "two") == before


def test_a_profile_is_what_the_doctor_counted(workspace: Path) -> None:
    (profile,) = {past_of(workspace, name)[0].profile for name in ("one", "two", "three")}
    assert (profile.images, profile.classes, profile.imbalance) == (64, 4, 1.0)
    assert (profile.side, profile.grey) == (64.0, 0.0)
    for file in (workspace / "two" / "corner0").iterdir():
        with Image.open(file) as image:
            image.convert("L").resize((640, 320)).save(file)
    assert past_of(workspace, "two")[0].profile.grey == 0.25


# --- one backbone everywhere --------------------------------------------------------------------------


def _plugins() -> tuple[Any, Any]:
    from tlauto.plugins import registry

    return (registry().strategy("feature_extraction"),), (registry().head("linear"),)


def record_study(folder: Path, name: str, scores: Mapping[str, float]) -> None:
    """A finished search over other images of the same kind, with these probes."""
    with closing(Store(storage_url(folder / "runs", None))) as store:
        row, data = store.search("one"), store.dataset("one")
        assert row is not None
        store.create_search(
            name, config=row["config"], dataset=data["content"], fingerprint=name, root=data["root"],
            report=data["report"], plan={**row["plan"], "past": None},
        )  # fmt: skip
        study = Study(store.url, name, seed=0, create=True)
        for backbone, score in scores.items():
            study.enqueue({"backbone": backbone}, purpose="probe")
            study.tell(study.ask(SearchSpace(tuple(scores), *_plugins(), {}, {})).number, score)
        store.release(name, state="finished")


@pytest.mark.slow
def test_a_backbone_that_is_first_on_every_dataset_is_noted_once(workspace: Path) -> None:
    # The path of penalties reads the corners off the first one's features, and off no other's.
    names = tuple(f"timm:test_{name}.r160_in1k" for name in ("resnet", "vit", "vit2"))
    settings = {"params": {"probe.solver": "path"}, "backbones": names, "trials": 6}
    change(workspace, "UPDATE tlauto_searches SET state = 'interrupted'")
    for name in ("red", "green"):
        record_study(workspace, name, dict(zip(names, (0.8, 0.79, 0.5), strict=True)))
    assert search(workspace, "two", **settings).screening.same_winner is None
    record_study(workspace, "blue", dict(zip(names, (0.7, 0.5, 0.69), strict=True)))
    found = search(workspace, "two", study="all", **settings)
    assert set(found.screening.learned_from) == {"red", "green", "blue", "two"}
    assert (found.screening.backbones[0].backbone, found.screening.same_winner) == (names[0], names[0])
    shown = run("show", "all", "--out", "runs", cwd=workspace).stdout
    assert shown.count(f"note      {names[0]} ranks first here as on all earlier datasets") == 1
    assert json.loads(run("show", "all", "--out", "runs", "--json", cwd=workspace).stdout)["same_winner"]
