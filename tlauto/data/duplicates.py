"""Which images are the same: by bytes, by pixels, or to the eye."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from tlauto.data.checks import LOOK_SIDE, TINT_SIDE

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray

# Measured on five photo collections: recompressed (JPEG quality 30), halved, squashed and darkened
# copies correlate above 0.998 and 0.989; the most alike pairs of different objects (fruit on one
# table, 8x8 digits) reach 0.996 and 0.992, but no pair reaches both limits.
_ALIKE = 0.997
_ALIKE_IN_DETAIL = 0.99
_ALIKE_AT_FIRST_GLANCE = 0.98
_SAME_TINT = 0.12
# Grey levels of standard deviation; below it an image is plain and shows nothing to compare.
_LEAST_CONTRAST = 3.0

MOST_IMAGES_TO_TURN = 20_000
"""Beyond this many images, turned and mirrored copies are not looked for (8 times the work)."""

_COARSE = 8
_TOGETHER = 512  # images, or pairs, whose looks are compared at a time


def same_groups(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices that share a key, for keys that occur more than once; falsy keys are passed over."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        if key:
            members[key].append(index)
    return [group for group in members.values() if len(group) > 1]


def joined(size: int, groups: Iterable[Sequence[int]]) -> list[int]:
    """For each of `size` indices the smallest index it is connected to through `groups`."""
    parent = list(range(size))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for group in groups:
        for other in group[1:]:
            first, second = sorted((find(group[0]), find(other)))
            parent[second] = first
    return [find(index) for index in range(size)]


def near_pairs(
    looks: Array, among: Sequence[int] | None = None, *, turned: bool = False
) -> list[tuple[int, int]]:
    """Pairs of images that show the same picture.

    Found are copies that were scaled, recompressed or uniformly lightened and darkened; with
    `turned`, copies that were also rotated by quarter turns or mirrored, and only these. Images that
    are merely alike differ in fine detail, and plain images show nothing that could be the same.
    Takes time with the square of the images (a multiplication by 64 numbers a pair), and of each 256
    bytes besides its look.

    Args:
        looks: (N, 1072) uint8, `checks.check_files`' own; may be mapped.
        among: the images to compare, all by default.

    Returns: places (i < j) in `among`.
    """
    import numpy as np

    rows = np.arange(len(looks)) if among is None else np.asarray(among, dtype=np.int64)
    usable, glances = _glances(looks, rows)
    pairs: set[tuple[int, int]] = set()
    for quarter_turns, mirrored in _turns() if turned else [(0, False)]:
        for one, other in _candidates(glances, _turn(glances, quarter_turns, mirrored)):
            places = usable[one], usable[other]
            (grey, tint), (other_grey, other_tint) = (_unpack(looks[rows[place]]) for place in places)
            turned_other = [_turn(look, quarter_turns, mirrored) for look in (other_grey, other_tint)]
            same = _is_same(grey, turned_other[0], tint, turned_other[1])
            pairs.update(zip(places[0][same].tolist(), places[1][same].tolist(), strict=True))
    return sorted(pairs)


def _turns() -> list[tuple[int, bool]]:
    return [(turns, mirrored) for mirrored in (False, True) for turns in range(4) if turns or mirrored]


def _unpack(looks: Array) -> tuple[Array, Array]:
    """Grey (N, 32, 32) and tint (N, 4, 4, 3), both uint8."""
    grey = looks[:, : LOOK_SIDE**2].reshape(-1, LOOK_SIDE, LOOK_SIDE)
    return grey, looks[:, LOOK_SIDE**2 :].reshape(-1, TINT_SIDE, TINT_SIDE, 3)


def _turn(images: Array, quarter_turns: int, mirrored: bool) -> Array:
    import numpy as np

    turned = np.rot90(images, quarter_turns, axes=(1, 2))
    result: Array = turned[:, :, ::-1] if mirrored else turned
    return result


def _glances(looks: Array, rows: Array) -> tuple[Array, Array]:
    """Places (M,) in `rows` of images that show something, and thumbnails (M, 8, 8) of length 1."""
    import numpy as np

    usable, count = np.empty(len(rows), np.int64), 0
    glances = np.empty((len(rows), _COARSE, _COARSE), np.float32)
    for start in range(0, len(rows), _TOGETHER):
        grey, _ = _unpack(looks[rows[start : start + _TOGETHER]])
        shows = np.flatnonzero(grey.std(axis=(1, 2)) >= _LEAST_CONTRAST)
        part = slice(count, count := count + len(shows))
        usable[part] = start + shows
        glances[part].reshape(len(shows), _COARSE**2)[:] = _unit(_blocks(grey[shows].astype(np.float32)))
    return usable[:count], glances[:count]


def _candidates(first: Array, second: Array) -> Iterator[tuple[Array, Array]]:
    """Batches of places (i, j), i < j, of thumbnails (M, 8, 8) that correlate."""
    import numpy as np

    first, second = (thumbnails.reshape(-1, _COARSE**2) for thumbnails in (first, second))
    step = max(64, 2_000_000 // max(1, len(first)))
    for start in range(0, len(first), step):
        alike = first[start : start + step] @ second[start:].T
        rows, columns = np.nonzero(alike >= _ALIKE_AT_FIRST_GLANCE)
        rows, columns = rows[rows < columns] + start, columns[rows < columns] + start
        for batch in range(0, len(rows), _TOGETHER):
            part = slice(batch, batch + _TOGETHER)
            yield rows[part], columns[part]


def _is_same(first: Array, second: Array, first_tint: Array, second_tint: Array) -> Array:
    """Which of the pairs (N,) agree in shape, in detail and in colour."""
    import numpy as np

    one, two = (a.astype(np.float32) for a in (first, second))
    alike = (_unit(one) * _unit(two)).sum(axis=1)
    in_detail = (_unit(_detail(one)) * _unit(_detail(two))).sum(axis=1)
    # Relative to the image's own brightness, so that exposure does not count.
    tints = [t.reshape(len(t), -1).astype(np.float32) for t in (first_tint, second_tint)]
    off = np.abs(np.subtract(*(t / np.maximum(t.mean(axis=1, keepdims=True), 1) for t in tints))).mean(axis=1)
    is_same: Array = (alike >= _ALIKE) & (in_detail >= _ALIKE_IN_DETAIL) & (off <= _SAME_TINT)
    return is_same


def _blocks(images: Array) -> Array:
    """Means over blocks: (N, 32, 32) to (N, 8, 8)."""
    size = LOOK_SIDE // _COARSE
    means: Array = images.reshape(len(images), _COARSE, size, _COARSE, size).mean(axis=(2, 4))
    return means


def _detail(images: Array) -> Array:
    """What remains of (N, 32, 32) without its coarse shape."""
    import numpy as np

    size = LOOK_SIDE // _COARSE
    detail: Array = images - np.repeat(np.repeat(_blocks(images), size, axis=1), size, axis=2)
    return detail


def _unit(images: Array) -> Array:
    """Rows of zero mean and length 1: their products are correlations."""
    import numpy as np

    rows = images.reshape(len(images), math.prod(images.shape[1:]))
    rows = rows - rows.mean(axis=1, keepdims=True)
    unit: Array = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return unit
