"""Splits are stratified, seeded and free of leaks; what cannot be split says why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlauto.data import Dataset, DoctorReport, Item, RawDataset, examine, load_dataset, make_dataset, read
from tlauto.errors import DataError

PARTS = ("train", "val", "test")


def noise(path: Path, seed: int) -> None:
    """An image that nothing else resembles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(path)


def folder(root: Path, **counts: int) -> Path:
    for c, (label, count) in enumerate(counts.items()):
        for i in range(count):
            noise(root / label / f"{i:03d}.png", 1000 * c + i)
    return root


def listed(root: Path, rows: list[str], *, header: str = "path,label") -> Path:
    """A manifest of images that are made on the way; a row starts with the file's name."""
    for number, row in enumerate(rows):
        noise(root / row.split(",")[0], number)
    (root / "data.csv").write_text("\n".join([header, *rows]) + "\n")
    return root / "data.csv"


def part_counts(dataset: Dataset) -> dict[str, Counter[object]]:
    return {part: Counter(item.target for item in dataset.part(part)) for part in PARTS}


def error_of(path: Path, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        load_dataset(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_classes_are_spread_evenly(tmp_path: Path) -> None:
    dataset, _ = load_dataset(folder(tmp_path, a=50, b=20, c=10, d=3))
    assert dataset.classes == ("a", "b", "c", "d")
    counts = part_counts(dataset)
    assert counts["train"] == {0: 30, 1: 12, 2: 6, 3: 1}
    assert counts["val"] == counts["test"] == {0: 10, 1: 4, 2: 2, 3: 1}
    assert [item.path for item in dataset.items] == sorted(item.path for item in dataset.items)


def test_one_seed_gives_one_split_and_another_gives_another(tmp_path: Path) -> None:
    root = folder(tmp_path, a=20, b=20)
    first, again, other = (load_dataset(root, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again
    assert first.items != other.items
    assert first.fingerprint == other.fingerprint


def test_the_dataset_survives_json(tmp_path: Path) -> None:
    for path in (
        folder(tmp_path / "f", a=4, b=4),
        listed(tmp_path / "m", [f"{i}.png,{'x|y' if i % 2 else 'x'}" for i in range(12)]),
        listed(tmp_path / "r", [f"{i}.png,{i / 8}" for i in range(12)]),
    ):
        dataset, _ = load_dataset(path)
        assert Dataset.from_json(dataset.to_json()) == dataset


def test_whole_number_classes_are_in_numeric_order(tmp_path: Path) -> None:
    dataset, _ = load_dataset(folder(tmp_path, **{str(n): 3 for n in (10, 9, 1, 2)}))
    assert dataset.classes == ("1", "2", "9", "10")


def test_given_splits_are_kept_and_val_is_taken_from_train(tmp_path: Path) -> None:
    folder(tmp_path / "train", a=10, b=20)
    for c, label in enumerate("ab"):
        for i in range(5):
            noise(tmp_path / "test" / label / f"{i}.png", 5000 + 10 * c + i)
    dataset, _ = load_dataset(tmp_path)
    counts = part_counts(dataset)
    assert counts["test"] == {0: 5, 1: 5}
    assert counts["val"] == {0: 2, 1: 4}
    assert all(item.path.startswith("test/") for item in dataset.part("test"))


def test_a_missing_test_part_is_taken_from_train(tmp_path: Path) -> None:
    folder(tmp_path / "train", a=10, b=10)
    noise(tmp_path / "val/a/1.png", 9001)
    noise(tmp_path / "val/b/1.png", 9002)
    dataset, _ = load_dataset(tmp_path)
    assert len(dataset.part("val")) == 2
    assert len(dataset.part("test")) == 4


def test_unreadable_images_are_in_no_part(tmp_path: Path) -> None:
    root = folder(tmp_path, a=5, b=5)
    (root / "a/bad.jpg").write_text("no image")
    dataset, report = load_dataset(root)
    assert len(dataset.items) == 10
    assert report.unreadable == (("a/bad.jpg", "text, not an image"),)


def test_copies_never_straddle_a_split_made_here(tmp_path: Path) -> None:
    root = folder(tmp_path, a=12, b=12)
    for label in "ab":
        for i in range(6):
            source = root / label / f"{i:03d}.png"
            (root / label / f"copy{i}.png").write_bytes(source.read_bytes())
            image = Image.open(source)
            image.resize((128, 128)).save(root / label / f"scaled{i}.bmp")
            image.rotate(90).save(root / label / f"turned{i}.png")
    for seed in range(5):
        dataset, _ = load_dataset(root, seed=seed)
        home = {item.path: item.split for item in dataset.items}
        for label in "ab":
            for i in range(6):
                names = (f"{i:03d}.png", f"copy{i}.png", f"scaled{i}.bmp", f"turned{i}.png")
                assert len({home[f"{label}/{name}"] for name in names}) == 1
        assert all(set(counts) == {0, 1} for counts in part_counts(dataset).values())


def test_groups_never_straddle_a_split_made_here(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'x' if i % 2 else 'y'},{i // 4}" for i in range(80)]
    path = listed(tmp_path, rows, header="path,label,fruit")
    dataset, _ = load_dataset(path, group_column="fruit")
    home: dict[int, set[str]] = {}
    for item in dataset.items:
        home.setdefault(int(item.path.removesuffix(".png")) // 4, set()).add(item.split)
    assert all(len(splits) == 1 for splits in home.values())
    assert {part: len(dataset.part(part)) for part in PARTS} == {"train": 48, "val": 16, "test": 16}


def test_large_groups_leave_every_class_in_every_part(tmp_path: Path) -> None:
    rows = [f"{label}{i}.png,{label},{label}{i // 5}" for label in "xy" for i in range(15)]
    path = listed(tmp_path, rows, header="path,label,who")
    dataset, _ = load_dataset(path, group_column="who")
    assert all(set(counts) == {0, 1} for counts in part_counts(dataset).values())


def test_every_label_of_several_is_spread(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(100):
        names = [n for n, p in (("often", 0.7), ("half", 0.4), ("rare", 0.08)) if rng.random() < p]
        rows.append(f"{i}.png,{'|'.join(names)}")
    rows[0] = "0.png,often|half"
    dataset, _ = load_dataset(listed(tmp_path, rows))
    assert (dataset.task, dataset.classes) == ("multilabel", ("half", "often", "rare"))
    share = {
        part: np.mean([[c in item.target for c in range(3)] for item in dataset.part(part)], axis=0)
        for part in PARTS
    }
    assert 17 <= len(dataset.part("test")) <= 23
    assert 17 <= len(dataset.part("val")) <= 23
    for part in PARTS:
        np.testing.assert_allclose(share[part], share["train"], atol=0.12)
        assert share[part][2] > 0


def test_values_are_spread_by_quantile(tmp_path: Path) -> None:
    values = np.random.default_rng(0).lognormal(size=100)
    path = listed(tmp_path, [f"{i}.png,{value:.6f}" for i, value in enumerate(values)])
    dataset, _ = load_dataset(path)
    assert dataset.task == "regression" and dataset.classes == ()
    middles = [np.median([item.target for item in dataset.part(part)]) for part in PARTS]
    np.testing.assert_allclose(middles, np.median(values), rtol=0.25)
    assert {part: len(dataset.part(part)) for part in PARTS} == {"train": 60, "val": 20, "test": 20}


def test_the_fractions_can_be_chosen(patches: Callable[..., Path]) -> None:
    raw = read(patches(per_class=20, classes=2))
    dataset = make_dataset(raw, examine(raw), val_fraction=0.1, test_fraction=0.3)
    assert [len(dataset.part(part)) for part in PARTS] == [24, 4, 12]


# --- fingerprint -----------------------------------------------------------------------------------


def test_the_fingerprint_moves_with_the_folder_and_changes_with_its_contents(tmp_path: Path) -> None:
    def of(root: Path) -> str:
        return load_dataset(root)[0].fingerprint

    root = folder(tmp_path / "one", a=4, b=4)
    first = of(root)
    assert first == of(folder(tmp_path / "two", a=4, b=4))
    root = root.rename(tmp_path / "moved")
    assert of(root) == first
    (root / "a/bad.jpg").write_text("unreadable files do not count")
    assert of(root) == first
    noise(root / "a/000.png", 777)
    changed = of(root)
    assert changed != first
    (root / "a/003.png").rename(root / "b/a003.png")
    assert of(root) not in (first, changed)


def test_the_fingerprint_knows_labels_splits_and_groups(tmp_path: Path) -> None:
    prints = set()
    for header, tail in [
        ("path,label", ""), ("path,label,split", ",train"), ("path,label,who", ",1"),
    ]:  # fmt: skip
        rows = [f"{i}.png,{'xy'[i % 2]}{tail if tail != ',1' else f',{i}'}" for i in range(8)]
        options = {"group_column": "who"} if "who" in header else {}
        prints.add(load_dataset(listed(tmp_path, rows, header=header), **options)[0].fingerprint)
    assert len(prints) == 3


# --- leaks -----------------------------------------------------------------------------------------


def leaking(root: Path) -> Path:
    for s, split in enumerate(("train", "test")):
        for c, label in enumerate("ab"):
            for i in range(4):
                noise(root / split / label / f"{i}.png", 1000 * s + 100 * c + i)
    (root / "test/a/leak.png").write_bytes((root / "train/a/1.png").read_bytes())
    return root


def test_copies_across_given_splits_are_an_error_that_names_them(tmp_path: Path) -> None:
    text = error_of(leaking(tmp_path))
    assert text.startswith("1 group of identical images in more than one split")
    assert "test/a/leak.png = train/a/1.png" in text and "--allow-leaks" in text


def test_leaks_can_be_accepted(tmp_path: Path) -> None:
    dataset, report = load_dataset(leaking(tmp_path), allow_leaks=True)
    assert len(dataset.part("test")) == 9
    assert len(report.leaks) == 1


def test_a_group_across_given_splits_is_an_error(tmp_path: Path) -> None:
    rows = [f"{i}.png,{'xy'[i % 2]},{'train' if i < 8 else 'test'},{i % 8}" for i in range(12)]
    path = listed(tmp_path, rows, header="path,label,split,who")
    assert "group '2' lies in more than one split" in error_of(path, group_column="who")
    assert len(load_dataset(path, group_column="who", allow_leaks=True)[0].part("test")) == 4
    assert len(load_dataset(path, label_column="label")[0].part("test")) == 4


# --- what cannot be split --------------------------------------------------------------------------


def test_one_class_is_an_error(tmp_path: Path) -> None:
    assert "one class only, 'a'; add images of at least one other class" in error_of(folder(tmp_path, a=5))


def test_one_folder_around_the_classes_is_pointed_out(tmp_path: Path) -> None:
    folder(tmp_path / "data", cats=4, dogs=4)
    assert f"if its subfolders are the classes, pass '{tmp_path}/data'" in error_of(tmp_path)


def test_all_images_damaged_is_an_error(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    text = error_of(tmp_path)
    assert text.startswith("none of the 3 images in") and "'a/1.jpg': empty file" in text


def test_a_class_whose_images_are_all_damaged_leaves_one_class(tmp_path: Path) -> None:
    root = folder(tmp_path, a=5)
    (root / "b").mkdir()
    (root / "b/1.jpg").write_bytes(b"")
    assert "usable images of one class only, 'a'" in error_of(root)


def test_a_class_too_small_to_split_is_named_with_its_size(tmp_path: Path) -> None:
    text = error_of(folder(tmp_path, a=10, b=2, c=1))
    assert "too few different images of 'b' (2), 'c' (1)" in text
    assert "train, val and test (at least 3 different images)" in text


def test_copies_do_not_make_a_class_large_enough(tmp_path: Path) -> None:
    root = folder(tmp_path, a=10, b=2)
    for i in range(5):
        (root / "b" / f"copy{i}.png").write_bytes((root / "b/000.png").read_bytes())
    assert "'b' (2)" in error_of(root)


def test_two_images_of_a_class_are_enough_when_test_is_given(tmp_path: Path) -> None:
    folder(tmp_path / "train", a=2, b=2)
    noise(tmp_path / "test/a/1.png", 9001)
    dataset, _ = load_dataset(tmp_path)
    assert part_counts(dataset)["val"] == {0: 1, 1: 1}


def test_a_test_class_that_is_not_in_train_is_named(tmp_path: Path) -> None:
    folder(tmp_path / "train", cats=5, dogs=5)
    noise(tmp_path / "test/Cats/1.png", 9001)
    assert "class 'Cats' is in the test part" in error_of(tmp_path)


def test_splits_without_train_are_an_error(tmp_path: Path) -> None:
    folder(tmp_path / "val", a=5, b=5)
    noise(tmp_path / "test/a/1.png", 9001)
    assert "has no usable train images, only test, val" in error_of(tmp_path)


def test_equal_targets_are_an_error(tmp_path: Path) -> None:
    path = listed(tmp_path, [f"{i}.png,0.5" for i in range(12)])
    assert "all targets in" in error_of(path)


def test_too_few_values_are_an_error(tmp_path: Path) -> None:
    path = listed(tmp_path, [f"{i}.png,{i}.5" for i in range(5)])
    assert "regression needs at least 10" in error_of(path)


def test_every_image_with_the_same_labels_is_an_error(tmp_path: Path) -> None:
    path = listed(tmp_path, [f"{i}.png,x|y" for i in range(12)])
    assert "one class only" not in error_of(path)
    assert "the same labels" in error_of(path)


def test_the_public_names_are_exported() -> None:
    import tlauto.data

    assert all(hasattr(tlauto.data, name) for name in tlauto.data.__all__)
    assert {Dataset, DoctorReport, Item, RawDataset} <= {getattr(tlauto.data, n) for n in tlauto.data.__all__}
