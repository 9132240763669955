"""`tlauto.json`: everything about a model but its tensors, checked field by field when it is read."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tlauto.contracts import BackboneInfo, ImageInput, TrialSpec, WeightsOptions, spec_from_json, to_json
from tlauto.data.dataset import Dataset
from tlauto.errors import ConfigError, DataError
from tlauto.recipe import beside

FORMAT = "tlauto model bundle"
FORMAT_VERSION = 5
"""2: `ensemble`, 3: `features`, 4: `mirror`, 5: `joined`; only where they are, so that older versions read
the rest."""

MANIFEST_FILE = "tlauto.json"
TASKS = ("multiclass", "multilabel", "regression")

Metrics = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class DatasetFacts:
    """What a model was made from.

    Attributes:
        fingerprint: of contents, labels and given splits (`tlauto.data.Dataset.fingerprint`).
        images: number of images by part of the split.
        fit_on: the parts that the model was fitted on.
    """

    fingerprint: str
    images: Mapping[str, int]
    fit_on: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset, fit_on: tuple[str, ...]) -> DatasetFacts:
        """The facts of a dataset."""
        images = {split: len(dataset.part(split)) for split in ("train", "val", "test")}
        return cls(dataset.fingerprint, {s: n for s, n in images.items() if n}, tuple(fit_on))


@dataclass(frozen=True)
class Ensemble:
    """Bundles inside a bundle that answer with it: the weighted mean of all answers.

    Attributes:
        weight: of the bundle itself; all weights add up to 1.
        members: folder inside the bundle, such as `members/1`, to weight.
        alone: metrics of the bundle itself, without the others.
    """

    weight: float
    members: Mapping[str, float]
    alone: Metrics


@dataclass(frozen=True)
class Manifest:
    """The contents of `tlauto.json`.

    Attributes:
        task: `multiclass`, `multilabel` or `regression`.
        labels: class names in the order of the outputs; empty for regression.
        backbone: what is known of the backbone, its pretraining and licence included.
        input: how images are prepared.
        spec: the trial that made the model, without paths of the machine it ran on.
        metrics: name to {"value", "low", "high"}, a 95 % interval, measured on `evaluated_on`.
        comparison: the model against the default recipe, when both were tested.
        ensemble: further bundles that answer with it; `metrics` are then those of all together.
        features: what of the backbone the head gets instead of pooled features: those of all stages, by
            their means (`levels`) or those of each quarter of the image (`grid`).
        joined: bundles inside the bundle, such as `joined/1`, whose raw outputs are added to its own before
            they become answers, each with the SHA-256 of its tensors: the head reads several backbones.
        is_part: it is such a bundle itself, and answers nothing alone.
        versions: distribution to version; provenance: what came from which plugin.
        sha256: of the tensors' file.
        probe: the network's outputs for a fixed image, compared when it is built again.
        created: UTC, ISO 8601.
    """

    task: str
    labels: tuple[str, ...]
    backbone: BackboneInfo
    input: ImageInput
    spec: TrialSpec
    metrics: Metrics
    evaluated_on: str
    dataset: DatasetFacts
    sha256: str
    probe: tuple[float, ...]
    created: str
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    comparison: Mapping[str, Any] | None = None
    ensemble: Ensemble | None = None
    features: Literal["levels", "grid"] | None = None
    joined: Mapping[str, str] = field(default_factory=dict)
    is_part: bool = False

    @property
    def mirror(self) -> bool:
        """Whether the head reads the mean of the features of an image and of its mirror image."""
        return bool(self.spec.params.get("probe.mirror", False))

    def to_json(self) -> str:
        """The manifest as indented JSON; `read_manifest` reads it."""
        version = 4 if self.mirror else 3 if self.features else 2 if self.ensemble else 1
        version = 5 if self.joined or self.is_part else version
        head = {"format": FORMAT, "format_version": version}
        data = {**head, **dataclasses.asdict(self), "spec": json.loads(to_json(portable(self.spec)))}
        return json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def portable(spec: TrialSpec) -> TrialSpec:
    """The specification without paths, which mean nothing on another machine and may name a person."""
    weights = WeightsOptions(offline=True, pretrained=spec.weights.pretrained)
    return dataclasses.replace(spec, dataset="", folder="", cache="", init_head=None, weights=weights)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises: DataError when it is unreadable, damaged, of a newer format or not a bundle's.
    """
    data = _read_object(path)
    if data.get("format") != FORMAT:
        raise DataError(f"{path} does not describe a tlauto model bundle (its 'format' is not '{FORMAT}')")
    version = data.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise _damaged(path, f"'format_version' is {version!r}")
    if version > FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, this tlauto reads up to {FORMAT_VERSION}; "
            f"update it: pip install --upgrade tlauto"
        )
    try:
        manifest = _manifest(data)
        _check(manifest)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise _damaged(path, _reason(error)) from None
    return manifest


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise _damaged(path, "it is not JSON") from None
    if not isinstance(data, dict):
        raise _damaged(path, "it holds no JSON object")
    return data


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}; copy the bundle again from where it was made")


