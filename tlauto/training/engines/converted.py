"""Networks converted for OpenVINO and ONNX Runtime, as bytes that can be kept.

Both packages are optional. Nothing here is unpickled: a conversion is an XML or protobuf graph and its
weights.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tlauto.training.engines.frozen import Engine, FrozenFeatures
from tlauto.training.engines.work import Work

Blob = np.ndarray
"""A converted network, (bytes,) uint8."""


@dataclass(frozen=True)
class Converter:
    """A library that runs networks faster than PyTorch, once they are converted.

    Attributes:
        name: the engine's name, and the distribution's that runs it.
        needs: packages that must be installed.
        convert: the network as bytes, from two example images (2, 3, H, W).
        start: an engine of such bytes, with so many threads.
        per_network_s, per_operation_s: what converting takes, measured on one core.
    """

    name: str
    needs: tuple[str, ...]
    convert: Callable[[FrozenFeatures, torch.Tensor], bytes]
    start: Callable[[Blob, int], Engine]
    per_network_s: float
    per_operation_s: float

    @property
    def is_installed(self) -> bool:
        """Whether all it needs can be imported."""
        return all(_is_importable(name) for name in self.needs)

    @property
    def version(self) -> str:
        """Of the distribution that runs the network."""
        return importlib.metadata.version(self.name)

    def pays(self, work: Work, images: int, threads: int) -> bool:
        """Whether so many images save more seconds than the conversion takes.

        Conversions that were kept do not count: the answer must not depend on what ran before.
        """
        seconds = self.per_network_s + self.per_operation_s * work.operations
        return work.saving_s(images, threads) > seconds


def _is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # blocked, or half imported
        return False


# --- OpenVINO ---------------------------------------------------------------------------------------


def _convert_openvino(network: FrozenFeatures, example: torch.Tensor) -> bytes:
    openvino = _openvino()
    shape = [-1, *example.shape[1:]]
    with _quiet():
        # Left to OpenVINO, the trace is made thrice, two thirds of the time; we compare features.
        trace = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
        model = openvino.convert_model(trace, example_input=example, input=shape, extension=_additions())
    with tempfile.TemporaryDirectory() as folder:
        graph, weights = Path(folder, "graph.xml"), Path(folder, "graph.bin")
        openvino.serialize(model, str(graph), str(weights))
        text = graph.read_bytes()
        return len(text).to_bytes(8, "little") + text + weights.read_bytes()


def _start_openvino(blob: Blob, threads: int) -> Engine:
    openvino = _openvino()
    end = 8 + int.from_bytes(blob[:8].tobytes(), "little")
    # A copy: weights must be aligned, and the compiled network may go on reading them.
    weights = openvino.Tensor(np.array(blob[end:]))
    core = openvino.Core()
    model = core.read_model(model=blob[8:end].tobytes(), weights=weights)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # It would take bfloat16 where the processor has it: 1.8 % off on Keras' MobileNetV2.
        "INFERENCE_PRECISION_HINT": "f32",
        # Two workers would be pinned to the same cores.
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(model, "CPU", settings)

    def run(images: torch.Tensor) -> torch.Tensor:
        # The answer is copied: it lies in memory that the next call writes to.
        return torch.from_numpy(compiled(images.contiguous().numpy())[0].copy())

    return run


@functools.cache
def _openvino() -> Any:
    """The `openvino` module, imported without its telemetry.

    Left alone, `import openvino` reports to Google Analytics unless the user has opted out. Without the
    package `openvino_telemetry` it takes a stand-in that does nothing.
    """
    name = "openvino_telemetry"
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        import openvino

        return openvino
    finally:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before


def _additions() -> list[Any]:
    """Operations that OpenVINO does not know by these names; Keras uses them."""
    from openvino import opset8
    from openvino.frontend.pytorch import ConversionExtension

    def subtract(node: Any) -> Any:
        return [opset8.subtract(node.get_input(0), node.get_input(1)).output(0)]

    return [ConversionExtension("aten::subtract", subtract)]


# --- ONNX Runtime -----------------------------------------------------------------------------------


def _convert_onnx(network: FrozenFeatures, example: torch.Tensor) -> bytes:
    batch = torch.export.Dim("batch", min=1, max=4096)
    with _quiet():
        program = torch.onnx.export(
            network, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    assert program is not None
    found: bytes = program.model_proto.SerializeToString()
    return found


def _start_onnx(blob: Blob, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(blob.tobytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: images.contiguous().numpy()})[0])

    return run


# In order of preference: equally fast (bench/forward.py), but OpenVINO converts in a fifth of the time.
CONVERTERS = (
    Converter("openvino", ("openvino",), _convert_openvino, _start_openvino, 0.3, 0.003),
    Converter("onnxruntime", ("onnxruntime", "onnx", "onnxscript"), _convert_onnx, _start_onnx, 1.0, 0.045),
)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' warnings, which are about what the comparison of features decides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
