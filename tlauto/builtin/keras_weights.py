"""Weights of Keras Applications: where they lie, whether they can be had, loading and downloading.

Files keep the library's own names (`mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224_no_top.h5`,
with or without classifier) or ours (`MobileNetV2.h5`, `MobileNetV2.weights.h5`).
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tlauto.builtin import weights as files
from tlauto.builtin.keras_catalogue import Application
from tlauto.contracts import WeightsOptions, WeightsStatus
from tlauto.errors import WeightsError

DOWNLOAD_HOST = "https://storage.googleapis.com"
STALLED_AFTER_S = 60.0
# Keras' deviations for EfficientNet's input, see `_scale_variance`.
_EFFICIENTNET_STD = (0.229, 0.224, 0.225)


def status(application: Application, weights: WeightsOptions) -> WeightsStatus:
    """Whether the application's weights are at hand, downloadable or missing; never downloads."""
    if not weights.pretrained:
        return files.random_status()
    found = locate(application, weights)
    if found is not None:
        origin, path = found
        return WeightsStatus("at_hand", f"{origin}: {path}", str(path))
    stems = [name.removesuffix(".h5") for name in application.files]
    return files.absent_status(
        application.id, stems, weights, source="Keras' storage, storage.googleapis.com", cache=str(cache())
    )


def locate(application: Application, weights: WeightsOptions) -> tuple[str, Path] | None:
    """Where the application's weights lie (in words) and the file; None when they are not here.

    Raises: WeightsError when a file or folder that the user named does not exist.
    """
    chosen = files.chosen_file([application.id], weights)
    if chosen is not None:
        return "--weights", chosen
    local = files.folder_files(weights.folder, "keras")
    stems = [name.removesuffix(".h5") for name in application.files]
    for stem in (*stems, f"{application.name}.weights", application.name):
        if stem in local:
            return "weights folder", local[stem]
    for name in application.files:
        if (cache() / name).is_file():
            return "cache", cache() / name
    return None


def cache() -> Path:
    """The folder Keras downloads weights to (`KERAS_HOME` moves it)."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras", "models")


def fetch(application: Application, weights: WeightsOptions) -> Path:
    """The file with the application's weights, downloaded into Keras' cache when it is not here.

    Raises: WeightsError when they are not here and may not, or cannot, be downloaded; without a
    network in seconds.
    """
    found = locate(application, weights)
    if found is not None:
        return found[1]
    state = status(application, weights)
    if state.state == "missing":
        raise WeightsError(state.detail)
    return _download(application)


def load(model: Any, application: Application, path: Path) -> None:
    """Load a weights file, with or without classifier, into a model without one.

    Raises: WeightsError when the file is damaged or holds weights of another network.
    """
    from tlauto.keras_network import finalize

    reason = _try_load(model, path)
    if reason is not None and not _load_without_classifier(model, application, path):
        raise files.wrong_weights(application.id, path, reason)
    if application.function.startswith("EfficientNetB"):
        _scale_variance(model)
    finalize(model)


def _try_load(model: Any, path: Path) -> str | None:
    """Load strictly; returns why the file does not fit, raises WeightsError when it is damaged."""
    if path.suffix not in (".h5", ".keras"):
        raise WeightsError(
            f"the weights file '{path}' cannot be read: Keras reads .h5, .weights.h5 and .keras"
        )
    # Keras only warns of layers that a file lacks, and leaves them as they were: mark them.
    for variable in model.weights:
        if "float" in variable.dtype:
            variable.assign(variable * math.nan)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model.load_weights(str(path))
    except ValueError as error:
        return " ".join(str(error).split())[:200]
    except (OSError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(
            f"the weights file '{path}' cannot be read: it is damaged or no HDF5 file ({reason}); "
            f"delete it and fetch it again"
        ) from None
    lacking = [variable.path for variable in model.weights if variable.value.isnan().any()]
    return f"it lacks '{lacking[0]}' ({len(lacking)} in all)" if lacking else None


def _load_without_classifier(model: Any, application: Application, path: Path) -> bool:
    """Whether the file fitted the network with its classifier, whose other weights are then taken."""
    from tlauto.keras_network import build_model

    whole = build_model(application, include_top=True)
    if _try_load(whole, path) is not None:
        return False
    # The classifier's layers come last, so the weights before them are ours in the same order.
    for ours, theirs in zip(model.weights, whole.weights, strict=False):
        ours.assign(theirs)
    return True


def _scale_variance(model: Any) -> None:
    """Give EfficientNet the input scaling that goes with its ImageNet weights.

    Keras adds a layer that divides by the root of the standard deviations, and only when it
    downloads the weights itself; without it the same file gives other features. Dividing the
    normalised input by sqrt(s) is to multiply the variance it is normalised with by s.
    """
    from tlauto.keras_network import import_keras, leaf_layers

    keras = import_keras()
    for layer in leaf_layers(model):
        if isinstance(layer, keras.layers.Normalization):
            for variable in layer.weights:
                if variable.name == "variance":
                    variable.assign(variable * keras.ops.array(_EFFICIENTNET_STD))


def _download(application: Application) -> Path:
    from tlauto.keras_network import build_model

    files.check_network(DOWNLOAD_HOST, id=application.id)
    try:
        # Keras reports progress on stdout, which is for results.
        with contextlib.redirect_stdout(sys.stderr), _stall_limit():
            build_model(application, weights="imagenet")
    except Exception as error:  # noqa: BLE001 Keras raises a bare Exception when a download fails
        raise files.download_failed(application.id, DOWNLOAD_HOST, error) from None
    path = cache() / application.files[0]
    if not path.is_file():
        raise WeightsError(
            f"Keras downloaded the weights of {application.id} elsewhere than '{path}'; is its folder "
            f"writable? (KERAS_HOME moves it)"
        )
    return path


@contextlib.contextmanager
def _stall_limit() -> Iterator[None]:
    """Sockets that give up after a while; Keras' download waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALLED_AFTER_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
