"""Searches on a real cluster of several nodes on this machine, with GPUs that are only declared."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests_support import TINY, command, environment, install_troubles, leaderboard, run
from tlauto_ray import RayExecutor
from tlauto_ray.host import Host, Site

from tlauto.errors import ConfigError
from tlauto.executors import Wanted
from tlauto.testing import ExecutorSuite

pytest.importorskip("ray", reason="Ray is not installed (pip install ray): nothing of it is tested")

# Ray warns its own developers.
pytestmark = pytest.mark.filterwarnings("ignore")

STORE_BYTES = 80 * 2**20
SEARCH = (
    "search", "--data", "images", *TINY, "--strategies", "feature_extraction", "--heads", "stands",
    "--executor", "ray",
)  # fmt: skip
SHARE = {"cpus": "1", "gpus": "1"}


class Nodes:
    """A cluster whose head has no room for workers; each further node has one CPU and declares one GPU."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.cluster = Cluster()
        self.head = self.cluster.add_node(
            num_cpus=0, include_dashboard=False, include_log_monitor=False, object_store_memory=STORE_BYTES
        )
        self.address = str(self.cluster.address)
        self.workers: list[Any] = []
        self.processes = processes_of(self.head)

    def add(self) -> None:
        """Start a node."""
        node = self.cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE_BYTES)
        self.workers.append(node)
        self.processes += processes_of(node)

    def lose(self, pid: int) -> None:
        """Kill all processes of the node on which a process runs, as when its machine loses power."""
        raylets = {worker.all_processes["raylet"][0].process.pid: worker for worker in self.workers}
        while pid not in raylets:
            pid = parent(pid)
        self.workers.remove(raylets[pid])
        self.cluster.remove_node(raylets[pid], allow_graceful=False)

    def shutdown(self) -> None:
        """End all nodes."""
        self.cluster.shutdown()
        for process in self.processes:
            process.wait()  # Ray leaves some to the garbage collector, which warns


NODES: list[Nodes] = []


