"""The libraries' own weight caches and downloads: the Hugging Face hub's and torch.hub's."""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.parse
from pathlib import Path, PurePosixPath

from tlauto.builtin import weights as files
from tlauto.errors import WeightsError

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")


def source(hub_id: str | None, url: str | None) -> str | None:
    """Where weights would be downloaded from, in words; None when they are published nowhere."""
    if hub_id:
        return f"the Hugging Face hub, {hub_id.partition('@')[0]}"
    return urllib.parse.urlsplit(url).netloc if url else None


def cache_folder(hub_id: str | None) -> str:
    """The folder of the cache in which weights of this kind would lie."""
    if hub_id:
        from huggingface_hub import constants

        return str(constants.HF_HUB_CACHE)
    return str(torch_folder())


def torch_folder() -> Path:
    """torch.hub's folder of checkpoints (`TORCH_HOME` moves it)."""
    import torch

    return Path(torch.hub.get_dir(), "checkpoints")


def cached(hub_id: str | None, filename: str | None, url: str | None) -> Path | None:
    """The file in the hub's or torch's cache, or None; never touches the network."""
    if hub_id:
        from huggingface_hub import try_to_load_from_cache

        repo, _, revision = hub_id.partition("@")
        for name in (filename,) if filename else HUB_FILES:
            found = try_to_load_from_cache(repo, name, revision=revision or None)
            if isinstance(found, str):
                return Path(found)
    if url:
        path = torch_folder() / PurePosixPath(urllib.parse.urlsplit(url).path).name
        return path if path.is_file() else None
    return None


def download(hub_id: str | None, filename: str | None, url: str | None, *, id: str) -> Path:
    """Download weights into the library's own cache and return the file.

    Raises: WeightsError, within seconds when there is no network.
    """
    if hub_id:
        return _download_from_hub(hub_id, filename, id=id)
    if url:
        return _download_url(url, id=id)
    raise WeightsError(f"nobody publishes weights of {id}; name a file with --weights {id}=PATH")


def _download_from_hub(hub_id: str, filename: str | None, *, id: str) -> Path:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    files.check_network(constants.ENDPOINT, id=id)
    repo, _, revision = hub_id.partition("@")
    # The base class is the error of the hub's HTTP client, whichever client its version uses.
    broken: tuple[type[BaseException], ...] = (EntryNotFoundError, OSError, *HfHubHTTPError.__bases__)
    reason: BaseException = WeightsError("it holds no weights file of a known name")
    for name in (filename,) if filename else HUB_FILES:
        try:
            return Path(hf_hub_download(repo, name, revision=revision or None))
        except broken as error:
            # "Local" means that the hub could not be asked, not that it has no such file.
            if isinstance(error, LocalEntryNotFoundError) or not isinstance(error, EntryNotFoundError):
                raise files.download_failed(id, f"{constants.ENDPOINT}/{repo}", error) from None
            reason = error
    raise files.download_failed(id, f"{constants.ENDPOINT}/{repo}", reason)


def _download_url(url: str, *, id: str) -> Path:
    import torch

    files.check_network(url, id=id)
    folder = torch_folder()
    name = PurePosixPath(urllib.parse.urlsplit(url).path).name
    digest = HASH_IN_NAME.search(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Writes a temporary file beside it, checks the hash, then renames.
        torch.hub.download_url_to_file(
            url, os.fspath(folder / name), digest.group(1) if digest else None, progress=False
        )
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise files.download_failed(id, url, error) from None
    return folder / name
