"""Open any ordinary image file as upright RGB, or say why it cannot be done."""

from __future__ import annotations

import contextlib
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlauto.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm")
)
"""Lower-case suffixes of the files that count as images in a folder."""

# Named one by one so that a file of another format behind a `.jpg` never reaches Pillow's rarer
# readers, some of which start other programs.
# (Multi-picture JPEGs come through JPEG.)
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM")
_ORIENTATION = 0x0112

# What Pillow's readers raise on damaged files, beside OSError.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    EOFError,
    RuntimeError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Decoded:
    """An image and what its file said.

    Attributes:
        image: upright, mode RGB.
        format: Pillow's name, e.g. `JPEG`.
        mode: Pillow's mode in the file, e.g. `L`, `P`, `RGBA`, `I;16`, `CMYK`.
        is_rotated: EXIF asked for a rotation or mirroring, which was done.
        is_animated: it has more frames; `image` is the first.
    """

    image: Image
    format: str
    mode: str
    is_rotated: bool
    is_animated: bool


def is_image_name(name: str) -> bool:
    """Whether a file name has an image's suffix, in either case."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def open_rgb(path: str | Path) -> Image:
    """The image in mode RGB, upright, fully decoded.

    EXIF rotation is applied; of several frames the first is taken; transparency is laid over white;
    16-bit greys are scaled by 255/65535; 32-bit integers beyond 16 bits and floats outside [0, 1] and
    [0, 255] by the image's own range; palette, greyscale and CMYK are converted.

    Raises: DataError naming the file when it is missing, empty, damaged, truncated or no image.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot open image '{path}': {error.strerror}") from None
    try:
        return decode(data).image
    except DataError as error:
        raise DataError(f"cannot read image '{path}': {error}") from None


def decode(data: bytes) -> Decoded:
    """Decode the bytes of an image file; see `open_rgb` for how modes are converted.

    Raises: DataError whose text is only the reason, e.g. "truncated".
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise DataError("empty file (0 bytes)")
    # A Pillow built without WebP does not know that name.
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    try:
        with Image.open(BytesIO(data), formats=formats) as opened:
            # Pillow itself turns a TIFF upright when it loads it, and forgets that it did.
            was_turned = opened.format == "TIFF" and _turn(opened) is not None
            opened.load()
            turn = _turn(opened)
            rgb = _to_rgb(opened)
            return Decoded(
                image=rgb if turn is None else rgb.transpose(turn),
                format=str(opened.format),
                mode=opened.mode,
                is_rotated=was_turned or turn is not None,
                is_animated=_is_animated(opened),
            )
    except UnidentifiedImageError:
        raise DataError(_what_it_is(data)) from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise DataError(f"larger than {limit} million pixels; scale it down first") from None
    except _DAMAGE as error:
        raise DataError(_damage(error)) from None


def _turn(image: Image) -> Any:
    """The transposition that makes the image upright, or None."""
    from PIL import Image

    turns = Image.Transpose
    by_orientation = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except _DAMAGE:
        # A damaged EXIF block says nothing about rotation; the pixels are whole.
        return None
    return by_orientation.get(orientation) if isinstance(orientation, int) else None


def _to_rgb(image: Image) -> Image:
    from PIL import Image

    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        # Over white: what lies under transparent pixels is arbitrary and never seen by a person.
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image).convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError:
        raise DataError(f"colour mode {image.mode} cannot be converted to RGB") from None


def _deep_grey(image: Image) -> Image:
    """A greyscale image of 16 bits, 32 bits or floats as 8 bits (mode L)."""
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise DataError("holds values that are not numbers")
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0.0, 1.0 if high <= 1 else 255.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def _is_animated(image: Image) -> bool:
    # Looks at the start of the second frame, which may be damaged; the first was decoded whole.
    with contextlib.suppress(*_DAMAGE):
        return bool(getattr(image, "is_animated", False))
    return False


def _damage(error: Exception) -> str:
    text = str(error)
    if isinstance(error, DataError):
        return text
    if "truncated" in text.lower() or isinstance(error, (EOFError, struct.error)):
        return "truncated"
    return f"damaged ({text})" if text else "damaged"


def _what_it_is(data: bytes) -> str:
    """Why Pillow knows no format for these bytes, as far as their start tells."""
    head = data[:64]
    if head.startswith((b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")):
        return "damaged or truncated at its start"
    if head[4:8] == b"ftyp":
        kind = "HEIC" if head[8:11] in (b"hei", b"hev", b"mif", b"msf") else "AVIF or video"
        return f"{kind} data; convert it to JPEG or PNG"
    if head.startswith(b"%PDF"):
        return "a PDF, not an image"
    if not data.strip(b"\0"):
        return "only zero bytes"
    if all(byte in b"\t\n\r\f" or byte >= 32 for byte in data[:512]):
        return "text, not an image"
    return "not an image of a known format"
