"""The model bundle: a folder that predicts anywhere, with no pickle and no network.

bundle = load_bundle("tlauto-runs/flowers/model")
bundle.predict(["photo.jpg"])[0].label
"""

from __future__ import annotations

import dataclasses
import datetime
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlauto.contracts import BackboneInfo, TrialDone, TrialSpec
from tlauto.data.dataset import Dataset
from tlauto.errors import ConfigError, DataError
from tlauto.plugins import Registry, loaded_libraries, registry
from tlauto.recipe import BESIDE, beside
from tlauto.results.card import write_card
from tlauto.results.files import own_file, replaced_folder, sha256
from tlauto.results.manifest import (
    MANIFEST_FILE,
    DatasetFacts,
    Ensemble,
    Manifest,
    Metrics,
    portable,
    read_manifest,
)
from tlauto.results.network import (
    build_network,
    check_probe,
    find_device,
    load_tensors,
    make_predictor,
    probe,
    save_tensors,
)
from tlauto.results.prediction import Prediction, prediction
from tlauto.results.together import Answering, Together

if TYPE_CHECKING:
    import numpy as np
    import torch

    from tlauto.training.model import Classifier
    from tlauto.training.predictor import OnUnreadable, Predictor

WEIGHTS_FILE = "model.safetensors"
FITTED_FILE = "fitted.txt"
CARD_FILE = "README.md"
MEMBERS = "members"
JOINED = "joined"

Part = tuple["Classifier", BackboneInfo]
"""The classifier of a further backbone that a model reads, and what is known of that backbone."""


class Bundle:
    """A model bundle in memory, ready to predict. `load_bundle` makes one.

    Attributes:
        folder: where it was loaded from.
        manifest: what is known of it.
    """

    def __init__(self, folder: Path, manifest: Manifest, predictor: Answering) -> None:
        self.folder = folder
        self.manifest = manifest
        self._predictor = predictor

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes it knows, in the order of its outputs; empty for regression."""
        return self.manifest.labels

    def predict(
        self, paths: Iterable[str | Path], top_k: int = 1, *, on_unreadable: OnUnreadable | None = None
    ) -> list[Prediction]:
        """The answers for image files, in their order.

        Args:
            top_k: probabilities kept of each image.
            on_unreadable: told of each image that cannot be read, which then has no answer.

        Raises: DataError for an unreadable image when `on_unreadable` is not given; ConfigError for
        a `top_k` below 1.
        """
        if top_k < 1:
            raise ConfigError(f"top-k must be at least 1, not {top_k}")
        task, classes = self.manifest.task, self.manifest.labels
        rows = self.outputs((str(path) for path in paths), on_unreadable=on_unreadable)
        return [prediction(path, row, task=task, classes=classes, top_k=top_k) for path, row in rows]

    def outputs(
        self, paths: Iterable[str], *, on_unreadable: OnUnreadable | None = None
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Each readable image's path with its probabilities (K,), or its value () for regression.

        Raises: DataError for an image that cannot be read, unless there is someone to tell.
        """
        return self._predictor.rows(paths, on_unreadable=on_unreadable)

    def evaluate(self, data: str | Path, *, split: str = "test", **reading: Any) -> dict[str, Any]:
        """Metrics with intervals on a labelled dataset; see `tlauto.results.evaluation.evaluate`."""
        from tlauto.results.evaluation import evaluate

        return evaluate(self, data, split=split, **reading)

    def fitted_on(self) -> frozenset[str]:
        """SHA-256 of the image files that the model was fitted on; raises DataError without the list."""
        path = own_file(self.folder, FITTED_FILE)
        return frozenset(path.read_text(encoding="utf-8").split())


