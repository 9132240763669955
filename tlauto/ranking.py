"""What a trial is worth: how trials are ranked, and when one has no hope."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tlauto import metrics
from tlauto.contracts import EpochResult, TrialDone
from tlauto.joined import is_joined
from tlauto.pace import PROBE_STRATEGY
from tlauto.study import TrialRecord


def rank(trial: TrialRecord) -> tuple[float, float]:
    """Sorts trials: by score, then by lower validation loss, since small parts make many ties."""
    score = trial.score if trial.score is not None else float("-inf")
    loss = float(trial.attrs.get("val_loss", math.inf))
    return score, -math.inf if math.isnan(loss) else -loss


SPREAD = 0.03
"""Standard deviation of the gains of trials over the cross-validated one on the same backbone, of a score
that is at most 1; of others, as a share of the score."""

HOPE_EPOCHS = 2
"""Epochs that a trial has to come near the best frozen head on its backbone."""

DIFFERENT = 0.06
"""Share of the images on which two models on one backbone answer differently."""


def estimate(
    done: TrialDone, backbone: str, metric: str, trials: Sequence[TrialRecord], *, val: int
) -> float:
    """What a trial is ranked by: its score, with the luck of a small validation part taken out.

    A cross-validated trial has a score over all images to learn from. Any other is measured on the
    validation part alone, which may be easy or hard; how easy, the best cross-validated trial on the
    same backbone tells, whose score is known on both. The gain over that trial on the same images is
    then added to that trial's score over all: a control variate (Lavenberg & Welch 1981). Few images
    tell little of a gain, and of many trials the luckiest would win: what counts is the gain's posterior
    mean under a normal prior (`SPREAD`), less one posterior standard deviation, as in the rule of one
    standard error (Breiman et al. 1984, section 3.4.3). Without such a trial it is the score on validation.

    Args:
        val: images in the validation part.
    """
    if done.held_out is not None:
        return done.held_out
    reference = _reference(backbone, trials)
    if reference is None:
        return done.score
    known, best = float(reference["held_out"]), metrics.get(metric).best
    believed = val / (val + DIFFERENT / SPREAD**2)
    gain = believed * (done.score - float(reference["val_score"]))
    doubt = SPREAD * math.sqrt(1 - believed) * (1.0 if best == 1.0 else abs(known))
    return min(best, known + gain - doubt)


def is_hopeless(result: EpochResult, backbone: str, trials: Sequence[TrialRecord], *, val: int) -> bool:
    """Whether a trial that trains the backbone is far below the best frozen head after two epochs.

    Far is two standard errors of the difference between two models' scores on the validation part.

    Args:
        val: images in the validation part.
    """
    before = to_beat(backbone, trials)
    if before is None:
        before = max(_frozen_scores(backbone, trials), default=None)  # of many images none is held out
    if result.epoch < HOPE_EPOCHS or before is None:
        return False
    return result.score < before - 2 * math.sqrt(DIFFERENT / val) * max(abs(before), result.score)


def to_beat(backbone: str, trials: Sequence[TrialRecord]) -> float | None:
    """The score on validation of the best cross-validated trial on a backbone; None without one."""
    reference = _reference(backbone, trials)
    return float(reference["val_score"]) if reference else None


def _reference(backbone: str, trials: Sequence[TrialRecord]) -> Mapping[str, Any] | None:
    """What is recorded of the best cross-validated trial on a backbone."""
    known = [t.attrs for t in _alone(backbone, trials) if "held_out" in t.attrs]
    return max(known, key=lambda attrs: float(attrs["held_out"]), default=None)


def _frozen_scores(backbone: str, trials: Sequence[TrialRecord]) -> list[float]:
    """The scores on validation of complete trials with a backbone as it is."""
    frozen = [t for t in _alone(backbone, trials) if t.params.get("strategy") == PROBE_STRATEGY]
    return [float(t.attrs["val_score"]) for t in frozen if t.state == "complete" and "val_score" in t.attrs]


def _alone(backbone: str, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [t for t in trials if t.params.get("backbone") == backbone and not is_joined(t)]


def best_trial(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The best complete trial; the best pruned one when none is complete; None when neither is."""
    for state in ("complete", "pruned"):
        scored = [t for t in trials if t.state == state and t.score is not None]
        if scored:
            return max(scored, key=rank)
    return None
