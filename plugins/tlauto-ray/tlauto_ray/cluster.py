"""The connection to a Ray cluster: one that is there, or one of our own for as long as the search lasts."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlauto.devices import available_cores, visible_gpus
from tlauto.errors import ConfigError, TlautoError

STORE_BYTES = 80 * 2**20
"""Ray's object store, of which lines of text need next to nothing; about the least that Ray accepts."""

OURS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # What makes Ray take 127.0.0.1 for this machine's address, so that its servers listen there only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Other users of this machine can reach 127.0.0.1 too.
    "RAY_AUTH_MODE": "token",
    # Ray's workers run at 15 otherwise, far behind whatever else this machine does.
    "RAY_worker_niceness": "0",
}
"""The environment of a cluster of our own: nothing leaves this machine, nobody else gets in."""


@dataclass(frozen=True)
class Cluster:
    """A connection that `close` ends.

    Attributes:
        is_ours: whether Ray was started for this search; None when the caller's process had it already.
        folder: of our own cluster's files.
    """

    is_ours: bool | None
    folder: Path | None = None

    def nodes(self) -> list[Mapping[str, float]]:
        """The resources of the nodes that are alive."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def close(self) -> None:
        """Disconnect, and end the cluster if it is ours."""
        import ray

        if self.is_ours is not None:
            ray.shutdown()
            _let_ray_print(True)
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def connect(address: str | None) -> Cluster:
    """Connect to the cluster at an address, or start one on this machine.

    Args: address: `auto` or `HOST:PORT`; None starts one.
    Raises: TlautoError when there is none, or when Ray does not start.
    """
    if address is None:
        with _environment(OURS | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            return _start()
    import ray

    if ray.is_initialized():
        return Cluster(is_ours=None)
    try:
        _init(address=address)
    except Exception as error:  # noqa: BLE001 Ray raises many kinds
        ray.shutdown()
        raise ConfigError(
            f"cannot use the Ray cluster '{address}': {_sentence(error)}; 'ray status' shows whether one "
            f"runs, 'ray start --head' starts one, and without --ray-address the search starts its own"
        ) from None
    return Cluster(is_ours=False)


def wait_for_node(cluster: Cluster, timeout_s: float) -> list[Mapping[str, float]]:
    """The resources of the nodes, once there is one."""
    deadline = time.monotonic() + timeout_s
    while not (nodes := cluster.nodes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return nodes


def _start() -> Cluster:
    import ray

    if ray.is_initialized():
        return Cluster(is_ours=None)
    # Not the usual temporary folder: the paths of sockets below it may have about 100 letters.
    folder = Path(tempfile.mkdtemp(prefix="tlauto-ray-", dir="/tmp"))
    try:
        _init(
            address="local",
            num_cpus=available_cores(),
            num_gpus=len(visible_gpus()),
            include_dashboard=False,
            object_store_memory=STORE_BYTES,
            _temp_dir=str(folder),
        )
    except BaseException as error:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise TlautoError(f"Ray does not start on this machine: {_sentence(error)}") from None
    return Cluster(is_ours=True, folder=folder)


def _init(**settings: Any) -> None:
    import ray

    ray.init(log_to_driver=False, logging_level=logging.ERROR, **settings)
    _let_ray_print(False)


def _let_ray_print(on: bool) -> None:
    # On standard output, where results go, it prints what befalls a node even so; there is no setting for it.
    from ray._private import worker

    worker._worker_logs_enabled = on


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables of this process within the block, for processes that start in it; the user's own win."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _sentence(error: Exception) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return said.rstrip(".") or type(error).__name__
