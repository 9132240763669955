"""A small dataset of real images that comes with a dependency: scikit-learn's handwritten digits."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from tlauto.errors import ConfigError

MOST_PER_CLASS = 174
"""Images of the rarest digit."""


def write_digits(folder: str | Path, *, per_class: int = 60, size: int = 64) -> int:
    """Write handwritten digits as greyscale PNGs into class folders 0 to 9; how many there are.

    The same arguments always write the same bytes. A folder that already holds exactly these files
    is left as it is.

    Args:
        per_class: 1 to `MOST_PER_CLASS`, the first ones in scikit-learn's order.
        size: side in pixels; the 8x8 originals are enlarged bicubically.

    Raises: ConfigError when the folder holds other files or cannot be written, or for `per_class`
    out of range.
    Source: UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak), test set.
    """
    if not 1 <= per_class <= MOST_PER_CLASS:
        raise ConfigError(f"{per_class} images per class is outside 1 to {MOST_PER_CLASS}")
    root = Path(folder)
    files = _digits(per_class, size)
    try:
        _require_ours(root, files)
        for name, data in files.items():
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"cannot write to '{root}': {error.strerror}; choose another folder") from None
    return len(files)


def _digits(per_class: int, size: int) -> dict[str, bytes]:
    """PNG bytes by file name."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    files: dict[str, bytes] = {}
    for digit in range(10):
        for index in np.flatnonzero(digits.target == digit)[:per_class]:
            # 17 grey levels, 0 to 16.
            pixels = np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)
            png = BytesIO()
            Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC).save(png, "PNG")
            files[f"{digit}/{index:04d}.png"] = png.getvalue()
    return files


def _require_ours(root: Path, files: dict[str, bytes]) -> None:
    """Raises ConfigError when the folder holds a file that would not be written just so."""
    if root.exists() and not root.is_dir():
        raise ConfigError(f"'{root}' is a file; choose a folder")
    for file in sorted(root.rglob("*")) if root.exists() else []:
        name = file.relative_to(root).as_posix()
        if file.is_file() and (name not in files or file.read_bytes() != files[name]):
            raise ConfigError(f"'{root}' holds other files, such as {name}; choose an empty or new folder")
