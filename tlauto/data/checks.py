"""Decode every image once, in threads, and remember what was found."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tlauto.data.images import decode
from tlauto.data.memory import Memory, Stamp, stamp_of
from tlauto.devices import available_cores, cache_folder
from tlauto.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Array = np.ndarray

LOOK_SIDE = 32
"""Side of the grey thumbnail that near duplicates are found by, pixels."""
TINT_SIDE = 4
"""Side of the colour thumbnail that tells equal shapes of other colours apart, pixels."""

LOOK_BYTES = LOOK_SIDE**2 + 3 * TINT_SIDE**2
"""Bytes of a look: `LOOK_SIDE`² grey ones, then `TINT_SIDE`² of RGB."""

AHEAD = 8  # files a thread that are read before the first of them is asked for


@dataclass(frozen=True, slots=True)
class FileCheck:
    """What one file turned out to be.

    Attributes:
        problem: why it cannot be used, or empty; then the rest is empty except perhaps `sha256`.
        sha256: of the file's bytes.
        pixels: hash of the upright RGB pixels and their size.
        look: base64 of `LOOK_BYTES` bytes.
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
    files: Sequence[str],
    *,
    memory: Path | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[FileCheck], Array]:
    """One `FileCheck` per file, in order, without its `look`, and the looks of all.

    Args:
        memory: a JSON-lines file of earlier results; a file of the same path, size and time of change
            is not opened again. It is written anew at the end, and when interrupted.
        workers: threads; None is one per usable core.
        progress: called with (done, total) from this thread.

    Returns: the checks, and `LOOK_BYTES` bytes of each file (N, 1072) uint8, zeros where there is no
    look, on disk: together they would take more memory than all else that is known of the images.
    """
    checks: list[FileCheck] = []
    with tempfile.TemporaryFile(buffering=0) as looks, Memory(memory) as known, warnings.catch_warnings():
        # Pillow warns of odd metadata and of very large images; both are decoded all the same.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        done = sum(stamp_of(file) in known for file in files) if progress else 0
        for check, is_new in _checked(files, known, workers or min(16, available_cores())):
            _keep(looks, base64.b64decode(check.look) or bytes(LOOK_BYTES))
            checks.append(replace(check, look=""))
            if progress and is_new:
                done += 1
                progress(done, len(files))
        return checks, _mapped(looks, len(files))


def _checked(files: Sequence[str], known: Memory, workers: int) -> Iterator[tuple[FileCheck, bool]]:
    """The check of each file, in order, and whether the file was opened for it."""
    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Stamp, Future[FileCheck] | FileCheck]] = deque()

    def first() -> tuple[FileCheck, bool]:
        stamp, found = waiting.popleft()
        if isinstance(found, FileCheck):
            return found, False
        check = found.result()
        if check.sha256:  # else it could not be opened, which can change without its stamp changing
            known.add(stamp, asdict(check))
        return check, True

    try:
        for file in files:
            stamp = stamp_of(file)
            waiting.append((stamp, _recalled(known, stamp) or pool.submit(check_file, Path(file))))
            if len(waiting) > AHEAD * workers:
                yield first()
        while waiting:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


def _recalled(known: Memory, stamp: Stamp) -> FileCheck | None:
    found = known.find(stamp)
    with contextlib.suppress(TypeError):
        return None if found is None else FileCheck(**found)
    return None


def _keep(looks: IO[bytes], look: bytes) -> None:
    # Written as a stream, not through a memory map: a full disk is then an error, not a crash.
    try:
        if looks.write(look) < len(look):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        folder = tempfile.gettempdir()
        raise DataError(
            f"cannot keep thumbnails in {folder}: {error.strerror}; make room there or set TMPDIR"
        ) from None


def _mapped(looks: IO[bytes], count: int) -> Array:
    import numpy as np

    if not count:
        return np.empty((0, LOOK_BYTES), np.uint8)
    # The file has no name: it goes with the last who has it mapped.
    return np.memmap(looks, np.uint8, "r", shape=(count, LOOK_BYTES))


def memory_file(root: str | Path) -> Path:
    """Where the checks of a dataset are remembered, in the user's cache folder (or `TLAUTO_CACHE`)."""
    name = hashlib.sha256(os.fsencode(os.path.abspath(root))).hexdigest()[:16]
    return cache_folder() / "checks" / f"{name}.jsonl"


def _look(image: Image) -> str:
    from PIL.Image import Resampling

    small = image.resize((LOOK_SIDE, LOOK_SIDE), Resampling.BILINEAR, reducing_gap=4.0)
    tint = small.resize((TINT_SIDE, TINT_SIDE), Resampling.BOX)
    return base64.b64encode(small.convert("L").tobytes() + tint.tobytes()).decode()