def _manifest(data: Mapping[str, Any]) -> Manifest:
    facts = _mapping(data, "dataset")
    return Manifest(
        task=_text(data, "task"),
        labels=tuple(_strings(data, "labels")),
        backbone=BackboneInfo(**_mapping(data, "backbone")),
        input=_input(_mapping(data, "input")),
        spec=spec_from_json(json.dumps(_mapping(data, "spec"))),
        metrics={name: _interval(name, value) for name, value in _mapping(data, "metrics").items()},
        evaluated_on=_text(data, "evaluated_on"),
        dataset=DatasetFacts(
            fingerprint=_text(facts, "fingerprint"),
            images={str(name): int(count) for name, count in _mapping(facts, "images").items()},
            fit_on=tuple(_strings(facts, "fit_on")),
        ),
        sha256=_text(data, "sha256"),
        probe=_numbers(data, "probe"),
        created=_text(data, "created"),
        versions=_texts(data, "versions"),
        provenance=_texts(data, "provenance"),
        comparison=_mapping(data, "comparison") if data.get("comparison") is not None else None,
        ensemble=_ensemble(_mapping(data, "ensemble")) if data.get("ensemble") is not None else None,
        features=_features(data.get("features")),
        joined=_joined(data),
        is_part=data.get("is_part") is True,
    )


def _features(value: object) -> Literal["levels", "grid"] | None:
    if value == "levels":
        return "levels"
    if value == "grid":
        return "grid"
    if value is not None:
        raise ValueError(f"'features' is {value!r}")
    return None


def _joined(data: Mapping[str, Any]) -> dict[str, str]:
    found = _texts(data, "joined") if data.get("joined") is not None else {}
    for name in found:
        if not re.fullmatch(r"joined/[0-9]{1,3}", name):
            raise ValueError(f"'joined' names the folder {name!r}")
    return found


def _ensemble(data: Mapping[str, Any]) -> Ensemble:
    members = {name: float(weight) for name, weight in _mapping(data, "members").items()}
    for name in members:
        if not re.fullmatch(r"members/[0-9]{1,3}", name):
            raise ValueError(f"'ensemble.members' names the folder {name!r}")
    weights = [float(data["weight"]), *members.values()]
    if not members or min(weights) <= 0 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(f"'ensemble' has the weights {weights}, which must be positive and add up to 1")
    alone = {name: _interval(name, value) for name, value in _mapping(data, "alone").items()}
    return Ensemble(weights[0], members, alone)


def _input(data: Mapping[str, Any]) -> ImageInput:
    values = {**data, "mean": _triple(data, "mean"), "std": _triple(data, "std")}
    image_input = ImageInput(**values)
    for name in ("size", "resize"):
        value = getattr(image_input, name)
        # A damaged size must not ask for all the memory there is.
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 8192:
            raise ValueError(f"'input.{name}' is {value!r}")
    for name, allowed in (("fit", ("crop", "squash", "border")),
                          ("interpolation", ("nearest", "bilinear", "bicubic", "lanczos")),
                          ("bgr", (True, False)), ("resizable", (True, False))):  # fmt: skip
        if getattr(image_input, name) not in allowed:
            raise ValueError(f"'input.{name}' is {getattr(image_input, name)!r}")
    if min(image_input.std) <= 0:
        raise ValueError(f"'input.std' is {list(image_input.std)}")
    return image_input


def _check(manifest: Manifest) -> None:
    if manifest.task not in TASKS:
        raise ValueError(f"'task' is {manifest.task!r}, not one of {', '.join(TASKS)}")
    if manifest.task != "regression" and len(manifest.labels) < 2:
        raise ValueError(f"'labels' holds {len(manifest.labels)} classes for the task {manifest.task}")
    if len(set(manifest.labels)) != len(manifest.labels):
        raise ValueError("'labels' holds a class twice")
    for name in ("backbone", "task"):
        said, used = getattr(manifest, name), getattr(manifest.spec, name)
        if (said.id if isinstance(said, BackboneInfo) else said) != used:
            raise ValueError(f"'{name}' and 'spec.{name}' differ")
    if len(manifest.joined) != len(beside(manifest.spec.params)):
        raise ValueError("'joined' and 'spec.params' do not name as many further backbones")
    if manifest.is_part and (manifest.joined or manifest.ensemble):
        raise ValueError("a part of a model has 'joined' or 'ensemble'")


def _mapping(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data[name]
    if not isinstance(value, dict):
        raise TypeError(f"'{name}' is not an object")
    return value


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data[name]
    if not isinstance(value, str):
        raise TypeError(f"'{name}' is not a text")
    return value


def _texts(data: Mapping[str, Any], name: str) -> dict[str, str]:
    values = _mapping(data, name)
    return {key: _text(values, key) for key in values}


def _strings(data: Mapping[str, Any], name: str) -> list[str]:
    values = data[name]
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise TypeError(f"'{name}' is not a list of texts")
    return values


def _numbers(data: Mapping[str, Any], name: str) -> tuple[float, ...]:
    values = tuple(float(value) for value in data[name])
    if not all(math.isfinite(value) for value in values):
        raise ValueError(f"'{name}' holds a value that is not a number")
    return values


def _triple(data: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    red, green, blue = _numbers(data, name)
    return red, green, blue


def _interval(name: str, value: Any) -> dict[str, float]:
    if not isinstance(value, dict) or "value" not in value:
        raise TypeError(f"'metrics.{name}' has no value")
    # JSON has no NaN: a metric that is undefined on the test part (ROC-AUC of one class) is null.
    return {key: math.nan if number is None else float(number) for key, number in value.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def _reason(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)
