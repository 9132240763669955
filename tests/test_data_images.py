"""Every image format and mode becomes upright RGB; every damaged file says what it is."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlauto.data import IMAGE_SUFFIXES, open_rgb
from tlauto.data.images import decode, is_image_name
from tlauto.errors import DataError

ORIENTATION = 0x0112


def noise(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def first_pixel(data: bytes) -> tuple[int, ...]:
    return decode(data).image.getpixel((0, 0))


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_their_exact_pixels(format: str) -> None:
    pixels = noise()
    decoded = decode(encoded(Image.fromarray(pixels), format))
    assert decoded.image.mode == "RGB"
    assert decoded.format == format
    np.testing.assert_array_equal(np.asarray(decoded.image), pixels)


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}), ("TIFF", {"compression": "jpeg"})],
)
def test_lossy_formats_give_rgb_of_the_same_size(format: str, options: dict[str, object]) -> None:
    image = decode(encoded(Image.fromarray(noise()), format, **options)).image
    assert (image.mode, image.size) == ("RGB", (30, 20))


@pytest.mark.parametrize("name", ["A.JPG", "b.Jpeg", "c.PNG", "d.TIF", "e.WebP", "f.GIF", "g.bmp"])
def test_upper_case_suffixes_count_as_images(name: str, tmp_path: Path) -> None:
    assert is_image_name(name)
    Image.fromarray(noise()).save(tmp_path / name)
    assert open_rgb(tmp_path / name).mode == "RGB"


def test_suffixes_are_lower_case_and_exclude_other_files() -> None:
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert not any(is_image_name(name) for name in ("a.txt", "jpg", "a.jpg.part", ".png", "a"))


def test_content_decides_when_the_suffix_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(Image.fromarray(noise()), "PNG"))
    np.testing.assert_array_equal(np.asarray(open_rgb(path)), noise())


def test_greyscale_has_three_equal_channels() -> None:
    assert first_pixel(encoded(Image.new("L", (4, 4), 77), "PNG")) == (77, 77, 77)


def test_one_bit_images_become_black_and_white() -> None:
    assert first_pixel(encoded(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)


def test_palette_images_get_their_colours() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert first_pixel(encoded(image, "PNG")) == (10, 200, 30)


def test_transparency_is_laid_over_white() -> None:
    assert first_pixel(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    assert first_pixel(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 255)), "PNG")) == (200, 0, 0)
    assert first_pixel(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == (255, 255, 255)


def test_transparent_palette_colours_are_laid_over_white() -> None:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert first_pixel(encoded(image, "PNG", transparency=1)) == (255, 255, 255)
    assert first_pixel(encoded(image, "PNG", transparency=b"\xff\x00")) == (255, 255, 255)
    assert first_pixel(encoded(image, "PNG", transparency=0)) == (10, 200, 30)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_greys_are_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    image = decode(encoded(Image.fromarray(values), format)).image
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_big_endian_sixteen_bit_pgm_is_scaled() -> None:
    data = b"P5 2 1 65535\n" + bytes([0x80, 0x80, 0xFF, 0xFF])
    image = decode(data).image
    assert [image.getpixel((x, 0))[0] for x in range(2)] == [128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 128.0, 255.0], [0, 128, 255]),
        ([-10.0, 0.0, 10.0], [0, 128, 255]),
    ],
)
def test_float_images_are_scaled_by_their_range(values: list[float], expected: list[int]) -> None:
    image = decode(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")).image
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


def test_thirty_two_bit_integers_beyond_sixteen_bits_use_their_own_range() -> None:
    image = decode(encoded(Image.fromarray(np.array([[0, 500_000, 1_000_000]], np.int32)), "TIFF")).image
    assert [image.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_floats_that_are_not_numbers_are_named() -> None:
    with pytest.raises(DataError, match="not numbers"):
        decode(encoded(Image.fromarray(np.array([[0.0, np.nan]], np.float32)), "TIFF"))


def test_cmyk_jpegs_are_converted() -> None:
    decoded = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    red, green, blue = decoded.image.getpixel((4, 4))
    assert decoded.mode == "CMYK"
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, format: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255
    turned = Image.fromarray(upright)
    # The inverse of what the tag asks for.
    for step in {
        1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90], 7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]:  # fmt: skip
        turned = turned.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    decoded = decode(encoded(turned, format, exif=exif))
    assert decoded.is_rotated == (orientation != 1)
    assert decoded.image.size == (32, 16)
    assert np.abs(np.asarray(decoded.image).astype(int) - upright).mean() < 8


def test_only_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for format in ("GIF", "TIFF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        decoded = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options))
        assert decoded.is_animated, format
        assert decoded.image.getpixel((2, 2)) == (255, 0, 0), format


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file (0 bytes)"),
        (b"hello, I am not an image\n", "text, not an image"),
        (b"<html><body>404 not found</body></html>", "text, not an image"),
        (b"\0" * 5000, "only zero bytes"),
        (b"%PDF-1.7 \x80\x81", "a PDF, not an image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC data; convert it to JPEG or PNG"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "AVIF or video data; convert it to JPEG or PNG"),
        (b"\xff\xd8\xff", "damaged or truncated at its start"),
        (b"\x01\x02\x03\x04\x05", "not an image of a known format"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        decode(data)
    assert str(caught.value) == reason
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        open_rgb(path)
    assert str(caught.value) == f"cannot read image '{path}': {reason}"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_cut_in_half_is_refused(format: str) -> None:
    data = encoded(Image.fromarray(noise(60, 60)), format)
    with pytest.raises(DataError, match=r"truncated|damaged"):
        decode(data[: len(data) // 2])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open image '.*nowhere\.png': No such file"):
        open_rgb(tmp_path / "nowhere.png")


def test_a_folder_named_like_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match="directory"):
        open_rgb(tmp_path / "folder.png")


def test_an_image_of_absurd_size_is_refused_without_reading_it() -> None:
    data = b"P5 60000 60000 255\n" + b"\0" * 100
    with pytest.raises(DataError, match="million pixels"):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_random_damage_gives_an_image_or_a_data_error(format: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    data = encoded(Image.fromarray(noise()), format, **options)
    rng = random.Random(0)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 8)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            assert decode(bytes(damaged)).image.mode == "RGB"
        except DataError as error:
            assert str(error)
