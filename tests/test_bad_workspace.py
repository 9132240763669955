"""A workspace, study or model bundle that is missing, damaged, foreign or out of date: one clear sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from tests_support import SPOILED, TINY, command, environment, refused, run

RED = "images/red/red000.png"
SAME = (*TINY, "--trials", "1", "--strategies", "feature_extraction", "--heads", "linear")


def search(*args: str, cwd: Path) -> str:
    """The sentence with which a quiet search ends, which then is the only line."""
    return refused("search", "--data", "images", *args, "--quiet", cwd=cwd)


# --- the workspace ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Path:
    """A workspace with a finished search over images of which four cannot be read."""
    folder = tmp_path_factory.mktemp("finished")
    make_patches(folder / "images", per_class=6, classes=2)
    for name, spoil in SPOILED.items():
        file = folder / "images" / "red" / f"{name}.png"
        shutil.copy(folder / "images/green/green000.png", file)
        spoil(file)
    done = run("search", "--data", "images", *SAME, "--workers", "0", cwd=folder)
    (folder / "said.txt").write_text(done.stderr)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished workspace to spoil."""
    shutil.copytree(finished, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "hf", "torch"))
    return tmp_path / "copy"


def test_a_search_goes_on_without_unreadable_files_and_names_them(finished: Path) -> None:
    said = (finished / "said.txt").read_text()
    assert "4 unreadable files left out, e.g. red/noise.png: " in said
    for named in (
        "red/text.jpg: text, not an image",
        "red/truncated.jpg: truncated",
        "red/zero.png: empty file",
    ):
        assert f"left out: {named}" in said
    assert "train 8, val 2, test 2" in said
    shown = json.loads(run("doctor", "images", "--json", cwd=finished).stdout)
    assert [entry["path"] for entry in shown["unreadable"]] == [
        "red/noise.png", "red/text.jpg", "red/truncated.jpg", "red/zero.png",
    ]  # fmt: skip


def test_a_changed_dataset_is_noticed(workspace: Path) -> None:
    (workspace / "images/green/green001.png").unlink()
    sentence = search(*SAME, cwd=workspace)
    assert f"the dataset {workspace}/images changed" in sentence and "use --new" in sentence


def test_going_on_with_another_seed_is_refused(finished: Path) -> None:
    sentence = search(*SAME, "--seed", "5", cwd=finished)
    assert "seed was 0 and is now 5" in sentence and "--new" in sentence


def test_a_study_of_optuna_s_own_is_left_alone(finished: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tlauto.db"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    optuna.create_study(storage=url, study_name="theirs").set_user_attr("owner", "somebody")
    sentence = search(*TINY, "--study", "theirs", "--out", str(tmp_path), cwd=finished)
    assert "'theirs' in this database was not made by" in sentence and "--study NAME" in sentence
    study = optuna.load_study(storage=url, study_name="theirs")
    assert study.user_attrs == {"owner": "somebody"} and not study.trials


def test_a_study_that_another_process_searches_is_left_alone(workspace: Path) -> None:
    with closing(sqlite3.connect(workspace / "tlauto-runs/tlauto.db")) as database, database:
        holder = (os.getpid(), socket.gethostname())
        database.execute("UPDATE tlauto_searches SET state = 'running', pid = ?, host = ?", holder)
    sentence = search(*SAME, cwd=workspace)
    assert f"searched by process {os.getpid()}" in sentence and "--study NAME" in sentence


READERS = (("show",), ("leaderboard",), ("rerun", "images", "0"), ("dashboard", "--port", "0"))


@pytest.mark.parametrize("words", READERS, ids=[words[0] for words in READERS])
def test_without_a_workspace_there_is_nothing_to_read(words: tuple[str, ...], tmp_path: Path) -> None:
    sentence = refused(*words, "--out", "runs", cwd=tmp_path)
    assert f"no workspace at {tmp_path}/runs" in sentence and "tlauto search --data PATH" in sentence
    assert not list(tmp_path.iterdir())


def test_reading_a_database_that_is_not_there_makes_none(tmp_path: Path) -> None:
    assert "no workspace at no.db" in refused("show", "--storage", "sqlite:///no.db", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("show",), ("search", "--data", "images", *SAME)], ids=["show", "search"])
def test_a_damaged_database_without_backup_is_named(words: tuple[str, ...], workspace: Path) -> None:
    database = workspace / "tlauto-runs" / "tlauto.db"
    database.with_name("tlauto.db.backup").unlink(missing_ok=True)
    database.write_bytes(os.urandom(5000))
    sentence = refused(*words, cwd=workspace)
    assert str(database) in sentence and "file is not a database" in sentence and "--out" in sentence


