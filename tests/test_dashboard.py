"""`tlauto dashboard` on the file that a search is writing: nothing fails, nothing waits, all is readable."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from tests_support import TINY, command, environment, wait_for, wait_until_served

READERS = 3
TRIALS = 20
"""So many that readers ask often enough while they run, however quick trials become."""
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))),
    None,
)


def get(port: int, path: str) -> tuple[int, str]:
    """Status and body of a GET from the dashboard (its server answers one request at a time)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@contextmanager
def started(*args: str, cwd: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `tlauto ARGS` that writes to a log and is ended with the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(command(*args), cwd=cwd, env=environment(cwd), stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass
class Watched:
    """A search that was watched from its first to its last trial, and the dashboard, still running."""

    folder: Path
    port: int
    pid: int
    exit_code: int
    statuses: Counter[int] = field(default_factory=Counter)
    seen: set[tuple[str, int]] = field(default_factory=set)
    errors: list[Exception] = field(default_factory=list)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def detail(self) -> dict[str, Any]:
        """The study as the dashboard's page gets it."""
        time.sleep(2.1)  # trials are cached for two seconds
        studies = json.loads(get(self.port, "/api/studies")[1])["study_summaries"]
        (study,) = (s for s in studies if s["study_name"] == "patches")
        detail: dict[str, Any] = json.loads(get(self.port, f"/api/studies/{study['study_id']}")[1])
        return detail


def read_on(watched: Watched, done: threading.Event) -> None:
    """Ask for the studies and one study's trials, again and again, as open pages do."""
    while not done.wait(0.2):
        try:
            status, body = get(watched.port, "/api/studies")
            watched.statuses[status] += 1
            for study in json.loads(body)["study_summaries"]:
                status, body = get(watched.port, f"/api/studies/{study['study_id']}")
                watched.statuses[status] += 1
                watched.seen |= {(trial["state"], trial["number"]) for trial in json.loads(body)["trials"]}
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            watched.errors.append(error)
            return


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, make_patches: Callable[..., Path]) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    make_patches(folder / "patches")
    args = ("search", "--data", "patches", *TINY, "--trials", str(TRIALS), "--seed", "1")
    searching, serving = folder / "search.log", folder / "dashboard.log"
    with started(*args, cwd=folder, log=searching) as search:
        wait_for(searching, r"score +accuracy", search)
        with started("dashboard", "--port", "0", cwd=folder, log=serving) as dashboard:
            port = int(wait_for(serving, r"Optuna dashboard on http://127\.0\.0\.1:(\d+) ", dashboard)[1])
            wait_until_served(port)
            watched = Watched(folder, port, dashboard.pid, exit_code=-1)
            done = threading.Event()
            threads = [threading.Thread(target=read_on, args=(watched, done)) for _ in range(READERS)]
            for thread in threads:
                thread.start()
            try:
                watched.exit_code = search.wait(timeout=400)
            finally:
                done.set()
                for thread in threads:
                    thread.join()
            yield watched


def test_a_search_ends_well_while_the_dashboard_reads_its_file(watched: Watched) -> None:
    assert watched.exit_code == 0, watched.said("search")
    assert watched.errors == []
    assert set(watched.statuses) == {200}, watched.statuses
    assert watched.statuses[200] > 20, watched.statuses
    # It was really watched while it ran, not only before or after.
    assert {state for state, _ in watched.seen} >= {"Running", "Complete"}


def test_no_trial_fails_and_nothing_is_locked(watched: Watched) -> None:
    states = Counter(trial["state"] for trial in watched.detail()["trials"])
    assert set(states) <= {"Complete", "Pruned"} and sum(states.values()) == TRIALS, states
    logs = [watched.said("search"), watched.said("dashboard")]
    logs += [log.read_text() for log in (watched.folder / "tlauto-runs/patches/logs").iterdir()]
    for text in logs:
        assert "locked" not in text.lower() and "Traceback" not in text, text


def test_every_trial_shows_readable_parameters_and_facts(watched: Watched) -> None:
    study = watched.detail()
    for trial in study["trials"]:
        values = {p["name"]: p["param_external_value"] for p in trial["params"]}
        assert values["backbone"] == "timm:test_resnet.r160_in1k"
        assert values["strategy"] in ("feature_extraction", "partial")
        assert values["head"] in ("linear", "mlp", "cosine")
        is_solved = (values["strategy"], values["head"]) == ("feature_extraction", "linear")
        assert is_solved or values["optim.name"] in ("adamw", "adam", "sgd")
        facts = {attr["key"] for attr in trial["user_attrs"]}
        assert facts >= {"purpose", "slot", "seed", "seconds", "metrics", "trainable_params"}
    assert study["objective_names"] == ["accuracy"]
    assert study["directions"] == ["maximize"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net to find the socket")
def test_only_this_machine_can_reach_it(watched: Watched) -> None:
    port = f"{watched.port:04X}"
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{watched.pid}/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if local.endswith(f":{port}") and state == "0A":
                listening.append(local)
    assert listening == [f"0100007F:{port}"]  # 127.0.0.1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH to render the dashboard's page")
def test_the_page_shows_the_study_in_a_real_browser(watched: Watched, tmp_path: Path) -> None:
    shown = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--no-first-run", "--no-proxy-server",
            f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000", "--dump-dom",
            f"http://127.0.0.1:{watched.port}/dashboard/",
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert "patches" in shown.stdout


def test_a_study_deleted_in_the_dashboard_ends_its_search_in_one_sentence(
    tmp_path: Path, make_patches: Callable[..., Path]
) -> None:
    make_patches(tmp_path / "patches", per_class=6)
    log = tmp_path / "search.log"
    with started("search", "--data", "patches", *TINY, "--trials", "9", cwd=tmp_path, log=log) as search:
        wait_for(log, r"score +accuracy", search)
        # What the page's button does.
        optuna.delete_study(study_name="patches", storage=f"sqlite:///{tmp_path}/tlauto-runs/tlauto.db")
        assert search.wait(timeout=120) == 1
    assert "Traceback" not in log.read_text()
    last = log.read_text().splitlines()[-1]
    assert last.startswith("error: the trials of study 'patches' are gone") and "--new" in last