def save_bundle(
    folder: str | Path,
    *,
    classifier: Classifier,
    spec: TrialSpec,
    dataset: Dataset,
    info: BackboneInfo,
    done: TrialDone,
    evaluated_on: str,
    comparison: Mapping[str, Any] | None = None,
    members: Sequence[tuple[Path, float]] = (),
    weight: float = 1.0,
    alone: Metrics | None = None,
    parts: Sequence[Part] = (),
) -> Manifest:
    """Write a trained model as a bundle, whole or not at all, over an older bundle if there is one.

    Args:
        done: of the trial, with its metrics measured on `evaluated_on`.
        comparison: against the default recipe, on the same images: "metric", "gain", "low", "high",
            "significant"; or "default_is_winner".
        members: bundles that are copied into this one and answer with it, each with its weight.
        weight, alone: this model's own weight and metrics; all weights add up to 1.
        parts: the classifiers of further backbones, whose raw outputs are added to this one's.

    Raises: ConfigError when the folder cannot be written or holds something else.
    """
    with replaced_folder(Path(folder)) as new:
        manifest = dataclasses.replace(
            _save_network(new, classifier, spec, dataset, info, done, evaluated_on),
            comparison=comparison,
            ensemble=_take_in(new, members, weight, alone or done.metrics) if members else None,
            joined=_save_parts(new, parts, spec, dataset, done, evaluated_on),
        )
        others = [other for _, other in parts]
        _save_texts(new, manifest, dataset, name=Path(folder).name, others=others)
    return manifest


def _save_network(
    folder: Path, classifier: Classifier, spec: TrialSpec, dataset: Dataset, info: BackboneInfo,
    done: TrialDone, evaluated_on: str,
) -> Manifest:  # fmt: skip
    """Write the tensors of one network into `folder`; what is to be known of it."""
    save_tensors(classifier, folder / WEIGHTS_FILE)
    return Manifest(
        task=spec.task,
        labels=dataset.classes,
        backbone=info,
        input=classifier.source.input,
        features=classifier.kind if classifier.kind in ("levels", "grid") else None,
        spec=portable(spec),
        metrics=done.metrics,
        evaluated_on=evaluated_on,
        dataset=DatasetFacts.of(dataset, spec.fit_on),
        sha256=sha256(folder / WEIGHTS_FILE),
        probe=_probe(classifier),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions={"tlauto": version("tlauto"), **(done.versions or loaded_libraries())},
        provenance=done.provenance,
    )


def _save_parts(
    folder: Path, parts: Sequence[Part], spec: TrialSpec, dataset: Dataset, done: TrialDone, evaluated_on: str
) -> dict[str, str]:
    """Write classifiers of further backbones as bundles inside `folder`; the hash of each one's tensors."""
    hashes: dict[str, str] = {}
    for number, (classifier, info) in enumerate(parts, start=1):
        name = f"{JOINED}/{number}"
        (folder / name).mkdir(parents=True)
        params = {key: value for key, value in spec.params.items() if key not in ("probe.joined", BESIDE)}
        own = dataclasses.replace(spec, backbone=info.id, params=params)
        sources = {key: done.provenance[key] for key in ("strategy", "head") if key in done.provenance}
        sources["backbone"] = done.provenance.get(f"backbone {number + 1}", "")
        found = dataclasses.replace(done, metrics={}, provenance=sources)
        part = _save_network(folder / name, classifier, own, dataset, info, found, evaluated_on)
        _save_texts(folder / name, dataclasses.replace(part, is_part=True), dataset, name=name)
        hashes[name] = part.sha256
    return hashes


