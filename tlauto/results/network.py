"""The network of a bundle: its tensors to and from a file, and proof that it still answers as it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tlauto.contracts import ImageInput, WeightsOptions
from tlauto.errors import ConfigError, DataError, TlautoError, UnknownNameError
from tlauto.plugins import Registry
from tlauto.recipe import scale_of
from tlauto.results.manifest import MANIFEST_FILE, Manifest
from tlauto.scales import at_scale
from tlauto.space import complete

if TYPE_CHECKING:
    import torch

    from tlauto.training.model import Classifier
    from tlauto.training.predictor import Predictor

Found = TypeVar("Found")

TOLERANCE = 0.02
"""Largest difference of the probe's outputs, relative to their size; TF32 on a GPU gives about 0.002."""


def save_tensors(classifier: Classifier, file: Path) -> None:
    """Write all tensors of a classifier as safetensors."""
    from safetensors.torch import save_file

    # Cloned: safetensors refuses tensors that share memory or are in channels_last order.
    state = classifier.state_dict()
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def load_tensors(classifier: Classifier, file: Path) -> None:
    """Read all tensors of a classifier; raises DataError when the file is damaged or does not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        classifier.load_state_dict(load_file(file), strict=True)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file} is damaged: {error}") from None
    except RuntimeError as error:  # missing, unexpected or differently shaped tensors
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"the tensors in {file} do not fit the network that is built here; compare 'versions' in "
            f"{MANIFEST_FILE} with what is installed ({reason})"
        ) from None


def build_network(folder: Path, file: Path, manifest: Manifest, plugins: Registry) -> Classifier:
    """The network with random weights, built by the plugins that made it.

    Raises: UnknownNameError when a plugin is missing; DataError when it cannot build the network.
    """
    from tlauto.backbone import TorchBackbone
    from tlauto.builtin.tasks import task
    from tlauto.training.model import assemble

    spec, id = manifest.spec, manifest.backbone.id
    provider = _offered("backbone", manifest.backbone.provider, plugins.provider, folder, manifest)
    head = _offered("head", spec.head, plugins.head, folder, manifest)
    # Naming the bundle's own file makes known an id that stems from a weights file elsewhere.
    weights = WeightsOptions(files={id: str(file)}, offline=True, pretrained=False)
    try:
        backbone = at_scale(provider.load(id, weights), scale_of(spec.params), id=id)
        owner = f"head.{spec.head}"
        given = {n.removeprefix(f"{owner}."): v for n, v in spec.params.items() if n.startswith(f"{owner}.")}
        params = complete(head.space, given, owner=owner)
        outputs = task(spec.task).num_outputs(manifest.labels)
        classifier = assemble(backbone, head, params, outputs, manifest.features, mirror=manifest.mirror)
    except TlautoError as error:
        raise DataError(f"the model bundle {folder} cannot be built here: {error}") from None
    if isinstance(backbone, TorchBackbone):
        import torch

        backbone.module.to(memory_format=torch.channels_last)  # 1.6 times as fast on a CPU
    return classifier


def _offered(what: str, name: str, find: Callable[[str], Found], folder: Path, manifest: Manifest) -> Found:
    try:
        return find(name)
    except UnknownNameError as error:
        source = manifest.provenance.get(what, "")
        hint = f"it came from {source}: pip install {source.partition(' ')[0]}" if source else str(error)
        raise UnknownNameError(
            f"the model bundle {folder} needs the {what} '{name}', which no plugin here offers ({hint})"
        ) from None


def make_predictor(
    networks: Iterable[tuple[Classifier, Manifest]], manifest: Manifest, device: torch.device
) -> Predictor:
    """What answers for image files with these networks, whose raw outputs are added."""
    from tlauto.builtin.tasks import task
    from tlauto.training.predictor import Predictor

    first, *others = [(classifier, own.input) for classifier, own in networks]
    return Predictor(*first, task(manifest.task), manifest.labels, device, beside=others)


def probe(classifier: Classifier, image_input: ImageInput, device: torch.device) -> list[float]:
    """The outputs for one fixed synthetic image: the same for the same network everywhere."""
    import numpy as np
    import torch

    from tlauto.training.batches import normalise

    rows, columns = np.indices((image_input.size, image_input.size))
    channels = [rows * 7 + columns * 3, rows * 2 + columns * 5 + 80, (rows * columns) // 16]
    image = np.stack(channels).astype(np.int64) % 256  # (3, S, S)
    batch = torch.from_numpy(image.astype(np.uint8))[None]
    with torch.inference_mode():
        outputs: list[float] = classifier(normalise(batch, image_input, device))[0].double().cpu().tolist()
    return outputs


def check_probe(folder: Path, expected: Sequence[float], found: Sequence[float]) -> None:
    """Raise DataError when a loaded network's probe differs from the one at saving.

    Same names and shapes do not make the same network: padding, activation and normalisation are
    decided by the library that builds it, and may change with its version.
    """
    size = max(1.0, *(abs(value) for value in expected))
    is_same = len(expected) == len(found) and all(
        abs(a - b) <= TOLERANCE * size for a, b in zip(expected, found, strict=True)
    )
    if not is_same:
        raise DataError(
            f"the network that is built here from {folder} answers differently than when it was saved; "
            f"install the library versions that {MANIFEST_FILE} names under 'versions'"
        )


def find_device(name: str) -> torch.device:
    """The device of that name; `auto` is a GPU when there is one. Raises: ConfigError without it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0].split(". ")[0]
        if reason.startswith("Expected one of"):  # every device type that torch was ever built for
            reason = "no such kind of device"
        raise ConfigError(
            f"this machine has no device '{name}' ({reason}); use auto, cpu, cuda or cuda:N"
        ) from None
    return device
