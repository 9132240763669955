"""What the finished searches of a workspace found. Reads its database and nothing else, and sends nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from tlauto import metrics
from tlauto.config import PRESETS, SearchConfig
from tlauto.errors import DataError, TlautoError
from tlauto.ranking import DIFFERENT, best_trial
from tlauto.schedule import probe_scores
from tlauto.store import Store
from tlauto.study import TrialRecord, trial_reader, versioned
from tlauto.warm import Earlier, Past, Profile

MOST = 20
"""Earlier datasets that a search remembers: those whose profiles are the most similar."""

CONTESTS = 3
"""Earlier datasets that one backbone must have won, and backbones probed for a win to say something."""

GREY = frozenset({"1", "L", "LA", "La", "I", "F"})
"""Pillow's modes of greyscale images, besides those that begin with `I;16`."""


def profile_of(task: str, report: Mapping[str, Any]) -> Profile:
    """What a dataset is like, by its doctor's report as JSON; raises DataError when that is unusable."""
    try:
        modes = {str(mode): int(count) for mode, count in report["modes"].items()}
        grey = sum(count for mode, count in modes.items() if mode in GREY or mode.startswith("I;16"))
        found = Profile(
            task=task,
            images=int(report["images"]),
            classes=len(report["classes"]) or 1,
            imbalance=float(report["imbalance"] or 1.0),
            side=float(report["sides"]["median"]),
            grey=grey / sum(modes.values()),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"its report on the images cannot be read ({error!r})") from None
    if not all(0 < n < math.inf for n in (found.images, found.imbalance, found.side)):
        raise DataError("its report on the images holds impossible figures")
    return found


def read_past(
    store: Store, config: SearchConfig, *, task: str, fingerprint: str, report: Mapping[str, Any]
) -> tuple[Past, list[str]]:
    """What a new search may learn from, and a sentence on each study that could not be read.

    Finished searches of the same task, pretrained like this one: of each dataset the newest, which had
    the others to learn from. The same images under another seed are left out: what was validated on
    there may be the test part here.

    Args:
        report: the doctor's on this dataset, as JSON.
    """
    profile = profile_of(task, report)
    notes: list[str] = []
    candidates: dict[str, tuple[dict[str, Any], Profile]] = {}
    for row in store.finished():
        try:
            if row["fingerprint"] not in candidates and _fits(row, config, task, fingerprint):
                candidates[row["fingerprint"]] = row, profile_of(task, json.loads(row["report"]))
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            notes.append(_left_out(row["study"], error))
    nearest = sorted(candidates.items(), key=lambda c: (c[0] != fingerprint, profile.distance(c[1][1])))
    earlier = []
    with trial_reader(store.url) as read:
        for _, (row, looks) in nearest[:MOST]:
            try:
                found = _earlier(row, looks, read)
            except (KeyError, TypeError, ValueError, AttributeError, TlautoError) as error:
                notes.append(_left_out(row["study"], error))
            else:
                earlier += [found] if found else []
    return Past(fingerprint, profile, tuple(earlier)), notes


def _fits(row: Mapping[str, Any], config: SearchConfig, task: str, fingerprint: str) -> bool:
    theirs, plan = json.loads(row["config"]), json.loads(row["plan"])
    is_split_alike = row["fingerprint"] != fingerprint or theirs["seed"] == config.seed
    is_pretrained_alike: bool = theirs["pretrained"] == config.pretrained
    return bool(plan["task"] == task) and is_pretrained_alike and is_split_alike


def _left_out(study: str, error: Exception) -> str:
    why = str(error) if isinstance(error, TlautoError) else f"its record is damaged ({error!r})"
    return f"nothing is learned from study '{study}': {why}"


def _earlier(
    row: Mapping[str, Any], profile: Profile, read: Callable[[str], list[TrialRecord]]
) -> Earlier | None:
    trials = read(versioned(row["study"], row["version"]))
    best, probes = best_trial(trials), probe_scores(trials)
    if best is None or best.score is None or not {"backbone", "strategy", "head"} <= set(best.params):
        return None
    theirs = json.loads(row["config"])
    fixed = {**PRESETS[theirs["preset"]].fixed, **theirs["params"]}  # a study records what it sampled
    perfect = metrics.get(json.loads(row["plan"])["metric"]).best
    before = max(probes.values(), default=best.score)
    return Earlier(
        study=row["study"],
        fingerprint=row["fingerprint"],
        profile=profile,
        probes=probes,
        params={**fixed, **best.params},
        gain=max(0.0, (best.score - before) / (perfect - before)) if perfect > before else 0.0,
    )


def collapsed(past: Past, probes: Mapping[str, float]) -> str | None:
    """The backbone that ranks first here and on every earlier dataset though others came near, or None.

    Then the ranking may follow the backbones and not the images, as transferability scores are known to
    do. Near is within two standard errors of the difference between two models, on most datasets; one
    that is far ahead wherever it goes is simply the best. Where several share the first place, none has
    won.
    """
    others = [e for e in past.earlier if e.fingerprint != past.fingerprint and len(e.probes) >= CONTESTS]
    if len(others) < CONTESTS or len(probes) < CONTESTS:
        return None
    contests = [(past.profile.images, probes), *((e.profile.images, e.probes) for e in others)]
    first = {name for _, scores in contests for name in scores if scores[name] == max(scores.values())}
    near = sum(_is_near(images, scores) for images, scores in contests)
    return first.pop() if len(first) == 1 and near > len(contests) / 2 else None


def _is_near(images: int, scores: Mapping[str, float]) -> bool:
    top, second = sorted(scores.values(), reverse=True)[:2]
    return top - second <= 2 * math.sqrt(DIFFERENT / images) * max(abs(top), abs(second))