def test_a_database_of_a_newer_tlauto_is_left_alone(workspace: Path) -> None:
    with closing(sqlite3.connect(workspace / "tlauto-runs/tlauto.db")) as database, database:
        database.execute("INSERT INTO tlauto_migrations VALUES (99, 0)")
    sentence = refused("leaderboard", cwd=workspace)
    assert "schema 99" in sentence and "upgrade tlauto" in sentence


def test_an_unknown_study_is_answered_with_the_closest(finished: Path) -> None:
    assert "did you mean 'images'?" in refused("show", "image", cwd=finished)


def test_an_unknown_trial_is_answered_with_where_to_look(finished: Path) -> None:
    sentence = refused("rerun", "images", "42", cwd=finished)
    assert "no trial 42" in sentence and "'tlauto leaderboard images'" in sentence


def test_a_used_port_is_named(finished: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        sentence = refused("dashboard", "--port", str(port), cwd=finished)
    assert f"127.0.0.1:{port}" in sentence and "another --port" in sentence


def test_a_full_disk_is_one_sentence(finished: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("leaderboard", "--json"), cwd=finished, env=environment(finished), stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_who_closed_standard_output_sees_no_traceback(finished: Path) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command("leaderboard")],
        cwd=finished, env=environment(finished), stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_a_search_that_cannot_begin_gives_its_study_up(workspace: Path) -> None:
    file = workspace / "tlauto-runs/images/dataset.json"
    file.unlink()
    file.mkdir()
    assert "dataset.json: Is a directory" in search(*SAME, cwd=workspace)
    with closing(sqlite3.connect(workspace / "tlauto-runs/tlauto.db")) as database:
        assert database.execute("SELECT state, pid FROM tlauto_searches").fetchall() == [
            ("interrupted", None)
        ]


def test_no_memory_is_one_sentence(tmp_path: Path) -> None:
    with (tmp_path / "line.jsonl").open("wb") as file:
        file.truncate(4 << 30)  # one line of 4 GB that takes no room on the disk
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 1500000; exec "$@"', "sh", *command("doctor", "line.jsonl")],
        cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr == "error: no memory is left; end other programs, or use fewer --workers\n"


# --- the model ----------------------------------------------------------------------------------------

MODEL_FOLDER = "tlauto-runs/images/model"


def _edit_manifest(folder: Path, **changes: object) -> None:
    file = folder / "tlauto.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a manifest cut short": (
        lambda folder: (folder / "tlauto.json").write_text('{"format": '), "tlauto.json is damaged", "copy"
    ),
    "a manifest without labels": (
        lambda folder: _edit_manifest(folder, labels=None), "'labels' is not a list", "copy the bundle again"
    ),
    "a manifest of a newer format": (
        lambda folder: _edit_manifest(folder, format_version=9), "format version 9", "pip install --upgrade"
    ),
    "changed tensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "safetensors is damaged", "copy"
    ),
    "missing tensors": (
        lambda folder: (folder / "model.safetensors").unlink(), "safetensors is missing", "copy it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_bundle_is_named(finished: Path, tmp_path: Path, case: str) -> None:
    spoil, *said = DAMAGES[case]
    spoil(shutil.copytree(finished / MODEL_FOLDER, tmp_path / "model"))
    sentence = refused("predict", "model", str(finished / "images/red/red000.png"), cwd=tmp_path)
    assert all(text in sentence for text in said), sentence


@pytest.mark.parametrize("words", [("predict", "images", RED), ("evaluate", "images", "--data", "images")])
def test_a_folder_that_is_no_bundle_is_named(words: tuple[str, ...], finished: Path) -> None:
    sentence = refused(*words, cwd=finished)
    assert "images is not a model bundle" in sentence and "<out>/<study>/model" in sentence


def test_a_missing_image_is_named_before_the_model_is_loaded(finished: Path) -> None:
    sentence = refused("predict", MODEL_FOLDER, "images/red/nope.png", cwd=finished)
    assert "images/red/nope.png" in sentence and "check the path" in sentence


def test_labels_that_the_model_does_not_know_are_named(workspace: Path) -> None:
    (workspace / "images/red").rename(workspace / "images/rot")
    sentence = refused("evaluate", MODEL_FOLDER, "--data", "images", cwd=workspace)
    assert "no classes of the model" in sentence and "'rot'" in sentence and "green, red" in sentence
