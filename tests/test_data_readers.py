"""Folders of every layout are read; what is no dataset gets one clear sentence."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tlauto.data import RawDataset, read
from tlauto.errors import DataError


def touch(root: Path, *names: str) -> Path:
    """Image files by name; readers never open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def labels(raw: RawDataset) -> dict[str, object]:
    return {record.path: record.label for record in raw.records}


def splits(raw: RawDataset) -> dict[str, str | None]:
    return {record.path: record.split for record in raw.records}


def error_of(path: Path | str, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_class_folders_give_their_names_as_labels(patches: Callable[..., Path]) -> None:
    raw = read(patches(per_class=2, classes=3))
    assert raw.kind == "folder"
    assert raw.task == "multiclass"
    assert labels(raw)["red/red000.png"] == "red"
    assert [record.path for record in raw.records] == sorted(record.path for record in raw.records)
    assert {record.split for record in raw.records} == {None}
    assert raw.notes == ()


def test_the_root_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/a/1.png", "d/b/1.png")
    monkeypatch.chdir(tmp_path)
    assert read("d").root == str(tmp_path / "d")
    assert read("./d/").root == str(tmp_path / "d")


@pytest.mark.parametrize("validation", ["val", "valid", "validation", "Val", "dev"])
def test_split_folders_are_kept(tmp_path: Path, validation: str) -> None:
    names = [f"{split}/{label}/1.jpg" for split in ("Train", validation, "test") for label in "ab"]
    raw = read(touch(tmp_path, *names))
    assert raw.kind == "split folders"
    assert splits(raw)["Train/a/1.jpg"] == "train"
    assert splits(raw)[f"{validation}/b/1.jpg"] == "val"
    assert splits(raw)["test/a/1.jpg"] == "test"
    assert labels(raw)["test/b/1.jpg"] == "b"


def test_train_beside_other_vehicles_is_a_class(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "train/1.jpg", "bus/1.jpg", "car/1.jpg"))
    assert raw.kind == "folder"
    assert set(labels(raw).values()) == {"train", "bus", "car"}
    nested = read(touch(tmp_path / "nested", "train/x/1.jpg", "bus/1.jpg"))
    assert set(labels(nested).values()) == {"train", "bus"}


def test_folders_beside_the_splits_are_noted(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "train/a/1.jpg", "test/a/1.jpg", "raw/2.jpg"))
    assert len(raw.records) == 2
    assert any("raw" in note for note in raw.notes)


def test_subfolders_belong_to_their_class(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "cat/monday/1.jpg", "cat/tuesday/deep/2.jpg", "dog/3.jpg"))
    assert labels(raw) == {"cat/monday/1.jpg": "cat", "cat/tuesday/deep/2.jpg": "cat", "dog/3.jpg": "dog"}


def test_upper_case_suffixes_are_read_and_strays_are_listed(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "a/1.JPG", "a/2.Png", "b/3.TIFF", "b/notes.txt", "readme.md", "b/4.heic"))
    assert len(raw.records) == 3
    assert raw.strays == ("b/4.heic", "b/notes.txt", "readme.md")


def test_hidden_files_and_folders_are_noted_and_not_read(tmp_path: Path) -> None:
    names = ("a/.ipynb_checkpoints/1-checkpoint.png", ".ipynb_checkpoints/2.png", "a/.DS_Store", "a/._1.png")
    raw = read(touch(tmp_path, "a/1.png", "b/1.png", "__MACOSX/a/1.png", "b/Thumbs.db", *names))
    assert list(labels(raw)) == ["a/1.png", "b/1.png"]
    assert raw.hidden == (
        ".ipynb_checkpoints", "__MACOSX", "a/.DS_Store", "a/._1.png", "a/.ipynb_checkpoints", "b/Thumbs.db",
    )  # fmt: skip


def test_our_own_workspace_in_the_data_folder_is_not_a_class(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "a/1.png", "b/1.png", "tlauto-runs/s/plot.png"))
    assert set(labels(raw).values()) == {"a", "b"}


