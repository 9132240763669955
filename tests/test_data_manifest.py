"""CSV, TSV and JSONL manifests: columns, tasks, splits, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tlauto.data import RawDataset, read
from tlauto.errors import DataError


def manifest(root: Path, text: str, *, name: str = "data.csv", images: str = "a b c d e") -> Path:
    """A manifest beside images/a.png … (never opened by readers)."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for image in images.split():
        (root / "images" / f"{image}.png").write_bytes(b"")
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def rows(*labels: object, header: str = "path,label") -> str:
    lines = [f"images/{name}.png,{label}" for name, label in zip("abcde", labels, strict=False)]
    return "\n".join([header, *lines]) + "\n"


def labels(raw: RawDataset) -> list[object]:
    return [record.label for record in raw.records]


def error_of(path: Path, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_csv_of_names_is_multiclass(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, rows("cat", " dog ", "cat")))
    assert (raw.kind, raw.task, raw.root) == ("manifest", "multiclass", str(tmp_path))
    assert labels(raw) == ["cat", "dog", "cat"]
    assert raw.records[0].path == "images/a.png"


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_and_a_byte_order_mark_are_understood(tmp_path: Path, delimiter: str) -> None:
    path = manifest(tmp_path, "\ufeff" + rows("cat", "dog").replace(",", delimiter), name="d.tsv")
    assert labels(read(path)) == ["cat", "dog"]


def test_quoted_cells_blank_lines_and_windows_line_ends_are_understood(tmp_path: Path) -> None:
    text = 'path,label\r\n\r\n"images/a.png","cat, black"\r\nimages/b.png,dog\r\n,\r\n'
    assert labels(read(manifest(tmp_path, text))) == ["cat, black", "dog"]


def test_labels_joined_by_a_bar_are_multilabel(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, rows("cat|dog", "cat", "", "dog | cat|")))
    assert raw.task == "multilabel"
    assert labels(raw) == [("cat", "dog"), ("cat",), (), ("cat", "dog")]


def test_fractions_are_regression(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, rows("0.5", "1", "-2e-3")))
    assert raw.task == "regression"
    assert labels(raw) == [0.5, 1.0, -0.002]


def test_few_whole_numbers_are_classes_and_say_so(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, rows(0, 1, 0, 1)))
    assert raw.task == "multiclass"
    assert any("--task regression" in note for note in raw.notes)


def test_many_whole_numbers_are_values_and_say_so(tmp_path: Path) -> None:
    names = [f"i{n}" for n in range(60)]
    text = "path,age\n" + "".join(f"images/{name}.png,{n}\n" for n, name in enumerate(names))
    raw = read(manifest(tmp_path, text, images=" ".join(names)))
    assert raw.task == "regression"
    assert any("--task multiclass" in note for note in raw.notes)


def test_the_task_can_be_overridden(tmp_path: Path) -> None:
    path = manifest(tmp_path, rows(0, 1, 2))
    assert labels(read(path, task="regression")) == [0.0, 1.0, 2.0]
    assert labels(read(path, task="multilabel")) == [("0",), ("1",), ("2",)]
    assert labels(read(manifest(tmp_path, rows("a|b", "c")), task="multiclass")) == ["a|b", "c"]


def test_json_lines_are_read_with_lists_and_numbers(tmp_path: Path) -> None:
    lines = [{"path": "images/a.png", "label": ["x", "y"]}, {"path": "images/b.png", "label": []}]
    raw = read(manifest(tmp_path, "\n".join(map(json.dumps, lines)), name="d.jsonl"))
    assert raw.task == "multilabel"
    assert labels(raw) == [("x", "y"), ()]
    lines = [{"image": "images/a.png", "target": 0.25}, {"image": "images/b.png", "target": 3}]
    assert labels(read(manifest(tmp_path, "\n".join(map(json.dumps, lines)), name="d.jsonl"))) == [0.25, 3.0]


def test_a_split_column_is_kept(tmp_path: Path) -> None:
    text = "path,label,split\nimages/a.png,x,train\nimages/b.png,y,Validation\nimages/c.png,x,TEST\n"
    assert [record.split for record in read(manifest(tmp_path, text)).records] == ["train", "val", "test"]