def _save_texts(
    folder: Path, manifest: Manifest, dataset: Dataset, *, name: str, others: Sequence[BackboneInfo] = ()
) -> None:
    """Write what stands beside the tensors: the images' hashes, the card and the manifest."""
    fitted = {f"{item.sha256}\n" for item in dataset.part(*manifest.spec.fit_on)}
    (folder / FITTED_FILE).write_text("".join(sorted(fitted)), encoding="utf-8")
    (folder / CARD_FILE).write_text(write_card(manifest, name=name, others=others), encoding="utf-8")
    (folder / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _take_in(folder: Path, members: Sequence[tuple[Path, float]], weight: float, alone: Metrics) -> Ensemble:
    """Copy the members into `folder`, and what is to be known of them."""
    weights: dict[str, float] = {}
    for number, (source, share) in enumerate(members, start=1):
        require_bundle(source)
        name = f"{MEMBERS}/{number}"
        shutil.copytree(source, folder / name)
        weights[name] = share
    return Ensemble(weight, weights, alone)


def _probe(classifier: Classifier) -> tuple[float, ...]:
    was_training = classifier.training
    device = next(iter(classifier.state_dict().values())).device
    outputs = probe(classifier.eval(), classifier.source.input, device)
    classifier.train(was_training)
    return tuple(outputs)


def require_bundle(folder: Path) -> None:
    """Raise DataError unless there is a bundle in a folder, damaged or not; opens nothing."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise DataError(
            f"the model bundle {folder} {what} ('tlauto search' leaves one in <out>/<study>/model)"
        )
    own_file(folder, MANIFEST_FILE)


def load_bundle(folder: str | Path, device: str = "cpu", *, plugins: Registry | None = None) -> Bundle:
    """The bundle in a folder, on a device; reads nothing else and never the network.

    Raises: DataError when it is missing, incomplete, damaged, of a newer format, or no longer
    answers as it did; UnknownNameError when a plugin that it needs is not installed; ConfigError for
    a device that this machine does not have.
    """
    folder = Path(folder)
    require_bundle(folder)
    manifest = read_manifest(own_file(folder, MANIFEST_FILE))
    if manifest.is_part:
        whole = folder.resolve().parents[1]
        raise DataError(
            f"{folder} is one part of a model that reads several backbones and answers nothing by itself; "
            f"use the bundle that it lies in, {whole}"
        )
    plugins = plugins or registry()
    predictor: Answering = _load_predictor(folder, manifest, device, plugins)
    if manifest.ensemble is not None:
        predictors = [predictor, *_load_members(folder, manifest, device, plugins)]
        predictor = Together(predictors, [manifest.ensemble.weight, *manifest.ensemble.members.values()])
    return Bundle(folder, manifest, predictor)


def _load_members(folder: Path, manifest: Manifest, device: str, plugins: Registry) -> list[Predictor]:
    assert manifest.ensemble is not None
    predictors = []
    for name in manifest.ensemble.members:
        place, member = _inner(folder, name, manifest)
        if member.ensemble is not None or member.is_part:
            raise _foreign(place, folder)
        predictors.append(_load_predictor(place, member, device, plugins))
    return predictors


def _load_predictor(folder: Path, manifest: Manifest, device: str, plugins: Registry) -> Predictor:
    """What answers in one bundle, all its backbones together, checked; members are not looked at."""
    where = find_device(device)
    networks = [(_load_network(folder, manifest, where, plugins), manifest)]
    for (name, digest), backbone in zip(manifest.joined.items(), beside(manifest.spec.params), strict=True):
        place, part = _inner(folder, name, manifest)
        if not part.is_part or (part.sha256, part.backbone.id) != (digest, backbone):
            raise _foreign(place, folder)
        networks.append((_load_network(place, part, where, plugins), part))
    return make_predictor(networks, manifest, where)


def _inner(folder: Path, name: str, manifest: Manifest) -> tuple[Path, Manifest]:
    """A bundle inside a bundle, and its manifest; raises DataError when it does not belong there."""
    place = own_file(folder, f"{name}/{MANIFEST_FILE}").parent
    inner = read_manifest(place / MANIFEST_FILE)
    if (inner.task, inner.labels) != (manifest.task, manifest.labels):
        raise _foreign(place, folder)
    return place, inner


def _foreign(place: Path, folder: Path) -> DataError:
    return DataError(f"{place} does not belong to the model bundle {folder}; copy the bundle again")


def _load_network(folder: Path, manifest: Manifest, device: torch.device, plugins: Registry) -> Classifier:
    """One network with its tensors, checked."""
    file = own_file(folder, WEIGHTS_FILE)
    if sha256(file) != manifest.sha256:
        raise DataError(
            f"{file} is damaged or was changed: its SHA-256 is not the one in {MANIFEST_FILE}; copy the "
            f"bundle again from where it was made"
        )
    classifier = build_network(folder, file, manifest, plugins)
    load_tensors(classifier, file)
    classifier.to(device).eval()
    check_probe(folder, manifest.probe, probe(classifier, manifest.input, device))
    return classifier
