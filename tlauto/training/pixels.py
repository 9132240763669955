"""Images as a backbone wants them, decoded and resized once for all trials.

What is kept of an image is a square window whose centre crop is exactly the crop that the
library's own pipeline makes; augmentation uses the margin around it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tlauto.contracts import ImageInput
from tlauto.data import Dataset, Item
from tlauto.data.images import open_rgb
from tlauto.training.arrays import cached_array

VERSION = 1  # raise it when the pixels change, so that old caches are not used
BLOCK = 256  # images decoded before they are written
GEOMETRY = ("size", "resize", "fit", "interpolation")


class Pixels:
    """Windows (R, R, 3) uint8 of some images, by index, read from the cache."""

    def __init__(self, parts: Sequence[np.ndarray], image_input: ImageInput) -> None:
        self.parts = tuple(parts)
        self.input = image_input

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def windows(self, indices: Sequence[int]) -> torch.Tensor:
        """Copies (N, R, R, 3) of the windows of some images; raises IndexError where there is none."""
        return torch.from_numpy(gather(self.parts, indices))

    def crops(self, indices: Sequence[int]) -> torch.Tensor:
        """The centre crops (N, 3, size, size) uint8 of some images."""
        parts = [centre_crop(part, self.input) for part in self.parts]
        return torch.from_numpy(gather(parts, indices)).permute(0, 3, 1, 2)


def gather(parts: Sequence[np.ndarray], indices: Sequence[int]) -> np.ndarray:
    """A copy (N, …) of some rows of arrays that lie one after the other.

    Raises: IndexError for a row before the first or after the last one.
    """
    rows, count, start = np.asarray(indices, np.int64), sum(map(len, parts)), 0
    if rows.size and not 0 <= rows.min() <= rows.max() < count:
        raise IndexError(f"rows {rows.min()} to {rows.max()} of {count}")
    found = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
    for part in parts:
        is_here = (start <= rows) & (rows < start + len(part))
        found[is_here] = part[rows[is_here] - start]
        start += len(part)
    return found


def load_pixels(dataset: Dataset, splits: Sequence[str], image_input: ImageInput, cache: str) -> Pixels:
    """The images of these splits, split after split; decoded now when the cache lacks them.

    Raises: DataError for an image that cannot be read; ConfigError when the cache is not writable.
    """
    return Pixels([_part(dataset, dataset.part(split), image_input, cache) for split in splits], image_input)


def decode(path: Path, image_input: ImageInput) -> np.ndarray:
    """The window (R, R, 3) uint8 of one file; raises DataError when it cannot be read."""
    return window_of(open_rgb(path), image_input)


def window_of(image: Image.Image, image_input: ImageInput) -> np.ndarray:
    """The window (R, R, 3) uint8 of an RGB image of any size, resized as `image_input` says."""
    size = _resized(image.size, image_input)
    if image.size != size:
        image = image.resize(size, Image.Resampling[image_input.interpolation.upper()])
    edge = window_edge(image_input)
    canvas = Image.new("RGB", (edge, edge), _fill(image_input))
    canvas.paste(image, (_origin(image.width, image_input), _origin(image.height, image_input)))
    return np.array(canvas)  # a copy: torch wants arrays that it may write to


def window_edge(image_input: ImageInput) -> int:
    """R, the side of the window in pixels."""
    return max(image_input.resize, image_input.size)


def centre_crop(window: np.ndarray, image_input: ImageInput) -> np.ndarray:
    """The crop (…, size, size, 3) in the middle of a window (…, R, R, 3)."""
    margin = _offset(window_edge(image_input), image_input.size)
    return window[..., margin : margin + image_input.size, margin : margin + image_input.size, :]


def contents(items: Sequence[Item], **more: object) -> str:
    """A short hash of the images' bytes, in order, and of whatever else decides a cached array."""
    text = json.dumps({"images": [item.sha256 for item in items], **more}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def geometry(image_input: ImageInput) -> dict[str, object]:
    """What decides the pixels of a window (mean and std do so only through the border's colour)."""
    data = asdict(image_input)
    return {"version": VERSION, "fill": _fill(image_input), **{name: data[name] for name in GEOMETRY}}


def _part(dataset: Dataset, items: Sequence[Item], image_input: ImageInput, cache: str) -> np.ndarray:
    edge = window_edge(image_input)

    def blocks(first: int) -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            for start in range(first, len(items), BLOCK):
                files = [dataset.file(item) for item in items[start : start + BLOCK]]
                yield np.stack(list(threads.map(lambda file: decode(file, image_input), files)))

    path = Path(cache, "pixels", contents(items, **geometry(image_input)) + ".npy")
    return cached_array(path, (len(items), edge, edge, 3), np.uint8, blocks)


def _resized(size: tuple[int, int], image_input: ImageInput) -> tuple[int, int]:
    """Width and height after the resize, rounded as torchvision (crop) and timm (border) round."""
    width, height = size
    target = image_input.resize
    if image_input.fit == "squash":
        return target, target
    if image_input.fit == "border":
        ratio = max(width, height) / target
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    if width <= height:
        return target, int(target * height / width)
    return int(target * width / height), target


def _fill(image_input: ImageInput) -> tuple[int, int, int]:
    """Colour around images that do not fill the window: the mean for `border`, else black."""
    if image_input.fit != "border":
        return 0, 0, 0
    red, green, blue = (round(255 * value) for value in image_input.mean)
    return red, green, blue


def _offset(length: int, crop: int) -> int:
    """Where a centred crop starts, rounded as torchvision rounds (half to even)."""
    return round((length - crop) / 2)


def _origin(length: int, image_input: ImageInput) -> int:
    """Where an image edge of `length` starts in the window, so that both centre crops agree."""
    crop = image_input.size
    start = -_offset(length, crop) if length >= crop else (crop - length) // 2
    return _offset(window_edge(image_input), crop) + start