def test_a_group_column_is_kept(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, "path,label,who\nimages/a.png,x,1\nimages/b.png,y,2\n"), group_column="who")
    assert [record.group for record in raw.records] == ["1", "2"]
    assert labels(raw) == ["x", "y"]


def test_a_folder_with_one_manifest_is_read_through_it(tmp_path: Path) -> None:
    manifest(tmp_path, rows("x", "y"))
    assert read(tmp_path).kind == "manifest"


def test_a_folder_with_train_and_test_manifests_keeps_the_split(tmp_path: Path) -> None:
    manifest(tmp_path, rows("x", "y"), name="train.csv")
    manifest(tmp_path, "path,label\nimages/e.png,x\n", name="test.csv")
    manifest(tmp_path, rows("x"), name="notes.csv")
    raw = read(tmp_path)
    assert [record.split for record in raw.records] == ["train", "train", "test"]


def test_flat_split_folders_are_read_through_their_manifest(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "1.png").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("path,label,split\ntrain/1.png,x,train\ntest/1.png,y,test\n")
    assert [record.split for record in read(tmp_path).records] == ["test", "train"]


@pytest.mark.parametrize("column", ["image", "Filename", "FILE", "filepath", "image_path"])
def test_path_columns_are_found_by_name(tmp_path: Path, column: str) -> None:
    raw = read(manifest(tmp_path, rows("x", "y", header=f"{column},label")))
    assert raw.records[0].path == "images/a.png"


def test_path_and_label_columns_of_other_names_are_found_by_content(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, rows("x", "y", header="photo,species")))
    assert labels(raw) == ["x", "y"]
    assert raw.notes[0] == "images from column 'photo', labels from column 'species'"


def test_columns_can_be_named(tmp_path: Path) -> None:
    text = "path,photo,label,kind\nx,images/a.png,1,u\ny,images/b.png,2,v\n"
    raw = read(manifest(tmp_path, text), path_column="photo", label_column="kind")
    assert labels(raw) == ["u", "v"]


def test_absolute_paths_and_paths_outside_are_kept(tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere.png"
    outside.write_bytes(b"")
    text = f"path,label\n{outside},x\n../elsewhere2.png,y\nimages/../images/a.png,z\n"
    (tmp_path / "elsewhere2.png").write_bytes(b"")
    raw = read(manifest(tmp_path / "d", text))
    assert {record.path for record in raw.records} == {
        str(outside), str(tmp_path / "elsewhere2.png"), "images/a.png",
    }  # fmt: skip


def test_paths_written_on_windows_are_understood(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, "path,label\nimages\\a.png,x\nimages\\b.png,y\n"))
    assert raw.records[0].path == "images/a.png"


def test_repeated_rows_count_once_and_are_noted(tmp_path: Path) -> None:
    raw = read(manifest(tmp_path, rows("x", "y") + "images/a.png,x\n"))
    assert len(raw.records) == 2
    assert "1 repeated row counted once" in raw.notes


# --- bad manifests ---------------------------------------------------------------------------------

