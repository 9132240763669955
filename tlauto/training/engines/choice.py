"""Which engine runs a frozen backbone.

The order is fixed: the first of OpenVINO and ONNX Runtime that is installed and pays, else PyTorch with
BatchNorm folded, else PyTorch. What pays is decided by the network, the number of images and the
threads, not by the clock or by what is in the cache, so a search that is run again chooses the same
engine. Whatever is chosen must first give the features of plain PyTorch on real images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from tlauto.contracts import Backbone
from tlauto.training.engines.converted import CONVERTERS, Converter
from tlauto.training.engines.fold import folded
from tlauto.training.engines.frozen import Engine, FrozenFeatures, same_features
from tlauto.training.engines.stored import discard, stored, stored_at
from tlauto.training.engines.work import measure_work
from tlauto.training.model import Kind, features_of

PROVING = 16  # images that engines are compared on
PLAIN = "pytorch"
FOLDED = "pytorch, BatchNorm folded"


class Extractor:
    """Features of one kind of a frozen backbone; itself an `Engine`.

    The engine is chosen at the first images. What cannot be converted, differs, or fails later costs a
    note; its images are run by PyTorch.

    Args:
        images: how many there are in all, those that need not be run again included: a resumed
            computation goes on with the engine that began it.
        weights: the hash of the backbone's weights.
        folder: of the caches.
        note: gets one sentence for the log.
        about: what `tlauto cache list` shows of a kept conversion, such as `backbone`.

    Attributes:
        name: of the engine; empty before the first images.
    """

    def __init__(
        self,
        backbone: Backbone,
        kind: Kind,
        device: torch.device,
        *,
        images: int,
        weights: str,
        folder: Path,
        note: Callable[[str], None],
        about: Mapping[str, object] | None = None,
    ) -> None:
        self.backbone = backbone
        self.kind: Kind = kind
        self.device = device
        self.images = images
        self.weights = weights
        self.folder = folder
        self.note = note
        self.about = about or {}
        self.name = ""
        self._plain: Engine = partial(_plain, backbone, kind)
        self._engine: Engine = self._plain

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, D) or (N, C, H, W) of normalised images (N, 3, H, W)."""
        if not self.name:
            # Copies made outside inference mode: exporters refuse tensors that were made in it.
            with torch.inference_mode(False), torch.no_grad():
                self.name, self._engine = self._choose(images[:PROVING].clone())
        try:
            return self._engine(images)
        except Exception as error:  # whatever a library raises, PyTorch can do it
            if self._engine is self._plain:
                raise
            self._refuse(self.name, error)
            self.name, self._engine = PLAIN, self._plain
            return self._plain(images)

    def _choose(self, images: torch.Tensor) -> tuple[str, Engine]:
        # On GPUs PyTorch is the engine: TensorRT and the like would be candidates here.
        if self.device.type != "cpu":
            return PLAIN, self._plain
        expected = self._plain(images)
        for name, make in self._candidates(images):
            try:
                engine = make()
                if engine and same_features(engine(images), expected):
                    return name, engine
                if engine:
                    self.note(f"{name} computes other features than PyTorch, which is used instead")
            except Exception as error:  # noqa: BLE001 exporters raise anything
                self._refuse(name, error)
        return PLAIN, self._plain

    def _candidates(self, images: torch.Tensor) -> Iterator[tuple[str, Callable[[], Engine | None]]]:
        """Engines in order of preference and how to make them."""
        work, threads = measure_work(self.backbone, self.kind, images[:1]), torch.get_num_threads()
        for converter in CONVERTERS:
            if converter.is_installed and converter.pays(work, self.images, threads):
                yield converter.name, partial(self._converted, converter, images)
        yield FOLDED, partial(self._folded, images[:1])

    def _converted(self, converter: Converter, images: torch.Tensor) -> Engine:
        """The network as it was kept, or converted now."""
        size = list(images.shape[1:])
        facts = {"weights": self.weights, "kind": self.kind, "size": size}
        path = stored_at(self.folder, engine=converter.name, release=converter.version, **facts)
        network = FrozenFeatures(self.backbone, self.kind)
        # Two, not one: exporters take a length of one for a constant.
        convert = partial(converter.convert, network, images[:1].contiguous().repeat(2, 1, 1, 1))
        blob = stored(path, convert, about={**self.about, "engine": converter.name})
        try:
            return converter.start(blob, torch.get_num_threads())
        except Exception:
            discard(path)
            raise

    def _folded(self, images: torch.Tensor) -> Engine | None:
        backbone = folded(self.backbone, images)
        return None if backbone is None else partial(_plain, backbone, self.kind)

    def _refuse(self, name: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self.note(f"{name} cannot run this backbone, PyTorch does it instead: {reason}")


def _plain(backbone: Backbone, kind: Kind, images: torch.Tensor) -> torch.Tensor:
    return features_of(backbone, images, kind)
