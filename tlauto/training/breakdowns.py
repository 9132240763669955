"""What torch's errors mean: a full memory, a lost device, or neither."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from tlauto.errors import DeviceLost, OutOfMemory

# torch has an exception for a full GPU, but a full main memory is a bare RuntimeError.
FULL_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
# After most errors of CUDA every later call of the process fails as well, often at a place that has
# nothing to do with it: whichever it was, the process is not trusted any more.
LOST_DEVICE = re.compile(
    r"CUDA error|CUDA driver error|device-side assert|uncorrectable ECC|CUBLAS_STATUS_"
    r"|CUDNN_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR|NOT_INITIALIZED)",
    re.IGNORECASE,
)
ASKED = re.compile(r"allocate (\d+(?:\.\d+)?) (bytes|[KMGTPE]iB)\b", re.IGNORECASE)
PREFIXES = "bkmgtpe"  # of units, each 1,024 times the one before; b is for bytes


@contextlib.contextmanager
def breakdowns(where: str) -> Iterator[None]:
    """Turn the many ways to run out of memory into OutOfMemory, and to lose a GPU into DeviceLost.

    Args:
        where: for the message, such as `on cuda with batches of 16 images`.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or FULL_MEMORY.search(text):
            message = f"out of memory {where}; a smaller batch or backbone needs less"
            raise OutOfMemory(message, bytes=asked_bytes(text)) from error
        if LOST_DEVICE.search(text):
            raise DeviceLost(f"the device was lost {where}: {text.splitlines()[0]}") from error
        raise


def asked_bytes(text: str) -> int | None:
    """Bytes that torch or NumPy say they could not get; None when they do not say."""
    found = ASKED.search(text)
    return int(float(found[1]) * 1024 ** PREFIXES.index(found[2][0].lower())) if found else None
