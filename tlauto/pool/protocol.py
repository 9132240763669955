"""What coordinator and worker say to each other: one JSON object a line, `type` names the dataclass."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tlauto.contracts import (
    BackboneInfo,
    EpochResult,
    TrialDone,
    TrialFailed,
    TrialSpec,
    WeightsOptions,
    WeightsStatus,
    spec_from_json,
)

# --- to the worker --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preflight:
    """Expand backbone globs, check their weights, build what is at hand.

    Attributes:
        patterns: globs over `provider:name`; empty means every shortlist and the weights folder.
        limit: most candidates wanted, best prior first; explicit patterns are not limited.
        providers: without patterns, whose shortlists; empty means all.
    """

    patterns: tuple[str, ...]
    weights: WeightsOptions
    limit: int
    providers: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunTrial:
    """Run a trial; the worker sends `EpochResult`s and waits for an `Answer` to each."""

    spec: TrialSpec


@dataclass(frozen=True)
class RunTogether:
    """Run trials on cached features whose heads are solved side by side; the worker says `TogetherDone`.

    When one of them fails, it says `JobFailed`: who fails is seen when each runs by itself.
    """

    specs: tuple[TrialSpec, ...]


@dataclass(frozen=True)
class TryStep:
    """Try one step of a trial that trains the backbone, with so many images at once.

    With fewer if need be, but not when it may take `most` bytes because others run on its device.
    """

    spec: TrialSpec
    at_once: int
    most: int | None = None


@dataclass(frozen=True)
class WriteBundle:
    """Write a finished trial as a model bundle.

    Attributes:
        done: its metrics are those of all that answers together, measured on `evaluated_on`.
        members: folders of further bundles that answer with it, each with its weight.
        weight: its own.
        alone: its own metrics when there are members.
        beside: the further backbones that the trial reads.
    """

    spec: TrialSpec
    done: TrialDone
    info: BackboneInfo
    folder: str
    evaluated_on: str
    comparison: Mapping[str, Any] | None = None
    members: tuple[tuple[str, float], ...] = ()
    weight: float = 1.0
    alone: Mapping[str, Mapping[str, float]] | None = None
    beside: tuple[BackboneInfo, ...] = ()


@dataclass(frozen=True)
class Answer:
    """After an `EpochResult`: go on or stop here."""

    go_on: bool


@dataclass(frozen=True)
class Stop:
    """End the process."""


# --- from the worker --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    """The worker is up."""

    pid: int


@dataclass(frozen=True)
class Beat:
    """A sign of life, every few seconds; `work` is a count of it (`tlauto.pulse`)."""

    work: int


@dataclass(frozen=True)
class Note:
    """A sentence for the user."""

    text: str


@dataclass(frozen=True)
class Used:
    """Most bytes that the trial which ends next took of its device, and the device's; None is not known.

    On a CPU, the bytes that its process holds, and those that the processes of this search may have.
    """

    bytes: int | None
    total: int | None


@dataclass(frozen=True)
class StepTried:
    """What a step took that was tried: bytes, with so many images at once; of the device's `total` bytes.

    When that did not fit, `at_once` is None and `bytes` are what was asked for last, if known.
    """

    at_once: int | None
    bytes: int | None
    total: int | None


@dataclass(frozen=True)
class Grown:
    """The worker wants to be replaced after this job: it holds so many bytes, after its first so many."""

    held: int
    level: int


@dataclass(frozen=True)
class Candidate:
    """A backbone that can be searched, or why it cannot; whether it takes images of other sizes."""

    info: BackboneInfo
    status: WeightsStatus
    problem: str = ""
    is_scalable: bool = False


@dataclass(frozen=True)
class PreflightDone:
    """What preflight found. `unmatched` are patterns that no backbone matches."""

    candidates: tuple[Candidate, ...]
    unmatched: tuple[str, ...] = ()


@dataclass(frozen=True)
class BundleDone:
    """The bundle was written."""

    folder: str
    number: int


@dataclass(frozen=True)
class TogetherDone:
    """The trials of a `RunTogether` ended, in its order; each had one epoch."""

    ends: tuple[TrialDone, ...]
    epochs: tuple[EpochResult, ...]


@dataclass(frozen=True)
class JobFailed:
    """A job other than a trial failed; `message` is one sentence."""

    message: str
    detail: str = field(default="")


JOBS = (Preflight, RunTrial, RunTogether, TryStep, WriteBundle)
"""What keeps a worker busy until it says one of `ENDS`."""

ENDS = (PreflightDone, StepTried, BundleDone, JobFailed, TrialDone, TrialFailed, TogetherDone)

Message = (
    Preflight | RunTrial | RunTogether | TryStep | WriteBundle | Answer | Stop | Ready | Beat | Note | Used
    | Grown | StepTried | PreflightDone | BundleDone | TogetherDone | JobFailed | EpochResult | TrialDone
    | TrialFailed
)  # fmt: skip
_TYPES: dict[str, Any] = {t.__name__: t for t in Message.__args__}


def encode(message: Message) -> str:
    """One line of JSON."""
    return json.dumps({"type": type(message).__name__, **vars(message)}, default=dataclasses.asdict)


def decode(line: str) -> Message:
    """The message of a line; raises ValueError when it is none."""
    data = json.loads(line)
    if not isinstance(data, dict) or data.get("type") not in _TYPES:
        raise ValueError(f"not a message: {line[:200]}")
    kind = _TYPES[data.pop("type")]
    return _restore(kind, data)


def _restore(kind: Any, data: dict[str, Any]) -> Message:
    if "spec" in data:
        data["spec"] = spec_from_json(json.dumps(data["spec"]))
    if kind is RunTogether:
        data["specs"] = tuple(spec_from_json(json.dumps(spec)) for spec in data["specs"])
    if kind is TogetherDone:
        data["ends"] = tuple(TrialDone(**end) for end in data["ends"])
        data["epochs"] = tuple(EpochResult(**epoch) for epoch in data["epochs"])
    if "done" in data:
        data["done"] = TrialDone(**data["done"])
    if "info" in data:
        data["info"] = BackboneInfo(**data["info"])
    if "weights" in data:
        data["weights"] = WeightsOptions(**data["weights"])
    if kind is PreflightDone:
        data["candidates"] = tuple(_candidate(entry) for entry in data["candidates"])
    if kind is WriteBundle:
        data["members"] = tuple((folder, weight) for folder, weight in data["members"])
        data["beside"] = tuple(BackboneInfo(**info) for info in data["beside"])
    for name in ("patterns", "providers", "unmatched"):
        if name in data:
            data[name] = tuple(data[name])
    message: Message = kind(**data)
    return message


def _candidate(entry: Mapping[str, Any]) -> Candidate:
    about = BackboneInfo(**entry["info"]), WeightsStatus(**entry["status"])
    return Candidate(*about, entry["problem"], entry["is_scalable"])
