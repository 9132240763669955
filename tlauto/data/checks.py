"""Decode every image once, in threads, and remember what was found."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlauto.data.images import decode
from tlauto.devices import available_cores, cache_folder
from tlauto.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

LOOK_SIDE = 32
"""Side of the grey thumbnail that near duplicates are found by, pixels."""
TINT_SIDE = 4
"""Side of the colour thumbnail that tells equal shapes of other colours apart, pixels."""

# Raise it when what `check_file` finds changes, so that older results are not believed.
_VERSION = 1


@dataclass(frozen=True)
class FileCheck:
    """What one file turned out to be.

    Attributes:
        problem: why it cannot be used, or empty; then the rest is empty except perhaps `sha256`.
        sha256: of the file's bytes.
        pixels: hash of the upright RGB pixels and their size.
        look: base64 of `LOOK_SIDE`² grey bytes and `TINT_SIDE`² RGB bytes.
    """

    problem: str = ""
    sha256: str = ""
    pixels: str = ""
    look: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    is_rotated: bool = False
    is_animated: bool = False


def check_file(file: Path) -> FileCheck:
    """Decode one file fully; a file that cannot be used has its `problem` set."""
    try:
        # Reading a pipe would wait for ever.
        data = file.read_bytes() if stat.S_ISREG(file.stat().st_mode) else None
    except OSError as error:
        return FileCheck(problem=f"cannot be opened: {error.strerror}")
    if data is None:
        return FileCheck(problem="not a regular file")
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        decoded = decode(data)
    except DataError as error:
        return FileCheck(problem=str(error), sha256=sha256)
    image = decoded.image
    return FileCheck(
        sha256=sha256,
        pixels=hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()[:32],
        look=_look(image),
        format=decoded.format,
        mode=decoded.mode,
        width=image.width,
        height=image.height,
        is_rotated=decoded.is_rotated,
        is_animated=decoded.is_animated,
    )


def check_files(
    files: Sequence[Path],
    *,
    memory: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[FileCheck]:
    """One `FileCheck` per file, in order.

    Args:
        memory: a JSON-lines file of earlier results; a file of the same path, size and time of change
            is not opened again. It is written anew at the end, and when interrupted.
        workers: threads; None is one per usable core.
        progress: called with (done, total) from this thread.
    """
    stamps = [_stamp(file) for file in files]
    known = _recall(memory)
    results: dict[int, FileCheck] = {
        index: known[stamp] for index, stamp in enumerate(stamps) if stamp in known
    }
    missing = [index for index in range(len(files)) if index not in results]
    pool = ThreadPoolExecutor(workers or min(16, available_cores()))
    try:
        # Pillow warns of odd metadata and of very large images; both are decoded all the same.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            waiting = {pool.submit(check_file, files[index]): index for index in missing}
            for done in as_completed(waiting):
                results[waiting[done]] = done.result()
                if progress is not None:
                    progress(len(results), len(files))
    finally:
        pool.shutdown(cancel_futures=True)
        if memory is not None and missing:
            _remember(memory, {stamps[index]: check for index, check in results.items()})
    return [results[index] for index in range(len(files))]


def brightest(look: str) -> int:
    """The highest grey level, 0 to 255, of a `FileCheck.look`."""
    return max(base64.b64decode(look)[: LOOK_SIDE**2])


def memory_file(root: str | Path) -> Path:
    """Where the checks of a dataset are remembered, in the user's cache folder (or `TLAUTO_CACHE`)."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return cache_folder() / "checks" / f"{name}.jsonl"


def _look(image: Image) -> str:
    from PIL.Image import Resampling

    small = image.resize((LOOK_SIDE, LOOK_SIDE), Resampling.BILINEAR, reducing_gap=4.0)
    tint = small.resize((TINT_SIDE, TINT_SIDE), Resampling.BOX)
    return base64.b64encode(small.convert("L").tobytes() + tint.tobytes()).decode()


# --- memory ----------------------------------------------------------------------------------------

_Stamp = tuple[str, int, int]


def _stamp(file: Path) -> _Stamp:
    """Path, size and time of change; a file that is not there has size -1."""
    try:
        status = file.stat()
    except OSError:
        return str(file), -1, 0
    return str(file), status.st_size, status.st_mtime_ns


def _recall(memory: Path | None) -> dict[_Stamp, FileCheck]:
    """Earlier results by stamp; lines of another version or that do not parse are passed over."""
    known: dict[_Stamp, FileCheck] = {}
    if memory is None:
        return known
    try:
        lines = memory.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return known
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            data: dict[str, Any] = json.loads(line)
            if data["version"] == _VERSION:
                known[(data["path"], data["size"], data["changed_ns"])] = FileCheck(**data["check"])
    return known


def _remember(memory: Path, checks: Mapping[_Stamp, FileCheck]) -> None:
    # Without a hash the file could not be opened, which can change without its stamp changing.
    lines = (_line(stamp, check) for stamp, check in checks.items() if check.sha256)
    # A memory that cannot be written costs time at the next run and nothing else.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=memory.parent, prefix=memory.name, delete=False
        ) as new:
            new.writelines(lines)
        os.replace(new.name, memory)


def _line(stamp: _Stamp, check: FileCheck) -> str:
    path, size, changed_ns = stamp
    data = {"version": _VERSION, "path": path, "size": size, "changed_ns": changed_ns, "check": asdict(check)}
    return json.dumps(data) + "\n"
