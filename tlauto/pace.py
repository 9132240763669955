"""What a search can afford in the time it has, from what its trials measured so far."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tlauto.joined import backbones_of
from tlauto.recipe import scale_of
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

PLAIN_COST = 2.0
"""Seconds of a trained network for an image over those of the same backbone's features, which the fastest
engine computes."""

MARGIN = 1.2
"""What is held back for the end over what it should take."""

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


def held_back(
    trials: Sequence[TrialRecord], sizes: Sizes, *, best: int | None, members: int, limit: float
) -> float:
    """Seconds that the end of the search will need: refits, their test, the bundle.

    Args:
        best: number of the best trial so far.
        members: most models that may answer together.
        limit: seconds of the whole search.
    """
    refitted = [t for t in trials if t.number == best or t.attrs.get("purpose") == "default"]
    if not refitted:
        return 0.0
    refits = sum(refit_seconds(t, trials, sizes) for t in refitted if t.score is not None)
    # Test features of further members' backbones, at most: dear ones are no members.
    read = {backbone for t in refitted for backbone in _read_by(t)}
    others = {
        backbone: _test_seconds([backbone], trials, sizes)
        for t in trials if t.score is not None for backbone in _read_by(t) if backbone not in read
    }  # fmt: skip
    dearest = sorted((s for s in others.values() if s <= MEMBER_SHARE * limit), reverse=True)
    return MARGIN * (refits + sum(dearest[: members - 1])) + WORKER_START_S


def refit_seconds(trial: TrialRecord, trials: Sequence[TrialRecord], sizes: Sizes) -> float:
    """Seconds that the refit of a trial and its test will take.

    A trial that trained the backbone repeats its epochs on more images and runs once over the test
    part. A frozen one only needs the features of the test part, and its head.
    """
    seconds, epochs = float(trial.attrs.get("seconds", 0.0)), int(trial.attrs.get("epochs", 1))
    passes = 2 if trial.params.get("probe.mirror") else 1
    test = passes * _test_seconds(_read_by(trial), trials, sizes)
    if trial.params.get("strategy") == PROBE_STRATEGY:
        head = seconds * HEAD_SHARE if _computed_features(trial, trials) else seconds
        return min(head, 10.0) + test
    best = int(trial.attrs.get("best_epoch", epochs))
    learned = sizes.train + sizes.val
    return seconds / max(1, epochs) * best * learned / sizes.train + PLAIN_COST * test


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
    backbone: str, trials: Sequence[TrialRecord], sizes: Sizes, *, left: float, epochs: int, images: int,
    scale: float = 1.0,
) -> tuple[int, int] | None:  # fmt: skip
    """Epochs and images an epoch that a fine-tuning can have, at most those given; None for too few.

    Images are a power of two when they are cut, so that trials share cached activations.

    Args:
        scale: of its images, over those that the backbone was pretrained on.
    """
    probe = feature_seconds(backbone, trials, sizes, scale=scale)
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


def feature_seconds(
    backbone: str, trials: Sequence[TrialRecord], sizes: Sizes, *, scale: float = 1.0
) -> float | None:
    """Seconds to compute one image's features: of the first frozen trial, which did; else the median.

    As it measured, where there were enough images for that; else all its seconds by its images. Of images
    at another scale than was measured, in proportion to their pixels.
    """
    firsts: dict[tuple[str, float], float] = {}
    for trial in trials:
        if trial.params.get("strategy") == PROBE_STRATEGY and "seconds" in trial.attrs:
            whole = float(trial.attrs["seconds"]) / (sizes.train + sizes.val)
            each = float(trial.attrs.get("feature_seconds", whole))
            firsts.setdefault((str(trial.params.get("backbone")), scale_of(trial.params)), each)
    if not firsts or (backbone, scale) in firsts:
        return firsts.get((backbone, scale))
    plain: dict[str, float] = {}
    for (one, measured), each in firsts.items():
        plain.setdefault(one, each / measured**2)
    return plain.get(backbone, statistics.median(plain.values())) * scale**2


def _computed_features(trial: TrialRecord, trials: Sequence[TrialRecord]) -> bool:
    """Whether a frozen trial is the first on a backbone; those after it find its features in the cache."""

    def read(one: TrialRecord) -> set[tuple[object, ...]]:
        how = one.params.get("strategy"), one.params.get("probe.mirror")
        return {(*backbone, *how) for backbone in _read_by(one)}

    before = [read(t) for t in trials if t.number < trial.number]
    return not read(trial) <= set[tuple[object, ...]]().union(*before)


def _step_cost(trials: Sequence[TrialRecord], sizes: Sizes) -> float:
    """Seconds to learn from an image over seconds to compute its features, as measured."""
    ratios = []
    for trial in trials:
        if "image_seconds" in trial.attrs:
            scale = scale_of(trial.params)
            features = feature_seconds(str(trial.params.get("backbone")), trials, sizes, scale=scale)
            if features:
                ratios.append(float(trial.attrs["image_seconds"]) / features)
    return statistics.median(ratios) if ratios else STEP_COST


def _read_by(trial: TrialRecord) -> list[tuple[str, float]]:
    """The backbones that a trial reads, each with the scale of its images."""
    return [(backbone, scale_of(trial.params)) for backbone in backbones_of(trial)]


def _test_seconds(
    backbones: Iterable[tuple[str, float]], trials: Sequence[TrialRecord], sizes: Sizes
) -> float:
    """Seconds to compute the features of the test part, of each of the backbones at its scale."""
    each = (feature_seconds(backbone, trials, sizes, scale=scale) for backbone, scale in backbones)
    return sum(sizes.test * (seconds or 0.0) for seconds in each)
