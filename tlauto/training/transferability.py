"""Transferability scores: how well a frozen backbone's features suit a task, without training on them.

All scores take one row an image and are higher for the better backbone. They compare backbones on the
same images with the same targets; a value says nothing across datasets. `log_me` and `h_score` look
at features (N, D); `nce` and `leep` at what a backbone's own classifier, over Z source classes, says.

Computed in 64 bits whatever the input is: float16 features are converted in blocks, not as a whole.
Class labels may be of any type that sorts; only the classes that occur count. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tlauto.errors import ConfigError

Array = np.ndarray[Any, Any]

_ROWS = 4096  # rows converted to 64 bits at a time
_STEPS = 500  # of the fixed point, at most; near a flat maximum it creeps
_SETTLED = 1e-6  # relative change of a step at which the fixed point is reached
_DECADES = 8  # of alpha / beta on both sides of the features' scale; beyond, the evidence is flat
_EPS = float(np.finfo(np.float64).eps)


def log_me(features: Array, targets: Array) -> float:
    """LogME: the log evidence per image of a Bayesian linear model, its two precisions maximised.

    For each target column y, with weights w ~ N(0, I / alpha) and y ~ N(F w, I / beta):

        L(alpha, beta) = N/2 log beta + D/2 log alpha - N/2 log 2 pi
                         - beta/2 |F m - y|^2 - alpha/2 m'm - 1/2 log |A|
        A = alpha I + beta F'F,  m = beta A^-1 F'y;  LogME = max L / N, mean over the columns.

    Args:
        features: (N, D), not centred and without intercept, as in the paper: a constant column other
            than 0 acts as the intercept, a column of zeros changes nothing. Rotating or scaling all
            features changes nothing either.
        targets: classes (N,) of integers, bools or strings, taken as one-hot columns; values (N,) of
            floats; or several columns (N, K), multi-hot or values. Columns that are constant say
            nothing and are left out. Values of regression are taken as they are: with other units,
            the score shifts.

    Returns: a density's logarithm, any real number. Where targets are explained without a residual,
    alpha / beta ends at 1e-8 of the features' mean squared singular value: with N <= D the evidence
    is flat there, with N > D it would be infinite and the score is merely high. With N <= D or one
    image a class it is the prior that keeps the fit from being perfect, and the score is defined.
    Raises: ConfigError for empty, mismatched or non-finite input, or when all targets are equal.
    Cost: a thin SVD for N <= D, else the eigenvectors of F'F (D x D) and one pass over the rows.
    Source: You et al. 2021, "LogME: Practical Assessment of Pre-trained Models for Transfer Learning"
    (arXiv:2102.11005), algorithm 1; iterated on alpha / beta, of which alone the fixed point depends.
    """
    features = _features(features)
    columns = _columns(_rows(targets, len(features), "targets"))
    origin = np.zeros(features.shape[1])
    squares, axes = _spectrum(features, origin)
    # Of each column, the part along each left singular vector, squared: (K, r).
    along = (_products(columns, features, origin) @ axes) ** 2 / squares
    total = (columns**2).sum(axis=0)  # (K,)
    outside = total - along.sum(axis=1)  # (K,), what no weights can fit
    outside[outside < len(features) * _EPS * total] = 0.0  # rounding
    return float(_max_evidence(squares, along, outside, len(features)).mean())


def h_score(features: Array, classes: Array, *, shrinkage: float | None = None) -> float:
    """H-score: how much of the features' variance, whitened, lies between the classes.

        H = tr(((1 - a) S + a s I)^-1 (1 - a) B)

    with S the covariance of the features, B the covariance of their class means, each image counted,
    s = tr(S) / D, and shrinkage a.

    Args:
        features: (N, D); with D >= N - 1 the shrinkage is what makes the score mean anything.
        classes: (N,) labels. One image a class is allowed; then B = S and the score says nothing.
        shrinkage: in [0, 1]; None estimates it (Ledoit & Wolf 2004). 0 is the original H-score with
            the pseudo-inverse, unchanged by invertible linear maps of the features; with D >= N - 1
            it is usually the largest possible value whatever the features are.

    Returns: from 0 to min(number of classes - 1, D). Constant columns add nothing, but count in D and
    so in the shrinkage; features that are constant altogether score 0.
    Raises: ConfigError for empty, mismatched or non-finite input, a single class, or a shrinkage
    outside [0, 1].
    Source: Bao et al. 2019, "An Information-Theoretic Approach to Transferability in Task Transfer
    Learning" (ICIP); shrunk as by Ibrahim et al. 2021, "Newer is not always better: Rethinking
    transferability metrics" (arXiv:2110.06893); the amount by Ledoit & Wolf 2004, "A well-conditioned
    estimator for large-dimensional covariance matrices", Journal of Multivariate Analysis 88.
    """
    features = _features(features)
    members = _one_hot(_rows(classes, len(features), "classes"))  # (N, K)
    if shrinkage is not None and not 0 <= shrinkage <= 1:
        raise ConfigError(f"the H-score's shrinkage is {shrinkage:g}; give one from 0 to 1")
    number, width = features.shape
    mean = _mean(features)
    squares, axes = _spectrum(features, mean)
    if not len(squares):
        return 0.0
    if shrinkage is None:
        shrinkage = _ledoit_wolf(features, mean, squares)
    sums = _products(members, features, mean) @ axes  # (K, r), of the centred features by class
    between = (sums**2 / members.sum(axis=0)[:, None]).sum(axis=0) / number  # (r,), the diagonal of B
    whole = (1 - shrinkage) * squares / number + shrinkage * squares.sum() / number / width
    return float(((1 - shrinkage) * between / whole).sum())


def nce(source: Array, classes: Array) -> float:
    """Negative conditional entropy of the target classes given the source labels, in nats.

        NCE = -H(Y | Z) = sum over y, z of P(y, z) log(P(y, z) / P(z)),  P by counting images

    Args:
        source: source labels (N,), or probabilities (N, Z) of which each row's largest is its label.
        classes: (N,) target labels. When every image has a source label of its own, or there is one
            image a class and no two share a source label, the score is 0 and says nothing.

    Returns: from -log(number of classes) to 0; a constant source label gives -H(Y), a source column
    that is never the largest changes nothing.
    Raises: ConfigError for empty or mismatched input, a single class, or probabilities below 0 or not
    finite or whose rows do not add up to 1.
    Source: Tran et al. 2019, "Transferability and Hardness of Supervised Classification Tasks"
    (arXiv:1908.08142).
    """
    source = np.atleast_1d(source)
    labels = _probabilities(source).argmax(axis=1) if source.ndim == 2 else source
    members = _one_hot(_rows(classes, len(labels), "classes"))  # (N, K)
    _, codes = np.unique(_rows(labels, len(labels), "source labels"), return_inverse=True)
    joint = np.zeros((codes.max() + 1, members.shape[1]))  # (Z, K), images of each pair
    np.add.at(joint, codes, members)
    given = np.broadcast_to(joint.sum(axis=1, keepdims=True), joint.shape)
    occurs = joint > 0
    # Adding 0 turns a certain answer's -0.0 into 0.0.
    return float((joint[occurs] * np.log(joint[occurs] / given[occurs])).sum() / len(codes)) + 0.0


def leep(source_probabilities: Array, classes: Array) -> float:
    """LEEP: mean log probability of the target classes, read off the source classifier's answers.

        LEEP = 1/N sum over i of log(sum over z of P(y_i | z) p_iz)
        P(y | z) = P(y, z) / P(z),  P(y, z) = 1/N sum over i with y_i = y of p_iz

    Args:
        source_probabilities: p (N, Z), rows that add up to 1 (within 0.01, for float16; they are
            scaled to 1); Z < N or one image a class makes the score optimistic, as of any fit.
        classes: (N,) target labels.

    Returns: from -log(number of classes) to 0, in nats; answers that are the same for all images give
    -H(Y). A source class that is never given any probability changes nothing.
    Raises: ConfigError for empty or mismatched input, a single class, or probabilities below 0 or not
    finite or whose rows do not add up to 1.
    Source: Nguyen et al. 2020, "LEEP: A New Measure to Evaluate Transferability of Learned
    Representations" (arXiv:2002.12462), equation 2.
    """
    p = _probabilities(source_probabilities)  # (N, Z)
    members = _one_hot(_rows(classes, len(p), "classes"))  # (N, K)
    joint = members.T @ p  # (K, Z)
    mass = joint.sum(axis=0)
    given = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    chances = ((members @ given) * p).sum(axis=1)  # (N,)
    return float(np.log(np.minimum(chances, 1.0)).mean()) + 0.0


# --- evidence ---------------------------------------------------------------------------------------


def _max_evidence(squares: Array, along: Array, outside: Array, number: int) -> Array:
    """The largest log evidence per image of each column, (K,), over alpha and beta.

    The paper starts at alpha = beta = 1. The evidence can have two maxima, though, of which that start
    may find the lesser one (seen with N <= D), and it depends on the features' scale. A coarse scan
    over alpha / beta, two points a decade, finds the start here.
    """
    scale = float(squares.mean()) if len(squares) else 1.0
    best, start = np.full(len(along), -np.inf), np.full(len(along), scale)
    for ratio in scale * np.logspace(-_DECADES, _DECADES, 4 * _DECADES + 1):
        value = _evidence(np.full(len(along), ratio), squares, along, outside, number)
        start[value > best] = ratio
        best = np.maximum(best, value)
    found = _fixed_point(start, scale, squares, along, outside, number)
    larger: Array = np.maximum(best, _evidence(found, squares, along, outside, number))
    return larger


def _fixed_point(
    start: Array, scale: float, squares: Array, along: Array, outside: Array, number: int
) -> Array:
    """The ratio alpha / beta of each column, (K,), at which the evidence is stationary.

    One step, from the means m and residuals at the present ratio t:
    gamma = sum of s^2 / (s^2 + t), alpha = gamma / m'm, beta = (N - gamma) / |F m - y|^2.
    """
    least, most = scale * 10.0**-_DECADES, scale * 10.0**_DECADES
    ratio, moving = start.copy(), np.arange(len(along))
    for _ in range(_STEPS if len(squares) else 0):
        now = ratio[moving, None]  # (k, 1)
        shrunk = squares / (squares + now)  # (k, r)
        weights = (along[moving] * shrunk**2 / squares).sum(axis=1)  # m'm
        residual = (along[moving] * (1 - shrunk) ** 2).sum(axis=1) + outside[moving]
        # Adding up the unshrunk parts, as N - gamma would cancel when N <= D.
        spare = number - len(squares) + (now / (squares + now)).sum(axis=1)
        above, below = shrunk.sum(axis=1) * residual, spare * weights
        step = np.divide(above, below, out=np.full(len(now), np.inf), where=below > 0)
        ratio[moving] = np.clip(step, least, most)
        moving = moving[np.abs(ratio[moving] / now[:, 0] - 1) > _SETTLED]
        if not len(moving):
            break
    return ratio


def _evidence(ratio: Array, squares: Array, along: Array, outside: Array, number: int) -> Array:
    """Log evidence per image of each column, (K,), at a ratio alpha / beta and the best beta for it.

    In the basis of the left singular vectors y is N(0, (1 + s^2 / ratio) / beta), independent.
    """
    stretch = 1 + squares / ratio[:, None]  # (K, r)
    noise = ((along / stretch).sum(axis=1) + outside) / number  # 1 / beta
    spread = np.log(stretch).sum(axis=1) / number
    values: Array = -0.5 * (np.log(2 * np.pi * noise) + spread + 1)
    return values


# --- covariance -------------------------------------------------------------------------------------


def _spectrum(features: Array, mean: Array) -> tuple[Array, Array]:
    """Squared singular values (r,) of the features less `mean`, without zeros, and right vectors (D, r)."""
    number, width = features.shape
    if number <= width:
        centred = np.concatenate(list(_blocks(features, mean)))
        _, singular, rows = np.linalg.svd(centred, full_matrices=False)
        squares, axes = singular**2, rows.T
        least = (width * _EPS) ** 2
    else:
        gram = np.zeros((width, width))
        for block in _blocks(features, mean):
            gram += block.T @ block
        squares, axes = np.linalg.eigh(gram)
        least = width * _EPS  # squaring has cost half of the digits
    kept = squares > least * squares.max()
    return squares[kept], axes[:, kept]


def _ledoit_wolf(features: Array, mean: Array, squares: Array) -> float:
    """The shrinkage towards a multiple of the identity with the least expected squared error.

    `squares` are those of the centred features. All norms of the paper are over D, which cancels.
    """
    number, width = features.shape
    size = float((squares**2).sum()) / number**2  # |S|^2
    distance = size - (float(squares.sum()) / number) ** 2 / width  # |S - s I|^2
    fourth = sum(float(((block**2).sum(axis=1) ** 2).sum()) for block in _blocks(features, mean))
    error = (fourth / number - size) / number
    return min(max(error, 0.0) / distance, 1.0) if distance > _EPS * size else 1.0


def _mean(features: Array) -> Array:
    """Mean of each column, (D,); of a constant column exactly its value, so that it centres to 0."""
    first = features[0].astype(np.float64)
    total = sum((block.sum(axis=0) for block in _blocks(features, first)), np.zeros(len(first)))
    mean: Array = first + total / len(features)
    return mean


def _products(columns: Array, features: Array, mean: Array) -> Array:
    """Products of columns (N, K) with the features less `mean`, (K, D)."""
    found = np.zeros((columns.shape[1], features.shape[1]))
    for start, block in zip(range(0, len(features), _ROWS), _blocks(features, mean), strict=True):
        found += columns[start : start + _ROWS].T @ block
    return found


def _blocks(features: Array, mean: Array) -> Iterator[Array]:
    for start in range(0, len(features), _ROWS):
        yield features[start : start + _ROWS].astype(np.float64) - mean


# --- input ------------------------------------------------------------------------------------------


def _features(features: Array) -> Array:
    features = np.asarray(features)
    if features.ndim != 2 or not features.size:
        raise ConfigError(
            f"features must be (images, width) and not empty, but their shape is {features.shape}"
        )
    if features.dtype.kind not in "fiu":
        raise ConfigError(f"features must be real numbers, but their type is {features.dtype}")
    if not np.isfinite(features).all():
        raise ConfigError("the features hold values that are not finite numbers; the backbone is unusable")
    return features


def _rows(values: Array, number: int, what: str) -> Array:
    values = np.asarray(values)
    if not number or not values.ndim or len(values) != number:
        raise ConfigError(f"there are {len(values) if values.ndim else 0} {what} for {number} images")
    if values.ndim > (2 if what == "targets" else 1):
        raise ConfigError(f"{what} must be one row an image, but their shape is {values.shape}")
    return values


def _columns(targets: Array) -> Array:
    """Targets as columns (N, K) of 64-bit floats, without the constant ones."""
    if targets.ndim == 1 and targets.dtype.kind != "f":
        return _one_hot(targets)
    if targets.dtype.kind not in "fiub":
        raise ConfigError(f"columns of targets must be numbers, but their type is {targets.dtype}")
    columns = targets.reshape(len(targets), -1).astype(np.float64)
    if not np.isfinite(columns).all():
        raise ConfigError("the targets hold values that are not finite numbers")
    columns = columns[:, (columns != columns[0]).any(axis=0)]
    if not columns.size:
        raise ConfigError(f"all {len(targets)} targets are equal; a score needs targets that differ")
    return columns


def _one_hot(classes: Array) -> Array:
    """Membership (N, K) of the K classes that occur."""
    labels, codes = np.unique(classes, return_inverse=True)
    if len(labels) < 2:
        raise ConfigError(f"all {len(classes)} images are of one class; a score needs two or more")
    members: Array = np.eye(len(labels))[codes]
    return members


def _probabilities(values: Array) -> Array:
    """Probabilities (N, Z) of 64-bit floats, rows scaled to 1."""
    values = np.asarray(values)
    if values.ndim != 2 or not values.size:
        raise ConfigError(
            f"source probabilities must be (images, source classes) and not empty, "
            f"but their shape is {values.shape}"
        )
    values = values.astype(np.float64)
    sums = values.sum(axis=1, keepdims=True)
    if not np.isfinite(values).all() or (values < 0).any() or (np.abs(sums - 1) > 0.01).any():
        raise ConfigError("source probabilities must not be negative and each row must add up to 1")
    scaled: Array = values / sums
    return scaled
