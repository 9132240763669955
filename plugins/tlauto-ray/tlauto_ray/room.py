"""What a slot takes of a node, and how many of them the cluster has room for. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tlauto.errors import ConfigError
from tlauto.executors import Wanted

DEVICES = ("auto", "cpu", "cuda")

Resources = Mapping[str, float]
"""What a node has by Ray's names, such as {"CPU": 16.0, "GPU": 2.0}."""


@dataclass(frozen=True)
class Share:
    """What Ray sets aside for one slot: CPUs and GPUs (a fraction where several share one)."""

    device: str
    cpus: int
    gpus: float

    @property
    def threads(self) -> int:
        """Arithmetic threads of its worker."""
        return max(1, self.cpus)

    def fits(self, node: Resources) -> int:
        """How many slots a node has room for."""
        shares = [(self.cpus, node.get("CPU", 0.0)), (self.gpus, node.get("GPU", 0.0))]
        # Ray counts in parts of 10,000, so three thirds fit into one.
        return int(min((math.floor(has / share + 1e-3) for share, has in shares if share), default=0))

    def room(self, nodes: Sequence[Resources]) -> int:
        """How many slots all nodes have room for."""
        return sum(self.fits(node) for node in nodes)


def share_of(wanted: Wanted, nodes: Sequence[Resources]) -> Share:
    """A slot's share: a GPU and its part of the node's CPUs where there are GPUs, else two CPUs.

    Raises: ConfigError when the cluster has none of the devices that are asked for.
    """
    most_gpus = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    device = wanted.devices
    if device == "auto":
        device = "cuda" if most_gpus else "cpu"
    if device == "cuda" and not most_gpus:
        raise ConfigError("no node of the Ray cluster has a GPU; use --devices auto or cpu")
    gpus = option(wanted, "gpus", 1.0 if device == "cuda" else 0.0)
    given = option(wanted, "cpus", -1.0)
    cpus = int(given) if given >= 0 else _cpus(gpus, nodes)
    if not cpus and not gpus:
        raise ConfigError("a slot must take something of a node; give --executor-option cpus=1 or more")
    share = Share(device, cpus, gpus)
    if not share.room(nodes):
        raise ConfigError(
            f"no node of the Ray cluster has {cpus} CPUs and {gpus:g} GPUs for a slot; give less with "
            f"--executor-option cpus=N or gpus=N"
        )
    return share


def option(wanted: Wanted, name: str, default: float) -> float:
    """A number among the options; raises ConfigError when it is none or cannot be."""
    text = wanted.options.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    whole = value == int(value) if math.isfinite(value) else False
    right = {"gpus": whole or 0 < value < 1, "cpus": whole}.get(name, True)
    if text is not None and not (math.isfinite(value) and value >= 0 and right):
        kind = {"gpus": "a fraction of 1 or a whole number", "cpus": "a whole number"}.get(name, "seconds")
        raise ConfigError(f"--executor-option {name}={text}: write {kind}")
    return value


def _cpus(gpus: float, nodes: Sequence[Resources]) -> int:
    """Two CPUs, or with GPUs the part of a node's CPUs that every slot can have."""
    if not gpus:
        return min(2, int(max((node.get("CPU", 0.0) for node in nodes), default=0.0)))
    free = Share("cuda", 0, gpus)
    return min(int(node.get("CPU", 0.0)) // free.fits(node) for node in nodes if free.fits(node))
