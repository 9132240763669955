"""The training recipe's own search space: optimizer, schedule, augmentation, batch size.

Plain data, so that the coordinator can sample it without torch; `training` consumes it.
"""

from __future__ import annotations

from collections.abc import Mapping

from tlauto.space import Choice, Float, Int, Scalar, Space, number

EVAL_BATCH = 64
"""Images that a network takes at once where it does not learn, unless memory was short."""

PROBE_EPOCHS = 150
"""Epochs of a head on cached features, unless it stops early."""

REFIT_PROBE_EPOCHS = 30
"""Least epochs of its refit, which cost nothing."""

OPTIMIZERS = ("adamw", "adam", "sgd")
AUGMENT_LEVELS = ("none", "light", "medium", "strong")

# Head learning rates. Features are standardised before the head, so one range serves all backbones.
OPTIMIZER_SPACES: dict[str, Space] = {
    "adamw": {"lr": Float(1e-4, 3e-2, default=1e-3, log=True),
              "weight_decay": Float(1e-4, 1.0, default=1e-2, log=True)},
    "adam": {"lr": Float(1e-4, 3e-2, default=1e-3, log=True),
             "weight_decay": Float(1e-6, 1e-2, default=1e-5, log=True)},
    "sgd": {"lr": Float(1e-3, 0.3, default=1e-2, log=True),
            "weight_decay": Float(1e-6, 1e-2, default=1e-4, log=True),
            "momentum": Float(0.8, 0.99, default=0.9)},
}  # fmt: skip
"""Parameters `optim.<name>.*`, sampled only when `optim.name` is that optimizer."""

OPTIM_SPACE: Space = {"name": Choice(OPTIMIZERS, "adamw"), "warmup": Float(0.0, 0.3, default=0.1)}
"""Parameters `optim.*` of every trial; `warmup` is the fraction of all steps, then cosine to 0."""

FINETUNE_SPACE: Space = {
    "backbone_lr": Float(0.01, 1.0, default=0.1, log=True),
    "batch_size": Choice((8, 16, 32), 16),
    "train_mode": Choice((False, True), False),
}
"""Parameters `finetune.*` of trials that train the backbone.

`backbone_lr` multiplies `lr`. `train_mode` runs the learning part of the backbone as in pretraining:
BatchNorm takes the batch's statistics and moves its running ones, dropout and stochastic depth act.
Without it BatchNorm keeps the pretrained statistics while its scale and shift learn, which a few
hundred images and a head that was fitted beforehand (LP-FT) call for.
"""

AUGMENT_SPACE: Space = {"level": Choice(AUGMENT_LEVELS, "light")}
"""Parameters `augment.*` of trials that train the backbone (frozen trials read cached features)."""

SOLVERS = ("path", "lbfgs", "minibatch")

LINEAR_SPACE: Space = {"solver": Choice(SOLVERS, "path")}
"""Parameters `probe.*` of linear heads on cached features, which have one optimum.

`path` finds it for a path of L2 penalties, on the features of one and of all stages, and takes the best
by cross-validation; `lbfgs` finds it
for the penalty `probe.l2`; `minibatch` trains it like any other head, with an optimizer and epochs.
"""

L2_SPACE: Space = {"l2": Float(1e-6, 10.0, default=1e-2, log=True)}
"""Parameters `probe.*` of the solver `lbfgs`: half of |W|² times this is added to the mean loss."""

FEATURES = ("pooled", "levels", "grid")

FEATURES_SPACE: Space = {"features": Choice(FEATURES, "pooled")}
"""Parameters `probe.*` of trials on cached features whose head reads pooled features.

`pooled` are those of the last stage; `levels` adds the mean of what every stage hands to the next, and
`grid` its mean over each quarter of the image, where the backbone offers them. The solver `path` needs
no such parameter: it tries all three.
"""

MIRROR_SPACE: Space = {"mirror": Choice((False, True), False)}
"""Parameters `probe.*` of all trials on cached features.

`mirror` reads the mean of the features of an image and of its mirror image, in training and in use. It
helps where left and right mean the same and takes a second forward pass; cross-validation shows which.
"""

SCALE = "image.scale"
SCALES = (1.0, 1.4)

IMAGE_SPACE: Space = {"scale": Choice(SCALES, 1.0)}
"""Parameters `image.*` of trials on backbones that take images of other sizes than their own.

`scale` multiplies the side of the images that the backbone sees, up to a multiple of 32 pixels: 224 become
320. It takes about twice the time and memory, and helps where images are larger than what a backbone was
pretrained on.
"""

MOST_JOINED = 3

BESIDE = "probe.beside"
"""Parameter that names the further backbones that a head reads, their ids with spaces between.

It is never sampled: which ones are best follows from the probes when a trial is specified.
"""

PROBE_SPACE: Space = {"batch_size": Int(16, 256, default=64, log=True)}
"""Parameters `probe.*` of other trials on cached features."""


def joined_space(backbones: int = MOST_JOINED) -> Space:
    """Parameters `probe.*` of linear heads on cached features that are solved.

    `joined` is how many backbones the head reads side by side: its own and the best others.

    Args:
        backbones: that are searched; 0 where nobody knows yet. With one there is nothing to join.
    """
    most = min(backbones or MOST_JOINED, MOST_JOINED)
    return {"joined": Choice(tuple(range(1, most + 1)), 1)} if most > 1 else {}


def scale_of(params: Mapping[str, Scalar]) -> float:
    """By how much the images of a trial with these parameters are larger than its backbone's own size."""
    return number(params.get(SCALE, 1.0))


def beside(params: Mapping[str, Scalar]) -> tuple[str, ...]:
    """Ids of the further backbones that the head of a trial with these parameters reads."""
    return tuple(str(params.get(BESIDE, "")).split())


def refit_epochs(epochs: int, best: int) -> int:
    """Epochs of the refit of a trial that was to have `epochs` and was best after `best`.

    The schedule is squeezed into them. A head on cached features gets at least `REFIT_PROBE_EPOCHS`: a
    9-epoch refit of ten sign classes lost a point against a 30-epoch one.
    """
    return max(best, REFIT_PROBE_EPOCHS if epochs == PROBE_EPOCHS else 1)
