"""What a search can afford in the time it has, from what its trials measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tlauto.joined import backbones_of
from tlauto.study import TrialRecord

PROBE_STRATEGY = "feature_extraction"

SCREEN_SHARE = 0.4
"""Part of the time that screening may take before the search goes on with what it knows."""

FIRST_PROBES = 3
"""Backbones that are screened however little time there is."""

TRIAL_SHARE = 0.2
"""Part of the time left that one fine-tuning may take: several can then be compared."""

STEP_COST = 6.0
"""Seconds to learn from an image over seconds to compute its features, until a trial has shown it."""

FEWEST_IMAGES = 64
FEWEST_EPOCHS = 2

WORKER_START_S = 12.0
"""For a worker that had to be killed at the end and starts again for the refit."""

HEAD_SHARE = 0.2
"""Part of the seconds of a backbone's first frozen trial that its head took; the features took the rest."""

MEMBER_SHARE = 0.05
"""Part of the whole time that the refit of one further member of an ensemble may take."""


class Sizes(NamedTuple):
    """Images in each part of the split."""

    train: int
    val: int
    test: int


@dataclass(frozen=True)
class Begun:
    """Where a version of a study began: with so many trials and active seconds, and these new backbones."""

    trials: int = 0
    seconds: float = 0.0
    added: tuple[str, ...] = ()


def held_back(trials: Sequence[TrialRecord], sizes: Sizes, *, best: int | None, members: int) -> float:
    """Seconds that the end of the search will need: refits, their test, the bundle.

    Args:
        best: number of the best trial so far.
        members: most models that may answer together.
    """
    refitted = [t for t in trials if t.number == best or t.attrs.get("purpose") == "default"]
    refits = sum(refit_seconds(t, trials, sizes) for t in refitted if t.score is not None)
    # Test features of further members' backbones, at most.
    others = (members - 1) * max((_test_seconds(t, trials, sizes) for t in trials), default=0.0)
    return 1.2 * refits + min(others, 0.5 * refits + 10) + WORKER_START_S if refitted else 0.0


def refit_seconds(trial: TrialRecord, trials: Sequence[TrialRecord], sizes: Sizes) -> float:
    """Seconds that the refit of a trial and its test will take.

    A trial that trained the backbone repeats its epochs on more images and runs once over the test
    part, which is reckoned as one more epoch. A frozen one only needs the features of the test part.
    """
    seconds, epochs = float(trial.attrs.get("seconds", 0.0)), int(trial.attrs.get("epochs", 1))
    if trial.params.get("strategy") == PROBE_STRATEGY:
        head = seconds * HEAD_SHARE if _computed_features(trial, trials) else seconds
        return min(head, 10.0) + _test_seconds(trial, trials, sizes)
    best = int(trial.attrs.get("best_epoch", epochs))
    learned = sizes.train + sizes.val
    return seconds / max(1, epochs) * (best * learned / sizes.train + 1)


def seconds_a_trial(trials: Sequence[TrialRecord], slots: int) -> float | None:
    """Seconds from the end of one trial to that of the next, probes left aside; None before the first."""
    times = [
        float(t.attrs["seconds"]) for t in trials if t.counts and not _is_probe(t) and "seconds" in t.attrs
    ]
    return sum(times) / len(times) / slots if times else None


def next_to_screen(
    screened: Sequence[str], trials: Sequence[TrialRecord], begun: Begun, *, spent: float,
    limit: float | None, most: int | None,
) -> str | None:  # fmt: skip
    """The next backbone to screen, when there is one and time and trials for it.

    With a limit of trials alone the study begins with its probes, so that only a later version has any left.

    Args:
        screened: backbones in their order; what a later version added goes before the others.
        spent: active seconds of the study so far; limit: of all; most: trials of all.
    """
    seen, since = _probed(trials), trials[begun.trials :]
    rest = [backbone for backbone in screened if backbone not in seen]
    rest.sort(key=lambda backbone: backbone not in begun.added)
    if not rest or (limit is None and not begun.trials):
        return None
    if most is not None:
        room = most - sum(t.counts for t in trials[: begun.trials])
        if len(_probed(since)) >= max(bool(begun.trials), room // 2):
            return None
    probes = [float(t.attrs["seconds"]) for t in since if _is_probe(t) and "seconds" in t.attrs]
    if limit is None or len(probes) < FIRST_PROBES:
        return rest[0]
    share = SCREEN_SHARE * (limit - begun.seconds)
    return rest[0] if spent - begun.seconds + statistics.median(probes) <= share else None


def _probed(trials: Sequence[TrialRecord]) -> set[str]:
    return {str(t.params["backbone"]) for t in trials if _is_probe(t) and t.params}


def affordable_epochs(
    backbone: str, trials: Sequence[TrialRecord], sizes: Sizes, *, left: float, epochs: int, images: int
) -> tuple[int, int] | None:
    """Epochs and images an epoch that a fine-tuning can have, at most those given; None for too few.

    Images are a power of two when they are cut, so that trials share cached activations.
    """
    probe = feature_seconds(backbone, trials, sizes)
    if probe is None:
        return epochs, images
    cost = probe * _step_cost(trials, sizes)
    total = TRIAL_SHARE * left / cost if cost > 0 else float("inf")
    if total >= epochs * images:
        return epochs, images
    size = images
    while size > FEWEST_IMAGES and total < epochs * size:
        size = 2 ** ((size - 1).bit_length() - 1)
    size = max(min(FEWEST_IMAGES, images), size)
    count = min(epochs, int(total / size))
    return (count, size) if count >= FEWEST_EPOCHS else None


def _is_probe(trial: TrialRecord) -> bool:
    return trial.attrs.get("purpose") == "probe"


def feature_seconds(backbone: str, trials: Sequence[TrialRecord], sizes: Sizes) -> float | None:
    """Seconds to compute one image's features: of the first frozen trial, which did; else the median."""
    firsts: dict[str, float] = {}
    for trial in trials:
        if trial.params.get("strategy") == PROBE_STRATEGY and "seconds" in trial.attrs:
            firsts.setdefault(str(trial.params.get("backbone")), float(trial.attrs["seconds"]))
    if not firsts:
        return None
    return firsts.get(backbone, statistics.median(firsts.values())) / (sizes.train + sizes.val)


def _computed_features(trial: TrialRecord, trials: Sequence[TrialRecord]) -> bool:
    """Whether a frozen trial is the first on a backbone; those after it find its features in the cache."""

    def read(one: TrialRecord) -> set[tuple[object, ...]]:
        how = one.params.get("strategy"), one.params.get("probe.mirror")
        return {(backbone, *how) for backbone in backbones_of(one)}

    before = [read(t) for t in trials if t.number < trial.number]
    return not read(trial) <= set[tuple[object, ...]]().union(*before)


def _step_cost(trials: Sequence[TrialRecord], sizes: Sizes) -> float:
    """Seconds to learn from an image over seconds to compute its features, as measured."""
    ratios = []
    for trial in trials:
        if "image_seconds" in trial.attrs:
            features = feature_seconds(str(trial.params.get("backbone")), trials, sizes)
            if features:
                ratios.append(float(trial.attrs["image_seconds"]) / features)
    return statistics.median(ratios) if ratios else STEP_COST


def _test_seconds(trial: TrialRecord, trials: Sequence[TrialRecord], sizes: Sizes) -> float:
    features = sum(feature_seconds(each, trials, sizes) or 0.0 for each in backbones_of(trial))
    passes = 2 if trial.params.get("probe.mirror") else 1
    return features * sizes.test * passes
