"""Cached windows: the same pixels as the libraries' own pipelines, and a cache that cannot be half full."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from tlauto.contracts import ImageInput
from tlauto.data import Dataset, Item
from tlauto.errors import ConfigError, DataError
from tlauto.training.arrays import cached_array
from tlauto.training.batches import normalise
from tlauto.training.pixels import centre_crop, geometry, load_pixels, window_of

SIZES = [(64, 64), (65, 64), (64, 66), (300, 201), (57, 91), (500, 33), (40, 41)]
BILINEAR = transforms.InterpolationMode.BILINEAR


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def crop(image: Image.Image, image_input: ImageInput) -> np.ndarray:
    return centre_crop(window_of(image, image_input), image_input)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("resize", "edge"), [(64, 56), (63, 56), (64, 57), (65, 32), (48, 48)])
def test_the_centre_of_the_window_is_torchvisions_crop(size: tuple[int, int], resize: int, edge: int) -> None:
    image_input = ImageInput(size=edge, resize=resize)
    library = transforms.Compose([transforms.Resize(resize, BILINEAR), transforms.CenterCrop(edge)])
    assert np.array_equal(crop(noise(*size), image_input), np.asarray(library(noise(*size))))


@pytest.mark.parametrize("size", SIZES)
def test_a_squashed_window_is_torchvisions_resize_to_both_edges(size: tuple[int, int]) -> None:
    image_input = ImageInput(size=50, resize=60, fit="squash", interpolation="bicubic")
    bicubic = transforms.InterpolationMode.BICUBIC
    library = transforms.Compose([transforms.Resize((60, 60), bicubic), transforms.CenterCrop(50)])
    assert np.array_equal(crop(noise(*size), image_input), np.asarray(library(noise(*size))))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("crop_pct", [1.0, 0.9])
def test_a_bordered_window_is_timms(size: tuple[int, int], crop_pct: float) -> None:
    from timm.data import create_transform

    mean = (0.485, 0.456, 0.406)
    library = create_transform(
        (3, 56, 56),
        crop_mode="border",
        crop_pct=crop_pct,
        mean=mean,
        interpolation="bilinear",
        normalize=False,
    )
    image_input = ImageInput(size=56, resize=int(56 / crop_pct), fit="border", mean=mean)
    assert np.array_equal(crop(noise(*size), image_input), library(noise(*size)).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("bgr", [False, True])
def test_normalised_images_are_torchvisions_to_the_last_bit(bgr: bool) -> None:
    image_input = ImageInput(size=56, resize=64, bgr=bgr)
    library = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(image_input.mean, image_input.std)]
    )
    pixels = crop(noise(80, 70), image_input)
    expected = library(np.ascontiguousarray(pixels[..., ::-1] if bgr else pixels))
    crops = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    assert torch.equal(normalise(crops, image_input, torch.device("cpu"))[0], expected)


def test_geometry_ignores_what_does_not_change_the_pixels() -> None:
    assert geometry(ImageInput()) == geometry(ImageInput(mean=(0, 0, 0), bgr=True))
    assert geometry(ImageInput()) != geometry(ImageInput(interpolation="bicubic"))
    assert geometry(ImageInput(fit="border")) != geometry(ImageInput(fit="border", mean=(0, 0, 0)))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    items = []
    for i, split in enumerate(["train"] * 5 + ["val"] * 3 + ["test"] * 2):
        noise(40 + i, 40).save(tmp_path / f"{i}.png")
        items.append(Item(f"{i}.png", 0, split, f"sha{i}"))
    return Dataset(str(tmp_path), "multiclass", ("a",), tuple(items), "fingerprint")


def test_pixels_come_split_after_split_and_only_those_asked_for(dataset: Dataset, tmp_path: Path) -> None:
    image_input = ImageInput(size=32, resize=36)
    cache = tmp_path / "cache"
    pixels = load_pixels(dataset, ("val", "train"), image_input, str(cache))
    assert len(pixels) == 8
    for index, name in enumerate(["5", "6", "7", "0", "1", "2", "3", "4"]):
        expected = window_of(Image.open(tmp_path / f"{name}.png"), image_input)
        assert np.array_equal(pixels.windows([index])[0], expected)
    crops, windows = pixels.crops([6, 0, 6]), pixels.windows([6, 0, 6])
    assert np.array_equal(crops.permute(0, 2, 3, 1), centre_crop(windows.numpy(), image_input))
    assert torch.equal(windows[0], pixels.windows([6])[0]) and torch.equal(windows[0], windows[2])
    for index in (-1, 8):
        with pytest.raises(IndexError, match=f"rows .* of {len(pixels)}"):
            pixels.windows([0, index])
    assert len(list(cache.glob("pixels/*.npy"))) == 2, "the test part must not be touched"


def test_an_unreadable_image_is_named_and_leaves_no_cache_behind(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png"):
        load_pixels(dataset, ("train",), ImageInput(size=32, resize=36), str(tmp_path / "cache"))
    assert not list(tmp_path.glob("cache/pixels/*.npy"))
    assert not list(tmp_path.glob("cache/pixels/*.part"))


def count_up(calls: list[int]) -> Callable[[int], Iterable[np.ndarray]]:
    def rows(first: int) -> Iterable[np.ndarray]:
        calls.append(1)
        yield np.arange(4).reshape(2, 2)
        yield np.arange(4, 6).reshape(1, 2)

    return rows


def test_a_cached_array_is_computed_once(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(3):
        array = cached_array(tmp_path / "pixels" / "a.npy", (3, 2), np.float32, count_up(calls))
        assert array.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["truncated", "no array", "other shape", "other type"])
def test_a_damaged_cache_file_is_computed_again(tmp_path: Path, damage: str) -> None:
    path, calls = tmp_path / "pixels" / "a.npy", list[int]()
    cached_array(path, (3, 2), np.float32, count_up(calls))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "no array":
        path.write_bytes(b"x" * 200)
    else:
        np.save(path, np.zeros((3, 3) if damage == "other shape" else (3, 2), np.int16))
    array = cached_array(path, (3, 2), np.float32, count_up(calls))
    assert array.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert len(calls) == 2


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write the cache"):
        cached_array(tmp_path / "file" / "a.npy", (3, 2), np.float32, count_up([]))


def test_two_workers_that_want_one_array_compute_it_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def rows(first: int) -> Iterable[np.ndarray]:
        calls.append(1)
        for i in range(20):
            time.sleep(0.005)
            yield np.full((10, 10), i)

    # Locks are held by open files, so two threads exclude each other as two processes do.
    with ThreadPoolExecutor(2) as threads:
        wanted = [
            threads.submit(cached_array, tmp_path / "pixels" / "a.npy", (200, 10), np.float32, rows)
            for _ in range(2)
        ]
        assert [float(array.result()[-1, -1]) for array in wanted] == [19, 19]
    assert len(calls) == 1