def test_images_outside_class_folders_are_noted(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "a/1.png", "b/1.png", "loose.png"))
    assert raw.notes == ("1 image outside any class folder left out",)
    split = read(touch(tmp_path / "s", "train/a/1.png", "test/a/1.png", "train/loose.png"))
    assert split.notes == ("1 image in train/ outside any class folder left out",)


def test_an_empty_class_folder_is_noted(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "empty").mkdir()
    assert read(tmp_path).notes == ("folder empty holds no image",)


def test_a_manifest_beside_class_folders_is_noted_and_not_read(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "a/1.png", "b/1.png", "labels.csv"))
    assert raw.kind == "folder"
    assert "labels.csv is not read" in raw.notes[0]


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    touch(tmp_path, "store/1.png", "data/b/1.png")
    (tmp_path / "data/a").symlink_to(tmp_path / "store")
    (tmp_path / "data/b/loop").symlink_to(tmp_path / "data/b")
    assert list(labels(read(tmp_path / "data"))) == ["a/1.png", "b/1.png"]


def test_a_link_to_nowhere_is_listed_and_not_fatal(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/2.png").symlink_to(tmp_path / "gone.png")
    assert "a/2.png" in labels(read(tmp_path))


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    odd = os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff\xfe.png")
    Path(odd).write_bytes(b"")
    assert len(read(tmp_path).records) == 3


def test_folder_names_can_be_values(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, "0.5/1.png", "2/2.png"), task="regression")
    assert labels(raw) == {"0.5/1.png": 0.5, "2/2.png": 2.0}
    assert "not a finite number" in error_of(touch(tmp_path / "w", "low/1.png", "2/2.png"), task="regression")


def test_whole_number_folders_stay_classes(tmp_path: Path) -> None:
    raw = read(touch(tmp_path, *[f"{i}/1.png" for i in range(12)]))
    assert raw.task == "multiclass"


# --- what is no dataset ------------------------------------------------------------------------------


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    text = error_of(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in text and "check the path" in text


def test_an_empty_folder_says_what_it_needs(tmp_path: Path) -> None:
    text = error_of(tmp_path)
    assert text.startswith(f"no images in '{tmp_path}'") and "one folder" in text and "CSV" in text


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    assert "only 2 .txt files" in error_of(touch(tmp_path, "a/1.txt", "b/2.txt"))


def test_flat_images_say_that_class_folders_are_missing(tmp_path: Path) -> None:
    assert "holds 2 images but no class folders" in error_of(touch(tmp_path, "1.png", "2.png"))


def test_splits_without_class_folders_are_an_error(tmp_path: Path) -> None:
    text = error_of(touch(tmp_path, "train/1.png", "test/1.png"))
    assert "test' holds images but no class folders" in text


def test_images_and_masks_are_not_classes(tmp_path: Path) -> None:
    assert "has no class folders, only images, masks" in error_of(
        touch(tmp_path, "train/images/1.png", "train/masks/1.png", "test/images/1.png")
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [("data.zip", "unpack it"), ("cat.jpg", "it is one image"), ("data.parquet", "manifest ending in")],
)
def test_a_file_that_is_no_manifest_says_what_to_do(tmp_path: Path, name: str, advice: str) -> None:
    assert advice in error_of(touch(tmp_path, name) / name)


def test_an_unknown_task_offers_the_closest(patches: Callable[..., Path]) -> None:
    assert "did you mean 'multiclass'?" in error_of(patches(per_class=1), task="multi-class")


def test_columns_do_not_fit_class_folders(patches: Callable[..., Path]) -> None:
    assert "leave --label-column out" in error_of(patches(per_class=1), label_column="label")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a").chmod(0)
    text = error_of(tmp_path)
    (tmp_path / "a").chmod(0o755)
    assert "cannot list folder" in text


def test_reading_opens_no_image(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png", "b/1.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a/2.png")
    assert len(read(tmp_path).records) == 3
