"""The executor: which cluster, which share of it, and the pool of workers there."""

from __future__ import annotations

import contextlib
import secrets
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tlauto.errors import ConfigError
from tlauto.executors import Wanted
from tlauto_ray.cluster import connect, wait_for_node
from tlauto_ray.host import Site
from tlauto_ray.pool import RayPool
from tlauto_ray.room import DEVICES, option, share_of

if TYPE_CHECKING:
    from tlauto.pool.base import Pool

PATIENCE_S = 120.0
NODES_S = 30.0


class RayExecutor:
    """Workers on the nodes of a Ray cluster, an actor for each slot."""

    name = "ray"
    options: tuple[str, ...] = ("address", "cpus", "gpus", "patience")

    def check(self, wanted: Wanted) -> None:
        """Raise ConfigError when Ray is not installed or a value cannot be right."""
        if wanted.per_device is not None:
            raise ConfigError(
                "--per-device: on a cluster, give each slot a share of a GPU with --executor-option gpus=0.5"
            )
        if wanted.devices not in DEVICES:
            raise ConfigError(
                f"--devices {wanted.devices}: on a cluster Ray chooses the device; use {', '.join(DEVICES)}"
            )
        if wanted.options.get("address", "").startswith("ray://"):
            raise ConfigError(
                "a search must run on a machine of the cluster, not behind Ray's client (ray://); start it "
                "there with --ray-address auto, or join this machine ('ray start --address=HOST:PORT')"
            )
        for name in ("cpus", "gpus", "patience"):
            option(wanted, name, 1.0)
        if find_spec("ray") is None:
            raise ConfigError("--executor ray needs ray; run 'pip install ray', or leave it out")

    def open(self, wanted: Wanted) -> Pool:
        """Connect or start, and wait until there is a slot.

        Raises: ConfigError when the cluster cannot be used, or a node of it lacks what the search needs.
        """
        wanted.folder.mkdir(parents=True, exist_ok=True)
        token = secrets.token_hex(16)
        file = wanted.folder / f".ray-{token[:8]}"
        with contextlib.ExitStack() as undo:
            cluster = connect(wanted.options.get("address"))
            undo.callback(cluster.close)
            share = share_of(wanted, wait_for_node(cluster, NODES_S))
            file.write_text(token, encoding="utf-8")
            undo.callback(file.unlink, missing_ok=True)
            shared = tuple(str(path) for path in wanted.shared)
            site = Site(str(file), token, shared, str(wanted.cache), share.device, version("tlauto"))
            patience_s = option(wanted, "patience", PATIENCE_S)
            pool = RayPool(cluster, share, site, wanted=wanted, patience_s=patience_s)
            undo.callback(pool.close)
            pool.settle()
            undo.pop_all()
        return pool
