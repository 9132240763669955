"""The model card: `README.md` of a bundle, for the person who finds the folder in a year."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlauto.contracts import BackboneInfo
from tlauto.levels import read_from
from tlauto.recipe import beside
from tlauto.results.manifest import Manifest
from tlauto.space import Scalar

TITLES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "precision": "precision (macro)",
    "recall": "recall (macro)", "f1": "F1 (macro)", "roc_auc": "ROC-AUC", "map": "mean average precision",
    "mae": "mean absolute error", "rmse": "root mean squared error", "r2": "R²", "log_loss": "log loss",
}  # fmt: skip
PURPOSES = {"multiclass": "says which of its classes an image shows",
            "multilabel": "says which of its classes an image shows, any number of them",
            "regression": "estimates a number from an image"}  # fmt: skip


PART = (
    "This is one part of a model that reads several backbones at once. It answers nothing by itself: use the "
    "bundle that it lies in, two folders up."
)


def write_card(manifest: Manifest, *, name: str, others: Sequence[BackboneInfo] = ()) -> str:
    """The card as Markdown.

    Args:
        name: the bundle's folder name, used in the examples.
        others: the further backbones that the model reads.
    """
    backbones = " and ".join(_plain(info.id) for info in (manifest.backbone, *others))
    title, licence = f"# {backbones}, {manifest.task}", ("Licence", _licence(manifest, others))
    sections = [
        ("", _summary(manifest)),
        ("How to use it", _usage(manifest, name)),
        ("How good it is", _quality(manifest)),
        ("What it was made from", _origin(manifest)),
        ("How it was trained", _training(manifest)),
        ("Limits", _limits(manifest)),
        licence,
    ]
    if manifest.is_part:
        sections = [("", PART), licence]
    body = [f"## {heading}\n\n{text}" if heading else text for heading, text in sections]
    return "\n\n".join([title, *body]) + "\n"


def _summary(manifest: Manifest) -> str:
    text = f"This model {PURPOSES[manifest.task]}. Found by tlauto on {manifest.created[:10]}."
    if not manifest.labels:
        return text
    shown = ", ".join(_plain(label) for label in manifest.labels[:50])
    more = f", and {len(manifest.labels) - 50} more" if len(manifest.labels) > 50 else ""
    return f"{text}\n\nIts {len(manifest.labels)} classes: {shown}{more}."


def _usage(manifest: Manifest, name: str) -> str:
    answer = "prediction.value" if manifest.task == "regression" else "prediction.labels"
    packages = {source.partition(" ")[0]: None for source in ["tlauto", *manifest.provenance.values()]}
    lines = [
        f"    pip install {' '.join(packages)}",
        "",
        f"    tlauto predict {name} photo.jpg",
        f"    tlauto evaluate {name} --data FOLDER",
        "",
        "    import tlauto",
        f"    for prediction in tlauto.load({name!r}).predict(['photo.jpg']):",
        f"        print(prediction.path, {answer})",
    ]
    return "\n".join(lines) + "\n\nIt needs no network. The tensors are safetensors; nothing is unpickled."


def _quality(manifest: Manifest) -> str:
    if not manifest.metrics:
        return "It was not measured."
    count = manifest.dataset.images.get(manifest.evaluated_on)
    images = f" of {count} images" if count else ""
    where = f"Measured on the {manifest.evaluated_on} part{images}{_held_out(manifest)}."
    rows = [(TITLES.get(key, key), _number(value.get("value")), _range(value))
            for key, value in manifest.metrics.items()]  # fmt: skip
    chosen = TITLES.get(manifest.spec.metric, manifest.spec.metric)
    parts = [where, _table(("metric", "value", "95 % interval"), rows), f"The model was chosen by {chosen}."]
    if manifest.comparison:
        parts.append(_comparison(manifest.comparison))
    return "\n\n".join(parts)


def _held_out(manifest: Manifest) -> str:
    if manifest.evaluated_on in manifest.dataset.fit_on:
        return ", which it was also fitted on: these figures are too good"
    if manifest.evaluated_on == "val":
        return ", which was used to choose it: expect a little less on new images"
    return ", which played no part in training or choosing it"


def _comparison(comparison: Mapping[str, Any]) -> str:
    """One sentence on the winner against the default recipe."""
    if comparison.get("default_is_winner"):
        return "It is the default recipe itself: nothing that was tried did better."
    gain, low, high = (_number(comparison.get(key)) for key in ("gain", "low", "high"))
    metric = str(comparison.get("metric", ""))
    verdict = "significant" if comparison.get("significant") else "not significant"
    what = f"Gain in {TITLES.get(metric, metric)}" if metric else "Gain"
    return f"{what} over the default recipe: {gain}, 95 % interval {low} to {high}, {verdict}."


def _origin(manifest: Manifest) -> str:
    table = _table(("part", "images"), [(split, str(n)) for split, n in manifest.dataset.images.items()])
    fitted = f"The model was fitted on {' and '.join(manifest.dataset.fit_on)}."
    return f"{table}\n\n{fitted} Fingerprint of the dataset: `{manifest.dataset.fingerprint}`."


def _training(manifest: Manifest) -> str:
    spec = manifest.spec
    pretraining = _plain(manifest.backbone.pretraining) if spec.weights.pretrained else "none, random weights"
    facts = [
        ("backbone", f"{_plain(manifest.backbone.id)} (pretraining: {pretraining})"),
        ("strategy", spec.strategy),
        (
            "head",
            spec.head + read_from(manifest.features, mirror=manifest.mirror, beside=beside(spec.params)),
        ),
        ("images", f"{manifest.input.size} x {manifest.input.size} pixels"),
        ("seed", str(spec.seed)),
        *((name, _scalar(value)) for name, value in sorted(spec.params.items())),
    ]
    if manifest.ensemble is not None:
        facts.insert(0, ("weight", _number(manifest.ensemble.weight)))
    sources = [(what, source) for what, source in sorted(manifest.provenance.items())]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items()))
    parts = [*_members(manifest), *_joined(manifest), _table(("setting", "value"), facts)]
    if sources:
        parts.append(_table(("part", "comes from"), sources))
    return "\n\n".join([*parts, f"Made with {versions}."] if versions else parts)


def _members(manifest: Manifest) -> list[str]:
    """Who answers, where several do."""
    found = manifest.ensemble
    if found is None:
        return []
    shares = ", ".join(f"`{name}` {_number(weight)}" for name, weight in found.members.items())
    chosen = manifest.spec.metric
    alone = _number(found.alone.get(chosen, {}).get("value"))
    return [
        f"{1 + len(found.members)} models answer together, by the weighted mean of their answers. Further "
        f"ones and their weights: {shares}; each folder is a bundle that also works by itself. The one "
        f"described here has a {TITLES.get(chosen, chosen)} of {alone} alone."
    ]


def _joined(manifest: Manifest) -> list[str]:
    """What is read at once, where that is several backbones."""
    if not manifest.joined:
        return []
    each = zip(manifest.joined, beside(manifest.spec.params), strict=True)
    shown = ", ".join(f"`{name}` holds that of {_plain(id)}" for name, id in each)
    return [
        f"Its head reads {1 + len(manifest.joined)} backbones at once: the raw outputs of one part for each "
        f"are added. Beside the part here, {shown}; these answer nothing by themselves."
    ]


def _limits(manifest: Manifest) -> str:
    limits = [
        "It knows only images like those it was made from; other cameras, places or subjects can fool it.",
        "The interval above covers chance in the choice of images, not a change of their kind.",
    ]
    if manifest.task == "multiclass":
        limits.append("It answers with one of its classes even for an image that shows none of them.")
    if manifest.task != "regression":
        limits.append("Its probabilities were not calibrated.")
    smallest = manifest.dataset.images.get(manifest.evaluated_on, 0)
    if 0 < smallest < 200:
        limits.append(
            f"With {smallest} images measured, one image is {100 / smallest:.1f} points of accuracy."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _licence(manifest: Manifest, others: Sequence[BackboneInfo]) -> str:
    if not manifest.spec.weights.pretrained:
        return "No pretrained weights were used. The images' licence applies to what was learned from them."
    stated = _stated(manifest.backbone)
    stated += "".join(f"; of those of {_plain(other.id)}: {_stated(other)}" for other in others)
    return (
        f"Licence of the pretrained weights: {stated}. The licences of the pretraining data and of your "
        f"images are for you to check before you publish the model."
    )


def _stated(info: BackboneInfo) -> str:
    licence = _plain(info.licence)
    return "not known" if licence == "unknown" else licence


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|")


def _plain(text: str) -> str:
    """Text on one line; a class name from a folder must not break the page."""
    return " ".join(str(text).replace("<", "&lt;").split())


def _scalar(value: Scalar) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "undefined"
    return f"{value:.4g}" if abs(value) >= 1000 or 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _range(value: Mapping[str, float]) -> str:
    if value.get("low") is None or value.get("high") is None:
        return ""
    return f"{_number(value['low'])} to {_number(value['high'])}"