@pytest.fixture(scope="module", autouse=True)
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """A head and two nodes, whose workers find the heads of `trouble_plugin`."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment(folder), **install_troubles(folder / "site")}.items():
            patch.setenv(name, value)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")  # as of a cluster of our own
        patch.delenv("CUDA_VISIBLE_DEVICES")
        made = Nodes(folder)
        made.add()
        made.add()
        NODES.append(made)
        yield made
        NODES.clear()
        made.shutdown()


class TestRay(ExecutorSuite):
    executor = RayExecutor()

    @classmethod
    def given(cls) -> Mapping[str, Any]:
        return {"options": {"address": NODES[0].address, **SHARE}}


def test_a_node_that_does_not_see_what_the_search_needs_is_refused_by_name(nodes: Nodes) -> None:
    there = f"the Ray node {platform.node()} does not see {nodes.folder}/nowhere; mount it there under"
    with pytest.raises(ConfigError, match=there):
        RayExecutor().open(_wanted(nodes, shared=(nodes.folder / "nowhere",)))
    with pytest.raises(
        ConfigError, match=r"was started with GPUs but has none; start its Ray with --num-gpus 0"
    ):
        RayExecutor().open(_wanted(nodes, devices="cuda"))


def test_a_workspace_on_another_disk_is_noticed(tmp_path: Path) -> None:
    from importlib.metadata import version

    there = Site(str(tmp_path / "token"), "1", (), str(tmp_path / "cache"), "cpu", version("tlauto"))
    _, lack = Host().look(there)
    assert lack.startswith(f"does not see the workspace {tmp_path}; mount it there under the same path")
    (tmp_path / "token").write_text("1")
    assert Host().look(there)[1] == ""


@pytest.mark.slow
def test_a_search_outlives_a_node(nodes: Nodes, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    with search(nodes, tmp_path, "--trials", "2", "--ensemble", "1", "--json") as process:
        nodes.lose(standing(nodes, process, tmp_path))
        assert process.wait(timeout=200) == 0, (tmp_path / "log").read_text()
    assert json.loads((tmp_path / "out").read_text())["trials"] == 2, "Ray's own words are no result"
    said = (tmp_path / "log").read_text()
    assert "ray:0 ray:1" in said
    assert "was lost on the Ray node" in said
    rows = leaderboard(tmp_path)
    (lost,) = [row for row in rows if row["state"] == "failed"]
    assert lost["error"] == "worker died: the worker process was lost with its machine"
    (again,) = [row for row in rows if row["retry_of"] == lost["number"]]
    assert again["state"] == "complete"
    assert json.loads(run("show", "--json", cwd=tmp_path).stdout)["trials"] == 2


@pytest.mark.slow
def test_a_search_that_has_no_node_left_ends_with_a_sentence(nodes: Nodes, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    while len(nodes.workers) > 1:
        nodes.lose(nodes.workers[0].all_processes["raylet"][0].process.pid)
    if not nodes.workers:
        nodes.add()
    with search(nodes, tmp_path, "--trials", "2", "--executor-option", "patience=3") as process:
        nodes.lose(standing(nodes, process, tmp_path))
        assert process.wait(timeout=200) == 1
    last = (tmp_path / "log").read_text().splitlines()[-1]
    assert last.startswith("error: the Ray cluster has had no room for a worker for 3 s; add nodes")


@pytest.mark.slow
def test_a_cluster_of_our_own_listens_here_only_and_ends_with_the_search(
    tmp_path: Path, nodes: Nodes
) -> None:
    write_images(tmp_path / "images")
    marked = {"TLAUTO_TEST_MARK": str(tmp_path)}
    with search(None, tmp_path, "--workers", "1", **marked) as process:
        standing(nodes, process, tmp_path)
        ours = carrying(tmp_path)
        assert len(ours) > 4
        assert listening(ours) == {"127.0.0.1"}
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert carrying(tmp_path) == set()
    assert not list(Path("/tmp").glob(f"tlauto-ray-*/session_*_{process.pid}"))


# --- helpers ------------------------------------------------------------------------------------------


def _wanted(nodes: Nodes, *, devices: str = "cpu", shared: tuple[Path, ...] = ()) -> Wanted:
    options = {"address": nodes.address, **SHARE}
    return Wanted(nodes.folder / "study", nodes.folder / "cache", devices, options=options, shared=shared)


def write_images(folder: Path) -> None:
    """Eight noisy images of each of two kinds."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, value in {"dark": 60, "light": 180}.items():
        (folder / label).mkdir(parents=True)
        for i in range(8):
            pixels = rng.normal(value, 25, (48, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")


def search(nodes: Nodes | None, folder: Path, *args: str, **env: str) -> subprocess.Popen[bytes]:
    """Start a search in a folder, on a cluster or one of its own; it writes to `out` and `log`."""
    (NODES[0].folder / "site" / "marks" / "stands").unlink(missing_ok=True)
    where = ("--ray-address", nodes.address, "--executor-option", "gpus=1") if nodes else ()
    share = ("--devices", "cpu", "--executor-option", "cpus=1", *where)
    kept = {k: v for k, v in os.environ.items() if k not in env}
    if nodes is None:
        kept = {k: v for k, v in kept.items() if not k.startswith("RAY_")}
    words = command(*SEARCH, *share, *args)
    with (folder / "log").open("wb") as log, (folder / "out").open("wb") as out:
        return subprocess.Popen(words, cwd=folder, env={**kept, **env}, stdout=out, stderr=log)


def standing(nodes: Nodes, process: subprocess.Popen[bytes], folder: Path) -> int:
    """The id of the worker that stands still in its first trial, as each search's first does."""
    mark = nodes.folder / "site" / "marks" / "stands"
    deadline = time.monotonic() + 300  # only catches a hang
    while not mark.exists() or not mark.read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    return int(mark.read_text())


def processes_of(node: Any) -> list[subprocess.Popen[bytes]]:
    """The processes of a node of Ray's."""
    return [info.process for infos in node.all_processes.values() for info in infos]


def parent(pid: int) -> int:
    """The process that started another."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def carrying(mark: Path) -> set[int]:
    """The processes that a search with this mark started, itself included."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"TLAUTO_TEST_MARK={mark}".encode() in (entry / "environ").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def listening(pids: set[int]) -> set[str]:
    """The addresses on which processes listen for TCP connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(_address(words[1].partition(":")[0]))
    return found


def _address(text: str) -> str:
    """An address of /proc/net, the last four bytes of it where it is longer."""
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(text[-8:])))
