"""`tlauto doctor` and `tlauto demo-data`, as people and programs call them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tlauto.cli.demo_data import command as demo_data
from tlauto.cli.doctor import command as doctor
from tlauto.data import load_dataset
from tlauto.data.demo import MOST_PER_CLASS, write_digits
from tlauto.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLAUTO_CACHE", str(tmp_path / "cache"))


def run(*args: object) -> Result:
    return CliRunner().invoke(doctor, [str(arg) for arg in args])


def test_a_healthy_folder_exits_0_and_names_the_next_command(patches: Callable[..., Path]) -> None:
    root = patches(per_class=12, classes=3)
    result = run(root)
    assert result.exit_code == 0
    assert "36 usable of 36 (train 24, val 6, test 6 held out)" in _flat(result.output)
    assert "3: blue 12, green 12, red 12" in result.output
    assert "yes; next: tlauto search" in _flat(result.output)
    assert "warning" not in result.output


def test_the_report_keeps_within_80_columns(patches: Callable[..., Path]) -> None:
    root = patches(per_class=5, classes=2, name="a-very-long-folder-name-" * 3)
    (root / "red" / ("x" * 120 + ".jpg")).write_bytes(b"")
    result = run(root)
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80


def test_warnings_exit_0_and_name_every_unreadable_file(patches: Callable[..., Path]) -> None:
    root = patches(per_class=12, classes=2)
    (root / "red/[bold]broken.jpg").write_text("not an image")
    result = run(root)
    assert result.exit_code == 0
    assert "red/[bold]broken.jpg: text, not an image" in _flat(result.output)
    assert "yes, with warnings" in result.output


def test_an_unusable_folder_exits_1_after_the_report(patches: Callable[..., Path]) -> None:
    root = patches(per_class=5, classes=1)
    result = run(root)
    assert result.exit_code == 1
    assert isinstance(result.exception, DataError)
    assert "5 usable of 5" in result.output
    assert "one class only" in str(result.exception)


def test_a_missing_folder_exits_1(tmp_path: Path) -> None:
    result = run(tmp_path / "nowhere")
    assert result.exit_code == 1
    assert isinstance(result.exception, DataError)


def test_json_says_whether_it_is_usable(patches: Callable[..., Path]) -> None:
    root = patches(per_class=5, classes=2)
    result = run(root, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["usable"] is True and data["problem"] is None
    assert data["split"] == {"train": 6, "val": 2, "test": 2}
    assert data["fingerprint"] == load_dataset(root)[0].fingerprint
    (root / "red").rename(root / ".red")
    result = run(root, "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 1
    assert data["usable"] is False and "one class only" in data["problem"]


def test_leaks_can_be_accepted(patches: Callable[..., Path], tmp_path: Path) -> None:
    patches(per_class=5, classes=2, name="data/train")
    patches(per_class=3, classes=2, name="data/test")
    assert run(tmp_path / "data").exit_code == 1
    assert run(tmp_path / "data", "--allow-leaks").exit_code == 0


def test_columns_and_task_reach_the_reader(patches: Callable[..., Path]) -> None:
    root = patches(per_class=8, classes=2)
    lines = [f"{p.relative_to(root)},{p.stem},{i},{i % 5}" for i, p in enumerate(sorted(root.rglob("*.png")))]
    manifest = root.parent / "patches" / "data.csv"
    manifest.write_text("photo,name,age,who\n" + "\n".join(lines) + "\n")
    result = run(manifest, "--label-column", "age", "--group-column", "who", "--task", "regression")
    assert result.exit_code == 0, result.exception
    assert "(manifest, regression)" in _flat(result.output)


def test_file_names_that_are_not_utf8_can_be_printed(patches: Callable[..., Path]) -> None:
    root = patches(per_class=5, classes=2)
    Path(os.fsdecode(os.fsencode(root / "red") + b"/\xff.jpg")).write_bytes(b"")
    result = run(root)
    assert result.exit_code == 0
    assert "empty file (0 bytes)" in result.output
    assert run(root, "--json").exit_code == 0


def test_the_command_line_prints_one_error_line_and_no_traceback(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tlauto", "doctor", str(tmp_path / "nowhere")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no dataset at") and result.stderr.count("\n") == 1


# --- demo data -------------------------------------------------------------------------------------


def test_demo_data_is_a_healthy_dataset_of_ten_classes(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo_data, [str(tmp_path / "digits"), "--per-class", "12"])
    assert result.exit_code == 0
    assert result.output.startswith("120 images of 10 classes")
    dataset, report = load_dataset(tmp_path / "digits")
    assert dataset.classes == tuple("0123456789")
    assert report.warnings == ()
    assert report.sides == (64, 64, 64)


def test_demo_data_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert write_digits(tmp_path / name, per_class=3) == 30
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n).rglob("*.png")} for n in ("one", "two"))
    assert one == two and len(one) == 30


def test_demo_data_already_there_is_left_and_other_files_are_refused(tmp_path: Path) -> None:
    write_digits(tmp_path, per_class=2)
    assert write_digits(tmp_path, per_class=2) == 20
    with pytest.raises(ConfigError, match="holds other files, such as 0/"):
        write_digits(tmp_path, per_class=1)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"mine\.txt; choose an empty or new folder"):
        write_digits(tmp_path, per_class=2)


def test_demo_data_in_an_impossible_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file; choose a folder"):
        write_digits(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot write to"):
        write_digits(tmp_path / "file" / "below")


@pytest.mark.parametrize("per_class", [0, MOST_PER_CLASS + 1])
def test_more_demo_images_than_there_are_is_refused(tmp_path: Path, per_class: int) -> None:
    with pytest.raises(ConfigError, match="outside 1 to 174"):
        write_digits(tmp_path, per_class=per_class)
    assert CliRunner().invoke(demo_data, [str(tmp_path), "--per-class", str(per_class)]).exit_code == 2


def _flat(output: str) -> str:
    """The output without the line breaks of a narrow terminal."""
    return " ".join(output.split())
