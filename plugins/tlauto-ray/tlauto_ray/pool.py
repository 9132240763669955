"""The workers on a cluster: slots that come and go with its nodes."""

from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tlauto.devices import Slot, environment
from tlauto.errors import ConfigError, TlautoError
from tlauto.executors import Wanted
from tlauto.pool.base import Event
from tlauto.pool.local import LocalPool, Process
from tlauto.pool.protocol import Note
from tlauto_ray.cluster import Cluster
from tlauto_ray.host import Site
from tlauto_ray.place import Place
from tlauto_ray.process import RemoteProcess
from tlauto_ray.room import Share

SETTLE_S = 20.0
"""How long the start waits for all slots once it has one; the others come when Ray has room."""

GROW_S = 5.0
"""How often the cluster is asked whether it has grown."""

PAUSE_S = 0.1


class RayPool(LocalPool):
    """A pool whose workers' processes run on nodes of a cluster, each beside the actor of its slot.

    An actor that ends with its node is asked for again, and its slot is there again when Ray has found room.
    """

    def __init__(
        self, cluster: Cluster, share: Share, site: Site, *, wanted: Wanted, patience_s: float
    ) -> None:
        """Ask for actors. Raises: ConfigError for a wrong TLAUTO_SILENCE.

        Args:
            share: what a slot takes of a node.
            site: what every node must see.
            patience_s: how long it may be without any slot.
        """
        super().__init__((), logs=wanted.folder / "logs", limits=wanted.limits, launch=self._start_there)
        self._cluster, self._share, self._site = cluster, share, site
        self._env, self._most = {**_settings(), **wanted.env}, wanted.workers
        self._patience_s = patience_s
        self._places: dict[str, Place] = {}
        self._numbers = itertools.count()
        self._notes: list[Event] = []
        self._had_slot, self._grown = time.monotonic(), 0.0
        self._grow()

    @property
    def slots(self) -> Sequence[str]:
        """Names of the slots whose actors run; there may be none for a while."""
        return tuple(name for name, place in self._places.items() if place.is_ready and not place.is_lost)

    @property
    def device(self) -> str:
        """What torch calls the device of the slots."""
        return self._share.device

    def settle(self) -> None:
        """Wait for the actors until there are slots.

        Raises: ConfigError when a node lacks what the search needs, TlautoError when none has room.
        """
        begun = time.monotonic()
        while len(self.slots) < len(self._places):
            waited = time.monotonic() - begun
            if waited > SETTLE_S and (self.slots or waited > self._patience_s):
                break
            time.sleep(PAUSE_S)
            for place, lack in self._look():
                raise ConfigError(f"{place.where} {lack}")
            self._renew()
        if not self.slots:
            raise self._no_room()
        nodes = Counter(place.node for place in self._places.values() if place.is_ready)
        counts = (f"{count} slot{'s' if count > 1 else ''} on {node}" for node, count in nodes.items())
        self._say("", f"Ray gives {', '.join(counts)}")

    def wait(self, timeout_s: float) -> list[Event]:
        """As of any pool. Raises: TlautoError when there was no slot for too long."""
        for place, lack in self._look():
            place.is_given_up = True
            self._say(place.slot, f"{place.where} {lack}; slot {place.slot} is given up")
        self._renew()
        self._grow()
        if self.slots:
            self._had_slot = time.monotonic()
        elif time.monotonic() - self._had_slot > self._patience_s:
            raise self._no_room()
        notes, self._notes = self._notes, []
        return notes or super().wait(timeout_s)

    def kill(self, slot: str) -> str:
        """End the slot's worker now, and its actor too when that does not answer."""
        worker = self._workers.get(slot)
        log_tail = super().kill(slot)
        if worker and isinstance(worker.process, RemoteProcess) and not worker.process.has_ended:
            worker.process.place.end()
        return log_tail

    def close(self, *, grace_s: float = 1.0) -> None:
        """End all workers and actors, and the cluster if it is ours."""
        try:
            super().close(grace_s=grace_s)
            for place in self._places.values():
                place.end()
            self._places.clear()
        finally:
            self._cluster.close()
            Path(self._site.token_file).unlink(missing_ok=True)

    def _start_there(self, slot: Slot, log: Path) -> Process:
        return RemoteProcess(self._places[slot.name], next(self._numbers), slot, log=log, env=self._env)

    def _look(self) -> list[tuple[Place, str]]:
        """Notice which actors came and went; those whose nodes cannot be used, and why."""
        refused = []
        for place in self._places.values():
            was_ready, was_lost = place.is_ready, place.is_told_lost
            if place.is_given_up:
                continue
            if lack := place.look():
                refused.append((place, lack))
            if place.is_lost and place.is_ready and not was_lost:
                place.is_told_lost = True
                self._say(place.slot, f"slot {place.slot} was lost on {place.where}")
            elif place.is_ready and not was_ready and place.is_late:
                self._say(place.slot, f"slot {place.slot} runs on {place.where}")
        return refused

    def _renew(self) -> None:
        """Ask for new actors in place of those that are gone."""
        for name, place in self._places.items():
            # Its worker's end must be told first: a new one would be mistaken for it.
            if place.is_lost and not place.is_given_up and name not in self._workers:
                self._places[name] = Place.ask(name, self._share, self._site, is_late=True)

    def _grow(self) -> None:
        """Ask for as many actors as the cluster has room for by now."""
        now = time.monotonic()
        if self._places and now - self._grown < GROW_S:
            return
        room = self._share.room(self._cluster.nodes())
        wanted = room if self._most is None else min(room, self._most)
        env = environment(self._share.device, "", self._share.threads)
        for index in range(len(self._places), wanted):
            name = f"ray:{index}"
            self._slots[name] = Slot(name, self._share.device, self._share.threads, env)
            self._places[name] = Place.ask(name, self._share, self._site, is_late=bool(self._grown))
        self._grown = now

    def _no_room(self) -> TlautoError:
        return TlautoError(
            f"the Ray cluster has had no room for a worker for {self._patience_s:g} s; add nodes, or wait "
            f"for other jobs to end ('ray status' shows both), and give the same command again"
        )

    def _say(self, slot: str, text: str) -> None:
        self._notes.append(Event(slot, Note(text)))


def _settings() -> dict[str, str]:
    """Settings of the coordinator that its workers share, wherever they are."""
    return {k: v for k, v in os.environ.items() if k.startswith("TLAUTO_") and k != "TLAUTO_THREADS"}
