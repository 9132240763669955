"""A slot's place in the cluster: an actor that Ray finds room for, sooner or later."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from tlauto_ray.host import Host, Site
from tlauto_ray.room import Share

GROUPS = {"in": 1, "out": 2, "life": 1}
"""Threads of an actor by what they do, besides one that looks and kills: `read` and `stay` wait."""


@dataclass
class Place:
    """An actor for a slot.

    Attributes:
        slot: the slot's name.
        node: name of the actor's node, once it has one.
        is_ready: whether the actor runs and its node has all that a worker needs.
        is_lost: whether the actor is gone; is_told_lost: whether the user knows.
        is_late: whether it was asked for after the search began.
        is_given_up: whether no other is to be asked for when this one is gone.
    """

    slot: str
    actor: Any
    site: Any
    life: Any
    node: str = ""
    is_ready: bool = False
    is_lost: bool = False
    is_told_lost: bool = False
    is_late: bool = False
    is_given_up: bool = False

    @classmethod
    def ask(cls, slot: str, share: Share, site: Site, *, is_late: bool) -> Place:
        """Ask Ray for a place; returns at once."""
        import ray

        host = ray.remote(
            num_cpus=share.cpus,
            num_gpus=share.gpus,
            max_restarts=0,
            concurrency_groups=GROUPS,
            scheduling_strategy="SPREAD",
        )(Host)
        actor = host.remote()
        life = actor.stay.options(concurrency_group="life").remote()
        return cls(slot, actor, actor.look.remote(site), life, is_late=is_late)

    @property
    def where(self) -> str:
        """Its node, for a sentence."""
        return f"the Ray node {self.node}" if self.node else "a Ray node"

    def look(self) -> str:
        """Notice what became of it; why its node cannot be used, empty when it can or is not known yet."""
        import ray

        self.is_lost = self.is_lost or _is_done(self.life)
        if self.is_ready or self.is_lost or not _is_done(self.site):
            return ""
        try:
            self.node, lack = ray.get(self.site)
        except Exception as error:  # noqa: BLE001 whatever Ray raises, there is no actor
            self.is_lost = True
            return "" if _is_gone(error) else f"cannot run tlauto's workers: {_first_line(error)}"
        self.is_ready = not lack
        return str(lack)

    def end(self) -> None:
        """End the actor, and with it its worker."""
        import ray

        self.is_lost = True
        with contextlib.suppress(Exception):  # the cluster itself may be gone
            if ray.is_initialized():  # else Ray would start a cluster to do it in
                ray.kill(self.actor)


def _is_done(ref: Any) -> bool:
    import ray

    return bool(ray.wait([ref], timeout=0)[0])


def _is_gone(error: Exception) -> bool:
    """Whether the actor ended with its node or by force, and not by an error of its own."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) and "creation" not in str(error).splitlines()[0]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
