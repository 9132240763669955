"""Whether there is memory for a trial: pure functions of what trials like it took before.

A trial that learns takes memory for each image that the network has at once, and for itself: its bytes
rise with the images at once, about along a line. So what some numbers of images took says something of
others, and without any measurement nothing is said and nothing refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from tlauto.caches import format_size
from tlauto.contracts import TrialSpec
from tlauto.memory import CONTEXT
from tlauto.recipe import EVAL_BATCH, FINETUNE_SPACE, SCALE, scale_of
from tlauto.space import Scalar
from tlauto.study import TrialRecord

SHARE = 0.9
"""Part of a GPU's memory that trials side by side may take: the rest is lost between their blocks."""

FROZEN = 4 * 2**30
"""Such bytes where images are of the backbone's own size: at most 1 GiB of features, twice while they are
scaled, and a forward pass of 64 images when they are computed."""

ATTRIBUTE = "memory"
"""Under which a trial keeps what it took (`Took`)."""

_SHAPING = (
    "freeze.", "head.", "optim.name", "finetune.train_mode", "probe.solver", "probe.features", "probe.mirror",
    "probe.joined", "probe.beside",
)  # fmt: skip


@dataclass(frozen=True)
class Took:
    """What a trial took.

    Attributes:
        kind: of trials that take the same (`kind_of`).
        at_once: images that the network took at once.
        fits: whether there was enough.
        bytes: at most, of its device; on a CPU, what its process held. What it asked for last when it did
            not fit. None when nobody said.
        total: bytes of memory of the device; None when nobody said.
    """

    kind: str
    at_once: int
    fits: bool
    bytes: int | None
    total: int | None

    def to_json(self) -> dict[str, object]:
        """As it is kept with its trial."""
        return asdict(self)


class Bounds(NamedTuple):
    """Bytes between which a trial's need lies."""

    low: float
    high: float

    @property
    def is_exact(self) -> bool:
        """Whether the need is known."""
        return self.low == self.high


@dataclass(frozen=True)
class Verdict:
    """What is expected of a trial.

    Attributes:
        at_once: most images at once with which it is not known to fail; None when it would with one.
        bounds: of its bytes then; None when nothing is known.
    """

    at_once: int | None
    bounds: Bounds | None = None


def kind_of(spec: TrialSpec) -> str:
    """Names the trials that take as much memory as this one, if they have as many images at once."""
    shaping: dict[str, Scalar] = {
        name: value
        for name, value in spec.params.items()
        if name.startswith(_SHAPING) and not isinstance(value, float)
    }
    if (scale := scale_of(spec.params)) != 1.0:
        shaping[SCALE] = scale
    own = (spec.backbone, spec.strategy, spec.head, *(f"{name}={shaping[name]}" for name in sorted(shaping)))
    return " ".join(own)


def images_at_once(spec: TrialSpec, *, trains: bool) -> int:
    """Images that a trial's network takes at once; `trains` says whether it trains the backbone."""
    if spec.micro_batch:
        return spec.micro_batch
    if not trains:
        return EVAL_BATCH
    size = spec.params.get("finetune.batch_size", FINETUNE_SPACE["batch_size"].default)
    assert isinstance(size, (int, float))
    return int(size)


def frozen_bytes(spec: TrialSpec) -> int:
    """Bytes of a GPU that a trial on cached features is taken to need until one like it was measured."""
    return round(FROZEN * scale_of(spec.params) ** 2)


def taken(trials: Sequence[TrialRecord], kind: str) -> list[Took]:
    """What trials of a kind took, as recorded."""
    found = [known for t in trials if isinstance(known := t.attrs.get(ATTRIBUTE), Mapping)]
    return [Took(**known) for known in found if known["kind"] == kind]


def judge(took: Sequence[Took], at_once: int, capacity: int | None) -> Verdict:
    """With how many images at once, at most `at_once`, a trial may start.

    What did not fit where there was less memory may fit here.

    Args:
        took: what trials of its kind took.
        capacity: bytes that there are for a trial that runs alone; None when nobody says.
    """
    failed = _least_that_failed(took, capacity)
    for count in _halvings(at_once):
        bounds = need(took, count)
        is_too_much = bounds is not None and capacity is not None and bounds.low > capacity
        if not is_too_much and (failed is None or count < failed):
            return Verdict(count, bounds)
    return Verdict(None, need(took, 1))


def _least_that_failed(took: Sequence[Took], capacity: int | None) -> int | None:
    if capacity is None:
        return None
    worked = max((t.at_once for t in took if t.fits), default=0)
    failed = [t for t in took if not t.fits and t.at_once > worked]
    return min((t.at_once for t in failed if t.total is not None and capacity <= t.total), default=None)


def need(took: Sequence[Took], at_once: int) -> Bounds | None:
    """Bounds of the bytes of a trial with so many images at once; None when nothing was measured.

    As many or more images took enough. Beyond the most that were measured, two numbers of images give a
    line; one says that it is no less, and no more than in proportion.
    """
    known: dict[int, int] = {}
    for t in took:
        if t.fits and t.bytes is not None:
            known[t.at_once] = max(known.get(t.at_once, 0), t.bytes)
    above, below = sorted(n for n in known if n >= at_once), sorted(n for n in known if n < at_once)
    if above:
        return Bounds(known[above[0]], known[above[0]])
    if not below:
        return None
    most = below[-1]
    low, high = known[most], known[most] * at_once / most
    if len(below) == 1:
        return Bounds(low, high)
    slope = max(0.0, (known[most] - known[below[-2]]) / (most - below[-2]))
    line = min(high, known[most] + slope * (at_once - most))
    return Bounds(line, line)


def room_beside(beside: Sequence[float | None], total: int | None, *, idle: int = 0) -> float | None:
    """Bytes of a GPU that are left beside the trials that run there; None when nobody can say.

    Args:
        beside: bytes of those that run there.
        total: of the GPU's memory, None before a worker has told.
        idle: other processes that have been there and wait.
    """
    known = [each for each in beside if each is not None]
    if total is None or len(known) < len(beside):
        return None
    return max(0.0, SHARE * total - sum(known) - idle * CONTEXT)


def refusal(verdict: Verdict, capacity: int | None, device: str) -> str:
    """The sentence on a trial that does not start; `verdict` says that it would not fit."""
    why = f"it was not started: even with 1 image at a time it needs more memory than {device} has"
    if verdict.bounds and capacity:
        why += f" ({format_size(verdict.bounds.low)} of {format_size(capacity)})"
    return f"{why}, as was measured; a smaller backbone needs less"


def _halvings(count: int) -> Iterator[int]:
    """The number, half of it, and so on to 1."""
    yield count
    while count > 1:
        count = -(-count // 2)
        yield count
