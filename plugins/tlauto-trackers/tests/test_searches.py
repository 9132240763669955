"""What a search that was killed and went on left behind, read with TensorBoard's and MLflow's own readers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata as hparams
from tensorboard.plugins.hparams.api_pb2 import Status
from tlauto_trackers.mlflow import MLflow
from tlauto_trackers.tensorboard import END, START, TensorBoard

from tlauto.errors import ConfigError

# MLflow and SQLAlchemy warn each other's developers.
pytestmark = pytest.mark.filterwarnings("ignore")

SEARCH = ("search", "--data", "patches", "--backbones", "timm:test_resnet.r160_in1k", "--no-pretrained",
          "--offline", "--preset", "fast", "--trials", "3",
          "--track", "tensorboard", "--track", "mlflow")  # fmt: skip

WITNESS = """
import json, sys, threading
import tlauto.cli
try:
    tlauto.cli.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
from mlflow.telemetry.utils import is_telemetry_disabled
loaded = [name for name in ("torch", "tensorflow", "mlflow", "tensorboard") if name in sys.modules]
threads = [thread.name for thread in threading.enumerate()]
print(json.dumps({"loaded": loaded, "threads": threads, "no_telemetry": is_telemetry_disabled()}))
"""
"""Runs tlauto in its own process, which is the coordinator's, and says what it loaded."""