BAD = {
    "empty file": ("", "is empty; it needs a header line"),
    "only blank lines": ("\n \n", "is empty"),
    "header without rows": ("path,label\n", "has a header and no rows"),
    "no header": ("images/a.png,x\nimages/b.png,y\n", "has no header: its first line is 'images/a.png,x'"),
    "no label column": ("path\nimages/a.png\n", "has no label column, only path; add one"),
    "several label columns": ("path,size,kind\nimages/a.png,1,x\n", "name it with --label-column"),
    "no path column": ("text,label\nhello,x\n", "no column of image paths; name it with --path-column"),
    "several path columns": (
        "path,image,label\nimages/a.png,images/b.png,x\n",
        "several columns that may hold paths",
    ),
    "two columns of one name": ("path,label,label\nimages/a.png,x,y\n", "two columns named 'label'"),
    "too many cells": ("path,label\nimages/a.png,x,y\n", "data.csv line 2"),
    "empty label": ("path,label\nimages/a.png,x\nimages/b.png,\n", "data.csv line 3: the label is empty"),
    "empty path": ("path,label\nimages/a.png,x\n,y\n", "data.csv line 3: column 'path' is empty"),
    "missing file": (
        "path,label\nimages/a.png,x\nimages/gone.png,y\n",
        "1 of 2 listed images not found in",
    ),
    "missing folder": ("path,label\na.png,x\nb.png,y\n", "write it as images/a.png"),
    "missing suffix": ("path,label\na,x\nb,y\n", "write it as images/a.png"),
    "absurdly long path": (f"path,label\n{'x' * 5000}.png,x\n", "not found"),
    "unknown split": ("path,label,split\nimages/a.png,x,holdout\n", "the split is 'holdout'; write train"),
    "missing split": ("path,label,split\nimages/a.png,x,\n", "the split is ''; write train"),
    "contradiction": (
        "path,label\nimages/a.png,x\nimages/a.png,y\n",
        "'images/a.png' is listed twice with different labels (data.csv line 2 and data.csv line 3)",
    ),
    "in two splits": (
        "path,label,split\nimages/a.png,x,train\nimages/a.png,x,test\n",
        "is listed twice with different splits",
    ),
    "one bad number among measurements": (
        rows("0.5", "0.25", "1.5", "0.75", "n/a"),
        "data.csv line 6: the target is 'n/a', which is not a finite number",
    ),
    "broken quotes": ('path,label\n"images/a.png"x,y\n', "line 2 is not CSV"),
    "zero byte": ("path,label\nimages/a\0.png,y\n", "data.csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_manifests_give_one_clear_sentence(tmp_path: Path, name: str) -> None:
    text, expected = BAD[name]
    assert expected in error_of(manifest(tmp_path, text))


@pytest.mark.parametrize("value", ["heavy", "", "nan", "inf", "1,5"])
def test_targets_that_are_no_numbers_are_named(tmp_path: Path, value: str) -> None:
    cell = f'"{value}"' if "," in value else value
    text = error_of(manifest(tmp_path, rows("1.5", cell)), task="regression")
    assert text.startswith("data.csv line 3: the target is")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = manifest(tmp_path, rows("x"))
    path.write_bytes("path,label\nimages/a.png,é\n".encode("latin-1"))
    assert "is not UTF-8 text (byte 24); save it again as UTF-8" in error_of(path)


def test_a_column_that_is_not_there_offers_the_closest(tmp_path: Path) -> None:
    path = manifest(tmp_path, rows("x", header="path,species"))
    text = error_of(path, label_column="speces")
    assert "has no column 'speces' for --label-column, only path, species; did you mean 'species'?" in text
    assert "for --path-column" in error_of(path, path_column="nope")
    assert "for --group-column" in error_of(path, group_column="nope")
    assert "must be different columns" in error_of(path, label_column="path")


@pytest.mark.parametrize(
    ("line", "expected"),
    [("{not json", "d.jsonl line 2"), ('["images/a.png", "x"]', "is not an object such as")],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, expected: str) -> None:
    text = json.dumps({"path": "images/a.png", "label": "x"}) + "\n" + line + "\n"
    assert expected in error_of(manifest(tmp_path, text, name="d.jsonl"))


def test_several_manifests_ask_for_one(tmp_path: Path) -> None:
    manifest(tmp_path, rows("x"), name="one.csv")
    manifest(tmp_path, rows("x"), name="two.csv")
    assert "several manifests (one.csv, two.csv); pass the path of one" in error_of(tmp_path)


def test_manifests_of_one_dataset_need_the_same_columns(tmp_path: Path) -> None:
    manifest(tmp_path, rows("x", "y"), name="train.csv")
    manifest(tmp_path, "path\nimages/e.png\n", name="test.csv")
    assert "test.csv' has no column 'label', only path" in error_of(tmp_path)


def test_a_list_is_no_single_class(tmp_path: Path) -> None:
    path = manifest(tmp_path, json.dumps({"path": "images/a.png", "label": ["x", "y"]}), name="d.jsonl")
    assert "use --task multilabel" in error_of(path, task="multiclass")


def test_the_mango_manifests_are_read_with_their_groups(bench_data: Path) -> None:
    raw = read(bench_data / "mangomass", group_column="fruit_id")
    assert (raw.task, len(raw.records)) == ("regression", 546)
    assert all(record.group for record in raw.records)
