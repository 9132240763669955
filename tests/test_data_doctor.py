"""The doctor names every unusable, repeated and leaking image, and nothing that is merely alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlauto.data import DoctorReport, examine, memory_file, read
from tlauto.data.checks import LOOK_BYTES, check_files
from tlauto.data.demo import write_digits
from tlauto.data.duplicates import joined, near_pairs
from tlauto.errors import DataError


def scene(seed: int, size: int = 96) -> Image.Image:
    """A picture with shapes at all scales, unlike every other seed's."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3))
    for cells in (3, 6, 12, 24, 48):
        patch = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(patch.resize((size, size), Image.Resampling.BICUBIC), float)
    return Image.fromarray((total / 5).astype(np.uint8))


def save(image: Image.Image, path: Path, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def scenes(root: Path, *, classes: str = "ab", per_class: int = 6) -> Path:
    for c, label in enumerate(classes):
        for i in range(per_class):
            save(scene(100 * c + i), root / label / f"{i}.png")
    return root


def examined(root: Path, **options: object) -> DoctorReport:
    return examine(read(root), workers=2, **options)


def test_a_healthy_folder_has_no_warnings(patches: Callable[..., Path]) -> None:
    report = examined(patches(per_class=12, classes=3))
    assert report.warnings == ()
    assert report.images == 36
    assert dict(report.class_counts) == {"blue": 12, "green": 12, "red": 12}
    assert report.modes == {"RGB": 36} and report.formats == {"PNG": 36}
    assert report.sides == (48, 48, 48)
    assert report.imbalance == 1.0


def test_unusable_files_are_left_out_by_name_count_and_reason(tmp_path: Path) -> None:
    root = scenes(tmp_path, per_class=12)
    (root / "a/empty.jpg").write_bytes(b"")
    (root / "a/text.JPG").write_text("this is a text file\n")
    half = (root / "b/0.png").read_bytes()
    (root / "b/half.png").write_bytes(half[: len(half) // 2])
    (root / "b/link.png").symlink_to(root / "nowhere.png")
    os.mkfifo(root / "b/pipe.png")
    report = examined(root)
    assert dict(report.unreadable) == {
        "a/empty.jpg": "empty file (0 bytes)",
        "a/text.JPG": "text, not an image",
        "b/half.png": "truncated",
        "b/link.png": "cannot be opened: No such file or directory",
        "b/pipe.png": "not a regular file",
    }
    assert report.images == 24
    assert report.warnings[0] == "5 unreadable files left out, e.g. a/empty.jpg: empty file (0 bytes)"
    assert report.class_counts == {"a": 12, "b": 12}


def test_modes_rotation_and_animation_are_counted(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    save(scene(50).convert("L"), root / "a/grey.png")
    save(scene(51).convert("CMYK"), root / "a/cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(scene(52).resize((60, 30)), root / "a/turned.jpg", exif=exif)
    save(scene(53), root / "b/moving.gif", save_all=True, append_images=[scene(54)])
    report = examined(root)
    assert (report.rotated, report.animated) == (1, 1)
    assert report.modes["L"] == 1 and report.modes["CMYK"] == 1
    assert report.formats == {"GIF": 1, "JPEG": 2, "PNG": 13}
    assert report.sides == (30, 96, 96)


def test_identical_files_and_identical_pixels_are_exact_duplicates(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    save(scene(0), root / "a/same_pixels.bmp")
    (root / "b/same_bytes.png").write_bytes((root / "b/1.png").read_bytes())
    report = examined(root)
    assert report.exact == (("a/0.png", "a/same_pixels.bmp"), ("b/1.png", "b/same_bytes.png"))
    assert report.near == () and report.turned == () and report.conflicts == ()


def test_identical_images_with_different_labels_are_conflicts(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    save(scene(0), root / "b/copy.png")
    report = examined(root)
    assert report.conflicts == (("a/0.png", "b/copy.png"),)
    assert any("different labels" in warning for warning in report.warnings)


def darker(image: Image.Image) -> Image.Image:
    return image.point(lambda level: int(level * 0.6))


@pytest.mark.parametrize(
    ("name", "change", "options"),
    [
        ("recompressed.jpg", lambda image: image, {"quality": 60}),
        ("halved.png", lambda image: image.resize((48, 48)), {}),
        ("squashed.png", lambda image: image.resize((120, 80)), {}),
        ("darker.png", darker, {}),
    ],
)
def test_changed_copies_are_near_duplicates(
    tmp_path: Path, name: str, change: Callable[[Image.Image], Image.Image], options: dict[str, int]
) -> None:
    root = scenes(tmp_path)
    save(change(scene(0)), root / "a" / name, **options)
    report = examined(root)
    assert report.near == (("a/0.png", f"a/{name}"),)
    assert report.exact == () and report.turned == ()


@pytest.mark.parametrize("turn", list(Image.Transpose))
def test_rotated_and_mirrored_copies_are_found(tmp_path: Path, turn: Image.Transpose) -> None:
    root = scenes(tmp_path)
    save(scene(0).transpose(turn), root / "b/turned.jpg", quality=90)
    report = examined(root)
    assert report.turned == (("a/0.png", "b/turned.jpg"),)
    assert report.near == ()


def test_copies_of_copies_form_one_group(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    save(scene(0), root / "a/same.bmp")
    save(scene(0), root / "a/lossy.jpg", quality=60)
    assert examined(root).near == (("a/0.png", "a/lossy.jpg", "a/same.bmp"),)


def test_handwritten_digits_are_not_duplicates(tmp_path: Path) -> None:
    write_digits(tmp_path / "digits", per_class=100)
    report = examined(tmp_path / "digits")
    assert report.exact == () and report.near == () and report.turned == ()
    assert report.warnings == ()


def test_plain_backgrounds_with_noise_are_not_duplicates(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in "ab":
        for i in range(20):
            pixels = 200 + rng.normal(0, 3, (64, 64, 3))
            for row, column in rng.integers(0, 54, (3, 2)):
                pixels[row : row + 8, column : column + 5] = 40
            save(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), tmp_path / label / f"{i}.png")
    report = examined(tmp_path)
    assert report.near == () and report.turned == ()


def test_plain_images_of_one_colour_are_not_near_duplicates(tmp_path: Path) -> None:
    for label in "ab":
        for i in range(5):
            save(Image.new("RGB", (32 + i, 32), (i, 90, 200)), tmp_path / label / f"{i}.png")
    assert examined(tmp_path).near == ()


def test_one_shape_in_two_colours_is_not_a_duplicate(tmp_path: Path) -> None:
    for label, colour in (("red", (230, 20, 20)), ("blue", (20, 20, 230))):
        sign = np.full((64, 64, 3), 90, np.uint8)
        sign[16:48, 16:48] = colour
        sign[24:30, 20:44] = 255
        save(Image.fromarray(sign), tmp_path / label / "sign.png")
    assert examined(tmp_path).near == ()


def test_copies_across_given_splits_are_leaks(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("test", 50)):
        for c, label in enumerate("ab"):
            for i in range(4):
                save(scene(first + 10 * c + i), tmp_path / split / label / f"{i}.png")
    save(scene(1), tmp_path / "test/a/leak.png")
    save(scene(2).resize((50, 50)), tmp_path / "test/a/near.png")
    save(scene(3), tmp_path / "train/a/harmless.png")
    report = examined(tmp_path)
    assert report.leaks == (("test/a/leak.png", "train/a/1.png"),)
    assert report.near_leaks == (("test/a/near.png", "train/a/2.png"),)
    assert "in more than one split" in report.warnings[0]
    assert report.split_counts == {"test": 10, "train": 9}


def test_small_and_unbalanced_and_emptied_classes_are_warned_of(tmp_path: Path) -> None:
    root = scenes(tmp_path, classes="ab", per_class=4)
    for i in range(20):
        save(scene(500 + i), root / "b" / f"more{i}.png")
    (root / "c").mkdir()
    (root / "c/1.png").write_bytes(b"")
    warnings = examined(root).warnings
    assert "no usable image of 1 class: c" in warnings
    assert "1 class with fewer than 10 images: a (4)" in warnings
    assert "unbalanced: the largest class has 6.0 times the images of the smallest" in warnings


def test_almost_black_images_are_warned_of(tmp_path: Path) -> None:
    root = scenes(tmp_path, per_class=12)
    twelve_bits = (np.random.default_rng(0).integers(0, 4000, (64, 64))).astype(np.uint16)
    save(Image.fromarray(twelve_bits), root / "a/camera.tif")
    report = examined(root)
    assert report.dark == ("a/camera.tif",)
    assert "1 image almost black" in report.warnings[-1]


def test_strays_and_hidden_folders_are_told(tmp_path: Path) -> None:
    root = scenes(tmp_path, per_class=12)
    (root / "notes.txt").write_text("x")
    save(scene(0), root / "a/.ipynb_checkpoints/0-checkpoint.png")
    report = examined(root)
    assert report.warnings == ("1 file of other kinds ignored, e.g. notes.txt",)
    assert "1 hidden file or folder not looked into, e.g. a/.ipynb_checkpoints" in report.notes


def test_the_json_names_are_stable_and_serialisable(tmp_path: Path) -> None:
    data = examined(scenes(tmp_path)).to_json()
    assert json.loads(json.dumps(data)) == data
    assert list(data) == [
        "version", "root", "kind", "task", "images", "unreadable", "classes", "splits", "imbalance",
        "exact_duplicates", "near_duplicates", "turned_duplicates", "leaks", "near_leaks",
        "conflicting_labels", "almost_black", "modes", "formats", "exif_rotated", "animated", "sides",
        "not_images", "hidden", "notes", "warnings",
    ]  # fmt: skip


def test_progress_counts_every_image_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    examined(scenes(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]


# --- memory ----------------------------------------------------------------------------------------


def test_a_second_examination_decodes_only_what_changed(tmp_path: Path) -> None:
    root, memory = scenes(tmp_path / "data"), tmp_path / "cache" / "memory.jsonl"
    first = examined(root, memory=memory)
    opened: list[int] = []
    assert examined(root, memory=memory, progress=lambda done, _: opened.append(done)) == first
    assert opened == []
    save(scene(77), root / "a/0.png")
    (root / "b/0.png").unlink()
    second = examined(root, memory=memory, progress=lambda done, _: opened.append(done))
    assert opened == [11]
    assert second.checks["a/0.png"] != first.checks["a/0.png"]
    assert "b/0.png" not in second.checks


def test_a_file_of_the_same_size_but_another_time_is_decoded_again(tmp_path: Path) -> None:
    root, memory = scenes(tmp_path / "data"), tmp_path / "memory.jsonl"
    examined(root, memory=memory)
    path = root / "a/0.png"
    path.write_bytes(b"x" * path.stat().st_size)
    os.utime(path, ns=(1, 1))
    assert dict(examined(root, memory=memory).unreadable) == {"a/0.png": "text, not an image"}


def test_a_damaged_memory_is_passed_over(tmp_path: Path) -> None:
    root, memory = scenes(tmp_path / "data"), tmp_path / "memory.jsonl"
    first = examined(root, memory=memory)
    lines = memory.read_text().splitlines()
    memory.write_text("\n".join(['{"version": 0}', "[]", "7", "{", lines[0], lines[1][:40], lines[2]]))
    assert examined(root, memory=memory) == first
    memory.write_bytes(b"\xff\xfe\x00")
    assert examined(root, memory=memory) == first


def test_a_memory_that_cannot_be_written_does_not_stop_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    report = examined(scenes(tmp_path / "data"), memory=tmp_path / "file" / "memory.jsonl")
    assert report.images == 12


def test_files_that_could_not_be_opened_are_tried_again(tmp_path: Path) -> None:
    root, memory = scenes(tmp_path / "data"), tmp_path / "memory.jsonl"
    target = tmp_path / "later.png"
    (root / "a/link.png").symlink_to(target)
    assert len(examined(root, memory=memory).unreadable) == 1
    save(scene(9), target)
    assert examined(root, memory=memory).unreadable == ()


def test_the_memory_lies_in_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLAUTO_CACHE", str(tmp_path))
    assert memory_file("x").parent == tmp_path / "checks"
    assert memory_file("x") != memory_file("y")


# --- duplicates ------------------------------------------------------------------------------------


def test_joined_follows_chains() -> None:
    assert joined(6, [[1, 2], [2, 4], [3, 5]]) == [0, 1, 1, 3, 1, 3]


def test_no_and_one_image_have_no_pairs(tmp_path: Path) -> None:
    root = scenes(tmp_path, classes="a", per_class=1)
    for files in ([], [str(root / "a/0.png")]):
        _, looks = check_files(files)
        assert looks.shape == (len(files), LOOK_BYTES)
        assert near_pairs(looks) == near_pairs(looks, turned=True) == []


def test_real_photos_have_no_false_near_duplicates(bench_data: Path) -> None:
    report = examined(bench_data / "hymenoptera")
    assert report.near == () and report.turned == () and report.exact == ()


def test_the_copies_across_the_trash_splits_are_found(bench_data: Path) -> None:
    report = examined(bench_data / "trashnet")
    assert len(report.leaks) == 2
    assert report.near == ()


def test_reading_again_and_examining_is_deterministic(tmp_path: Path) -> None:
    root = scenes(tmp_path)
    assert examined(root) == examined(root)


def test_reading_is_refused_before_any_image_is_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        examined(tmp_path)


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """Thumbnails go to a file; no file of the process may grow beyond 2 kB here."""
    root = scenes(tmp_path / "data")
    code = (
        "import resource, signal, sys; from tlauto.data import examine, read\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))\n"
        "examine(read(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True, check=False)
    assert "DataError: cannot keep thumbnails in" in done.stderr
    assert "set TMPDIR" in done.stderr
