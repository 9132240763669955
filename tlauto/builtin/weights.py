"""Where pretrained weights lie, whether they can be had, and reading them safely.

Layout of a weights folder (`--weights-dir`, `TLAUTO_WEIGHTS`):

    <folder>/<provider>/<name>.safetensors      also .pth .pt .bin .h5 .npz, or the library's own file name
    <folder>/<provider>/<name>.json             optional facts about the file of the same stem
    <folder>/<provider>/<name>/model.safetensors    a model folder as downloaded from a hub

Files are read by `tlauto.backbone.read_tensors`, which never unpickles an object.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlauto.contracts import WeightsOptions, WeightsStatus
from tlauto.errors import WeightsError

if TYPE_CHECKING:
    pass

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz", ".h5", ".keras")
CONNECT_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Sidecar:
    """What a `<name>.json` beside a weights file says; None where it is silent.

    Attributes:
        kwargs: arguments to build the network with, beside its name.
        mean, std, interpolation, crop_pct, input_size: its preprocessing.
        licence, pretraining: facts for `BackboneInfo`.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    input_size: int | None = None
    licence: str | None = None
    pretraining: str | None = None


def folder_files(folder: str | None, provider: str) -> dict[str, Path]:
    """Weights files of one provider in a weights folder: name (file name without suffix) to path.

    A folder `<name>` with a `model.safetensors` counts as a file `<name>`. Raises: WeightsError when
    `folder` is given and is not a folder. A folder without `<provider>/` gives nothing.
    """
    if folder is None:
        return {}
    if not Path(folder).is_dir():
        raise WeightsError(
            f"the weights folder '{folder}' does not exist; give --weights-dir (or TLAUTO_WEIGHTS) a folder "
            f"that holds <provider>/<file>, such as timm/resnet18.safetensors"
        )
    base = Path(folder, provider)
    files: dict[str, Path] = {}
    for path in sorted(base.iterdir()) if base.is_dir() else ():
        if path.is_dir() and (path / "model.safetensors").is_file():
            files.setdefault(path.name, path / "model.safetensors")
        elif path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("."):
            files.setdefault(path.name.removesuffix(path.suffix), path)
    return files


def chosen_file(ids: Sequence[str], weights: WeightsOptions) -> Path | None:
    """The file that `--weights ID=PATH` gives for any of these spellings of one id, or None.

    Raises: WeightsError when that file does not exist.
    """
    for id in ids:
        if id in weights.files:
            path = Path(weights.files[id])
            if not path.is_file():
                raise WeightsError(f"the weights file '{path}' of {id} does not exist (from --weights)")
            return path
    return None


def read_sidecar(path: Path) -> Sidecar:
    """What the `.json` beside a weights file says; an empty `Sidecar` when there is none.

    Raises: WeightsError when it is not a JSON object of the known keys.
    """
    file = path.with_name(path.name.removesuffix(path.suffix) + ".json")
    if not file.is_file():
        return Sidecar()
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        for key in ("mean", "std"):
            if key in data:
                data[key] = tuple(float(value) for value in data[key])
        return Sidecar(**data)
    except (ValueError, TypeError) as error:
        known = ", ".join(Sidecar.__dataclass_fields__)
        raise WeightsError(
            f"'{file}' does not describe weights: {error} (a JSON object of {known})"
        ) from None


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def wrong_weights(id: str, path: Path, reason: str) -> WeightsError:
    """The error for a file that holds weights of another architecture."""
    return WeightsError(
        f"'{path}' does not hold weights of {id}: {reason}; give the file of this architecture"
    )


# --- the network ------------------------------------------------------------------------------------


def is_offline(weights: WeightsOptions) -> bool:
    """Whether the network must not be touched, by `--offline` or `HF_HUB_OFFLINE`."""
    return weights.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def check_network(url: str, *, id: str) -> None:
    """Raise WeightsError within seconds when the host of `url` (or the proxy to it) cannot be reached.

    The hub's own client retries for 47 s without a network before it says so.
    """
    address = urllib.parse.urlsplit(_proxy_for(url) or url)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise WeightsError(
            f"the weights of {id} must be downloaded and {address.hostname} cannot be reached ({error}); "
            f"give a local file with --weights {id}=PATH or a folder with --weights-dir"
        ) from None


def download_failed(id: str, url: str, error: BaseException) -> WeightsError:
    """The error for a download that broke off."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return WeightsError(f"the weights of {id} could not be downloaded from {url}: {reason[:300]}")


def random_status() -> WeightsStatus:
    """The status of every backbone when random initialisation was asked for."""
    return WeightsStatus("at_hand", "random initialisation, as --no-pretrained asks")


def absent_status(
    id: str, names: Iterable[str], weights: WeightsOptions, *, source: str | None, cache: str
) -> WeightsStatus:
    """The status of weights that are neither given, nor in the folder, nor in the library's cache.

    Args:
        names: what the file could be called in the weights folder, without suffix.
        source: where the library would download them from; None when they are published nowhere.
        cache: the folder of the library's cache.
    """
    provider = id.partition(":")[0]
    wanted = " or ".join(f"{provider}/{name}.*" for name in names)
    looked = f"{weights.folder}/{provider} and {cache}" if weights.folder else cache
    if source is None:
        return WeightsStatus(
            "missing", f"nobody publishes weights of {id}; name a file with --weights {id}=PATH"
        )
    if is_offline(weights):
        return WeightsStatus(
            "missing",
            f"the weights of {id} are not in {looked}, and --offline forbids the download; give a "
            f"--weights-dir that holds {wanted}, use --weights {id}=PATH, or fetch them first with "
            f"'tlauto weights fetch {id}'",
        )
    return WeightsStatus("downloadable", f"to be downloaded from {source}")


def _proxy_for(url: str) -> str | None:
    parts = urllib.parse.urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    proxy = urllib.request.getproxies().get(parts.scheme)
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"