# MLflow's telemetry is off under pytest and in continuous integration anyway.
QUIET = ("PYTEST_CURRENT_TEST", "CI", "GITHUB_ACTIONS", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK")


@dataclass(frozen=True)
class Searched:
    """A finished search: where, what tlauto says of it, and what the process that ended it had loaded."""

    folder: Path
    rows: dict[int, dict[str, Any]]
    shown: dict[str, Any]
    witness: dict[str, Any]

    def events(self, run: str) -> EventAccumulator:
        (folder,) = (self.folder / "tlauto-runs" / "patches" / "tensorboard").iterdir()
        found = EventAccumulator(str(folder / run))
        found.Reload()
        return found

    def runs(self) -> tuple[MlflowClient, Run, dict[int, Run]]:
        """A client, the run of the search, and those of its trials by number."""
        database = self.folder / "tlauto-runs" / "patches" / "mlflow" / "mlflow.db"
        client = MlflowClient(f"sqlite:///{database}")
        found = client.search_runs([client.get_experiment_by_name("patches").experiment_id])
        (search,) = [run for run in found if "tlauto.search" in run.data.tags]
        trials = [run for run in found if run.data.tags.get("mlflow.parentRunId") == search.info.run_id]
        assert len(found) == 1 + len(trials)
        numbers = [int(run.data.tags["tlauto.trial"]) for run in trials]
        assert len(numbers) == len(set(numbers)), "a trial stands there twice"
        return client, search, dict(zip(numbers, trials, strict=True))


def _environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TLAUTO_") and k not in QUIET}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "TLAUTO_CACHE": str(folder / "cache")}


def _run(code: Sequence[str], *args: str, folder: Path) -> Any:
    done = subprocess.run(
        [sys.executable, *code, *args],
        cwd=folder, env=_environment(folder), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tracker" not in done.stderr.replace("waiting for the tracker", ""), done.stderr
    return json.loads(done.stdout.splitlines()[-1]) if "-c" in code else json.loads(done.stdout)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("searched")
    rng = np.random.default_rng(0)
    for label, colour in {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 200)}.items():
        (folder / "patches" / label).mkdir(parents=True)
        for i in range(12):
            pixels = np.array(colour) + rng.normal(0, 25, (48, 48, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / "patches" / label / f"{i}.png")
    first = [sys.executable, "-m", "tlauto", *SEARCH]
    environment = _environment(folder)
    with subprocess.Popen(
        first, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        assert any(line.startswith("    0 ") for line in process.stderr)  # reads as far as trial 0's line
        process.kill()
    witness = _run(["-c", WITNESS], *SEARCH, "--quiet", folder=folder)
    rows = _run(["-m", "tlauto"], "leaderboard", "--json", folder=folder)
    shown = _run(["-m", "tlauto"], "show", "--json", folder=folder)
    return Searched(folder, {row["number"]: row for row in rows}, shown, witness)


def test_the_search_was_really_cut_off_and_went_on(searched: Searched) -> None:
    assert searched.shown["state"] == "finished"
    assert searched.shown["trials"] == 3
    assert all(row["state"] in ("complete", "pruned", "failed") for row in searched.rows.values())


def test_the_coordinator_loads_both_libraries_but_neither_torch_nor_tensorflow(searched: Searched) -> None:
    assert searched.witness["loaded"] == ["mlflow", "tensorboard"]


def test_mlflow_reports_its_use_to_nobody(searched: Searched) -> None:
    assert searched.witness["no_telemetry"]
    assert not [name for name in searched.witness["threads"] if "elemetry" in name]


def test_tensorboard_has_every_trial_once(searched: Searched) -> None:
    (folder,) = (searched.folder / "tlauto-runs" / "patches" / "tensorboard").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {"search", "model", *(f"trial-{number:04d}" for number in searched.rows)}
    scored = {n: row["score"] for n, row in searched.rows.items() if row["score"] is not None}
    points = searched.events("search").Scalars("score")
    assert {point.step: pytest.approx(point.value) for point in points} == scored
    assert len(points) == len(scored)


def test_tensorboard_has_the_curves_and_results_of_a_trial(searched: Searched) -> None:
    for number, row in searched.rows.items():
        if row["score"] is None:
            continue
        found = searched.events(f"trial-{number:04d}")
        assert [point.value for point in found.Scalars("score")] == [pytest.approx(row["score"])]
        values = {name: found.Scalars(f"val/{name}")[0].value for name in row["metrics"]}
        wanted = {name: entry["value"] for name, entry in row["metrics"].items()}
        assert values == pytest.approx(wanted)
        for name in ("score", "train_loss", "val_loss", "seconds"):
            steps = [point.step for point in found.Scalars(f"epoch/{name}")]
            assert steps and steps == sorted(set(steps))


def test_tensorboard_has_a_table_of_trials_with_their_parameters(searched: Searched) -> None:
    for number, row in searched.rows.items():
        found = searched.events(f"trial-{number:04d}")
        start = hparams.parse_session_start_info_plugin_data(found.SummaryMetadata(START).plugin_data.content)
        end = hparams.parse_session_end_info_plugin_data(found.SummaryMetadata(END).plugin_data.content)
        told = {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
        parts = {name: row[name] for name in ("backbone", "strategy", "head", "purpose", "seed")}
        assert told == {**parts, **row["params"]}
        is_cut = (row["error"] or "").startswith("interrupted")
        assert Status.Name(end.status) == ("STATUS_UNKNOWN" if is_cut else "STATUS_SUCCESS")
        assert start.start_time_secs <= end.end_time_secs


def test_tensorboard_has_the_test_of_the_model_and_the_settings(searched: Searched) -> None:
    found = searched.events("model")
    for name, entry in searched.shown["test"].items():
        (point,) = found.Scalars(f"test/{name}")
        assert point.value == pytest.approx(entry["value"])
    texts = [
        event.tensor_proto.string_val[0].decode() for event in searched.events("search").Tensors("search")
    ]
    assert all('| backbones | ["timm:test_resnet.r160_in1k"] |' in text for text in texts)


def test_mlflow_has_every_trial_once_with_parameters_and_results(searched: Searched) -> None:
    client, _, trials = searched.runs()
    assert sorted(trials) == sorted(searched.rows)
    for number, row in searched.rows.items():
        run = trials[number]
        parts = {name: row[name] for name in ("backbone", "strategy", "head", "purpose", "seed")}
        assert run.data.params == {name: str(value) for name, value in {**parts, **row["params"]}.items()}
        is_cut = (row["error"] or "").startswith("interrupted")
        assert run.info.status == ("KILLED" if is_cut else "FINISHED")
        assert run.data.tags["tlauto.state"] == row["state"]
        assert run.info.start_time <= run.info.end_time
        if row["score"] is None:
            continue
        assert run.data.metrics["score"] == pytest.approx(row["score"])
        for name, entry in row["metrics"].items():
            assert run.data.metrics[f"val/{name}"] == pytest.approx(entry["value"])
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "epoch/score")]
        assert steps and steps == sorted(set(steps))


def test_mlflow_has_the_search_its_settings_and_the_test_of_the_model(searched: Searched) -> None:
    _, search, _ = searched.runs()
    assert search.info.status == "FINISHED"
    tags = search.data.tags
    assert json.loads(tags["tlauto.backbones"]) == ["timm:test_resnet.r160_in1k"]
    assert (tags["tlauto.model"], tags["tlauto.best_trial"]) == (
        searched.shown["model"], str(searched.shown["best"]["number"]),
    )  # fmt: skip
    for name, entry in searched.shown["test"].items():
        assert search.data.metrics[f"test/{name}"] == pytest.approx(entry["value"])


def test_nothing_is_written_outside_the_study(searched: Searched) -> None:
    assert {path.name for path in searched.folder.iterdir()} == {"patches", "cache", "tlauto-runs"}
    files = {path.name for path in (searched.folder / "tlauto-runs").iterdir()}
    assert {name.partition(".")[0] for name in files} == {"patches", "tlauto"}


@pytest.mark.parametrize("module", ["tensorboard", "mlflow", "alembic"])
def test_a_library_that_is_not_installed_is_named_with_what_to_install(module: str) -> None:
    tracker = "TensorBoard" if module == "tensorboard" else "MLflow"
    package = {"mlflow": "mlflow-skinny"}.get(module, module)
    code = (
        f"import sys; sys.modules['{module}'] = None\nimport tlauto_trackers\n"
        f"from tlauto.errors import ConfigError\ntry:\n    tlauto_trackers.{tracker}().check(None)\n"
        "except ConfigError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == (
        f"--track {tracker.lower()} needs {package}; run 'pip install {package}', or leave it out"
    ), done.stderr


def test_a_place_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        TensorBoard().check(str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="writes to a folder of this machine, not to http://host"):
        TensorBoard().check("http://host")
    with pytest.raises(ConfigError, match="no longer writes plain files; --track mlflow=/a/runs makes"):
        MLflow().check("file:///a/runs")
    for where in (str(tmp_path), None):
        TensorBoard().check(where)
        MLflow().check(where)
