"""What screening found in a study: the backbones as ranked, what each cost, and which went on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tlauto.history import collapsed
from tlauto.ranking import rank
from tlauto.schedule import kept_backbones, probe_scores
from tlauto.study import TrialRecord
from tlauto.warm import Past


@dataclass(frozen=True)
class Screened:
    """A backbone whose probe is complete.

    Attributes:
        score: of its linear probe.
        seconds: of that trial: loading it, its features unless they were cached, and the probe.
        goes_on: whether the sampler may propose it.
    """

    backbone: str
    score: float
    seconds: float
    goes_on: bool


@dataclass(frozen=True)
class Screening:
    """How a study's backbones were ranked, and what earlier studies had to do with it.

    Attributes:
        backbones: best first.
        learned_from: earlier studies of the workspace that this one could learn from.
        same_winner: the backbone that is first here and was on all of them; see `history.collapsed`.
    """

    backbones: tuple[Screened, ...]
    learned_from: tuple[str, ...]
    same_winner: str | None


def screening(plan: Mapping[str, Any], trials: Sequence[TrialRecord], *, seed: int) -> Screening:
    """The screening of a study with this recorded plan and this seed, as far as its trials are."""
    scores, kept = probe_scores(trials), kept_backbones(plan["backbones"], trials, seed=seed)
    probes = [t for t in trials if t.attrs.get("purpose") == "probe" and t.state == "complete"]
    rows = []
    for trial in sorted(probes, key=rank, reverse=True):
        name = str(trial.params["backbone"])
        rows.append(Screened(name, scores[name], float(trial.attrs.get("seconds", 0.0)), name in kept))
    past = Past.from_json(plan["past"]) if plan.get("past") else None
    learned_from = tuple(earlier.study for earlier in past.earlier) if past else ()
    return Screening(tuple(rows), learned_from, collapsed(past, scores) if past else None)
