"""How many slots the nodes of a cluster have room for, and what a slot takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from tlauto_ray import RayExecutor
from tlauto_ray.room import Resources, Share, share_of

from tlauto.errors import ConfigError
from tlauto.executors import Wanted

GPU_NODES = ({"CPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 12.0, "GPU": 4.0})
CPU_NODES = ({"CPU": 5.0}, {"CPU": 1.0}, {})


def wanted(devices: str = "auto", **options: str) -> Wanted:
    return Wanted(Path("study"), Path("cache"), devices=devices, options=options)


@pytest.mark.parametrize(
    ("nodes", "asked", "share", "room"),
    [
        (GPU_NODES, wanted(), Share("cuda", 3, 1.0), 6),
        (GPU_NODES, wanted(gpus="0.5"), Share("cuda", 1, 0.5), 12),
        (GPU_NODES, wanted(gpus="0.3333"), Share("cuda", 1, 0.3333), 18),
        (GPU_NODES, wanted(gpus="2", cpus="4"), Share("cuda", 4, 2.0), 3),
        (GPU_NODES, wanted("cpu"), Share("cpu", 2, 0.0), 15),
        (GPU_NODES, wanted("cpu", gpus="1"), Share("cpu", 3, 1.0), 6),
        (CPU_NODES, wanted(), Share("cpu", 2, 0.0), 2),
        (CPU_NODES, wanted(cpus="1"), Share("cpu", 1, 0.0), 6),
        (({"CPU": 1.0},), wanted(), Share("cpu", 1, 0.0), 1),
        (({"GPU": 1.0},), wanted(), Share("cuda", 0, 1.0), 1),
    ],
)
def test_a_slot_takes_a_share_and_the_nodes_have_room_for_so_many(
    nodes: Sequence[Resources], asked: Wanted, share: Share, room: int
) -> None:
    assert share_of(asked, nodes) == share
    assert share.room(nodes) == room
    assert share.threads == max(1, share.cpus)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (wanted("cuda"), "no node of the Ray cluster has a GPU; use --devices auto or cpu"),
        (wanted(cpus="9"), "no node of the Ray cluster has 9 CPUs and 0 GPUs for a slot"),
        (wanted(cpus="0"), "a slot must take something of a node"),
    ],
)
def test_what_no_node_has_is_refused(asked: Wanted, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        share_of(asked, CPU_NODES)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (wanted("cuda:1"), "--devices cuda:1: on a cluster Ray chooses the device; use auto, cpu, cuda"),
        (wanted(gpus="1.5"), "--executor-option gpus=1.5: write a fraction of 1 or a whole number"),
        (wanted(gpus="-1"), "--executor-option gpus=-1: write a fraction of 1 or a whole number"),
        (wanted(cpus="half"), "--executor-option cpus=half: write a whole number"),
        (wanted(address="ray://head:10001"), "a search must run on a machine of the cluster"),
        (wanted(patience="nan"), "--executor-option patience=nan: write seconds"),
    ],
)
def test_what_cannot_be_right_is_refused_without_a_cluster(asked: Wanted, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RayExecutor().check(asked)
