"""A bundle's folder: written whole or not at all, read only from within itself."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tlauto.errors import ConfigError, DataError
from tlauto.results.manifest import MANIFEST_FILE

BLOCK = 1 << 20
LEFTOVER_S = 3600.0
"""Age from which a half-written folder belongs to a process that was killed."""


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when the block ends without an exception.

    An older bundle there stays usable until then. Raises: ConfigError when `folder` holds something
    else than a bundle, or when the place cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and not _may_replace(folder):
        raise ConfigError(f"{folder} is not a model bundle and is left alone; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        # Beside the target: a rename is atomic only within one file system.
        new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".new", dir=folder.parent))
    except OSError as error:
        raise ConfigError(f"cannot write a model bundle to {folder}: {error.strerror or error}") from None
    try:
        yield new
        _make_readable(new)
        _swap(new, folder)
    except OSError as error:
        raise ConfigError(f"cannot write a model bundle to {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _may_replace(folder: Path) -> bool:
    return folder.is_dir() and ((folder / MANIFEST_FILE).is_file() or not any(folder.iterdir()))


def _sweep(folder: Path) -> None:
    """Remove what killed processes left beside `folder`."""
    for suffix in (".new", ".old"):
        for left in folder.parent.glob(f".{glob.escape(folder.name)}-*{suffix}"):
            if time.time() - left.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(left, ignore_errors=True)


def _swap(new: Path, folder: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".old", dir=folder.parent))
    folder.rename(old)  # onto the empty folder: POSIX replaces it
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _make_readable(folder: Path) -> None:
    """Give folder and files the usual rights: mkdtemp and safetensors make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~mask)


def own_file(folder: Path, name: str) -> Path:
    """The file `name` of a bundle.

    Raises: DataError when it is missing, not a plain file, or a link that leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{path} leads out of the bundle's folder; it is not read")
    if not path.is_file() and name == MANIFEST_FILE:
        raise DataError(
            f"{folder} is not a model bundle: it has no {name} "
            f"('tlauto search' leaves a bundle in <out>/<study>/model)"
        )
    if not path.is_file():
        raise DataError(f"the model bundle {folder} is incomplete: {name} is missing; copy it whole")
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex; raises DataError when it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()
